//! The table of pieces, and what moves them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use kvasir_types::Checksum;
use rustix::io::Errno;

use super::PagingError;
use super::coded::{Coding, Slots};
use super::file::{Backing, SECTOR_BYTES, errno};
use super::foresight::Foresight;
use super::frames::{FrameId, Frames, Heat, PieceId, Replacement, aligned};
use super::io::{Device, Fault};
use super::stats::PagerStats;
use crate::kv::BlockId;

mod reading;
mod writing;

#[cfg(test)]
mod tests;

use reading::LATE;
use writing::write_error;

/// Bytes that one operation moves, at most.
const GROUP_BYTES: usize = 1 << 20;

/// Groups that are written at the same time, at most: as much memory is used beside the frames.
const WRITE_GROUPS: usize = 8;

/// Share of the frames that may hold what the file does not, before it is written behind.
const DIRTY_SHARE: usize = 4;

/// Which pieces there are. The file holds them in this order: `[layer][block][kv_head]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) blocks: usize,
    /// Bytes of a piece, padding not counted.
    pub(crate) piece_bytes: usize,
    /// How pieces lie in the file, if not as they are.
    pub(crate) coding: Option<Coding>,
}

impl Shape {
    fn pieces(&self) -> usize {
        self.layers * self.kv_heads * self.blocks
    }

    fn frame_bytes(&self) -> usize {
        frame_bytes(self.piece_bytes)
    }

    pub(crate) fn piece(&self, layer: usize, kv_head: usize, block: BlockId) -> PieceId {
        let index = (layer * self.blocks + block.0 as usize) * self.kv_heads + kv_head;
        PieceId(u32::try_from(index).expect("as many pieces as u32 counts"))
    }

    fn layer_and_block(&self, piece: PieceId) -> (usize, BlockId) {
        let of_head = piece.index() / self.kv_heads;
        let block = u32::try_from(of_head % self.blocks).expect("block ids are u32");
        (of_head / self.blocks, BlockId(block))
    }
}

/// Bytes of memory for a piece of some bytes.
pub(crate) const fn frame_bytes(piece_bytes: usize) -> usize {
    piece_bytes.next_multiple_of(SECTOR_BYTES)
}

/// Where a piece is. It is in memory, in the file, in both, or nowhere: then it holds nothing.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// [`NOWHERE`] if it has none.
    frame: u32,
    /// The file holds the piece as it was when last clean, with `checksum`.
    stored: bool,
    /// A write is in flight.
    writing: bool,
    /// What is being written belongs to a sequence that has ended.
    forgotten: bool,
    /// Listed in [`Pager::dirty`].
    listed: bool,
    checksum: Checksum,
}

const NOWHERE: u32 = u32::MAX;

/// A piece that was waited for in vain.
#[derive(Clone, Copy, Debug)]
struct Unread {
    piece: PieceId,
    fault: Fault,
    /// It had been asked for before it was wanted.
    ahead: bool,
}

impl Piece {
    const EMPTY: Self = Self {
        frame: NOWHERE,
        stored: false,
        writing: false,
        forgotten: false,
        listed: false,
        checksum: Checksum::from_u64(0),
    };

    fn frame(&self) -> Option<FrameId> {
        (self.frame != NOWHERE).then_some(FrameId(self.frame))
    }
}

/// Pieces of a pool, of which some are in memory. See [the module](super).
#[derive(Debug)]
pub struct Pager {
    shape: Shape,
    slots: Slots,
    pieces: Vec<Piece>,
    /// By block, whether anything of it has come back from the file not as it was.
    rounded: Vec<AtomicBool>,
    frames: Frames,
    device: Device,
    /// The latest request; what it wanted stays until the next one.
    epoch: u64,
    /// Pieces in the order in which they became dirty, each once; some are clean again.
    dirty: VecDeque<PieceId>,
    dirty_count: usize,
    /// Buffers of [`GROUP_BYTES`] that are not in use.
    buffers: Vec<BytesMut>,
    writes_in_flight: usize,
    /// Pieces on their way.
    loading: usize,
    /// What is in flight beside these, and waited for no more: pieces whose frames are out of
    /// the pool, and writes.
    overdue_reads: usize,
    overdue_writes: usize,
    /// Of those, the ones that the latest request wants: not predicted, and predicted.
    awaited: [usize; 2],
    /// The first piece of the latest request that could not be read.
    unread: Option<Unread>,
    /// Why the last write failed, if it did.
    unwritten: Option<Errno>,
    foresight: Foresight,
    stats: PagerStats,
}

