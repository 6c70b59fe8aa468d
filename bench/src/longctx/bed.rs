//! Sequences with long contexts over one pool.

use std::ops::ControlFlow;
use std::time::Instant;

use half::f16;
use kvasir_engine::cache::{self, PoolBackend, Turns};
use kvasir_engine::{
    BLOCK_TOKENS, BlockId, KvDtype, KvPool, LogitsWanted, Model, PagerStats, Pages, Positions,
    Scratch, Step, Threads,
};
use kvasir_plugin::{EngineBackend as _, Placement};
use kvasir_types::LayerIdx;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::choice::Boxes;

pub(super) const DTYPE: KvDtype = KvDtype::F16;

/// Tokens that are computed together.
const CHUNK_TOKENS: usize = 512;
/// Tokens from the same few words.
const TOPIC_TOKENS: usize = 128;
const TOPIC_WORDS: u32 = 24;
/// Tokens for which there is room behind the contexts.
const ROOM_TOKENS: usize = 256;

/// How pages are read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Method {
    All,
    Chosen {
        /// What the token before chose is read one layer ahead.
        ahead: bool,
    },
}

/// What decoding some tokens took.
#[derive(Debug)]
pub(super) struct Decoded {
    /// Of each token, in ms.
    pub(super) times: Vec<f64>,
    pub(super) stats: PagerStats,
}

#[derive(Debug)]
pub(super) struct Bed<'a> {
    model: &'a Model,
    scratch: Scratch,
    pool: KvPool,
    tables: Vec<Vec<BlockId>>,
    boxes: Vec<Boxes>,
    context: usize,
    /// Tokens behind the contexts so far.
    decoded: usize,
}

impl<'a> Bed<'a> {
    /// Sequences of `context` tokens each, in memory.
    pub(super) fn new(
        model: &'a Model,
        context: usize,
        sequences: usize,
        threads: &Threads,
    ) -> anyhow::Result<Self> {
        let config = model.config();
        let blocks = (context + ROOM_TOKENS) / BLOCK_TOKENS;
        let mut pool = KvPool::new(config, blocks * sequences, DTYPE);
        let tables: Vec<Vec<BlockId>> = (0..sequences)
            .map(|_| (0..blocks).filter_map(|_| pool.alloc()).collect())
            .collect();
        let mut bed = Self {
            model,
            scratch: Scratch::new(threads.clone()),
            pool,
            tables,
            boxes: (0..sequences)
                .map(|_| Boxes::new(config, context))
                .collect(),
            context,
            decoded: 0,
        };
        bed.fill()?;
        Ok(bed)
    }

    pub(super) fn pool(&self) -> &KvPool {
        &self.pool
    }

    /// Computes chunks alone and lays them into the sequences. Sequences have the same chunks,
    /// at other places.
    fn fill(&mut self) -> anyhow::Result<()> {
        let config = self.model.config();
        let layout = cache::layout(config, DTYPE, u32::try_from(CHUNK_TOKENS)?)?;
        let mut turns = Turns::new(config);
        let mut alone = KvPool::new(config, CHUNK_TOKENS / BLOCK_TOKENS, DTYPE);
        let blocks: Vec<BlockId> = std::iter::from_fn(|| alone.alloc()).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let chunks = self.context / CHUNK_TOKENS;
        let progress = crate::progress(chunks as u64, "computing chunks");
        let mut payload = vec![0; layout.layer_bytes()];
        for chunk in 0..chunks {
            let tokens = text(&mut rng, config.vocab_size, CHUNK_TOKENS);
            let step = Step {
                tokens: &tokens,
                positions: Positions::From(0),
                blocks: &blocks,
                logits: LogitsWanted::None,
            };
            let go_on = &mut |_: kvasir_engine::BeforeLayer<'_>| ControlFlow::Continue(());
            self.model
                .forward(&mut alone, &mut self.scratch, &[step], go_on)?;
            for (sequence, table) in self.tables.iter().enumerate() {
                let at = (chunk + sequence * chunks / self.tables.len()) % chunks;
                let placement = Placement {
                    first: at * CHUNK_TOKENS,
                    compiled_at: 0,
                    tokens: CHUNK_TOKENS,
                };
                for layer in 0..config.layers {
                    alone.read_layer(&blocks, 0, CHUNK_TOKENS, layer, &mut payload)?;
                    let index = LayerIdx(u16::try_from(layer)?);
                    PoolBackend::new(&mut self.pool, &layout)
                        .with_turns(&mut turns)
                        .write_moved(table, placement, index, &payload)?;
                    self.pool.read_layer(
                        table,
                        placement.first,
                        CHUNK_TOKENS,
                        layer,
                        &mut payload,
                    )?;
                    let keys = widen(&payload[..payload.len() / 2]);
                    let page = placement.first / BLOCK_TOKENS;
                    self.boxes[sequence].note(layer, page, &keys);
                }
            }
            progress.inc(1);
        }
        progress.finish_and_clear();
        Ok(())
    }

