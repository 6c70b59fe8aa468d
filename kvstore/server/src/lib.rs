//! The cache daemon: [`kvasir.v1`](kvasir_proto) over a [`Store`](kvasir_store::Store).
//!
//! Control calls and puts are gRPC. Gets are too, and go over the data plane
//! ([`kvasir_transport`]) where a client can reach it: over QUIC, in memory that both map, or,
//! with the feature `rdma`, by reading the daemon's memory from another host.
//!
//! The server is thin: it parses requests once at the border, moves bytes between
//! sockets and the store, and refuses what exceeds a bound. [`Server::start`] runs
//! one inside any Tokio runtime, as tests and benchmarks do; the `kvasird` binary
//! adds [configuration](DaemonConfig), signals and logs, and `kvasir` is its
//! command line.
//!
//! ```no_run
//! use kvasir_server::{Server, ServerConfig};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let running = Server::start(ServerConfig::in_memory()).await?;
//! println!("listening on {}", running.addr());
//! running.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! # What bounds what
//! | resource | bound | at the bound |
//! |---|---|---|
//! | payload, in the store and on its way | the memory capacity | `RESOURCE_EXHAUSTED`, come back |
//! | bytes of codec profiles | [`ProfilesConfig::capacity`](kvasir_store::ProfilesConfig::capacity) | `RESOURCE_EXHAUSTED`, until some are deleted |
//! | puts and gets in progress | [`Limits::data_streams`] | `RESOURCE_EXHAUSTED`, come back |
//! | layers read ahead of a get's receiver | [`Limits::read_ahead`] | the next read waits |
//! | a read of the device, for a get | [`Limits::read_timeout_ms`] | the chunk is lost to the get |
//! | watches and listings in progress | [`Limits::watchers`] | `RESOURCE_EXHAUSTED`, come back |
//! | a peer that neither sends nor takes | [`Limits::stream_idle_ms`] | the stream ends; a put stores nothing |
//! | requests of one connection of the data plane | 256 | refused, come back |
//! | bytes read and not sent, of one connection of the data plane | [`Limits::read_ahead`] | the next read waits |
//! | memory lent to processes of the host | half of the memory capacity | what is beyond is copied |
//! | memory lent to other hosts, over RDMA | a quarter of the memory capacity | what is beyond goes over QUIC |
//! | a loan of another host that it does not give back | 10 s | the connection ends |
//! | clients that follow where the data plane is | [`Limits::connections`] | they use gRPC |
//! | chunks of a listing in memory | 16384 | the next page waits |
//! | calls in progress on a connection | 256 | the peer waits |
//! | connections | [`Limits::connections`] | the next one waits in the kernel's backlog |
//! | a connection whose peer does not greet | 10 s | it is closed |
//! | bytes in a connection's receive window | [`Limits::window`] | the peer waits |
//! | changes a watcher lags behind | [`EventLog::CAPACITY`](kvasir_store::EventLog::CAPACITY) | it gets a new snapshot |
//!
//! # Shutdown
//! [`Running::shutdown`] reports `NOT_SERVING`, stops accepting, ends watches, lets
//! transfers finish for [`Limits::drain_ms`], ends the rest as `UNAVAILABLE`, gives
//! peers two seconds to close their connections, and the store ten to close. Whatever
//! was acknowledged as durable by then needs none of it. A second signal ends
//! `kvasird` at once.

#![forbid(unsafe_code)]

mod admission;
pub mod child;
mod config;
mod connections;
mod counters;
pub mod daemon;
mod data;
mod get;
mod hold;
mod list;
mod outgoing;
mod paths;
mod process;
mod profiles;
mod put;
mod quic;
mod rdma;
mod read;
mod refusal;
mod server;
mod service;
mod settings;
mod shared_memory;
mod watch;
mod wire;

pub use config::{Limits, QuicSettings, RdmaSettings, ServerConfig, SharedMemorySettings};
pub use kvasir_transport::shm::ListenError;
pub use quic::QuicError;
pub use rdma::RdmaError;
pub use server::{Running, Server, StartError};
pub use settings::{DaemonConfig, DiskSettings, SettingsError};
