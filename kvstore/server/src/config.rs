//! What a server needs to know.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use kvasir_store::StoreConfig;
use kvasir_types::ByteSize;
use serde::{Deserialize, Serialize};

/// Everything [`Server::start`](crate::Server::start) needs.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The store's tiers.
    pub store: StoreConfig,
    /// What bounds the load.
    pub limits: Limits,
    /// The data plane over QUIC.
    pub quic: QuicSettings,
    /// The data plane on one host.
    pub shared_memory: SharedMemorySettings,
    /// The data plane by one-sided reads.
    pub rdma: RdmaSettings,
}

/// `[rdma]` in `kvasird.toml`: one-sided reads of the daemon's memory by other hosts, at the
/// address of `[quic]`. Daemons that are built without the feature `rdma` have none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct RdmaSettings {
    /// Whether to offer them, where there is a device. Memory that was lent is locked: the
    /// limit of locked memory has to allow for the capacity of the memory tier. Default: true.
    pub enabled: bool,
    /// The device's name, such as `mlx5_0`; then it has to be there. Default: the first that
    /// is usable, if there is one.
    pub device: Option<String>,
}

impl Default for RdmaSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            device: None,
        }
    }
}

/// `[shared-memory]` in `kvasird.toml`: the data plane between processes of one user on one
/// host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct SharedMemorySettings {
    /// Whether to offer it. Default: true.
    pub enabled: bool,
    /// Path of the socket, in a directory that only this user can enter. Default: named after
    /// the port of the control calls, in `$XDG_RUNTIME_DIR/kvasir`, else in `kvasir-UID` of
    /// the directory for temporary files.
    pub socket: Option<PathBuf>,
}

impl Default for SharedMemorySettings {
    fn default() -> Self {
        Self {
            enabled: true,
            socket: None,
        }
    }
}

/// `[quic]` in `kvasird.toml`: the data plane between hosts, over TLS 1.3.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct QuicSettings {
    /// Whether to offer it. Without it, gets are answered over gRPC. Default: true.
    pub enabled: bool,
    /// Address and port of UDP. Default: those of the control calls.
    pub listen: Option<SocketAddr>,
    /// File of the daemon's certificate in PEM, with those that vouch for it. Default: one
    /// that the daemon makes at every start, and tells clients over the control calls.
    pub certificate: Option<PathBuf>,
    /// File of its key in PEM. Default: as for `certificate`.
    pub key: Option<PathBuf>,
    /// File of certificates in PEM, one of which must vouch for every client. Default:
    /// clients need none.
    pub client_ca: Option<PathBuf>,
}

impl Default for QuicSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: None,
            certificate: None,
            key: None,
            client_ca: None,
        }
    }
}

impl ServerConfig {
    /// Port of a daemon without configuration.
    pub const PORT: u16 = 7420;

    /// A server on a free port of the loopback interface that keeps chunks in
    /// memory only.
    pub fn in_memory() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            store: StoreConfig::default(),
            limits: Limits::default(),
            quic: QuicSettings::default(),
            shared_memory: SharedMemorySettings::default(),
            rdma: RdmaSettings::default(),
        }
    }
}

/// `[limits]` in `kvasird.toml`: what bounds the load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Puts and gets in progress at once, of chunks and profiles; more are asked to come back.
    /// Default: [`Self::DATA_STREAMS`]. Minimum: 1.
    pub data_streams: u32,
    /// Connections at once; more wait to be accepted.
    /// Default: [`Self::CONNECTIONS`]. Minimum: 1.
    pub connections: u32,
    /// Bytes that a get reads ahead of what it sends. Worst-case memory, charged to
    /// the memory capacity, is this times `data-streams`; at least two layers are
    /// read ahead. Default: [`Self::READ_AHEAD`].
    pub read_ahead: ByteSize,
    /// Bytes a peer may send before the server reads them. Worst-case memory,
    /// outside of the memory capacity, is this times `connections`.
    /// Default: [`Self::WINDOW`]. Minimum: 64KiB. Maximum: 1GiB.
    pub window: ByteSize,
    /// Milliseconds without progress after which a stream is ended.
    /// Default: [`Self::STREAM_IDLE_MS`].
    pub stream_idle_ms: u64,
    /// Watches and listings in progress at once; more are asked to come back.
    /// Default: [`Self::WATCHERS`]. Minimum: 1.
    pub watchers: u32,
    /// Milliseconds after which a get gives up on a read of the device; the chunk is
    /// lost to it. Default: [`Self::READ_TIMEOUT_MS`].
    pub read_timeout_ms: u64,
    /// Milliseconds that transfers get to finish at shutdown.
    /// Default: [`Self::DRAIN_MS`].
    pub drain_ms: u64,
}

impl Limits {
    /// 64.
    pub const DATA_STREAMS: u32 = 64;
    /// 256.
    pub const CONNECTIONS: u32 = 256;
    /// 16 MiB.
    pub const READ_AHEAD: ByteSize = ByteSize::mib(16);
    /// 4 MiB.
    pub const WINDOW: ByteSize = ByteSize::mib(4);
    /// 30 seconds.
    pub const STREAM_IDLE_MS: u64 = 30_000;
    /// 64.
    pub const WATCHERS: u32 = 64;
    /// 10 seconds.
    pub const READ_TIMEOUT_MS: u64 = 10_000;
    /// 10 seconds.
    pub const DRAIN_MS: u64 = 10_000;

    pub(crate) const fn stream_idle(&self) -> Duration {
        Duration::from_millis(self.stream_idle_ms)
    }

    pub(crate) const fn read_timeout(&self) -> Duration {
        Duration::from_millis(self.read_timeout_ms)
    }

    pub(crate) const fn drain(&self) -> Duration {
        Duration::from_millis(self.drain_ms)
    }

    pub(crate) fn window_bytes(&self) -> u32 {
        let bytes = self.window.as_u64().clamp(64 << 10, 1 << 30);
        u32::try_from(bytes).unwrap_or(1 << 30)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            data_streams: Self::DATA_STREAMS,
            connections: Self::CONNECTIONS,
            read_ahead: Self::READ_AHEAD,
            window: Self::WINDOW,
            stream_idle_ms: Self::STREAM_IDLE_MS,
            watchers: Self::WATCHERS,
            read_timeout_ms: Self::READ_TIMEOUT_MS,
            drain_ms: Self::DRAIN_MS,
        }
    }
}
