//! Engine-neutral reuse of KV caches: look up, fetch, compute the rest, capture.
//!
//! An engine gives three things: a [`Namespace`] that says
//! what its KV is, an [`EngineBackend`] that moves one layer of one chunk between
//! bytes and its pages, and measured prefill times. It gets back, for each prompt:
//!
//! ```text
//! prefetch   lookup ─ decide (cost model) ─ get, decode ─▶ layers         [async task]
//!                                                     │ bounded channel
//! engine     admit ─ land layer l into pages ─ attention of layer l       [engine thread]
//!                                                     │ after the first token
//! capture    copy new chunks out of pages ─▶ bounded queue ─ encode, put  [async task]
//! ```
//!
//! Promises to the request in front of us:
//!
//! * **Never wrong.** Layers land only after their checksum matched; a prefix counts
//!   as cached only when every layer of every one of its chunks has landed.
//! * **Never slower.** Fetching starts only if [`CostModel`] expects it to beat
//!   computing, and ends at a deadline that is at most the time computing would take.
//! * **Never worse than it says.** What was computed over chunks that came coarser than
//!   chunks are stored ([`CodecConfig`]) is not stored: [`Prefetch::may_capture`].
//! * **Never failing.** A miss, an error, a late or broken daemon all become
//!   "compute that part". After a failure the daemon is left alone for a while
//!   ([`PluginConfig::cooldown`]), so that an outage costs one deadline, not one per
//!   request.
//!
//! With a deadline ([`PluginConfig::deadline`]), the base levels of all layers come first, and
//! refinements as long as there is time; see [`controller`].
//!
//! Chunks may name a codec profile, which the daemon keeps. The engine's own is uploaded in
//! the background. One that is not here costs the first request that meets it its hit, and
//! no time: it computes, while the profile is fetched for the next one.
//!
//! Engines that publish KV events are told which of their chunks the daemon has: [`Residency`].
//!
//! Text that stands elsewhere in every prompt is reused as content chunks: [`blend`].
//!
//! Ownership: the engine thread owns the pages and does every copy into and out of
//! them, so no page is ever shared between threads. Dropping a [`Prefetch`] cancels
//! its fetch. Chunks waiting for capture are lost when the process ends.
//!
//! Not here: models, attention, scheduling (`kvasir-engine`); wire (`kvasir-client`).

#![forbid(unsafe_code)]

mod backend;
pub mod blend;
mod breaker;
mod capture;
mod coding;
pub mod controller;
mod cost;
mod fetch;
mod inbox;
mod profiles;
mod prompt;
mod residency;
mod steer;
mod strided;

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvasir_client::{CallError, Client, ClientConfig, Lookup};
use kvasir_types::{ByteSize, ChunkKey, Durability, Namespace};

pub use kvasir_client::{
    Carrier, DataPlane, ParseEndpointError, PathStatus, Tier, TlsConfig, TlsFileError,
};
pub use kvasir_codec::{
    CalibrationError, ChunkError, EncodeError, Encoding, KeyRotation, Pairing, Profile,
    ProfileError,
};

pub use backend::{BackendError, EngineBackend, Placement};
pub use breaker::Breaker;
pub use capture::{CaptureOutcome, CaptureStats, ChunkCopy};
pub use coding::{CodecConfig, Decoding, Threads};
pub use cost::{CostModel, Decision, FetchObservation, TierBytes};
pub use fetch::{FetchOutcome, LayerWait, Prefetch};
pub use prompt::Prompt;
pub use residency::{Change, Residency};
pub use strided::{Memory, OutsideMemory, Strided, Strides, StridesError};

use capture::{CaptureQueue, Stored, Storing};
use coding::Coder;
use controller::Learnt;
use profiles::Profiles;

/// When a cached prefix is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadPolicy {
    /// When [`CostModel`] expects loading to beat computing; the wait ends, at the
    /// latest, when computing would have ended.
    #[default]
    WhenFaster,
    /// Always, within [`PluginConfig::fetch_timeout`]: for engines whose compute is
    /// worth more than their time, and for tests.
    Always,
}

