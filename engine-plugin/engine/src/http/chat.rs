//! `POST /v1/chat/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::Response;
use minijinja::Value as Jinja;
use minijinja::value::ValueKind;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Front;
use super::answer::{Answer, Choice, Delta, Shape, chat_logprobs, counted};
use super::error::ApiError;
use super::fields::{Common, Fields};
use super::generation::{Generation, Prompt};
use super::text::Piece;
use crate::chat::Conversation;

/// The handler.
pub(super) async fn handle(
    State(front): State<Arc<Front>>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let answer = async |body, arrived| converse(&front, body, arrived).await;
    counted("chat_completions", body, &front, answer).await
}

async fn converse(front: &Arc<Front>, body: Bytes, arrived: Instant) -> Result<Response, ApiError> {
    let worker = Arc::clone(front);
    let prepare = move || {
        let Request {
            common,
            conversation,
            max_tokens,
            logprobs,
        } = Request::parse(&body, &worker)?;
        let text = worker.chat.render(&conversation)?;
        let ids = worker.tokenizer.encode(&text, false)?;
        let left = worker.limits.context_tokens.saturating_sub(ids.len());
        let default = worker.defaults.chat_tokens.min(left);
        let prompt = Prompt {
            // A message stands alone, so its first word is joined to nothing.
            detokenizer: worker.tokenizer.detokenizer(&[])?,
            max_tokens: max_tokens.unwrap_or(default).max(1),
            ids,
            chunks: Vec::new(),
            param: MESSAGES,
            arrived,
        };
        Ok((common, logprobs, prompt))
    };
    let (common, logprobs, prompt) = front.preparation.run(prepare).await?;
    let generation = Generation::submit(front, &common, prompt)?;
    let answer = Answer {
        shape: &SHAPE,
        common,
        logprobs,
        generations: vec![generation],
    };
    answer.respond(front).await
}

/// A checked request.
#[derive(Debug)]
struct Request {
    common: Common,
    conversation: Conversation,
    max_tokens: Option<usize>,
    logprobs: bool,
}

impl Request {
    fn parse(body: &[u8], front: &Front) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        let common = Common::parse(&fields, front)?;
        if fields
            .get::<u8>("top_logprobs")?
            .is_some_and(|count| count > 0)
        {
            return Err(ApiError::Value {
                param: "top_logprobs",
                rule: "must be 0; only the chosen token's is known",
            });
        }
        let max_tokens = match fields.max_tokens("max_completion_tokens")? {
            Some(tokens) => Some(tokens),
            None => fields.max_tokens("max_tokens")?,
        };
        let given: TemplateFields = serde_json::from_slice(body).map_err(ApiError::Json)?;
        let add_generation_prompt = fields.get("add_generation_prompt")?;
        Ok(Self {
            common,
            conversation: Conversation {
                messages: messages(given.messages)?,
                tools: given.tools.filter(|tools| !tools.is_none()),
                add_generation_prompt: add_generation_prompt.unwrap_or(true),
                variables: given.chat_template_kwargs.unwrap_or_default(),
            },
            max_tokens,
            logprobs: fields.get("logprobs")?.unwrap_or(false),
        })
    }
}

/// What the template sees, in the order the client wrote it.
#[derive(Debug, Deserialize)]
struct TemplateFields {
    messages: Option<Jinja>,
    tools: Option<Jinja>,
    chat_template_kwargs: Option<BTreeMap<String, Jinja>>,
}

/// Checks the messages; contents given as text parts become one string, parts
/// on lines of their own.
fn messages(given: Option<Jinja>) -> Result<Jinja, ApiError> {
    let given = given
        .filter(|messages| !messages.is_none())
        .ok_or(ApiError::Missing(MESSAGES))?;
    if given.kind() != ValueKind::Seq {
        return refuse("must be an array");
    }
    let messages = items(&given)?.map(|message| flattened(&message));
    let messages = messages.collect::<Result<Vec<_>, _>>()?;
    if messages.is_empty() {
        return refuse("must hold a message");
    }
    Ok(Jinja::from(messages))
}

fn flattened(message: &Jinja) -> Result<Jinja, ApiError> {
    if message.kind() != ValueKind::Map {
        return refuse("must hold objects");
    }
    let role = attribute(message, "role");
    let Some(role) = role.as_str() else {
        return refuse("must hold a role, a string, in each message");
    };
    let content = attribute(message, CONTENT);
    let content = match content.kind() {
        ValueKind::String => content,
        // An assistant may have called tools instead of speaking.
        ValueKind::None | ValueKind::Undefined if role == "assistant" => content,
        ValueKind::Seq => Jinja::from(joined(&content)?),
        _ => return refuse("must hold a string or an array of text parts as content"),
    };
    let pair = |key: Jinja| {
        let value = match key.as_str() {
            Some(CONTENT) => content.clone(),
            _ => message.get_item(&key).unwrap_or_default(),
        };
        (key, value)
    };
    Ok(items(message)?.map(pair).collect())
}

fn joined(parts: &Jinja) -> Result<String, ApiError> {
    let mut texts = Vec::new();
    for part in items(parts)? {
        let text = attribute(&part, "text");
        match (attribute(&part, "type").as_str(), text.as_str()) {
            (Some("text"), Some(text)) => texts.push(text.to_owned()),
            _ => return refuse("may hold content parts of type text only"),
        }
    }
    Ok(texts.join("\n"))
}

fn attribute(value: &Jinja, name: &str) -> Jinja {
    value.get_attr(name).unwrap_or_default()
}

fn items(value: &Jinja) -> Result<impl Iterator<Item = Jinja>, ApiError> {
    value
        .try_iter()
        .or_else(|_| refuse("must hold arrays and objects"))
}

fn refuse<T>(rule: &'static str) -> Result<T, ApiError> {
    Err(ApiError::Value {
        param: MESSAGES,
        rule,
    })
}

static SHAPE: Shape = Shape {
    id_prefix: "chatcmpl",
    object: "chat.completion",
    chunk_object: "chat.completion.chunk",
    choice: |piece, logprobs| {
        let message = json!({"role": "assistant", "content": piece.text});
        choice("message", message, piece, logprobs)
    },
    deltas,
};

/// The role first, then content, and an empty delta for the finish reason.
fn deltas(delta: Delta<'_>) -> Vec<Choice> {
    let Delta {
        piece,
        logprobs,
        first,
        last,
    } = delta;
    let nothing = Piece::default();
    let role = json!({"role": "assistant", "content": ""});
    let role = first.then(|| choice("delta", role, &nothing, false));
    let content = json!({"content": piece.text});
    let content = piece
        .is_worth_sending(logprobs)
        .then(|| choice("delta", content, piece, logprobs));
    let end = last.then(|| choice("delta", json!({}), &nothing, false));
    role.into_iter().chain(content).chain(end).collect()
}

fn choice(name: &str, value: Value, piece: &Piece, logprobs: bool) -> Choice {
    let logprobs = logprobs.then(|| chat_logprobs(&piece.tokens));
    Choice::from_iter([
        (name.to_owned(), value),
        ("logprobs".to_owned(), json!(logprobs)),
    ])
}

const MESSAGES: &str = "messages";
const CONTENT: &str = "content";
