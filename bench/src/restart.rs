//! `restart`: a disk tier of many small chunks is closed and opened again.
//!
//! Another process fills the tier and ends, so that this one's memory holds nothing but
//! what opening takes. Filling is not measured and would take longest: the fill leaves out
//! what makes each chunk durable by itself. Its segments are ordinary files without a sync,
//! written out as a whole at the end, and its catalog lies in `/dev/shm` (where there is
//! room) until it is moved beside them. What is opened is what any daemon leaves.
//! `--hollow` leaves out the payload, too, for tiers larger than the disk at hand; then
//! nothing can be read and verified.
//!
//! # Rows
//! * `ready`: from the call to a store that serves, with a cold page cache; `ready/warm`
//!   with a warm one.
//! * `scan`: chunks ÷ `ready/warm`, the whole start and not just the reading of the
//!   catalog; limit: a million a second. `scan/cold`: the same of `ready`. `scan/cpu`: of
//!   the CPU time that the warm start took, which other processes do not lengthen.
//! * `served`: share of the chunks that lookups find again; limit: 0.99.
//! * `verified`: chunks of a random sample that were read and had the right bytes.
//! * `memory`: resident memory after opening, less before, a chunk, everything included;
//!   limit: 128 bytes. `memory/peak`: the most while it was opened.
//! * `lookup`: keys a second, 512 in a call, of which the longest stored prefix is asked
//!   for; `/p50` and `/p99` of calls. `lookup/writing`: the same while chunks are stored
//!   durably as fast as eight writers can.

mod fill;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use kvasir_server::child::drop_page_cache;
use kvasir_store::{Environment, Store, TierKind};
use kvasir_types::ExtentRange;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::time::{ClockId, clock_gettime};
use tokio::task::JoinSet;

use self::fill::{Chunks, Fast};
use crate::report::{Report, Row, median, percentile};
use crate::store::key;

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Chunks to store.
    #[arg(long, default_value_t = 1_000_000)]
    chunks: u64,
    /// Leave out the payload, which takes 8 KiB of disk a chunk.
    #[arg(long)]
    hollow: bool,
    /// Where the tier lies, in a directory of its own that is deleted afterwards.
    /// Default: the system's temporary directory.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Fill `dir` itself, and end.
    #[arg(long, requires = "dir")]
    fill: bool,
    /// Measure `dir` itself, which `--fill` filled with as many chunks.
    #[arg(long, requires = "dir", conflicts_with = "fill")]
    filled: bool,
}

pub(crate) async fn run(options: &Options, quick: bool) -> anyhow::Result<Option<Report>> {
    let mut options = options.clone();
    if options.fill {
        let dir = options.dir.as_deref().context("a directory to fill")?;
        fill::fill(dir, options.chunks, options.hollow).await?;
        return Ok(None);
    }
    if options.filled {
        let dir = options
            .dir
            .as_deref()
            .context("a directory that was filled")?;
        return measure(&options, dir, quick).await.map(Some);
    }
    if quick {
        options.chunks = options.chunks.min(QUICK_CHUNKS);
    }
    let parent = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    let directory = tempfile::tempdir_in(parent)?;
    fill_apart(&options, directory.path())?;
    measure(&options, directory.path(), quick).await.map(Some)
}

/// Fills `directory` in another process.
fn fill_apart(options: &Options, directory: &Path) -> anyhow::Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["restart", "--fill", "--dir"]).arg(directory);
    command.args(["--chunks", &options.chunks.to_string()]);
    if options.hollow {
        command.arg("--hollow");
    }
    let status = tokio::task::block_in_place(|| command.status())?;
    ensure!(status.success(), "the tier was not filled: {status}");
    Ok(())
}

async fn measure(options: &Options, directory: &Path, quick: bool) -> anyhow::Result<Report> {
    let chunks = Chunks::new()?;
    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    let count = options.chunks as f64;
    let mut report = Report::new("restart");
    report.set("chunks", options.chunks);
    report.set("frame_bytes", Chunks::FRAME_BYTES);
    report.set("hollow", options.hollow);

    tokio::task::block_in_place(|| drop_page_cache(directory))?;
    let before = Memory::now()?;
    let begun = Instant::now();
    let store = open(options, directory).await?;
    let cold = begun.elapsed().as_secs_f64();
    let after = Memory::now()?;
    let served = served(&store, options.chunks) / count;
    let verified = match options.hollow {
        true => 0,
        false => verify(&store, &chunks, options.chunks).await?,
    };
    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    let verified = verified as f64;
    store.close().await?;
    drop(store);
    let (begun, worked) = (Instant::now(), cpu_seconds());
    let store = open(options, directory).await?;
    let warm = begun.elapsed().as_secs_f64();
    let worked = cpu_seconds() - worked;

    report.push(Row::new("ready", cold, "s"));
    report.push(Row::new("ready/warm", warm, "s"));
    for (name, seconds) in [("scan", warm), ("scan/cold", cold), ("scan/cpu", worked)] {
        let rate = count / seconds;
        report.push(Row::new(name, rate, "chunks/s").against(SCAN, rate / SCAN));
    }
    report.push(Row::new("served", served, "share").against(SERVED, served / SERVED));
    report.push(Row::new("verified", verified, "chunks"));
    let [resident, peak] = after.since(&before).map(|bytes| bytes / count);
    report.push(Row::new("memory", resident, "B/chunk").against(MEMORY, resident / MEMORY));
    report.push(Row::new("memory/peak", peak, "B/chunk"));

    let window = Duration::from_secs(if quick { 1 } else { 5 });
    for row in lookups(&store, options.chunks, window, "lookup").await? {
        report.push(row);
    }
    let (writing, written) = write(&store, &chunks, options.chunks);
    let begun = Instant::now();
    for row in lookups(&store, options.chunks, window, "lookup/writing").await? {
        report.push(row);
    }
    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    let rate = written.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    drop(writing);
    report.push(Row::new("lookup/writing/puts", rate, "chunks/s"));
    store.close().await?;
    ensure!(served >= SERVED, "chunks were lost");
    Ok(report)
}

