//! Bounds of dot products with the keys in a box.
//!
//! A box of a few pages has, per channel, a lower end and a step, both f16; the pages' own
//! ends are whole numbers of steps, of 8 or 4 bits. So a query is multiplied with the steps once per
//! box, and what is left per page are sums over bytes. Channels are padded to whole
//! [`LANES`] with steps and codes of 0.

use super::Isa;
use super::elementwise::{LANES, exp, max_lanes, sum_lanes};
use super::isa::{Kind, dispatch};
#[cfg(target_arch = "x86_64")]
use super::vector;

/// Rows of codes of a page in whole bytes: lower ends, upper ends, and one more that the
/// digest chooses.
pub(crate) const CODE_ROWS: usize = 3;

/// Tokens of a page.
const TOKENS: usize = 16;

/// Sums of channels that do not wait for each other.
const CHAINS: usize = 4;

/// What is known of `query · key` for all keys in a box, but for a common `base`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Reach {
    /// No product is larger.
    pub(crate) upper: f32,
    /// None is smaller.
    pub(crate) lower: f32,
    /// The product with the third row of codes; with their magnitudes in `third_size`.
    pub(crate) third: f32,
    pub(crate) third_size: f32,
}

/// A query in the units of one box.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Weighed {
    /// The product with the lower ends, to which those of codes are added.
    pub(crate) base: f32,
    /// Products with the farthest ends, above and below `base`.
    pub(crate) above: f32,
    pub(crate) below: f32,
    /// The sum of magnitudes, of which rounding takes a share.
    pub(crate) size: f32,
}

dispatch! {
    /// Multiplies a query with the steps of a box, which is `steps` of them wide. All slices
    /// are equally long, a multiple of [`LANES`].
    pub(crate) fn weigh(
        low: &[u16], step: &[u16], steps: f32, query: &[f32], weights: &mut [f32],
        out: &mut Weighed,
    ) = weigh_body
}

#[inline(always)]
fn weigh_body(
    low: &[u16],
    step: &[u16],
    steps: f32,
    query: &[f32],
    weights: &mut [f32],
    out: &mut Weighed,
) {
    let [mut base, mut above, mut below, mut size] = [[0.0f32; LANES]; 4];
    let chunks = low
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(step.as_chunks::<LANES>().0);
    let queries = query.as_chunks::<LANES>().0.iter();
    let weights = weights.as_chunks_mut::<LANES>().0.iter_mut();
    for (((low, step), query), weights) in chunks.zip(queries).zip(weights) {
        for lane in 0..LANES {
            let (low, step, query) = (widen(low[lane]), widen(step[lane]), query[lane]);
            let weight = query * step;
            let far = weight * steps;
            weights[lane] = weight;
            base[lane] = query.mul_add(low, base[lane]);
            above[lane] += if far > 0.0 { far } else { 0.0 };
            below[lane] += if far < 0.0 { far } else { 0.0 };
            size[lane] += (query * low).abs() + far.abs();
        }
    }
    *out = Weighed {
        base: sum_lanes(base),
        above: sum_lanes(above),
        below: sum_lanes(below),
        size: sum_lanes(size),
    };
}

dispatch! {
    /// Per page, what its codes, `[page][CODE_ROWS][channel]`, say with these weights.
    pub(crate) fn reach(codes: &[u8], weights: &[f32], out: &mut [Reach]) = reach_body
}

#[inline(always)]
fn reach_body(codes: &[u8], weights: &[f32], out: &mut [Reach]) {
    let width = weights.len();
    for (codes, out) in codes.chunks_exact(CODE_ROWS * width).zip(out) {
        let (low, rest) = codes.split_at(width);
        let (high, third) = rest.split_at(width);
        let [mut upper, mut lower, mut mean, mut size] = [[0.0f32; LANES]; 4];
        let ends = low
            .as_chunks::<LANES>()
            .0
            .iter()
            .zip(high.as_chunks::<LANES>().0);
        let others = third
            .as_chunks::<LANES>()
            .0
            .iter()
            .zip(weights.as_chunks::<LANES>().0);
        for ((low, high), (third, weights)) in ends.zip(others) {
            for lane in 0..LANES {
                let weight = weights[lane];
                let a = weight * f32::from(low[lane]);
                let b = weight * f32::from(high[lane]);
                upper[lane] += if a > b { a } else { b };
                lower[lane] += if a > b { b } else { a };
                let third = f32::from(third[lane]);
                mean[lane] = weight.mul_add(third, mean[lane]);
                size[lane] = weight.abs().mul_add(third, size[lane]);
            }
        }
        *out = Reach {
            upper: sum_lanes(upper),
            lower: sum_lanes(lower),
            third: sum_lanes(mean),
            third_size: sum_lanes(size),
        };
    }
}

