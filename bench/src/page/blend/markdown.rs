//! Tables of what blending gains, and whether it is what was hoped for.

use super::plot::CURVES;
use super::{ALL, Blending, EXACT, FULL, Measure, NAIVE, Point};
use crate::page::legend;
use crate::page::plot::Plot;
use crate::page::read::Quality;
use crate::page::text::{code, escape, image, number, table, value};

/// What there is to say; nothing where no method blends.
pub(in crate::page) fn section(blending: &Blending<'_>, plots: &[Plot]) -> String {
    if blending.curves.is_empty() {
        return String::new();
    }
    let mut text = "\n".to_owned() + INTRODUCTION;
    text += &bars(blending);
    text += &curves(blending, plots);
    text += &tasks(blending);
    text += &chunks(blending);
    text + &rules(blending)
}

/// A bar and what the rows say about it.
struct Bar {
    asks: &'static str,
    of: String,
    value: f64,
    met: bool,
}

/// Those that the rows say anything about.
fn bars(blending: &Blending<'_>) -> String {
    let gap = blending.with_gap();
    let curve = |rule: &str| blending.curves.iter().find(|curve| curve.rule == rule);
    let of = |point: &Point<'_>| {
        let charged = percent(point.charged);
        format!("{}, {charged} charged", code(point.method))
    };
    let closed = |point: &Point<'_>| blending.mean(Measure::Closed, point.method, &gap);
    let random = curve("random").and_then(|curve| {
        let point = curve.near(0.15)?;
        let value = closed(point)?;
        Some(Bar {
            asks: "random choice at 15 % closes no more than 25 % of the gap",
            of: of(point),
            value,
            met: value <= 0.25,
        })
    });
    // As much as the bar allows to spend.
    let affordable = |point: &&Point<'_>| point.charged <= 0.15;
    let chosen = curve(DEFAULT).and_then(|it| it.points.iter().rfind(affordable));
    let graded = chosen.and_then(|point| {
        let value = closed(point)?;
        Some(Bar {
            asks: "the default closes 70 % of the gap or more at 15 % or less",
            of: of(point),
            value,
            met: value >= 0.7,
        })
    });
    let control = chosen.and_then(|point| {
        let value = blending.row(point.method, CONTROL, "em_loss")?.value?;
        Some(Bar {
            asks: "there, the control (`hop1`) is within a point of full prefill",
            of: of(point),
            value,
            met: value.abs() <= 0.01,
        })
    });
    let rows: Vec<Vec<String>> = [random, graded, control]
        .into_iter()
        .flatten()
        .map(|bar| {
            let verdict = if bar.met { "met" } else { "**MISSED**" };
            let value = number(bar.value, "share");
            vec![bar.asks.to_owned(), bar.of, value, verdict.to_owned()]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let head = ["asked", "of", "value (share)", ""].map(str::to_owned);
    format!("\n## Bars\n\n{}", table(&head, &rows))
}

/// Plots, and what is drawn in them.
fn curves(blending: &Blending<'_>, plots: &[Plot]) -> String {
    let drawn = |name: &str| plots.iter().find(|plot| plot.name == name).map(image);
    let images: String = CURVES
        .into_iter()
        .filter_map(|(_, name, ..)| drawn(name))
        .collect();
    let gap = blending.with_gap();
    let mut kinds: Vec<(&str, &[&str])> = vec![("all tasks", &blending.tasks)];
    if !gap.is_empty() {
        kinds.insert(0, ("with a gap", &gap));
    }
    let columns: Vec<(String, Measure, &[&str])> = kinds
        .into_iter()
        .flat_map(|(kind, tasks)| {
            MEANS.map(|(measure, title)| (format!("{title}, {kind}"), measure, tasks))
        })
        .collect();
    let references = [FULL, NAIVE].into_iter().map(|method| {
        let cells = columns
            .iter()
            .map(|(_, measure, tasks)| mean(*measure, blending.mean(*measure, method, tasks)));
        let first = [code(method), String::new()].into_iter();
        first.chain(cells).collect::<Vec<_>>()
    });
    let points = blending.curves.iter().flat_map(|curve| {
        curve.points.iter().map(|point| {
            let cells = columns.iter().map(|(_, measure, tasks)| {
                mean(*measure, blending.mean(*measure, point.method, tasks))
            });
            let first = [code(&curve.rule), percent(point.charged)].into_iter();
            first.chain(cells).collect()
        })
    });
    let rows: Vec<Vec<String>> = references.chain(points).collect();
    let head: Vec<String> = ["rule", "charged"]
        .into_iter()
        .map(str::to_owned)
        .chain(columns.iter().map(|(title, ..)| title.clone()))
        .collect();
    let names: Vec<String> = gap.iter().map(|task| code(task)).collect();
    let which = if names.is_empty() {
        "There are none.".to_owned()
    } else {
        format!("They are {}.", names.join(", "))
    };
    format!(
        "\n## Means over tasks\n\nTasks with a gap are those on which naive reuse loses exact \
         match, the whole interval of its loss above zero. {which} The gap is what full prefill \
         has more of it than naive reuse, over these tasks together. A rule that was not asked \
         about all of them is left out.\n{images}\n{}",
        table(&head, &rows)
    )
}

/// A table a task: every rule near each of [`BUDGETS`].
fn tasks(blending: &Blending<'_>) -> String {
    let mut text = String::new();
    for &task in blending.tasks.iter().chain(&[ALL]) {
        let of = |method: &str| -> Option<Vec<String>> {
            blending.row(method, task, EXACT)?;
            let cell = |(measure, _)| value(blending.row(method, task, measure));
            Some(MEASURES.into_iter().map(cell).collect())
        };
        let mut rows = Vec::new();
        for method in [FULL, NAIVE] {
            let first = vec![code(method), String::new()];
            rows.extend(of(method).map(|cells| [first, cells].concat()));
        }
        let references = rows.len();
        for curve in &blending.curves {
            let mut shown = None;
            for point in BUDGETS.iter().filter_map(|budget| curve.near(*budget)) {
                if shown.replace(point.method) == Some(point.method) {
                    continue;
                }
                let first = vec![code(&curve.rule), percent(point.charged)];
                rows.extend(of(point.method).map(|cells| [first, cells].concat()));
            }
        }
        if rows.len() == references {
            continue;
        }
        let head: Vec<String> = ["rule", "charged"]
            .into_iter()
            .chain(MEASURES.map(|(_, title)| title))
            .map(str::to_owned)
            .collect();
        let named = escape(task);
        text += &format!(
            "\n<details><summary>{named}</summary>\n\n{}\n</details>\n",
            table(&head, &rows)
        );
    }
    if text.is_empty() {
        return text;
    }
    format!("\n## By task\n\nEvery rule at what is nearest to {BUDGETS_SAID}.\n{text}")
}

/// A table a run that asked at several numbers of chunks.
fn chunks(blending: &Blending<'_>) -> String {
    let tables: String = blending.runs.iter().map(chunks_of).collect();
    if tables.is_empty() {
        return tables;
    }
    format!("\n## By number of chunks\n\nExact match, and KL.\n{tables}")
}

fn chunks_of(run: &Quality<'_>) -> String {
    let grown = run.grown();
    let cells = || {
        grown
            .iter()
            .flat_map(|(task, cells)| cells.iter().map(move |it| (task, it)))
    };
    let blends = |method: &&&str| super::rule(method).is_some() || [FULL, NAIVE].contains(*method);
    let methods: Vec<&str> = run.methods.iter().filter(blends).copied().collect();
    if !cells().any(|(_, (_, cell))| {
        let mut blends = methods.iter().filter(|it| super::rule(it).is_some());
        blends.any(|method| run.row(method, cell, EXACT).is_some())
    }) {
        return String::new();
    }
    let rows: Vec<Vec<String>> = cells()
        .map(|(task, (count, cell))| {
            let cells = methods.iter().map(|method| {
                let kl = run.row(method, cell, "kl").and_then(|row| row.value);
                let exact = value(run.row(method, cell, EXACT));
                kl.map_or(exact.clone(), |kl| {
                    format!("{exact}; {}", number(kl, "nats"))
                })
            });
            [code(task), count.to_string()]
                .into_iter()
                .chain(cells)
                .collect()
        })
        .collect();
    let head: Vec<String> = ["task", "chunks"]
        .into_iter()
        .map(str::to_owned)
        .chain(methods.iter().map(|method| code(method)))
        .collect();
    format!("\n{}", table(&head, &rows))
}

/// What the rules are, of those that are on the page.
fn rules(blending: &Blending<'_>) -> String {
    let mut text = "\n## Rules\n\n".to_owned();
    for curve in &blending.curves {
        let rule = curve.rule.split(", ").next().unwrap_or_default();
        let meaning = legend::rule(rule).unwrap_or("not described here");
        text += &format!("- {}: {meaning}.\n", code(&curve.rule));
    }
    text
}

fn mean(measure: Measure, value: Option<f64>) -> String {
    let unit = if measure == Measure::Kl {
        "nats"
    } else {
        "share"
    };
    value.map_or_else(|| "–".to_owned(), |value| number(value, unit))
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

const INTRODUCTION: &str = "\
Chunks are reused at other places than they were compiled at, and a rule chooses tokens of them \
whose K and V are computed anew there. Charged are rows whose Q, K and V are computed, summed over \
layers, as a share of the context's tokens times layers; a pass of the question is charged too.\n";
/// What the engine does.
const DEFAULT: &str = "graded";
/// The task whose answers need one chunk only.
const CONTROL: &str = "hop1";
/// Charges that tables are of.
const BUDGETS: [f64; 5] = [0.05, 0.1, 0.15, 0.3, 0.4];
const BUDGETS_SAID: &str = "5, 10, 15, 30 and 40 % charged, if it is near";
/// Of a mean over tasks.
const MEANS: [(Measure, &str); 3] = [
    (Measure::Exact, "exact match"),
    (Measure::Kl, "KL (nats)"),
    (Measure::Closed, "gap closed"),
];
/// Of a task.
const MEASURES: [(&str, &str); 4] = [
    (EXACT, "exact match"),
    ("kl", "KL (nats)"),
    ("diverged", "answers that differ"),
    ("divergence", "first token that differs"),
];
