//! Bounds from digests, and the walk from boxes of 128 tokens to pages.
//!
//! Best first, as in LeoAM (arXiv 2506.20187): groups are opened in the order of what their
//! best page could weigh, until none that is left could hold a page that is wanted. So where
//! attention is skewed, most of a context is rejected by its groups.

use super::digest::{Detail, Digests, GROUP_PAGES, Group, Head};
use super::select::Vote;
use super::vote::Estimates;
use crate::kernels::{Isa, Reach, Weighed, add_signs, log_means, reach, reach_ends, weigh};
use crate::kv::BLOCK_TOKENS;

/// Rounds after which all groups that could matter are opened; half of them are in those
/// before, after which more is known about what the others have to beat.
const ROUNDS: usize = 3;

/// Queries of one KV head as each move of pages wants them: `[move][query][padded]`, scaled.
#[derive(Debug)]
pub(super) struct Turned {
    pub(super) padded: usize,
    pub(super) queries: usize,
    pub(super) values: Vec<f32>,
}

impl Turned {
    pub(super) fn get(&self, moved: usize, query: usize) -> &[f32] {
        &self.values[(moved * self.queries + query) * self.padded..][..self.padded]
    }
}

/// What a digest says of `query · key` over all keys of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Bounds {
    pub(super) upper: f32,
    pub(super) lower: f32,
    /// With the middle of the box.
    pub(super) middle: f32,
    /// With the mean of the keys; what the mean box reaches above its middle; or the
    /// logarithm of the mean weight of the keys as far as they are known.
    pub(super) third: f32,
}

impl Bounds {
    /// The logarithm of the mean weight of the page's keys, as far as they are known; never
    /// outside the bounds.
    pub(super) fn expected(&self) -> f32 {
        self.third.min(self.upper).max(self.lower)
    }

    /// How high the mean box reaches; of digests with deviations.
    pub(super) fn mean_box(&self) -> f32 {
        self.middle + self.third
    }
}

/// Reads digests of one KV head for a few queries.
#[derive(Debug)]
pub(super) struct Judge<'a> {
    isa: Isa,
    head: &'a Head,
    groups: &'a [Group],
    turned: &'a Turned,
    detail: Detail,
    dim: usize,
    /// Of the group at hand: `[query][channel]`, the same in the group's order, and what bits
    /// of tokens come to in a page.
    weights: Vec<f32>,
    weighed: Vec<(Weighed, f32)>,
    ordered: Vec<f32>,
    rows: Vec<f32>,
    sums: Vec<[f32; BLOCK_TOKENS]>,
    reached: Vec<Reach>,
}

impl<'a> Judge<'a> {
    pub(super) fn new(digests: &'a Digests, head: &'a Head, turned: &'a Turned) -> Self {
        let (width, queries) = (turned.padded, turned.queries);
        Self {
            isa: Isa::detect(),
            head,
            groups: digests.groups(),
            turned,
            detail: digests.detail(),
            dim: digests.dim(),
            weights: vec![0.0; queries * width],
            weighed: Vec::with_capacity(queries),
            ordered: vec![0.0; queries * width],
            rows: vec![0.0; queries * width],
            sums: vec![[0.0; BLOCK_TOKENS]; queries],
            reached: vec![Reach::default(); queries.max(GROUP_PAGES)],
        }
    }

    fn weigh(&mut self, group: usize, query: usize) -> (Weighed, f32) {
        let padded = self.turned.padded;
        let mut weighed = Weighed::default();
        weigh(
            self.isa,
            &self.head.low[group * padded..][..padded],
            &self.head.step[group * padded..][..padded],
            f32::from(self.detail.steps()),
            self.turned.get(self.groups[group].moved, query),
            &mut self.weights[query * padded..][..padded],
            &mut weighed,
        );
        // Of sums in lanes; what rounding takes from a sum is a share of its magnitudes.
        #[expect(clippy::cast_precision_loss, reason = "head_dim is at most 512")]
        let roundings = (padded / 16 + 16) as f32;
        let slack = weighed.size * roundings * f32::EPSILON;
        (weighed, slack)
    }

    /// The largest and smallest that `query · key` can be over a group's keys.
    pub(super) fn group(&mut self, group: usize, query: usize) -> (f32, f32) {
        let (weighed, slack) = self.weigh(group, query);
        (
            weighed.base + weighed.above + slack,
            weighed.base + weighed.below - slack,
        )
    }

