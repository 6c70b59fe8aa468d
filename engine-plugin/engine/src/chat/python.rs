//! Where Jinja in Python and minijinja differ.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value, escape_formatter};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Prints a value: booleans and none as Python spells them.
pub(super) fn print(
    out: &mut Output<'_>,
    state: &State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        ValueKind::None => "None",
        _ => return escape_formatter(out, state, value),
    };
    out.write_str(text).map_err(Error::from)
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
pub(super) fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if ascii == Some(true) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson: ensure_ascii is not supported",
        ));
    }
    let failed = |error| Error::new(ErrorKind::BadSerialization, "tojson").with_source(error);
    let mut json = Vec::new();
    match indent {
        Some(indent) => {
            let indent = " ".repeat(indent);
            let pretty = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut json, pretty))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut json, OneLine)),
    }
    .map_err(failed)?;
    Ok(String::from_utf8(json).expect("JSON is UTF-8"))
}

/// JSON with a space after commas and colons, as Python writes it.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: io::Write + ?Sized>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: io::Write + ?Sized>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// The current time in UTC; see [`strftime`].
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    // A clock before 1970 is broken; the epoch is as good as any answer.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    strftime(format, now.map_or(0, |since| since.as_secs()))
}

/// `seconds` since the epoch in the format of C, as far as templates use it:
/// `%Y %y %m %d %e %B %b %A %a %j %H %I %M %S %p %F %T %%`, and `%-` before a
/// number for no padding.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let time = Civil::from_unix(seconds);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let (padded, directive) = match chars.next() {
            Some('-') => (false, chars.next()),
            other => (true, other),
        };
        let number = |value: u64, width: usize| {
            if padded {
                format!("{value:0width$}")
            } else {
                value.to_string()
            }
        };
        out += &match directive {
            Some('Y') => number(time.year, 4),
            Some('y') => number(time.year % 100, 2),
            Some('m') => number(time.month, 2),
            Some('d') => number(time.day, 2),
            Some('e') => format!("{:2}", time.day),
            Some('j') => number(time.day_of_year, 3),
            Some('H') => number(time.hour, 2),
            Some('I') => number((time.hour + 11) % 12 + 1, 2),
            Some('M') => number(time.minute, 2),
            Some('S') => number(time.second, 2),
            Some('p') => if time.hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => time.month_name.to_owned(),
            Some('b') => time.month_name.chars().take(3).collect(),
            Some('A') => time.weekday.to_owned(),
            Some('a') => time.weekday.chars().take(3).collect(),
            Some('F') => strftime("%Y-%m-%d", seconds)?,
            Some('T') => strftime("%H:%M:%S", seconds)?,
            Some('%') => "%".to_owned(),
            _ => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now: unsupported format {format:?}"),
                ));
            }
        };
    }
    Ok(out)
}

/// A moment on the Gregorian calendar, UTC.
struct Civil {
    year: u64,
    month: u64,
    month_name: &'static str,
    day: u64,
    day_of_year: u64,
    weekday: &'static str,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Civil {
    fn from_unix(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let mut year = 1970;
        let mut left = days;
        while left >= 365 + u64::from(is_leap(year)) {
            left -= 365 + u64::from(is_leap(year));
            year += 1;
        }
        let day_of_year = left + 1;
        let mut month = 1;
        let mut month_name = "";
        for (name, length) in MONTHS {
            month_name = name;
            let length = length + u64::from(month == 2 && is_leap(year));
            if left < length {
                break;
            }
            left -= length;
            month += 1;
        }
        // 1 January 1970 was a Thursday, the first of the list.
        let weekday = WEEKDAYS.iter().cycle().nth((days % 7) as usize);
        Self {
            year,
            month,
            month_name,
            day: left + 1,
            day_of_year,
            weekday: weekday.expect("a cycle does not end"),
            hour: seconds / 3600 % 24,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

const WEEKDAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

/// Names and lengths in a common year.
const MONTHS: [(&str, u64); 12] = [
    ("January", 31),
    ("February", 28),
    ("March", 31),
    ("April", 30),
    ("May", 31),
    ("June", 30),
    ("July", 31),
    ("August", 31),
    ("September", 30),
    ("October", 31),
    ("November", 30),
    ("December", 31),
];

/// Turns `{% generation %}` and `{% endgeneration %}` into `{% if true %}` and
/// `{% endif %}`, whatever their whitespace control.
pub(super) fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out += before;
        let body = tag.trim_start_matches(['-', '+']).trim_start();
        let replaced = [("generation", "if true"), ("endgeneration", "endif")]
            .into_iter()
            .find_map(|(word, instead)| {
                let after = body.strip_prefix(word)?;
                let end = after.trim_start().trim_start_matches(['-', '+']);
                end.starts_with("%}").then_some((after, instead))
            });
        rest = match replaced {
            Some((after, instead)) => {
                out += &tag[..tag.len() - body.len()];
                out += instead;
                after
            }
            None => tag,
        };
    }
    out + rest
}
