//! Reading one chunk.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use kvasir_codec::{ExtentError, ObjectHeader};
use kvasir_mem::AlignedBuffer;
use kvasir_types::{ChunkKey, ExtentIdx, ExtentRange};
use rustix::io::Errno;

use super::medium::{MediumFile, read_full};
use super::segment::{BLOCK_BYTES, Location, frame_bytes, framed_header_bytes};
use super::{DiskEntry, DiskTier, Shared};
use crate::blocking::blocking;
use crate::budget::ChargedBytes;
use crate::buffers::Buffer;
use crate::index::count;
use crate::memory::INLINE_VERIFY_BYTES;
use crate::promotion::Promotion;
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
    pub(super) location: Location,
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

    fn frame_bytes(&self) -> u64 {
        frame_bytes(&self.facts.layout, self.facts.level, self.facts.bytes)
    }

    fn payload_bytes(&self) -> u64 {
        let header = ObjectHeader::header_bytes(&self.facts.layout, self.facts.level);
        self.facts.bytes.saturating_sub(header as u64)
    }
}

/// A frame that was opened.
pub(super) struct Opened {
    pub(super) reader: DiskReader,
    /// All extents, unverified, where they were read too.
    extents: Option<Vec<ChargedBytes>>,
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
    /// Opens a chunk; `None` is a miss. Where its promotion to memory may gather, a small
    /// chunk is read whole: the device is asked once, not twice or once a extent.
    pub(crate) async fn lease(
        &self,
        key: ChunkKey,
    ) -> Result<Option<(DiskReader, Arc<Promotion>)>, DeviceError> {
        let Some(hold) = self.hold(&key) else {
            return Ok(None);
        };
        let memory = &self.0.memory;
        let promotion = memory
            .promotions()
            .begin(hold.facts.extents(), hold.payload_bytes());
        let whole = match hold.frame_bytes() {
            bytes if bytes <= READ_WHOLE_BYTES && promotion.gathers() => memory.buffer(bytes).ok(),
            _ => None,
        };
        let Some(opened) = self.open_held(hold, whole).await? else {
            return Ok(None);
        };
        if let Some(extents) = opened.extents {
            promotion.read_ahead(extents);
        }
        Ok(Some((opened.reader, promotion)))
    }

    /// Opens a chunk without reading more than its header.
    pub(super) async fn reader(&self, key: ChunkKey) -> Result<Option<DiskReader>, DeviceError> {
        let Some(hold) = self.hold(&key) else {
            return Ok(None);
        };
        let opened = self.open_held(hold, None).await?;
        Ok(opened.map(|opened| opened.reader))
    }

    pub(super) fn hold(&self, key: &ChunkKey) -> Option<Hold> {
        let entry = self.0.lock().hold(key, self.0.clock.now());
        if entry.is_none() {
            count(&self.0.counters.misses);
        }
        Some(Hold::new(self.clone(), &entry?))
    }

    async fn open_held(
        &self,
        hold: Hold,
        whole: Option<Buffer>,
    ) -> Result<Option<Opened>, DeviceError> {
        let tier = self.clone();
        let opened = self
            .run(move |_| tier.open_whole_or_head(hold, whole))
            .await??;
        count(if opened.is_some() {
            &self.0.counters.hits
        } else {
            &self.0.counters.misses
        });
        Ok(opened)
    }

    /// Opens and checks a held frame. One that is not what the index says is dropped
    /// and a miss. A buffer of the frame's size takes all of it at once.
    pub(super) fn open_whole_or_head(
        &self,
        hold: Hold,
        whole: Option<Buffer>,
    ) -> Result<Option<Opened>, DeviceError> {
        let shared = &*self.0;
        let (file, head, payload) = match shared.open_frame(&hold, whole) {
            Ok(opened) => opened,
            Err(error) => {
                count(&shared.counters.failures);
                shared.discard_unreadable(&hold, &error);
                return Err(error.into());
            }
        };
        let Some(header) = header_of(&hold.facts, &head) else {
            shared.discard_corrupt(hold.key(), hold.location);
            return Ok(None);
        };
        let reader = DiskReader {
            file,
            header: Arc::new(header),
            hold: Arc::new(hold),
        };
        let all = reader.header.all();
        let extents = payload.map(|payload| reader.cut(all, payload));
        Ok(Some(Opened { reader, extents }))
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

    /// What a frame starts with and, where there is a buffer for it, the rest.
    fn open_frame(
        &self,
        hold: &Hold,
        whole: Option<Buffer>,
    ) -> io::Result<(Arc<dyn MediumFile>, Bytes, Option<Bytes>)> {
        let file = self.segments.file(hold.location.segment)?;
        let len = framed_header_bytes(&hold.facts.layout, hold.facts.level);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let start = hold.location.offset();
        let Some(mut buffer) = whole else {
            let mut block = AlignedBuffer::zeroed(len)?;
            let read = read_full(&*file, &mut block, start)?;
            return Ok((file, Bytes::from_owner(block).slice(..read), None));
        };
        let read = read_full(&*file, buffer.as_mut(), start)?;
        let mut head = Bytes::from_owner(buffer).slice(..read);
        let payload = head.split_off(len.min(read));
        Ok((file, head, Some(payload)))
    }
}

/// The header that `head` starts with, if it is that of a held chunk.
fn header_of(facts: &Facts, head: &[u8]) -> Option<ObjectHeader> {
    let key = &facts.key;
    match ObjectHeader::parse(head) {
        Err(error) => tracing::warn!(%key, %error, "a stored header is corrupt"),
        Ok((header, _)) => match header.verify(key, &facts.layout_digest) {
            Err(error) => tracing::warn!(%key, %error, "a frame holds something else"),
            // A frame of the same chunk at another level, which a crash left.
            Ok(()) if Facts::of(&header) != *facts => {
                tracing::warn!(%key, "a frame holds another form of the chunk");
            }
            Ok(()) => return Some(header),
        },
    }
    None
}

impl DiskReader {
    pub(crate) fn header(&self) -> &Arc<ObjectHeader> {
        &self.header
    }

