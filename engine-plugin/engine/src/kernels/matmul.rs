//! Products of activations with a weight matrix.
//!
//! A weight matrix `[out, in]` is stored transposed in panels of [`PANEL`]
//! outputs: `[panel][in][PANEL]`, the form that the `gemm` crate's AVX-512
//! kernel (64 × 6) reads without packing. Measured on two Zen 4 cores against
//! row-major weights, 1024 × 1024: 1.3 times as fast for 512 rows, 10 times
//! for 8.
//!
//! # Order of summation
//!
//! For each output element: inputs in chunks of [`K_CHUNK`], in a chunk a chain
//! of fused multiply-adds from zero in the order of inputs, chunks added in
//! order. The library does exactly this when a call is given one chunk,
//! whatever the number of rows, except for a single row, where it takes another
//! path; so [`matmul`] runs single rows with a kernel of its own in the same
//! order. A row's result thus does not depend on the rows beside it.

use rayon::prelude::*;

use super::isa::{Kind, dispatch};
use super::{AlignedBuf, Isa};

/// Outputs per panel.
pub(crate) const PANEL: usize = 64;

/// Inputs summed in one chain. The library splits longer sums by the size of
/// the CPU's caches; up to 512 it never does.
pub const K_CHUNK: usize = 512;

/// Whether the build's target has a fused multiply-add, so that the library's
/// portable path and ours use it.
const NATIVE_FMA: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

/// A weight matrix in the layout that [`matmul`] reads.
#[derive(Debug)]
pub(crate) struct PackedMatrix {
    inputs: usize,
    outputs: usize,
    /// `[panel][input][PANEL]`; outputs past the last are zero.
    panels: AlignedBuf<f32>,
    /// Output rows that [`Self::push_rows`] has filled.
    filled: usize,
}

impl PackedMatrix {
    /// A matrix of zeros, to be filled by [`Self::push_rows`].
    pub(crate) fn new(outputs: usize, inputs: usize) -> Self {
        let panels = AlignedBuf::new(outputs.div_ceil(PANEL) * PANEL * inputs);
        Self {
            inputs,
            outputs,
            panels,
            filled: 0,
        }
    }

    /// Appends whole output rows of a row-major `[out, in]` matrix.
    ///
    /// # Panics
    ///
    /// When `rows` is not whole rows, or more than the matrix holds.
    pub(crate) fn push_rows(&mut self, rows: &[f32]) {
        for row in rows.chunks(self.inputs) {
            assert_eq!(row.len(), self.inputs, "whole rows");
            assert!(self.filled < self.outputs, "more rows than outputs");
            let (panel, lane) = (self.filled / PANEL, self.filled % PANEL);
            let panel_len = self.inputs * PANEL;
            let panel = &mut self.panels[panel * panel_len..][..panel_len];
            for (column, &weight) in panel.chunks_exact_mut(PANEL).zip(row) {
                column[lane] = weight;
            }
            self.filled += 1;
        }
    }

    /// Bytes of memory held.
    pub(crate) fn bytes(&self) -> u64 {
        size_of_val::<[f32]>(&self.panels) as u64
    }

    /// Copies the weights of one output, which is row `output` of `[out, in]`.
    ///
    /// # Panics
    ///
    /// When `output` is out of range or `row` is not as long as a row.
    pub(crate) fn copy_row(&self, output: usize, row: &mut [f32]) {
        assert!(
            output < self.outputs && row.len() == self.inputs,
            "a row of the matrix"
        );
        let panel = self.panel(output / PANEL);
        for (to, column) in row.iter_mut().zip(panel.chunks_exact(PANEL)) {
            *to = column[output % PANEL];
        }
    }

    fn panel(&self, index: usize) -> &[f32] {
        &self.panels[index * self.inputs * PANEL..][..self.inputs * PANEL]
    }
}

