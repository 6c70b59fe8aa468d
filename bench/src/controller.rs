//! `controller`: deadlines kept and levels reached over links whose bandwidth changes, in
//! virtual time.
//!
//! 120 seeded traces, a fifth of each kind ([`Kind`]), from 0.2 to 4 Gbit/s and from 1 to
//! 40 ms of round trip; over each nine requests, of 4,096, 8,192 and 16,384 tokens of context
//! with 0.5, 1 and 2 s to the first token. The constants of the controller were chosen on
//! other seeds. What is simulated, and how: [`simulator`].
//!
//! # Policies
//! - `ours`: [`Controller`](kvasir_plugin::controller::Controller), which keeps what it
//!   learns from one request of a trace to the next, and knows nothing at the first;
//! - `l0`, `l1`, `l2`: everything at one level, layer by layer; `text`: everything computed;
//! - `best_fixed`: of these four, the one that misses the fewest deadlines over all traces;
//! - `cachegen`: the rule of arXiv 2310.07240;
//! - `oracle`: the best mean level in time, by who knows trace and times.
//!
//! # Rows
//! Of requests for which there is a way to be in time; the oracle finds one if there is.
//! - `requests`, and `unavoidable`: those without, which count for nothing else;
//! - `violations/POLICY`: the share of requests that miss their deadline; of `ours`, `limit` is
//!   that of `best_fixed`, and `ratio` how many times more those are;
//! - `level/POLICY`: 0, 1 or 2, in the mean over chunks, layers and requests, in time or not.
//!   What is computed counts as 2, though it is exact;
//! - `estimate/median_error`: of the forecast median of the rate beside the mean rate of the
//!   next 200 ms; `estimate/low_exceeded`: how often that was above the forecast's low
//!   quantile, of 0.9;
//! - `KIND/…`: the same of one kind of trace.

mod simulator;
mod trace;

use std::thread;

use crate::report::{Report, Row, median};
use simulator::{Belief, Outcome, PARTS, Session};
use trace::{Kind, as_f64};

pub(crate) fn run(quick: bool) -> Report {
    let mut report = Report::new("controller");
    let seeds = if quick { 4 } else { SEEDS };
    let kinds: Vec<_> = Kind::ALL
        .map(|kind| (kind, Tally::of(kind, 0..seeds)))
        .into();
    let mut all = Tally::default();
    for (_, tally) in &kinds {
        all.add(tally);
    }
    report.set("traces", seeds * as_u64(Kind::ALL.len()));
    all.rows("", all.best_fixed(), &mut report);
    for (kind, tally) in &kinds {
        tally.rows(&format!("{}/", kind.name()), all.best_fixed(), &mut report);
    }
    report
}

/// Policies, in the order of a [`Tally`].
const POLICIES: [&str; 7] = ["ours", "l0", "l1", "l2", "text", "cachegen", "oracle"];
const OURS: usize = 0;
const FIXED: std::ops::Range<usize> = 1..5;

/// What came of some requests.
#[derive(Clone, Debug, Default)]
struct Tally {
    requests: usize,
    unavoidable: usize,
    missed: [usize; POLICIES.len()],
    levels: [f64; POLICIES.len()],
    beliefs: Vec<Belief>,
}

impl Tally {
    /// Of traces with these seeds.
    fn of(kind: Kind, seeds: std::ops::Range<u64>) -> Self {
        thread::scope(|scope| {
            let run = |seed| scope.spawn(move || Self::of_session(&Session::new(kind, seed)));
            let first = SEEDS_OF_A_KIND * kind as u64;
            let running: Vec<_> = seeds.map(|seed| run(first + seed)).collect();
            let mut all = Self::default();
            for one in running {
                all.add(&one.join().expect("a simulation does not panic"));
            }
            all
        })
    }

    fn of_session(session: &Session) -> Self {
        let mut tally = Self::default();
        let ours = session.ours(&mut tally.beliefs);
        let cachegen = session.cachegen();
        for ((request, ours), cachegen) in session.requests.iter().zip(ours).zip(cachegen) {
            tally.requests += 1;
            let Some(oracle) = session.oracle(request) else {
                tally.unavoidable += 1;
                continue;
            };
            let [l0, l1, l2] = [0, 1, PARTS - 1].map(|level| session.fixed(request, level));
            let text = Session::text(request);
            tally.count([ours, l0, l1, l2, text, cachegen, oracle]);
        }
        tally
    }

    fn count(&mut self, outcomes: [Outcome; POLICIES.len()]) {
        for (index, outcome) in outcomes.into_iter().enumerate() {
            self.missed[index] += usize::from(!outcome.in_time);
            self.levels[index] += outcome.level;
        }
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.unavoidable += other.unavoidable;
        for index in 0..POLICIES.len() {
            self.missed[index] += other.missed[index];
            self.levels[index] += other.levels[index];
        }
        self.beliefs.extend(&other.beliefs);
    }

