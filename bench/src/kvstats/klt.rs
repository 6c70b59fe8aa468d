//! What a Karhunen–Loève transform would gain.
//!
//! At high rate an entropy-coded uniform quantiser of one step spends
//! `½ log2 σ²` bits on a value, up to a constant (Goyal, 2001, "Theoretical
//! foundations of transform coding"). Per-channel tables already take the
//! unequal variances of channels; a transform gains the ratio of the geometric
//! means of variances before and after it. 6.02 dB are one bit a value.
//!
//! Regularisation: the step is per layer and plane, so every layer is scaled to
//! a mean variance of 1; then [`FLOOR`] is added to every variance, on both
//! sides of the ratio. It stands for the quantiser's noise: directions below it
//! are not coded at all and gain no more by being smaller. Channels that do not
//! vary are padding and left out.

use std::ops::Range;

use nalgebra::{DMatrix, DVector, SymmetricEigen};

use super::count;
use super::moments::LIVE;

/// Tokens per dimension of a basis, at least.
const TOKENS_PER_DIMENSION: usize = 8;
/// Noise relative to a layer's mean variance: -40 dB, less than any lossy level keeps.
const FLOOR: f64 = 1e-4;
/// Sweeps of the eigenvalue iteration per dimension.
const SWEEPS: usize = 100;

/// Why there is no gain.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(super) enum KltError {
    /// Too few tokens for a covariance. Ask for more contexts.
    #[error("{tokens} tokens are too few for a basis of {dimensions} dimensions: {needed} needed")]
    TooFewTokens {
        tokens: usize,
        dimensions: usize,
        needed: usize,
    },
    /// The eigenvalues were not found.
    #[error("the eigenvalues of a covariance of {dimensions} dimensions did not converge")]
    NotConverged { dimensions: usize },
}

/// Refuses fewer than 8 tokens per dimension.
pub(super) fn enough(tokens: usize, dimensions: usize) -> Result<(), KltError> {
    let needed = TOKENS_PER_DIMENSION * dimensions;
    if tokens < needed {
        return Err(KltError::TooFewTokens {
            tokens,
            dimensions,
            needed,
        });
    }
    Ok(())
}

/// Sums for the covariance of one plane of all layers, and of each layer with the next.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scatter {
    tokens: usize,
    sums: Vec<DVector<f64>>,
    own: Vec<DMatrix<f64>>,
    next: Vec<DMatrix<f64>>,
}

impl Scatter {
    pub(super) fn new(layers: usize, channels: usize) -> Self {
        let square = || DMatrix::zeros(channels, channels);
        Self {
            tokens: 0,
            sums: vec![DVector::zeros(channels); layers],
            own: (0..layers).map(|_| square()).collect(),
            next: (1..layers).map(|_| square()).collect(),
        }
    }

    /// Adds one context: every layer's `[channel, token]`.
    pub(super) fn add(&mut self, layers: &[DMatrix<f64>]) {
        self.tokens += layers.first().map_or(0, DMatrix::ncols);
        for (layer, values) in layers.iter().enumerate() {
            self.sums[layer] += values.column_sum();
            let transposed = values.transpose();
            self.own[layer].gemm(1.0, values, &transposed, 1.0);
            if let Some(before) = layer.checked_sub(1) {
                self.next[before].gemm(1.0, &layers[before], &transposed, 1.0);
            }
        }
    }

    /// Both together.
    pub(super) fn with(&self, other: &Self) -> Self {
        let mut all = self.clone();
        all.tokens += other.tokens;
        let add = |to: &mut Vec<DMatrix<f64>>, from: &[DMatrix<f64>]| {
            for (to, from) in to.iter_mut().zip(from) {
                *to += from;
            }
        };
        add(&mut all.own, &other.own);
        add(&mut all.next, &other.next);
        for (to, from) in all.sums.iter_mut().zip(&other.sums) {
            *to += from;
        }
        all
    }

    /// Covariance of layer `layer`.
    fn layer(&self, layer: usize) -> DMatrix<f64> {
        self.centred(&self.own[layer], layer, layer)
    }

    /// Covariance of a layer and the next, each scaled to a mean variance of 1;
    /// `None` for the last layer, and where either does not vary.
    fn pair(&self, layer: usize) -> Option<DMatrix<f64>> {
        let cross = self.centred(self.next.get(layer)?, layer, layer + 1);
        let (first, second) = (self.layer(layer), self.layer(layer + 1));
        let (a, b) = (mean_variance(&first)?, mean_variance(&second)?);
        let n = first.nrows();
        let mut all = DMatrix::zeros(2 * n, 2 * n);
        all.view_mut((0, 0), (n, n)).copy_from(&(first / a));
        all.view_mut((n, n), (n, n)).copy_from(&(second / b));
        let cross = cross / (a * b).sqrt();
        all.view_mut((n, 0), (n, n)).copy_from(&cross.transpose());
        all.view_mut((0, n), (n, n)).copy_from(&cross);
        Some(all)
    }

