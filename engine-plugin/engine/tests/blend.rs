//! Blending over every architecture: exact where it claims to be.

#![expect(
    clippy::unwrap_used,
    reason = "a test; clippy exempts only functions marked as such"
)]

use std::ops::{ControlFlow, Range};

use kvasir_engine::blend::{self, Probes, Prompt};
use kvasir_engine::kernels::{Isa, rotate};
use kvasir_engine::{
    BLOCK_TOKENS, BlockId, KvDtype, KvPool, LogitsWanted, Model, Positions, Scratch, Step, Threads,
};
use kvasir_plugin::blend::{Check, Compared, Reused, Rule, Selection, Selector};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

mod models;
use models::models;

const TOKENS: usize = 150;
const FIRST: u32 = 1;

/// A sequence in pages of its own.
struct Sequence<'a> {
    model: &'a Model,
    pool: KvPool,
    blocks: Vec<BlockId>,
    scratch: Scratch,
}

/// K and V of some tokens, by layer: `[plane][kv_head][token][head_dim]`.
type Kv = Vec<Vec<f32>>;

impl<'a> Sequence<'a> {
    fn new(model: &'a Model) -> Self {
        let pages = 192 / BLOCK_TOKENS;
        let mut pool = KvPool::new(model.config(), pages, KvDtype::F32);
        let blocks = (0..pages).map(|_| pool.alloc().unwrap()).rev().collect();
        Self {
            model,
            pool,
            blocks,
            scratch: Scratch::new(Threads::new(2).unwrap()),
        }
    }

    fn extend(&mut self, from: usize, tokens: &[u32], logits: LogitsWanted) -> Vec<Vec<f32>> {
        let step = Step {
            tokens,
            positions: Positions::From(from),
            blocks: &self.blocks,
            logits,
        };
        let go_on = &mut |_: kvasir_engine::BeforeLayer<'_>| ControlFlow::Continue(());
        let found = self
            .model
            .forward(&mut self.pool, &mut self.scratch, &[step], go_on)
            .unwrap();
        found.rows(0).map(<[f32]>::to_vec).collect()
    }

    fn blend(
        &mut self,
        tokens: &[u32],
        selection: &mut Selection,
        ready: usize,
        land: &mut (dyn FnMut(usize, &mut KvPool, &[BlockId]) + Send),
    ) -> Vec<f32> {
        let mut prompts = [Prompt {
            tokens,
            blocks: &self.blocks,
            selection,
            ready,
            logits: LogitsWanted::Last,
        }];
        let logits = blend::run(
            self.model,
            &mut self.pool,
            &mut self.scratch,
            &mut prompts,
            &mut |layer, pool| {
                land(layer, pool, &self.blocks);
                ControlFlow::Continue(())
            },
        );
        logits.unwrap().last(0).unwrap().to_vec()
    }

    fn greedy(&mut self, mut logits: Vec<f32>, from: usize, count: usize) -> Vec<u32> {
        let mut tokens = Vec::new();
        for position in from..from + count {
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            tokens.push(u32::try_from(best.unwrap()).unwrap());
            logits = self
                .extend(position, &tokens[tokens.len() - 1..], LogitsWanted::Last)
                .remove(0);
        }
        tokens
    }

    fn take(&self, range: Range<usize>) -> Kv {
        let mut bytes = vec![0; self.pool.layer_bytes(range.len())];
        let layers = 0..self.model.config().layers;
        let layers = layers.map(|layer| {
            self.pool
                .read_layer(&self.blocks, range.start, range.len(), layer, &mut bytes)
                .unwrap();
            let values = bytes.as_chunks().0.iter();
            values.map(|&value| f32::from_le_bytes(value)).collect()
        });
        layers.collect()
    }
}

fn put(pool: &mut KvPool, blocks: &[BlockId], first: usize, layer: usize, values: &[f32]) {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let tokens = (1..).find(|&tokens| pool.layer_bytes(tokens) == bytes.len());
    pool.write_layer(blocks, first, tokens.unwrap(), layer, &bytes)
        .unwrap();
}

/// KV of a chunk, computed alone behind [`FIRST`], with keys turned for position `to`.
fn alone(model: &Model, chunk: &[u32], to: usize) -> Kv {
    let mut sequence = Sequence::new(model);
    sequence.extend(0, &[&[FIRST], chunk].concat(), LogitsWanted::None);
    let mut kv = sequence.take(1..1 + chunk.len());
    let config = model.config();
    let (dim, frequencies) = (config.head_dim, config.rope.frequencies(config.head_dim));
    let (mut cos, mut sin) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
    for layer in &mut kv {
        let keys = layer.len() / 2;
        for head in layer[..keys].chunks_exact_mut(chunk.len() * dim) {
            for (token, key) in head.chunks_exact_mut(dim).enumerate() {
                frequencies.shift(1 + token, to + token, &mut cos, &mut sin);
                rotate(Isa::detect(), key, &cos, &sin);
            }
        }
    }
    kv
}

