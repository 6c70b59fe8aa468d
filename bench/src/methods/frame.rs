//! A chunk as two matrices, and bases for them.

use anyhow::{Context as _, ensure};
use kvasir_engine::kernels::{Isa, rotate};
use nalgebra::{DMatrix, DVector, SymmetricEigen};

use super::{Chunk, Geometry, from_raw, to_raw};

/// K with RoPE undone, and V: `[layer × head × channel, token]`.
pub(super) fn matrices(chunk: &Chunk, geometry: &Geometry) -> [DMatrix<f32>; 2] {
    let mut matrices = matrices_as_they_are(chunk, geometry);
    turn(&mut matrices[0], chunk, geometry, true);
    matrices
}

/// The opposite.
pub(super) fn fill(chunk: &mut Chunk, geometry: &Geometry, mut matrices: [DMatrix<f32>; 2]) {
    turn(&mut matrices[0], chunk, geometry, false);
    fill_as_they_are(chunk, geometry, &matrices);
}

/// K and V, whatever they are: `[layer × head × channel, token]`.
pub(super) fn matrices_as_they_are(chunk: &Chunk, geometry: &Geometry) -> [DMatrix<f32>; 2] {
    let tokens = chunk.layout.tokens() as usize;
    let (per_layer, dim) = (geometry.kv_heads * geometry.head_dim, geometry.head_dim);
    let rows = per_layer * geometry.layers;
    let mut matrices = [DMatrix::zeros(rows, tokens), DMatrix::zeros(rows, tokens)];
    for (layer, raw) in chunk.layers.iter().enumerate() {
        let values = from_raw(chunk.layout.dtype(), raw);
        let heads = values.chunks_exact(tokens * dim).enumerate();
        for (head, values) in heads {
            let matrix = &mut matrices[head / geometry.kv_heads];
            let row = layer * per_layer + head % geometry.kv_heads * dim;
            for (token, values) in values.chunks_exact(dim).enumerate() {
                let mut column = matrix.column_mut(token);
                column.as_mut_slice()[row..][..dim].copy_from_slice(values);
            }
        }
    }
    matrices
}

/// The opposite.
pub(super) fn fill_as_they_are(
    chunk: &mut Chunk,
    geometry: &Geometry,
    matrices: &[DMatrix<f32>; 2],
) {
    let tokens = chunk.layout.tokens() as usize;
    let (per_layer, dim) = (geometry.kv_heads * geometry.head_dim, geometry.head_dim);
    let dtype = chunk.layout.dtype();
    for (layer, raw) in chunk.layers.iter_mut().enumerate() {
        let mut values = Vec::with_capacity(2 * per_layer * tokens);
        for matrix in matrices {
            for head in 0..geometry.kv_heads {
                let row = layer * per_layer + head * dim;
                for column in matrix.column_iter() {
                    values.extend(column.iter().skip(row).take(dim));
                }
            }
        }
        *raw = to_raw(dtype, &values);
    }
}

/// Undoes RoPE of all keys, or does it.
fn turn(keys: &mut DMatrix<f32>, chunk: &Chunk, geometry: &Geometry, undo: bool) {
    let (isa, dim) = (Isa::detect(), geometry.head_dim);
    let (mut cos, mut sin) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
    let start = usize::try_from(chunk.start).unwrap_or(usize::MAX);
    for (token, mut column) in keys.column_iter_mut().enumerate() {
        let (from, to) = if undo {
            (start + token, 0)
        } else {
            (0, start + token)
        };
        geometry.frequencies.shift(from, to, &mut cos, &mut sin);
        for key in column.as_mut_slice().chunks_exact_mut(dim) {
            rotate(isa, key, &cos, &sin);
        }
    }
}

/// A mean and an orthonormal basis, the directions of largest variance first.
#[derive(Clone, Debug)]
pub(super) struct Basis {
    pub(super) mean: DVector<f32>,
    /// A direction a column.
    pub(super) vectors: DMatrix<f32>,
}

impl Basis {
    /// The Karhunen–Loève basis of some rows of all samples.
    pub(super) fn of(
        samples: &[DMatrix<f32>],
        rows: std::ops::Range<usize>,
    ) -> anyhow::Result<Self> {
        let n = rows.len();
        let count = samples.iter().map(DMatrix::ncols).sum::<usize>().max(1);
        #[expect(clippy::cast_precision_loss, reason = "tokens of a calibration")]
        let count = count as f32;
        let mut sum = DVector::<f32>::zeros(n);
        for sample in samples {
            sum += sample.rows_range(rows.clone()).column_sum();
        }
        let mean = sum / count;
        let mut products = DMatrix::<f32>::zeros(n, n);
        for sample in samples {
            let mut centred = sample.rows_range(rows.clone()).into_owned();
            for mut column in centred.column_iter_mut() {
                column -= &mean;
            }
            products.gemm(1.0 / count, &centred, &centred.transpose(), 1.0);
        }
        let (values, vectors) = eigen(products)?;
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
        Ok(Self {
            mean,
            vectors: vectors.select_columns(&order),
        })
    }

    /// Coefficients of the first `rank` directions.
    pub(super) fn project(&self, mut values: DMatrix<f32>, rank: usize) -> DMatrix<f32> {
        for mut column in values.column_iter_mut() {
            column -= &self.mean;
        }
        self.vectors.columns(0, rank).tr_mul(&values)
    }

    /// Values from coefficients.
    pub(super) fn restore(&self, coefficients: &DMatrix<f32>) -> DMatrix<f32> {
        let mut values = self.vectors.columns(0, coefficients.nrows()) * coefficients;
        for mut column in values.column_iter_mut() {
            column += &self.mean;
        }
        values
    }
}

/// Eigenvalues and eigenvectors of a covariance.
fn eigen(products: DMatrix<f32>) -> anyhow::Result<(DVector<f32>, DMatrix<f32>)> {
    let sweeps = SWEEPS * products.nrows();
    let is_whole = |vectors: &DMatrix<f32>| vectors.iter().all(|value| value.is_finite());
    let exact = products.clone().cast::<f64>();
    if let Some(found) = SymmetricEigen::try_new(products, f32::EPSILON, sweeps)
        && is_whole(&found.eigenvectors)
    {
        return Ok((found.eigenvalues, found.eigenvectors));
    }
    // Where some directions hardly vary, 32 bits can end in what is no number.
    let found = SymmetricEigen::try_new(exact, f64::EPSILON, sweeps);
    let found = found.context("the eigenvalues of a covariance did not converge")?;
    let vectors = found.eigenvectors.cast::<f32>();
    ensure!(is_whole(&vectors), "a covariance holds what is no number");
    Ok((found.eigenvalues.cast(), vectors))
}

const SWEEPS: usize = 100;
