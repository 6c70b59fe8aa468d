//! How values, errors and files are written.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use kvasir_client::{CallError, ConnectError};
use kvasir_types::{ByteSize, KvLayout, Planes};
use serde::Serialize;
use tonic::Status;

/// A layout, for --json.
#[derive(Debug, Serialize)]
pub(crate) struct Layout {
    layers: u16,
    kv_heads: u16,
    key_dim: u16,
    /// 0 for a single-plane (MLA) cache.
    value_dim: u16,
    tokens: u32,
    dtype: String,
}

impl From<&KvLayout> for Layout {
    fn from(layout: &KvLayout) -> Self {
        let (key_dim, value_dim) = match layout.planes() {
            Planes::KeyValue { key_dim, value_dim } => (key_dim, value_dim),
            Planes::Single { dim } => (dim, 0),
        };
        Self {
            layers: layout.layers(),
            kv_heads: layout.kv_heads(),
            key_dim,
            value_dim,
            tokens: layout.tokens(),
            dtype: layout.dtype().to_string(),
        }
    }
}

/// Whether the reader of stdout went away, as `head` does.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// An error with its causes, as one line.
pub(crate) fn explain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        if let Some(status) = cause.downcast_ref::<Box<Status>>() {
            add(&mut line, status.message());
            break;
        }
        add(&mut line, &cause.to_string());
        // What the transport reports of a daemon that is not there helps nobody.
        if is_unavailable(cause) {
            break;
        }
    }
    line
}

fn is_unavailable(error: &(dyn std::error::Error + 'static)) -> bool {
    let call = match error.downcast_ref::<ConnectError>() {
        Some(ConnectError::Call(call)) => Some(call),
        _ => error.downcast_ref::<CallError>(),
    };
    matches!(call, Some(CallError::Unavailable { .. }))
}

/// Transparent errors repeat the text of their cause.
fn add(line: &mut String, text: &str) {
    if line.is_empty() {
        line.push_str(text);
    } else if !line.ends_with(text) {
        line.push_str(": ");
        line.push_str(text);
    }
}

pub(crate) fn size(bytes: u64) -> String {
    ByteSize::bytes(bytes).human().to_string()
}

/// `93.1%`, or `-` of nothing.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    #[expect(clippy::cast_precision_loss, reason = "printed with one decimal")]
    let share = part as f64 / whole as f64 * 100.0;
    format!("{share:.1}%")
}

/// `4.13x`, or `-` of nothing.
pub(crate) fn times(whole: u64, part: u64) -> String {
    if part == 0 {
        return "-".into();
    }
    #[expect(clippy::cast_precision_loss, reason = "printed with two decimals")]
    let times = whole as f64 / part as f64;
    format!("{times:.2}x")
}

pub(crate) fn duration(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, ..) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// Writes a file that is there whole or not at all.
pub(crate) fn write_whole(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let write = || {
        let mut file = File::create(&partial)?;
        for part in parts {
            file.write_all(part)?;
        }
        fs::rename(&partial, path)
    };
    write().inspect_err(|_| {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_file(&partial);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line_without_repetition() {
        let inner = "abc".parse::<kvasir_client::Endpoint>().unwrap_err();
        let error = anyhow::Error::from(kvasir_client::ConnectError::from(inner.clone()));
        assert_eq!(explain(&error), inner.to_string());
        let error = error.context("--endpoint");
        assert!(explain(&error).starts_with("--endpoint: `abc` is not an endpoint"));
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(percent(1, 3), "33.3%");
        assert_eq!(percent(0, 0), "-");
        assert_eq!(duration(59_999), "59s");
        assert_eq!(duration(61_000), "1m 1s");
        assert_eq!(duration(3_600_000), "1h 0m");
        assert_eq!(duration(90_000_000), "1d 1h");
    }
}
