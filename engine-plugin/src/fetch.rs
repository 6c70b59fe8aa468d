//! Fetching a cached prefix, layer by layer, under a deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::future::Either;
use futures::stream::FuturesOrdered;
use kvasir_client::{CallError, Client, GetEvent, GetOptions, LayerStream};
use kvasir_types::{LayerIdx, Level};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use crate::coding::Decoding;
use crate::{
    Decision, EngineBackend, FetchObservation, Happened, LAYERS, LoadPolicy, Prompt, Shared,
};

/// A prefix on its way into the engine's pages.
///
/// Owned by the engine thread; dropping it cancels the fetch. Layers arrive for
/// all chunks in order: layer 0 of every chunk, then layer 1. A chunk that is
/// lost takes all later chunks with it; spent patience takes every chunk that is
/// not whole.
///
/// Patience is the time the engine spends waiting for the cache. Time in which
/// layers waited for a busy engine is not the cache's fault and not counted.
#[derive(Debug)]
pub struct Prefetch {
    shared: Arc<Shared>,
    arrivals: mpsc::Receiver<(Instant, Arrival)>,
    task: Option<AbortHandle>,
    begun: Instant,
    /// How much longer the engine waits for the cache, over all arrivals.
    patience: Duration,
    /// Since when the engine has had nothing of this fetch to land.
    idle_since: Option<Instant>,
    stage: Stage,
    /// Layers landed, per planned chunk.
    landed: Vec<u16>,
    /// Chunks that are still expected to become whole; shrinks, never grows.
    target: usize,
    /// The coarsest level that a layer of each chunk has come at.
    levels: Vec<Level>,
    present: usize,
    bytes: u64,
    /// When the first token is reckoned with, and when it is due.
    expected: Option<[Instant; 2]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Deciding,
    Loading,
    Done,
}

#[derive(Debug)]
pub(crate) enum Arrival {
    Planned {
        /// Leading chunks the cache holds.
        present: usize,
        /// Leading chunks that will be fetched.
        load: usize,
        budget: Duration,
    },
    Layer {
        chunk: usize,
        layer: LayerIdx,
        /// The level that it came at.
        level: Level,
        /// Raw.
        data: Bytes,
        /// Bytes that came for it.
        received: u64,
    },
    /// This chunk and all later ones will not come.
    Lost { chunk: usize },
    /// They will not come either, though the cache has them.
    Left { chunk: usize },
    /// The last layer is about to come.
    Expected {
        /// When the first token is reckoned with.
        at: Instant,
        /// When it is due.
        due: Instant,
    },
}

/// What a prefetch has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchOutcome {
    /// The cache has not answered yet, or the cost model is still to be asked.
    Deciding,
    /// Layers are arriving.
    Loading,
    /// Nothing more will arrive: `chunks` leading chunks are whole in the pages.
    Done {
        /// Leading chunks whose every layer has landed.
        chunks: usize,
    },
}

/// What waiting for a layer came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerWait {
    /// The layer of every chunk asked for is in the pages.
    Landed,
    /// Not yet.
    Pending,
    /// Not all of these chunks will come: what the engine computed on top of them is
    /// void, and [`Prefetch::poll`] goes on with fewer.
    Short,
}

pub(crate) fn start(shared: &Arc<Shared>, prompt: &Prompt) -> Prefetch {
    let now = Instant::now();
    let layer_bytes = shared.namespace.layout().layer_bytes() as u64;
    let buffered = shared.config.fetch_buffer.as_u64() / layer_bytes;
    let capacity = usize::try_from(buffered.clamp(1, 1 << 16)).unwrap_or(1);
    let (sender, arrivals) = mpsc::channel(capacity);
    // Asking must not take longer than computing what could be found.
    let compute = shared
        .cost()
        .compute_time(0, prompt.resume_at(prompt.keys().len()));
    let worthwhile = match shared.config.load {
        LoadPolicy::WhenFaster => shared.cost().fetch_time(0, now) < compute,
        LoadPolicy::Always => true,
    };
    let allowed = shared.breaker().allows(now);
    if !allowed {
        shared.stats.note(Happened::Skipped);
    }
    let skip = prompt.keys().is_empty() || !worthwhile || !allowed;
    let task = (!skip).then(|| {
        let fetch = Fetch {
            shared: Arc::clone(shared),
            prompt: prompt.clone(),
            arrivals: sender,
        };
        shared.runtime.spawn(fetch.run()).abort_handle()
    });
    Prefetch {
        shared: Arc::clone(shared),
        arrivals,
        task,
        begun: now,
        patience: match shared.config.load {
            LoadPolicy::WhenFaster => shared.config.lookup_timeout.min(compute),
            LoadPolicy::Always => shared.config.lookup_timeout,
        },
        idle_since: Some(now),
        stage: if skip { Stage::Done } else { Stage::Deciding },
        landed: Vec::new(),
        target: 0,
        levels: Vec::new(),
        present: 0,
        bytes: 0,
        expected: None,
    }
}

