//! One storage level, and what every level owes.

use std::fmt;
use std::io;
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use kvasir_codec::{ExtentError, Object, ObjectHeader};
use kvasir_types::{ChunkKey, ExtentRange, KvLayout, LayoutDigest, Level};

use crate::budget::Throttled;
use crate::levels::LevelUsages;
use crate::pins::{PinId, PinRefused};

/// One storage level: [`MemoryTier`](crate::MemoryTier), [`DiskTier`](crate::DiskTier).
///
/// # Contract
/// - `write` is all or nothing. A chunk is visible to every other call only after
///   all of it is readable; in a durable tier, only after it would survive a power
///   cut. Dropping the future leaves either a whole chunk or none.
/// - `write` of a key that is there stores nothing and says so. Of two concurrent
///   writers of one key, exactly one stores.
/// - Every read is verified against key, layout digest and checksum. Bytes that
///   fail are never returned: the copy is dropped, counted, and is a miss from
///   then on.
/// - Bytes and [`ChunkReader`]s that were handed out stay valid and unchanged until
///   dropped, through eviction, removal and rewriting of their key.
/// - The tier's budget is never exceeded, not even for a moment; bytes held by
///   readers count. What does not fit evicts chunks that are neither pinned nor held,
///   in the order of the tier's [`PolicyKind`](crate::policy::PolicyKind); where there
///   are none, the answer is [`Throttled`].
/// - `open` and a `write` of a present key are uses of a chunk; `find`, `entries`,
///   `list` and `usage` are not, never extend a life, and never wait for a device.
/// - Misses and throttling are values; an error is a device that failed.
///
/// Every implementation passes `kvasir_tests::conformance::tier`.
pub trait Tier: Send + Sync + fmt::Debug {
    /// Which level this is.
    fn kind(&self) -> TierKind;

    /// Stores a whole object.
    fn write(&self, object: Object) -> BoxFuture<'_, Result<Written, WriteError>>;

    /// Opens a chunk for reading; `None` is a miss.
    fn open(
        &self,
        key: ChunkKey,
    ) -> BoxFuture<'_, Result<Option<Box<dyn ChunkReader>>, DeviceError>>;

    /// What is known of each key, in order, from the index alone.
    fn find(&self, keys: &[ChunkKey]) -> Vec<Option<Facts>>;

    /// Drops a chunk, pinned or not. Says whether there was one.
    fn remove(&self, key: ChunkKey) -> BoxFuture<'_, Result<bool, DeviceError>>;

    /// Exempts all of `keys` from eviction until `expires` or [`unpin`](Self::unpin),
    /// or none of them. An id that is in use is extended by the keys.
    ///
    /// # Errors
    /// A key that is not there, or more pinned bytes than the tier allows.
    fn pin(&self, id: PinId, keys: &[ChunkKey], expires: Instant) -> Result<(), PinRefused>;

    /// Ends a pin. Says whether there was one.
    fn unpin(&self, id: PinId) -> bool;

    /// Everything stored, in no particular order.
    fn entries(&self) -> Vec<Facts>;

    /// What is stored with keys after `after`, in the order of keys: at most `limit`.
    fn list(&self, after: Option<&ChunkKey>, limit: usize) -> Vec<Facts>;

    /// Counters and fill level.
    fn usage(&self) -> Usage;

    /// Opens a chunk and reads a range of its extents. A copy that turns out corrupt,
    /// and a range outside the chunk, are misses.
    fn read_extents(
        &self,
        key: ChunkKey,
        range: ExtentRange,
    ) -> BoxFuture<'_, Result<Read, DeviceError>> {
        Box::pin(async move {
            let Some(reader) = self.open(key).await? else {
                return Ok(Read::Miss);
            };
            match reader.read_extents(range).await {
                Ok(extents) => Ok(Read::Extents(extents)),
                Err(ReadError::OutOfRange { .. } | ReadError::Corrupt { .. }) => Ok(Read::Miss),
                Err(ReadError::Throttled(throttled)) => Ok(Read::Throttled(throttled)),
                Err(ReadError::Device(error)) => Err(error),
            }
        })
    }
}

