//! Rows of numbers times a matrix, a few rows at a time.
//!
//! Sums run over the inputs in order, with one rounding a term, whatever the CPU, so that
//! all give the same numbers. Inputs that are zero in all rows at hand are passed over, which
//! is most of them at coarse levels.

use multiversion::multiversion;

/// Rows at a time, and columns: as many sums as there are registers for.
const ROWS: usize = 6;
const COLUMNS: usize = 16;

/// An input, and its values in a few rows.
type Used = (usize, [f32; ROWS]);

/// Sets each row of `out` to `initial` plus the row of `inputs` times `matrix`, which has a
/// row an input. All have as many columns as `initial`, a multiple of the lanes.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn multiply(inputs: &[f32], matrix: &[f32], initial: &[f32], out: &mut [f32]) {
    let width = initial.len();
    let groups = inputs.len().div_ceil(ROWS * width);
    let mut used = vec![(0, [0.0; ROWS]); groups * width];
    let mut count = 0;
    let mut ends = Vec::new();
    let nothing = vec![0.0; width];
    for inputs in inputs.chunks(ROWS * width) {
        let mut rows = [nothing.as_slice(); ROWS];
        for (row, inputs) in rows.iter_mut().zip(inputs.chunks_exact(width)) {
            *row = inputs;
        }
        let rows = rows.map(|row| &row[..width]);
        for input in 0..width {
            let values = rows.map(|row| row[input]);
            // All but the sign: what is no number is not zero either.
            let bits = values
                .iter()
                .fold(0, |bits, value| bits | value.to_bits() << 1);
            used[count] = (input, values);
            count += usize::from(bits != 0);
        }
        ends.push(count);
    }
    // By columns, so that those of the matrix stay in the nearest cache for all rows.
    let mut panel = vec![[0.0; COLUMNS]; width];
    let (initial, _) = initial.as_chunks();
    for (block, initial) in initial.iter().enumerate() {
        let column = block * COLUMNS;
        for (terms, row) in panel.iter_mut().zip(matrix.chunks_exact(width)) {
            terms.copy_from_slice(&row[column..column + COLUMNS]);
        }
        let mut start = 0;
        for (out, &end) in out.chunks_mut(ROWS * width).zip(&ends) {
            let sums = sums(&used[start..end], &panel, initial);
            for (out, sums) in out.chunks_exact_mut(width).zip(&sums) {
                out[column..column + COLUMNS].copy_from_slice(sums);
            }
            start = end;
        }
    }
}

/// Of some columns.
#[inline(always)]
fn sums(
    used: &[Used],
    panel: &[[f32; COLUMNS]],
    initial: &[f32; COLUMNS],
) -> [[f32; COLUMNS]; ROWS] {
    let [mut a, mut b, mut c, mut d, mut e, mut f] = [*initial; ROWS];
    for (input, values) in used {
        let terms = &panel[*input];
        for column in 0..COLUMNS {
            a[column] = values[0].mul_add(terms[column], a[column]);
            b[column] = values[1].mul_add(terms[column], b[column]);
            c[column] = values[2].mul_add(terms[column], c[column]);
            d[column] = values[3].mul_add(terms[column], d[column]);
            e[column] = values[4].mul_add(terms[column], e[column]);
            f[column] = values[5].mul_add(terms[column], f[column]);
        }
    }
    [a, b, c, d, e, f]
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
        for rows in [0, 1, 6, 13] {
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
