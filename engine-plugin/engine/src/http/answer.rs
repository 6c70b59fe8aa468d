//! Answers from sequences: whole, or as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ::metrics::counter;
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, SelectAll, Stream, StreamExt};
use kvasir_types::Level;
use serde_json::{Map, Value, json};

use super::Front;
use super::error::ApiError;
use super::fields::Common;
use super::generation::{Cost, End, Generation, Step, word};
use super::plain::unix_seconds;
use super::text::{Piece, TokenText};
use crate::metrics;
use crate::request::FinishReason;

/// How the two endpoints put text into JSON.
#[derive(Debug)]
pub(super) struct Shape {
    /// Beginning of the answer's `id`.
    pub(super) id_prefix: &'static str,
    /// `object` of a whole answer.
    pub(super) object: &'static str,
    /// `object` of a chunk of a stream.
    pub(super) chunk_object: &'static str,
    /// The one choice of a whole answer.
    pub(super) choice: fn(&Piece, logprobs: bool) -> Choice,
    /// The choices, one per chunk, that a piece adds to a stream.
    pub(super) deltas: fn(Delta<'_>) -> Vec<Choice>,
}

/// A choice without its index and finish reason.
pub(super) type Choice = Map<String, Value>;

/// What a stream has to tell of one sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Delta<'a> {
    pub(super) piece: &'a Piece,
    pub(super) logprobs: bool,
    /// Whether nothing of the sequence was sent before.
    pub(super) first: bool,
    /// Whether the sequence ended.
    pub(super) last: bool,
}

/// An answer to be given.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) shape: &'static Shape,
    pub(super) common: Common,
    pub(super) logprobs: bool,
    /// One for each prompt, in their order.
    pub(super) generations: Vec<Generation>,
}

impl Answer {
    /// Waits for all sequences, or starts a stream of them.
    pub(super) async fn respond(self, front: &Front) -> Result<Response, ApiError> {
        let Self {
            shape,
            common,
            logprobs,
            generations,
        } = self;
        let head = Head {
            id: format!("{}-{}", shape.id_prefix, unique()),
            created: unix_seconds(),
            model: front.model.clone(),
        };
        let tally = Tally {
            digests: common.kvasir.logits_digest.then(Vec::new),
            ..Tally::default()
        };
        if common.stream {
            let chunks = Chunks {
                head,
                shape,
                logprobs,
                include_usage: common.include_usage,
                begun: vec![false; generations.len()],
                steps: Some(steps(generations)),
                ready: VecDeque::new(),
                tally,
            };
            let events = stream::unfold(chunks, async |mut chunks| {
                let event = chunks.next().await?;
                Some((Ok::<_, Infallible>(event), chunks))
            });
            let events = Sse::new(Box::pin(events));
            return Ok(events.keep_alive(KeepAlive::default()).into_response());
        }
        whole(head, shape, logprobs, tally, generations)
            .await
            .map(IntoResponse::into_response)
    }
}

/// Runs a handler and counts its response.
pub(super) async fn counted(
    endpoint: &'static str,
    body: Result<Bytes, BytesRejection>,
    front: &Front,
    handle: impl AsyncFnOnce(Bytes, Instant) -> Result<Response, ApiError>,
) -> Response {
    let arrived = Instant::now();
    let result = match body {
        Err(rejection) => Err(ApiError::Body(rejection)),
        Ok(_) if !front.ready.load(Ordering::Acquire) => Err(ApiError::NotReady),
        Ok(body) => handle(body, arrived).await,
    };
    let response = result.unwrap_or_else(IntoResponse::into_response);
    let status = response.status().as_u16().to_string();
    counter!(metrics::REQUESTS, "endpoint" => endpoint, "status" => status).increment(1);
    response
}

/// `logprobs` of a completion.
pub(super) fn completion_logprobs(tokens: &[TokenText]) -> Value {
    let each = |value: fn(&TokenText) -> Value| tokens.iter().map(value).collect::<Vec<_>>();
    json!({
        "tokens": each(|token| token.text.clone().into()),
        "token_logprobs": each(|token| token.logprob.into()),
        "top_logprobs": null,
        "text_offset": each(|token| token.offset.into()),
    })
}

/// `logprobs` of a chat.
pub(super) fn chat_logprobs(tokens: &[TokenText]) -> Value {
    let entry = |token: &TokenText| {
        json!({
            "token": token.text,
            "logprob": token.logprob,
            "bytes": token.text.as_bytes(),
            "top_logprobs": [],
        })
    };
    json!({ "content": tokens.iter().map(entry).collect::<Vec<_>>() })
}

/// What all chunks of an answer share.
#[derive(Debug)]
struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }
}

/// The cost of all sequences of an answer.
#[derive(Debug, Default)]
struct Tally {
    ended: Vec<Cost>,
    digests: Option<Vec<String>>,
}

impl Tally {
    fn add(&mut self, end: &End) {
        self.ended.push(end.cost);
        if let Some(digests) = &mut self.digests {
            digests.extend(end.logits_digests.iter().map(|digest| hex(digest)));
        }
    }

