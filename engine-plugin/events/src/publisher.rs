//! One engine: what it holds, and whether that is known.
//!
//! An engine numbers its batches from 0 and keeps the last ones, which it sends again when
//! asked. Its numbers say nothing about which of its lives they are from: a restarted engine
//! counts from 0 again, and may have come past the number that was seen last. So the numbers are
//! not believed without the batches: of those that were taken last, the contents are
//! remembered (a digest; batches carry a time, so no two lives' are the same), and an engine is
//! the one it was only if it has the same batch under the same number.
//!
//! Whoever drives this does no more than to pass on what comes, and to ask when told so:
//!
//! ```text
//! connected ──► Ask{from} ──► replayed* ──► replay_ended ──► (Ask | followed)
//! live*                  at any time while connected
//! check, now and then ──► Ask       a batch that was lost at the end is not missed otherwise
//! disconnected           what is known is kept, and not offered
//! ```
//!
//! An engine without a replay address is known from the next batch on, in part
//! ([`Standing::Partial`]); after a gap, everything before it is forgotten.

use std::collections::{BTreeMap, VecDeque};

use crate::hash::{self, Hash};
use crate::holdings::{Held, Holdings, Limits};
use crate::wire::{Batch, BlockHash, Event, Stored};

/// How well a publisher is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// Changes were missed, or it cannot be reached: nothing is offered.
    Behind,
    /// What is offered is there, and there may be more.
    Partial,
    /// What is offered is all that there is.
    Complete,
}

/// Have batches sent again, from this one on. Answers to what was asked before are not passed on
/// any more; and no answer is before all that has come by the connection for what is live, its
/// end included: the answer may be another life's, and what is live must not be mixed into that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The first number that is wanted.
    pub from: u64,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Batches that were taken.
    pub batches: u64,
    /// Batches that had been taken before.
    pub duplicates: u64,
    /// Times that batches were missing.
    pub gaps: u64,
    /// Times that the engine was another one than before.
    pub restarts: u64,
    /// Replays that were asked for.
    pub replays: u64,
    /// Batches that could not be read.
    pub malformed: u64,
    /// Events, and fields of events, that are not known here.
    pub unknown: u64,
}

/// One engine, as far as its messages tell.
#[derive(Debug)]
pub struct Publisher {
    limits: Limits,
    can_replay: bool,
    holdings: Holdings,
    phase: Phase,
    /// Whether every change since the engine's start, or since it cleared all, is known.
    whole: bool,
    /// The batches taken last, in order.
    recent: VecDeque<Mark>,
    /// Batches that came while others are sent again.
    held: BTreeMap<u64, Vec<u8>>,
    held_bytes: usize,
    /// Replays since a batch was taken last.
    vain: u32,
    none_hash: Hash,
    hashes_agree: Option<bool>,
    block_size: Option<u32>,
    rank: Option<u32>,
    counts: Counts,
}

/// A batch that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    sequence: u64,
    digest: u128,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not connected, or nobody answers.
    Away,
    /// Batches are sent again.
    Replaying(Replay),
    Following,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Replay {
    /// Whether what comes live waits for the end of it, and nothing is offered. A mere check
    /// changes nothing for anybody.
    holding: bool,
    /// Whether the engine is known to be the one that it was.
    known: bool,
    /// Whether another replay has to follow.
    again: bool,
    /// Whether the rest of this one is of no use.
    void: bool,
}

impl Publisher {
    /// Of an engine that is not connected yet. `can_replay`: it has a replay address;
    /// `none_hash`: what its hashes begin with, if they are `sha256_cbor`.
    pub const fn new(can_replay: bool, none_hash: Hash, limits: Limits) -> Self {
        Self {
            limits,
            can_replay,
            holdings: Holdings::new(limits),
            phase: Phase::Away,
            whole: false,
            recent: VecDeque::new(),
            held: BTreeMap::new(),
            held_bytes: 0,
            vain: 0,
            none_hash,
            hashes_agree: None,
            block_size: None,
            rank: None,
            counts: Counts {
                batches: 0,
                duplicates: 0,
                gaps: 0,
                restarts: 0,
                replays: 0,
                malformed: 0,
                unknown: 0,
            },
        }
    }

    /// A connection is there. Batches may have been missed before it, and the engine may be
    /// another one.
    pub fn connected(&mut self) -> Option<Ask> {
        self.drop_held();
        if self.can_replay {
            return Some(self.ask(true));
        }
        self.forget();
        self.phase = Phase::Following;
        None
    }

    /// The connection is gone.
    pub fn disconnected(&mut self) {
        self.drop_held();
        self.phase = Phase::Away;
    }

    /// Nobody answers what was asked. The engine's blocks are not offered until
    /// [`connected`](Self::connected) is called again and a replay ends.
    pub fn unanswered(&mut self) {
        self.disconnected();
    }

