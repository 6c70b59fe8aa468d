//! Writing pieces: behind the computation, to make room, and all of a sequence.

use std::ops::Range;
use std::time::Instant;

use kvasir_types::Checksum;
use rustix::io::Errno;

use super::super::PagingError;
use super::super::frames::{PieceId, aligned};
use super::super::io::{Work, WriteRun};
use super::{DIRTY_SHARE, GROUP_BYTES, NOWHERE, Pager};
use crate::kv::BlockId;

impl Pager {
    /// Writes what of the blocks only memory holds, and gives their frames back. Returns the
    /// bytes written for it. What was written before and has not changed is not written again.
    ///
    /// # Errors
    /// [`PagingError::Full`], [`PagingError::Write`] or [`PagingError::Timeout`]: then nothing is
    /// lost, and all of it that was in memory still is.
    pub(crate) fn park(&mut self, blocks: &[BlockId]) -> Result<u64, PagingError> {
        let mut pieces = Vec::with_capacity(blocks.len());
        for layer in 0..self.shape.layers {
            for kv_head in 0..self.shape.kv_heads {
                let of_head = |&block: &BlockId| self.shape.piece(layer, kv_head, block);
                pieces.extend(blocks.iter().map(of_head));
            }
        }
        pieces.sort_unstable();
        self.epoch += 1;
        self.unread = None;
        self.collect();
        // What is being written cannot be written again yet.
        while self.writes_in_flight > 0 {
            self.wait()?;
        }
        if pieces.iter().any(|it| self.pieces[it.index()].writing) {
            // By a write that hangs: the only copy of it is in memory.
            return Err(PagingError::Timeout {
                timeout: self.device.timeout(),
            });
        }
        self.unwritten = None;
        let dirty: Vec<PieceId> = pieces
            .iter()
            .copied()
            .filter(|&piece| self.is_dirty(piece))
            .collect();
        for run in self.runs(&dirty) {
            self.write(&dirty[run])?;
        }
        while self.writes_in_flight > 0 {
            self.wait_for_write()?;
        }
        for &piece in &pieces {
            if let Some(frame) = self.resident(piece) {
                self.pieces[piece.index()].frame = NOWHERE;
                self.frames.release(frame);
            }
        }
        Ok((dirty.len() * self.slots.bytes()) as u64)
    }

    /// Starts to write when much is dirty, without waiting.
    pub(super) fn write_behind(&mut self) {
        let limit = self.frames.count() / DIRTY_SHARE;
        if self.unwritten.is_none() && self.dirty_count > limit {
            self.write_oldest(self.dirty_count - limit, true);
        }
    }

    /// Starts to write about `count` pieces, those that became dirty first, and what adjoins
    /// them; as far as there are buffers.
    pub(super) fn write_oldest(&mut self, count: usize, behind: bool) {
        let most = self.group_pieces();
        let mut started = 0;
        for _ in 0..self.dirty.len() {
            if started >= count || self.buffers.is_empty() {
                return;
            }
            let Some(piece) = self.dirty.pop_front() else {
                return;
            };
            let entry = &mut self.pieces[piece.index()];
            entry.listed = false;
            let writing = entry.writing;
            if !self.is_dirty(piece) {
                continue;
            }
            if writing {
                self.pieces[piece.index()].listed = true;
                self.dirty.push_back(piece);
                continue;
            }
            // What adjoins it and may be written, in both directions.
            let able = |at: u32| {
                let at = PieceId(at);
                at.index() < self.pieces.len()
                    && !self.pieces[at.index()].writing
                    && self.is_dirty(at)
            };
            let (mut first, mut end) = (piece.0, piece.0 + 1);
            while ((end - first) as usize) < most && able(end) {
                end += 1;
            }
            while ((end - first) as usize) < most && first > 0 && able(first - 1) {
                first -= 1;
            }
            let run: Vec<PieceId> = (first..end).map(PieceId).collect();
            started += run.len();
            self.submit_write(&run, behind);
        }
    }

    /// Ranges of a sorted list whose pieces adjoin and make one operation.
    fn runs(&self, pieces: &[PieceId]) -> Vec<Range<usize>> {
        let most = self.group_pieces();
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (at, piece) in pieces.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.len() < most && pieces[at - 1].0 + 1 == piece.0 => run.end += 1,
                _ => runs.push(at..at + 1),
            }
        }
        runs
    }

    /// Writes adjoining dirty pieces, once there is a buffer.
    fn write(&mut self, run: &[PieceId]) -> Result<(), PagingError> {
        while self.buffers.is_empty() {
            self.wait_for_write()?;
        }
        self.submit_write(run, false);
        Ok(())
    }

    /// There must be a buffer, and no piece of the run being written.
    fn submit_write(&mut self, run: &[PieceId], behind: bool) {
        let bytes = self.slots.bytes();
        let mut buffer = self.buffers.pop().expect("there is a buffer");
        if buffer.len() < run.len() * bytes {
            buffer = aligned(GROUP_BYTES.max(bytes));
        }
        let mut pieces = Vec::with_capacity(run.len());
        for (&piece, copy) in run.iter().zip(buffer.chunks_exact_mut(bytes)) {
            let frame = self.resident(piece).expect("dirty pieces are in memory");
            self.slots.pack(self.frames.bytes(frame), copy);
            pieces.push((piece, Checksum::of(copy)));
            let tag = self.frames.tag_mut(frame);
            tag.dirty = false;
            tag.writing = true;
            self.dirty_count -= 1;
            let entry = &mut self.pieces[piece.index()];
            entry.writing = true;
            // The file is between two states.
            entry.stored = false;
        }
        self.writes_in_flight += 1;
        self.stats.writes += 1;
        let work = Work::Write(WriteRun {
            offset: self.offset(run[0]),
            len: run.len() * bytes,
            pieces,
            buffer,
            outcome: Ok(()),
        });
        self.device.submit(vec![work], !behind);
    }

    pub(super) fn written(&mut self, run: WriteRun, is_overdue: bool) {
        if is_overdue {
            self.overdue_writes -= 1;
        } else {
            self.writes_in_flight -= 1;
        }
        self.buffers.push(run.buffer);
        match run.outcome {
            Ok(()) => self.stats.written_bytes += run.len as u64,
            Err(error) => {
                if self.unwritten.replace(error) != Some(error) {
                    tracing::warn!(%error, "pages cannot be written to the scratch file");
                }
            }
        }
        for (piece, checksum) in run.pieces {
            let entry = &mut self.pieces[piece.index()];
            entry.writing = false;
            let forgotten = std::mem::take(&mut entry.forgotten);
            let frame = entry.frame();
            if !forgotten && run.outcome.is_ok() {
                entry.stored = true;
                entry.checksum = checksum;
            }
            let Some(frame) = frame else { continue };
            self.frames.tag_mut(frame).writing = false;
            if !forgotten && run.outcome.is_err() {
                self.soil(piece, frame);
            }
        }
    }

    /// Something must be written.
    fn wait_for_write(&mut self) -> Result<(), PagingError> {
        let started = Instant::now();
        let came = self.wait();
        self.stats.stalls.write += started.elapsed();
        came?;
        self.unwritten
            .map_or(Ok(()), |error| Err(write_error(error)))
    }
}

pub(super) fn write_error(error: Errno) -> PagingError {
    match error {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => PagingError::Full,
        other => PagingError::Write(other),
    }
}
