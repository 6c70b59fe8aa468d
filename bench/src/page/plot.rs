//! The page's plots: which rows are drawn, and how.

use std::collections::{BTreeMap, BTreeSet};

use plotters::prelude::*;

use super::PageError;
use super::figure::{
    Axes, DrawError, INK, Scale, color, count, decades, figure, groups_per_panel, interval, line,
    named, padded,
};
use super::legend;
use super::read::{Layers, Measure, Plane, Point, Quality, Report};

pub(super) const EXACT: &str = "exact-match";
pub(super) const KL: &str = "kl";
pub(super) const LAYERS: &str = "kvstats";
pub(super) const GROWTH: &str = "growth";

/// Values over chunks or layers.
type Line = Vec<(f64, Point)>;

/// One picture of the page.
#[derive(Debug)]
pub(super) struct Plot {
    pub(super) name: String,
    pub(super) title: String,
    pub(super) svg: String,
}

impl Plot {
    /// From the page.
    pub(super) fn path(&self) -> String {
        format!("quality/{}.svg", self.name)
    }
}

/// Every plot that has rows.
pub(super) fn all(report: &Report, kvstats: Option<&Report>) -> Result<Vec<Plot>, PageError> {
    let quality = Quality::new(report);
    let mut plots = Vec::new();
    let mut add = |name: String, title: String, svg: Result<Option<String>, DrawError>| {
        match svg {
            Ok(Some(svg)) => plots.push(Plot { name, title, svg }),
            Ok(None) => {}
            Err(source) => return Err(PageError::Draw { plot: name, source }),
        }
        Ok(())
    };
    let title = "Exact match by task".to_owned();
    let svg = by_task(&quality, "em", &title, "exact match (share)", Scale::Share);
    add(EXACT.to_owned(), title, svg)?;
    let title = "KL from full prefill by task, mean".to_owned();
    let svg = by_task(&quality, "kl", &title, "KL (nats, log scale)", Scale::Log);
    add(KL.to_owned(), title, svg)?;
    let title = "Loss of exact match by number of chunks".to_owned();
    let svg = growth(&quality, &title);
    add(GROWTH.to_owned(), title, svg)?;
    if let Some(kvstats) = kvstats {
        let title = "KV statistics by layer".to_owned();
        let svg = layers(&Layers::new(kvstats), &title);
        add(LAYERS.to_owned(), title, svg)?;
    }
    Ok(plots)
}

/// One group a task, one mark a method.
fn by_task(
    quality: &Quality<'_>,
    measure: &str,
    title: &str,
    y_label: &str,
    scale: Scale,
) -> Result<Option<String>, DrawError> {
    let (tasks, methods) = (quality.tasks_of(measure), quality.methods_of(measure));
    let point = |task: &str, method: &str| quality.row(method, task, measure)?.point();
    let all: Vec<Point> = tasks
        .iter()
        .flat_map(|task| methods.iter().filter_map(|method| point(task, method)))
        .collect();
    if all.is_empty() {
        return Ok(None);
    }
    let y = match scale {
        Scale::Share => 0.0..all.iter().fold(1.0, |top: f64, p| top.max(p.hi)) + 0.02,
        Scale::Log => {
            let ends = all.iter().flat_map(|p| [p.lo, p.value, p.hi]);
            decades(ends.map(|value| scale.height(value)))
        }
    };
    let rows = tasks
        .len()
        .div_ceil(groups_per_panel(&tasks, methods.len()));
    let per_row = tasks.len().div_ceil(rows);
    let panel = if rows == 1 { 300 } else { 220 };
    // The same colour in every plot, whichever methods it has.
    let colors: Vec<RGBColor> = quality
        .methods
        .iter()
        .enumerate()
        .filter(|(_, method)| methods.contains(method))
        .map(|(index, _)| color(index))
        .collect();
    let entries: Vec<(String, RGBColor)> = methods
        .iter()
        .map(|method| (*method).to_owned())
        .zip(colors.iter().copied())
        .collect();
    figure(title, &entries, rows, 1, panel, |root, panels| {
        for (panel, tasks) in panels.iter().zip(tasks.chunks(per_row)) {
            let axes = Axes {
                x: -0.5..count(per_row) - 0.5,
                y: y.clone(),
                ticks: tasks
                    .iter()
                    .enumerate()
                    .map(|(index, task)| (count(index), (*task).to_owned()))
                    .collect(),
                x_label: "task",
                y_label,
                caption: "",
                scale,
            };
            let chart = axes.draw(root, panel)?;
            let slot = 0.84 / count(methods.len());
            for (group, task) in tasks.iter().enumerate() {
                for (index, (method, color)) in methods.iter().zip(&colors).enumerate() {
                    let Some(point) = point(task, method) else {
                        continue;
                    };
                    let left = count(group) - 0.42 + slot * count(index);
                    let middle = left + slot / 2.0;
                    let area = chart.plotting_area();
                    let height = scale.height(point.value);
                    match scale {
                        Scale::Share => area.draw(&Rectangle::new(
                            [(left + 0.06 * slot, 0.0), (left + 0.94 * slot, height)],
                            color.filled(),
                        ))?,
                        Scale::Log => {
                            area.draw(&Circle::new((middle, height), 4, color.filled()))?;
                        }
                    }
                    let style = match scale {
                        Scale::Share => INK.stroke_width(1),
                        Scale::Log => color.stroke_width(1),
                    };
                    interval(&chart, middle, slot * 0.22, scale, point, style)?;
                }
            }
        }
        Ok(())
    })
    .map(Some)
}

