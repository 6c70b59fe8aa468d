//! A fetcher that tasks share: those that carry its frames, and those that wait for bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use crate::path::Carrier;
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
    /// Bytes that were handed out and that the fetcher does not know of.
    taken: u64,
    shared: Arc<Shared>,
    /// Without it nothing comes.
    _tasks: Tasks,
}

/// The tasks that carry a connection's frames, for as long as anybody needs them.
pub(crate) type Tasks = Arc<JoinSet<()>>;

/// A fetcher, who waits for what, and who is to send.
#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// There may be frames to send.
    pub(crate) work: Notify,
    /// Timers may have changed.
    pub(crate) timers: Notify,
    /// Whether the ends know each other.
    pub(crate) open: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    fetcher: Fetcher,
    carrier: Carrier,
    /// Data in these is bounded by the credit of the session.
    waiting: HashMap<RequestId, mpsc::UnboundedSender<FetchEvent>>,
    /// That of the fetcher, when it was last looked at.
    timeout: Option<Instant>,
}

impl Shared {
    /// Of a path that `carrier` is to carry.
    pub(crate) fn new(config: Config, carrier: Carrier) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                fetcher: Fetcher::new(config),
                carrier,
                waiting: HashMap::new(),
                timeout: None,
            }),
            work: Notify::new(),
            timers: Notify::new(),
            open: watch::Sender::new(false),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves a fetcher as it was between two calls.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the fetcher, and passes on what comes of it.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut Fetcher) -> T) -> T {
        self.act(|state| act(&mut state.fetcher))
    }

    fn act<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let done = act(&mut state);
        while let Some(event) = state.fetcher.poll_event() {
            if let FetchEvent::Connected(agreement) = event {
                tracing::debug!(version = agreement.version, "connected to a holder");
                self.open.send_replace(true);
            }
            state.pass_on(event);
        }
        // Tasks are woken for what concerns them: most of what comes is data.
        let timeout = state.fetcher.timeout();
        let sooner = timeout != std::mem::replace(&mut state.timeout, timeout);
        let sends = state.fetcher.has_frames();
        drop(state);
        if sends {
            self.work.notify_one();
        }
        if sooner {
            self.timers.notify_one();
        }
        done
    }

    /// A connection is there, and `carrier` carries it.
    pub(crate) fn connect(&self, carrier: Carrier) {
        self.act(|state| {
            state.carrier = carrier;
            state.fetcher.connect(Instant::now());
        });
    }

    /// What carries it, or did so last.
    pub(crate) fn carrier(&self) -> Carrier {
        self.state().carrier
    }

    /// It is gone.
    pub(crate) fn disconnect(&self) {
        self.with(Fetcher::disconnect);
        self.open.send_replace(false);
    }

    /// Waits until the ends know each other.
    pub(crate) async fn opened(&self) {
        // Its sender is here.
        let _ = self.open.subscribe().wait_for(|&open| open).await;
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
        tasks: &Tasks,
    ) -> Fetch {
        let (sender, events) = mpsc::unbounded_channel();
        let FetchOptions { priority, deadline } = options;
        let now = Instant::now();
        let request = self.act(|state| {
            let request = state.fetcher.fetch(now, body, priority, deadline);
            state.waiting.insert(request, sender);
            request
        });
        Fetch {
            request,
            events,
            taken: 0,
            shared: Arc::clone(self),
            _tasks: Arc::clone(tasks),
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
        } else if let Some(waiting) = self.waiting.get(&request)
            && let Err(unsent) = waiting.send(event)
            && let FetchEvent::Data { bytes, .. } = unsent.0
        {
            // Whoever waited is about to give it up, and does not take these any more.
            self.fetcher.consumed(bytes.len() as u64);
        }
    }
}

impl Fetch {
    /// What happens next; `None` after the request has ended, with
    /// [`FetchEvent::Complete`], [`FetchEvent::Refused`] or [`FetchEvent::Failed`].
    ///
    /// Data counts against the session's credit until it is taken here.
    pub async fn next(&mut self) -> Option<FetchEvent> {
        let event = match self.events.try_recv() {
            Ok(event) => Some(event),
            Err(_) => {
                self.tell();
                self.events.recv().await
            }
        }?;
        if let FetchEvent::Data { bytes, .. } = &event {
            self.taken += bytes.len() as u64;
            if self.taken >= TELL_AFTER {
                self.tell();
            }
        }
        Some(event)
    }

    /// Lets the fetcher know what was taken.
    fn tell(&mut self) {
        let taken = std::mem::take(&mut self.taken);
        if taken > 0 {
            self.shared.with(|fetcher| fetcher.consumed(taken));
        }
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
        self.shared.act(|state| {
            state.waiting.remove(&self.request);
            state.fetcher.cancel(self.request);
            state.fetcher.consumed(untaken + self.taken);
        });
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

/// Data comes in packets; the fetcher need not hear of every one that is taken.
const TELL_AFTER: u64 = 64 << 10;
