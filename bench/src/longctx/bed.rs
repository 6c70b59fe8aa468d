//! Sequences with long contexts over one pool.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use kvasir_engine::cache::{self, PoolBackend, Turns};
use kvasir_engine::paging::{Digests, Options, Rule, Selector, page_weights};
use kvasir_engine::{
    BLOCK_TOKENS, BlockId, KvDtype, KvPool, LogitsWanted, Model, PagerStats, Pages, Positions,
    Scratch, Step, Threads,
};
use kvasir_plugin::{EngineBackend as _, Placement};
use kvasir_types::LayerIdx;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

pub(super) const DTYPE: KvDtype = KvDtype::F16;

/// Tokens that are computed together.
const CHUNK_TOKENS: usize = 512;
/// Tokens from the same few words.
const TOPIC_TOKENS: usize = 128;
const TOPIC_WORDS: u32 = 24;
/// Tokens decoded before the clock is looked at.
const WARM: usize = 3;
/// Tokens along which mass is measured.
const MASS_TOKENS: usize = 4;
/// Tokens for which there is room behind the contexts.
const ROOM_TOKENS: usize = 256;

/// How pages are read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Method {
    All,
    Chosen(Ahead),
}

/// What is read one layer ahead.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Ahead {
    Nothing,
    /// What the token before chose.
    Last,
    /// What the queries of the layer before foresee.
    Foreseen,
}

/// What decoding some tokens took.
#[derive(Debug)]
pub(super) struct Decoded {
    /// Of each token, in ms.
    pub(super) times: Vec<f64>,
    /// What of it went into choosing pages.
    pub(super) choosing: Vec<f64>,
    pub(super) stats: PagerStats,
}

