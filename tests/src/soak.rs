//! A daemon at the edge of its budgets, for as long as one likes.
//!
//! ```text
//! clients ── put, get, lookup, pin, unpin, delete, list ──▶ daemon ◀── stats, once a second
//! stalled readers and writers, watchers, cut connections ──▶          └─▶ Outcome: violations
//! ```
//!
//! The chunks of the [`WorkingSet`] take several times the memory tier and more than the
//! disk tier, so that there are evictions all the time. Every layer that is read is
//! compared with what its key says.
//!
//! Resident memory is held against the capacity of the memory tier, 3 %, and what the
//! daemon took before there was any load ([`Outcome::idle_bytes`]). A dozen busy connections
//! take some 35 MB, whatever the capacity: 2 GiB are enough for 3 % to mean something.

mod client;
mod tally;
mod working_set;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kvasir_client::{Client, Stats, Tier};
use kvasir_server::child::ListeningChild;
use kvasir_types::ByteSize;
use tokio::task::JoinSet;

use self::client::Target;
pub use self::tally::{Tally, Violation};
pub use self::working_set::WorkingSet;
use crate::crash::allocated;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Soak {
    /// How long there is load.
    pub duration: Duration,
    /// Capacity of the memory tier.
    pub memory: ByteSize,
    /// Capacity of the disk tier.
    pub disk: ByteSize,
    /// Bytes of all chunks together.
    pub working_set: ByteSize,
    /// Clients that put and get.
    pub clients: u64,
    /// After which the daemon ends a stream without progress; much longer than any
    /// client pauses that means to go on.
    pub stream_idle: Duration,
    /// Decides everything but timing.
    pub seed: u64,
    /// Whether resident memory is judged. A small tier, or one that is still filling
    /// up, says nothing.
    pub judge_resident: bool,
}

/// What the daemon said of itself at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Since the load began.
    pub at: Duration,
    /// Resident memory.
    pub resident_bytes: u64,
    /// Mappings of its address space, which the kernel limits.
    pub mappings: u64,
    /// Chunks that readers hold.
    pub leases: u64,
    /// Pins that last.
    pub pins: u64,
    /// Bytes that the memory tier is charged for.
    pub memory_bytes: u64,
    /// Bytes that the disk tier is charged for.
    pub disk_bytes: u64,
}

/// What a run showed.
#[derive(Debug)]
pub struct Outcome {
    /// Resident memory before there was any load.
    pub idle_bytes: u64,
    /// One a second.
    pub samples: Vec<Sample>,
    /// What the daemon said after all clients were gone.
    pub last: Stats,
    /// From the end of the load until no lease and no pin was left.
    pub settled: Duration,
    /// What the clients did.
    pub tally: Arc<Tally>,
    /// What is wrong.
    pub violations: Vec<Violation>,
}

impl Soak {
    /// The run that operators ask for.
    pub const fn of(duration: Duration) -> Self {
        Self {
            duration,
            memory: ByteSize::gib(2),
            disk: ByteSize::gib(6),
            working_set: ByteSize::gib(10),
            clients: 6,
            stream_idle: Duration::from_secs(10),
            seed: 1,
            judge_resident: true,
        }
    }

    /// The same, small and short; resident memory is not judged.
    pub const QUICK: Self = Self {
        memory: ByteSize::mib(96),
        disk: ByteSize::mib(288),
        working_set: ByteSize::mib(480),
        stream_idle: Duration::from_secs(5),
        judge_resident: false,
        ..Self::of(Duration::from_secs(10))
    };

