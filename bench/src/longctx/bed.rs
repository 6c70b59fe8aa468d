//! Sequences with long contexts over one pool.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use kvasir_engine::cache::{self, PoolBackend, Turns};
use kvasir_engine::paging::{Digests, Options, Selector, page_weights};
use kvasir_engine::{
    BLOCK_TOKENS, BlockId, KvDtype, KvPool, LogitsWanted, Model, PagerStats, Pages, Positions,
    Scratch, Step, Threads,
};
use kvasir_plugin::{EngineBackend as _, Placement};
use kvasir_types::LayerIdx;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::report::median;

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
    /// What is chosen, when it is.
    Chosen(Options),
    /// The same, and one layer ahead what is foreseen of it.
    Foreseen(Options),
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

/// What moving a layer took, in ms.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moves {
    pub(super) park: f64,
    pub(super) resume: f64,
}

#[derive(Debug)]
pub(super) struct Bed<'a> {
    model: &'a Model,
    scratch: Scratch,
    pool: KvPool,
    tables: Vec<Vec<BlockId>>,
    /// Of the contexts, by sequence.
    digests: Vec<Digests>,
    text: Text,
    context: usize,
}

impl<'a> Bed<'a> {
    /// Sequences of `context` tokens each, in memory.
    pub(super) fn new(
        model: &'a Model,
        context: usize,
        sequences: usize,
        returns: usize,
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
            text: Text::new(config.vocab_size, context, returns),
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
            let tokens = self.text.write(&mut rng, CHUNK_TOKENS);
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

    /// Medians of writing and parking a layer of all contexts, and of bringing it back: a layer is
    /// what is in memory at once.
    pub(super) fn moves(&mut self, layers: usize) -> anyhow::Result<Moves> {
        let part = CHUNK_TOKENS.min(self.context);
        let mut payload = vec![0; self.pool.layer_bytes(part)];
        let (mut parks, mut resumes) = (Vec::new(), Vec::new());
        for layer in 0..layers.min(self.model.config().layers) {
            self.tables
                .iter()
                .try_for_each(|table| self.pool.park(table).map(|_| ()))?;
            let begun = Instant::now();
            for table in &self.tables {
                self.pool.bring(table, 0, self.context, layer..layer + 1)?;
            }
            resumes.push(begun.elapsed().as_secs_f64() * 1e3);
            let mut spent = Duration::ZERO;
            for table in &self.tables {
                for first in (0..self.context).step_by(part) {
                    self.pool
                        .read_layer(table, first, part, layer, &mut payload)?;
                    let begun = Instant::now();
                    self.pool.write_layer(table, first, part, layer, &payload)?;
                    spent += begun.elapsed();
                }
                let begun = Instant::now();
                self.pool.park(table)?;
                spent += begun.elapsed();
            }
            parks.push(spent.as_secs_f64() * 1e3);
        }
        Ok(Moves {
            park: median(&mut parks),
            resume: median(&mut resumes),
        })
    }

    /// Goes on with another pool from the contexts, and gives the one before back.
    pub(super) fn replace(&mut self, pool: KvPool) -> KvPool {
        std::mem::replace(&mut self.pool, pool)
    }

    /// Decodes tokens of all sequences together behind their contexts, the first few without a
    /// clock.
    pub(super) fn decode(&mut self, method: Method, steps: usize) -> anyhow::Result<Decoded> {
        let mut tail = Tail::new(self, method);
        let mut times = Vec::new();
        let mut choosing = Vec::new();
        let mut before_stats = PagerStats::default();
        for (index, token) in self.tail_text(WARM + steps).into_iter().enumerate() {
            if index == WARM {
                before_stats = self.stats();
            }
            let begun = Instant::now();
            self.step(token, &mut tail)?;
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
        self.text.write(&mut rng, tokens)
    }

    fn stats(&self) -> PagerStats {
        self.pool
            .pager()
            .map(|pager| pager.stats())
            .unwrap_or_default()
    }

    fn step(&mut self, token: u32, tail: &mut Tail) -> anyhow::Result<()> {
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
        let tables = &self.tables;
        tail.choosing = Duration::ZERO;
        self.model
            .forward(&mut self.pool, &mut self.scratch, &steps, &mut |before| {
                let begun = Instant::now();
                for (sequence, (selector, first)) in tail.choices.iter_mut().enumerate() {
                    let (digests, table) = (&tail.digests[sequence], &tables[sequence]);
                    let chosen = selector.choose(&before, sequence, digests, table);
                    if tail.foresees {
                        before.expected[sequence] = match before.next {
                            Some(_) => selector.foresee(&before, sequence, digests, table),
                            None => first.clone(),
                        };
                        if before.layer == 0 {
                            *first = Some(chosen.clone());
                        }
                    }
                    before.pages[sequence] = chosen;
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

    /// Share of attention that the chosen pages have, over layers, query heads, and
    /// a few tokens of the first sequence, which attend to everything. The pool is in memory.
    pub(super) fn masses<const N: usize>(
        &mut self,
        selections: [Options; N],
    ) -> anyhow::Result<[f64; N]> {
        let config = self.model.config();
        let mut selectors = selections.map(|selection| Selector::new(self.model, selection));
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

/// What is decoded behind the contexts.
#[derive(Debug)]
struct Tail {
    decoded: usize,
    digests: Vec<Digests>,
    /// By sequence, unless all pages are read: what chooses, and what was chosen last in the first
    /// layer.
    choices: Vec<(Selector, Option<Pages>)>,
    foresees: bool,
    /// How long choosing took for the last token.
    choosing: Duration,
}

impl Tail {
    fn new(bed: &Bed<'_>, method: Method) -> Self {
        let choice = |options| (Selector::new(bed.model, options), None);
        let choices = match method {
            Method::All => Vec::new(),
            Method::Chosen(options) | Method::Foreseen(options) => {
                bed.digests.iter().map(|_| choice(options)).collect()
            }
        };
        Self {
            decoded: 0,
            digests: bed.digests.clone(),
            choices,
            foresees: matches!(method, Method::Foreseen(_)),
            choosing: Duration::ZERO,
        }
    }
}

/// Text that goes from topic to topic, and comes back to them.
#[derive(Debug)]
struct Text {
    /// The words of each topic.
    topics: Vec<Vec<u32>>,
}

impl Text {
    /// Of topics so many that `tokens` have each of them `returns` times.
    fn new(vocabulary: usize, tokens: usize, returns: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let vocabulary = u32::try_from(vocabulary).unwrap_or(u32::MAX);
        let mut words = || {
            let words = (0..TOPIC_WORDS).map(|_| rng.random_range(0..vocabulary));
            words.collect()
        };
        let topics = (tokens / TOPIC_TOKENS).div_ceil(returns.max(1));
        Self {
            topics: (0..topics.max(1)).map(|_| words()).collect(),
        }
    }

    fn write(&self, rng: &mut ChaCha8Rng, tokens: usize) -> Vec<u32> {
        let mut words = &self.topics[0];
        (0..tokens)
            .map(|token| {
                if token % TOPIC_TOKENS == 0 {
                    words = &self.topics[rng.random_range(0..self.topics.len())];
                }
                words[rng.random_range(0..words.len())]
            })
            .collect()
    }
}
