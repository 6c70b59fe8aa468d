//! What clients were told, and what must hold after a crash.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvasir_types::Durability;

use super::Chunks;

/// What must be true of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expectation {
    /// It is there.
    Present,
    /// It is not.
    Absent,
    /// It is there, and right, or it is not.
    Either,
}

/// What was asked and acknowledged so far. Clones share it. A chunk may have many
/// writers at once, but whoever deletes it does nothing else with it meanwhile.
#[derive(Clone, Debug)]
pub struct Ledger(Arc<Mutex<State>>);

#[derive(Clone, Debug)]
struct State {
    entries: Vec<Entry>,
    now: u64,
}

/// A ledger as of one moment.
#[derive(Clone, Debug)]
pub struct Snapshot(Vec<Entry>);

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    told: Told,
    puts_begun: u64,
    puts_ended: u64,
    deletes_begun: u64,
    pending: u64,
    /// When something last began or ended.
    last_use: u64,
    /// When the last acknowledged put began, in this life of the target.
    put_began: Option<u64>,
    /// It was put into memory, in this life: it may move to disk at any time.
    may_move: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Told {
    /// Never stored, or deleted.
    #[default]
    Gone,
    Stored,
    Nothing,
}

/// An operation under way. One that is dropped never ended.
#[derive(Debug)]
#[must_use = "what never ends is never acknowledged"]
pub(super) struct Pending {
    number: u32,
    kind: Kind,
    begun: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Put(Durability),
    Get,
    Delete,
}

impl Ledger {
    /// Of `count` chunks that were never stored.
    pub fn new(count: u32) -> Self {
        Self(Arc::new(Mutex::new(State {
            entries: vec![Entry::default(); count as usize],
            now: 0,
        })))
    }

    pub(super) fn begin(&self, number: u32, kind: Kind) -> Pending {
        let mut state = self.lock();
        let (entry, begun) = state.touch(number);
        entry.pending += 1;
        match kind {
            Kind::Put(durability) => {
                entry.puts_begun += 1;
                entry.may_move |= durability == Durability::Memory;
            }
            Kind::Get => (),
            Kind::Delete => {
                entry.deletes_begun += 1;
                entry.told = Told::Nothing;
            }
        }
        Pending {
            number,
            kind,
            begun,
        }
    }

    pub(super) fn end(&self, pending: Pending, acknowledged: bool) {
        let mut state = self.lock();
        let (entry, _) = state.touch(pending.number);
        entry.pending -= 1;
        match pending.kind {
            Kind::Put(_) => {
                entry.puts_ended += 1;
                if acknowledged {
                    entry.told = Told::Stored;
                    entry.put_began = Some(pending.begun);
                } else if entry.told == Told::Gone {
                    entry.told = Told::Nothing;
                }
            }
            Kind::Get => (),
            Kind::Delete => {
                if acknowledged {
                    entry.told = Told::Gone;
                }
            }
        }
    }

    /// What is acknowledged now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.lock().entries.clone())
    }

    /// What must hold of a target that ended after `snapshot` and before now. Where
    /// there is a `capacity`, chunks may have been evicted; those used last may not (the
    /// policy is `lru`).
    pub fn expectations(
        &self,
        snapshot: &Snapshot,
        chunks: &Chunks,
        capacity: Option<u64>,
    ) -> Vec<Expectation> {
        let state = self.lock();
        // Chunks used since, those in use, and those on their way from memory are all
        // that can have taken its place. Of each there may be two copies, one of them held by a reader.
        let used_since = |since: u64| -> u64 {
            (0..)
                .zip(&state.entries)
                .filter(|(_, entry)| entry.last_use >= since || entry.pending > 0 || entry.may_move)
                .map(|(number, _)| 2 * chunks.frame_bytes(number))
                .sum()
        };
        let kept = |then: &Entry| match (capacity, then.put_began) {
            (None, _) => true,
            (Some(capacity), Some(since)) => used_since(since) <= capacity,
            (Some(_), None) => false,
        };
        snapshot
            .0
            .iter()
            .zip(&state.entries)
            .map(|(then, now)| {
                let untouched = then.deletes_begun == now.deletes_begun;
                let unwritten = then.puts_ended == now.puts_begun;
                match then.told {
                    Told::Stored if untouched && kept(then) => Expectation::Present,
                    Told::Gone if unwritten => Expectation::Absent,
                    _ => Expectation::Either,
                }
            })
            .collect()
    }

    /// Starts anew with what a check that expected `expected` found. That something
    /// was not found promises nothing; that it was deleted does.
    pub fn restart(&self, expected: &[Expectation], found: &[bool]) {
        let mut state = self.lock();
        let checked = expected.iter().zip(found);
        for (entry, (expected, found)) in state.entries.iter_mut().zip(checked) {
            let told = match (found, expected) {
                (true, _) => Told::Stored,
                (false, Expectation::Absent) => Told::Gone,
                (false, _) => Told::Nothing,
            };
            *entry = Entry {
                told,
                ..Entry::default()
            };
        }
    }

    /// Whether a chunk's last acknowledged put was not followed by a deletion.
    pub fn is_stored(&self, number: u32) -> bool {
        let state = self.lock();
        let entry = state.entries.get(number as usize);
        entry.is_some_and(|entry| entry.told == Told::Stored)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn touch(&mut self, number: u32) -> (&mut Entry, u64) {
        self.now += 1;
        let entry = &mut self.entries[number as usize];
        entry.last_use = self.now;
        (entry, self.now)
    }
}
