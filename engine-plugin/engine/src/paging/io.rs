//! Threads that read and write the scratch file.
//!
//! Direct I/O blocks the thread that asks, so [`THREADS`] threads are that many operations in
//! the device's queue. Compared with `io_uring` that costs a switch of threads per operation;
//! it needs no `unsafe`, and a buffer in flight is owned by the thread that fills it, so nothing
//! else can touch it, come what may.
//!
//! Jobs hold several runs, so that many small reads wake few threads. Two queues: what
//! computing waits for goes first, then what is read ahead or written behind, in order.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use bytes::BytesMut;
use kvasir_types::Checksum;
use rustix::io::Errno;

use super::PagingError;
use super::coded::Slots;
use super::file::{self, Backing, errno};
use super::frames::{FrameId, PieceId};

/// Operations in flight at once, at most.
pub(super) const THREADS: usize = 32;

/// Adjoining pieces to be read.
#[derive(Debug)]
pub(super) struct ReadRun {
    pub(super) offset: u64,
    pub(super) pieces: Vec<ReadPiece>,
}

/// A piece on its way into a frame, whose memory it owns until then.
#[derive(Debug)]
pub(super) struct ReadPiece {
    pub(super) piece: PieceId,
    pub(super) frame: FrameId,
    pub(super) memory: BytesMut,
    pub(super) checksum: Checksum,
    /// Asked for before it was wanted.
    pub(super) ahead: bool,
    pub(super) outcome: Result<(), Fault>,
}

/// Adjoining pieces to be written, and their checksums.
#[derive(Debug)]
pub(super) struct WriteRun {
    pub(super) offset: u64,
    pub(super) pieces: Vec<(PieceId, Checksum)>,
    /// One piece after another, and room behind them.
    pub(super) buffer: BytesMut,
    pub(super) len: usize,
    pub(super) outcome: Result<(), Errno>,
}

/// Why a piece has not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Device(Errno),
    Corrupt,
}

/// Work for one thread.
#[derive(Debug)]
pub(super) enum Job {
    Read(Vec<ReadRun>),
    Write(WriteRun),
}

/// The threads. Dropping it waits until operations in flight are done; others are forgotten.
#[derive(Debug)]
pub(super) struct Device {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    backing: Arc<dyn Backing>,
    slots: Slots,
    queues: Mutex<Queues>,
    /// Rung when there is work, or none any more.
    work: Condvar,
    /// Rung when a job is done.
    landed: Condvar,
}

#[derive(Debug, Default)]
struct Queues {
    urgent: VecDeque<Job>,
    ahead: VecDeque<Job>,
    done: Vec<Job>,
    closed: bool,
}

impl Device {
    pub(super) fn new(backing: Arc<dyn Backing>, slots: Slots) -> Result<Self, PagingError> {
        let mut device = Self {
            shared: Arc::new(Shared {
                backing,
                slots,
                queues: Mutex::default(),
                work: Condvar::new(),
                landed: Condvar::new(),
            }),
            threads: Vec::new(),
        };
        for _ in 0..THREADS {
            let shared = Arc::clone(&device.shared);
            let thread = std::thread::Builder::new()
                .name("pager".into())
                .spawn(move || shared.work())
                .map_err(|error| PagingError::Threads(errno(&error)))?;
            device.threads.push(thread);
        }
        Ok(device)
    }

    /// Reads one piece on this thread.
    pub(super) fn read_now(
        &self,
        into: &mut [u8],
        offset: u64,
        checksum: Checksum,
    ) -> Result<(), Fault> {
        let mut slices = [IoSliceMut::new(into)];
        file::read_full(&*self.shared.backing, &mut slices, offset).map_err(Fault::Device)?;
        if Checksum::of(into) == checksum {
            Ok(())
        } else {
            Err(Fault::Corrupt)
        }
    }

    /// Queues jobs; those that are urgent go before those that are not.
    pub(super) fn submit(&self, jobs: Vec<Job>, urgent: bool) {
        let count = jobs.len();
        let mut queues = self.shared.lock();
        if urgent {
            queues.urgent.extend(jobs);
        } else {
            queues.ahead.extend(jobs);
        }
        drop(queues);
        for _ in 0..count {
            self.shared.work.notify_one();
        }
    }

    /// Makes everything that is queued urgent.
    pub(super) fn promote(&self) {
        let mut queues = self.shared.lock();
        let ahead = std::mem::take(&mut queues.ahead);
        queues.urgent.extend(ahead);
    }

    /// What is done.
    pub(super) fn done(&self) -> Vec<Job> {
        std::mem::take(&mut self.shared.lock().done)
    }

    /// The same, once there is something. Something must be in flight.
    pub(super) fn wait(&self) -> Vec<Job> {
        let mut queues = self.shared.lock();
        while queues.done.is_empty() {
            queues = self
                .shared
                .landed
                .wait(queues)
                .unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut queues.done)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let mut queues = self.shared.lock();
        queues.closed = true;
        queues.urgent.clear();
        queues.ahead.clear();
        drop(queues);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to wait for.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Queues are whole between any two statements, so a panic elsewhere leaves them usable.
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut queues = self.lock();
        while !queues.closed {
            let next = queues.urgent.pop_front();
            let Some(mut job) = next.or_else(|| queues.ahead.pop_front()) else {
                queues = self
                    .work
                    .wait(queues)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(queues);
            job.run(&*self.backing, &self.slots);
            queues = self.lock();
            queues.done.push(job);
            self.landed.notify_one();
        }
    }
}

impl Job {
    fn run(&mut self, backing: &dyn Backing, slots: &Slots) {
        match self {
            Self::Read(runs) => runs.iter_mut().for_each(|run| run.run(backing, slots)),
            Self::Write(run) => {
                run.outcome = file::write_full(backing, &run.buffer[..run.len], run.offset);
            }
        }
    }
}

impl ReadRun {
    fn run(&mut self, backing: &dyn Backing, slots: &Slots) {
        let mut memory: Vec<IoSliceMut<'_>> = self
            .pieces
            .iter_mut()
            .map(|piece| IoSliceMut::new(slots.part(&mut piece.memory)))
            .collect();
        let read = file::read_full(backing, &mut memory, self.offset);
        for piece in &mut self.pieces {
            piece.outcome = match read {
                Err(error) => Err(Fault::Device(error)),
                Ok(()) if Checksum::of(slots.part(&mut piece.memory)) == piece.checksum => Ok(()),
                Ok(()) => Err(Fault::Corrupt),
            };
            if piece.outcome.is_ok() {
                slots.unpack(&mut piece.memory);
            }
        }
    }
}
