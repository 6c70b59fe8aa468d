//! A directory of a local file system: payload in flat files, a catalog in RocksDB.
//!
//! ```text
//! LOCK            held while a daemon uses the directory
//! catalog/        RocksDB: key → layout, level, size, generation
//! chunks/00..ff/  one file per chunk
//! ```
//!
//! A write goes payload → sync → rename → sync of the directory → catalog record,
//! synced → index. The index is in memory and publishes last; lookups never touch
//! the catalog, which is read once, at startup. A crash loses only writes that were
//! not acknowledged.
//!
//! All file and catalog work runs on blocking threads, at most `io-depth` at once,
//! and each step runs to its end even when its caller goes away. Work on one key's
//! published state (publish, remove, evict) is serialized by a stripe lock, which
//! is taken before the index lock and never across an await.
//!
//! Not here: the payload format (`kvasir_codec`), read buffers ([`MemoryTier`]).

mod catalog;
mod files;
mod reader;
mod recover;

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use kvasir_codec::{Object, ObjectHeader};
use kvasir_types::ChunkKey;
use tokio::sync::Semaphore;

use self::catalog::{Catalog, Record};
use self::files::{ChunkFiles, create_directory, sync_directory};
pub(crate) use self::reader::DiskReader;
use crate::blocking::blocking;
use crate::budget::{Budget, Reservation, Throttled};
use crate::clock::Clock;
use crate::config::DiskConfig;
use crate::events::EventLog;
use crate::index::{Counters, Entry, Index, count};
use crate::memory::MemoryTier;
use crate::pins::{PinId, PinRefused};
use crate::tier::{ChunkReader, DeviceError, Facts, Tier, TierKind, Usage, WriteError, Written};

/// The disk tier. Clones are handles to the same tier.
#[derive(Clone, Debug)]
pub struct DiskTier(Arc<Shared>);

/// Why a directory could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another daemon uses it.
    #[error("{0} is in use by another process; stop that one, or give this one another directory")]
    Locked(PathBuf),
    /// The directory cannot be created or locked.
    #[error("cannot use {path} as a store directory; check that it exists and is writable")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// Its contents cannot be read.
    #[error("cannot recover the chunks in {path}")]
    Recover {
        /// The directory.
        path: PathBuf,
        /// What happened.
        #[source]
        source: DeviceError,
    },
}

/// Fields drop in order: the lock goes last.
#[derive(Debug)]
struct Shared {
    files: ChunkFiles,
    catalog: Catalog,
    budget: Budget,
    index: Mutex<Index<DiskEntry>>,
    stripes: [Mutex<()>; STRIPES],
    next_generation: AtomicU64,
    counters: Counters,
    clock: Clock,
    memory: MemoryTier,
    permits: Arc<Semaphore>,
    io_depth: u32,
    /// Space of files that could not be deleted. It stays taken until the next
    /// start, which deletes them.
    undeleted: Mutex<Vec<Arc<Reservation>>>,
    _lock: File,
}

#[derive(Clone, Debug)]
struct DiskEntry {
    facts: Facts,
    generation: u64,
    /// Shared with readers: the blocks of an unlinked file are free only when the
    /// last of them closes it.
    space: Arc<Reservation>,
}

impl Entry for DiskEntry {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn charged_bytes(&self) -> u64 {
        self.space.bytes()
    }

    fn is_held(&self) -> bool {
        Arc::strong_count(&self.space) > 1
    }
}

impl DiskTier {
    /// Opens a directory and recovers what it holds. `memory` pays for the buffers
    /// that chunks are read into.
    ///
    /// # Errors
    /// The directory is in use, cannot be written, or cannot be read.
    pub async fn open(
        config: DiskConfig,
        memory: MemoryTier,
        clock: Clock,
        events: EventLog,
    ) -> Result<Self, OpenError> {
        let path = config.path.clone();
        blocking(move || Self::open_blocking(&config, memory, clock, events))
            .await
            .unwrap_or_else(|source| Err(OpenError::Recover { path, source }))
    }

