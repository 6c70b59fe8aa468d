//! `store`: the storage engine in this process, beside memcpy, fio and Redis.
//!
//! # What is compared
//! | rows | ours | limit |
//! |---|---|---|
//! | `mem_get` | a lease, and all layers, verified; the bytes are shared, not copied | memcpy |
//! | `mem_get/SIZE/copied` | the same, and the reader copies them into a buffer it has | memcpy |
//! | `mem_put` | the bytes are copied into fresh memory, checksummed and stored; the least recently used object goes | memcpy |
//! | `mem_put/SIZE/handed_over` | the same without the copy: the caller gives its bytes away | memcpy |
//! | `verify` | what every get does to the bytes: one checksum per layer | memcpy |
//! | `disk_get` | a lease, and all layers, read from the device and verified | fio |
//! | `disk_put` | checksummed, stored, and acknowledged as durable | fio |
//! | `redis_get`, `redis_put` | `GET` and `SET` through the `redis` crate, over a Unix socket | none |
//!
//! **memcpy** copies the same bytes, layer by layer, object after object, from a set
//! that is larger than the caches into one touched buffer of an object's size per
//! thread, with as many threads as ours has objects in flight. A get that shares bytes
//! only reads them, so it may exceed 1.0; its reader has not touched them yet.
//!
//! **fio** uses `O_DIRECT`, blocks of the object's size, and as many in flight as
//! ours; psync or io_uring, whichever was faster in the first round. Reads are random,
//! in a part of a file as large as our set of objects. Writes overwrite a file laid out
//! already, with an `fdatasync` after every block, because each of our puts is
//! acknowledged as durable: the device's own price for that, without allocation, names
//! and a catalog, which are ours to pay.
//!
//! It is the limit of asking for whole objects, not of the device: one that serves large
//! requests slower than several smaller ones, as virtual disks do, lets ours exceed 1.0
//! where the kernel reads ahead or an object is read in parts.
//!
//! **Reads come from the device**: the page cache is dropped after every use, the set
//! is larger than the memory tier and read in a random cycle, the lease must say
//! `disk`, and the kernel's count of bytes that this process caused to be read must
//! cover the payload, or the suite fails.
//!
//! **Redis** is another process, and its rows hold the socket and the client's copies,
//! which an engine inside the process does not pay. They say what a node pays that
//! keeps its KV in Redis; what our daemon costs over a connection is in the suite
//! `transport`. Nothing is written to disk by it (`--save '' --appendonly no`).
//!
//! # Rows
//! `OP/SIZE` is the better of the throughputs with 1 and 4 objects in flight, `/c1` and
//! `/c4` are both; each with the limit at the same number. `/p50` and `/p99` are
//! latencies of single objects with 1 in flight. `/cpu` is CPU time per GB of payload,
//! all threads, at the number in flight of `OP/SIZE`; for Redis with the server's.
//! Throughputs are medians of rounds, in which ours, limit and peer take turns.
//!
//! # The cost of integrity
//! The store cannot be told to skip verification, and must not be. So `integrity_cost`
//! compares two loops at 1 MiB, each one lease per object and one copy by the reader:
//! one reads the layers through the lease, the other takes new handles on bytes that an
//! earlier read handed out. The difference is the checksums, with their effect on the
//! caches: a checksum brings in what the copy reads next. `integrity_cost/disk` is the
//! time of verifying what was just read once more ÷ the time of the read.

mod disk;
mod fio;
mod memory;
mod payload;
mod redis_server;
mod sample;
mod workspace;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::json;
use tokio::runtime::Handle;

use self::fio::Fio;
pub(crate) use self::payload::key;
use self::redis_server::RedisServer;
use self::workspace::Workspace;
use crate::report::Report;

#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Where the disk part lies, in a directory of its own that is deleted afterwards.
    /// Default: `target` in the working directory, or that directory itself.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Only these sizes, such as `256KiB,1MiB`. Default: all.
    #[arg(long, value_name = "SIZES", value_delimiter = ',')]
    size: Vec<String>,
    /// Only this tier. Default: both.
    #[arg(long)]
    tier: Option<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    Memory,
    Disk,
}

/// How much is measured.
struct Effort {
    /// Bytes of the objects in memory that are read in turn.
    memory_set_bytes: u64,
    /// Of those on disk.
    disk_set_bytes: u64,
    memory_rounds: usize,
    memory_window: Duration,
    disk_rounds: usize,
    disk_window: Duration,
}