/// `y = x · wᵀ`, or `y += x · wᵀ` with `accumulate`.
///
/// `x` is `[rows, inputs]`, `y` is `[rows, outputs]`, both row-major. Runs on
/// the current rayon pool.
///
/// # Panics
///
/// When the lengths of `x` and `y` are not those of `rows` rows.
pub(crate) fn matmul(
    isa: Isa,
    w: &PackedMatrix,
    rows: usize,
    x: &[f32],
    y: &mut [f32],
    accumulate: bool,
) {
    assert_eq!(x.len(), rows * w.inputs, "rows of x");
    assert_eq!(y.len(), rows * w.outputs, "rows of y");
    if rows == 0 {
        return;
    }
    if rows == 1 && (isa.kind() != Kind::Portable || NATIVE_FMA) {
        y.par_chunks_mut(PANEL).enumerate().for_each(|(index, y)| {
            single_row(isa, w.panel(index), x, y, accumulate);
        });
        return;
    }
    if rows == 1 {
        // Without a fused multiply-add the library rounds its products, which
        // our own kernel cannot follow; two rows take the library's main path.
        let twice = [x, x].concat();
        let mut results = [&*y, &*y].concat();
        matmul(isa, w, 2, &twice, &mut results, accumulate);
        y.copy_from_slice(&results[..w.outputs]);
        return;
    }
    let columns = Columns {
        start: y.as_mut_ptr(),
        len: y.len(),
    };
    (0..w.outputs.div_ceil(PANEL))
        .into_par_iter()
        .for_each(|index| {
            many_rows(w, index, rows, x, &columns, accumulate);
        });
}

/// The first outputs of one row, as many as `y` has, to rounding.
///
/// # Panics
///
/// When `x` is not as long as a row, or `y` longer than the outputs.
pub(crate) fn matmul_row(isa: Isa, w: &PackedMatrix, x: &[f32], y: &mut [f32]) {
    assert!(x.len() == w.inputs && y.len() <= w.outputs, "one row");
    y.par_chunks_mut(PANEL).enumerate().for_each(|(index, y)| {
        single_row(isa, w.panel(index), x, y, false);
    });
}

/// `y`, of which each worker writes the columns of one panel.
struct Columns {
    start: *mut f32,
    len: usize,
}

// SAFETY: workers write disjoint columns (see `many_rows`), and the borrow of
// `y` in `matmul` outlives them.
unsafe impl Sync for Columns {}