impl Pager {
    /// How long the disk may take to complete any operation before nobody waits for it any more,
    /// by default.
    pub const TIMEOUT: Duration = Duration::from_secs(10);

    pub(crate) fn new(
        shape: Shape,
        frames: usize,
        replacement: Replacement,
        backing: Arc<dyn Backing>,
    ) -> Result<Self, PagingError> {
        let pieces = shape.pieces();
        if u32::try_from(pieces).is_err() {
            return Err(PagingError::TooLarge(pieces));
        }
        let slots = Slots::new(shape.piece_bytes, shape.coding, backing.sector_bytes());
        backing
            .prepare(pieces as u64 * slots.bytes() as u64)
            .map_err(|error| write_error(errno(&error)))?;
        Ok(Self {
            pieces: vec![Piece::EMPTY; pieces],
            frames: Frames::new(
                frames.min(pieces),
                shape.frame_bytes(),
                shape.layers,
                replacement,
            ),
            device: Device::new(backing, slots, Self::TIMEOUT)?,
            rounded: (0..shape.blocks).map(|_| AtomicBool::new(false)).collect(),
            slots,
            shape,
            epoch: 0,
            dirty: VecDeque::new(),
            dirty_count: 0,
            buffers: (0..WRITE_GROUPS).map(|_| BytesMut::new()).collect(),
            writes_in_flight: 0,
            loading: 0,
            overdue_reads: 0,
            overdue_writes: 0,
            awaited: [0; 2],
            unread: None,
            unwritten: None,
            foresight: Foresight::default(),
            stats: PagerStats::default(),
        })
    }

    /// The same with another timeout than [`Self::TIMEOUT`].
    pub(crate) fn set_timeout(&mut self, timeout: Duration) {
        self.device.set_timeout(timeout);
    }

    /// Counts since the pool was made.
    pub fn stats(&self) -> PagerStats {
        PagerStats {
            timeouts: self.device.timeouts(),
            ..self.stats
        }
    }

    /// Pieces that fit into memory.
    pub fn frames(&self) -> usize {
        self.frames.count()
    }

    /// The same without those that reads hold which hang.
    pub(crate) fn usable_frames(&self) -> usize {
        self.frames.count() - self.overdue_reads
    }

    /// Bytes of a frame, padding included.
    pub fn frame_bytes(&self) -> usize {
        self.shape.frame_bytes()
    }

    /// Bytes of a piece in the file, padding included.
    pub fn slot_bytes(&self) -> usize {
        self.slots.bytes()
    }

