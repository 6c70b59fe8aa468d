//! `kvasir top`.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use clap::Args;
use kvasir_client::Stats;
use serde::Serialize;

use crate::context::Context;
use crate::output::{duration, percent, size};
use crate::status;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Seconds between refreshes.
    #[arg(long, short, default_value_t = 1.0, value_name = "SECONDS", value_parser = interval)]
    interval: f64,
    /// Stop after this many refreshes; 0 means never.
    #[arg(long, short = 'n', default_value_t = 0, value_name = "N")]
    count: u64,
}

fn interval(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.05..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give seconds from 0.05 to 3600".into()),
    }
}

/// One refresh, for --json.
#[derive(Serialize)]
struct Tick<'a> {
    rates: Rates,
    #[serde(flatten)]
    stats: &'a Stats,
}

/// Changes per second since the refresh before; zero in the first one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Rates {
    lookup_keys: f64,
    lookup_hits: f64,
    received_bytes: f64,
    sent_bytes: f64,
    hits: f64,
    evictions: f64,
    throttled: f64,
}

impl Rates {
    fn between(before: &Stats, now: &Stats, elapsed: Duration) -> Self {
        // A daemon that was restarted counts from zero: no rate rather than a wrong one.
        let rate = |field: fn(&Stats) -> u64| {
            #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
            let change = field(now).saturating_sub(field(before)) as f64;
            change / elapsed.as_secs_f64().max(1e-3)
        };
        Self {
            lookup_keys: rate(|stats| stats.lookup_keys),
            lookup_hits: rate(|stats| stats.lookup_hits),
            received_bytes: rate(|stats| stats.received_bytes),
            sent_bytes: rate(|stats| stats.sent_bytes),
            hits: rate(|stats| stats.tiers.iter().map(|tier| tier.hits).sum()),
            evictions: rate(|stats| stats.tiers.iter().map(|tier| tier.evictions).sum()),
            throttled: rate(|stats| stats.tiers.iter().map(|tier| tier.throttled).sum()),
        }
    }
}

pub(crate) async fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<()> {
    let client = context.connect().await?;
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(arguments.interval));
    let mut before: Option<(Stats, Instant)> = None;
    let mut shown = 0;
    loop {
        ticks.tick().await;
        let stats = client.stats().await?;
        let now = Instant::now();
        let rates = match &before {
            Some((before, at)) => Rates::between(before, &stats, now.duration_since(*at)),
            None => Rates::default(),
        };
        if show(context, &stats, rates).is_err() {
            // The reader of a pipe has seen enough.
            return Ok(());
        }
        before = Some((stats, now));
        shown += 1;
        if shown == arguments.count {
            return Ok(());
        }
    }
}

fn show(context: &Context, stats: &Stats, rates: Rates) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if context.json {
        writeln!(out, "{}", serde_json::to_string(&Tick { rates, stats })?)?;
    } else {
        if out.is_terminal() {
            // Cursor home, clear to the end: no flicker, unlike clearing first.
            write!(out, "\x1b[H\x1b[J")?;
        }
        write!(out, "{}", screen(context, stats, rates))?;
    }
    out.flush()
}

fn screen(context: &Context, stats: &Stats, rates: Rates) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rates are not negative; printed rounded"
    )]
    let per_second = |bytes: f64| format!("{}/s", size(bytes as u64));
    format!(
        "kvasird {} at {}, up {}, {} resident\n\n\
         lookups   {:.0} keys/s, {} present in all\n\
         received  {}\n\
         sent      {}\n\
         evicted   {:.1}/s, throttled {:.1}/s\n\
         held      {} chunks by readers, {} by {} pins\n\n{}",
        stats.version,
        context.endpoint,
        duration(stats.uptime_ms),
        size(stats.resident_bytes),
        rates.lookup_keys,
        percent(stats.lookup_hits, stats.lookup_keys),
        per_second(rates.received_bytes),
        per_second(rates.sent_bytes),
        rates.evictions,
        rates.throttled,
        stats.leases,
        size(stats.pinned_bytes),
        stats.pins,
        status::tiers(stats),
    )
}
