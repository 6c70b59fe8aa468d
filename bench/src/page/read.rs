//! What a suite printed, as a page reads it: the other side of [`crate::report`].
//!
//! Rows are found by their names. No method, task or measure is known here, so
//! that new ones appear on the page by being in the rows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::PageError;

/// One suite's result.
#[derive(Debug, Deserialize)]
pub(super) struct Report {
    pub(super) suite: String,
    pub(super) machine: Machine,
    #[serde(default)]
    pub(super) settings: Map<String, Value>,
    pub(super) rows: Vec<Row>,
}

/// Where it was measured.
#[derive(Debug, Deserialize)]
pub(super) struct Machine {
    pub(super) cpu: String,
    pub(super) cores: usize,
    pub(super) memory_bytes: u64,
    pub(super) load: f64,
}

/// One measured value.
#[derive(Debug, Deserialize)]
pub(super) struct Row {
    pub(super) name: String,
    /// `null` in JSON where it is not a number.
    pub(super) value: Option<f64>,
    pub(super) unit: String,
    pub(super) limit: Option<f64>,
    pub(super) ratio: Option<f64>,
    pub(super) lo: Option<f64>,
    pub(super) hi: Option<f64>,
}

impl Report {
    /// Reads the last line of a file, which must be a report of `suite`.
    pub(super) fn load(path: &Path, suite: &'static str) -> Result<Self, PageError> {
        let text = std::fs::read_to_string(path).map_err(|source| PageError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path, suite)
    }

    /// As [`Self::load`], of text from `path`.
    pub(super) fn parse(text: &str, path: &Path, suite: &'static str) -> Result<Self, PageError> {
        let path = || path.to_owned();
        let line = text
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .ok_or_else(|| PageError::Empty {
                path: path(),
                suite,
            })?;
        let report: Self = serde_json::from_str(line).map_err(|source| PageError::Json {
            path: path(),
            suite,
            source,
        })?;
        if report.suite != suite {
            return Err(PageError::Suite {
                path: path(),
                suite,
                found: report.suite,
            });
        }
        Ok(report)
    }

    /// Rows `gate/NAME`.
    pub(super) fn gates(&self) -> impl Iterator<Item = Gate<'_>> {
        self.rows.iter().filter_map(|row| {
            let name = row.name.strip_prefix("gate/")?;
            Some(Gate { name, row })
        })
    }
}

impl Row {
    /// Value and interval; an interval that is missing has no width.
    pub(super) fn point(&self) -> Option<Point> {
        let value = self.value?;
        Some(Point {
            value,
            lo: self.lo.unwrap_or(value),
            hi: self.hi.unwrap_or(value),
        })
    }
}

/// A value with its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) value: f64,
    pub(super) lo: f64,
    pub(super) hi: f64,
}

/// What a model must show before it can judge anything.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gate<'a> {
    pub(super) name: &'a str,
    pub(super) row: &'a Row,
}

/// Which side of its bar a value had to be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    AtLeast,
    AtMost,
    /// The value is the bar.
    Either,
}

impl Gate<'_> {
    /// Whether it held. A value that is no number did not.
    pub(super) fn held(&self) -> bool {
        self.row.value.is_some() && self.row.ratio.is_some_and(|ratio| ratio >= 1.0)
    }

    /// The bar: rows say only whether it was met, and the value on which side.
    pub(super) fn bar(&self) -> Option<(Side, f64)> {
        let bar = self.row.limit?;
        let side = match self.row.value.and_then(|value| value.partial_cmp(&bar)) {
            None | Some(std::cmp::Ordering::Equal) => Side::Either,
            Some(order) if self.held() == order.is_gt() => Side::AtLeast,
            Some(_) => Side::AtMost,
        };
        Some((side, bar))
    }
}

