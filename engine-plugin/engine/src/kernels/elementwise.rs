//! Operations on one row at a time: norms, activation, rotation.
//!
//! Plain loops over slices, compiled once per instruction set. Results do not
//! depend on which: sums have 16 lanes whatever the registers' width.

use super::isa::dispatch;

dispatch! {
    /// `out = x / sqrt(mean(x²) + eps) · weight`, all of one length.
    pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_body
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = x.mul_add(x, *lane);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = x.mul_add(x, *lane);
    }
    #[expect(clippy::cast_precision_loss, reason = "widths are at most 2^24")]
    let mean = sum_lanes(lanes) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

dispatch! {
    /// RMSNorm of a row in place.
    pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) = rms_norm_in_place_body
}

#[inline(always)]
fn rms_norm_in_place_body(x: &mut [f32], weight: &[f32], eps: f32) {
    let mut copy = [0.0; 512];
    let copy = &mut copy[..x.len()];
    copy.copy_from_slice(x);
    rms_norm_body(copy, weight, eps, x);
}

dispatch! {
    /// `out = silu(gate) · up`, where `gate_up` is the gates, then as many ups.
    pub(crate) fn silu_mul(gate_up: &[f32], out: &mut [f32]) = silu_mul_body
}

#[inline(always)]
fn silu_mul_body(gate_up: &[f32], out: &mut [f32]) {
    let (gates, ups) = gate_up.split_at(out.len());
    for ((out, &gate), &up) in out.iter_mut().zip(gates).zip(ups) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

dispatch! {
    /// Rotates pairs `(i, i + half)` of one head by the angles of its position.
    /// `cos` and `sin` are half as long as `head`.
    pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) = rotate_body
}

#[inline(always)]
fn rotate_body(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((low, high), &cos), &sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}

dispatch! {
    /// Adds `bias` to a row.
    pub(crate) fn add_bias(row: &mut [f32], bias: &[f32]) = add_bias_body
}

#[inline(always)]
fn add_bias_body(row: &mut [f32], bias: &[f32]) {
    for (element, &bias) in row.iter_mut().zip(bias) {
        *element += bias;
    }
}

/// Lanes of a sum.
pub(crate) const LANES: usize = 16;

/// Adds lanes pairwise, in a fixed tree.
#[inline(always)]
pub(super) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest lane. A comparison, not `f32::max`: one instruction per step.
#[inline(always)]
pub(super) fn max_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] = if other > lanes[lane] {
                other
            } else {
                lanes[lane]
            };
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x` to 2 units in the last place, without branches, so that loops over it
/// vectorise. Exactly 1 at 0; exactly 0 below -87.33, `-inf` included.
///
/// Cody–Waite reduction and the polynomial of Cephes' `expf`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// 1.5 · 2^23: adding it rounds to a whole number, left in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const SMALLEST: f32 = -87.33;

    let clamped = x.clamp(SMALLEST, 88.0);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let power = shifted - ROUND;
    let r = power.mul_add(-LN2_LOW, power.mul_add(-LN2_HIGH, clamped));
    let mut y = 1.987_569_1e-4f32;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        0.166_666_65,
        0.500_000_06,
    ] {
        y = y.mul_add(r, coefficient);
    }
    let mantissa = y.mul_add(r * r, r) + 1.0;
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < SMALLEST { 0.0 } else { mantissa * scale }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::Isa;

    /// Next of a sequence of numbers between -1 and 1 (SplitMix64).
    #[expect(clippy::cast_precision_loss, reason = "any noise will do")]
    pub(crate) fn noise(state: &mut u64) -> f32 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    #[test]
    fn exp_is_accurate_and_exact_where_promised() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e9), 0.0);
        for step in -8700..8700i16 {
            let x = f32::from(step) / 100.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.5e-7, "exp({x}): relative error {error}");
        }
    }

    proptest! {
        /// Every instruction set gives the bits of the scalar code.
        #[test]
        fn instruction_sets_agree(len in 1usize..300, seed: u64) {
            let mut state = seed;
            let mut numbers = |count: usize| -> Vec<f32> {
                (0..count).map(|_| 8.0 * noise(&mut state)).collect()
            };
            let (x, weight) = (numbers(len), numbers(len));
            let (gate_up, head) = (numbers(2 * len), numbers(2 * len));
            for isa in Isa::available() {
                let (mut found, mut expected) = (vec![0.0; len], vec![0.0; len]);
                rms_norm(isa, &x, &weight, 1e-5, &mut found);
                rms_norm_body(&x, &weight, 1e-5, &mut expected);
                prop_assert_eq!(&found, &expected);

                silu_mul(isa, &gate_up, &mut found);
                silu_mul_body(&gate_up, &mut expected);
                prop_assert_eq!(&found, &expected);

                let (mut found, mut expected) = (head.clone(), head.clone());
                rotate(isa, &mut found, &x, &weight);
                rotate_body(&mut expected, &x, &weight);
                prop_assert_eq!(&found, &expected);
            }
        }
    }
}
