//! Bounds from digests, and the walk from boxes of 128 tokens to pages.
//!
//! Best first, as in LeoAM (arXiv 2506.20187): groups are opened in the order of what their
//! best page could weigh, until none that is left could hold a page that is wanted. So where
//! attention is skewed, most of a context is rejected by its groups.

use super::digest::{Detail, Digests, GROUP_PAGES, Group, Head, fine_channels, token_words};
use super::select::Vote;
use super::vote::Estimates;
use crate::kernels::{Isa, Reach, Weighed, add_tokens, log_mean, reach, reach_packed, weigh};
use crate::kv::BLOCK_TOKENS;

/// Rounds after which all groups that could matter are opened; half of them are in those
/// before, after which more is known about what the others have to beat.
const ROUNDS: usize = 3;

/// Variance of a page's keys, as a share of the squared width of their box, about: of sixteen
/// draws of a normal distribution it is 0.08.
const BOX_VARIANCE: f32 = 0.09;

/// The same of keys about the middle of the quarter that they are in: a uniform distribution's.
const QUARTER_VARIANCE: f32 = 1.0 / (12.0 * 16.0);

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
    /// Of what is not known of keys.
    pub(super) variance: f32,
}

impl Bounds {
    /// The logarithm of the mean weight of the page's keys, were what is not known of them
    /// normally distributed, independently in each channel: a variance adds half of itself.
    /// Never outside the bounds.
    pub(super) fn expected(&self) -> f32 {
        let expected = self.third + self.variance / 2.0;
        expected.clamp(self.lower, self.upper.max(self.lower))
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
    fine: usize,
    words: usize,
    weights: Vec<f32>,
    /// The group that the next two are of.
    at: Option<usize>,
    /// By channel, the variance of what is not known of keys as a share of their page's squared
    /// width.
    shares: Vec<f32>,
    /// Steps that a quarter of a page's box is wide: `[page][fine channel]`.
    quarters: Vec<f32>,
    /// Weights of the group's fine channels, and what they come to in a page.
    fine_weights: Vec<f32>,
    page_weights: Vec<f32>,
    reached: [Reach; GROUP_PAGES],
}

impl<'a> Judge<'a> {
    pub(super) fn new(digests: &'a Digests, head: &'a Head, turned: &'a Turned) -> Self {
        Self {
            isa: Isa::detect(),
            head,
            groups: digests.groups(),
            turned,
            detail: digests.detail(),
            fine: fine_channels(digests.dim()),
            words: token_words(digests.dim()),
            weights: vec![0.0; turned.padded],
            at: None,
            shares: Vec::new(),
            quarters: Vec::new(),
            fine_weights: Vec::new(),
            page_weights: Vec::new(),
            reached: [Reach::default(); GROUP_PAGES],
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
            &mut self.weights,
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

    /// The same of each of its pages, by `each`: page of the sequence, bounds.
    pub(super) fn pages(&mut self, group: usize, query: usize, mut each: impl FnMut(u32, Bounds)) {
        let (weighed, slack) = self.weigh(group, query);
        let Group { first, pages, .. } = self.groups[group];
        let width = self.detail.rows() * self.turned.padded;
        let codes = &self.head.codes[first * width..][..pages * width];
        let reached = &mut self.reached[..pages];
        if self.detail == Detail::Tokens {
            let channels = &self.head.fine[group * self.fine..][..self.fine];
            if self.at != Some(group) {
                self.at = Some(group);
                self.shares.clear();
                self.shares.resize(self.turned.padded, BOX_VARIANCE);
                self.quarters.clear();
                for &channel in channels {
                    self.shares[channel as usize] = QUARTER_VARIANCE;
                }
                for codes in codes.chunks_exact(width) {
                    self.quarters.extend(channels.iter().map(|&channel| {
                        let code = codes[channel as usize];
                        f32::from((code >> 4) - (code & 15)) / 4.0
                    }));
                }
            }
            self.fine_weights.clear();
            let weights = channels
                .iter()
                .map(|&channel| self.weights[channel as usize]);
            self.fine_weights.extend(weights);
            reach_packed(self.isa, codes, &self.weights, &self.shares, reached);
        } else {
            reach(self.isa, codes, &self.weights, reached);
        }
        for (index, reached) in self.reached[..pages].iter().enumerate() {
            let base = weighed.base;
            let mut bounds = Bounds {
                upper: base + reached.upper + slack,
                lower: base + reached.lower - slack,
                middle: base + f32::midpoint(reached.upper, reached.lower),
                variance: reached.spread * BOX_VARIANCE,
                third: base,
            };
            bounds.third = match self.detail {
                Detail::Mean => base + reached.third,
                Detail::Deviation => reached.third_size,
                Detail::Tokens => {
                    bounds.variance = reached.part;
                    let quarters = self.quarters[index * self.fine..][..self.fine].iter();
                    let weights = quarters.zip(&self.fine_weights);
                    self.page_weights.clear();
                    self.page_weights
                        .extend(weights.map(|(quarter, weight)| quarter * weight));
                    let mut tokens = [bounds.middle; BLOCK_TOKENS];
                    let words = &self.head.tokens[(first + index) * self.words..][..self.words];
                    add_tokens(self.isa, words, &self.page_weights, &mut tokens);
                    let mut mean = 0.0;
                    log_mean(self.isa, &tokens, &mut mean);
                    mean
                }
            };
            each(u32::try_from(first + index).unwrap_or(u32::MAX), bounds);
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
        let queries = self.turned.queries;
        let from = found.logits.len();
        let pages = self.groups[group].pages;
        found.logits.resize(from + pages * queries, 0.0);
        let first = u32::try_from(self.groups[group].first).unwrap_or(u32::MAX);
        found.pages.extend((first..).take(pages));
        for query in 0..queries {
            let mut page = from + query;
            self.pages(group, query, |_, bounds| {
                found.logits[page] = rule(&bounds);
                page += queries;
            });
        }
    }

    /// Estimates of those pages that are among the `want` best, and of others in their
    /// groups. With a target of `mass`, of enough pages to know that it is reached.
    pub(super) fn best(&mut self, want: usize, mass: Option<f32>, vote: Vote) -> Estimates {
        let queries = self.turned.queries;
        let mut uppers = Vec::with_capacity(self.groups.len() * queries);
        for group in 0..self.groups.len() {
            for query in 0..queries {
                let (upper, _) = self.group(group, query);
                uppers.push(upper);
            }
        }
        let mut found = Estimates::new(queries);
        let mut left: Vec<usize> = (0..self.groups.len()).collect();
        // What weights are relative to: first the best groups' bounds, then what was found.
        let mut totals = vec![f32::NEG_INFINITY; queries];
        for row in uppers.chunks_exact(queries) {
            for (total, upper) in totals.iter_mut().zip(row) {
                *total = total.max(*upper);
            }
        }
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
            keys.extend(left.iter().map(|&group| {
                let row = &uppers[group * queries..][..queries];
                (vote.weigh(row, &totals), group)
            }));
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
                pages * (uppers[group * queries + query] - totals[query]).exp()
            });
            *rest = weights.sum();
        }
        found
    }
}
