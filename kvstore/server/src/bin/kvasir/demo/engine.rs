//! The engine as a client sees it: OpenAI's completions, streamed.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures::StreamExt as _;
use serde_json::{Value, json};

use super::questions::Question;

const MAX_TOKENS: usize = 8;

const FETCH_ATTEMPTS: usize = 5;

/// Longer than the engine leaves a cache alone after a late fetch.
const FETCH_PAUSE: Duration = Duration::from_millis(1500);

/// How long captured chunks may take to be stored.
const STORE_PATIENCE: Duration = Duration::from_secs(60);

/// Where the prefill comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// Computed; its chunks are stored afterwards, or not.
    Computed { store: bool },
    /// From the cache, as far as it holds it.
    Cache,
}

/// One answer.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) text: String,
    /// From sending the request to the first token.
    pub(super) ttft: Duration,
    pub(super) prompt_tokens: usize,
    pub(super) cached_tokens: usize,
    pub(super) fetched_bytes: u64,
    /// One digest of the logits per generated token.
    logits: Vec<String>,
}

impl Answer {
    /// Whether text and every logit behind it are the same.
    pub(super) fn equals(&self, other: &Self) -> bool {
        self.text == other.text && !self.logits.is_empty() && self.logits == other.logits
    }
}

/// A client of the engine.
#[derive(Debug)]
pub(super) struct Engine {
    http: reqwest::Client,
    url: String,
}

impl Engine {
    pub(super) fn new(address: &str) -> Self {
        Self {
            http: reqwest::Client::new(),
            url: format!("http://{address}"),
        }
    }

    /// Asks with a fetched prefill. On a busy machine a fetch may come late and the
    /// engine then computes, and leaves the cache alone for a moment: ask again.
    pub(super) async fn ask_cached(&self, question: &Question) -> anyhow::Result<Answer> {
        for _ in 0..FETCH_ATTEMPTS {
            let answer = self.ask(question, Source::Cache).await?;
            if answer.cached_tokens > 0 {
                return Ok(answer);
            }
            tokio::time::sleep(FETCH_PAUSE).await;
        }
        bail!(
            "the engine computed what it should have fetched, {FETCH_ATTEMPTS} times; is the \
             machine too busy, or the document shorter than a chunk?"
        )
    }

    pub(super) async fn ask(&self, question: &Question, source: Source) -> anyhow::Result<Answer> {
        let (read_cache, write_cache) = match source {
            Source::Computed { store } => (false, store),
            Source::Cache => (true, false),
        };
        let body = json!({
            "prompt": question.prompt(),
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
            "kvasir": {
                "logits_digest": true,
                "read_cache": read_cache,
                "write_cache": write_cache,
            },
        });
        let begun = Instant::now();
        let response = self
            .http
            .post(format!("{}/v1/completions", self.url))
            .json(&body)
            .send()
            .await
            .context("asking the engine")?;
        let status = response.status();
        if !status.is_success() {
            bail!("the engine refused: {status}: {}", response.text().await?);
        }
        let mut stream = response.bytes_stream();
        let mut pending = Vec::new();
        let mut ttft = None;
        let mut text = String::new();
        let mut usage = Value::Null;
        while let Some(part) = stream.next().await {
            pending.extend_from_slice(&part?);
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let Some(data) = line.strip_prefix(b"data: ") else {
                    continue;
                };
                if data.starts_with(b"[DONE]") {
                    continue;
                }
                let event: Value = serde_json::from_slice(data)?;
                ensure!(
                    event["error"].is_null(),
                    "the engine failed: {}",
                    event["error"]
                );
                if let Some(piece) = event["choices"][0]["text"].as_str() {
                    ttft.get_or_insert_with(|| begun.elapsed());
                    text.push_str(piece);
                }
                if event["usage"].is_object() {
                    usage = event;
                }
            }
        }
        let number = |value: &Value| value.as_u64().context("the engine's usage is incomplete");
        let details = &usage["kvasir"];
        let prompt_tokens = &usage["usage"]["prompt_tokens"];
        Ok(Answer {
            text: text.trim().to_owned(),
            ttft: ttft.context("the engine answered nothing")?,
            prompt_tokens: usize::try_from(number(prompt_tokens)?)?,
            cached_tokens: usize::try_from(number(&details["cached_tokens"])?)?,
            fetched_bytes: number(&details["fetched_bytes"])?,
            logits: serde_json::from_value(details["logits_digests"].clone())
                .context("the engine's usage lacks the digests of its logits")?,
        })
    }

    /// Waits until everything captured so far is stored.
    pub(super) async fn stored(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < STORE_PATIENCE {
            let metrics = self
                .http
                .get(format!("{}/metrics", self.url))
                .send()
                .await?
                .text()
                .await?;
            // A gauge that is not there is not zero.
            let is_zero = |name: &str| {
                metrics
                    .lines()
                    .find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok())
                    .is_some_and(|value| value == 0.0)
            };
            if is_zero("kvasir_engine_running ") && is_zero("kvasir_plugin_chunks_waiting ") {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        bail!("the daemon did not store the prefill within {STORE_PATIENCE:?}; see its log above")
    }
}
