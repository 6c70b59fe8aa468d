//! What clients did, and what they found.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvasir_client::{CallError, LostReason, Tier};
use kvasir_types::ChunkKey;

/// What must never be seen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A read gave other bytes, or another layout, than were stored.
    #[error("chunk {0}: a read gave other bytes than were stored")]
    Wrong(ChunkKey),
    /// A chunk that nobody stored, or one out of order.
    #[error("chunk {0}: never stored, or listed out of order")]
    Stray(ChunkKey),
    /// A put was acknowledged, but not as durable.
    #[error("chunk {0}: acknowledged without being durable")]
    Volatile(ChunkKey),
    /// A chunk was lost in the middle of a stream although the device works.
    #[error("chunk {key}: lost in the middle of a stream: {reason}")]
    Lost {
        /// The chunk.
        key: ChunkKey,
        /// What the daemon says.
        reason: LostReason,
    },
    /// A watch left changes out.
    #[error("a watch went from change {before} to {after}")]
    Gap {
        /// The sequence before.
        before: u64,
        /// The next one.
        after: u64,
    },
    /// A call failed for another reason than a full budget.
    #[error("{operation} failed")]
    Failed {
        /// The call.
        operation: &'static str,
        /// What happened.
        #[source]
        source: Box<CallError>,
    },
    /// A tier was charged for more than it may hold.
    #[error("the {tier} tier held {bytes} bytes of {capacity}")]
    OverCapacity {
        /// The tier.
        tier: Tier,
        /// Its bytes.
        bytes: u64,
        /// The limit.
        capacity: u64,
    },
    /// Copies failed a check although the device works.
    #[error("{copies} copies in the {tier} tier were corrupt")]
    Corrupt {
        /// The tier.
        tier: Tier,
        /// How many.
        copies: u64,
    },
    /// Something was still held after every client was gone.
    #[error("{leases} leases and {pins} pins outlived their holders")]
    Held {
        /// Chunks held.
        leases: u64,
        /// Pins that last.
        pins: u64,
    },
    /// The files take less space than the disk tier is charged for, or more than it may.
    #[error("segments take {allocated} bytes, {charged} are charged, {capacity} allowed")]
    Space {
        /// Bytes that they take.
        allocated: u64,
        /// Bytes charged, and a header a file.
        charged: u64,
        /// Bytes of the capacity, and a header a file.
        capacity: u64,
    },
    /// Too much resident memory.
    #[error("resident memory reached {bytes} of {limit} bytes")]
    Resident {
        /// The most.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Resident memory grew all the time.
    #[error("resident memory grew from {second} to {last} bytes")]
    Drift {
        /// Median of the second fifth.
        second: u64,
        /// Median of the last.
        last: u64,
    },
}

/// Counts by name, and violations. The first of these are kept.
#[derive(Debug, Default)]
pub struct Tally(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    counts: BTreeMap<&'static str, u64>,
    violations: Vec<Violation>,
}

impl Tally {
    pub(super) fn add(&self, name: &'static str, count: u64) {
        *self.lock().counts.entry(name).or_default() += count;
    }

    pub(super) fn violation(&self, violation: Violation) {
        let mut state = self.lock();
        *state.counts.entry("violations").or_default() += 1;
        if state.violations.len() < KEPT {
            state.violations.push(violation);
        }
    }

    /// Counts an error. Being asked to come back is none.
    pub(super) fn error(&self, operation: &'static str, error: CallError) {
        match error {
            CallError::Throttled { .. } => self.add("throttled", 1),
            source => self.violation(Violation::Failed {
                operation,
                source: Box::new(source),
            }),
        }
    }

    /// Everything counted.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.lock().counts.clone()
    }

    pub(super) fn violations(&self) -> Vec<Violation> {
        std::mem::take(&mut self.lock().violations)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const KEPT: usize = 20;