impl Prefetch {
    /// Leading chunks the cache was seen to hold, fetched or not. They need not be
    /// captured again.
    pub fn present(&self) -> usize {
        self.present
    }

    /// Leading chunks that are fetched, or still expected.
    pub fn target(&self) -> usize {
        self.target
    }

    /// Payload bytes that came for the layers landed so far, as they were sent.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The level that each of the [target](Self::target) chunks has come at: the coarsest of
    /// the layers that have landed.
    pub fn levels(&self) -> &[Level] {
        self.levels.get(..self.target).unwrap_or(&self.levels)
    }

    /// Whether what is computed over these chunks may be stored. Not where they came
    /// coarser than chunks are stored.
    pub fn may_capture(&self) -> bool {
        let coder = &self.shared.coder;
        self.levels()
            .iter()
            .all(|level| coder.may_store_over(*level))
    }

    /// Tells that the first token is out, and was computed behind this fetch. Fetches with a
    /// deadline learn from it how much longer that takes than their models say: what decoding
    /// and computing wait for, and what a short prefill costs beside its tokens.
    pub fn answered(&self, at: Instant) {
        let Some([expected, due]) = self.expected else {
            return;
        };
        let overrun = at.saturating_duration_since(expected);
        self.shared.note_overrun(overrun);
        if at > due {
            self.shared.stats.note(Happened::Missed);
        }
    }

    /// Lands what has arrived, without waiting.
    pub fn poll<B: EngineBackend>(&mut self, backend: &mut B, pages: &B::Pages) -> FetchOutcome {
        while self.stage != Stage::Done {
            match self.arrivals.try_recv() {
                Ok((at, arrival)) => self.take(at, arrival, backend, pages),
                Err(mpsc::error::TryRecvError::Disconnected) => self.finish(),
                Err(mpsc::error::TryRecvError::Empty) => {
                    let now = Instant::now();
                    self.charge(now);
                    self.idle_since = Some(now);
                    break;
                }
            }
        }
        self.outcome()
    }

    /// Waits for the next arrival, `longest` at most, and lands what is there.
    /// Must not be called on a runtime's own thread.
    pub fn wait<B: EngineBackend>(
        &mut self,
        longest: Duration,
        backend: &mut B,
        pages: &B::Pages,
    ) -> FetchOutcome {
        if self.stage != Stage::Done {
            self.receive(longest, backend, pages);
        }
        self.poll(backend, pages)
    }

    /// Waits, `longest` at most, until `layer` of the first `chunks` chunks has landed.
    /// Must not be called on a runtime's own thread.
    pub fn wait_layer<B: EngineBackend>(
        &mut self,
        chunks: usize,
        layer: LayerIdx,
        longest: Duration,
        backend: &mut B,
        pages: &B::Pages,
    ) -> LayerWait {
        let until = Instant::now() + longest;
        loop {
            if self.target < chunks {
                return LayerWait::Short;
            }
            if self.landed[..chunks].iter().all(|&count| count > layer.0) {
                return LayerWait::Landed;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return LayerWait::Pending;
            }
            self.receive(left, backend, pages);
        }
    }

