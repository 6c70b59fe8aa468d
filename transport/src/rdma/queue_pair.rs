//! Queue pairs: reads, loans, and how they end.

mod connection;
mod error;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::io::Errno;

use super::device::Device;
use super::endpoint::Endpoint;
use super::pool::Pool;
use super::region::Region;
use super::{RemoteRange, verbs};
use connection::{Live, Room};

pub(super) use connection::Connection;
pub use error::{LendError, QueuePairError, ReadError};

/// What bounds a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePairConfig {
    /// Requests that may be outstanding, fewer if the device takes fewer; others wait, in
    /// order. Of the device's room for completions so much is kept. Default: 128.
    pub depth: u32,
    /// Reads that may be outstanding, fewer if one of the devices takes fewer. Default: 16.
    pub outstanding_reads: u8,
    /// Bytes of one request, fewer if the device takes fewer; longer reads are several.
    /// Default: 1 MiB, so that a request that is sent again does not begin far back.
    pub message_bytes: u32,
    /// Loans at once. Default: 1024.
    pub loans: u32,
    /// How long an acknowledgement may take before a request is sent again, rounded up to
    /// 4.096 µs times a power of two. Devices take up to four times that, and may have a least
    /// value (specification, volume 1, 9.7.6.1.3). Default: 33 ms.
    pub timeout: Duration,
    /// How often a request is sent again, at most 7. Default: 6, with which a peer that is gone
    /// is noticed after a quarter of a second at the earliest and one second at the latest.
    pub retries: u8,
}

impl Default for QueuePairConfig {
    fn default() -> Self {
        Self {
            depth: 128,
            outstanding_reads: 16,
            message_bytes: 1 << 20,
            loans: 1024,
            timeout: Duration::from_millis(33),
            retries: 6,
        }
    }
}

/// A queue pair that is not connected.
#[derive(Debug)]
pub struct PreparedQueuePair {
    live: Live,
    device: Device,
    config: QueuePairConfig,
    endpoint: Endpoint,
}

/// A connected queue pair. Dropping it ends it, and all its loans.
#[derive(Debug)]
pub struct QueuePair {
    connection: Arc<Connection>,
    /// Completions are taken as long as there are handles.
    _device: Device,
}

/// Bytes that the peer may read until this is dropped.
///
/// The bytes stay as they are until the peer's device cannot read them any more, which may be
/// shortly after that.
#[derive(Debug)]
pub struct Loan {
    connection: Arc<Connection>,
    number: u64,
    range: RemoteRange,
}

