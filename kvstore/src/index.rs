//! Which chunks a tier has, in order of use.
//!
//! Shared by all tiers. An index is plain data behind its tier's mutex; nothing
//! here waits.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvasir_types::ChunkKey;
use lru::LruCache;

use crate::budget::Budget;
use crate::events::{EventKind, EventLog};
use crate::pins::{PinId, PinRefused, Pins};
use crate::tier::{Facts, TierKind, Usage};

/// What an index keeps per chunk.
pub(crate) trait Entry {
    fn facts(&self) -> &Facts;
    /// Bytes that evicting the chunk would free.
    fn charged_bytes(&self) -> u64;
    /// Whether a reader holds the chunk, so that evicting it would free nothing.
    fn is_held(&self) -> bool;
}

#[derive(Debug)]
pub(crate) struct Index<E> {
    tier: TierKind,
    entries: LruCache<ChunkKey, E>,
    pins: Pins,
    events: EventLog,
}

impl<E: Entry> Index<E> {
    pub(crate) fn new(tier: TierKind, pin_limit: u64, events: EventLog) -> Self {
        Self {
            tier,
            entries: LruCache::unbounded(),
            pins: Pins::new(tier, pin_limit),
            events,
        }
    }

    /// An entry, without using it.
    pub(crate) fn peek(&self, key: &ChunkKey) -> Option<&E> {
        self.entries.peek(key)
    }

    /// An entry, as the most recently used from now on.
    pub(crate) fn touch(&mut self, key: &ChunkKey) -> Option<&E> {
        self.entries.get(key)
    }

    pub(crate) fn contains(&self, key: &ChunkKey) -> bool {
        self.entries.contains(key)
    }

    /// Publishes a chunk. The caller made sure that it is absent and readable.
    pub(crate) fn insert(&mut self, entry: E) {
        let key = entry.facts().key;
        let replaced = self.entries.put(key, entry);
        debug_assert!(replaced.is_none(), "callers check for presence first");
        self.events.publish(EventKind::Stored, key, self.tier);
    }

    pub(crate) fn remove(&mut self, key: &ChunkKey) -> Option<E> {
        let entry = self.entries.pop(key)?;
        self.pins.forget(key);
        self.events.publish(EventKind::Removed, *key, self.tier);
        Some(entry)
    }

    /// Removes least recently used chunks that are neither pinned nor held, until
    /// `bytes` are freed. Where that cannot be reached, removes none.
    pub(crate) fn evict(&mut self, bytes: u64, now: Instant) -> Vec<E> {
        self.pins.expire(now);
        let mut freed = 0u64;
        let mut victims = Vec::new();
        for (key, entry) in self.entries.iter().rev() {
            if freed >= bytes {
                break;
            }
            if !self.pins.covers(key) && !entry.is_held() {
                freed = freed.saturating_add(entry.charged_bytes());
                victims.push(*key);
            }
        }
        if freed < bytes {
            return Vec::new();
        }
        victims.iter().filter_map(|key| self.remove(key)).collect()
    }

    pub(crate) fn find(&self, keys: &[ChunkKey]) -> Vec<Option<Facts>> {
        keys.iter()
            .map(|key| self.peek(key).map(|entry| *entry.facts()))
            .collect()
    }

    /// Everything, least recently used first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &E> {
        self.entries.iter().rev().map(|(_, entry)| entry)
    }

    /// At most `limit` chunks with keys after `after`, in the order of keys.
    pub(crate) fn list(&self, after: Option<&ChunkKey>, limit: usize) -> Vec<Facts> {
        let mut first: BTreeMap<ChunkKey, Facts> = BTreeMap::new();
        for (key, entry) in &self.entries {
            if after.is_some_and(|after| key <= after) {
                continue;
            }
            if first.len() >= limit {
                match first.last_entry() {
                    Some(last) if key < last.key() => last.remove(),
                    _ => continue,
                };
            }
            first.insert(*key, *entry.facts());
        }
        first.into_values().collect()
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
            chunks: self.entries.len() as u64,
            bytes: budget.used(),
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
