//! A holder that tasks share: those that carry its frames, and those that read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::Notify;

use crate::path::until;
use crate::session::{Config, Frame, Holder, HolderEvent, Read, RequestId, Violation};
use crate::source::{Lost, Source, Thing};

/// A holder of one connection, and what it has open.
#[derive(Debug)]
pub(crate) struct Shared<S: Source> {
    source: Arc<S>,
    state: Mutex<State<S::Thing>>,
    /// There may be frames to send.
    pub(crate) work: Notify,
    /// Timers may have changed.
    pub(crate) timers: Notify,
    /// There may be something to open or to read.
    reads: Notify,
}

#[derive(Debug)]
struct State<T> {
    holder: Holder,
    open: HashMap<RequestId, Arc<T>>,
}

/// What is to be done besides.
enum Job<T> {
    Opened(RequestId, Result<T, bytes::Bytes>),
    Read(Read, Result<Vec<bytes::Bytes>, Lost>),
}

impl<S: Source> Shared<S> {
    pub(crate) fn new(config: Config, source: Arc<S>) -> Self {
        Self {
            source,
            state: Mutex::new(State {
                holder: Holder::new(config),
                open: HashMap::new(),
            }),
            work: Notify::new(),
            timers: Notify::new(),
            reads: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State<S::Thing>> {
        // A panic elsewhere leaves a holder as it was between two calls.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes frames.
    pub(crate) fn take(&self, frames: impl IntoIterator<Item = Frame>) -> Result<(), Violation> {
        let now = Instant::now();
        let taken = {
            let mut state = self.state();
            let mut frames = frames.into_iter();
            frames.try_for_each(|frame| state.holder.on_frame(now, frame))
        };
        self.reads.notify_one();
        self.work.notify_one();
        self.timers.notify_one();
        taken
    }

    /// The next frame to send.
    pub(crate) fn next_frame(&self) -> Option<Frame> {
        let frame = self.state().holder.poll_frame(Instant::now());
        if frame.is_some() {
            // There is room to read ahead.
            self.reads.notify_one();
        }
        frame
    }

    /// When [`on_timeout`](Self::on_timeout) is due.
    pub(crate) fn timeout(&self) -> Option<Instant> {
        self.state().holder.timeout()
    }

    pub(crate) fn on_timeout(&self) {
        self.state().holder.on_timeout(Instant::now());
        self.reads.notify_one();
    }

    pub(crate) fn drain(&self) {
        self.state().holder.drain();
        self.work.notify_one();
    }

    /// Whether it drains, and nothing is left.
    pub(crate) fn is_drained(&self) -> bool {
        let holder = &self.state().holder;
        holder.is_draining() && holder.is_idle()
    }

    /// How much a request matters.
    pub(crate) fn priority(&self, request: RequestId) -> Option<u32> {
        self.state().holder.priority(request)
    }

    /// Whether a request is still served.
    pub(crate) fn serves(&self, request: RequestId) -> bool {
        self.state().holder.serves(request)
    }

    /// Opens and reads what is asked for, for as long as it is polled.
    pub(crate) async fn read(&self) -> std::convert::Infallible {
        let mut jobs = FuturesUnordered::new();
        loop {
            let (asked, reads) = self.due();
            for (request, body, deadline) in asked {
                let source = Arc::clone(&self.source);
                let job = async move { Job::Opened(request, source.open(body, deadline).await) };
                jobs.push(futures::future::Either::Left(job));
            }
            for (read, thing) in reads {
                let job = async move {
                    let bytes = thing.read(read.range.clone()).await;
                    Job::Read(read, bytes)
                };
                jobs.push(futures::future::Either::Right(job));
            }
            tokio::select! {
                Some(job) = jobs.next(), if !jobs.is_empty() => self.done(job),
                () = self.reads.notified() => {}
            }
        }
    }

    /// What is to be opened, and to be read.
    #[expect(clippy::type_complexity, reason = "two lists that are used at once")]
    fn due(
        &self,
    ) -> (
        Vec<(RequestId, bytes::Bytes, Option<Instant>)>,
        Vec<(Read, Arc<S::Thing>)>,
    ) {
        let mut state = self.state();
        let (mut asked, mut reads) = (Vec::new(), Vec::new());
        while let Some(event) = state.holder.poll_event() {
            match event {
                HolderEvent::Asked {
                    request,
                    body,
                    deadline,
                } => asked.push((request, body, deadline)),
                HolderEvent::Ended { request } => {
                    state.open.remove(&request);
                    // Its stream is to be closed.
                    self.work.notify_one();
                }
                HolderEvent::Connected(agreement) => {
                    tracing::debug!(version = agreement.version, "a fetcher connected");
                }
            }
        }
        let State { holder, open } = &mut *state;
        let end =
            |request: RequestId, at: u64| open.get(&request).map_or(at, |thing| thing.end_of(at));
        while let Some(read) = holder.poll_read(end) {
            match open.get(&read.request) {
                Some(thing) => reads.push((read, Arc::clone(thing))),
                None => holder.lose(&read, all_of(&read)),
            }
        }
        (asked, reads)
    }

    fn done(&self, job: Job<S::Thing>) {
        let mut state = self.state();
        match job {
            Job::Opened(request, Ok(thing)) => {
                // Not where it was given up meanwhile.
                if state.holder.serves(request) {
                    let (total, description) = (thing.total(), thing.description());
                    state.holder.describe(request, total, description);
                    state.open.insert(request, Arc::new(thing));
                }
            }
            Job::Opened(request, Err(body)) => state.holder.refuse(request, body),
            Job::Read(read, Ok(pieces)) => {
                let all = pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
                let mut rest = read.clone();
                if (1..=read.range.end - read.range.start).contains(&all) {
                    for piece in pieces {
                        let length = piece.len() as u64;
                        state.holder.supply(read.request, rest.range.start, piece);
                        rest.range.start += length;
                    }
                    state.holder.put_off(&rest);
                } else {
                    // A thing owes some of them; the fetcher is not to wait for ever.
                    state.holder.lose(&read, all_of(&read));
                }
            }
            Job::Read(read, Err(lost)) => state.holder.lose(&read, lost),
        }
        drop(state);
        self.work.notify_one();
        // Something may have been put off.
        self.reads.notify_one();
    }
}

/// All that was to be read.
fn all_of(read: &Read) -> Lost {
    Lost {
        ranges: vec![read.range.clone()],
        reason: 0,
    }
}

/// Keeps a holder's timers.
pub(crate) async fn expire<S: Source>(shared: &Shared<S>) -> std::convert::Infallible {
    loop {
        let at = shared.timeout();
        tokio::select! {
            () = until(at) => shared.on_timeout(),
            () = shared.timers.notified() => {}
        }
    }
}
