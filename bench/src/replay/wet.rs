//! A real store under a trace: real files, small chunks, the trace's time.
//!
//! Requests come one after the other, as fast as the store serves them; its clock shows
//! the trace's time. Every block is a chunk of 4 KiB. A request leases its longest
//! stored prefix, reads and compares all of it, then puts the rest with
//! [`Durability::Memory`] and its parent as a hint.
//!
//! What differs from the simulation: the store's buffers, index entries and readers
//! take part of its memory; what moves to disk does so in the background, ahead of
//! eviction; and a chunk read from disk takes its place in memory only if there is room
//! beside what is being read.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::ensure;
use bytes::Bytes;
use kvasir_codec::Object;
use kvasir_store::policy::{Admission, PolicyKind};
use kvasir_store::{
    Clock, DiskConfig, Environment, MemoryConfig, PutError, PutOptions, Store, StoreConfig,
    TierKind,
};
use kvasir_types::{ByteSize, ChunkKey, DType, Durability, ExtentRange, Hints, KvLayout, Planes};

use super::dry::{Outcome, Setup};
use super::trace::{Request, Trace};

/// What came of a replay.
pub(crate) struct Replayed {
    pub(crate) outcome: Outcome,
    /// Blocks that found no room.
    pub(crate) refused: u64,
    pub(crate) took: Duration,
}

/// Replays a trace in a store whose disk tier lies in `directory`.
///
/// # Errors
/// The store failed, or gave wrong bytes.
pub(crate) async fn replay(
    trace: &Trace,
    setup: &Setup,
    directory: &Path,
) -> anyhow::Result<Replayed> {
    let start = Instant::now();
    let time = Arc::new(Mutex::new(start));
    let shown = Arc::clone(&time);
    let environment = Environment {
        clock: Clock::new(move || *shown.lock().unwrap_or_else(PoisonError::into_inner)),
        ..Environment::default()
    };
    let layout = KvLayout::new(1, 1, Planes::symmetric(64), 16, DType::Bf16)?;
    let store = Store::open_in(environment, config(setup, &layout, directory)).await?;
    let mut replayed = Replayed {
        outcome: Outcome::default(),
        refused: 0,
        took: Duration::ZERO,
    };
    for request in &trace.requests {
        *time.lock().unwrap_or_else(PoisonError::into_inner) = start + request.at;
        serve(trace, request, &store, &layout, &mut replayed).await?;
    }
    replayed.outcome.disk_writes = store.stats().disk.unwrap_or_default().writes;
    replayed.took = start.elapsed();
    store.close().await?;
    Ok(replayed)
}

fn config(setup: &Setup, layout: &KvLayout, directory: &Path) -> StoreConfig {
    let Setup {
        policy,
        memory_blocks,
        disk_blocks,
        admission,
        ..
    } = *setup;
    StoreConfig {
        memory: MemoryConfig {
            policy,
            ..MemoryConfig::with_capacity(ByteSize::bytes(
                memory_blocks as u64 * Store::charged_bytes_of_raw(layout),
            ))
        },
        disk: Some(DiskConfig {
            policy,
            admission,
            capacity: ByteSize::bytes(disk_blocks as u64 * FRAME_BYTES),
            ..DiskConfig::at(directory)
        }),
        ..StoreConfig::default()
    }
}

async fn serve(
    trace: &Trace,
    request: &Request,
    store: &Store,
    layout: &KvLayout,
    replayed: &mut Replayed,
) -> anyhow::Result<()> {
    let keys: Vec<ChunkKey> = request.blocks.iter().map(|block| key(*block)).collect();
    let mut leases = Vec::new();
    for &key in &keys[..store.lookup(&keys).prefix] {
        // Evicted since by what was read before.
        let Some(lease) = store.lease(key).await else {
            break;
        };
        leases.push(lease);
    }
    let outcome = &mut replayed.outcome;
    outcome.hit_tokens += request.tokens_of(leases.len());
    outcome.hit_blocks += leases.len() as u64;
    let all = ExtentRange::new(0, layout.layers().into())?;
    for (lease, &block) in leases.iter().zip(&request.blocks) {
        outcome.memory_hit_blocks += u64::from(lease.tier() == TierKind::Memory);
        let layers = lease.read_extents(all).await?;
        ensure!(layers == [payload(block, layout)], "block {block} is wrong");
    }
    for &block in &request.blocks[leases.len()..] {
        let object = Object::raw(key(block), layout, vec![payload(block, layout)])?;
        let options = PutOptions {
            durability: Durability::Memory,
            hints: Hints {
                parent: trace.blocks[block as usize].parent.map(key),
                ..Hints::default()
            },
        };
        match store.put_with(object, options).await {
            Ok(_) => (),
            Err(PutError::Throttled(_)) => replayed.refused += 1,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn key(block: u32) -> ChunkKey {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&block.to_le_bytes());
    ChunkKey::from_bytes(bytes)
}

fn payload(block: u32, layout: &KvLayout) -> Bytes {
    let words = layout.layer_bytes() / 4;
    (0..u32::try_from(words).unwrap_or(u32::MAX))
        .flat_map(|word| (word ^ block.wrapping_mul(0x9e37_79b9)).to_le_bytes())
        .collect()
}

/// Header and payload of a chunk, in blocks of 4 KiB.
const FRAME_BYTES: u64 = 8192;
/// What a store is replayed with, next to the default policy.
pub(crate) const POLICIES: [(PolicyKind, Admission); 3] = [
    (PolicyKind::Lru, Admission::All),
    (PolicyKind::Reuse, Admission::All),
    (PolicyKind::Reuse, Admission::MinReuse(0.05)),
];
