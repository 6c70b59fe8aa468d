//! Sequences whose chunks are reused where they did not stand before.
//!
//! A sequence that has chunks gathers them when nothing of its front is to be fetched any
//! more. What it came to is planned ([`BlendPlan`]): computing everything, or reusing the
//! chunks and computing a part of them anew. When it is the only one, it runs layer by layer
//! behind its gather; else the chunks land while others run, and its rows join their batches.

use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use half::f16;
use kvasir_plugin::blend::{
    BlendPlan, ChunkLimits, ContentCuts, Gate, Gather, GatherOutcome, Quality, Recorder, Reused,
    Segmented, Selection, Selector, Situation,
};
use kvasir_plugin::{CachePlugin, CostModel, LayerWait};
use kvasir_types::{ChunkKey, LayerIdx, Level};
use lru::LruCache;

use super::compile::Compiler;
use super::engine_loop::{EngineLoop, LOOK_INTERVAL};
use super::sequence::{Phase, Sequence};
use crate::blend::Probes;
use crate::cache::{PoolBackend, Turns};
use crate::config::ModelConfig;
use crate::model::ForwardError;

/// Batches that are computed as one behind a gather. When they are done it has brought
/// everything, so that later ones hide nothing of it; but requests that come meanwhile wait.
const BATCHES_BEHIND_GATHER: usize = 4;

/// How an engine blends.
#[derive(Clone, Debug)]
pub struct BlendConfig {
    /// What was measured on the model.
    pub gate: Gate,
    /// How near to full prefill answers must be, for which the gate knows repairs.
    pub quality: Quality,
    /// A repair to use whatever was measured. Default: none.
    pub forced: Option<Selector>,
    /// How long chunks are.
    pub limits: ChunkLimits,
    /// How prompts are cut into chunks that name none, all but their last piece. Default: not at
    /// all.
    pub cuts: Option<ContentCuts>,
    /// Chunks whose scores are remembered, 2 bytes a token and layer of the probes, and as
    /// many that were missed. Default: 4,096.
    pub remembered: usize,
    /// A chunk is compiled when it has been missed so often. Half the chunks of a trace are
    /// asked for once, and compiling one costs more than computing it. Default:
    /// [`Self::COMPILE_AFTER`].
    pub compile_after: NonZeroU32,
}

impl BlendConfig {
    /// Misses after which a chunk is compiled: the second.
    pub const COMPILE_AFTER: NonZeroU32 = NonZeroU32::MIN.saturating_add(1);

    /// As the gate says.
    pub fn new(gate: Gate) -> Self {
        Self {
            gate,
            quality: Quality::default(),
            forced: None,
            limits: ChunkLimits::default(),
            cuts: None,
            remembered: 4_096,
            compile_after: Self::COMPILE_AFTER,
        }
    }
}

/// What the engine thread knows of chunks.
#[derive(Debug)]
pub(super) struct Blender {
    config: BlendConfig,
    turns: Turns,
    /// How what probes record is known to other engines.
    pub(super) recorder: Recorder,
    /// What probes recorded.
    pub(super) scores: LruCache<ChunkKey, Scores>,
    pub(super) compiler: Compiler,
}

/// What probes recorded of a chunk: by layer, from layer 1, and token. Rounded to 16 bits.
pub(super) type Scores = Arc<[Vec<f16>]>;

/// A sequence on its way to a [`Selection`].
#[derive(Debug)]
pub(super) struct Gathering {
    segmented: Segmented,
    gather: Gather,
    /// What is computed anew, once it is decided that chunks are reused.
    selector: Option<Selector>,
}

impl Blender {
    pub(super) fn new(config: BlendConfig, model: &ModelConfig) -> Self {
        let remembered = NonZeroUsize::new(config.remembered).unwrap_or(NonZeroUsize::MIN);
        let probes = Probes {
            texts: config.gate.probes.clone(),
            layers: config.gate.probe_layers.into(),
        };
        Self {
            recorder: Recorder {
                digest: probes.digest(),
                layers: config.gate.probe_layers,
            },
            turns: Turns::new(model),
            scores: LruCache::new(remembered),
            compiler: Compiler::new(probes, remembered, config.compile_after),
            config,
        }
    }

