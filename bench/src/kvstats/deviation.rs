//! How far reused KV is from that of full prefill, token by token.
//!
//! The quantity that CacheBlend selects by (Yao et al., 2025): squared
//! difference of K and V, summed over both, of chunks computed alone with keys
//! rotated to their new positions. Tokens of the first chunk are left out: they
//! follow the same prefix alone and in the context, so they are exact. So is all
//! of layer 0, whose K and V know nothing but their token and position.

use std::collections::BTreeSet;

use super::count;
use super::plane::{Plane, Shape};
use crate::quality::reader::Kv;

/// Share of the tokens that a selector may recompute.
pub(super) const SELECTED: f64 = 0.15;
/// Share that hold most of the deviation in larger models.
pub(super) const FEW: f64 = 0.05;

/// What one context says, by layer from layer 1 on: `[layer - 1]`. `None` where
/// nothing deviates.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Deviation {
    /// Spearman correlation of the layer's deviation with the next layer's; one
    /// fewer than layers.
    pub(super) rank_correlation: Vec<Option<f64>>,
    /// Share of the deviation held by the [`FEW`] tokens that deviate most.
    pub(super) top5: Vec<Option<f64>>,
    /// Share held by the [`SELECTED`] tokens that deviate most.
    pub(super) top15: Vec<Option<f64>>,
    /// Share of the layer's [`SELECTED`] tokens that are also those of the mean over
    /// all later layers, each layer's deviation divided by its total; one fewer
    /// than layers.
    pub(super) overlap15: Vec<Option<f64>>,
}

impl Deviation {
    /// Compares a context from position 0 with its chunks from position 1.
    pub(super) fn new(shape: Shape, full: &Kv, reused: &[Kv]) -> Self {
        let layers: Vec<Vec<f64>> = (1..shape.layers)
            .map(|layer| of_layer(shape, full, reused, layer))
            .collect();
        Self::of(&layers)
    }

    /// Of `[layer][token]`.
    fn of(layers: &[Vec<f64>]) -> Self {
        let shares: Vec<Vec<f64>> = layers
            .iter()
            .map(|layer| {
                let total: f64 = layer.iter().sum();
                let scale = if total > 0.0 { total.recip() } else { 0.0 };
                layer.iter().map(|deviation| deviation * scale).collect()
            })
            .collect();
        Self {
            rank_correlation: layers
                .windows(2)
                .map(|pair| spearman(&pair[0], &pair[1]))
                .collect(),
            top5: layers.iter().map(|layer| top_share(layer, FEW)).collect(),
            top15: layers
                .iter()
                .map(|layer| top_share(layer, SELECTED))
                .collect(),
            overlap15: (1..layers.len())
                .map(|next| overlap(&shares[next - 1], &sum(&shares[next..]), SELECTED))
                .collect(),
        }
    }
}

/// Squared deviation of every token after the first chunk.
pub(crate) fn of_layer(shape: Shape, full: &Kv, reused: &[Kv], layer: usize) -> Vec<f64> {
    let mut position = 1;
    let mut deviations = Vec::with_capacity(full.tokens);
    for (index, chunk) in reused.iter().enumerate() {
        if index > 0 {
            deviations.extend((0..chunk.tokens).map(|token| {
                let heads = |kv, token| {
                    [Plane::K, Plane::V]
                        .into_iter()
                        .flat_map(move |plane| shape.heads(kv, layer, plane, token))
                        .flatten()
                };
                heads(chunk, token)
                    .zip(heads(full, position + token))
                    .map(|(&reused, &full)| f64::from(reused - full).powi(2))
                    .sum::<f64>()
            }));
        }
        position += chunk.tokens;
    }
    deviations
}

fn sum(layers: &[Vec<f64>]) -> Vec<f64> {
    let mut total = vec![0.0; layers.first().map_or(0, Vec::len)];
    for layer in layers {
        for (total, value) in total.iter_mut().zip(layer) {
            *total += value;
        }
    }
    total
}

/// Correlation of ranks; equal values share the mean of their ranks. `None`
/// where either side is all equal.
fn spearman(one: &[f64], other: &[f64]) -> Option<f64> {
    let (one, other) = (ranks(one), ranks(other));
    // Ranks of n values always have mean (n + 1) / 2.
    let mean = (count(one.len()) + 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum()
    };
    let scale = (product(&one, &one) * product(&other, &other)).sqrt();
    (scale > 0.0).then(|| product(&one, &other) / scale)
}

/// From 1; ties get the mean of the ranks they take up.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0;
    for ties in order.chunk_by(|&a, &b| values[a].total_cmp(&values[b]).is_eq()) {
        for &index in ties {
            ranks[index] = count(before) + (count(ties.len()) + 1.0) / 2.0;
        }
        before += ties.len();
    }
    ranks
}

