//! A directory of a local file system: payload in segments, a catalog in RocksDB.
//!
//! ```text
//! LOCK            held while a daemon uses the directory
//! catalog/        RocksDB: key and place → layout, level, size
//! segments/       files of many chunks each, written and read past
//!                 the page cache
//! profiles/       codec profiles; see `profiles`
//! ```
//!
//! A write goes payload → sync of segment and catalog record, side by side → index.
//! Neither sync waits for the other: a record whose frame was not synced fails its
//! check and is a miss, a frame without a record is swept at the next start, and the
//! writer hears of success after both. The index is in memory and publishes last;
//! lookups never touch the catalog, which is read once, at startup. A crash loses only
//! writes that were not acknowledged.
//!
//! Why payload is not in RocksDB: its blob files gave 0.2 to 0.6 GB/s of CPU time on a
//! disk that reads and writes 1.2 to 1.9 GB/s past the page cache.
//!
//! The frames of evicted chunks are written again, in place: nothing is copied to reclaim
//! space, and a sync of what lay there before costs less than one of what is new. While a
//! reader holds a frame, it waits. A place is free once the record of what lay there is
//! deleted, in the order of the catalog's log, so no record outlives its frame and claims
//! the next one. Should a power cut lose the deletion, it also loses the next record, and
//! a frame that was half overwritten by then fails its check.
//!
//! All file and catalog work runs on blocking threads, at most `io-depth` at once,
//! and each step runs to its end even when its caller goes away. A key has one writer
//! at a time. The record of a place is deleted before the place is used again, so whoever
//! deletes an old copy cannot touch a new one.
//!
//! Not here: the payload format (`kvasir_codec`), read buffers ([`MemoryTier`]).

mod catalog;
mod legacy;
mod medium;
#[cfg(all(test, kvasir_loom))]
mod models;
mod reader;
mod recover;
mod segment;
mod segments;
mod space;

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use kvasir_codec::{Object, ObjectHeader};
use kvasir_types::{ChunkKey, Class, Hints, KvLayout, LayoutDigest, Level};
use tokio::sync::Semaphore;

use self::catalog::{Catalog, LegacyRecord, Record};
pub use self::medium::{DirectIo, Medium, MediumFile};
pub(crate) use self::reader::DiskReader;
use self::segment::{Location, SegmentId, frame_bytes};
use self::segments::{BeginError, Segments};
use crate::blocking::blocking;
use crate::budget::{Budget, Reservation, Throttled};
use crate::claims::Claims;
use crate::clock::Clock;
use crate::config::DiskConfig;
use crate::environment::Environment;
use crate::events::EventLog;
use crate::index::{self, Counters, Entry, Index, Worth, count};
use crate::memory::MemoryTier;
use crate::pins::{PinId, PinRefused};
use crate::policy::ClassLimits;
use crate::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard};
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
    segments: Segments,
    catalog: Catalog,
    budget: Budget,
    chunks: Mutex<Chunks>,
    /// Shared by whoever takes a chunk out of the index, until its record is gone too.
    removing: RwLock<()>,
    claims: Claims,
    counters: Counters,
    clock: Clock,
    memory: MemoryTier,
    permits: Arc<Semaphore>,
    io_depth: u32,
    /// Each writer has a segment of its own.
    writers: Arc<Semaphore>,
    _lock: File,
}

/// What lies where.
#[derive(Debug)]
struct Chunks {
    index: Index<DiskEntry>,
    /// Frames that left the index while readers hold them.
    retired: HashMap<Location, DiskEntry>,
    /// The geometries in use: few, and large.
    layouts: HashMap<KvLayout, Arc<Geometry>>,
}

#[derive(Debug)]
struct Geometry {
    layout: KvLayout,
    digest: LayoutDigest,
}

/// A stored chunk. Kept small: there are many.
#[derive(Clone, Debug)]
struct DiskEntry {
    key: ChunkKey,
    geometry: Arc<Geometry>,
    location: Location,
    /// A chunk has at most [`KvLayout::MAX_CHUNK_BYTES`], and a header.
    object_bytes: u32,
    readers: u32,
    recompute: Option<NonZeroU32>,
    level: Level,
    class: Class,
}