/// How the plugin spends time and memory.
#[derive(Clone, Debug)]
pub struct PluginConfig {
    /// When a cached prefix is loaded. Default: when faster.
    pub load: LoadPolicy,
    /// Longest wait for the answer to a lookup. Default: 50 ms.
    pub lookup_timeout: Duration,
    /// Longest wait for a fetch, whatever the cost model says. Default: 10 s.
    pub fetch_timeout: Duration,
    /// Bytes of fetched layers that may wait for the engine thread, per request.
    /// Default: 128 MiB.
    pub fetch_buffer: ByteSize,
    /// Bytes of captured chunks that may wait to be stored. When they are spent,
    /// new chunks are not captured, and counted. Default: 512 MiB.
    pub capture_buffer: ByteSize,
    /// Whether stored chunks survive a crash of the daemon. Default: durable. In
    /// memory, the daemon answers sooner, and writes to disk only what it expects to
    /// be used again.
    pub durability: Durability,
    /// Deadline of storing one chunk. Default: 10 s.
    pub store_timeout: Duration,
    /// How long the daemon is left alone after it failed; doubles with each failure
    /// up to 32 times this. Default: 1 s.
    pub cooldown: Duration,
    /// In which form chunks are stored and fetched. Default: raw.
    pub codec: CodecConfig,
    /// The time to the first token, from [`CachePlugin::prefetch`] on, that fetches of chunks
    /// at nested levels keep to: they come as fine as they can until then, and chunks that
    /// would be late are computed ([`controller`]). Counts only where
    /// [`CodecConfig::fetch`] names no level. Default: none; chunks come as they are stored,
    /// however long that takes.
    pub deadline: Option<Duration>,
    /// A namespace of the same model that content chunks are also looked up in, such as that
    /// of documents which all tenants may read. The tenant's own copy wins. Nothing is ever
    /// written there, and prefix chunks never come from it. Whoever names it trusts whoever
    /// fills it: it must differ from the engine's own in its tenant salt alone. Default: none.
    pub corpus: Option<Namespace>,
    /// Which way fetches go. Default: the best that the daemon offers.
    pub data_plane: DataPlane,
    /// Whom the data plane believes. Default: whom the control calls name.
    pub tls: TlsConfig,
}

impl Default for PluginConfig {
    fn default() -> Self {
        Self {
            load: LoadPolicy::default(),
            lookup_timeout: Duration::from_millis(50),
            fetch_timeout: Duration::from_secs(10),
            fetch_buffer: ByteSize::mib(128),
            capture_buffer: ByteSize::mib(512),
            durability: Durability::default(),
            store_timeout: Duration::from_secs(10),
            cooldown: Duration::from_secs(1),
            codec: CodecConfig::default(),
            deadline: None,
            corpus: None,
            data_plane: DataPlane::default(),
            tls: TlsConfig::default(),
        }
    }
}

/// One engine's connection to the cache. Cheap to clone.
#[derive(Clone, Debug)]
pub struct CachePlugin {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    client: Client,
    runtime: tokio::runtime::Handle,
    namespace: Namespace,
    config: PluginConfig,
    cost: Mutex<CostModel>,
    learnt: Mutex<Learnt>,
    /// Nanoseconds that first tokens come later than a controller reckons, smoothed.
    overrun: AtomicU64,
    breaker: Mutex<Breaker>,
    capture: CaptureQueue,
    storing: Storing,
    coder: Arc<Coder>,
    stats: FetchCounters,
}

/// What became of prefetches and gathers so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchStats {
    /// Those that fetched something, or tried to.
    pub loads: u64,
    /// Fetches given up because they took longer than their budget.
    pub late: u64,
    /// Lookups and fetches the daemon failed.
    pub failed: u64,
    /// Those not begun because the daemon had failed shortly before.
    pub skipped: u64,
    /// Fetches behind which the first token came later than [`PluginConfig::deadline`].
    pub missed: u64,
}

#[derive(Debug, Default)]
pub(crate) struct FetchCounters {
    load: AtomicU64,
    late: AtomicU64,
    failed: AtomicU64,
    skipped: AtomicU64,
    missed: AtomicU64,
}

/// What happened to a prefetch; a label of [`FETCHES`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Happened {
    Load,
    Late,
    Failed,
    Skipped,
    Missed,
}

/// Counter: prefetches, by `event`: `load`, `late`, `failed`, `skipped`, `missed`. See
/// [`FetchStats`].
const FETCHES: &str = "kvasir_plugin_fetches_total";

/// Counter: layers of chunks that landed, by the `level` that they came at.
pub(crate) const LAYERS: &str = "kvasir_plugin_layers_total";

