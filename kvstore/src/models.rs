//! The store's concurrency, in the orders in which threads can take their steps.
//!
//! Compiled with `--cfg kvasir_loom` only; `make check-deep` runs them. What runs is the
//! store's own code over the types of [`crate::sync`]. Doubles stand where a model must
//! see what happens, or cannot bear it: [`Memory`] for mapped memory and payload, and, of
//! the disk tier, a medium and a catalog in memory.
//!
//! All orders are tried that switch threads [`PREEMPTIONS`] times at most without being
//! forced to by a lock or an end; `LOOM_MAX_PREEMPTIONS=4` tries more. Not seen:
//! * counts of [`Bytes`], of chunks, and of weak references, which are std's;
//! * a count that is looked at while it falls: to loom, a look does not depend on the drops
//!   that come after it. And that [`ChargedBytes::is_held`] looks at std's relaxed counts,
//!   where loom's are in order;
//! * what crosses tiers, and all that only async code does: it needs tokio's threads.

#![allow(clippy::unwrap_used, reason = "a model fails by panicking")]

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use futures::FutureExt as _;
use kvasir_codec::Object;
use kvasir_types::{ByteSize, ChunkKey, DType, ExtentRange, Hints, KvLayout, Planes};
use loom::sync::atomic::AtomicU64;
use loom::thread;

use crate::budget::{Budget, ChargedBytes};
use kvasir_mem::Arena;

use crate::buffers::Buffers;
use crate::claims::Claims;
use crate::clock::Clock;
use crate::config::MemoryConfig;
use crate::events::EventLog;
use crate::memory::{Chunk, MemoryTier};
use crate::promotion::Promotions;
use crate::sync::Arc;
use crate::tier::Tier as _;

/// Bytes of payload that a model may have in memory at any moment.
pub(crate) const CAPACITY: u64 = 4096;

/// Each planted mistake was found with three or fewer.
const PREEMPTIONS: usize = 3;

const LAYERS: u16 = 2;

loom::lazy_static! {
    /// Bytes of [`Memory`] that exist.
    static ref LIVE: AtomicU64 = AtomicU64::new(0);
}

/// Memory that is counted from when it is made until it is dropped. Checks that there
/// is never more of it than [`CAPACITY`], whatever the budget says.
#[derive(Debug)]
pub(crate) struct Memory(Vec<u8>);

impl Memory {
    #[expect(
        clippy::unnecessary_wraps,
        reason = "has the signature of what it stands for"
    )]
    pub(crate) fn zeroed(len: usize, _: Option<&std::sync::Arc<Arena>>) -> io::Result<Self> {
        Ok(Self::filled(len, 0))
    }

    fn filled(len: usize, fill: u8) -> Self {
        let before = LIVE.fetch_add(len as u64, Ordering::Relaxed);
        assert!(
            before + len as u64 <= CAPACITY,
            "{before} bytes were in use when {len} were added"
        );
        Self(vec![fill; len])
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        LIVE.fetch_sub(self.0.len() as u64, Ordering::Relaxed);
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Runs `model` in all orders; says how many there are.
pub(crate) fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 100_000;
    builder.preemption_bound.get_or_insert(PREEMPTIONS);
    let orders = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = std::sync::Arc::clone(&orders);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    println!("{} orders", orders.load(Ordering::Relaxed));
}

pub(crate) fn layout() -> KvLayout {
    KvLayout::new(LAYERS, 1, Planes::symmetric(8), 16, DType::F8E4m3).unwrap()
}

/// Time that stands still: all runs of a model must go the same way.
pub(crate) fn clock() -> Clock {
    let now = Instant::now();
    Clock::new(move || now)
}

fn all_extents() -> ExtentRange {
    ExtentRange::new(0, LAYERS).unwrap()
}

/// A chunk of [`Memory`].
fn object(key: ChunkKey, fill: u8) -> Object {
    let layout = layout();
    let layer = || Bytes::from_owner(Memory::filled(layout.layer_bytes(), fill));
    Object::raw(key, &layout, vec![layer(), layer()]).unwrap()
}

pub(crate) fn memory_tier() -> MemoryTier {
    let config = MemoryConfig::with_capacity(ByteSize::bytes(CAPACITY));
    MemoryTier::new(&config, clock(), EventLog::new())
}

/// Stores a chunk as the store does: memory first, then bytes.
fn put(tier: &MemoryTier, key: ChunkKey, fill: u8) -> bool {
    let layout = layout();
    let bytes = layout.chunk_bytes() + Chunk::overhead_bytes(LAYERS);
    let Ok(reservation) = tier.reserve(bytes) else {
        return false;
    };
    let chunk = Chunk::charge(object(key, fill), Hints::default(), reservation);
    tier.publish(std::sync::Arc::new(chunk.unwrap()), 1)
}

