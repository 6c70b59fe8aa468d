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
mod shared;
mod space;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use kvasir_codec::{Object, ObjectHeader};
use kvasir_types::{ChunkKey, Class, Hints, KvLayout, LayoutDigest, Level};
use tokio::sync::Semaphore;

use self::catalog::{Catalog, Record};
pub use self::medium::{DirectIo, Medium, MediumFile};
pub(crate) use self::reader::DiskReader;
use self::segment::{Location, SegmentId, frame_bytes};
use self::segments::Segments;
use crate::blocking::blocking;
use crate::budget::Budget;
use crate::claims::Claims;
use crate::clock::Clock;
use crate::config::DiskConfig;
use crate::environment::Environment;
use crate::events::EventLog;
use crate::index::{self, Counters, Entry, Index, Worth, count};
use crate::memory::MemoryTier;
use crate::pins::{PinId, PinRefused};
use crate::policy::ClassLimits;
use crate::sync::{Mutex, RwLock};
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
