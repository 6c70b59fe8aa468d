//! Means, spread, tails and neighbours of channels.
//!
//! Power sums in f64, so that contexts are seen once and then forgotten; the
//! mean of a channel is over all contexts. A channel whose variance is nothing
//! beside that of the others ([`LIVE`]) counts for the means, and is otherwise
//! left out.

use nalgebra::DMatrix;

use super::count;
use crate::report::median;

/// Tokens between anchors of the delta coder of CacheGen (Liu et al., 2024).
const ANCHOR_TOKENS: usize = 10;
/// Variance below which a channel is constant, relative to the mean variance.
pub(super) const LIVE: f64 = 1e-9;

/// Sums over the tokens of one plane of one layer.
#[derive(Clone, Debug, Default)]
pub(super) struct Moments {
    tokens: usize,
    pairs: usize,
    deltas: usize,
    channels: Vec<Channel>,
}

#[derive(Clone, Debug, Default)]
struct Channel {
    /// Sums of the first four powers.
    powers: [f64; 4],
    /// Sums over pairs of neighbours: the earlier, the later, their product,
    /// their squared difference.
    earlier: f64,
    later: f64,
    product: f64,
    difference: f64,
    /// Sum of squared differences from the anchor.
    delta: f64,
}

/// What the sums say. Ratios are pooled over channels unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summary {
    /// Share of the second moment that is the channels' means.
    pub(super) mean_share: f64,
    /// Largest over median standard deviation of a channel.
    pub(super) outlier_ratio: f64,
    /// Root of the mean variance.
    pub(super) std: f64,
    /// Excess kurtosis of all values less their channel's mean.
    pub(super) kurtosis: f64,
    /// Median over channels of the channel's own excess kurtosis.
    pub(super) kurtosis_channel: f64,
    /// Correlation with the token before.
    pub(super) lag1: f64,
    /// Variance of the difference from the token before, over variance.
    pub(super) lag1_delta: f64,
    /// Mean square of the difference from the anchor, over variance.
    pub(super) anchor_delta: f64,
    /// Mean over channels of `-½ log2(1 - ρ²)`: bits a value that predicting it
    /// from the token before could save.
    pub(super) predicted_bits: f64,
}

impl Moments {
    /// Adds one context: `[channel, token]`.
    pub(super) fn add(&mut self, values: &DMatrix<f64>) {
        self.channels.resize_with(values.nrows(), Channel::default);
        for (token, column) in values.column_iter().enumerate() {
            for (channel, &x) in self.channels.iter_mut().zip(column.iter()) {
                for (power, exponent) in channel.powers.iter_mut().zip(1..) {
                    *power += x.powi(exponent);
                }
            }
            if token > 0 {
                let before = values.column(token - 1);
                let neighbours = before.iter().zip(column.iter());
                for (channel, (&earlier, &later)) in self.channels.iter_mut().zip(neighbours) {
                    channel.earlier += earlier;
                    channel.later += later;
                    channel.product += earlier * later;
                    channel.difference += (later - earlier).powi(2);
                }
                self.pairs += 1;
            }
            if !token.is_multiple_of(ANCHOR_TOKENS) {
                let anchor = values.column(token - token % ANCHOR_TOKENS);
                let both = anchor.iter().zip(column.iter());
                for (channel, (&anchor, &x)) in self.channels.iter_mut().zip(both) {
                    channel.delta += (x - anchor).powi(2);
                }
                self.deltas += 1;
            }
            self.tokens += 1;
        }
    }

    /// Variance summed over channels.
    pub(super) fn variance(&self) -> f64 {
        self.variances().iter().sum()
    }

    fn variances(&self) -> Vec<f64> {
        let tokens = count(self.tokens);
        let variance =
            |c: &Channel| (c.powers[1] / tokens - (c.powers[0] / tokens).powi(2)).max(0.0);
        self.channels.iter().map(variance).collect()
    }