    /// Whether batches are still on their way: the engine is [`Standing::Complete`] or
    /// [`Standing::Partial`], and none is.
    pub fn check(&mut self) -> Option<Ask> {
        let due = self.can_replay && self.phase == Phase::Following;
        due.then(|| self.ask(false))
    }

    /// Takes a batch as it was published.
    pub fn live(&mut self, sequence: u64, payload: &[u8]) -> Option<Ask> {
        match self.phase {
            Phase::Away => None,
            Phase::Replaying(replay) if replay.holding => {
                self.hold(sequence, payload);
                None
            }
            _ => self.take(sequence, payload),
        }
    }

    /// Takes a batch that was sent again.
    pub fn replayed(&mut self, sequence: u64, payload: &[u8]) {
        let Phase::Replaying(mut replay) = self.phase else {
            return;
        };
        if replay.void {
            return;
        }
        let mark = Mark::of(sequence, payload);
        match self.remembered(sequence) {
            Some(known) if known == mark => {
                replay.known = true;
                self.counts.duplicates += 1;
            }
            // Another life's; what it has before this one is needed too.
            Some(_) => {
                self.restarted();
                replay = replay.again();
                replay.void = true;
            }
            None => match self.next() {
                None => {
                    self.whole = sequence == 0;
                    self.apply(mark, payload);
                    replay.known = true;
                }
                // From before what is remembered.
                Some(next) if sequence < next => self.counts.duplicates += 1,
                // It no longer has what was taken last: whether it is the same cannot be said,
                // and here begins what it has.
                Some(_) if !replay.known => {
                    self.counts.gaps += 1;
                    self.forget();
                    self.apply(mark, payload);
                    replay.known = true;
                }
                Some(next) if sequence == next => self.apply(mark, payload),
                Some(_) => replay = replay.again(),
            },
        }
        self.phase = Phase::Replaying(replay);
    }

    /// All that the engine has was sent again.
    pub fn replay_ended(&mut self) -> Option<Ask> {
        let Phase::Replaying(mut replay) = self.phase else {
            return None;
        };
        if !replay.known && self.next().is_some() {
            // It has not come as far as it had: it began anew.
            self.restarted();
            replay = replay.again();
        }
        if replay.again {
            if self.vain < VAIN {
                return Some(self.ask(true));
            }
            // It goes on losing what it sends; what it will publish can be followed.
            self.counts.gaps += 1;
            self.forget();
        } else if self.next().is_none() {
            // It has published nothing, so it holds nothing.
            self.whole = true;
        }
        self.phase = Phase::Following;
        while let Some((sequence, payload)) = self.held.pop_first() {
            self.held_bytes -= payload.len();
            if self
                .recent
                .front()
                .is_some_and(|first| sequence < first.sequence)
            {
                // The engine had so much to say meanwhile that it no longer keeps this one.
                self.counts.duplicates += 1;
                continue;
            }
            if let Some(ask) = self.take(sequence, &payload) {
                return Some(ask);
            }
        }
        None
    }

    /// Takes a batch that is next, or finds out why it is not.
    fn take(&mut self, sequence: u64, payload: &[u8]) -> Option<Ask> {
        let mark = Mark::of(sequence, payload);
        match self.next() {
            Some(next) if sequence == next => {
                self.apply(mark, payload);
                return None;
            }
            None if sequence == 0 => {}
            Some(next) if sequence < next => {
                if self.remembered(sequence) == Some(mark) {
                    self.counts.duplicates += 1;
                    return None;
                }
                self.restarted();
            }
            _ => self.counts.gaps += 1,
        }
        let first = sequence == 0 && self.recent.is_empty();
        if !first && self.can_replay && self.vain < VAIN {
            self.hold(sequence, payload);
            return Some(self.ask(true));
        }
        self.forget();
        self.whole = first;
        self.apply(mark, payload);
        None
    }

    fn apply(&mut self, mark: Mark, payload: &[u8]) {
        if self.recent.len() == MARKS {
            self.recent.pop_front();
        }
        self.recent.push_back(mark);
        self.vain = 0;
        self.counts.batches += 1;
        let batch = match Batch::decode(payload) {
            Ok(batch) => batch,
            Err(_) => {
                // What it changed is not known. It will not be another the next time.
                self.counts.malformed += 1;
                self.holdings.clear();
                self.whole = false;
                return;
            }
        };
        self.rank = batch.rank.or(self.rank);
        self.counts.unknown += u64::from(batch.unknown.events) + u64::from(batch.unknown.fields);
        for event in &batch.events {
            match event {
                Event::Stored(stored) => {
                    self.compare(stored);
                    self.holdings.store(stored);
                }
                Event::Removed(removed) => self.holdings.remove(removed),
                Event::Cleared => {
                    self.holdings.clear();
                    self.whole = true;
                }
            }
        }
    }

