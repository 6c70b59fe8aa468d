//! The segment files of one directory: who writes where, and what is free again.
//!
//! Segments are append-only. Every writer has one to itself, so writers never wait
//! for each other, and a failure spoils one file. A segment that is full, or in which
//! a write failed, is never written again; after a start all are. The space of a
//! frame is given back as a hole, at once and without moving any other; a file
//! without live frames is deleted.

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use kvasir_mem::{ALIGNMENT, AlignedBuffer};
use lru::LruCache;

use super::medium::{Medium, MediumFile, write_full};
use super::segment::{self, BLOCK, BLOCK_BYTES, Location, SegmentId, StoreId};
use crate::budget::Throttled;
use crate::buffers::{Buffer, BufferError};
use crate::memory::MemoryTier;
use crate::sync::{Mutex, MutexGuard};

#[derive(Debug)]
pub(super) struct Segments {
    medium: Arc<dyn Medium>,
    root: PathBuf,
    store: StoreId,
    segment_bytes: u64,
    /// Pays for the buffers that frames are written from.
    memory: MemoryTier,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    next: SegmentId,
    segments: HashMap<SegmentId, Segment>,
    /// Writers that nobody uses right now.
    writers: Vec<Writer>,
    files: LruCache<SegmentId, Arc<dyn MediumFile>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    /// Bytes of frames that are stored or being written.
    live_bytes: u64,
    /// Whether a writer may still add frames.
    open: bool,
}

/// The right to append to one segment.
#[derive(Debug)]
pub(super) struct Writer {
    id: SegmentId,
    file: Arc<dyn MediumFile>,
    next_block: u32,
}

/// A frame that was written and not yet synced.
#[derive(Debug)]
pub(super) struct Unsynced {
    writer: Writer,
    pub(super) location: Location,
    bytes: u64,
}

/// Why a frame could not be written.
#[derive(Debug)]
pub(super) enum AppendError {
    /// No memory to write from.
    Throttled(Throttled),
    Io(io::Error),
}

impl Segments {
    /// Over `root`, which exists. `live` tells for each segment found there how many
    /// bytes of its frames are stored; `next` is greater than any number in use.
    pub(super) fn new(
        medium: Arc<dyn Medium>,
        root: PathBuf,
        store: StoreId,
        memory: MemoryTier,
        capacity: u64,
        live: impl IntoIterator<Item = (SegmentId, u64)>,
        next: SegmentId,
    ) -> Self {
        let segments = live.into_iter().map(|(id, live_bytes)| {
            let open = false;
            (id, Segment { live_bytes, open })
        });
        Self {
            medium,
            root,
            store,
            segment_bytes: (capacity / SEGMENTS).clamp(SEGMENT_BYTES, MAX_SEGMENT_BYTES),
            memory,
            state: Mutex::new(State {
                next,
                segments: segments.collect(),
                writers: Vec::new(),
                files: LruCache::new(OPEN_FILES),
            }),
        }
    }

    /// Writes a frame. It is neither durable nor known to anyone yet. Blocks.
    pub(super) fn append(&self, header: &[u8], layers: &[Bytes]) -> Result<Unsynced, AppendError> {
        let payload: u64 = layers.iter().map(|layer| layer.len() as u64).sum();
        let bytes = (header.len() as u64).next_multiple_of(BLOCK_BYTES)
            + payload.next_multiple_of(BLOCK_BYTES);
        let mut staging = self.staging()?;
        let mut writer = self.writer(bytes).map_err(AppendError::Io)?;
        let location = Location {
            segment: writer.id,
            block: writer.next_block,
        };
        if let Some(segment) = self.lock().segments.get_mut(&writer.id) {
            segment.live_bytes += bytes;
        }
        let written = writer.write(header, layers, staging.as_mut());
        let unsynced = Unsynced {
            writer,
            location,
            bytes,
        };
        match written {
            Ok(()) => Ok(unsynced),
            Err(error) => {
                self.abandon(unsynced);
                Err(AppendError::Io(error))
            }
        }
    }

    /// Keeps a frame that was synced; its segment can be written again.
    pub(super) fn keep(&self, frame: Unsynced) {
        self.lock().writers.push(frame.writer);
    }

