//! The data plane: how stored bytes travel.
//!
//! [`session`] is what both ends say to each other, without I/O; carriers move its frames. A
//! holder gives out what its [`Source`] has; a fetcher has a [`DataPath`] to it, and its requests
//! are [`Fetch`]es.
//!
//! * [`quic`]: between hosts, over TLS 1.3.
//! * [`shm`]: on one host, without a copy.
//! * `rdma`, with the feature of that name: one-sided reads of another host's memory, and QUIC
//!   for the rest.
//!
//! Not here: what requests ask for and what bytes mean (`kvasir-proto`), control calls
//! (`kvasir-client`, `kvasir-server`).

#![deny(unsafe_code)]

#[cfg(feature = "quic")]
mod fetching;
#[cfg(feature = "quic")]
mod holding;
#[cfg(feature = "quic")]
mod path;
#[cfg(feature = "quic")]
pub mod quic;
#[cfg(all(feature = "quic", not(feature = "rdma")))]
#[path = "no_rdma.rs"]
mod rdma;
#[cfg(feature = "rdma")]
#[allow(
    unsafe_code,
    reason = "verbs are calls of a C library, and a device writes into memory that it was given"
)]
pub mod rdma;
pub mod session;
#[cfg(feature = "quic")]
#[allow(unsafe_code, reason = "memory of another process; see the module")]
pub mod shm;
mod source;

#[cfg(feature = "quic")]
pub use fetching::{Fetch, FetchError, FetchOptions};
#[cfg(feature = "quic")]
pub use path::{Carrier, DataPath, Status};
pub use source::{Lost, Source, Thing};
