//! Threads that read and write the scratch file.
//!
//! Direct I/O blocks the thread that asks, so [`THREADS`] threads are that many operations in
//! the device's queue. Compared with `io_uring` that costs a switch of threads per operation;
//! it needs no `unsafe`, and a buffer in flight is owned by the thread that fills it, so nothing
//! else can touch it, come what may.
//!
//! Jobs hold several runs, so that many small reads wake few threads. Two queues: what
//! computing waits for goes first, then what is read ahead or written behind, in order.
//!
//! A thread whose operation hangs is lost until it ends, and so is the memory of its job; nobody
//! waits for it longer than the timeout, not even to end.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use kvasir_types::Checksum;
use rustix::io::Errno;

use super::PagingError;
use super::coded::Slots;
use super::file::{self, Backing, errno};
use super::frames::{FrameId, PieceId};

/// Operations in flight at once, at most.
pub(super) const THREADS: usize = 32;

/// While the disk hangs, waits last this share of the timeout, and this long at least: few of
/// those that need it then hold up the others.
const HANGING_SHARE: u32 = 10;
const HANGING_LEAST: Duration = Duration::from_millis(100);

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

/// A piece read past the frames, for one who waits for it.
#[derive(Debug)]
pub(super) struct ReadOut {
    offset: u64,
    memory: BytesMut,
    checksum: Checksum,
    to: mpsc::Sender<Result<BytesMut, Fault>>,
}

/// Why a piece has not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Device(Errno),
    Corrupt,
    Timeout,
}

/// What one thread does.
#[derive(Debug)]
pub(super) enum Work {
    Read(Vec<ReadRun>),
    Write(WriteRun),
    ReadOut(ReadOut),
}

/// Work, and how often waiting had been given up when it was submitted.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    generation: u64,
}

/// The threads. Dropping it waits until operations in flight are done, as long as the timeout
/// allows; threads that hang are left behind. What has not begun is forgotten.
#[derive(Debug)]
pub(super) struct Device {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    timeout: Duration,
    /// How often waiting was given up.
    generation: u64,
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
    /// Jobs under way.
    busy: usize,
    /// A wait was in vain, and nothing has come since.
    hangs: bool,
    /// Waits in vain.
    timeouts: u64,
    closed: bool,
}

