//! Fetching a cached prefix, layer by layer, under a deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::{CallError, GetEvent, GetOptions};
use kvasir_types::{ChunkKey, KvLayout, LayerIdx};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use crate::{Decision, EngineBackend, FetchObservation, LoadPolicy, Prompt, Shared};

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
    runtime: tokio::runtime::Handle,
    arrivals: mpsc::Receiver<Arrival>,
    task: Option<AbortHandle>,
    layout: KvLayout,
    /// How much longer the engine waits for the cache, over all arrivals.
    patience: Duration,
    /// Since when the engine has had nothing of this fetch to land.
    idle_since: Option<Instant>,
    stage: Stage,
    /// Layers landed, per planned chunk.
    landed: Vec<u16>,
    /// Chunks that are still expected to become whole; shrinks, never grows.
    target: usize,
    present: usize,
    bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Deciding,
    Loading,
    Done,
}

#[derive(Debug)]
enum Arrival {
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
        data: Bytes,
    },
    /// This chunk and all later ones will not come.
    Lost { chunk: usize },
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

/// A layer will not arrive in time: the prefix is shorter than planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the fetched prefix fell short")]
pub struct Shortfall;

pub(crate) fn start(shared: &Arc<Shared>, prompt: &Prompt) -> Prefetch {
    let now = Instant::now();
    let layout = *shared.namespace.layout();
    let buffered = shared.config.fetch_buffer.as_u64() / layout.layer_bytes() as u64;
    let capacity = usize::try_from(buffered.clamp(1, 1 << 16)).unwrap_or(1);
    let (sender, arrivals) = mpsc::channel(capacity);
    let skip = prompt.keys().is_empty() || !shared.allows(now);
    let task = (!skip).then(|| {
        let fetch = Fetch {
            shared: Arc::clone(shared),
            keys: prompt.keys().to_vec(),
            prompt: prompt.clone(),
            arrivals: sender,
        };
        shared.runtime.spawn(fetch.run()).abort_handle()
    });
    Prefetch {
        runtime: shared.runtime.clone(),
        arrivals,
        task,
        layout,
        patience: shared.config.lookup_timeout,
        idle_since: Some(now),
        stage: if skip { Stage::Done } else { Stage::Deciding },
        landed: Vec::new(),
        target: 0,
        present: 0,
        bytes: 0,
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

    /// Payload bytes landed so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Lands what has arrived, without waiting.
    pub fn poll<B: EngineBackend>(&mut self, backend: &mut B, pages: &B::Pages) -> FetchOutcome {
        while self.stage != Stage::Done {
            match self.arrivals.try_recv() {
                Ok(arrival) => self.take(arrival, backend, pages),
                Err(mpsc::error::TryRecvError::Disconnected) => self.finish(),
                Err(mpsc::error::TryRecvError::Empty) => {
                    self.spend_patience();
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

    /// Waits until `layer` of every chunk of [`target`](Self::target) has landed.
    /// Must not be called on a runtime's own thread.
    ///
    /// # Errors
    /// [`Shortfall`] when a chunk is lost meanwhile or patience is spent; what the
    /// engine computed on top of the longer prefix is void then, and
    /// [`poll`](Self::poll) goes on with the shorter one.
    pub fn wait_layer<B: EngineBackend>(
        &mut self,
        layer: LayerIdx,
        backend: &mut B,
        pages: &B::Pages,
    ) -> Result<(), Shortfall> {
        let planned = self.target;
        loop {
            if self.target < planned {
                return Err(Shortfall);
            }
            if self.landed[..planned].iter().all(|&count| count > layer.0) {
                return Ok(());
            }
            if self.stage == Stage::Done {
                return Err(Shortfall);
            }
            self.receive(Duration::MAX, backend, pages);
        }
    }

    fn receive<B: EngineBackend>(&mut self, longest: Duration, backend: &mut B, pages: &B::Pages) {
        self.idle_since.get_or_insert_with(Instant::now);
        let longest = longest.min(self.patience);
        let received = self
            .runtime
            .block_on(async { tokio::time::timeout(longest, self.arrivals.recv()).await });
        self.spend_patience();
        match received {
            Ok(Some(arrival)) => self.take(arrival, backend, pages),
            Ok(None) => self.finish(),
            Err(_) => {}
        }
    }

    /// Charges the time in which the engine waited, or found nothing when it looked.
    fn spend_patience(&mut self) {
        let now = Instant::now();
        if let Some(since) = self.idle_since.replace(now) {
            self.patience = self.patience.saturating_sub(now - since);
        }
        if self.patience.is_zero() && self.stage != Stage::Done {
            debug!(target = self.target, "the cache is late; computing instead");
            self.finish();
        }
    }

    fn take<B: EngineBackend>(&mut self, arrival: Arrival, backend: &mut B, pages: &B::Pages) {
        self.idle_since = None;
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
            Arrival::Layer { chunk, layer, data } => {
                // Chunks beyond a loss may still be in the channel.
                if chunk >= self.target {
                    return;
                }
                match backend.write_layer(pages, chunk, layer, &data) {
                    Ok(()) => {
                        self.landed[chunk] = layer.0 + 1;
                        self.bytes += data.len() as u64;
                    }
                    Err(error) => {
                        warn!(%error, chunk, %layer, "a fetched layer does not fit the pages");
                        self.lose(chunk);
                    }
                }
            }
            Arrival::Lost { chunk } => self.lose(chunk),
        }
        if self.stage == Stage::Loading && self.whole() == self.target {
            self.finish();
        }
    }

    fn lose(&mut self, chunk: usize) {
        self.target = self.target.min(chunk);
        self.present = self.present.min(chunk);
    }

    /// Leading chunks that are whole.
    fn whole(&self) -> usize {
        self.landed[..self.target]
            .iter()
            .take_while(|&&count| count == self.layout.layers())
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
struct Fetch {
    shared: Arc<Shared>,
    keys: Vec<ChunkKey>,
    prompt: Prompt,
    arrivals: mpsc::Sender<Arrival>,
}

impl Fetch {
    async fn run(self) {
        match self.fetch().await {
            Ok(()) => self.shared.breaker().succeeded(),
            Err(error) => {
                warn!(%error, "the cache failed; computing instead");
                self.shared.breaker().failed(Instant::now());
            }
        }
    }

    async fn fetch(&self) -> Result<(), CallError> {
        let shared = &self.shared;
        let looked_up = Instant::now();
        let lookup = shared
            .client
            .with_call_timeout(shared.config.lookup_timeout)
            .lookup(&self.keys)
            .await?;
        let present = lookup.prefix_chunks;
        let bytes = lookup.found[..present]
            .iter()
            .flatten()
            .map(|found| found.bytes)
            .sum();
        let decision = match shared.config.load {
            LoadPolicy::WhenFaster => shared.cost().decide(self.prompt.resume_at(present), bytes),
            LoadPolicy::Always if present > 0 => Decision::Load {
                budget: shared.config.fetch_timeout,
            },
            LoadPolicy::Always => Decision::Compute,
        };
        let (load, budget) = match decision {
            Decision::Load { budget } => (present, budget.min(shared.config.fetch_timeout)),
            Decision::Compute => (0, Duration::ZERO),
        };
        debug!(present, load, bytes, ?budget, "decided");
        let planned = Arrival::Planned {
            present,
            load,
            budget,
        };
        // A closed channel means that nobody waits any more.
        if self.arrivals.send(planned).await.is_err() || load == 0 {
            return Ok(());
        }
        let options = GetOptions {
            deadline: Some(Instant::now() + shared.config.fetch_timeout),
            ..GetOptions::default()
        };
        let mut stream = shared.client.get(&self.keys[..load], options).await?;
        let served = stream.chunks().len();
        let fitting = stream
            .chunks()
            .iter()
            .take_while(|chunk| chunk.layout == *shared.namespace.layout())
            .count();
        if fitting < load {
            debug!(served, fitting, load, "fewer chunks than looked up");
            if self
                .arrivals
                .send(Arrival::Lost { chunk: fitting })
                .await
                .is_err()
            {
                return Ok(());
            }
        }
        let mut first = None;
        let mut after_first = 0u64;
        let mut busy = Duration::ZERO;
        while let Some(event) = stream.next().await? {
            let arrival = match event {
                GetEvent::Layer { chunk, layer, data } => {
                    if first.is_none() {
                        first = Some(Instant::now());
                    } else {
                        after_first += data.len() as u64;
                    }
                    Arrival::Layer { chunk, layer, data }
                }
                GetEvent::Lost { chunk, reason } => {
                    warn!(
                        chunk,
                        ?reason,
                        "a cached chunk was lost; computing it instead"
                    );
                    Arrival::Lost { chunk }
                }
            };
            let handed = Instant::now();
            if self.arrivals.send(arrival).await.is_err() {
                return Ok(());
            }
            busy += handed.elapsed();
        }
        if let Some(first) = first {
            shared.cost().observe_fetch(FetchObservation {
                latency: first - looked_up,
                bytes: after_first,
                elapsed: first.elapsed().saturating_sub(busy),
            });
        }
        Ok(())
    }
}