    fn centred(&self, products: &DMatrix<f64>, first: usize, second: usize) -> DMatrix<f64> {
        let tokens = count(self.tokens);
        let (a, b) = (&self.sums[first] / tokens, &self.sums[second] / tokens);
        products / tokens - a * b.transpose()
    }

    /// What a basis made of these tokens gains on the tokens of `on`, in dB over
    /// per-channel tables: a basis per head, per layer, and over a layer and the
    /// next. `None` where nothing varies.
    pub(super) fn gains(
        &self,
        on: &Self,
        layer: usize,
        head_dim: usize,
    ) -> Result<Option<Gains>, KltError> {
        let (Some(from), Some(to)) = (scaled(self.layer(layer)), scaled(on.layer(layer))) else {
            return Ok(None);
        };
        let channels = from.nrows();
        let mut heads = Decibel::default();
        for head in 0..channels / head_dim {
            heads.add(self.gain(&from, &to, head * head_dim..(head + 1) * head_dim)?);
        }
        let over_layer = self.gain(&from, &to, 0..channels)?;
        let pair = match (self.pair(layer), on.pair(layer)) {
            (Some(from), Some(to)) => Some(self.gain(&from, &to, 0..2 * channels)?.mean()),
            _ => None,
        };
        Ok(Some(Gains {
            channels: channel_gain(&to),
            head: heads.mean(),
            layer: over_layer.mean(),
            pair,
        }))
    }

    fn gain(
        &self,
        from: &DMatrix<f64>,
        to: &DMatrix<f64>,
        block: Range<usize>,
    ) -> Result<Decibel, KltError> {
        let live: Vec<usize> = block
            .filter(|&channel| from[(channel, channel)] > LIVE && to[(channel, channel)] > LIVE)
            .collect();
        enough(self.tokens, live.len())?;
        if live.is_empty() {
            return Ok(Decibel::default());
        }
        let (from, to) = (select(from, &live), select(to, &live));
        let eigen = SymmetricEigen::try_new(from, f64::EPSILON, SWEEPS * live.len()).ok_or(
            KltError::NotConverged {
                dimensions: live.len(),
            },
        )?;
        let turned = &to * &eigen.eigenvectors;
        let after = turned
            .column_iter()
            .zip(eigen.eigenvectors.column_iter())
            .map(|(turned, direction)| turned.dot(&direction));
        Ok(Decibel {
            sum: to.diagonal().iter().copied().map(decibel).sum::<f64>()
                - after.map(decibel).sum::<f64>(),
            dimensions: live.len(),
        })
    }
}

/// Gains in dB.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Gains {
    /// Per-channel tables over one table for the layer: what needs no transform.
    pub(super) channels: f64,
    pub(super) head: f64,
    pub(super) layer: f64,
    /// `None` for the last layer.
    pub(super) pair: Option<f64>,
}

/// A sum of decibels over dimensions.
#[derive(Clone, Copy, Debug, Default)]
struct Decibel {
    sum: f64,
    dimensions: usize,
}

impl Decibel {
    fn add(&mut self, other: Self) {
        self.sum += other.sum;
        self.dimensions += other.dimensions;
    }

    /// A value.
    fn mean(self) -> f64 {
        self.sum / count(self.dimensions.max(1))
    }
}

/// Arithmetic over geometric mean of the channels' variances.
fn channel_gain(covariance: &DMatrix<f64>) -> f64 {
    let live: Vec<f64> = covariance
        .diagonal()
        .iter()
        .copied()
        .filter(|&variance| variance > LIVE)
        .collect();
    let channels = count(live.len().max(1));
    decibel(live.iter().sum::<f64>() / channels)
        - live.iter().copied().map(decibel).sum::<f64>() / channels
}

fn decibel(variance: f64) -> f64 {
    10.0 * (variance.max(0.0) + FLOOR).log10()
}

/// The covariance over [`mean_variance`].
fn scaled(covariance: DMatrix<f64>) -> Option<DMatrix<f64>> {
    let variance = mean_variance(&covariance)?;
    Some(covariance / variance)
}

/// Mean variance of the channels that vary; `None` where none does.
fn mean_variance(covariance: &DMatrix<f64>) -> Option<f64> {
    let variances = covariance.diagonal();
    let bar = LIVE * variances.mean();
    let live: Vec<f64> = variances.iter().copied().filter(|&v| v > bar).collect();
    (!live.is_empty()).then(|| live.iter().sum::<f64>() / count(live.len()))
}

fn select(matrix: &DMatrix<f64>, indices: &[usize]) -> DMatrix<f64> {
    DMatrix::from_fn(indices.len(), indices.len(), |row, column| {
        matrix[(indices[row], indices[column])]
    })
}

#[cfg(test)]
mod tests {
    use super::super::normal;
    use super::*;

    /// Gain of a pair of values of equal variance and correlation `rho`.
    fn of_correlation(rho: f64) -> f64 {
        -5.0 * (1.0 - rho * rho).log10()
    }

    fn near(found: f64, expected: f64, tolerance: f64) {
        assert!(
            (found - expected).abs() < tolerance,
            "{found} is not {expected} within {tolerance}"
        );
    }

