//! Who may start a transfer, and when transfers must end.

use std::sync::Arc;
use std::time::Duration;

use kvasir_proto::status;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// The gate of puts and gets.
#[derive(Debug)]
pub(crate) struct Admission {
    streams: Arc<Semaphore>,
    limit: u32,
    /// Shutdown has begun: nothing new starts.
    pub(crate) draining: CancellationToken,
    /// Shutdown has waited long enough: what runs ends.
    pub(crate) aborting: CancellationToken,
}

impl Admission {
    pub(crate) fn new(streams: u32) -> Self {
        let limit = streams.max(1);
        let permits = usize::try_from(limit).unwrap_or(Semaphore::MAX_PERMITS);
        Self {
            streams: Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS))),
            limit,
            draining: CancellationToken::new(),
            aborting: CancellationToken::new(),
        }
    }

    /// Admits one transfer, until the permit is dropped.
    pub(crate) fn transfer(&self) -> Result<OwnedSemaphorePermit, Status> {
        if self.draining.is_cancelled() {
            return Err(shutting_down());
        }
        Arc::clone(&self.streams)
            .try_acquire_owned()
            .map_err(|_| status::come_back("too many puts and gets at once", BUSY))
    }

    /// Waits until no transfer is in progress.
    pub(crate) async fn idle(&self) {
        // An error would mean a closed semaphore, which nobody closes.
        let _ = self.streams.acquire_many(self.limit).await;
    }
}

pub(crate) fn shutting_down() -> Status {
    Status::unavailable("the daemon is shutting down")
}

/// About the time of one transfer.
const BUSY: Duration = Duration::from_millis(50);
