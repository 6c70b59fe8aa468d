//! What rules that read no digest make of pages.

use rayon::prelude::*;

use super::vote::Estimates;
use crate::config::ModelConfig;
use crate::kernels::{Isa, dots};
use crate::kv::{BLOCK_TOKENS, BlockId, KvPool, Plane};
use crate::model::BeforeLayer;

/// Keys of one KV head that are in the pool.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys<'a> {
    pub(super) pool: &'a KvPool,
    pub(super) blocks: &'a [BlockId],
    pub(super) layer: usize,
    pub(super) kv_head: usize,
    pub(super) dim: usize,
    /// Pages, from the first.
    pub(super) pages: usize,
}

impl Keys<'_> {
    /// Shows the keys of each page, `[token][dim]`.
    fn each(&self, mut each: impl FnMut(usize, &[f32])) {
        let mut keys = vec![0.0; BLOCK_TOKENS * self.dim];
        for (page, &block) in self.blocks[..self.pages].iter().enumerate() {
            let block = self
                .pool
                .head_block(self.layer, block, Plane::K, self.kv_head);
            block.widen(self.dim, &mut keys, self.dim);
            each(page, &keys);
        }
    }

    /// Logits of all tokens, `[query][token]`.
    fn logits(&self, queries: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let mut logits = vec![vec![0.0; self.pages * BLOCK_TOKENS]; queries.len()];
        let isa = Isa::detect();
        self.each(|page, keys| {
            for (query, logits) in queries.iter().zip(&mut logits) {
                let logits = &mut logits[page * BLOCK_TOKENS..][..BLOCK_TOKENS];
                dots(isa, keys, query, logits);
            }
        });
        logits
    }

    fn listed(&self, queries: usize) -> Estimates {
        let mut found = Estimates::new(queries);
        found
            .pages
            .extend(0..u32::try_from(self.pages).unwrap_or(u32::MAX));
        found
    }

    /// The weights that pages have.
    pub(super) fn exact(&self, queries: &[Vec<f32>]) -> Estimates {
        let mut found = self.listed(queries.len());
        let logits = self.logits(queries);
        for (found, logits) in found.logits.iter_mut().zip(&logits) {
            found.extend(logits.chunks_exact(BLOCK_TOKENS).map(log_sum));
        }
        found
    }

    /// Queries vote for tokens with their weights; a page is worth its best token.
    pub(super) fn token_vote(&self, queries: &[Vec<f32>]) -> Estimates {
        let mut votes = vec![0.0; self.pages * BLOCK_TOKENS];
        for logits in self.logits(queries) {
            let total = log_sum(&logits);
            for (vote, logit) in votes.iter_mut().zip(logits) {
                *vote += (logit - total).exp();
            }
        }
        let mut found = self.listed(1);
        let pages = votes.chunks_exact(BLOCK_TOKENS);
        let best = pages.map(|page| page.iter().copied().fold(0.0, f32::max));
        found.logits[0].extend(best.map(f32::ln));
        found
    }

    /// As [`Self::exact`], of the `share` of RoPE's pairs of channels in which products with
    /// these queries differ most between keys.
    pub(super) fn frequencies(&self, queries: &[Vec<f32>], share: f32) -> Estimates {
        let half = self.dim / 2;
        let (mut sums, mut squares) = (vec![0.0; self.dim], vec![0.0; self.dim]);
        self.each(|_, keys| {
            for key in keys.chunks_exact(self.dim) {
                for ((sum, square), key) in sums.iter_mut().zip(&mut squares).zip(key) {
                    *sum += key;
                    *square += key * key;
                }
            }
        });
        #[expect(
            clippy::cast_precision_loss,
            reason = "a sequence has 2^24 tokens at most"
        )]
        let tokens = (self.pages * BLOCK_TOKENS).max(1) as f32;
        let variance = |channel: usize| squares[channel] - sums[channel] * sums[channel] / tokens;
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a few channels"
        )]
        let kept = (half as f32 * share).ceil() as usize;
        let dominant = queries.iter().map(|query| {
            let energy = |pair: usize| {
                let of = |channel: usize| query[channel] * query[channel] * variance(channel);
                of(pair) + of(pair + half)
            };
            let mut pairs: Vec<usize> = (0..half).collect();
            pairs.sort_by(|&a, &b| energy(b).total_cmp(&energy(a)));
            let mut masked = query.clone();
            for &pair in &pairs[kept.min(half)..] {
                (masked[pair], masked[pair + half]) = (0.0, 0.0);
            }
            masked
        });
        self.exact(&dominant.collect::<Vec<_>>())
    }
}

