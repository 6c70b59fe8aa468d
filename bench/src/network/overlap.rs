//! How much of the shorter of transfer and computation is hidden behind the longer one.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use anyhow::ensure;
use kvasir_client::{Client, ClientConfig, DataPlane, GetEvent, GetOptions};
use kvasir_engine::kernels::Threads;
use kvasir_engine::kv::{BLOCK_TOKENS, KvDtype, KvPool};
use kvasir_engine::model::{LogitsWanted, Model, Positions, Scratch, Step};
use kvasir_tests::harness::Use;
use kvasir_tests::network::Network;
use kvasir_types::Level;

use crate::checkpoint::{self, Shape};
use crate::report::{Report, Row, median};

use super::bed::{Bed, CHUNK_TOKENS, as_f64, millis};

const CONTEXT_TOKENS: usize = 1024;
/// One batch.
const REST_TOKENS: usize = 512;

pub(super) fn run(network: &Network, quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let runs = if quick { 5 } else { 15 };
    let directory = tempfile::tempdir()?;
    checkpoint::write(directory.path(), &Shape::DEEP)?;
    let model = Arc::new(Model::load(directory.path())?);
    let vocabulary = u32::try_from(Shape::DEEP.vocabulary)?;
    let tokens = u32::try_from(CONTEXT_TOKENS + REST_TOKENS)?;
    let prompt: Vec<u32> = (0..tokens).map(|at| at * 7919 % vocabulary).collect();
    let mut bed = Bed::of(network, Arc::clone(&model), prompt, CONTEXT_TOKENS)?;
    // Both hosts are this one: the daemon and what carries its bytes need some of it.
    bed.threads = (bed.threads - 1).max(1);
    let compute = compute_alone(&bed, runs)?;
    network
        .near()
        .run(|| measure(&bed, compute, runs, report))?
}

async fn measure(
    bed: &Bed<'_>,
    compute: f64,
    runs: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let layers = f64::from(bed.layout.layers());
    let chunks = CONTEXT_TOKENS / CHUNK_TOKENS as usize;
    let bytes = bed.layout.chunk_bytes() * chunks as u64;
    let writer = bed.rig(Level::RAW, |_| {});
    bed.network.set_mbps(10_000)?;
    // Of the context alone, as of an earlier turn.
    let context = &bed.prompt[..CONTEXT_TOKENS + 1];
    writer.ask(context, Use::Write).await;
    let client = Client::connect_with(ClientConfig {
        endpoint: bed.daemon.address().parse()?,
        data_plane: DataPlane::Quic,
        ..ClientConfig::default()
    });
    let client = client.await?;
    writer.stored(&client, context).await;
    let keys = writer.plugin.namespace().prefix_keys(context);
    let computed = writer.ask(&bed.prompt, Use::Nothing).await;
    drop(writer);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate of some hundreds"
    )]
    let mbps = (as_f64(bytes) * 8.0 / compute / 1e3) as u32;
    bed.network.set_mbps(mbps)?;
    let reader = bed.rig(Level::RAW, |_| {});
    bed.connected(&reader).await?;
    let (mut transfers, mut times) = (Vec::new(), Vec::new());
    for run in 0..=runs {
        let begun = Instant::now();
        let mut stream = client.get(&keys, GetOptions::default()).await?;
        let mut came = 0;
        while let Some(event) = stream.next().await? {
            if let GetEvent::Layer { parts, .. } = event {
                came += parts.iter().map(|part| part.len() as u64).sum::<u64>();
            }
        }
        ensure!(came == bytes, "{came} bytes came");
        let transfer = millis(begun.elapsed());
        let answer = bed.fetch(&reader).await?;
        ensure!(answer.logits == computed.logits, "logits differ");
        if run > 0 {
            transfers.push(transfer);
            times.push(millis(answer.ttft()));
        }
    }
    let transfer = median(&mut transfers);
    let time = median(&mut times);
    let longer = transfer.max(compute);
    report.set("overlap_mbps", mbps);
    report.push(Row::new("overlap/transfer", transfer, "ms"));
    report.push(Row::new("overlap/compute", compute, "ms"));
    report.push(Row::new("overlap/ttft", time, "ms").against(longer, time / longer));
    let least = longer + transfer.min(compute) / layers;
    report.push(Row::new("overlap/least", least, "ms").against(longer, least / longer));
    Ok(())
}

/// Milliseconds that the rest takes over pages that have the context.
fn compute_alone(bed: &Bed<'_>, runs: usize) -> anyhow::Result<f64> {
    let blocks = bed.prompt.len().div_ceil(BLOCK_TOKENS);
    let mut pool = KvPool::new(bed.model.config(), blocks, KvDtype::F16);
    let mut scratch = Scratch::new(Threads::new(bed.threads)?);
    let blocks: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
    let mut forward = |range: std::ops::Range<usize>| -> anyhow::Result<f64> {
        let begun = Instant::now();
        let step = Step {
            tokens: &bed.prompt[range.clone()],
            positions: Positions::From(range.start),
            blocks: &blocks,
            logits: LogitsWanted::Last,
        };
        let go_on = &mut |_: kvasir_engine::model::BeforeLayer<'_>| ControlFlow::Continue(());
        bed.model.forward(&mut pool, &mut scratch, &[step], go_on)?;
        Ok(millis(begun.elapsed()))
    };
    for start in (0..CONTEXT_TOKENS).step_by(REST_TOKENS) {
        forward(start..start + REST_TOKENS)?;
    }
    let mut times = Vec::new();
    // The first warms caches and buffers.
    for run in 0..=runs {
        let time = forward(CONTEXT_TOKENS..bed.prompt.len())?;
        if run > 0 {
            times.push(time);
        }
    }
    Ok(median(&mut times))
}
