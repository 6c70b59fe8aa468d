//! Jobs under way, and those that have ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// All jobs of a cache.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    state: Mutex<State>,
    changed: Condvar,
    halted: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    running: usize,
    /// Bytes that stores keep from being written.
    lent: u64,
    ended: Vec<Ended>,
}

/// What became of a job.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) id: u64,
    /// Of each of its blocks, whether it came whole.
    pub(super) whole: Vec<bool>,
    pub(super) elapsed: Duration,
}

/// A job under way. It ends when nothing holds it any more: neither its task, however that ends,
/// nor bytes of the engine's memory that are still on their way.
#[derive(Debug)]
pub(super) struct Job {
    jobs: Arc<Jobs>,
    id: u64,
    begun: Instant,
    lent: u64,
    whole: Vec<AtomicBool>,
}

impl Jobs {
    fn state(&self) -> MutexGuard<'_, State> {
        // Plain data, whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a job of so many blocks.
    pub(super) fn begin(self: &Arc<Self>, id: u64, blocks: usize) -> Job {
        self.state().running += 1;
        Job {
            jobs: Arc::clone(self),
            id,
            begun: Instant::now(),
            lent: 0,
            whole: (0..blocks).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    /// Those that have ended since this was called last.
    pub(super) fn ended(&self) -> Vec<Ended> {
        std::mem::take(&mut self.state().ended)
    }

    pub(super) fn is_halted(&self) -> bool {
        self.halted.load(Ordering::Relaxed)
    }

    /// Waits until all jobs have ended; false after `timeout`. Meanwhile none of them begins
    /// anything, if they are to be `cut`.
    pub(super) fn drain(&self, timeout: Duration, cut: bool) -> bool {
        self.halted.store(cut, Ordering::Relaxed);
        let running = |state: &mut State| state.running > 0;
        let waited = self
            .changed
            .wait_timeout_while(self.state(), timeout, running);
        let over = waited.unwrap_or_else(PoisonError::into_inner).0.running == 0;
        self.halted.store(false, Ordering::Relaxed);
        over
    }
}

impl Job {
    /// Takes as many of `blocks` blocks of memory out of use as `capacity` bytes of all jobs allow.
    pub(super) fn lend(&mut self, blocks: usize, block_bytes: usize, capacity: u64) -> usize {
        let mut state = self.jobs.state();
        let room = capacity.saturating_sub(state.lent) / (block_bytes as u64).max(1);
        let lent = usize::try_from(room).unwrap_or(usize::MAX).min(blocks);
        self.lent += (lent * block_bytes) as u64;
        state.lent += (lent * block_bytes) as u64;
        lent
    }

    /// One of its blocks came whole.
    pub(super) fn came(&self, block: usize) {
        if let Some(whole) = self.whole.get(block) {
            whole.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let whole = std::mem::take(&mut self.whole);
        let ended = Ended {
            id: self.id,
            whole: whole.into_iter().map(AtomicBool::into_inner).collect(),
            elapsed: self.begun.elapsed(),
        };
        let mut state = self.jobs.state();
        state.running -= 1;
        state.lent -= self.lent;
        state.ended.push(ended);
        drop(state);
        self.jobs.changed.notify_all();
    }
}
