//! Rows of numbers times a matrix, a few rows at a time.
//!
//! Sums run over the inputs in order, with one rounding a term, whatever the CPU, so that
//! all give the same numbers. Inputs that are zero in all rows at hand are passed over, which
//! is most of them at coarse levels.

use multiversion::multiversion;

use crate::cell::MAX_WIDTH;
use crate::rans::LANES;

/// Rows at a time.
const ROWS: usize = 4;

/// Sets each row of `out` to `initial` plus the row of `inputs` times `matrix`, which has a
/// row an input. All have as many columns as `initial`, a multiple of the lanes.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn multiply(inputs: &[f32], matrix: &[f32], initial: &[f32], out: &mut [f32]) {
    let width = initial.len();
    let mut used = [(0, [0.0; ROWS]); MAX_WIDTH];
    let rows = inputs.chunks(ROWS * width);
    for (inputs, out) in rows.zip(out.chunks_mut(ROWS * width)) {
        let mut count = 0;
        for input in 0..width {
            let mut values = [0.0; ROWS];
            for (value, row) in values.iter_mut().zip(inputs.chunks_exact(width)) {
                *value = row[input];
            }
            used[count] = (input, values);
            // What is no number is not equal to zero either.
            count += usize::from(values != [0.0; ROWS]);
        }
        let (initial, _) = initial.as_chunks::<LANES>();
        for (block, initial) in initial.iter().enumerate() {
            let column = block * LANES;
            let [mut a, mut b, mut c, mut d] = [*initial; ROWS];
            for &(input, values) in &used[..count] {
                let at = input * width + column;
                let terms = matrix[at..].first_chunk::<LANES>();
                let terms = terms.expect("a row of the matrix for every input");
                for lane in 0..LANES {
                    a[lane] = values[0].mul_add(terms[lane], a[lane]);
                    b[lane] = values[1].mul_add(terms[lane], b[lane]);
                    c[lane] = values[2].mul_add(terms[lane], c[lane]);
                    d[lane] = values[3].mul_add(terms[lane], d[lane]);
                }
            }
            for (out, sums) in out.chunks_exact_mut(width).zip([a, b, c, d]) {
                out[column..column + LANES].copy_from_slice(&sums);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sums_of_rows_of_the_matrix() {
        let width = 64;
        let number = |at: usize| f32::from(u8::try_from(at * 7 % 23).unwrap()) - 11.0;
        let matrix: Vec<f32> = (0..width * width).map(number).collect();
        let initial: Vec<f32> = (0..width).map(number).collect();
        for rows in [0, 1, 4, 7] {
            let sparse = |at: usize| if at % 5 < 2 { number(at * 3) } else { 0.0 };
            let inputs: Vec<f32> = (0..rows * width).map(sparse).collect();
            let mut out = vec![9.0; rows * width];
            multiply(&inputs, &matrix, &initial, &mut out);
            for (row, out) in inputs.chunks(width).zip(out.chunks(width)) {
                for (column, &out) in out.iter().enumerate() {
                    let mut sum = initial[column];
                    for (input, value) in row.iter().enumerate() {
                        sum = value.mul_add(matrix[input * width + column], sum);
                    }
                    assert_eq!(out.to_bits(), sum.to_bits());
                }
            }
        }
    }
}
