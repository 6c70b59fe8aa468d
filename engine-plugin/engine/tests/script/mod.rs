//! A server whose engine plays a script, and a client for it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use kvasir_engine::chat::{ChatTemplate, Conversation};
use kvasir_engine::http::{Chunks, Defaults, Front, Limits, Preparation, serve};
use kvasir_engine::metrics;
use kvasir_engine::request::{Event, FinishReason, GenerateRequest, RequestError, Usage};
use kvasir_engine::tokenizer::Tokenizer;
use kvasir_types::Level;
use metrics_exporter_prometheus::PrometheusHandle;
use reqwest::{Response, StatusCode};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

/// Context of the served model.
pub(crate) const CONTEXT: usize = 500;
/// Tokens of a chat that asks for no number.
pub(crate) const CHAT_TOKENS: usize = 200;
/// Largest body the server takes.
pub(crate) const BODY_BYTES: usize = 10_000;

/// What the engine does with every request.
#[derive(Clone, Debug)]
pub(crate) enum Play {
    /// Generates these, then ends.
    Tokens(Vec<u32>, FinishReason),
    /// As `Tokens`, some milliseconds apart.
    Slow(Vec<u32>),
    /// Generates these over and over.
    Endless(Vec<u32>),
    /// The first request as `Endless`, others refused.
    EndlessThenRefuse(Vec<u32>),
    /// Accepts, then fails.
    Fail(RequestError),
    /// Does not accept.
    Refuse(RequestError),
    /// Accepts, then drops the sender.
    Vanish,
}

impl Play {
    /// Generates the tokens of `text` and the stop token.
    pub(crate) fn text(text: &str) -> Self {
        let mut ids = tokens(text, false);
        ids.push(EOS);
        Self::Tokens(ids, FinishReason::Stop)
    }
}

/// A running server.
pub(crate) struct Server {
    base: String,
    client: reqwest::Client,
    engine: Arc<Engine>,
    ready: Arc<AtomicBool>,
    stop: Mutex<Option<oneshot::Sender<()>>>,
    task: JoinHandle<std::io::Result<()>>,
}

impl Server {
    /// Serves the model `tiny` on a port of its own.
    pub(crate) async fn start(play: Play) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let engine = Arc::new(Engine {
            play,
            requests: Mutex::default(),
            submitted: AtomicUsize::new(0),
            cancelled: Notify::new(),
        });
        let ready = Arc::new(AtomicBool::new(true));
        let (tokenizer, chat) = model();
        let submit = Arc::clone(&engine);
        let front = Front {
            model: "tiny".to_owned(),
            tokenizer,
            chat,
            submit: Arc::new(move |request| submit.submit(request)),
            preparation: Preparation::default(),
            ready: Arc::clone(&ready),
            limits: Limits {
                body_bytes: BODY_BYTES,
                ..Limits::of_context(CONTEXT)
            },
            defaults: Defaults {
                chat_tokens: CHAT_TOKENS,
                ..Defaults::default()
            },
            chunks: Chunks {
                prefix: vec![1, 2],
                separator: Some(" # # ".to_owned()),
            },
            metrics: Some(RECORDER.clone()),
        };
        let (stop, stopped) = oneshot::channel();
        let shutdown = async { stopped.await.unwrap_or(()) };
        Self {
            base,
            client: reqwest::Client::new(),
            engine,
            ready,
            stop: Mutex::new(Some(stop)),
            task: tokio::spawn(serve(listener, front, shutdown)),
        }
    }

    /// The requests since the last call.
    pub(crate) fn requests(&self) -> Vec<GenerateRequest> {
        std::mem::take(&mut self.engine.requests.lock().unwrap())
    }

    /// Waits until the engine saw a sequence cancelled.
    pub(crate) async fn cancelled(&self) {
        let seen = self.engine.cancelled.notified();
        let seen = tokio::time::timeout(Duration::from_secs(5), seen).await;
        seen.expect("the sequence is cancelled");
    }

    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// Begins the shutdown; the task ends with it.
    pub(crate) fn shut_down(self) -> JoinHandle<std::io::Result<()>> {
        let stop = self.stop.lock().unwrap().take();
        stop.unwrap().send(()).unwrap();
        self.task
    }

    pub(crate) async fn request(&self, path: &str, body: String) -> Response {
        let url = format!("{}{path}", self.base);
        self.client.post(url).body(body).send().await.unwrap()
    }

    pub(crate) async fn send(&self, path: &str, body: String) -> (StatusCode, Value) {
        let response = self.request(path, body).await;
        (response.status(), response.json().await.unwrap())
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        self.send(path, body.to_string()).await
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        let response = self
            .client
            .get(format!("{}{path}", self.base))
            .send()
            .await
            .unwrap();
        (response.status(), response.json().await.unwrap())
    }

    pub(crate) async fn text(&self, path: &str) -> String {
        let response = self
            .client
            .get(format!("{}{path}", self.base))
            .send()
            .await
            .unwrap();
        response.text().await.unwrap()
    }

    /// The chunks of a stream, which must end with `[DONE]`.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.request(path, body.to_string()).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.unwrap();
        let mut data: Vec<&str> = text
            .split_terminator("\n\n")
            .map(|event| event.strip_prefix("data: ").unwrap())
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.into_iter()
            .map(|json| serde_json::from_str(json).unwrap())
            .collect()
    }
}

