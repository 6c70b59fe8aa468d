//! Reading one chunk.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use kvasir_codec::{LayerError, ObjectHeader};
use kvasir_mem::AlignedBuffer;
use kvasir_types::{ChunkKey, LayerIdx, LayerRange};
use rustix::io::Errno;

use super::medium::{MediumFile, read_full};
use super::segment::{BLOCK_BYTES, Location, framed_header_bytes};
use super::{DiskEntry, DiskTier, Shared};
use crate::budget::ChargedBytes;
use crate::buffers::Buffer;
use crate::index::count;
use crate::tier::{ChunkReader, DeviceError, Facts, ReadError, TierKind};

/// A chunk whose frame stays where it is until this is dropped.
#[derive(Clone, Debug)]
pub(crate) struct DiskReader {
    file: Arc<dyn MediumFile>,
    header: Arc<ObjectHeader>,
    hold: Arc<Hold>,
}

/// A reader's share in a frame: while it lasts, the frame's space is not given back.
#[derive(Debug)]
pub(super) struct Hold {
    tier: DiskTier,
    facts: Facts,
    location: Location,
}

impl Hold {
    /// The caller has counted the holder in the entry.
    pub(super) fn new(tier: DiskTier, entry: &DiskEntry) -> Self {
        Self {
            tier,
            facts: entry.facts_of(),
            location: entry.location,
        }
    }

    fn key(&self) -> &ChunkKey {
        &self.facts.key
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let Some(retired) = self.tier.0.lock().release(&self.facts.key, self.location) else {
            return;
        };
        let shared = Arc::clone(&self.tier.0);
        let free = move || shared.free_or_warn(&retired);
        // Freeing is a system call that may wait for the device.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(free)),
            Err(_) => free(),
        }
    }
}

impl DiskTier {
    /// Opens and checks a held frame. One that is not what the index says is dropped
    /// and a miss. Blocks.
    pub(super) fn open_held(&self, hold: Hold) -> Result<Option<DiskReader>, DeviceError> {
        let shared = &*self.0;
        let (file, header) = match shared.open_frame(&hold) {
            Ok(opened) => opened,
            Err(error) => {
                count(&shared.counters.failures);
                shared.discard_unreadable(&hold, &error);
                return Err(error.into());
            }
        };
        let Some(header) = header else {
            shared.discard_corrupt(hold.key(), hold.location);
            return Ok(None);
        };
        Ok(Some(DiskReader {
            file,
            header: Arc::new(header),
            hold: Arc::new(hold),
        }))
    }
}

impl Shared {
    /// Drops a copy that the device cannot read, so that it can be stored again.
    fn discard_unreadable(&self, hold: &Hold, error: &io::Error) {
        if is_shortage(error) {
            return;
        }
        tracing::warn!(key = %hold.key(), %error, "a chunk cannot be read");
        self.discard_corrupt(hold.key(), hold.location);
    }

    fn open_frame(&self, hold: &Hold) -> io::Result<(Arc<dyn MediumFile>, Option<ObjectHeader>)> {
        let facts = &hold.facts;
        let file = self.segments.file(hold.location.segment)?;
        let len = framed_header_bytes(facts.layout.layers());
        let mut block = AlignedBuffer::zeroed(usize::try_from(len).unwrap_or(usize::MAX))?;
        let read = read_full(&*file, &mut block, hold.location.offset())?;
        let header = match ObjectHeader::parse(&block[..read]) {
            Ok((header, _)) => header,
            Err(error) => {
                tracing::warn!(key = %facts.key, %error, "a stored header is corrupt");
                return Ok((file, None));
            }
        };
        if let Err(error) = header.verify(&facts.key, &facts.layout_digest) {
            tracing::warn!(key = %facts.key, %error, "a frame holds something else");
            return Ok((file, None));
        }
        Ok((file, Some(header)))
    }
}

impl DiskReader {
    pub(crate) fn header(&self) -> &Arc<ObjectHeader> {
        &self.header
    }

    /// The layers of `range`, verified, in one buffer charged to the memory budget.
    pub(crate) async fn read(&self, range: LayerRange) -> Result<Vec<ChargedBytes>, ReadError> {
        let entries = self.header.range(range).ok_or(ReadError::OutOfRange {
            range,
            layers: self.header.layout().layers(),
        })?;
        let payload =
            self.hold.location.offset() + framed_header_bytes(self.header.layout().layers());
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return Ok(Vec::new());
        };
        // Whole blocks that contain the layers, which lie one after another.
        let start = (payload + first.offset) / BLOCK_BYTES * BLOCK_BYTES;
        let end = (payload + last.offset + last.len).next_multiple_of(BLOCK_BYTES);
        let skip = usize::try_from(payload + first.offset - start).unwrap_or(usize::MAX);
        let tier = &self.hold.tier;
        let buffer = tier.0.memory.buffer((end - start).max(BLOCK_BYTES))?;
        let reader = self.clone();
        tier.run(move |shared| {
            let bytes = reader.read_blocks(shared, buffer, start)?;
            reader.verified(shared, range, bytes.slice(skip.min(bytes.len())..))
        })
        .await?
    }

    /// As many bytes from `start` as fit into the buffer and as the file has.
    fn read_blocks(
        &self,
        shared: &Shared,
        mut buffer: Buffer,
        start: u64,
    ) -> Result<Bytes, ReadError> {
        match read_full(&*self.file, buffer.as_mut(), start) {
            Ok(read) => Ok(Bytes::from_owner(buffer).slice(..read)),
            Err(error) => {
                count(&shared.counters.failures);
                shared.discard_unreadable(&self.hold, &error);
                Err(DeviceError::from(error).into())
            }
        }
    }

    /// Cuts `bytes`, which start with the first layer of `range`, into layers.
    fn verified(
        &self,
        shared: &Shared,
        range: LayerRange,
        mut bytes: Bytes,
    ) -> Result<Vec<ChargedBytes>, ReadError> {
        let mut layers = Vec::with_capacity(usize::from(range.len()));
        for layer in range.iter().map(LayerIdx) {
            let len = self.header.layer(layer).map_or(0, |entry| entry.len);
            // Where the file ends early, less than a layer: the check finds it.
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len());
            let payload = bytes.split_to(len);
            if let Err(cause) = self.header.verify_layer(layer, &payload) {
                return Err(self.corrupt(shared, cause));
            }
            layers.push(ChargedBytes::prepaid(payload));
        }
        Ok(layers)
    }

    fn corrupt(&self, shared: &Shared, cause: LayerError) -> ReadError {
        let key = *self.hold.key();
        shared.discard_corrupt(&key, self.hold.location);
        ReadError::Corrupt {
            key,
            tier: TierKind::Disk,
            cause,
        }
    }

    /// Whether the tier still has this copy.
    pub(crate) fn is_current(&self) -> bool {
        let hold = &self.hold;
        let chunks = hold.tier.0.lock();
        let now = chunks.index.peek(hold.key());
        now.is_some_and(|now| now.location == hold.location)
    }
}

impl ChunkReader for DiskReader {
    fn header(&self) -> &ObjectHeader {
        &self.header
    }

    fn read_layers(&self, range: LayerRange) -> BoxFuture<'_, Result<Vec<Bytes>, ReadError>> {
        Box::pin(async move {
            let layers = self.read(range).await?;
            Ok(layers.iter().map(ChargedBytes::share).collect())
        })
    }
}

/// Whether the process or the system is short of something; the frame may be good.
fn is_shortage(error: &io::Error) -> bool {
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOMEM];
    shortages
        .map(Errno::raw_os_error)
        .map(Some)
        .contains(&error.raw_os_error())
}
