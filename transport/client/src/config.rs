//! How a client behaves.

use std::time::Duration;

use crate::Endpoint;

/// Settings of a [`Client`](crate::Client).
///
/// ```
/// use std::time::Duration;
/// use kvasir_client::{ClientConfig, RetryConfig};
///
/// let config = ClientConfig {
///     endpoint: "127.0.0.1:7420".parse()?,
///     call_timeout: Duration::from_millis(200),
///     retry: RetryConfig::NEVER,
///     ..ClientConfig::default()
/// };
/// # assert_eq!(config.retry.attempts, 1);
/// # Ok::<(), kvasir_client::ParseEndpointError>(())
/// ```
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Where the daemon listens. Default: `127.0.0.1:7420`.
    pub endpoint: Endpoint,
    /// Longest wait for one TCP connection. Default: 2 s.
    pub connect_timeout: Duration,
    /// Deadline of a call that moves no payload, retries included. Default: 5 s.
    pub call_timeout: Duration,
    /// Deadline of a whole put, get or list, retries included. Default: 60 s.
    pub transfer_timeout: Duration,
    /// When to repeat a call.
    pub retry: RetryConfig,
    /// Bytes the daemon may send ahead of the reader, per stream and per
    /// connection. The connection's share bounds the memory that all unread
    /// streams of this client hold together. Default: 16 MiB.
    pub window_bytes: u32,
    /// Silence after which the connection is probed while calls are open; it
    /// counts as lost after another such time. Default: 10 s.
    pub keep_alive: Duration,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            endpoint: Endpoint::default(),
            connect_timeout: Duration::from_secs(2),
            call_timeout: Duration::from_secs(5),
            transfer_timeout: Duration::from_secs(60),
            retry: RetryConfig::default(),
            window_bytes: 16 << 20,
            keep_alive: Duration::from_secs(10),
        }
    }
}

/// When and how often a call is repeated.
///
/// Before attempt `n + 1` the client waits a random time between zero and
/// `min(max, base · 2ⁿ⁻¹)` ("full jitter"), on top of the time the daemon asks
/// for, and gives up when that wait would end after the deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryConfig {
    /// Attempts in all; 1 never repeats. Default: 4.
    pub attempts: u32,
    /// Upper bound of the first wait. Default: 25 ms.
    pub base: Duration,
    /// Upper bound of every wait. Default: 1 s.
    pub max: Duration,
}

impl RetryConfig {
    /// One attempt: for callers that would rather compute than wait.
    pub const NEVER: Self = Self {
        attempts: 1,
        base: Duration::ZERO,
        max: Duration::ZERO,
    };
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self {
            attempts: 4,
            base: Duration::from_millis(25),
            max: Duration::from_secs(1),
        }
    }
}