impl DiskEntry {
    fn facts_of(&self) -> Facts {
        Facts {
            key: self.key,
            layout: self.geometry.layout,
            layout_digest: self.geometry.digest,
            level: self.level,
            bytes: self.object_bytes.into(),
        }
    }

    /// Bytes of the frame.
    fn space(&self) -> u64 {
        frame_bytes(&self.geometry.layout, self.level, self.object_bytes.into())
    }

    fn record_key(&self) -> impl AsRef<[u8]> + use<> {
        Record::key_of(&self.key, self.location)
    }
}

impl Entry for DiskEntry {
    fn key(&self) -> &ChunkKey {
        &self.key
    }

    fn facts(&self) -> Facts {
        self.facts_of()
    }

    fn charged_bytes(&self) -> u64 {
        self.space()
    }

    fn is_held(&self) -> bool {
        self.readers > 0
    }
}

impl Chunks {
    /// An entry for a frame; `None` where its size is impossible.
    fn entry(&mut self, record: &Record) -> Option<DiskEntry> {
        let geometry = self.layouts.entry(record.layout).or_insert_with(|| {
            Arc::new(Geometry {
                layout: record.layout,
                digest: record.layout.digest(),
            })
        });
        Some(DiskEntry {
            key: record.key,
            geometry: Arc::clone(geometry),
            location: record.location,
            object_bytes: u32::try_from(record.object_bytes).ok()?,
            readers: 0,
            recompute: record.hints.recompute,
            level: record.level,
            class: record.hints.class,
        })
    }

    /// A chunk as the most recently used, with one reader more.
    fn hold(&mut self, key: &ChunkKey, now: Instant) -> Option<DiskEntry> {
        let entry = self.index.touch(key, now)?;
        entry.readers += 1;
        Some(entry.clone())
    }

    /// Ends a hold. Gives the entry whose space nobody needs any more.
    fn release(&mut self, key: &ChunkKey, location: Location) -> Option<DiskEntry> {
        match self.index.peek_mut(key) {
            Some(entry) if entry.location == location => {
                entry.readers -= 1;
                None
            }
            _ => {
                let retired = self.retired.get_mut(&location)?;
                retired.readers -= 1;
                (retired.readers == 0)
                    .then(|| self.retired.remove(&location))
                    .flatten()
            }
        }
    }

    /// Takes a chunk out of the index. Its readers keep its frame.
    fn remove(&mut self, key: &ChunkKey) -> Option<DiskEntry> {
        let entry = self.index.remove(key)?;
        if entry.readers > 0 {
            self.retired.insert(entry.location, entry.clone());
        }
        Some(entry)
    }
}

impl DiskTier {
    /// Opens a directory and recovers what it holds. `memory` pays for the buffers
    /// that chunks are read into.
    ///
    /// # Errors
    /// The directory is in use, cannot be written, or cannot be read.
    pub async fn open(
        environment: Environment,
        config: DiskConfig,
        memory: MemoryTier,
        events: EventLog,
    ) -> Result<Self, OpenError> {
        let path = config.path.clone();
        blocking(move || Self::open_blocking(environment, &config, memory, events))
            .await
            .unwrap_or_else(|source| Err(OpenError::Recover { path, source }))
    }

    fn open_blocking(
        environment: Environment,
        config: &DiskConfig,
        memory: MemoryTier,
        events: EventLog,
    ) -> Result<Self, OpenError> {
        let lock = lock(&config.path)?;
        let tier = Self::recover(environment, config, memory, events, lock);
        tier.map_err(|source| OpenError::Recover {
            path: config.path.clone(),
            source,
        })
    }