impl Device {
    pub(super) fn new(
        backing: Arc<dyn Backing>,
        slots: Slots,
        timeout: Duration,
    ) -> Result<Self, PagingError> {
        let mut device = Self {
            shared: Arc::new(Shared {
                backing,
                slots,
                queues: Mutex::default(),
                work: Condvar::new(),
                landed: Condvar::new(),
            }),
            threads: Vec::new(),
            timeout,
            generation: 0,
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

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Whether nothing has come since a wait in vain.
    #[cfg(test)]
    pub(super) fn hangs(&self) -> bool {
        self.shared.lock().hangs
    }

    /// Waits in vain so far.
    pub(super) fn timeouts(&self) -> u64 {
        self.shared.lock().timeouts
    }

    /// Reads one piece into `memory`, and waits for it.
    pub(super) fn read_out(
        &self,
        memory: BytesMut,
        offset: u64,
        checksum: Checksum,
    ) -> Result<BytesMut, Fault> {
        let (to, from) = mpsc::channel();
        let work = Work::ReadOut(ReadOut {
            offset,
            memory,
            checksum,
            to,
        });
        self.submit(vec![work], true);
        let patience = self.patience(self.shared.lock().hangs);
        from.recv_timeout(patience).unwrap_or_else(|_| {
            self.shared.lock().note_timeout();
            Err(Fault::Timeout)
        })
    }

    /// Queues work; what is urgent goes before what is not.
    pub(super) fn submit(&self, work: Vec<Work>, urgent: bool) {
        let count = work.len();
        let generation = self.generation;
        let jobs = work.into_iter().map(|work| Job { work, generation });
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

    /// The same, once there is something; nothing after a wait in vain. The wait is short where
    /// all that is in flight `is_overdue`.
    pub(super) fn wait(&self, is_overdue: bool) -> Vec<Job> {
        let queues = self.shared.lock();
        let patience = self.patience(queues.hangs || is_overdue);
        let (mut queues, _) = self
            .shared
            .landed
            .wait_timeout_while(queues, patience, |queues| queues.done.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        if queues.done.is_empty() {
            queues.note_timeout();
        }
        std::mem::take(&mut queues.done)
    }

    /// Makes everything overdue that is in flight, and calls off what has not begun.
    pub(super) fn give_up(&mut self) -> Vec<Job> {
        self.generation += 1;
        let mut queues = self.shared.lock();
        let Queues { urgent, ahead, .. } = &mut *queues;
        let mut jobs: Vec<Job> = urgent.drain(..).chain(ahead.drain(..)).collect();
        drop(queues);
        jobs.iter_mut().for_each(|job| job.work.call_off());
        jobs
    }

    /// Whether it has been given up since the job was submitted.
    pub(super) fn is_overdue(&self, job: &Job) -> bool {
        job.generation < self.generation
    }

    fn patience(&self, hangs: bool) -> Duration {
        if hangs {
            let short = (self.timeout / HANGING_SHARE).max(HANGING_LEAST);
            short.min(self.timeout)
        } else {
            self.timeout
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let mut queues = self.shared.lock();
        queues.closed = true;
        queues.urgent.clear();
        queues.ahead.clear();
        self.shared.work.notify_all();
        let patience = self.patience(queues.hangs);
        let (queues, _) = self
            .shared
            .landed
            .wait_timeout_while(queues, patience, |queues| queues.busy > 0)
            .unwrap_or_else(PoisonError::into_inner);
        let busy = queues.busy;
        drop(queues);
        if busy > 0 {
            // They own what they read and write, and end when their operation does.
            tracing::warn!(
                threads = busy,
                "the disk of the scratch file hangs: its threads are left behind"
            );
            return;
        }
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
            let Some(job) = next.or_else(|| queues.ahead.pop_front()) else {
                queues = self
                    .work
                    .wait(queues)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queues.busy += 1;
            drop(queues);
            let Job { work, generation } = job;
            let work = work.run(&*self.backing, &self.slots);
            queues = self.lock();
            queues.busy -= 1;
            queues.hangs = false;
            let job = work.map(|work| Job { work, generation });
            queues.done.extend(job);
            self.landed.notify_one();
        }
    }
}

impl Queues {
    fn note_timeout(&mut self) {
        self.timeouts += 1;
        if !std::mem::replace(&mut self.hangs, true) {
            tracing::warn!("the disk of the scratch file hangs");
        }
    }
}

impl Work {
    /// Does it. Nothing is left of what somebody waits for elsewhere.
    fn run(self, backing: &dyn Backing, slots: &Slots) -> Option<Self> {
        match self {
            Self::Read(mut runs) => {
                runs.iter_mut().for_each(|run| run.run(backing, slots));
                Some(Self::Read(runs))
            }
            Self::Write(mut run) => {
                run.outcome = file::write_full(backing, &run.buffer[..run.len], run.offset);
                Some(Self::Write(run))
            }
            Self::ReadOut(read) => {
                read.run(backing, slots);
                None
            }
        }
    }

    /// It has not begun, and never will.
    fn call_off(&mut self) {
        match self {
            Self::Read(runs) => {
                let pieces = runs.iter_mut().flat_map(|run| &mut run.pieces);
                pieces.for_each(|piece| piece.outcome = Err(Fault::Timeout));
            }
            Self::Write(run) => run.outcome = Err(Errno::TIMEDOUT),
            Self::ReadOut(_) => {}
        }
    }
}

impl ReadOut {
    fn run(self, backing: &dyn Backing, slots: &Slots) {
        let Self {
            offset,
            mut memory,
            checksum,
            to,
        } = self;
        let part = slots.part(&mut memory);
        let read = file::read_full(backing, &mut [IoSliceMut::new(part)], offset);
        let is_sound = Checksum::of(part) == checksum;
        // Who has stopped waiting wants it no more.
        let _ = to.send(match read {
            Err(error) => Err(Fault::Device(error)),
            Ok(()) if is_sound => {
                slots.unpack(&mut memory);
                Ok(memory)
            }
            Ok(()) => Err(Fault::Corrupt),
        });
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