impl FetchCounters {
    pub(crate) fn note(&self, happened: Happened) {
        let (counter, event) = match happened {
            Happened::Load => (&self.load, "load"),
            Happened::Late => (&self.late, "late"),
            Happened::Failed => (&self.failed, "failed"),
            Happened::Skipped => (&self.skipped, "skipped"),
            Happened::Missed => (&self.missed, "missed"),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        metrics::counter!(FETCHES, "event" => event).increment(1);
    }
}

impl CachePlugin {
    /// A plugin that stores and finds KV of `namespace` through `client`. Its async
    /// work runs on `runtime`; the engine calls it from threads of its own.
    pub fn new(
        client: Client,
        runtime: tokio::runtime::Handle,
        namespace: Namespace,
        config: PluginConfig,
    ) -> Self {
        let layout = *namespace.layout();
        let profiles = Profiles::start(client.clone(), runtime.clone(), &config.codec, layout);
        let coder = Arc::new(Coder::new(config.codec.clone(), profiles));
        let storing = Storing::new(client.clone(), Arc::clone(&coder), &config);
        let queue = CaptureQueue::start(&runtime, storing.clone(), config.capture_buffer);
        Self {
            shared: Arc::new(Shared {
                client,
                runtime,
                namespace,
                cost: Mutex::new(CostModel::default()),
                learnt: Mutex::new(Learnt::default()),
                overrun: AtomicU64::new(0),
                breaker: Mutex::new(Breaker::new(config.cooldown)),
                capture: queue,
                storing,
                coder,
                stats: FetchCounters::default(),
                config,
            }),
        }
    }

    /// A plugin of the daemon at `endpoint` (`HOST:PORT`). Does not wait for it: an
    /// engine may start before its cache.
    ///
    /// # Errors
    /// `endpoint` is malformed.
    pub fn connect(
        endpoint: &str,
        runtime: tokio::runtime::Handle,
        namespace: Namespace,
        config: PluginConfig,
    ) -> Result<Self, ParseEndpointError> {
        let client_config = ClientConfig {
            endpoint: endpoint.parse()?,
            data_plane: config.data_plane,
            tls: config.tls.clone(),
            ..ClientConfig::default()
        };
        // The connection's tasks live on the runtime.
        let guard = runtime.enter();
        let client = Client::connect_lazy(client_config);
        drop(guard);
        Ok(Self::new(client, runtime, namespace, config))
    }

    /// What this engine's KV is.
    pub fn namespace(&self) -> &Namespace {
        &self.shared.namespace
    }

    /// Starts to look for the longest cached prefix of `prompt`, and to fetch it if
    /// that is expected to be faster than computing. Returns at once.
    pub fn prefetch(&self, prompt: &Prompt) -> Prefetch {
        fetch::start(&self.shared, prompt)
    }

    /// How many of the leading chunks are cached, for an engine that asks before it makes room for
    /// them. None, as long as the daemon is left alone; costs
    /// [`PluginConfig::lookup_timeout`] at most.
    pub async fn find(&self, keys: &[ChunkKey]) -> usize {
        let lookup = self.look_up(keys).await;
        lookup.map_or(0, |lookup| lookup.prefix_chunks)
    }

    /// Which of the chunks are cached; as [`find`](Self::find) otherwise.
    pub async fn present(&self, keys: &[ChunkKey]) -> Vec<bool> {
        let Some(lookup) = self.look_up(keys).await else {
            return vec![false; keys.len()];
        };
        lookup.found.iter().map(Option::is_some).collect()
    }

    async fn look_up(&self, keys: &[ChunkKey]) -> Option<Lookup> {
        let shared = &self.shared;
        let begun = Instant::now();
        if keys.is_empty() || !self.may_ask(begun) {
            return None;
        }
        let client = shared
            .client
            .with_call_timeout(shared.config.lookup_timeout);
        self.answered(begun, "a lookup failed", client.lookup(keys).await)
    }

    /// Deletes chunks; how many there were. None, as long as the daemon is left alone; costs
    /// [`PluginConfig::lookup_timeout`] at most.
    pub async fn delete(&self, keys: &[ChunkKey]) -> u32 {
        let shared = &self.shared;
        let begun = Instant::now();
        if keys.is_empty() || !self.may_ask(begun) {
            return 0;
        }
        let client = shared
            .client
            .with_call_timeout(shared.config.lookup_timeout);
        let deleted = self.answered(begun, "a deletion failed", client.delete(keys).await);
        deleted.unwrap_or(0)
    }

    /// What a call came to; where it failed, the daemon is left alone.
    fn answered<T>(
        &self,
        begun: Instant,
        failure: &str,
        answer: Result<T, CallError>,
    ) -> Option<T> {
        match answer {
            Ok(answer) => {
                self.shared.breaker().succeeded();
                Some(answer)
            }
            Err(error) => {
                tracing::warn!(%error, "{failure}");
                self.shared.stats.note(Happened::Failed);
                self.shared.breaker().failed(begun, Instant::now());
                None
            }
        }
    }

    /// Whether the daemon is not left alone at this moment; counts where it is.
    fn may_ask(&self, now: Instant) -> bool {
        let allows = self.shared.breaker().allows(now);
        if !allows {
            self.shared.stats.note(Happened::Skipped);
        }
        allows
    }

