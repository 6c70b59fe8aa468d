//! What choosing costs, beside reading what was chosen.
//!
//! One layer of two KV heads of 128 channels, four query heads each, f16: `time/RULE/N` is
//! one token's choice of an eighth of the pages of N tokens, `ratio` its time over that of
//! `time/read/N`, which adds up the bytes of as many pages of K and V, scattered alike, in as
//! many threads. `digest/share` is bytes of digests over those of K and V.

use std::time::Instant;

use half::f16;
use kvasir_engine::model::{BeforeLayer, Fate};
use kvasir_engine::paging::{Detail, Digests, Options, Rule, Selector};
use kvasir_engine::{BLOCK_TOKENS, BlockId, KvDtype, KvPool, Model, Pages};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::checkpoint::{self, Shape};
use crate::report::{Report, Row, median};

const SHAPE: Shape = Shape {
    hidden: 1024,
    layers: 1,
    heads: 8,
    kv_heads: 2,
    intermediate: 64,
    vocabulary: 64,
    positions: 1 << 18,
};
const DIM: usize = SHAPE.hidden / SHAPE.heads;
/// Words of one plane of a page of a KV head.
const PAGE: usize = BLOCK_TOKENS * DIM * 2 / 8;
/// Tokens whose keys are alike.
const TOPIC_TOKENS: usize = 128;

pub(super) fn run(quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let lengths: &[usize] = if quick { &[32] } else { &[8, 32, 128] };
    let dir = tempfile::tempdir()?;
    checkpoint::write(dir.path(), &SHAPE)?;
    let model = Model::load(dir.path())?;
    for &thousands in lengths {
        let tokens = thousands * 1024;
        let mut bed = Bed::new(&model, tokens)?;
        for (name, rule) in [
            ("bounds", Rule::Bounds),
            ("quest", Rule::Quest),
            ("exact", Rule::Exact { alike: 2.0 }),
        ] {
            bed.measure(&model, name, rule, thousands, report);
        }
        if thousands == lengths[lengths.len() - 1] {
            let share = bed.tokens.bytes() as f64 / bed.pool.bytes() as f64;
            let row = Row::new("digest/share", share, "share");
            report.push(row.against(1.0 / 16.0, 1.0 / 16.0 / share));
        }
    }
    Ok(())
}

/// K and V of one layer.
struct Bed {
    pool: KvPool,
    blocks: Vec<BlockId>,
    tokens: Digests,
    means: Digests,
    rows: Vec<f32>,
    /// As large as K and V: `[page][plane][kv_head][PAGE]`.
    bytes: Vec<u64>,
    length: usize,
}

impl Bed {
    /// Keys of each topic lie about a middle of their own; the queries look for one topic.
    fn new(model: &Model, tokens: usize) -> anyhow::Result<Self> {
        let config = model.config();
        let mut pool = KvPool::new(config, tokens / BLOCK_TOKENS, KvDtype::F16);
        let blocks: Vec<BlockId> = std::iter::from_fn(|| pool.alloc()).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut noise = |size: f32| rng.random_range(-size..size);
        let mut rows = Vec::new();
        for topic in 0..tokens / TOPIC_TOKENS {
            let mut payload = Vec::with_capacity(pool.layer_bytes(TOPIC_TOKENS));
            for head in 0..2 * SHAPE.kv_heads {
                let middle: Vec<f32> = (0..DIM).map(|_| noise(1.0)).collect();
                if topic == tokens / TOPIC_TOKENS / 2 && head < SHAPE.kv_heads {
                    for _ in 0..SHAPE.heads / SHAPE.kv_heads {
                        rows.extend(middle.iter().map(|x| 1.5 * x + noise(0.5)));
                    }
                }
                for _ in 0..TOPIC_TOKENS {
                    let key = middle.iter().map(|x| f16::from_f32(x + noise(0.7)));
                    payload.extend(key.flat_map(f16::to_le_bytes));
                }
            }
            pool.write_layer(&blocks, topic * TOPIC_TOKENS, TOPIC_TOKENS, 0, &payload)?;
        }
        rows.resize(config.qkv_width(), 0.0);
        let mut digested = |detail| -> anyhow::Result<Digests> {
            let mut digests = Digests::new(config, detail);
            digests.extend(&mut pool, &blocks, tokens)?;
            Ok(digests)
        };
        let (places, means) = (digested(Detail::Tokens)?, digested(Detail::Mean)?);
        Ok(Self {
            tokens: places,
            means,
            pool,
            blocks,
            rows,
            bytes: vec![1; tokens / BLOCK_TOKENS * 2 * SHAPE.kv_heads * PAGE],
            length: tokens,
        })
    }

    fn measure(
        &mut self,
        model: &Model,
        name: &str,
        rule: Rule,
        thousands: usize,
        report: &mut Report,
    ) {
        let options = Options {
            rule,
            ..Options::default()
        };
        let mut selector = Selector::new(model, options);
        let digests = match rule.detail() {
            Some(Detail::Mean) => &self.means,
            _ => &self.tokens,
        };
        let (mut choosing, mut reading) = (Vec::new(), Vec::new());
        for _ in 0..15 {
            // Takes digests out of the caches, as the other layers of a model do.
            std::hint::black_box(total(&self.bytes));
            let before = BeforeLayer {
                layer: 0,
                pool: &mut self.pool,
                rows: &self.rows,
                stride: self.rows.len(),
                positions: &[self.length - 1],
                steps: std::slice::from_ref(&(0..1)),
                fates: &mut [Fate::GoesOn],
                pages: &mut [Pages::All],
                expected: &mut [None],
                next: None,
            };
            let begun = Instant::now();
            let chosen = selector.choose(&before, 0, digests, &self.blocks);
            choosing.push(begun.elapsed().as_secs_f64() * 1e6);
            if let Pages::Chosen(chosen) = chosen {
                reading.push(self.read(&chosen));
            }
        }
        let (choose, read) = (median(&mut choosing), median(&mut reading));
        if name == "bounds" {
            report.push(Row::new(format!("time/read/{thousands}k"), read, "us"));
        }
        let row = Row::new(format!("time/{name}/{thousands}k"), choose, "us");
        report.push(row.against(read, choose / read));
    }

    /// Microseconds that adding up the bytes of the pages takes, a thread a KV head.
    fn read(&self, chosen: &[Vec<u32>]) -> f64 {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for (kv_head, pages) in chosen.iter().enumerate() {
                scope.spawn(move || {
                    let planes = pages.iter().flat_map(|&page| [2 * page, 2 * page + 1]);
                    let starts =
                        planes.map(|plane| (plane as usize * SHAPE.kv_heads + kv_head) * PAGE);
                    let sum = starts.fold(0, |sum, at| sum ^ total(&self.bytes[at..at + PAGE]));
                    std::hint::black_box(sum)
                });
            }
        });
        begun.elapsed().as_secs_f64() * 1e6
    }
}

fn total(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}
