//! The segment files of one directory: frames are written, synced and freed here.
//!
//! Where they go is decided in [`Space`]: in the place of a freed frame of the same size,
//! or at the end of a segment that nobody else writes. After a start nothing is free but
//! what lies beyond the stored frames, and new segments are begun.

use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use kvasir_mem::{ALIGNMENT, AlignedBuffer};
use lru::LruCache;

use super::medium::{Medium, MediumFile, write_full};
use super::segment::{self, BLOCK, BLOCK_BYTES, Location, SegmentId, StoreId};
use super::space::{Space, Surplus};
use crate::budget::Throttled;
use crate::buffers::{Buffer, BufferError};
use crate::memory::MemoryTier;
use crate::sync::{Mutex, MutexGuard};

#[derive(Debug)]
pub(super) struct Segments {
    medium: Arc<dyn Medium>,
    root: PathBuf,
    store: StoreId,
    capacity: u64,
    segment_bytes: u64,
    /// Pays for the buffers that frames are written from.
    memory: MemoryTier,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    space: Space,
    files: LruCache<SegmentId, Arc<dyn MediumFile>>,
}

/// A frame to be. Nobody else writes its segment until it is [kept](Segments::keep) or
/// [abandoned](Segments::abandon).
#[derive(Debug)]
pub(super) struct NewFrame {
    file: Arc<dyn MediumFile>,
    staging: Buffer,
    pub(super) location: Location,
    bytes: u64,
}

/// Why no frame could be begun.
#[derive(Debug)]
pub(super) enum BeginError {
    /// No memory to write from.
    Throttled(Throttled),
    Io(io::Error),
}

impl Segments {
    /// Over `root`, which exists, with at most `capacity` bytes of frames. `live` tells
    /// for each segment found there how many bytes of its frames are stored; `next` is
    /// greater than any number in use.
    pub(super) fn new(
        medium: Arc<dyn Medium>,
        root: PathBuf,
        store: StoreId,
        memory: MemoryTier,
        capacity: u64,
        live: impl IntoIterator<Item = (SegmentId, u64)>,
        next: SegmentId,
    ) -> Self {
        Self {
            medium,
            root,
            store,
            capacity,
            segment_bytes: (capacity / SEGMENTS).clamp(SEGMENT_BYTES, MAX_SEGMENT_BYTES),
            memory,
            state: Mutex::new(State {
                space: Space::new(live, next),
                files: LruCache::new(OPEN_FILES),
            }),
        }
    }

    /// A place for a frame of `bytes`, and what it takes to write it there. Blocks.
    pub(super) fn begin(&self, bytes: u64) -> Result<NewFrame, BeginError> {
        let staging = self.staging()?;
        let location = self.place(bytes).map_err(BeginError::Io)?;
        match self.file(location.segment) {
            Ok(file) => Ok(NewFrame {
                file,
                staging,
                location,
                bytes,
            }),
            Err(error) => {
                self.give_up(location, bytes);
                Err(BeginError::Io(error))
            }
        }
    }

    /// Keeps a frame that was written.
    pub(super) fn keep(&self, frame: &NewFrame) {
        self.lock().space.written(frame.location.segment);
    }

    /// Gives up a frame and, since nothing is known of what a failed write or sync
    /// left, its segment.
    pub(super) fn abandon(&self, frame: &NewFrame) {
        self.give_up(frame.location, frame.bytes);
    }

    /// Lets the next frame of its size have the place of this one, which nobody may read
    /// any more, and whose record is gone. Blocks.
    pub(super) fn free(&self, location: Location, bytes: u64) -> io::Result<()> {
        if !self.lock().space.free(location, bytes) {
            self.punch(location, bytes)?;
            self.lock().space.given_back(location.segment, bytes);
        }
        self.trim(self.capacity)
    }

    /// Writes nothing to a segment any more: its medium cannot be trusted, or what the
    /// catalog says of it.
    pub(super) fn spoil(&self, id: SegmentId) {
        self.lock().space.spoil(id);
    }