    /// Finds out how the engine hashes, from the first block of a prompt that needs no more to
    /// be told than its tokens.
    fn compare(&mut self, stored: &Stored) {
        let size = usize::try_from(stored.block_size).unwrap_or(0);
        let [first, ..] = stored.hashes.as_slice() else {
            return;
        };
        // The last part of a prompt may be stored as a block that is shorter.
        if stored.hashes.len().checked_mul(size) != Some(stored.tokens.len()) || size == 0 {
            return;
        }
        self.block_size = self.block_size.max(Some(stored.block_size));
        let plain = stored.extra_keys.iter().flatten().all(Option::is_none);
        if stored.parent.is_some() || !plain || stored.lora_id.is_some() {
            return;
        }
        let tokens = stored.tokens.get(..size).unwrap_or_default();
        let expected = hash::block_hash(&self.none_hash, tokens, &[]);
        self.hashes_agree = Some(match first {
            BlockHash::Int(bits) => *bits == hash::low64(&expected),
            BlockHash::Bytes(bytes) => **bytes == expected,
        });
    }

    fn ask(&mut self, holding: bool) -> Ask {
        self.counts.replays += 1;
        self.vain += u32::from(holding);
        let last = self.recent.back();
        self.phase = Phase::Replaying(Replay {
            holding,
            known: false,
            again: false,
            void: false,
        });
        // The one that was taken last, too: it says whether the engine is the same.
        Ask {
            from: last.map_or(0, |mark| mark.sequence),
        }
    }

    fn hold(&mut self, sequence: u64, payload: &[u8]) {
        let full = self.held.len() >= self.limits.held
            || self.held_bytes + payload.len() > self.limits.held_bytes;
        if full {
            self.drop_held();
            if let Phase::Replaying(replay) = &mut self.phase {
                replay.again = true;
            }
            return;
        }
        if let Some(replaced) = self.held.insert(sequence, payload.to_vec()) {
            self.held_bytes -= replaced.len();
        }
        self.held_bytes += payload.len();
    }

    fn drop_held(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
    }

    fn restarted(&mut self) {
        self.counts.restarts += 1;
        self.hashes_agree = None;
        self.block_size = None;
        self.forget();
    }

    fn forget(&mut self) {
        self.holdings.clear();
        self.recent.clear();
        self.whole = false;
    }

    /// The number that comes next; `None` where nothing is known.
    fn next(&self) -> Option<u64> {
        Some(self.recent.back()?.sequence.saturating_add(1))
    }

    fn remembered(&self, sequence: u64) -> Option<Mark> {
        let last = self.recent.back()?.sequence;
        let back = usize::try_from(last.checked_sub(sequence)?).ok()?;
        let at = self.recent.len().checked_sub(back.checked_add(1)?)?;
        self.recent.get(at).copied()
    }

    /// How well it is known.
    pub const fn standing(&self) -> Standing {
        let offered = match self.phase {
            Phase::Away => false,
            Phase::Replaying(replay) => !replay.holding,
            Phase::Following => true,
        };
        match (offered, self.whole && self.holdings.refused() == 0) {
            (false, _) => Standing::Behind,
            (true, false) => Standing::Partial,
            (true, true) => Standing::Complete,
        }
    }

    /// How many leading blocks of a prompt it holds; none while it is [`Standing::Behind`].
    pub fn prefix(&self, blocks: &[u64]) -> Held {
        match self.standing() {
            Standing::Behind => Held::default(),
            _ => self.holdings.prefix(blocks),
        }
    }

    /// Blocks that are known, one in two media counted twice; offered or not.
    pub fn blocks(&self) -> usize {
        self.holdings.len()
    }

    /// Blocks that were not taken, because the index was full.
    pub const fn refused(&self) -> u64 {
        self.holdings.refused()
    }

    /// The batch that was taken last.
    pub fn sequence(&self) -> Option<u64> {
        Some(self.recent.back()?.sequence)
    }

    /// Data-parallel rank, if the engine says it.
    pub const fn rank(&self) -> Option<u32> {
        self.rank
    }

    /// Tokens in a block.
    pub const fn block_size(&self) -> Option<u32> {
        self.block_size
    }

    /// Whether the engine's hashes are those of [`crate::hash`], with the `none_hash` that was
    /// given; `None` as long as no block tells.
    pub const fn hashes_agree(&self) -> Option<bool> {
        self.hashes_agree
    }

    /// What happened so far.
    pub const fn counts(&self) -> Counts {
        self.counts
    }
}

impl Mark {
    fn of(sequence: u64, payload: &[u8]) -> Self {
        let digest = blake3::hash(payload);
        let (half, _) = digest
            .as_bytes()
            .split_first_chunk()
            .expect("a digest has 32 bytes");
        Self {
            sequence,
            digest: u128::from_le_bytes(*half),
        }
    }
}

impl Replay {
    /// Another has to follow, and nothing is offered until then.
    const fn again(self) -> Self {
        Self {
            holding: true,
            again: true,
            ..self
        }
    }
}

/// Batches whose contents are remembered: as far back as a duplicate may come from.
const MARKS: usize = 1024;

/// Replays in a row that may bring nothing new before what is missing is given up.
const VAIN: u32 = 3;

#[cfg(test)]
mod tests;