fn tokens(model: &Model, count: usize, seed: usize) -> Vec<u32> {
    let vocabulary = u32::try_from(model.config().vocab_size).unwrap();
    let token = |index: usize| u32::try_from((index * 7919 + seed * 104_729) % 65_521).unwrap();
    (0..count)
        .map(|index| token(index * index + index) % vocabulary)
        .collect()
}

/// `FIRST`, chunks, and a question; the chunks' ranges.
fn prompt(model: &Model, cuts: &[usize]) -> (Vec<u32>, Vec<Range<usize>>) {
    let mut all = tokens(model, TOKENS, 3);
    all[0] = FIRST;
    let chunks = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
    (all, chunks)
}

fn selector(rule: Rule, share: f32) -> Selector {
    Selector {
        rule,
        share,
        layers: None,
    }
}

fn reused(chunks: &[Range<usize>]) -> Vec<Reused> {
    let reused = |tokens: &Range<usize>| Reused {
        tokens: tokens.clone(),
        exact: false,
    };
    chunks.iter().map(reused).collect()
}

const DEVIATION: Rule = Rule::Deviation(Check {
    layer: 1,
    of: Compared::Both,
    gradual: false,
});

#[test]
fn recomputing_everything_is_full_prefill_bit_for_bit() {
    for (name, model) in models() {
        let (all, chunks) = prompt(&model, &[1, 40, 71, 130]);
        let mut full = Sequence::new(&model);
        let expected = full.extend(0, &all, LogitsWanted::Last).remove(0);
        let text = full.greedy(expected.clone(), TOKENS, 8);
        for rule in [Rule::First, Rule::Random { seed: 1 }, DEVIATION] {
            let layers = u16::try_from(model.config().layers).unwrap();
            let mut selection =
                Selection::new(selector(rule, 1.0), TOKENS, &reused(&chunks), layers, &[]);
            let mut blended = Sequence::new(&model);
            let kv: Vec<Kv> = chunks
                .iter()
                .map(|chunk| alone(&model, &all[chunk.clone()], chunk.start))
                .collect();
            let found = blended.blend(&all, &mut selection, 0, &mut |layer, pool, blocks| {
                for (chunk, kv) in chunks.iter().zip(&kv) {
                    put(pool, blocks, chunk.start, layer, &kv[layer]);
                }
            });
            assert_eq!(found, expected, "{name}, {rule:?}");
            assert_eq!(blended.greedy(found, TOKENS, 8), text, "{name}, {rule:?}");
            assert!((selection.charged() - 1.0).abs() < 1e-9);
        }
    }
}

#[test]
fn recomputing_nothing_is_naive_reuse_bit_for_bit() {
    for (name, model) in models() {
        let (all, chunks) = prompt(&model, &[1, 40, 71, 130]);
        let kv: Vec<Kv> = chunks
            .iter()
            .map(|chunk| alone(&model, &all[chunk.clone()], chunk.start))
            .collect();
        // Reuse without this module: everything lands first, and the rest is prefilled.
        let mut naive = Sequence::new(&model);
        naive.extend(0, &[FIRST], LogitsWanted::None);
        for (chunk, kv) in chunks.iter().zip(&kv) {
            for (layer, values) in kv.iter().enumerate() {
                put(&mut naive.pool, &naive.blocks, chunk.start, layer, values);
            }
        }
        let expected = naive.extend(130, &all[130..], LogitsWanted::Last).remove(0);
        let layers = u16::try_from(model.config().layers).unwrap();
        for selector in [selector(Rule::None, 0.3), selector(DEVIATION, 0.0)] {
            let mut selection = Selection::new(selector, TOKENS, &reused(&chunks), layers, &[]);
            let mut blended = Sequence::new(&model);
            let found = blended.blend(&all, &mut selection, 0, &mut |layer, pool, blocks| {
                for (chunk, kv) in chunks.iter().zip(&kv) {
                    put(pool, blocks, chunk.start, layer, &kv[layer]);
                }
            });
            assert_eq!(found, expected, "{name}");
            assert_eq!(blended.take(0..TOKENS), naive.take(0..TOKENS), "{name}");
            assert_eq!(selection.charged(), 0.0);
        }
    }
}

