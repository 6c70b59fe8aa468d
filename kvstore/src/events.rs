//! What changed, in order: the feed behind `Watch`.
//!
//! Sequence numbers are given while the index that changed is locked, so the order
//! of events is the order of changes. A watcher that falls behind the bounded
//! channel sees a gap, takes a [`Snapshot`], and skips events up to its sequence.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvasir_types::ChunkKey;
use tokio::sync::broadcast;

use crate::tier::TierKind;

/// A change of one tier's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Names this run of the store; another epoch means that everything before is void.
    pub epoch: u64,
    /// Counts the events of an epoch from 1, without gaps.
    pub sequence: u64,
    /// What happened.
    pub kind: EventKind,
    /// To which chunk.
    pub key: ChunkKey,
    /// Where.
    pub tier: TierKind,
}

/// What happened to a chunk in a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// It can be read there from now on.
    Stored,
    /// It cannot any more.
    Removed,
}

/// What is stored where. Gathered while changes go on, of which it may hold any after
/// `sequence`; the events after that, applied in their order, lead to what is true, since
/// each says where a copy is and not what changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Epoch of the sequence.
    pub epoch: u64,
    /// The last event that is contained for certain; 0 before the first.
    pub sequence: u64,
    /// Every copy: a chunk in two tiers is listed twice.
    pub copies: Vec<(ChunkKey, TierKind)>,
}

/// Where the tiers of one store report changes.
#[derive(Clone, Debug)]
pub struct EventLog(Arc<Log>);

#[derive(Debug)]
struct Log {
    epoch: u64,
    sequence: Mutex<u64>,
    sender: broadcast::Sender<Event>,
}

impl EventLog {
    /// Events kept for a watcher that lags; older ones are dropped, and it must
    /// take a snapshot.
    pub const CAPACITY: usize = 8192;

    /// A log with a random epoch.
    pub fn new() -> Self {
        Self(Arc::new(Log {
            // Hashing nothing under fresh random keys is a random number.
            epoch: RandomState::new().hash_one(()),
            sequence: Mutex::new(0),
            sender: broadcast::Sender::new(Self::CAPACITY),
        }))
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.0.sender.subscribe()
    }

    /// Reports a change. The caller holds the lock of the index that changed.
    pub(crate) fn publish(&self, kind: EventKind, key: ChunkKey, tier: TierKind) {
        let mut sequence = self.lock();
        *sequence += 1;
        // No watcher is no error.
        let _ = self.0.sender.send(Event {
            epoch: self.0.epoch,
            sequence: *sequence,
            kind,
            key,
            tier,
        });
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.0.epoch
    }

    /// The last sequence number. Consistent with an index that is locked meanwhile.
    pub(crate) fn sequence(&self) -> u64 {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.0
            .sequence
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for EventLog {
    fn default() -> Self {
        Self::new()
    }
}