/// Fills what is left of the memory, for a moment. Says whether that worked.
fn press(tier: &MemoryTier, bytes: u64) -> bool {
    let Ok(reservation) = tier.reserve(bytes) else {
        return false;
    };
    drop(Memory::zeroed(usize::try_from(bytes).unwrap(), None));
    drop(reservation);
    true
}

/// Reads all of a chunk and lets go of everything but the bytes.
fn read(tier: &MemoryTier, key: ChunkKey) -> Option<Vec<Bytes>> {
    let reader = tier.open(key).now_or_never().unwrap().unwrap()?;
    let layers = reader.read_extents(all_extents()).now_or_never().unwrap();
    Some(layers.unwrap())
}

fn are_filled(layers: &[Bytes], fill: u8) -> bool {
    layers.len() == usize::from(LAYERS) && layers.iter().flatten().all(|&byte| byte == fill)
}

/// The budget is not exceeded by a reader, a writer and whoever comes next, and hears of
/// bytes when they are gone.
#[test]
fn a_budget_is_an_upper_bound_of_what_is_in_memory() {
    check(|| {
        let budget = Budget::new(CAPACITY);
        let use_most = |budget: &Budget| {
            let mut reservation = budget.try_reserve(CAPACITY - 1)?;
            let memory = Memory::filled(2048, 1);
            let charged = reservation.charge(Bytes::from_owner(memory)).unwrap();
            Some((charged, reservation))
        };
        let threads = [0, 1].map(|_| {
            let budget = budget.clone();
            thread::spawn(move || {
                let Some((charged, rest)) = use_most(&budget) else {
                    return;
                };
                drop(rest);
                let reader = charged.share();
                drop(charged);
                assert!(budget.used() >= 2048, "a reader has them");
                drop(reader);
            })
        });
        drop(use_most(&budget));
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(budget.used(), 0);
        assert!(budget.peak() <= CAPACITY);
        assert_eq!(LIVE.load(Ordering::Relaxed), 0);
    });
}

/// The owner and the readers of bytes let go in any order, and the charge ends once.
#[test]
fn a_charge_ends_once_with_the_last_reader() {
    check(|| {
        let budget = Budget::new(CAPACITY);
        let mut reservation = budget.try_reserve(CAPACITY).unwrap();
        let memory = Bytes::from_owner(Memory::filled(4096, 7));
        let charged = reservation.charge(memory).unwrap();
        drop(reservation);
        let readers = [charged.share(), charged.share().slice(1..2)].map(|reader| {
            thread::spawn(move || {
                assert!(reader.iter().all(|&byte| byte == 7));
                drop(reader);
            })
        });
        drop(charged);
        // Whoever gets the bytes now finds them gone.
        if let Some(reservation) = budget.try_reserve(CAPACITY) {
            drop(Memory::filled(4096, 8));
            drop(reservation);
        }
        for reader in readers {
            reader.join().unwrap();
        }
        assert_eq!(budget.used(), 0);
        assert_eq!(LIVE.load(Ordering::Relaxed), 0);
    });
}

/// Buffers come, are read by others than their users, go back, and make room.
#[test]
fn a_buffer_has_one_user_and_idle_ones_make_room() {
    const BYTES: usize = 2048;
    check(|| {
        let budget = Budget::new(CAPACITY);
        // Room for one that waits.
        let buffers = Buffers::new(BYTES as u64, None);
        let users = [1, 2].map(|fill| {
            let (budget, buffers) = (budget.clone(), buffers.clone());
            thread::spawn(move || {
                let buffer = buffers.reuse(BYTES).or_else(|| {
                    let reservation = budget.try_reserve(BYTES as u64)?;
                    Some(buffers.create(reservation).unwrap())
                });
                let Some(mut buffer) = buffer else { return };
                buffer.as_mut().fill(fill);
                let bytes = Bytes::from_owner(buffer);
                let part = bytes.slice(..1);
                drop(bytes);
                assert_eq!(part[0], fill);
            })
        });
        // Somebody needs the memory for something else.
        buffers.trim();
        if let Some(reservation) = budget.try_reserve(CAPACITY) {
            drop(Memory::zeroed(4096, None));
            drop(reservation);
        }
        for user in users {
            user.join().unwrap();
        }
        assert!(budget.used() <= BYTES as u64, "more waits than may");
        assert_eq!(LIVE.load(Ordering::Relaxed), budget.used());
        buffers.trim();
        assert_eq!(budget.used(), 0);
    });
}

