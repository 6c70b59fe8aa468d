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
//!
//! Of an engine whose memory holds a part of its KV, set by the scheduler:
//!
//! | metric | kind | labels |
//! |---|---|---|
//! | [`KV_FRAMES`] | gauge | |
//! | [`KV_RESIDENT_BYTES`] | gauge | `of` |
//! | [`KV_READ_BYTES`] | counter | |
//! | [`KV_WRITTEN_BYTES`] | counter | |
//! | [`KV_STALL_MICROSECONDS`] | counter | `cause` |
//! | [`KV_PARKS`] | counter | |
//! | [`KV_RESUMES`] | counter | |
//! | [`KV_RESTARTS`] | counter | |
//! | [`KV_TIMEOUTS`] | counter | |

#![forbid(unsafe_code)]

use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::paging::Stalls;
use crate::scheduler::PagingStats;

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

/// Pieces of KV, each a KV head of a layer of a page, that fit into memory.
pub const KV_FRAMES: &str = "kvasir_engine_kv_frames";

/// Memory of paging: `of` is `frames` (write buffers included) or `digests`.
pub const KV_RESIDENT_BYTES: &str = "kvasir_engine_kv_resident_bytes";

/// Bytes of KV read from the scratch file.
pub const KV_READ_BYTES: &str = "kvasir_engine_kv_read_bytes_total";

/// Bytes of KV written to it.
pub const KV_WRITTEN_BYTES: &str = "kvasir_engine_kv_written_bytes_total";

/// Time that computing waited for the scratch file. `cause` is `read` (not predicted), `late`
/// (predicted, but not in time), `frame` (for a read ahead to give way) or `write`.
pub const KV_STALL_MICROSECONDS: &str = "kvasir_engine_kv_stall_microseconds_total";

/// Sequences parked.
pub const KV_PARKS: &str = "kvasir_engine_kv_parks_total";

/// Parked sequences that went on.
pub const KV_RESUMES: &str = "kvasir_engine_kv_resumes_total";

/// Sequences computed again because their pages could not be moved.
pub const KV_RESTARTS: &str = "kvasir_engine_kv_restarts_total";

/// Waits for the scratch file that were given up because its disk hangs.
pub const KV_TIMEOUTS: &str = "kvasir_engine_kv_timeouts_total";

/// Says what paging has come to.
#[expect(clippy::cast_precision_loss, reason = "gauges are f64")]
pub(crate) fn paging(stats: &PagingStats) {
    use ::metrics::{counter, gauge};
    gauge!(KV_FRAMES).set(stats.frames as f64);
    gauge!(KV_RESIDENT_BYTES, "of" => "frames").set(stats.resident_bytes as f64);
    gauge!(KV_RESIDENT_BYTES, "of" => "digests").set(stats.digest_bytes as f64);
    counter!(KV_READ_BYTES).absolute(stats.pager.read_bytes);
    counter!(KV_WRITTEN_BYTES).absolute(stats.pager.written_bytes);
    let Stalls {
        read,
        late,
        frame,
        write,
    } = stats.pager.stalls;
    let causes = [
        ("read", read),
        ("late", late),
        ("frame", frame),
        ("write", write),
    ];
    for (cause, waited) in causes {
        let micros = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        counter!(KV_STALL_MICROSECONDS, "cause" => cause).absolute(micros);
    }
    counter!(KV_PARKS).absolute(stats.parks);
    counter!(KV_RESUMES).absolute(stats.resumes);
    counter!(KV_RESTARTS).absolute(stats.restarts);
    counter!(KV_TIMEOUTS).absolute(stats.pager.timeouts);
}

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
    describe_gauge!(KV_FRAMES, "Pieces of KV that fit into memory");
    describe_gauge!(KV_RESIDENT_BYTES, "Memory of KV paging, by use");
    describe_counter!(KV_READ_BYTES, "Bytes of KV read from the scratch file");
    describe_counter!(KV_WRITTEN_BYTES, "Bytes of KV written to the scratch file");
    describe_counter!(
        KV_STALL_MICROSECONDS,
        "Waiting for the scratch file, by cause"
    );
    describe_counter!(KV_PARKS, "Sequences parked");
    describe_counter!(KV_RESUMES, "Parked sequences that went on");
    describe_counter!(KV_RESTARTS, "Sequences computed again");
    describe_counter!(KV_TIMEOUTS, "Waits given up because the disk hangs");
}

const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

const TTFT_BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0,
];

const TPOT_BUCKETS: [f64; 11] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0,
];
