//! Paged KV of all sequences.
//!
//! A page ([`BlockId`]) holds [`BLOCK_TOKENS`] consecutive tokens of one
//! sequence, for all layers. In memory: `[layer][block][plane: K, V][kv_head]
//! [token][head_dim]`, so that a layer of a whole page, per head and plane, is
//! one contiguous copy to or from the canonical order in which chunks travel:
//! for one layer of a run of tokens, `[plane][kv_head][token][head_dim]`,
//! row-major, little-endian. K is stored after RoPE.
//!
//! The pool hands out pages and checks ranges. Who shares a page, and for how
//! long, is the scheduler's to know.
//!
//! A [paged](KvPool::paged) pool has more pages than fit into memory; see [`crate::paging`].
//! Its pages come to memory before a layer attends to them, which [`crate::Model::forward`]
//! sees to; who reads or writes pages in another way [brings](KvPool::bring) them first.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use half::{bf16, f16};

use crate::config::ModelConfig;
use crate::kernels::AlignedBuf;
use crate::paging::coded::Coding;
use crate::paging::frames::Heat;
use crate::paging::pager::{Shape, frame_bytes};
use crate::paging::{Backing, Pager, PagingError, Replacement, ScratchBits};

mod demand;
mod free;
mod geometry;
#[cfg(test)]
mod tests;

use demand::demanded;

pub(crate) use demand::{Demand, Demanded};
pub(crate) use free::FreeBlocks;
pub(crate) use geometry::{Geometry, HeadBlock, Plane};

#[cfg(target_endian = "big")]
compile_error!("pages are exchanged as the memory of a little-endian machine");

/// Tokens per page.
pub const BLOCK_TOKENS: usize = 16;

/// A page of a [`KvPool`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

impl BlockId {
    const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Element type of the pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 4 bytes; K and V exactly as computed.
    #[default]
    F32,
    /// 2 bytes; 8 bits of precision, the range of f32.
    Bf16,
    /// 2 bytes; 11 bits of precision, up to 65504.
    F16,
}

impl KvDtype {
    /// Bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// A fixed number of pages.
#[derive(Debug)]
pub struct KvPool {
    geometry: Geometry,
    memory: Memory,
    blocks: FreeBlocks,
}

#[derive(Debug)]
enum Memory {
    /// All pages, resident from the start.
    Whole(AlignedBuf<u8>),
    /// Some of them.
    Paged(Box<Pager>),
}

impl KvPool {
    /// `blocks` pages for a model, zeroed and touched, so that no later write
    /// pays for fresh memory.
    ///
    /// # Panics
    ///
    /// With more than `u32::MAX` blocks.
    pub fn new(config: &ModelConfig, blocks: usize, dtype: KvDtype) -> Self {
        let geometry = Geometry::new(config, blocks, dtype);
        Self {
            geometry,
            memory: Memory::Whole(AlignedBuf::new(geometry.bytes())),
            blocks: FreeBlocks::new(blocks),
        }
    }

    /// `blocks` pages for a model, of which `frames` pieces are in memory and others in
    /// `backing`, in `bits`. A piece is one KV head of one layer of one page.
    ///
    /// Memory: [`Pager::resident_bytes`]. A batch needs frames for all pieces that one of its
    /// layers attends to.
    ///
    /// # Errors
    ///
    /// A [`PagingError`] when there are too many pieces, or the backing cannot be prepared.
    ///
    /// # Panics
    ///
    /// With more than `u32::MAX` blocks.
    pub fn paged(
        config: &ModelConfig,
        blocks: usize,
        dtype: KvDtype,
        frames: usize,
        replacement: Replacement,
        backing: Arc<dyn Backing>,
        bits: ScratchBits,
    ) -> Result<Self, PagingError> {
        let geometry = Geometry::new(config, blocks, dtype);
        let shape = Shape {
            layers: geometry.layers,
            kv_heads: geometry.kv_heads,
            blocks,
            piece_bytes: geometry.piece_bytes(),
            coding: match bits {
                ScratchBits::AsInMemory => None,
                ScratchBits::Eight => Some(Coding::new(geometry.head_dim, dtype)),
            },
        };
        let pager = Pager::new(shape, frames, replacement, backing)?;
        Ok(Self {
            geometry,
            memory: Memory::Paged(Box::new(pager)),
            blocks: FreeBlocks::new(blocks),
        })
    }