/// A chunk behind the prefix that it was compiled behind, in its own place.
#[test]
fn unchanged_order_and_prefix_are_prefix_reuse_bit_for_bit() {
    for (name, model) in models() {
        let (all, chunks) = prompt(&model, &[1, 97]);
        let mut full = Sequence::new(&model);
        let expected = full.extend(0, &all, LogitsWanted::Last).remove(0);
        let kv = alone(&model, &all[1..97], 1);
        assert_eq!(kv, full.take(1..97), "{name}");
        let layers = u16::try_from(model.config().layers).unwrap();
        for share in [0.0, 0.2, 1.0] {
            let selector = selector(Rule::Random { seed: 5 }, share);
            let mut selection = Selection::new(selector, TOKENS, &reused(&chunks), layers, &[]);
            let mut blended = Sequence::new(&model);
            let found = blended.blend(&all, &mut selection, 0, &mut |layer, pool, blocks| {
                put(pool, blocks, 1, layer, &kv[layer]);
            });
            assert_eq!(found, expected, "{name}, {share}");
        }
    }
}

/// Over KV that is right, whatever is computed anew comes out as it was: no query sees a token
/// behind it, or misses one before it. Any cut into chunks, any choice, any layer at which
/// tokens are dropped, and with a part of the prompt computed before.
#[test]
fn over_exact_kv_any_selection_changes_no_bit() {
    for (name, model) in models() {
        let (all, _) = prompt(&model, &[]);
        let mut full = Sequence::new(&model);
        let expected = full.extend(0, &all, LogitsWanted::Last).remove(0);
        let exact = full.take(0..TOKENS);
        let layers = u16::try_from(model.config().layers).unwrap();
        let cases = (
            proptest::collection::btree_set(0..TOKENS - 1, 0..8),
            proptest::collection::vec(0..=layers, TOKENS),
            0..TOKENS,
        );
        let mut runner = TestRunner::new(Config {
            failure_persistence: None,
            ..Config::with_cases(24)
        });
        let outcome = runner.run(&cases, |(cuts, depths, ready)| {
            let cuts: Vec<usize> = cuts.into_iter().collect();
            let chunks: Vec<Range<usize>> =
                cuts.chunks_exact(2).map(|cut| cut[0]..cut[1]).collect();
            let nothing = selector(Rule::None, 0.0);
            let mut selection = Selection::new(nothing, TOKENS, &reused(&chunks), layers, &[]);
            for token in chunks.iter().cloned().flatten() {
                selection.layers[token] = depths[token];
            }
            let mut blended = Sequence::new(&model);
            for (layer, values) in exact.iter().enumerate() {
                // Wrong wherever it is not landed or computed.
                let wrong = vec![9.0; values.len()];
                put(&mut blended.pool, &blended.blocks, 0, layer, &wrong);
            }
            if ready > 0 {
                blended.extend(0, &all[..ready], LogitsWanted::None);
            }
            let landing: Vec<Kv> = chunks
                .iter()
                .map(|chunk| full.take(chunk.clone()))
                .collect();
            let found = blended.blend(&all, &mut selection, ready, &mut |layer, pool, blocks| {
                for (chunk, kv) in chunks.iter().zip(&landing) {
                    if !chunk.is_empty() {
                        put(pool, blocks, chunk.start, layer, &kv[layer]);
                    }
                }
            });
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(&blended.take(0..TOKENS), &exact);
            Ok(())
        });
        outcome.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// Prompts of one batch do not touch each other, nor does prefill beside them.
#[test]
fn a_batch_gives_what_each_prompt_gives_alone() {
    let (_, model) = models().swap_remove(4);
    let layers = u16::try_from(model.config().layers).unwrap();
    let cuts: [&[usize]; 3] = [&[1, 40, 71, 130], &[1, 20, 90], &[30, 120]];
    let mut single = Vec::new();
    let mut pool = KvPool::new(model.config(), 36, KvDtype::F32);
    let mut tables = Vec::new();
    for cuts in cuts {
        let (all, chunks) = prompt(&model, cuts);
        let kv: Vec<Kv> = chunks
            .iter()
            .map(|chunk| alone(&model, &all[chunk.clone()], chunk.start))
            .collect();
        let selection = Selection::new(
            selector(DEVIATION, 0.25),
            TOKENS,
            &reused(&chunks),
            layers,
            &[],
        );
        let mut alone = Sequence::new(&model);
        let mut after = selection.clone();
        let logits = alone.blend(&all, &mut after, 0, &mut |layer, pool, blocks| {
            for (chunk, kv) in chunks.iter().zip(&kv) {
                put(pool, blocks, chunk.start, layer, &kv[layer]);
            }
        });
        let blocks: Vec<BlockId> = (0..12).map(|_| pool.alloc().unwrap()).collect();
        tables.push(blocks);
        single.push((all, chunks, kv, selection, after, logits));
    }
    let mut selections: Vec<Selection> = single.iter().map(|it| it.3.clone()).collect();
    let mut prompts: Vec<Prompt<'_>> = single
        .iter()
        .zip(&tables)
        .zip(&mut selections)
        .map(|((it, blocks), selection)| Prompt {
            tokens: &it.0,
            blocks,
            selection,
            ready: 0,
            logits: LogitsWanted::Last,
        })
        .collect();
    let mut scratch = Scratch::new(Threads::new(2).unwrap());
    let logits = blend::run(
        &model,
        &mut pool,
        &mut scratch,
        &mut prompts,
        &mut |layer, pool| {
            for ((_, chunks, kv, ..), blocks) in single.iter().zip(&tables) {
                for (chunk, kv) in chunks.iter().zip(kv) {
                    put(pool, blocks, chunk.start, layer, &kv[layer]);
                }
            }
            ControlFlow::Continue(())
        },
    )
    .unwrap();
    for (index, ((.., after, expected), selection)) in single.iter().zip(&selections).enumerate() {
        assert_eq!(logits.last(index), Some(&expected[..]));
        assert_eq!(selection, after);
        assert!(after.layers.contains(&1), "something was dropped");
    }
}

/// Tokens that are computed in some layers have their own K and V in these, and what landed in
/// the others.
#[test]
fn layers_that_are_not_computed_keep_what_landed() {
    for (name, model) in models() {
        let (all, chunks) = prompt(&model, &[1, 40, 71, 130]);
        let mut full = Sequence::new(&model);
        full.extend(0, &all, LogitsWanted::None);
        let full = full.take(0..TOKENS);
        let layers = u16::try_from(model.config().layers).unwrap();
        for depth in 0..=layers {
            let selector = Selector {
                rule: Rule::First,
                share: 1.0,
                layers: Some(depth),
            };
            let mut selection = Selection::new(selector, TOKENS, &reused(&chunks), layers, &[]);
            let mut blended = Sequence::new(&model);
            blended.blend(&all, &mut selection, 0, &mut |layer, pool, blocks| {
                let tokens = pool.layer_bytes(TOKENS) / 4;
                put(pool, blocks, 0, layer, &vec![0.5; tokens]);
            });
            let found = blended.take(0..TOKENS);
            let config = model.config();
            for layer in 0..config.layers {
                let rows = found[layer].chunks_exact(config.head_dim).enumerate();
                for (row, (index, values)) in rows.map(|it| (it.0 % TOKENS, it)) {
                    let computed = layer < usize::from(depth);
                    let expected = &full[layer][index * config.head_dim..][..config.head_dim];
                    if (1..130).contains(&row) && !computed {
                        assert!(values.iter().all(|&it| it == 0.5), "{name} {layer} {row}");
                    } else if computed {
                        assert_eq!(values, expected, "{name} {layer} {row}");
                    }
                }
            }
            let expected = f64::from(depth) / f64::from(layers);
            assert!((selection.charged() - expected).abs() < 1e-9);
        }
    }
}

/// Behind the same model computed step by step, and keys turned back by the test.
#[test]
fn probes_record_how_far_a_chunk_deviates() {
    for (name, model) in models() {
        let config = model.config();
        let (chunk, text) = (tokens(&model, 30, 5), tokens(&model, 21, 6));
        let mut sequence = Sequence::new(&model);
        let record = |sequence: &mut Sequence<'_>, texts: Vec<Vec<u32>>| {
            let probes = Probes { texts, layers: 1 };
            let (pool, scratch) = (&mut sequence.pool, &mut sequence.scratch);
            let found = probes.record(&model, pool, scratch, &sequence.blocks, &[FIRST], &chunk);
            let mut found = found.unwrap();
            assert_eq!(found.len(), 1, "layer 1");
            found.remove(0)
        };
        assert_eq!(record(&mut sequence, vec![Vec::new()]), [0.0; 30], "{name}");
        let one = record(&mut sequence, vec![text.clone()]);
        let other = record(&mut sequence, vec![tokens(&model, 9, 7)]);
        let both = record(&mut sequence, vec![text.clone(), tokens(&model, 9, 7)]);
        let largest: Vec<f32> = one.iter().zip(&other).map(|(a, b)| a.max(*b)).collect();
        assert_eq!(both, largest, "{name}");

        // At the same positions, so that nothing has to be turned.
        let mut behind = Sequence::new(&model);
        behind.extend(
            0,
            &[&[FIRST], &text[..], &chunk].concat(),
            LogitsWanted::None,
        );
        let behind = behind.take(22..52).remove(1);
        let alone = alone(&model, &chunk, 22).remove(1);
        let half = alone.len() / 2;
        let mut expected = [0.0f64; 30];
        for plane in [0..half, half..2 * half] {
            let square: f64 = alone[plane.clone()].iter().map(|&x| f64::from(x * x)).sum();
            let rows = alone[plane.clone()].chunks_exact(config.head_dim);
            let rows = rows.zip(behind[plane].chunks_exact(config.head_dim));
            for (row, (a, b)) in rows.enumerate() {
                let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
                expected[row % 30] += squares.sum::<f64>() / (square / 30.0);
            }
        }
        for (found, expected) in one.iter().zip(expected) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-4 * (1.0 + expected),
                "{name}"
            );
        }
        assert!(one.iter().any(|&it| it > 1e-3), "{name}");
    }
}

