//! Figures as SVG on white: title, legend and panels with axes.
//!
//! Text stays text, in whatever sans-serif font the reader has: widths are
//! estimates, and layouts leave room for wider ones.

use std::io;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::read::Point;

pub(super) type DrawError = DrawingAreaErrorKind<io::Error>;
/// Part of a figure, in its pixels.
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// A panel with coordinates.
pub(super) type Chart<'a, 'b> =
    ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// How values become heights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    /// From 0 to 1, as bars.
    Share,
    /// Logarithm to base 10, as dots; values below [`FLOOR`] at the floor.
    Log,
}

impl Scale {
    pub(super) fn height(self, value: f64) -> f64 {
        match self {
            Self::Share => value,
            Self::Log => value.max(FLOOR).log10(),
        }
    }
}

/// Title and legend, and below them panels of a height: `[row][column]`.
pub(super) fn figure(
    title: &str,
    entries: &[(String, RGBColor)],
    rows: usize,
    columns: usize,
    panel: u32,
    draw: impl for<'s> FnOnce(&Area<'s>, &[Area<'s>]) -> Result<(), DrawError>,
) -> Result<String, DrawError> {
    let mut places = Vec::new();
    let (mut x, mut y) = (MARGIN, 40_i32);
    for (name, _) in entries {
        let wide = 26 + text_width(name);
        if x + wide > WIDTH && x > MARGIN {
            (x, y) = (MARGIN, y + 20);
        }
        places.push((x, y));
        x += wide;
    }
    let head = y + 22;
    let height = pixels(rows) * panel + head.unsigned_abs();
    let mut svg = String::new();
    {
        let root =
            SVGBackend::with_string(&mut svg, (WIDTH.unsigned_abs(), height)).into_drawing_area();
        root.fill(&WHITE)?;
        let style = ("sans-serif", 20, FontStyle::Bold, &INK).into_text_style(&root);
        root.draw(&Text::new(title, (MARGIN, 12), style))?;
        for ((name, color), (x, y)) in entries.iter().zip(places) {
            root.draw(&Rectangle::new([(x, y), (x + 12, y + 12)], color.filled()))?;
            let style = label(&root, HPos::Left, VPos::Center);
            root.draw(&Text::new(name.as_str(), (x + 18, y + 6), style))?;
        }
        let (_, body) = root.split_vertically(head);
        draw(&root, &body.split_evenly((rows, columns)))?;
        root.present()?;
    }
    Ok(svg)
}

/// One coordinate system.
#[derive(Debug)]
pub(super) struct Axes<'a> {
    pub(super) x: Range<f64>,
    pub(super) y: Range<f64>,
    pub(super) ticks: Vec<(f64, String)>,
    pub(super) x_label: &'a str,
    pub(super) y_label: &'a str,
    pub(super) caption: &'a str,
    pub(super) scale: Scale,
}

impl Axes<'_> {
    pub(super) fn draw<'a, 'b>(
        &self,
        root: &Area<'b>,
        panel: &'a Area<'b>,
    ) -> Result<Chart<'a, 'b>, DrawError> {
        let mut builder = ChartBuilder::on(panel);
        builder
            .margin(6)
            .margin_right(16)
            .margin_top(if self.caption.is_empty() { 6 } else { 26 })
            .x_label_area_size(44)
            .y_label_area_size(70);
        let mut chart = builder.build_cartesian_2d(self.x.clone(), self.y.clone())?;
        let log = self.scale == Scale::Log;
        let digits = if self.y.end - self.y.start < 0.05 {
            3
        } else {
            2
        };
        let power = |y: &f64| {
            if (y - y.round()).abs() > 1e-9 {
                String::new()
            } else if *y <= FLOOR.log10() {
                format!("≤ 1e{y:.0}")
            } else {
                format!("1e{y:.0}")
            }
        };
        let plain = |y: &f64| format!("{:.digits$}", y + 0.0);
        let style = label(root, HPos::Right, VPos::Center);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .disable_x_axis()
            .y_labels(if log { 14 } else { 6 })
            .y_max_light_lines(1)
            .y_label_formatter(if log { &power } else { &plain })
            .y_desc(self.y_label)
            .label_style(style.clone())
            .axis_desc_style(label(root, HPos::Center, VPos::Center))
            .axis_style(INK.stroke_width(1))
            .bold_line_style(RULE.stroke_width(1))
            .light_line_style(WHITE.stroke_width(0))
            .draw()?;
        let middle = f64::midpoint(self.x.start, self.x.end);
        let below = |x: f64| chart.backend_coord(&(x, self.y.start));
        let style = label(root, HPos::Center, VPos::Top);
        for (x, text) in &self.ticks {
            let (x, y) = below(*x);
            root.draw(&PathElement::new([(x, y), (x, y + 4)], INK.stroke_width(1)))?;
            root.draw(&Text::new(text.as_str(), (x, y + 7), style.clone()))?;
        }
        let (x, y) = below(middle);
        root.draw(&PathElement::new(
            [below(self.x.start), below(self.x.end)],
            INK.stroke_width(1),
        ))?;
        root.draw(&Text::new(self.x_label, (x, y + 25), style.clone()))?;
        let (_, top) = chart.backend_coord(&(middle, self.y.end));
        let style = ("sans-serif", 16, FontStyle::Bold, &INK)
            .into_text_style(root)
            .pos(Pos::new(HPos::Center, VPos::Top));
        root.draw(&Text::new(self.caption, (x, top - 20), style))?;
        // Zero, where the axis is not there.
        if !log && self.y.start < 0.0 && self.y.end > 0.0 {
            let zero = [(self.x.start, 0.0), (self.x.end, 0.0)];
            chart
                .plotting_area()
                .draw(&PathElement::new(zero, FAINT.stroke_width(1)))?;
        }
        Ok(chart)
    }
}