    /// `None` where nothing varies, or there is no pair of tokens.
    pub(super) fn summary(&self) -> Option<Summary> {
        let variances = self.variances();
        let total: f64 = variances.iter().sum();
        let bar = LIVE * total / count(variances.len().max(1));
        let live: Vec<(&Channel, f64)> = self
            .channels
            .iter()
            .zip(variances)
            .filter(|&(_, variance)| variance > bar)
            .collect();
        if live.is_empty() || self.pairs == 0 || self.deltas == 0 {
            return None;
        }
        let (tokens, pairs) = (count(self.tokens), count(self.pairs));
        let sum = |of: &dyn Fn(&Channel) -> f64| live.iter().map(|(c, _)| of(c)).sum::<f64>();
        let mean = |c: &Channel| c.powers[0] / tokens;
        let fourth = |c: &Channel| {
            let m = mean(c);
            let [_, second, third, fourth] = c.powers.map(|power| power / tokens);
            fourth - 4.0 * m * third + 6.0 * m * m * second - 3.0 * m.powi(4)
        };
        let lagged = |c: &Channel| {
            let m = mean(c);
            (c.product - m * (c.earlier + c.later)) / pairs + m * m
        };
        let mut deviations: Vec<f64> = live.iter().map(|(_, variance)| variance.sqrt()).collect();
        let largest = deviations.iter().copied().fold(0.0, f64::max);
        let mut kurtoses: Vec<f64> = live
            .iter()
            .map(|(c, variance)| fourth(c) / variance.powi(2) - 3.0)
            .collect();
        let bits = live.iter().map(|(c, variance)| {
            let correlation = (lagged(c) / variance).clamp(-0.999_999, 0.999_999);
            -0.5 * (1.0 - correlation.powi(2)).log2()
        });
        let second = self
            .channels
            .iter()
            .map(|c| c.powers[1] / tokens)
            .sum::<f64>();
        let channels = count(live.len());
        let variance = total / channels;
        Some(Summary {
            mean_share: 1.0 - total / second,
            outlier_ratio: largest / median(&mut deviations),
            std: variance.sqrt(),
            kurtosis: sum(&fourth) / channels / variance.powi(2) - 3.0,
            kurtosis_channel: median(&mut kurtoses),
            lag1: sum(&lagged) / total,
            lag1_delta: sum(&|c| c.difference) / pairs / total,
            anchor_delta: sum(&|c| c.delta) / count(self.deltas) / total,
            predicted_bits: bits.sum::<f64>() / channels,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::normal;
    use super::*;

    fn summary(values: &DMatrix<f64>) -> Summary {
        let mut moments = Moments::default();
        moments.add(values);
        moments.summary().unwrap()
    }

    fn near(found: f64, expected: f64, tolerance: f64) {
        assert!(
            (found - expected).abs() < tolerance,
            "{found} is not {expected} within {tolerance}"
        );
    }

    #[test]
    fn independent_normal_values_with_means_and_one_outlier_channel() {
        let mut noise = normal(1);
        // Means 3 in every channel, deviation 1 and once 8; one dead channel.
        let values = DMatrix::from_fn(6, 20_000, |channel, _| match channel {
            5 => 3.0,
            4 => 3.0 + 8.0 * noise(),
            _ => 3.0 + noise(),
        });
        let found = summary(&values);
        near(found.mean_share, 54.0 / (54.0 + 68.0), 0.01);
        near(found.outlier_ratio, 8.0, 0.2);
        near(found.std, (68f64 / 5.0).sqrt(), 0.05);
        // E[x⁴] = 3σ⁴: pooled (4·3 + 3·4096) / 5 over 13.6² less 3; alone 0.
        near(
            found.kurtosis,
            3.0 * (4.0 + 4096.0) / 5.0 / 13.6f64.powi(2) - 3.0,
            0.5,
        );
        near(found.kurtosis_channel, 0.0, 0.1);
        near(found.lag1, 0.0, 0.03);
        near(found.lag1_delta, 2.0, 0.06);
        near(found.anchor_delta, 2.0, 0.06);
        near(found.predicted_bits, 0.0, 0.001);
    }

    #[test]
    fn tails_of_two_point_and_laplace_values_are_known() {
        let mut noise = normal(2);
        let signs = DMatrix::from_fn(3, 20_000, |_, _| 5.0 + noise().signum());
        near(summary(&signs).kurtosis, -2.0, 0.01);
        // A difference of products of normals is Laplace: excess kurtosis 3.
        let laplace = DMatrix::from_fn(3, 60_000, |_, _| noise() * noise() - noise() * noise());
        near(summary(&laplace).kurtosis, 3.0, 0.4);
    }

    #[test]
    fn neighbours_of_a_first_order_process() {
        let mut noise = normal(3);
        let rho = 0.8f64;
        let mut state = [0.0; 4];
        let innovation = (1.0 - rho * rho).sqrt();
        let columns: Vec<f64> = (0..40_000)
            .flat_map(|_| {
                state = state.map(|x| rho * x + innovation * noise());
                state.map(|x| x + 7.0)
            })
            .collect();
        let found = summary(&DMatrix::from_vec(4, 40_000, columns));
        near(found.lag1, rho, 0.01);
        near(found.lag1_delta, 2.0 * (1.0 - rho), 0.02);
        let to_anchor = (1..=9).map(|lag| 2.0 * (1.0 - rho.powi(lag))).sum::<f64>() / 9.0;
        near(found.anchor_delta, to_anchor, 0.03);
        near(found.predicted_bits, -0.5 * (1.0 - rho * rho).log2(), 0.02);
    }

    #[test]
    fn contexts_add_up_and_no_pair_spans_two() {
        // Each context is constant in time; only the jump between them is large.
        let mut moments = Moments::default();
        moments.add(&DMatrix::from_element(2, 50, 1.0));
        moments.add(&DMatrix::from_element(2, 50, -1.0));
        let found = moments.summary().unwrap();
        near(found.std, 1.0, 1e-9);
        near(found.lag1, 1.0, 1e-9);
        near(found.lag1_delta, 0.0, 1e-9);
        assert!(Moments::default().summary().is_none());
    }
}