/// Rows of a quality report by method, cell and measure; names in the order of
/// their first row.
#[derive(Debug)]
pub(super) struct Quality<'a> {
    pub(super) methods: Vec<&'a str>,
    cells: Vec<&'a str>,
    /// Measures of `METHOD/CELL/MEASURE`.
    pub(super) measures: Vec<&'a str>,
    /// Measures of `METHOD/MEASURE`.
    pub(super) totals: Vec<&'a str>,
    /// Rows whose names say none of this.
    pub(super) others: Vec<&'a Row>,
    by_name: BTreeMap<&'a str, &'a Row>,
    /// Chunks of a cell without a count in its name.
    pub(super) base: Option<u64>,
}

impl<'a> Quality<'a> {
    pub(super) fn new(report: &'a Report) -> Self {
        let mut quality = Self {
            methods: Vec::new(),
            cells: Vec::new(),
            measures: Vec::new(),
            totals: Vec::new(),
            others: Vec::new(),
            by_name: BTreeMap::new(),
            base: report.settings.get("chunks").and_then(Value::as_u64),
        };
        for row in &report.rows {
            quality.by_name.insert(&row.name, row);
            let names: Vec<&str> = row.name.split('/').collect();
            match names[..] {
                ["gate" | "bar" | "sensitivity", ..] | ["questions", _] => {}
                [method, cell, measure] => {
                    note(&mut quality.methods, method);
                    note(&mut quality.cells, cell);
                    note(&mut quality.measures, measure);
                }
                [method, measure] => {
                    note(&mut quality.methods, method);
                    note(&mut quality.totals, measure);
                }
                _ => quality.others.push(row),
            }
        }
        quality
    }

    pub(super) fn row(&self, method: &str, cell: &str, measure: &str) -> Option<&'a Row> {
        let name = format!("{method}/{cell}/{measure}");
        self.by_name.get(name.as_str()).copied()
    }

    pub(super) fn total(&self, method: &str, measure: &str) -> Option<&'a Row> {
        self.by_name
            .get(format!("{method}/{measure}").as_str())
            .copied()
    }

    /// Methods that have any row of a measure.
    pub(super) fn methods_of(&self, measure: &str) -> Vec<&'a str> {
        let with = |method: &&str| {
            let mut cells = self.cells.iter();
            cells.any(|cell| self.row(method, cell, measure).is_some())
        };
        self.methods.iter().copied().filter(with).collect()
    }

    /// Cells without a count that have any row of a measure.
    pub(super) fn tasks_of(&self, measure: &str) -> Vec<&'a str> {
        let with = |cell: &&str| {
            let mut methods = self.methods.iter();
            methods.any(|method| self.row(method, cell, measure).is_some())
        };
        let plain = self.cells.iter().filter(|cell| !cell.contains('@'));
        plain.copied().filter(with).collect()
    }

    /// Cells of each task that was asked at more than one number of chunks, by
    /// that number. Without [`Self::base`] only those that name it.
    pub(super) fn grown(&self) -> Vec<(&'a str, BTreeMap<u64, &'a str>)> {
        let mut tasks = Vec::new();
        let mut counts: BTreeMap<&str, BTreeMap<u64, &str>> = BTreeMap::new();
        for cell in &self.cells {
            let (task, count) = match cell.split_once('@') {
                Some((task, count)) => (task, count.parse().ok()),
                None => (*cell, self.base),
            };
            note(&mut tasks, task);
            if let Some(count) = count {
                counts.entry(task).or_default().insert(count, cell);
            }
        }
        tasks
            .into_iter()
            .filter_map(|task| Some((task, counts.remove(task)?)))
            .filter(|(_, cells)| cells.len() > 1)
            .collect()
    }

    /// Fewest and most questions asked in a cell.
    pub(super) fn questions(&self) -> Option<(f64, f64)> {
        let mut asked = self
            .by_name
            .iter()
            .filter(|(name, _)| name.starts_with("questions/"))
            .filter_map(|(_, row)| row.value);
        let first = asked.next()?;
        Some(asked.fold((first, first), |(lo, hi), n| (lo.min(n), hi.max(n))))
    }
}

/// Rows of KV statistics by measure, plane and layer.
#[derive(Debug, Default)]
pub(super) struct Layers<'a> {
    /// In the order of their first row.
    pub(super) measures: Vec<Measure<'a>>,
    pub(super) layers: BTreeSet<u32>,
    /// Rows that are about neither a layer nor the median of all.
    pub(super) others: Vec<&'a Row>,
}

