//! Which chunk goes when room is needed, and which is worth a write to a lower tier.
//!
//! Plain data: no I/O, no locks, and time is a parameter. A tier's index drives a
//! [`Policy`] with what happens to its chunks, and asks it for victims; so does the
//! `replay` benchmark, with the same code.
//!
//! # Order of eviction
//! 1. Chunks of a class that outlived the class's time to live.
//! 2. Chunks of the class that is furthest above its quota.
//! 3. The order of the [`PolicyKind`].
//!
//! All but [`PolicyKind::Lru`] evict chains from their ends: a chunk is of no use
//! without the chunks before it, so it goes before they do. Only the ends of chains
//! (chunks without stored children) are candidates; when the last child goes, its
//! parent becomes one.
//!
//! Chunks that the caller exempts (pins, readers) are set aside when they are met, so
//! that none is looked at twice in a call; a few of them are looked at again in every
//! later call, and all of them before a call fails. A parent of nothing but exempt
//! chunks goes only where nothing else is left.
//!
//! # Costs
//! 32 bytes a chunk, and 8 to 16 for ghosts, but 64 KiB at least. Every call takes constant time, but for
//! a victim under [`PolicyKind::Reuse`], which looks at all non-empty age groups: up
//! to some hundred per class in use, about a microsecond.
//!
//! Not here: bytes that are really free, pins, events (the index's).

mod by_reuse;
mod ghosts;
mod links;
mod reuse;
mod s3_fifo;

use std::time::{Duration, Instant};

pub use kvasir_types::Class;
use serde::{Deserialize, Serialize};

use self::by_reuse::ByReuse;
use self::links::{Links, List};
use self::s3_fifo::S3Fifo;

/// A chunk's place in its tier's index; reused after the chunk is gone. At most
/// 2³¹ - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// The order in which chunks are evicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyKind {
    /// Least recently used first; knows nothing of chains.
    Lru,
    /// S3-FIFO (Yang et al., SOSP 2023): a small queue for what is new, a main queue
    /// for what was used while in it. A scan passes through the small queue only.
    S3Fifo,
    /// The least hits per byte and second first, as learnt online from how often and
    /// how long ago chunks were used when they were used again. The default.
    #[default]
    Reuse,
}

impl PolicyKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Lru, Self::S3Fifo, Self::Reuse];

    /// The name in configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::S3Fifo => "s3-fifo",
            Self::Reuse => "reuse",
        }
    }
}

/// What a class may keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassLimits {
    /// Time since the last use (`s3-fifo`: since it was queued) after which chunks go
    /// first. They go when room is needed; up to a quarter of it late. Default: none.
    pub time_to_live: Option<Duration>,
    /// Bytes above which the class's chunks go before those of others. Default: none.
    pub quota_bytes: Option<u64>,
}

/// What a policy is told of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkFacts {
    /// A uniform hash of the chunk's key.
    pub key_hash: u64,
    /// Bytes that evicting the chunk frees. Above 4 GiB, they count as 4 GiB.
    pub bytes: u64,
    /// Cost of computing the chunk again, in any unit: its tokens, say, or its tokens
    /// weighted by how many come before. Costs per byte are told apart within a factor
    /// of four either way of the first chunk's.
    pub recompute: u32,
    /// The class it is charged to.
    pub class: Class,
    /// The chunk before it in its chain, if that is stored.
    pub parent: Option<Slot>,
    /// Uses of the chunk so far, this one included: 1 for a new chunk, more for one
    /// that comes from another tier.
    pub uses: u8,
}

/// What a tier knows of a chunk that it evicts, for [`Admission::admits`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prospect {
    /// Times the chunk was used, its insertion included.
    pub uses: u8,
    /// Probability that it is used again. 1 where the policy does not learn any.
    pub reuse: f32,
    /// When it was last used, to a quarter of a second.
    pub last_used: Instant,
}

/// Which chunks evicted from memory are written to disk.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Admission {
    /// All of them.
    All,
    /// Those used after they were stored.
    SecondUse,
    /// Those that are used again with at least this probability.
    MinReuse(f32),
}

impl Default for Admission {
    /// [`Self::MinReuse`] of 0.05: a write that is read back once in twenty times.
    fn default() -> Self {
        Self::MinReuse(0.05)
    }
}