dispatch! {
    /// As [`reach`], of one page with codes of 4 bits, lower ends in the lower half, for
    /// several queries: `[query][channel]`. What each bit of a token adds goes to `rows`, as long
    /// as `weights`: of the first `coded` channels a quarter of the two ends' difference, then
    /// of the first `twice` of them half of that; `third` is the product with the middle less
    /// the sum of these.
    pub(crate) fn reach_ends(
        codes: &[u8], weights: &[f32], coded: usize, twice: usize, rows: &mut [f32],
        out: &mut [Reach],
    ) = reach_ends_body
}

#[inline(always)]
fn reach_ends_body(
    codes: &[u8],
    weights: &[f32],
    coded: usize,
    twice: usize,
    rows: &mut [f32],
    out: &mut [Reach],
) {
    let width = codes.len();
    let codes = codes.as_chunks::<LANES>().0;
    let queries = weights
        .chunks_exact(width)
        .zip(rows.chunks_exact_mut(width));
    for ((weights, rows), out) in queries.zip(out) {
        let [mut upper, mut lower] = [[0.0f32; LANES]; 2];
        let weights = weights.as_chunks::<LANES>().0.iter();
        let quarters = rows.as_chunks_mut::<LANES>().0.iter_mut();
        for ((codes, weights), quarters) in codes.iter().zip(weights).zip(quarters) {
            for lane in 0..LANES {
                let a = weights[lane] * f32::from(codes[lane] & 15);
                let b = weights[lane] * f32::from(codes[lane] >> 4);
                upper[lane] += if a > b { a } else { b };
                lower[lane] += if a > b { b } else { a };
                quarters[lane] = (b - a) / 4.0;
            }
        }
        let (quarters, rest) = rows.split_at_mut(coded);
        for (row, quarter) in rest.iter_mut().zip(&quarters[..twice]) {
            *row = quarter / 2.0;
        }
        rest[twice..].fill(0.0);
        let mut sum = [0.0f32; LANES];
        for rows in rows.as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                sum[lane] += rows[lane];
            }
        }
        let (upper, lower) = (sum_lanes(upper), sum_lanes(lower));
        *out = Reach {
            upper,
            lower,
            third: f32::midpoint(upper, lower) - sum_lanes(sum),
            third_size: 0.0,
        };
    }
}

/// By query and token of a page, the sum of the query's rows in which the token's bit is set:
/// `signs` has a word a row, with a bit for each token.
pub(crate) fn add_signs(isa: Isa, signs: &[u16], rows: &[f32], out: &mut [[f32; TOKENS]]) {
    match isa.kind() {
        // SAFETY: an `Isa` of this kind exists only after detection.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { add_signs_avx512(signs, rows, out) },
        _ => add_signs_compiled(isa, signs, rows, out),
    }
}

dispatch! {
    fn add_signs_compiled(
        signs: &[u16], rows: &[f32], out: &mut [[f32; TOKENS]],
    ) = add_signs_body
}

#[inline(always)]
fn add_signs_body(signs: &[u16], rows: &[f32], out: &mut [[f32; TOKENS]]) {
    for (rows, out) in rows.chunks_exact(signs.len()).zip(out) {
        let mut sums = [[0.0; TOKENS]; CHAINS];
        let signs = signs.as_chunks::<CHAINS>().0.iter();
        for (signs, rows) in signs.zip(rows.as_chunks::<CHAINS>().0) {
            for ((sums, sign), row) in sums.iter_mut().zip(signs).zip(rows) {
                for (token, sum) in sums.iter_mut().enumerate() {
                    let is_set = (sign >> token) & 1 == 1;
                    *sum += if is_set { *row } else { 0.0 };
                }
            }
        }
        let [a, b, c, d] = sums;
        for token in 0..TOKENS {
            out[token] = (a[token] + b[token]) + (c[token] + d[token]);
        }
    }
}

/// What compilers do not find in [`add_signs_body`]: a token's bit is its lane's mask.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn add_signs_avx512(signs: &[u16], rows: &[f32], out: &mut [[f32; TOKENS]]) {
    let (fours, rest) = out.as_chunks_mut::<4>();
    let (threes, rest) = rest.as_chunks_mut::<3>();
    let (twos, ones) = rest.as_chunks_mut::<2>();
    let rows = add_signs_together(signs, rows, fours);
    let rows = add_signs_together(signs, rows, threes);
    let rows = add_signs_together(signs, rows, twos);
    add_signs_together(signs, rows, ones.as_chunks_mut::<1>().0);
}