#[derive(Debug)]
pub(super) struct Bed<'a> {
    model: &'a Model,
    scratch: Scratch,
    pool: KvPool,
    tables: Vec<Vec<BlockId>>,
    /// Of the contexts, by sequence.
    digests: Vec<Digests>,
    context: usize,
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
            digests: Vec::new(),
            context,
        };
        bed.fill()?;
        let detail = Options::default().rule.detail().unwrap_or_default();
        for table in &bed.tables {
            let mut digests = Digests::new(config, detail);
            digests.extend(&mut bed.pool, table, context)?;
            bed.digests.push(digests);
        }
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
        std::mem::replace(&mut self.pool, pool)
    }

    /// Decodes tokens of all sequences together behind their contexts, the first few without a
    /// clock.
    pub(super) fn decode(
        &mut self,
        method: Method,
        share: f32,
        steps: usize,
    ) -> anyhow::Result<Decoded> {
        let mut tail = Tail::new(self, share);
        let mut times = Vec::new();
        let mut choosing = Vec::new();
        let mut before_stats = PagerStats::default();
        for (index, token) in self.tail_text(WARM + steps).into_iter().enumerate() {
            if index == WARM {
                before_stats = self.stats();
            }
            let begun = Instant::now();
            self.step(token, method, &mut tail)?;
            if index >= WARM {
                times.push(begun.elapsed().as_secs_f64() * 1e3);
                choosing.push(tail.choosing.as_secs_f64() * 1e3);
            }
        }
        Ok(Decoded {
            times,
            choosing,
            stats: self.stats().since(&before_stats),
        })
    }

    fn tail_text(&self, tokens: usize) -> Vec<u32> {
        let mut rng = ChaCha8Rng::seed_from_u64(23);
        text(&mut rng, self.model.config().vocab_size, tokens)
    }

    fn stats(&self) -> PagerStats {
        self.pool
            .pager()
            .map(|pager| pager.stats())
            .unwrap_or_default()
    }

    fn step(&mut self, token: u32, method: Method, tail: &mut Tail) -> anyhow::Result<()> {
        let position = self.context + tail.decoded;
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
        let layers = self.model.config().layers;
        let tables = &self.tables;
        tail.choosing = Duration::ZERO;
        self.model
            .forward(&mut self.pool, &mut self.scratch, &steps, &mut |before| {
                let Method::Chosen(ahead) = method else {
                    return ControlFlow::Continue(());
                };
                let begun = Instant::now();
                let next = (before.layer + 1) % layers;
                for (sequence, table) in tables.iter().enumerate() {
                    let (selector, last) = &mut tail.choices[sequence];
                    let digests = &tail.digests[sequence];
                    let chosen = selector.choose(&before, sequence, digests, table);
                    before.pages[sequence] = chosen.clone();
                    before.expected[sequence] = match ahead {
                        Ahead::Nothing => None,
                        Ahead::Last => last[next].clone(),
                        Ahead::Foreseen => selector
                            .foresee(&before, sequence, digests, table)
                            .or_else(|| last[next].clone()),
                    };
                    last[before.layer] = Some(chosen);
                }
                tail.choosing += begun.elapsed();
                ControlFlow::Continue(())
            })?;
        tail.decoded += 1;
        for (digests, table) in tail.digests.iter_mut().zip(tables) {
            digests.extend(&mut self.pool, table, position + 1)?;
        }
        Ok(())
    }

    /// Share of attention that the pages chosen by `rules` have, over layers, query heads, and
    /// a few tokens of the first sequence, which attend to everything. The pool is in memory.
    pub(super) fn masses<const N: usize>(
        &mut self,
        rules: [Rule; N],
        share: f32,
    ) -> anyhow::Result<[f64; N]> {
        let config = self.model.config();
        let mut selectors = rules.map(|rule| Selector::new(self.model, selection(rule, share)));
        let mut sums = [0.0; N];
        let (table, digests) = (&self.tables[0], &self.digests[0]);
        let group = config.heads / config.kv_heads;
        for (index, token) in self.tail_text(MASS_TOKENS).into_iter().enumerate() {
            let step = Step {
                tokens: &[token],
                positions: Positions::From(self.context + index),
                blocks: table,
                logits: LogitsWanted::None,
            };
            self.model
                .forward(&mut self.pool, &mut self.scratch, &[step], &mut |before| {
                    let weights = page_weights(config, &before, 0, table);
                    for (selector, sum) in selectors.iter_mut().zip(&mut sums) {
                        let Pages::Chosen(chosen) = selector.choose(&before, 0, digests, table)
                        else {
                            *sum += weights.len() as f64;
                            continue;
                        };
                        for (head, weights) in weights.iter().enumerate() {
                            let pages = chosen[head / group].iter();
                            let mass: f32 = pages.map(|&page| weights[page as usize]).sum();
                            *sum += f64::from(mass);
                        }
                    }
                    ControlFlow::Continue(())
                })?;
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "layers times heads times tokens"
        )]
        let count = (config.layers * config.heads * MASS_TOKENS) as f64;
        Ok(sums.map(|sum| sum / count))
    }
}

fn selection(rule: Rule, share: f32) -> Options {
    Options {
        rule,
        share,
        ..Options::default()
    }
}

/// What is decoded behind the contexts.
#[derive(Debug)]
struct Tail {
    decoded: usize,
    digests: Vec<Digests>,
    /// By sequence: what chooses, and what was chosen last in each layer.
    choices: Vec<(Selector, Vec<Option<Pages>>)>,
    /// How long choosing took for the last token.
    choosing: Duration,
}

impl Tail {
    fn new(bed: &Bed<'_>, share: f32) -> Self {
        let layers = bed.model.config().layers;
        let choice = |_: &Digests| {
            let selector = Selector::new(bed.model, selection(Rule::default(), share));
            (selector, vec![None; layers])
        };
        Self {
            decoded: 0,
            digests: bed.digests.clone(),
            choices: bed.digests.iter().map(choice).collect(),
            choosing: Duration::ZERO,
        }
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
