//! Which chunks a tier has, and which goes first.
//!
//! Shared by all tiers. An index is plain data behind its tier's mutex; nothing
//! here waits. Entries lie in a slab, found through a table of their slots, so that a
//! chunk costs its entry, some 8 bytes of table, and what the [`Policy`] keeps.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use hashbrown::HashTable;
use kvasir_types::{ChunkKey, Class, Hints};

use crate::budget::Budget;
use crate::events::{EventKind, EventLog};
use crate::levels::LevelUsages;
use crate::pins::{PinId, PinRefused, Pins};
use crate::policy::{ChunkFacts, ClassLimits, Policy, PolicyKind, Prospect, Slot};
use crate::tier::{Facts, TierKind, Usage};

/// What an index keeps per chunk.
pub(crate) trait Entry {
    fn key(&self) -> &ChunkKey;
    fn facts(&self) -> Facts;
    /// Bytes that evicting the chunk would free.
    fn charged_bytes(&self) -> u64;
    /// Whether a reader holds the chunk, so that evicting it would free nothing.
    fn is_held(&self) -> bool;
}

/// What a chunk brings along when it enters a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Worth {
    pub(crate) hints: Hints,
    /// Uses so far, here or in another tier, this one included.
    pub(crate) uses: u8,
}

impl Worth {
    /// Of a chunk that is new to the store.
    pub(crate) const fn new(hints: Hints) -> Self {
        Self { hints, uses: 1 }
    }
}

#[derive(Debug)]
pub(crate) struct Index<E> {
    tier: TierKind,
    slots: HashTable<u32>,
    /// Keys come from clients, who must not choose where they collide.
    hasher: RandomState,
    entries: Vec<Option<E>>,
    free: Vec<u32>,
    policy: Policy,
    pins: Pins,
    events: EventLog,
    levels: LevelUsages,
}

impl<E: Entry> Index<E> {
    pub(crate) fn new(
        tier: TierKind,
        policy: PolicyKind,
        capacity: u64,
        pin_limit: u64,
        events: EventLog,
        now: Instant,
    ) -> Self {
        Self {
            tier,
            slots: HashTable::new(),
            hasher: RandomState::new(),
            entries: Vec::new(),
            free: Vec::new(),
            policy: Policy::new(policy, capacity, now),
            pins: Pins::new(tier, pin_limit),
            events,
            levels: LevelUsages::default(),
        }
    }

    /// An entry, without using it.
    pub(crate) fn peek(&self, key: &ChunkKey) -> Option<&E> {
        self.entry(self.slot(key)?)
    }

    /// An entry to change, without using it.
    pub(crate) fn peek_mut(&mut self, key: &ChunkKey) -> Option<&mut E> {
        let slot = self.slot(key)?;
        self.entries.get_mut(slot as usize)?.as_mut()
    }

    /// An entry, used now.
    pub(crate) fn touch(&mut self, key: &ChunkKey, now: Instant) -> Option<&mut E> {
        let slot = self.slot(key)?;
        self.policy.used(Slot(slot), now);
        self.entries.get_mut(slot as usize)?.as_mut()
    }

    pub(crate) fn contains(&self, key: &ChunkKey) -> bool {
        self.slot(key).is_some()
    }

    /// Makes room for `more` chunks, which are about to come.
    pub(crate) fn reserve(&mut self, more: usize) {
        let Self {
            entries,
            slots,
            hasher,
            policy,
            ..
        } = self;
        slots.reserve(more, |&slot| hash(hasher, entries, slot));
        entries.reserve(more);
        policy.reserve(more);
    }

