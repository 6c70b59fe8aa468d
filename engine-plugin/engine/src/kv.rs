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

use half::{bf16, f16};

use crate::config::ModelConfig;
use crate::kernels::AlignedBuf;

#[cfg(test)]
mod tests;

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

/// A fixed number of pages, all resident from the start.
#[derive(Debug)]
pub struct KvPool {
    geometry: Geometry,
    data: Storage,
    free: Vec<BlockId>,
    allocated: Vec<bool>,
}

#[derive(Debug)]
enum Storage {
    F32(AlignedBuf<f32>),
    Bf16(AlignedBuf<u16>),
    F16(AlignedBuf<u16>),
}

/// Which of a token's two vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plane {
    K = 0,
    V = 1,
}

/// One head of one plane of one page: `[token][head_dim]`.
pub(crate) enum HeadBlock<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
    F16(&'a [u16]),
}

impl HeadBlock<'_> {
    /// Widens row by row into `out`, whose rows are `stride` elements long.
    pub(crate) fn widen(&self, head_dim: usize, out: &mut [f32], stride: usize) {
        let rows = out.chunks_exact_mut(stride);
        match self {
            Self::F32(data) => {
                for (out, row) in rows.zip(data.chunks_exact(head_dim)) {
                    out[..head_dim].copy_from_slice(row);
                }
            }
            Self::Bf16(data) => {
                for (out, row) in rows.zip(data.chunks_exact(head_dim)) {
                    for (out, &bits) in out.iter_mut().zip(row) {
                        *out = f32::from_bits(u32::from(bits) << 16);
                    }
                }
            }
            Self::F16(data) => {
                for (out, row) in rows.zip(data.chunks_exact(head_dim)) {
                    for (out, &bits) in out.iter_mut().zip(row) {
                        *out = f16::from_bits(bits).to_f32();
                    }
                }
            }
        }
    }
}

impl KvPool {
    /// `blocks` pages for a model, zeroed and touched, so that no later write
    /// pays for fresh memory.
    ///
    /// # Panics
    ///
    /// With more than `u32::MAX` blocks.
    pub fn new(config: &ModelConfig, blocks: usize, dtype: KvDtype) -> Self {
        let ids = u32::try_from(blocks).expect("block ids are u32");
        let elements = blocks * config.kv_token_bytes(1) * BLOCK_TOKENS;
        Self {
            geometry: Geometry {
                layers: config.layers,
                blocks,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
            },
            data: match dtype {
                KvDtype::F32 => Storage::F32(AlignedBuf::new(elements)),
                KvDtype::Bf16 => Storage::Bf16(AlignedBuf::new(elements)),
                KvDtype::F16 => Storage::F16(AlignedBuf::new(elements)),
            },
            // Popped from the end: ids are handed out in ascending order.
            free: (0..ids).rev().map(BlockId).collect(),
            allocated: vec![false; blocks],
        }
    }

    /// Takes a free page. `None` when there is none. Its contents are stale.
    pub fn alloc(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.allocated[block.index()] = true;
        Some(block)
    }

    /// Gives a page back.
    ///
    /// # Errors
    ///
    /// [`KvError::NotAllocated`] when it is not taken.
    pub fn free(&mut self, block: BlockId) -> Result<(), KvError> {
        match self.allocated.get_mut(block.index()) {
            Some(taken) if *taken => {
                *taken = false;
                self.free.push(block);
                Ok(())
            }
            _ => Err(KvError::NotAllocated(block)),
        }
    }

    /// Pages not taken.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// All pages.
    pub fn blocks(&self) -> usize {
        self.geometry.blocks
    }

    /// Element type.
    pub fn dtype(&self) -> KvDtype {
        match self.data {
            Storage::F32(_) => KvDtype::F32,
            Storage::Bf16(_) => KvDtype::Bf16,
            Storage::F16(_) => KvDtype::F16,
        }
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> u64 {
        self.data.as_bytes().len() as u64
    }

    /// Bytes of one layer of `tokens` tokens in canonical order:
    /// `2 · kv_heads · tokens · head_dim · size(dtype)`.
    pub fn layer_bytes(&self, tokens: usize) -> usize {
        2 * self.geometry.kv_heads * tokens * self.geometry.head_dim * self.dtype().bytes()
    }

    /// Lands one layer of tokens `first_token..first_token + tokens` of a
    /// sequence whose whole page table is `blocks`. `payload` is in canonical
    /// order and the pool's element type.
    ///
    /// # Errors
    ///
    /// A [`KvError`] when the payload or the range does not fit; nothing is
    /// written then.
    pub fn write_layer(
        &mut self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layer: usize,
        payload: &[u8],
    ) -> Result<(), KvError> {
        self.check(blocks, first_token, tokens, layer, payload.len())?;
        let size = self.dtype().bytes();
        let bytes = self.data.as_bytes_mut();
        self.geometry
            .each_run(blocks, first_token, tokens, layer, |run| {
                bytes[run.pool * size..][..run.len * size]
                    .copy_from_slice(&payload[run.payload * size..][..run.len * size]);
            });
        Ok(())
    }

    /// The inverse of [`Self::write_layer`].
    ///
    /// # Errors
    ///
    /// A [`KvError`] when the buffer or the range does not fit.
    pub fn read_layer(
        &self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layer: usize,
        out: &mut [u8],
    ) -> Result<(), KvError> {
        self.check(blocks, first_token, tokens, layer, out.len())?;
        let size = self.dtype().bytes();
        let bytes = self.data.as_bytes();
        self.geometry
            .each_run(blocks, first_token, tokens, layer, |run| {
                out[run.payload * size..][..run.len * size]
                    .copy_from_slice(&bytes[run.pool * size..][..run.len * size]);
            });
        Ok(())
    }

    /// Whether the pages have the shape that a model needs.
    pub(crate) fn fits(&self, config: &ModelConfig) -> bool {
        let Geometry {
            layers,
            kv_heads,
            head_dim,
            ..
        } = self.geometry;
        (layers, kv_heads, head_dim) == (config.layers, config.kv_heads, config.head_dim)
    }

    /// One head of one plane of a page.
    pub(crate) fn head_block(
        &self,
        layer: usize,
        block: BlockId,
        plane: Plane,
        kv_head: usize,
    ) -> HeadBlock<'_> {
        let len = BLOCK_TOKENS * self.geometry.head_dim;
        let at = self.geometry.offset(layer, block, plane, kv_head, 0);
        match &self.data {
            Storage::F32(data) => HeadBlock::F32(&data[at..at + len]),
            Storage::Bf16(data) => HeadBlock::Bf16(&data[at..at + len]),
            Storage::F16(data) => HeadBlock::F16(&data[at..at + len]),
        }
    }

