//! Profiles from samples: what the keys and values of a model are like, from some of its chunks.
//!
//! Each basis is the Karhunen–Loève basis of its channels, and all of them have the steps that
//! chunks have without a profile: [`DEFAULT_STEPS`], in deviations of the plane. Keys are taken as
//! they are, turned if the model turns them. `kvasir-bench profile` does better where it can run
//! the model: it takes keys before RoPE, and weighs errors by what attention makes of them.

#![deny(clippy::indexing_slicing)]

use bytes::Bytes;
use kvasir_types::{DType, KvLayout, Plane};
use nalgebra::{DMatrix, DVector, SymmetricEigen};

use crate::chunk::{DEFAULT_STEPS, SMALLEST_STEP};
use crate::elements::{self, Head};
use crate::profile::{Profile, ProfileBasis, ProfileError, ProfilePlane, ProfileShape};

/// Why chunks make no profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrationError {
    /// Eight bits a value are quantised already.
    #[error("values of type {0} are quantised already; store them raw or lossless")]
    DType(DType),
    /// A sample does not have the layers that its layout says.
    #[error("sample {0} does not have the layers of the layout")]
    Layers(usize),
    /// There is nothing to learn from.
    #[error("no token of the samples is all numbers; give chunks that the model has computed")]
    Nothing,
    /// The values of a plane are too large to be counted together.
    #[error("no basis was found for layer {0}; leave out samples that are not of the model")]
    Basis(u16),
    /// No profile is like this.
    #[error(transparent)]
    Profile(#[from] ProfileError),
}

impl Profile {
    /// Learnt from samples: chunks of `layout`, whose layers are raw, in order. Chunks of any
    /// number of tokens can be coded with it.
    ///
    /// Take some thousand tokens of what the model usually reads, at least as many as a group of
    /// heads has channels, and not the first chunks of prompts: their first tokens are unlike all
    /// others.
    ///
    /// # Errors
    /// The samples are not of the layout, or nothing can be learnt from them.
    pub fn calibrate(layout: &KvLayout, samples: &[Vec<Bytes>]) -> Result<Self, CalibrationError> {
        if !elements::is_float(layout.dtype()) {
            return Err(CalibrationError::DType(layout.dtype()));
        }
        let layers = usize::from(layout.layers());
        let fits = |sample: &Vec<Bytes>| {
            let whole = |layer: &Bytes| layer.len() == layout.layer_bytes();
            sample.len() == layers && sample.iter().all(whole)
        };
        if let Some(index) = samples.iter().position(|sample| !fits(sample)) {
            return Err(CalibrationError::Layers(index));
        }
        let shape = ProfileShape::of(layout, None);
        let heads: Vec<Head> = elements::heads(layout).collect();
        let planes = heads.chunk_by(|one, other| one.plane == other.plane);
        let planes: Vec<&[Head]> = planes.filter(|heads| has_channels(heads)).collect();
        let mut learnt = Vec::new();
        for layer in 0..layout.layers() {
            for heads in &planes {
                let raw = samples.iter().filter_map(|it| it.get(usize::from(layer)));
                let raw: Vec<&Bytes> = raw.collect();
                learnt.push(plane(layout, &shape, layer, heads, &raw)?);
            }
        }
        Ok(Self::new(shape, learnt)?)
    }
}

fn has_channels(heads: &[Head]) -> bool {
    heads.first().is_some_and(|head| head.dim > 0)
}

