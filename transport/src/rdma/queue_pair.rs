//! Queue pairs: reads, loans, and how they end.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rustix::io::Errno;
use tokio::sync::{oneshot, watch};

use super::device::{Device, Shared};
use super::endpoint::Endpoint;
use super::pending::Pending;
use super::pool::{Buffer, Pool};
use super::region::Region;
use super::verbs::{self, MemoryRegion, MemoryWindow, Request, status};
use super::{RemoteKey, RemoteRange};

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

/// A queue pair, and then the room that is kept for its completions: dropped in this order.
#[derive(Debug)]
struct Live {
    qp: verbs::QueuePair,
    _room: Room,
}

/// Room in the completion queue, until it is given back.
#[derive(Debug)]
struct Room {
    shared: Arc<Shared>,
    depth: u32,
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

/// What a queue pair is after it was connected: it outlives its handle until every request has
/// completed.
#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    number: u32,
    config: QueuePairConfig,
    state: Mutex<State>,
    /// Why it failed, once it has.
    failed: watch::Sender<Option<QueuePairError>>,
}

#[derive(Debug)]
struct State {
    /// `None` after it was destroyed.
    live: Option<Live>,
    pending: Pending<Operation>,
    lent: HashMap<u64, Lent>,
    next_loan: u64,
    /// Loans, those that begin and end among them.
    loans: u32,
    /// Windows that are not bound.
    windows: Vec<MemoryWindow>,
    failed: Option<QueuePairError>,
    /// Of operations that failed: what the device may use until the queue pair is destroyed.
    remains: Vec<Operation>,
    /// Who waits for loans to end, after it failed.
    enders: Vec<oneshot::Sender<()>>,
}

/// What was asked for, who waits for it, and what it needs meanwhile.
#[derive(Debug)]
enum Operation {
    Read {
        buffer: Buffer,
        into: Arc<MemoryRegion>,
        from: RemoteRange,
        waiter: Option<Waiter<Bytes, ReadError>>,
    },
    Bind {
        lent: Lent,
        waiter: Option<Waiter<Loan, LendError>>,
    },
    Invalidate {
        lent: Lent,
        /// Dropped when nobody can read the bytes any more.
        waiter: Option<oneshot::Sender<()>>,
    },
}

/// A window, and what it opens. Dropped in this order.
#[derive(Debug)]
struct Lent {
    window: MemoryWindow,
    region: Arc<MemoryRegion>,
    range: Range<u64>,
    bytes: Bytes,
}

/// What is to be done when the state is no longer locked: to wake somebody may run anything.
#[derive(Debug, Default)]
struct Later {
    reads: Vec<(Waiter<Bytes, ReadError>, Result<Bytes, ReadError>)>,
    loans: Vec<(Waiter<Loan, LendError>, Result<Loan, LendError>)>,
    /// Loans that ended: what nobody reads any more, then who waits for that.
    ended: Vec<(Arc<MemoryRegion>, Bytes, Option<oneshot::Sender<()>>)>,
    dropped: Vec<Operation>,
    ruin: Option<Ruin>,
}

type Waiter<T, E> = oneshot::Sender<Result<T, E>>;

