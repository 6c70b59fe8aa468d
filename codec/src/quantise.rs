//! Values to numbers, and the sums that a quantiser follows from, a row at a time.
//!
//! These loops are compiled several times, for the vector units of x86-64, and the best is
//! chosen at run time. They hold nothing but operations that are rounded alike everywhere,
//! so all give the same numbers.

use multiversion::multiversion;

use crate::channels::Quantiser;
use crate::classes::{BASE, ZERO};
use crate::rans::{LANES, Row};

/// Adding this to a number below 2²² leaves no bit for a fraction, and the number in the
/// low bits.
const SHIFT: f32 = 12_582_912.0;

/// What turns the values of a row of channels into numbers of the finest level.
#[derive(Debug)]
pub(crate) struct Limits {
    per_step: f32,
    /// By block and lane.
    offsets: Vec<[f32; LANES]>,
    /// The largest number that the channel's class codes, at the finest level.
    largest: Vec<[f32; LANES]>,
}

impl Limits {
    pub(crate) fn of(quantiser: &Quantiser) -> Self {
        let largest = |&class: &u8| {
            // No refinement would tell a channel that is zero from others.
            if class == ZERO {
                0.0
            } else {
                // What rounds to the largest number of the base.
                f32::from(BASE.largest[usize::from(class)]) * 9.0 + 4.0
            }
        };
        let blocks = quantiser.blocks().iter();
        Self {
            per_step: 9.0 / quantiser.step,
            offsets: quantiser.offsets.as_chunks().0.to_vec(),
            largest: blocks.map(|block| block.each_ref().map(largest)).collect(),
        }
    }

    /// Whether a value has no number that its channel's class codes.
    pub(crate) fn is_outlier(&self, channel: usize, value: f32) -> bool {
        let (block, lane) = (channel / LANES, channel % LANES);
        let number = rounded((value - self.offsets[block][lane]) * self.per_step);
        // No number is within any, so this is true of what is none.
        let fits = number.abs() <= self.largest[block][lane];
        !fits
    }
}

/// Turns a row into numbers of the finest level: a row a block of channels, the first and
/// then every `stride` of `numbers`. Outliers become zero; says whether there was any.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn quantise(row: &[f32], limits: &Limits, numbers: &mut [Row], stride: usize) -> bool {
    let mut strays = 0u32;
    let blocks = limits.offsets.iter().zip(&limits.largest);
    let numbers = numbers.iter_mut().step_by(stride);
    let (values, _) = row.as_chunks::<LANES>();
    for ((values, (offsets, largest)), numbers) in values.iter().zip(blocks).zip(numbers) {
        for lane in 0..LANES {
            let number = rounded((values[lane] - offsets[lane]) * limits.per_step);
            // No number is larger than any, so this is false of what is none.
            let fits = number.abs() <= largest[lane];
            strays += u32::from(!fits);
            let number = if fits { number } else { 0.0 };
            numbers[lane] = low_half(number);
        }
    }
    strays > 0
}

/// Adds a row to the sum and the sum of squares of each channel.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn add_moments(row: &[f32], sums: &mut [f32], squares: &mut [f32]) {
    for ((sum, square), &value) in sums.iter_mut().zip(squares).zip(row) {
        *sum += value;
        *square += value * value;
    }
}

/// As [`add_moments`], and the number: of each channel's finite values.
pub(crate) fn add_finite(row: &[f32], counts: &mut [f32], sums: &mut [f32], squares: &mut [f32]) {
    let sums = counts.iter_mut().zip(sums).zip(squares);
    for (((count, sum), square), &value) in sums.zip(row) {
        if value.is_finite() {
            *count += 1.0;
            *sum += value;
            *square += value * value;
        }
    }
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
