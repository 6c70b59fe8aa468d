//! A fetcher that tasks share: those that carry its frames, and those that wait for bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

use crate::session::{Config, FailReason, FetchEvent, Fetcher, Frame, RequestId, Violation};

/// How much a request matters, and how long somebody waits for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchOptions {
    /// More is sooner. Default: 0.
    pub priority: u32,
    /// Default: none.
    pub deadline: Option<Instant>,
}

/// One request under way. Dropping it gives it up.
#[derive(Debug)]
pub struct Fetch {
    request: RequestId,
    events: mpsc::UnboundedReceiver<FetchEvent>,
    shared: Arc<Shared>,
    /// Without it nothing comes.
    _carrier: Carrier,
}

/// The tasks that carry a connection's frames, for as long as anybody needs them.
pub(crate) type Carrier = Arc<JoinSet<()>>;

/// A fetcher, who waits for what, and who is to send.
#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// There may be frames to send.
    pub(crate) work: Notify,
    /// Timers may have changed.
    pub(crate) timers: Notify,
}

#[derive(Debug)]
struct State {
    fetcher: Fetcher,
    /// Data in these is bounded by the credit of the session.
    waiting: HashMap<RequestId, mpsc::UnboundedSender<FetchEvent>>,
}

impl Shared {
    pub(crate) fn new(config: Config) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                fetcher: Fetcher::new(config),
                waiting: HashMap::new(),
            }),
            work: Notify::new(),
            timers: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves a fetcher as it was between two calls.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self) {
        self.work.notify_one();
        self.timers.notify_one();
    }

    /// Does something with the fetcher, and passes on what comes of it.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut Fetcher) -> T) -> T {
        let mut state = self.state();
        let done = act(&mut state.fetcher);
        while let Some(event) = state.fetcher.poll_event() {
            state.pass_on(event);
        }
        drop(state);
        self.notify();
        done
    }

    /// Takes frames.
    pub(crate) fn take(&self, frames: impl IntoIterator<Item = Frame>) -> Result<(), Violation> {
        let now = Instant::now();
        self.with(|fetcher| {
            let mut frames = frames.into_iter();
            frames.try_for_each(|frame| fetcher.on_frame(now, frame))
        })
    }

    /// The next frame to send.
    pub(crate) fn next_frame(&self) -> Option<Frame> {
        self.state().fetcher.poll_frame()
    }

    /// When [`on_timeout`](Self::on_timeout) is due.
    pub(crate) fn timeout(&self) -> Option<Instant> {
        self.state().fetcher.timeout()
    }

    pub(crate) fn on_timeout(&self) {
        self.with(|fetcher| fetcher.on_timeout(Instant::now()));
    }

    pub(crate) fn round_trip(&self) -> Option<Duration> {
        self.state().fetcher.round_trip()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.state().fetcher.is_draining()
    }

    pub(crate) fn fetch(
        self: &Arc<Self>,
        body: Bytes,
        options: FetchOptions,
        carrier: &Carrier,
    ) -> Fetch {
        let (sender, events) = mpsc::unbounded_channel();
        let mut state = self.state();
        let FetchOptions { priority, deadline } = options;
        let request = state
            .fetcher
            .fetch(Instant::now(), body, priority, deadline);
        state.waiting.insert(request, sender);
        drop(state);
        self.notify();
        Fetch {
            request,
            events,
            shared: Arc::clone(self),
            _carrier: Arc::clone(carrier),
        }
    }
}

impl State {
    fn pass_on(&mut self, event: FetchEvent) {
        let (request, ends) = match &event {
            FetchEvent::Described { request, .. }
            | FetchEvent::Data { request, .. }
            | FetchEvent::Lost { request, .. } => (*request, false),
            FetchEvent::Complete { request }
            | FetchEvent::Refused { request, .. }
            | FetchEvent::Failed { request, .. } => (*request, true),
            FetchEvent::Connected(_) | FetchEvent::Draining => return,
        };
        if ends {
            if let Some(waiting) = self.waiting.remove(&request) {
                // Nobody waits where this fails.
                let _ = waiting.send(event);
            }
        } else if let Some(waiting) = self.waiting.get(&request) {
            let _ = waiting.send(event);
        }
    }
}

impl Fetch {
    /// What happens next; `None` after the request has ended, with
    /// [`FetchEvent::Complete`], [`FetchEvent::Refused`] or [`FetchEvent::Failed`].
    ///
    /// Data counts against the session's credit until it is taken here.
    pub async fn next(&mut self) -> Option<FetchEvent> {
        let event = self.events.recv().await?;
        if let FetchEvent::Data { bytes, .. } = &event {
            let length = bytes.len() as u64;
            self.shared.with(|fetcher| fetcher.consumed(length));
        }
        Some(event)
    }

    /// All bytes of it, and what they are. For requests that are small.
    ///
    /// # Errors
    /// Why there are none.
    pub async fn all(mut self) -> Result<(Bytes, Vec<u8>), FetchError> {
        let mut described = Bytes::new();
        let mut all = Vec::new();
        while let Some(event) = self.next().await {
            match event {
                FetchEvent::Described { total, body, .. } => {
                    described = body;
                    all.resize(usize::try_from(total).unwrap_or(usize::MAX), 0);
                }
                FetchEvent::Data { offset, bytes, .. } => {
                    let at = usize::try_from(offset).unwrap_or(usize::MAX);
                    if let Some(place) = all.get_mut(at..at.saturating_add(bytes.len())) {
                        place.copy_from_slice(&bytes);
                    }
                }
                FetchEvent::Complete { .. } => return Ok((described, all)),
                FetchEvent::Lost { .. } => return Err(FetchError::Lost),
                FetchEvent::Refused { body, .. } => return Err(FetchError::Refused(body)),
                FetchEvent::Failed { reason, .. } => return Err(FetchError::Failed(reason)),
                FetchEvent::Connected(_) | FetchEvent::Draining => {}
            }
        }
        Err(FetchError::Closed)
    }

    /// Makes it matter more, or less.
    pub fn prioritise(&self, priority: u32) {
        let request = self.request;
        self.shared
            .with(|fetcher| fetcher.prioritise(request, priority));
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        let mut untaken = 0;
        self.events.close();
        while let Ok(event) = self.events.try_recv() {
            if let FetchEvent::Data { bytes, .. } = event {
                untaken += bytes.len() as u64;
            }
        }
        let mut state = self.shared.state();
        state.waiting.remove(&self.request);
        state.fetcher.cancel(self.request);
        state.fetcher.consumed(untaken);
        drop(state);
        self.shared.notify();
    }
}

/// Why a request has not all of its bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The holder does not have it, or not now.
    #[error("the holder refused")]
    Refused(Bytes),
    /// Some of it cannot be read.
    #[error("the holder lost some of it")]
    Lost,
    /// It ended before.
    #[error(transparent)]
    Failed(#[from] FailReason),
    /// The connection was closed by this end.
    #[error("the connection was closed")]
    Closed,
}