    fn open_blocking(
        config: &DiskConfig,
        memory: MemoryTier,
        clock: Clock,
        events: EventLog,
    ) -> Result<Self, OpenError> {
        let path = &config.path;
        let lock = lock(path)?;
        let recover_error = |source| OpenError::Recover {
            path: path.clone(),
            source,
        };
        let files = ChunkFiles::open(path.join("chunks"), config.drop_page_cache)
            .map_err(|error| recover_error(error.into()))?;
        let catalog =
            Catalog::open(&path.join("catalog")).map_err(|error| recover_error(error.into()))?;
        // The names of lock, files and catalog.
        sync_directory(path).map_err(|error| recover_error(error.into()))?;
        let recovered = recover::recover(&catalog, &files).map_err(recover_error)?;
        tracing::info!(
            path = %path.display(),
            chunks = recovered.records.len(),
            temporary = recovered.swept.temporary,
            orphans = recovered.swept.orphans,
            records = recovered.swept.records,
            "recovered the disk tier",
        );

        let budget = Budget::new(config.capacity.as_u64());
        let io_depth = config.io_depth.max(1);
        let shared = Shared {
            files,
            catalog,
            index: Mutex::new(Index::new(TierKind::Disk, config.pin_limit_bytes(), events)),
            budget,
            stripes: std::array::from_fn(|_| Mutex::new(())),
            next_generation: AtomicU64::new(recovered.next_generation),
            counters: Counters::default(),
            clock,
            memory,
            permits: Arc::new(Semaphore::new(usize::from(io_depth))),
            io_depth: u32::from(io_depth),
            undeleted: Mutex::default(),
            _lock: lock,
        };
        shared.adopt(&recovered.records).map_err(recover_error)?;
        shared.warn_of_little_room(path);
        Ok(Self(Arc::new(shared)))
    }

    /// Stores an object of checked parts.
    pub(crate) async fn store(
        &self,
        header: Arc<ObjectHeader>,
        layers: Vec<Bytes>,
    ) -> Result<Written, WriteError> {
        let key = *header.key();
        if self.touch(&key) {
            return Ok(Written::AlreadyPresent);
        }
        let bytes = space_of(header.object_bytes());
        let capacity = self.0.budget.capacity();
        if bytes > capacity {
            return Err(WriteError::TooLarge {
                tier: TierKind::Disk,
                bytes,
                capacity,
            });
        }
        let written = self
            .run(move |shared| {
                shared
                    .store(&header, &layers, bytes)
                    .inspect_err(|_| count(&shared.counters.failures))
            })
            .await??;
        Ok(written)
    }

    /// Opens a chunk; `None` is a miss.
    pub(crate) async fn reader(&self, key: ChunkKey) -> Result<Option<DiskReader>, DeviceError> {
        let entry = self.0.lock().touch(&key).cloned();
        let reader = match entry {
            Some(entry) => {
                let tier = self.clone();
                self.run(move |_| tier.open_entry(&entry)).await??
            }
            None => None,
        };
        count(if reader.is_some() {
            &self.0.counters.hits
        } else {
            &self.0.counters.misses
        });
        Ok(reader)
    }

    pub(crate) fn contains(&self, key: &ChunkKey) -> bool {
        self.0.lock().contains(key)
    }

    pub(crate) fn touch(&self, key: &ChunkKey) -> bool {
        self.0.lock().touch(key).is_some()
    }

    pub(crate) fn pin_ids(&self) -> Vec<PinId> {
        self.0.lock().pin_ids(self.0.clock.now())
    }

    /// Runs `view` on the locked index, and gives it its keys.
    pub(crate) fn keys_with<T>(&self, view: impl FnOnce(Vec<ChunkKey>) -> T) -> T {
        let index = self.0.lock();
        view(index.iter().map(|entry| entry.facts.key).collect())
    }

    /// Waits for work in progress, refuses more, and makes the catalog durable.
    ///
    /// # Errors
    /// The catalog failed.
    pub async fn close(&self) -> Result<(), DeviceError> {
        // An error means that it was closed before.
        let idle = self.0.permits.acquire_many(self.0.io_depth).await;
        self.0.permits.close();
        drop(idle);
        let shared = Arc::clone(&self.0);
        blocking(move || shared.catalog.flush()).await??;
        Ok(())
    }

    /// Runs `work` on a blocking thread, in turn. Counts device failures.
    async fn run<T, E>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, E> + Send + 'static,
    ) -> Result<Result<T, E>, DeviceError>
    where
        T: Send + 'static,
        E: Send + 'static,
    {
        let permit = Arc::clone(&self.0.permits)
            .acquire_owned()
            .await
            .map_err(|_| DeviceError::Closed)?;
        let shared = Arc::clone(&self.0);
        blocking(move || {
            // Held until the work is done, not until the caller stops waiting.
            let _permit = permit;
            work(&shared)
        })
        .await
    }
}