    /// Two layers of two heads of two channels. In a head the channels correlate
    /// by 0.9; the heads of the first layer by `heads`; the second layer is
    /// `scale` times the first, with noise that makes them correlate by `layers`.
    fn scatter(seed: u64, heads: f64, layers: f64, scale: f64) -> Scatter {
        let mut noise = normal(seed);
        let mut mix = |x: f64, rho: f64| rho * x + (1.0 - rho * rho).sqrt() * noise();
        let mut scatter = Scatter::new(2, 4);
        for _ in 0..4 {
            let (mut first, mut second) = (Vec::new(), Vec::new());
            for _ in 0..5000 {
                let a = mix(0.0, 0.0);
                let b = mix(a, heads);
                let token = [a, mix(a, 0.9), b, mix(b, 0.9)];
                first.extend(token.map(|x| x + 2.0));
                second.extend(token.map(|x| scale * mix(x, layers)));
            }
            scatter.add(&[
                DMatrix::from_vec(4, 5000, first),
                DMatrix::from_vec(4, 5000, second),
            ]);
        }
        scatter
    }

    #[test]
    fn the_gain_of_a_known_covariance() {
        let independent = scatter(1, 0.0, 0.0, 3.0);
        let found = independent.gains(&independent, 0, 2).unwrap().unwrap();
        near(found.channels, 0.0, 0.05);
        near(found.head, of_correlation(0.9), 0.05);
        near(found.layer, of_correlation(0.9), 0.05);
        // The second layer is noise: half of the dimensions gain.
        near(found.pair.unwrap(), of_correlation(0.9) / 2.0, 0.05);
        let found = independent.gains(&independent, 1, 2).unwrap().unwrap();
        near(found.head, 0.0, 0.01);
        assert_eq!(found.pair, None);
    }

    #[test]
    fn heads_and_layers_that_correlate_gain_more() {
        let tied = scatter(2, 0.8, 0.0, 1.0);
        let found = tied.gains(&tied, 0, 2).unwrap().unwrap();
        // det = (1 - 0.9²)² (1 - 0.8²): one more factor over the heads.
        near(found.head, of_correlation(0.9), 0.05);
        near(
            found.layer,
            of_correlation(0.9) + of_correlation(0.8) / 2.0,
            0.05,
        );
        // The same in the next layer but for the floor, whatever its scale.
        let same = scatter(3, 0.0, 1.0, 50.0);
        let found = same.gains(&same, 0, 2).unwrap().unwrap();
        let before = of_correlation(0.9);
        // Half of the dimensions have variance 0, the other half twice theirs.
        let stacked = before / 2.0 + (-decibel(0.0) - decibel(2.0)) / 2.0;
        near(found.pair.unwrap(), stacked, 0.05);
    }

    #[test]
    fn a_basis_of_other_tokens_gains_less_and_none_of_other_structure() {
        let (one, other) = (scatter(4, 0.8, 0.5, 1.0), scatter(5, 0.8, 0.5, 1.0));
        let own = other.gains(&other, 0, 2).unwrap().unwrap();
        let held_out = one.gains(&other, 0, 2).unwrap().unwrap();
        assert!(held_out.layer <= own.layer && held_out.pair <= own.pair);
        near(held_out.layer, own.layer, 0.02);
        let both = one.with(&other);
        assert_eq!(both.tokens, one.tokens + other.tokens);
        near(
            both.gains(&both, 0, 2).unwrap().unwrap().layer,
            own.layer,
            0.1,
        );
        let unrelated = scatter(6, 0.0, 0.0, 1.0);
        let lost = one.gains(&unrelated, 0, 2).unwrap().unwrap();
        assert!(lost.layer < unrelated.gains(&unrelated, 0, 2).unwrap().unwrap().layer);
    }

    #[test]
    fn unequal_channels_are_no_transforms_merit_and_padding_is_none() {
        let mut noise = normal(7);
        let mut scatter = Scatter::new(1, 4);
        scatter.add(&[DMatrix::from_fn(4, 20_000, |channel, _| match channel {
            0 => 4.0 * noise(),
            1 => noise(),
            _ => 1.0,
        })]);
        let found = scatter.gains(&scatter, 0, 2).unwrap().unwrap();
        // Mean of 16 and 1 over their geometric mean 4.
        near(found.channels, 10.0 * (8.5f64 / 4.0).log10(), 0.05);
        near(found.head, 0.0, 0.01);
        near(found.layer, 0.0, 0.01);
    }

    #[test]
    fn too_few_tokens_and_constants_are_refused() {
        let mut scatter = Scatter::new(1, 4);
        let mut noise = normal(8);
        scatter.add(&[DMatrix::from_fn(4, 31, |_, _| noise())]);
        let expected = KltError::TooFewTokens {
            tokens: 31,
            dimensions: 4,
            needed: 32,
        };
        assert_eq!(scatter.gains(&scatter, 0, 2), Err(expected));
        let mut constant = Scatter::new(1, 4);
        constant.add(&[DMatrix::from_element(4, 100, 1.0)]);
        assert_eq!(constant.gains(&constant, 0, 2), Ok(None));
    }
}
