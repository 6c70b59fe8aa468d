//! `kvasir status`.

use std::io::{self, Write};

use kvasir_client::Stats;
use serde::Serialize;

use crate::context::Context;
use crate::output::{duration, percent, size, times};

#[derive(Serialize)]
struct Report<'a> {
    endpoint: String,
    /// What gets go over: `quic`, or `grpc`.
    data_path: String,
    /// Of the data path, once it was measured.
    round_trip_us: Option<u64>,
    #[serde(flatten)]
    stats: &'a Stats,
}

pub(crate) async fn run(context: &Context) -> anyhow::Result<()> {
    let client = context.connect().await?;
    let stats = client.stats().await?;
    let path = client.data_path().filter(|path| path.connected);
    let round_trip = path.and_then(|path| path.round_trip);
    let report = Report {
        endpoint: context.endpoint.to_string(),
        data_path: path.map_or_else(|| "grpc".to_owned(), |path| path.carrier.to_string()),
        round_trip_us: round_trip.and_then(|time| time.as_micros().try_into().ok()),
        stats: &stats,
    };
    context.print(&report, |out| print(out, &report))
}

fn print(out: &mut dyn Write, report: &Report<'_>) -> io::Result<()> {
    let stats = report.stats;
    writeln!(out, "kvasird {} at {}", stats.version, report.endpoint)?;
    writeln!(out, "up        {}", duration(stats.uptime_ms))?;
    write!(out, "data path {}", report.data_path)?;
    match report.round_trip_us {
        Some(micros) => writeln!(out, ", {micros} us there and back")?,
        None => writeln!(out)?,
    }
    let data_dir = match stats.data_dir.as_str() {
        "" => "none (memory only)",
        path => path,
    };
    writeln!(out, "data      {data_dir}")?;
    writeln!(
        out,
        "process   {} resident, {} at its peak",
        size(stats.resident_bytes),
        size(stats.peak_resident_bytes)
    )?;
    writeln!(
        out,
        "lookups   {} keys, {} present",
        stats.lookup_keys,
        percent(stats.lookup_hits, stats.lookup_keys)
    )?;
    writeln!(
        out,
        "payload   {} received, {} sent",
        size(stats.received_bytes),
        size(stats.sent_bytes)
    )?;
    writeln!(
        out,
        "held      {} chunks by readers, {} by {} pins",
        stats.leases,
        size(stats.pinned_bytes),
        stats.pins
    )?;
    writeln!(
        out,
        "profiles  {}, {} of {}",
        stats.profiles,
        size(stats.profile_bytes),
        size(stats.profile_capacity_bytes)
    )?;
    writeln!(out)?;
    write!(out, "{}", tiers(stats))?;
    let mut levels = stats.tiers.iter().flat_map(|tier| {
        let levels = tier.levels.iter();
        levels.map(move |level| (tier.tier, level))
    });
    // Where all is raw, the table above says it.
    if !levels.clone().any(|(_, level)| level.level != "raw") {
        return Ok(());
    }
    writeln!(
        out,
        "\n{:<7} {:<9} {:>9} {:>10} {:>10} {:>8}",
        "TIER", "LEVEL", "CHUNKS", "BYTES", "RAW", "SMALLER"
    )?;
    levels.try_for_each(|(tier, level)| {
        writeln!(
            out,
            "{:<7} {:<9} {:>9} {:>10} {:>10} {:>8}",
            tier,
            level.level,
            level.chunks,
            size(level.bytes),
            size(level.raw_bytes),
            times(level.raw_bytes, level.bytes)
        )
    })
}

/// The table of tiers, which `top` prints too.
pub(crate) fn tiers(stats: &Stats) -> String {
    let mut table = format!(
        "{:<7} {:>9} {:>10} {:>10} {:>6} {:>9} {:>9} {:>9} {:>9}\n",
        "TIER", "CHUNKS", "BYTES", "CAPACITY", "FULL", "HITS", "EVICTED", "CORRUPT", "THROTTLED"
    );
    for tier in &stats.tiers {
        table += &format!(
            "{:<7} {:>9} {:>10} {:>10} {:>6} {:>9} {:>9} {:>9} {:>9}\n",
            tier.tier,
            tier.chunks,
            size(tier.bytes),
            size(tier.capacity_bytes),
            percent(tier.bytes, tier.capacity_bytes),
            tier.hits,
            tier.evictions,
            tier.corrupt,
            tier.throttled
        );
    }
    table
}