    fn receive<B: EngineBackend>(&mut self, longest: Duration, backend: &mut B, pages: &B::Pages) {
        self.idle_since.get_or_insert_with(Instant::now);
        let longest = longest.min(self.patience);
        let received = self
            .shared
            .runtime
            .block_on(async { tokio::time::timeout(longest, self.arrivals.recv()).await });
        match received {
            Ok(Some((at, arrival))) => {
                // Waking up is part of the wait.
                self.charge(Instant::now());
                self.take(at, arrival, backend, pages);
            }
            Ok(None) => self.finish(),
            Err(_) => {
                let now = Instant::now();
                self.charge(now);
                self.idle_since = Some(now);
            }
        }
    }

    /// Charges the time until `until` in which the engine had nothing to land.
    fn charge(&mut self, until: Instant) {
        if let Some(since) = self.idle_since.take() {
            self.patience = self
                .patience
                .saturating_sub(until.saturating_duration_since(since));
        }
        if self.patience.is_zero() && self.stage != Stage::Done {
            self.give_up(until);
        }
    }

    /// The cache is late, which counts as a failure.
    fn give_up(&mut self, now: Instant) {
        debug!(target = self.target, "the cache is late; computing instead");
        if self.stage == Stage::Loading {
            self.shared.stats.note(Happened::Late);
            self.shared.breaker().failed(self.begun, now);
        }
        self.finish();
    }

    fn take<B: EngineBackend>(
        &mut self,
        at: Instant,
        arrival: Arrival,
        backend: &mut B,
        pages: &B::Pages,
    ) {
        self.charge(at);
        if self.stage == Stage::Done {
            return;
        }
        match arrival {
            Arrival::Planned {
                present,
                load,
                budget,
            } => {
                self.present = present;
                self.target = load;
                self.landed = vec![0; load];
                self.patience = budget;
                self.stage = Stage::Loading;
            }
            Arrival::Layer {
                chunk,
                layer,
                level,
                data,
                received,
            } => {
                // Chunks beyond a loss may still be in the channel.
                if chunk >= self.target {
                    return;
                }
                match backend.write_layer(pages, chunk, layer, &data) {
                    Ok(()) => {
                        self.landed[chunk] = layer.0 + 1;
                        self.bytes += received;
                        self.came_at(chunk, level);
                    }
                    Err(error) => {
                        warn!(%error, chunk, %layer, "a fetched layer does not fit the pages");
                        self.lose(chunk);
                    }
                }
            }
            Arrival::Lost { chunk } => self.lose(chunk),
            Arrival::Left { chunk } => self.target = self.target.min(chunk),
            Arrival::Expected { at, due } => self.expected = Some([at, due]),
        }
        if self.stage == Stage::Loading && self.whole() == self.target {
            self.finish();
        }
    }

    fn came_at(&mut self, chunk: usize, level: Level) {
        metrics::counter!(LAYERS, "level" => level.to_string()).increment(1);
        match self.levels.get_mut(chunk) {
            Some(known) => *known = Level::coarsest([*known, level]).unwrap_or(level),
            // First layers land in the order of chunks.
            None => self.levels.push(level),
        }
    }

    fn lose(&mut self, chunk: usize) {
        self.target = self.target.min(chunk);
        self.present = self.present.min(chunk);
    }

    /// Leading chunks that are whole.
    fn whole(&self) -> usize {
        let layers = self.shared.namespace.layout().layers();
        self.landed[..self.target]
            .iter()
            .take_while(|&&count| count == layers)
            .count()
    }

    fn finish(&mut self) {
        self.stage = Stage::Done;
        self.target = self.whole();
        if let Some(task) = self.task.take()
            && self.target < self.landed.len()
        {
            task.abort();
        }
    }

