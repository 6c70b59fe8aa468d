use proptest::prelude::*;

use super::refine::{Judge, Turned};
use super::vote::{Ballot, elect};
use super::*;
use crate::config::ModelConfig;
use crate::kernels::{noise, rotate};
use crate::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvPool};
use crate::rope::{Frequencies, RopeConfig, RopeScaling};

/// One layer of one KV head.
fn config(dim: usize) -> ModelConfig {
    let text = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 64,
            "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": {dim}, "max_position_embeddings": 9000}}"#
    );
    ModelConfig::from_json(text.as_bytes()).unwrap()
}

/// Pages that hold some keys.
struct Bed {
    config: ModelConfig,
    pool: KvPool,
    blocks: Vec<BlockId>,
    keys: Vec<Vec<f32>>,
}

impl Bed {
    fn new(dim: usize, keys: Vec<Vec<f32>>) -> Self {
        let config = config(dim);
        let mut pool = KvPool::new(&config, keys.len() / BLOCK_TOKENS, KvDtype::F32);
        let blocks: Vec<BlockId> = std::iter::from_fn(|| pool.alloc()).collect();
        for (position, key) in keys.iter().enumerate() {
            pool.write_token(&blocks, position, 0, key, key);
        }
        Self {
            config,
            pool,
            blocks,
            keys,
        }
    }

    fn digests(&mut self, detail: Detail) -> Digests {
        let mut digests = Digests::new(&self.config, detail);
        digests
            .extend(&mut self.pool, &self.blocks, self.keys.len())
            .unwrap();
        digests
    }
}

fn numbers(count: usize, size: f32, state: &mut u64) -> Vec<f32> {
    (0..count).map(|_| size * noise(state)).collect()
}

/// Keys that are hard on boxes: of all sizes, with outliers, constants and subnormals.
fn hard_keys(pages: usize, dim: usize, size: f32, state: &mut u64) -> Vec<Vec<f32>> {
    let mut keys: Vec<Vec<f32>> = (0..pages * BLOCK_TOKENS)
        .map(|_| numbers(dim, size, state))
        .collect();
    for (token, key) in keys.iter_mut().enumerate() {
        key[0] = 3.25;
        key[1] = 1e-9 * noise(state);
        key[2] = if token % 37 == 5 { 60_000.0 } else { key[2] };
        key[3] = -1000.0 + 0.01 * noise(state);
        key[4] = if token % 2 == 0 { 65504.0 } else { -65504.0 };
    }
    keys
}

/// One query as given, without moves; or several of whole lanes.
fn still(digests: &Digests, query: &[f32]) -> Turned {
    let mut values = query.to_vec();
    values.resize(digests.padded().max(query.len()), 0.0);
    Turned {
        padded: digests.padded(),
        queries: 1,
        values,
    }
}

