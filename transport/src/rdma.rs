//! One-sided reads of another host's memory: RDMA over RoCE or InfiniBand.
//!
//! A holder lends bytes that lie in registered memory; a fetcher reads them from there into a
//! buffer of its own, and no CPU of the holder has a part in it.
//!
//! # The carrier
//! A [`Lender`] and a [`Reader`] make a carrier of it: [`listen`] and [`connect`] are those of
//! [`quic`], whose connections carry all frames. Data of some length that lies in the
//! holder's arena is replaced by a loan (`Frame::Lend`), with a place and a key; the fetcher
//! reads it, hands it to the session as data, and gives it back (`Frame::Return`).
//!
//! ```text
//! holder                                              fetcher
//!   Data(offset, bytes in the arena)
//!   register their block, once; bind a window
//!   Lend(offset, place, key)   ───── QUIC ─────▶      read into a buffer of the pool
//!                              ◀──── RDMA ──────
//!   end the loan               ◀──── QUIC ─────       Data(offset, bytes), Return(loan)
//! ```
//!
//! * Credit counts lent bytes as data, so it bounds loans as well; what is read and not taken
//!   never keeps others from being read ([`Reader`]).
//! * When a queue pair fails, at either end, the connection ends with it, since what was lent
//!   over it may not have been read. The fetcher connects again, over QUIC alone, and asks for
//!   what is missing: nothing that was read in part was handed out. It tries one-sided reads
//!   again at a later connection, after a pause that grows.
//! * Where an end has no device, or no queue pair to give, the session goes over QUIC from the
//!   beginning. So does a piece that is short, that lies elsewhere, or for which there is no
//!   window, no registration, or no room in [`LenderConfig::most_lent`].
//! * A fetcher that keeps a loan for longer than [`LenderConfig::longest`] loses its connection.
//!
//! # The mechanism
//! Below that, who asks for what, and which bytes are lent when, is left to others:
//!
//! ```text
//! holder                                    fetcher
//!   Device::find                              Device::find
//!   Region::register(memory)                  Pool::new
//!   Device::prepare → endpoint  ◀───────────▶ Device::prepare → endpoint
//!   connect(their endpoint)                   connect(their endpoint)
//!   lend(bytes) → Loan::range   ────────────▶ read(range) → Bytes
//!   drop the loan               ◀──────────── done with it
//! ```
//!
//! # Keys
//! Registered memory is open to nobody. A [`Loan`] is a memory window of type 2, bound by the
//! session's queue pair to the bytes lent and no others: its key opens these, for reading, to
//! that queue pair's peer alone, and nothing once the loan or the queue pair has ended
//! (InfiniBand Architecture Specification, volume 1, 10.6.7; `ibv_alloc_mw(3)`). To bind one is
//! a request like a read, without a system call, where a registration for every session would
//! pin and map all memory each time. Addresses on the wire are places in the region, since
//! that is registered with byte 0 at address 0 (`ibv_reg_mr(3)`); no process's addresses are
//! told.
//!
//! Adapters check a window's own bounds. Soft-RoCE checks its key, queue pair and access, but
//! the bounds of its region only (`check_rkey` in Linux's `rxe_resp.c`): it is for tests.
//!
//! # Who owns what
//! * A [`Device`] has the context, one protection domain, and one completion queue with a
//!   thread, which sleeps in the completion channel, takes what is done, and wakes who waits.
//! * A [`Region`] has memory and its registrations; while either is used it stays.
//! * A [`Lender`] has a region for each block of its arena that something was lent of; see there
//!   for why blocks, and not the arena.
//! * A [`QueuePair`] has its requests. What a request needs (the buffer that a device writes
//!   into, the bytes that are lent, registrations and windows) belongs to the request until its
//!   completion has come. So a dropped future frees nothing under a device's hands: the bytes
//!   arrive and are thrown away.
//! * Handles may be dropped in any order: what depends on something keeps it.
//!
//! # How a queue pair ends
//! It fails as a whole (`IBV_QPS_ERR`, `ibv_modify_qp(3)`): a read that the peer's device
//! refuses, a peer that does not answer within the retry time, or its handle dropped. Then all
//! that is outstanding fails at once with the reason, later requests fail with it too, no loan
//! is readable any more, and when every request has been flushed its windows and the queue
//! pair itself are destroyed, by whoever took the last completion. There is no way back: prepare
//! another one, or use another carrier.
//!
//! # What it needs
//! Programs built with this link with `libibverbs.so.1`, which has to be there when they start;
//! its providers are in `ibverbs-providers` or `rdma-core`. Devices are looked for at run time:
//! none is no error. Registered memory is locked: `ulimit -l`, or `LimitMEMLOCK` of a service,
//! has to allow for it.
//!
//! `unsafe` is in `verbs` (calls of libibverbs), in [`pool`](Pool) (bytes that the device
//! wrote), in [`region`](Region) (what memory promises), and where requests are posted.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::path::DataPath;
use crate::quic::{self, Identity, Listener, QuicConfig, Trust};
use crate::source::Source;

mod completions;
mod device;
mod endpoint;
mod lender;
mod pending;
mod pool;
mod queue_pair;
mod reader;
mod region;
mod verbs;

pub use device::{Device, DeviceConfig, FindError, Limits};
pub use endpoint::{Endpoint, EndpointError, Mtu};
pub(crate) use lender::Lending;
pub use lender::{Lender, LenderConfig};
pub use pool::{Buffer, Pool};
pub use queue_pair::{
    ConnectError, LendError, Loan, PrepareError, PreparedQueuePair, QueuePair, QueuePairConfig,
    QueuePairError, ReadError,
};
pub(crate) use reader::{Prepared, Reading};
pub use reader::{Reader, ReaderConfig, ReaderError};
pub use region::{Memory, Region, RegisterError};

/// As [`quic::connect`]; where the holder lends, its bytes are read with `reader`, if there is
/// one. Status says which it is. When one-sided reads fail, the path goes on over QUIC, and
/// tries them again at a later connection.
///
/// # Errors
/// [`quic::ConnectError`]: there can be no such connection.
///
/// # Panics
/// Outside of a Tokio runtime.
pub fn connect(
    reader: Option<Reader>,
    address: SocketAddr,
    name: &str,
    trust: &Trust,
    identity: Option<&Identity>,
    config: QuicConfig,
) -> Result<DataPath, quic::ConnectError> {
    quic::connect_with(reader, address, name, trust, identity, config)
}

/// As [`Listener::new`]; what `lender` can, if there is one, it lends to fetchers that read
/// one-sidedly.
///
/// # Errors
/// [`quic::ConnectError`]
pub fn listen<S: Source>(
    lender: Option<Lender>,
    address: SocketAddr,
    identity: &Identity,
    clients: Option<&Trust>,
    source: Arc<S>,
    config: QuicConfig,
) -> Result<Listener, quic::ConnectError> {
    Listener::with(lender, address, identity, clients, source, config)
}

/// Bytes of a peer, while they are lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRange {
    /// What opens them.
    pub key: RemoteKey,
    /// Where they are in the peer's region.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

/// Opens bytes to one queue pair's peer, as long as they are lent: an `R_Key`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RemoteKey(pub u32);
