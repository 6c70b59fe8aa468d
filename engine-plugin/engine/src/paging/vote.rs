//! From what each query makes of each page to which pages a KV head reads.

use super::select::Vote;
use crate::kernels::{Isa, add_weights, log_sum, max_weights};

/// What pages may weigh, for a few queries of one KV head.
#[derive(Clone, Debug, Default)]
pub(super) struct Estimates {
    pub(super) pages: Vec<u32>,
    /// `[query][page]`: logarithms of weights before normalisation.
    pub(super) logits: Vec<Vec<f32>>,
    /// By query, what all pages that are not listed may weigh, as a share of those that are.
    pub(super) rest: Vec<f32>,
}

impl Estimates {
    pub(super) fn new(queries: usize) -> Self {
        Self {
            pages: Vec::new(),
            logits: vec![Vec::new(); queries],
            rest: vec![0.0; queries],
        }
    }

    /// By query, the logarithm of what all listed pages weigh.
    pub(super) fn totals(&self) -> Vec<f32> {
        let isa = Isa::detect();
        let total = |logits: &Vec<f32>| {
            let mut total = 0.0;
            log_sum(isa, logits, &mut total);
            total
        };
        self.logits.iter().map(total).collect()
    }

    /// Score of each page.
    pub(super) fn scores(&self, totals: &[f32], vote: Vote) -> Vec<f32> {
        vote.scores(&self.logits, totals)
    }

    /// The `want`-th highest score; below all for fewer pages.
    pub(super) fn bar(&self, want: usize, totals: &[f32], vote: Vote) -> f32 {
        let mut scores = self.scores(totals, vote);
        if want == 0 || scores.len() < want {
            return f32::NEG_INFINITY;
        }
        let (_, bar, _) = scores.select_nth_unstable_by(want - 1, |a, b| b.total_cmp(a));
        *bar
    }
}

impl Vote {
    /// What the queries together make of each page, `[query][page]`: of its shares of their
    /// weights.
    pub(super) fn scores(self, logits: &[Vec<f32>], totals: &[f32]) -> Vec<f32> {
        let isa = Isa::detect();
        let mut scores = vec![0.0; logits.first().map_or(0, Vec::len)];
        for (logits, &total) in logits.iter().zip(totals) {
            match self {
                Self::Soft => add_weights(isa, logits, total, &mut scores),
                Self::Max => max_weights(isa, logits, total, &mut scores),
            }
        }
        scores
    }
}

/// A KV head's pages, best first, and how much to take of them.
#[derive(Debug)]
pub(super) struct Ballot {
    /// By falling scores; those that are read in any case are not among them.
    ranked: Vec<Ranked>,
    /// Mean share of the weights that pages have which are read in any case.
    certain: f32,
}

#[derive(Clone, Copy, Debug)]
struct Ranked {
    score: f32,
    page: u32,
    /// Mean share of the weights.
    share: f32,
}

impl Ballot {
    /// Of `most` pages that are not certain.
    pub(super) fn new(
        estimates: &Estimates,
        vote: Vote,
        most: usize,
        is_certain: impl Fn(u32) -> bool,
    ) -> Self {
        let mut totals = estimates.totals();
        let scores = estimates.scores(&totals, vote);
        #[expect(clippy::cast_precision_loss, reason = "queries are few")]
        let queries = totals.len() as f32;
        for (total, rest) in totals.iter_mut().zip(&estimates.rest) {
            *total += (queries * (1.0 + rest)).ln();
        }
        let shares = estimates.scores(&totals, Vote::Soft);
        let mut certain = 0.0;
        let mut ranked = Vec::with_capacity(scores.len());
        for ((&page, score), share) in estimates.pages.iter().zip(scores).zip(shares) {
            if is_certain(page) {
                certain += share;
            } else {
                ranked.push(Ranked { score, page, share });
            }
        }
        let order = |a: &Ranked, b: &Ranked| b.score.total_cmp(&a.score).then(a.page.cmp(&b.page));
        if most < ranked.len() {
            ranked.select_nth_unstable_by(most, order);
            ranked.truncate(most);
        }
        ranked.sort_unstable_by(order);
        Self { ranked, certain }
    }

    /// Pages until the budget is spent, or the target of mass reached.
    fn len(&self, budget: usize, mass: Option<f32>) -> usize {
        let budget = budget.min(self.ranked.len());
        let Some(mass) = mass else { return budget };
        let mut sum = self.certain;
        let before = self.ranked.iter().take_while(|it| {
            let is_short = sum < mass;
            sum += it.share;
            is_short
        });
        before.count().min(budget)
    }
}

/// What each head takes: up to `budget` pages; or up to twice as many, and no more than
/// `budget` a head on average, where heads share.
pub(super) fn elect(
    ballots: &[Ballot],
    budget: usize,
    mass: Option<f32>,
    is_shared: bool,
) -> Vec<Vec<u32>> {
    let each = if is_shared { 2 * budget } else { budget };
    let mut lengths: Vec<usize> = ballots.iter().map(|it| it.len(each, mass)).collect();
    let total: usize = lengths.iter().sum();
    if is_shared && total > budget * ballots.len() {
        let mut all: Vec<(f32, usize)> = Vec::with_capacity(total);
        for (head, (ballot, length)) in ballots.iter().zip(&lengths).enumerate() {
            let scores = ballot.ranked[..*length].iter();
            all.extend(scores.map(|it| (it.score, head)));
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        lengths.fill(0);
        for (_, head) in &all[..budget * ballots.len()] {
            lengths[*head] += 1;
        }
    }
    let taken = ballots.iter().zip(lengths);
    let pages = taken.map(|(ballot, length)| {
        let pages = ballot.ranked[..length].iter();
        pages.map(|it| it.page).collect()
    });
    pages.collect()
}
