//! What pages are made of, and where in them things are.

use std::ops::Range;

use half::f16;

use super::{BLOCK_TOKENS, BlockId, KvDtype, KvError};
use crate::config::ModelConfig;

/// What the pages are made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) layers: usize,
    pub(crate) blocks: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: KvDtype,
}

/// A stretch that is contiguous in the pool and in canonical order.
pub(super) struct Run {
    pub(super) block: BlockId,
    pub(super) plane: Plane,
    pub(super) kv_head: usize,
    /// First token in the page, and in the payload's head.
    pub(super) slot: usize,
    pub(super) payload: usize,
    pub(super) tokens: usize,
}

impl Geometry {
    pub(crate) fn new(config: &ModelConfig, blocks: usize, dtype: KvDtype) -> Self {
        Self {
            layers: config.layers,
            blocks,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            dtype,
        }
    }

    pub(crate) const fn row_bytes(&self) -> usize {
        self.head_dim * self.dtype.bytes()
    }

    pub(crate) const fn plane_bytes(&self) -> usize {
        BLOCK_TOKENS * self.row_bytes()
    }

    pub(crate) const fn piece_bytes(&self) -> usize {
        2 * self.plane_bytes()
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.layers * self.blocks * self.kv_heads * self.piece_bytes()
    }

    /// One layer of so many tokens in canonical order.
    pub(crate) const fn layer_bytes(&self, tokens: usize) -> usize {
        2 * self.kv_heads * tokens * self.row_bytes()
    }

    /// Whether the pages have the shape that a model needs.
    pub(crate) fn fits(&self, config: &ModelConfig) -> bool {
        let Self {
            layers,
            kv_heads,
            head_dim,
            ..
        } = *self;
        (layers, kv_heads, head_dim) == (config.layers, config.kv_heads, config.head_dim)
    }

    /// Checks a page table that must cover `tokens` tokens.
    pub(crate) fn check_table(&self, blocks: &[BlockId], tokens: usize) -> Result<(), KvError> {
        if tokens.div_ceil(BLOCK_TOKENS) > blocks.len() {
            return Err(KvError::Range {
                last: tokens,
                table: blocks.len() * BLOCK_TOKENS,
            });
        }
        match blocks.iter().find(|block| block.index() >= self.blocks) {
            Some(&block) => Err(KvError::NoSuchBlock {
                block,
                blocks: self.blocks,
            }),
            None => Ok(()),
        }
    }

    pub(crate) fn check_layer(&self, layer: usize) -> Result<(), KvError> {
        if layer >= self.layers {
            return Err(KvError::NoSuchLayer {
                layer,
                layers: self.layers,
            });
        }
        Ok(())
    }

    /// Checks one layer of some tokens, and the payload that it goes to or comes from.
    pub(crate) fn check(
        &self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layer: usize,
        payload_bytes: usize,
    ) -> Result<(), KvError> {
        let last = first_token.saturating_add(tokens);
        self.check_table(blocks, last)?;
        self.check_layer(layer)?;
        let expected = self.layer_bytes(tokens);
        if payload_bytes != expected {
            return Err(KvError::PayloadLength {
                found: payload_bytes,
                expected,
            });
        }
        Ok(())
    }

    /// Where a plane of a head is, all pages being in memory.
    pub(crate) fn offset(
        &self,
        layer: usize,
        block: BlockId,
        plane: Plane,
        kv_head: usize,
    ) -> usize {
        let page = (layer * self.blocks + block.index()) * 2 + plane as usize;
        (page * self.kv_heads + kv_head) * self.plane_bytes()
    }

    pub(super) fn typed<'a>(&self, bytes: &'a [u8]) -> HeadBlock<'a> {
        match self.dtype {
            KvDtype::F32 => HeadBlock::F32(bytemuck::cast_slice(bytes)),
            KvDtype::Bf16 => HeadBlock::Bf16(bytemuck::cast_slice(bytes)),
            KvDtype::F16 => HeadBlock::F16(bytemuck::cast_slice(bytes)),
        }
    }

    /// Bytes of a run in its plane of its page.
    pub(super) const fn run_bytes(&self, run: &Run) -> Range<usize> {
        let at = run.slot * self.row_bytes();
        at..at + run.tokens * self.row_bytes()
    }

    /// Bytes of a run in the payload.
    pub(super) const fn payload_bytes(&self, run: &Run) -> Range<usize> {
        let at = run.payload * self.row_bytes();
        at..at + run.tokens * self.row_bytes()
    }

    pub(super) fn each_run(
        &self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        mut each: impl FnMut(Run) -> Result<(), KvError>,
    ) -> Result<(), KvError> {
        for plane in [Plane::K, Plane::V] {
            for kv_head in 0..self.kv_heads {
                let mut done = 0;
                while done < tokens {
                    let position = first_token + done;
                    let slot = position % BLOCK_TOKENS;
                    let count = (BLOCK_TOKENS - slot).min(tokens - done);
                    each(Run {
                        block: blocks[position / BLOCK_TOKENS],
                        plane,
                        kv_head,
                        slot,
                        payload: (plane as usize * self.kv_heads + kv_head) * tokens + done,
                        tokens: count,
                    })?;
                    done += count;
                }
            }
        }
        Ok(())
    }
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