async fn open(options: &Options, directory: &Path) -> anyhow::Result<Store> {
    let environment = match options.hollow {
        true => Environment {
            medium: Arc::new(Fast { hollow: true }),
            ..Environment::default()
        },
        false => Environment::default(),
    };
    let config = Chunks::config(directory, options.chunks);
    Ok(Store::open_in(environment, config).await?)
}

/// How many chunks lookups find.
#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
fn served(store: &Store, chunks: u64) -> f64 {
    let mut found = 0;
    for first in (0..chunks).step_by(KEYS) {
        let end = chunks.min(first + KEYS as u64);
        let keys: Vec<_> = (first..end).map(key).collect();
        found += store.lookup(&keys).found.iter().flatten().count();
    }
    found as f64
}

/// Reads a sample; says how many there were.
async fn verify(store: &Store, chunks: &Chunks, count: u64) -> anyhow::Result<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(count);
    let layers = ExtentRange::new(0, 1)?;
    let numbers = rand::seq::index::sample(&mut random, usize::try_from(count)?, SAMPLE);
    for number in numbers.into_iter().map(|number| number as u64) {
        let lease = store.lease(key(number)).await;
        let lease = lease.with_context(|| format!("chunk {number} is not served"))?;
        ensure!(lease.tier() == TierKind::Disk, "it was in memory");
        let read = lease.read_extents(layers).await?;
        let object = chunks.object(number)?;
        ensure!(read == object.extents(), "chunk {number} has other bytes");
    }
    Ok(SAMPLE)
}

/// Looks up for as long as `window`, from one thread.
async fn lookups(
    store: &Store,
    chunks: u64,
    window: Duration,
    name: &'static str,
) -> anyhow::Result<Vec<Row>> {
    let store = store.clone();
    let mut micros = tokio::task::spawn_blocking(move || {
        let mut random = ChaCha8Rng::seed_from_u64(chunks);
        let mut micros = Vec::new();
        let begun = Instant::now();
        while begun.elapsed() < window {
            let first = random.random_range(0..=chunks.saturating_sub(KEYS as u64));
            let keys: Vec<_> = (first..first + KEYS as u64).map(key).collect();
            let start = Instant::now();
            let prefix = store.lookup(&keys).prefix;
            micros.push(start.elapsed().as_secs_f64() * 1e6);
            ensure!(prefix == KEYS, "a stored chunk was not found");
        }
        Ok(micros)
    })
    .await??;
    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    let rate = (KEYS * micros.len()) as f64 / micros.iter().sum::<f64>() * 1e6;
    Ok(vec![
        Row::new(name, rate, "keys/s"),
        Row::new(format!("{name}/p50"), median(&mut micros), "us"),
        Row::new(format!("{name}/p99"), percentile(&mut micros, 0.99), "us"),
    ])
}

/// Stores chunks until the set is dropped; counts them.
fn write(store: &Store, chunks: &Chunks, first: u64) -> (JoinSet<()>, Arc<AtomicU64>) {
    let next = Arc::new(AtomicU64::new(first));
    let written = Arc::new(AtomicU64::new(0));
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let (store, chunks) = (store.clone(), chunks.clone());
        let (next, written) = (Arc::clone(&next), Arc::clone(&written));
        writers.spawn(async move {
            while let Ok(object) = chunks.object(next.fetch_add(1, Ordering::Relaxed))
                && store.put(object).await.is_ok()
            {
                written.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    (writers, written)
}

/// CPU time of this process.
#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
fn cpu_seconds() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// What the kernel says of this process.
struct Memory {
    resident: u64,
    peak: u64,
}

impl Memory {
    fn now() -> anyhow::Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
        };
        Ok(Self {
            resident: bytes("VmRSS:").context("the kernel gives VmRSS")?,
            peak: bytes("VmHWM:").context("the kernel gives VmHWM")?,
        })
    }

    /// Resident bytes, and the most, above those of `before`.
    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    fn since(&self, before: &Self) -> [f64; 2] {
        [self.resident, self.peak].map(|bytes| bytes.saturating_sub(before.resident) as f64)
    }
}

const KEYS: usize = 512;
const QUICK_CHUNKS: u64 = 20_000;
/// Chunks that are read.
const SAMPLE: usize = 2000;
const WRITERS: usize = 8;
/// Chunks a second.
const SCAN: f64 = 1e6;
const SERVED: f64 = 0.99;
/// Bytes a chunk.
const MEMORY: f64 = 128.0;
