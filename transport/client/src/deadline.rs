//! The moment by which a call has ended, one way or the other.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::error::{CallError, Origin};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(timeout: Duration) -> Self {
        let now = Instant::now();
        Self(now.checked_add(timeout).unwrap_or(now + FAR))
    }

    pub(crate) fn at(instant: std::time::Instant) -> Self {
        Self(Instant::from_std(instant))
    }

    pub(crate) fn instant(self) -> std::time::Instant {
        self.0.into_std()
    }

    pub(crate) fn has_passed(self) -> bool {
        Instant::now() >= self.0
    }

    pub(crate) fn allows(self, wait: Duration) -> bool {
        wait < self.0.saturating_duration_since(Instant::now())
    }

    /// Runs one exchange with the daemon, but not longer. After the deadline none
    /// begins; a result that is ready when the deadline is noticed still counts.
    pub(crate) async fn bound<T>(
        self,
        origin: &Origin,
        exchange: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, CallError> {
        if self.has_passed() {
            return Err(CallError::DeadlineExceeded);
        }
        match timeout_at(self.0, exchange).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(status)) => Err(origin.error(status)),
            Err(_) => Err(CallError::DeadlineExceeded),
        }
    }
}

/// Stands for "never" where a timeout is too long to add to the clock.
const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365);