    /// Runs `daemon`, a command that takes the arguments of `kvasird`, on a directory in
    /// `parent`, and tells `each` sample.
    ///
    /// # Errors
    /// The daemon does not start, or ends.
    ///
    /// # Panics
    /// A client did.
    pub async fn run(
        &self,
        mut daemon: Command,
        parent: &Path,
        mut each: impl FnMut(&Sample),
    ) -> anyhow::Result<Outcome> {
        let directory = tempfile::tempdir_in(parent)?;
        let config = directory.path().join("kvasird.toml");
        fs::write(&config, self.settings(directory.path()))?;
        daemon.arg("--config").arg(&config);
        let daemon = ListeningChild::start(daemon)?;
        let observer = Client::connect(daemon.address()).await?;
        let idle_bytes = idle(&observer).await?;

        let target = Target {
            address: daemon.address().to_owned(),
            set: WorkingSet::new(self.working_set.as_u64()),
            tally: Arc::default(),
            stream_idle: self.stream_idle,
        };
        let load = target.load(self.clients, self.seed);
        let samples = self
            .observe(&daemon, &observer, &target.tally, &mut each)
            .await?;
        end(load).await;
        let tally = target.tally;
        let ended = Instant::now();
        let last = self.quiet(&observer).await?;
        let settled = ended.elapsed();
        let mut outcome = Outcome {
            idle_bytes,
            samples,
            last,
            settled,
            violations: tally.violations(),
            tally,
        };
        outcome.judge(self);
        outcome
            .violations
            .extend(check_space(&observer, directory.path()).await?);
        daemon.stop().context("a daemon ends well after a soak")?;
        Ok(outcome)
    }