    /// The extents of `range`, verified, in one buffer charged to the memory budget.
    pub(crate) async fn read(&self, range: ExtentRange) -> Result<Vec<ChargedBytes>, ReadError> {
        let entries = self.header.range(range).ok_or(ReadError::OutOfRange {
            range,
            extents: self.header.all().end(),
        })?;
        let payload = self.hold.location.offset()
            + framed_header_bytes(self.header.layout(), self.header.level());
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return Ok(Vec::new());
        };
        // Whole blocks that contain the extents, which lie one after another.
        let start = (payload + first.offset) / BLOCK_BYTES * BLOCK_BYTES;
        let end = (payload + last.offset + last.len).next_multiple_of(BLOCK_BYTES);
        let skip = usize::try_from(payload + first.offset - start).unwrap_or(usize::MAX);
        let tier = &self.hold.tier;
        let buffer = tier.0.memory.buffer((end - start).max(BLOCK_BYTES))?;
        let reader = self.clone();
        tier.run(move |shared| {
            let bytes = reader.read_blocks(shared, buffer, start)?;
            let extents = reader.cut(range, bytes.slice(skip.min(bytes.len())..));
            reader.verified(shared, range, extents)
        })
        .await?
    }

    /// `extents`, which were read when this was opened, once they are verified.
    pub(crate) async fn check(
        &self,
        range: ExtentRange,
        extents: Vec<ChargedBytes>,
    ) -> Result<Vec<ChargedBytes>, ReadError> {
        let bytes: usize = extents.iter().map(|extent| extent.as_ref().len()).sum();
        let shared = Arc::clone(&self.hold.tier.0);
        if bytes <= INLINE_VERIFY_BYTES {
            return self.verified(&shared, range, extents);
        }
        let reader = self.clone();
        blocking(move || reader.verified(&shared, range, extents)).await?
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

    /// Cuts `bytes`, which start with the first extent of `range`, into extents.
    fn cut(&self, range: ExtentRange, mut bytes: Bytes) -> Vec<ChargedBytes> {
        let extents = range.iter().map(|extent| {
            let entry = self.header.extent(ExtentIdx(extent));
            // Where the file ends early, less than a extent: the check finds it.
            let len = entry.map_or(0, |entry| usize::try_from(entry.len).unwrap_or(usize::MAX));
            ChargedBytes::prepaid(bytes.split_to(len.min(bytes.len())))
        });
        extents.collect()
    }

    fn verified(
        &self,
        shared: &Shared,
        range: ExtentRange,
        extents: Vec<ChargedBytes>,
    ) -> Result<Vec<ChargedBytes>, ReadError> {
        for (extent, bytes) in range.iter().zip(&extents) {
            if let Err(cause) = self.header.verify_extent(ExtentIdx(extent), bytes.as_ref()) {
                return Err(self.corrupt(shared, cause));
            }
        }
        Ok(extents)
    }

    fn corrupt(&self, shared: &Shared, cause: ExtentError) -> ReadError {
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

    fn read_extents(&self, range: ExtentRange) -> BoxFuture<'_, Result<Vec<Bytes>, ReadError>> {
        Box::pin(async move {
            let extents = self.read(range).await?;
            Ok(extents.iter().map(ChargedBytes::share).collect())
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

/// Frames up to this size are read whole when they are leased: up to here, waiting for the
/// device once more takes a tenth of the time that the payload does, or more.
const READ_WHOLE_BYTES: u64 = 2 << 20;