impl Admission {
    /// Whether a chunk is worth the write.
    pub fn admits(self, prospect: &Prospect) -> bool {
        match self {
            Self::All => true,
            Self::SecondUse => prospect.uses > 1,
            Self::MinReuse(least) => prospect.reuse >= least,
        }
    }
}

/// Eviction order of one tier.
#[derive(Debug)]
pub struct Policy {
    order: Order,
    epoch: Instant,
    nodes: Vec<Node>,
    links: Links,
    /// Exempt when they were last looked at, longest ago first.
    parked: List,
    /// Chunks all of whose children are parked.
    last_resort: List,
    classes: [ClassState; Class::LIMIT as usize],
    len: usize,
}

#[derive(Debug)]
enum Order {
    Lru([List; Class::LIMIT as usize]),
    S3Fifo(S3Fifo),
    Reuse(ByReuse),
}

#[derive(Clone, Copy, Debug, Default)]
struct ClassState {
    limits: ClassLimits,
    bytes: u64,
}

/// State of a slot, beside its links.
#[derive(Clone, Copy, Debug, Default)]
struct Node {
    parent: u32,
    /// Stored children that are neither parked nor taken.
    children: u32,
    /// Tick of the last use.
    last: u32,
    bytes: u32,
    /// Counts the chunks that had this slot.
    generation: u16,
    /// The generation that `parent` is meant in.
    parent_generation: u16,
    uses: u8,
    class: u8,
    flags: u8,
    /// `s3-fifo`: uses since it was queued. `reuse`: value per byte.
    detail: u8,
}

impl Node {
    const STORED: u8 = 1;
    const HAS_PARENT: u8 = 2;
    /// Set aside, because it was exempt.
    const PARKED: u8 = 4;
    /// Handed out as a victim.
    const TAKEN: u8 = 8;
    /// A child was parked.
    const PARKED_CHILD: u8 = 16;
    /// In the main queue of `s3-fifo`.
    const MAIN: u8 = 32;

    fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    fn set(&mut self, flag: u8, on: bool) {
        self.flags = if on {
            self.flags | flag
        } else {
            self.flags & !flag
        };
    }
}

/// The end of a list at which a candidate arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Next to go.
    Front,
    /// Last to go.
    Back,
}

impl Policy {
    /// An empty policy for a tier of `capacity_bytes`, from `now` on.
    pub fn new(kind: PolicyKind, capacity_bytes: u64, now: Instant) -> Self {
        let mut links = Links::default();
        let order = match kind {
            PolicyKind::Lru => Order::Lru(std::array::from_fn(|_| links.list())),
            PolicyKind::S3Fifo => Order::S3Fifo(S3Fifo::new(capacity_bytes, &mut links)),
            PolicyKind::Reuse => Order::Reuse(ByReuse::new()),
        };
        Self {
            order,
            epoch: now,
            nodes: Vec::new(),
            parked: links.list(),
            last_resort: links.list(),
            links,
            classes: [ClassState::default(); Class::LIMIT as usize],
            len: 0,
        }
    }

    /// Sets what a class may keep.
    pub fn limit(&mut self, class: Class, limits: ClassLimits) {
        self.classes[usize::from(class.number())].limits = limits;
    }

    /// Chunks there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room for `more` chunks, which are about to come.
    pub fn reserve(&mut self, more: usize) {
        self.nodes.reserve(more);
        self.links.reserve(more);
    }

    /// A chunk is stored in a free slot. `used` is when it was last used: now, but for
    /// a chunk that comes from another tier.
    ///
    /// Where the chunk's children are stored already, tell with
    /// [`linked`](Self::linked).
    pub fn inserted(&mut self, slot: Slot, facts: &ChunkFacts, used: Instant) {
        let now = self.tick(used);
        let index = slot.0 as usize;
        if self.nodes.len() <= index {
            self.nodes.resize(index + 1, Node::default());
        }
        debug_assert!(!self.nodes[index].is(Node::STORED), "the slot is free");
        self.nodes[index] = Node {
            last: now,
            bytes: u32::try_from(facts.bytes).unwrap_or(u32::MAX),
            generation: self.nodes[index].generation,
            uses: facts.uses,
            class: facts.class.number(),
            flags: Node::STORED,
            ..Node::default()
        };
        self.len += 1;
        let node = &mut self.nodes[index];
        match &mut self.order {
            Order::Lru(_) => {}
            Order::S3Fifo(order) => order.inserted(node, facts, now),
            Order::Reuse(order) => order.inserted(node, facts, now, self.len),
        }
        self.enter(slot.0);
        self.offer(slot.0, End::Back);
        if let Some(parent) = facts.parent {
            self.linked(slot, parent);
        }
    }

