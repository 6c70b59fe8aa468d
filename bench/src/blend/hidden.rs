//! How much of a load hides behind the computing of 30 % of the rows.
//!
//! # Rows
//! - `load`: from asking for the chunks until the last layer lies in the pages, its keys turned,
//!   in ms, with nothing computed; `compute`: the rows, with all in the pages, in one batch;
//!   `together`: the engine's time to the first token, of prompts in the same orders;
//!   `hidden`: 1 − (together − compute) ÷ load. All that the engine does besides counts against
//!   it. Over a link on which loading takes about half as long as computing;
//! - `together/loop`, `hidden/loop`: the same of the layer loop alone, in one batch, which is
//!   what a scheduler could reach;
//! - `…/spare`: the same where the engine computes on all cores but one. What loading takes of a
//!   processor, here and in the daemon, can hide only where there is one besides, as there is
//!   beside a GPU;
//! - `…/local`: the same on all cores, without a link. What is hidden of a load that takes a hundredth of the
//!   computing is within the noise of that.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use kvasir_engine::blend::{self, Probes};
use kvasir_engine::cache::{PoolBackend, Turns};
use kvasir_engine::model::{LogitsWanted, Model, Scratch};
use kvasir_engine::{BLOCK_TOKENS, BlockId, KvDtype, KvPool, Threads};
use kvasir_plugin::blend::{Gather, GatherOutcome, Reused, Segmented, Selection, Selector};
use kvasir_plugin::{DataPlane, LayerWait};
use kvasir_tests::harness::Link;
use kvasir_types::{LayerIdx, Level};

use super::bed::{Bed, Order, PREFIX, Reader, millis};
use super::graded;
use crate::report::{Report, Row, median};

const SELECTOR: Selector = graded(0.3);

/// Returns the shares that the engine hides over a link: on all cores, and where it spares one.
pub(super) async fn run(bed: &mut Bed, report: &mut Report) -> anyhow::Result<[f64; 2]> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut layers = LayerLoop::new(bed, cores)?;
    let local = bed.reader(SELECTOR, Level::RAW, 1).await?;
    let compute = measure(bed, &local, &mut layers, "/local", report).await?.0;
    drop(local);
    let all = over_link(bed, &mut layers, cores, compute, "", report).await?;
    let spare = (cores - 1).max(1);
    let mut layers = LayerLoop::new(bed, spare)?;
    // On fewer cores the computing takes longer, and so does what is to hide behind it.
    #[expect(clippy::cast_precision_loss, reason = "a count of cores")]
    let compute = compute * cores as f64 / spare as f64;
    let spared = over_link(bed, &mut layers, spare, compute, "/spare", report).await?;
    Ok([all, spared])
}

/// The share that is hidden over a link on which loading takes half of `compute`, in ms.
async fn over_link(
    bed: &mut Bed,
    layers: &mut LayerLoop,
    threads: usize,
    compute: f64,
    suffix: &str,
    report: &mut Report,
) -> anyhow::Result<f64> {
    let link = Link::start(bed.address().to_owned(), FAST).await;
    let config = bed.plugin(DataPlane::Grpc, Level::RAW);
    let reader = bed
        .reader_at(link.address(), config, threads, SELECTOR, Level::RAW, 1)
        .await?;
    let tokens = u32::try_from(bed.size.context()).context("a prompt is short")?;
    let bytes = f64::from(tokens) * f64::from(token_bytes(bed)?);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "millions of bits a second"
    )]
    let mbps = (bytes * 8.0 / (compute / 2.0) / 1e3) as u32;
    link.set_mbps(mbps.max(1));
    report.set(&format!("mbps{suffix}"), mbps);
    Ok(measure(bed, &reader, layers, suffix, report).await?.1)
}

