//! Content chunks computed for the cache, each alone behind the canonical prefix.
//!
//! Chunks that a few requests had and the cache had not are compiled when the last of these is
//! answered, never taken out of it: its chunks have read what stood before them. Compiling waits for
//! prefill of requests, and shares the engine with decoding, a step at a time. A chunk's KV goes
//! to the cache; what probes record of it stays here.
//!
//! Overflow: of more than [`MOST`] chunks that wait, the latest are forgotten, and found
//! missing by the next request that has them.
//!
//! A request that comes while a step is under way waits for one layer of it at most.

use std::collections::{HashSet, VecDeque};
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::atomic::Ordering;

use bytes::Bytes;
use half::f16;
use kvasir_plugin::blend::Recorder;
use kvasir_plugin::{CachePlugin, CaptureOutcome, ChunkCopy};
use kvasir_types::{ChunkKey, Hints, KvLayout};
use lru::LruCache;
use metrics::counter;

use super::blending::{Gathering, Scores};
use super::engine_loop::EngineLoop;
use crate::blend::{Probes, Recording};
use crate::kv::{BLOCK_TOKENS, BlockId};
use crate::metrics::COMPILED;
use crate::model::ForwardError;

/// Chunks that wait, at most.
const MOST: usize = 1024;

#[derive(Debug)]
pub(super) struct Compiler {
    pub(super) probes: Probes,
    /// How often chunks were missed that are not compiled yet.
    missed: LruCache<ChunkKey, u32>,
    /// How often is often enough.
    after: NonZeroU32,
    waiting: VecDeque<Job>,
    /// Of those that wait, and of the one under way.
    keys: HashSet<ChunkKey>,
    current: Option<Compiling>,
}

/// A chunk to compile.
#[derive(Debug)]
struct Job {
    key: ChunkKey,
    layout: KvLayout,
    prefix: Vec<u32>,
    chunk: Vec<u32>,
    /// The cache has it not.
    store: bool,
}

#[derive(Debug)]
struct Compiling {
    job: Job,
    blocks: Vec<BlockId>,
    recording: Recording,
}

impl Compiler {
    pub(super) fn new(probes: Probes, remembered: NonZeroUsize, after: NonZeroU32) -> Self {
        Self {
            probes,
            missed: LruCache::new(remembered),
            after,
            waiting: VecDeque::new(),
            keys: HashSet::new(),
            current: None,
        }
    }

    /// Chunks that the cache has been found not to have often enough, or of which it is not
    /// known what depends on context.
    pub(super) fn want(&mut self, gathering: &Gathering, scores: &LruCache<ChunkKey, Scores>) {
        let segmented = gathering.segmented();
        let present: HashSet<usize> = gathering.gather().present().collect();
        for (index, chunk) in segmented.chunks().iter().enumerate() {
            let store = !present.contains(&index);
            let known = scores.contains(&chunk.key());
            if store && !self.is_missed_enough(chunk.key()) {
                continue;
            }
            if (store || !known) && self.waiting.len() < MOST && self.keys.insert(chunk.key()) {
                self.waiting.push_back(Job {
                    key: chunk.key(),
                    layout: *chunk.layout(),
                    prefix: segmented.prefix().to_vec(),
                    chunk: segmented.tokens()[chunk.range()].to_vec(),
                    store,
                });
            }
        }
    }

    /// Counts one more miss.
    fn is_missed_enough(&mut self, key: ChunkKey) -> bool {
        let missed = self.missed.get_or_insert_mut(key, || 0);
        *missed = missed.saturating_add(1);
        *missed >= self.after.get()
    }

    /// Whether nothing is to be compiled.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.current.is_none()
    }
}

/// Beside the chunk, for engines that did not compile it.
fn store_scores(plugin: &CachePlugin, recorder: &Recorder, job: &Job, scores: &Scores) {
    let bytes = |layer: &Vec<f16>| {
        let bytes: Vec<u8> = layer.iter().flat_map(|score| score.to_le_bytes()).collect();
        Bytes::from(bytes)
    };
    let Ok(layout) = recorder.layout(job.layout.tokens()) else {
        return;
    };
    let copy = ChunkCopy {
        key: recorder.key(plugin.namespace(), &job.key),
        layout,
        start: 0,
        layers: scores.iter().map(bytes).collect(),
        hints: Hints::default(),
    };
    if plugin.capture(copy) == CaptureOutcome::Dropped {
        tracing::debug!(key = %job.key, "what was recorded of a chunk was not stored");
    }
}