    /// Publishes a chunk. The caller made sure that it is absent and readable.
    pub(crate) fn insert(&mut self, entry: E, worth: &Worth, now: Instant) {
        let key = *entry.key();
        debug_assert!(!self.contains(&key), "callers check for presence first");
        let hints = &worth.hints;
        self.levels.add(&entry.facts());
        let facts = ChunkFacts {
            key_hash: self.hasher.hash_one(key),
            bytes: entry.charged_bytes(),
            recompute: hints
                .recompute
                .map_or_else(|| entry.facts().layout.tokens(), NonZeroU32::get),
            class: hints.class,
            parent: hints.parent.and_then(|parent| self.slot(&parent)).map(Slot),
            uses: worth.uses,
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.entries[slot as usize] = Some(entry);
                slot
            }
            None => {
                self.entries.push(Some(entry));
                u32::try_from(self.entries.len() - 1).expect("memory ends before 2^32 chunks")
            }
        };
        let Self {
            entries, hasher, ..
        } = self;
        self.slots
            .insert_unique(facts.key_hash, slot, |&slot| hash(hasher, entries, slot));
        self.policy.inserted(Slot(slot), &facts, now);
        self.events.publish(EventKind::Stored, key, self.tier);
    }

    /// The chunk before a stored one, and how often that one was used.
    pub(crate) fn history(&self, key: &ChunkKey, now: Instant) -> Option<(Option<ChunkKey>, u8)> {
        let slot = Slot(self.slot(key)?);
        let parent = self.policy.parent_of(slot);
        let parent = parent.and_then(|parent| self.entry(parent.0)).map(E::key);
        Some((parent.copied(), self.policy.prospect(slot, now).uses))
    }

    /// The chunks that [`evict`](Self::evict) would remove for `bytes`, or as many as
    /// there are, in order, and what to expect of them.
    pub(crate) fn soon_evicted(&mut self, bytes: u64, now: Instant) -> Vec<(&E, Prospect)> {
        self.pins.expire(now);
        let Self {
            entries,
            pins,
            policy,
            ..
        } = self;
        let slots = policy.preview(bytes, now, |slot| is_exempt(entries, pins, slot));
        slots
            .into_iter()
            .filter_map(|slot| Some((self.entry(slot.0)?, self.policy.prospect(slot, now))))
            .collect()
    }

    /// Everything, and what to expect of it, in no order.
    pub(crate) fn prospects(&self, now: Instant) -> impl Iterator<Item = (&E, Prospect)> {
        let slots = (0..).map(Slot).zip(&self.entries);
        slots.filter_map(move |(slot, entry)| {
            Some((entry.as_ref()?, self.policy.prospect(slot, now)))
        })
    }

    pub(crate) fn limit(&mut self, class: Class, limits: ClassLimits) {
        self.policy.limit(class, limits);
    }

    pub(crate) fn remove(&mut self, key: &ChunkKey) -> Option<E> {
        let (slot, entry) = self.take(key)?;
        self.policy.removed(Slot(slot));
        Some(entry)
    }

    /// Removes the chunks that the policy says should go, none of them pinned or held,
    /// until `bytes` are freed. Where that cannot be reached, removes none.
    pub(crate) fn evict(&mut self, bytes: u64, now: Instant) -> Vec<E> {
        self.pins.expire(now);
        let Self {
            entries,
            pins,
            policy,
            ..
        } = self;
        let victims = policy
            .victims(bytes, now, |slot| is_exempt(entries, pins, slot))
            .unwrap_or_default();
        let mut evicted = Vec::with_capacity(victims.len());
        for victim in victims {
            let Some(key) = self.entry(victim.0).map(|entry| *entry.key()) else {
                continue;
            };
            evicted.extend(self.take(&key).map(|(_, entry)| entry));
            self.policy.evicted(victim, self.hasher.hash_one(key), now);
        }
        evicted
    }

    pub(crate) fn find(&self, keys: &[ChunkKey]) -> Vec<Option<Facts>> {
        keys.iter()
            .map(|key| self.peek(key).map(Entry::facts))
            .collect()
    }

    /// Everything, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &E> {
        self.entries.iter().flatten()
    }

    #[cfg(test)]
    pub(crate) fn allocated_bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Option<E>>()
            + self.free.capacity() * size_of::<u32>()
            + self.slots.allocation_size()
            + self.policy.allocated_bytes()
    }

    fn slot(&self, key: &ChunkKey) -> Option<u32> {
        let is_it = |&slot: &u32| self.entry(slot).is_some_and(|entry| entry.key() == key);
        self.slots.find(self.hasher.hash_one(key), is_it).copied()
    }

    fn entry(&self, slot: u32) -> Option<&E> {
        self.entries.get(slot as usize)?.as_ref()
    }

    /// Takes an entry out of everything but the policy.
    fn take(&mut self, key: &ChunkKey) -> Option<(u32, E)> {
        let Self { entries, slots, .. } = self;
        let is_it = |&slot: &u32| {
            let entry = entries.get(slot as usize).and_then(Option::as_ref);
            entry.is_some_and(|entry| entry.key() == key)
        };
        let found = slots.find_entry(self.hasher.hash_one(key), is_it).ok()?;
        let (slot, _) = found.remove();
        let entry = self.entries.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        self.levels.remove(&entry.facts());
        self.pins.forget(key);
        self.events.publish(EventKind::Removed, *key, self.tier);
        Some((slot, entry))
    }

    pub(crate) fn pin(
        &mut self,
        id: PinId,
        keys: &[ChunkKey],
        expires: Instant,
        now: Instant,
    ) -> Result<(), PinRefused> {
        let keys = keys
            .iter()
            .map(|key| {
                let entry = self.peek(key).ok_or(PinRefused::Missing(*key))?;
                Ok((*key, entry.charged_bytes()))
            })
            .collect::<Result<Vec<_>, _>>()?;
        self.pins.add(id, &keys, expires, now)
    }

    pub(crate) fn unpin(&mut self, id: PinId, now: Instant) -> bool {
        self.pins.expire(now);
        self.pins.remove(id)
    }

    /// The pins that last.
    pub(crate) fn pin_ids(&mut self, now: Instant) -> Vec<PinId> {
        self.pins.expire(now);
        self.pins.ids().collect()
    }

    pub(crate) fn usage(&mut self, counters: &Counters, budget: &Budget, now: Instant) -> Usage {
        self.pins.expire(now);
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Usage {
            chunks: self.slots.len() as u64,
            levels: self.levels,
            bytes: budget.used(),
            idle_bytes: 0,
            peak_bytes: budget.peak(),
            capacity: budget.capacity(),
            pins: self.pins.len() as u64,
            pinned_bytes: self.pins.bytes(),
            hits: read(&counters.hits),
            misses: read(&counters.misses),
            writes: read(&counters.writes),
            evictions: read(&counters.evictions),
            corrupt: read(&counters.corrupt),
            throttled: read(&counters.throttled),
            failures: read(&counters.failures),
        }
    }
}

