//! Why queue pairs fail, and what that means for who uses them.

use std::io;

use rustix::io::Errno;

use crate::rdma::verbs::status;

/// Why a queue pair failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueuePairError {
    /// The peer's device did not answer: it, the path, or the peer is gone.
    #[error("the peer did not answer within the retry time")]
    RetryExceeded,
    /// Bytes were asked for that are not lent, or not any more.
    #[error("the peer's device refused the key, or the place in its region")]
    RemoteAccess,
    /// The peer's queue pair does not answer reads.
    #[error("the peer's device refused the request")]
    RemoteInvalidRequest,
    /// The peer's device failed.
    #[error("the peer's device could not do it")]
    RemoteOperation,
    /// Our device does not take our buffer.
    #[error("the device refused the local buffer")]
    LocalProtection,
    /// A window could not be bound.
    #[error("the device could not bind a memory window")]
    Bind,
    /// It had failed before this end asked for anything, such as by a peer that asked for what
    /// is not lent.
    #[error("the queue pair had failed before the request")]
    Flushed,
    /// Any other: `enum ibv_wc_status`.
    #[error("the device reported status {0} (enum ibv_wc_status)")]
    Status(u32),
    /// The device did not take a request.
    #[error("the device did not take a request: {0}")]
    Post(Errno),
    /// Completions of the device cannot be taken any more.
    #[error("the device's completions cannot be taken")]
    Completions,
    /// Its handle was dropped.
    #[error("this end closed the queue pair")]
    Closed,
}

/// Why there are no bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Longer than a buffer of the pool; read it in parts.
    #[error("a read of {length} bytes, and buffers of the pool have {limit}")]
    TooLong {
        /// Bytes asked for.
        length: u64,
        /// Bytes of a buffer.
        limit: u64,
    },
    /// The pool is another device's.
    #[error("the pool is registered with another device")]
    OtherDevice,
    /// This read made the queue pair fail.
    #[error("the read failed")]
    Failed(#[source] QueuePairError),
    /// Something else made the queue pair fail, before or meanwhile.
    #[error("the queue pair failed")]
    Dead(#[source] QueuePairError),
}

/// Why bytes are not lent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LendError {
    /// They do not lie in the region, or there are none.
    #[error("the bytes do not lie in the region; copy them into a buffer of a pool")]
    NotRegistered,
    /// They lie in two registrations; [`Region::split`](crate::rdma::Region::split) them.
    #[error("the bytes lie in two pieces of the region")]
    Pieces,
    /// The region is another device's.
    #[error("the region is registered with another device")]
    OtherDevice,
    /// As many are lent as may be; wait for some to end.
    #[error("{limit} loans at once are allowed")]
    Loans {
        /// [`QueuePairConfig::loans`](crate::rdma::QueuePairConfig::loans).
        limit: u32,
    },
    /// The device has no windows, or none left.
    #[error("the device gives no memory window")]
    Window(#[source] io::Error),
    /// The queue pair failed, before or meanwhile.
    #[error("the queue pair failed")]
    Dead(#[source] QueuePairError),
}

impl QueuePairError {
    pub(super) fn from_status(status: status::Type) -> Self {
        match status {
            status::IBV_WC_RETRY_EXC_ERR | status::IBV_WC_RESP_TIMEOUT_ERR => Self::RetryExceeded,
            status::IBV_WC_REM_ACCESS_ERR => Self::RemoteAccess,
            status::IBV_WC_REM_INV_REQ_ERR => Self::RemoteInvalidRequest,
            status::IBV_WC_REM_OP_ERR => Self::RemoteOperation,
            status::IBV_WC_LOC_PROT_ERR => Self::LocalProtection,
            status::IBV_WC_MW_BIND_ERR => Self::Bind,
            status::IBV_WC_WR_FLUSH_ERR => Self::Flushed,
            other => Self::Status(other),
        }
    }
}
