//! Which pages to read: those whose keys can have the largest products with the queries.
//!
//! The upper bound of each page's box (Quest, arXiv 2406.10774). The first page, the last two
//! full ones and those that are not full yet are always read.

use kvasir_engine::{BLOCK_TOKENS, ModelConfig};
use rayon::prelude::*;

/// Boxes of the full pages of a sequence's context.
#[derive(Debug)]
pub(super) struct Boxes {
    pages: usize,
    dim: usize,
    /// `[layer][kv_head][page][low, high][dim]`.
    bounds: Vec<f32>,
    kv_heads: usize,
}

impl Boxes {
    pub(super) fn new(config: &ModelConfig, tokens: usize) -> Self {
        let pages = tokens / BLOCK_TOKENS;
        let (dim, kv_heads) = (config.head_dim, config.kv_heads);
        Self {
            pages,
            dim,
            bounds: vec![0.0; config.layers * kv_heads * pages * 2 * dim],
            kv_heads,
        }
    }

    /// Takes note of keys `[kv_head][token][dim]` of a layer, which begin with a page.
    pub(super) fn note(&mut self, layer: usize, first_page: usize, keys: &[f32]) {
        let per_head = keys.len() / self.kv_heads;
        for (kv_head, keys) in keys.chunks_exact(per_head).enumerate() {
            for (index, page) in keys.chunks_exact(BLOCK_TOKENS * self.dim).enumerate() {
                let at = ((layer * self.kv_heads + kv_head) * self.pages + first_page + index)
                    * 2
                    * self.dim;
                let (low, high) = self.bounds[at..at + 2 * self.dim].split_at_mut(self.dim);
                low.fill(f32::INFINITY);
                high.fill(f32::NEG_INFINITY);
                for key in page.chunks_exact(self.dim) {
                    for ((low, high), &key) in low.iter_mut().zip(high.iter_mut()).zip(key) {
                        *low = low.min(key);
                        *high = high.max(key);
                    }
                }
            }
        }
    }

    /// By KV head, the pages for `queries`, `[head][dim]`, of a token at `position`.
    pub(super) fn choose(
        &self,
        layer: usize,
        queries: &[f32],
        position: usize,
        share: f32,
    ) -> Vec<Vec<u32>> {
        let group = queries.len() / self.dim / self.kv_heads;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of the pages"
        )]
        let count = (self.pages as f32 * share) as usize;
        (0..self.kv_heads)
            .into_par_iter()
            .map(|kv_head| {
                let queries = &queries[kv_head * group * self.dim..][..group * self.dim];
                let mut scores = self.scores(layer, kv_head, queries);
                let kept = [0, self.pages - 1, self.pages - 2];
                for page in kept {
                    scores[page].0 = f32::INFINITY;
                }
                let (chosen, ..) = scores.select_nth_unstable_by(count, |a, b| b.0.total_cmp(&a.0));
                let mut list: Vec<u32> = chosen.iter().map(|&(_, page)| page).collect();
                let last = u32::try_from(position / BLOCK_TOKENS).unwrap_or(u32::MAX);
                list.extend(u32::try_from(self.pages).unwrap_or(u32::MAX)..=last);
                list.sort_unstable();
                list
            })
            .collect()
    }

    /// The largest bound of any query, with its page.
    fn scores(&self, layer: usize, kv_head: usize, queries: &[f32]) -> Vec<(f32, u32)> {
        let stride = self.pages * 2 * self.dim;
        let boxes = &self.bounds[(layer * self.kv_heads + kv_head) * stride..][..stride];
        let pages = boxes.chunks_exact(2 * self.dim).zip(0u32..);
        pages
            .map(|(bounds, page)| {
                let (low, high) = bounds.split_at(self.dim);
                let bound = |query: &[f32]| {
                    let mut lanes = [0.0f32; 16];
                    let rows = query.chunks_exact(16).zip(low.chunks_exact(16));
                    for ((query, low), high) in rows.zip(high.chunks_exact(16)) {
                        for lane in 0..16 {
                            lanes[lane] += (query[lane] * low[lane]).max(query[lane] * high[lane]);
                        }
                    }
                    lanes.iter().sum::<f32>()
                };
                let best = queries.chunks_exact(self.dim).map(bound);
                (best.fold(f32::NEG_INFINITY, f32::max), page)
            })
            .collect()
    }
}
