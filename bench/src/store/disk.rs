//! The disk tier and fio, in turns.

use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures::TryStreamExt as _;
use kvasir_codec::Object;
use kvasir_store::policy::PolicyKind;
use kvasir_store::{DiskConfig, Lease, MemoryConfig, PutOutcome, Store, StoreConfig, TierKind};
use kvasir_types::{ByteSize, ExtentIdx, ExtentRange};
use rand::SeedableRng as _;
use rand::seq::SliceRandom as _;
use rand_chacha::ChaCha8Rng;
use tokio::runtime::Handle;

use super::Effort;
use super::fio::{Direction, Fio, Limit};
use super::memory::INTEGRITY_SIZE;
use super::payload::{Payload, Size, key};
use super::sample::{IN_FLIGHT, Series, Work};
use crate::report::{Report, Row, median};

/// Measures one size, with a store in `directory`.
pub(super) fn measure(
    runtime: &Handle,
    size: &Size,
    fio: &Fio,
    directory: &Path,
    effort: &Effort,
    report: &mut Report,
) -> anyhow::Result<()> {
    let name = size.name;
    let set = set_bytes(size, effort.disk_set_bytes);
    let mut bench = Bench::open(runtime, size, directory, set)?;
    let progress = crate::progress(2 * effort.disk_rounds as u64, &format!("disk, {name}"));

    let mut puts = Series::default();
    let mut limit = Limit::new(fio, Direction::Write, size.bytes(), set);
    for _ in 0..effort.disk_rounds {
        limit.measure()?;
        for (at, in_flight) in IN_FLIGHT.into_iter().enumerate() {
            let work = bench.work(effort, &bench.next_key);
            let sample = work.drive(&mut vec![(); in_flight], |(), index| bench.put(index))?;
            puts.push(at, sample);
        }
        bench.trim()?;
        progress.inc(1);
    }
    let put_limits = limit.rates();

    bench.fill()?;
    let mut gets = Series::default();
    let mut limit = Limit::new(fio, Direction::Read, size.bytes(), set);
    let order = bench.order();
    bench.displace(&order)?;
    let next = AtomicUsize::new(0);
    for _ in 0..effort.disk_rounds {
        limit.measure()?;
        for (at, in_flight) in IN_FLIGHT.into_iter().enumerate() {
            let before = device_read_bytes()?;
            let work = bench.work(effort, &next);
            let sample = work.drive(&mut vec![(); in_flight], |(), index| {
                black_box(bench.get(order[index % order.len()])?);
                Ok(())
            })?;
            let read = device_read_bytes()? - before;
            ensure!(
                read >= sample.bytes / 20 * 19,
                "of {} bytes only {read} came from the device, the others from a cache",
                sample.bytes
            );
            gets.push(at, sample);
        }
        progress.inc(1);
    }
    let get_limits = limit.rates();
    progress.finish_and_clear();

    let get_rows = gets.rows(&format!("disk_get/{name}"), get_limits);
    let put_rows = puts.rows(&format!("disk_put/{name}"), put_limits);
    for row in get_rows.into_iter().chain(put_rows) {
        report.push(row);
    }
    if name == INTEGRITY_SIZE {
        let turns = next.load(Ordering::Relaxed);
        let keys = order.iter().cycle().skip(turns % order.len());
        let cost = bench.verify_again(keys.take(INTEGRITY_READS).copied())?;
        report.push(Row::new("integrity_cost/disk", cost, "share"));
    }
    bench.runtime.block_on(bench.store.close())?;
    Ok(())
}

/// What the objects of one size take together: `wanted` bytes, or more where that would
/// be too few objects.
pub(super) fn set_bytes(size: &Size, wanted: u64) -> u64 {
    wanted.max(SET_OBJECTS * size.bytes())
}

struct Bench<'a> {
    runtime: &'a Handle,
    size: &'a Size,
    layers: ExtentRange,
    payload: Payload,
    store: Store,
    /// How many objects the set has.
    count: usize,
    /// Objects from `oldest` on are stored, up to `next_key`.
    oldest: usize,
    next_key: AtomicUsize,
}

impl<'a> Bench<'a> {
    fn open(
        runtime: &'a Handle,
        size: &'a Size,
        directory: &Path,
        set: u64,
    ) -> anyhow::Result<Self> {
        let memory = MEMORY_OBJECTS * Store::charged_bytes_of_raw(&size.layout);
        let config = StoreConfig {
            memory: MemoryConfig {
                // What is read in turn is never in memory when its turn comes.
                policy: PolicyKind::Lru,
                ..MemoryConfig::with_capacity(ByteSize::bytes(memory))
            },
            disk: Some(DiskConfig {
                // Nothing is evicted: a round of puts is trimmed by us, untimed.
                capacity: DISK_CAPACITY,
                ..DiskConfig::at(directory)
            }),
            ..StoreConfig::default()
        };
        let count = size.count(set)?;
        Ok(Self {
            runtime,
            size,
            layers: size.all_extents()?,
            payload: Payload::random(size, count.min(PAYLOAD_OBJECTS))?,
            store: runtime.block_on(Store::open(config))?,
            count,
            oldest: 0,
            next_key: AtomicUsize::new(0),
        })
    }

