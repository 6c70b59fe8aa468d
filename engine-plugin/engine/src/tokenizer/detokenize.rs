//! Text of a growing sequence, in pieces that never have to be taken back.
//!
//! A token's text can depend on the tokens before it (spaces between words)
//! and be part of a character. So a short window of tokens is decoded again
//! with each new one, and text is handed out once it no longer ends in the
//! replacement character that stands for an unfinished one. Bytes that belong
//! to no character wait for a few tokens only; a character begun behind them
//! still arrives whole.

use std::sync::Arc;

use super::{DecodeError, Tokenizer};

/// Decodes one sequence; see [`Tokenizer::detokenizer`].
///
/// Special tokens give no text.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Tokens that may influence the text to come; none is special.
    window: Vec<u32>,
    /// Tokens at the front of the window whose text was handed out.
    settled: usize,
    /// Bytes of the window's text that were handed out.
    emitted: usize,
}

impl Detokenizer {
    pub(super) fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32]) -> Result<Self, DecodeError> {
        let plain = prompt.iter().rev().filter(|&&id| !tokenizer.is_special(id));
        let mut window: Vec<u32> = plain.take(CONTEXT_TOKENS).copied().collect();
        window.reverse();
        let text = tokenizer.decode(&window, true)?;
        Ok(Self {
            tokenizer,
            settled: window.len(),
            window,
            emitted: text.trim_end_matches(UNFINISHED).len(),
        })
    }

    /// The text that `id` completes; often a word, empty inside a character.
    ///
    /// # Errors
    /// [`DecodeError`] when the tokenizer's decoder rejects the token.
    pub fn push(&mut self, id: u32) -> Result<String, DecodeError> {
        if self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window, true)?;
        let unfinished = text.ends_with(UNFINISHED);
        if unfinished && self.window.len() - self.settled < PENDING_TOKENS {
            return Ok(String::new());
        }
        // After so many bytes of no character, the last may begin one.
        let (held_text, held_tokens) = if unfinished {
            (UNFINISHED.len_utf8(), CHARACTER_BYTES - 1)
        } else {
            (0, 0)
        };
        let new = self.fresh(&text[..text.len() - held_text]);
        if !new.is_empty() {
            // What was handed out before is context no longer.
            self.window.drain(..self.settled);
            self.settled = self.window.len() - held_tokens;
            let context = self.tokenizer.decode(&self.window, true)?;
            self.emitted = context.len().saturating_sub(held_text);
        }
        Ok(new)
    }

    /// What is left when no token follows: an unfinished character, replaced.
    ///
    /// # Errors
    /// [`DecodeError`] when the tokenizer's decoder rejects the tokens.
    pub fn finish(self) -> Result<String, DecodeError> {
        let text = self.tokenizer.decode(&self.window, true)?;
        Ok(self.fresh(&text))
    }

    fn fresh(&self, text: &str) -> String {
        text.get(self.emitted..).unwrap_or_default().to_owned()
    }
}

/// Tokens of the prompt that decide how the first word is joined to it.
const CONTEXT_TOKENS: usize = 6;

/// Bytes of the longest character in UTF-8.
const CHARACTER_BYTES: usize = 4;

/// Tokens that may wait for a character to end. Of more than this, at most the
/// last `CHARACTER_BYTES - 1` are part of one; the others are of none.
const PENDING_TOKENS: usize = 8;

const UNFINISHED: char = char::REPLACEMENT_CHARACTER;
