//! Chunks on their way from memory to disk.
//!
//! A chunk that was put with [`Durability::Memory`](kvasir_types::Durability) is in memory
//! alone. Before it is evicted it moves to disk, if the tier's
//! [`Admission`](crate::policy::Admission) thinks it worth the write. To evict at
//! once when room is needed, this runs ahead of eviction: it copies what would go
//! next, an eighth of the memory, so that what is evicted is mostly on disk already or
//! not worth it. Puts that find memory full wait for it for a while; reads never do, so
//! many of them at once, from disk, may evict what was to be copied.
//!
//! A chunk stays in memory, readable, while it is copied.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::stream::{self, StreamExt as _};
use kvasir_codec::ObjectHeader;
use tokio::sync::{Mutex, Notify};
use tokio::task::AbortHandle;

use crate::disk::DiskTier;
use crate::index::Worth;
use crate::memory::{Candidate, Chunk};
use crate::policy::{Admission, Prospect};
use crate::store::Inner;
use crate::tier::Written;

/// When to look for chunks to demote. Looks happen in the background.
#[derive(Debug)]
pub(crate) struct Demotions {
    admission: Admission,
    /// Bytes ahead of eviction that are looked at.
    window: u64,
    /// Whether any chunk was ever put into memory alone. Else there is nothing to do.
    needed: AtomicBool,
    /// Bytes that came into memory since the last look.
    fresh: AtomicU64,
    look: Arc<Notify>,
    /// Looks that were asked for, and how many of them are over.
    asked: AtomicU64,
    over: AtomicU64,
    /// A chunk was copied, or a look ended.
    progress: Notify,
    /// Held during a look, and longer than the look holds the store, so that who waits
    /// for it may be the last to hold the store. `true` once no look may begin.
    closed: Arc<Mutex<bool>>,
    task: OnceLock<AbortHandle>,
}

impl Demotions {
    /// For a memory tier of `capacity` bytes.
    pub(crate) fn new(admission: Admission, capacity: u64) -> Self {
        Self {
            admission,
            window: capacity / WINDOW,
            needed: AtomicBool::new(false),
            fresh: AtomicU64::new(0),
            look: Arc::default(),
            asked: AtomicU64::new(0),
            over: AtomicU64::new(0),
            progress: Notify::new(),
            closed: Arc::default(),
            task: OnceLock::new(),
        }
    }

    /// Looks whenever it is time to, as long as the store lives.
    pub(crate) fn start(store: &Arc<Inner>) {
        let look = Arc::clone(&store.demotions.look);
        let closed = Arc::clone(&store.demotions.closed);
        let weak = Arc::downgrade(store);
        let task = tokio::spawn(async move {
            loop {
                look.notified().await;
                let closed = closed.lock().await;
                let Some(store) = weak.upgrade() else { return };
                if !*closed {
                    store.demote().await;
                }
            }
        });
        // Started once.
        let _ = store.demotions.task.set(task.abort_handle());
    }

    /// `bytes` more come into memory, which has `room`.
    fn grown(&self, bytes: u64, room: u64) {
        if !self.is_needed() {
            return;
        }
        let fresh = self.fresh.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if room < 2 * self.window && fresh >= self.window / LOOKS_PER_WINDOW {
            self.ask();
        }
    }

    fn is_needed(&self) -> bool {
        self.needed.load(Ordering::Relaxed)
    }

    fn ask(&self) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.look.notify_one();
    }

    fn is_looking(&self) -> bool {
        self.over.load(Ordering::SeqCst) < self.asked.load(Ordering::SeqCst)
    }
}

