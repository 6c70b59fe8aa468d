//! Reading pieces: into frames, as few operations as there can be, and what becomes of them.

use std::time::Instant;

use super::super::PagingError;
use super::super::frames::{FrameId, Heat, PieceId, Tag};
use super::super::io::{Fault, Job, ReadPiece, ReadRun, THREADS, Work};
use super::super::stats::Stalls;
use super::{NOWHERE, Pager, Unread};

impl Pager {
    /// Puts pieces into frames: those in the file are read, others are zeros.
    pub(super) fn load(
        &mut self,
        pieces: &[PieceId],
        frames: Vec<FrameId>,
        heat: Heat,
        ahead: bool,
    ) {
        let epoch = if ahead { 0 } else { self.epoch };
        let mut reads = Vec::new();
        for (&piece, frame) in pieces.iter().zip(frames) {
            let entry = &mut self.pieces[piece.index()];
            entry.frame = frame.0;
            // What was guessed has to be wanted to last.
            let heat = if ahead { Heat::Scanned } else { heat };
            let layer = self.shape.layer_and_block(piece).0;
            *self.frames.tag_mut(frame) = Tag {
                piece: Some(piece),
                epoch,
                heat,
                layer: u32::try_from(layer).unwrap_or(0),
                turn: 0,
                loading: entry.stored,
                ahead,
                dirty: false,
                writing: entry.writing,
            };
            self.frames.touch(frame, heat);
            if entry.stored {
                reads.push(ReadPiece {
                    piece,
                    frame,
                    memory: self.frames.take_memory(frame),
                    checksum: entry.checksum,
                    ahead,
                    outcome: Ok(()),
                });
            } else {
                self.frames.bytes_mut(frame).fill(0);
                self.stats.fresh += 1;
            }
        }
        if !ahead {
            self.awaited[UNPREDICTED] += reads.len();
            self.stats.misses += reads.len() as u64;
        }
        self.loading += reads.len();
        self.read(reads, !ahead);
    }

    /// Submits reads, adjoining ones as one, in about as many jobs as there are threads.
    fn read(&mut self, reads: Vec<ReadPiece>, urgent: bool) {
        let most = self.group_pieces();
        let share = reads.len().div_ceil(THREADS).clamp(1, most);
        let mut jobs: Vec<Work> = Vec::new();
        let (mut runs, mut in_job): (Vec<ReadRun>, usize) = (Vec::new(), 0);
        for read in reads {
            let adjoins = runs
                .last()
                .and_then(|run| run.pieces.last())
                .is_some_and(|last| last.piece.0 + 1 == read.piece.0);
            // A run is cut only where it is as long as an operation may be.
            if in_job >= most || (in_job >= share && !adjoins) {
                jobs.push(Work::Read(std::mem::take(&mut runs)));
                in_job = 0;
            }
            in_job += 1;
            match runs.last_mut() {
                Some(run) if adjoins => run.pieces.push(read),
                _ => {
                    self.stats.reads += 1;
                    runs.push(ReadRun {
                        offset: self.offset(read.piece),
                        pieces: vec![read],
                    });
                }
            }
        }
        if !runs.is_empty() {
            jobs.push(Work::Read(runs));
        }
        if !jobs.is_empty() {
            self.device.submit(jobs, urgent);
        }
    }

    pub(super) fn await_wanted(&mut self) {
        while self.awaited != [0; 2] {
            let cause = usize::from(self.awaited[UNPREDICTED] == 0);
            let started = Instant::now();
            // A wait in vain leaves nothing awaited, and says what is unread.
            let _ = self.wait();
            let waited = started.elapsed();
            let Stalls { read, late, .. } = &mut self.stats.stalls;
            *[read, late][cause] += waited;
        }
    }

    pub(super) fn collect(&mut self) {
        for job in self.device.done() {
            self.land(job);
        }
    }

    /// Lands what is done, once there is something; an error when nothing comes in time.
    pub(super) fn wait(&mut self) -> Result<(), PagingError> {
        let is_overdue = self.loading + self.writes_in_flight == 0;
        let done = self.device.wait(is_overdue);
        if done.is_empty() {
            return Err(self.give_up());
        }
        for job in done {
            self.land(job);
        }
        Ok(())
    }

    /// Stops waiting for all that is in flight, and says for what it was.
    ///
    /// A read that hangs keeps the memory that it fills: its frame is out of the pool until it
    /// lands, and its piece is read anew into another one. What is being written stays in
    /// memory, and is not written again until that write has ended.
    fn give_up(&mut self) -> PagingError {
        for frame in self.frames.ids() {
            let tag = self.frames.tag_mut(frame);
            if !tag.loading {
                continue;
            }
            let wanted = tag.epoch == self.epoch;
            let Some(piece) = tag.piece.take() else {
                continue;
            };
            self.pieces[piece.index()].frame = NOWHERE;
            if wanted {
                self.unread.get_or_insert(Unread {
                    piece,
                    fault: Fault::Timeout,
                    ahead: false,
                });
            }
        }
        self.awaited = [0; 2];
        self.overdue_reads += std::mem::take(&mut self.loading);
        self.overdue_writes += std::mem::take(&mut self.writes_in_flight);
        for job in self.device.give_up() {
            self.land(job);
        }
        match self.unread {
            Some(Unread { piece, fault, .. }) => self.read_error(piece, fault),
            None => PagingError::Timeout {
                timeout: self.device.timeout(),
            },
        }
    }

    fn land(&mut self, job: Job) {
        let is_overdue = self.device.is_overdue(&job);
        match job.work {
            Work::Read(runs) => {
                let reads = runs.into_iter().flat_map(|run| run.pieces);
                reads.for_each(|read| self.landed(read, is_overdue));
            }
            Work::Write(run) => self.written(run, is_overdue),
            // Never among what is done: somebody else has it.
            Work::ReadOut(_) => {}
        }
    }

    fn landed(&mut self, read: ReadPiece, is_overdue: bool) {
        if is_overdue {
            self.overdue_reads -= 1;
        } else {
            self.loading -= 1;
        }
        if read.outcome.is_ok() {
            self.stats.read_bytes += self.slots.bytes() as u64;
        }
        self.frames.return_memory(read.frame, read.memory);
        let tag = self.frames.tag_mut(read.frame);
        let piece = tag.piece;
        let wanted = piece.is_some() && tag.epoch == self.epoch;
        tag.loading = false;
        if wanted {
            self.awaited[usize::from(read.ahead)] -= 1;
        }
        match (piece, read.outcome) {
            (None, _) => self.frames.release(read.frame),
            (Some(piece), Ok(())) => self.note_rounded(piece),
            (Some(piece), Err(fault)) => {
                self.pieces[piece.index()].frame = NOWHERE;
                self.frames.release(read.frame);
                if wanted {
                    let ahead = read.ahead;
                    self.unread.get_or_insert(Unread {
                        piece,
                        fault,
                        ahead,
                    });
                }
            }
        }
    }

    pub(super) fn read_error(&self, piece: PieceId, fault: Fault) -> PagingError {
        let (layer, block) = self.shape.layer_and_block(piece);
        match fault {
            Fault::Corrupt => PagingError::Corrupt { block, layer },
            Fault::Device(source) => PagingError::Read {
                block,
                layer,
                source,
            },
            Fault::Timeout => PagingError::ReadTimeout {
                block,
                layer,
                timeout: self.device.timeout(),
            },
        }
    }
}

/// Indices of [`Pager::awaited`]: whether a read had been asked for ahead.
const UNPREDICTED: usize = 0;
pub(super) const LATE: usize = 1;