/// At most `limit` chunks with keys after `after`, in the order of keys; looks
/// [in parts](in_parts).
pub(crate) fn list<E: Entry>(
    after: Option<&ChunkKey>,
    limit: usize,
    locked: impl Fn(&mut dyn FnMut(&Index<E>)),
) -> Vec<Facts> {
    let mut first: BTreeMap<ChunkKey, Facts> = BTreeMap::new();
    if limit == 0 {
        return Vec::new();
    }
    in_parts(locked, |entry| {
        let key = entry.key();
        if after.is_some_and(|after| key <= after) {
            return;
        }
        if first.len() >= limit {
            match first.last_entry() {
                Some(last) if key < last.key() => last.remove(),
                _ => return,
            };
        }
        first.insert(*key, entry.facts());
    });
    first.into_values().collect()
}

/// Shows all entries, in no particular order. Looks at a part of the index at a time, each
/// under a lock of its own that `locked` takes: nobody waits for all of it. What comes or
/// goes meanwhile may be shown or not, and what stays is.
pub(crate) fn in_parts<E: Entry>(
    locked: impl Fn(&mut dyn FnMut(&Index<E>)),
    mut show: impl FnMut(&E),
) {
    let (mut from, mut ended) = (0, false);
    while !ended {
        locked(&mut |index| {
            let rest = index.entries.get(from..).unwrap_or(&[]);
            let part = rest.get(..PART).unwrap_or(rest);
            part.iter().flatten().for_each(&mut show);
            from += part.len();
            ended = part.is_empty();
        });
    }
}

/// Entries that are listed under one lock: well under a millisecond.
const PART: usize = 4096;

/// Whether a chunk may not be evicted now.
fn is_exempt<E: Entry>(entries: &[Option<E>], pins: &Pins, slot: Slot) -> bool {
    let entry = entries.get(slot.0 as usize).and_then(Option::as_ref);
    entry.is_none_or(|entry| entry.is_held() || pins.covers(entry.key()))
}

/// The hash under which a slot is found.
fn hash<E: Entry>(hasher: &RandomState, entries: &[Option<E>], slot: u32) -> u64 {
    let entry = entries.get(slot as usize).and_then(Option::as_ref);
    entry.map_or(0, |entry| hasher.hash_one(entry.key()))
}

/// Counts of what happened to a tier; see [`Usage`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) evictions: AtomicU64,
    pub(crate) corrupt: AtomicU64,
    pub(crate) throttled: AtomicU64,
    pub(crate) failures: AtomicU64,
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
