//! Small parts of Markdown: tables, and values as they stand in their cells.

use serde_json::Value;

use super::plot::Plot;
use super::read::{Point, Row};

/// A heading of the second level.
pub(super) fn section(title: &str) -> String {
    format!("\n## {title}\n")
}

/// A plot, by its path from the page.
pub(super) fn image(plot: &Plot) -> String {
    format!("\n![{}]({})\n", escape(&plot.title), plot.path())
}

/// The first column to the left, the others, numbers, to the right.
pub(super) fn table(head: &[String], rows: &[Vec<String>]) -> String {
    let numbers = "---:|".repeat(head.len().saturating_sub(1));
    ruled(head, &format!("|---|{numbers}"), rows)
}

/// A table with the line below its head.
pub(super) fn ruled(head: &[String], rule: &str, rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rows: String = rows.iter().map(|row| line(row)).collect();
    format!("{}{rule}\n{rows}", line(head))
}

/// The value of a row with its interval; a dash where there is no row.
pub(super) fn value(row: Option<&Row>) -> String {
    let Some(row) = row else {
        return "–".to_owned();
    };
    let Some(Point { value, lo, hi }) = row.point() else {
        return "not a number".to_owned();
    };
    let said = number(value, &row.unit);
    if row.lo.is_some() && row.hi.is_some() {
        let (lo, hi) = (number(lo, &row.unit), number(hi, &row.unit));
        format!("{said} [{lo}, {hi}]")
    } else {
        said
    }
}

/// A setting of a run.
pub(super) fn setting(value: Option<&Value>) -> String {
    match value {
        None => "–".to_owned(),
        Some(Value::String(text)) => code(text),
        Some(Value::Bool(true)) => "yes".to_owned(),
        Some(Value::Bool(false)) => "no".to_owned(),
        Some(value) => escape(&value.to_string()),
    }
}

/// A value as people read it: the same number of places all through a unit.
pub(super) fn number(value: f64, unit: &str) -> String {
    if unit.starts_with("bytes") || unit == "questions" {
        return count(value);
    }
    // Rounds to nothing: says how small it is instead.
    if value != 0.0 && value.abs() < 5e-4 && unit != "share" {
        return format!("{value:.1e}").replace('-', "−");
    }
    let text = if value.abs() >= 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    };
    match text.strip_prefix('-') {
        Some("0.000") => "0.000".to_owned(),
        Some(positive) => format!("−{positive}"),
        None => text,
    }
}

/// A whole number in groups of three digits.
pub(super) fn count(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::from(if value <= -0.5 { "−" } else { "" });
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A unit behind a title.
pub(super) fn in_unit(unit: &str) -> String {
    if unit.is_empty() {
        String::new()
    } else {
        format!(" ({})", escape(unit))
    }
}

/// A name as it is in the rows.
pub(super) fn code(text: &str) -> String {
    format!("`{}`", text.replace('`', "'").replace('|', "\\|"))
}

/// Text in which nothing is markup.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '|' | '*' | '_' | '`' | '[' | ']' | '<' | '\\') {
            escaped.push('\\');
        }
        escaped.push(if character == '\n' { ' ' } else { character });
    }
    escaped
}

/// With a capital.
pub(super) fn sentence(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(characters).collect()
    })
}
