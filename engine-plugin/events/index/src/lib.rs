//! `kvasir-index`: follows serving engines and cache daemons, and tells routers who holds what.
//!
//! What is known, and what is promised of it, is [`kvasir_events`]; here it meets sockets:
//! engines over ZeroMQ (SUB, and DEALER for replays), daemons over their `Watch`, routers over
//! the gRPC service `kvasir.v1.PrefixIndex`. [`EventPublisher`] is the other end of the first,
//! for programs that are followed by routers which read vLLM's events.
//!
//! ```no_run
//! use kvasir_events::{Limits, hash};
//! use kvasir_index::{Server, ServerConfig};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let running = Server::start(ServerConfig {
//!     listen: "127.0.0.1:7430".parse()?,
//!     metrics: None,
//!     engines: vec!["a=tcp://10.0.0.1:5557,replay=tcp://10.0.0.1:6557".parse()?],
//!     daemons: vec![],
//!     hash_seed: hash::DEFAULT_SEED.to_owned(),
//!     limits: Limits::default(),
//! })
//! .await?;
//! # running.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! # How late it may be
//! A change is known when its batch has come. A batch that is lost is noticed by the next one, and
//! where none follows by the next check, a second later; an engine that ends, by the end of its
//! connection; a host that vanishes, by the check that nobody answers, up to four seconds
//! later, and without a replay address not at all. So give one.
//!
//! # Why the `zeromq` crate
//! It is ZeroMQ in Rust, on Tokio, and maintained; its bindings would build libzmq, in C++. It
//! bounds neither the size of a message nor the time of a silent connection: follow engines that
//! are trusted, over networks that are.
//!
//! # The daemon
//! A daemon says which keys it has, and a key is a digest of a namespace and an engine's whole
//! block hash. So a prompt's blocks are looked up by computing their keys, in the namespaces that
//! are configured: the connector in vLLM logs its own. Requests with 64-bit hashes cannot be
//! answered for daemons, nor those with an adapter, whose chunks are named by its files, too.
//!
//! The daemon's changes are not published in vLLM's form: an event names a block by its hash, and
//! a key does not tell the hash that it was made of.

#![forbid(unsafe_code)]

mod ask;
mod config;
mod metrics;
pub mod program;
mod publish;
mod server;
mod service;
mod state;
mod subscribe;
mod watch;

pub use config::{ConfigError, DaemonConfig, EngineConfig};
pub use publish::{EventPublisher, PublishConfig, PublisherEnded};
pub use server::{Running, Server, ServerConfig, StartError};
pub use zeromq::ZmqError;
