//! What jobs do.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::{StreamExt as _, future, stream};
use kvasir_client::{CallError, Chunk, Client, GetEvent, GetOptions, PutOptions};
use kvasir_plugin::{Breaker, Memory as _};
use kvasir_types::{ChunkKey, Durability, Hints, KvLayout, Level};
use tokio::sync::Semaphore;
use tracing::warn;

use super::jobs::{Job, Jobs};
use crate::memory::Region;

/// Slots that are stored at the same time; more wait for their turn.
const STORES: usize = 4;

/// Gets that a load is made of, at most: one, if the daemon has all that was found there.
const GETS: usize = 3;

/// A cache's way to its daemon.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) client: Client,
    pub(super) layout: KvLayout,
    pub(super) durability: Durability,
    pub(super) load_timeout: Duration,
    pub(super) jobs: Arc<Jobs>,
    pub(super) counters: Counters,
    breaker: Mutex<Breaker>,
    turns: Semaphore,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) loads: AtomicU64,
    pub(super) loads_late: AtomicU64,
    pub(super) calls_failed: AtomicU64,
    pub(super) calls_skipped: AtomicU64,
    pub(super) stored: AtomicU64,
    pub(super) stores_failed: AtomicU64,
    pub(super) stores_dropped: AtomicU64,
}

/// A chunk, and the slot that holds it.
#[derive(Debug)]
pub(super) struct Block {
    /// Which one of the job it is.
    pub(super) index: usize,
    pub(super) key: ChunkKey,
    /// Where its slot begins.
    pub(super) at: usize,
}

pub(super) fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// Whether a failure says that the daemon is better left alone, and not merely that it had no room
/// for this.
fn is_outage(error: &CallError) -> bool {
    !matches!(
        error,
        CallError::Throttled { .. } | CallError::Invalid { .. } | CallError::Refused(_)
    )
}

