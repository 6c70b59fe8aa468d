//! Which tokens of reused chunks are computed anew.
//!
//! A token that is computed in some layer is computed in all layers before it, since it needs
//! its hidden state; so what a rule decides is up to which layer each token goes. All rules but
//! one decide before anything is computed. [`Rule::Deviation`] computes every token of the
//! first layers and goes on with those whose KV has changed most.

use std::collections::BTreeSet;
use std::ops::Range;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Rule {
    /// No token: chunks are reused as they are.
    None,
    /// The first tokens of every chunk (EPIC, Hu et al., arXiv 2410.15332).
    First,
    /// Any, evenly. To compare with.
    Random {
        /// Of the choice.
        seed: u64,
    },
    /// Those with the largest scores, which the caller has: recorded when the chunk was
    /// compiled, or from attention of the question (ProphetKV), or from an oracle.
    Scored,
    /// Those that change most, as deep as they do, by what was recorded of each layer when the
    /// chunk was compiled. Rows go where they bring most for what they cost: a token that is
    /// computed in `n` layers brings its scores of layers 1 to `n - 1`, each as a share of the
    /// layer's mean and divided by the layer's number, for what is wrong early spreads. The
    /// share of [`Selector`] is of all rows, the charged budget.
    Graded,
    /// The first tokens of every chunk, and then those with the largest scores.
    FirstAndScored {
        /// Tokens of each chunk.
        first: usize,
    },
    /// Those whose KV differs most from the reused (HKVD of CacheBlend).
    Deviation(Check),
}

/// When and how reused KV is compared with computed KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// The layer whose K and V are compared, from 0. All tokens are computed up to it. In layer 0
    /// nothing differs.
    pub layer: u16,
    /// What is compared.
    pub of: Compared,
    /// Gradual filtering: half as many tokens again go on behind the check, and each of the
    /// next layers leaves fewer, until [`Selector::share`] are left two layers later.
    pub gradual: bool,
}

/// Planes that [`Check`] compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// Keys, rotated for their new positions.
    Keys,
    /// Values.
    Values,
    /// Both.
    Both,
}

/// A rule, how many tokens it chooses, and how far they are computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Selector {
    /// How.
    pub rule: Rule,
    /// How many, as a share of the tokens reused; with [`Rule::Graded`], of their rows in all
    /// layers.
    pub share: f32,
    /// In how many layers their K and V are computed, from the first; later layers keep what is
    /// reused. `None` for all. With all tokens in all layers, this is full prefill.
    pub layers: Option<u16>,
}

/// Tokens of a prompt whose KV comes from a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reused {
    /// Where they stand.
    pub tokens: Range<usize>,
    /// Whether what stands before them is what they were computed behind: then their KV is
    /// right, and none of them is chosen.
    pub exact: bool,
}

/// Up to which layer each token of a prompt is computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// By token: layers that it is computed in, counted from the first. Tokens that are not
    /// reused are computed in all.
    pub layers: Vec<u16>,
    /// Tokens that are reused.
    reused: Vec<Reused>,
    /// Where tokens are chosen while they are computed, and the share that is left.
    check: Option<(Check, f32)>,
    /// Layers of the model.
    all: u16,
    /// Layers in which chosen tokens are computed.
    depth: u16,
}