impl Drop for Demotions {
    fn drop(&mut self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

impl Inner {
    /// A chunk is in memory alone.
    pub(crate) fn demote_later(&self, chunk: &Chunk) {
        self.demotions.needed.store(true, Ordering::Relaxed);
        self.demote_others(chunk.header());
    }

    /// A chunk of this header is in memory from now on, or on its way there.
    pub(crate) fn demote_others(&self, header: &ObjectHeader) {
        let bytes = Chunk::charged_bytes(header);
        self.demotions.grown(bytes, self.memory.room());
    }

    /// Waits until room for `bytes` costs no chunk that is still to be copied, or that
    /// takes too long.
    pub(crate) async fn demotions_catch_up(&self, bytes: u64) {
        let demotions = &self.demotions;
        let (Some(disk), true) = (&self.disk, demotions.is_needed()) else {
            return;
        };
        // Copying needs buffers too.
        let wanted = bytes.saturating_add((demotions.window / 2).min(BUFFERS_BYTES));
        let caught_up = async {
            loop {
                let progress = demotions.progress.notified();
                let missing = wanted.saturating_sub(self.memory.room());
                if missing == 0 {
                    return;
                }
                let soon = self.memory.soon_evicted(missing);
                if !soon.iter().any(|soon| self.is_to_be_copied(disk, soon)) {
                    return;
                }
                if !demotions.is_looking() {
                    // The order changed since the last look: time passed.
                    demotions.ask();
                }
                progress.await;
            }
        };
        // Then memory evicts what is not on disk yet.
        let _ = tokio::time::timeout(PATIENCE, caught_up).await;
    }

    /// Copies what would be evicted next, where it is worth it. The caller holds
    /// `closed`.
    async fn demote(&self) {
        let demotions = &self.demotions;
        let asked = demotions.asked.load(Ordering::SeqCst);
        demotions.fresh.store(0, Ordering::Relaxed);
        if let Some(disk) = &self.disk {
            let soon = self.memory.soon_evicted(demotions.window);
            self.copy(disk, soon).await;
        }
        demotions.over.store(asked, Ordering::SeqCst);
        demotions.progress.notify_waiters();
    }

    /// Copies all that is worth it, and no more from then on.
    pub(crate) async fn demote_all(&self) {
        let mut closed = self.demotions.closed.lock().await;
        if let (Some(disk), false) = (&self.disk, *closed) {
            self.copy(disk, self.memory.candidates()).await;
        }
        *closed = true;
    }

    fn is_to_be_copied(&self, disk: &DiskTier, candidate: &Candidate) -> bool {
        let admits = self.demotions.admission.admits(&candidate.prospect);
        admits && !disk.contains(&candidate.key)
    }

    async fn copy(&self, disk: &DiskTier, mut candidates: Vec<Candidate>) {
        candidates.retain(|candidate| self.is_to_be_copied(disk, candidate));
        stream::iter(candidates)
            .for_each_concurrent(COPIES, |candidate| async move {
                if let Some(chunk) = candidate.chunk.upgrade() {
                    self.copy_one(disk, chunk, candidate.prospect).await;
                }
                self.demotions.progress.notify_waiters();
            })
            .await;
    }

    async fn copy_one(&self, disk: &DiskTier, chunk: Arc<Chunk>, prospect: Prospect) {
        let key = *chunk.key();
        // Deletion takes the claim too, so that it cannot slip in between.
        let _claim = self.claims.claim(key).await;
        if !self.memory.has(&chunk) {
            return;
        }
        let worth = Worth {
            hints: chunk.hints(),
            uses: prospect.uses,
        };
        let header = Arc::clone(chunk.header());
        match disk.store(header, chunk.share(), worth).await {
            Ok(Written::Stored | Written::AlreadyPresent) => (),
            Ok(Written::Throttled(throttled)) => {
                tracing::debug!(%key, %throttled, "a chunk does not move to disk");
            }
            // Counted by the tier.
            Err(error) => tracing::warn!(%key, %error, "cannot move a chunk to disk"),
        }
    }
}

/// Which part of the memory is looked at ahead of eviction.
const WINDOW: u64 = 8;
const LOOKS_PER_WINDOW: u64 = 4;
/// Chunks on their way at once.
const COPIES: usize = 4;
/// More than the disk tier's writers need.
const BUFFERS_BYTES: u64 = 8 << 20;
/// How long a put waits for room that is being made. A device that stalls for longer
/// costs chunks their place, not their writers more time.
const PATIENCE: Duration = Duration::from_secs(1);