impl Effort {
    const FULL: Self = Self {
        memory_set_bytes: 512 << 20,
        disk_set_bytes: 1 << 30,
        memory_rounds: 7,
        memory_window: Duration::from_millis(300),
        disk_rounds: 5,
        disk_window: Duration::from_secs(1),
    };
    const QUICK: Self = Self {
        memory_set_bytes: 128 << 20,
        disk_set_bytes: 64 << 20,
        memory_rounds: 2,
        memory_window: Duration::from_millis(40),
        disk_rounds: 2,
        disk_window: Duration::from_millis(150),
    };
}

pub(crate) async fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    let tools = Tools::find()?;
    // The loops wait on their own threads, as callers of a blocking interface would.
    tokio::task::block_in_place(|| measure(options, quick, &tools))
}

fn measure(options: &Options, quick: bool, tools: &Tools) -> anyhow::Result<Report> {
    let effort = if quick { Effort::QUICK } else { Effort::FULL };
    if !quick {
        eprintln!("this takes about eight minutes; --quick takes less than one");
    }
    let runtime = Handle::current();
    let workspace = Workspace::create(options.dir.as_deref())?;
    let mut report = Report::new("store");
    describe(&mut report, &effort, tools);
    let mut sizes = Vec::from(payload::sizes()?);
    for wanted in &options.size {
        let known = sizes.iter().any(|size| size.name == wanted);
        ensure!(known, "there are no objects of {wanted}");
    }
    sizes.retain(|size| options.size.is_empty() || options.size.iter().any(|it| it == size.name));

    if options.tier != Some(Part::Disk) {
        let redis = RedisServer::start()?;
        for size in &sizes {
            memory::measure(&runtime, size, &redis, &effort, &mut report)?;
        }
    }
    if options.tier == Some(Part::Memory) {
        return Ok(report);
    }
    let sets = sizes
        .iter()
        .map(|size| disk::set_bytes(size, effort.disk_set_bytes));
    let fio = Fio::prepare(
        &workspace.path().join("fio"),
        sets.max().context("there are sizes")?,
        effort.disk_window,
    )?;
    report.set("fio_engines", fio.engine_names());
    for size in &sizes {
        let directory = workspace.path().join(size.name);
        disk::measure(&runtime, size, &fio, &directory, &effort, &mut report)?;
        std::fs::remove_dir_all(&directory)?;
    }
    Ok(report)
}

fn describe(report: &mut Report, effort: &Effort, tools: &Tools) {
    report.set("memory_set_bytes", effort.memory_set_bytes);
    report.set("disk_set_bytes", effort.disk_set_bytes);
    report.set("in_flight", json!(sample::IN_FLIGHT));
    report.set("memory_rounds", effort.memory_rounds);
    report.set("disk_rounds", effort.disk_rounds);
    report.set("fio", tools.fio.as_str());
    report.set("redis", tools.redis.as_str());
    report.set(
        "meaning",
        json!({
            "mem_get": "verified layers, shared without a copy; limit: memcpy of the same bytes",
            "mem_put": "copied into fresh memory, checksummed, stored; limit: memcpy",
            "disk_get": "cold, verified; limit: fio, O_DIRECT random reads of the same size",
            "disk_put": "durable when acknowledged; limit: fio, O_DIRECT overwrites, fdatasync after each",
            "redis": "another process, over a Unix socket, client's copies included; nothing on disk",
            "c1, c4": "objects in flight; the row without it is the better one",
            "p50, p99": "of one object, 1 in flight",
            "cpu": "of all threads; for Redis with the server's",
            "integrity_cost": "share of the throughput of gets, copied by the reader, that verification takes",
        }),
    );
}

/// The versions of the programs that this suite runs.
pub(crate) struct Tools {
    fio: String,
    redis: String,
}

impl Tools {
    /// # Errors
    /// One is missing; says how to install it.
    pub(crate) fn find() -> anyhow::Result<Self> {
        Ok(Self {
            fio: version_of("fio")?,
            redis: version_of("redis-server")?,
        })
    }
}

fn version_of(program: &str) -> anyhow::Result<String> {
    let output = match Command::new(program).arg("--version").output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
            "`{program}` is missing; run `apt-get install fio redis-server`, or `make deps-bench`"
        ),
        Err(error) => return Err(error).context(format!("`{program}` cannot be run")),
    };
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