fn dot(query: &[f32], key: &[f32]) -> f64 {
    let products = query.iter().zip(key);
    products.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Of every key of a page, and of every key of a group.
    #[test]
    fn bounds_hold(
        pages in 1usize..20, dim in prop::sample::select(vec![8usize, 40, 64]),
        size in prop::sample::select(vec![1e-6f32, 1.0, 300.0]), is_hard: bool, seed: u64,
    ) {
        let mut state = seed;
        let keys = match is_hard {
            true => hard_keys(pages, dim, size, &mut state),
            false => (0..pages * 16).map(|_| numbers(dim, size, &mut state)).collect(),
        };
        let mut bed = Bed::new(dim, keys);
        let query = numbers(dim, 2.0, &mut state);
        for detail in [Detail::Tokens, Detail::Mean, Detail::Deviation] {
            let digests = bed.digests(detail);
            let turned = still(&digests, &query);
            let mut judge = Judge::new(&digests, digests.head(0, 0), &turned);
            let mut seen = 0;
            for group in 0..digests.groups().len() {
                let (high, low) = judge.group(group, 0);
                judge.pages(group, |index, _, bounds| {
 let page = digests.groups()[group].first + index;
                    seen += 1;
                    for key in &bed.keys[page * 16..][..16] {
                        let exact = dot(&query, key);
                        assert!(f64::from(bounds.upper) >= exact, "{} {exact}", bounds.upper);
                        assert!(f64::from(bounds.lower) <= exact, "{} {exact}", bounds.lower);
                        assert!(f64::from(high) >= exact && f64::from(low) <= exact);
                    }
                    let expected = bounds.expected();
                    assert!(bounds.lower <= expected && expected <= bounds.upper);
                });
            }
            prop_assert_eq!(seen, pages);
        }
    }

    /// Bounds of pages that were moved hold for keys turned to where they are, as those do
    /// that are made of the turned keys; and moving twice is moving once.
    #[test]
    fn bounds_hold_at_other_positions(
        before in 1usize..12, pages in 1usize..12, again in 0usize..300, seed: u64,
    ) {
        let (mut state, dim) = (seed, 16);
        let rope = RopeConfig { theta: 10_000.0, scaling: RopeScaling::None };
        let frequencies: Frequencies = rope.frequencies(dim);
        let keys: Vec<Vec<f32>> = (0..pages * 16).map(|_| numbers(dim, 2.0, &mut state)).collect();
        let chunk = Bed::new(dim, keys).digests(Detail::Tokens);
        let other: Vec<Vec<f32>> = (0..before * 16).map(|_| numbers(dim, 2.0, &mut state)).collect();
        let mut moved = Bed::new(dim, other.clone()).digests(Detail::Tokens);
        moved.append(&chunk);
        // Somewhere else, by way of where it is now.
        let far: Vec<Vec<f32>> = (0..again * 16).map(|_| numbers(dim, 2.0, &mut state)).collect();
        let mut twice = Bed::new(dim, far).digests(Detail::Tokens);
        twice.append(&moved);
        prop_assert_eq!(twice.pages(), again + before + pages);

        let state_of_chunk = {
            let mut state = seed;
            (0..pages * 16).map(|_| numbers(dim, 2.0, &mut state)).collect::<Vec<_>>()
        };
        let (mut cos, mut sin) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
        let query = numbers(dim, 2.0, &mut state);
        let magnitude: f64 = query.iter().map(|q| f64::from(q.abs()) * 3.0).sum();
        for (digests, first) in [(&moved, before), (&twice, again + before)] {
            let mut turned = still(digests, &query);
            turned.values.clear();
            for (from, to) in digests.moves() {
                let mut query = query.clone();
                frequencies.shift(to, from, &mut cos, &mut sin);
                if from != to {
                    rotate(crate::kernels::Isa::detect(), &mut query, &cos, &sin);
                }
                turned.values.extend(query);
            }
            let mut judge = Judge::new(digests, digests.head(0, 0), &turned);
            let anew: Vec<Vec<f32>> = state_of_chunk.iter().enumerate().map(|(token, key)| {
                let mut key = key.clone();
                frequencies.shift(token, first * 16 + token, &mut cos, &mut sin);
                rotate(crate::kernels::Isa::detect(), &mut key, &cos, &sin);
                key
            }).collect();
            let mut seen = 0;
            for group in 0..digests.groups().len() {
                judge.pages(group, |index, _, bounds| {
 let page = digests.groups()[group].first + index;
                    let Some(page) = page.checked_sub(first) else { return };
                    seen += 1;
                    for key in &anew[page * 16..][..16] {
                        let (exact, slack) = (dot(&query, key), magnitude * 1e-3);
                        assert!(f64::from(bounds.upper) + slack >= exact);
                        assert!(f64::from(bounds.lower) - slack <= exact);
                    }
                    // As tight as of keys that never moved.
                    assert!(f64::from(bounds.upper - bounds.lower) < 4.0 * magnitude);
                });
            }
            prop_assert_eq!(seen, pages);
        }
    }

    /// Opening groups best first finds what looking at every page finds.
    #[test]
    fn the_walk_finds_the_best(
        pages in 1usize..80, want in 1usize..30, queries in 1usize..4, seed: u64,
    ) {
        let (mut state, dim) = (seed, 16);
        // Groups differ, as topics do.
        let keys = (0..pages * 16).map(|token| {
            let mut topic = seed ^ (token as u64 / 128);
            let middle = numbers(dim, 1.5, &mut topic);
            middle.iter().map(|x| x + 0.5 * noise(&mut state)).collect()
        });
        let mut bed = Bed::new(dim, keys.collect());
        let digests = bed.digests(Detail::Tokens);
        let mut turned = still(&digests, &numbers(queries * dim, 1.5, &mut state));
        turned.queries = queries;
        let mut judge = Judge::new(&digests, digests.head(0, 0), &turned);
        let all = judge.all(refine::Bounds::expected);
        let found = judge.best(want, None, Vote::Soft);
        let choose = |estimates: &vote::Estimates| {
            let ballot = Ballot::new(estimates, Vote::Soft, want, |_| false);
            let mut pages = elect(&[ballot], want, None, false).remove(0);
            pages.sort_unstable();
            pages
        };
        if queries == 1 {
            prop_assert_eq!(choose(&found), choose(&all));
        } else {
            // How much a query's vote counts depends on what all pages weigh for it, which is
            // not known exactly.
            let scores = all.scores(&all.totals(), Vote::Soft);
            let sum = |pages: Vec<u32>| -> f32 {
                pages.iter().map(|&page| scores[page as usize]).sum()
            };
            prop_assert!(sum(choose(&found)) >= 0.9 * sum(choose(&all)));
        }
        // And what was not opened is known to be no more than it is.
        let within = judge.best(want, Some(0.95), Vote::Soft);
        let most = within.totals().into_iter().zip(&within.rest);
        for ((total, rest), all) in most.zip(all.totals()) {
            prop_assert!(total + (1.0 + rest).ln() >= all - 1e-3);
        }
    }
}

