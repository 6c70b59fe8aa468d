//! Changes of a daemon's chunks, as they happen.

use kvasir_proto::{convert, v1};
use kvasir_types::ChunkKey;
use tokio::sync::mpsc;
use tonic::Streaming;

use crate::chunk::check_count;
use crate::client::Client;
use crate::error::{CallError, ProtocolError, broken};
use crate::stats::Tier;

/// One message of a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// Changes at every start of the daemon.
    pub epoch: u64,
    /// Position in the order of changes; grows by one with each change.
    pub sequence: u64,
    /// What happened.
    pub change: WatchedChange,
}

/// What a [`WatchEvent`] reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchedChange {
    /// What is stored where at [`WatchEvent::sequence`]; what a listener knew before
    /// its first part is void.
    Snapshot {
        /// Copies in this part; a chunk in two tiers has two.
        copies: Vec<(ChunkKey, Tier)>,
        /// More parts of the same snapshot follow.
        more: bool,
    },
    /// A tier holds a chunk that it did not hold before.
    Stored {
        /// The chunk.
        key: ChunkKey,
        /// The tier.
        tier: Tier,
    },
    /// A tier no longer holds a chunk.
    Removed {
        /// The chunk.
        key: ChunkKey,
        /// The tier.
        tier: Tier,
    },
}

/// A watch under way. It has no deadline: it lives until it is dropped or the
/// daemon goes away.
///
/// A listener that falls 1024 changes behind gets a new snapshot instead of
/// them.
#[derive(Debug)]
pub struct Watch {
    events: mpsc::Receiver<Result<WatchEvent, CallError>>,
}

/// Changes that wait for a listener.
const QUEUE: usize = 1024;

impl Watch {
    /// Follows `stream`; `client` opens it anew when the listener is behind.
    pub(crate) fn follow(client: Client, stream: Streaming<v1::WatchResponse>) -> Self {
        let (sender, events) = mpsc::channel(QUEUE);
        tokio::spawn(follow(client, stream, sender));
        Self { events }
    }

    /// Waits for the next event; `None` when the daemon ends the watch.
    ///
    /// # Errors
    /// The daemon went away. Watch again: the new watch starts with a snapshot.
    pub async fn next(&mut self) -> Result<Option<WatchEvent>, CallError> {
        self.events.recv().await.transpose()
    }
}

/// Reads the stream whether or not anybody listens: thousands of small unread
/// messages would make HTTP/2 give up the connection, and every other call on it.
async fn follow(
    client: Client,
    mut stream: Streaming<v1::WatchResponse>,
    events: mpsc::Sender<Result<WatchEvent, CallError>>,
) {
    loop {
        let message = tokio::select! {
            () = events.closed() => return,
            message = stream.message() => message,
        };
        let event = match message {
            Ok(Some(wire)) => parse(wire),
            Ok(None) => return,
            Err(status) => Err(client.origin().error(status)),
        };
        let is_change = event
            .as_ref()
            .is_ok_and(|event| !matches!(event.change, WatchedChange::Snapshot { .. }));
        if !is_change {
            // All parts of a snapshot are delivered; there are few, and they are large.
            let last = event.is_err();
            if events.send(event).await.is_err() || last {
                return;
            }
        } else if let Err(refused) = events.try_send(event) {
            if matches!(refused, mpsc::error::TrySendError::Closed(_)) {
                return;
            }
            drop(stream);
            if events.reserve_many(QUEUE / 2).await.is_err() {
                return;
            }
            stream = match client.open_watch().await {
                Ok(stream) => stream,
                Err(error) => {
                    // A listener that left needs no error.
                    let _ = events.send(Err(error)).await;
                    return;
                }
            };
        }
    }
}

fn parse(wire: v1::WatchResponse) -> Result<WatchEvent, CallError> {
    use v1::watch_response::Event;
    let change = match wire.event.ok_or(ProtocolError::Empty)? {
        Event::Snapshot(snapshot) => snapshot_part(&snapshot)?,
        Event::Change(change) => {
            use v1::change::Kind;
            let key = convert::key("change.key", &change.key).map_err(broken)?;
            let tier = Tier::from_wire(change.tier()).ok_or(ProtocolError::Empty)?;
            match change.kind() {
                Kind::Stored => WatchedChange::Stored { key, tier },
                Kind::Removed => WatchedChange::Removed { key, tier },
                Kind::Unspecified => return Err(ProtocolError::Empty.into()),
            }
        }
    };
    Ok(WatchEvent {
        epoch: wire.epoch,
        sequence: wire.sequence,
        change,
    })
}

fn snapshot_part(part: &v1::Snapshot) -> Result<WatchedChange, CallError> {
    check_count(part.keys.len(), part.tiers.len())?;
    let mut copies = Vec::with_capacity(part.keys.len());
    for (key, tier) in part.keys.iter().zip(part.tiers()) {
        let key = convert::key("snapshot.keys", key).map_err(broken)?;
        // A tier that this version cannot name is left out.
        copies.extend(Tier::from_wire(tier).map(|tier| (key, tier)));
    }
    Ok(WatchedChange::Snapshot {
        copies,
        more: part.more,
    })
}
