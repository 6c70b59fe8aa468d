//! Pages that sequences take, in memory or not.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::engine_loop::EngineLoop;
use crate::kv::BlockId;
use crate::paging::{Backing, Options, Pager, PagerStats, ScratchBits};

/// Keeps KV in memory only in part; see [`crate::paging`].
///
/// A layer of one sequence has to fit into memory, no more. Sequences that do not fit together
/// are parked and take turns. All of it gives the very tokens and logits that memory for
/// everything gives, unless pages are [selected](Self::selection) or [rounded](Self::bits).
#[derive(Clone, Debug)]
pub struct PagingConfig {
    /// Pieces in memory: [`crate::KvPool::frames_in`] says how many some bytes hold.
    pub frames: usize,
    /// Where the others are.
    pub backing: Arc<dyn Backing>,
    /// How the others lie there. Default: as in memory, which is exact. Chunks that were computed
    /// over pages that have come back from fewer bits are not stored in the cache.
    pub bits: ScratchBits,
    /// Pages that decoding attends to. Default: all, which is exact.
    pub selection: Option<PageSelection>,
    /// Batches that a sequence is in before others that wait for memory have their turn: tokens,
    /// where it decodes. More move fewer bytes, and let others wait longer. Default:
    /// [`Self::TURN_BATCHES`].
    pub turn_batches: NonZeroUsize,
    /// How long the backing may take to complete any operation: then it hangs, nobody waits for
    /// it any more, and what needs it is computed again, or fails. Until then it may hold up
    /// everybody. Default: [`Pager::TIMEOUT`].
    pub timeout: Duration,
}

impl PagingConfig {
    /// Default of [`Self::turn_batches`].
    pub const TURN_BATCHES: NonZeroUsize = NonZeroUsize::MIN.saturating_add(63);

    /// Exact, everything else by default.
    pub fn new(frames: usize, backing: Arc<dyn Backing>) -> Self {
        Self {
            frames,
            backing,
            bits: ScratchBits::default(),
            selection: None,
            turn_batches: Self::TURN_BATCHES,
            timeout: Pager::TIMEOUT,
        }
    }
}

/// Which pages decoding attends to. Prompts are computed over all of theirs.
///
/// An approximation: see `docs/measurements.md` for what it does to answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PageSelection {
    /// How pages are chosen. Rules that [need keys](crate::paging::Rule::needs_keys) are
    /// refused.
    pub options: Options,
    /// Sequences attend to all pages up to this many tokens. Default: [`Self::FROM_TOKENS`].
    pub from_tokens: usize,
    /// Whether a layer's choice is [foreseen](crate::paging::Selector::foresee) one layer earlier,
    /// and read while that computes. As much work again as choosing: worth it where cores are
    /// idle then.
    pub reads_ahead: bool,
    /// Memory for digests of all sequences, beside the frames. A sequence whose digests find no
    /// room attends to all of its pages.
    pub digest_bytes: usize,
}

impl PageSelection {
    /// Default of [`Self::from_tokens`].
    pub const FROM_TOKENS: usize = 1024;
}

/// What keeping KV in memory only in part has come to since the engine started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagingStats {
    /// Pieces that fit into memory.
    pub frames: usize,
    /// Bytes of frames and of buffers.
    pub resident_bytes: usize,
    /// Bytes of digests, in memory too.
    pub digest_bytes: usize,
    /// What moved.
    pub pager: PagerStats,
    /// How often a sequence was parked.
    pub parks: u64,
    /// Bytes that were written for it.
    pub parked_bytes: u64,
    /// How often one went on that had been parked.
    pub resumes: u64,
    /// How often one was computed again because its pages could not be moved.
    pub restarts: u64,
    /// Sequences that attend to all pages because digests found no room.
    pub undigested: u64,
}

/// What the loop knows of a pool that is in memory only in part.
#[derive(Debug)]
pub(super) struct Paged {
    pub(super) selection: Option<PageSelection>,
    pub(super) turn_batches: usize,
    /// Batches so far.
    pub(super) now: u64,
    /// The batch up to which nothing is parked, because the file could not be written.
    pub(super) unwritable_until: u64,
    pub(super) stats: PagingStats,
    shown: Arc<Mutex<PagingStats>>,
}

impl Paged {
    pub(super) fn new(config: &PagingConfig, shown: Arc<Mutex<PagingStats>>) -> Self {
        Self {
            selection: config.selection,
            turn_batches: config.turn_batches.get(),
            now: 0,
            unwritable_until: 0,
            stats: PagingStats::default(),
            shown,
        }
    }
}

impl EngineLoop {
    pub(super) fn take_blocks(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.pool.free_blocks() {
            return None;
        }
        (0..count).map(|_| self.pool.alloc()).collect()
    }

    pub(super) fn give_back(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            if let Err(error) = self.pool.free(block) {
                tracing::error!(%error, "a page was given back twice");
            }
        }
    }

    /// Lets others see what paging has come to.
    pub(super) fn show_paging(&mut self) {
        let digest_bytes = self.digest_bytes();
        let (Some(paged), Some(pager)) = (&mut self.paged, self.pool.pager()) else {
            return;
        };
        paged.stats.frames = pager.frames();
        paged.stats.resident_bytes = pager.resident_bytes();
        paged.stats.digest_bytes = digest_bytes;
        paged.stats.pager = pager.stats();
        crate::metrics::paging(&paged.stats);
        *paged.shown.lock().unwrap_or_else(PoisonError::into_inner) = paged.stats;
    }
}
