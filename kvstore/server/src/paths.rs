//! Says where the data plane is.

use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use kvasir_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::service::Shared;

type Messages = BoxStream<'static, Result<v1::PathsResponse, Status>>;

/// Says it at once, and that there is none any more when shutdown begins. The stream lasts
/// until the last transfer has ended: it shows clients that the daemon is there.
pub(crate) fn serve(shared: Arc<Shared>) -> Result<Messages, Status> {
    let permit = shared.admission.client()?;
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(async move {
        let _permit = permit;
        let admission = &shared.admission;
        let follow = async {
            let paths = shared.paths.get().cloned().unwrap_or_default();
            sender.send(Ok(paths)).await?;
            admission.draining.cancelled().await;
            sender.send(Ok(v1::PathsResponse::default())).await?;
            tokio::select! {
                () = admission.idle() => {}
                () = admission.aborting.cancelled() => {}
            }
            Ok::<(), mpsc::error::SendError<_>>(())
        };
        tokio::select! {
            // Where it fails, nobody listens any more.
            _ = follow => {}
            () = sender.closed() => {}
        }
    });
    Ok(ReceiverStream::new(receiver).boxed())
}
