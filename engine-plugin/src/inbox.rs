//! The two ends of a fetch: the task that talks to the daemon hands over what came, and the
//! engine thread takes it, as long as it has patience.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvasir_client::CallError;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use crate::{FetchObservation, Happened, LoadPolicy, Shared, TierBytes};

/// The engine's end. Dropping it cancels the fetch.
///
/// Patience is the time the engine spends waiting for the cache. Time in which arrivals
/// waited for a busy engine is not the cache's fault and not counted.
#[derive(Debug)]
pub(crate) struct Inbox<A> {
    shared: Arc<Shared>,
    arrivals: mpsc::Receiver<(Instant, A)>,
    task: Option<AbortHandle>,
    begun: Instant,
    /// How much longer the engine waits for the cache, over all arrivals.
    patience: Duration,
    /// Since when the engine has had nothing of this fetch to land.
    idle_since: Option<Instant>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Deciding,
    Loading,
    /// Nothing is taken any more.
    Done,
}

/// The task's end.
#[derive(Debug)]
pub(crate) struct Outbox<A>(mpsc::Sender<(Instant, A)>);

/// How the task ended, when nothing failed.
pub(crate) enum End {
    /// The daemon did all that was asked of it.
    Completed,
    /// The engine has no use for the rest; nothing was learnt about the daemon.
    Abandoned,
}

/// What could be fetched, before the cache is asked.
pub(crate) struct Wish {
    /// Chunks that could be there.
    pub(crate) chunks: usize,
    /// How long computing them all would take.
    pub(crate) compute: Duration,
    /// Raw bytes of the largest layer of any of them.
    pub(crate) layer_bytes: u64,
}

impl<A: Send + 'static> Inbox<A> {
    /// Begins a fetch, which is `work`, if anything can come of it.
    pub(crate) fn begin<F>(
        shared: &Arc<Shared>,
        wish: &Wish,
        work: impl FnOnce(Outbox<A>, Instant) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Result<End, CallError>> + Send + 'static,
    {
        let now = Instant::now();
        let buffered = shared.config.fetch_buffer.as_u64() / wish.layer_bytes.max(1);
        let capacity = usize::try_from(buffered.clamp(1, 1 << 16)).unwrap_or(1);
        let (sender, arrivals) = mpsc::channel(capacity);
        // Asking must not take longer than computing what could be found.
        let worthwhile = match shared.config.load {
            LoadPolicy::WhenFaster => {
                shared.cost().fetch_time(TierBytes::default(), now) < wish.compute
            }
            LoadPolicy::Always => true,
        };
        let allowed = shared.breaker().allows(now);
        if !allowed {
            shared.stats.note(Happened::Skipped);
        }
        let skip = wish.chunks == 0 || !worthwhile || !allowed;
        let task = (!skip).then(|| {
            let attended = attend(Arc::clone(shared), Outbox(sender), work);
            shared.runtime.spawn(attended).abort_handle()
        });
        Self {
            shared: Arc::clone(shared),
            arrivals,
            task,
            begun: now,
            patience: match shared.config.load {
                LoadPolicy::WhenFaster => shared.config.lookup_timeout.min(wish.compute),
                LoadPolicy::Always => shared.config.lookup_timeout,
            },
            idle_since: Some(now),
            stage: if skip { Stage::Done } else { Stage::Deciding },
        }
    }
}

impl<A> Inbox<A> {
    pub(crate) fn stage(&self) -> Stage {
        self.stage
    }

    /// It is decided what will be fetched, and how long that may take.
    pub(crate) fn decided(&mut self, budget: Duration) {
        self.patience = budget;
        self.stage = Stage::Loading;
    }

    /// Nothing more is wanted. The task goes on for itself if all that it fetches has come.
    pub(crate) fn close(&mut self, complete: bool) {
        self.stage = Stage::Done;
        // Nor may the task wait for room.
        self.arrivals.close();
        if let Some(task) = self.task.take()
            && !complete
        {
            task.abort();
        }
    }