    /// A pool with the same pages.
    pub(super) fn copied(
        &self,
        make: impl FnOnce(usize) -> anyhow::Result<KvPool>,
    ) -> anyhow::Result<KvPool> {
        let mut to = make(self.pool.blocks())?;
        while to.alloc().is_some() {}
        let part = CHUNK_TOKENS.min(self.context);
        let mut payload = vec![0; self.pool.layer_bytes(part)];
        for layer in 0..self.model.config().layers {
            for table in &self.tables {
                for first in (0..self.context).step_by(part) {
                    self.pool
                        .read_layer(table, first, part, layer, &mut payload)?;
                    to.write_layer(table, first, part, layer, &payload)?;
                }
            }
        }
        for table in &self.tables {
            to.park(table)?;
        }
        Ok(to)
    }

    /// Goes on with another pool from the contexts, and gives the one before back.
    pub(super) fn replace(&mut self, pool: KvPool) -> KvPool {
        self.decoded = 0;
        std::mem::replace(&mut self.pool, pool)
    }

    /// Decodes tokens of all sequences together, the first few without a clock.
    pub(super) fn decode(
        &mut self,
        method: Method,
        share: f32,
        steps: usize,
    ) -> anyhow::Result<Decoded> {
        const WARM: usize = 3;
        let layers = self.model.config().layers;
        let mut rng = ChaCha8Rng::seed_from_u64(23);
        let tokens = text(&mut rng, self.model.config().vocab_size, steps + WARM);
        self.decoded = 0;
        // By sequence and layer, what was chosen last.
        let mut last: Vec<Vec<Option<Pages>>> = vec![vec![None; layers]; self.tables.len()];
        let mut times = Vec::new();
        let mut before_stats = PagerStats::default();
        for (index, token) in tokens.iter().enumerate() {
            if index == WARM {
                before_stats = self.stats();
            }
            let begun = Instant::now();
            self.step(*token, method, share, &mut last)?;
            if index >= WARM {
                times.push(begun.elapsed().as_secs_f64() * 1e3);
            }
        }
        Ok(Decoded {
            times,
            stats: self.stats().since(&before_stats),
        })
    }

    fn stats(&self) -> PagerStats {
        self.pool
            .pager()
            .map(|pager| pager.stats())
            .unwrap_or_default()
    }

    fn step(
        &mut self,
        token: u32,
        method: Method,
        share: f32,
        last: &mut [Vec<Option<Pages>>],
    ) -> anyhow::Result<()> {
        let position = self.context + self.decoded;
        let steps: Vec<Step<'_>> = self
            .tables
            .iter()
            .map(|blocks| Step {
                tokens: std::slice::from_ref(&token),
                positions: Positions::From(position),
                blocks,
                logits: LogitsWanted::Last,
            })
            .collect();
        let config = self.model.config();
        let width = config.heads * config.head_dim;
        let boxes = &self.boxes;
        self.model
            .forward(&mut self.pool, &mut self.scratch, &steps, &mut |before| {
                let Method::Chosen { ahead } = method else {
                    return ControlFlow::Continue(());
                };
                let next = (before.layer + 1) % config.layers;
                for (sequence, rows) in before.steps.iter().enumerate() {
                    let queries = &before.rows[rows.start * before.stride..][..width];
                    let chosen = boxes[sequence].choose(before.layer, queries, position, share);
                    before.pages[sequence] = Pages::Chosen(chosen);
                    if ahead {
                        before.expected[sequence] = last[sequence][next].clone();
                    }
                    last[sequence][before.layer] = Some(before.pages[sequence].clone());
                }
                ControlFlow::Continue(())
            })?;
        self.decoded += 1;
        Ok(())
    }

