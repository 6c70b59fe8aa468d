//! Lists chunks, a page at a time.
//!
//! Chunks that come or go meanwhile may be in the listing or not.

use std::sync::Arc;

use kvasir_proto::v1;
use kvasir_types::ChunkKey;
use tonic::Status;

use crate::outgoing::{self, Messages, Over, Sender};
use crate::service::Shared;
use crate::wire;

/// Starts a listing of at most `limit` chunks with keys after `after`.
pub(crate) fn serve(
    shared: Arc<Shared>,
    after: Option<ChunkKey>,
    limit: usize,
) -> Result<Messages<v1::ListResponse>, Status> {
    outgoing::serve(shared, move |sender| fill(sender, after, limit))
}

async fn fill(
    sender: Sender<v1::ListResponse>,
    mut after: Option<ChunkKey>,
    mut left: usize,
) -> Result<(), Over> {
    while left > 0 {
        let size = left.min(PAGE);
        let store = sender.shared().store.clone();
        let page = tokio::task::spawn_blocking(move || store.list(after.as_ref(), size)).await;
        let Ok(page) = page else {
            return sender
                .send(Err(Status::internal("the listing failed")))
                .await;
        };
        for chunk in &page {
            sender.send(Ok(wire::listed(chunk))).await?;
        }
        if page.len() < size {
            break;
        }
        left -= size;
        after = page.last().map(|chunk| chunk.key);
    }
    Ok(())
}

/// Chunks that are looked up at once: some 3 MiB. Every page looks at the whole
/// index.
const PAGE: usize = 16_384;
