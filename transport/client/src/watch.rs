//! Changes of a daemon's chunks, as they happen.

use kvasir_proto::{convert, v1};
use kvasir_types::ChunkKey;
use tonic::Streaming;

use crate::chunk::check_count;
use crate::error::{CallError, Origin, ProtocolError, broken};
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
#[derive(Debug)]
pub struct Watch {
    pub(crate) origin: Origin,
    pub(crate) stream: Streaming<v1::WatchResponse>,
}

impl Watch {
    /// Waits for the next event; `None` when the daemon ends the watch.
    ///
    /// # Errors
    /// The daemon went away. Watch again: the new watch starts with a snapshot.
    pub async fn next(&mut self) -> Result<Option<WatchEvent>, CallError> {
        match self.stream.message().await {
            Ok(Some(wire)) => parse(wire).map(Some),
            Ok(None) => Ok(None),
            Err(status) => Err(self.origin.error(status)),
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
