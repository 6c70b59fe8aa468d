//! What a caller asks of the engine and what it is told.
//!
//! The scheduler speaks tokens only. Text (stop strings, chat templates,
//! detokenisation) belongs to the HTTP front.

use std::ops::Range;
use std::time::Duration;

use kvasir_types::Level;

use crate::paging::PagingError;
use crate::sampling::SamplingParams;

/// One sequence to continue.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Token ids of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// Parts of the prompt that other prompts have too, wherever they stand: documents.
    /// Ascending, and none over another. Their KV is reused at any position, if the engine
    /// blends; see [`BlendConfig`](crate::scheduler::BlendConfig).
    pub chunks: Vec<Range<usize>>,
    /// Most tokens to generate; 0 counts as 1, and what does not fit is cut.
    pub max_tokens: usize,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// Tokens that end the sequence; they are reported but belong to no text.
    pub stop_tokens: Vec<u32>,
    /// Whether the cache may be read for this request.
    pub read_cache: bool,
    /// Whether chunks of this prompt are stored after prefill.
    pub write_cache: bool,
    /// Whether each [`Event::Token`] carries a digest of the logits it was chosen from.
    pub logits_digest: bool,
}

/// Progress of one request, in order: `Prefilled`, tokens, then one `Finished`; or
/// `Failed` at any point.
#[derive(Clone, Debug)]
pub enum Event {
    /// The whole prompt is in the pages; the first token follows at once.
    Prefilled {
        /// Prompt tokens whose KV came from the cache.
        cached_tokens: usize,
        /// Prompt tokens of chunks that were reused where they did not stand before.
        blended_tokens: usize,
        /// Payload bytes fetched, those of chunks that fell short included.
        fetched_bytes: u64,
    },
    /// The next token.
    Token {
        /// Its id.
        id: u32,
        /// Natural logarithm of its probability before temperature.
        logprob: f32,
        /// BLAKE3 of the logits (little-endian f32, vocabulary order), if asked for.
        logits_digest: Option<[u8; 32]>,
    },
    /// The sequence ended.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it cost.
        usage: Usage,
    },
    /// The sequence cannot go on.
    Failed(RequestError),
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was generated.
    Stop,
    /// `max_tokens` were generated, or the model's context is full.
    Length,
}

/// What one request cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Prompt tokens whose KV came from the cache instead of prefill.
    pub cached_tokens: usize,
    /// Prompt tokens of chunks that were reused where they did not stand before.
    pub blended_tokens: usize,
    /// Of the KV of these, the share that was computed anew.
    pub recomputed: f32,
    /// Payload bytes fetched from the cache, as they were sent.
    pub fetched_bytes: u64,
    /// The coarsest level among the chunks that these tokens came in, if any.
    pub cached_level: Option<Level>,
    /// From admission to the queue until the first token was chosen.
    pub ttft: Duration,
}

/// Why a request was not accepted or not finished.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The prompt is empty.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A token id is outside the model's vocabulary.
    #[error("token {token} is outside the model's vocabulary of {vocabulary}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// Chunks reach over each other, or past the prompt.
    #[error("chunks must ascend, not overlap, and lie inside the prompt")]
    Chunks,
    /// The prompt and one more token do not fit the model's context or the KV pool.
    #[error("{needed} tokens do not fit: the limit is {limit}; shorten the prompt")]
    TooLong {
        /// The prompt plus one token.
        needed: usize,
        /// What fits.
        limit: usize,
    },
    /// Too many requests wait; nothing was queued.
    #[error("{waiting} requests are waiting already; try again later")]
    Overloaded {
        /// Length of the queue.
        waiting: usize,
    },
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// The model produced a value that is not a number.
    #[error("the model's output is not finite; the checkpoint or its precision is at fault")]
    NotFinite,
    /// The KV of this request cannot be kept or read back; others go on.
    #[error(
        "the KV of this request cannot be moved; try again, and see to the scratch file's disk"
    )]
    Pages(#[source] PagingError),
    /// The batch this request was part of failed; the log says why.
    #[error("the engine failed on this request; its log says why")]
    Internal,
}