/// By row of a step and query head, `[row · heads]`, the share of attention that each page
/// of the sequence has in the layer at hand when all are read; rows see no later row.
///
/// # Panics
///
/// When the batch has no such step.
pub fn page_weights(
    config: &ModelConfig,
    before: &BeforeLayer<'_>,
    step: usize,
    blocks: &[BlockId],
) -> Vec<Vec<f32>> {
    let (dim, group) = (config.head_dim, config.heads / config.kv_heads);
    let rows = before.steps[step].clone();
    let Some(last) = rows.clone().last() else {
        return Vec::new();
    };
    let pages = before.positions[last] / BLOCK_TOKENS + 1;
    #[expect(clippy::cast_precision_loss, reason = "head_dim is at most 512")]
    let scale = 1.0 / (dim as f32).sqrt();
    let row = |row: usize| &before.rows[row * before.stride..][..before.stride];
    let of_head = |kv_head: usize| {
        let keys = Keys {
            pool: before.pool,
            blocks,
            layer: before.layer,
            kv_head,
            dim,
            pages,
        };
        let queries: Vec<Vec<f32>> = rows
            .clone()
            .flat_map(|it| row(it)[kv_head * group * dim..][..group * dim].chunks_exact(dim))
            .map(|query| query.iter().map(|q| q * scale).collect())
            .collect();
        let mut logits = keys.logits(&queries);
        for (index, (query, logits)) in queries.iter().zip(&mut logits).enumerate() {
            // Keys of the rows are not in their pages yet.
            for own in rows.clone() {
                let key = &row(own)[(config.heads + kv_head) * dim..][..dim];
                let dot = query.iter().zip(key).map(|(q, k)| q * k).sum();
                logits[before.positions[own]] = dot;
            }
            logits[before.positions[rows.start + index / group] + 1..].fill(f32::NEG_INFINITY);
        }
        logits
    };
    let heads: Vec<Vec<Vec<f32>>> = (0..config.kv_heads).into_par_iter().map(of_head).collect();
    let ordered = (0..rows.len()).flat_map(|row| {
        heads
            .iter()
            .flat_map(move |head| &head[row * group..(row + 1) * group])
    });
    let shares = ordered.map(|logits| {
        let total = log_sum(logits);
        let pages = logits.chunks_exact(BLOCK_TOKENS);
        let share = |page: &[f32]| page.iter().map(|logit| (logit - total).exp()).sum();
        pages.map(share).collect()
    });
    shares.collect()
}

/// Later pages before earlier ones.
pub(super) fn recency(pages: usize) -> Estimates {
    let mut found = Estimates::new(1);
    found
        .pages
        .extend(0..u32::try_from(pages).unwrap_or(u32::MAX));
    #[expect(clippy::cast_precision_loss, reason = "a rank is enough")]
    let logits = (0..pages).map(|page| page as f32 - pages as f32);
    found.logits[0].extend(logits);
    found
}

/// In an order that `seed` decides (SplitMix64).
pub(super) fn random(pages: usize, seed: u64) -> Estimates {
    let mut found = recency(pages);
    let mut state = seed;
    for logit in &mut found.logits[0] {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        #[expect(clippy::cast_precision_loss, reason = "any noise will do")]
        let unit = (z >> 40) as f32 / (1u64 << 24) as f32;
        *logit = unit;
    }
    found
}

/// The logarithm of the sum of exponentials.
fn log_sum(logits: &[f32]) -> f32 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - top).exp()).sum();
    top + sum.ln()
}