    /// `parent` comes before `child` in its chain, and both are stored. Does nothing
    /// where that is known.
    pub fn linked(&mut self, child: Slot, parent: Slot) {
        if matches!(self.order, Order::Lru(_)) || child == parent || !self.is_stored(parent) {
            return;
        }
        if !self.is_stored(child) || self.parent(child.0).is_some() {
            return;
        }
        let parent_generation = self.nodes[parent.0 as usize].generation;
        let node = &mut self.nodes[child.0 as usize];
        node.parent = parent.0;
        node.parent_generation = parent_generation;
        node.set(Node::HAS_PARENT, true);
        if node.flags & (Node::PARKED | Node::TAKEN) == 0 {
            self.attach(child.0);
        }
    }

    /// A chunk was read, or written again.
    pub fn used(&mut self, slot: Slot, now: Instant) {
        debug_assert!(self.is_stored(slot), "only stored chunks are used");
        let now = self.tick(now);
        let listed = self.is_offered(slot.0);
        let node = &mut self.nodes[slot.0 as usize];
        match &mut self.order {
            Order::Lru(_) => node.last = now,
            Order::S3Fifo(order) => return order.used(node),
            Order::Reuse(order) => order.used(node, now, self.len),
        }
        node.uses = node.uses.saturating_add(1);
        if listed {
            self.links.remove(slot.0);
            self.offer(slot.0, End::Back);
        }
    }

    /// A chunk is gone for another reason than [`victims`](Self::victims): deleted,
    /// or corrupt. Its children, if any, become the beginnings of chains.
    pub fn removed(&mut self, slot: Slot) {
        if !self.is_stored(slot) {
            return;
        }
        let flags = self.nodes[slot.0 as usize].flags;
        self.links.remove(slot.0);
        if flags & Node::TAKEN == 0 {
            if flags & Node::PARKED == 0 {
                self.detach(slot.0, false);
            }
            self.leave(slot.0);
        }
        let node = &mut self.nodes[slot.0 as usize];
        node.flags = 0;
        node.generation = node.generation.wrapping_add(1);
        self.len -= 1;
    }

    /// A victim is gone. `key_hash` is that of its insertion.
    pub fn evicted(&mut self, slot: Slot, key_hash: u64, now: Instant) {
        let now = self.tick(now);
        let node = &self.nodes[slot.0 as usize];
        match &mut self.order {
            Order::Lru(_) => {}
            Order::S3Fifo(order) => order.evicted(node, key_hash, now, self.len),
            Order::Reuse(order) => order.evicted(node, key_hash, now, self.len),
        }
        self.removed(slot);
    }

    /// Chunks to evict, in order, so that `bytes` at least are freed; `None` where all
    /// that are not exempt would not be enough. The caller evicts all of them, and
    /// says so with [`evicted`](Self::evicted).
    pub fn victims(
        &mut self,
        bytes: u64,
        now: Instant,
        exempt: impl Fn(Slot) -> bool,
    ) -> Option<Vec<Slot>> {
        let (victims, enough) = self.select(bytes, now, exempt);
        if !enough {
            self.put_all_back(&victims);
        }
        enough.then_some(victims)
    }

    /// What [`victims`](Self::victims) would give, or all there is. They stay.
    pub fn preview(
        &mut self,
        bytes: u64,
        now: Instant,
        exempt: impl Fn(Slot) -> bool,
    ) -> Vec<Slot> {
        let (victims, _) = self.select(bytes, now, exempt);
        self.put_all_back(&victims);
        victims
    }

    /// Takes victims until `bytes` are reached; says whether they were.
    fn select(
        &mut self,
        bytes: u64,
        now: Instant,
        exempt: impl Fn(Slot) -> bool,
    ) -> (Vec<Slot>, bool) {
        let now = self.tick(now);
        self.wake(RETRIED_PER_CALL, &exempt);
        let mut freed = 0u64;
        let mut victims = Vec::new();
        let mut retried = false;
        while freed < bytes {
            match self.next(now) {
                Some(slot) if exempt(Slot(slot)) => self.park(slot),
                Some(slot) => {
                    freed += u64::from(self.nodes[slot as usize].bytes);
                    self.take(slot);
                    victims.push(Slot(slot));
                }
                None if !retried => {
                    retried = true;
                    self.wake(usize::MAX, &exempt);
                }
                None => return (victims, false),
            }
        }
        (victims, true)
    }

