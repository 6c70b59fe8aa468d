//! From what each query makes of each page to which pages a KV head reads.

use super::select::Vote;

/// What pages may weigh, for a few queries of one KV head.
#[derive(Clone, Debug, Default)]
pub(super) struct Estimates {
    pub(super) queries: usize,
    pub(super) pages: Vec<u32>,
    /// `[page][query]`: logarithms of weights before normalisation.
    pub(super) logits: Vec<f32>,
    /// By query, what all pages that are not listed may weigh, as a share of those that are.
    pub(super) rest: Vec<f32>,
}

impl Estimates {
    pub(super) fn new(queries: usize) -> Self {
        Self {
            queries,
            rest: vec![0.0; queries],
            ..Self::default()
        }
    }

    /// By query, the logarithm of what all listed pages weigh.
    pub(super) fn totals(&self) -> Vec<f32> {
        let mut tops = vec![f32::NEG_INFINITY; self.queries];
        for row in self.logits.chunks_exact(self.queries) {
            for (top, logit) in tops.iter_mut().zip(row) {
                *top = top.max(*logit);
            }
        }
        let mut sums = vec![0.0; self.queries];
        for row in self.logits.chunks_exact(self.queries) {
            for ((sum, logit), top) in sums.iter_mut().zip(row).zip(&tops) {
                *sum += (logit - top).exp();
            }
        }
        let totals = tops.iter().zip(&sums).map(|(top, sum)| top + sum.ln());
        totals.collect()
    }

    /// Score of each page.
    pub(super) fn scores(&self, totals: &[f32], vote: Vote) -> Vec<f32> {
        let rows = self.logits.chunks_exact(self.queries);
        rows.map(|row| vote.weigh(row, totals)).collect()
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
    /// What the queries together make of a page: of its shares of their weights.
    pub(super) fn weigh(self, logits: &[f32], totals: &[f32]) -> f32 {
        let shares = logits.iter().zip(totals);
        let shares = shares.map(|(logit, total)| (logit - total).exp());
        match self {
            Self::Soft => shares.sum(),
            Self::Max => shares.fold(0.0, f32::max),
        }
    }
}

/// A KV head's pages, best first, and how much to take of them.
#[derive(Debug)]
pub(super) struct Ballot {
    /// Score and page, by falling scores; those that are read in any case are not among them.
    ranked: Vec<(f32, u32)>,
    /// Mean share of the weights that pages have which are read in any case.
    certain: f32,
    /// Mean share of each ranked page.
    shares: Vec<f32>,
}

impl Ballot {
    pub(super) fn new(estimates: &Estimates, vote: Vote, is_certain: impl Fn(u32) -> bool) -> Self {
        let totals = estimates.totals();
        #[expect(clippy::cast_precision_loss, reason = "queries are few")]
        let queries = estimates.queries as f32;
        let share = |row: &[f32]| -> f32 {
            let each = row.iter().zip(&totals).zip(&estimates.rest);
            each.map(|((logit, total), rest)| (logit - total).exp() / (1.0 + rest))
                .sum::<f32>()
                / queries
        };
        let mut certain = 0.0;
        let mut ranked = Vec::with_capacity(estimates.pages.len());
        let rows = estimates.logits.chunks_exact(estimates.queries);
        for (&page, row) in estimates.pages.iter().zip(rows) {
            if is_certain(page) {
                certain += share(row);
            } else {
                ranked.push((vote.weigh(row, &totals), page, share(row)));
            }
        }
        ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        Self {
            shares: ranked.iter().map(|(_, _, share)| *share).collect(),
            ranked: ranked
                .into_iter()
                .map(|(score, page, _)| (score, page))
                .collect(),
            certain,
        }
    }

    /// Pages until the budget is spent, or the target of mass reached.
    fn len(&self, budget: usize, mass: Option<f32>) -> usize {
        let budget = budget.min(self.ranked.len());
        let Some(mass) = mass else { return budget };
        let mut sum = self.certain;
        let before = self.shares.iter().take_while(|&&share| {
            let is_short = sum < mass;
            sum += share;
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
            all.extend(scores.map(|(score, _)| (*score, head)));
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
        pages.map(|(_, page)| *page).collect()
    });
    pages.collect()
}
