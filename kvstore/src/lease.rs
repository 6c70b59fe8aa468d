//! A reader's hold on a chunk.

use std::sync::Arc;

use bytes::Bytes;
use kvasir_codec::ObjectHeader;
use kvasir_types::{ChunkKey, KvLayout, LayerRange, Level};

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
/// When all layers of a chunk on disk were read through one lease, the chunk is
/// copied into memory, if there is room. The copy costs nothing: memory keeps the
/// bytes that the reader got. Until then they take half of the memory at most, and
/// go before anyone is refused memory. So do the layers of a small chunk, which are read
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

    /// The layers of `range`, in order. Verified, on every call.
    ///
    /// # Errors
    /// [`ReadError::Corrupt`] where this copy went bad: it is gone, so lease the key
    /// again, or treat it as a miss. [`ReadError::Throttled`] where there is no
    /// memory to read into.
    pub async fn read_layers(&self, range: LayerRange) -> Result<Vec<Bytes>, ReadError> {
        let (reader, promotion) = match &self.source {
            Source::Memory(reader) => return reader.read_layers(range).await,
            Source::Disk(reader, promotion) => (reader, promotion),
        };
        let layers = match promotion.get(range) {
            Some(layers) => reader.check(range, layers).await?,
            None => reader.read(range).await?,
        };
        let bytes = layers.iter().map(ChargedBytes::share).collect();
        if let Some(layers) = promotion.add(range, layers) {
            self.store.promote(reader, layers);
        }
        Ok(bytes)
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
    fn promote(&self, reader: &DiskReader, layers: Vec<ChargedBytes>) {
        let header = reader.header();
        let overhead = Chunk::overhead_bytes(header.layout().layers());
        let Ok(overhead) = self.memory.reserve(overhead) else {
            return;
        };
        let worth = self.disk.as_ref().and_then(|disk| disk.worth(header.key()));
        let Some(Worth { hints, uses }) = worth else {
            return;
        };
        let chunk = Arc::new(Chunk::new(Arc::clone(header), layers, hints, overhead));
        // A chunk deleted on disk meanwhile must not come back through memory.
        // Deletion goes disk first, so one of the two sees the other.
        if self.memory.publish(chunk, uses) && !reader.is_current() {
            self.memory.discard(header.key());
        }
    }
}
