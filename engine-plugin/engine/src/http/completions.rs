//! `POST /v1/completions`.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::Response;
use serde::Deserialize;
use serde_json::json;

use super::Front;
use super::answer::{Answer, Choice, Shape, completion_logprobs, counted};
use super::error::ApiError;
use super::fields::{Common, Fields};
use super::generation::{Generation, Prompt};
use super::text::Piece;
use crate::tokenizer::Tokenizer;

/// The handler.
pub(super) async fn handle(
    State(front): State<Arc<Front>>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let answer = async |body, arrived| complete(&front, body, arrived).await;
    counted("completions", body, &front, answer).await
}

async fn complete(front: &Arc<Front>, body: Bytes, arrived: Instant) -> Result<Response, ApiError> {
    let worker = Arc::clone(front);
    let prepare = move || {
        let Request {
            common,
            prompts,
            chunks,
            max_tokens,
            logprobs,
        } = Request::parse(&body, &worker)?;
        let prompt = |input: Input| {
            let (ids, chunks) = input.ids(&worker, &chunks)?;
            Ok(Prompt {
                detokenizer: worker.tokenizer.detokenizer(&ids)?,
                ids,
                chunks,
                max_tokens,
                param: PROMPT,
                arrived,
            })
        };
        let prompts = prompts.into_iter().map(prompt);
        let prompts = prompts.collect::<Result<Vec<_>, ApiError>>()?;
        Ok((common, logprobs, prompts))
    };
    let (common, logprobs, prompts) = front.preparation.run(prepare).await?;
    let submit = |prompt| Generation::submit(front, &common, prompt);
    let generations = prompts.into_iter().map(submit).collect::<Result<_, _>>()?;
    let answer = Answer {
        shape: &SHAPE,
        common,
        logprobs,
        generations,
    };
    answer.respond(front).await
}

/// A checked request.
#[derive(Debug)]
struct Request {
    common: Common,
    prompts: Vec<Input>,
    /// Texts in front of each prompt.
    chunks: Vec<String>,
    max_tokens: usize,
    logprobs: bool,
}

impl Request {
    fn parse(body: &[u8], front: &Front) -> Result<Self, ApiError> {
        let refuse = |param, rule| Err(ApiError::Value { param, rule });
        let fields = Fields::parse(body)?;
        let common = Common::parse(&fields, front)?;
        if fields.get("echo")?.unwrap_or(false) {
            return refuse("echo", "is not supported");
        }
        if fields
            .get::<String>("suffix")?
            .is_some_and(|suffix| !suffix.is_empty())
        {
            return refuse("suffix", "is not supported");
        }
        let prompts = fields
            .get::<Inputs>(PROMPT)?
            .ok_or(ApiError::Missing(PROMPT))?
            .list();
        if prompts.is_empty() {
            return refuse(PROMPT, "holds no prompt");
        }
        if prompts.len() > front.limits.prompts {
            return refuse(PROMPT, "holds too many prompts; send several requests");
        }
        if common.kvasir.logits_digest && prompts.len() > 1 {
            return refuse("kvasir", "takes logits_digest with one prompt only");
        }
        let chunks: Vec<String> = fields.get(CHUNKS)?.unwrap_or_default();
        if chunks.iter().any(String::is_empty) {
            return refuse(CHUNKS, "must not hold an empty text");
        }
        let logprobs = fields.get::<u8>("logprobs")?;
        if logprobs.is_some_and(|count| count > 5) {
            return refuse("logprobs", "must be at most 5");
        }
        let max_tokens = fields.max_tokens("max_tokens")?;
        Ok(Self {
            common,
            prompts,
            chunks,
            max_tokens: max_tokens.unwrap_or(front.defaults.completion_tokens),
            logprobs: logprobs.is_some(),
        })
    }
}

/// `prompt` in any of its four forms.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, an array of strings, an array of token ids or an array of such arrays"
)]
enum Inputs {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    ManyIds(Vec<Vec<u32>>),
}

impl Inputs {
    fn list(self) -> Vec<Input> {
        match self {
            Self::Text(text) => vec![Input::Text(text)],
            Self::Texts(texts) => texts.into_iter().map(Input::Text).collect(),
            Self::Ids(ids) => vec![Input::Ids(ids)],
            Self::ManyIds(many) => many.into_iter().map(Input::Ids).collect(),
        }
    }
}

/// One prompt.
#[derive(Debug)]
enum Input {
    Text(String),
    Ids(Vec<u32>),
}

impl Input {
    /// Its tokens, behind those of `chunks`, and where its chunks are. Each text is encoded
    /// by itself, so that a chunk's tokens do not depend on what stands beside it.
    fn ids(self, front: &Front, chunks: &[String]) -> Result<Tokens, ApiError> {
        let tokenizer = &front.tokenizer;
        let text = match self {
            Self::Ids(ids) if chunks.is_empty() => return Ok((ids, Vec::new())),
            Self::Ids(_) => {
                return Err(ApiError::Value {
                    param: CHUNKS,
                    rule: "needs a prompt that is text",
                });
            }
            Self::Text(text) => text,
        };
        if !chunks.is_empty() {
            let chunks = chunks.iter().map(String::as_str);
            return assemble(tokenizer, front.chunks.prefix.clone(), chunks, &text);
        }
        let separator = front.chunks.separator.as_deref();
        let mut parts: Vec<&str> = match separator {
            Some(separator) if !separator.is_empty() => text.split(separator).collect(),
            _ => return Ok((tokenizer.encode(&text, true)?, Vec::new())),
        };
        let rest = if parts.len() > 1 { parts.pop() } else { None };
        let before = tokenizer.encode(parts.remove(0), true)?;
        assemble(
            tokenizer,
            before,
            parts.into_iter(),
            rest.unwrap_or_default(),
        )
    }
}

/// Tokens of a prompt, and its chunks.
type Tokens = (Vec<u32>, Vec<Range<usize>>);

fn assemble<'a>(
    tokenizer: &Tokenizer,
    before: Vec<u32>,
    chunks: impl Iterator<Item = &'a str>,
    rest: &str,
) -> Result<Tokens, ApiError> {
    let mut ids = before;
    let mut ranges = Vec::new();
    for chunk in chunks {
        let start = ids.len();
        ids.extend(tokenizer.encode(chunk, false)?);
        ranges.push(start..ids.len());
    }
    ids.extend(tokenizer.encode(rest, false)?);
    Ok((ids, ranges))
}

static SHAPE: Shape = Shape {
    id_prefix: "cmpl",
    object: "text_completion",
    chunk_object: "text_completion",
    choice,
    deltas: |delta| vec![choice(delta.piece, delta.logprobs)],
};

fn choice(piece: &Piece, logprobs: bool) -> Choice {
    let logprobs = logprobs.then(|| completion_logprobs(&piece.tokens));
    Choice::from_iter([
        ("text".to_owned(), json!(piece.text)),
        ("logprobs".to_owned(), json!(logprobs)),
    ])
}

const PROMPT: &str = "prompt";
const CHUNKS: &str = "chunks";