/// `N` queries at a time, for each of which a mask is loaded once. Returns what is left.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
fn add_signs_together<'a, const N: usize>(
    signs: &[u16],
    rows: &'a [f32],
    out: &mut [[[f32; TOKENS]; N]],
) -> &'a [f32] {
    use std::arch::x86_64::{_mm512_add_ps, _mm512_mask_add_ps, _mm512_set1_ps, _mm512_setzero_ps};
    let (rows, rest) = rows.split_at(out.len() * N * signs.len());
    for (rows, out) in rows.chunks_exact(N * signs.len()).zip(out) {
        let mut sums = [[_mm512_setzero_ps(); CHAINS]; N];
        let queries: [&[[f32; CHAINS]]; N] =
            std::array::from_fn(|at| rows[at * signs.len()..].as_chunks().0);
        for (at, signs) in signs.as_chunks::<CHAINS>().0.iter().enumerate() {
            for (sums, query) in sums.iter_mut().zip(queries) {
                for ((sum, &sign), &row) in sums.iter_mut().zip(signs).zip(&query[at]) {
                    *sum = _mm512_mask_add_ps(*sum, sign, *sum, _mm512_set1_ps(row));
                }
            }
        }
        for (out, [a, b, c, d]) in out.iter_mut().zip(sums) {
            vector::store(out, _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
        }
    }
    rest
}

dispatch! {
    /// Makes of `third`, by query, the logarithm of the mean weight of the page's tokens, which
    /// have it and twice their sums in their logits.
    pub(crate) fn log_means(sums: &[[f32; TOKENS]], out: &mut [Reach]) = log_means_body
}

#[inline(always)]
fn log_means_body(sums: &[[f32; TOKENS]], out: &mut [Reach]) {
    for (sums, out) in sums.iter().zip(out) {
        let mut logits = [0.0; TOKENS];
        for (logit, &sum) in logits.iter_mut().zip(sums) {
            *logit = 2.0f32.mul_add(sum, out.third);
        }
        let top = max_lanes(logits);
        let mut weights = [0.0; TOKENS];
        for (weight, &logit) in weights.iter_mut().zip(&logits) {
            *weight = exp(logit - top);
        }
        #[expect(clippy::cast_precision_loss, reason = "a page has few tokens")]
        let tokens = TOKENS as f32;
        out.third = top + (sum_lanes(weights) / tokens).ln();
    }
}

dispatch! {
    /// The logarithm of the sum of exponentials.
    pub(crate) fn log_sum(logits: &[f32], out: &mut f32) = log_sum_body
}

#[inline(always)]
fn log_sum_body(logits: &[f32], out: &mut f32) {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut tops = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            tops[lane] = if chunk[lane] > tops[lane] {
                chunk[lane]
            } else {
                tops[lane]
            };
        }
    }
    let top = rest.iter().copied().fold(max_lanes(tops), f32::max);
    let mut sums = [0.0; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += exp(chunk[lane] - top);
        }
    }
    let rest: f32 = rest.iter().map(|logit| exp(logit - top)).sum();
    *out = top + (sum_lanes(sums) + rest).ln();
}

dispatch! {
    /// Adds to each score the weight of its logit.
    pub(crate) fn add_weights(logits: &[f32], total: f32, scores: &mut [f32]) = add_weights_body
}

#[inline(always)]
fn add_weights_body(logits: &[f32], total: f32, scores: &mut [f32]) {
    for (score, logit) in scores.iter_mut().zip(logits) {
        *score += exp(logit - total);
    }
}

dispatch! {
    /// Raises each score to the weight of its logit.
    pub(crate) fn max_weights(logits: &[f32], total: f32, scores: &mut [f32]) = max_weights_body
}

#[inline(always)]
fn max_weights_body(logits: &[f32], total: f32, scores: &mut [f32]) {
    for (score, logit) in scores.iter_mut().zip(logits) {
        let weight = exp(logit - total);
        *score = if weight > *score { weight } else { *score };
    }
}

dispatch! {
    /// Per key, `[key][channel]`, its product with the query.
    pub(crate) fn dots(keys: &[f32], query: &[f32], out: &mut [f32]) = dots_body
}

