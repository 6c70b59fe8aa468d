//! Choosing the pages that each KV head of a layer attends to.

use rayon::prelude::*;

use super::digest::{Detail, Digests};
use super::estimate::{self, Keys};
use super::refine::{Bounds, Judge, Turned};
use super::vote::{Ballot, Estimates, elect};
use crate::kernels::{Isa, rotate};
use crate::kv::{BLOCK_TOKENS, BlockId, KvPool};
use crate::model::{BeforeLayer, Model, Pages};
use crate::rope::Frequencies;

/// How pages are judged.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Rule {
    /// All are read.
    All,
    /// Ours. Ranks pages by what their tokens weigh as far as these are known, kept inside the
    /// bounds of the page's box; opens groups best first, and only those whose upper bound is
    /// high enough.
    #[default]
    Bounds,
    /// The upper bound of each page's box: Quest, arXiv 2406.10774.
    Quest,
    /// The upper bound of each page's mean box: ArkVale, NeurIPS 2024. Needs digests with
    /// [`Detail::Deviation`].
    MeanBox,
    /// The mean of each page's keys.
    Centroid,
    /// `q · k` of every token, queries voting with their weights, and the choice of the token
    /// before taken again while queries are alike: as TokenSelect, arXiv 2411.02886. Needs
    /// all keys in memory.
    Exact {
        /// Cosine from which queries count as alike; 1 or more for never.
        alike: f32,
    },
    /// `q · k` in the pairs of channels that RoPE turns together which matter most: as
    /// FASA does. Needs all keys in memory, if only in these channels.
    Frequency {
        /// Share of the pairs.
        share: f32,
    },
    /// The latest pages.
    Recency,
    /// Any pages.
    Random {
        /// What the choice is drawn from.
        seed: u64,
    },
    /// The weights themselves: the most mass that a budget can have. Needs all keys in memory.
    Oracle,
}

impl Rule {
    /// What digests it reads, if it reads any.
    pub fn detail(self) -> Option<Detail> {
        match self {
            Self::Bounds => Some(Detail::Tokens),
            Self::Quest | Self::Centroid => Some(Detail::Mean),
            Self::MeanBox => Some(Detail::Deviation),
            _ => None,
        }
    }

    /// Whether it reads the keys of all pages.
    pub fn needs_keys(self) -> bool {
        matches!(
            self,
            Self::Exact { .. } | Self::Frequency { .. } | Self::Oracle
        )
    }
}

/// How the query heads of one KV head, and the rows of a step, agree on its pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vote {
    /// By the sum of the shares of attention that they expect a page to have.
    #[default]
    Soft,
    /// By the largest of them.
    Max,
}

/// How much is read, and how it is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// How pages are judged.
    pub rule: Rule,
    /// Pages read, of those of the sequence: the budget, in a layer, averaged over its KV
    /// heads. Default: 1/8.
    pub share: f32,
    /// Stops below the budget where this share of attention is expected to be reached.
    /// Default: never.
    pub mass: Option<f32>,
    /// Default: [`Vote::Soft`].
    pub vote: Vote,
    /// Whether a KV head may take up to twice the budget, where others of its layer need
    /// less. Default: it may.
    pub is_shared: bool,
    /// Pages at the start that are always read. Default: 1.
    pub sinks: usize,
    /// Latest full pages that are always read. Default: 1.
    pub recent: usize,
    /// First layers that read everything; not counted against the budget of others.
    /// Default: 0.
    pub exact_layers: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rule: Rule::default(),
            share: 0.125,
            mass: None,
            vote: Vote::default(),
            is_shared: true,
            sinks: 1,
            recent: 1,
            exact_layers: 0,
        }
    }
}

/// Chooses pages for the steps of one sequence.
#[derive(Debug)]
pub struct Selector {
    options: Options,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    windows: Vec<Option<usize>>,
    frequencies: Frequencies,
    isa: Isa,
    /// By layer, what was chosen last; of [`Rule::Exact`].
    last: Vec<Option<Last>>,
    draws: u64,
}

/// What a choice is made from.
#[derive(Clone, Copy, Debug)]
struct Look<'a> {
    layer: usize,
    /// Of the step: `[row][stride]`, query heads first.
    rows: &'a [f32],
    stride: usize,
    pool: &'a KvPool,
    blocks: &'a [BlockId],
}

/// A choice that may be taken again.
#[derive(Debug)]
struct Last {
    queries: Vec<f32>,
    pages: usize,
    chosen: Vec<Vec<u32>>,
}

impl Selector {
    /// For sequences of `model`.
    pub fn new(model: &Model, options: Options) -> Self {
        let config = model.config();
        Self {
            options,
            heads: config.heads,
            kv_heads: config.kv_heads,
            dim: config.head_dim,
            windows: config.windows.clone(),
            frequencies: model.frequencies().clone(),
            isa: Isa::detect(),
            last: (0..config.layers).map(|_| None).collect(),
            draws: 0,
        }
    }