    /// Share of attention that the chosen pages of the first sequence have, over layers and
    /// query heads, for one token.
    pub(super) fn mass(&mut self, share: f32) -> anyhow::Result<f64> {
        let config = self.model.config().clone();
        let (dim, width) = (config.head_dim, config.heads * config.head_dim);
        let position = self.context;
        let group = config.heads / config.kv_heads;
        let mut masses = Vec::new();
        let mut keys = vec![0; self.pool.layer_bytes(CHUNK_TOKENS)];
        let (boxes, table, context) = (&self.boxes[0], &self.tables[0], self.context);
        let mut failed = None;
        let step = Step {
            tokens: &[1],
            positions: Positions::From(position),
            blocks: table,
            logits: LogitsWanted::Last,
        };
        self.model
            .forward(&mut self.pool, &mut self.scratch, &[step], &mut |before| {
                let queries = &before.rows[..width];
                let chosen = boxes.choose(before.layer, queries, position, share);
                // By head: the exponents of all tokens, in order.
                let mut logits = vec![Vec::with_capacity(context); config.heads];
                for first in (0..context).step_by(CHUNK_TOKENS) {
                    let layer = before.layer;
                    let read = before
                        .pool
                        .bring(table, first, CHUNK_TOKENS, layer..layer + 1)
                        .and_then(|()| {
                            before
                                .pool
                                .read_layer(table, first, CHUNK_TOKENS, layer, &mut keys)
                        });
                    if let Err(error) = read {
                        failed = Some(error);
                        return ControlFlow::Break(());
                    }
                    let keys = widen(&keys[..keys.len() / 2]);
                    for (head, logits) in logits.iter_mut().enumerate() {
                        let query = &queries[head * dim..][..dim];
                        let keys = &keys[head / group * CHUNK_TOKENS * dim..][..CHUNK_TOKENS * dim];
                        #[expect(clippy::cast_precision_loss, reason = "a head dimension")]
                        let scale = 1.0 / (dim as f32).sqrt();
                        logits.extend(keys.chunks_exact(dim).map(|key| {
                            key.iter().zip(query).map(|(a, b)| a * b).sum::<f32>() * scale
                        }));
                    }
                }
                for (head, logits) in logits.iter().enumerate() {
                    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let weight = |logit: &f32| f64::from((logit - top).exp());
                    let all: f64 = logits.iter().map(weight).sum();
                    let of_page = |&page: &u32| -> f64 {
                        let at = page as usize * BLOCK_TOKENS;
                        let tokens = logits.iter().skip(at).take(BLOCK_TOKENS);
                        tokens.map(weight).sum()
                    };
                    let held: f64 = chosen[head / group].iter().map(of_page).sum();
                    masses.push(held / all);
                }
                before.pages[0] = Pages::Chosen(chosen);
                ControlFlow::Continue(())
            })
            .map_err(|error| failed.map_or_else(|| error.into(), anyhow::Error::from))?;
        #[expect(clippy::cast_precision_loss, reason = "layers times heads")]
        let mean = masses.iter().sum::<f64>() / masses.len() as f64;
        Ok(mean)
    }
}

/// Text that goes from topic to topic.
fn text(rng: &mut ChaCha8Rng, vocabulary: usize, tokens: usize) -> Vec<u32> {
    let vocabulary = u32::try_from(vocabulary).unwrap_or(u32::MAX);
    let mut words: Vec<u32> = Vec::new();
    (0..tokens)
        .map(|token| {
            if token % TOPIC_TOKENS == 0 {
                words = (0..TOPIC_WORDS)
                    .map(|_| rng.random_range(0..vocabulary))
                    .collect();
            }
            words[rng.random_range(0..words.len())]
        })
        .collect()
}

fn widen(bytes: &[u8]) -> Vec<f32> {
    let elements = bytes.as_chunks().0.iter();
    elements
        .map(|&bits| f16::from_le_bytes(bits).to_f32())
        .collect()
}
