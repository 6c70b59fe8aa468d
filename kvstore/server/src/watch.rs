//! Tells listeners what changed.
//!
//! Subscribe first, then take the snapshot, then skip the events that it contains:
//! no change falls between the two. A listener that lags gets a new snapshot.

use std::sync::Arc;

use kvasir_proto::{MAX_KEYS, convert, v1};
use kvasir_store::{Event, EventKind, Snapshot};
use tokio::sync::broadcast::error::RecvError;
use tonic::Status;
use v1::watch_response::Event as WireEvent;

use crate::outgoing::{self, Messages, Over, Sender};
use crate::service::Shared;
use crate::wire;

/// Starts a watch; it ends with its receiver, or with the server.
pub(crate) fn serve(shared: Arc<Shared>) -> Result<Messages<v1::WatchResponse>, Status> {
    outgoing::serve(shared, follow)
}

async fn follow(sender: Sender<v1::WatchResponse>) -> Result<(), Over> {
    let store = &sender.shared().store;
    let mut events = store.events();
    loop {
        let snapshot = store.snapshot();
        let contained = snapshot.sequence;
        for part in parts(snapshot) {
            sender.send(Ok(part)).await?;
        }
        loop {
            match events.recv().await {
                Ok(event) if event.sequence <= contained => (),
                Ok(event) => sender.send(Ok(change(&event))).await?,
                Err(RecvError::Lagged(missed)) => {
                    tracing::debug!(missed, "a watcher lags and gets a snapshot");
                    break;
                }
                Err(RecvError::Closed) => return Err(Over),
            }
        }
    }
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
