//! How a client behaves.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvasir_transport::quic::{Identity, TlsError, Trust};

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
    /// Which way gets go. Default: the best that the daemon offers.
    pub data_plane: DataPlane,
    /// The RDMA device that reads, such as `mlx5_0`; only with the feature `rdma`. Some 16 MiB of
    /// memory are locked for it. Default: the first that is usable, if there is one.
    pub rdma_device: Option<String>,
    /// Whom the data plane believes. Default: whom the control calls name.
    pub tls: TlsConfig,
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
            data_plane: DataPlane::default(),
            rdma_device: None,
            tls: TlsConfig::default(),
            window_bytes: 16 << 20,
            keep_alive: Duration::from_secs(10),
        }
    }
}

/// Which way gets go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataPlane {
    /// The best that the daemon offers and that can be reached: shared memory on one host,
    /// else RDMA, with the feature `rdma` and a device at both ends, else QUIC, else gRPC.
    #[default]
    Best,
    /// RDMA, also on one host, else QUIC, else gRPC.
    Rdma,
    /// QUIC, also on one host, else gRPC.
    Quic,
    /// gRPC, like all other calls.
    Grpc,
}

/// Whom the data plane believes, and who this client is.
#[derive(Clone, Debug, Default)]
pub struct TlsConfig {
    /// Who must vouch for the daemon. Default: the certificate that the daemon names over its
    /// control calls, which is as good as these are.
    pub trust: Option<Trust>,
    /// The name in the daemon's certificate. Default: the host of the endpoint, or what the
    /// daemon calls itself where its certificate vouches for itself.
    pub server_name: Option<String>,
    /// Who this client is, for daemons that ask. Default: nobody.
    pub identity: Option<Arc<Identity>>,
}

impl TlsConfig {
    /// Of files in PEM: certificates that must vouch for the daemon; this client's
    /// certificate, and its key.
    ///
    /// # Errors
    /// [`TlsFileError`]
    pub fn from_files(
        trust: Option<PathBuf>,
        identity: Option<(PathBuf, PathBuf)>,
    ) -> Result<Self, TlsFileError> {
        let read = |path: &PathBuf| {
            fs::read(path).map_err(|source| TlsFileError::Read {
                path: path.clone(),
                source,
            })
        };
        let refused = |path: PathBuf| |source| TlsFileError::Tls { path, source };
        let mut config = Self::default();
        if let Some(path) = trust {
            let trust = Trust::from_pem(&read(&path)?);
            config.trust = Some(trust.map_err(refused(path))?);
        }
        if let Some((certificate, key)) = identity {
            let identity = Identity::from_pem(&read(&certificate)?, &read(&key)?);
            config.identity = Some(Arc::new(identity.map_err(refused(certificate))?));
        }
        Ok(config)
    }
}

/// Why files do not make a [`TlsConfig`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsFileError {
    /// One cannot be read.
    #[error("cannot read {path}; `kvasir cert` makes certificates")]
    Read {
        /// The file.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// One holds no certificate or no key.
    #[error("{path} cannot be used; `kvasir cert` makes certificates that can")]
    Tls {
        /// The file, or the certificate of a key.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: TlsError,
    },
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
