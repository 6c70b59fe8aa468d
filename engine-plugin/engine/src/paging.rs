//! Long contexts whose KV does not fit into memory.
//!
//! [`crate::KvPool::paged`] makes a pool of as many blocks as the longest contexts need, of
//! which a fixed number of frames is in memory and the rest in a scratch file. The parts:
//! [`mod@file`] is the scratch file, `io` the threads that read and write it, `frames` the memory
//! and what gives way in it, `pager` the table that ties them together.
//!
//! ```text
//! model.forward(…, |before| {
//!     before.pages[step] = chosen;               brought before the layer attends
//!     before.expected[step] = Some(predicted);   read ahead while it computes
//! })
//! pool.park(blocks)                              later steps bring back what they need
//! ```
//!
//! # Units
//!
//! A *piece* is one KV head of one layer of one block: `[K, V][token][head_dim]`, 4 KiB for 64
//! dimensions in 16 bits. It is the smallest thing that moves, because pages are chosen by KV
//! head. A *frame* is memory for one piece, a *slot* its place in the file. Both are padded to
//! [`file::SECTOR_BYTES`], which does for direct I/O everywhere: pools of less than 4 KiB a piece
//! waste the rest, in memory and on disk.
//!
//! # Movement
//!
//! Attention of a layer starts when all pieces that it reads are in memory, and waits for no
//! other. What the next layer is expected to read is read ahead while this layer computes.
//! In the file, all heads of a layer of a block adjoin, and blocks as they do in the pool; pieces
//! that adjoin move in one operation of up to 1 MiB. Reads land in the frames themselves; writes are copied, so
//! that a page may be read while it is written behind. Loading only the pieces that matter, by
//! head, and one layer ahead, follows LeoAM (arXiv 2506.20187); parking that moves only what
//! changed, in groups, FastSwitch (arXiv 2411.18424, section 3).
//!
//! # Fewer bits on disk
//!
//! With [`ScratchBits::Eight`] a slot holds 8 bits an element, and an f32 for every 32 channels of a
//! token: 4,608 bytes for 128 channels, of 8,192 in f16 or 16,384 in f32. Slots are padded to the
//! sectors that the file asks for then ([`Backing::sector_bytes`]: 512 bytes on most disks);
//! where that saves nothing, as in f16 where sectors are of 4 KiB, pieces are stored as they are.
//! Threads that read decode what has come, each in its frame, so memory holds the pool's
//! element type and takes no more. Checksums are of what the file holds.
//!
//! That loses precision, once: a value comes back within 1/254 of the largest magnitude of its 32
//! channels (and 2^-15 of that), rounded to the element type. A group with a value that is infinite
//! or no number comes back as NaN. What came back and is written again is the same bits, also
//! where tokens were written beside it: steps are per token, and the same for rounded
//! values as for those that were rounded. So neither parking often nor pages that fill up token by
//! token add to the error. What has not come back is exact; so results depend on which
//! pages gave way. Chunks computed over what came back are not captured for the cache.
//! How pieces are coded, and why not by the codec: `coded.rs`.
//!
//! # Failure
//!
//! Every piece has a checksum, kept in memory, which every read is held against: bytes that
//! are not those written are an error, never an answer. What cannot be written stays in memory
//! and is tried again when its frame is needed. Errors name the block, so that the sequence
//! that needs it fails and others go on.
//!
//! A disk that hangs is an error, too. Who waits does so as long as operations come to their end,
//! and gives up when none has for the timeout ([`Pager::TIMEOUT`]), or for a tenth of it while
//! none has since somebody gave up before. Bringing a layer, or parking a sequence, so fails at
//! the latest the timeout after the last operation has ended, or after it began to wait itself.
//! What then is in flight is the disk's:
//!
//! - A read keeps the memory that it fills. Its frame is out of the pool until it ends, and what
//!   it brings is dropped; who needs the piece reads it into another frame.
//! - A write keeps a copy of what it writes. Its pieces stay in memory, and are not written
//!   again until it ends, so that an old state never follows a new one onto the disk.
//! - Its thread is lost that long, of 32. Where these are all lost, nothing moves until one is
//!   back.
//! - What has not begun is called off.
//!
//! Nobody waits for any of it again, but for one who finds no room otherwise. Dropping the pool
//! waits once more, and then leaves threads that hang behind; the memory of all frames is given
//! back when the last of them ends.
//!
//! # Costs
//!
//! 16 bytes of table a piece and 56 a frame: 0.4 % of the KV, and 1.4 % of what is in memory,
//! at 4 KiB a piece. A request costs a look into the table for each piece that is wanted.
//! Threads instead of `io_uring`: see `io.rs`.
//!
//! # Which pages
//!
//! Decoding a token reads all K and V of its sequence, of which attention makes little use.
//! [`Digests`] stay in memory when pages do not; a [`Selector`] judges pages by them and the
//! queries of the token at hand, per layer and KV head; and attention reads what was chosen
//! ([`crate::Pages`]), nothing else.
//!
//! ```text
//! digests.extend(pool, blocks, tokens)            after prefill, and every 16 tokens
//! model.forward(…, |before| {
//!     before.pages[step] = selector.choose(&before, step, &digests, blocks);
//! })
//! ```
//!
//! Choosing does no I/O and does not know where pages are; [`crate::Model::forward`] brings what was
//! chosen.
//!
//! ## What is always read
//!
//! Pages without a digest, that is the last one that is not full yet; the first pages and the
//! most recent ones ([`Options::sinks`], [`Options::recent`]); all pages in the first layers,
//! on request ([`Options::exact_layers`]), and in layers with a window of their own, which
//! see few pages anyway. They count against the budget. With a budget of everything, the
//! result has the bits of full attention.
//!
//! ## What a choice costs
//!
//! Digests take 5.9 % of K and V in f16 ([`Digests::bytes`]). A choice looks at the box of every
//! group, and at all tokens of the groups that it opens, once a query: most, where attention is
//! even, and then it takes longer than reading the pages that it chose. `kvasir-bench select`
//! measures that.
//!
//! Units: scores are logits, `query · key / sqrt(head_dim)`; budgets are shares of a
//! sequence's pages, which is its bytes.
//!
//! # Serving
//!
//! [`EngineConfig::paging`](crate::scheduler::EngineConfig::paging) makes the engine's loop run
//! over such a pool: sequences that do not fit together take turns and are parked in between;
//! while a layer computes, the next one is read; and a sequence whose pages cannot be moved is
//! computed again. Decoding chooses pages only if told to
//! ([`PageSelection`](crate::scheduler::PageSelection)), and then reads ahead what a layer's input
//! foresees of the next one only if told to, too.
//!
//! # Not here
//!
//! Pieces are not compressed further on disk: slots have one size. A prompt is computed over all
//! of its pages: a layer of the longest sequence has to fit into memory. Who waits for the disk
//! computes nothing meanwhile, be it for other sequences: parking waits for its writes.