impl Transfer {
    pub(super) fn new(
        client: Client,
        layout: KvLayout,
        durability: Durability,
        load_timeout: Duration,
        cooldown: Duration,
    ) -> Self {
        Self {
            client,
            layout,
            durability,
            load_timeout,
            jobs: Arc::default(),
            counters: Counters::default(),
            breaker: Mutex::new(Breaker::new(cooldown)),
            turns: Semaphore::new(STORES),
        }
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn rests(&self) -> bool {
        !self.breaker().allows(Instant::now())
    }

    /// When a call may begin: now, or not at all as long as the daemon is left alone.
    fn allowed(&self) -> Option<Instant> {
        let now = Instant::now();
        if self.breaker().allows(now) {
            return Some(now);
        }
        count(&self.counters.calls_skipped, 1);
        None
    }

    fn failed(&self, begun: Instant, error: &CallError) {
        warn!(%error, "a call of the cache failed");
        count(&self.counters.calls_failed, 1);
        if is_outage(error) {
            self.breaker().failed(begun, Instant::now());
        }
    }

    /// Which of these are there; none, as long as the daemon is left alone.
    pub(super) async fn find(&self, keys: &[ChunkKey]) -> Vec<bool> {
        let nothing = || vec![false; keys.len()];
        let Some(begun) = self.allowed() else {
            return nothing();
        };
        match self.client.lookup(keys).await {
            Ok(lookup) => {
                self.breaker().succeeded();
                lookup.found.iter().map(Option::is_some).collect()
            }
            Err(error) => {
                self.failed(begun, &error);
                nothing()
            }
        }
    }

    /// How many of these there were; none, as long as the daemon is left alone.
    pub(super) async fn delete(&self, keys: &[ChunkKey]) -> u32 {
        let Some(begun) = self.allowed() else {
            return 0;
        };
        match self.client.delete(keys).await {
            Ok(deleted) => {
                self.breaker().succeeded();
                deleted
            }
            Err(error) => {
                self.failed(begun, &error);
                0
            }
        }
    }

    /// Stores blocks, each with the hints beside it: begins with them in order, and with none
    /// behind one that did not get there.
    pub(super) async fn store(&self, memory: Arc<Region>, job: Job, blocks: Vec<(Block, Hints)>) {
        let (job, is_over) = (Arc::new(job), AtomicBool::new(false));
        let wanted = blocks.len();
        let stores = blocks.into_iter().map(async |(block, hints)| {
            let _turn = self.turns.acquire().await.ok()?;
            let goes_on = !self.jobs.is_halted() && !is_over.load(Ordering::Relaxed);
            if !goes_on || !self.store_one(&memory, &job, &block, hints).await {
                is_over.store(true, Ordering::Relaxed);
                return None;
            }
            job.came(block.index);
            Some(())
        });
        let stored = stream::iter(stores).buffered(STORES);
        let done = stored.filter_map(future::ready).count().await;
        count(&self.counters.stored, done);
        count(&self.counters.stores_failed, wanted - done);
        // Who waits for the job may want to unmap it.
        drop(memory);
        drop(job);
    }

    /// False where it did not get there.
    async fn store_one(
        &self,
        memory: &Arc<Region>,
        job: &Arc<Job>,
        block: &Block,
        hints: Hints,
    ) -> bool {
        let Some(begun) = self.allowed() else {
            return false;
        };
        let Ok(data) = memory.lend(block.at, self.layout.layer_bytes(), Arc::clone(job)) else {
            return false;
        };
        let chunk = Chunk {
            key: block.key,
            layout: self.layout,
            level: Level::RAW,
            extents: vec![data],
        };
        let options = PutOptions {
            durability: self.durability,
            hints,
        };
        match self.client.put_with(&chunk, options).await {
            Ok(_) => {
                self.breaker().succeeded();
                true
            }
            Err(error) => {
                self.failed(begun, &error);
                false
            }
        }
    }

    /// Loads blocks into their slots. A slot is written when its chunk has come whole and matches
    /// its checksum, and not before.
    pub(super) async fn load(&self, memory: Arc<Region>, job: Job, blocks: Vec<Block>) {
        self.load_all(&memory, &job, blocks).await;
        // Who waits for the job may want to unmap it.
        drop(memory);
        drop(job);
    }

    async fn load_all(&self, memory: &Arc<Region>, job: &Job, mut blocks: Vec<Block>) {
        let deadline = Instant::now() + self.load_timeout;
        count(&self.counters.loads, 1);
        for _ in 0..GETS {
            let Some(begun) = self.allowed() else {
                return;
            };
            let came = match self.get(memory, job, &blocks, deadline).await {
                Ok(came) => came,
                Err(error) => {
                    if matches!(error, CallError::DeadlineExceeded) {
                        count(&self.counters.loads_late, 1);
                    }
                    return self.failed(begun, &error);
                }
            };
            self.breaker().succeeded();
            // A get ends where one is missing, or was lost; what is behind that may be there.
            let behind = blocks.split_off(blocks.len().min(came + 1));
            if behind.is_empty() {
                return;
            }
            let keys: Vec<ChunkKey> = behind.iter().map(|block| block.key).collect();
            let found = self.find(&keys).await;
            blocks = behind
                .into_iter()
                .zip(found)
                .filter_map(|(block, found)| found.then_some(block))
                .collect();
            if blocks.is_empty() {
                return;
            }
        }
    }

    /// How many of the leading blocks came whole.
    async fn get(
        &self,
        memory: &Arc<Region>,
        job: &Job,
        blocks: &[Block],
        deadline: Instant,
    ) -> Result<usize, CallError> {
        let blocks = &blocks[..blocks.len().min(Client::MAX_GET_KEYS)];
        let keys: Vec<ChunkKey> = blocks.iter().map(|block| block.key).collect();
        let options = GetOptions {
            deadline: Some(deadline),
            ..GetOptions::default()
        };
        let mut stream = self.client.get(&keys, options).await?;
        let fits = |chunk: &&kvasir_client::ChunkInfo| {
            chunk.layout == self.layout && !chunk.level.is_encoded()
        };
        let mut coming = stream.chunks().iter().take_while(fits).count();
        let mut came = 0;
        while came < coming {
            match stream.next().await? {
                // Of one layer, so that this is all of the chunk, and they come in order.
                Some(GetEvent::Layer { chunk, parts, .. }) if chunk == came => {
                    let (memory, at) = (Arc::clone(memory), blocks[chunk].at);
                    let written = tokio::task::spawn_blocking(move || {
                        let mut at = at;
                        parts.iter().all(|part| {
                            let written = memory.write(at, part);
                            at += part.len();
                            written.is_ok()
                        })
                    });
                    if !matches!(written.await, Ok(true)) {
                        break;
                    }
                    job.came(blocks[chunk].index);
                    came += 1;
                }
                Some(GetEvent::Lost { chunk, .. }) => coming = coming.min(chunk),
                Some(_) => (),
                None => break,
            }
        }
        Ok(came)
    }
}