/// One panel a method that loses something, one line a task.
fn growth(quality: &Quality<'_>, title: &str) -> Result<Option<String>, DrawError> {
    let grown = quality.grown();
    let losses = |method: &str| -> Vec<Line> {
        let of_task = |(_, cells): &(&str, BTreeMap<u64, &str>)| {
            let points = cells.iter().filter_map(|(chunks, cell)| {
                let point = quality.row(method, cell, "em_loss")?.point()?;
                #[expect(clippy::cast_precision_loss, reason = "a few chunks")]
                Some((*chunks as f64, point))
            });
            points.collect()
        };
        grown.iter().map(of_task).collect()
    };
    let methods: Vec<(&str, Vec<Line>)> = quality
        .methods
        .iter()
        .map(|method| (*method, losses(method)))
        .filter(|(_, tasks)| {
            let mut points = tasks.iter().flatten();
            points.any(|(_, point)| point.value.abs() >= LOSES)
        })
        .collect();
    let points = || methods.iter().flat_map(|(_, tasks)| tasks).flatten();
    let mut chunks: Vec<f64> = points().map(|&(chunks, _)| chunks).collect();
    chunks.sort_by(f64::total_cmp);
    chunks.dedup();
    let (Some(&first), Some(&last)) = (chunks.first(), chunks.last()) else {
        return Ok(None);
    };
    let reach = (last - first).max(1.0);
    let y = padded(points().flat_map(|(_, point)| [point.lo, point.hi, 0.0]));
    let entries = named(grown.iter().map(|(task, _)| *task));
    let (rows, columns) = (methods.len().div_ceil(2), methods.len().min(2));
    let panel = if rows == 1 { 320 } else { 240 };
    figure(title, &entries, rows, columns, panel, |root, panels| {
        for (panel, (method, tasks)) in panels.iter().zip(&methods) {
            let axes = Axes {
                x: first - 0.06 * reach..last + 0.06 * reach,
                y: y.clone(),
                ticks: chunks
                    .iter()
                    .map(|chunks| (*chunks, chunks.to_string()))
                    .collect(),
                x_label: "chunks in the context",
                y_label: "loss (share)",
                caption: method,
                scale: Scale::Share,
            };
            let chart = axes.draw(root, panel)?;
            for (index, points) in tasks.iter().enumerate() {
                // Side by side, so that intervals stay apart.
                let aside = (count(index) - count(tasks.len() - 1) / 2.0) * reach * 0.008;
                let points: Line = points
                    .iter()
                    .map(|&(x, point)| (x + aside, point))
                    .collect();
                line(&chart, &points, reach * 0.005, Scale::Share, color(index))?;
            }
        }
        Ok(())
    })
    .map(Some)
}

/// One panel a measure, one line a plane.
fn layers(layers: &Layers<'_>, title: &str) -> Result<Option<String>, DrawError> {
    let (Some(&first), Some(&last)) = (layers.layers.first(), layers.layers.last()) else {
        return Ok(None);
    };
    let lines: Vec<(&Measure<'_>, Vec<(Plane, Line)>)> = legend::DRAWN
        .iter()
        .filter_map(|name| layers.measure(name))
        .map(|measure| {
            let planes = measure.planes().into_iter();
            let lines = planes.map(|plane| (plane, measure.by_layer(plane)));
            (
                measure,
                lines.filter(|(_, line)| !line.is_empty()).collect(),
            )
        })
        .filter(|(_, lines): &(_, Vec<_>)| !lines.is_empty())
        .collect();
    if lines.is_empty() {
        return Ok(None);
    }
    let drawn = lines.iter().flat_map(|(_, lines)| lines);
    let planes: BTreeSet<Plane> = drawn.map(|&(plane, _)| plane).collect();
    let entries = named(planes.iter().map(|plane| plane.name()));
    let step = usize::try_from((last - first) / 8 + 1).unwrap_or(1);
    let (rows, columns) = (lines.len().div_ceil(2), lines.len().min(2));
    figure(title, &entries, rows, columns, 240, |root, panels| {
        for (panel, (measure, lines)) in panels.iter().zip(&lines) {
            let points = lines.iter().flat_map(|(_, points)| points);
            let caption = legend::title(legend::LAYERS, &measure.name);
            let axes = Axes {
                x: f64::from(first) - 0.5..f64::from(last) + 0.5,
                y: padded(points.flat_map(|(_, point)| [point.lo, point.hi])),
                ticks: (first..=last)
                    .step_by(step)
                    .map(|layer| (f64::from(layer), layer.to_string()))
                    .collect(),
                x_label: "layer",
                y_label: measure.unit,
                caption: &caption,
                scale: Scale::Share,
            };
            let chart = axes.draw(root, panel)?;
            for (plane, points) in lines {
                let index = planes.iter().position(|known| known == plane);
                line(&chart, points, 0.1, Scale::Share, color(index.unwrap_or(0)))?;
            }
        }
        Ok(())
    })
    .map(Some)
}

/// A method that loses less everywhere is left out of the plot of losses.
const LOSES: f64 = 0.01;