    /// Gives up a frame and, since nothing is known of what a failed write or sync
    /// left, its segment.
    pub(super) fn abandon(&self, frame: Unsynced) {
        let id = frame.writer.id;
        drop(frame.writer);
        // What stays behind is swept at the next start.
        let _ = self.seal(id);
        let _ = self.free(frame.location, frame.bytes);
    }

    /// Gives the space of a frame back. Nobody may read it any more. Blocks.
    pub(super) fn free(&self, location: Location, bytes: u64) -> io::Result<()> {
        let id = location.segment;
        if !self.is_last_of_closed(id, bytes) {
            let file = self.file(id)?;
            file.punch(location.offset()..location.offset() + bytes)?;
        }
        if let Some(segment) = self.lock().segments.get_mut(&id) {
            segment.live_bytes = segment.live_bytes.saturating_sub(bytes);
        }
        self.delete_if_dead(id)
    }

    /// An open file of a segment.
    pub(super) fn file(&self, id: SegmentId) -> io::Result<Arc<dyn MediumFile>> {
        if let Some(file) = self.lock().files.get(&id) {
            return Ok(Arc::clone(file));
        }
        // Not under the lock: others have their files open.
        let file: Arc<dyn MediumFile> = self.medium.open(&self.path(id))?.into();
        self.lock().files.put(id, Arc::clone(&file));
        Ok(file)
    }

    /// Ends all segments that could be written.
    pub(super) fn close(&self) -> io::Result<()> {
        let writers = std::mem::take(&mut self.lock().writers);
        writers
            .into_iter()
            .map(|writer| self.seal(writer.id))
            .fold(Ok(()), io::Result::and)
    }

    /// A writer with room for `bytes`.
    fn writer(&self, bytes: u64) -> io::Result<Writer> {
        loop {
            let Some(writer) = self.lock().writers.pop() else {
                return self.create();
            };
            let used = u64::from(writer.next_block) * BLOCK_BYTES;
            let fits = used.saturating_add(bytes) <= self.segment_bytes;
            if fits || used == BLOCK_BYTES {
                return Ok(writer);
            }
            self.seal(writer.id)?;
        }
    }

    fn create(&self) -> io::Result<Writer> {
        let id = {
            let mut state = self.lock();
            let id = state.next;
            state.next = SegmentId(id.0.saturating_add(1));
            id
        };
        let file = self.create_file(id)?;
        let mut state = self.lock();
        let segment = Segment {
            live_bytes: 0,
            open: true,
        };
        state.segments.insert(id, segment);
        state.files.put(id, Arc::clone(&file));
        Ok(Writer {
            id,
            file,
            next_block: 1,
        })
    }

    /// A buffer to write from, small beside the memory there is.
    fn staging(&self) -> Result<Buffer, AppendError> {
        let bytes = (self.memory.capacity() / STAGING_SHARE)
            .clamp(BLOCK_BYTES, STAGING_BYTES)
            .next_multiple_of(BLOCK_BYTES);
        self.memory.buffer(bytes).map_err(|error| match error {
            BufferError::Throttled(throttled) => AppendError::Throttled(throttled),
            BufferError::Io(error) => AppendError::Io(error),
        })
    }

    fn create_file(&self, id: SegmentId) -> io::Result<Arc<dyn MediumFile>> {
        let file: Arc<dyn MediumFile> = self.medium.create(&self.path(id))?.into();
        let mut block = AlignedBuffer::zeroed(BLOCK)?;
        block.copy_from_slice(&segment::encode(&self.store, id));
        let written = write_full(&*file, &block, 0)
            .and_then(|()| file.sync())
            .and_then(|()| self.medium.sync_directory(&self.root));
        if written.is_err() {
            // What stays behind is swept at the next start.
            let _ = self.medium.remove(&self.path(id));
        }
        written.map(|()| file)
    }

    /// No more frames will be added to a segment.
    fn seal(&self, id: SegmentId) -> io::Result<()> {
        if let Some(segment) = self.lock().segments.get_mut(&id) {
            segment.open = false;
        }
        self.delete_if_dead(id)
    }

