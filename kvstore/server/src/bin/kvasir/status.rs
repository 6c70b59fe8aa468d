//! `kvasir status`.

use kvasir_client::Stats;
use serde::Serialize;

use crate::context::Context;
use crate::output::{duration, percent, size};

#[derive(Serialize)]
struct Report<'a> {
    endpoint: String,
    #[serde(flatten)]
    stats: &'a Stats,
}

pub(crate) async fn run(context: &Context) -> anyhow::Result<()> {
    let stats = context.connect().await?.stats().await?;
    let report = Report {
        endpoint: context.endpoint.to_string(),
        stats: &stats,
    };
    context.print(&report, || print(&report))
}

fn print(report: &Report<'_>) {
    let stats = report.stats;
    println!("kvasird {} at {}", stats.version, report.endpoint);
    println!("up        {}", duration(stats.uptime_ms));
    let data_dir = match stats.data_dir.as_str() {
        "" => "none (memory only)",
        path => path,
    };
    println!("data      {data_dir}");
    println!(
        "process   {} resident, {} at its peak",
        size(stats.resident_bytes),
        size(stats.peak_resident_bytes)
    );
    println!(
        "lookups   {} keys, {} present",
        stats.lookup_keys,
        percent(stats.lookup_hits, stats.lookup_keys)
    );
    println!(
        "payload   {} received, {} sent",
        size(stats.received_bytes),
        size(stats.sent_bytes)
    );
    println!(
        "held      {} chunks by readers, {} by {} pins",
        stats.leases,
        size(stats.pinned_bytes),
        stats.pins
    );
    println!();
    print!("{}", tiers(stats));
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
