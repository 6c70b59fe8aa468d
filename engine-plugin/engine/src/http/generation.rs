//! One sequence in progress: events in, text out, metrics at the end.

use std::ops::Range;
use std::time::{Duration, Instant};

use ::metrics::{counter, histogram};
use kvasir_types::Level;
use tokio::sync::mpsc;

use super::Front;
use super::error::ApiError;
use super::fields::Common;
use super::text::{Piece, Text};
use crate::metrics;
use crate::request::{Event, FinishReason, GenerateRequest, Usage};
use crate::tokenizer::Detokenizer;

/// A submitted sequence. Dropping it cancels it.
#[derive(Debug)]
pub(super) struct Generation {
    /// None once the sequence ended, which also cancels it.
    events: Option<mpsc::Receiver<Event>>,
    text: Text,
    stop_tokens: Vec<u32>,
    /// The request's field that holds the prompt.
    param: &'static str,
    arrived: Instant,
    /// When the first and the last token came.
    tokens_came: Option<(Instant, Instant)>,
    cost: Cost,
    logits_digests: Vec<[u8; 32]>,
}

/// What the front knows about the cost of a sequence.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) cached_tokens: usize,
    pub(super) blended_tokens: usize,
    pub(super) recomputed: f32,
    pub(super) fetched_bytes: u64,
    pub(super) cached_level: Option<Level>,
    /// The scheduler's, or else the front's own measurement.
    pub(super) ttft: Duration,
}

/// How a sequence ended.
#[derive(Debug)]
pub(super) struct End {
    pub(super) reason: FinishReason,
    pub(super) cost: Cost,
    pub(super) logits_digests: Vec<[u8; 32]>,
}

/// One step of a sequence.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) piece: Piece,
    /// Present in the last step.
    pub(super) end: Option<End>,
}

/// A sequence to submit.
#[derive(Debug)]
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    /// Parts of it that other prompts have too.
    pub(super) chunks: Vec<Range<usize>>,
    pub(super) max_tokens: usize,
    pub(super) detokenizer: Detokenizer,
    /// The request's field that holds it.
    pub(super) param: &'static str,
    /// When the request arrived.
    pub(super) arrived: Instant,
}

impl Generation {
    /// Hands a sequence to the scheduler.
    pub(super) fn submit(front: &Front, common: &Common, prompt: Prompt) -> Result<Self, ApiError> {
        let Prompt {
            ids,
            chunks,
            max_tokens,
            detokenizer,
            param,
            arrived,
        } = prompt;
        let mut stop_tokens = common.stop_token_ids.clone();
        if !common.ignore_eos {
            stop_tokens.extend(front.tokenizer.stop_tokens());
        }
        let cost = Cost {
            prompt_tokens: ids.len(),
            ..Cost::default()
        };
        let request = GenerateRequest {
            chunks,
            prompt: ids,
            max_tokens,
            sampling: common.sampling.clone(),
            stop_tokens: stop_tokens.clone(),
            read_cache: common.kvasir.read_cache,
            write_cache: common.kvasir.write_cache,
            logits_digest: common.kvasir.logits_digest,
        };
        let events = (front.submit)(request).map_err(|error| ApiError::Engine { param, error })?;
        Ok(Self {
            events: Some(events),
            text: Text::new(detokenizer, common.stop.clone()),
            stop_tokens,
            param,
            arrived,
            tokens_came: None,
            cost,
            logits_digests: Vec::new(),
        })
    }

    /// The next step that brings text, tokens or the end; none after the end
    /// or an error.
    pub(super) async fn next(&mut self) -> Option<Result<Step, ApiError>> {
        loop {
            let event = self.events.as_mut()?.recv().await;
            match self.take(event) {
                Ok(step) if step.end.is_none() && step.piece.is_empty() => {}
                Ok(step) => return Some(Ok(step)),
                Err(error) => {
                    self.leave("failed");
                    return Some(Err(error));
                }
            }
        }
    }

    fn take(&mut self, event: Option<Event>) -> Result<Step, ApiError> {
        match event.ok_or(ApiError::Stopped)? {
            Event::Prefilled {
                cached_tokens,
                blended_tokens,
                fetched_bytes,
            } => {
                self.cost.cached_tokens = cached_tokens;
                self.cost.blended_tokens = blended_tokens;
                self.cost.fetched_bytes = fetched_bytes;
                let piece = Piece::default();
                Ok(Step { piece, end: None })
            }
            Event::Token {
                id,
                logprob,
                logits_digest,
            } => {
                self.count_token();
                self.logits_digests.extend(logits_digest);
                if self.stop_tokens.contains(&id) {
                    let piece = Piece::default();
                    return Ok(Step { piece, end: None });
                }
                let piece = self.text.push(id, logprob)?;
                let end = piece.stopped.then(|| self.end(FinishReason::Stop));
                Ok(Step { piece, end })
            }
            Event::Finished { reason, usage } => {
                self.adopt(usage);
                let piece = self.text.finish()?;
                let reason = if piece.stopped {
                    FinishReason::Stop
                } else {
                    reason
                };
                let end = Some(self.end(reason));
                Ok(Step { piece, end })
            }
            Event::Failed(error) => Err(ApiError::Engine {
                param: self.param,
                error,
            }),
        }
    }

    fn count_token(&mut self) {
        self.cost.completion_tokens += 1;
        let now = Instant::now();
        match &mut self.tokens_came {
            Some((_, last)) => *last = now,
            None => {
                self.tokens_came = Some((now, now));
                self.cost.ttft = now - self.arrived;
                histogram!(metrics::TTFT_SECONDS).record(self.cost.ttft);
            }
        }
    }

    fn adopt(&mut self, usage: Usage) {
        self.cost = Cost {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            cached_tokens: usage.cached_tokens,
            blended_tokens: usage.blended_tokens,
            recomputed: usage.recomputed,
            fetched_bytes: usage.fetched_bytes,
            cached_level: usage.cached_level,
            ttft: usage.ttft,
        };
    }

    fn end(&mut self, reason: FinishReason) -> End {
        self.leave(word(reason));
        End {
            reason,
            cost: self.cost,
            logits_digests: std::mem::take(&mut self.logits_digests),
        }
    }

    /// Cancels what is left and records the sequence, once.
    fn leave(&mut self, reason: &'static str) {
        if self.events.take().is_none() {
            return;
        }
        let Cost {
            prompt_tokens,
            completion_tokens,
            cached_tokens,
            blended_tokens,
            ..
        } = self.cost;
        counter!(metrics::SEQUENCES, "reason" => reason).increment(1);
        counter!(metrics::PROMPT_TOKENS).increment(prompt_tokens as u64);
        counter!(metrics::COMPLETION_TOKENS).increment(completion_tokens as u64);
        counter!(metrics::CACHED_TOKENS).increment(cached_tokens as u64);
        counter!(metrics::BLENDED_TOKENS).increment(blended_tokens as u64);
        if let Some((first, last)) = self.tokens_came
            && completion_tokens > 1
        {
            let gaps = (completion_tokens - 1) as f64;
            histogram!(metrics::TPOT_SECONDS).record((last - first).as_secs_f64() / gaps);
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.leave("cancelled");
    }
}

/// `finish_reason` of a response.
pub(super) fn word(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}