    /// What it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The pages that a step is to attend to in the layer at hand. `digests` are of its
    /// sequence, whose page table is `blocks`; K is read from there by rules that need keys,
    /// and by no other.
    ///
    /// Runs on the current rayon pool, a thread a KV head. Meant for the few rows of
    /// decoding: its cost grows with rows times query heads.
    ///
    /// # Panics
    ///
    /// When the batch has no such step, or digests are of another model; with
    /// [`Rule::MeanBox`] and digests that have means.
    pub fn choose(
        &mut self,
        before: &BeforeLayer<'_>,
        step: usize,
        digests: &Digests,
        blocks: &[BlockId],
    ) -> Pages {
        let stride = before.stride;
        let look = Look {
            layer: before.layer,
            rows: &before.rows[before.steps[step].start * stride..]
                [..before.steps[step].len() * stride],
            stride,
            pool: before.pool,
            blocks,
        };
        let positions = &before.positions[before.steps[step].clone()];
        self.pages(&look, positions, digests)
    }

    /// The pages that a step is expected to choose in the next layer, for
    /// [`BeforeLayer::expected`]: the choice of [`queries`](crate::model::NextLayer::queries), which costs as much as
    /// the one at hand. `None` before the last layer, and by rules that need keys.
    ///
    /// # Panics
    ///
    /// As [`Self::choose`].
    pub fn foresee(
        &mut self,
        before: &BeforeLayer<'_>,
        step: usize,
        digests: &Digests,
        blocks: &[BlockId],
    ) -> Option<Pages> {
        if self.options.rule.needs_keys() {
            return None;
        }
        let rows = before.steps[step].clone();
        let queries = before.next?.queries(rows.clone());
        let look = Look {
            layer: before.layer + 1,
            rows: &queries,
            stride: self.heads * self.dim,
            pool: before.pool,
            blocks,
        };
        Some(self.pages(&look, &before.positions[rows], digests))
    }

    fn pages(&mut self, look: &Look<'_>, positions: &[usize], digests: &Digests) -> Pages {
        let options = self.options;
        let Some(&last) = positions.last() else {
            return Pages::All;
        };
        let total = last / BLOCK_TOKENS + 1;
        if options.rule == Rule::All
            || look.layer < options.exact_layers
            || self.windows[look.layer].is_some()
        {
            return Pages::All;
        }
        let digested = digests.pages().min(total);
        let budget = budget(options.share, total);
        let certain = self.certain(
            digests,
            look.layer,
            digested,
            (budget + digested).saturating_sub(total),
        );
        let room =
            |kv_head: usize| (budget + digested).saturating_sub(total + certain[kv_head].len());
        let queries = |kv_head: usize| self.queries(look, kv_head);
        let queries: Vec<Vec<Vec<f32>>> = (0..self.kv_heads).map(queries).collect();
        if let Some(chosen) = self.again(look.layer, digested, &queries) {
            return Pages::Chosen(with_undigested(chosen, digested, total));
        }
        let draw = self.draws;
        let ballots: Vec<Ballot> = (0..self.kv_heads)
            .into_par_iter()
            .map(|kv_head| {
                let keys = Keys {
                    pool: look.pool,
                    blocks: look.blocks,
                    layer: look.layer,
                    kv_head,
                    dim: self.dim,
                    pages: digested,
                };
                let most = if options.is_shared { 2 } else { 1 } * room(kv_head);
                let estimates = self.estimate(digests, &keys, &queries[kv_head], most, draw);
                let certain = &certain[kv_head];
                Ballot::new(&estimates, options.vote, most, |page| {
                    page as usize >= digested || certain.contains(&page)
                })
            })
            .collect();
        self.draws += self.kv_heads as u64;
        let room = (0..self.kv_heads).map(room).min().unwrap_or(0);
        let mut chosen = elect(&ballots, room, options.mass, options.is_shared);
        for (chosen, certain) in chosen.iter_mut().zip(certain) {
            chosen.extend(certain);
        }
        if let Rule::Exact { .. } = options.rule {
            self.last[look.layer] = Some(Last {
                queries: queries.into_iter().flatten().flatten().collect(),
                pages: digested,
                chosen: chosen.clone(),
            });
        }
        Pages::Chosen(with_undigested(chosen, digested, total))
    }