/// Tokens of the largest values: `share` of all, rounded down, but at least one.
/// The earlier of equals.
fn top(values: &[f64], share: f64) -> BTreeSet<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of the number of tokens"
    )]
    let few = ((count(values.len()) * share) as usize).max(1);
    order.into_iter().take(few).collect()
}

/// Share of the total that the largest values hold.
fn top_share(values: &[f64], share: f64) -> Option<f64> {
    let total: f64 = values.iter().sum();
    let held: f64 = top(values, share)
        .into_iter()
        .map(|index| values[index])
        .sum();
    (total > 0.0).then(|| held / total)
}

/// Share of the largest of one that are among the largest of the other.
fn overlap(one: &[f64], other: &[f64], share: f64) -> Option<f64> {
    let something = |values: &[f64]| values.iter().any(|&value| value > 0.0);
    let (a, b) = (top(one, share), top(other, share));
    (something(one) && something(other)).then(|| count(a.intersection(&b).count()) / count(a.len()))
}

#[cfg(test)]
mod tests {
    use super::super::plane::synthetic;
    use super::*;

    #[test]
    fn spearman_of_known_permutations() {
        let ordered = [1.0, 2.0, 3.0, 4.0, 5.0];
        assert_eq!(
            spearman(&ordered, &[10.0, 20.0, 30.0, 40.0, 99.0]),
            Some(1.0)
        );
        assert_eq!(spearman(&ordered, &[5.0, 4.0, 3.0, 2.0, 1.0]), Some(-1.0));
        // 1 - 6 Σd² / n(n² - 1), d = (-1, 1, -1, 1, 0).
        let found = spearman(&ordered, &[2.0, 1.0, 4.0, 3.0, 5.0]).unwrap();
        assert!((found - 0.8).abs() < 1e-12);
        assert_eq!(spearman(&ordered, &[7.0; 5]), None);
    }

    #[test]
    fn ties_share_their_mean_rank() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 3.0]), [3.0, 1.0, 3.0, 3.0]);
        // scipy.stats.spearmanr([1, 2, 2, 3], [1, 3, 2, 4]).
        let found = spearman(&[1.0, 2.0, 2.0, 3.0], &[1.0, 3.0, 2.0, 4.0]).unwrap();
        assert!((found - 0.948_683_298_050_513_8).abs() < 1e-12);
    }

    #[test]
    fn shares_of_the_largest() {
        let even = [1.0; 100];
        assert_eq!(top_share(&even, 0.15), Some(0.15));
        let mut planted = [1.0; 100];
        planted[40] = 901.0;
        assert_eq!(top_share(&planted, 0.05), Some(0.905));
        assert_eq!(top_share(&[0.0; 100], 0.15), None);
    }

    #[test]
    fn overlap_counts_common_tokens() {
        let at = |range: std::ops::Range<usize>| {
            let planted = |i| if range.contains(&i) { 2.0 } else { 1.0 };
            (0..100).map(planted).collect::<Vec<f64>>()
        };
        assert_eq!(overlap(&at(0..15), &at(0..15), SELECTED), Some(1.0));
        assert_eq!(overlap(&at(0..15), &at(12..27), SELECTED), Some(0.2));
        // Later layers count by shares: a large one does not drown the others.
        let large: Vec<f64> = at(50..65).iter().map(|x| x * 1e6).collect();
        let found = Deviation::of(&[at(0..15), at(0..15), at(0..15), large]);
        assert_eq!(found.overlap15[0], Some(1.0));
        assert_eq!(found.overlap15[2], Some(0.0));
        assert_eq!(found.rank_correlation.len(), 3);
        assert_eq!(found.top15.len(), 4);
    }

    #[test]
    fn a_planted_deviation_is_found_where_it_is() {
        let shape = Shape {
            layers: 2,
            kv_heads: 2,
            head_dim: 2,
        };
        let at = |plane: Plane, head: usize, token: usize, d: usize| {
            [0.0, 500.0][plane as usize] + (100 * head + 10 * token + d) as f32
        };
        let full = synthetic(shape, 7, at);
        let chunk = |first: usize| synthetic(shape, 3, move |p, h, t, d| at(p, h, first + t, d));
        let mut reused = [chunk(1), chunk(4)];
        assert_eq!(of_layer(shape, &full, &reused, 1), [0.0; 3]);
        // The first chunk is not looked at; token 1 of the second moves by (3, 4).
        reused[0].layers[1][0] += 1.0;
        reused[1].layers[1][2] += 3.0;
        reused[1].layers[1][12 + 2] += 4.0;
        assert_eq!(of_layer(shape, &full, &reused, 1), [0.0, 25.0, 0.0]);
        assert_eq!(of_layer(shape, &full, &reused, 0), [0.0; 3]);
    }
}