#[inline(always)]
fn dots_body(keys: &[f32], query: &[f32], out: &mut [f32]) {
    for (key, out) in keys.chunks_exact(query.len()).zip(out) {
        let mut sums = [0.0f32; LANES];
        let (chunks, rest) = key.as_chunks::<LANES>();
        let (queries, query_rest) = query.as_chunks::<LANES>();
        for (key, query) in chunks.iter().zip(queries) {
            for ((sum, key), query) in sums.iter_mut().zip(key).zip(query) {
                *sum = key.mul_add(*query, *sum);
            }
        }
        for ((sum, key), query) in sums.iter_mut().zip(rest).zip(query_rest) {
            *sum = key.mul_add(*query, *sum);
        }
        *out = sum_lanes(sums);
    }
}

/// A finite f16 as f32, without branches: loops over it vectorise.
#[inline(always)]
pub(crate) fn widen(bits: u16) -> f32 {
    /// 2^112: between the biases of the exponents.
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * BIAS;
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::super::elementwise::tests::noise;
    use super::*;

    #[test]
    fn every_finite_f16_is_widened() {
        for bits in (0..=u16::MAX).filter(|&bits| f16::from_bits(bits).is_finite()) {
            let expected = f16::from_bits(bits).to_f32();
            assert_eq!(widen(bits).to_bits(), expected.to_bits(), "{bits:#x}");
        }
    }

    proptest! {
        /// Every instruction set gives the bits of the scalar code.
        #[test]
        fn instruction_sets_agree(
            chunks in 1usize..9, pages in 0usize..9, count in 1usize..9, seed: u64,
        ) {
            let (mut state, width) = (seed, chunks * LANES);
            let mut floats = |count: usize| -> Vec<f32> {
                (0..count).map(|_| 4.0 * noise(&mut state)).collect()
            };
            let query = floats(width);
            let bits = |values: Vec<f32>| -> Vec<u16> {
                values.into_iter().map(|value| f16::from_f32(value).to_bits()).collect()
            };
            let (low, step) = (bits(floats(width)), bits(floats(width)));
            let codes: Vec<u8> = floats(pages * CODE_ROWS * width)
                .into_iter().map(|value| value.to_bits().to_le_bytes()[1]).collect();
            let coded = width - width / (2 + pages);
            let queries = floats(count * width);
            let signs: Vec<u16> = floats(width)
                .into_iter().map(|value| f16::from_f32(value).to_bits()).collect();
            let one: Vec<u8> = floats(width)
                .into_iter().map(|value| value.to_bits().to_le_bytes()[1]).collect();
            let run = |isa: Option<Isa>| {
                let mut weights = vec![0.0; width];
                let mut weighed = Weighed::default();
                let mut reached = vec![Reach::default(); pages];
                let mut ends = vec![Reach::default(); count];
                let (mut rows, mut sums) = (vec![0.0; count * width], vec![[0.0; TOKENS]; count]);
                match isa {
                    Some(isa) => {
                        weigh(isa, &low, &step, 255.0, &query, &mut weights, &mut weighed);
                        reach(isa, &codes, &weights, &mut reached);
                        reach_ends(isa, &one, &queries, coded, width - coded, &mut rows, &mut ends);
                        add_signs(isa, &signs, &rows, &mut sums);
                    }
                    None => {
                        weigh_body(&low, &step, 255.0, &query, &mut weights, &mut weighed);
                        reach_body(&codes, &weights, &mut reached);
                        reach_ends_body(&one, &queries, coded, width - coded, &mut rows, &mut ends);
                        add_signs_body(&signs, &rows, &mut sums);
                    }
                }
                let (mut dot, mut sum) = ([0.0; 1], 0.0);
                let [mut added, mut raised] = [(); 2].map(|()| vec![0.1; width]);
                match isa {
                    Some(isa) => {
                        log_means(isa, &sums, &mut ends);
                        dots(isa, &weights, &query, &mut dot);
                        log_sum(isa, &queries[3..], &mut sum);
                        add_weights(isa, &query, 1.5, &mut added);
                        max_weights(isa, &query, 1.5, &mut raised);
                    }
                    None => {
                        log_means_body(&sums, &mut ends);
                        dots_body(&weights, &query, &mut dot);
                        log_sum_body(&queries[3..], &mut sum);
                        add_weights_body(&query, 1.5, &mut added);
                        max_weights_body(&query, 1.5, &mut raised);
                    }
                }
                (weights, weighed, reached, ends, (rows, sums, dot), (sum, added, raised))
            };
            for isa in Isa::available() {
                prop_assert_eq!(run(Some(isa)), run(None));
            }
        }
    }
}