    fn recover(
        environment: Environment,
        config: &DiskConfig,
        memory: MemoryTier,
        events: EventLog,
        lock: File,
    ) -> Result<Self, DeviceError> {
        let Environment { clock, medium } = environment;
        let path = &config.path;
        let root = path.join("segments");
        fs::create_dir_all(&root)?;
        let catalog = Catalog::open(&path.join("catalog"))?;
        // The names of lock, segments and catalog.
        sync_directory(path)?;
        let store = catalog.store_id()?;
        let recovered = recover::recover(&catalog, &*medium, &root, &store)?;
        tracing::info!(
            path = %path.display(),
            chunks = recovered.records.len(),
            segments = recovered.swept.segments,
            orphan_bytes = recovered.swept.orphan_bytes,
            records = recovered.swept.records,
            "recovered the disk tier",
        );

        let capacity = config.capacity.as_u64();
        let io_depth = config.io_depth.max(1);
        let mut live: HashMap<SegmentId, u64> = HashMap::new();
        for record in &recovered.records {
            *live.entry(record.location.segment).or_default() += space_of(record);
        }
        let next = recovered.next_segment;
        let shared = Shared {
            segments: Segments::new(medium, root, store, memory.clone(), capacity, live, next),
            catalog,
            budget: Budget::new(capacity),
            chunks: Mutex::new(Chunks {
                index: Index::new(
                    TierKind::Disk,
                    config.policy,
                    capacity,
                    config.pin_limit_bytes(),
                    events,
                    clock.now(),
                ),
                retired: HashMap::new(),
                layouts: HashMap::new(),
            }),
            removing: RwLock::new(()),
            claims: Claims::default(),
            counters: Counters::default(),
            clock,
            memory,
            permits: Arc::new(Semaphore::new(usize::from(io_depth))),
            io_depth: u32::from(io_depth),
            writers: Arc::new(Semaphore::new(WRITERS)),
            _lock: lock,
        };
        shared.adopt(&recovered.records)?;
        shared.import(path, &recovered.legacy)?;
        shared.warn_of_little_room(path);
        Ok(Self(Arc::new(shared)))
    }

    /// Stores an object of checked parts.
    pub(crate) async fn store(
        &self,
        header: Arc<ObjectHeader>,
        extents: Vec<Bytes>,
        worth: Worth,
    ) -> Result<Written, WriteError> {
        let key = *header.key();
        let bytes = frame_bytes(header.layout(), header.level(), header.object_bytes());
        let capacity = self.0.budget.capacity();
        if bytes > capacity {
            return Err(WriteError::TooLarge {
                tier: TierKind::Disk,
                bytes,
                capacity,
            });
        }
        let claim = self.0.claims.claim(key).await;
        if self.touch(&key) {
            return Ok(Written::AlreadyPresent);
        }
        let writer = Arc::clone(&self.0.writers)
            .acquire_owned()
            .await
            .map_err(|_| DeviceError::Closed)?;
        let written = self
            .run(move |shared| {
                // Held until the work is done, not until the caller stops waiting.
                let _held = (claim, writer);
                shared
                    .store(&header, &extents, &worth, bytes)
                    .inspect_err(|_| count(&shared.counters.failures))
            })
            .await??;
        Ok(written)
    }

    pub(crate) fn contains(&self, key: &ChunkKey) -> bool {
        self.0.lock().index.contains(key)
    }

    pub(crate) fn touch(&self, key: &ChunkKey) -> bool {
        let now = self.0.clock.now();
        self.0.lock().index.touch(key, now).is_some()
    }

    /// What a stored chunk takes along to another tier.
    pub(crate) fn worth(&self, key: &ChunkKey) -> Option<Worth> {
        let now = self.0.clock.now();
        let chunks = self.0.lock();
        let entry = chunks.index.peek(key)?;
        let (parent, uses) = chunks.index.history(key, now)?;
        let hints = Hints {
            parent,
            class: entry.class,
            recompute: entry.recompute,
        };
        Some(Worth { hints, uses })
    }

    pub(crate) fn limit(&self, class: Class, limits: ClassLimits) {
        self.0.lock().index.limit(class, limits);
    }

    pub(crate) fn pin_ids(&self) -> Vec<PinId> {
        self.0.lock().index.pin_ids(self.0.clock.now())
    }

    /// Shows the keys of all chunks; see [`index::in_parts`].
    pub(crate) fn keys(&self, mut show: impl FnMut(ChunkKey)) {
        let show = |entry: &DiskEntry| show(entry.key);
        index::in_parts(|part| part(&self.0.lock().index), show);
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
        blocking(move || {
            shared.segments.close()?;
            Ok(shared.catalog.flush()?)
        })
        .await?
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
        let capacity = self.budget.capacity();
        let mut excess = records
            .iter()
            .map(space_of)
            .sum::<u64>()
            .saturating_sub(capacity);
        let now = self.clock.now();
        let mut chunks = self.lock();
        chunks.index.reserve(records.len());
        for record in records {
            let bytes = space_of(record);
            let space = match excess {
                0 => self.budget.try_reserve(bytes),
                _ => None,
            };
            if let (Some(space), Some(entry)) = (space, chunks.entry(record)) {
                space.into_bytes();
                chunks.index.insert(entry, &Worth::new(record.hints), now);
                continue;
            }
            excess = excess.saturating_sub(bytes);
            let key = Record::key_of(&record.key, record.location);
            self.catalog.delete(&key, false)?;
            self.segments.free(record.location, bytes)?;
            count(&self.counters.evictions);
        }
        Ok(())
    }