    /// What is known of a stored chunk's future.
    pub fn prospect(&self, slot: Slot, now: Instant) -> Prospect {
        let node = &self.nodes[slot.0 as usize];
        let reuse = match &self.order {
            Order::Lru(_) | Order::S3Fifo(_) => 1.0,
            Order::Reuse(order) => order.probability(node, self.tick(now)),
        };
        Prospect {
            uses: node.uses,
            reuse,
            last_used: self.epoch + TICK * node.last,
        }
    }

    /// The chunk before a stored one, as far as that was told.
    pub fn parent_of(&self, slot: Slot) -> Option<Slot> {
        self.parent(slot.0).map(Slot)
    }

    #[cfg(test)]
    pub(crate) fn allocated_bytes(&self) -> usize {
        let ghosts = match &self.order {
            Order::Lru(_) => 0,
            Order::S3Fifo(order) => order.allocated_bytes(),
            Order::Reuse(order) => order.allocated_bytes(),
        };
        self.nodes.capacity() * size_of::<Node>() + self.links.allocated_bytes() + ghosts
    }

    /// The next candidate.
    fn next(&mut self, now: u32) -> Option<u32> {
        self.expired(now)
            .or_else(|| self.above_quota(now))
            .or_else(|| self.candidate(None, now))
            .or_else(|| self.links.front(self.last_resort))
    }

    fn expired(&self, now: u32) -> Option<u32> {
        (0..Class::LIMIT).find_map(|class| {
            let live = self.classes[usize::from(class)].limits.time_to_live?;
            let before = now.checked_sub(ticks(live))?;
            let old = |slot: &u32| self.nodes[*slot as usize].last <= before;
            match &self.order {
                Order::Lru(lists) => self.links.front(lists[usize::from(class)]).filter(old),
                Order::S3Fifo(order) => order.fronts(class, &self.links).find(old),
                Order::Reuse(order) => order.older(class, before, &self.links, &self.nodes),
            }
        })
    }

    fn above_quota(&mut self, now: u32) -> Option<u32> {
        let excess = |class: &u8| {
            let state = &self.classes[usize::from(*class)];
            state.bytes.checked_sub(state.limits.quota_bytes?)
        };
        let mut above: Vec<u8> = (0..Class::LIMIT)
            .filter(|class| excess(class).is_some_and(|bytes| bytes > 0))
            .collect();
        above.sort_by_key(|class| std::cmp::Reverse(excess(class)));
        above
            .into_iter()
            .find_map(|class| self.candidate(Some(class), now))
    }

    /// The next in the general order, of one class or of all.
    fn candidate(&mut self, class: Option<u8>, now: u32) -> Option<u32> {
        match &mut self.order {
            Order::Lru(lists) => oldest(
                classes(class).filter_map(|class| self.links.front(lists[usize::from(class)])),
                &self.nodes,
            ),
            Order::S3Fifo(order) => order.candidate(class, now, &mut self.links, &mut self.nodes),
            Order::Reuse(order) => order.candidate(class, now, &self.links),
        }
    }

    /// Makes a chunk a candidate.
    fn offer(&mut self, slot: u32, end: End) {
        let node = &self.nodes[slot as usize];
        let list = match &mut self.order {
            Order::Lru(lists) => lists[usize::from(node.class)],
            Order::S3Fifo(order) => order.queue(node),
            Order::Reuse(order) => order.group(node, &mut self.links),
        };
        // Within an age group order matters little; taking what came last follows a
        // chain from its end.
        match end {
            End::Front if !matches!(self.order, Order::Reuse(_)) => {
                self.links.push_front(list, slot);
            }
            _ => self.links.push_back(list, slot),
        }
    }

    fn is_offered(&self, slot: u32) -> bool {
        let node = &self.nodes[slot as usize];
        node.flags & (Node::PARKED | Node::TAKEN) == 0 && self.links.contains(slot)
    }

    /// Counts a chunk as something that its parent must wait for.
    fn attach(&mut self, slot: u32) {
        let Some(parent) = self.parent(slot) else {
            return;
        };
        if self.is_offered(parent) {
            self.links.remove(parent);
        }
        self.nodes[parent as usize].children += 1;
    }

