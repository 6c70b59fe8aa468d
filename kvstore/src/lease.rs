//! A reader's hold on a chunk.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use kvasir_codec::ObjectHeader;
use kvasir_types::{ChunkKey, KvLayout, LayerRange, Level};

use crate::budget::ChargedBytes;
use crate::disk::DiskReader;
use crate::memory::{Chunk, MemoryReader};
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
/// bytes that the reader got.
#[derive(Debug)]
pub struct Lease {
    source: Source,
    store: Arc<Inner>,
}

#[derive(Debug)]
enum Source {
    Memory(MemoryReader),
    Disk(DiskReader, Promotion),
}

impl Lease {
    pub(crate) fn memory(reader: MemoryReader, store: Arc<Inner>) -> Self {
        Self::new(Source::Memory(reader), store)
    }

    pub(crate) fn disk(reader: DiskReader, store: Arc<Inner>) -> Self {
        let promotion = Promotion::new(reader.header().layout().layers());
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
        let layers = match reader.read(range).await {
            // What was kept for the promotion may be what is missing.
            Err(ReadError::Throttled(_)) if promotion.abandon() => reader.read(range).await?,
            other => other?,
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

/// The layers that a lease has read so far; complete ones move to memory.
#[derive(Debug)]
struct Promotion(Mutex<Gathered>);

#[derive(Debug)]
struct Gathered {
    layers: Vec<Option<ChargedBytes>>,
    /// No longer wanted: done, or the memory was needed.
    over: bool,
}

impl Promotion {
    fn new(layers: u16) -> Self {
        Self(Mutex::new(Gathered {
            layers: vec![None; usize::from(layers)],
            over: false,
        }))
    }

    /// Keeps `layers`; gives all of them, once, when none is missing.
    fn add(&self, range: LayerRange, layers: Vec<ChargedBytes>) -> Option<Vec<ChargedBytes>> {
        let mut gathered = self.lock();
        if gathered.over {
            return None;
        }
        let slots = gathered.layers.iter_mut().skip(range.start().into());
        for (slot, layer) in slots.zip(layers) {
            *slot = Some(layer);
        }
        if gathered.layers.iter().any(Option::is_none) {
            return None;
        }
        gathered.over = true;
        std::mem::take(&mut gathered.layers).into_iter().collect()
    }

    /// Lets go of what was gathered. Says whether there was anything.
    fn abandon(&self) -> bool {
        let mut gathered = self.lock();
        gathered.over = true;
        std::mem::take(&mut gathered.layers)
            .iter()
            .any(Option::is_some)
    }

    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        let chunk = Arc::new(Chunk::new(Arc::clone(header), layers, overhead));
        // A chunk deleted on disk meanwhile must not come back through memory.
        // Deletion goes disk first, so one of the two sees the other.
        if self.memory.publish(chunk) && !reader.is_current() {
            self.memory.discard(header.key());
        }
    }
}