    /// What has arrived, without waiting.
    pub(crate) fn arrived(&mut self) -> Option<A> {
        if self.stage == Stage::Done {
            return None;
        }
        match self.arrivals.try_recv() {
            Ok((at, arrival)) => self.accept(at, arrival),
            Err(mpsc::error::TryRecvError::Disconnected) => {
                self.stage = Stage::Done;
                None
            }
            Err(mpsc::error::TryRecvError::Empty) => {
                self.idle();
                None
            }
        }
    }

    /// What arrives next, within `longest`. Must not be called on a runtime's own thread.
    pub(crate) fn wait(&mut self, longest: Duration) -> Option<A> {
        if self.stage == Stage::Done {
            return None;
        }
        self.idle_since.get_or_insert_with(Instant::now);
        let longest = longest.min(self.patience);
        let received = self
            .shared
            .runtime
            .block_on(async { tokio::time::timeout(longest, self.arrivals.recv()).await });
        match received {
            // Waking up is part of the wait.
            Ok(Some((_, arrival))) => self.accept(Instant::now(), arrival),
            Ok(None) => {
                self.stage = Stage::Done;
                None
            }
            Err(_) => {
                self.idle();
                None
            }
        }
    }

    fn accept(&mut self, at: Instant, arrival: A) -> Option<A> {
        self.charge(at);
        (self.stage != Stage::Done).then_some(arrival)
    }

    fn idle(&mut self) {
        let now = Instant::now();
        self.charge(now);
        self.idle_since = Some(now);
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
        debug!("the cache is late; computing instead");
        if self.stage == Stage::Loading {
            self.shared.stats.note(Happened::Late);
            self.shared.breaker().failed(self.begun, now);
        }
        self.stage = Stage::Done;
    }
}

impl<A> Drop for Inbox<A> {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl<A> Outbox<A> {
    /// False when nobody waits any more.
    pub(crate) async fn hand_over(&self, arrival: A) -> bool {
        // The time of arrival, not of acceptance: a full channel is the engine's doing.
        let stamped = (Instant::now(), arrival);
        self.0.send(stamped).await.is_ok()
    }
}

/// Runs a fetch, and tells the breaker what it says of the daemon.
async fn attend<A, F>(
    shared: Arc<Shared>,
    outbox: Outbox<A>,
    work: impl FnOnce(Outbox<A>, Instant) -> F,
) where
    F: Future<Output = Result<End, CallError>>,
{
    let begun = Instant::now();
    // The engine takes a closed channel for the end. By then the breaker knows what it was.
    let _open = outbox.0.clone();
    match work(outbox, begun).await {
        Ok(End::Completed) => shared.breaker().succeeded(),
        Ok(End::Abandoned) => {}
        Err(error) => {
            warn!(%error, "the cache failed; computing instead");
            shared.stats.note(Happened::Failed);
            shared.breaker().failed(begun, Instant::now());
        }
    }
}

/// What came of gets, for the cost model.
#[derive(Debug, Default)]
pub(crate) struct Received {
    pub(crate) bytes: u64,
    /// Some of it will not come.
    pub(crate) lost: bool,
    pub(crate) first: Option<Instant>,
    pub(crate) after_first: u64,
    /// Time in which the engine was busy.
    pub(crate) busy: Duration,
}

impl Received {
    pub(crate) fn note(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        match self.first {
            None => self.first = Some(Instant::now()),
            Some(_) => self.after_first += bytes as u64,
        }
    }

    /// What a fetch that was begun then, of what was stored so, says of link and levels.
    pub(crate) fn teach(&self, shared: &Shared, begun: Instant, stored: TierBytes) {
        // What was lost on the way says nothing of how much coarser levels take.
        if !self.lost {
            shared.coder.note_received(self.bytes, stored.total());
        }
        if let Some(first) = self.first {
            let observation = FetchObservation {
                tier: stored.tier(),
                latency: first - begun,
                bytes: self.after_first,
                elapsed: first.elapsed().saturating_sub(self.busy),
            };
            shared.cost().observe_fetch(observation, Instant::now());
        }
    }
}
