use proptest::prelude::*;

use super::super::elementwise::tests::noise;
use super::*;

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
