//! What every [`Tier`] owes: its `# Contract`, checked.
//!
//! Sizes are measured, not assumed: a tier says what a chunk costs it, and the
//! checks that need a full tier open one with room for so many chunks.

#![allow(clippy::unwrap_used, reason = "a suite fails by panicking")]

mod chunks;
mod pressure;

use std::any::Any;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_codec::Object;
use kvasir_store::policy::PolicyKind;
use kvasir_store::{Clock, Read, Tier, Written};
use kvasir_types::{ByteSize, ChunkKey, DType, ExtentRange, KvLayout, Planes};

/// How a tier under test is to be opened: empty, and with these limits.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The tier's byte budget.
    pub capacity: ByteSize,
    /// Its cap on pinned bytes.
    pub pin_limit: ByteSize,
    /// Which chunks go first.
    pub policy: PolicyKind,
    /// Where it takes the time from.
    pub clock: Clock,
}

/// A tier under test, and what must outlive it, such as its directory.
#[derive(Debug)]
pub struct Fixture {
    /// The tier.
    pub tier: Arc<dyn Tier>,
    /// Dropped after the tier.
    pub keep: Box<dyn Any + Send + Sync>,
}

/// Runs every check on tiers that `open` makes, under one policy.
///
/// # Panics
/// Where the tier breaks its contract.
pub async fn run<F, O>(policy: PolicyKind, open: F)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let suite = Suite::new(policy, open).await;
    chunks::every_layout_round_trips(&suite).await;
    chunks::every_level_round_trips(&suite).await;
    chunks::a_missing_key_is_a_miss(&suite).await;
    chunks::a_range_outside_the_chunk_is_a_miss(&suite).await;
    chunks::writing_twice_stores_once(&suite).await;
    chunks::one_of_many_writers_stores(&suite).await;
    chunks::a_chunk_is_seen_whole_or_not_at_all(&suite).await;
    chunks::an_abandoned_write_leaves_a_whole_chunk_or_none(&suite).await;
    chunks::readers_survive_removal_and_rewriting(&suite).await;
    chunks::entries_list_what_is_stored(&suite).await;
    if policy == PolicyKind::Lru {
        pressure::the_least_recently_used_goes_first(&suite).await;
    }
    pressure::looking_does_not_extend_a_life(&suite).await;
    pressure::the_budget_holds_under_load(&suite).await;
    pressure::what_is_held_is_not_evicted(&suite).await;
    pressure::what_is_pinned_is_not_evicted(&suite).await;
    pressure::pins_are_capped_and_expire(&suite).await;
    pressure::what_can_never_fit_is_refused(&suite).await;
}

/// Opens tiers of a size given in chunks.
struct Suite<F> {
    open: F,
    policy: PolicyKind,
    /// Bytes that a chunk of [`layout`] costs the tier.
    chunk_bytes: u64,
}

impl<F, O> Suite<F>
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    async fn new(policy: PolicyKind, open: F) -> Self {
        let setup = Setup {
            capacity: ByteSize::mib(1),
            pin_limit: ByteSize::mib(1),
            policy,
            clock: Clock::default(),
        };
        let fixture = open(setup).await;
        assert_eq!(write(&fixture, object(0)).await, Written::Stored);
        let chunk_bytes = fixture.tier.usage().bytes;
        assert!(chunk_bytes >= object(0).header().payload_bytes());
        Self {
            open,
            policy,
            chunk_bytes,
        }
    }

    /// A tier with room for `chunks`, of which half may be pinned.
    async fn with_room_for(&self, chunks: u64) -> Fixture {
        self.with_clock(chunks, Clock::default()).await
    }

    async fn with_clock(&self, chunks: u64, clock: Clock) -> Fixture {
        let capacity = self.chunk_bytes * chunks;
        (self.open)(Setup {
            capacity: ByteSize::bytes(capacity),
            pin_limit: ByteSize::bytes(capacity / 2),
            policy: self.policy,
            clock,
        })
        .await
    }

    async fn roomy(&self) -> Fixture {
        self.with_room_for(1000).await
    }
}

/// Time that passes when a check says so.
#[derive(Clone, Debug)]
struct VirtualTime {
    start: Instant,
    passed_millis: Arc<AtomicU64>,
}

impl VirtualTime {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            passed_millis: Arc::default(),
        }
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.passed_millis.load(Ordering::SeqCst))
    }

    fn pass(&self, time: Duration) {
        let millis = u64::try_from(time.as_millis()).unwrap();
        self.passed_millis.fetch_add(millis, Ordering::SeqCst);
    }

    fn clock(&self) -> Clock {
        let time = self.clone();
        Clock::new(move || time.now())
    }
}

/// The layout of checks that do not care: 4 layers of 2 KiB.
fn layout() -> KvLayout {
    KvLayout::new(4, 2, Planes::symmetric(16), 16, DType::Bf16).unwrap()
}

fn all_extents(layout: &KvLayout) -> ExtentRange {
    ExtentRange::new(0, layout.layers().into()).unwrap()
}

fn key(number: u64) -> ChunkKey {
    // Different first bytes, as hashes have.
    let mut bytes = [0x5a; 32];
    for (slot, byte) in bytes.iter_mut().zip(number.to_le_bytes()) {
        *slot = byte;
    }
    ChunkKey::from_bytes(bytes)
}

/// Chunk `number`, with content of its own.
fn object(number: u64) -> Object {
    object_with(number, &layout(), number)
}

fn object_with(number: u64, layout: &KvLayout, seed: u64) -> Object {
    let layers = (0..u64::from(layout.layers()))
        .map(|layer| {
            let mut state = seed ^ (layer << 32) ^ 0x9e37_79b9_7f4a_7c15;
            (0..layout.layer_bytes())
                .map(|_| {
                    // xorshift64 (Marsaglia 2003)
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state.to_le_bytes()[3]
                })
                .collect::<Bytes>()
        })
        .collect();
    Object::raw(key(number), layout, layers).unwrap()
}

async fn write(fixture: &Fixture, object: Object) -> Written {
    fixture.tier.write(object).await.unwrap()
}

async fn read(fixture: &Fixture, number: u64) -> Read {
    let all = all_extents(&layout());
    fixture.tier.read_extents(key(number), all).await.unwrap()
}

/// Stored and whole, with the content of `object`.
async fn assert_holds(fixture: &Fixture, object: &Object) {
    let header = object.header();
    let read = fixture
        .tier
        .read_extents(*header.key(), header.all())
        .await
        .unwrap();
    assert_eq!(read, Read::Extents(object.extents().to_vec()));
}

fn is_there(fixture: &Fixture, number: u64) -> bool {
    fixture.tier.find(&[key(number)])[0].is_some()
}
