//! What a daemon costs that dies or stalls in the middle of a fetch.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use kvasir_engine::model::Model;
use kvasir_plugin::{Decision, LoadPolicy, Tier, TierBytes};
use kvasir_tests::harness::{Answer, Rig, Use, signal};
use kvasir_tests::network::Network;
use kvasir_types::Level;
use rustix::process::Signal;

use crate::link;
use crate::report::{Report, Row, median, percentile};

use super::bed::{Bed, millis};

const TOKENS: usize = 768;
/// On which a fetch takes a third of a second: longer than it takes to break it.
const SLOW: u32 = 100;
/// On which it is faster than computing, so that it is tried by itself.
const FAST: u32 = 1000;
const BREAK_AFTER: Duration = Duration::from_millis(100);
const STOP_AFTER: Duration = Duration::from_millis(15);
/// What the design grants on top of budget and computing.
const GRACE_MS: f64 = 10.0;

pub(super) fn run(
    network: &Network,
    model: &Path,
    quick: bool,
    report: &mut Report,
) -> anyhow::Result<()> {
    let runs = if quick { 3 } else { 9 };
    let model = Arc::new(Model::load(model)?);
    let prompt = link::prompt(TOKENS)?;
    let bed = || Bed::of(network, Arc::clone(&model), prompt.clone(), TOKENS);
    let mut killed = Vec::new();
    let mut computed = Vec::new();
    for _ in 0..runs {
        let bed = bed()?;
        let (alone, took) = network.near().run(|| kill(&bed))??;
        computed.push(alone);
        killed.push(took);
    }
    let alone = median(&mut computed);
    let killed = median(&mut killed);
    report.push(Row::new("computed", alone, "ms"));
    report.push(Row::new("killed", killed, "ms").against(alone, alone / killed));
    let bed = bed()?;
    let mut stalled = network.near().run(|| stall(&bed, 4 * runs))??;
    let series = [
        ("waited", &mut stalled.waits),
        ("overrun", &mut stalled.overruns),
    ];
    for (name, values) in series {
        for (quantile, share) in [("p50", 0.5), ("max", 1.0)] {
            let value = percentile(values, share);
            let row = Row::new(format!("stalled/{name}_{quantile}"), value, "ms");
            report.push(row.against(GRACE_MS, value / GRACE_MS));
        }
    }
    Ok(())
}

/// Milliseconds of computing alone, and from the death of the daemon to the first token.
async fn kill(bed: &Bed<'_>) -> anyhow::Result<(f64, f64)> {
    let expected = bed.store_at(Level::RAW).await?;
    let reader = bed.rig(Level::RAW, |_| {});
    bed.connected(&reader).await?;
    // The first one waits for the engine to have started.
    reader.ask(&bed.prompt, Use::Nothing).await;
    let alone = reader.ask(&bed.prompt, Use::Nothing).await;
    bed.network.set_mbps(SLOW)?;
    let begun = Instant::now();
    let death = async {
        tokio::time::sleep(BREAK_AFTER).await;
        signal(bed.daemon.pid(), Signal::KILL);
        begun.elapsed()
    };
    let (answer, killed) = tokio::join!(reader.ask(&bed.prompt, Use::Read), death);
    checked(&answer, &expected)?;
    let took = millis(answer.ttft()) - millis(killed);
    Ok((millis(alone.ttft()), took))
}

/// Milliseconds beyond the budget, of requests whose daemon was stopped.
#[derive(Debug, Default)]
struct Stalled {
    /// Until the engine gave up.
    waits: Vec<f64>,
    /// Until the first token, less what computing takes alone.
    overruns: Vec<f64>,
}

/// Stops the daemon in the middle of fetches.
async fn stall(bed: &Bed<'_>, runs: usize) -> anyhow::Result<Stalled> {
    let expected = bed.store_at(Level::RAW).await?;
    bed.network.set_mbps(FAST)?;
    let reader = bed.rig(Level::RAW, |config| config.load = LoadPolicy::WhenFaster);
    bed.connected(&reader).await?;
    let pid = bed.daemon.pid();
    let mut stalled = Stalled::default();
    while stalled.waits.len() < runs {
        until_it_hits(bed, &reader).await?;
        let alone = reader.ask(&bed.prompt, Use::Nothing).await;
        let bytes = bed.layout.chunk_bytes() * TOKENS as u64 / u64::from(bed.layout.tokens());
        let cost = reader.plugin.cost_model();
        let bytes = TierBytes::of(Tier::Memory, bytes);
        let budget = match cost.decide(TOKENS, bytes, Instant::now()) {
            Decision::Load { budget } => budget,
            Decision::Compute => bail!("the cost model would not load; nothing to stall"),
        };
        let before = reader.plugin.fetch_stats().late;
        let begun = Instant::now();
        let stop = async {
            tokio::time::sleep(STOP_AFTER).await;
            signal(pid, Signal::STOP);
            let gave_up = || reader.plugin.fetch_stats().late > before;
            while !gave_up() && begun.elapsed() < 10 * budget {
                tokio::time::sleep(Duration::from_micros(100)).await;
            }
            begun.elapsed()
        };
        let (answer, waited) = tokio::join!(reader.ask(&bed.prompt, Use::Read), stop);
        signal(pid, Signal::CONT);
        // It may have come before.
        if answer.usage.cached_tokens == 0 {
            checked(&answer, &expected)?;
            let ttft = millis(answer.ttft());
            stalled.waits.push(millis(waited) - millis(budget));
            let overrun = ttft - millis(budget) - millis(alone.ttft());
            stalled.overruns.push(overrun);
        }
    }
    Ok(stalled)
}

/// Waits until the engine uses its cache again, over QUIC.
async fn until_it_hits(bed: &Bed<'_>, reader: &Rig) -> anyhow::Result<()> {
    bed.connected(reader).await?;
    for _ in 0..40 {
        if bed.fetch(reader).await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!(
        "the engine never came back to its cache: {:?}, {:?}",
        reader.plugin.fetch_stats(),
        reader.plugin.cost_model()
    )
}

fn checked(answer: &Answer, expected: &Answer) -> anyhow::Result<()> {
    ensure!(
        answer.logits == expected.logits,
        "a broken fetch changed the answer"
    );
    ensure!(
        answer.usage.cached_tokens == 0,
        "a broken fetch counted as cached"
    );
    Ok(())
}