    /// Takes over what others have recorded.
    fn recall(&mut self, gathering: &Gathering) {
        for (index, chunk) in gathering.segmented.chunks().iter().enumerate() {
            if let Some(layers) = gathering.gather.recorded(index) {
                let numbers = |layer: &Bytes| {
                    let bytes = layer.as_chunks().0.iter();
                    bytes.map(|&bytes| f16::from_le_bytes(bytes)).collect()
                };
                let scores: Scores = layers.iter().map(numbers).collect();
                // One that is no number would make all others none.
                if scores.iter().flatten().all(|score: &f16| score.is_finite()) {
                    self.scores.put(chunk.key(), scores);
                }
            }
        }
    }

    fn plan(&self, situation: &Situation<'_>, cost: &CostModel) -> BlendPlan {
        match self.config.forced {
            Some(selector) => BlendPlan::forced(situation, selector, cost),
            None => BlendPlan::new(situation, &self.config.gate, cost),
        }
    }

    /// What of a prompt is computed when these of its chunks are reused.
    fn selection(
        &mut self,
        selector: Selector,
        segmented: &Segmented,
        chunks: &[usize],
        layers: u16,
    ) -> Selection {
        let tokens = segmented.tokens().len();
        let depth = self.compiler.probes.layers.min(usize::from(layers) - 1);
        let mut scores = vec![vec![0.0; tokens]; depth];
        // A chunk of which nothing says what depends on its context is computed like text.
        let mut known = Vec::new();
        for (&chunk, reused) in chunks.iter().zip(reused(segmented, chunks)) {
            let chunk = &segmented.chunks()[chunk];
            let recorded = self.scores.get(&chunk.key());
            if let Some(recorded) = recorded.filter(|it| it.len() >= depth) {
                for (scores, recorded) in scores.iter_mut().zip(recorded.iter()) {
                    for (score, value) in scores[chunk.range()].iter_mut().zip(recorded) {
                        *score = value.to_f32();
                    }
                }
                known.push(reused);
            } else if reused.exact {
                known.push(reused);
            }
        }
        let mut selection = Selection::new(selector, tokens, &known, layers, &scores);
        // Its logits are wanted.
        if let Some(last) = selection.layers.last_mut() {
            *last = layers;
        }
        selection
    }
}

fn reused(segmented: &Segmented, chunks: &[usize]) -> Vec<Reused> {
    let prefix = segmented.prefix();
    let at_its_own = segmented.tokens().starts_with(prefix);
    let reused = chunks.iter().map(|&chunk| {
        let tokens = segmented.chunks()[chunk].range();
        Reused {
            exact: at_its_own && tokens.start == prefix.len(),
            tokens,
        }
    });
    reused.collect()
}

impl EngineLoop {
    /// Starts to gather the chunks of sequences whose front is settled.
    pub(super) fn start_gathers(&mut self) {
        let (Some(plugin), Some(blender)) = (&self.plugin, &self.blender) else {
            return;
        };
        let settled = |sequence: &&mut Sequence| matches!(sequence.phase, Phase::Prefill);
        for sequence in self.running.iter_mut().filter(settled) {
            let Some(segmented) = sequence.segmented.take() else {
                continue;
            };
            let segmented = segmented.behind(sequence.position);
            if !segmented.chunks().is_empty() {
                sequence.phase = Phase::Gathering(Box::new(Gathering {
                    gather: plugin.gather_recorded(&segmented, &blender.recorder, |key| {
                        !blender.scores.contains(key)
                    }),
                    segmented,
                    selector: None,
                }));
            }
        }
    }

    /// Lands what has come of chunks, without waiting.
    pub(super) fn land_chunks(&mut self) {
        for index in 0..self.running.len() {
            if matches!(self.running[index].phase, Phase::Gathering(_)) {
                self.land_chunks_of(index, |gather, backend, blocks| {
                    gather.poll(backend, blocks)
                });
            }
        }
    }

