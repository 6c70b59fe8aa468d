//! Values as whole numbers of a step, 8 bits each.

use super::isa::dispatch;

/// The largest number, and minus the smallest.
const MOST: f32 = 127.0;

/// The largest step: as many of it as there can be are finite.
const LARGEST_STEP: f32 = f32::from_bits((f32::MAX / MOST).to_bits() & !SPARE_BITS);

/// Bits of a step that are zero. What is left, 16 bits of precision, times a number of 7 bits is
/// exact in f32.
const SPARE_BITS: u32 = 0xff;

dispatch! {
    /// The step for some values: their largest magnitude is 127 of it, within 2^-15. It is no
    /// number if one of them is none or infinite.
    pub(crate) fn step_of(values: &[f32], step: &mut f32) = step_of_body
}

#[inline(always)]
fn step_of_body(values: &[f32], step: &mut f32) {
    // Of magnitudes the bits order as the numbers do, with what is not finite on top.
    let bits = values
        .iter()
        .fold(0, |most, value| value.abs().to_bits().max(most));
    let largest = f32::from_bits(bits);
    *step = if largest.is_finite() {
        let rounded_up = (largest / MOST).to_bits().next_multiple_of(SPARE_BITS + 1);
        // A step that is not subnormal, so that all numbers of it are exact.
        f32::from_bits(rounded_up).clamp(f32::MIN_POSITIVE, LARGEST_STEP)
    } else {
        f32::NAN
    };
}

dispatch! {
    /// The nearest numbers of steps.
    pub(crate) fn quantise(values: &[f32], step: f32, codes: &mut [u8]) = quantise_body
}

#[inline(always)]
fn quantise_body(values: &[f32], step: f32, codes: &mut [u8]) {
    for (code, value) in codes.iter_mut().zip(values) {
        // Saturates; what is no number becomes zero, and its step tells.
        #[expect(clippy::cast_possible_truncation, reason = "saturates, and fits")]
        let number = (value / step).round_ties_even() as i8;
        *code = number.cast_unsigned();
    }
}

dispatch! {
    /// The values of numbers of steps.
    pub(crate) fn dequantise(codes: &[u8], step: f32, values: &mut [f32]) = dequantise_body
}

#[inline(always)]
fn dequantise_body(codes: &[u8], step: f32, values: &mut [f32]) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value = f32::from(code.cast_signed()) * step;
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
        fn instruction_sets_agree(values in prop::collection::vec(any_value(), 1..70)) {
            let all: Vec<_> = Isa::available().into_iter().map(|isa| {
                let (mut step, mut codes) = (0.0, vec![7; values.len()]);
                let mut back = vec![7.0; values.len()];
                step_of(isa, &values, &mut step);
                quantise(isa, &values, step, &mut codes);
                dequantise(isa, &codes, step, &mut back);
                let back: Vec<u32> = back.into_iter().map(f32::to_bits).collect();
                (step.to_bits(), codes, back)
            }).collect();
            prop_assert!(all.iter().all(|one| *one == all[0]));
        }
    }
}
