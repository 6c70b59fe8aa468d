//! One sequence on the engine thread.

use std::time::{Duration, Instant};

use kvasir_plugin::blend::{Segmented, Selection};
use kvasir_plugin::{FetchOutcome, Prefetch, Prompt};
use kvasir_types::Level;
use tokio::sync::mpsc;

use super::blending::Gathering;
use super::choosing::Choice;
use super::parking::Turn;
use crate::kv::BlockId;
use crate::request::{Event, FinishReason, GenerateRequest, RequestError, Usage};
use crate::sampling::Sampler;

/// Where a sequence stands.
#[derive(Debug)]
pub(super) enum Phase {
    /// Its prefix is being fetched.
    Fetching(Prefetch),
    /// Its chunks are being fetched.
    Gathering(Box<Gathering>),
    /// Of the prompt from `position` on, what is selected is still to be computed.
    Blending(Box<Selection>),
    /// Of the prompt, and of what was generated where it is computed again, tokens from
    /// `position` on are still to be run through the model.
    Prefill,
    /// The last token of `tokens` is still to be run through the model.
    Decode,
    /// Finished; its pages are kept until its chunks are captured.
    Draining,
}

/// A sequence that holds pages.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) phase: Phase,
    /// Prompt, then generated tokens.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_tokens: usize,
    /// The prompt in chunks, when the cache may be used.
    pub(crate) prompt: Option<Prompt>,
    /// Its chunks, until they are gathered.
    pub(super) segmented: Option<Segmented>,
    /// Tokens whose KV is in the pages.
    pub(crate) position: usize,
    pub(crate) blocks: Vec<BlockId>,
    /// The next chunk to copy out for the cache, and one past the last.
    pub(crate) capture: std::ops::Range<usize>,
    request: GenerateRequest,
    /// Prompt plus completion, at most.
    limit: usize,
    sampler: Sampler,
    events: mpsc::Sender<Event>,
    submitted: Instant,
    pub(crate) usage: Usage,
    /// Where not all sequences fit into memory.
    pub(super) turn: Turn,
    /// What it chooses pages by, if it does not attend to all.
    pub(super) choice: Option<Choice>,
    /// How often it was computed again.
    pub(super) restarts: u32,
}

/// What became of a sequence with its next token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Goes,
    /// Its KV is not to be trusted: all of it is to be computed.
    StartsOver,
    Ends,
}

impl Sequence {
    pub(crate) fn new(
        submission: super::Submission,
        blocks: Vec<BlockId>,
        limit: usize,
        fallback_seed: u64,
    ) -> Self {
        let super::Submission {
            mut request,
            prompt,
            segmented,
            events,
            submitted,
        } = submission;
        let tokens = std::mem::take(&mut request.prompt);
        let prompt_tokens = tokens.len();
        let chunks = prompt.as_ref().map_or(0, |prompt| prompt.keys().len());
        let sampler = Sampler::new(request.sampling.clone(), fallback_seed);
        Self {
            phase: Phase::Prefill,
            prompt_tokens,
            position: 0,
            blocks,
            capture: if request.write_cache { 0..chunks } else { 0..0 },
            limit,
            sampler,
            events,
            submitted,
            usage: Usage {
                prompt_tokens,
                ..Usage::default()
            },
            tokens,
            prompt,
            turn: Turn::default(),
            choice: None,
            restarts: 0,
            segmented: segmented.filter(|segmented| !segmented.chunks().is_empty()),
            request,
        }
    }

    /// Where its events go; tells whether anybody listens.
    pub(crate) fn events(&self) -> mpsc::Sender<Event> {
        self.events.clone()
    }

    pub(crate) fn reads_cache(&self) -> bool {
        self.request.read_cache
    }

    /// Since it was submitted.
    pub(super) fn waited(&self) -> Duration {
        self.submitted.elapsed()
    }

    pub(super) fn writes_cache(&self) -> bool {
        self.request.write_cache
    }

    /// Whether nobody listens any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Takes note of what the fetch has come to; leaves `Fetching` when it is done.
    pub(crate) fn settle(&mut self, outcome: FetchOutcome) {
        let Phase::Fetching(prefetch) = &self.phase else {
            return;
        };
        let FetchOutcome::Done { chunks } = outcome else {
            return;
        };
        let prompt = self
            .prompt
            .as_ref()
            .expect("a fetch has a prompt in chunks");
        self.position = prompt.resume_at(chunks);
        self.usage.cached_tokens = self.position;
        self.usage.fetched_bytes = prefetch.bytes();
        self.usage.cached_level = Level::coarsest(prefetch.levels().iter().copied());
        // What the cache holds need not be stored again.
        self.capture.start = prefetch.present().max(chunks).min(self.capture.end);
        if !prefetch.may_capture() {
            self.capture.end = self.capture.start;
        }
        self.phase = Phase::Prefill;
    }

    /// Chooses the next token from `logits`, reports it, and says whether to go on.
    pub(crate) fn advance(&mut self, logits: &[f32]) -> Progress {
        let choice = match self.sampler.sample(logits) {
            Ok(choice) => choice,
            // Fetched KV is the first suspect: compute all of it, once.
            Err(_)
                if self.usage.cached_tokens + self.usage.blended_tokens > 0
                    && self.usage.completion_tokens == 0 =>
            {
                tracing::warn!("logits over fetched KV are not finite; computing everything");
                self.capture = 0..0;
                return Progress::StartsOver;
            }
            Err(_) => {
                self.fail(RequestError::NotFinite);
                return Progress::Ends;
            }
        };
        if self.usage.completion_tokens == 0 {
            self.usage.ttft = self.submitted.elapsed();
            // A receiver that went away is noticed with the token below.
            let _ = self.events.try_send(Event::Prefilled {
                cached_tokens: self.usage.cached_tokens,
                blended_tokens: self.usage.blended_tokens,
                fetched_bytes: self.usage.fetched_bytes,
            });
        }
        self.usage.completion_tokens += 1;
        self.tokens.push(choice.id);
        let event = Event::Token {
            id: choice.id,
            logprob: choice.logprob,
            logits_digest: self.request.logits_digest.then(|| digest(logits)),
        };
        if self.events.try_send(event).is_err() {
            // The receiver went away: there is room for every event by construction.
            return Progress::Ends;
        }
        let reason = if self.request.stop_tokens.contains(&choice.id) {
            FinishReason::Stop
        } else if self.usage.completion_tokens >= self.request.max_tokens
            || self.tokens.len() >= self.limit
        {
            FinishReason::Length
        } else {
            self.phase = Phase::Decode;
            return Progress::Goes;
        };
        let usage = self.usage;
        // A receiver that went away needs no last word.
        let _ = self.events.try_send(Event::Finished { reason, usage });
        Progress::Ends
    }

    /// Computes everything from its tokens, of which nothing is in the pages from now on.
    pub(super) fn start_over(&mut self) {
        // What has been answered was computed over what came from the cache.
        if self.usage.completion_tokens == 0 {
            self.usage.cached_tokens = 0;
            self.usage.blended_tokens = 0;
            self.usage.recomputed = 0.0;
            self.usage.cached_level = None;
        }
        self.position = 0;
        self.phase = Phase::Prefill;
    }

    /// Prompt plus completion, at most.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Reports an error. What is in the pages is not worth keeping.
    pub(crate) fn fail(&mut self, error: RequestError) {
        self.capture = 0..0;
        // A receiver that went away needs no last word.
        let _ = self.events.try_send(Event::Failed(error));
    }
}

fn digest(logits: &[f32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for value in logits {
        hasher.update(&value.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}