    /// Moves the chunks of an older format version into segments.
    fn import(&self, path: &Path, records: &[LegacyRecord]) -> Result<(), DeviceError> {
        let mut imported = 0u64;
        for record in records {
            if let Some((header, extents)) = legacy::read(path, record).map(Object::into_parts) {
                let bytes = frame_bytes(header.layout(), header.level(), header.object_bytes());
                let fits = bytes <= self.budget.capacity();
                let worth = Worth::new(Hints::default());
                if fits && self.store(&header, &extents, &worth, bytes)? == Written::Stored {
                    imported += 1;
                }
            }
            self.catalog.delete(record.key.as_bytes(), false)?;
            legacy::remove(path, record)?;
        }
        if !records.is_empty() {
            tracing::info!(imported, of = records.len(), "moved chunks into segments");
        }
        Ok(legacy::sweep(path)?)
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
        extents: &[Bytes],
        worth: &Worth,
        bytes: u64,
    ) -> Result<Written, DeviceError> {
        let mut failures = 0;
        loop {
            let space = match self.make_room(bytes)? {
                Ok(space) => space,
                Err(throttled) => {
                    count(&self.counters.throttled);
                    return Ok(Written::Throttled(throttled));
                }
            };
            match self.write(header, extents, worth, space) {
                // Something else fills the file system, and the capacity is more
                // than what is left.
                Err(DeviceError::Io(error)) if is_full(&error) => {
                    tracing::warn!(%error, "the file system has less room than the capacity");
                    failures += 1;
                    match failures {
                        // What goes leaves a place of the right size, as a rule.
                        1 if self.evict(bytes)? => (),
                        1 | 2 => self.segments.give_back_spares()?,
                        _ => {
                            count(&self.counters.throttled);
                            return Ok(Written::Throttled(self.budget.throttled(bytes)));
                        }
                    }
                }
                written => return written,
            }
        }
    }

    /// Writes a frame and publishes it.
    fn write(
        &self,
        header: &ObjectHeader,
        extents: &[Bytes],
        worth: &Worth,
        space: Reservation,
    ) -> Result<Written, DeviceError> {
        let mut frame = match self.segments.begin(space.bytes()) {
            Ok(frame) => frame,
            Err(BeginError::Throttled(throttled)) => return Ok(Written::Throttled(throttled)),
            Err(BeginError::Io(error)) => return Err(error.into()),
        };
        let record = Record {
            key: *header.key(),
            location: frame.location,
            layout: *header.layout(),
            level: header.level(),
            object_bytes: header.object_bytes(),
            created: self.catalog.now(),
            hints: worth.hints,
        };
        // Both at once: whichever is missing after a crash, the chunk is too.
        let recorded = self.catalog.put(&record);
        let written = frame.write(&header.encode(), extents);
        let committed = recorded.wait().and(written.map_err(DeviceError::from));
        let entry = self.lock().entry(&record);
        match (committed, entry) {
            (Ok(()), Some(entry)) => {
                self.segments.keep(&frame);
                space.into_bytes();
                self.lock().index.insert(entry, worth, self.clock.now());
                count(&self.counters.writes);
                Ok(Written::Stored)
            }
            (committed, _) => {
                // What cannot be removed now is swept at the next start.
                let key = Record::key_of(&record.key, record.location);
                let _ = self.catalog.delete(&key, true);
                self.segments.abandon(&frame);
                committed.and(Err(io::Error::from(io::ErrorKind::FileTooLarge).into()))
            }
        }
    }

    /// Space for a frame; evicts what it must.
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

