//! The memory tier, memcpy and Redis, in turns.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use kvasir_codec::Object;
use kvasir_store::{MemoryConfig, PutOutcome, Store, StoreConfig, TierKind};
use kvasir_types::{ByteSize, ExtentIdx, ExtentRange};
use redis::Connection;
use tokio::runtime::Handle;

use super::Effort;
use super::payload::{Payload, Size, key};
use super::redis_server::RedisServer;
use super::sample::{IN_FLIGHT, Sample, Series, Work};
use crate::report::{Report, Row};

/// Measures one size.
pub(super) fn measure(
    runtime: &Handle,
    size: &Size,
    redis: &RedisServer,
    effort: &Effort,
    report: &mut Report,
) -> anyhow::Result<()> {
    let name = size.name;
    let count = size.count(effort.memory_set_bytes)?;
    let payload = Payload::random(size, count)?;
    let bench = Bench::fill(runtime, size, &payload, redis, effort.memory_window)?;
    let progress = crate::progress(
        (effort.memory_rounds * IN_FLIGHT.len()) as u64,
        &format!("memory, {name}"),
    );
    let mut series = All::default();
    let mut workers = Workers::start(size, redis)?;
    for _ in 0..effort.memory_rounds {
        for (at, in_flight) in IN_FLIGHT.into_iter().enumerate() {
            bench.round(at, &mut workers, in_flight, &mut series)?;
            progress.inc(1);
        }
    }
    progress.finish_and_clear();

    let limits = Some(series.copy.rates());
    let mut push = |operation: &str, series: &Series, limits| {
        let (operation, kind) = operation.split_once('/').unwrap_or((operation, ""));
        let slash = if kind.is_empty() { "" } else { "/" };
        for row in series.rows(&format!("{operation}/{name}{slash}{kind}"), limits) {
            report.push(row);
        }
    };
    push("memcpy", &series.copy, None);
    push("verify", &series.verify, limits);
    push("mem_get", &series.get, limits);
    push("mem_get/copied", &series.get_copied, limits);
    push("mem_put", &series.put, limits);
    push("mem_put/handed_over", &series.put_handed_over, limits);
    push("redis_get", &series.redis_get, None);
    push("redis_put", &series.redis_put, None);
    if name == INTEGRITY_SIZE {
        let (on, off) = (series.get_copied.rates(), series.unverified.rates());
        let cost = 1.0 - on[0] / off[0];
        report.push(Row::new("integrity_cost", cost, "share"));
    }
    Ok(())
}

/// Of `integrity_cost`.
pub(super) const INTEGRITY_SIZE: &str = "1MiB";

#[derive(Default)]
struct All {
    copy: Series,
    verify: Series,
    get: Series,
    get_copied: Series,
    unverified: Series,
    put: Series,
    put_handed_over: Series,
    redis_get: Series,
    redis_put: Series,
}

/// One buffer and one connection for each object in flight.
struct Workers {
    /// Touched before the first measurement.
    buffers: Vec<Vec<u8>>,
    connections: Vec<Connection>,
}

impl Workers {
    fn start(size: &Size, redis: &RedisServer) -> anyhow::Result<Self> {
        let most = IN_FLIGHT.into_iter().max().unwrap_or(1);
        let bytes = usize::try_from(size.bytes())?;
        Ok(Self {
            buffers: vec![vec![1; bytes]; most],
            connections: (0..most)
                .map(|_| redis.connect())
                .collect::<anyhow::Result<_>>()?,
        })
    }
}

struct Bench<'a> {
    runtime: &'a Handle,
    size: &'a Size,
    payload: &'a Payload,
    redis: &'a RedisServer,
    window: Duration,
    layers: ExtentRange,
    /// Holds the set.
    readable: Store,
    /// Holds as many bytes as the set has, and evicts for every object that is put.
    writable: Store,
    /// What a read of each object handed out.
    handed_out: Vec<Vec<Bytes>>,
    next: AtomicUsize,
    next_key: AtomicUsize,
}

impl<'a> Bench<'a> {
    fn fill(
        runtime: &'a Handle,
        size: &'a Size,
        payload: &'a Payload,
        redis: &'a RedisServer,
        window: Duration,
    ) -> anyhow::Result<Self> {
        let count = payload.objects.len() as u64;
        let charged = count * Store::charged_bytes_of_raw(&size.layout);
        let open = || {
            let memory = MemoryConfig::with_capacity(ByteSize::bytes(charged));
            runtime.block_on(Store::open(StoreConfig {
                memory,
                disk: None,
                ..StoreConfig::default()
            }))
        };
        let mut bench = Self {
            runtime,
            size,
            payload,
            redis,
            window,
            layers: size.all_extents()?,
            readable: open()?,
            writable: open()?,
            handed_out: Vec::new(),
            next: AtomicUsize::new(0),
            next_key: AtomicUsize::new(0),
        };
        let mut connection = redis.connect()?;
        redis::cmd("FLUSHALL").exec(&mut connection)?;
        for (index, object) in payload.objects.iter().enumerate() {
            runtime.block_on(bench.readable.put(object.clone()))?;
            bench.handed_out.push(bench.read(index)?);
            bench.put(index, true)?;
            bench.redis_put(&mut connection, index)?;
        }
        Ok(bench)
    }

