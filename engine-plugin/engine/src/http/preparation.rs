//! Parsing and encoding of requests, off the async workers.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::error::ApiError;

/// Where bodies are parsed and prompts encoded: a bounded number at once, and
/// a bounded number that wait; more are refused.
#[derive(Debug)]
pub struct Preparation {
    /// One permit for each request here, waiting or not.
    places: Arc<Semaphore>,
    /// One permit for each that runs.
    turns: Arc<Semaphore>,
}

impl Preparation {
    /// Prepares `running` requests at once, at least one, while up to `waiting`
    /// wait. Each holds its body.
    pub fn new(running: usize, waiting: usize) -> Self {
        let running = running.max(1);
        Self {
            places: Arc::new(Semaphore::new(running + waiting)),
            turns: Arc::new(Semaphore::new(running)),
        }
    }

    /// Default of the requests that may wait; as many as wait for pages.
    pub const WAITING: usize = 256;

    /// Runs `work` on a thread that may block.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let place = Arc::clone(&self.places)
            .try_acquire_owned()
            .map_err(|_| ApiError::Busy)?;
        let turn = Arc::clone(&self.turns)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        // Work goes on when its client leaves, so it keeps its permits itself.
        let work = move || {
            let _held = (turn, place);
            work()
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(ApiError::Worker)?
    }
}

impl Default for Preparation {
    /// One per core at once, [`Self::WAITING`] waiting.
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::new(cores, Self::WAITING)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn more_than_may_wait_are_refused() {
        let preparation = Preparation::new(1, 1);
        let (finish, finished) = mpsc::channel::<()>();
        let block = move || {
            finished.recv().expect("the test lets go");
            Ok(1)
        };
        let mut first = Box::pin(preparation.run(block));
        assert!(first.as_mut().now_or_never().is_none(), "runs");
        // Its client leaves; the work does not.
        drop(first);
        let mut second = Box::pin(preparation.run(|| Ok(2)));
        assert!(second.as_mut().now_or_never().is_none(), "waits");
        let third = preparation.run(|| Ok(3)).await;
        assert!(matches!(third, Err(ApiError::Busy)));

        finish.send(()).expect("the first waits");
        assert!(matches!(second.await, Ok(2)));
        assert!(matches!(preparation.run(|| Ok(4)).await, Ok(4)));
    }
}