/// One measure everywhere.
#[derive(Debug)]
pub(super) struct Measure<'a> {
    pub(super) name: String,
    pub(super) unit: &'a str,
    rows: BTreeMap<(Plane, At), &'a Row>,
}

/// What of the KV a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Plane {
    /// Keys with their rotation undone.
    Keys,
    /// Keys as they are stored.
    StoredKeys,
    Values,
    /// The row's name says no more.
    Both,
}

/// Where a row was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum At {
    Layer(u32),
    /// Over layers.
    Median,
}

impl Plane {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Keys => "K",
            Self::StoredKeys => "K as stored",
            Self::Values => "V",
            Self::Both => "K and V",
        }
    }
}

impl<'a> Layers<'a> {
    pub(super) fn new(report: &'a Report) -> Self {
        let mut found = Self::default();
        for row in &report.rows {
            if row.name.starts_with("gate/") {
                continue;
            }
            let Some((name, plane, at)) = place(&row.name) else {
                found.others.push(row);
                continue;
            };
            if let At::Layer(layer) = at {
                found.layers.insert(layer);
            }
            let mut measures = found.measures.iter_mut();
            if let Some(measure) = measures.find(|measure| measure.name == name) {
                measure.rows.insert((plane, at), row);
            } else {
                found.measures.push(Measure {
                    name,
                    unit: &row.unit,
                    rows: BTreeMap::from([((plane, at), row)]),
                });
            }
        }
        found
    }

    pub(super) fn measure(&self, name: &str) -> Option<&Measure<'a>> {
        self.measures.iter().find(|measure| measure.name == name)
    }

    /// Planes that any measure is about.
    pub(super) fn planes(&self) -> BTreeSet<Plane> {
        self.measures.iter().flat_map(Measure::planes).collect()
    }
}

impl<'a> Measure<'a> {
    pub(super) fn planes(&self) -> BTreeSet<Plane> {
        self.rows.keys().map(|&(plane, _)| plane).collect()
    }

    pub(super) fn row(&self, plane: Plane, at: At) -> Option<&'a Row> {
        self.rows.get(&(plane, at)).copied()
    }

    /// Values of one plane by layer.
    pub(super) fn by_layer(&self, plane: Plane) -> Vec<(f64, Point)> {
        self.rows
            .iter()
            .filter_map(|(&(of, at), row)| match at {
                At::Layer(layer) if of == plane => Some((f64::from(layer), row.point()?)),
                _ => None,
            })
            .collect()
    }
}

/// Measure, plane and layer of a row's name: `layer/N/…`, `…/N` or `median/…`,
/// in which the plane is a name or the end of one.
fn place(name: &str) -> Option<(String, Plane, At)> {
    let names: Vec<&str> = name.split('/').collect();
    let (at, names) = match names[..] {
        ["median", ref rest @ ..] => (At::Median, rest),
        ["layer", layer, ref rest @ ..] => (At::Layer(layer.parse().ok()?), rest),
        [ref rest @ .., layer] => (At::Layer(layer.parse().ok()?), rest),
        [] => return None,
    };
    let mut plane = Plane::Both;
    let mut measure = Vec::new();
    for &name in names {
        match name {
            "k" => plane = Plane::Keys,
            "k_post" => plane = Plane::StoredKeys,
            "v" => plane = Plane::Values,
            _ => measure.push(if let Some(name) = name.strip_suffix("_k") {
                plane = Plane::Keys;
                name
            } else if let Some(name) = name.strip_suffix("_v") {
                plane = Plane::Values;
                name
            } else {
                name
            }),
        }
    }
    (!measure.is_empty()).then(|| (measure.join("/"), plane, at))
}

/// Adds a name that is not known yet.
pub(super) fn note<T: PartialEq>(known: &mut Vec<T>, name: T) {
    if !known.contains(&name) {
        known.push(name);
    }
}
