//! The fetcher's end of a carrier: what is lent is read, and given back.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;

use super::device::{Device, DeviceConfig, FindError};
use super::endpoint::Endpoint;
use super::pool::Pool;
use super::queue_pair::{PreparedQueuePair, QueuePair, QueuePairConfig};
use super::region::RegisterError;
use super::{RemoteKey, RemoteRange};
use crate::fetching::Shared;
use crate::quic::Ended;
use crate::session::{Frame, Loan, Violation};

/// How lent bytes are read.
#[derive(Clone, Debug)]
pub struct ReaderConfig {
    /// With which device.
    pub device: DeviceConfig,
    /// Buffers that are read into; all their memory is locked. As many reads may be under way.
    /// Default: 64.
    pub buffers: usize,
    /// Bytes of each; what is longer is read in parts. Default: 256 KiB, a piece of a session.
    pub buffer_bytes: usize,
    /// That of every connection.
    pub queue_pair: QueuePairConfig,
}

impl Default for ReaderConfig {
    fn default() -> Self {
        Self {
            device: DeviceConfig::default(),
            buffers: 64,
            buffer_bytes: 256 << 10,
            queue_pair: QueuePairConfig::default(),
        }
    }
}

/// Why lent bytes cannot be read, though there is a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReaderError {
    /// The device cannot be used.
    #[error(transparent)]
    Find(#[from] FindError),
    /// There is no memory to read into.
    #[error(transparent)]
    Register(#[from] RegisterError),
}

/// Reads what is lent, cheap to clone: paths to many holders may share one.
///
/// # Buffers
/// What is read comes to who asked for it in the buffer that it was read into, which is free
/// again when the bytes are dropped. Who keeps bytes for long must not hold up others, nor
/// himself: when three quarters of the buffers are with somebody, what is read is copied, and
/// the rest of the buffers goes round.
#[derive(Clone, Debug)]
pub struct Reader {
    device: Device,
    pool: Pool,
    config: QueuePairConfig,
    /// Buffers that may be handed out.
    spare: Arc<Semaphore>,
}

impl Reader {
    /// Finds a device, and takes memory for it. `None` if there is no device. That takes system
    /// calls, and as long as it takes to lock the memory.
    ///
    /// # Errors
    /// [`ReaderError`]
    pub fn find(config: &ReaderConfig) -> Result<Option<Self>, ReaderError> {
        let Some(device) = Device::find(&config.device)? else {
            return Ok(None);
        };
        let buffers = config.buffers.max(1);
        Ok(Some(Self {
            pool: Pool::new(&device, buffers, config.buffer_bytes)?,
            device,
            config: config.queue_pair,
            spare: Arc::new(Semaphore::new(buffers * 3 / 4)),
        }))
    }

    /// Makes a queue pair. `None`, and a word in the log, if there is none to be had.
    pub(crate) async fn prepare(&self) -> Option<Prepared> {
        let reader = self.clone();
        let prepare = move || reader.device.prepare(&reader.config);
        // System calls.
        let queue_pair = match spawn_blocking(prepare).await.ok()? {
            Ok(queue_pair) => queue_pair,
            Err(error) => {
                let error = &error as &dyn Error;
                tracing::warn!(error, "no queue pair; bytes come over QUIC");
                return None;
            }
        };
        Some(Prepared {
            queue_pair,
            reader: self.clone(),
        })
    }
}

/// A queue pair that is to be connected.
pub(crate) struct Prepared {
    queue_pair: PreparedQueuePair,
    reader: Reader,
}

impl Prepared {
    /// Where it is.
    pub(crate) fn endpoint(&self) -> Vec<u8> {
        self.queue_pair.endpoint().to_bytes().to_vec()
    }

    /// Connects it with the holder's, which is at `theirs`.
    pub(crate) async fn connect(
        self,
        theirs: Vec<u8>,
    ) -> Result<Reading, Box<dyn Error + Send + Sync>> {
        let Self { queue_pair, reader } = self;
        let connect = move || {
            let theirs = Endpoint::parse(&theirs)?;
            Ok(queue_pair.connect(&theirs)?)
        };
        // System calls, of which some wait for the device.
        let connected: Result<QueuePair, Box<dyn Error + Send + Sync>> =
            spawn_blocking(connect).await?;
        Ok(Reading {
            inner: Arc::new(Inner {
                queue_pair: connected?,
                reader,
                loans: Mutex::default(),
                work: Notify::new(),
            }),
        })
    }
}

/// What one connection reads. Its queue pair ends with it.
#[derive(Clone)]
pub(crate) struct Reading {
    inner: Arc<Inner>,
}

struct Inner {
    queue_pair: QueuePair,
    reader: Reader,
    loans: Mutex<Loans>,
    /// There may be something to read.
    work: Notify,
}

#[derive(Default)]
struct Loans {
    /// To be read.
    new: VecDeque<Lent>,
    /// Numbers of those that were read, and are to be given back.
    over: Vec<u64>,
    /// All that were not given back.
    open: usize,
}

struct Lent {
    loan: Loan,
    key: RemoteKey,
}

impl Reading {
    /// Takes loans, to be read. What they are of was described before.
    pub(crate) fn begin(&self, frames: Vec<Frame>) -> Result<(), Violation> {
        let mut loans = self.inner.loans();
        for frame in frames {
            let Frame::Lend(loan) = frame else { continue };
            // The session's credit bounds their bytes, once they are read.
            let key = loan
                .key
                .filter(|_| loan.length > 0 && loans.open < MOST_LOANS);
            let key = RemoteKey(key.ok_or(Violation::Loan)?);
            loans.open += 1;
            loans.new.push_back(Lent { loan, key });
        }
        drop(loans);
        self.inner.work.notify_one();
        Ok(())
    }

    /// Loans that are over, each said once.
    pub(crate) fn over(&self) -> Vec<u64> {
        let mut loans = self.inner.loans();
        loans.open -= loans.over.len();
        std::mem::take(&mut loans.over)
    }

    /// Reads what is lent, as long as it is polled and nothing fails.
    pub(crate) async fn read(&self, shared: &Shared) -> Result<Infallible, Ended> {
        let mut reads = FuturesUnordered::new();
        loop {
            let new = std::mem::take(&mut self.inner.loans().new);
            reads.extend(new.into_iter().map(|lent| self.inner.read(lent, shared)));
            tokio::select! {
                Some(read) = reads.next(), if !reads.is_empty() => read?,
                () = self.inner.work.notified() => {}
                error = self.inner.queue_pair.failed() => {
                    return Err(Ended::OneSided(error.into()));
                }
            }
        }
    }
}

impl Inner {
    fn loans(&self) -> MutexGuard<'_, Loans> {
        // What is locked is changed in one step.
        self.loans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a loan, hands it to the session, and gives it back.
    async fn read(&self, lent: Lent, shared: &Shared) -> Result<(), Ended> {
        let Lent { loan, key } = lent;
        let part = self.reader.pool.buffer_bytes() as u64;
        let mut at = 0;
        while at < loan.length {
            let range = RemoteRange {
                key,
                offset: loan.at + at,
                length: part.min(loan.length - at),
            };
            let read = self.queue_pair.read(&self.reader.pool, range).await;
            let bytes = read.map_err(|error| Ended::OneSided(error.into()))?;
            shared.take([Frame::Data {
                request: loan.request,
                offset: loan.offset + at,
                bytes: self.reader.hand_out(bytes),
            }])?;
            at += range.length;
        }
        self.loans().over.push(loan.loan);
        shared.work.notify_one();
        Ok(())
    }
}

impl Reader {
    /// What was read, in its buffer if there are buffers to spare, and else as a copy.
    fn hand_out(&self, bytes: Bytes) -> Bytes {
        match Arc::clone(&self.spare).try_acquire_owned() {
            Ok(permit) => Bytes::from_owner(HandedOut {
                bytes,
                _permit: permit,
            }),
            Err(_) => Bytes::copy_from_slice(&bytes),
        }
    }
}

/// A buffer that is with somebody.
struct HandedOut {
    // Free before another one may be handed out.
    bytes: Bytes,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for HandedOut {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Loans of one connection at once; far more than holders make.
const MOST_LOANS: usize = 1 << 16;