impl EngineLoop {
    /// Takes the next step of compiling, when no request waits for its first token.
    pub(super) fn compile(&mut self) {
        let (Some(plugin), Some(mut blender)) = (self.plugin.clone(), self.blender.take()) else {
            return;
        };
        let compiler = &mut blender.compiler;
        if self.is_prefilling() || compiler.is_idle() {
            self.blender = Some(blender);
            return;
        }
        if compiler.current.is_none()
            && let Some(job) = compiler.waiting.pop_front()
        {
            let tokens = compiler.probes.tokens(job.prefix.len(), job.chunk.len());
            let fits = tokens <= self.sequence_tokens;
            match self.take_blocks(tokens.div_ceil(BLOCK_TOKENS)) {
                Some(blocks) if fits => {
                    compiler.current = Some(Compiling {
                        job,
                        blocks,
                        recording: Recording::default(),
                    });
                }
                Some(blocks) => {
                    self.give_back(&blocks);
                    compiler.keys.remove(&job.key);
                }
                // Requests have the pages.
                None => compiler.waiting.push_front(job),
            }
        }
        if let Some(mut compiling) = compiler.current.take() {
            match self.compile_step(&plugin, &compiler.probes, &mut compiling) {
                Ok(true) => compiler.current = Some(compiling),
                Ok(false) => {
                    counter!(COMPILED).increment(1);
                    let Compiling { job, recording, .. } = &mut compiling;
                    let largest = f16::MAX.to_f32();
                    let rounded = |score: &f32| f16::from_f32(score.min(largest));
                    let layers = recording.scores.iter();
                    let scores: Scores =
                        layers.map(|it| it.iter().map(rounded).collect()).collect();
                    compiler.keys.remove(&job.key);
                    store_scores(&plugin, &blender.recorder, job, &scores);
                    blender.scores.put(job.key, scores);
                    self.give_back(&compiling.blocks);
                }
                Err(error) => {
                    tracing::error!(%error, "a chunk could not be compiled");
                    compiler.keys.remove(&compiling.job.key);
                    self.give_back(&compiling.blocks);
                }
            }
        }
        self.blender = Some(blender);
    }

    /// False when it is done.
    fn compile_step(
        &mut self,
        plugin: &CachePlugin,
        probes: &Probes,
        compiling: &mut Compiling,
    ) -> Result<bool, ForwardError> {
        let Compiling {
            job,
            blocks,
            recording,
        } = compiling;
        let waiting = &self.waiting_count;
        let was_alone = recording.is_alone();
        let goes_on = recording.step(
            probes,
            &self.model,
            &mut self.pool,
            &mut self.scratch,
            blocks,
            &job.prefix,
            &job.chunk,
            job.store,
            &|| waiting.load(Ordering::Acquire) == 0,
        )?;
        if job.store && recording.is_alone() && !was_alone {
            self.store_compiled(plugin, job, blocks);
        }
        Ok(goes_on)
    }

    fn store_compiled(&mut self, plugin: &CachePlugin, job: &Job, blocks: &[BlockId]) {
        let layers: Result<Vec<Bytes>, _> = (0..usize::from(job.layout.layers()))
            .map(|layer| {
                let mut payload = vec![0u8; job.layout.layer_bytes()];
                let (first, tokens) = (job.prefix.len(), job.chunk.len());
                self.pool
                    .read_layer(blocks, first, tokens, layer, &mut payload)
                    .map(|()| Bytes::from(payload))
            })
            .collect();
        if !self.pool.is_exact(blocks) {
            tracing::debug!(key = %job.key, "a compiled chunk is not stored: its pages were rounded");
            return;
        }
        match layers {
            Ok(layers) => {
                let copy = ChunkCopy {
                    key: job.key,
                    layout: job.layout,
                    start: job.prefix.len() as u64,
                    layers,
                    hints: Hints::default(),
                };
                if plugin.capture(copy) == CaptureOutcome::Dropped {
                    tracing::debug!(key = %job.key, "a compiled chunk was not stored: too many wait");
                }
            }
            Err(error) => tracing::error!(%error, "a compiled chunk could not be copied"),
        }
    }
}