/// One plane of one layer.
fn plane(
    layout: &KvLayout,
    shape: &ProfileShape,
    layer: u16,
    heads: &[Head],
    samples: &[&Bytes],
) -> Result<ProfilePlane, CalibrationError> {
    let [of_keys, of_values] = shape.heads_per_basis();
    let [key_step, value_step] = DEFAULT_STEPS;
    let (per_basis, step) = match heads.first().map(|head| head.plane) {
        Some(Plane::Value) => (of_values, value_step),
        _ => (of_keys, key_step),
    };
    let mut bases = Vec::new();
    let (mut variance, mut channels) = (0.0, 0.0);
    for group in heads.chunks(per_basis.max(1).into()) {
        let mut sums = Sums::new(group.iter().map(|head| head.dim).sum());
        for raw in samples {
            sums.add(layout, group, raw);
        }
        let (basis, of_group) = sums.basis(layer)?;
        variance += of_group;
        channels += sums.total.len() as f64;
        bases.push(basis);
    }
    let unit = step * narrow((variance / channels).sqrt());
    Ok(ProfilePlane {
        unit: unit.max(SMALLEST_STEP),
        bases,
    })
}

/// Over the tokens of a group of heads.
struct Sums {
    tokens: f64,
    total: DVector<f64>,
    products: DMatrix<f64>,
}

impl Sums {
    fn new(channels: usize) -> Self {
        Self {
            tokens: 0.0,
            total: DVector::zeros(channels),
            products: DMatrix::zeros(channels, channels),
        }
    }

    /// The tokens of a raw layer, without those that are not all numbers.
    fn add(&mut self, layout: &KvLayout, heads: &[Head], raw: &Bytes) {
        let tokens = layout.tokens() as usize;
        let mut rows = DMatrix::<f64>::zeros(self.total.len(), tokens);
        let mut first = 0;
        for head in heads {
            let mut values = vec![0.0; tokens * head.dim];
            let bytes = raw.get(head.place.clone()).unwrap_or(&[]);
            elements::read(layout.dtype(), bytes, &mut values);
            let of_tokens = values.chunks_exact(head.dim);
            for (mut column, values) in rows.column_iter_mut().zip(of_tokens) {
                let channels = column.iter_mut().skip(first);
                for (place, value) in channels.zip(values) {
                    *place = f64::from(*value);
                }
            }
            first += head.dim;
        }
        for mut column in rows.column_iter_mut() {
            if column.iter().all(|value| value.is_finite()) {
                self.tokens += 1.0;
            } else {
                column.fill(0.0);
            }
        }
        self.total += rows.column_sum();
        self.products.gemm(1.0, &rows, &rows.transpose(), 1.0);
    }

    /// The directions of largest variance first, and the variance of all.
    fn basis(&self, layer: u16) -> Result<(ProfileBasis, f64), CalibrationError> {
        if self.tokens == 0.0 {
            return Err(CalibrationError::Nothing);
        }
        let mean = &self.total / self.tokens;
        let covariance = &self.products / self.tokens - &mean * mean.transpose();
        let failed = CalibrationError::Basis(layer);
        if !covariance.iter().all(|value| value.is_finite()) {
            return Err(failed);
        }
        let variance = covariance.trace().max(0.0);
        let sweeps = SWEEPS * covariance.nrows();
        let found = SymmetricEigen::try_new(covariance, f64::EPSILON, sweeps).ok_or(failed)?;
        let mut directions: Vec<_> = found
            .eigenvalues
            .iter()
            .zip(found.eigenvectors.column_iter())
            .collect();
        directions.sort_by(|(one, _), (other, _)| other.total_cmp(one));
        let deviations = directions.iter().map(|(variance, _)| {
            let deviation = narrow(variance.max(0.0).sqrt());
            deviation.max(SMALLEST)
        });
        let deviations = deviations.collect();
        let vectors = directions.iter().flat_map(|(_, vector)| vector.iter());
        let vectors: Vec<f32> = vectors.copied().map(narrow).collect();
        let means = mean.iter().copied().map(narrow).collect();
        // Orthonormal, so that each way is the other's transpose.
        let basis = ProfileBasis::new(means, deviations, &vectors, &vectors);
        Ok((basis, variance))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "rounded to f32")]
fn narrow(value: f64) -> f32 {
    value as f32
}

/// Of a direction that does not vary.
const SMALLEST: f32 = 1e-6;
const SWEEPS: usize = 100;