/// Time to compute, and the share that is hidden.
async fn measure(
    bed: &mut Bed,
    reader: &Reader,
    layers: &mut LayerLoop,
    suffix: &str,
    report: &mut Report,
) -> anyhow::Result<(f64, f64)> {
    let runs = 2 * bed.size.runs;
    let progress = crate::progress(runs as u64, "hidden");
    let mut all = [const { Vec::new() }; 6];
    // The first round meets cold connections and buffers.
    for run in 0..=runs {
        let order = bed.next_order();
        let segmented = order.cut(reader.rig.plugin.namespace());
        let times = tokio::task::block_in_place(|| -> anyhow::Result<_> {
            let started = Instant::now();
            layers.load(&mut reader.rig.plugin.gather(&segmented))?;
            let loaded = started.elapsed();
            let first = layers.time(&order, &segmented, None)?;
            let mut gather = reader.rig.plugin.gather(&segmented);
            let looped = layers.time(&order, &segmented, Some(&mut gather))?;
            // Before and after, as what ran last has left its data in the caches.
            let second = layers.time(&order, &segmented, None)?;
            Ok([millis(loaded), f64::midpoint(first, second), looped])
        })?;
        let answer = reader.blend(&order).await?;
        let [load, compute, looped] = times;
        let together = millis(answer.ttft());
        // Of one round: the machine may have other work in another.
        let [in_loop, hidden] = [looped, together].map(|time| 1.0 - (time - compute) / load);
        if run > 0 {
            let values = [load, compute, looped, together, in_loop, hidden];
            for (all, value) in all.iter_mut().zip(values) {
                all.push(value);
            }
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    let [load, compute, looped, together, in_loop, hidden] = all.map(|mut all| median(&mut all));
    for (name, value, unit) in [
        ("load", load, "ms"),
        ("compute", compute, "ms"),
        ("together/loop", looped, "ms"),
        ("together", together, "ms"),
        ("hidden/loop", in_loop, "of load"),
        ("hidden", hidden, "of load"),
    ] {
        report.push(Row::new(format!("{name}{suffix}"), value, unit));
    }
    Ok((compute, hidden))
}

/// The layers of the model behind those of a gather, and nothing else of an engine.
struct LayerLoop {
    model: Arc<Model>,
    pool: KvPool,
    blocks: Vec<BlockId>,
    scratch: Scratch,
    turns: Turns,
    layout: kvasir_types::KvLayout,
    probes: Probes,
    /// By what the chunk is: its scores by layer and token.
    scores: Vec<(Vec<u32>, Vec<Vec<f32>>)>,
}

impl LayerLoop {
    fn new(bed: &Bed, threads: usize) -> anyhow::Result<Self> {
        let model = Arc::clone(&bed.model);
        let config = model.config();
        let count = (bed.stored.tokens.len() + 128).div_ceil(BLOCK_TOKENS);
        let mut pool = KvPool::new(config, count, KvDtype::F32);
        let blocks = (0..count).map(|_| pool.alloc()).collect::<Option<_>>();
        let gate = bed.gate(true);
        let mut all = Self {
            blocks: blocks.context("the pool has as many pages")?,
            pool,
            scratch: Scratch::new(Threads::new(threads)?),
            turns: Turns::new(config),
            layout: bed.layout,
            probes: Probes {
                texts: gate.probes,
                layers: gate.probe_layers.into(),
            },
            scores: Vec::new(),
            model,
        };
        for chunk in &bed.stored.chunks {
            let tokens = bed.stored.tokens[chunk.clone()].to_vec();
            let scores = all.probes.record(
                &all.model,
                &mut all.pool,
                &mut all.scratch,
                &all.blocks,
                &PREFIX,
                &tokens,
            )?;
            all.scores.push((tokens, scores));
        }
        Ok(all)
    }

    /// Until all chunks are in the pages.
    fn load(&mut self, gather: &mut Gather) -> anyhow::Result<()> {
        let mut backend =
            PoolBackend::new(&mut self.pool, &self.layout).with_turns(&mut self.turns);
        while gather.wait(LOOK, &mut backend, &self.blocks) != GatherOutcome::Done {}
        ensure!(gather.chunks().next().is_some(), "no chunk came");
        Ok(())
    }

    /// Over chunks that are in the pages, or behind a gather.
    fn run(
        &mut self,
        order: &Order,
        segmented: &Segmented,
        mut gather: Option<&mut Gather>,
    ) -> anyhow::Result<()> {
        let mut selection = self.selection(order, segmented)?;
        let mut prompts = [blend::Prompt {
            tokens: &order.tokens,
            blocks: &self.blocks,
            selection: &mut selection,
            ready: 0,
            logits: LogitsWanted::Last,
        }];
        let (turns, layout, blocks) = (&mut self.turns, &self.layout, &self.blocks);
        let mut land = |layer: usize, pool: &mut KvPool| {
            let Some(gather) = &mut gather else {
                return ControlFlow::Continue(());
            };
            let layer = LayerIdx(u16::try_from(layer).unwrap_or(u16::MAX));
            let mut backend = PoolBackend::new(pool, layout).with_turns(turns);
            loop {
                match gather.wait_layer(layer, LOOK, &mut backend, blocks) {
                    LayerWait::Landed => return ControlFlow::Continue(()),
                    LayerWait::Short => return ControlFlow::Break(()),
                    LayerWait::Pending => {}
                }
            }
        };
        let (pool, scratch) = (&mut self.pool, &mut self.scratch);
        blend::run(&self.model, pool, scratch, &mut prompts, &mut land)?;
        Ok(())
    }

    /// Milliseconds that [`Self::run`] takes.
    fn time(
        &mut self,
        order: &Order,
        segmented: &Segmented,
        gather: Option<&mut Gather>,
    ) -> anyhow::Result<f64> {
        let started = Instant::now();
        self.run(order, segmented, gather)?;
        Ok(millis(started.elapsed()))
    }

    /// As the engine selects.
    fn selection(&self, order: &Order, segmented: &Segmented) -> anyhow::Result<Selection> {
        let tokens = order.tokens.len();
        let mut scores = vec![vec![0.0; tokens]; self.probes.layers];
        let mut reused = Vec::new();
        for chunk in segmented.chunks() {
            let range = chunk.range();
            let text = &order.tokens[range.clone()];
            let Some((_, found)) = self.scores.iter().find(|(known, _)| known == text) else {
                bail!("a chunk was not recorded");
            };
            for (scores, found) in scores.iter_mut().zip(found) {
                scores[range.clone()].copy_from_slice(found);
            }
            reused.push(Reused {
                exact: range.start == PREFIX.len(),
                tokens: range,
            });
        }
        let layers = self.layout.layers();
        Ok(Selection::new(SELECTOR, tokens, &reused, layers, &scores))
    }
}

const LOOK: Duration = Duration::from_millis(1);
/// Millions of bits a second while nothing is measured.
const FAST: u32 = 1_000_000;

/// Bytes of the KV of a token.
fn token_bytes(bed: &Bed) -> anyhow::Result<u32> {
    Ok(u32::try_from(bed.layout.chunk_bytes())? / bed.layout.tokens())
}
