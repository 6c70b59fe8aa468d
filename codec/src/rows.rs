//! The arithmetic of cells, a row at a time.
//!
//! These loops are compiled several times, for the vector units of x86-64, and the best is
//! chosen at run time. They hold nothing but operations that are rounded alike everywhere,
//! so all give the same numbers.

use multiversion::multiversion;

use crate::classes::LARGEST;

/// Adding this to a number below 2²² leaves no bit for a fraction, and the number in the
/// low bits.
const SHIFT: f32 = 12_582_912.0;
const LIMIT: f32 = 4_194_304.0;
const THIRD: f32 = 1.0 / 3.0;

/// What the encoder knows of the channels of a row.
#[derive(Debug)]
pub(crate) struct Channels {
    pub(crate) offsets: Vec<f32>,
    /// The largest base number that the channel's class has.
    pub(crate) largest: Vec<f32>,
    /// The largest number of the finest level.
    pub(crate) largest_finest: Vec<f32>,
    /// The first refinement table, by level.
    pub(crate) tables: [Vec<u8>; 2],
    /// Distances from zero that its refinement tables tell apart, less one.
    pub(crate) distances: Vec<u8>,
}

/// Where the symbols of a row go, and the tables of its refinements.
#[derive(Debug)]
pub(crate) struct Symbols<'a> {
    pub(crate) base: &'a mut [u8],
    pub(crate) thirds: [&'a mut [u8]; 2],
    pub(crate) tables: [&'a mut [u8]; 2],
}

/// Turns a row into symbols. What a class has no symbol for becomes zero; says whether
/// there was any such value.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn split<'a>(
    row: &[f32],
    per_step: f32,
    channels: &Channels,
    out: &mut Symbols<'a>,
) -> bool {
    let n = row.len();
    let (offsets, largest) = (&channels.offsets[..n], &channels.largest[..n]);
    let finest_of = &channels.largest_finest[..n];
    let distances = &channels.distances[..n];
    let [first_a, first_b] = &channels.tables;
    let (first_a, first_b) = (&first_a[..n], &first_b[..n]);
    let base = &mut out.base[..n];
    let [third_a, third_b] = &mut out.thirds;
    let (third_a, third_b) = (&mut third_a[..n], &mut third_b[..n]);
    let [table_a, table_b] = &mut out.tables;
    let (table_a, table_b) = (&mut table_a[..n], &mut table_b[..n]);
    let mut strays = 0u32;
    for c in 0..n {
        let exact = (row[c] - offsets[c]) * per_step;
        let finest = rounded(exact);
        let middle = rounded(finest * THIRD);
        let coarse = rounded(middle * THIRD);
        // No number is larger than any, so this is false of what is none.
        let fits = coarse.abs() <= largest[c] && finest.abs() <= finest_of[c];
        strays += u32::from(!fits);
        let (coarse, middle, finest) = if fits {
            (coarse, middle, finest)
        } else {
            (0.0, 0.0, 0.0)
        };
        base[c] = low_byte(coarse + SYMBOL_OF_ZERO);
        third_a[c] = third(coarse, middle);
        third_b[c] = third(middle, finest);
        let most = f32::from(distances[c]);
        table_a[c] = first_a[c].wrapping_add(low_byte(coarse.abs().min(most)));
        table_b[c] = first_b[c].wrapping_add(low_byte(middle.abs().min(most)));
    }
    strays > 0
}

/// Adds a row to the number, the sum and the sum of squares of each channel's finite values.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn add_moments(row: &[f32], counts: &mut [f32], sums: &mut [f32], squares: &mut [f32]) {
    let sums = counts.iter_mut().zip(sums).zip(squares);
    for (((count, sum), squares), &value) in sums.zip(row) {
        let (one, value) = if value.abs() < f32::INFINITY {
            (1.0, value)
        } else {
            (0.0, 0.0)
        };
        *count += one;
        *sum += value;
        *squares += value * value;
    }
}

/// Whether a value is one that [`split`] makes zero.
pub(crate) fn is_stray(value: f32, per_step: f32, channels: &Channels, channel: usize) -> bool {
    let finest = rounded((value - channels.offsets[channel]) * per_step);
    let coarse = rounded(rounded(finest * THIRD) * THIRD);
    let fits = coarse.abs() <= channels.largest[channel]
        && finest.abs() <= channels.largest_finest[channel];
    !fits
}

/// The values of base symbols.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn values_of_symbols(symbols: &[u8], step: f32, offsets: &[f32], row: &mut [f32]) {
    for ((value, &symbol), &offset) in row.iter_mut().zip(symbols).zip(offsets) {
        *value = (f32::from(symbol) - SYMBOL_OF_ZERO) * step + offset;
    }
}

/// The values of numbers.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn values_of_numbers(numbers: &[i16], step: f32, offsets: &[f32], row: &mut [f32]) {
    for ((value, &number), &offset) in row.iter_mut().zip(numbers).zip(offsets) {
        *value = f32::from(number) * step + offset;
    }
}

/// Base symbols as numbers.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn numbers_of_symbols(symbols: &[u8], numbers: &mut [i16]) {
    for (number, &symbol) in numbers.iter_mut().zip(symbols) {
        *number = i16::from(symbol) - NUMBER_OF_ZERO;
    }
}

/// The refinement tables of a row of numbers.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn tables_of_numbers(
    numbers: &[i16],
    first: &[u8],
    distances: &[u8],
    tables: &mut [u8],
) {
    let of = numbers.iter().zip(first).zip(distances);
    for (table, ((&number, &first), &most)) in tables.iter_mut().zip(of) {
        let distance = number.unsigned_abs().min(u16::from(most));
        let [distance, _] = distance.to_le_bytes();
        *table = first.wrapping_add(distance);
    }
}

/// Numbers of the next level from their thirds.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn refine(numbers: &mut [i16], thirds: &[u8]) {
    for (number, &third) in numbers.iter_mut().zip(thirds) {
        let third = i16::from(third) - 1;
        let sign = (*number >> 15) | 1;
        *number = 3 * *number + sign * third;
    }
}

/// Turns pairs of values by angles given as cosine and sine: `first[i]` and `second[i]`.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn turn(first: &mut [f32], second: &mut [f32], cos: &[f32], sin: &[f32]) {
    let pairs = first.iter_mut().zip(second).zip(cos.iter().zip(sin));
    for ((a, b), (&cos, &sin)) in pairs {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// The nearest whole number; for what is out of reach, or none, no number.
#[inline(always)]
fn rounded(value: f32) -> f32 {
    let near = (value + SHIFT) - SHIFT;
    if value.abs() < LIMIT { near } else { f32::NAN }
}

/// The lowest byte of a whole number from 0 on.
#[inline(always)]
fn low_byte(number: f32) -> u8 {
    let [low, ..] = (number + SHIFT).to_bits().to_le_bytes();
    low
}

/// Where the finer number lies in the step of the coarser one: 0 towards zero, 2 away.
#[inline(always)]
fn third(coarser: f32, finer: f32) -> u8 {
    let third = finer - 3.0 * coarser;
    let away = if coarser < 0.0 { -third } else { third };
    low_byte(away + 1.0)
}

#[expect(clippy::cast_precision_loss, reason = "63")]
const SYMBOL_OF_ZERO: f32 = LARGEST as f32;
#[expect(clippy::cast_possible_truncation, reason = "63")]
const NUMBER_OF_ZERO: i16 = LARGEST as i16;