    fn usage(&self) -> Value {
        let prompt: usize = self.ended.iter().map(|cost| cost.prompt_tokens).sum();
        let completion: usize = self.ended.iter().map(|cost| cost.completion_tokens).sum();
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": { "cached_tokens": self.cached_tokens() },
        })
    }

    fn kvasir(&self) -> Value {
        let fetched: u64 = self.ended.iter().map(|cost| cost.fetched_bytes).sum();
        let blended: usize = self.ended.iter().map(|cost| cost.blended_tokens).sum();
        #[expect(clippy::cast_precision_loss, reason = "tokens of prompts")]
        let recomputed = self
            .ended
            .iter()
            .map(|cost| cost.recomputed * cost.blended_tokens as f32);
        #[expect(clippy::cast_precision_loss, reason = "tokens of prompts")]
        let recomputed = recomputed.sum::<f32>() / blended.max(1) as f32;
        let ttft = self.ended.iter().map(|cost| cost.ttft).max();
        let level = Level::coarsest(self.ended.iter().filter_map(|cost| cost.cached_level));
        let mut kvasir = json!({
            "cached_tokens": self.cached_tokens(),
            "blended_tokens": blended,
            "recomputed": recomputed,
            "fetched_bytes": fetched,
            "cached_level": level.map(|level| level.to_string()),
            "ttft_ms": ttft.as_ref().map(Duration::as_secs_f64).map(|s| s * 1e3),
        });
        if let Some(digests) = &self.digests {
            kvasir["logits_digests"] = json!(digests);
        }
        kvasir
    }

    fn cached_tokens(&self) -> usize {
        self.ended.iter().map(|cost| cost.cached_tokens).sum()
    }
}

async fn whole(
    head: Head,
    shape: &Shape,
    logprobs: bool,
    mut tally: Tally,
    generations: Vec<Generation>,
) -> Result<Json<Value>, ApiError> {
    let all = generations.into_iter().map(collect);
    let ended = futures::future::try_join_all(all).await?;
    let mut choices = Vec::with_capacity(ended.len());
    for (index, (piece, end)) in ended.iter().enumerate() {
        tally.add(end);
        let choice = (shape.choice)(piece, logprobs);
        choices.push(finished(choice, index, Some(end.reason)));
    }
    let mut answer = head.envelope(shape.object, choices);
    answer["usage"] = tally.usage();
    answer["kvasir"] = tally.kvasir();
    Ok(Json(answer))
}

/// All of one sequence as one piece.
async fn collect(mut generation: Generation) -> Result<(Piece, End), ApiError> {
    let mut all = Piece::default();
    while let Some(step) = generation.next().await {
        let Step { piece, end } = step?;
        all.text += &piece.text;
        all.tokens.extend(piece.tokens);
        if let Some(end) = end {
            return Ok((all, end));
        }
    }
    Err(ApiError::Stopped)
}

fn finished(mut choice: Choice, index: usize, reason: Option<FinishReason>) -> Value {
    choice.insert("index".to_owned(), index.into());
    choice.insert("finish_reason".to_owned(), reason.map(word).into());
    Value::Object(choice)
}

type Steps = SelectAll<Pin<Box<dyn Stream<Item = (usize, Result<Step, ApiError>)> + Send>>>;

/// Steps of all sequences as they come, with the index of their sequence.
fn steps(generations: Vec<Generation>) -> Steps {
    let each = |(index, generation): (usize, Generation)| {
        let steps = stream::unfold(generation, async |mut generation| {
            let step = generation.next().await?;
            Some((step, generation))
        });
        steps.map(move |step| (index, step)).boxed()
    };
    stream::select_all(generations.into_iter().enumerate().map(each))
}

/// A stream in progress: chunks, the usage if asked for, `[DONE]`.
struct Chunks {
    head: Head,
    shape: &'static Shape,
    logprobs: bool,
    include_usage: bool,
    /// Whether each sequence has sent a chunk.
    begun: Vec<bool>,
    /// None once `[DONE]` is in `ready`.
    steps: Option<Steps>,
    ready: VecDeque<sse::Event>,
    tally: Tally,
}

impl Chunks {
    async fn next(&mut self) -> Option<sse::Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            match self.steps.as_mut()?.next().await {
                Some((index, Ok(step))) => self.add(index, step),
                Some((_, Err(error))) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "stream failed");
                    self.close(Some(error.json()));
                }
                None => {
                    let last = self.include_usage.then(|| self.last());
                    self.close(last);
                }
            }
        }
    }

    fn add(&mut self, index: usize, Step { piece, end }: Step) {
        if end.is_none() && !piece.is_worth_sending(self.logprobs) {
            return;
        }
        let first = self
            .begun
            .get_mut(index)
            .is_some_and(|begun| !std::mem::replace(begun, true));
        let deltas = (self.shape.deltas)(Delta {
            piece: &piece,
            logprobs: self.logprobs,
            first,
            last: end.is_some(),
        });
        let last = deltas.len().saturating_sub(1);
        for (i, delta) in deltas.into_iter().enumerate() {
            let reason = end.as_ref().filter(|_| i == last).map(|end| end.reason);
            let choice = finished(delta, index, reason);
            let mut chunk = self.head.envelope(self.shape.chunk_object, vec![choice]);
            if self.include_usage {
                chunk["usage"] = Value::Null;
            }
            self.ready.push_back(event(&chunk));
        }
        if let Some(end) = end {
            self.tally.add(&end);
        }
    }

    /// The chunk without choices that ends a stream with `include_usage`.
    fn last(&self) -> Value {
        let mut chunk = self.head.envelope(self.shape.chunk_object, Vec::new());
        chunk["usage"] = self.tally.usage();
        chunk["kvasir"] = self.tally.kvasir();
        chunk
    }

    /// Cancels what runs; `last` and `[DONE]` are all that follows.
    fn close(&mut self, last: Option<Value>) {
        self.steps = None;
        self.ready.extend(last.as_ref().map(event));
        self.ready.push_back(sse::Event::default().data("[DONE]"));
    }
}

fn event(chunk: &Value) -> sse::Event {
    // JSON has no line breaks outside of strings, and escapes those inside.
    sse::Event::default().data(chunk.to_string())
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
    }
    text
}

/// An id no other answer of this process has, and hardly one of another.
fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    // Hashers are seeded from the operating system's randomness.
    let salt = RandomState::new().hash_one(number);
    format!("{salt:016x}{number:08x}")
}
