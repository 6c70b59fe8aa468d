//! What of a piece the scratch file holds: its bytes, or 8 bits an element.
//!
//! ```text
//! slot  := zeros ‖ row × (K, V; token)          padded to sectors, in front
//! row   := group of channels × { step (f32) ‖ codes (i8) }
//! ```
//!
//! A group is up to [`GROUP`] channels of one token; a value is `code · step`, and the largest of a
//! group is 127 steps. So a piece of 128 channels takes 4,608 bytes, of 8,192 in 16 bits or
//! 16,384 in 32.
//!
//! # Error
//!
//! A value comes back within half a step, which is 1/254 of the largest magnitude of its group (and
//! a 2^15th of that), and then rounded to the pool's element type; magnitudes below 2^-127 may
//! come back as zero. A group with a value that is infinite or no number comes back as nothing
//! but NaN, as attention makes of it anyway, and other groups as ever.
//!
//! What has come back is coded to the same bytes again: the largest of a group comes back as it
//! was, because its step has few enough bits, so the next step is the same one, and rounding to the
//! element type is less than half a step. Tokens do not share steps. So a page that is parked
//! after each token that is written to it loses no more than one that is parked when it is full.
//! Steps per channel, over the tokens of a page, would change with every token, and all of the
//! page would be rounded anew.
//!
//! # Why not the codec's
//!
//! [`kvasir-codec`](https://docs.rs/kvasir-codec)'s fixed rate has a scale of 8 bits a row, rounded
//! up: in 16 bits the largest of a row comes back as another number, its scale as another scale, and
//! values wander. Its entropy-coded levels share tables and angles over 64 tokens and have no
//! fixed place.
//!
//! # In place
//!
//! Coded bytes are read into the end of the frame and decoded to its beginning: no group is
//! longer coded than decoded, so values never reach what is still to be read. Reading takes no
//! memory beside the frames.

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};

use super::pager::frame_bytes;
use crate::kernels::{Isa, STEP_BYTES, dequantise, narrow_bf16, quantise};
use crate::kv::{BLOCK_TOKENS, KvDtype};

/// Channels that share a step, at most.
const GROUP: usize = 32;

/// Groups that are coded at once: a row of usual length.
const STRIP_GROUPS: usize = 8;

/// Rows of a piece: K and V of each token.
const ROWS: usize = 2 * BLOCK_TOKENS;

/// How KV lies in the scratch file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ScratchBits {
    /// As in memory. Exact.
    #[default]
    AsInMemory,
    /// 8 bits an element, and an f32 for up to 32 of them. See [`mod@crate::paging`] for the error.
    Eight,
}

/// Pieces in 8 bits an element.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Coding {
    head_dim: usize,
    group: usize,
    dtype: KvDtype,
    isa: Isa,
}

/// Places of pieces in the file, all of one size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots {
    bytes: usize,
    coding: Option<Coding>,
}

impl Slots {
    /// For pieces of some bytes in memory. What would not take fewer sectors is not coded.
    pub(crate) fn new(piece_bytes: usize, coding: Option<Coding>, sector_bytes: usize) -> Self {
        let raw = frame_bytes(piece_bytes);
        if let Some(coding) = coding {
            let bytes = coding.bytes().next_multiple_of(sector_bytes);
            if bytes < raw {
                let coding = Some(coding);
                return Self { bytes, coding };
            }
            tracing::warn!(
                piece_bytes,
                sector_bytes,
                "pages go to disk as they are: 8 bits would take as many sectors"
            );
        }
        Self {
            bytes: raw,
            coding: None,
        }
    }

    /// Bytes of one.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn are_coded(&self) -> bool {
        self.coding.is_some()
    }

    /// Where in a frame the bytes of its slot are read to.
    pub(super) fn part<'a>(&self, frame: &'a mut [u8]) -> &'a mut [u8] {
        let at = frame.len() - self.bytes;
        &mut frame[at..]
    }

    /// Makes the piece of what was read.
    pub(super) fn unpack(&self, frame: &mut [u8]) {
        if let Some(coding) = &self.coding {
            coding.decode(frame);
        }
    }

    /// Makes what is written of the piece.
    pub(super) fn pack(&self, frame: &[u8], slot: &mut [u8]) {
        match &self.coding {
            None => slot.copy_from_slice(frame),
            Some(coding) => {
                let at = slot.len() - coding.bytes();
                let (padding, coded) = slot.split_at_mut(at);
                padding.fill(0);
                coding.encode(frame, coded);
            }
        }
    }
}

