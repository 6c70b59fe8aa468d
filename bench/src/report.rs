//! Rows as others read them: one JSON object, and a table for people.

use anyhow::Context as _;
use serde::Serialize;
use serde_json::{Map, Value};

/// One suite's result.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    suite: &'static str,
    machine: Machine,
    /// What the suite was told to do, where that is not in the names of its rows.
    #[serde(skip_serializing_if = "Map::is_empty")]
    settings: Map<String, Value>,
    rows: Vec<Row>,
}

/// Where it was measured.
#[derive(Debug, Serialize)]
struct Machine {
    cpu: String,
    cores: usize,
    memory_bytes: u64,
    /// One-minute load average before the first measurement.
    load: f64,
}

/// One measured value.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    /// The raw limit or baseline of the same run, in `unit`.
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<f64>,
    /// 1.0 is the limit; for a speed-up, how many times better.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    /// Lower end of a 95 % interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    lo: Option<f64>,
    /// Upper end of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    hi: Option<f64>,
}

impl Row {
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self {
            name: name.into(),
            value,
            unit,
            limit: None,
            ratio: None,
            lo: None,
            hi: None,
        }
    }

    pub(crate) fn against(mut self, limit: f64, ratio: f64) -> Self {
        self.limit = Some(limit);
        self.ratio = Some(ratio);
        self
    }

    /// A 95 % interval, where there is one.
    pub(crate) fn within(mut self, interval: Option<(f64, f64)>) -> Self {
        (self.lo, self.hi) = interval.unzip();
        self
    }
}

impl Report {
    pub(crate) fn new(suite: &'static str) -> Self {
        Self {
            suite,
            machine: Machine::here(),
            settings: Map::new(),
            rows: Vec::new(),
        }
    }

    /// Records one setting of the suite.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.settings.insert(name.to_owned(), value.into());
    }

    pub(crate) fn push(&mut self, row: Row) {
        eprintln!("  {}", line(&row));
        self.rows.push(row);
    }

    /// Repeats rows under shorter names: without `end`.
    pub(crate) fn repeat_without(&mut self, end: &str) {
        let shorter = |row: &Row| {
            let name = row.name.strip_suffix(end)?.to_owned();
            Some(Row {
                name,
                ..row.clone()
            })
        };
        let rows: Vec<Row> = self.rows.iter().filter_map(shorter).collect();
        self.rows.extend(rows);
    }

    /// Prints the table, or the JSON object as one last line.
    pub(crate) fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            println!(
                "{}",
                serde_json::to_string(self).context("a report is plain data")?
            );
        } else {
            println!(
                "{} ({}, {} cores)",
                self.suite, self.machine.cpu, self.machine.cores
            );
            for row in &self.rows {
                println!("  {}", line(row));
            }
        }
        Ok(())
    }
}

fn line(row: &Row) -> String {
    let mut text = format!("{:<32} {:>12.4} {}", row.name, row.value, row.unit);
    if let (Some(lo), Some(hi)) = (row.lo, row.hi) {
        text += &format!("   {lo:.3}..{hi:.3}");
    }
    if let (Some(limit), Some(ratio)) = (row.limit, row.ratio) {
        text += &format!("   limit {limit:.3}   ratio {ratio:.2}");
    }
    text
}

impl Machine {
    fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let field = |text: &str, name: &str| {
            text.lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| Some(line.split_once(':')?.1.trim().to_owned()))
        };
        let memory_kib = field(&read("/proc/meminfo"), "MemTotal")
            .and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        Self {
            cpu: field(&cpuinfo, "model name").unwrap_or_else(|| "unknown".into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory_kib.unwrap_or(0) * 1024,
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|text| text.parse().ok())
                .unwrap_or(0.0),
        }
    }
}

/// The middle value; the mean of the middle two of an even number.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    assert!(!values.is_empty(), "a median needs a value");
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

/// The value below which a share of `share` of all values lies (nearest rank).
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a rank within the slice"
)]
pub(crate) fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * share).ceil() as usize;
    values[rank.clamp(1, values.len()) - 1]
}