pub(crate) mod coded;
mod digest;
mod estimate;
#[cfg(test)]
pub(crate) mod faulty;
pub mod file;
mod foresight;
pub(crate) mod frames;
mod io;
pub(crate) mod pager;
mod refine;
mod select;
mod stats;
mod vote;

use std::time::Duration;

use rustix::io::Errno;

use crate::kv::BlockId;

pub use coded::ScratchBits;
pub use digest::{Detail, Digests, GROUP_PAGES};
pub use estimate::page_weights;
pub use file::{Backing, ScratchFile};
pub use frames::Replacement;
pub use pager::Pager;
pub use select::{Options, Rule, Selector, Vote};
pub use stats::{PagerStats, Stalls};

/// Why pages cannot be brought to memory, or out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PagingError {
    /// Too little memory for what is read at once.
    #[error(
        "{needed} pieces of a layer are read at once, and there are frames for {frames}: give the pool more frames, choose fewer pages or batch fewer sequences"
    )]
    Frames {
        /// Pieces read by one layer of a batch.
        needed: usize,
        /// Pieces that fit into memory.
        frames: usize,
    },
    /// More pieces than a table holds.
    #[error("a pool of {0} pieces is too large: make it of fewer blocks")]
    TooLarge(usize),
    /// The scratch file cannot be made.
    #[error("no scratch file can be made: give a directory of a local disk that can be written")]
    Create(#[source] Errno),
    /// The system grants no threads for reading and writing.
    #[error("the system grants no threads to read and write pages")]
    Threads(#[source] Errno),
    /// The disk is full. What could not be written is in memory still.
    #[error("the disk of the scratch file is full: free space there, or give the pool more frames")]
    Full,
    /// The disk cannot be written. What could not be written is in memory still.
    #[error("a page could not be written to the scratch file: check its disk")]
    Write(#[source] Errno),
    /// A page cannot be read.
    #[error("layer {layer} of {block:?} cannot be read from the scratch file: check its disk")]
    Read {
        /// The page.
        block: BlockId,
        /// The layer.
        layer: usize,
        /// The cause.
        #[source]
        source: Errno,
    },
    /// What was read is not what was written.
    #[error("layer {layer} of {block:?} is corrupt in the scratch file: compute it again")]
    Corrupt {
        /// The page.
        block: BlockId,
        /// The layer.
        layer: usize,
    },
    /// A page has not come in time. It may be readable later.
    #[error(
        "layer {layer} of {block:?} has not come, as the disk of the scratch file hangs: check it, or allow it more than {timeout:?}"
    )]
    ReadTimeout {
        /// The page.
        block: BlockId,
        /// The layer.
        layer: usize,
        /// What the disk may take, while it does not hang.
        timeout: Duration,
    },
    /// No room was made in time: writes hang, or reads that hold memory. What could not be
    /// written is in memory still.
    #[error(
        "pages cannot give way, as the disk of the scratch file hangs: check it, or allow it more than {timeout:?}"
    )]
    Timeout {
        /// What the disk may take, while it does not hang.
        timeout: Duration,
    },
}

impl PagingError {
    /// The page whose sequence cannot go on; `None` where any may make room.
    pub fn block(&self) -> Option<BlockId> {
        match self {
            Self::Read { block, .. }
            | Self::Corrupt { block, .. }
            | Self::ReadTimeout { block, .. } => Some(*block),
            _ => None,
        }
    }

    /// Whether the disk hangs.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::ReadTimeout { .. } | Self::Timeout { .. })
    }
}

#[cfg(test)]
mod tests;