    /// By KV head, full pages that are read whatever their estimates: up to `room`.
    fn certain(
        &self,
        digests: &Digests,
        layer: usize,
        digested: usize,
        room: usize,
    ) -> Vec<Vec<u32>> {
        let page = |page: usize| u32::try_from(page).unwrap_or(u32::MAX);
        let recent = digested.saturating_sub(self.options.recent)..digested;
        let ends = (0..self.options.sinks.min(recent.start))
            .chain(recent)
            .map(page);
        let ends: Vec<u32> = ends.take(room).collect();
        let of = |kv_head: usize| {
            let mut pages = ends.clone();
            if self.options.rule.detail().is_some() {
                let odd = digests.head(layer, kv_head).odd.iter().copied();
                let more = odd.filter(|&odd| odd < page(digested) && !ends.contains(&odd));
                pages.extend(more.take(room - ends.len()));
            }
            pages
        };
        (0..self.kv_heads).map(of).collect()
    }

    /// Scaled queries of one KV head: of all rows and all heads of its group.
    fn queries(&self, look: &Look<'_>, kv_head: usize) -> Vec<Vec<f32>> {
        let group = self.heads / self.kv_heads;
        #[expect(clippy::cast_precision_loss, reason = "head_dim is at most 512")]
        let scale = 1.0 / (self.dim as f32).sqrt();
        let of_row = |row: &[f32]| -> Vec<Vec<f32>> {
            let heads =
                row[kv_head * group * self.dim..][..group * self.dim].chunks_exact(self.dim);
            heads
                .map(|query| query.iter().map(|q| q * scale).collect())
                .collect()
        };
        look.rows
            .chunks_exact(look.stride)
            .flat_map(of_row)
            .collect()
    }

    /// What the rule makes of the pages of a KV head.
    fn estimate(
        &self,
        digests: &Digests,
        keys: &Keys<'_>,
        queries: &[Vec<f32>],
        want: usize,
        draw: u64,
    ) -> Estimates {
        let Options {
            rule, mass, vote, ..
        } = self.options;
        if let Some(detail) = rule.detail() {
            assert_eq!(digests.detail(), detail, "digests for this rule");
            let turned = self.turn(digests, queries);
            let head = digests.head(keys.layer, keys.kv_head);
            let mut judge = Judge::new(digests, head, &turned);
            return match rule {
                Rule::Quest => judge.all(|bounds| bounds.upper),
                Rule::MeanBox => judge.all(Bounds::mean_box),
                Rule::Centroid => judge.all(|bounds| bounds.third),
                _ => judge.best(want, mass, vote),
            };
        }
        match rule {
            Rule::Exact { .. } => keys.token_vote(queries),
            Rule::Frequency { share } => keys.frequencies(queries, share),
            Rule::Random { seed } => {
                let draw = draw + keys.kv_head as u64;
                estimate::random(keys.pages, seed.wrapping_add(draw << 32))
            }
            Rule::Recency => estimate::recency(keys.pages),
            _ => keys.exact(queries),
        }
    }

    /// Queries turned back by how each page was moved.
    fn turn(&self, digests: &Digests, queries: &[Vec<f32>]) -> Turned {
        let padded = digests.padded();
        let half = self.dim / 2;
        let mut values = Vec::with_capacity(queries.len() * padded);
        let (mut cos, mut sin) = (vec![0.0; half], vec![0.0; half]);
        for (from, to) in digests.moves() {
            self.frequencies.shift(to, from, &mut cos, &mut sin);
            for query in queries {
                let start = values.len();
                values.extend_from_slice(query);
                if from != to {
                    rotate(self.isa, &mut values[start..], &cos, &sin);
                }
                values.resize(start + padded, 0.0);
            }
        }
        Turned {
            padded,
            queries: queries.len(),
            values,
        }
    }

    /// What was chosen last, if queries are like those then.
    fn again(
        &self,
        layer: usize,
        digested: usize,
        queries: &[Vec<Vec<f32>>],
    ) -> Option<Vec<Vec<u32>>> {
        let Rule::Exact { alike } = self.options.rule else {
            return None;
        };
        let last = self.last[layer].as_ref()?;
        let now: Vec<f32> = queries.iter().flatten().flatten().copied().collect();
        if last.pages != digested || last.queries.len() != now.len() {
            return None;
        }
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let norms = dot(&now, &now) * dot(&last.queries, &last.queries);
        let cosine = dot(&now, &last.queries) / norms.sqrt();
        (cosine >= alike).then(|| last.chosen.clone())
    }
}

/// Pages that a share of `total` comes to; one at least.
pub(super) fn budget(share: f32, total: usize) -> usize {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of the pages of a sequence, and casts of floats saturate"
    )]
    let pages = (share * total as f32) as usize;
    pages.clamp(1, total)
}

/// Adds the pages that no digest tells of.
fn with_undigested(mut chosen: Vec<Vec<u32>>, digested: usize, total: usize) -> Vec<Vec<u32>> {
    for pages in &mut chosen {
        pages.extend((digested..total).map(|page| u32::try_from(page).unwrap_or(u32::MAX)));
        pages.sort_unstable();
    }
    chosen
}