impl Selection {
    /// What `selector` decides about a prompt of `tokens` tokens, of which `reused` have KV in a
    /// cache, for a model of `layers` layers. `scores` are by token of the prompt; the larger,
    /// the sooner computed; [`Rule::Graded`] takes a row for each layer from layer 1 on, the
    /// others one. Rules without scores ignore them.
    ///
    /// # Panics
    /// When `reused` is not inside the prompt, or scores are wanted and fewer than tokens.
    pub fn new(
        selector: Selector,
        tokens: usize,
        reused: &[Reused],
        layers: u16,
        scores: &[Vec<f32>],
    ) -> Self {
        let mut selection = Self {
            layers: vec![layers; tokens],
            reused: reused.to_vec(),
            check: None,
            all: layers,
            depth: selector.layers.unwrap_or(layers).min(layers),
        };
        let total = selection.open().count();
        let count = count(total, selector.share);
        for reused in reused {
            selection.layers[reused.tokens.clone()].fill(0);
        }
        if selector.share <= 0.0 {
            return selection;
        }
        match selector.rule {
            Rule::None => {}
            Rule::First => selection.first(count, usize::MAX),
            Rule::Random { seed } => {
                let scores: Vec<f32> = (0..tokens as u64).map(|token| noise(seed, token)).collect();
                selection.scored(count, &scores);
            }
            Rule::Scored => selection.scored(count, first_row(scores)),
            Rule::Graded => selection.graded(selector.share, scores),
            Rule::FirstAndScored { first } => {
                selection.first(count, first);
                let computed = |token: &usize| selection.layers[*token] > 0;
                let done = selection.open().filter(computed).count();
                selection.scored(count - done, first_row(scores));
            }
            Rule::Deviation(check) => {
                let open: Vec<usize> = selection.open().collect();
                for token in open {
                    selection.layers[token] = selection.depth;
                }
                selection.check = Some((check, selector.share));
            }
        }
        selection
    }

    /// Tokens that are reused, those included that are computed anew.
    pub fn reused_tokens(&self) -> usize {
        self.reused.iter().map(|reused| reused.tokens.len()).sum()
    }

