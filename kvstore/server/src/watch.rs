//! Tells listeners what changed.
//!
//! Subscribe first, then take the snapshot, then skip the events that it contains:
//! no change falls between the two. A listener that lags gets a new snapshot.

use std::sync::Arc;

use futures::stream::{BoxStream, StreamExt as _};
use kvasir_proto::{MAX_KEYS, convert, v1};
use kvasir_store::{Event, EventKind, Snapshot};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use v1::watch_response::Event as WireEvent;

use crate::admission::shutting_down;
use crate::service::Shared;
use crate::wire;

type Messages = BoxStream<'static, Result<v1::WatchResponse, Status>>;

/// Starts a watch; it ends with its receiver, or with the server.
pub(crate) fn serve(shared: Arc<Shared>) -> Result<Messages, Status> {
    if shared.admission.draining.is_cancelled() {
        return Err(shutting_down());
    }
    let (sender, receiver) = mpsc::channel(SEND_QUEUE);
    tokio::spawn(async move {
        tokio::select! {
            () = shared.admission.draining.cancelled() => {
                // A receiver that reads nothing is not waited for.
                let _ = sender.try_send(Err(shutting_down()));
            }
            _ = follow(&shared, &sender) => (),
        }
    });
    Ok(ReceiverStream::new(receiver).boxed())
}

/// The receiver is gone, or the store is.
struct Over;

type Sender = mpsc::Sender<Result<v1::WatchResponse, Status>>;

async fn follow(shared: &Shared, sender: &Sender) -> Result<(), Over> {
    let mut events = shared.store.events();
    loop {
        let snapshot = shared.store.snapshot();
        let contained = snapshot.sequence;
        for part in parts(snapshot) {
            send(sender, part).await?;
        }
        loop {
            match events.recv().await {
                Ok(event) if event.sequence <= contained => (),
                Ok(event) => send(sender, change(&event)).await?,
                Err(RecvError::Lagged(missed)) => {
                    tracing::debug!(missed, "a watcher lags and gets a snapshot");
                    break;
                }
                Err(RecvError::Closed) => return Err(Over),
            }
        }
    }
}

async fn send(sender: &Sender, message: v1::WatchResponse) -> Result<(), Over> {
    sender.send(Ok(message)).await.map_err(|_| Over)
}

/// At least one part, even of an empty store.
fn parts(snapshot: Snapshot) -> impl Iterator<Item = v1::WatchResponse> {
    let Snapshot {
        epoch,
        sequence,
        copies,
    } = snapshot;
    let count = copies.len().div_ceil(MAX_KEYS).max(1);
    (0..count).map(move |index| {
        let start = index * MAX_KEYS;
        let end = copies.len().min(start + MAX_KEYS);
        let part = copies.get(start..end).unwrap_or(&[]);
        v1::WatchResponse {
            epoch,
            sequence,
            event: Some(WireEvent::Snapshot(v1::Snapshot {
                keys: part
                    .iter()
                    .map(|(key, _)| convert::key_to_wire(key))
                    .collect(),
                tiers: part
                    .iter()
                    .map(|(_, tier)| wire::tier(*tier).into())
                    .collect(),
                more: index + 1 < count,
            })),
        }
    })
}

fn change(event: &Event) -> v1::WatchResponse {
    v1::WatchResponse {
        epoch: event.epoch,
        sequence: event.sequence,
        event: Some(WireEvent::Change(v1::Change {
            kind: match event.kind {
                EventKind::Stored => v1::change::Kind::Stored,
                EventKind::Removed => v1::change::Kind::Removed,
            }
            .into(),
            key: convert::key_to_wire(&event.key),
            tier: wire::tier(event.tier).into(),
        })),
    }
}

/// Messages between the events and the socket; the events' own queue is the longer
/// one.
const SEND_QUEUE: usize = 16;