    /// Deletes chunks that the policy says should go, `bytes` of them. Says whether
    /// there were that many.
    ///
    /// # Errors
    /// The device failed. Evicting more would fail too, and empty the tier.
    fn evict(&self, bytes: u64) -> Result<bool, DeviceError> {
        let _removing = self.removing();
        let victims = self.lock().index.evict(bytes, self.clock.now());
        let mut retired = Ok(());
        for victim in &victims {
            count(&self.counters.evictions);
            // All of them: they left the index.
            retired = retired.and(self.retire(victim, false));
        }
        retired.map(|()| !victims.is_empty())
    }

    /// Deletes the record of an entry that left the index and, unless it has readers,
    /// gives its space back. Tries both.
    fn retire(&self, entry: &DiskEntry, sync: bool) -> Result<(), DeviceError> {
        let forgotten = self.catalog.delete(entry.record_key().as_ref(), sync);
        if forgotten.is_err() {
            // The record would claim whatever lay in its place at the next start.
            self.segments.spoil(entry.location.segment);
        }
        let freed = match entry.readers {
            0 => self.free(entry),
            _ => Ok(()),
        };
        forgotten?;
        Ok(freed?)
    }

    /// Gives the space of a frame back. Where that fails it stays charged until the
    /// next start, which sweeps it.
    fn free(&self, entry: &DiskEntry) -> io::Result<()> {
        let bytes = entry.space();
        self.segments.free(entry.location, bytes)?;
        drop(self.budget.adopt(bytes));
        Ok(())
    }

    fn remove(&self, key: &ChunkKey) -> Result<bool, DeviceError> {
        let removing = self.removing();
        let Some(entry) = self.lock().remove(key) else {
            drop(removing);
            self.settle()?;
            return Ok(false);
        };
        self.retire(&entry, true)
            .inspect_err(|_| count(&self.counters.failures))?;
        Ok(true)
    }

    fn removing(&self) -> RwLockReadGuard<'_, ()> {
        self.removing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what is not in the index stays away after a power cut. Waits for nobody.
    fn is_settled(&self) -> bool {
        self.removing.try_write().is_ok() && self.catalog.is_settled()
    }

    /// Makes sure that what is not in the index stays away after a power cut. Blocks.
    fn settle(&self) -> Result<(), DeviceError> {
        drop(
            self.removing
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
        Ok(self.catalog.settle()?)
    }

    /// Drops a copy that failed a check, unless it is already gone.
    fn discard_corrupt(&self, key: &ChunkKey, location: Location) {
        let _removing = self.removing();
        let entry = {
            let mut chunks = self.lock();
            match chunks.index.peek(key) {
                Some(entry) if entry.location == location => chunks.remove(key),
                _ => None,
            }
        };
        let Some(entry) = entry else { return };
        count(&self.counters.corrupt);
        self.segments.spoil(entry.location.segment);
        if let Err(error) = self.retire(&entry, true) {
            self.warn_of_leftover(&entry, &error);
        }
    }

    fn free_or_warn(&self, entry: &DiskEntry) {
        if let Err(error) = self.free(entry) {
            self.warn_of_leftover(entry, &error.into());
        }
    }

    fn warn_of_leftover(&self, entry: &DiskEntry, error: &DeviceError) {
        count(&self.counters.failures);
        let key = entry.key;
        tracing::warn!(%key, %error, "cannot give back the space of a chunk; the next start will");
    }

    fn lock(&self) -> MutexGuard<'_, Chunks> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tier for DiskTier {
    fn kind(&self) -> TierKind {
        TierKind::Disk
    }

    fn write(&self, object: Object) -> BoxFuture<'_, Result<Written, WriteError>> {
        let (header, extents) = object.into_parts();
        Box::pin(self.store(header, extents, Worth::new(Hints::default())))
    }

