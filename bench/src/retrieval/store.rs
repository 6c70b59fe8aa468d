//! What a store has under the daemon's default policy of eviction: sizes, no bytes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use kvasir_store::policy::{ChunkFacts, Class, Policy, PolicyKind, Slot};

use crate::corpus::mix;

/// What is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Item {
    /// A canonical prefix.
    Prefix(u32),
    /// A content chunk.
    Chunk(Content),
    /// A prefix chunk, by the number of its chain.
    Block(u64),
}

/// A content chunk: compiled behind another canonical prefix, it is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Content {
    pub(crate) prefix: u32,
    pub(crate) chunk: u32,
}

/// One tier, in the trace's time.
pub(crate) struct Store {
    policy: Policy,
    start: Instant,
    /// `None`: no limit.
    capacity: Option<u64>,
    /// Bytes of all items.
    bytes: u64,
    slots: HashMap<Item, Slot>,
    entries: Vec<Entry>,
    free: Vec<Slot>,
    /// The request at hand. What it has read or inserted is not evicted.
    request: u64,
}

#[derive(Clone, Copy)]
struct Entry {
    item: Item,
    bytes: u64,
    held: u64,
}

impl Store {
    pub(crate) fn new(capacity: Option<u64>) -> Self {
        let start = Instant::now();
        let policy = PolicyKind::default();
        Self {
            policy: Policy::new(policy, capacity.unwrap_or(u64::MAX), start),
            start,
            capacity,
            bytes: 0,
            slots: HashMap::new(),
            entries: Vec::new(),
            free: Vec::new(),
            request: 0,
        }
    }

    /// Bytes of all items.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Begins a request: what others held may be evicted.
    pub(crate) fn begin(&mut self) {
        self.request += 1;
    }

    /// Whether an item is stored.
    pub(crate) fn contains(&self, item: Item) -> bool {
        self.slots.contains_key(&item)
    }

    /// Uses an item, and holds it until the next request. False where it is not stored.
    pub(crate) fn read(&mut self, item: Item, now: Duration) -> bool {
        let Some(&slot) = self.slots.get(&item) else {
            return false;
        };
        self.policy.used(slot, self.start + now);
        self.entries[slot.0 as usize].held = self.request;
        true
    }

    /// Stores an item that is not stored, and holds it. `tokens` is what computing it costs,
    /// `parent` the prefix chunk before it, `beside` the bytes that something else takes of the
    /// capacity. Returns what was evicted for it, or `None` where there is no room.
    pub(crate) fn insert(
        &mut self,
        item: Item,
        bytes: u64,
        tokens: u64,
        parent: Option<Item>,
        beside: u64,
        now: Duration,
    ) -> Option<Vec<Item>> {
        let evicted = self.make_room(bytes.saturating_add(beside), now)?;
        let entry = Entry {
            item,
            bytes,
            held: self.request,
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.entries[slot.0 as usize] = entry;
                slot
            }
            None => {
                self.entries.push(entry);
                Slot(u32::try_from(self.entries.len() - 1).expect("fewer items than 2^32"))
            }
        };
        self.slots.insert(item, slot);
        self.bytes += bytes;
        let facts = ChunkFacts {
            key_hash: hash(item),
            bytes,
            recompute: u32::try_from(tokens).unwrap_or(u32::MAX),
            class: Class::default(),
            parent: parent.and_then(|parent| self.slots.get(&parent).copied()),
            uses: 1,
        };
        self.policy.inserted(slot, &facts, self.start + now);
        Some(evicted)
    }

    /// Evicts until `bytes` more fit. Returns what went, or `None`, and nothing goes, where
    /// that is impossible.
    pub(crate) fn make_room(&mut self, bytes: u64, now: Duration) -> Option<Vec<Item>> {
        let Some(capacity) = self.capacity else {
            return Some(Vec::new());
        };
        let above = self.bytes.saturating_add(bytes).saturating_sub(capacity);
        if above == 0 {
            return Some(Vec::new());
        }
        let now = self.start + now;
        let held = |slot: Slot| self.entries[slot.0 as usize].held == self.request;
        let victims = self.policy.victims(above, now, held)?;
        let evict = |slot: Slot| {
            let Entry { item, bytes, .. } = self.entries[slot.0 as usize];
            self.policy.evicted(slot, hash(item), now);
            self.slots.remove(&item);
            self.free.push(slot);
            self.bytes -= bytes;
            item
        };
        Some(victims.into_iter().map(evict).collect())
    }
}

fn hash(item: Item) -> u64 {
    match item {
        Item::Prefix(prefix) => mix(0, prefix.into()),
        Item::Chunk(Content { prefix, chunk }) => mix(u64::from(prefix) + 2, chunk.into()),
        Item::Block(number) => mix(1, number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(number: u64) -> Item {
        Item::Block(number)
    }

    fn insert(store: &mut Store, number: u64, beside: u64) -> Option<Vec<Item>> {
        let now = Duration::from_secs(number);
        store.insert(item(number), 10, 10, None, beside, now)
    }

    #[test]
    fn what_is_held_stays_and_what_was_used_longest_ago_goes() {
        let mut store = Store::new(Some(30));
        for number in 1..=3 {
            store.begin();
            assert_eq!(insert(&mut store, number, 0), Some(vec![]));
        }
        store.begin();
        assert!(store.read(item(1), Duration::from_secs(4)));
        assert_eq!(insert(&mut store, 4, 0), Some(vec![item(2)]));
        assert_eq!(insert(&mut store, 5, 0), Some(vec![item(3)]));
        // One, four and five are this request's.
        assert_eq!(insert(&mut store, 6, 0), None);
        assert_eq!(store.bytes(), 30);
        store.begin();
        assert!(!store.read(item(2), Duration::from_secs(5)));
        assert!(insert(&mut store, 7, 10).is_some_and(|evicted| evicted.len() == 2));
        assert_eq!(store.bytes(), 20);
        assert_eq!(insert(&mut store, 8, 30), None);
    }

    #[test]
    fn a_prefix_chunk_goes_before_the_one_in_front_of_it() {
        let mut store = Store::new(Some(20));
        store.begin();
        let now = Duration::from_secs(1);
        store.insert(item(1), 10, 10, None, 0, now);
        store.insert(item(2), 10, 10, Some(item(1)), 0, now);
        store.begin();
        assert!(store.read(item(2), Duration::from_secs(2)));
        store.begin();
        assert_eq!(insert(&mut store, 3, 0), Some(vec![item(2)]));
    }

    #[test]
    fn without_a_limit_nothing_goes() {
        let mut store = Store::new(None);
        for number in 0..1000 {
            assert_eq!(insert(&mut store, number, u64::MAX), Some(vec![]));
        }
        assert_eq!(store.bytes(), 10_000);
    }
}