/// A chunk opened in one tier; it stays readable until dropped.
pub trait ChunkReader: Send + Sync + fmt::Debug {
    /// The chunk's header, verified against the key it was opened by.
    fn header(&self) -> &ObjectHeader;

    /// The extents of `range`, in order, verified.
    fn read_extents(&self, range: ExtentRange) -> BoxFuture<'_, Result<Vec<Bytes>, ReadError>>;
}

/// A storage medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum TierKind {
    /// Host memory; lost on restart.
    Memory,
    /// A directory of a local file system; survives restarts.
    Disk,
}

impl fmt::Display for TierKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
        })
    }
}

/// What an index knows of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its key.
    pub key: ChunkKey,
    /// Its geometry.
    pub layout: KvLayout,
    /// Digest of that.
    pub layout_digest: LayoutDigest,
    /// The level it is stored at.
    pub level: Level,
    /// Bytes of the object, header included.
    pub bytes: u64,
}

impl Facts {
    /// The facts that a header states.
    pub fn of(header: &ObjectHeader) -> Self {
        Self {
            key: *header.key(),
            layout: *header.layout(),
            layout_digest: header.layout().digest(),
            level: header.level(),
            bytes: header.object_bytes(),
        }
    }

    /// Extents of the object.
    pub fn extents(&self) -> u32 {
        self.level.extents(self.layout.layers())
    }
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a throttled write stored nothing"]
pub enum Written {
    /// The chunk is stored.
    Stored,
    /// It already was.
    AlreadyPresent,
    /// Nothing was stored: no room, and nothing that may be evicted.
    Throttled(Throttled),
}

/// What became of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// The extents asked for, in order.
    Extents(Vec<Bytes>),
    /// The tier does not have them.
    Miss,
    /// No memory to read into. The chunk is still there.
    Throttled(Throttled),
}

/// Why a tier could not store an object.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The object would not fit into an empty tier.
    #[error("a chunk that takes {bytes} bytes exceeds the {tier} tier of {capacity}")]
    TooLarge {
        /// The tier.
        tier: TierKind,
        /// Bytes the object takes there.
        bytes: u64,
        /// The tier's capacity.
        capacity: u64,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Why an open chunk could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The chunk has fewer extents.
    #[error("extents {range} lie outside the {extents} extents of the chunk")]
    OutOfRange {
        /// Extents asked for.
        range: ExtentRange,
        /// Extents there are.
        extents: u32,
    },
    /// Stored bytes fail their check; this copy is gone. Treat it as a miss.
    #[error("chunk {key} is corrupt in the {tier} tier")]
    Corrupt {
        /// The chunk.
        key: ChunkKey,
        /// Where the bad copy was.
        tier: TierKind,
        /// What was wrong.
        #[source]
        cause: ExtentError,
    },
    /// No memory to read into; the chunk is still there.
    #[error(transparent)]
    Throttled(#[from] Throttled),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A device that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A file could not be read or written.
    #[error("device I/O failed")]
    Io(#[from] io::Error),
    /// The catalog could not be read or written.
    #[error("the catalog failed")]
    Catalog(#[from] rocksdb::Error),
    /// The tier was closed.
    #[error("the store is closed")]
    Closed,
}

/// Counters and fill level of one tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Chunks stored.
    pub chunks: u64,
    /// The same, by level.
    pub levels: LevelUsages,
    /// Bytes charged: chunks, their index entries, and what readers and writers hold.
    pub bytes: u64,
    /// Of these, in buffers that wait for their next use.
    pub idle_bytes: u64,
    /// Most that `bytes` ever was.
    pub peak_bytes: u64,
    /// Limit of `bytes`.
    pub capacity: u64,
    /// Pins that last.
    pub pins: u64,
    /// Bytes exempt from eviction by pins.
    pub pinned_bytes: u64,
    /// Opens that found the chunk.
    pub hits: u64,
    /// Opens that did not.
    pub misses: u64,
    /// Chunks stored since the start.
    pub writes: u64,
    /// Chunks dropped to make room.
    pub evictions: u64,
    /// Copies dropped because they failed a check or could not be read.
    pub corrupt: u64,
    /// Requests that found no room.
    pub throttled: u64,
    /// Device failures.
    pub failures: u64,
}