impl Shared {
    /// Takes recovered chunks into the index, oldest first. Where the capacity
    /// shrank, the oldest are dropped.
    fn adopt(&self, records: &[Record]) -> Result<(), DeviceError> {
        let mut excess = records
            .iter()
            .map(|record| space_of(record.facts.bytes))
            .sum::<u64>()
            .saturating_sub(self.budget.capacity());
        for record in records {
            let bytes = space_of(record.facts.bytes);
            let space = match excess {
                0 => self.budget.try_reserve(bytes),
                _ => None,
            };
            let Some(space) = space else {
                excess = excess.saturating_sub(bytes);
                self.catalog.delete(record.facts.key.as_bytes(), false)?;
                self.files.remove(&record.facts.key, record.generation)?;
                count(&self.counters.evictions);
                continue;
            };
            self.lock().insert(DiskEntry {
                facts: record.facts,
                generation: record.generation,
                space: Arc::new(space),
            });
        }
        Ok(())
    }

    fn warn_of_little_room(&self, path: &Path) {
        let wanted = self.budget.capacity().saturating_sub(self.budget.used());
        match rustix::fs::statvfs(path) {
            Ok(room) if room.f_bavail.saturating_mul(room.f_frsize) < wanted => tracing::warn!(
                path = %path.display(),
                free = room.f_bavail.saturating_mul(room.f_frsize),
                wanted,
                "the file system has less room than the capacity; lower it, or make room",
            ),
            Ok(_) => (),
            Err(error) => tracing::warn!(%error, "cannot tell how much room there is"),
        }
    }

    fn store(
        &self,
        header: &ObjectHeader,
        layers: &[Bytes],
        bytes: u64,
    ) -> Result<Written, DeviceError> {
        let mut evicted = false;
        loop {
            let space = match self.make_room(bytes)? {
                Ok(space) => space,
                Err(throttled) => {
                    count(&self.counters.throttled);
                    return Ok(Written::Throttled(throttled));
                }
            };
            let entry = DiskEntry {
                facts: Facts::of(header),
                generation: self.next_generation.fetch_add(1, Ordering::Relaxed),
                space: Arc::new(space),
            };
            match self.write(header, layers, entry) {
                // Something else fills the file system, and the capacity is more
                // than what is left.
                Err(DeviceError::Io(error)) if is_full(&error) => {
                    tracing::warn!(%error, "the file system has less room than the capacity");
                    if !evicted && self.evict(bytes)? {
                        evicted = true;
                        continue;
                    }
                    count(&self.counters.throttled);
                    return Ok(Written::Throttled(self.budget.throttled(bytes)));
                }
                written => return written,
            }
        }
    }

    fn write(
        &self,
        header: &ObjectHeader,
        layers: &[Bytes],
        entry: DiskEntry,
    ) -> Result<Written, DeviceError> {
        let (key, generation) = (entry.facts.key, entry.generation);
        let file = self
            .files
            .write(&key, generation, &header.encode(), layers)?;

        let _stripe = self.stripe(&key);
        if self.lock().touch(&key).is_some() {
            return Ok(Written::AlreadyPresent);
        }
        let committed = file
            .publish()
            .map_err(DeviceError::from)
            .and_then(|()| Ok(self.catalog.put(&Record::new(entry.facts, generation))?));
        if let Err(error) = committed {
            // What cannot be removed now is an orphan that the next start sweeps.
            let _ = self.files.remove(&key, generation);
            return Err(error);
        }
        self.lock().insert(entry);
        count(&self.counters.writes);
        Ok(Written::Stored)
    }

    /// Space for a file; evicts what it must.
    fn make_room(&self, bytes: u64) -> Result<Result<Reservation, Throttled>, DeviceError> {
        loop {
            if let Some(space) = self.budget.try_reserve(bytes) {
                return Ok(Ok(space));
            }
            let throttled = self.budget.throttled(bytes);
            let excess = throttled
                .used
                .saturating_add(bytes)
                .saturating_sub(throttled.capacity);
            if !self.evict(excess)? && excess > 0 {
                return Ok(Err(throttled));
            }
        }
    }

    /// Deletes the least recently used chunks, `bytes` of them. Says whether there
    /// were that many.
    ///
    /// # Errors
    /// The device failed. Evicting more would fail too, and empty the tier.
    fn evict(&self, bytes: u64) -> Result<bool, DeviceError> {
        let victims = self.lock().evict(bytes, self.clock.now());
        let mut retired = Ok(());
        for victim in &victims {
            count(&self.counters.evictions);
            // All of them: they left the index.
            retired = retired.and(self.retire(victim, false));
        }
        retired.map(|()| !victims.is_empty())
    }

