//! Choosing pages, on the fixtures' models.

#![expect(
    clippy::unwrap_used,
    reason = "a test; clippy exempts only functions marked as such"
)]

use std::ops::ControlFlow;

use kvasir_engine::paging::{Digests, Options, Rule, Selector, Vote, page_weights};
use kvasir_engine::{
    BLOCK_TOKENS, BeforeLayer, BlockId, Fate, KvDtype, KvPool, LogitsWanted, Model, Pages,
    Positions, Scratch, Step, Threads,
};

mod models;
use models::models;

const RULES: [Rule; 10] = [
    Rule::All,
    Rule::Bounds,
    Rule::Quest,
    Rule::MeanBox,
    Rule::Centroid,
    Rule::Exact { alike: 0.9 },
    Rule::Frequency { share: 0.25 },
    Rule::Recency,
    Rule::Random { seed: 3 },
    Rule::Oracle,
];

/// A context in pages, and what comes next.
struct Bed<'a> {
    model: &'a Model,
    pool: KvPool,
    scratch: Scratch,
    blocks: Vec<BlockId>,
    tokens: Vec<u32>,
}

impl<'a> Bed<'a> {
    fn new(model: &'a Model, tokens: usize) -> Self {
        let pages = tokens.div_ceil(BLOCK_TOKENS) + 1;
        let mut pool = KvPool::new(model.config(), pages, KvDtype::F32);
        let blocks: Vec<BlockId> = std::iter::from_fn(|| pool.alloc()).collect();
        let vocabulary = u32::try_from(model.config().vocab_size).unwrap();
        let count = u32::try_from(tokens).unwrap();
        let mut bed = Self {
            model,
            pool,
            scratch: Scratch::new(Threads::new(2).unwrap()),
            blocks,
            tokens: (0..count)
                .map(|token| (token * token + 7) % vocabulary)
                .collect(),
        };
        let context = bed.tokens.clone();
        bed.run(&context, 0, &mut |_, _| Pages::All);
        bed
    }