    /// The same of each of its pages, by `each`: page of the group, query, bounds.
    pub(super) fn pages(&mut self, group: usize, mut each: impl FnMut(usize, usize, Bounds)) {
        let Group { first, pages, .. } = self.groups[group];
        let padded = self.turned.padded;
        let width = self.detail.rows() * padded;
        let codes = &self.head.codes[first * width..][..pages * width];
        let bounds_of = |reached: &Reach, weighed: &Weighed, slack: f32| Bounds {
            upper: weighed.base + reached.upper + slack,
            lower: weighed.base + reached.lower - slack,
            middle: weighed.base + f32::midpoint(reached.upper, reached.lower),
            third: weighed.base + reached.third,
        };
        if self.detail != Detail::Tokens {
            for query in 0..self.turned.queries {
                let (weighed, slack) = self.weigh(group, query);
                let reached = &mut self.reached[..pages];
                reach(
                    self.isa,
                    codes,
                    &self.weights[query * padded..][..padded],
                    reached,
                );
                for (page, reached) in reached.iter().enumerate() {
                    let mut bounds = bounds_of(reached, &weighed, slack);
                    if self.detail == Detail::Deviation {
                        bounds.third = reached.third_size;
                    }
                    each(page, query, bounds);
                }
            }
            return;
        }
        self.weighed.clear();
        for query in 0..self.turned.queries {
            let weighed = self.weigh(group, query);
            self.weighed.push(weighed);
        }
        let (order, twice) = (
            &self.head.order[group * self.dim..][..self.dim],
            self.head.twice[group],
        );
        let twice = usize::from(twice);
        let ordered = self.ordered.chunks_exact_mut(padded);
        for (weights, ordered) in self.weights.chunks_exact(padded).zip(ordered) {
            for (to, &channel) in ordered.iter_mut().zip(order) {
                *to = weights[usize::from(channel)];
            }
        }
        let signs = self.head.signs[first * padded..].chunks_exact(padded);
        for (page, (codes, signs)) in codes.chunks_exact(width).zip(signs).enumerate() {
            let reached = &mut self.reached[..self.weighed.len()];
            reach_ends(
                self.isa,
                codes,
                &self.ordered,
                self.dim - twice,
                twice,
                &mut self.rows,
                reached,
            );
            add_signs(self.isa, signs, &self.rows, &mut self.sums);
            log_means(self.isa, &self.sums, reached);
            for (query, (reached, (weighed, slack))) in
                reached.iter().zip(&self.weighed).enumerate()
            {
                each(page, query, bounds_of(reached, weighed, *slack));
            }
        }
    }

    /// Estimates of all pages.
    pub(super) fn all(&mut self, rule: impl Fn(&Bounds) -> f32) -> Estimates {
        let mut found = Estimates::new(self.turned.queries);
        for group in 0..self.groups.len() {
            self.open(group, &mut found, &rule);
        }
        found
    }

    /// Adds the pages of a group.
    fn open(&mut self, group: usize, found: &mut Estimates, rule: impl Fn(&Bounds) -> f32) {
        let from = found.pages.len();
        let pages = self.groups[group].pages;
        for logits in &mut found.logits {
            logits.resize(from + pages, 0.0);
        }
        let first = u32::try_from(self.groups[group].first).unwrap_or(u32::MAX);
        found.pages.extend((first..).take(pages));
        self.pages(group, |page, query, bounds| {
            found.logits[query][from + page] = rule(&bounds);
        });
    }

    /// Estimates of those pages that are among the `want` best, and of others in their
    /// groups. With a target of `mass`, of enough pages to know that it is reached.
    pub(super) fn best(&mut self, want: usize, mass: Option<f32>, vote: Vote) -> Estimates {
        let queries = self.turned.queries;
        let mut uppers = vec![vec![0.0; self.groups.len()]; queries];
        for (query, uppers) in uppers.iter_mut().enumerate() {
            for (group, upper) in uppers.iter_mut().enumerate() {
                (*upper, _) = self.group(group, query);
            }
        }
        let mut found = Estimates::new(queries);
        let mut left: Vec<usize> = (0..self.groups.len()).collect();
        // What weights are relative to: first the best groups' bounds, then what was found.
        let best = |uppers: &Vec<f32>| uppers.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut totals: Vec<f32> = uppers.iter().map(best).collect();
        let mut keys: Vec<(f32, usize)> = Vec::new();
        let mut rounds = 0;
        while !left.is_empty() && want > 0 {
            let (mut bar, mut most) = (f32::NEG_INFINITY, 0.0);
            if !found.pages.is_empty() {
                totals = found.totals();
                bar = found.bar(want, &totals, vote);
                most = mass.map_or(0.0, |mass| (1.0 - mass) / 4.0);
            }
            keys.clear();
            let scores = vote.scores(&uppers, &totals);
            keys.extend(left.iter().map(|&group| (scores[group], group)));
            keys.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
            let mut matter = keys.partition_point(|(key, _)| *key > bar);
            if mass.is_some() {
                // Those behind that might together hold too much of the mass.
                let mut sum = 0.0;
                let behind = keys.iter().rev().take_while(|(key, group)| {
                    #[expect(clippy::cast_precision_loss, reason = "a group has few pages")]
                    let pages = self.groups[*group].pages as f32;
                    sum += key * pages;
                    sum < most
                });
                matter = matter.max(keys.len() - behind.count());
            }
            if matter == 0 {
                break;
            }
            rounds += 1;
            let round = match rounds {
                1 => 2 * want.div_ceil(GROUP_PAGES),
                2..=ROUNDS => matter.div_ceil(2),
                _ => matter,
            };
            let round = round.min(matter);
            for &(_, group) in &keys[..round] {
                self.open(group, &mut found, Bounds::expected);
            }
            left.clear();
            left.extend(keys[round..].iter().map(|(_, group)| *group));
        }
        for (query, rest) in found.rest.iter_mut().enumerate() {
            let weights = left.iter().map(|&group| {
                #[expect(clippy::cast_precision_loss, reason = "a group has few pages")]
                let pages = self.groups[group].pages as f32;
                pages * (uppers[query][group] - totals[query]).exp()
            });
            *rest = weights.sum();
        }
        found
    }
}
