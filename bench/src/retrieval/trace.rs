//! Retrieval traces, as JSON lines.
//!
//! `{"timestamp": ms, "prefix": id, "chunks": [id, …], "question_length": tokens,
//! "output_length": tokens}`: a prompt is the canonical prefix, the chunks in this order, and a
//! question that no other prompt has. How long prefixes and chunks are is said where a trace
//! is replayed.

use std::collections::HashSet;
use std::io::{self, BufRead};

use serde::{Deserialize, Serialize};

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    /// Milliseconds since the trace began.
    pub(crate) timestamp: u64,
    /// The canonical prefix.
    pub(crate) prefix: u32,
    /// Retrieved chunks, as they stand in the prompt.
    pub(crate) chunks: Vec<u32>,
    /// Tokens of the question.
    pub(crate) question_length: u32,
    /// Tokens of the answer. Nothing here depends on it.
    pub(crate) output_length: u64,
}

/// Why a trace cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TraceError {
    /// The file ended, or the disk failed.
    #[error("line {line} cannot be read")]
    Read {
        line: usize,
        #[source]
        source: io::Error,
    },
    /// Not JSON, or without a field.
    #[error("line {line} is not a request of a retrieval trace")]
    Syntax {
        line: usize,
        #[source]
        source: serde_json::Error,
    },
    /// Traces are in order of time.
    #[error("line {line} is earlier than the line before")]
    Time { line: usize },
    /// A retriever returns a chunk once.
    #[error("line {line} has a chunk twice")]
    Twice { line: usize },
    /// Nothing to replay.
    #[error("the trace has no requests")]
    Empty,
}

/// Reads JSON lines.
///
/// # Errors
/// The first line that is not one of a trace.
pub(crate) fn read(lines: impl BufRead) -> Result<Vec<Request>, TraceError> {
    let mut requests: Vec<Request> = Vec::new();
    for (index, text) in lines.lines().enumerate() {
        let line = index + 1;
        let text = text.map_err(|source| TraceError::Read { line, source })?;
        let request: Request =
            serde_json::from_str(&text).map_err(|source| TraceError::Syntax { line, source })?;
        if requests
            .last()
            .is_some_and(|last| request.timestamp < last.timestamp)
        {
            return Err(TraceError::Time { line });
        }
        let mut seen = HashSet::new();
        if !request.chunks.iter().all(|chunk| seen.insert(chunk)) {
            return Err(TraceError::Twice { line });
        }
        requests.push(request);
    }
    if requests.is_empty() {
        return Err(TraceError::Empty);
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(time: u64, chunks: &str) -> String {
        format!(
            r#"{{"timestamp": {time}, "prefix": 0, "chunks": [{chunks}], "question_length": 40, "output_length": 9}}"#
        ) + "\n"
    }

    #[test]
    fn errors_name_the_line() {
        let good = line(5, "1, 2");
        assert_eq!(read(good.as_bytes()).unwrap()[0].chunks, [1, 2]);
        let bad = [
            ("{\n".to_owned(), "line 2 is not a request"),
            (line(4, "1"), "line 2 is earlier"),
            (line(5, "3, 1, 3"), "line 2 has a chunk twice"),
            (good.replace("prefix", "prefixes"), "line 2 is not a"),
        ];
        for (bad, message) in bad {
            let error = read((good.clone() + &bad).as_bytes()).unwrap_err();
            assert!(error.to_string().starts_with(message), "{error}");
        }
        assert!(matches!(read(&b""[..]), Err(TraceError::Empty)));
    }
}
