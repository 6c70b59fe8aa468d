//! Connected queue pairs: what they were asked for, what they have lent, and how they end.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustix::io::Errno;
use tokio::sync::{oneshot, watch};

use super::{LendError, Loan, QueuePairConfig, QueuePairError, ReadError};
use crate::rdma::device::Shared;
use crate::rdma::pending::Pending;
use crate::rdma::pool::{Buffer, Pool};
use crate::rdma::region::Region;
use crate::rdma::verbs::{self, MemoryRegion, MemoryWindow, Request, status};
use crate::rdma::{RemoteKey, RemoteRange};

/// What a queue pair is after it was connected: it outlives its handle until every request has
/// completed.
#[derive(Debug)]
pub(in crate::rdma) struct Connection {
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
    /// Bounded, since every read in it has a buffer of a pool, and every other operation is one
    /// of a loan.
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

/// A queue pair, and then the room that is kept for its completions: dropped in this order.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) qp: verbs::QueuePair,
    _room: Room,
}

/// Room in the completion queue, until it is given back.
#[derive(Debug)]
pub(super) struct Room {
    shared: Arc<Shared>,
    depth: u32,
}

impl Connection {
    /// From here on completions of the queue pair are its.
    pub(super) fn begin(shared: &Arc<Shared>, live: Live, config: QueuePairConfig) -> Arc<Self> {
        let connection = Arc::new(Self {
            shared: Arc::clone(shared),
            number: live.qp.number(),
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
        if !shared.insert(connection.number, Arc::clone(&connection)) {
            connection.fail(QueuePairError::Completions);
        }
        connection
    }

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

    pub(super) async fn failed(&self) -> QueuePairError {
        let mut failed = self.failed.subscribe();
        let error = failed.wait_for(Option::is_some).await;
        // The sender is a part of `self`.
        error
            .ok()
            .and_then(|error| *error)
            .unwrap_or(QueuePairError::Closed)
    }

    pub(super) async fn read(
        self: &Arc<Self>,
        pool: &Pool,
        from: RemoteRange,
    ) -> Result<Bytes, ReadError> {
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

    pub(super) async fn lend(
        self: &Arc<Self>,
        region: &Region,
        bytes: Bytes,
    ) -> Result<Loan, LendError> {
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
    pub(super) fn end(self: &Arc<Self>, number: u64) -> Option<oneshot::Receiver<()>> {
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
                    from: from.offset.saturating_add(part.start),
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
    pub(in crate::rdma) fn complete(self: &Arc<Self>, id: u64, status: Option<status::Type>) {
        self.with(|state, later| {
            if let Some(status) = status {
                self.fail_with(state, QueuePairError::from_status(status), Some(id), later);
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
    pub(in crate::rdma) fn fail(self: &Arc<Self>, error: QueuePairError) {
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

impl Live {
    pub(super) fn new(qp: verbs::QueuePair, room: Room) -> Self {
        Self { qp, _room: room }
    }
}

impl Room {
    /// `None` if there is none.
    pub(super) fn reserve(shared: &Arc<Shared>, depth: u32) -> Option<Self> {
        shared.reserve(depth).then(|| Self {
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