    /// The same with another time than [`Pager::TIMEOUT`] that its file may take to complete any
    /// operation; nothing to do where all is in memory.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        if let Memory::Paged(pager) = &mut self.memory {
            pager.set_timeout(timeout);
        }
        self
    }

    /// What moves its pages, if not all are in memory.
    pub fn pager(&self) -> Option<&Pager> {
        match &self.memory {
            Memory::Whole(_) => None,
            Memory::Paged(pager) => Some(pager),
        }
    }

    /// Has all of `demands` in memory, and keeps it there until the next call that may move
    /// pages. On failure, says which demand cannot be met, or `None` when together they cannot.
    pub(crate) fn ensure(
        &mut self,
        layer: usize,
        demands: &[Demand<'_>],
    ) -> Result<(), (Option<usize>, PagingError)> {
        let Memory::Paged(pager) = &mut self.memory else {
            return Ok(());
        };
        let (pieces, heat) = demanded(pager.shape(), layer, demands);
        pager.ensure(&pieces, heat).map_err(|error| {
            let of = |block| {
                let has = |demand: &Demand<'_>| demand.blocks.contains(&block);
                demands.iter().position(has)
            };
            (error.block().and_then(of), error)
        })
    }

    /// Starts to bring what a layer is expected to demand.
    pub(crate) fn prefetch(&mut self, layer: usize, demands: &[Demand<'_>]) {
        if let Memory::Paged(pager) = &mut self.memory {
            let (pieces, heat) = demanded(pager.shape(), layer, demands);
            pager.prefetch(&pieces, heat);
        }
    }

    /// Brings some layers of tokens to memory, where they stay until the next call that may
    /// move pages; nothing to do where all is in memory.
    ///
    /// # Errors
    ///
    /// A [`KvError`] when the range does not fit the table, or pages cannot be brought.
    pub fn bring(
        &mut self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layers: Range<usize>,
    ) -> Result<(), KvError> {
        let end = first_token.saturating_add(tokens);
        self.check_table(blocks, end)?;
        if let Some(last) = layers.clone().next_back() {
            self.geometry.check_layer(last)?;
        }
        let Memory::Paged(pager) = &mut self.memory else {
            return Ok(());
        };
        let pages = Demanded::Range {
            first: first_token / BLOCK_TOKENS,
            end: end.div_ceil(BLOCK_TOKENS),
        };
        let mut pieces = Vec::new();
        for layer in layers {
            pieces.extend(demanded(pager.shape(), layer, &[Demand { blocks, pages }]).0);
        }
        pager
            .ensure(&pieces, Heat::Scanned)
            .map_err(KvError::Paging)
    }

    /// Writes what of some pages only memory holds to the scratch file, adjoining pages
    /// together, and gives their memory back. Returns the bytes written: what has not changed
    /// since it was written last is not written again. Nothing to do where all is in memory.
    ///
    /// Pages come back when they are attended to, or [brought](Self::bring).
    ///
    /// # Errors
    ///
    /// A [`PagingError`] when the file cannot be written, or is not in time: then nothing is
    /// lost, and the pages are where they were.
    pub fn park(&mut self, blocks: &[BlockId]) -> Result<u64, KvError> {
        self.check_table(blocks, blocks.len() * BLOCK_TOKENS)?;
        match &mut self.memory {
            Memory::Whole(_) => Ok(0),
            Memory::Paged(pager) => pager.park(blocks).map_err(KvError::Paging),
        }
    }

    /// Takes a free page. `None` when there is none. Its contents are stale.
    pub fn alloc(&mut self) -> Option<BlockId> {
        self.blocks.alloc()
    }

    /// Gives a page back.
    ///
    /// # Errors
    ///
    /// [`KvError::NotAllocated`] when it is not taken.
    pub fn free(&mut self, block: BlockId) -> Result<(), KvError> {
        self.blocks.free(block)?;
        if let Memory::Paged(pager) = &mut self.memory {
            pager.forget(block);
        }
        Ok(())
    }

    /// Lets go of what pages hold, which stay taken: they are to be written anew. Nothing to do
    /// where all is in memory.
    pub(crate) fn forget(&mut self, blocks: &[BlockId]) {
        if let Memory::Paged(pager) = &mut self.memory {
            blocks.iter().for_each(|&block| pager.forget(block));
        }
    }

    /// Whether all that some pages hold is what was written to them: nothing of it has come back
    /// from [fewer bits](ScratchBits).
    pub(crate) fn is_exact(&self, blocks: &[BlockId]) -> bool {
        let rounded = |pager: &Pager| blocks.iter().any(|&block| pager.is_rounded(block));
        !self.pager().is_some_and(rounded)
    }

    /// Pages of which a whole layer is in memory at once, at most.
    pub fn layer_blocks(&self) -> usize {
        match &self.memory {
            Memory::Whole(_) => self.geometry.blocks,
            Memory::Paged(pager) => {
                (pager.frames() / self.geometry.kv_heads).min(self.geometry.blocks)
            }
        }
    }

    /// Pieces of a model's KV that fit into some bytes of memory.
    pub fn frames_in(config: &ModelConfig, dtype: KvDtype, bytes: u64) -> usize {
        usize::try_from(bytes).unwrap_or(usize::MAX) / Self::frame_bytes(config, dtype)
    }

    /// Bytes of memory for one piece of a model's KV, padding included.
    pub fn frame_bytes(config: &ModelConfig, dtype: KvDtype) -> usize {
        frame_bytes(Geometry::new(config, 1, dtype).piece_bytes())
    }

    /// Pages not taken.
    pub fn free_blocks(&self) -> usize {
        self.blocks.count()
    }

    /// All pages.
    pub fn blocks(&self) -> usize {
        self.geometry.blocks
    }

    /// Element type.
    pub fn dtype(&self) -> KvDtype {
        self.geometry.dtype
    }

    /// Bytes of all pages, in memory or not.
    pub fn bytes(&self) -> u64 {
        self.geometry.bytes() as u64
    }

    /// Bytes of one layer of `tokens` tokens in canonical order:
    /// `2 · kv_heads · tokens · head_dim · size(dtype)`.
    pub fn layer_bytes(&self, tokens: usize) -> usize {
        self.geometry.layer_bytes(tokens)
    }

    /// Lands one layer of tokens `first_token..first_token + tokens` of a
    /// sequence whose whole page table is `blocks`. `payload` is in canonical
    /// order and the pool's element type.
    ///
    /// # Errors
    ///
    /// A [`KvError`] when the payload or the range does not fit; nothing is
    /// written then. [`KvError::Paging`] when pages cannot be brought: then a part may be.
    pub fn write_layer(
        &mut self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layer: usize,
        payload: &[u8],
    ) -> Result<(), KvError> {
        self.geometry
            .check(blocks, first_token, tokens, layer, payload.len())?;
        let geometry = self.geometry;
        geometry.each_run(blocks, first_token, tokens, |run| {
            // A piece at a time, so that any number of tokens can be landed.
            if let Memory::Paged(pager) = &mut self.memory {
                let piece = pager.shape().piece(layer, run.kv_head, run.block);
                pager
                    .ensure(&[piece], Heat::Scanned)
                    .map_err(KvError::Paging)?;
            }
            let to = self.plane_mut(layer, run.block, run.plane, run.kv_head);
            let to = to.expect("the piece was brought to memory");
            to[geometry.run_bytes(&run)].copy_from_slice(&payload[geometry.payload_bytes(&run)]);
            Ok(())
        })
    }

    /// The inverse of [`Self::write_layer`].
    ///
    /// # Errors
    ///
    /// A [`KvError`] when the buffer or the range does not fit, or a page cannot be read. Pages
    /// on disk are read one by one: [bring](Self::bring) those first that are many.
    pub fn read_layer(
        &self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layer: usize,
        out: &mut [u8],
    ) -> Result<(), KvError> {
        self.geometry
            .check(blocks, first_token, tokens, layer, out.len())?;
        let geometry = self.geometry;
        geometry.each_run(blocks, first_token, tokens, |run| {
            let out = &mut out[geometry.payload_bytes(&run)];
            let in_plane = geometry.run_bytes(&run);
            if let Some(from) = self.plane(layer, run.block, run.plane, run.kv_head) {
                out.copy_from_slice(&from[in_plane]);
                return Ok(());
            }
            let pager = self.pager().expect("only a pager has pages elsewhere");
            let piece = pager.shape().piece(layer, run.kv_head, run.block);
            match pager.read_out(piece).map_err(KvError::Paging)? {
                Some(bytes) => {
                    let plane = run.plane as usize * geometry.plane_bytes();
                    out.copy_from_slice(&bytes[plane..][in_plane]);
                }
                None => out.fill(0),
            }
            Ok(())
        })
    }

    /// One head of one plane of a page: `[token][head_dim]`, if it is in memory.
    fn plane(&self, layer: usize, block: BlockId, plane: Plane, kv_head: usize) -> Option<&[u8]> {
        let len = self.geometry.plane_bytes();
        match &self.memory {
            Memory::Whole(bytes) => {
                let at = self.geometry.offset(layer, block, plane, kv_head);
                Some(&bytes[at..at + len])
            }
            Memory::Paged(pager) => {
                let piece = pager.shape().piece(layer, kv_head, block);
                Some(&pager.bytes(piece)?[plane as usize * len..][..len])
            }
        }
    }

    /// The same, to be changed.
    fn plane_mut(
        &mut self,
        layer: usize,
        block: BlockId,
        plane: Plane,
        kv_head: usize,
    ) -> Option<&mut [u8]> {
        let len = self.geometry.plane_bytes();
        match &mut self.memory {
            Memory::Whole(bytes) => {
                let at = self.geometry.offset(layer, block, plane, kv_head);
                Some(&mut bytes[at..at + len])
            }
            Memory::Paged(pager) => {
                let piece = pager.shape().piece(layer, kv_head, block);
                Some(&mut pager.bytes_mut(piece)?[plane as usize * len..][..len])
            }
        }
    }

    /// What the pages are made of.
    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// One head of one plane of a page, which must be in memory: see [`Self::ensure`].
    pub(crate) fn head_block(
        &self,
        layer: usize,
        block: BlockId,
        plane: Plane,
        kv_head: usize,
    ) -> HeadBlock<'_> {
        let bytes = self.plane(layer, block, plane, kv_head);
        self.geometry
            .typed(bytes.expect("what is read was brought to memory"))
    }

    /// Stores K and V of one token, both `[kv_head][head_dim]`, rounding to the
    /// pool's element type. The page must be in memory.
    pub(crate) fn write_token(
        &mut self,
        blocks: &[BlockId],
        position: usize,
        layer: usize,
        k: &[f32],
        v: &[f32],
    ) {
        let (block, slot) = (blocks[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
        let (dim, dtype) = (self.geometry.head_dim, self.geometry.dtype);
        let row = dim * dtype.bytes();
        for (plane, heads) in [(Plane::K, k), (Plane::V, v)] {
            for (kv_head, from) in heads.chunks_exact(dim).enumerate() {
                let to = self
                    .plane_mut(layer, block, plane, kv_head)
                    .expect("what is written was brought to memory");
                let to = &mut to[slot * row..][..row];
                match dtype {
                    KvDtype::F32 => to.copy_from_slice(bytemuck::cast_slice(from)),
                    KvDtype::Bf16 => {
                        let to: &mut [u16] = bytemuck::cast_slice_mut(to);
                        for (to, &value) in to.iter_mut().zip(from) {
                            *to = bf16::from_f32(value).to_bits();
                        }
                    }
                    KvDtype::F16 => {
                        let to: &mut [u16] = bytemuck::cast_slice_mut(to);
                        for (to, &value) in to.iter_mut().zip(from) {
                            *to = f16::from_f32(value).to_bits();
                        }
                    }
                }
            }
        }
    }

    /// K or V of one token, `[kv_head][head_dim]`, widened: the inverse of
    /// [`Self::write_token`]. The page must be in memory.
    pub(crate) fn read_token(
        &self,
        blocks: &[BlockId],
        position: usize,
        layer: usize,
        plane: Plane,
        out: &mut [f32],
    ) {
        let (block, slot) = (blocks[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
        let dim = self.geometry.head_dim;
        let row = dim * self.geometry.dtype.bytes();
        for (kv_head, out) in out.chunks_exact_mut(dim).enumerate() {
            let head = self.plane(layer, block, plane, kv_head);
            let head = head.expect("what is read was brought to memory");
            self.geometry
                .typed(&head[slot * row..][..row])
                .widen(dim, out, dim);
        }
    }

    /// Checks a page table that must cover `tokens` tokens.
    pub(crate) fn check_table(&self, blocks: &[BlockId], tokens: usize) -> Result<(), KvError> {
        self.geometry.check_table(blocks, tokens)
    }
}

/// Why a page, or a range of pages, cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KvError {
    /// A page was given back that is not taken.
    #[error("{0:?} is not allocated")]
    NotAllocated(BlockId),
    /// A page table names a page that the pool does not have.
    #[error("{block:?} is not one of {blocks} blocks")]
    NoSuchBlock {
        /// The page.
        block: BlockId,
        /// Pages in the pool.
        blocks: usize,
    },
    /// The model has fewer layers.
    #[error("layer {layer} is not one of {layers} layers")]
    NoSuchLayer {
        /// The layer.
        layer: usize,
        /// Layers in the pool.
        layers: usize,
    },
    /// The page table does not cover the tokens.
    #[error("tokens up to {last} do not fit a page table of {table} tokens")]
    Range {
        /// One past the last token.
        last: usize,
        /// Tokens that the table covers.
        table: usize,
    },
    /// The payload is not one layer of the tokens.
    #[error("payload of {found} bytes where the range needs {expected}")]
    PayloadLength {
        /// Bytes given.
        found: usize,
        /// Bytes of the range.
        expected: usize,
    },
    /// Pages cannot be brought to memory, or out of it.
    #[error("pages cannot be moved")]
    Paging(#[source] PagingError),
}