    fn work<'b>(&self, effort: &Effort, next: &'b AtomicUsize) -> Work<'b> {
        Work {
            window: effort.disk_window,
            object_bytes: self.size.bytes(),
            next,
            server: None,
        }
    }

    fn put(&self, index: usize) -> anyhow::Result<()> {
        self.runtime.block_on(self.stored(index))
    }

    async fn stored(&self, index: usize) -> anyhow::Result<()> {
        let layers = self.payload.object(index).extents().to_vec();
        let object = Object::raw(key(index as u64), &self.size.layout, layers)?;
        let outcome = self.store.put(object).await?;
        ensure!(outcome == PutOutcome::Stored, "a new key was there already");
        Ok(())
    }

    /// Deletes the oldest objects beyond the set.
    fn trim(&mut self) -> anyhow::Result<()> {
        let end = self.next_key.load(Ordering::Relaxed);
        while end - self.oldest > self.count {
            let key = key(self.oldest as u64);
            self.runtime.block_on(self.store.delete(key))?;
            self.oldest += 1;
        }
        Ok(())
    }

    /// Puts what the set lacks.
    fn fill(&mut self) -> anyhow::Result<()> {
        let stored = self.next_key.load(Ordering::Relaxed);
        let wanted = (self.oldest + self.count).max(stored);
        self.next_key.store(wanted, Ordering::Relaxed);
        let puts = futures::stream::iter((stored..wanted).map(Ok));
        let most = IN_FLIGHT.into_iter().max();
        self.runtime
            .block_on(puts.try_for_each_concurrent(most, |index| self.stored(index)))
    }

    /// Reads the end of the cycle, so that memory holds that, and nothing that was put
    /// just now and comes soon.
    fn displace(&self, order: &[usize]) -> anyhow::Result<()> {
        for index in &order[order.len() / 2..] {
            let lease = self.store.lease(key(*index as u64));
            let lease = self.runtime.block_on(lease).context("a chunk is gone")?;
            self.runtime.block_on(lease.read_extents(self.layers))?;
        }
        Ok(())
    }

    /// The set, shuffled.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (self.oldest..self.oldest + self.count).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(1));
        order
    }

    fn get(&self, index: usize) -> anyhow::Result<(Lease, Vec<Bytes>)> {
        self.runtime.block_on(async {
            let lease = self.store.lease(key(index as u64)).await;
            let lease = lease.context("a chunk is gone")?;
            ensure!(lease.tier() == TierKind::Disk, "a chunk was in memory");
            let layers = lease.read_extents(self.layers).await?;
            Ok((lease, layers))
        })
    }

    /// Verifying what was just read once more ÷ reading it.
    fn verify_again(&self, indices: impl Iterator<Item = usize>) -> anyhow::Result<f64> {
        let mut reads = Vec::new();
        let mut checks = Vec::new();
        for index in indices {
            let begun = Instant::now();
            let (lease, layers) = self.get(index)?;
            let read = begun.elapsed();
            for (layer, bytes) in (0..).zip(&layers) {
                lease.header().verify_extent(ExtentIdx(layer), bytes)?;
            }
            reads.push(read.as_secs_f64());
            checks.push((begun.elapsed() - read).as_secs_f64());
        }
        Ok(median(&mut checks) / median(&mut reads))
    }
}

/// Bytes that this process caused to be read from devices, by the kernel's account.
fn device_read_bytes() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/io").context("the kernel's account of I/O")?;
    let bytes = text
        .lines()
        .find_map(|line| line.strip_prefix("read_bytes:"));
    Ok(bytes.context("no read_bytes in it")?.trim().parse()?)
}

/// A set that is read in a cycle has at least as many, so that none of them is still in
/// memory when its turn comes.
const SET_OBJECTS: u64 = 128;
/// Of the memory tier: room for those in flight, and far fewer than the set has.
const MEMORY_OBJECTS: u64 = 64;
const DISK_CAPACITY: ByteSize = ByteSize::gib(64);
/// More make no difference: the device does not know what was written before.
const PAYLOAD_OBJECTS: usize = 64;
const INTEGRITY_READS: usize = 64;
