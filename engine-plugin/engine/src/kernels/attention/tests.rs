use proptest::prelude::*;

use super::super::elementwise::tests::noise;
use super::*;
use crate::config::ModelConfig;
use crate::kv::KvDtype;

fn numbers(count: usize, state: &mut u64) -> Vec<f32> {
    (0..count).map(|_| noise(state)).collect()
}

proptest! {
    /// Every instruction set gives the bits of the scalar code, loop by loop.
    #[test]
    fn instruction_sets_agree(
        chunks in 1usize..10, rows in 1usize..=ROW_BLOCK, tokens in 1usize..=KEY_TILE, seed: u64,
    ) {
        let mut state = seed;
        let dim = chunks * LANES;
        let page = numbers(BLOCK_TOKENS * dim, &mut state);
        let queries = numbers(rows * dim, &mut state);
        let keys = numbers(dim * KEY_TILE, &mut state);
        let values = numbers(KEY_TILE * dim, &mut state);
        let sums = numbers(rows * dim, &mut state);
        let mut scores = [[0.0; KEY_TILE]; ROW_BLOCK];
        score_rows_scalar(&queries, dim, &keys, &mut scores[..rows]);
        let rescale = [0.5, 1.0, 0.25, 0.1, 0.9, 0.0];
        let lanes: [(usize, usize); ROW_BLOCK] =
            std::array::from_fn(|row| ((row * 7) % 5, (row * 11 + tokens) % (KEY_TILE + 1)));
        let start = vec![(0.1, 2.0); rows];

        for isa in Isa::available() {
            let (mut found, mut expected) = (keys.clone(), keys.clone());
            transpose(isa, &page, dim, &mut found[16..]);
            transpose_scalar(&page, dim, &mut expected[16..]);
            prop_assert_eq!(found, expected);

            let mut found = [[1.0; KEY_TILE]; ROW_BLOCK];
            score_rows(isa, &queries, dim, &keys, &mut found[..rows]);
            prop_assert_eq!(&found[..rows], &scores[..rows]);

            let (mut found, mut expected) = ((scores, start.clone(), rescale), (scores, start.clone(), rescale));
            soften(isa, &mut found.0, &lanes, &mut found.1, &mut found.2);
            soften_body(&mut expected.0, &lanes, &mut expected.1, &mut expected.2);
            prop_assert_eq!(found, expected);

            let (mut found, mut expected) = (sums.clone(), sums.clone());
            add_values(isa, &scores, &rescale, tokens, &values, dim, &mut found);
            add_values_scalar(&scores, &rescale, tokens, &values, dim, &mut expected);
            prop_assert_eq!(found, expected);
        }
    }
}

const POSITIONS: [usize; 3] = [0, 1, 2];

/// Attends over a page of zeros with two heads of 16; each range is its first
/// row and its number of queries.
fn attend_rows(ranges: &[(usize, usize)], out_rows: usize) {
    let config = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 32,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 512}"#;
    let config = ModelConfig::from_json(config.as_bytes()).expect("the config is complete");
    let mut pool = KvPool::new(&config, 1, KvDtype::F32);
    let blocks = [pool.alloc().expect("the pool has a page")];
    let range = |&(first_row, queries): &(usize, usize)| QueryRange {
        first_row,
        positions: &POSITIONS[..queries],
        blocks: &blocks,
        pages: None,
    };
    let work = AttentionWork {
        shape: AttentionShape {
            heads: 2,
            kv_heads: 2,
            head_dim: 16,
            window: None,
        },
        ranges: &ranges.iter().map(range).collect::<Vec<_>>(),
        queries: &[1.0; 8 * 32],
        query_stride: 32,
        pool: &pool,
        layer: 0,
    };
    attend(Isa::detect(), &work, &mut vec![1.0; out_rows * 32]);
}

#[test]
fn ranges_may_leave_gaps_and_be_empty() {
    attend_rows(&[(0, 2), (2, 0), (2, 1), (5, 3)], 8);
}

#[test]
#[should_panic(expected = "ranges ascend")]
fn overlapping_ranges_are_refused() {
    attend_rows(&[(0, 3), (2, 2)], 8);
}