    fn run(
        &mut self,
        tokens: &[u32],
        position: usize,
        choose: &mut (dyn FnMut(&BeforeLayer<'_>, &[BlockId]) -> Pages + Send),
    ) -> Vec<f32> {
        let step = Step {
            tokens,
            positions: Positions::From(position),
            blocks: &self.blocks,
            logits: LogitsWanted::Last,
        };
        let (pool, scratch, blocks) = (&mut self.pool, &mut self.scratch, &self.blocks);
        let logits = self.model.forward(pool, scratch, &[step], &mut |before| {
            before.pages[0] = choose(&before, blocks);
            ControlFlow::Continue(())
        });
        logits.unwrap().last(0).unwrap().to_vec()
    }

    fn digests(&mut self, rule: Rule) -> Digests {
        let detail = rule.detail().unwrap_or_default();
        let mut digests = Digests::new(self.model.config(), detail);
        let tokens = self.tokens.len();
        digests
            .extend(&mut self.pool, &self.blocks, tokens)
            .unwrap();
        digests
    }
}

#[test]
fn a_budget_of_everything_changes_no_bit() {
    for (name, model) in models() {
        let mut bed = Bed::new(&model, 150);
        let full = bed.run(&[3], 150, &mut |_, _| Pages::All);
        for rule in RULES {
            let options = Options {
                rule,
                share: 1.0,
                ..Options::default()
            };
            let digests = bed.digests(rule);
            let mut selector = Selector::new(&model, options);
            let mut listed = 0;
            let found = bed.run(&[3], 150, &mut |before, blocks| {
                let pages = selector.choose(before, 0, &digests, blocks);
                if let Pages::Chosen(pages) = &pages {
                    assert!(
                        pages.iter().all(|pages| pages.len() == 10),
                        "{name} {rule:?}"
                    );
                    listed += 1;
                }
                pages
            });
            assert_eq!(found, full, "{name}: {rule:?}");
            let config = model.config();
            let windows = config.windows.iter().filter(|it| it.is_some()).count();
            let expected = match rule {
                Rule::All => 0,
                _ => config.layers - windows,
            };
            assert_eq!(listed, expected, "{name}: {rule:?}");
        }
    }
}

/// Whatever the rule: never more than the budget, the ends of the context always, exact
/// layers untouched.
#[test]
fn budgets_are_kept() {
    for (name, model) in models() {
        let config = model.config();
        let mut bed = Bed::new(&model, 246);
        for (rule, share, is_shared, mass) in RULES[1..].iter().flat_map(|&rule| {
            [
                (0.25, true, None),
                (0.5, false, None),
                (0.5, true, Some(0.6)),
            ]
            .map(|(share, is_shared, mass)| (rule, share, is_shared, mass))
        }) {
            let options = Options {
                rule,
                share,
                is_shared,
                mass,
                vote: Vote::Max,
                exact_layers: 1,
                ..Options::default()
            };
            let digests = bed.digests(rule);
            let mut selector = Selector::new(&model, options);
            // 16 pages, of which the last is not full.
            let budget = if share == 0.25 { 4 } else { 8 };
            bed.run(&[3], 246, &mut |before, blocks| {
                let pages = selector.choose(before, 0, &digests, blocks);
                if before.layer == 0 || config.windows[before.layer].is_some() {
                    assert_eq!(pages, Pages::All);
                    return pages;
                }
                let Pages::Chosen(chosen) = &pages else {
                    panic!("{name}: {rule:?} chose nothing");
                };
                let all: usize = chosen.iter().map(Vec::len).sum();
                assert!(all <= budget * config.kv_heads, "{name} {rule:?}: {all}");
                if mass.is_none() {
                    assert_eq!(all, budget * config.kv_heads, "{name} {rule:?}");
                }
                for pages in chosen {
                    assert!(
                        pages.is_sorted_by(|a, b| a < b),
                        "{name} {rule:?} {pages:?}"
                    );
                    assert!([0, 14, 15].iter().all(|page| pages.contains(page)));
                    assert!(is_shared || pages.len() <= budget);
                }
                pages
            });
        }
    }
}

/// The most mass that a budget can have is the oracle's; a target of mass is met by it with no
/// page to spare.
#[test]
fn the_oracle_knows_the_mass() {
    for (name, model) in models() {
        let config = model.config();
        if config.windows.iter().any(Option::is_some) {
            continue;
        }
        let group = config.heads / config.kv_heads;
        let mut bed = Bed::new(&model, 240);
        let all: Vec<Digests> = RULES.iter().map(|&rule| bed.digests(rule)).collect();
        let options = |rule, mass| Options {
            rule,
            mass,
            share: if mass.is_some() { 1.0 } else { 0.25 },
            is_shared: false,
            sinks: 0,
            recent: 0,
            ..Options::default()
        };
        let selector = |rule, mass| Selector::new(&model, options(rule, mass));
        let mut selectors: Vec<Selector> = RULES.iter().map(|&rule| selector(rule, None)).collect();
        let mut to_mass = selector(Rule::Oracle, Some(0.5));
        bed.run(&[3], 240, &mut |before, blocks| {
            let weights = page_weights(config, before, 0, blocks);
            for head in &weights {
                assert!((head.iter().sum::<f32>() - 1.0).abs() < 1e-4, "{name}");
            }
            let masses = |chosen: &Pages| -> Vec<f32> {
                let Pages::Chosen(chosen) = chosen else {
                    return vec![0.0; config.kv_heads];
                };
                let heads = weights.chunks_exact(group).zip(chosen);
                heads
                    .map(|(heads, pages)| {
                        let of = |head: &Vec<f32>| -> f32 {
                            pages.iter().map(|&page| head[page as usize]).sum()
                        };
                        heads.iter().map(of).sum::<f32>() / group as f32
                    })
                    .collect()
            };
            let found: Vec<Vec<f32>> = selectors
                .iter_mut()
                .zip(&all)
                .map(|(selector, digests)| masses(&selector.choose(before, 0, digests, blocks)))
                .collect();
            let oracle = &found[RULES.len() - 1];
            for (rule, masses) in RULES.iter().zip(&found) {
                let pairs = masses.iter().zip(oracle);
                for (mass, most) in pairs {
                    assert!(
                        *mass <= most + 1e-4,
                        "{name}: {rule:?} has {mass} of {most}"
                    );
                }
            }
            let Pages::Chosen(mut chosen) = to_mass.choose(before, 0, &all[9], blocks) else {
                panic!("pages are chosen");
            };
            // Of the mass of full pages; the last one has a little, too.
            let own = weights.iter().map(|head| head[15]).fold(0.0, f32::max);
            for mass in masses(&Pages::Chosen(chosen.clone())) {
                assert!(mass >= 0.5 * (1.0 - own) - 1e-3, "{name}: {mass}");
            }
            for (kv_head, pages) in chosen.iter_mut().enumerate() {
                // Without its lightest full page, it would not be.
                let heads = &weights[kv_head * group..][..group];
                let of = |page: u32| -> f32 { heads.iter().map(|head| head[page as usize]).sum() };
                let least = pages.iter().copied().filter(|&page| page < 15);
                let least = least.min_by(|&a, &b| of(a).total_cmp(&of(b))).unwrap();
                pages.retain(|&page| page != least && page < 15);
                let left: f32 = pages.iter().map(|&page| of(page)).sum();
                assert!(left / group as f32 <= 0.5 + 1e-3, "{name}");
            }
            Pages::All
        });
    }
}

/// A page whose keys the queries look for, among noise: found by every rule that looks, and
/// read when it is no number.
#[test]
fn needles_are_found_and_odd_pages_read() {
    let (_, model) = models().remove(0);
    let config = model.config();
    let (dim, tokens) = (config.head_dim, 4096);
    let mut noise = {
        let mut state = 1u32;
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
        }
    };
    let rows: Vec<f32> = (0..config.qkv_width()).map(|_| 2.0 * noise()).collect();
    let group = config.heads / config.kv_heads;
    let mut pool = KvPool::new(config, tokens / BLOCK_TOKENS, KvDtype::F32);
    let blocks: Vec<BlockId> = std::iter::from_fn(|| pool.alloc()).collect();
    for page in 0..tokens / BLOCK_TOKENS {
        let mut payload = Vec::new();
        for head in 0..2 * config.kv_heads {
            for token in 0..BLOCK_TOKENS {
                for channel in 0..dim {
                    let needle = rows[(head % config.kv_heads) * group * dim + channel];
                    let value = match (page, token) {
                        (100, 4) => 4.0 * needle,
                        (77, 2) if channel == 1 => f32::NAN,
                        _ => noise(),
                    };
                    payload.extend(value.to_le_bytes());
                }
            }
        }
        let first = page * BLOCK_TOKENS;
        pool.write_layer(&blocks, first, BLOCK_TOKENS, 0, &payload)
            .unwrap();
    }
    for rule in RULES {
        let detail = rule.detail().unwrap_or_default();
        let mut digests = Digests::new(config, detail);
        digests.extend(&mut pool, &blocks, tokens).unwrap();
        let options = Options {
            rule,
            share: 0.031_25,
            ..Options::default()
        };
        let mut selector = Selector::new(&model, options);
        let mut choose = |rows: &[f32]| {
            let before = BeforeLayer {
                layer: 0,
                pool: &mut pool,
                rows,
                stride: rows.len(),
                positions: &[tokens - 1],
                steps: std::slice::from_ref(&(0..1)),
                fates: &mut [Fate::GoesOn],
                pages: &mut [Pages::All],
                expected: &mut [None],
                next: None,
            };
            match selector.choose(&before, 0, &digests, &blocks) {
                Pages::Chosen(pages) => pages,
                Pages::All => Vec::new(),
            }
        };
        let found = choose(&rows);
        if rule.detail().is_some() {
            for pages in &found {
                assert!(
                    pages.contains(&100) && pages.contains(&77),
                    "{rule:?} {pages:?}"
                );
            }
        }
        // Whatever the queries are, this is no place to panic.
        for strange in [f32::NAN, f32::INFINITY, 1e38, 0.0] {
            choose(&vec![strange; rows.len()]);
        }
    }
}

/// While queries are alike, [`Rule::Exact`] takes its choice again.
#[test]
fn choices_of_alike_queries_are_taken_again() {
    let (_, model) = models().remove(0);
    let mut bed = Bed::new(&model, 240);
    let digests = bed.digests(Rule::Bounds);
    for (alike, is_same) in [(-1.0, true), (2.0, false)] {
        let options = Options {
            rule: Rule::Exact { alike },
            share: 0.25,
            sinks: 0,
            recent: 0,
            ..Options::default()
        };
        let mut selector = Selector::new(&model, options);
        let mut chosen = Vec::new();
        for token in [3, 50] {
            let mut of_token = Vec::new();
            bed.run(&[token], 240, &mut |before, blocks| {
                of_token.push(selector.choose(before, 0, &digests, blocks));
                Pages::All
            });
            chosen.push(of_token);
        }
        assert_eq!(chosen[0] == chosen[1], is_same, "{alike}");
    }
}
