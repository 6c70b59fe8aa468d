//! Who may start a transfer, and when transfers must end.

use std::sync::Arc;
use std::time::Duration;

use kvasir_proto::status;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::config::Limits;

/// The gate of calls that stream.
#[derive(Debug)]
pub(crate) struct Admission {
    streams: Arc<Semaphore>,
    limit: u32,
    watchers: Arc<Semaphore>,
    /// Clients that follow where the data plane is.
    clients: Arc<Semaphore>,
    /// Shutdown has begun: nothing new starts.
    pub(crate) draining: CancellationToken,
    /// Shutdown has waited long enough: what runs ends.
    pub(crate) aborting: CancellationToken,
}

impl Admission {
    pub(crate) fn new(limits: &Limits) -> Self {
        let limit = limits.data_streams.max(1);
        Self {
            streams: semaphore(limit),
            limit,
            watchers: semaphore(limits.watchers.max(1)),
            clients: semaphore(limits.connections.max(1)),
            draining: CancellationToken::new(),
            aborting: CancellationToken::new(),
        }
    }

    /// Admits one put or get, until the permit is dropped.
    pub(crate) fn transfer(&self) -> Result<OwnedSemaphorePermit, Status> {
        self.admit(&self.streams, "too many puts and gets at once")
    }

    /// Admits one watch or listing, until the permit is dropped.
    pub(crate) fn watcher(&self) -> Result<OwnedSemaphorePermit, Status> {
        self.admit(&self.watchers, "too many watches and listings at once")
    }

    /// Admits one client that follows where the data plane is, until the permit is dropped.
    pub(crate) fn client(&self) -> Result<OwnedSemaphorePermit, Status> {
        self.admit(&self.clients, "too many clients at once")
    }

    fn admit(&self, gate: &Arc<Semaphore>, full: &str) -> Result<OwnedSemaphorePermit, Status> {
        if self.draining.is_cancelled() {
            return Err(shutting_down());
        }
        Arc::clone(gate)
            .try_acquire_owned()
            .map_err(|_| status::come_back(full, BUSY))
    }

    /// Waits until no transfer is in progress.
    pub(crate) async fn idle(&self) {
        // An error would mean a closed semaphore, which nobody closes.
        let _ = self.streams.acquire_many(self.limit).await;
    }
}

fn semaphore(permits: u32) -> Arc<Semaphore> {
    let permits = usize::try_from(permits).unwrap_or(Semaphore::MAX_PERMITS);
    Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)))
}

pub(crate) fn shutting_down() -> Status {
    Status::unavailable("the daemon is shutting down")
}

/// About the time of one transfer.
const BUSY: Duration = Duration::from_millis(50);