    /// The reverse of [`attach`](Self::attach).
    fn detach(&mut self, slot: u32, parked: bool) {
        let Some(parent) = self.parent(slot) else {
            return;
        };
        let node = &mut self.nodes[parent as usize];
        node.children -= 1;
        node.set(Node::PARKED_CHILD, parked || node.is(Node::PARKED_CHILD));
        if node.children > 0 || node.flags & (Node::PARKED | Node::TAKEN) != 0 {
            return;
        }
        if node.is(Node::PARKED_CHILD) {
            self.links.push_back(self.last_resort, parent);
        } else {
            self.offer(parent, End::Back);
        }
    }

    fn park(&mut self, slot: u32) {
        self.links.remove(slot);
        self.links.push_back(self.parked, slot);
        self.nodes[slot as usize].set(Node::PARKED, true);
        self.detach(slot, true);
    }

    /// Looks again at chunks that were exempt.
    fn wake(&mut self, most: usize, exempt: impl Fn(Slot) -> bool) {
        let Some(last) = self.links.back(self.parked) else {
            return;
        };
        for _ in 0..most {
            let Some(slot) = self.links.front(self.parked) else {
                return;
            };
            self.links.remove(slot);
            if exempt(Slot(slot)) {
                self.links.push_back(self.parked, slot);
            } else {
                self.nodes[slot as usize].set(Node::PARKED, false);
                if let Some(parent) = self.parent(slot) {
                    self.nodes[parent as usize].set(Node::PARKED_CHILD, false);
                }
                self.restore(slot);
            }
            if slot == last {
                return;
            }
        }
    }

    fn take(&mut self, slot: u32) {
        self.links.remove(slot);
        self.nodes[slot as usize].set(Node::TAKEN, true);
        self.leave(slot);
        self.detach(slot, false);
    }

    fn put_all_back(&mut self, victims: &[Slot]) {
        for victim in victims.iter().rev() {
            self.put_back(victim.0);
        }
    }

    fn put_back(&mut self, slot: u32) {
        self.nodes[slot as usize].set(Node::TAKEN, false);
        self.enter(slot);
        self.restore(slot);
    }

    fn restore(&mut self, slot: u32) {
        self.attach(slot);
        if self.nodes[slot as usize].children == 0 {
            self.offer(slot, End::Front);
        }
    }

    /// Counts a chunk's bytes.
    fn enter(&mut self, slot: u32) {
        let node = &self.nodes[slot as usize];
        self.classes[usize::from(node.class)].bytes += u64::from(node.bytes);
        if let Order::S3Fifo(order) = &mut self.order {
            order.entered(node);
        }
    }

    fn leave(&mut self, slot: u32) {
        let node = &self.nodes[slot as usize];
        self.classes[usize::from(node.class)].bytes -= u64::from(node.bytes);
        if let Order::S3Fifo(order) = &mut self.order {
            order.left(node);
        }
    }

    fn parent(&self, slot: u32) -> Option<u32> {
        let node = &self.nodes[slot as usize];
        let parent = &self.nodes[node.parent as usize];
        let known = node.is(Node::HAS_PARENT)
            && parent.is(Node::STORED)
            && parent.generation == node.parent_generation;
        known.then_some(node.parent)
    }

    fn is_stored(&self, slot: Slot) -> bool {
        let node = self.nodes.get(slot.0 as usize);
        node.is_some_and(|node| node.is(Node::STORED))
    }

    fn tick(&self, now: Instant) -> u32 {
        ticks(now.saturating_duration_since(self.epoch))
    }
}

fn ticks(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis() / TICK.as_millis()).unwrap_or(u32::MAX - 1)
}

/// One class, or all.
fn classes(class: Option<u8>) -> std::ops::Range<u8> {
    class.map_or(0..Class::LIMIT, |class| class..class + 1)
}

fn oldest(slots: impl Iterator<Item = u32>, nodes: &[Node]) -> Option<u32> {
    slots.min_by_key(|slot| nodes[*slot as usize].last)
}

/// The unit of time. 32 bits of it are 34 years.
const TICK: Duration = Duration::from_millis(250);
/// Exempt chunks that every call for victims looks at again.
const RETRIED_PER_CALL: usize = 8;

#[cfg(test)]
mod tests;
