//! Names of the engine's metrics and the Prometheus recorder behind them.
//!
//! | metric | kind | labels | set by |
//! |---|---|---|---|
//! | [`REQUESTS`] | counter | `endpoint`, `status` | HTTP front, when a response starts |
//! | [`SEQUENCES`] | counter | `reason` | HTTP front, when a sequence ends |
//! | [`PROMPT_TOKENS`] | counter | | HTTP front, when a sequence ends |
//! | [`COMPLETION_TOKENS`] | counter | | HTTP front, when a sequence ends |
//! | [`CACHED_TOKENS`] | counter | | HTTP front, when a sequence ends |
//! | [`BLENDED_TOKENS`] | counter | | HTTP front, when a sequence ends |
//! | [`TTFT_SECONDS`] | histogram | | HTTP front, at the first token |
//! | [`TPOT_SECONDS`] | histogram | | HTTP front, when a sequence ends |
//! | [`RUNNING`] | gauge | | scheduler |
//! | [`WAITING`] | gauge | | scheduler |
//! | [`FREE_BLOCKS`] | gauge | | scheduler |
//! | [`COMPILED`] | counter | | scheduler |

#![forbid(unsafe_code)]

use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Requests answered. `endpoint` is `completions` or `chat_completions`;
/// `status` is the HTTP status, which a stream decides before its first token.
pub const REQUESTS: &str = "kvasir_engine_requests_total";

/// Sequences ended. `reason` is `stop`, `length`, `failed` or `cancelled`
/// (the client went away).
pub const SEQUENCES: &str = "kvasir_engine_sequences_total";

/// Tokens of prompts.
pub const PROMPT_TOKENS: &str = "kvasir_engine_prompt_tokens_total";

/// Tokens generated.
pub const COMPLETION_TOKENS: &str = "kvasir_engine_completion_tokens_total";

/// Prompt tokens whose KV came from the cache.
pub const CACHED_TOKENS: &str = "kvasir_engine_cached_tokens_total";

/// Prompt tokens of chunks that were reused where they did not stand before.
pub const BLENDED_TOKENS: &str = "kvasir_engine_blended_tokens_total";

/// Content chunks computed for the cache.
pub const COMPILED: &str = "kvasir_engine_compiled_chunks_total";

/// From the request's arrival to its first token, tokenising and queueing included.
pub const TTFT_SECONDS: &str = "kvasir_engine_ttft_seconds";

/// Mean time between a sequence's tokens; sequences of one token have none.
pub const TPOT_SECONDS: &str = "kvasir_engine_tpot_seconds";

/// Sequences in the running batch.
pub const RUNNING: &str = "kvasir_engine_running";

/// Sequences waiting for a place in the batch.
pub const WAITING: &str = "kvasir_engine_waiting";

/// Pages that no sequence holds.
pub const FREE_BLOCKS: &str = "kvasir_engine_kv_blocks_free";

/// Installs the process's recorder; what it returns serves `/metrics`. Samples
/// of histograms pile up unless it is rendered or [`upkeep`] runs.
///
/// # Errors
/// [`BuildError`] when the process has a recorder already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(TTFT_SECONDS.to_owned()), &TTFT_BUCKETS)?
        .set_buckets_for_metric(Matcher::Full(TPOT_SECONDS.to_owned()), &TPOT_BUCKETS)?
        .install_recorder()?;
    describe();
    Ok(handle)
}

/// Sorts the samples of histograms into their buckets from time to time; never ends.
pub async fn upkeep(recorder: PrometheusHandle) {
    let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        interval.tick().await;
        recorder.run_upkeep();
    }
}

fn describe() {
    use ::metrics::{describe_counter, describe_gauge, describe_histogram};
    describe_counter!(REQUESTS, "Requests answered, by endpoint and HTTP status");
    describe_counter!(SEQUENCES, "Sequences ended, by reason");
    describe_counter!(PROMPT_TOKENS, "Tokens of prompts");
    describe_counter!(COMPLETION_TOKENS, "Tokens generated");
    describe_counter!(CACHED_TOKENS, "Prompt tokens whose KV came from the cache");
    describe_histogram!(TTFT_SECONDS, "Time from arrival to the first token");
    describe_histogram!(TPOT_SECONDS, "Mean time between the tokens of a sequence");
    describe_gauge!(RUNNING, "Sequences in the running batch");
    describe_gauge!(WAITING, "Sequences waiting for a place in the batch");
    describe_gauge!(FREE_BLOCKS, "Pages that no sequence holds");
}

const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

const TTFT_BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0,
];

const TPOT_BUCKETS: [f64; 11] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0,
];
