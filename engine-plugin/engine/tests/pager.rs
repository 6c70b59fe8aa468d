//! Models over a pool of which little is in memory: the same bits as with all of it.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::ops::ControlFlow;
use std::sync::Arc;

use kvasir_engine::paging::{Detail, Digests};
use kvasir_engine::{
    BLOCK_TOKENS, BlockId, ForwardError, KvDtype, KvPool, LogitsWanted, Model, Pages, PagingError,
    Positions, Replacement, Scratch, ScratchBits, ScratchFile, Step, Threads,
};

mod models;
use models::models;

/// Tokens of a sequence, at most.
const TOKENS: usize = 176;
const SEQUENCES: usize = 3;
/// How far logits over 8 bits an element are from those over memory: root of the mean square,
/// over that of the logits.
const LOGITS_8_BITS: f64 = 0.01;

fn paged(model: &Model, dtype: KvDtype, frames: usize) -> KvPool {
    paged_in(model, dtype, frames, ScratchBits::AsInMemory)
}

fn paged_in(model: &Model, dtype: KvDtype, frames: usize, bits: ScratchBits) -> KvPool {
    let directory = tempfile::tempdir().unwrap();
    let file = Arc::new(ScratchFile::create(directory.path()).unwrap());
    let blocks = SEQUENCES * TOKENS / BLOCK_TOKENS;
    let replacement = Replacement::Clock;
    let config = model.config();
    KvPool::paged(config, blocks, dtype, frames, replacement, file, bits).unwrap()
}

fn whole(model: &Model, dtype: KvDtype) -> KvPool {
    KvPool::new(model.config(), SEQUENCES * TOKENS / BLOCK_TOKENS, dtype)
}

/// Frames for one layer of `sequences` whole sequences.
fn frames(model: &Model, sequences: usize) -> usize {
    sequences * TOKENS / BLOCK_TOKENS * model.config().kv_heads
}

/// Sequences over a pool, and how they choose pages.
struct Run<'a> {
    model: &'a Model,
    pool: KvPool,
    scratch: Scratch,
    tables: Vec<Vec<BlockId>>,
    choice: fn(&Model, usize) -> Pages,
}

impl<'a> Run<'a> {
    fn new(model: &'a Model, mut pool: KvPool, choice: fn(&Model, usize) -> Pages) -> Self {
        // Pages of all sequences interleaved.
        let mut tables = vec![Vec::new(); SEQUENCES];
        for _ in 0..TOKENS / BLOCK_TOKENS {
            for table in tables.iter_mut().rev() {
                table.push(pool.alloc().unwrap());
            }
        }
        Self {
            model,
            pool,
            scratch: Scratch::new(Threads::new(2).unwrap()),
            tables,
            choice,
        }
    }

    fn step(&mut self, batch: &[(usize, usize, &[u32])]) -> Result<Vec<f32>, ForwardError> {
        let steps: Vec<Step<'_>> = batch
            .iter()
            .map(|&(sequence, position, tokens)| Step {
                tokens,
                positions: Positions::From(position),
                blocks: &self.tables[sequence],
                logits: LogitsWanted::All,
            })
            .collect();
        let (model, choice) = (self.model, self.choice);
        let logits = model.forward(&mut self.pool, &mut self.scratch, &steps, &mut |before| {
            let next = (before.layer + 1) % model.config().layers;
            for pages in before.pages.iter_mut() {
                *pages = choice(model, before.layer);
            }
            for expected in before.expected.iter_mut() {
                *expected = Some(choice(model, next));
            }
            ControlFlow::Continue(())
        })?;
        Ok((0..steps.len())
            .flat_map(|step| logits.rows(step).flatten().copied().collect::<Vec<_>>())
            .collect())
    }

    /// Prefill in parts, each beside others, then tokens of all sequences together.
    fn story(&mut self, tokens: &[u32]) -> Vec<f32> {
        let mut logits = Vec::new();
        let mut at = 0;
        for part in [70, 50, 30] {
            for sequence in 0..SEQUENCES {
                let beside = (sequence + 1) % SEQUENCES;
                let mut batch = vec![(sequence, at, &tokens[at..at + part])];
                if sequence == 1 {
                    // Computed twice, which changes nothing.
                    batch.push((beside, 0, &tokens[..20]));
                }
                logits.extend(self.step(&batch).unwrap());
            }
            at += part;
        }
        for position in at..at + 20 {
            let token = &tokens[position..=position];
            let batch = [0, 1, 2].map(|sequence| (sequence, position, token));
            logits.extend(self.step(&batch).unwrap());
        }
        logits
    }
}