    /// Tokens that may be chosen.
    fn open(&self) -> impl Iterator<Item = usize> + use<'_> {
        let inexact = self.reused.iter().filter(|reused| !reused.exact);
        inexact.flat_map(|reused| reused.tokens.clone())
    }

    /// `count` tokens, as many of each chunk as of the others, `most` at most.
    fn first(&mut self, count: usize, most: usize) {
        let mut left = count;
        for place in 0..most {
            let mut any = false;
            for reused in self.reused.iter().filter(|reused| !reused.exact) {
                if place < reused.tokens.len() && left > 0 {
                    self.layers[reused.tokens.start + place] = self.depth;
                    left -= 1;
                    any = true;
                }
            }
            if !any {
                return;
            }
        }
    }

    /// As many rows as `share` of all pays for, where they bring most.
    fn graded(&mut self, share: f32, scores: &[Vec<f32>]) {
        let open: Vec<usize> = self.open().collect();
        #[expect(clippy::cast_precision_loss, reason = "rows of a prompt")]
        let budget = f64::from(share) * open.len() as f64 * f64::from(self.all);
        // By token: what it brings to compute it in 1, 2, … layers.
        let mut gains: Vec<Vec<f64>> = vec![vec![0.0]; open.len()];
        for (layer, scores) in (1u32..).zip(scores.iter().take(usize::from(self.depth) - 1)) {
            let total: f64 = open.iter().map(|&token| f64::from(scores[token])).sum();
            #[expect(clippy::cast_precision_loss, reason = "tokens of a prompt")]
            let scale = open.len() as f64 / total.max(f64::MIN_POSITIVE) / f64::from(layer);
            for (gains, &token) in gains.iter_mut().zip(&open) {
                let so_far = gains.last().copied().unwrap_or_default();
                gains.push(so_far + f64::from(scores[token]) * scale);
            }
        }
        // Layers in which a token is computed when a row costs `price`, and all rows then.
        let depth = |gains: &[f64], price: f64| {
            let nothing = (0u16, 0.0);
            let best = (1u16..).zip(gains).fold(nothing, |best, (layers, gain)| {
                let left = gain - price * f64::from(layers);
                if left > best.1 { (layers, left) } else { best }
            });
            best.0
        };
        let rows = |price: f64| {
            let rows = gains.iter().map(|gains| f64::from(depth(gains, price)));
            rows.sum::<f64>()
        };
        // Dearer rows are fewer; bisection finds the lowest price that the budget pays.
        let (mut low, mut high) = (0.0, 1e9);
        for _ in 0..PRICES {
            let price = f64::midpoint(low, high);
            if rows(price) > budget {
                low = price;
            } else {
                high = price;
            }
        }
        for (&token, gains) in open.iter().zip(&gains) {
            self.layers[token] = if share < 1.0 {
                depth(gains, high)
            } else {
                self.depth
            };
        }
    }

    /// Those `count` of the tokens not chosen yet that have the largest scores.
    fn scored(&mut self, count: usize, scores: &[f32]) {
        let open = self.open().filter(|&token| self.layers[token] == 0);
        let open: Vec<usize> = open.collect();
        let values: Vec<f32> = open.iter().map(|&token| scores[token]).collect();
        for index in largest(&values, count) {
            self.layers[open[index]] = self.depth;
        }
    }

    /// What of `layer` is compared with what is reused there, for [`Self::narrow`].
    pub fn compares_at(&self, layer: u16) -> Option<Compared> {
        let (check, share) = self.check?;
        let layers = check.layer..check.layer + check.stages(share);
        layers.contains(&layer).then_some(check.of)
    }

    /// Leaves those tokens out, from `layer` on, that a check drops there. `deviations` are by
    /// token of the prompt; of tokens that are not computed any more they do not matter.
    pub fn narrow(&mut self, layer: u16, deviations: &[f32]) {
        let Some((check, share)) = self.check else {
            return;
        };
        let total = self.open().count();
        let wider = f32::from(
            check
                .stages(share)
                .saturating_sub(1 + layer.saturating_sub(check.layer)),
        );
        let count = count(total, share * (1.0 + wider / 4.0));
        let alive = self.open().filter(|&token| self.layers[token] > layer);
        let alive: Vec<usize> = alive.collect();
        let values: Vec<f32> = alive.iter().map(|&token| deviations[token]).collect();
        let mut dropped = vec![true; alive.len()];
        for index in largest(&values, count) {
            dropped[index] = false;
        }
        for (token, dropped) in alive.into_iter().zip(dropped) {
            if dropped {
                self.layers[token] = layer;
            }
        }
    }

    /// Rows of reused tokens whose Q, K and V are computed, summed over layers, as a share of
    /// those tokens times layers: the charged budget. Holds once all choices have been made.
    /// Rows that are computed to be compared, and then left out, count.
    pub fn charged(&self) -> f64 {
        let reused = self.reused.iter().flat_map(|reused| reused.tokens.clone());
        let tokens = reused.clone().count();
        let compared = match self.check {
            Some((check, _)) => check.layer + 1,
            None => 0,
        };
        let open: BTreeSet<usize> = self.open().collect();
        let rows: u64 = reused
            .map(|token| match open.contains(&token) {
                true => u64::from(self.layers[token].max(compared)),
                false => u64::from(self.layers[token]),
            })
            .sum();
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let charged = rows as f64 / (tokens.max(1) as f64 * f64::from(self.all.max(1)));
        charged
    }
}

impl Check {
    /// Layers that choose.
    fn stages(self, share: f32) -> u16 {
        if self.gradual && share < 0.5 { 3 } else { 1 }
    }
}

/// Indices of the `count` largest values, of equals the earlier, in no order.
pub fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    if count < order.len() {
        order.select_nth_unstable_by(count, |&a, &b| {
            values[b].total_cmp(&values[a]).then(a.cmp(&b))
        });
        order.truncate(count);
    }
    order
}

fn first_row(scores: &[Vec<f32>]) -> &[f32] {
    scores.first().map_or(&[], |row| row)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a share of the tokens of a prompt"
)]
fn count(total: usize, share: f32) -> usize {
    ((total as f32 * share.clamp(0.0, 1.0)).round() as usize).min(total)
}

/// Steps of the bisection: prices to a relative error far below what tells tokens apart.
const PRICES: usize = 100;

/// SplitMix64 (Steele, Lea, Flood, 2014), in [0, 1).
#[expect(clippy::cast_precision_loss, reason = "24 bits")]
fn noise(seed: u64, index: u64) -> f32 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / 16_777_216.0
}

#[cfg(test)]
mod tests;