    fn open(
        &self,
        key: ChunkKey,
    ) -> BoxFuture<'_, Result<Option<Box<dyn ChunkReader>>, DeviceError>> {
        Box::pin(async move { Ok(self.reader(key).await?.map(|reader| Box::new(reader) as _)) })
    }

    fn find(&self, keys: &[ChunkKey]) -> Vec<Option<Facts>> {
        self.0.lock().index.find(keys)
    }

    fn remove(&self, key: ChunkKey) -> BoxFuture<'_, Result<bool, DeviceError>> {
        Box::pin(async move {
            // Without this, a miss would wait for a thread. One that was just evicted
            // must not come back after its deletion was acknowledged, either.
            if !self.contains(&key) && self.0.is_settled() {
                return Ok(false);
            }
            self.run(move |shared| shared.remove(&key)).await?
        })
    }

    fn pin(&self, id: PinId, keys: &[ChunkKey], expires: Instant) -> Result<(), PinRefused> {
        self.0
            .lock()
            .index
            .pin(id, keys, expires, self.0.clock.now())
    }

    fn unpin(&self, id: PinId) -> bool {
        self.0.lock().index.unpin(id, self.0.clock.now())
    }

    fn entries(&self) -> Vec<Facts> {
        self.0.lock().index.iter().map(Entry::facts).collect()
    }

    fn list(&self, after: Option<&ChunkKey>, limit: usize) -> Vec<Facts> {
        index::list(after, limit, |part| part(&self.0.lock().index))
    }

    fn usage(&self) -> Usage {
        let shared = &*self.0;
        shared
            .lock()
            .index
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

fn space_of(record: &Record) -> u64 {
    frame_bytes(&record.layout, record.level, record.object_bytes)
}

/// Creates a directory, and its parents where missing, durably.
fn create_directory(path: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = path.ancestors().take_while(|path| !path.is_dir()).collect();
    fs::create_dir_all(path)?;
    for created in missing {
        match created.parent() {
            Some(parent) if parent == Path::new("") => sync_directory(Path::new("."))?,
            Some(parent) => sync_directory(parent)?,
            None => (),
        }
    }
    Ok(())
}

pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Writers at once. Each keeps a file and a staging buffer; more would not make a
/// device faster.
const WRITERS: usize = 8;

#[cfg(test)]
mod tests {
    use kvasir_types::{DType, Planes};

    use super::*;
    use crate::policy::PolicyKind;

    #[test]
    fn directories_are_created_with_their_parents() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("a/b/c");
        create_directory(&path).unwrap();
        assert!(path.is_dir());
        create_directory(&path).unwrap();
    }

    #[test]
    fn entries_are_small() {
        assert!(size_of::<DiskEntry>() <= 64);
    }

    /// What a start allocates, and what evictions add: ghosts. `KVASIR_INDEX_CHUNKS` says
    /// of how many chunks; ten million take 1.2 GB.
    #[test]
    fn an_index_takes_at_most_128_bytes_a_chunk() {
        let count = std::env::var("KVASIR_INDEX_CHUNKS");
        let count: u32 = count.map_or(100_000, |count| count.parse().unwrap());
        let layout = KvLayout::new(1, 1, Planes::symmetric(8), 16, DType::Bf16).unwrap();
        let now = Instant::now();
        let (policy, log) = (PolicyKind::default(), EventLog::new());
        let mut chunks = Chunks {
            index: Index::new(TierKind::Disk, policy, u64::MAX, 0, log, now),
            retired: HashMap::new(),
            layouts: HashMap::new(),
        };
        let before = resident_bytes();
        chunks.index.reserve(count as usize);
        for number in 0..count {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&number.to_be_bytes());
            let record = Record {
                key: ChunkKey::from_bytes(key),
                location: Location {
                    segment: SegmentId(1),
                    block: number,
                },
                layout,
                level: Level::RAW,
                object_bytes: 600,
                created: u64::from(number),
                hints: Hints::default(),
            };
            let entry = chunks.entry(&record).unwrap();
            chunks.index.insert(entry, &Worth::new(record.hints), now);
        }
        #[expect(clippy::cast_precision_loss, reason = "to the nearest byte")]
        let per_chunk = |bytes: usize| bytes as f64 / f64::from(count);
        let resident = per_chunk(resident_bytes().saturating_sub(before));
        let filled = per_chunk(chunks.index.allocated_bytes());
        assert_eq!(chunks.index.evict(1, now).len(), 1);
        let evicted = per_chunk(chunks.index.allocated_bytes());
        println!(
            "{count} chunks: {filled:.1} bytes each, {evicted:.1} with ghosts; \
             {resident:.1} resident, whatever else runs included"
        );
        assert!(evicted <= 128.0, "{evicted}");
    }

    fn resident_bytes() -> usize {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        kib.unwrap().parse::<usize>().unwrap() << 10
    }
}
