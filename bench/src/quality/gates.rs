//! What a model must show before it can judge anything.
//!
//! A gate that fails is reported like any other: the model then is no stand-in
//! for what the gate is about. Each gate is one row `gate/NAME`: the value, the
//! bar as `limit`, and a `ratio` of 1.0 or more where the gate holds.
//!
//! G6, about the deviation of reused KV, is with the KV statistics.

use std::collections::BTreeMap;

use super::interval::Estimate;
use super::method::Caches;
use super::reader::{Pages, Reader};
use crate::report::{Report, Row};

/// Exact match that full prefill must reach, by task.
const G1: [(&str, f64); 11] = [
    ("hop1", 0.95),
    ("needle", 0.95),
    ("coref2", 0.85),
    ("coref3", 0.85),
    ("coref4", 0.85),
    ("override", 0.85),
    ("update", 0.85),
    ("ordinal", 0.85),
    ("compare", 0.85),
    ("hop2", 0.70),
    ("kv", 0.70),
];
/// Tasks that cannot be answered without binding across chunks.
const BINDING: [&str; 6] = [
    "coref2", "coref3", "coref4", "override", "ordinal", "compare",
];
/// Loss of exact match that reuse must cause there, at least.
const BINDING_LOSS: f64 = 0.15;
/// Loss that reuse may cause on the control, at most.
const CONTROL_LOSS: f64 = 0.02;
/// What more chunks must add to the loss there.
const GROWTH: f64 = 0.01;
/// Exact match that keys at wrong positions must cost beyond reuse at right ones.
const POSITION_LOSS: f64 = 0.10;
/// Nats a token of text that they must cost beyond it.
const POSITION_NATS: f64 = 0.05;
/// Largest difference of a logit after recomputing everything, f32.
const LOGIT: f64 = 1e-3;

/// Findings on the way, judged at the end.
#[derive(Debug, Default)]
pub(super) struct Gates {
    full: BTreeMap<String, f64>,
    losses: BTreeMap<(String, String), Estimate>,
    logits: BTreeMap<String, f64>,
    continuations: BTreeMap<String, f64>,
    layer0_keys: Option<f64>,
}

impl Gates {
    /// Exact match of full prefill.
    pub(super) fn full(&mut self, cell: &str, em: f64) {
        self.full.insert(cell.to_owned(), em);
    }

    /// Exact match that full prefill has over the method.
    pub(super) fn loss(&mut self, method: &str, cell: &str, loss: Estimate) {
        let key = (method.to_owned(), cell.to_owned());
        self.losses.insert(key, loss);
    }

    /// Nats a token of text that the method adds to full prefill's.
    pub(super) fn continuation(&mut self, method: &str, more: f64) {
        self.continuations.insert(method.to_owned(), more);
    }

    /// A difference of a logit between full prefill and the method.
    pub(super) fn logits(&mut self, method: &str, difference: f64) {
        let worst = self.logits.entry(method.to_owned()).or_default();
        *worst = worst.max(difference);
    }

    /// Compares re-rotated keys of the first layer, which know nothing but their
    /// token and position, with those of full prefill.
    pub(super) fn layer0_keys(
        &mut self,
        reader: &Reader,
        full: &Pages,
        caches: &Caches,
    ) -> anyhow::Result<()> {
        let mut position = 1;
        for moved in caches.repositioned(reader) {
            let computed = reader.take(full, position..position + moved.tokens)?;
            position += moved.tokens;
            let (moved, computed) = (&moved.layers[0], &computed.layers[0]);
            let keys = moved.len() / 2;
            let largest = |values: &mut dyn Iterator<Item = f32>| {
                f64::from(values.fold(0.0, |worst: f32, x| worst.max(x.abs())))
            };
            let difference = largest(&mut moved[..keys].iter().zip(computed).map(|(a, b)| a - b));
            let scale = largest(&mut computed[..keys].iter().copied());
            let worst = self.layer0_keys.get_or_insert(0.0);
            *worst = worst.max(difference / scale);
        }
        Ok(())
    }

    pub(super) fn report(&self, report: &mut Report) {
        for method in ["recompute-all", "prefix"] {
            if let Some(&difference) = self.logits.get(method) {
                push(
                    report,
                    &format!("G0/{method}"),
                    difference,
                    LOGIT,
                    Bar::AtMost,
                    "logit",
                );
            }
        }
        if let Some(error) = self.layer0_keys {
            push(
                report,
                "G0/layer0_keys",
                error,
                1e-5,
                Bar::AtMost,
                "relative",
            );
        }
        for (task, bar) in G1 {
            if let Some(&em) = self.full.get(task) {
                push(
                    report,
                    &format!("G1/{task}"),
                    em,
                    bar,
                    Bar::AtLeast,
                    "share",
                );
            }
        }
        let naive = |cell: &str| self.losses.get(&("naive".to_owned(), cell.to_owned()));
        let of = |method: &'static str| {
            let losses = self
                .losses
                .iter()
                .filter(|((name, cell), _)| *name == method && !cell.contains('@'));
            super::score::mean(&losses.map(|(_, loss)| loss.value).collect::<Vec<_>>())
        };
        if self
            .losses
            .keys()
            .any(|(name, _)| *name == "naive-unpositioned")
        {
            let beyond = of("naive-unpositioned") - of("naive");
            push(
                report,
                "G2/positions",
                beyond,
                POSITION_LOSS,
                Bar::AtLeast,
                "share",
            );
        }
        let more = |method: &str| self.continuations.get(method);
        if let (Some(wrong), Some(right)) = (more("naive-unpositioned"), more("naive")) {
            push(
                report,
                "G2/continuation",
                wrong - right,
                POSITION_NATS,
                Bar::AtLeast,
                "nats",
            );
        }
        for task in BINDING {
            if let Some(loss) = naive(task) {
                let name = format!("G3/{task}");
                push(
                    report,
                    &name,
                    loss.value,
                    BINDING_LOSS,
                    Bar::AtLeast,
                    "share",
                );
            }
        }
        if let Some(loss) = naive("hop1") {
            push(
                report,
                "G3/hop1",
                loss.value,
                CONTROL_LOSS,
                Bar::AtMost,
                "share",
            );
        }
        for task in BINDING {
            let mut by_count: Vec<(usize, f64)> = self
                .losses
                .iter()
                .filter_map(|((name, cell), loss)| {
                    let (cell, count) = match cell.split_once('@') {
                        Some((cell, count)) => (cell, count.parse().ok()?),
                        None => (cell.as_str(), super::BASE_CHUNKS),
                    };
                    (*name == "naive" && cell == task).then_some((count, loss.value))
                })
                .collect();
            by_count.sort_by_key(|&(count, _)| count);
            if let [(_, fewest), .., (_, most)] = by_count[..] {
                let name = format!("G3/{task}/growth");
                push(report, &name, most - fewest, GROWTH, Bar::AtLeast, "share");
            }
        }
    }
}

/// Which side of its limit a value must be on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    AtLeast,
    AtMost,
}

/// Adds the row of one gate.
pub(crate) fn push(
    report: &mut Report,
    name: &str,
    value: f64,
    limit: f64,
    bar: Bar,
    unit: &'static str,
) {
    let (held, most) = match bar {
        Bar::AtLeast => (value >= limit, value / limit),
        Bar::AtMost => (value <= limit, limit / value),
    };
    // A value or limit of zero has no ratio: it says only on which side it is.
    let ratio = if most.is_finite() && most > 0.0 {
        most
    } else {
        f64::from(u8::from(held))
    };
    report.push(Row::new(format!("gate/{name}"), value, unit).against(limit, ratio));
}
