//! Curves over what was charged, a line a rule.

use plotters::prelude::*;

use super::{Blending, FULL, Measure, NAIVE};
use crate::page::PageError;
use crate::page::figure::{
    Axes, DrawError, FAINT, INK, Scale, color, decades, figure, line, padded,
};
use crate::page::plot::Plot;
use crate::page::read::Point;

/// Every curve that has points.
pub(in crate::page) fn all(blending: &Blending<'_>) -> Result<Vec<Plot>, PageError> {
    let mut plots = Vec::new();
    for (measure, name, title, y_label) in CURVES {
        match curves(blending, measure, title, y_label) {
            Ok(None) => {}
            Ok(Some(svg)) => plots.push(Plot {
                name: name.to_owned(),
                title: title.to_owned(),
                svg,
            }),
            Err(source) => {
                let plot = name.to_owned();
                return Err(PageError::Draw { plot, source });
            }
        }
    }
    Ok(plots)
}

/// One panel of tasks.
struct Panel<'a> {
    caption: &'a str,
    /// Number of the rule, and its points.
    lines: Vec<(usize, Vec<(f64, Point)>)>,
    /// Full prefill and naive reuse.
    levels: Vec<(f64, RGBColor)>,
}

impl Panel<'_> {
    fn of<'a>(
        blending: &Blending<'_>,
        measure: Measure,
        caption: &'a str,
        tasks: &[&str],
    ) -> Panel<'a> {
        let curves = blending.curves.iter().enumerate();
        let lines = curves.map(|(rule, curve)| {
            let points = curve.points.iter().filter_map(|point| {
                let value = blending.mean(measure, point.method, tasks)?;
                let [lo, hi] = [value; 2];
                Some((point.charged, Point { value, lo, hi }))
            });
            (rule, points.collect::<Vec<_>>())
        });
        let levels = REFERENCES
            .into_iter()
            .filter_map(|(method, color)| Some((blending.mean(measure, method, tasks)?, color)));
        Panel {
            caption,
            lines: lines.filter(|(_, points)| !points.is_empty()).collect(),
            levels: levels.collect(),
        }
    }

    fn values(&self) -> impl Iterator<Item = f64> {
        let points = self.lines.iter().flat_map(|(_, points)| points);
        let levels = self.levels.iter().map(|(level, _)| *level);
        points.map(|(_, point)| point.value).chain(levels)
    }
}

/// Tasks with a gap beside all of them.
fn curves(
    blending: &Blending<'_>,
    measure: Measure,
    title: &str,
    y_label: &str,
) -> Result<Option<String>, DrawError> {
    let gap = blending.with_gap();
    let mut panels = vec![
        Panel::of(blending, measure, "tasks with a gap", &gap),
        Panel::of(blending, measure, "all tasks", &blending.tasks),
    ];
    panels.retain(|panel| !panel.lines.is_empty());
    let lines = || panels.iter().flat_map(|panel| &panel.lines);
    let charges = lines().flat_map(|(_, points)| points.iter().map(|&(x, _)| x));
    let most = charges.fold(0.0, f64::max);
    if panels.is_empty() {
        return Ok(None);
    }
    let drawn = blending.curves.iter().enumerate();
    let drawn = drawn.filter(|(rule, _)| lines().any(|(of, _)| of == rule));
    let mut entries: Vec<(String, RGBColor)> = drawn
        .map(|(rule, curve)| (curve.rule.clone(), rule_color(rule)))
        .collect();
    let references = REFERENCES.into_iter().filter(|(_, color)| {
        let mut levels = panels.iter().flat_map(|panel| &panel.levels);
        levels.any(|(_, of)| of == color)
    });
    entries.extend(references.map(|(name, color)| (name.to_owned(), color)));
    let scale = match measure {
        Measure::Kl => Scale::Log,
        Measure::Exact | Measure::Closed => Scale::Share,
    };
    let heights = panels
        .iter()
        .flat_map(|panel| panel.values().map(|value| scale.height(value)));
    let y = match scale {
        Scale::Log => decades(heights),
        Scale::Share => padded(heights),
    };
    figure(title, &entries, 1, panels.len(), 380, |root, areas| {
        for (area, panel) in areas.iter().zip(&panels) {
            let axes = Axes {
                x: 0.0..most + 0.02,
                y: y.clone(),
                ticks: ticks(most),
                x_label: "charged (share of rows computed)",
                y_label,
                caption: panel.caption,
                scale,
            };
            let chart = axes.draw(root, area)?;
            for &(level, color) in &panel.levels {
                let height = scale.height(level);
                let path = [(0.0, height), (most + 0.02, height)];
                let path = PathElement::new(path, color.stroke_width(1));
                chart.plotting_area().draw(&path)?;
            }
            for (rule, points) in &panel.lines {
                line(&chart, points, 0.0, scale, rule_color(*rule))?;
            }
        }
        Ok(())
    })
    .map(Some)
}

/// Every ten percent up to `most`.
fn ticks(most: f64) -> Vec<(f64, String)> {
    let percents = (0..=100).step_by(10);
    percents
        .map(|percent| (f64::from(percent) / 100.0, format!("{percent} %")))
        .filter(|&(share, _)| share <= most + 0.01)
        .collect()
}

/// Not the first colour, which is like those of [`REFERENCES`].
fn rule_color(rule: usize) -> RGBColor {
    color(rule + 1)
}

pub(super) const CURVES: [(Measure, &str, &str, &str); 3] = [
    (
        Measure::Exact,
        "blend-exact-match",
        "Exact match by what is computed anew",
        "exact match (share)",
    ),
    (
        Measure::Kl,
        "blend-kl",
        "KL from full prefill by what is computed anew",
        "KL (nats, log scale)",
    ),
    (
        Measure::Closed,
        "blend-gap",
        "Gap between naive reuse and full prefill that is closed",
        "gap closed (share)",
    ),
];
const REFERENCES: [(&str, RGBColor); 2] = [(FULL, INK), (NAIVE, FAINT)];