#[test]
#[should_panic(expected = "rows of out")]
fn ranges_outside_the_output_are_refused() {
    attend_rows(&[(6, 2)], 7);
}

proptest! {
    /// Queries at any positions, beside dense attention in f64 under the mask
    /// `key <= query`, inside the window if there is one, and on a chosen page if some are:
    /// all others hold NaN.
    #[test]
    fn scattered_queries_see_what_a_dense_mask_shows(
        positions in proptest::collection::btree_set(0usize..150, 1..60),
        window in proptest::option::of(1usize..100),
        chosen in proptest::option::of(proptest::array::uniform2(
            proptest::collection::btree_set(0u32..10, 0..10),
        )),
        dtype in proptest::sample::select(vec![KvDtype::F32, KvDtype::Bf16, KvDtype::F16]),
        seed: u64,
    ) {
        let config = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 64,
            "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 512}"#;
        let config = ModelConfig::from_json(config.as_bytes()).expect("the config is complete");
        let (dim, heads, group) = (16, 4, 2);
        let positions: Vec<usize> = positions.into_iter().collect();
        let mut pool = KvPool::new(&config, 10, dtype);
        let blocks: Vec<BlockId> = (0..10).filter_map(|_| pool.alloc()).rev().collect();
        let mut state = seed;
        let own = positions.iter().map(|&position| u32::try_from(position / BLOCK_TOKENS));
        let own: Vec<u32> = own.collect::<Result<_, _>>().expect("ten pages");
        let chosen = chosen.map(|heads| heads.map(|mut pages| {
            pages.extend(&own);
            pages.into_iter().collect::<Vec<u32>>()
        }));
        let reads = |kv_head: usize, position: usize| chosen.as_ref().is_none_or(
            |heads| heads[kv_head].iter().any(|&page| page as usize == position / BLOCK_TOKENS),
        );
        let mut kv: Vec<(Vec<f32>, Vec<f32>)> = Vec::new();
        for position in 0..150 {
            let (mut k, mut v) = (numbers(2 * dim, &mut state), numbers(2 * dim, &mut state));
            for kv_head in (0..2).filter(|&kv_head| !reads(kv_head, position)) {
                k[kv_head * dim..][..dim].fill(f32::NAN);
                v[kv_head * dim..][..dim].fill(f32::NAN);
            }
            pool.write_token(&blocks, position, 0, &k, &v);
            // As the pages hold them.
            pool.read_token(&blocks, position, 0, Plane::K, &mut k);
            pool.read_token(&blocks, position, 0, Plane::V, &mut v);
            kv.push((k, v));
        }
        let queries = numbers(positions.len() * heads * dim, &mut state);
        let range = QueryRange { first_row: 0, positions: &positions, blocks: &blocks,
            pages: chosen.as_ref().map(<[_; 2]>::as_slice) };
        let work = AttentionWork {
            shape: AttentionShape { heads, kv_heads: 2, head_dim: dim, window },
            ranges: &[range],
            queries: &queries,
            query_stride: heads * dim,
            pool: &pool,
            layer: 0,
        };
        let mut out = vec![0.0; queries.len()];
        attend(Isa::detect(), &work, &mut out);
        for (row, &position) in positions.iter().enumerate() {
            for head in 0..heads {
                let at = (row * heads + head) * dim;
                let weight = |key: usize| {
                    let behind = window.is_some_and(|window| key + window <= position);
                    if key > position || behind || !reads(head / group, key) {
                        return 0.0;
                    }
                    let k = &kv[key].0[head / group * dim..][..dim];
                    let dot: f64 = queries[at..at + dim].iter().zip(k)
                        .map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    (dot / 4.0).exp()
                };
                let weights: Vec<f64> = (0..150).map(weight).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let expected: f64 = kv.iter().zip(&weights)
                        .filter(|(_, weight)| **weight > 0.0)
                        .map(|((_, v), weight)| f64::from(v[head / group * dim + d]) * weight / total)
                        .sum();
                    prop_assert!((f64::from(out[at + d]) - expected).abs() < 1e-5);
                }
            }
        }
    }
}