/// Attention of the rows from `context` on, by layer and position before `context`, summed over
/// rows and heads; from queries as the layers had them and all K that the pages hold. In f64.
fn dense_attention(model: &Model, queries: &[Vec<f32>], kv: &Kv, context: usize) -> Vec<Vec<f64>> {
    let config = model.config();
    let (dim, group) = (config.head_dim, config.heads / config.kv_heads);
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    let of_layer = |layer: usize| {
        let tokens = kv[layer].len() / (2 * config.kv_heads * dim);
        let mut sums = vec![0.0; context];
        for (index, query) in queries[layer].chunks_exact(config.heads * dim).enumerate() {
            let position = context + index;
            let seen: Vec<usize> = (0..=position)
                .filter(|key| config.windows[layer].is_none_or(|window| position - key < window))
                .collect();
            for (head, query) in query.chunks_exact(dim).enumerate() {
                let keys = &kv[layer][head / group * tokens * dim..][..tokens * dim];
                let weights: Vec<f64> = seen
                    .iter()
                    .map(|key| (dot(query, &keys[key * dim..][..dim]) / (dim as f64).sqrt()).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                for (&key, weight) in seen.iter().zip(&weights) {
                    if key < context {
                        sums[key] += weight / total;
                    }
                }
            }
        }
        sums
    };
    (0..config.layers).map(of_layer).collect()
}

#[test]
fn attention_to_the_context_is_that_of_a_dense_reference() {
    let (mut grouped, mut windowed) = (false, false);
    for (name, model) in models() {
        let config = model.config();
        grouped |= config.kv_heads > 1 && config.heads > config.kv_heads;
        let all = tokens(&model, 70, 5);
        // Shorter than the fixtures' window, and longer: its last tokens see none of the context.
        for context in [61, 40] {
            windowed |= config
                .windows
                .iter()
                .flatten()
                .any(|window| all.len() - context > *window);
            let mut sequence = Sequence::new(&model);
            sequence.extend(0, &all[..context], LogitsWanted::None);
            let step = Step {
                tokens: &all[context..],
                positions: Positions::From(context),
                blocks: &sequence.blocks,
                logits: LogitsWanted::None,
            };
            let (mut found, mut queries) = (Vec::new(), Vec::new());
            model
                .forward(
                    &mut sequence.pool,
                    &mut sequence.scratch,
                    &[step],
                    &mut |before| {
                        let rows = before.rows.chunks_exact(before.stride);
                        let width = config.heads * config.head_dim;
                        queries.push(rows.flat_map(|row| &row[..width]).copied().collect());
                        let blocks = &sequence.blocks;
                        found.push(blend::attention_of(&model, &before, 0, blocks, context));
                        ControlFlow::Continue(())
                    },
                )
                .unwrap();
            let expected = dense_attention(&model, &queries, &sequence.take(0..all.len()), context);
            assert_eq!(found.len(), expected.len());
            for (layer, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(
                    expected.iter().sum::<f64>() > 0.0,
                    "{name}: nothing is seen"
                );
                for (position, (found, expected)) in found.iter().zip(expected).enumerate() {
                    assert!(
                        (f64::from(*found) - expected).abs() < 1e-4,
                        "{name}, layer {layer}, position {position}: {found} for {expected}"
                    );
                }
            }
        }
    }
    assert!(grouped && windowed, "fixtures of both");
}