fn tokens(model: &Model) -> Vec<u32> {
    let vocabulary = u32::try_from(model.config().vocab_size).unwrap();
    (0..200).map(|i| (i * i + 7 * i + 3) % vocabulary).collect()
}

const ALL: fn(&Model, usize) -> Pages = |_, _| Pages::All;

/// Other pages in each layer and for each head.
const SOME: fn(&Model, usize) -> Pages = |model, layer| {
    let layer = u32::try_from(layer).unwrap();
    let list = |head| {
        (0..11)
            .filter(|page| (page + layer + head) % 3 != 1)
            .collect()
    };
    let heads = u32::try_from(model.config().kv_heads).unwrap();
    Pages::Chosen((0..heads).map(list).collect())
};

/// Whether all pages are chosen or some, with frames for no more than one layer of a batch: not
/// a bit of any logits changes, and pages do come and go.
#[test]
fn a_pool_on_disk_gives_the_same_bits() {
    for (name, model) in models() {
        let tokens = tokens(&model);
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16] {
            for choice in [ALL, SOME] {
                let expected = Run::new(&model, whole(&model, dtype), choice).story(&tokens);
                let pool = paged(&model, dtype, frames(&model, SEQUENCES));
                let mut run = Run::new(&model, pool, choice);
                assert!(run.story(&tokens) == expected, "{name}: {dtype:?}");
                let stats = run.pool.pager().unwrap().stats();
                assert!(
                    stats.evictions > 0 && stats.read_bytes > 0,
                    "{name}: {stats:?}"
                );
            }
        }
    }
}

/// A sequence that is parked between any two tokens, others running meanwhile, goes on as if it
/// had not been; a park moves what is new since the last one.
#[test]
fn parked_and_resumed_is_uninterrupted() {
    for (name, model) in models() {
        let config = model.config();
        let tokens = tokens(&model);
        let decode = |parks: bool| {
            let mut run = Run::new(&model, paged(&model, KvDtype::Bf16, frames(&model, 2)), ALL);
            let mut logits = run.step(&[(0, 0, &tokens[..100])]).unwrap();
            let table = run.tables[0].clone();
            for position in 100..130 {
                if parks {
                    let bytes = run.pool.park(&table).unwrap();
                    let page =
                        run.pool.pager().unwrap().frame_bytes() * config.layers * config.kv_heads;
                    // One new token: its page, where it was all of them at first. Less, if
                    // others took the frames before.
                    let most = if position == 100 { 7 } else { 1 };
                    assert!(bytes <= (most * page) as u64, "{name}: {bytes}");
                    assert_eq!(run.pool.park(&table).unwrap(), 0, "{name}");
                }
                run.step(&[(1, position - 100, &tokens[..1])]).unwrap();
                logits.extend(
                    run.step(&[(0, position, &tokens[position..=position])])
                        .unwrap(),
                );
            }
            logits
        };
        assert!(decode(true) == decode(false), "{name}");
    }
}

/// The largest of some logits, and by how much.
fn best(logits: &[f32]) -> (usize, f32) {
    let mut all: Vec<(usize, f32)> = logits.iter().copied().enumerate().collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    (all[0].0, all[0].1 - all[1].1)
}

/// With 8 bits an element on disk, logits stay close to those over memory: all pages have been
/// there and back, some of them many times, while they were filled.
#[test]
fn logits_over_8_bits_are_close() {
    for (name, model) in models() {
        let tokens = tokens(&model);
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16] {
            let frames = frames(&model, SEQUENCES);
            let exact = Run::new(&model, paged(&model, dtype, frames), ALL).story(&tokens);
            let pool = paged_in(&model, dtype, frames, ScratchBits::Eight);
            let mut run = Run::new(&model, pool, ALL);
            let close = run.story(&tokens);
            let pager = run.pool.pager().unwrap();
            let (stats, slot) = (pager.stats(), pager.slot_bytes() as u64);
            assert!(stats.evictions > 0 && stats.read_bytes > 0, "{name}");
            assert_eq!(stats.read_bytes % slot, 0, "{name}");
            let rms = |values: &mut dyn Iterator<Item = f32>| {
                let squares = values.map(|value| f64::from(value).powi(2));
                (squares.sum::<f64>() / exact.len() as f64).sqrt()
            };
            let size = rms(&mut exact.iter().copied());
            let error = rms(&mut exact.iter().zip(&close).map(|(a, b)| a - b)) / size;
            let is_coded = pager.slot_bytes() < pager.frame_bytes();
            assert_eq!(is_coded, error > 0.0, "{name} {dtype:?}: {error}");
            assert!(error < LOGITS_8_BITS, "{name} {dtype:?}: {error}");
            // The first choice is the same, unless it was next to a tie.
            let vocabulary = model.config().vocab_size;
            let (mut clear, mut rows) = (0, 0);
            for (a, b) in exact.chunks(vocabulary).zip(close.chunks(vocabulary)) {
                let (first, margin) = best(a);
                let is_clear = f64::from(margin) > 4.0 * LOGITS_8_BITS * size;
                rows += 1;
                clear += usize::from(is_clear);
                assert!(
                    !is_clear || best(b).0 == first,
                    "{name} {dtype:?}: {margin}"
                );
            }
            assert!(2 * clear > rows, "{name} {dtype:?}: {clear} of {rows}");
        }
    }
}

