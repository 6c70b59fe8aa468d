//! Request traces: Mooncake's JSON lines (Qin et al., FAST 2025).
//!
//! `{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": […]}`,
//! one id per block of 512 tokens. Ids chain: an id stands for its block and all blocks
//! before it.

use std::collections::HashMap;
use std::io::{self, BufRead};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// Milliseconds since the trace began.
    pub(crate) timestamp: u64,
    /// Tokens of the prompt.
    pub(crate) input_length: u64,
    /// Tokens of the answer.
    pub(crate) output_length: u64,
    /// The prompt's blocks.
    pub(crate) hash_ids: Vec<u64>,
}

/// Requests over blocks that are numbered from 0 in order of appearance.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace {
    pub(crate) requests: Vec<Request>,
    pub(crate) blocks: Vec<Block>,
}

/// One prompt.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// Time since the trace began.
    pub(crate) at: Duration,
    pub(crate) input_tokens: u64,
    pub(crate) output_tokens: u64,
    pub(crate) blocks: Vec<u32>,
}

/// A block of a prompt, after all blocks before it.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// Its tokens: fewer than [`BLOCK_TOKENS`] at the end of a prompt only.
    pub(crate) tokens: u32,
    pub(crate) parent: Option<u32>,
    pub(crate) children: Vec<u32>,
}

/// Tokens of a block.
pub(crate) const BLOCK_TOKENS: u64 = 512;

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
    #[error("line {line} is not a request of a trace")]
    Syntax {
        line: usize,
        #[source]
        source: serde_json::Error,
    },
    /// As many blocks as tokens need are what every trace has.
    #[error("line {line} has {blocks} blocks for {tokens} tokens; blocks have {BLOCK_TOKENS}")]
    Length {
        line: usize,
        blocks: usize,
        tokens: u64,
    },
    /// Traces are in order of time.
    #[error("line {line} is earlier than the line before")]
    Time { line: usize },
    /// An id stands for all blocks before it.
    #[error("line {line} has block {id} behind another block than an earlier line, or twice")]
    Chain { line: usize, id: u64 },
    /// Nothing to replay.
    #[error("the trace has no requests")]
    Empty,
}

impl Trace {
    /// Reads JSON lines.
    ///
    /// # Errors
    /// The first line that is not one of a trace.
    pub(crate) fn read(lines: impl BufRead) -> Result<Self, TraceError> {
        let mut builder = Builder::default();
        for (index, text) in lines.lines().enumerate() {
            let line = index + 1;
            let text = text.map_err(|source| TraceError::Read { line, source })?;
            let request = serde_json::from_str(&text)
                .map_err(|source| TraceError::Syntax { line, source })?;
            builder.push(line, &request)?;
        }
        builder.finish()
    }

    /// Takes lines that were made, not read.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) fn from_lines(lines: &[Line]) -> Result<Self, TraceError> {
        let mut builder = Builder::default();
        for (index, line) in lines.iter().enumerate() {
            builder.push(index + 1, line)?;
        }
        builder.finish()
    }

    /// Tokens of all prompts.
    pub(crate) fn input_tokens(&self) -> u64 {
        let tokens = self.requests.iter().map(|request| request.input_tokens);
        tokens.sum()
    }
}

impl Request {
    /// Tokens of the prompt's first `blocks` blocks.
    pub(crate) fn tokens_of(&self, blocks: usize) -> u64 {
        (blocks as u64 * BLOCK_TOKENS).min(self.input_tokens)
    }
}

#[derive(Default)]
struct Builder {
    trace: Trace,
    numbers: HashMap<u64, u32>,
}

impl Builder {
    fn push(&mut self, line: usize, request: &Line) -> Result<(), TraceError> {
        let tokens = request.input_length;
        if request.hash_ids.len() as u64 != tokens.div_ceil(BLOCK_TOKENS) {
            let blocks = request.hash_ids.len();
            return Err(TraceError::Length {
                line,
                blocks,
                tokens,
            });
        }
        let at = Duration::from_millis(request.timestamp);
        if self.trace.requests.last().is_some_and(|last| at < last.at) {
            return Err(TraceError::Time { line });
        }
        let mut parent = None;
        let mut blocks = Vec::with_capacity(request.hash_ids.len());
        for &id in &request.hash_ids {
            let block = self.block(id, parent);
            if self.trace.blocks[block as usize].parent != parent {
                return Err(TraceError::Chain { line, id });
            }
            let left = tokens - blocks.len() as u64 * BLOCK_TOKENS;
            let known = &mut self.trace.blocks[block as usize].tokens;
            *known = u32::try_from(left.min(BLOCK_TOKENS)).map_or(*known, |now| now.max(*known));
            blocks.push(block);
            parent = Some(block);
        }
        self.trace.requests.push(Request {
            at,
            input_tokens: tokens,
            output_tokens: request.output_length,
            blocks,
        });
        Ok(())
    }

    fn block(&mut self, id: u64, parent: Option<u32>) -> u32 {
        let blocks = &mut self.trace.blocks;
        *self.numbers.entry(id).or_insert_with(|| {
            let number = u32::try_from(blocks.len()).expect("a trace has fewer blocks than 2^32");
            if let Some(parent) = parent {
                blocks[parent as usize].children.push(number);
            }
            blocks.push(Block {
                tokens: 0,
                parent,
                children: Vec::new(),
            });
            number
        })
    }

    fn finish(self) -> Result<Trace, TraceError> {
        if self.trace.requests.is_empty() {
            return Err(TraceError::Empty);
        }
        Ok(self.trace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Trace, TraceError> {
        Trace::read(text.as_bytes())
    }

    fn line(time: u64, tokens: u64, ids: &str) -> String {
        format!(
            r#"{{"timestamp": {time}, "input_length": {tokens}, "output_length": 1, "hash_ids": [{ids}]}}"#
        ) + "\n"
    }

    #[test]
    fn chains_are_numbered() {
        let trace = read(&(line(0, 1000, "7, 9") + &line(5, 1100, "7, 9, 3"))).unwrap();
        assert_eq!(trace.requests[1].blocks, [0, 1, 2]);
        assert_eq!(trace.blocks[0].children, [1]);
        assert_eq!(trace.requests[0].tokens_of(2), 1000);
        assert_eq!(trace.input_tokens(), 2100);
    }

    #[test]
    fn errors_name_the_line() {
        let good = line(5, 600, "1, 2");
        let bad = [
            ("{\n".into(), "line 2 is not a request"),
            (line(5, 600, "1"), "line 2 has 1 blocks for 600 tokens"),
            (line(4, 600, "1, 2"), "line 2 is earlier"),
            (line(5, 600, "2, 1"), "line 2 has block 2 behind another"),
            (
                line(5, 1100, "1, 2, 1"),
                "line 2 has block 1 behind another",
            ),
        ];
        for (bad, message) in bad {
            let error = read(&(good.clone() + &bad)).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        assert!(matches!(read(""), Err(TraceError::Empty)));
    }
}