fn many_rows(
    w: &PackedMatrix,
    index: usize,
    rows: usize,
    x: &[f32],
    y: &Columns,
    accumulate: bool,
) {
    let panel = w.panel(index);
    let first = index * PANEL;
    let width = PANEL.min(w.outputs - first);
    assert!(x.len() == rows * w.inputs && y.len == rows * w.outputs);
    #[expect(clippy::cast_possible_wrap, reason = "extents of slices fit in isize")]
    let (inputs, outputs) = (w.inputs as isize, w.outputs as isize);
    for start in (0..w.inputs).step_by(K_CHUNK) {
        let depth = K_CHUNK.min(w.inputs - start);
        // SAFETY: the library reads and writes
        // - dst: columns `first..first + width` of `rows` rows of `outputs`
        //   elements, inside `y` as asserted; `matmul` gives each index to one
        //   worker, so no other touches these columns;
        // - lhs: `depth` columns of `width <= PANEL` weights from `start`,
        //   inside `panel`, which holds `inputs * PANEL`;
        // - rhs: `depth` elements from `start` of each row of `x`, as asserted.
        unsafe {
            gemm::gemm(
                width,
                rows,
                depth,
                y.start.add(first),
                outputs,
                1,
                accumulate || start > 0,
                panel[start * PANEL..].as_ptr(),
                PANEL as isize,
                1,
                x[start..].as_ptr(),
                inputs,
                1,
                1.0f32,
                1.0f32,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

/// One row of `x` against one panel; `y` is the panel's outputs.
fn single_row(isa: Isa, panel: &[f32], x: &[f32], y: &mut [f32], accumulate: bool) {
    match isa.kind() {
        // SAFETY: an `Isa` of this kind exists only after detection.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { single_row_avx512(panel, x, y, accumulate) },
        _ => single_row_compiled(isa, panel, x, y, accumulate),
    }
}

dispatch! {
    fn single_row_compiled(panel: &[f32], x: &[f32], y: &mut [f32], accumulate: bool) =
        single_row_scalar
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn single_row_avx512(panel: &[f32], x: &[f32], y: &mut [f32], accumulate: bool) {
    use std::arch::x86_64::{
        _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_fmadd_ps, _mm512_set1_ps,
        _mm512_setzero_ps,
    };

    use super::vector::{LANES, load, store};

    /// Columns to fetch ahead; 4 KiB, so the next page too.
    const AHEAD: usize = 16;

    let mut total = [0.0; PANEL];
    total[..y.len()].copy_from_slice(y);
    let mut read = accumulate;
    for (columns, x) in panel.chunks(K_CHUNK * PANEL).zip(x.chunks(K_CHUNK)) {
        let mut sums = [_mm512_setzero_ps(); PANEL / LANES];
        for (column, &x) in columns.as_chunks::<PANEL>().0.iter().zip(x) {
            let x = _mm512_set1_ps(x);
            let lanes = column.as_chunks::<LANES>().0;
            for (sum, weights) in sums.iter_mut().zip(lanes) {
                let ahead = weights.as_ptr().wrapping_add(AHEAD * PANEL);
                // A prefetch of any address is harmless.
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                *sum = _mm512_fmadd_ps(load(weights), x, *sum);
            }
        }
        for (total, sum) in total.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
            let sum = if read {
                _mm512_add_ps(sum, load(total))
            } else {
                sum
            };
            store(total, sum);
        }
        read = true;
    }
    y.copy_from_slice(&total[..y.len()]);
}

#[inline(always)]
fn single_row_scalar(panel: &[f32], x: &[f32], y: &mut [f32], accumulate: bool) {
    let mut read = accumulate;
    for (columns, x) in panel.chunks(K_CHUNK * PANEL).zip(x.chunks(K_CHUNK)) {
        let mut sums = [0.0f32; PANEL];
        for (column, &x) in columns.as_chunks::<PANEL>().0.iter().zip(x) {
            for (sum, &weight) in sums.iter_mut().zip(column) {
                *sum = weight.mul_add(x, *sum);
            }
        }
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = if read { sum + *y } else { sum };
        }
        read = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packed(outputs: usize, inputs: usize, weights: &[f32]) -> PackedMatrix {
        let mut matrix = PackedMatrix::new(outputs, inputs);
        matrix.push_rows(weights);
        matrix
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// The library over many rows, every kernel for one row, and the order
        /// of summation as documented: all give the same bits.
        #[test]
        fn rows_do_not_depend_on_their_company(
            outputs in 1usize..200, quads in 1usize..330, rows in 2usize..20, seed: u64, accumulate: bool,
        ) {
            let inputs = 4 * quads;
            let mut state = seed;
            let mut number = || super::super::elementwise::tests::noise(&mut state);
            let weights: Vec<f32> = (0..outputs * inputs).map(|_| number()).collect();
            let x: Vec<f32> = (0..rows * inputs).map(|_| number()).collect();
            let start: Vec<f32> = (0..rows * outputs).map(|_| number()).collect();
            let matrix = packed(outputs, inputs, &weights);

            let mut together = start.clone();
            matmul(Isa::detect(), &matrix, rows, &x, &mut together, accumulate);
            for row in 0..rows {
                let x = &x[row * inputs..][..inputs];
                let together = &together[row * outputs..][..outputs];
                let start = &start[row * outputs..][..outputs];

                for isa in Isa::available() {
                    let mut alone = start.to_vec();
                    for (index, y) in alone.chunks_mut(PANEL).enumerate() {
                        single_row(isa, matrix.panel(index), x, y, accumulate);
                    }
                    prop_assert_eq!(&alone, together, "{:?}", isa);
                }
            }
        }

        #[test]
        fn rows_of_the_matrix_come_back(outputs in 1usize..150, inputs in 1usize..40) {
            let weights: Vec<f32> = (0u16..).take(outputs * inputs).map(f32::from).collect();
            let matrix = packed(outputs, inputs, &weights);
            let mut row = vec![0.0; inputs];
            for output in 0..outputs {
                matrix.copy_row(output, &mut row);
                prop_assert_eq!(&row[..], &weights[output * inputs..][..inputs]);
            }
        }
    }
}
