//! The holder's end of a carrier: data that lies in an arena is lent.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_mem::{Arena, Watcher};
use tokio::sync::OnceCell;
use tokio::task::spawn_blocking;

use super::device::Device;
use super::endpoint::Endpoint;
use super::queue_pair::{Loan, QueuePair, QueuePairConfig, QueuePairError};
use super::region::{Region, RegisterError};
use crate::session::{self, Frame, RequestId, Violation};

/// What is lent, and how.
#[derive(Clone, Copy, Debug)]
pub struct LenderConfig {
    /// Bytes of a piece of data from which on it is lent; smaller ones go over QUIC. A loan
    /// costs two requests to the device and two frames. Default: 32 KiB.
    pub least: u64,
    /// Bytes that are lent at most, to all fetchers together. What is beyond goes over QUIC.
    /// Default: no limit.
    pub most_lent: u64,
    /// How long a fetcher may keep a loan, which it reads as soon as it can; then its connection
    /// ends. Less than requests linger, so that these go on. Default: 10 s.
    pub longest: Duration,
    /// That of every fetcher.
    pub queue_pair: QueuePairConfig,
}

impl Default for LenderConfig {
    fn default() -> Self {
        Self {
            least: 32 << 10,
            most_lent: u64::MAX,
            longest: Duration::from_secs(10),
            queue_pair: QueuePairConfig::default(),
        }
    }
}

/// Lends what lies in an arena, cheap to clone.
///
/// # What is registered
/// A block of the arena is registered when something of it is first lent, and until it is
/// dropped; a store that uses its buffers again does not register them again. A device knows
/// pages, and an arena gives those of dropped blocks back to the system, so a registration of
/// the whole arena would soon be of pages that nobody writes to any more. Registrations keep
/// [`Pages`](kvasir_mem::Pages), and an arena does not give back what somebody keeps: what the
/// device reads is what lies there, whatever becomes of the block. So no more memory is locked
/// than blocks have.
#[derive(Clone, Debug)]
pub struct Lender {
    inner: Arc<Inner>,
}

struct Inner {
    device: Device,
    arena: Arc<Arena>,
    config: LenderConfig,
    /// Of blocks that were lent from, by where they start.
    regions: Arc<Mutex<HashMap<u64, Registering>>>,
    /// Forgets the regions of blocks that are gone.
    _watcher: Arc<Watcher>,
    /// When registering may be tried again, after the device took no more.
    refused: Mutex<Option<Instant>>,
    /// Bytes that are lent.
    lent: Arc<AtomicU64>,
    /// Bytes that were lent, those that were given back among them.
    lent_ever: AtomicU64,
}

/// A region, registered once for all who wait for it.
type Registering = Arc<OnceCell<Region>>;

type Broken = Box<dyn Error + Send + Sync>;

impl Lender {
    /// Lends what lies in `arena` through `device`.
    pub fn new(device: Device, arena: Arc<Arena>, config: LenderConfig) -> Self {
        let regions: Arc<Mutex<HashMap<u64, Registering>>> = Arc::default();
        let watcher: Arc<Watcher> = {
            let regions = Arc::clone(&regions);
            Arc::new(move |start| {
                let gone = lock(&regions).remove(&start);
                // Not while others wait for the lock: it ends a registration.
                drop(gone);
            })
        };
        arena.watch(&watcher);
        Self {
            inner: Arc::new(Inner {
                device,
                arena,
                config,
                regions,
                _watcher: watcher,
                refused: Mutex::default(),
                lent: Arc::default(),
                lent_ever: AtomicU64::new(0),
            }),
        }
    }

    /// How many blocks are registered.
    pub fn registered(&self) -> usize {
        lock(&self.inner.regions).len()
    }

    /// Bytes that are lent, to all fetchers together.
    pub fn lent(&self) -> u64 {
        self.inner.lent.load(Ordering::Relaxed)
    }

    /// Bytes that were ever lent.
    pub fn lent_ever(&self) -> u64 {
        self.inner.lent_ever.load(Ordering::Relaxed)
    }

    /// A queue pair for the fetcher whose endpoint is `theirs`, and where it is.
    pub(crate) async fn connect(&self, theirs: Vec<u8>) -> Result<(Vec<u8>, Lending), Broken> {
        let inner = Arc::clone(&self.inner);
        let connect = move || {
            let theirs = Endpoint::parse(&theirs)?;
            let prepared = inner.device.prepare(&inner.config.queue_pair)?;
            let ours = prepared.endpoint().to_bytes();
            let lending = Lending {
                queue_pair: prepared.connect(&theirs)?,
                lender: inner,
                loans: Mutex::default(),
            };
            Ok((ours.to_vec(), lending))
        };
        // System calls, of which some wait for the device.
        spawn_blocking(connect).await?
    }
}

/// What is lent to one fetcher. Dropping it ends its loans; what was lent stays until the
/// queue pair is dead.
pub(crate) struct Lending {
    // Dropped first: all loans end with it, and not one by one.
    queue_pair: QueuePair,
    loans: Mutex<Loans>,
    lender: Arc<Inner>,
}

#[derive(Default)]
struct Loans {
    next: u64,
    /// By number, and so by age.
    lent: BTreeMap<u64, Lent>,
}

struct Lent {
    request: RequestId,
    since: Instant,
    _loan: Loan,
    _counted: Counted,
}

/// Bytes that count as lent.
struct Counted {
    all: Arc<AtomicU64>,
    bytes: u64,
}