/// A lease whose layers are read side by side, while somebody needs the memory.
#[test]
fn gathered_layers_come_out_whole_and_once_or_give_way() {
    check(|| {
        let budget = Budget::new(CAPACITY);
        let promotions = Promotions::new(CAPACITY);
        let len = layout().layer_bytes();
        let promotion = promotions.begin(LAYERS, layout().chunk_bytes());
        // Says how often the whole chunk came out.
        let read = |layer: u16| {
            let promotion = std::sync::Arc::clone(&promotion);
            let mut reservation = budget.try_reserve(len as u64).unwrap();
            let memory = Bytes::from_owner(Memory::filled(len, 1));
            let charged = reservation.charge(memory).unwrap();
            move || {
                let range = ExtentRange::new(layer, layer + 1).unwrap();
                promotion.add(range, vec![charged]).map_or(0, |layers| {
                    let layers: Vec<_> = layers.iter().map(ChargedBytes::share).collect();
                    assert!(are_filled(&layers, 1));
                    1
                })
            }
        };
        let (first, again) = (read(0), read(1));
        let second = thread::spawn(read(1));
        let other = thread::spawn({
            let budget = budget.clone();
            move || {
                promotions.abandon();
                if let Some(reservation) = budget.try_reserve(CAPACITY) {
                    drop(Memory::filled(4096, 2));
                    drop(reservation);
                }
            }
        });
        let whole = first() + again() + second.join().unwrap();
        assert!(whole <= 1, "came out {whole} times");
        other.join().unwrap();
        drop(promotion);
        assert_eq!(budget.used(), 0);
        assert_eq!(LIVE.load(Ordering::Relaxed), 0);
    });
}

/// Eviction takes no chunk that a reader has, whichever part of it.
#[test]
fn what_a_reader_holds_is_not_evicted() {
    check(|| {
        let tier = memory_tier();
        let key = ChunkKey::from_bytes([1; 32]);
        assert!(put(&tier, key, 1));
        let reader = {
            let tier = tier.clone();
            thread::spawn(move || {
                let Some(layers) = read(&tier, key) else {
                    return;
                };
                assert!(tier.find(&[key])[0].is_some(), "evicted while held");
                assert!(are_filled(&layers, 1));
            })
        };
        let evicted = press(&tier, CAPACITY);
        reader.join().unwrap();
        assert_eq!(tier.usage().evictions, u64::from(evicted));
        assert_eq!(
            tier.usage().bytes,
            LIVE.load(Ordering::Relaxed) + overhead(!evicted)
        );
        assert!(press(&tier, CAPACITY), "nobody reads any more");
        assert_eq!(tier.usage().bytes, 0);
    });
}

/// A key is deleted and put again while it is read.
#[test]
fn what_a_reader_holds_does_not_change() {
    check(|| {
        let tier = memory_tier();
        let key = ChunkKey::from_bytes([1; 32]);
        assert!(put(&tier, key, 1));
        let held = read(&tier, key).unwrap();
        let reader = {
            let tier = tier.clone();
            thread::spawn(move || {
                assert!(are_filled(&held, 1));
                drop(held);
                if let Some(layers) = read(&tier, key) {
                    assert!(are_filled(&layers, 1) || are_filled(&layers, 2));
                }
            })
        };
        assert!(tier.discard(&key));
        let stored = put(&tier, key, 2);
        press(&tier, CAPACITY);
        reader.join().unwrap();
        assert!(stored, "there is room for both");
        assert!(press(&tier, CAPACITY));
        assert_eq!(tier.usage().bytes, 0);
        assert_eq!(LIVE.load(Ordering::Relaxed), 0);
    });
}

/// One writer at a time, and nobody waits for ever. Not more than one waits: the order in
/// which tokio wakes several is random, and a model must not be.
#[test]
fn a_key_has_one_writer() {
    check(|| {
        let claims = Claims::default();
        let writers = Arc::new(AtomicU64::new(0));
        let write_twice = || {
            let (claims, writers) = (claims.clone(), writers.clone());
            move || {
                for _ in 0..2 {
                    let key = ChunkKey::from_bytes([1; 32]);
                    let claim = loom::future::block_on(claims.claim(key));
                    assert_eq!(writers.fetch_add(1, Ordering::Relaxed), 0);
                    writers.fetch_sub(1, Ordering::Relaxed);
                    drop(claim);
                }
            }
        };
        let other = thread::spawn(write_twice());
        write_twice()();
        other.join().unwrap();
    });
}

/// What a chunk is charged beyond its payload, if there is one.
fn overhead(is_there: bool) -> u64 {
    if is_there {
        crate::memory::Chunk::overhead_bytes(LAYERS)
    } else {
        0
    }
}
