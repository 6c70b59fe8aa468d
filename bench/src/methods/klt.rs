//! Our codec behind a Karhunen–Loève transform: what a profile of a model would gain.
//!
//! RoPE is undone, channels are projected on a basis of the training split, and
//! the coefficients take the places of channels in our codec, which codes them as f32. A
//! basis is of one head, of all heads of a layer, or of all layers. For the last, layers are
//! brought to the same deviation first, since their steps are relative to it, or left as they
//! are; its coefficients share one step, and are coded as the heads of one layer.

use std::sync::Arc;

use kvasir_codec::LayerCodec;
use kvasir_types::DType;
use nalgebra::DMatrix;

use super::frame::{self, Basis};
use super::ours::{Transform, Variant};
use super::{Chunk, Coder, Geometry, PROTECTED, Parts};

#[derive(Debug)]
pub(super) struct Transformed {
    pub(super) variant: Variant,
    pub(super) geometry: Arc<Geometry>,
    pub(super) bases: Arc<Bases>,
    /// Of steps, by layer and plane.
    pub(super) factors: Vec<[f32; 2]>,
}

/// What is calibrated for all steps at once.
#[derive(Debug)]
pub(super) struct Bases {
    /// Of K and V, by block of rows.
    bases: [Vec<Basis>; 2],
    /// Of K and V, what rows of a layer are divided by.
    deviations: [Vec<f32>; 2],
}

impl Bases {
    pub(super) fn new(
        transform: Transform,
        factors: &[[f32; 2]],
        training: &[Chunk],
        geometry: &Geometry,
    ) -> anyhow::Result<Self> {
        let per_layer = geometry.kv_heads * geometry.head_dim;
        let rows = per_layer * geometry.layers;
        let block = match transform {
            Transform::Head => geometry.head_dim,
            Transform::Layer => per_layer,
            Transform::All | Transform::Flat => rows,
        };
        let mut planes: [Vec<DMatrix<f32>>; 2] = Default::default();
        for chunk in training {
            let matrices = frame::matrices(chunk, geometry);
            for (plane, matrix) in planes.iter_mut().zip(matrices) {
                let tokens = matrix.ncols() - PROTECTED;
                plane.push(matrix.columns(PROTECTED, tokens).into_owned());
            }
        }
        let prepare = |index: usize, plane: &mut Vec<DMatrix<f32>>| {
            let mut deviations = match transform {
                Transform::All => deviations(plane, per_layer),
                Transform::Flat => deviations(plane, rows).repeat(geometry.layers),
                _ => vec![1.0; geometry.layers],
            };
            if block == rows {
                // What may err more counts less, before directions are chosen.
                for (deviation, factors) in deviations.iter_mut().zip(factors) {
                    *deviation *= factors[index];
                }
            }
            plane
                .iter_mut()
                .for_each(|matrix| scale(matrix, &deviations, true));
            let blocks = (0..rows).step_by(block);
            let bases: anyhow::Result<Vec<Basis>> = blocks
                .map(|start| Basis::of(plane, start..start + block))
                .collect();
            anyhow::Ok((bases?, deviations))
        };
        let [keys, values] = std::thread::scope(|scope| {
            let [keys, values] = &mut planes;
            let prepare = &prepare;
            let workers = [
                scope.spawn(move || prepare(0, keys)),
                scope.spawn(move || prepare(1, values)),
            ];
            workers.map(|worker| worker.join().expect("no calibration panics"))
        });
        let ((keys, of_keys), (values, of_values)) = (keys?, values?);
        Ok(Self {
            bases: [keys, values],
            deviations: [of_keys, of_values],
        })
    }
}

impl Transformed {
    /// A chunk of f32 in which coefficients take the places of channels.
    fn shape(&self, chunk: &Chunk) -> anyhow::Result<(Geometry, Chunk)> {
        let mut geometry = self.geometry.unturned();
        if self.is_over_layers() {
            geometry.kv_heads *= geometry.layers;
            geometry.layers = 1;
        }
        let layout = geometry.layout(chunk.layout.tokens() as usize, DType::F32)?;
        let layers = vec![vec![0; layout.layer_bytes()]; geometry.layers];
        let shape = Chunk {
            layout,
            start: 0,
            layers,
        };
        Ok((geometry, shape))
    }

