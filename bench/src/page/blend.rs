//! What runs say whose methods compute a part of reused chunks anew, `blend:RULE:BUDGET[:LAYERS]`.
//!
//! A point is a method at what it was charged, which is not quite its budget; the points of a
//! rule are a curve. Several runs are read as one: what a method does to a task is taken from the
//! first run that asked it, and held against full prefill and naive reuse of the same run.

use std::path::Path;

use super::PageError;
use super::read::{Quality, Report, Row, note};

pub(super) mod markdown;
pub(super) mod plot;

/// Reads a report in which some method blends.
pub(super) fn load(path: &Path) -> Result<Report, PageError> {
    let report = Report::load(path, super::QUALITY)?;
    if Blending::new(std::slice::from_ref(&report))
        .curves
        .is_empty()
    {
        return Err(PageError::Rows {
            path: path.to_owned(),
            suite: "quality --methods naive,blend:RULE:BUDGET",
            missing: "`blend:RULE:BUDGET/charged`",
        });
    }
    Ok(report)
}

/// All runs, by rule.
#[derive(Debug)]
pub(super) struct Blending<'a> {
    runs: Vec<Quality<'a>>,
    /// In the order of their first row.
    curves: Vec<Curve<'a>>,
    /// That any method was asked about.
    tasks: Vec<&'a str>,
}

/// A rule at its budgets.
#[derive(Debug)]
struct Curve<'a> {
    rule: String,
    /// The cheapest first.
    points: Vec<Point<'a>>,
}

/// A rule at one budget.
#[derive(Clone, Copy, Debug)]
struct Point<'a> {
    method: &'a str,
    /// Share of rows that were computed.
    charged: f64,
}

/// What curves are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measure {
    Exact,
    Kl,
    /// What is gained over naive reuse, as a share of what full prefill gains over it.
    Closed,
}

impl<'a> Blending<'a> {
    pub(super) fn new(reports: &'a [Report]) -> Self {
        let runs: Vec<Quality<'a>> = reports.iter().map(Quality::new).collect();
        let mut tasks = Vec::new();
        let mut curves: Vec<Curve<'a>> = Vec::new();
        for run in &runs {
            for &method in &run.methods {
                let charged = run.total(method, "charged").and_then(|row| row.value);
                let (Some(rule), Some(charged)) = (rule(method), charged) else {
                    continue;
                };
                for task in run.tasks_of(EXACT) {
                    if task != ALL && run.row(method, task, EXACT).is_some() {
                        note(&mut tasks, task);
                    }
                }
                let at = curves.iter().position(|curve| curve.rule == rule);
                let at = at.unwrap_or_else(|| {
                    let points = Vec::new();
                    curves.push(Curve { rule, points });
                    curves.len() - 1
                });
                let points = &mut curves[at].points;
                if points.iter().all(|known| known.method != method) {
                    points.push(Point { method, charged });
                }
            }
        }
        for curve in &mut curves {
            let by_charge = |a: &Point<'_>, b: &Point<'_>| a.charged.total_cmp(&b.charged);
            curve.points.sort_by(by_charge);
        }
        Self {
            runs,
            curves,
            tasks,
        }
    }

    /// The first run that asked a method about a task. All tasks of a run that left some out
    /// are other tasks.
    fn run(&self, method: &str, task: &str) -> Option<&Quality<'a>> {
        let mut runs = self.runs.iter();
        runs.find(|run| {
            let asked = |task: &&str| run.row(method, task, EXACT).is_some();
            asked(&task) && (task != ALL || self.tasks.iter().all(asked))
        })
    }

    fn row(&self, method: &str, task: &str, measure: &str) -> Option<&'a Row> {
        self.run(method, task)?.row(method, task, measure)
    }

    /// Tasks on which naive reuse loses exact match, its whole interval above zero.
    fn with_gap(&self) -> Vec<&'a str> {
        let loses = |task: &&str| {
            let rows = |run: &Quality<'a>| run.row(NAIVE, task, "em_loss");
            let loss = self.runs.iter().find_map(rows).and_then(Row::point);
            loss.is_some_and(|loss| loss.lo > 0.0)
        };
        self.tasks.iter().copied().filter(loses).collect()
    }

    /// Over some tasks together; nothing if the method was not asked about one of them.
    fn mean(&self, measure: Measure, method: &str, tasks: &[&str]) -> Option<f64> {
        // Others as in the run that asked the method.
        let mean = |of: &str, name: &str| {
            let value = |task: &&str| self.run(method, task)?.row(of, task, name)?.value;
            let sum: f64 = tasks.iter().map(value).sum::<Option<f64>>()?;
            #[expect(clippy::cast_precision_loss, reason = "a few tasks")]
            (!tasks.is_empty()).then(|| sum / tasks.len() as f64)
        };
        match measure {
            Measure::Exact => mean(method, EXACT),
            Measure::Kl => mean(method, "kl"),
            Measure::Closed => {
                let (full, naive) = (mean(FULL, EXACT)?, mean(NAIVE, EXACT)?);
                let gained = mean(method, EXACT)? - naive;
                (full > naive).then(|| gained / (full - naive))
            }
        }
    }
}

impl<'a> Curve<'a> {
    /// The point nearest to a budget, if any is near.
    fn near(&self, budget: f64) -> Option<&Point<'a>> {
        let off = |point: &&Point<'_>| (point.charged - budget).abs();
        let nearest = self
            .points
            .iter()
            .min_by(|a, b| off(a).total_cmp(&off(b)))?;
        (off(&nearest) <= NEAR).then_some(nearest)
    }
}

/// `RULE`, with the layers if there are some, of a method that blends.
fn rule(method: &str) -> Option<String> {
    let mut parts = method.strip_prefix("blend:")?.split(':');
    let (rule, _budget) = (parts.next()?, parts.next()?);
    Some(match parts.next() {
        Some(layers) => format!("{rule}, {layers} layers"),
        None => rule.to_owned(),
    })
}

/// Exact match in the rows.
const EXACT: &str = "em";
/// The cell of all tasks together.
const ALL: &str = "all";
const FULL: &str = "full";
const NAIVE: &str = "naive";
/// How far a charge may be from a budget that it is shown for: half of what is between two.
const NEAR: f64 = 0.025;
