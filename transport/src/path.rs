//! A way to a holder, whatever carries it.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::fetching::{Fetch, FetchOptions, Shared, Tasks};

/// A connection to a holder, which comes back by itself. Clones are handles to the same one;
/// it ends with the last of them, and of its [`Fetch`]es.
///
/// One type for all carriers, which differ in what their tasks do and in nothing that a
/// fetcher sees: one suite of tests holds all of them to it.
#[derive(Clone, Debug)]
pub struct DataPath {
    shared: Arc<Shared>,
    connected: watch::Receiver<bool>,
    tasks: Tasks,
}

/// What carries a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Carrier {
    /// QUIC over UDP; see [`quic`](crate::quic).
    Quic,
    /// Memory of the holder, on the same host; see [`shm`](crate::shm).
    SharedMemory,
    /// One-sided reads of the holder's memory, with the feature `rdma`; what is small or lies
    /// elsewhere comes over QUIC.
    Rdma,
}

/// How a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// What carries it, or did so last.
    pub carrier: Carrier,
    /// Whether it is there now.
    pub connected: bool,
    /// Whether the holder is shutting down.
    pub draining: bool,
    /// The round trip, smoothed, once it was measured.
    pub round_trip: Option<Duration>,
}

impl DataPath {
    /// Lets `one` connect, and carry frames until the connection ends: again and again, with
    /// pauses that grow up to `most_backoff`.
    pub(crate) fn carried_by<E, F>(
        shared: Arc<Shared>,
        most_backoff: Duration,
        mut one: impl FnMut(Arc<Shared>) -> F + Send + 'static,
    ) -> Self
    where
        E: std::error::Error + Send + 'static,
        F: Future<Output = Result<Infallible, E>> + Send,
    {
        let connected = shared.open.subscribe();
        let mut tasks = JoinSet::new();
        tasks.spawn({
            let shared = Arc::clone(&shared);
            async move {
                let mut backoff = FIRST_BACKOFF;
                loop {
                    let begun = Instant::now();
                    let ended = tokio::select! {
                        ended = one(Arc::clone(&shared)) => ended,
                        // Deadlines pass also without a connection.
                        never = expire(&shared) => match never {},
                    };
                    shared.disconnect();
                    report(shared.carrier(), ended);
                    if begun.elapsed() > most_backoff {
                        backoff = FIRST_BACKOFF;
                    }
                    tokio::select! {
                        () = tokio::time::sleep(backoff) => {}
                        never = expire(&shared) => match never {},
                    }
                    backoff = (backoff * 2).min(most_backoff);
                }
            }
        });
        Self {
            shared,
            connected,
            tasks: Arc::new(tasks),
        }
    }

    /// Asks for something.
    pub fn fetch(&self, body: Bytes, options: FetchOptions) -> Fetch {
        self.shared.fetch(body, options, &self.tasks)
    }

    /// How it is.
    pub fn status(&self) -> Status {
        Status {
            carrier: self.shared.carrier(),
            connected: *self.connected.borrow(),
            draining: self.shared.is_draining(),
            round_trip: self.shared.round_trip(),
        }
    }

    /// Waits until it is there.
    pub async fn connected(&self) {
        // Its task lasts as long as this handle.
        let _ = self
            .connected
            .clone()
            .wait_for(|&connected| connected)
            .await;
    }

    /// Waits until it is not there.
    pub async fn disconnected(&self) {
        let _ = self
            .connected
            .clone()
            .wait_for(|&connected| !connected)
            .await;
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Quic => "quic",
            Self::SharedMemory => "shared memory",
            Self::Rdma => "rdma",
        })
    }
}

fn report<E: std::error::Error + 'static>(carrier: Carrier, ended: Result<Infallible, E>) {
    let Err(error) = ended;
    let error = &error as &dyn std::error::Error;
    tracing::debug!(%carrier, error, "disconnected");
}

/// Keeps a fetcher's timers.
async fn expire(shared: &Shared) -> Infallible {
    loop {
        let at = shared.timeout();
        tokio::select! {
            () = until(at) => shared.on_timeout(),
            () = shared.timers.notified() => {}
        }
    }
}

/// Until `at`, or for ever.
pub(crate) async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Before the second try.
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