    fn is_over_layers(&self) -> bool {
        let over = [Transform::All, Transform::Flat];
        self.variant.transform.is_some_and(|of| over.contains(&of))
    }

    fn steps(&self, codec: &LayerCodec<'_>, layer: usize, raw: &[u8]) -> [f32; 2] {
        let deviations = if self.is_over_layers() {
            [1.0; 2]
        } else {
            codec.deviations(raw)
        };
        let [mut keys, mut values] = deviations.map(|deviation| deviation * self.variant.step);
        if !self.is_over_layers() {
            keys *= self.factors[layer][0];
            values *= self.factors[layer][1];
        }
        [keys * self.variant.keys, values].map(|step| step.max(f32::MIN_POSITIVE))
    }
}

impl Coder for Transformed {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let mut matrices = frame::matrices(chunk, &self.geometry);
        let Bases { bases, deviations } = &*self.bases;
        for (matrix, (bases, deviations)) in matrices.iter_mut().zip(bases.iter().zip(deviations)) {
            scale(matrix, deviations, true);
            let mut row = 0;
            for basis in bases {
                let n = basis.mean.len();
                let block = matrix.rows(row, n).into_owned();
                matrix.rows_mut(row, n).copy_from(&basis.project(block, n));
                row += n;
            }
        }
        let (geometry, mut shape) = self.shape(chunk)?;
        frame::fill_as_they_are(&mut shape, &geometry, &matrices);
        let codec = LayerCodec::new(shape.layout, None)?;
        let mut parts = Vec::new();
        for (layer, raw) in shape.layers.iter().enumerate() {
            let encoded = codec.encode(raw, self.steps(&codec, layer, raw));
            parts.extend(encoded.parts.into_iter().take(self.variant.level + 1));
        }
        Ok(parts)
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        let (geometry, mut shape) = self.shape(chunk)?;
        let codec = LayerCodec::new(shape.layout, None)?;
        let layers = shape.layers.iter_mut();
        for (raw, parts) in layers.zip(parts.chunks(self.variant.level + 1)) {
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            codec.decode(&parts, raw)?;
        }
        let mut matrices = frame::matrices_as_they_are(&shape, &geometry);
        let Bases { bases, deviations } = &*self.bases;
        for (matrix, (bases, deviations)) in matrices.iter_mut().zip(bases.iter().zip(deviations)) {
            let mut row = 0;
            for basis in bases {
                let n = basis.mean.len();
                let restored = basis.restore(&matrix.rows(row, n).into_owned());
                matrix.rows_mut(row, n).copy_from(&restored);
                row += n;
            }
            scale(matrix, deviations, false);
        }
        frame::fill(chunk, &self.geometry, matrices);
        Ok(())
    }

    fn protected(&self) -> usize {
        PROTECTED
    }
}

/// Divides the rows of every layer, or multiplies them.
fn scale(matrix: &mut DMatrix<f32>, deviations: &[f32], divide: bool) {
    let per_layer = matrix.nrows() / deviations.len();
    for (layer, &deviation) in deviations.iter().enumerate() {
        let by = if divide { 1.0 / deviation } else { deviation };
        matrix.rows_mut(layer * per_layer, per_layer).scale_mut(by);
    }
}

/// By layer, of what is left without the means of rows.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "a deviation of f32 values"
)]
fn deviations(samples: &[DMatrix<f32>], per_layer: usize) -> Vec<f32> {
    let rows = samples.first().map_or(0, DMatrix::nrows);
    let variance = |row: usize| {
        let values = || {
            samples
                .iter()
                .flat_map(|sample| sample.row(row).iter().copied().collect::<Vec<_>>())
        };
        let count = values().count().max(1) as f64;
        let mean = values().map(f64::from).sum::<f64>() / count;
        values()
            .map(|value| (f64::from(value) - mean).powi(2))
            .sum::<f64>()
            / count
    };
    let variances: Vec<f64> = (0..rows).map(variance).collect();
    variances
        .chunks(per_layer.max(1))
        .map(|layer| {
            ((layer.iter().sum::<f64>() / layer.len() as f64).sqrt() as f32).max(f32::MIN_POSITIVE)
        })
        .collect()
}
