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

/// Codes of 2 bits in a word.
pub(crate) const CODES: usize = 16;

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
    /// Sum over channels of the squared difference of the two ends' products.
    pub(crate) spread: f32,
    /// The same, of each channel its share.
    pub(crate) part: f32,
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
        let [mut upper, mut lower, mut mean, mut spread, mut size] = [[0.0f32; LANES]; 5];
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
                spread[lane] = (b - a).mul_add(b - a, spread[lane]);
            }
        }
        *out = Reach {
            upper: sum_lanes(upper),
            lower: sum_lanes(lower),
            third: sum_lanes(mean),
            third_size: sum_lanes(size),
            spread: sum_lanes(spread),
            part: 0.0,
        };
    }
}

dispatch! {
    /// As [`reach`], of codes of 4 bits, lower ends in the lower half: `[page][channel]`.
    /// Without a third row.
    pub(crate) fn reach_packed(
        codes: &[u8], weights: &[f32], shares: &[f32], out: &mut [Reach],
    ) = reach_packed_body
}

#[inline(always)]
fn reach_packed_body(codes: &[u8], weights: &[f32], shares: &[f32], out: &mut [Reach]) {
    let shares = shares.as_chunks::<LANES>().0;
    let weights = weights.as_chunks::<LANES>().0;
    for (codes, out) in codes.chunks_exact(LANES * weights.len()).zip(out) {
        let [mut upper, mut lower, mut spread, mut part] = [[0.0f32; LANES]; 4];
        let codes = codes.as_chunks::<LANES>().0.iter();
        for ((codes, weights), shares) in codes.zip(weights).zip(shares) {
            for lane in 0..LANES {
                let a = weights[lane] * f32::from(codes[lane] & 15);
                let b = weights[lane] * f32::from(codes[lane] >> 4);
                upper[lane] += if a > b { a } else { b };
                lower[lane] += if a > b { b } else { a };
                let square = (b - a) * (b - a);
                spread[lane] += square;
                part[lane] = shares[lane].mul_add(square, part[lane]);
            }
        }
        *out = Reach {
            upper: sum_lanes(upper),
            lower: sum_lanes(lower),
            spread: sum_lanes(spread),
            part: sum_lanes(part),
            ..Reach::default()
        };
    }
}

/// Adds to each token of a page its codes, from their middle, times the channels' weights.
/// Codes have 2 bits; a word has those of a token in 16 channels, the first lowest:
/// `[16 channels][token]`.
pub(crate) fn add_tokens(isa: Isa, words: &[u32], weights: &[f32], out: &mut [f32; TOKENS]) {
    match isa.kind() {
        // SAFETY: an `Isa` of this kind exists only after detection.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { add_tokens_avx512(words, weights, out) },
        _ => add_tokens_compiled(isa, words, weights, out),
    }
}

dispatch! {
    fn add_tokens_compiled(
        words: &[u32], weights: &[f32], out: &mut [f32; TOKENS],
    ) = add_tokens_body
}

/// What compilers do not find in [`add_tokens_body`]: one token a lane.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn add_tokens_avx512(words: &[u32], weights: &[f32], out: &mut [f32; TOKENS]) {
    use std::arch::x86_64::{
        _mm512_and_si512, _mm512_castps_si512, _mm512_cvtepi32_ps, _mm512_fmadd_ps,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_srli_epi32, _mm512_sub_ps,
    };
    let (two_bits, middle) = (_mm512_set1_epi32(3), _mm512_set1_ps(1.5));
    let mut sums = vector::load(out);
    let blocks = words.as_chunks::<TOKENS>().0.iter();
    for (words, weights) in blocks.zip(weights.chunks(CODES)) {
        let mut left = _mm512_castps_si512(vector::load(&words.map(f32::from_bits)));
        for &weight in weights {
            let code = _mm512_cvtepi32_ps(_mm512_and_si512(left, two_bits));
            sums = _mm512_fmadd_ps(_mm512_sub_ps(code, middle), _mm512_set1_ps(weight), sums);
            left = _mm512_srli_epi32::<2>(left);
        }
    }
    vector::store(out, sums);
}

#[inline(always)]
fn add_tokens_body(words: &[u32], weights: &[f32], out: &mut [f32; TOKENS]) {
    let blocks = words.as_chunks::<TOKENS>().0.iter();
    for (words, weights) in blocks.zip(weights.chunks(CODES)) {
        let (mut left, mut sums) = (*words, *out);
        for &weight in weights {
            for lane in 0..TOKENS {
                #[expect(clippy::cast_precision_loss, reason = "two bits")]
                let code = (left[lane] & 3).cast_signed() as f32 - 1.5;
                sums[lane] = code.mul_add(weight, sums[lane]);
                left[lane] >>= 2;
            }
        }
        *out = sums;
    }
}

dispatch! {
    /// The logarithm of the mean of exponentials.
    pub(crate) fn log_mean(logits: &[f32; TOKENS], out: &mut f32) = log_mean_body
}

#[inline(always)]
fn log_mean_body(logits: &[f32; TOKENS], out: &mut f32) {
    let top = max_lanes(*logits);
    let mut weights = [0.0; TOKENS];
    for (weight, &logit) in weights.iter_mut().zip(logits) {
        *weight = exp(logit - top);
    }
    #[expect(clippy::cast_precision_loss, reason = "a page has few tokens")]
    let tokens = TOKENS as f32;
    *out = top + (sum_lanes(weights) / tokens).ln();
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
        fn instruction_sets_agree(chunks in 1usize..9, pages in 0usize..9, seed: u64) {
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
            let words: Vec<u32> = floats(width).into_iter().map(f32::to_bits).collect();
            let run = |isa: Option<Isa>| {
                let mut weights = vec![0.0; width];
                let mut weighed = Weighed::default();
                let mut reached = vec![Reach::default(); pages];
                let mut packed = vec![Reach::default(); pages];
                let mut tokens = [0.5; TOKENS];
                match isa {
                    Some(isa) => {
                        weigh(isa, &low, &step, 255.0, &query, &mut weights, &mut weighed);
                        reach(isa, &codes, &weights, &mut reached);
                        reach_packed(isa, &codes, &weights, &query, &mut packed);
                        add_tokens(isa, &words, &weights, &mut tokens);
                    }
                    None => {
                        weigh_body(&low, &step, 255.0, &query, &mut weights, &mut weighed);
                        reach_body(&codes, &weights, &mut reached);
                        reach_packed_body(&codes, &weights, &query, &mut packed);
                        add_tokens_body(&words, &weights, &mut tokens);
                    }
                }
                let (mut mean, mut dot) = (0.0, [0.0; 1]);
                match isa {
                    Some(isa) => {
                        log_mean(isa, &tokens, &mut mean);
                        dots(isa, &weights, &query, &mut dot);
                    }
                    None => {
                        log_mean_body(&tokens, &mut mean);
                        dots_body(&weights, &query, &mut dot);
                    }
                }
                (weights, weighed, reached, packed, (tokens, mean, dot))
            };
            for isa in Isa::available() {
                prop_assert_eq!(run(Some(isa)), run(None));
            }
        }
    }
}