    /// Stores a chunk, for an engine that waits for it: whether the daemon has it. It has not, as
    /// long as it is left alone; costs [`PluginConfig::store_timeout`] at most.
    pub async fn store(&self, chunk: ChunkCopy) -> bool {
        let shared = &self.shared;
        let begun = Instant::now();
        if !self.may_ask(begun) {
            return false;
        }
        let stored = shared.storing.store(chunk).await;
        shared.capture.note(stored);
        if stored == Stored::NoAnswer {
            shared.breaker().failed(begun, Instant::now());
        }
        stored == Stored::Yes
    }

    /// When what is cached is loaded.
    pub fn load_policy(&self) -> LoadPolicy {
        self.shared.config.load
    }

    /// The time to the first token that it keeps to, where it does.
    pub fn deadline(&self) -> Option<Duration> {
        self.shared.config.deadline
    }

    /// Starts to look for the content chunks of `prompt`, and to fetch those that are cached if
    /// that is expected to be faster than computing them. Returns at once.
    pub fn gather(&self, prompt: &blend::Segmented) -> blend::Gather {
        blend::start(&self.shared, prompt, None, |_| false)
    }

    /// As [`Self::gather`]; what was recorded of the chunks that `lacks` names comes first
    /// ([`blend::Gather::recorded`]).
    pub fn gather_recorded(
        &self,
        prompt: &blend::Segmented,
        recorder: &blend::Recorder,
        lacks: impl Fn(&ChunkKey) -> bool,
    ) -> blend::Gather {
        blend::start(&self.shared, prompt, Some(recorder), lacks)
    }

    /// What became of prefetches and gathers so far.
    pub fn fetch_stats(&self) -> FetchStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let stats = &self.shared.stats;
        FetchStats {
            loads: load(&stats.load),
            late: load(&stats.late),
            failed: load(&stats.failed),
            skipped: load(&stats.skipped),
            missed: load(&stats.missed),
        }
    }

    /// Which of an engine's chunks the daemon has, as it tells; `limit` bounds those chunks.
    pub fn follow<T: Clone + Send + 'static>(&self, limit: NonZeroUsize) -> Residency<T> {
        let client = self.shared.client.clone();
        Residency::follow(client, &self.shared.runtime, limit)
    }

    /// How fetches go at this moment; `None` is gRPC. See [`Client::data_path`].
    pub fn data_path(&self) -> Option<PathStatus> {
        self.shared.client.data_path()
    }

    /// Whether `bytes` more can wait to be stored. Ask before copying a chunk.
    pub fn has_capture_room(&self, bytes: u64) -> bool {
        self.shared.capture.has_room(bytes)
    }

    /// Queues a chunk for storing, off the request's path.
    pub fn capture(&self, chunk: ChunkCopy) -> CaptureOutcome {
        self.shared.capture.push(chunk)
    }

    /// Counts `chunks` that were not even copied, for lack of room.
    pub fn note_dropped_captures(&self, chunks: usize) {
        self.shared.capture.note_dropped(chunks as u64);
    }

    /// What became of captured chunks so far.
    pub fn capture_stats(&self) -> CaptureStats {
        self.shared.capture.stats()
    }

    /// Tells the cost model that prefill of tokens `from..to` of a sequence took
    /// `elapsed`, alone in its batch.
    pub fn observe_prefill(&self, from: usize, to: usize, elapsed: Duration) {
        self.shared.cost().observe_prefill(from, to, elapsed);
    }

    /// A copy of the cost model as it stands.
    pub fn cost_model(&self) -> CostModel {
        self.shared.cost().clone()
    }
}

impl Shared {
    fn cost(&self) -> std::sync::MutexGuard<'_, CostModel> {
        // Plain numbers: a panic elsewhere cannot leave them half-written.
        self.cost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn learnt(&self) -> std::sync::MutexGuard<'_, Learnt> {
        // As above: estimates, whichever fetch wrote them last.
        self.learnt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Prefetch::answered`].
    fn overrun(&self) -> Duration {
        Duration::from_nanos(self.overrun.load(Ordering::Relaxed))
    }

    fn note_overrun(&self, overrun: Duration) {
        let nanos = u64::try_from(overrun.as_nanos()).unwrap_or(u64::MAX);
        let before = self.overrun.load(Ordering::Relaxed);
        // Deadlines are missed by what is above the mean: up at once, down slowly. Of two
        // that come at the same time, one counts.
        let smoothed = match nanos.checked_sub(before) {
            Some(more) => before + more / 4 * 3,
            None => before - (before - nanos) / 8,
        };
        self.overrun.store(smoothed, Ordering::Relaxed);
    }

    fn breaker(&self) -> std::sync::MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