    /// Everything once, with `IN_FLIGHT[at]` objects in flight.
    fn round(
        &self,
        at: usize,
        workers: &mut Workers,
        in_flight: usize,
        series: &mut All,
    ) -> anyhow::Result<()> {
        let buffers = &mut workers.buffers[..in_flight];
        let connections = &mut workers.connections[..in_flight];
        series.copy.push(
            at,
            self.work().drive(buffers, |buffer, index| {
                copy(self.payload.object(index).extents(), buffer);
                Ok(())
            })?,
        );
        let get = self.work().drive(buffers, |_, index| {
            black_box(self.read(index)?);
            Ok(())
        });
        series.get.push(at, get?);
        let get_copied = self.work().drive(buffers, |buffer, index| {
            copy(&self.read(index)?, buffer);
            Ok(())
        });
        series.get_copied.push(at, get_copied?);
        if self.size.name == INTEGRITY_SIZE {
            series.unverified.push(at, self.unverified(buffers)?);
        }
        let verify = self.work().drive(buffers, |_, index| self.verify(index));
        series.verify.push(at, verify?);
        let put = self.work().drive(buffers, |_, index| self.put(index, true));
        series.put.push(at, put?);
        let put = self
            .work()
            .drive(buffers, |_, index| self.put(index, false));
        series.put_handed_over.push(at, put?);

        let work = Work {
            server: Some(self.redis.process()),
            ..self.work()
        };
        let get = work.drive(connections, |connection, index| {
            let count = self.payload.whole.len();
            let name = key((index % count) as u64);
            let value: Vec<u8> = redis::cmd("GET").arg(name.as_bytes()).query(connection)?;
            let expected = self.size.bytes();
            ensure!(value.len() as u64 == expected, "Redis lost an object");
            black_box(value);
            Ok(())
        });
        series.redis_get.push(at, get?);
        let put = work.drive(connections, |connection, index| {
            self.redis_put(connection, index)
        });
        series.redis_put.push(at, put?);
        Ok(())
    }

    fn work(&self) -> Work<'_> {
        Work {
            window: self.window,
            object_bytes: self.size.bytes(),
            next: &self.next,
            server: None,
        }
    }

    fn read(&self, index: usize) -> anyhow::Result<Vec<Bytes>> {
        let key = self.payload.object(index).header().key();
        self.runtime.block_on(async {
            let lease = self.readable.lease(*key).await.context("a chunk is gone")?;
            ensure!(lease.tier() == TierKind::Memory, "there is no other tier");
            Ok(lease.read_extents(self.layers).await?)
        })
    }

    /// `read` and a copy by the reader, less the verification; see the suite's
    /// documentation.
    fn unverified(&self, buffers: &mut [Vec<u8>]) -> anyhow::Result<Sample> {
        self.work().drive(buffers, |buffer, index| {
            let key = self.payload.object(index).header().key();
            let lease = self.runtime.block_on(self.readable.lease(*key));
            let lease = lease.context("a chunk is gone")?;
            let layers = self.handed_out[index % self.handed_out.len()].clone();
            copy(&layers, buffer);
            drop(lease);
            Ok(())
        })
    }

    fn verify(&self, index: usize) -> anyhow::Result<()> {
        let object = self.payload.object(index);
        for (layer, bytes) in (0..).zip(object.extents()) {
            object.header().verify_extent(ExtentIdx(layer), bytes)?;
        }
        Ok(())
    }

    /// Puts the object under a key of its own.
    fn put(&self, index: usize, copied: bool) -> anyhow::Result<()> {
        let layers = self.payload.object(index).extents();
        let layers = if copied {
            layers.iter().map(|l| Bytes::copy_from_slice(l)).collect()
        } else {
            layers.to_vec()
        };
        let key = key(self.next_key.fetch_add(1, Ordering::Relaxed) as u64);
        let object = Object::raw(key, &self.size.layout, layers)?;
        let outcome = self.runtime.block_on(self.writable.put(object))?;
        ensure!(outcome == PutOutcome::Stored, "a new key was there already");
        Ok(())
    }

    /// Replaces the value of the key whose turn it is.
    fn redis_put(&self, connection: &mut Connection, index: usize) -> anyhow::Result<()> {
        let index = index % self.payload.whole.len();
        redis::cmd("SET")
            .arg(key(index as u64).as_bytes())
            .arg(&self.payload.whole[index][..])
            .exec(connection)?;
        Ok(())
    }
}

/// Copies layers one after another into a buffer of the object's size.
fn copy(layers: &[Bytes], buffer: &mut [u8]) {
    let mut rest = &mut *buffer;
    for layer in layers {
        let (head, tail) = rest.split_at_mut(layer.len());
        head.copy_from_slice(layer);
        rest = tail;
    }
    black_box(buffer);
}