    /// Resident memory that a run may reach, where `idle_bytes` were there before.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "to the nearest byte or so"
    )]
    pub fn resident_limit(&self, idle_bytes: u64) -> u64 {
        (self.memory.as_u64() as f64 * (1.0 + RESIDENT_SLACK)) as u64 + idle_bytes
    }

    fn settings(&self, data: &Path) -> String {
        format!(
            "listen = \"127.0.0.1:0\"\ndata-dir = {data:?}\n\
             [memory]\ncapacity = \"{}\"\n[disk]\ncapacity = \"{}\"\n\
             [limits]\nstream-idle-ms = {}\n",
            self.memory,
            self.disk,
            self.stream_idle.as_millis(),
        )
    }

    async fn observe(
        &self,
        daemon: &ListeningChild,
        observer: &Client,
        tally: &Tally,
        each: &mut impl FnMut(&Sample),
    ) -> anyhow::Result<Vec<Sample>> {
        let begun = Instant::now();
        let mut samples = Vec::new();
        let mut ticks = tokio::time::interval(SAMPLE_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while begun.elapsed() < self.duration {
            ticks.tick().await;
            let stats = observer.stats().await?;
            for tier in &stats.tiers {
                if tier.bytes.max(tier.peak_bytes) > tier.capacity_bytes {
                    tally.violation(Violation::OverCapacity {
                        tier: tier.tier,
                        bytes: tier.bytes.max(tier.peak_bytes),
                        capacity: tier.capacity_bytes,
                    });
                }
            }
            let sample = Sample::of(begun.elapsed(), &stats, mappings(daemon)?);
            each(&sample);
            samples.push(sample);
        }
        Ok(samples)
    }

    /// Waits until nothing is held, at most as long as a pin or a stalled stream may last.
    async fn quiet(&self, observer: &Client) -> anyhow::Result<Stats> {
        let patience = Instant::now() + client::MAX_PIN + self.stream_idle + SETTLE;
        loop {
            let stats = observer.stats().await?;
            if (stats.leases, stats.pins) == (0, 0) || Instant::now() > patience {
                return Ok(stats);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Sample {
    fn of(at: Duration, stats: &Stats, mappings: u64) -> Self {
        let bytes = |tier| stats.tier(tier).map_or(0, |tier| tier.bytes);
        Self {
            at,
            resident_bytes: stats.resident_bytes,
            mappings,
            leases: stats.leases,
            pins: stats.pins,
            memory_bytes: bytes(Tier::Memory),
            disk_bytes: bytes(Tier::Disk),
        }
    }
}

impl Outcome {
    /// The most resident memory of any sample.
    pub fn resident_peak(&self) -> u64 {
        let resident = self.samples.iter().map(|sample| sample.resident_bytes);
        resident.max().unwrap_or(0)
    }

    /// The most resident memory beside what the memory tier was charged for: the
    /// process itself, buffers of connections, holes in the heap.
    pub fn uncounted_peak(&self) -> u64 {
        let beside = |sample: &Sample| sample.resident_bytes.saturating_sub(sample.memory_bytes);
        self.samples.iter().map(beside).max().unwrap_or(0)
    }

    /// Median resident memory of the second fifth, and of the last, of the time that the
    /// memory tier was full.
    pub fn resident_fifths(&self) -> [u64; 2] {
        let peak = self.samples.iter().map(|it| it.memory_bytes).max();
        let full = |it: &Sample| it.memory_bytes >= peak.unwrap_or(0) / 20 * 19;
        let filling = self.samples.iter().position(full).unwrap_or(0);
        let samples = &self.samples[filling..];
        let fifth = samples.len() / 5;
        let median = |samples: &[Sample]| {
            let mut resident: Vec<u64> = samples.iter().map(|it| it.resident_bytes).collect();
            resident.sort_unstable();
            resident.get(resident.len() / 2).copied().unwrap_or(0)
        };
        let last = samples.len() - fifth;
        [median(&samples[fifth..2 * fifth]), median(&samples[last..])]
    }

    fn judge(&mut self, soak: &Soak) {
        let Stats { leases, pins, .. } = self.last;
        if leases > 0 || pins > 0 {
            self.violations.push(Violation::Held { leases, pins });
        }
        for tier in &self.last.tiers {
            if tier.corrupt > 0 {
                self.violations.push(Violation::Corrupt {
                    tier: tier.tier,
                    copies: tier.corrupt,
                });
            }
        }
        if !soak.judge_resident {
            return;
        }
        let (bytes, limit) = (self.resident_peak(), soak.resident_limit(self.idle_bytes));
        if bytes > limit {
            self.violations.push(Violation::Resident { bytes, limit });
        }
        let [second, last] = self.resident_fifths();
        if last > second + soak.memory.as_u64() / DRIFT_SHARE {
            self.violations.push(Violation::Drift { second, last });
        }
    }
}

/// Resident memory of a daemon that nobody uses.
async fn idle(observer: &Client) -> anyhow::Result<u64> {
    let mut resident = Vec::new();
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        resident.push(observer.stats().await?.resident_bytes);
    }
    resident.sort_unstable();
    Ok(resident[resident.len() / 2])
}

fn mappings(daemon: &ListeningChild) -> anyhow::Result<u64> {
    let path = format!("/proc/{}/maps", daemon.pid().as_raw_pid());
    Ok(fs::read_to_string(path)?.lines().count() as u64)
}

/// Stops all clients, whatever they are doing.
async fn end(mut load: JoinSet<()>) {
    load.abort_all();
    while let Some(ended) = load.join_next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// Holds the space that segments take against what the disk tier is charged for. What
/// was held until now is freed a moment later, so this waits for a while.
async fn check_space(observer: &Client, data: &Path) -> anyhow::Result<Option<Violation>> {
    let patience = Instant::now() + SETTLE;
    loop {
        let stats = observer.stats().await?;
        let disk = stats.tier(Tier::Disk).context("there is a disk tier")?;
        let (allocated, files) = allocated(&data.join("segments"))?;
        let headers = files * 4096;
        let (charged, capacity) = (disk.bytes + headers, disk.capacity_bytes + headers);
        if (charged..=capacity).contains(&allocated) {
            return Ok(None);
        }
        if Instant::now() > patience {
            return Ok(Some(Violation::Space {
                allocated,
                charged,
                capacity,
            }));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// Whatever a busy machine may add to that.
const SETTLE: Duration = Duration::from_secs(10);
/// Part of the memory tier that resident memory may be above it.
const RESIDENT_SLACK: f64 = 0.03;
/// Resident memory may grow by this part of the memory tier during a run.
const DRIFT_SHARE: u64 = 100;
