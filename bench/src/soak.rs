//! `soak`: a daemon at the edge of both budgets, under every kind of load at once.
//!
//! See [`kvasir_tests::soak`] for the load and for what is a violation. The suite fails if
//! there is one. `rss` is resident memory: its limit is the capacity of the memory tier,
//! 3 % of it, and what the idle daemon took before (`rss/idle`). `rss/of_budget` is the same
//! in units of the memory tier. `rss/uncounted` is the most resident memory beside what the
//! tier was charged for in the same second.

use std::error::Error as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use kvasir_client::Tier;
use kvasir_tests::soak::{Outcome, Sample, Soak};

use crate::report::{Report, Row};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How long there is load.
    #[arg(long, default_value_t = 5)]
    minutes: u64,
    /// Decides everything but timing.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the disk tier lies, in a directory of its own that is deleted afterwards.
    /// Default: the system's temporary directory.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) async fn run(options: &Options, quick: bool, json: bool) -> anyhow::Result<()> {
    let soak = if quick {
        Soak::QUICK
    } else {
        Soak::of(Duration::from_secs(60 * options.minutes))
    };
    let soak = Soak {
        seed: options.seed,
        ..soak
    };
    let mut daemon = Command::new(std::env::current_exe()?);
    daemon.arg("daemon");
    if std::env::var_os("RUST_LOG").is_none() {
        daemon.env("RUST_LOG", "error");
    }
    let directory = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    let progress = crate::progress(soak.duration.as_secs(), "soak");
    let each = |sample: &Sample| {
        progress.set_position(sample.at.as_secs());
        progress.set_message(format!(
            "soak, {} MiB resident",
            sample.resident_bytes >> 20
        ));
    };
    let outcome = soak.run(daemon, &directory, each).await?;
    progress.finish_and_clear();
    report(&soak, &outcome).print(json)?;
    if outcome.violations.is_empty() {
        return Ok(());
    }
    for violation in &outcome.violations {
        match violation.source() {
            Some(cause) => eprintln!("{violation}: {cause}"),
            None => eprintln!("{violation}"),
        }
    }
    bail!("{} violations", outcome.violations.len());
}

#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
fn report(soak: &Soak, outcome: &Outcome) -> Report {
    let mut report = Report::new("soak");
    report.set("seconds", soak.duration.as_secs());
    report.set("memory_bytes", soak.memory.as_u64());
    report.set("disk_bytes", soak.disk.as_u64());
    report.set("working_set_bytes", soak.working_set.as_u64());
    report.set("clients", soak.clients);
    report.set("seed", soak.seed);
    let budget = soak.memory.as_u64() as f64;
    let peak = outcome.resident_peak() as f64;
    let limit = soak.resident_limit(outcome.idle_bytes) as f64;
    let [second, last] = outcome.resident_fifths().map(|bytes| bytes as f64);
    let most = |of: fn(&Sample) -> u64| outcome.samples.iter().map(of).max().unwrap_or(0) as f64;
    report.push(Row::new("violations", outcome.violations.len() as f64, ""));
    report.push(Row::new("rss", peak, "B").against(limit, peak / limit));
    report.push(Row::new("rss/idle", outcome.idle_bytes as f64, "B"));
    report.push(Row::new("rss/of_budget", peak / budget, "share"));
    let uncounted = outcome.uncounted_peak() as f64;
    report.push(Row::new("rss/uncounted", uncounted, "B"));
    report.push(Row::new("rss/drift", (last - second) / budget, "share"));
    report.push(Row::new(
        "mappings/most",
        most(|sample| sample.mappings),
        "",
    ));
    for tier in &outcome.last.tiers {
        let name = match tier.tier {
            Tier::Memory => "memory",
            Tier::Disk => "disk",
        };
        let (peak, capacity) = (tier.peak_bytes as f64, tier.capacity_bytes as f64);
        report.push(Row::new(name, peak, "B").against(capacity, peak / capacity));
        report.push(Row::new(
            format!("{name}/evictions"),
            tier.evictions as f64,
            "",
        ));
    }
    report.push(Row::new("leases/most", most(|sample| sample.leases), ""));
    report.push(Row::new("leases/end", outcome.last.leases as f64, ""));
    report.push(Row::new("pins/most", most(|sample| sample.pins), ""));
    report.push(Row::new("pins/end", outcome.last.pins as f64, ""));
    report.push(Row::new("settled", outcome.settled.as_secs_f64(), "s"));
    for (name, count) in outcome.tally.counts() {
        if name != "violations" {
            report.push(Row::new(name, count as f64, ""));
        }
    }
    report
}
