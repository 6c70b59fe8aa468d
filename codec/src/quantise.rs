//! Values to numbers, and the sums that a quantiser follows from, a block of channels at a time.
//!
//! These loops are compiled several times, for the vector units of x86-64, and the best is
//! chosen at run time. They hold nothing but operations that are rounded alike everywhere,
//! so all give the same numbers.

use multiversion::multiversion;

use crate::channels::Quantiser;
use crate::classes::{BASE, ZERO};
use crate::input::InputBlock;
use crate::rans::{LANES, Row};

/// Adding this to a number below 2²² leaves no bit for a fraction, and the number in the
/// low bits.
const SHIFT: f32 = 12_582_912.0;

/// What turns the values of a block of channels into numbers of the finest level.
#[derive(Debug)]
pub(crate) struct Limits {
    per_step: f32,
    offsets: [f32; LANES],
    /// The largest number that the channel's class codes, at the finest level.
    largest: [f32; LANES],
}

impl Limits {
    /// By block.
    pub(crate) fn of(quantiser: &Quantiser) -> Vec<Self> {
        let largest = |&class: &u8| {
            // No refinement would tell a channel that is zero from others.
            if class == ZERO {
                0.0
            } else {
                // What rounds to the largest number of the base.
                f32::from(BASE.largest[usize::from(class)]) * 9.0 + 4.0
            }
        };
        let (offsets, _) = quantiser.offsets.as_chunks();
        let blocks = quantiser.blocks().iter().zip(offsets);
        blocks
            .map(|(classes, &offsets)| Self {
                per_step: 9.0 / quantiser.step,
                offsets,
                largest: classes.each_ref().map(largest),
            })
            .collect()
    }

    /// Whether a value has no number that the class of its lane codes.
    pub(crate) fn is_outlier(&self, lane: usize, value: f32) -> bool {
        let number = rounded((value - self.offsets[lane]) * self.per_step);
        // No number is within any, so this is true of what is none.
        let fits = number.abs() <= self.largest[lane];
        !fits
    }
}

/// Turns rows of a block into numbers of the finest level. Outliers become zero; says whether
/// there was any.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn quantise(values: InputBlock, limits: &Limits, numbers: &mut [Row]) -> bool {
    let mut strays = [0u32; LANES];
    for (values, numbers) in values.rows().zip(numbers) {
        for lane in 0..LANES {
            let number = rounded((values[lane] - limits.offsets[lane]) * limits.per_step);
            // No number is larger than any, so this is false of what is none.
            let fits = number.abs() <= limits.largest[lane];
            strays[lane] |= u32::from(!fits);
            let number = if fits { number } else { 0.0 };
            numbers[lane] = low_half(number);
        }
    }
    strays != [0; LANES]
}

/// Adds rows of a block to the sum and the sum of squares of each channel.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn add_moments(values: InputBlock, sums: &mut [f32; LANES], squares: &mut [f32; LANES]) {
    let (mut of_values, mut of_squares) = (*sums, *squares);
    for values in values.rows() {
        for lane in 0..LANES {
            of_values[lane] += values[lane];
            of_squares[lane] += values[lane] * values[lane];
        }
    }
    (*sums, *squares) = (of_values, of_squares);
}

/// The nearest whole number; for what is out of reach, something out of reach.
#[inline(always)]
fn rounded(value: f32) -> f32 {
    (value + SHIFT) - SHIFT
}

/// A small whole number.
#[inline(always)]
fn low_half(number: f32) -> i16 {
    let [a, b, ..] = (number + SHIFT).to_bits().to_le_bytes();
    i16::from_le_bytes([a, b])
}
