//! Values as whole numbers of steps, 8 bits each, and an f32 for the step of some of them.

use super::isa::dispatch;

/// The largest number, and minus the smallest.
const MOST: f32 = 127.0;

/// The largest step: as many of it as there can be are finite.
const LARGEST_STEP: f32 = f32::from_bits((f32::MAX / MOST).to_bits() & !SPARE_BITS);

/// Bits of a step that are zero. What is left, 16 bits of precision, times a number of 7 bits is
/// exact in f32.
const SPARE_BITS: u32 = 0xff;

/// Adding this to a number below 2^22 leaves no bit for a fraction, and the number in the low
/// bits.
const SHIFT: f32 = 12_582_912.0;

/// Bytes of a step.
pub(crate) const STEP_BYTES: usize = size_of::<f32>();

dispatch! {
    /// Values to the nearest numbers of steps, `group` values to a step, which stands before
    /// them.
    ///
    /// The largest magnitude of a group is 127 of its steps, within 2^-15. A group with a value
    /// that is none, or infinite, has a step that is no number.
    pub(crate) fn quantise(values: &[f32], group: usize, coded: &mut [u8]) = quantise_body
}

#[inline(always)]
fn quantise_body(values: &[f32], group: usize, coded: &mut [u8]) {
    let coded = coded.chunks_mut(STEP_BYTES + group);
    for (values, coded) in values.chunks(group).zip(coded) {
        let step = step_of(values);
        let (head, codes) = coded.split_at_mut(STEP_BYTES);
        head.copy_from_slice(&step.to_le_bytes());
        for (code, value) in codes.iter_mut().zip(values) {
            // What is no number becomes one here: its step tells.
            #[expect(clippy::manual_clamp, reason = "keeps what is no number")]
            let number = (value / step).max(-MOST).min(MOST);
            [*code, ..] = (number + SHIFT).to_bits().to_le_bytes();
        }
    }
}

#[inline(always)]
fn step_of(values: &[f32]) -> f32 {
    // Of magnitudes the bits order as the numbers do, with what is not finite on top.
    let bits = values
        .iter()
        .fold(0, |most, value| value.abs().to_bits().max(most));
    let largest = f32::from_bits(bits);
    if !largest.is_finite() {
        return f32::NAN;
    }
    let rounded_up = (largest / MOST).to_bits().next_multiple_of(SPARE_BITS + 1);
    // A step that is not subnormal, so that all numbers of it are exact.
    f32::from_bits(rounded_up).clamp(f32::MIN_POSITIVE, LARGEST_STEP)
}

dispatch! {
    /// The values of numbers of steps.
    pub(crate) fn dequantise(coded: &[u8], group: usize, values: &mut [f32]) = dequantise_body
}

#[inline(always)]
fn dequantise_body(coded: &[u8], group: usize, values: &mut [f32]) {
    let coded = coded.chunks(STEP_BYTES + group);
    for (values, coded) in values.chunks_mut(group).zip(coded) {
        let Some((&step, codes)) = coded.split_first_chunk() else {
            return;
        };
        let step = f32::from_le_bytes(step);
        for (value, code) in values.iter_mut().zip(codes) {
            *value = f32::from(code.cast_signed()) * step;
        }
    }
}

dispatch! {
    /// Values to the nearest of bf16, ties to even. What is no number has to be so in its upper
    /// half.
    pub(crate) fn narrow_bf16(values: &[f32], halves: &mut [u16]) = narrow_bf16_body
}

#[inline(always)]
fn narrow_bf16_body(values: &[f32], halves: &mut [u16]) {
    for (half, value) in halves.iter_mut().zip(values) {
        let bits = value.to_bits();
        let [_, _, low, high] = (bits + 0x7fff + (bits >> 16 & 1)).to_le_bytes();
        *half = u16::from_le_bytes([low, high]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::Isa;

    fn any_value() -> impl Strategy<Value = f32> {
        prop_oneof![
            8 => -10.0..10.0f32,
            4 => (-149.0..128.0f32).prop_map(f32::exp2),
            1 => any::<f32>(),
        ]
    }

    proptest! {
        #[test]
        fn instruction_sets_agree(
            values in prop::collection::vec(any_value(), 1..150),
            group in 1..40usize,
        ) {
            let all: Vec<_> = Isa::available().into_iter().map(|isa| {
                let mut coded = vec![7; values.len() + STEP_BYTES * values.len().div_ceil(group)];
                let mut back = vec![7.0; values.len()];
                let mut halves = vec![7; values.len()];
                quantise(isa, &values, group, &mut coded);
                dequantise(isa, &coded, group, &mut back);
                narrow_bf16(isa, &back, &mut halves);
                for (&half, &value) in halves.iter().zip(&back) {
                    let half = half::bf16::from_bits(half);
                    assert!(half == half::bf16::from_f32(value) || value.is_nan() && half.is_nan());
                }
                let back: Vec<u32> = back.into_iter().map(f32::to_bits).collect();
                (coded, back, halves)
            }).collect();
            prop_assert!(all.iter().all(|one| *one == all[0]));
        }
    }
}