/// A sequence that has grown since it was parked writes the pages that it has grown by, and the
/// one in which they begin: nothing that was written before.
#[test]
fn a_second_park_writes_what_is_new() {
    for (name, model) in models() {
        let tokens = tokens(&model);
        let layers = model.config().layers;
        for grown in [1, 11, 12, 13, 40] {
            // So much memory that nothing is written behind.
            let frames = layers * frames(&model, SEQUENCES);
            let mut run = Run::new(&model, paged(&model, KvDtype::F32, frames), ALL);
            let page = run.pool.pager().unwrap().frame_bytes() * layers * model.config().kv_heads;
            let table = run.tables[0].clone();
            run.step(&[(0, 0, &tokens[..100])]).unwrap();
            assert_eq!(run.pool.park(&table).unwrap(), 7 * page as u64, "{name}");
            for position in 100..100 + grown {
                run.step(&[(0, position, &tokens[position..=position])])
                    .unwrap();
            }
            let new = (100 + grown).div_ceil(BLOCK_TOKENS) - 100 / BLOCK_TOKENS;
            let bytes = run.pool.park(&table).unwrap();
            assert_eq!(bytes, (new * page) as u64, "{name}: {grown}");
            let written = run.pool.pager().unwrap().stats().written_bytes;
            assert_eq!(written, ((7 + new) * page) as u64, "{name}: {grown}");
        }
    }
}

/// Too few frames for a layer is an error that says so, before anything is computed wrongly;
/// fewer sequences, or fewer pages, still run.
#[test]
fn too_few_frames_are_an_error() {
    let (_, model) = models().remove(0);
    let heads = model.config().kv_heads;
    let tokens = tokens(&model);
    let mut run = Run::new(&model, paged(&model, KvDtype::F32, 4 * heads), ALL);
    run.step(&[(0, 0, &tokens[..64])]).unwrap();
    let refused = run.step(&[(0, 64, &tokens[64..65])]).unwrap_err();
    let expected = PagingError::Frames {
        needed: 5 * heads,
        frames: 4 * heads,
    };
    assert!(
        matches!(&refused, ForwardError::Paging { step: None, source } if *source == expected),
        "{refused:?}"
    );
    let few = run.step(&[(1, 0, &tokens[..64])]);
    assert!(few.is_ok(), "{few:?}");
    run.choice = |model, _| Pages::Chosen(vec![vec![0, 1, 3]; model.config().kv_heads]);
    let chosen = run.step(&[(0, 64, &tokens[64..65])]).unwrap();
    let mut same = Run::new(&model, whole(&model, KvDtype::F32), run.choice);
    same.choice = ALL;
    same.step(&[(0, 0, &tokens[..64])]).unwrap();
    same.choice = run.choice;
    assert_eq!(same.step(&[(0, 64, &tokens[64..65])]).unwrap(), chosen);
}

/// Digests of pages of which few are in memory are those of all in memory, grown at once or by
/// parts.
#[test]
fn digests_of_a_paged_pool_are_the_same() {
    for (name, model) in models() {
        let tokens = tokens(&model);
        let frames = frames(&model, 1);
        let [at_once, by_parts] = [false, true].map(|is_paged| {
            let pool = if is_paged {
                paged(&model, KvDtype::F16, frames)
            } else {
                whole(&model, KvDtype::F16)
            };
            let mut run = Run::new(&model, pool, ALL);
            run.step(&[(0, 0, &tokens[..170])]).unwrap();
            run.pool.park(&run.tables[0]).unwrap();
            let mut digests = Digests::new(model.config(), Detail::Tokens);
            let parts: &[usize] = if is_paged { &[40, 130, 170] } else { &[170] };
            for &part in parts {
                digests.extend(&mut run.pool, &run.tables[0], part).unwrap();
            }
            digests
        });
        assert!(at_once == by_parts, "{name}");
        assert_eq!(at_once.pages(), 10, "{name}");
    }
}