/// What is left of a queue pair that failed, once every request has completed.
#[derive(Debug)]
struct Ruin {
    windows: Vec<MemoryWindow>,
    lent: HashMap<u64, Lent>,
    remains: Vec<Operation>,
    live: Live,
    enders: Vec<oneshot::Sender<()>>,
}

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
    /// They lie in two registrations; [`Region::split`] them.
    #[error("the bytes lie in two pieces of the region")]
    Pieces,
    /// The region is another device's.
    #[error("the region is registered with another device")]
    OtherDevice,
    /// As many are lent as may be; wait for some to end.
    #[error("{limit} loans at once are allowed")]
    Loans {
        /// [`QueuePairConfig::loans`].
        limit: u32,
    },
    /// The device has no windows, or none left.
    #[error("the device gives no memory window")]
    Window(#[source] io::Error),
    /// The queue pair failed, before or meanwhile.
    #[error("the queue pair failed")]
    Dead(#[source] QueuePairError),
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
        let room = Room::reserve(shared, config.depth)?;
        let make = || {
            let qp = verbs::QueuePair::new(&shared.domain, &shared.completions, config.depth)?;
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
            live: Live { qp, _room: room },
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
        let number = live.qp.number();
        let connection = Arc::new(Connection {
            shared: Arc::clone(shared),
            number,
            config,
            state: Mutex::new(State {
                live: Some(live),
                pending: Pending::new(config.depth),
                lent: HashMap::new(),
                next_loan: 0,
                loans: 0,
                windows: Vec::new(),
                failed: None,
                remains: Vec::new(),
                enders: Vec::new(),
            }),
            failed: watch::Sender::new(None),
        });
        shared.insert(number, Arc::clone(&connection));
        Ok(QueuePair {
            connection,
            _device: device,
        })
    }
}

impl Room {
    fn reserve(shared: &Arc<Shared>, depth: u32) -> Result<Self, PrepareError> {
        if !shared.reserve(depth) {
            return Err(PrepareError::Completions { depth });
        }
        Ok(Self {
            shared: Arc::clone(shared),
            depth,
        })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.shared.release(self.depth);
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

impl Connection {
    /// Changes the state, and then does what comes of it.
    fn with<T>(self: &Arc<Self>, change: impl FnOnce(&mut State, &mut Later) -> T) -> T {
        let mut later = Later::default();
        // What panics does so between changes: the allocator, and waiters' channels.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let done = change(&mut state, &mut later);
        self.post(&mut state, &mut later);
        later.ruin = state.ruin();
        drop(state);
        later.run(self);
        done
    }

    async fn failed(&self) -> QueuePairError {
        let mut failed = self.failed.subscribe();
        let error = failed.wait_for(Option::is_some).await;
        // The sender is a part of `self`.
        error
            .ok()
            .and_then(|error| *error)
            .unwrap_or(QueuePairError::Closed)
    }

    async fn read(self: &Arc<Self>, pool: &Pool, from: RemoteRange) -> Result<Bytes, ReadError> {
        let limit = pool.buffer_bytes() as u64;
        let RemoteRange { length, .. } = from;
        if !pool.region().is_of(&self.shared.domain) {
            return Err(ReadError::OtherDevice);
        }
        if length > limit {
            return Err(ReadError::TooLong { length, limit });
        }
        if length == 0 {
            return Ok(Bytes::new());
        }
        let buffer = tokio::select! {
            biased;
            buffer = pool.buffer() => buffer,
            error = self.failed() => return Err(ReadError::Dead(error)),
        };
        let place = buffer.place();
        let into = pool.region().piece(&(place..place + length));
        let into = Arc::clone(into.expect("a pool's pieces are whole buffers"));
        let (waiter, done) = oneshot::channel();
        let operation = Operation::Read {
            buffer,
            into,
            from,
            waiter: Some(waiter),
        };
        self.ask(operation, length).map_err(ReadError::Dead)?;
        let closed = |_| Err(ReadError::Dead(QueuePairError::Closed));
        done.await.unwrap_or_else(closed)
    }

    async fn lend(self: &Arc<Self>, region: &Region, bytes: Bytes) -> Result<Loan, LendError> {
        if !region.is_of(&self.shared.domain) {
            return Err(LendError::OtherDevice);
        }
        let range = region.locate(&bytes).ok_or(LendError::NotRegistered)?;
        let piece = Arc::clone(region.piece(&range).ok_or(LendError::Pieces)?);
        let window = self.window()?;
        let (waiter, done) = oneshot::channel();
        let operation = Operation::Bind {
            lent: Lent {
                window,
                region: piece,
                range,
                bytes,
            },
            waiter: Some(waiter),
        };
        self.ask(operation, 0).map_err(LendError::Dead)?;
        let closed = |_| Err(LendError::Dead(QueuePairError::Closed));
        done.await.unwrap_or_else(closed)
    }

    /// A window for another loan.
    fn window(self: &Arc<Self>) -> Result<MemoryWindow, LendError> {
        let limit = self.config.loans.min(self.shared.limits.windows);
        if self.shared.limits.windows == 0 {
            return Err(LendError::Window(io::ErrorKind::Unsupported.into()));
        }
        let idle = self.with(|state, _| {
            if let Some(error) = state.failed {
                return Err(LendError::Dead(error));
            }
            if state.loans >= limit {
                return Err(LendError::Loans { limit });
            }
            state.loans += 1;
            Ok(state.windows.pop())
        })?;
        match idle {
            Some(window) => Ok(window),
            None => MemoryWindow::new(&self.shared.domain).map_err(|error| {
                self.with(|state, _| state.loans -= 1);
                LendError::Window(error)
            }),
        }
    }

    /// Ends a loan. What is returned, unless it has ended, is dropped when it has.
    fn end(self: &Arc<Self>, number: u64) -> Option<oneshot::Receiver<()>> {
        let (waiter, ended) = oneshot::channel();
        self.with(|state, _| {
            state.live.as_ref()?;
            if state.failed.is_some() {
                state.enders.push(waiter);
            } else {
                let lent = state.lent.remove(&number)?;
                let waiter = Some(waiter);
                state
                    .pending
                    .push(Operation::Invalidate { lent, waiter }, 0, 1);
            }
            Some(ended)
        })
    }

    /// Queues an operation, unless the queue pair has failed.
    fn ask(self: &Arc<Self>, operation: Operation, bytes: u64) -> Result<(), QueuePairError> {
        let part = u64::from(self.config.message_bytes);
        self.with(|state, later| match state.failed {
            None => {
                state.pending.push(operation, bytes, part);
                Ok(())
            }
            Some(error) => {
                later.dropped.push(operation);
                Err(error)
            }
        })
    }

    /// Posts what there is room for.
    fn post(&self, state: &mut State, later: &mut Later) {
        while let State {
            live: Some(live),
            pending,
            failed: None,
            ..
        } = state
            && let Some((id, part, operation)) = pending.peek()
        {
            let request = match operation {
                Operation::Read {
                    buffer, into, from, ..
                } => Request::Read {
                    into,
                    range: buffer.place() + part.start..buffer.place() + part.end,
                    key: from.key.0,
                    // What is beyond the last address is beyond any loan too.
                    from: from.offset.wrapping_add(part.start),
                },
                Operation::Bind { lent, .. } => Request::Bind {
                    window: &mut lent.window,
                    region: &lent.region,
                    range: lent.range.clone(),
                },
                Operation::Invalidate { lent, .. } => Request::Invalidate {
                    window: &lent.window,
                },
            };
            // SAFETY: `pending` owns the operation, and with it the regions and windows that the
            // request names and a read's buffer, until the completion of every part that was
            // posted has come; `finish` then keeps windows that may still be bound until the
            // queue pair is destroyed. The bytes of a buffer in `Operation::Read` are not looked
            // at before that, and parts of one read do not overlap.
            match unsafe { live.qp.post(id, request) } {
                Ok(()) => pending.posted(),
                Err(error) => {
                    let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                    self.fail_with(state, QueuePairError::Post(errno), Some(id), later);
                }
            }
        }
    }

    /// A completion of ours was taken, with its status if that is not success.
    pub(super) fn complete(self: &Arc<Self>, id: u64, status: Option<status::Type>) {
        self.with(|state, later| {
            if let Some(status) = status {
                self.fail_with(state, QueuePairError::new(status), Some(id), later);
            }
            if let Some(operation) = state.pending.completed(id) {
                self.finish(state, operation, later);
            }
        });
    }

    /// All of an operation has completed.
    fn finish(self: &Arc<Self>, state: &mut State, operation: Operation, later: &mut Later) {
        if state.failed.is_some() {
            match operation {
                // Who waited was told, and the buffer is free.
                Operation::Read { .. } => later.dropped.push(operation),
                // The window may be bound.
                Operation::Bind { .. } | Operation::Invalidate { .. } => {
                    state.remains.push(operation);
                }
            }
            return;
        }
        match operation {
            Operation::Read {
                buffer,
                from,
                waiter,
                ..
            } => {
                let length = usize::try_from(from.length).unwrap_or(usize::MAX);
                let bytes = buffer.freeze(length);
                later.reads.extend(waiter.map(|waiter| (waiter, Ok(bytes))));
            }
            Operation::Bind { lent, waiter } => {
                let number = state.next_loan;
                state.next_loan += 1;
                let loan = Loan {
                    connection: Arc::clone(self),
                    number,
                    range: RemoteRange {
                        key: RemoteKey(lent.window.remote_key()),
                        offset: lent.range.start,
                        length: lent.range.end - lent.range.start,
                    },
                };
                state.lent.insert(number, lent);
                // If nobody waits any more, it is dropped there, and so ends.
                later.loans.extend(waiter.map(|waiter| (waiter, Ok(loan))));
            }
            Operation::Invalidate { lent, waiter } => {
                state.loans -= 1;
                state.windows.push(lent.window);
                later.ended.push((lent.region, lent.bytes, waiter));
            }
        }
    }

    /// Ends it: fails what is outstanding. It is destroyed when every request has completed.
    pub(super) fn fail(self: &Arc<Self>, error: QueuePairError) {
        self.with(|state, later| self.fail_with(state, error, None, later));
    }

    /// The first failure, if of an operation then of that one, is the reason for all others.
    fn fail_with(
        &self,
        state: &mut State,
        error: QueuePairError,
        at: Option<u64>,
        later: &mut Later,
    ) {
        if state.failed.is_some() {
            return;
        }
        state.failed = Some(error);
        self.failed.send_replace(Some(error));
        if let Some(Err(error)) = state.live.as_ref().map(|live| live.qp.stop()) {
            tracing::error!(%error, "a queue pair that failed cannot be stopped");
        }
        for (id, operation) in state.pending.iter_mut() {
            match operation {
                Operation::Read { waiter, .. } => {
                    let why = match at {
                        Some(at) if at == id => ReadError::Failed(error),
                        _ => ReadError::Dead(error),
                    };
                    later
                        .reads
                        .extend(waiter.take().map(|waiter| (waiter, Err(why))));
                }
                Operation::Bind { waiter, .. } => {
                    let why = LendError::Dead(error);
                    later
                        .loans
                        .extend(waiter.take().map(|waiter| (waiter, Err(why))));
                }
                Operation::Invalidate { .. } => {}
            }
        }
        state.remains.extend(state.pending.stop());
    }
}

impl State {
    /// What is left of it, if it failed and every request has completed; once.
    fn ruin(&mut self) -> Option<Ruin> {
        if self.failed.is_none() || !self.pending.is_drained() {
            return None;
        }
        Some(Ruin {
            live: self.live.take()?,
            windows: std::mem::take(&mut self.windows),
            lent: std::mem::take(&mut self.lent),
            remains: std::mem::take(&mut self.remains),
            enders: std::mem::take(&mut self.enders),
        })
    }
}

impl Later {
    fn run(self, connection: &Connection) {
        let Self {
            reads,
            loans,
            ended,
            dropped,
            ruin,
        } = self;
        // Before it is destroyed: then another one may get its number.
        if ruin.is_some() {
            connection.shared.remove(connection.number);
        }
        drop((ended, dropped));
        if let Some(ruin) = ruin {
            ruin.destroy();
        }
        // Sending fails where nobody waits any more.
        for (waiter, read) in reads {
            let _ = waiter.send(read);
        }
        for (waiter, loan) in loans {
            let _ = waiter.send(loan);
        }
    }
}

impl Ruin {
    fn destroy(self) {
        // Each loan's window, and then its bytes.
        drop((self.lent, self.remains));
        drop(self.windows);
        drop(self.live);
        // Who waits for loans to end is told by this.
        drop(self.enders);
    }
}

impl QueuePairError {
    fn new(status: status::Type) -> Self {
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