    /// Gives the space of frames that were freed back to the file system. Blocks.
    pub(super) fn give_back_spares(&self) -> io::Result<()> {
        self.trim(0)
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

    /// Ends all segments that could be added to.
    pub(super) fn close(&self) -> io::Result<()> {
        self.lock().space.seal();
        self.trim(self.capacity)
    }

    /// A place for a frame, in a segment that nobody else writes.
    fn place(&self, bytes: u64) -> io::Result<Location> {
        let limit = self.capacity.saturating_sub(bytes);
        loop {
            // Under one lock, or others would use the room that was just made.
            let surplus = {
                let mut state = self.lock();
                let space = &mut state.space;
                if let Some(location) = space.reuse(bytes) {
                    return Ok(location);
                }
                let surplus = space.surplus(limit);
                if surplus.is_none()
                    && let Some(location) = space.extend(bytes, self.segment_bytes)
                {
                    return Ok(location);
                }
                surplus
            };
            match surplus {
                Some(surplus) => self.give_back(surplus)?,
                None => self.create()?,
            }
        }
    }

    /// Allocates no more than `limit` bytes, unless that many are stored.
    fn trim(&self, limit: u64) -> io::Result<()> {
        loop {
            let Some(surplus) = self.lock().space.surplus(limit) else {
                return Ok(());
            };
            self.give_back(surplus)?;
        }
    }

    fn give_back(&self, surplus: Surplus) -> io::Result<()> {
        match surplus {
            Surplus::Segment(id) => {
                self.lock().files.pop(&id);
                // What stays behind is swept at the next start.
                self.medium.remove(&self.path(id))
            }
            Surplus::Spare(location, bytes) => {
                let punched = self.punch(location, bytes);
                if punched.is_err() {
                    self.lock().space.keep_spare(location, bytes);
                }
                punched
            }
        }
    }

    fn punch(&self, location: Location, bytes: u64) -> io::Result<()> {
        let file = self.file(location.segment)?;
        file.punch(location.offset()..location.offset() + bytes)
    }

    fn give_up(&self, location: Location, bytes: u64) {
        self.spoil(location.segment);
        // What stays behind is swept at the next start.
        let _ = self.free(location, bytes);
    }

    fn create(&self) -> io::Result<()> {
        let id = self.lock().space.next_id();
        let file = self.create_file(id)?;
        let mut state = self.lock();
        state.space.add(id);
        state.files.put(id, file);
        Ok(())
    }

    /// A buffer to write from, small beside the memory there is.
    fn staging(&self) -> Result<Buffer, BeginError> {
        let bytes = (self.memory.capacity() / STAGING_SHARE)
            .clamp(BLOCK_BYTES, STAGING_BYTES)
            .next_multiple_of(BLOCK_BYTES);
        self.memory.buffer(bytes).map_err(|error| match error {
            BufferError::Throttled(throttled) => BeginError::Throttled(throttled),
            BufferError::Io(error) => BeginError::Io(error),
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

    fn path(&self, id: SegmentId) -> PathBuf {
        self.root.join(name_of(id))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NewFrame {
    /// Writes the frame, durably. After an error it must be abandoned: a second sync
    /// would succeed without writing what the first one failed to ("Can Applications
    /// Recover from fsync Failures?", USENIX ATC 2020). Blocks.
    pub(super) fn write(&mut self, header: &[u8], extents: &[Bytes]) -> io::Result<()> {
        let mut stream = Stream {
            file: &*self.file,
            staging: self.staging.as_mut(),
            filled: 0,
            offset: self.location.offset(),
        };
        stream.push(header)?;
        stream.pad();
        for extent in extents {
            stream.push(extent)?;
        }
        stream.pad();
        stream.flush()?;
        self.file.sync()
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
/// A chunk of 1 MiB in one piece, with its header.
const STAGING_BYTES: u64 = (1 << 20) + (64 << 10);
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
