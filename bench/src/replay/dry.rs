//! Policies alone: two tiers without bytes, in the trace's time.
//!
//! A hit is the longest prefix of a prompt of which every block is in memory or on
//! disk. Then all blocks of the prompt are used, and are in memory: promoted from
//! disk, or stored anew. What memory evicts is written to disk if admitted and not
//! there; what was promoted keeps its place on disk. Blocks of the prompt at hand are
//! exempt, as leases would have it. Blocks have one size.

use std::time::Instant;

use kvasir_store::policy::{Admission, ChunkFacts, Class, Policy, PolicyKind, Prospect, Slot};

use super::trace::{Request, Trace};

/// What is simulated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) policy: PolicyKind,
    pub(crate) memory_blocks: usize,
    /// 0: no disk.
    pub(crate) disk_blocks: usize,
    pub(crate) admission: Admission,
    /// Instead: those blocks that a later request has, which no admission can know.
    pub(crate) clairvoyant: bool,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) hit_tokens: u64,
    pub(crate) hit_blocks: u64,
    /// Of these, blocks that were in memory.
    pub(crate) memory_hit_blocks: u64,
    pub(crate) disk_writes: u64,
}

/// Replays a trace.
pub(crate) fn replay(trace: &Trace, setup: &Setup) -> Outcome {
    let start = Instant::now();
    let mut tiers = Tiers::new(trace, setup, start);
    for (number, request) in trace.requests.iter().enumerate() {
        for &block in &request.blocks {
            tiers.held[block as usize] = number;
        }
        tiers.serve(request, number, start + request.at);
    }
    tiers.outcome
}

struct Tiers<'a> {
    trace: &'a Trace,
    memory: Tier,
    disk: Tier,
    admission: Admission,
    /// For the clairvoyant: the last request of the trace that has a block.
    last_use: Option<Vec<usize>>,
    /// The last request so far that has a block.
    held: Vec<usize>,
    outcome: Outcome,
}

impl<'a> Tiers<'a> {
    fn new(trace: &'a Trace, setup: &Setup, start: Instant) -> Self {
        let tier = |capacity| Tier::new(trace, setup.policy, capacity, start);
        Self {
            trace,
            memory: tier(setup.memory_blocks),
            disk: tier(setup.disk_blocks),
            admission: setup.admission,
            last_use: setup.clairvoyant.then(|| last_uses(trace)),
            held: vec![usize::MAX; trace.blocks.len()],
            outcome: Outcome::default(),
        }
    }

    fn serve(&mut self, request: &Request, number: usize, now: Instant) {
        let stored = |block: &&u32| self.memory.contains(**block) || self.disk.contains(**block);
        let hit = request.blocks.iter().take_while(stored).count();
        self.outcome.hit_tokens += request.tokens_of(hit);
        self.outcome.hit_blocks += hit as u64;
        let in_memory = |block: &&u32| self.memory.contains(**block);
        let prefix = &request.blocks[..hit];
        self.outcome.memory_hit_blocks += prefix.iter().filter(in_memory).count() as u64;
        for &block in &request.blocks {
            let on_disk = self.disk.used(block, now);
            if self.memory.used(block, now).is_some() {
                continue;
            }
            if !self.make_room(number, now) {
                continue;
            }
            // A chunk that comes back from disk is known there.
            let uses = on_disk.map_or(1, |prospect| prospect.uses);
            self.memory.insert(self.trace, block, uses, now);
        }
    }

    /// Makes room for a block in memory; what goes may go to disk.
    fn make_room(&mut self, number: usize, now: Instant) -> bool {
        let held = |block: u32| self.held[block as usize] == number;
        let Some(evicted) = self.memory.make_room(now, held) else {
            return false;
        };
        for (block, prospect) in evicted {
            let admitted = match &self.last_use {
                Some(last) => last[block as usize] > number,
                None => self.admission.admits(&prospect),
            };
            if self.disk.contains(block) || !admitted {
                continue;
            }
            if self.disk.make_room(now, held).is_some() {
                let Prospect {
                    uses, last_used, ..
                } = prospect;
                self.disk.insert(self.trace, block, uses, last_used);
                self.outcome.disk_writes += 1;
            }
        }
        true
    }
}

fn last_uses(trace: &Trace) -> Vec<usize> {
    let mut last = vec![0; trace.blocks.len()];
    for (number, request) in trace.requests.iter().enumerate() {
        for &block in &request.blocks {
            last[block as usize] = number;
        }
    }
    last
}

/// Which blocks a tier has.
struct Tier {
    policy: Policy,
    capacity: usize,
    slots: Vec<Option<Slot>>,
    blocks: Vec<u32>,
    free: Vec<Slot>,
}

impl Tier {
    fn new(trace: &Trace, policy: PolicyKind, capacity: usize, start: Instant) -> Self {
        Self {
            policy: Policy::new(policy, capacity as u64 * BLOCK_BYTES, start),
            capacity,
            slots: vec![None; trace.blocks.len()],
            blocks: Vec::new(),
            free: Vec::new(),
        }
    }

    fn contains(&self, block: u32) -> bool {
        self.slots[block as usize].is_some()
    }

    fn used(&mut self, block: u32, now: Instant) -> Option<Prospect> {
        let slot = self.slots[block as usize]?;
        self.policy.used(slot, now);
        Some(self.policy.prospect(slot, now))
    }

    /// Evicts until one block fits. `None` where that is impossible.
    fn make_room(
        &mut self,
        now: Instant,
        held: impl Fn(u32) -> bool,
    ) -> Option<Vec<(u32, Prospect)>> {
        if self.capacity == 0 {
            return None;
        }
        if self.policy.len() < self.capacity {
            return Some(Vec::new());
        }
        let exempt = |slot: Slot| held(self.blocks[slot.0 as usize]);
        let victims = self.policy.victims(BLOCK_BYTES, now, exempt)?;
        let evict = |slot: Slot| {
            let block = self.blocks[slot.0 as usize];
            let prospect = self.policy.prospect(slot, now);
            self.policy.evicted(slot, key_hash(block), now);
            self.slots[block as usize] = None;
            self.free.push(slot);
            (block, prospect)
        };
        Some(victims.into_iter().map(evict).collect())
    }

    fn insert(&mut self, trace: &Trace, block: u32, uses: u8, used: Instant) {
        let slot = self.free.pop().unwrap_or_else(|| {
            let next = u32::try_from(self.blocks.len()).expect("blocks are numbered by u32");
            self.blocks.push(block);
            Slot(next)
        });
        self.blocks[slot.0 as usize] = block;
        self.slots[block as usize] = Some(slot);
        let known = &trace.blocks[block as usize];
        let facts = ChunkFacts {
            key_hash: key_hash(block),
            bytes: BLOCK_BYTES,
            recompute: known.tokens,
            class: Class::default(),
            parent: known.parent.and_then(|parent| self.slots[parent as usize]),
            uses,
        };
        self.policy.inserted(slot, &facts, used);
        for child in &known.children {
            if let Some(child) = self.slots[*child as usize] {
                self.policy.linked(child, slot);
            }
        }
    }
}

/// A hash that makes no two blocks of a trace alike (the finalizer of SplitMix64).
fn key_hash(block: u32) -> u64 {
    let mut hash = u64::from(block).wrapping_add(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// All blocks have the same size, so any will do.
const BLOCK_BYTES: u64 = 1000;