/// Where attention is skewed, most groups are rejected unopened.
#[test]
fn the_walk_opens_few_groups_of_a_skewed_head() {
    let (mut state, dim) = (7, 64);
    let middles: Vec<Vec<f32>> = (0..64).map(|_| numbers(dim, 2.0, &mut state)).collect();
    let keys = (0..64 * 128).map(|token| {
        let middle = &middles[token / 128];
        middle.iter().map(|x| x + 0.3 * noise(&mut state)).collect()
    });
    let mut bed = Bed::new(dim, keys.collect());
    let digests = bed.digests(Detail::Tokens);
    let turned = still(&digests, &middles[17]);
    let mut judge = Judge::new(&digests, digests.head(0, 0), &turned);
    let found = judge.best(8, None, Vote::Soft);
    assert!(found.pages.len() <= 8 * 16, "{} pages", found.pages.len());
    assert!((17 * 8..18 * 8).all(|page| found.pages.contains(&page)));
}

#[test]
fn digests_take_a_sixteenth_at_most_and_grow_page_by_page() {
    for dim in [64, 128] {
        let mut state = 5;
        let keys: Vec<Vec<f32>> = (0..4096).map(|_| numbers(dim, 1.0, &mut state)).collect();
        let mut bed = Bed::new(dim, keys);
        let whole = bed.digests(Detail::Tokens);
        assert_eq!(whole.pages(), 256);
        let kv = 2 * 2 * dim * 4096;
        assert!(whole.bytes() * 16 <= kv, "{} of {kv}", whole.bytes());
        let mut grown = Digests::new(&bed.config, Detail::Tokens);
        for tokens in [3, 40, 41, 100, 1000, 1007, 4095] {
            grown.extend(&mut bed.pool, &bed.blocks, tokens).unwrap();
            assert_eq!(grown.pages(), tokens / 16);
            assert!(grown.bytes() * 15 <= 4 * dim * tokens.max(128) * 4);
        }
        grown.extend(&mut bed.pool, &bed.blocks, 4096).unwrap();
        assert_eq!(grown, whole);
        let short = grown.extend(&mut bed.pool, &bed.blocks, 4112);
        assert!(short.is_err());
        assert_eq!(grown, whole);
    }
}

/// Keys that are no numbers, or that f16 cannot hold, spoil no bound but their page's.
#[test]
fn odd_pages_are_listed_apart() {
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -65505.0] {
        let (mut state, dim) = (9, 16);
        let mut keys: Vec<Vec<f32>> = (0..20 * 16)
            .map(|_| numbers(dim, 1.0, &mut state))
            .collect();
        keys[5 * 16 + 3][7] = odd;
        keys[18 * 16][0] = odd;
        let mut bed = Bed::new(dim, keys);
        let digests = bed.digests(Detail::Tokens);
        assert_eq!(digests.head(0, 0).odd, [5, 18]);
        let query = numbers(dim, 1.0, &mut state);
        let turned = still(&digests, &query);
        let mut judge = Judge::new(&digests, digests.head(0, 0), &turned);
        for group in 0..3 {
            judge.pages(group, |index, _, bounds| {
                let page = digests.groups()[group].first + index;
                for key in bed.keys[page * 16..][..16].iter() {
                    let exact = dot(&query, key);
                    if !matches!(page, 5 | 18) {
                        assert!(f64::from(bounds.upper) >= exact);
                        assert!(f64::from(bounds.lower) <= exact);
                    }
                }
            });
        }
        let mut more = bed.digests(Detail::Tokens);
        more.append(&digests);
        assert_eq!(more.head(0, 0).odd, [5, 18, 25, 38]);
    }
}

/// What is known of tokens tells what a page weighs, also where one key stands out.
#[test]
fn weights_are_estimated_from_tokens() {
    let (mut state, dim) = (3, 64);
    // As of trained models: channels differ in how much keys differ in them.
    let sizes: Vec<f32> = (0..dim)
        .map(|channel| if channel % 2 == 0 { 1.0 } else { 0.2 })
        .collect();
    let key =
        |state: &mut u64| -> Vec<f32> { sizes.iter().map(|size| size * noise(state)).collect() };
    let mut keys: Vec<Vec<f32>> = (0..64 * 16).map(|_| key(&mut state)).collect();
    let query = numbers(dim, 0.6, &mut state);
    for (page, size) in [(3, 1.0), (20, 1.5), (50, 2.0)] {
        let towards = query.iter().zip(&sizes).map(|(q, it)| size * it * q / 0.6);
        keys[page * 16 + 7] = towards.collect();
    }
    let mut bed = Bed::new(dim, keys);
    let digests = bed.digests(Detail::Tokens);
    let turned = still(&digests, &query);
    let mut judge = Judge::new(&digests, digests.head(0, 0), &turned);
    let (mut error, mut of_middle) = (0.0, 0.0);
    for group in 0..8 {
        judge.pages(group, |index, _, bounds| {
            let page = digests.groups()[group].first + index;
            let keys = &bed.keys[page * 16..][..16];
            let weights = keys.iter().map(|key| dot(&query, key).exp());
            let exact = (weights.sum::<f64>() / 16.0).ln();
            error += (f64::from(bounds.expected()) - exact).powi(2);
            of_middle += (f64::from(bounds.middle) - exact).powi(2);
        });
    }
    assert!(error < of_middle / 5.0, "{error} of {of_middle}");
}
