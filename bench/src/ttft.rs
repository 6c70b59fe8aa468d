//! `ttft`: time to first token, computed, and fetched from host memory and from disk.
//!
//! The engine runs in this process, the daemon in its own; they talk as they do in
//! production. A prompt is a context of N random tokens and a question of 16. What is
//! fetched must give the very logits that computing gave, or the run fails.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use kvasir_engine::kv::KvDtype;
use kvasir_engine::model::Model;
use kvasir_plugin::PluginConfig;
use kvasir_tests::harness::{Rig, Use};
use kvasir_types::{ByteSize, KvLayout};
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::checkpoint::{self, Shape};
use crate::daemon::Daemon;
use crate::raw_stream;
use crate::report::{Report, Row, median};

const QUESTION_TOKENS: usize = 16;
const CHUNK_TOKENS: u32 = 256;

struct Setup {
    rig: Rig,
    address: String,
    layout: KvLayout,
}

pub(crate) async fn run(quick: bool) -> anyhow::Result<Report> {
    let contexts: &[usize] = if quick {
        &[256, 1024]
    } else {
        &[256, 1024, 4096, 16_384]
    };
    if !quick {
        eprintln!("this takes about three minutes on two cores; --quick takes less than one");
    }
    let mut report = Report::new("ttft");
    let checkpoint_dir = tempfile::tempdir()?;
    eprintln!(
        "writing a random checkpoint of {} M parameters",
        Shape::SERVING.parameters() / 1_000_000
    );
    checkpoint::write(checkpoint_dir.path(), &Shape::SERVING)?;
    let model = Arc::new(Model::load(checkpoint_dir.path())?);
    let data = tempfile::tempdir()?;
    let mut daemon = Daemon::start(data.path(), ByteSize::gib(1), "127.0.0.1:0")?;
    let address = daemon.address().to_owned();
    let longest = contexts.iter().max().context("there are contexts")? + 2 * QUESTION_TOKENS;
    let layout = kvasir_engine::cache::layout(model.config(), KvDtype::F32, CHUNK_TOKENS)?;
    let namespace = kvasir_engine::cache::namespace(&model, layout, &[0; 32], b"");
    let rig = Rig::start(
        model,
        namespace,
        longest,
        daemon.address(),
        PluginConfig::default(),
    );
    let setup = Setup {
        rig,
        address,
        layout,
    };
    for &context in contexts {
        daemon = measure(&setup, daemon, data.path(), context, quick, &mut report).await?;
    }
    drop(daemon);
    Ok(report)
}

async fn measure(
    setup: &Setup,
    mut daemon: Daemon,
    data: &Path,
    context: usize,
    quick: bool,
    report: &mut Report,
) -> anyhow::Result<Daemon> {
    // Long contexts take long to compute and vary less.
    let computed_runs = if quick || context > 2048 { 2 } else { 5 };
    let fetched_runs = if quick { 3 } else { 7 };
    let prompt = prompt(context);
    let progress = crate::progress(
        computed_runs + 2 * fetched_runs,
        &format!("context {context}"),
    );

    let mut computed = Vec::new();
    let mut steps = Vec::new();
    let mut digest = None;
    for run in 0..computed_runs {
        let answer = setup
            .rig
            .ask(&prompt, if run == 0 { Use::Write } else { Use::Nothing })
            .await;
        ensure!(
            answer.usage.cached_tokens == 0,
            "a computed run used the cache"
        );
        let logits = &answer.logits;
        ensure!(
            digest.get_or_insert_with(|| logits.clone()) == logits,
            "two computed runs differ"
        );
        computed.push(millis(answer.ttft()));
        steps.push(millis(answer.times[1] - answer.times[0]));
        progress.inc(1);
    }
    setup.rig.stored(&daemon.client().await?, &prompt).await;

    let mut host = Vec::new();
    let mut disk = Vec::new();
    let mut bytes = 0;
    for run in 0..2 * fetched_runs {
        let from_disk = run >= fetched_runs;
        if from_disk {
            // A restarted daemon has nothing in memory, and the page cache is dropped.
            daemon.stop()?;
            daemon = Daemon::start(data, ByteSize::gib(1), &setup.address)?;
            daemon.client().await?;
        }
        let answer = setup.rig.ask(&prompt, Use::Read).await;
        ensure!(
            answer.usage.cached_tokens == context,
            "{} of {context} context tokens came from the cache",
            answer.usage.cached_tokens
        );
        ensure!(
            digest.as_ref() == Some(&answer.logits),
            "fetched and computed logits differ"
        );
        bytes = answer.usage.fetched_bytes;
        if from_disk { &mut disk } else { &mut host }.push(millis(answer.ttft()));
        progress.inc(1);
    }
    progress.finish_and_clear();

    let bandwidth = raw_stream::bandwidth(&setup.layout, context / CHUNK_TOKENS as usize).await?;
    let step = median(&mut steps);
    let limit = as_f64(bytes) / bandwidth * 1e3 + step;
    let computed = median(&mut computed);
    report.push(Row::new(format!("computed/{context}"), computed, "ms"));
    for (tier, times) in [("host", &mut host), ("disk", &mut disk)] {
        let time = median(times);
        report.push(
            Row::new(format!("{tier}/{context}"), time, "ms").against(computed, computed / time),
        );
    }
    report.push(
        Row::new(format!("stream_limit/{context}"), limit, "ms")
            .against(median(&mut host), limit / median(&mut host)),
    );
    report.push(Row::new(format!("decode_step/{context}"), step, "ms"));
    report.push(Row::new(
        format!("grpc_stream/{context}"),
        bandwidth / 1e9,
        "GB/s",
    ));
    Ok(daemon)
}

fn prompt(context: usize) -> Vec<u32> {
    let vocabulary = u32::try_from(Shape::SERVING.vocabulary).unwrap_or(u32::MAX);
    let mut rng = ChaCha8Rng::seed_from_u64(context as u64);
    (0..context + QUESTION_TOKENS)
        .map(|_| rng.next_u32() % vocabulary)
        .collect()
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
fn as_f64(value: u64) -> f64 {
    value as f64
}
