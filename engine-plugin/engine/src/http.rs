//! The OpenAI-compatible face of the engine.
//!
//! | route | answers |
//! |---|---|
//! | `POST /v1/completions` | text after a prompt, or after each of several |
//! | `POST /v1/chat/completions` | the next message of a conversation |
//! | `GET /v1/models` | the one model |
//! | `GET /health` | 200 when ready; 503 before, while shutting down and after the engine failed |
//! | `GET /metrics` | Prometheus text, see [`crate::metrics`] |
//!
//! A request is parsed and checked, its prompt encoded (both by a bounded
//! [`Preparation`]), the token ids submitted, and the events that come back
//! turned into text. Until ready, requests are refused with 503. Text stays here:
//! stop strings are found here, and a sequence that met one, or whose client
//! went away, is cancelled by dropping its receiver.
//!
//! Beside OpenAI's fields, requests may hold `top_k`, `ignore_eos`,
//! `stop_token_ids`, `chat_template_kwargs`, `add_generation_prompt`, and
//! `kvasir`:
//!
//! ```json
//! {"kvasir": {"read_cache": true, "write_cache": true, "logits_digest": false}}
//! ```
//!
//! Responses hold `kvasir` beside `usage`: `cached_tokens`, `fetched_bytes`,
//! `cached_level` (the coarsest codec level that they came at, or null), `ttft_ms` (of
//! the slowest prompt) and, if asked for, `logits_digests`, the
//! BLAKE3 of the logits of every generated token in hexadecimal. A stream
//! carries both objects in its last chunk when `stream_options.include_usage`
//! is set.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::chat::ChatTemplate;
use crate::request::{Event, GenerateRequest, RequestError};
use crate::sampling::SamplingParams;
use crate::tokenizer::Tokenizer;

mod answer;
mod chat;
mod completions;
mod error;
mod fields;
mod generation;
mod plain;
mod preparation;
mod stop;
mod text;

pub use preparation::Preparation;

/// Hands one sequence to the scheduler. Dropping the receiver cancels it.
pub type Submit =
    Arc<dyn Fn(GenerateRequest) -> Result<mpsc::Receiver<Event>, RequestError> + Send + Sync>;

/// Everything the HTTP front needs.
pub struct Front {
    /// Name under which the model is served.
    pub model: String,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's chat templates; may hold none.
    pub chat: ChatTemplate,
    /// Where sequences go.
    pub submit: Submit,
    /// Where requests are parsed and encoded.
    pub preparation: Preparation,
    /// Whether requests are taken; others set it as the engine starts and ends.
    /// [`serve`] clears it at shutdown.
    pub ready: Arc<AtomicBool>,
    /// What is too much.
    pub limits: Limits,
    /// What a request gets that says nothing.
    pub defaults: Defaults,
    /// How prompts are put together from chunks.
    pub chunks: Chunks,
    /// Source of `/metrics`; without it the route is not found.
    pub metrics: Option<PrometheusHandle>,
}

impl fmt::Debug for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Front")
            .field("model", &self.model)
            .field("ready", &self.ready)
            .field("limits", &self.limits)
            .field("defaults", &self.defaults)
            .finish_non_exhaustive()
    }
}

/// How prompts are put together from texts that other prompts have too.
#[derive(Clone, Debug, Default)]
pub struct Chunks {
    /// Tokens in front of the chunks that a request names: what chunks are compiled behind.
    pub prefix: Vec<u32>,
    /// Text between the chunks of a prompt that is one text: what stands before the first is
    /// text, and so is what stands behind the last; separators are taken out. Default: none.
    pub separator: Option<String>,
}

/// Bounds on one request.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Prompt and completion together.
    pub context_tokens: usize,
    /// Body of a request. It is held in memory several times over while it is
    /// parsed and encoded.
    pub body_bytes: usize,
    /// Prompts of one completion request, each a sequence of its own.
    pub prompts: usize,
}

impl Limits {
    /// The given context, bodies up to [`Self::BODY_BYTES`] and
    /// [`Self::PROMPTS`] prompts.
    pub const fn of_context(context_tokens: usize) -> Self {
        Self {
            context_tokens,
            body_bytes: Self::BODY_BYTES,
            prompts: Self::PROMPTS,
        }
    }

    /// Default of [`Self::body_bytes`], 8 MiB.
    pub const BODY_BYTES: usize = 8 << 20;
    /// Default of [`Self::prompts`].
    pub const PROMPTS: usize = 64;
}

/// Values of fields that a request leaves out.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// `max_tokens` of `/v1/completions`. Default: 16, as OpenAI's.
    pub completion_tokens: usize,
    /// `max_tokens` of `/v1/chat/completions`, or what the prompt leaves of the
    /// context if that is less. A sequence waits until there are pages for all of
    /// its tokens, so more lets fewer run at once. Default: 1024.
    pub chat_tokens: usize,
    /// `temperature`, `top_k`, `top_p`. Default: 1, none, 1, as OpenAI's.
    pub sampling: SamplingParams,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            completion_tokens: 16,
            chat_tokens: 1024,
            sampling: SamplingParams::new(1.0, None, 1.0, None).expect("the values are in range"),
        }
    }
}

/// The routes, to be served or nested.
pub fn router(front: Arc<Front>) -> Router {
    let limit = DefaultBodyLimit::max(front.limits.body_bytes);
    Router::new()
        .route("/v1/completions", post(completions::handle))
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/models", get(plain::models))
        .route("/health", get(plain::health))
        .route("/metrics", get(plain::metrics))
        .fallback(plain::no_route)
        .method_not_allowed_fallback(plain::wrong_method)
        .layer(limit)
        .with_state(front)
}

/// Serves until `shutdown` completes, then ends: no new connection or request
/// is taken, and those in progress are answered to their end. Dropping the
/// future leaves those in progress to the runtime.
///
/// # Errors
/// What the listener reports.
pub async fn serve(
    listener: TcpListener,
    front: Front,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let ready = Arc::clone(&front.ready);
    let shutdown = async move {
        shutdown.await;
        ready.store(false, Ordering::Release);
    };
    // Tokens are small writes; waiting to fill a packet would delay each.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
    });
    axum::serve(listener, router(Arc::new(front)))
        .with_graceful_shutdown(shutdown)
        .await
}