    /// Deletes record and file of an entry that left the index. Tries both.
    fn retire(&self, entry: &DiskEntry, sync: bool) -> Result<(), DeviceError> {
        let key = &entry.facts.key;
        let _stripe = self.stripe(key);
        // A newer copy has replaced the record.
        let replaced = self.lock().contains(key);
        let forgotten = if replaced {
            Ok(())
        } else {
            self.catalog.delete(key.as_bytes(), sync)
        };
        let removed = self.files.remove(key, entry.generation);
        if removed.is_err() {
            let mut undeleted = self
                .undeleted
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            undeleted.push(Arc::clone(&entry.space));
        }
        forgotten?;
        Ok(removed?)
    }

    fn remove(&self, key: &ChunkKey) -> Result<bool, DeviceError> {
        let Some(entry) = self.lock().remove(key) else {
            return Ok(false);
        };
        self.retire(&entry, true)
            .inspect_err(|_| count(&self.counters.failures))?;
        Ok(true)
    }

    /// Drops a copy that failed a check, unless it is already gone.
    fn discard_corrupt(&self, key: &ChunkKey, generation: u64) {
        let entry = {
            let mut index = self.lock();
            match index.peek(key) {
                Some(entry) if entry.generation == generation => index.remove(key),
                _ => None,
            }
        };
        let Some(entry) = entry else { return };
        count(&self.counters.corrupt);
        self.retire_or_warn(&entry, true);
    }

    fn retire_or_warn(&self, entry: &DiskEntry, sync: bool) {
        if let Err(error) = self.retire(entry, sync) {
            count(&self.counters.failures);
            let key = entry.facts.key;
            tracing::warn!(%key, %error, "cannot delete a chunk file; the next start will");
        }
    }

    fn stripe(&self, key: &ChunkKey) -> MutexGuard<'_, ()> {
        let [first_byte, ..] = *key.as_bytes();
        let stripe = &self.stripes[usize::from(first_byte) % STRIPES];
        stripe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Index<DiskEntry>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tier for DiskTier {
    fn kind(&self) -> TierKind {
        TierKind::Disk
    }

    fn write(&self, object: Object) -> BoxFuture<'_, Result<Written, WriteError>> {
        let (header, layers) = object.into_parts();
        Box::pin(self.store(header, layers))
    }

    fn open(
        &self,
        key: ChunkKey,
    ) -> BoxFuture<'_, Result<Option<Box<dyn ChunkReader>>, DeviceError>> {
        Box::pin(async move { Ok(self.reader(key).await?.map(|reader| Box::new(reader) as _)) })
    }

    fn find(&self, keys: &[ChunkKey]) -> Vec<Option<Facts>> {
        self.0.lock().find(keys)
    }

    fn remove(&self, key: ChunkKey) -> BoxFuture<'_, Result<bool, DeviceError>> {
        Box::pin(async move {
            // Without this, a miss would wait for a thread.
            if !self.contains(&key) {
                return Ok(false);
            }
            self.run(move |shared| shared.remove(&key)).await?
        })
    }

    fn pin(&self, id: PinId, keys: &[ChunkKey], expires: Instant) -> Result<(), PinRefused> {
        self.0.lock().pin(id, keys, expires, self.0.clock.now())
    }

    fn unpin(&self, id: PinId) -> bool {
        self.0.lock().unpin(id, self.0.clock.now())
    }

    fn entries(&self) -> Vec<Facts> {
        self.0.lock().iter().map(|entry| entry.facts).collect()
    }

    fn list(&self, after: Option<&ChunkKey>, limit: usize) -> Vec<Facts> {
        self.0.lock().list(after, limit)
    }

    fn usage(&self) -> Usage {
        let shared = &*self.0;
        shared
            .lock()
            .usage(&shared.counters, &shared.budget, shared.clock.now())
    }
}

/// Creates and locks a directory. The lock ends with the file, also on a crash.
fn lock(path: &Path) -> Result<File, OpenError> {
    let directory_error = |source| OpenError::Directory {
        path: path.to_owned(),
        source,
    };
    create_directory(path).map_err(directory_error)?;
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path.join("LOCK"))
        .map_err(directory_error)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked(path.to_owned())),
        Err(TryLockError::Error(source)) => Err(directory_error(source)),
    }
}

fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

/// Bytes a file of this length takes: whole file-system blocks.
const fn space_of(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK_BYTES)
}

const BLOCK_BYTES: u64 = 4096;
const STRIPES: usize = 64;