/// A line through values, with dots and intervals.
pub(super) fn line(
    chart: &Chart<'_, '_>,
    points: &[(f64, Point)],
    cap: f64,
    scale: Scale,
    color: RGBColor,
) -> Result<(), DrawError> {
    let area = chart.plotting_area();
    let place = |&(x, point): &(f64, Point)| (x, scale.height(point.value));
    let path: Vec<(f64, f64)> = points.iter().map(place).collect();
    area.draw(&PathElement::new(path, color.stroke_width(2)))?;
    for it @ &(x, point) in points {
        area.draw(&Circle::new(place(it), 3, color.filled()))?;
        interval(chart, x, cap, scale, point, color.stroke_width(1))?;
    }
    Ok(())
}

/// From the lower to the upper end, with caps.
pub(super) fn interval(
    chart: &Chart<'_, '_>,
    x: f64,
    cap: f64,
    scale: Scale,
    point: Point,
    style: ShapeStyle,
) -> Result<(), DrawError> {
    let (lo, hi) = (scale.height(point.lo), scale.height(point.hi));
    if hi <= lo {
        return Ok(());
    }
    let area = chart.plotting_area();
    area.draw(&PathElement::new([(x, lo), (x, hi)], style))?;
    for end in [lo, hi] {
        area.draw(&PathElement::new([(x - cap, end), (x + cap, end)], style))?;
    }
    Ok(())
}

fn label<'a>(root: &Area<'_>, across: HPos, up: VPos) -> TextStyle<'a> {
    ("sans-serif", 16, &INK)
        .into_text_style(root)
        .pos(Pos::new(across, up))
}

/// So many groups that bars and their names have room.
pub(super) fn groups_per_panel(names: &[&str], bars: usize) -> usize {
    let widest = names.iter().map(|name| text_width(name)).max().unwrap_or(0);
    let group = widest.max(i32::try_from(bars).unwrap_or(i32::MAX / 16) * 9 + 8);
    usize::try_from((WIDTH - 90) / group.max(1))
        .unwrap_or(1)
        .max(1)
}

/// All values and some room; never empty.
pub(super) fn padded(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (lo, hi) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), value| {
        (lo.min(value), hi.max(value))
    });
    let room = if hi > lo { (hi - lo) * 0.06 } else { 0.05 };
    // Nothing below zero is suggested where nothing is.
    let start = if lo >= 0.0 {
        (lo - room).max(0.0)
    } else {
        lo - room
    };
    start..hi + room
}

/// Whole decades around all logarithms; at least one.
pub(super) fn decades(heights: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = heights.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), height| {
        (low.min(height.floor()), high.max(height.ceil()))
    });
    low..high.max(low + 1.0) + 0.05
}

/// Names with their colours.
pub(super) fn named<'a>(names: impl Iterator<Item = &'a str>) -> Vec<(String, RGBColor)> {
    names
        .enumerate()
        .map(|(index, name)| (name.to_owned(), color(index)))
        .collect()
}

/// The colours again, lighter, when there are more names than colours.
pub(super) fn color(index: usize) -> RGBColor {
    let RGBColor(r, g, b) = COLORS[index % COLORS.len()];
    let lighter = |channel: u8| match index / COLORS.len() {
        0 => channel,
        _ => channel + (255 - channel) / 2,
    };
    RGBColor(lighter(r), lighter(g), lighter(b))
}

/// Pixels that a label takes, on the safe side.
fn text_width(text: &str) -> i32 {
    8 * i32::try_from(text.chars().count()).unwrap_or(i32::MAX / 16) + 8
}

fn pixels(panels: usize) -> u32 {
    u32::try_from(panels).unwrap_or(1)
}

#[expect(clippy::cast_precision_loss, reason = "a few methods or tasks")]
pub(super) fn count(n: usize) -> f64 {
    n as f64
}

const WIDTH: i32 = 900;
const MARGIN: i32 = 16;
/// KL below it is rounding; zero has no logarithm.
const FLOOR: f64 = 1e-8;
pub(super) const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);
pub(super) const FAINT: RGBColor = RGBColor(0x99, 0x99, 0x99);
const RULE: RGBColor = RGBColor(0xDD, 0xDD, 0xDD);
/// Told apart by most of those who see fewer colours (Okabe and Ito, 2008).
const COLORS: [RGBColor; 8] = [
    RGBColor(0x5A, 0x5A, 0x5A),
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0x56, 0xB4, 0xE9),
    RGBColor(0x8C, 0x56, 0x4B),
];
