//! Generated tokens into the text of an answer.

use std::collections::VecDeque;

use super::stop::StopStrings;
use crate::tokenizer::{DecodeError, Detokenizer};

/// Text of one sequence so far.
#[derive(Debug)]
pub(super) struct Text {
    detokenizer: Option<Detokenizer>,
    stops: StopStrings,
    /// Tokens whose text is not released yet, with the byte each ends at.
    waiting: VecDeque<(TokenText, usize)>,
    produced_bytes: usize,
    produced_chars: usize,
    released_bytes: usize,
}

/// Text that is ready for the client, and the tokens it came from.
#[derive(Debug, Default)]
pub(super) struct Piece {
    /// May be empty.
    pub(super) text: String,
    /// Tokens whose last character, or the stop string in it, was reached.
    pub(super) tokens: Vec<TokenText>,
    /// Whether a stop string ended the text.
    pub(super) stopped: bool,
}

impl Piece {
    /// Whether it brings nothing to anyone.
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }

    /// Whether it brings something to a client that wants `logprobs` or not.
    pub(super) fn is_worth_sending(&self, logprobs: bool) -> bool {
        !self.text.is_empty() || (logprobs && !self.tokens.is_empty())
    }
}

/// One token of the answer.
#[derive(Debug)]
pub(super) struct TokenText {
    /// What it added; empty for a part of a character.
    pub(super) text: String,
    /// Natural logarithm of its probability.
    pub(super) logprob: f32,
    /// Characters of the answer before it.
    pub(super) offset: usize,
}

impl Text {
    /// An empty text that `stops` may end.
    pub(super) fn new(detokenizer: Detokenizer, stops: Vec<String>) -> Self {
        Self {
            detokenizer: Some(detokenizer),
            stops: StopStrings::new(stops),
            waiting: VecDeque::new(),
            produced_bytes: 0,
            produced_chars: 0,
            released_bytes: 0,
        }
    }

    /// Adds one token. After a piece that `stopped`, no more may follow.
    pub(super) fn push(&mut self, id: u32, logprob: f32) -> Result<Piece, DecodeError> {
        let text = match &mut self.detokenizer {
            Some(detokenizer) => detokenizer.push(id)?,
            None => String::new(),
        };
        let offset = self.produced_chars;
        self.produced_chars += text.chars().count();
        self.produced_bytes += text.len();
        let released = self.stops.push(&text);
        let token = TokenText {
            text,
            logprob,
            offset,
        };
        self.waiting.push_back((token, self.produced_bytes));
        Ok(self.release(released.text, released.stopped))
    }

    /// What was held back, when no more tokens come.
    pub(super) fn finish(&mut self) -> Result<Piece, DecodeError> {
        let rest = match self.detokenizer.take() {
            Some(detokenizer) => detokenizer.finish()?,
            None => String::new(),
        };
        let mut released = self.stops.push(&rest);
        if !released.stopped {
            released.text += &self.stops.finish();
        }
        // The replaced character came from the tokens that waited for it.
        self.produced_bytes += rest.len();
        if let Some((token, end)) = self.waiting.back_mut() {
            token.text += &rest;
            *end = self.produced_bytes;
        }
        Ok(self.release(released.text, released.stopped))
    }

    fn release(&mut self, text: String, stopped: bool) -> Piece {
        self.released_bytes += text.len();
        let mut tokens = Vec::new();
        while let Some((token, end)) = self.waiting.front() {
            // A stop string may begin inside a token: what is before it counts.
            let begun = end - token.text.len() < self.released_bytes;
            if *end > self.released_bytes && !(stopped && begun) {
                break;
            }
            tokens.extend(self.waiting.pop_front().map(|(token, _)| token));
        }
        Piece {
            text,
            tokens,
            stopped,
        }
    }
}
