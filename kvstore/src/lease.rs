//! A reader's hold on a chunk.

use std::sync::Arc;

use bytes::Bytes;
use kvasir_codec::ObjectHeader;
use kvasir_types::{ChunkKey, ExtentRange, KvLayout, Level};

use crate::budget::ChargedBytes;
use crate::disk::DiskReader;
use crate::index::Worth;
use crate::memory::{Chunk, MemoryReader};
use crate::promotion::Promotion;
use crate::store::Inner;
use crate::tier::{ChunkReader, ReadError, TierKind};

/// A chunk that stays readable until this is dropped, whatever happens to it in
/// the store.
///
/// In memory the lease owns the bytes together with the store; on disk it holds
/// the file open. Bytes that were read outlive the lease. No clock is involved:
/// a lease ends when it is dropped, and only then.
///
/// When all extents of a chunk on disk were read through one lease, the chunk is
/// copied into memory, if there is room. The copy costs nothing: memory keeps the
/// bytes that the reader got. Until then they take half of the memory at most, and
/// go before anyone is refused memory. So do the extents of a small chunk, which are read
/// ahead, all at once.
#[derive(Debug)]
pub struct Lease {
    source: Source,
    store: Arc<Inner>,
}

#[derive(Debug)]
enum Source {
    Memory(MemoryReader),
    Disk(DiskReader, Arc<Promotion>),
}

impl Lease {
    pub(crate) fn memory(reader: MemoryReader, store: Arc<Inner>) -> Self {
        Self::new(Source::Memory(reader), store)
    }

    pub(crate) fn disk(reader: DiskReader, promotion: Arc<Promotion>, store: Arc<Inner>) -> Self {
        store.demote_others(reader.header());
        Self::new(Source::Disk(reader, promotion), store)
    }

    fn new(source: Source, store: Arc<Inner>) -> Self {
        store.lease_begins();
        Self { source, store }
    }

    /// The extents of `range`, in order. Verified, on every call.
    ///
    /// # Errors
    /// [`ReadError::Corrupt`] where this copy went bad: it is gone, so lease the key
    /// again, or treat it as a miss. [`ReadError::Throttled`] where there is no
    /// memory to read into.
    pub async fn read_extents(&self, range: ExtentRange) -> Result<Vec<Bytes>, ReadError> {
        let (reader, promotion) = match &self.source {
            Source::Memory(reader) => return reader.read_extents(range).await,
            Source::Disk(reader, promotion) => (reader, promotion),
        };
        let extents = match promotion.get(range) {
            Some(extents) => reader.check(range, extents).await?,
            None => reader.read(range).await?,
        };
        let bytes = extents.iter().map(ChargedBytes::share).collect();
        if let Some(extents) = promotion.add(range, extents) {
            self.store.promote(reader, extents);
        }
        Ok(bytes)
    }

    /// Extents of a chunk in memory, as they lie there: shared, and not verified. For readers
    /// who compare checksums themselves. `None` for a chunk on disk, and where there are no
    /// such extents.
    pub fn share_extents(&self, range: ExtentRange) -> Option<Vec<Bytes>> {
        let Source::Memory(reader) = &self.source else {
            return None;
        };
        let extents = reader.share(range);
        (extents.len() as u64 == u64::from(range.end() - range.start())).then_some(extents)
    }

    /// The tier that the lease reads from.
    pub fn tier(&self) -> TierKind {
        match self.source {
            Source::Memory(_) => TierKind::Memory,
            Source::Disk(..) => TierKind::Disk,
        }
    }

    /// The chunk's header.
    pub fn header(&self) -> &ObjectHeader {
        match &self.source {
            Source::Memory(reader) => ChunkReader::header(reader),
            Source::Disk(reader, _) => ChunkReader::header(reader),
        }
    }

    /// The chunk's key.
    pub fn key(&self) -> &ChunkKey {
        self.header().key()
    }

    /// The chunk's geometry.
    pub fn layout(&self) -> &KvLayout {
        self.header().layout()
    }

    /// The level it is stored at.
    pub fn level(&self) -> Level {
        self.header().level()
    }

    /// Bytes of the object, header included.
    pub fn bytes(&self) -> u64 {
        self.header().object_bytes()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.store.lease_ends();
    }
}

impl Inner {
    /// Takes a chunk that was read from disk into memory. Best effort.
    fn promote(&self, reader: &DiskReader, extents: Vec<ChargedBytes>) {
        let header = reader.header();
        let overhead = Chunk::overhead_bytes(header.all().end());
        let Ok(overhead) = self.memory.reserve(overhead) else {
            return;
        };
        let worth = self.disk.as_ref().and_then(|disk| disk.worth(header.key()));
        let Some(Worth { hints, uses }) = worth else {
            return;
        };
        let chunk = Arc::new(Chunk::new(Arc::clone(header), extents, hints, overhead));
        // A chunk deleted on disk meanwhile must not come back through memory.
        // Deletion goes disk first, so one of the two sees the other.
        if self.memory.publish(chunk, uses) && !reader.is_current() {
            self.memory.discard(header.key());
        }
    }
}
