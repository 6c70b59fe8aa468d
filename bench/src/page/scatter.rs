//! One panel of points, a colour a series, for suites that draw what they measured.

use std::ops::Range;
use std::path::Path;

use anyhow::Context as _;
use plotters::prelude::*;

use super::figure::{Axes, DrawError, Scale, color, decades, figure, named, padded};

/// What is drawn.
#[derive(Clone, Debug)]
pub(crate) struct Scatter<'a> {
    pub(crate) title: &'a str,
    pub(crate) x_label: &'a str,
    pub(crate) y_label: &'a str,
    /// Whether heights are logarithms.
    pub(crate) log: bool,
    /// Series and point.
    pub(crate) points: Vec<(String, f64, f64)>,
}

impl Scatter<'_> {
    /// Writes it as SVG; a series' points are joined from left to right.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let svg = self.svg().context("drawing a plot")?;
        std::fs::write(path, svg).with_context(|| format!("writing {}", path.display()))
    }

    fn svg(&self) -> Result<String, DrawError> {
        let mut names: Vec<&str> = Vec::new();
        for (name, ..) in &self.points {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        let scale = if self.log { Scale::Log } else { Scale::Share };
        let x = padded(self.points.iter().map(|&(_, x, _)| x).chain([0.0]));
        let heights = || self.points.iter().map(|&(_, _, y)| scale.height(y));
        let y: Range<f64> = if self.log {
            decades(heights())
        } else {
            padded(heights().chain([0.0]))
        };
        let ticks = (0..=ticks(x.end)).map(|tick| (f64::from(tick), tick.to_string()));
        let axes = Axes {
            ticks: ticks.collect(),
            x,
            y,
            x_label: self.x_label,
            y_label: self.y_label,
            caption: "",
            scale,
        };
        let entries = named(names.iter().copied());
        figure(self.title, &entries, 1, 1, 460, |root, panels| {
            let chart = axes.draw(root, &panels[0])?;
            let area = chart.plotting_area();
            for (index, name) in names.iter().enumerate() {
                let mut points: Vec<(f64, f64)> = self
                    .points
                    .iter()
                    .filter(|(of, ..)| of == name)
                    .map(|&(_, x, y)| (x, scale.height(y)))
                    .collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                let color = color(index);
                area.draw(&PathElement::new(points.clone(), color.stroke_width(1)))?;
                for point in points {
                    area.draw(&Circle::new(point, 4, color.filled()))?;
                }
            }
            Ok(())
        })
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a few bits"
)]
fn ticks(end: f64) -> u8 {
    end.clamp(0.0, 64.0) as u8
}
