//! `faults`: what a broken cache costs a request, beyond the time it was allowed to take.
//!
//! A daemon is stopped (SIGSTOP) or its connection is cut in the middle of a fetch. The
//! request must answer within the fetch's budget, the time to compute, and 10 ms.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use kvasir_plugin::{DataPlane, Decision, PluginConfig, Tier, TierBytes};
use kvasir_tests::harness::{self, Proxy, Rig, Use, signal};
use kvasir_types::ByteSize;
use rustix::process::Signal;

use crate::daemon::Daemon;
use crate::report::{Report, Row, median, percentile};

const PROMPT_TOKENS: usize = 1500;

/// Bytes after which the fetch is stopped: a quarter of the prompt's 18 MB.
const MID_FETCH: u64 = 4 << 20;

/// What the design grants on top of budget and computing.
const GRACE_MS: f64 = 10.0;

pub(crate) async fn run(quick: bool) -> anyhow::Result<Report> {
    let repeats = if quick { 5 } else { 20 };
    let mut report = Report::new("faults");
    let data = tempfile::tempdir()?;
    let daemon = Daemon::start(data.path(), ByteSize::mib(256), "127.0.0.1:0")?;
    let pid = daemon.pid();
    let stopped = Arc::new(AtomicBool::new(false));
    let acted = Arc::clone(&stopped);
    let proxy = Proxy::start(daemon.address().to_owned(), move || {
        signal(pid, Signal::STOP);
        acted.store(true, Ordering::SeqCst);
    })
    .await;
    let config = PluginConfig {
        data_plane: DataPlane::Grpc,
        cooldown: Duration::from_millis(10),
        ..PluginConfig::default()
    };
    let rig = Rig::reader(proxy.address(), config);
    let prompt = harness::prompt(PROMPT_TOKENS, 0);
    let expected = rig.ask(&prompt, Use::Write).await;
    rig.stored(&daemon.client().await?, &prompt).await;
    let bytes = PROMPT_TOKENS as u64 / u64::from(harness::CHUNK_TOKENS)
        * rig.plugin.namespace().layout().chunk_bytes();

    let in_memory = TierBytes::of(Tier::Memory, bytes);
    let mut computed = Vec::new();
    let mut stalled = Vec::new();
    let mut overruns = Vec::new();
    let progress = crate::progress(repeats, "stalled daemon");
    for _ in 0..repeats {
        let alone = millis(rig.ask(&prompt, Use::Nothing).await.ttft());
        let budget = match rig
            .plugin
            .cost_model()
            .decide(PROMPT_TOKENS, in_memory, Instant::now())
        {
            Decision::Load { budget } => millis(budget),
            Decision::Compute => bail!("the cost model would not load; nothing to stall"),
        };
        proxy.arm(MID_FETCH);
        let answer = rig.ask(&prompt, Use::Read).await;
        ensure!(
            stopped.swap(false, Ordering::SeqCst),
            "the daemon was never stopped"
        );
        ensure!(
            answer.logits == expected.logits,
            "a stalled fetch changed the answer"
        );
        ensure!(
            answer.usage.cached_tokens == 0,
            "a stalled fetch counted as cached"
        );
        signal(pid, Signal::CONT);
        computed.push(alone);
        stalled.push(millis(answer.ttft()));
        overruns.push(millis(answer.ttft()) - budget);
        until_it_hits(&rig, &prompt).await?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    let alone = median(&mut computed);
    for overrun in &mut overruns {
        *overrun -= alone;
    }
    report.push(Row::new("computed", alone, "ms"));
    report.push(Row::new(
        "computed/max",
        percentile(&mut computed, 1.0),
        "ms",
    ));
    report.push(Row::new("stalled", median(&mut stalled), "ms"));
    let overrun = median(&mut overruns);
    report
        .push(Row::new("stalled/overrun_p50", overrun, "ms").against(GRACE_MS, overrun / GRACE_MS));
    let worst = percentile(&mut overruns, 1.0);
    report.push(Row::new("stalled/overrun_max", worst, "ms").against(GRACE_MS, worst / GRACE_MS));
    Ok(report)
}

/// Waits until the engine uses its cache again.
async fn until_it_hits(rig: &Rig, prompt: &[u32]) -> anyhow::Result<()> {
    for _ in 0..100 {
        if rig.ask(prompt, Use::Read).await.usage.cached_tokens > 0 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!("the engine never came back to its cache")
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