    /// Lands what `of` finds has come, and plans when it is known what will come.
    fn land_chunks_of(
        &mut self,
        index: usize,
        of: impl FnOnce(&mut Gather, &mut PoolBackend<'_>, &[crate::kv::BlockId]) -> GatherOutcome,
    ) {
        let (Some(plugin), Some(blender)) = (self.plugin.clone(), &mut self.blender) else {
            return;
        };
        let sequence = &mut self.running[index];
        let Phase::Gathering(gathering) = &mut sequence.phase else {
            return;
        };
        let layout = plugin.namespace().layout();
        let mut backend = PoolBackend::new(&mut self.pool, layout).with_turns(&mut blender.turns);
        let outcome = of(&mut gathering.gather, &mut backend, &sequence.blocks);
        if outcome == GatherOutcome::Deciding {
            return;
        }
        if gathering.selector.is_none() {
            let (writes, waited) = (sequence.writes_cache(), sequence.waited());
            let Phase::Gathering(gathering) = &mut sequence.phase else {
                return;
            };
            blender.recall(gathering);
            if writes {
                blender.compiler.want(gathering, &blender.scores);
            }
            match gathering.plan(blender, &plugin, sequence.position, waited) {
                BlendPlan::Blend { selector, .. } => gathering.selector = Some(selector),
                BlendPlan::Compute(why) => {
                    tracing::debug!(?why, "chunks are not reused");
                    sequence.phase = Phase::Prefill;
                    return;
                }
            }
        }
        if outcome == GatherOutcome::Done {
            let Phase::Gathering(gathering) = &mut sequence.phase else {
                return;
            };
            let chunks: Vec<usize> = gathering.gather.chunks().collect();
            let selector = gathering.selector.unwrap_or(Selector::NONE);
            let selection =
                blender.selection(selector, &gathering.segmented, &chunks, layout.layers());
            sequence.blend(selection, &chunks);
        }
    }

    /// Runs the one sequence that gathers behind what comes, layer by layer. False when
    /// there is no such sequence, or not only one that waits for the cache.
    pub(super) fn run_behind_gather(&mut self) -> bool {
        let (Some(plugin), Some(blender)) = (self.plugin.clone(), &mut self.blender) else {
            return false;
        };
        let layout = plugin.namespace().layout();
        let mut waits = self.running.iter_mut().enumerate().filter(|(_, sequence)| {
            matches!(sequence.phase, Phase::Gathering(_) | Phase::Fetching(_))
        });
        let (Some((index, sequence)), None) = (waits.next(), waits.next()) else {
            return false;
        };
        // Requests that wait for pages have waited for this sequence already.
        if self.waiting_count.load(Ordering::Acquire) > 0 {
            return false;
        }
        let Phase::Gathering(gathering) = &sequence.phase else {
            return false;
        };
        let Some(selector) = gathering.selector else {
            return false;
        };
        let chunks: Vec<usize> = gathering.gather.chunks().collect();
        if chunks.is_empty() {
            return false;
        }
        let selection = blender.selection(selector, &gathering.segmented, &chunks, layout.layers());
        let Phase::Gathering(mut gathering) =
            std::mem::replace(&mut sequence.phase, Phase::Prefill)
        else {
            return false;
        };
        sequence.phase = Phase::Blending(Box::new(selection));
        let blocks = sequence.blocks.clone();
        let (events, waiting) = (sequence.events(), Arc::clone(&self.waiting_count));
        let from = sequence.position;
        let room = self.batch_tokens.saturating_mul(BATCHES_BEHIND_GATHER);
        let plan = [self.planned(index, room)];
        let Some(mut blender) = self.blender.take() else {
            return false;
        };
        let outcome = self.forward(&plan, &mut |before| {
            let layer = LayerIdx(u16::try_from(before.layer).unwrap_or(u16::MAX));
            let mut backend = PoolBackend::new(before.pool, layout).with_turns(&mut blender.turns);
            let gather = &mut gathering.gather;
            loop {
                match gather.wait_layer(layer, LOOK_INTERVAL, &mut backend, &blocks) {
                    LayerWait::Landed => return ControlFlow::Continue(()),
                    LayerWait::Short => return ControlFlow::Break(()),
                    // Whoever came meanwhile must not wait for this gather.
                    LayerWait::Pending
                        if waiting.load(Ordering::Acquire) > 0 || events.is_closed() =>
                    {
                        return ControlFlow::Break(());
                    }
                    LayerWait::Pending => {}
                }
            }
        });
        self.blender = Some(blender);
        let sequence = &mut self.running[index];
        sequence.note_gathered(&gathering);
        match outcome {
            Ok(logits) => {
                sequence.count_blended();
                self.apply(&plan, &logits);
            }
            // Fewer chunks come than were expected, and what was computed over them is void;
            // or somebody came, and the layers that have landed stay.
            Err(ForwardError::Stopped) => {
                sequence.position = from;
                sequence.phase = Phase::Gathering(gathering);
            }
            Err(error) => self.fail(&plan, &error),
        }
        true
    }

    /// Waits a moment for chunks of the first sequence that gathers.
    pub(super) fn await_chunks(&mut self) {
        let gathers = |sequence: &Sequence| matches!(sequence.phase, Phase::Gathering(_));
        if let Some(index) = self.running.iter().position(gathers) {
            self.land_chunks_of(index, |gather, backend, blocks| {
                gather.wait(LOOK_INTERVAL, backend, blocks)
            });
        }
    }
}

impl Gathering {
    pub(super) fn segmented(&self) -> &Segmented {
        &self.segmented
    }