    fn outcome(&self) -> FetchOutcome {
        match self.stage {
            Stage::Deciding => FetchOutcome::Deciding,
            Stage::Loading => FetchOutcome::Loading,
            Stage::Done => FetchOutcome::Done {
                chunks: self.target,
            },
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// The async half: talks to the daemon, feeds the channel.
pub(crate) struct Fetch {
    pub(crate) shared: Arc<Shared>,
    pub(crate) prompt: Prompt,
    /// When each arrival was handed over, and what it is.
    arrivals: mpsc::Sender<(Instant, Arrival)>,
}

/// How the async half ended, when nothing failed.
pub(crate) enum End {
    /// The daemon did all that was asked of it.
    Completed,
    /// The engine has no use for the rest; nothing was learnt about the daemon.
    Abandoned,
}

impl Fetch {
    async fn run(self) {
        let begun = Instant::now();
        match self.fetch(begun).await {
            Ok(End::Completed) => self.shared.breaker().succeeded(),
            Ok(End::Abandoned) => {}
            Err(error) => {
                warn!(%error, "the cache failed; computing instead");
                self.shared.stats.note(Happened::Failed);
                self.shared.breaker().failed(begun, Instant::now());
            }
        }
    }

    /// False when nobody waits any more.
    pub(crate) async fn hand_over(&self, arrival: Arrival) -> bool {
        // The time of arrival, not of acceptance: a full channel is the engine's doing.
        let stamped = (Instant::now(), arrival);
        self.arrivals.send(stamped).await.is_ok()
    }

    async fn fetch(&self, begun: Instant) -> Result<End, CallError> {
        let shared = &self.shared;
        let keys = self.prompt.keys();
        let deadline = shared.steered_within();
        let asking = shared
            .client
            .with_call_timeout(shared.config.lookup_timeout);
        // What is steered is read in several gets, of the same chunks.
        let holding = async {
            match deadline {
                Some(_) => asking.hold().await.map(Some),
                None => Ok(None),
            }
        };
        let (lookup, hold) = futures::try_join!(asking.lookup(keys), holding)?;
        let present = lookup.prefix_chunks;
        let available = present.min(Client::MAX_GET_KEYS);
        let found = lookup.found[..available].iter().flatten();
        let sizes: Vec<u64> = found.map(|found| found.bytes).collect();
        let stored = sizes.iter().sum();
        let bytes = match deadline {
            Some(_) => shared
                .learnt()
                .sizes
                .base_bytes(shared.coder.stores_at(), stored),
            None => shared.coder.expected_bytes(stored),
        };
        let tokens = self.prompt.resume_at(available);
        let decision = match shared.config.load {
            LoadPolicy::WhenFaster => shared.cost().decide(tokens, bytes, Instant::now()),
            LoadPolicy::Always if available > 0 => Decision::Load {
                budget: shared.config.fetch_timeout,
            },
            LoadPolicy::Always => Decision::Compute,
        };
        let (load, budget) = match decision {
            // Refinements take time that the cost model does not count.
            Decision::Load { .. } if deadline.is_some() => {
                let compute = match shared.config.load {
                    LoadPolicy::WhenFaster => shared.cost().compute_time(0, tokens),
                    LoadPolicy::Always => Duration::MAX,
                };
                (available, compute.min(shared.config.fetch_timeout))
            }
            Decision::Load { budget } => (available, budget.min(shared.config.fetch_timeout)),
            Decision::Compute => (0, Duration::ZERO),
        };
        debug!(present, load, bytes, ?budget, "decided");
        let planned = Arrival::Planned {
            present,
            load,
            budget,
        };
        if !self.hand_over(planned).await {
            return Ok(End::Abandoned);
        }
        if load == 0 {
            // That lookups work says nothing about fetches.
            return Ok(End::Abandoned);
        }
        shared.stats.note(Happened::Load);
        if let (Some(deadline), Some(hold)) = (deadline, hold) {
            let due = begun + deadline.min(budget);
            return self.steer(hold, &sizes[..load], begun, due).await;
        }
        let finest = shared.coder.config().fetch;
        let options = GetOptions {
            deadline: Some(Instant::now() + shared.config.fetch_timeout),
            levels: finest.into_iter().collect(),
            ..GetOptions::default()
        };
        let stream = shared.client.get(&keys[..load], options).await?;
        let fitting = stream
            .chunks()
            .iter()
            .take_while(|chunk| chunk.layout == *shared.namespace.layout())
            .count();
        if fitting < load {
            debug!(fitting, load, "fewer fitting chunks than looked up");
            if !self.hand_over(Arrival::Lost { chunk: fitting }).await {
                return Ok(End::Abandoned);
            }
        }
        let mut received = Received::default();
        if !self.receive(stream, &mut received).await? {
            return Ok(End::Abandoned);
        }
        // What was lost on the way says nothing of how much coarser levels take.
        if fitting == load && !received.lost {
            shared.coder.note_received(received.bytes, stored);
        }
        if let Some(first) = received.first {
            let observation = FetchObservation {
                latency: first - begun,
                bytes: received.after_first,
                elapsed: first.elapsed().saturating_sub(received.busy),
            };
            shared.cost().observe_fetch(observation, Instant::now());
        }
        Ok(End::Completed)
    }

    /// A layer from those of its parts that came.
    pub(crate) async fn decode(
        &self,
        decoding: Arc<Decoding>,
        chunk: usize,
        layer: LayerIdx,
        parts: Vec<Bytes>,
    ) -> Arrival {
        let received = parts.iter().map(|part| part.len() as u64).sum();
        let level = decoding.level_of(parts.len());
        let failed = match self.shared.coder.decode(decoding, layer, parts).await {
            Some(Ok(data)) => {
                return Arrival::Layer {
                    chunk,
                    layer,
                    level,
                    data,
                    received,
                };
            }
            Some(Err(error)) => error.to_string(),
            None => "the runtime is shutting down".to_owned(),
        };
        warn!(chunk, %layer, error = failed, "a cached chunk cannot be decoded; computing it");
        Arrival::Lost { chunk }
    }

    /// Decodes layers while further ones arrive, and hands them over in order. False when
    /// nobody waits any more.
    async fn receive(
        &self,
        mut stream: LayerStream,
        received: &mut Received,
    ) -> Result<bool, CallError> {
        let coder = &self.shared.coder;
        let stored = stream.chunks().iter().map(|chunk| chunk.level);
        let raw = |level| Arc::new(Decoding::raw(level));
        let mut decodings: Vec<Arc<Decoding>> = stored.map(raw).collect();
        let most = 2 * coder.config().threads.max(1);
        let mut decodes = FuturesOrdered::new();
        let mut ended = false;
        // Chunks from here on are of no use.
        let mut live = usize::MAX;
        loop {
            let arrival = tokio::select! {
                biased;
                Some(arrival) = decodes.next(), if !decodes.is_empty() => arrival,
                event = stream.next(), if !ended && decodes.len() < most => {
                    match event? {
                        None => ended = true,
                        Some(GetEvent::Prelude { chunk, data }) => {
                            let level = stream.chunks()[chunk].level;
                            match coder.decoding(level, data) {
                                Some(decoding) => decodings[chunk] = Arc::new(decoding),
                                None if chunk < live => {
                                    debug!(chunk, "a cached chunk needs a profile; computing it");
                                    live = chunk;
                                    let lost = std::future::ready(Arrival::Lost { chunk });
                                    decodes.push_back(Either::Right(lost));
                                }
                                None => (),
                            }
                        }
                        Some(GetEvent::Layer { chunk, layer, parts }) => {
                            received.note(parts.iter().map(Bytes::len).sum());
                            if chunk >= live {
                                continue;
                            }
                            let decoding = Arc::clone(&decodings[chunk]);
                            let decode = self.decode(decoding, chunk, layer, parts);
                            decodes.push_back(Either::Left(decode));
                        }
                        Some(GetEvent::Lost { chunk, reason }) => {
                            received.lost = true;
                            warn!(chunk, ?reason, "a cached chunk was lost; computing it instead");
                            let lost = std::future::ready(Arrival::Lost { chunk });
                            decodes.push_back(Either::Right(lost));
                        }
                    }
                    continue;
                }
                else => return Ok(true),
            };
            let handed = Instant::now();
            if !self.hand_over(arrival).await {
                return Ok(false);
            }
            received.busy += handed.elapsed();
        }
    }
}

/// What came of a stream, for the cost model.
#[derive(Debug, Default)]
struct Received {
    bytes: u64,
    lost: bool,
    first: Option<Instant>,
    after_first: u64,
    /// Time in which the engine was busy.
    busy: Duration,
}

impl Received {
    fn note(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        match self.first {
            None => self.first = Some(Instant::now()),
            Some(_) => self.after_first += bytes as u64,
        }
    }
}