impl Coding {
    pub(crate) fn new(head_dim: usize, dtype: KvDtype) -> Self {
        Self {
            head_dim,
            // Equal groups: a last one that is very small would be longer coded than decoded.
            group: head_dim.div_ceil(head_dim.div_ceil(GROUP).max(1)).max(1),
            dtype,
            isa: Isa::detect(),
        }
    }

    fn row_bytes(&self) -> usize {
        self.head_dim + self.head_dim.div_ceil(self.group) * STEP_BYTES
    }

    /// Bytes of a piece, padding not counted.
    pub(crate) fn bytes(&self) -> usize {
        ROWS * self.row_bytes()
    }

    /// Codes the piece at the beginning of `frame`.
    fn encode(&self, frame: &[u8], coded: &mut [u8]) {
        let size = self.dtype.bytes();
        let mut values = [0.0; STRIP_GROUPS * GROUP];
        let rows = frame.chunks_exact(self.head_dim * size);
        for (row, coded) in rows.zip(coded.chunks_exact_mut(self.row_bytes())) {
            let strips = coded.chunks_mut(STRIP_GROUPS * (STEP_BYTES + self.group));
            for (strip, coded) in row.chunks(STRIP_GROUPS * self.group * size).zip(strips) {
                let values = &mut values[..strip.len() / size];
                widen(self.dtype, strip, values);
                quantise(self.isa, values, self.group, coded);
            }
        }
    }

    /// Decodes what is at the end of `frame` to its beginning.
    fn decode(&self, frame: &mut [u8]) {
        let size = self.dtype.bytes();
        let mut values = [0.0; STRIP_GROUPS * GROUP];
        let (mut from, mut to) = (frame.len() - self.bytes(), 0);
        for _ in 0..ROWS {
            let mut left = self.head_dim;
            while left > 0 {
                let len = left.min(STRIP_GROUPS * self.group);
                let values = &mut values[..len];
                let coded = len + len.div_ceil(self.group) * STEP_BYTES;
                dequantise(self.isa, &frame[from..][..coded], self.group, values);
                from += coded;
                narrow(self.isa, self.dtype, values, &mut frame[to..][..len * size]);
                to += len * size;
                left -= len;
            }
        }
    }
}

fn widen(dtype: KvDtype, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        KvDtype::F32 => bytemuck::cast_slice_mut(values).copy_from_slice(bytes),
        KvDtype::Bf16 => {
            for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = bf16::from_le_bytes(bytes).to_f32();
            }
        }
        KvDtype::F16 => {
            let mut halves = [f16::ZERO; STRIP_GROUPS * GROUP];
            let halves = &mut halves[..values.len()];
            bytemuck::cast_slice_mut(halves).copy_from_slice(bytes);
            halves.convert_to_f32_slice(values);
        }
    }
}

fn narrow(isa: Isa, dtype: KvDtype, values: &[f32], bytes: &mut [u8]) {
    match dtype {
        KvDtype::F32 => bytes.copy_from_slice(bytemuck::cast_slice(values)),
        KvDtype::Bf16 => {
            let mut halves = [0u16; STRIP_GROUPS * GROUP];
            let halves = &mut halves[..values.len()];
            narrow_bf16(isa, values, halves);
            bytes.copy_from_slice(bytemuck::cast_slice(halves));
        }
        KvDtype::F16 => {
            let mut halves = [f16::ZERO; STRIP_GROUPS * GROUP];
            let halves = &mut halves[..values.len()];
            halves.convert_from_f32_slice(values);
            bytes.copy_from_slice(bytemuck::cast_slice(halves));
        }
    }
}

#[cfg(test)]
mod tests;