    pub(super) fn gather(&self) -> &Gather {
        &self.gather
    }

    fn plan(
        &self,
        blender: &Blender,
        plugin: &CachePlugin,
        ready: usize,
        waited: Duration,
    ) -> BlendPlan {
        let chunks: Vec<usize> = self.gather.chunks().collect();
        let cost = plugin.cost_model();
        let situation = Situation {
            tokens: self.segmented.tokens().len(),
            ready,
            chunks: &reused(&self.segmented, &chunks),
            load: cost.fetch_time(self.gather.expected_bytes(), Instant::now()),
            deadline: plugin.deadline().map(|all| all.saturating_sub(waited)),
            layers: plugin.namespace().layout().layers(),
            quality: blender.config.quality,
            policy: plugin.load_policy(),
        };
        blender.plan(&situation, &cost)
    }
}

impl Sequence {
    /// Leaves `Gathering`: what is selected is to be computed, over `chunks`.
    fn blend(&mut self, selection: Selection, chunks: &[usize]) {
        let Phase::Gathering(gathering) =
            std::mem::replace(&mut self.phase, Phase::Blending(Box::new(selection)))
        else {
            return;
        };
        self.note_gathered(&gathering);
        if chunks.is_empty() {
            self.phase = Phase::Prefill;
        } else {
            self.count_blended();
        }
    }

    fn note_gathered(&mut self, gathering: &Gathering) {
        self.usage.fetched_bytes += gathering.gather.bytes();
        let levels = gathering.gather.levels().map(|(_, level)| level);
        let levels = levels.chain(self.usage.cached_level);
        self.usage.cached_level = Level::coarsest(levels.collect::<Vec<_>>());
    }

    /// What is computed over moved chunks is near to what prefill computes, and no more:
    /// it is not captured.
    fn count_blended(&mut self) {
        if let Phase::Blending(selection) = &self.phase {
            self.usage.blended_tokens = selection.reused_tokens();
            #[expect(clippy::cast_possible_truncation, reason = "a share")]
            let recomputed = selection.charged() as f32;
            self.usage.recomputed = recomputed;
        }
        if let Some(prompt) = &self.prompt {
            let whole = self.position / prompt.chunk_tokens();
            self.capture.end = self.capture.end.min(whole);
        }
    }
}
