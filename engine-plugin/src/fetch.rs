//! Fetching a cached prefix, layer by layer, under a deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::future::Either;
use futures::stream::FuturesOrdered;
use kvasir_client::{CallError, Client, Found, GetEvent, GetOptions, LayerStream};
use kvasir_types::{LayerIdx, Level};
use tracing::{debug, warn};

use crate::coding::{Decoded, Decoding, Encoded};
use crate::inbox::{End, Inbox, Outbox, Received, Stage, Wish};
use crate::{Decision, EngineBackend, Happened, LAYERS, LoadPolicy, Prompt, Shared, TierBytes};

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
    inbox: Inbox<Arrival>,
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
        came: Decoded,
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
    /// void, and the fetch goes on with fewer.
    Short,
}

pub(crate) fn start(shared: &Arc<Shared>, prompt: &Prompt) -> Prefetch {
    let keys = prompt.keys().len();
    let wish = Wish {
        chunks: keys,
        compute: shared.cost().compute_time(0, prompt.resume_at(keys)),
        layer_bytes: shared.namespace.layout().layer_bytes() as u64,
    };
    let (asking, prompt) = (Arc::clone(shared), prompt.clone());
    let inbox = Inbox::begin(shared, &wish, move |outbox, begun| {
        let fetch = Fetch {
            shared: asking,
            prompt,
            outbox,
        };
        async move { fetch.run(begun).await }
    });
    Prefetch {
        shared: Arc::clone(shared),
        inbox,
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
        while let Some(arrival) = self.inbox.arrived() {
            self.take(arrival, backend, pages);
        }
        self.settle();
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
        if let Some(arrival) = self.inbox.wait(longest) {
            self.take(arrival, backend, pages);
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
            if let Some(arrival) = self.inbox.wait(left) {
                self.take(arrival, backend, pages);
            }
            self.settle();
        }
    }

    fn take<B: EngineBackend>(&mut self, arrival: Arrival, backend: &mut B, pages: &B::Pages) {
        match arrival {
            Arrival::Planned {
                present,
                load,
                budget,
            } => {
                self.present = present;
                self.target = load;
                self.landed = vec![0; load];
                self.inbox.decided(budget);
            }
            Arrival::Layer { chunk, layer, came } => {
                // Chunks beyond a loss may still be in the channel.
                if chunk >= self.target {
                    return;
                }
                match backend.write_layer(pages, chunk, layer, &came.data) {
                    Ok(()) => {
                        self.landed[chunk] = layer.0 + 1;
                        self.bytes += came.received;
                        self.came_at(chunk, came.level);
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
        if self.inbox.stage() == Stage::Loading && self.whole() == self.target {
            self.inbox.close(self.target == self.landed.len());
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

    /// When nothing more will be taken, what is whole is all there is.
    fn settle(&mut self) {
        if self.inbox.stage() == Stage::Done {
            self.target = self.whole();
            self.inbox.close(self.target == self.landed.len());
        }
    }

    fn outcome(&self) -> FetchOutcome {
        match self.inbox.stage() {
            Stage::Deciding => FetchOutcome::Deciding,
            Stage::Loading => FetchOutcome::Loading,
            Stage::Done => FetchOutcome::Done {
                chunks: self.target,
            },
        }
    }
}

/// Bytes of raw KV that are decoded by one thread at a time, where layers are smaller.
const RUN_BYTES: usize = 256 << 10;

/// The async half: talks to the daemon, feeds the channel.
pub(crate) struct Fetch {
    pub(crate) shared: Arc<Shared>,
    pub(crate) prompt: Prompt,
    outbox: Outbox<Arrival>,
}

impl Fetch {
    pub(crate) async fn hand_over(&self, arrival: Arrival) -> bool {
        self.outbox.hand_over(arrival).await
    }

    async fn run(&self, begun: Instant) -> Result<End, CallError> {
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
        let found: Vec<Found> = found.copied().collect();
        let sizes: Vec<u64> = found.iter().map(|found| found.bytes).collect();
        let mut stored = TierBytes::default();
        for found in &found {
            stored += TierBytes::of(found.tier, found.bytes);
        }
        let bytes = stored.map(|stored| match deadline {
            Some(_) => shared
                .learnt()
                .sizes
                .base_bytes(shared.coder.stores_at(), stored),
            None => shared.coder.expected_bytes(stored),
        });
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
        debug!(present, load, ?bytes, ?budget, "decided");
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
            return self
                .steer(hold, &sizes[..load], stored.tier(), begun, due)
                .await;
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
        received.lost |= fitting < load;
        received.teach(shared, begun, stored);
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
        let coder = &self.shared.coder;
        match coder.layer(decoding, layer, parts).await {
            Some(came) => Arrival::Layer { chunk, layer, came },
            None => Arrival::Lost { chunk },
        }
    }

    /// Layers of these chunks, likewise.
    async fn decode_run(&self, chunks: Vec<usize>, layers: Vec<Encoded>) -> Vec<Arrival> {
        let places: Vec<LayerIdx> = layers.iter().map(|it| it.layer).collect();
        let decoded = self.shared.coder.layers(layers).await;
        let arrival = |((chunk, layer), came)| match came {
            Some(came) => Arrival::Layer { chunk, layer, came },
            None => Arrival::Lost { chunk },
        };
        let places = chunks.into_iter().zip(places);
        places.zip(decoded).map(arrival).collect()
    }

    /// Decodes layers while further ones arrive, and hands them over in order. False when
    /// nobody waits any more.
    async fn receive(
        &self,
        stream: LayerStream,
        received: &mut Received,
    ) -> Result<bool, CallError> {
        let coder = &self.shared.coder;
        let stored: Vec<Level> = stream.chunks().iter().map(|chunk| chunk.level).collect();
        let layout = *self.shared.namespace.layout();
        let raw = |level: &Level| Arc::new(Decoding::raw(layout, *level));
        let mut decodings: Vec<Arc<Decoding>> = stored.iter().map(raw).collect();
        let next = async |mut stream: LayerStream| {
            let event = stream.next().await?;
            Ok::<_, CallError>(event.map(|event| (event, stream)))
        };
        // What has come is decoded together: small layers take less time than to be passed on.
        let at_once = (RUN_BYTES / layout.layer_bytes()).max(1);
        let events = futures::stream::try_unfold(stream, next).ready_chunks(at_once);
        let mut events = std::pin::pin!(events);
        let most = 2 * coder.config().threads.max(1);
        let mut decodes = FuturesOrdered::new();
        let mut ended = false;
        // Chunks from here on are of no use.
        let mut live = usize::MAX;
        loop {
            let arrivals = tokio::select! {
                biased;
                Some(arrivals) = decodes.next(), if !decodes.is_empty() => arrivals,
                come = events.next(), if !ended && decodes.len() < most => {
                    let Some(come) = come else {
                        ended = true;
                        continue;
                    };
                    let (mut chunks, mut layers) = (Vec::new(), Vec::new());
                    let mut lost = Vec::new();
                    for event in come {
                        match event? {
                            GetEvent::Prelude { chunk, data } => {
                                match coder.decoding(layout, stored[chunk], data) {
                                    Some(decoding) => decodings[chunk] = Arc::new(decoding),
                                    None if chunk < live => {
                                        debug!(chunk, "a cached chunk needs a profile; computing it");
                                        live = chunk;
                                        lost.push(Arrival::Lost { chunk });
                                    }
                                    None => (),
                                }
                            }
                            GetEvent::Layer { chunk, layer, parts } => {
                                received.note(parts.iter().map(Bytes::len).sum());
                                if chunk < live {
                                    let decoding = Arc::clone(&decodings[chunk]);
                                    chunks.push(chunk);
                                    layers.push(Encoded { decoding, layer, parts });
                                }
                            }
                            GetEvent::Lost { chunk, reason } => {
                                received.lost = true;
                                warn!(chunk, ?reason, "a cached chunk was lost; computing it instead");
                                lost.push(Arrival::Lost { chunk });
                            }
                        }
                    }
                    // A chunk that is lost takes nothing along of what came before.
                    if !layers.is_empty() {
                        decodes.push_back(Either::Left(self.decode_run(chunks, layers)));
                    }
                    if !lost.is_empty() {
                        decodes.push_back(Either::Right(std::future::ready(lost)));
                    }
                    continue;
                }
                else => return Ok(true),
            };
            let handed = Instant::now();
            for arrival in arrivals {
                if !self.hand_over(arrival).await {
                    return Ok(false);
                }
            }
            received.busy += handed.elapsed();
        }
    }
}
