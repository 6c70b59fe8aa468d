//! The end of a server: requests in progress get some time.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Runs `serving` to its end. The first signal sends `drain`; `timeout` later, or
/// at a second signal, it is abandoned and there is no result.
pub(super) async fn until_drained<T>(
    serving: impl Future<Output = T>,
    mut signal: impl AsyncFnMut(),
    drain: oneshot::Sender<()>,
    timeout: Duration,
) -> Option<T> {
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        result = &mut serving => return Some(result),
        () = signal() => {}
    }
    tracing::info!(
        ?timeout,
        "shutting down; another signal ends requests in progress"
    );
    // A server that ended meanwhile needs no telling.
    let _ = drain.send(());
    tokio::select! {
        result = serving => return Some(result),
        () = tokio::time::sleep(timeout) => tracing::warn!("requests outlast the drain timeout"),
        () = signal() => tracing::warn!("requests are ended by a second signal"),
    }
    None
}

/// SIGINT and SIGTERM.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// From here on, they do not end the process by themselves.
    pub(super) fn watch() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Completes at the next one.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    #[tokio::test]
    async fn a_signal_drains() {
        let (drain, draining) = oneshot::channel();
        let mut signals = 1;
        let signal = async || match signals {
            0 => pending().await,
            _ => signals -= 1,
        };
        let drained = until_drained(draining, signal, drain, LONG).await;
        assert_eq!(drained, Some(Ok(())));
    }

    #[tokio::test]
    async fn a_server_that_ends_is_not_waited_for() {
        let (drain, _draining) = oneshot::channel();
        let ended = until_drained(ready(5), async || pending().await, drain, LONG).await;
        assert_eq!(ended, Some(5));
    }

    #[tokio::test]
    async fn the_timeout_and_a_second_signal_end_the_drain() {
        for (mut signals, timeout) in [(1, Duration::from_millis(10)), (2, LONG)] {
            let (drain, _draining) = oneshot::channel();
            let signal = async || match signals {
                0 => pending().await,
                _ => signals -= 1,
            };
            let drained = until_drained(pending::<()>(), signal, drain, timeout).await;
            assert_eq!(drained, None);
        }
    }
}