    /// Bytes in memory, in use or not: the frames, and buffers of writes.
    pub fn resident_bytes(&self) -> usize {
        self.frames.count() * self.frame_bytes() + WRITE_GROUPS * GROUP_BYTES
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// A piece that is in memory.
    pub(crate) fn bytes(&self, piece: PieceId) -> Option<&[u8]> {
        let frame = self.resident(piece)?;
        Some(&self.frames.bytes(frame)[..self.shape.piece_bytes])
    }

    /// The same, to be changed.
    pub(crate) fn bytes_mut(&mut self, piece: PieceId) -> Option<&mut [u8]> {
        let frame = self.resident(piece)?;
        self.soil(piece, frame);
        Some(&mut self.frames.bytes_mut(frame)[..self.shape.piece_bytes])
    }

    /// A piece that is not in memory, from the file past the frames; `None` if it holds nothing.
    ///
    /// # Errors
    /// A [`PagingError`] when it cannot be read.
    pub(crate) fn read_out(&self, piece: PieceId) -> Result<Option<BytesMut>, PagingError> {
        let entry = &self.pieces[piece.index()];
        if !entry.stored {
            return Ok(None);
        }
        let memory = aligned(self.frame_bytes());
        let mut bytes = self
            .device
            .read_out(memory, self.offset(piece), entry.checksum)
            .map_err(|fault| self.read_error(piece, fault))?;
        self.note_rounded(piece);
        bytes.truncate(self.shape.piece_bytes);
        Ok(Some(bytes))
    }

    /// Whether anything that a block holds has come back from the file not as it was.
    pub(crate) fn is_rounded(&self, block: BlockId) -> bool {
        self.rounded[block.0 as usize].load(Ordering::Relaxed)
    }

    fn note_rounded(&self, piece: PieceId) {
        if self.slots.are_coded() {
            let (_, block) = self.shape.layer_and_block(piece);
            self.rounded[block.0 as usize].store(true, Ordering::Relaxed);
        }
    }

    fn resident(&self, piece: PieceId) -> Option<FrameId> {
        let frame = self.pieces[piece.index()].frame()?;
        (!self.frames.tag(frame).loading).then_some(frame)
    }

    fn soil(&mut self, piece: PieceId, frame: FrameId) {
        let tag = self.frames.tag_mut(frame);
        if !tag.dirty {
            tag.dirty = true;
            self.dirty_count += 1;
            if !std::mem::replace(&mut self.pieces[piece.index()].listed, true) {
                self.dirty.push_back(piece);
            }
        }
    }

    /// Has all of `wanted` in memory, and keeps it there until the next call.
    ///
    /// Pieces that hold nothing yet come as zeros.
    ///
    /// # Errors
    /// A [`PagingError`]; what has come stays.
    pub(crate) fn ensure(&mut self, wanted: &[PieceId], heat: Heat) -> Result<(), PagingError> {
        self.bring(wanted, heat)?;
        if self.unread.is_some_and(|unread| unread.ahead) {
            // What failed was begun before it was asked for: the fault may be over.
            self.bring(wanted, heat)?;
        }
        if let Some(Unread { piece, fault, .. }) = self.unread {
            return Err(self.read_error(piece, fault));
        }
        self.write_behind();
        Ok(())
    }

    fn bring(&mut self, wanted: &[PieceId], heat: Heat) -> Result<(), PagingError> {
        self.epoch += 1;
        self.awaited = [0; 2];
        self.unread = None;
        self.collect();
        if let (Heat::Chosen, Some(&piece)) = (heat, wanted.first()) {
            self.frames.begin_turn(self.shape.layer_and_block(piece).0);
        }
        let mut missing = Vec::new();
        let mut held = 0;
        for &piece in wanted {
            match self.pieces[piece.index()].frame() {
                None => missing.push(piece),
                Some(frame) => held += usize::from(self.want(frame, heat)),
            }
        }
        missing.sort_unstable();
        missing.dedup();
        let needed = held + missing.len();
        if needed > self.frames.count() {
            return Err(PagingError::Frames {
                needed,
                frames: self.frames.count(),
            });
        }
        if self.awaited[LATE] > 0 {
            self.device.promote();
        }
        let frames = self.take_frames(missing.len())?;
        self.load(&missing, frames, heat, false);
        self.await_wanted();
        Ok(())
    }

    /// Notes that the latest request wants the piece in `frame`; false if it had been noted.
    fn want(&mut self, frame: FrameId, heat: Heat) -> bool {
        let epoch = self.epoch;
        let tag = self.frames.tag_mut(frame);
        if tag.epoch == epoch {
            return false;
        }
        tag.epoch = epoch;
        let ahead = std::mem::take(&mut tag.ahead);
        if ahead {
            self.foresight.note(true);
        }
        if tag.loading {
            self.awaited[LATE] += 1;
            self.stats.late += 1;
        } else {
            self.stats.hits += 1;
            self.stats.hits_ahead += u64::from(ahead);
        }
        self.frames.touch(frame, heat);
        true
    }

    /// Starts to read what of `expected` is in the file only, as far as frames can be had
    /// without waiting, and keeps the rest from giving way soon.
    pub(crate) fn prefetch(&mut self, expected: &[PieceId], heat: Heat) {
        self.collect();
        let mut missing = Vec::new();
        for &piece in expected {
            let entry = &self.pieces[piece.index()];
            match entry.frame() {
                Some(frame) => self.frames.touch(frame, heat),
                None if entry.stored => missing.push(piece),
                None => (),
            }
        }
        if !self.foresight.is_worth_it() {
            return;
        }
        missing.sort_unstable();
        missing.dedup();
        let mut frames = Vec::with_capacity(missing.len());
        while frames.len() < missing.len()
            && let Some(frame) = self.take_frame()
        {
            frames.push(frame);
        }
        missing.truncate(frames.len());
        self.stats.ahead += missing.len() as u64;
        self.load(&missing, frames, heat, true);
    }

    /// Lets go of all pieces of a block: they hold nothing from now on.
    pub(crate) fn forget(&mut self, block: BlockId) {
        *self.rounded[block.0 as usize].get_mut() = false;
        for layer in 0..self.shape.layers {
            for kv_head in 0..self.shape.kv_heads {
                let piece = self.shape.piece(layer, kv_head, block);
                let entry = &mut self.pieces[piece.index()];
                let frame = entry.frame();
                entry.frame = NOWHERE;
                entry.stored = false;
                entry.forgotten = entry.writing;
                let Some(frame) = frame else { continue };
                let tag = self.frames.tag_mut(frame);
                self.dirty_count -= usize::from(std::mem::take(&mut tag.dirty));
                if tag.loading {
                    // Released when its memory comes back.
                    tag.piece = None;
                } else {
                    self.frames.release(frame);
                }
            }
        }
    }

    fn is_dirty(&self, piece: PieceId) -> bool {
        self.resident(piece)
            .is_some_and(|frame| self.frames.tag(frame).dirty)
    }

    /// A frame that can be had at once.
    fn take_frame(&mut self) -> Option<FrameId> {
        if let Some(frame) = self.frames.take_free() {
            return Some(frame);
        }
        let frame = self.frames.victim(self.epoch)?;
        let tag = self.frames.tag_mut(frame);
        if std::mem::take(&mut tag.ahead) {
            self.foresight.note(false);
            self.stats.ahead_unused += 1;
        }
        if let Some(piece) = tag.piece.take() {
            self.pieces[piece.index()].frame = NOWHERE;
        }
        self.stats.evictions += 1;
        Some(frame)
    }

    /// Frames for what must come; none are taken when not all can be had.
    fn take_frames(&mut self, count: usize) -> Result<Vec<FrameId>, PagingError> {
        let mut frames = Vec::with_capacity(count);
        let mut tried = false;
        while frames.len() < count {
            if let Some(frame) = self.take_frame() {
                frames.push(frame);
            } else if let Err(error) = self.make_room(count - frames.len(), &mut tried) {
                frames
                    .into_iter()
                    .for_each(|frame| self.frames.release(frame));
                return Err(error);
            }
        }
        Ok(frames)
    }

    /// Everything in memory is wanted, on its way, or not on disk: waits until that changes.
    /// An error of writing counts once writing was `tried` anew.
    fn make_room(&mut self, wanted: usize, tried: &mut bool) -> Result<(), PagingError> {
        let started = Instant::now();
        // What failed is tried again once the rest has come to its end.
        let settled = self.unwritten.is_none() || self.writes_in_flight == 0;
        if settled && self.dirty_count > 0 {
            self.unwritten = None;
            let before = self.writes_in_flight;
            self.write_oldest(wanted.max(self.group_pieces()), false);
            *tried |= self.writes_in_flight > before;
        }
        if self.writes_in_flight > 0 {
            let came = self.wait();
            self.stats.stalls.write += started.elapsed();
            came?;
            return match self.unwritten {
                // What else is in flight may still succeed.
                Some(error) if self.writes_in_flight == 0 && *tried => Err(write_error(error)),
                _ => Ok(()),
            };
        }
        if self.loading + self.overdue_reads + self.overdue_writes > 0 {
            let came = self.wait();
            self.stats.stalls.frame += started.elapsed();
            return came;
        }
        // What is wanted fits, so something can always be written or awaited.
        Err(PagingError::Frames {
            needed: wanted,
            frames: self.frames.count(),
        })
    }

    /// Pieces that one operation moves, at most.
    fn group_pieces(&self) -> usize {
        (GROUP_BYTES / self.frame_bytes()).max(1)
    }

    fn offset(&self, piece: PieceId) -> u64 {
        u64::from(piece.0) * self.slots.bytes() as u64
    }
}
