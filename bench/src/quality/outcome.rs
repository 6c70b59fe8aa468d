//! Answers to a cell's questions, and the rows that are made of them.

use super::interval::{self, Estimate};
use super::score::{self, Answer, Distance};
use super::{bars, gates};
use crate::report::{Report, Row, median, percentile};

/// Answers over one context, each held against that of full prefill.
pub(super) type Held = Vec<(Answer, Distance)>;

/// Answers to one cell's questions: `[context][question]`.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) full: Vec<Vec<Answer>>,
    /// By method.
    pub(super) others: Vec<(String, Vec<Held>)>,
}

impl Outcome {
    /// Adds the answers of another cell.
    pub(super) fn extend(&mut self, other: Self) {
        self.full.extend(other.full);
        if self.others.is_empty() {
            self.others = other.others;
            return;
        }
        for ((_, all), (_, more)) in self.others.iter_mut().zip(other.others) {
            all.extend(more);
        }
    }

    /// KL of a method: `[context][token]`.
    pub(super) fn kl(&self, name: &str) -> Vec<Vec<f64>> {
        let of = self.others.iter().find(|(of, _)| of == name);
        let contexts = of.map_or(&[][..], |(_, contexts)| contexts);
        contexts
            .iter()
            .map(|context| context.iter().flat_map(|(_, d)| d.kl.clone()).collect())
            .collect()
    }

    /// Means of a method over all questions.
    pub(super) fn point(&self, name: String, bits: f64) -> bars::Point {
        let of = self.others.iter().find(|(of, _)| *of == name);
        let held = || of.into_iter().flat_map(|(_, contexts)| contexts).flatten();
        let mean = |of: &dyn Fn(&Answer) -> f64, answers: &mut dyn Iterator<Item = &Answer>| {
            score::mean(&answers.map(of).collect::<Vec<_>>())
        };
        let em = mean(&exact, &mut held().map(|(answer, _)| answer));
        let full = mean(&exact, &mut self.full.iter().flatten());
        let agrees = held().flat_map(|(_, distance)| &distance.agrees);
        let agrees: Vec<f64> = agrees.map(|&a| f64::from(u8::from(a))).collect();
        let kl: Vec<f64> = self.kl(&name).concat();
        bars::Point {
            bits,
            kl: score::mean(&kl),
            top1: score::mean(&agrees),
            em_loss: full - em,
            name,
        }
    }

    pub(super) fn report(
        &self,
        cell: &str,
        seed: u64,
        report: &mut Report,
        gates: &mut gates::Gates,
    ) {
        let questions: usize = self.full.iter().map(Vec::len).sum();
        #[expect(clippy::cast_precision_loss, reason = "a count of questions")]
        report.push(Row::new(
            format!("questions/{cell}"),
            questions as f64,
            "questions",
        ));
        let each = |of: fn(&Answer) -> f64| per_question(&self.full, of);
        if let Some(em) = push(
            report,
            format!("full/{cell}/em"),
            "share",
            &each(exact),
            seed,
        ) {
            gates.full(cell, em.value);
        }
        push(
            report,
            format!("full/{cell}/f1"),
            "share",
            &each(|a| a.f1),
            seed,
        );
        for (name, contexts) in &self.others {
            let row = |measure: &str| format!("{name}/{cell}/{measure}");
            let found = |of: fn(&Answer) -> f64| per_question(contexts, move |(a, _)| of(a));
            push(report, row("em"), "share", &found(exact), seed);
            push(report, row("f1"), "share", &found(|a| a.f1), seed);
            let loss: Vec<Vec<f64>> = self
                .full
                .iter()
                .zip(contexts)
                .map(|(full, this)| {
                    full.iter()
                        .zip(this)
                        .map(|(full, (this, _))| exact(full) - exact(this))
                        .collect()
                })
                .collect();
            if let Some(loss) = push(report, row("em_loss"), "share", &loss, seed) {
                gates.loss(name, cell, loss);
            }
            let kl = self.kl(name);
            push(report, row("kl"), "nats", &kl, seed);
            let agrees: Vec<Vec<f64>> = contexts
                .iter()
                .map(|context| {
                    let tokens = context.iter().flat_map(|(_, d)| &d.agrees);
                    tokens.map(|&agrees| f64::from(u8::from(agrees))).collect()
                })
                .collect();
            push(report, row("top1"), "share", &agrees, seed);
            push(
                report,
                row("diverged"),
                "share",
                &per_question(contexts, |(_, d)| {
                    f64::from(u8::from(d.divergence.is_some()))
                }),
                seed,
            );
            let distances = || contexts.iter().flatten().map(|(_, distance)| distance);
            #[expect(clippy::cast_precision_loss, reason = "answers are short")]
            let divergences: Vec<f64> = distances()
                .filter_map(|d| d.divergence.map(|token| token as f64))
                .collect();
            let mut kl: Vec<f64> = kl.into_iter().flatten().collect();
            if !kl.is_empty() {
                report.push(Row::new(row("kl_median"), median(&mut kl), "nats"));
                report.push(Row::new(row("kl_p99"), percentile(&mut kl, 0.99), "nats"));
            }
            if !divergences.is_empty() {
                report.push(Row::new(
                    row("divergence"),
                    score::mean(&divergences),
                    "tokens",
                ));
            }
        }
    }
}

/// Adds the row of a mean over `[context][value]`; nothing when there is no value.
pub(super) fn push(
    report: &mut Report,
    name: String,
    unit: &'static str,
    contexts: &[Vec<f64>],
    seed: u64,
) -> Option<Estimate> {
    let estimate = interval::estimate(contexts, seed)?;
    report.push(Row::new(name, estimate.value, unit).within(estimate.interval));
    Some(estimate)
}

fn exact(answer: &Answer) -> f64 {
    f64::from(u8::from(answer.exact))
}

fn per_question<T>(contexts: &[Vec<T>], of: impl Fn(&T) -> f64) -> Vec<Vec<f64>> {
    contexts
        .iter()
        .map(|context| context.iter().map(&of).collect())
        .collect()
}
