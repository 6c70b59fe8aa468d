//! The three inner loops of attention in AVX-512; scalar twins beside them.

use std::arch::x86_64::{
    __m512, _mm512_castpd_ps, _mm512_castps_pd, _mm512_fmadd_ps, _mm512_mul_ps, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_unpackhi_pd, _mm512_unpackhi_ps,
    _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use super::{KEY_TILE, ROW_BLOCK};
use crate::kernels::vector::{LANES, load, store};

/// Registers across a tile of keys.
const WIDTH: usize = KEY_TILE / LANES;

/// See [`super::transpose`]. `dim` is a multiple of [`LANES`].
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: &[f32], dim: usize, out: &mut [f32]) {
    for start in (0..dim).step_by(LANES) {
        let mut square = [_mm512_setzero_ps(); LANES];
        for (token, register) in square.iter_mut().enumerate() {
            *register = load(&rows[token * dim + start..].as_chunks().0[0]);
        }
        for (d, register) in transpose_square(square).into_iter().enumerate() {
            store(
                &mut out[(start + d) * KEY_TILE..].as_chunks_mut().0[0],
                register,
            );
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn transpose_square(r: [__m512; LANES]) -> [__m512; LANES] {
    let zero = _mm512_setzero_ps();
    // Pairs of rows, then fours: lane L of `fours[4g + i]` becomes column
    // 4L + i of rows 4g..4g + 4.
    let mut pairs = [zero; LANES];
    for i in 0..LANES / 2 {
        pairs[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let mut fours = [zero; LANES];
    for g in 0..4 {
        for half in 0..2 {
            let a = _mm512_castps_pd(pairs[4 * g + half]);
            let b = _mm512_castps_pd(pairs[4 * g + 2 + half]);
            fours[4 * g + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[4 * g + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // Gather each column's four lanes from the four groups.
    let mut columns = [zero; LANES];
    for i in 0..4 {
        let even_low = _mm512_shuffle_f32x4::<0x88>(fours[i], fours[4 + i]);
        let odd_low = _mm512_shuffle_f32x4::<0xdd>(fours[i], fours[4 + i]);
        let even_high = _mm512_shuffle_f32x4::<0x88>(fours[8 + i], fours[12 + i]);
        let odd_high = _mm512_shuffle_f32x4::<0xdd>(fours[8 + i], fours[12 + i]);
        columns[i] = _mm512_shuffle_f32x4::<0x88>(even_low, even_high);
        columns[4 + i] = _mm512_shuffle_f32x4::<0x88>(odd_low, odd_high);
        columns[8 + i] = _mm512_shuffle_f32x4::<0xdd>(even_low, even_high);
        columns[12 + i] = _mm512_shuffle_f32x4::<0xdd>(odd_low, odd_high);
    }
    columns
}

/// See [`super::score_rows`].
#[target_feature(enable = "avx512f")]
pub(super) fn score_rows(
    queries: &[f32],
    dim: usize,
    keys: &[f32],
    scores: &mut [[f32; KEY_TILE]],
) {
    match scores.len() {
        1 => score_exactly::<1>(queries, dim, keys, scores),
        2 => score_exactly::<2>(queries, dim, keys, scores),
        3 => score_exactly::<3>(queries, dim, keys, scores),
        4 => score_exactly::<4>(queries, dim, keys, scores),
        5 => score_exactly::<5>(queries, dim, keys, scores),
        _ => score_exactly::<ROW_BLOCK>(queries, dim, keys, scores),
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn score_exactly<const ROWS: usize>(
    queries: &[f32],
    dim: usize,
    keys: &[f32],
    scores: &mut [[f32; KEY_TILE]],
) {
    let queries: [&[f32]; ROWS] = std::array::from_fn(|row| &queries[row * dim..][..dim]);
    let columns = &keys.as_chunks::<KEY_TILE>().0[..dim];
    let mut sums = [[_mm512_setzero_ps(); WIDTH]; ROWS];
    for (d, column) in columns.iter().enumerate() {
        let lanes = column.as_chunks::<LANES>().0;
        let keys = [
            load(&lanes[0]),
            load(&lanes[1]),
            load(&lanes[2]),
            load(&lanes[3]),
        ];
        for row in 0..ROWS {
            let query = _mm512_set1_ps(queries[row][d]);
            for lane in 0..WIDTH {
                sums[row][lane] = _mm512_fmadd_ps(keys[lane], query, sums[row][lane]);
            }
        }
    }
    for (scores, sums) in scores.iter_mut().zip(sums) {
        for (scores, sum) in scores.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
            store(scores, sum);
        }
    }
}

/// See [`super::add_values`]. `padded` is a multiple of [`LANES`].
#[target_feature(enable = "avx512f")]
pub(super) fn add_values(
    weights: &[[f32; KEY_TILE]; ROW_BLOCK],
    rescale: &[f32; ROW_BLOCK],
    tokens: usize,
    values: &[f32],
    padded: usize,
    sums: &mut [f32],
) {
    let rows = sums.len() / padded;
    let mut start = 0;
    while start < padded {
        let wide = start + 4 * LANES <= padded;
        let mut row = 0;
        while row < rows {
            let tile = Tile {
                weights: &weights[row..],
                rescale: &rescale[row..],
                tokens,
                values,
                padded,
                start,
            };
            let sums = &mut sums[row * padded..];
            row += match (rows - row, wide) {
                (ROW_BLOCK.., true) => tile.add::<ROW_BLOCK, 4>(sums),
                (4.., true) => tile.add::<4, 4>(sums),
                (2.., true) => tile.add::<2, 4>(sums),
                (_, true) => tile.add::<1, 4>(sums),
                (ROW_BLOCK.., false) => tile.add::<ROW_BLOCK, 1>(sums),
                (_, false) => tile.add::<1, 1>(sums),
            };
        }
        start += if wide { 4 * LANES } else { LANES };
    }
}

/// Some rows and some columns of [`add_values`].
#[derive(Clone, Copy)]
struct Tile<'a> {
    weights: &'a [[f32; KEY_TILE]],
    rescale: &'a [f32],
    tokens: usize,
    values: &'a [f32],
    padded: usize,
    /// First column.
    start: usize,
}

impl Tile<'_> {
    /// Adds to `ROWS` rows and `16 · WIDTH` columns; returns `ROWS`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn add<const ROWS: usize, const WIDTH: usize>(self, sums: &mut [f32]) -> usize {
        let Self {
            weights,
            rescale,
            tokens,
            values,
            padded,
            start,
        } = self;
        let weights: [&[f32]; ROWS] = std::array::from_fn(|row| &weights[row][..tokens]);
        let mut totals = [[_mm512_setzero_ps(); WIDTH]; ROWS];
        for row in 0..ROWS {
            let from = sums[row * padded + start..].as_chunks::<LANES>().0;
            for lane in 0..WIDTH {
                let rescale = _mm512_set1_ps(rescale[row]);
                totals[row][lane] = _mm512_mul_ps(load(&from[lane]), rescale);
            }
        }
        for (token, values) in values.chunks_exact(padded).take(tokens).enumerate() {
            let values = &values[start..].as_chunks::<LANES>().0[..WIDTH];
            for row in 0..ROWS {
                let weight = _mm512_set1_ps(weights[row][token]);
                for lane in 0..WIDTH {
                    totals[row][lane] =
                        _mm512_fmadd_ps(load(&values[lane]), weight, totals[row][lane]);
                }
            }
        }
        for row in 0..ROWS {
            let to = sums[row * padded + start..].as_chunks_mut::<LANES>().0;
            for lane in 0..WIDTH {
                store(&mut to[lane], totals[row][lane]);
            }
        }
        ROWS
    }
}