    fn is_last_of_closed(&self, id: SegmentId, bytes: u64) -> bool {
        let state = self.lock();
        let segment = state.segments.get(&id);
        segment.is_some_and(|segment| !segment.open && segment.live_bytes <= bytes)
    }

    fn delete_if_dead(&self, id: SegmentId) -> io::Result<()> {
        {
            let mut state = self.lock();
            match state.segments.get(&id) {
                Some(segment) if !segment.open && segment.live_bytes == 0 => (),
                _ => return Ok(()),
            }
            state.segments.remove(&id);
            state.files.pop(&id);
        }
        self.medium.remove(&self.path(id))
    }

    fn path(&self, id: SegmentId) -> PathBuf {
        self.root.join(name_of(id))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Unsynced {
    /// Makes the frame durable. Blocks.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.writer.file.sync()
    }
}

impl Writer {
    fn write(&mut self, header: &[u8], layers: &[Bytes], staging: &mut [u8]) -> io::Result<()> {
        let mut stream = Stream {
            file: &*self.file,
            staging,
            filled: 0,
            offset: u64::from(self.next_block) * BLOCK_BYTES,
        };
        stream.push(header)?;
        stream.pad();
        for layer in layers {
            stream.push(layer)?;
        }
        stream.pad();
        stream.flush()?;
        let end = stream.offset / BLOCK_BYTES;
        self.next_block = u32::try_from(end).map_err(|_| io::ErrorKind::FileTooLarge)?;
        Ok(())
    }
}

/// Bytes of any length and address on their way into whole, aligned writes. `staging`
/// is aligned, and a whole number of blocks.
struct Stream<'a> {
    file: &'a dyn MediumFile,
    staging: &'a mut [u8],
    filled: usize,
    offset: u64,
}

impl Stream<'_> {
    fn push(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.filled == self.staging.len() {
                self.flush()?;
            }
            let room = &mut self.staging[self.filled..];
            let (now, later) = bytes.split_at(bytes.len().min(room.len()));
            room[..now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
        }
        Ok(())
    }

    /// Fills up with zeros to a whole block.
    fn pad(&mut self) {
        let end = self.filled.next_multiple_of(ALIGNMENT);
        self.staging[self.filled..end].fill(0);
        self.filled = end;
    }

    fn flush(&mut self) -> io::Result<()> {
        write_full(self.file, &self.staging[..self.filled], self.offset)?;
        self.offset += self.filled as u64;
        self.filled = 0;
        Ok(())
    }
}

/// The name of a segment's file.
pub(super) fn name_of(id: SegmentId) -> String {
    format!("{:08x}.{EXTENSION}", id.0)
}

/// The segment that has this file name; `None` for names that are not ours.
pub(super) fn parse_name(name: &str) -> Option<SegmentId> {
    let (stem, extension) = name.rsplit_once('.')?;
    let id = SegmentId(u32::from_str_radix(stem, 16).ok()?);
    // Other spellings of the same number are not ours.
    (extension == EXTENSION && name == name_of(id)).then_some(id)
}

const EXTENSION: &str = "seg";
const SEGMENT_BYTES: u64 = 256 << 20;
const MAX_SEGMENT_BYTES: u64 = 16 << 30;
/// How many segments a full tier has about, where they are larger than the least.
const SEGMENTS: u64 = 1024;
const STAGING_BYTES: u64 = 1 << 20;
/// The part of the memory that a writer's buffer may take.
const STAGING_SHARE: u64 = 64;
const OPEN_FILES: NonZeroUsize = NonZeroUsize::new(512).expect("not zero");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_foreign_ones_are_not_ours() {
        assert_eq!(parse_name("0000002a.seg"), Some(SegmentId(42)));
        assert_eq!(
            parse_name(&name_of(SegmentId(u32::MAX))),
            Some(SegmentId(u32::MAX))
        );
        for foreign in [
            "2a.seg",
            "0000002A.seg",
            "+000002a.seg",
            "0000002a.tmp",
            "0000002a",
            "notes.txt",
        ] {
            assert_eq!(parse_name(foreign), None, "{foreign}");
        }
    }
}