impl Lending {
    /// Makes a loan of data, where it lies in the arena and is large enough: what comes out
    /// is to be sent, and may be the data after all. Other frames come back at once.
    pub(crate) fn lend(
        &self,
        frame: Frame,
    ) -> Result<impl Future<Output = Frame> + Send + use<'_>, Frame> {
        let Frame::Data {
            request,
            offset,
            bytes,
        } = frame
        else {
            return Err(frame);
        };
        let counted = if bytes.len() as u64 >= self.lender.config.least
            && self.lender.arena.locate(&bytes).is_some()
        {
            self.lender.count(bytes.len() as u64)
        } else {
            None
        };
        let Some(counted) = counted else {
            return Err(Frame::Data {
                request,
                offset,
                bytes,
            });
        };
        Ok(async move {
            match self.open(bytes.clone()).await {
                Some(loan) => self.keep(request, offset, loan, counted),
                None => Frame::Data {
                    request,
                    offset,
                    bytes,
                },
            }
        })
    }

    async fn open(&self, bytes: Bytes) -> Option<Loan> {
        let region = self.lender.region(&bytes).await?;
        let loan = self.queue_pair.lend(&region, bytes).await;
        let report = |error: &super::LendError| {
            let error = error as &dyn Error;
            tracing::debug!(error, "sent, and not lent");
        };
        loan.inspect_err(report).ok()
    }

    fn keep(&self, request: RequestId, offset: u64, loan: Loan, counted: Counted) -> Frame {
        let range = loan.range();
        let ever = &self.lender.lent_ever;
        ever.fetch_add(range.length, Ordering::Relaxed);
        let lent = Lent {
            request,
            since: Instant::now(),
            _loan: loan,
            _counted: counted,
        };
        let mut loans = lock(&self.loans);
        let number = loans.next;
        loans.next += 1;
        loans.lent.insert(number, lent);
        Frame::Lend(session::Loan {
            request,
            offset,
            loan: number,
            at: range.offset,
            length: range.length,
            key: Some(range.key.0),
        })
    }

    /// Ends what the fetcher gives back.
    pub(crate) fn take_back(&self, frames: impl Iterator<Item = Frame>) -> Result<(), Violation> {
        for frame in frames {
            if let Frame::Return { loan } = frame {
                let lent = lock(&self.loans).lent.remove(&loan);
                // Not under the lock: it asks something of the device.
                drop(lent.ok_or(Violation::Loan)?);
            }
        }
        Ok(())
    }

    /// Whether something of a request is lent.
    pub(crate) fn has_lent(&self, request: RequestId) -> bool {
        let loans = lock(&self.loans);
        loans.lent.values().any(|lent| lent.request == request)
    }

    /// Waits until nothing can be lent any more, or something was not given back for too long:
    /// memory is not a fetcher's for good.
    pub(crate) async fn broken(&self) -> Broken {
        let longest = self.lender.config.longest.max(LEAST_LONGEST);
        let overdue = async {
            loop {
                tokio::time::sleep(longest / 4).await;
                let oldest = lock(&self.loans)
                    .lent
                    .values()
                    .next()
                    .map(|lent| lent.since);
                if oldest.is_some_and(|since| since.elapsed() > longest) {
                    return Overdue(longest);
                }
            }
        };
        tokio::select! {
            overdue = overdue => overdue.into(),
            error = self.queue_pair.failed() => Failed(error).into(),
        }
    }
}

/// A fetcher kept what was lent to it.
#[derive(Debug, thiserror::Error)]
#[error("the fetcher did not give back a loan within {0:?}")]
struct Overdue(Duration);

#[derive(Debug, thiserror::Error)]
#[error("the queue pair failed")]
struct Failed(#[source] QueuePairError);

impl Inner {
    /// Counts bytes as lent, unless there are too many then.
    fn count(&self, bytes: u64) -> Option<Counted> {
        let more = |lent: u64| {
            let lent = lent.checked_add(bytes);
            lent.filter(|&lent| lent <= self.config.most_lent)
        };
        let order = (Ordering::Relaxed, Ordering::Relaxed);
        let counted = self.lent.fetch_update(order.0, order.1, more);
        counted.is_ok().then(|| Counted {
            all: Arc::clone(&self.lent),
            bytes,
        })
    }

    /// The region that these bytes lie in, which is registered if it is not yet.
    async fn region(&self, bytes: &Bytes) -> Option<Region> {
        let pages = self.arena.pages(bytes)?;
        let registering = {
            let mut regions = lock(&self.regions);
            Arc::clone(regions.entry(pages.offset()).or_default())
        };
        let register = || async {
            if lock(&self.refused).is_some_and(|until| Instant::now() < until) {
                return Err(());
            }
            let device = self.device.clone();
            // With the bytes, so that the block is there until its region is known.
            let bytes = bytes.clone();
            let register = spawn_blocking(move || {
                let region = Region::register(&device, pages);
                drop(bytes);
                region
            });
            let registered = register.await.map_err(drop)?;
            registered.map_err(|error| self.refuse(&error))
        };
        let region = registering.get_or_try_init(register).await.ok();
        region.cloned()
    }

    /// The device takes no more memory, for now.
    fn refuse(&self, error: &RegisterError) {
        let error = error as &dyn Error;
        tracing::warn!(
            error,
            "memory is not registered; what lies there is sent over QUIC"
        );
        *lock(&self.refused) = Some(Instant::now() + AFTER_REFUSAL);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lender")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// What is locked is changed in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads take some time.
const LEAST_LONGEST: Duration = Duration::from_millis(10);
/// Before memory is registered again, which takes the device's time also where it fails.
const AFTER_REFUSAL: Duration = Duration::from_secs(10);