/// Why there is no queue pair.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// There are so many that their completions might not have room.
    #[error("the completion queue has no room for {depth} requests more")]
    Completions {
        /// Requests that it should have.
        depth: u32,
    },
    /// The system has no random numbers.
    #[error("no random packet sequence number can be had")]
    Random(#[source] Errno),
    /// The device makes none.
    #[error("the device makes no queue pair")]
    Create(#[source] io::Error),
}

/// Why a queue pair is not connected.
#[derive(Debug, thiserror::Error)]
#[error("the device does not connect the queue pair with the peer's")]
pub struct ConnectError(#[source] io::Error);

impl Device {
    /// Makes a queue pair, to be connected when the peer's endpoint is known.
    ///
    /// # Errors
    /// The device has no room for it.
    pub fn prepare(&self, config: &QueuePairConfig) -> Result<PreparedQueuePair, PrepareError> {
        let limits = self.limits();
        let mut config = *config;
        config.depth = config.depth.clamp(1, limits.queue_depth.max(1));
        config.message_bytes = config.message_bytes.clamp(1, limits.message_bytes);
        let shared = &self.shared;
        let depth = config.depth;
        let room = Room::reserve(shared, depth).ok_or(PrepareError::Completions { depth })?;
        let make = || {
            let qp = verbs::QueuePair::new(&shared.domain, &shared.completions, depth)?;
            qp.initialise()?;
            Ok(qp)
        };
        let qp = make().map_err(PrepareError::Create)?;
        let endpoint = Endpoint {
            queue_pair: qp.number(),
            psn: random_psn().map_err(PrepareError::Random)?,
            gid: shared.gid.bytes,
            lid: shared.lid,
            mtu: limits.mtu,
            responder_resources: config
                .outstanding_reads
                .min(limits.responder_resources)
                .max(1),
        };
        Ok(PreparedQueuePair {
            live: Live::new(qp, room),
            device: self.clone(),
            config,
            endpoint,
        })
    }
}

impl PreparedQueuePair {
    /// What the peer has to know.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Connects it. Who reads first should connect last: a queue pair that is not connected
    /// does not answer, and then reads are sent again after a timeout.
    ///
    /// # Errors
    /// The device does not take the peer's endpoint, or has no way there.
    pub fn connect(self, peer: &Endpoint) -> Result<QueuePair, ConnectError> {
        let Self {
            live,
            device,
            config,
            endpoint,
        } = self;
        let shared = &device.shared;
        let reads = config.outstanding_reads.min(shared.limits.initiator_depth);
        let with = verbs::Connect {
            gid_index: shared.gid.index,
            mtu: endpoint.mtu.min(peer.mtu).code(),
            psn: endpoint.psn,
            initiator_depth: reads.min(peer.responder_resources).max(1),
            responder_resources: endpoint.responder_resources,
            timeout: timeout_code(config.timeout),
            retries: config.retries.min(MOST_RETRIES),
        };
        live.qp.connect(with, peer).map_err(ConnectError)?;
        Ok(QueuePair {
            connection: Connection::begin(shared, live, config),
            _device: device,
        })
    }
}

impl QueuePair {
    /// Reads the peer's bytes into a buffer of the pool; waits for that, and for its turn.
    ///
    /// Dropping the future gives the bytes up, not the buffer, which is free again when the
    /// device is done with it.
    ///
    /// # Errors
    /// There are no bytes, and except for [`ReadError::TooLong`] and
    /// [`ReadError::OtherDevice`] the queue pair has failed.
    pub fn read(
        &self,
        pool: &Pool,
        from: RemoteRange,
    ) -> impl Future<Output = Result<Bytes, ReadError>> + Send + use<> {
        let connection = Arc::clone(&self.connection);
        let pool = pool.clone();
        async move { connection.read(&pool, from).await }
    }

    /// Lets the peer read bytes of the region, and waits until it can.
    ///
    /// # Errors
    /// They cannot be lent: as they are, now, or by this queue pair at all.
    pub fn lend(
        &self,
        region: &Region,
        bytes: Bytes,
    ) -> impl Future<Output = Result<Loan, LendError>> + Send + use<> {
        let connection = Arc::clone(&self.connection);
        let region = region.clone();
        async move { connection.lend(&region, bytes).await }
    }

    /// Why it failed, once it has.
    ///
    /// This end notices by its own requests: a peer that goes away is noticed when something is
    /// asked of it.
    pub async fn failed(&self) -> QueuePairError {
        self.connection.failed().await
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        self.connection.fail(QueuePairError::Closed);
    }
}

impl Loan {
    /// What the peer needs to read them.
    pub fn range(&self) -> RemoteRange {
        self.range
    }

    /// Ends it, and waits until the peer cannot read the bytes any more.
    pub async fn end(self) {
        if let Some(ended) = self.connection.end(self.number) {
            // It is never sent, only dropped.
            let _ = ended.await;
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.connection.end(self.number);
    }
}

/// The least value that stands for no less: 4.096 µs · 2^value. Not 0, which is for ever.
fn timeout_code(timeout: Duration) -> u8 {
    let units = timeout.as_nanos().div_ceil(4096).max(2);
    let code = units
        .checked_next_power_of_two()
        .map_or(31, u128::trailing_zeros);
    u8::try_from(code.min(31)).unwrap_or(31)
}

/// The first packet's number: one that packets of an earlier connection do not have.
fn random_psn() -> Result<u32, Errno> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_le_bytes(bytes) >> 8)
}

/// What has three bits.
const MOST_RETRIES: u8 = 7;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn timeouts_are_rounded_up(nanos in 8192u64..8_796_093_022_208) {
            let code = timeout_code(Duration::from_nanos(nanos));
            prop_assert!(4096u64 << code >= nanos);
            prop_assert!(4096u64 << (code - 1) < nanos);
        }
    }

    #[test]
    fn timeouts_are_never_for_ever() {
        assert_eq!(timeout_code(Duration::ZERO), 1);
        assert_eq!(timeout_code(Duration::MAX), 31);
        let config = QueuePairConfig::default();
        assert_eq!(timeout_code(config.timeout), 13);
        // Four times the timeout, for every try: what a device may take.
        let longest = Duration::from_nanos(4096 << 13) * 4 * (u32::from(config.retries) + 1);
        assert!(longest <= Duration::from_secs(1), "{longest:?}");
    }

    #[test]
    fn packet_sequence_numbers_have_24_bits() {
        assert!((0..1000).all(|_| random_psn().unwrap() < 1 << 24));
    }
}