struct Engine {
    play: Play,
    requests: Mutex<Vec<GenerateRequest>>,
    submitted: AtomicUsize,
    cancelled: Notify,
}

impl Engine {
    fn submit(
        self: &Arc<Self>,
        request: GenerateRequest,
    ) -> Result<mpsc::Receiver<Event>, RequestError> {
        let earlier = self.submitted.fetch_add(1, Ordering::Relaxed);
        match &self.play {
            Play::Refuse(error) => return Err(error.clone()),
            Play::EndlessThenRefuse(_) if earlier > 0 => {
                return Err(RequestError::Overloaded { waiting: 1 });
            }
            _ => {}
        }
        let (events, receiver) = mpsc::channel(4);
        self.requests.lock().unwrap().push(request.clone());
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            if engine.perform(&request, &events).await.is_err() {
                engine.cancelled.notify_one();
            }
        });
        Ok(receiver)
    }

    async fn perform(
        &self,
        request: &GenerateRequest,
        events: &mpsc::Sender<Event>,
    ) -> Result<(), mpsc::error::SendError<Event>> {
        let token = |id| Event::Token {
            id,
            logprob: -0.5,
            logits_digest: request.logits_digest.then_some([0xab; 32]),
        };
        match &self.play {
            Play::Vanish | Play::Refuse(_) => return Ok(()),
            Play::Fail(error) => return events.send(Event::Failed(error.clone())).await,
            _ => {}
        }
        let prefilled = Event::Prefilled {
            cached_tokens: 3,
            blended_tokens: 0,
            fetched_bytes: 1000,
        };
        events.send(prefilled).await?;
        let (ids, pause, reason) = match &self.play {
            Play::Vanish | Play::Refuse(_) | Play::Fail(_) => return Ok(()),
            Play::Endless(ids) | Play::EndlessThenRefuse(ids) => loop {
                for &id in ids {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    events.send(token(id)).await?;
                }
            },
            Play::Tokens(ids, reason) => (ids, Duration::ZERO, *reason),
            Play::Slow(ids) => (ids, Duration::from_millis(20), FinishReason::Length),
        };
        for &id in ids {
            tokio::time::sleep(pause).await;
            events.send(token(id)).await?;
        }
        let usage = Usage {
            prompt_tokens: request.prompt.len(),
            completion_tokens: ids.len(),
            cached_tokens: 3,
            blended_tokens: 2,
            recomputed: 0.5,
            fetched_bytes: 1000,
            cached_level: Some(Level::L1),
            ttft: Duration::from_millis(250),
        };
        events.send(Event::Finished { reason, usage }).await
    }
}

/// Token ids of `text`.
pub(crate) fn tokens(text: &str, add_special: bool) -> Vec<u32> {
    model().0.encode(text, add_special).unwrap()
}

/// Token ids of one user message, ready for the answer.
pub(crate) fn chat_ids(text: &str) -> Vec<u32> {
    let (tokenizer, chat) = model();
    let messages = serde_json::json!([{"role": "user", "content": text}]);
    let conversation = Conversation {
        messages: serde_json::from_value(messages).unwrap(),
        add_generation_prompt: true,
        ..Conversation::default()
    };
    tokenizer
        .encode(&chat.render(&conversation).unwrap(), false)
        .unwrap()
}

fn model() -> (Arc<Tokenizer>, ChatTemplate) {
    let tokenizer = Tokenizer::load(&fixture(), &[]).unwrap();
    let chat = ChatTemplate::new(tokenizer.templates(), tokenizer.special_tokens()).unwrap();
    (Arc::new(tokenizer), chat)
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/chat-jinja")
}

/// A process has one recorder.
static RECORDER: LazyLock<PrometheusHandle> = LazyLock::new(|| metrics::install().unwrap());

/// End of sequence in the fixture.
const EOS: u32 = 2;