    /// Stores K and V of one token, both `[kv_head][head_dim]`, rounding to the
    /// pool's element type.
    pub(crate) fn write_token(
        &mut self,
        blocks: &[BlockId],
        position: usize,
        layer: usize,
        k: &[f32],
        v: &[f32],
    ) {
        let (block, slot) = (blocks[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
        let dim = self.geometry.head_dim;
        for (plane, heads) in [(Plane::K, k), (Plane::V, v)] {
            for (kv_head, from) in heads.chunks_exact(dim).enumerate() {
                let at = self.geometry.offset(layer, block, plane, kv_head, slot);
                match &mut self.data {
                    Storage::F32(data) => data[at..at + dim].copy_from_slice(from),
                    Storage::Bf16(data) => {
                        for (to, &value) in data[at..at + dim].iter_mut().zip(from) {
                            *to = bf16::from_f32(value).to_bits();
                        }
                    }
                    Storage::F16(data) => {
                        for (to, &value) in data[at..at + dim].iter_mut().zip(from) {
                            *to = f16::from_f32(value).to_bits();
                        }
                    }
                }
            }
        }
    }

    /// K or V of one token, `[kv_head][head_dim]`, widened: the inverse of
    /// [`Self::write_token`].
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
        for (kv_head, out) in out.chunks_exact_mut(dim).enumerate() {
            let at = self.geometry.offset(layer, block, plane, kv_head, slot);
            let head = match &self.data {
                Storage::F32(data) => HeadBlock::F32(&data[at..at + dim]),
                Storage::Bf16(data) => HeadBlock::Bf16(&data[at..at + dim]),
                Storage::F16(data) => HeadBlock::F16(&data[at..at + dim]),
            };
            head.widen(dim, out, dim);
        }
    }

    /// Checks a page table that must cover `tokens` tokens.
    pub(crate) fn check_table(&self, blocks: &[BlockId], tokens: usize) -> Result<(), KvError> {
        if tokens.div_ceil(BLOCK_TOKENS) > blocks.len() {
            return Err(KvError::Range {
                last: tokens,
                table: blocks.len() * BLOCK_TOKENS,
            });
        }
        match blocks
            .iter()
            .find(|block| block.index() >= self.geometry.blocks)
        {
            Some(&block) => Err(KvError::NoSuchBlock {
                block,
                blocks: self.geometry.blocks,
            }),
            None => Ok(()),
        }
    }

    fn check(
        &self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layer: usize,
        payload_bytes: usize,
    ) -> Result<(), KvError> {
        let last = first_token.saturating_add(tokens);
        self.check_table(blocks, last)?;
        if layer >= self.geometry.layers {
            return Err(KvError::NoSuchLayer {
                layer,
                layers: self.geometry.layers,
            });
        }
        let expected = self.layer_bytes(tokens);
        if payload_bytes != expected {
            return Err(KvError::PayloadLength {
                found: payload_bytes,
                expected,
            });
        }
        Ok(())
    }
}

impl Storage {
    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F32(data) => bytemuck::cast_slice(data),
            Self::Bf16(data) | Self::F16(data) => bytemuck::cast_slice(data),
        }
    }

    fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(data) => bytemuck::cast_slice_mut(data),
            Self::Bf16(data) | Self::F16(data) => bytemuck::cast_slice_mut(data),
        }
    }
}

/// Where an element is. Offsets and lengths are in elements.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    layers: usize,
    blocks: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// A stretch that is contiguous in the pool and in canonical order.
struct Run {
    pool: usize,
    payload: usize,
    len: usize,
}

impl Geometry {
    fn offset(
        &self,
        layer: usize,
        block: BlockId,
        plane: Plane,
        kv_head: usize,
        slot: usize,
    ) -> usize {
        let page = (layer * self.blocks + block.index()) * 2 + plane as usize;
        ((page * self.kv_heads + kv_head) * BLOCK_TOKENS + slot) * self.head_dim
    }

    fn each_run(
        &self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layer: usize,
        mut each: impl FnMut(Run),
    ) {
        for plane in [Plane::K, Plane::V] {
            for kv_head in 0..self.kv_heads {
                let mut done = 0;
                while done < tokens {
                    let position = first_token + done;
                    let slot = position % BLOCK_TOKENS;
                    let count = (BLOCK_TOKENS - slot).min(tokens - done);
                    let block = blocks[position / BLOCK_TOKENS];
                    let head = plane as usize * self.kv_heads + kv_head;
                    each(Run {
                        pool: self.offset(layer, block, plane, kv_head, slot),
                        payload: (head * tokens + done) * self.head_dim,
                        len: count * self.head_dim,
                    });
                    done += count;
                }
            }
        }
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
}