    fn avoidable(&self) -> f64 {
        as_f64(self.requests - self.unavoidable)
    }

    fn violations(&self, policy: usize) -> f64 {
        as_f64(self.missed[policy]) / self.avoidable()
    }

    fn level(&self, policy: usize) -> f64 {
        self.levels[policy] / self.avoidable()
    }

    /// The one that misses the fewest deadlines; of several the finest.
    fn best_fixed(&self) -> usize {
        let fewest = FIXED.rev().min_by_key(|policy| self.missed[*policy]);
        fewest.expect("there are four")
    }

    /// The median of relative errors, and how often the low quantile was exceeded.
    fn estimates(&self) -> [f64; 2] {
        let known = self.beliefs.iter().filter(|belief| belief.rate > 0.0);
        let error = |belief: &Belief| (belief.forecast.median / belief.rate - 1.0).abs();
        let above = |belief: &&Belief| belief.rate > belief.forecast.low;
        let above = self.beliefs.iter().filter(above).count();
        [
            median(&mut known.map(error).collect::<Vec<_>>()),
            as_f64(above) / as_f64(self.beliefs.len()),
        ]
    }

    fn rows(&self, prefix: &str, best_fixed: usize, report: &mut Report) {
        let row = |name: &str, value, unit| Row::new(format!("{prefix}{name}"), value, unit);
        report.push(row("requests", as_f64(self.requests), ""));
        report.push(row("unavoidable", as_f64(self.unavoidable), ""));
        let [error, above] = self.estimates();
        report.push(row("estimate/median_error", error, "share"));
        report.push(row("estimate/low_exceeded", above, "share"));
        let named = POLICIES.into_iter().enumerate();
        for (policy, name) in named.chain([(best_fixed, "best_fixed")]) {
            let violations = self.violations(policy);
            let mut missed = row(&format!("violations/{name}"), violations, "share");
            if policy == OURS && violations > 0.0 {
                let limit = self.violations(best_fixed);
                missed = missed.against(limit, limit / violations);
            }
            report.push(missed);
            report.push(row(&format!("level/{name}"), self.level(policy), ""));
        }
    }
}

fn as_u64(value: usize) -> u64 {
    value as u64
}

/// Of each kind of trace.
const SEEDS: u64 = 24;
/// More than are used of a kind.
const SEEDS_OF_A_KIND: u64 = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Tally {
        let mut all = Tally::default();
        for kind in Kind::ALL {
            all.add(&Tally::of(kind, 0..SEEDS));
        }
        all
    }

    /// At most half of the deadlines that the best fixed level misses, at a finer level in
    /// the mean; nothing that the oracle could not do.
    #[test]
    fn deadlines_hold_where_fixed_levels_miss_them() {
        let all = all();
        let best = all.best_fixed();
        let missed = all.missed;
        assert!(2 * missed[OURS] <= missed[best], "{missed:?}, best {best}");
        assert!(all.level(OURS) >= all.level(best), "{:?}", all.levels);
        let [cachegen, oracle] = [5, 6];
        assert!(2 * missed[OURS] <= missed[cachegen], "{missed:?}");
        assert_eq!(missed[oracle], 0);
        assert!(all.unavoidable > 0 && all.unavoidable < all.requests / 2);
    }

    /// Whoever is in time without knowing the trace, is so with knowing it, and at no finer
    /// level than that allows.
    #[test]
    fn the_oracle_is_a_bound() {
        for kind in Kind::ALL {
            for seed in 0..4 {
                let session = Session::new(kind, SEEDS_OF_A_KIND * kind as u64 + seed);
                let ours = session.ours(&mut Vec::new());
                for (request, ours) in session.requests.iter().zip(ours) {
                    let oracle = session.oracle(request);
                    let fixed = (0..PARTS).map(|level| session.fixed(request, level));
                    for outcome in fixed.chain([ours, Session::text(request)]) {
                        let level = outcome.in_time.then_some(outcome.level);
                        let bound = oracle.map(|oracle| oracle.level + SIZES_DIFFER);
                        assert!(level <= bound, "{kind:?} {seed}: {outcome:?}, {oracle:?}");
                    }
                }
            }
        }
    }

    /// Two runs are the same, however the machine is.
    #[test]
    fn a_session_is_deterministic() {
        let [one, other] = [(); 2].map(|()| {
            let session = Session::new(Kind::Lte, 7);
            session.ours(&mut Vec::new())
        });
        assert_eq!(one, other);
    }

    /// The oracle counts with the mean size of a layer's parts.
    const SIZES_DIFFER: f64 = 0.02;
}
