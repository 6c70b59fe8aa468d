//! Fixed-rate coding of a layer: every row takes the same bytes and decodes alone.
//!
//! This is what pages of a paged cache need: the row of a token and head is found without
//! an index. It takes more bits than [`LayerCodec`](crate::LayerCodec) at equal error, which
//! is the price of a fixed place.
//!
//! ```text
//! layer := row × (plane, head, token), in the order of a raw layer
//! row   := block × { scale (bf16) ‖ codes }
//! ```
//!
//! * [`FixedRate::Int8`]: a block is the whole row; a code is the number of scales, in
//!   -127 to 127, as i8. The scale is the row's largest magnitude over 127.
//! * [`FixedRate::Int4Hadamard`]: a block is the largest power of two that divides the row,
//!   128 at most. It is turned by the Hadamard transform (its fast form; scaled to keep
//!   lengths), which spreads outliers over all channels, as in SAW-INT4 (arXiv 2604.19157);
//!   a code is -7 to 7, plus 8, two a byte: the first half of the block in the low nibbles.
//!
//! A scale is rounded up, so that no value is clipped. A row, or block, that holds a value
//! which is not finite decodes to nothing but NaN, as attention makes of it anyway.

#![deny(clippy::indexing_slicing)]

use half::bf16;
use kvasir_types::{DType, KvLayout};
use multiversion::multiversion;

use crate::elements::{self, Head};

/// Which fixed rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FixedRate {
    /// 8 bits and a scale a row: 8.125 bits a value for heads of 128 channels.
    Int8,
    /// 4 bits after a Hadamard transform, and a scale a block: 4.125 for heads of 128.
    Int4Hadamard,
}

/// Codes layers of one layout at a fixed rate.
#[derive(Clone, Debug)]
pub struct FixedCodec {
    layout: KvLayout,
    rate: FixedRate,
}

/// Why chunks of a layout cannot be coded at a fixed rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnsupportedFixed {
    /// Eight bits a value are quantised already.
    #[error("values of type {0} are quantised already; store them raw")]
    DType(DType),
    /// No Hadamard transform that is worth its scales fits the rows.
    #[error(
        "rows of {0} channels do not divide into powers of two of {SMALLEST_BLOCK} or more; use INT8"
    )]
    Width(usize),
}

/// Why bytes are not a layer at a fixed rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FixedError {
    /// More or fewer bytes than such a layer has.
    #[error("a layer at a fixed rate has {expected} bytes, {actual} are there")]
    Length {
        /// Bytes of such a layer.
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
    /// A scale is negative or infinite.
    #[error("a scale is negative or infinite")]
    Scale,
}

impl FixedCodec {
    /// For chunks of `layout`.
    ///
    /// # Errors
    /// Layouts that are not supported.
    pub fn new(layout: KvLayout, rate: FixedRate) -> Result<Self, UnsupportedFixed> {
        if !elements::is_float(layout.dtype()) {
            return Err(UnsupportedFixed::DType(layout.dtype()));
        }
        let narrow = |head: &Head| block_of(rate, head.dim) < SMALLEST_BLOCK;
        if rate == FixedRate::Int4Hadamard
            && let Some(head) = elements::heads(&layout).find(narrow)
        {
            return Err(UnsupportedFixed::Width(head.dim));
        }
        Ok(Self { layout, rate })
    }

    /// Bytes of every encoded layer.
    pub fn encoded_bytes(&self) -> usize {
        let rows = |head: Head| self.layout.tokens() as usize * self.row_bytes(head.dim);
        elements::heads(&self.layout).map(rows).sum()
    }

    /// Bytes of the encoded row of a head of `dim` channels.
    pub fn row_bytes(&self, dim: usize) -> usize {
        let block = block_of(self.rate, dim).max(1);
        dim / block * block_bytes(self.rate, block)
    }

    /// Codes a raw layer.
    ///
    /// # Panics
    /// The layer has not the bytes that the layout says.
    pub fn encode(&self, raw: &[u8]) -> Vec<u8> {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        let mut out = vec![0; self.encoded_bytes()];
        let mut rest = out.as_mut_slice();
        let mut values = Vec::new();
        for head in elements::heads(&self.layout) {
            let block = block_of(self.rate, head.dim);
            values.resize(self.layout.tokens() as usize * head.dim, 0.0);
            let bytes = raw.get(head.place).unwrap_or(&[]);
            elements::read(self.layout.dtype(), bytes, &mut values);
            let blocks = values.chunks_exact_mut(block);
            let len = blocks.len() * block_bytes(self.rate, block);
            let (here, after) = rest.split_at_mut(len);
            rest = after;
            for (values, out) in blocks.zip(here.chunks_exact_mut(block_bytes(self.rate, block))) {
                if let Some((scale, codes)) = out.split_first_chunk_mut() {
                    *scale = match self.rate {
                        FixedRate::Int8 => encode_int8(values, codes),
                        FixedRate::Int4Hadamard => encode_int4(values, codes),
                    }
                    .to_le_bytes();
                }
            }
        }
        out
    }

    /// Decodes a layer into its raw form.
    ///
    /// # Errors
    /// Another length, and scales that no encoder writes; `raw` then holds anything.
    ///
    /// # Panics
    /// `raw` has not the bytes that the layout says.
    pub fn decode(&self, bytes: &[u8], raw: &mut [u8]) -> Result<(), FixedError> {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        let (expected, actual) = (self.encoded_bytes(), bytes.len());
        if expected != actual {
            return Err(FixedError::Length { expected, actual });
        }
        let mut rest = bytes;
        let mut values = [0.0; MOST_VALUES];
        let size = self.layout.dtype().bytes();
        for head in elements::heads(&self.layout) {
            let block = block_of(self.rate, head.dim);
            let encoded = block_bytes(self.rate, block);
            let blocks = self.layout.tokens() as usize * head.dim / block;
            let length = FixedError::Length { expected, actual };
            let (here, after) = rest.split_at_checked(blocks * encoded).ok_or(length)?;
            rest = after;
            let raw = raw.get_mut(head.place).unwrap_or(&mut []);
            let out = raw.chunks_exact_mut(block * size);
            for (bytes, out) in here.chunks_exact(encoded).zip(out) {
                let (&scale, codes) = bytes.split_first_chunk().ok_or(length)?;
                let scale = bf16::from_le_bytes(scale).to_f32();
                if scale.is_infinite() || scale < 0.0 {
                    return Err(FixedError::Scale);
                }
                // Wide rows of INT8 in parts; a block of INT4 is never that wide.
                let codes = codes.chunks(MOST_VALUES);
                for (codes, out) in codes.zip(out.chunks_mut(MOST_VALUES * size)) {
                    let values = values.get_mut(..out.len() / size).unwrap_or(&mut []);
                    match self.rate {
                        FixedRate::Int8 => decode_int8(scale, codes, values),
                        FixedRate::Int4Hadamard => decode_int4(scale, codes, values),
                    }
                    elements::write(self.layout.dtype(), values, out);
                }
            }
        }
        Ok(())
    }
}

/// Values that share a scale.
fn block_of(rate: FixedRate, dim: usize) -> usize {
    match rate {
        FixedRate::Int8 => dim.max(1),
        FixedRate::Int4Hadamard => {
            let power = 1usize << dim.trailing_zeros().min(LARGEST_BLOCK.trailing_zeros());
            power.min(dim.max(1))
        }
    }
}

fn block_bytes(rate: FixedRate, block: usize) -> usize {
    SCALE_BYTES
        + match rate {
            FixedRate::Int8 => block,
            FixedRate::Int4Hadamard => block / 2,
        }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn encode_int8(values: &[f32], codes: &mut [u8]) -> bf16 {
    let scale = scale_of(values, 127.0);
    let by = scale.to_f32();
    for (code, value) in codes.iter_mut().zip(values) {
        // Zero over zero is no number, which becomes zero, as what is none in a NaN row.
        #[expect(clippy::cast_possible_truncation, reason = "saturates, and fits")]
        let number = (value / by).round_ties_even() as i8;
        *code = number.cast_unsigned();
    }
    scale
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn decode_int8(scale: f32, codes: &[u8], values: &mut [f32]) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value = f32::from(code.cast_signed()) * scale;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn encode_int4(values: &mut [f32], codes: &mut [u8]) -> bf16 {
    hadamard(values);
    let scale = scale_of(values, 7.0);
    let by = scale.to_f32();
    let (low, high) = values.split_at(values.len() / 2);
    for (code, (&low, &high)) in codes.iter_mut().zip(low.iter().zip(high)) {
        let nibble = |value: f32| {
            #[expect(clippy::cast_possible_truncation, reason = "saturates, and fits")]
            let number = (value / by).round_ties_even().clamp(-7.0, 7.0) as i8;
            (number + 8).cast_unsigned() & 15
        };
        *code = nibble(low) | (nibble(high) << 4);
    }
    scale
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn decode_int4(scale: f32, codes: &[u8], values: &mut [f32]) {
    let (low, high) = values.split_at_mut(codes.len());
    for ((low, high), code) in low.iter_mut().zip(high).zip(codes) {
        *low = (f32::from(code & 15) - 8.0) * scale;
        *high = (f32::from(code >> 4) - 8.0) * scale;
    }
    hadamard(values);
}

/// The Walsh–Hadamard transform that keeps lengths, of a power of two of values; its own
/// opposite.
#[inline(always)]
fn hadamard(values: &mut [f32]) {
    let n = values.len();
    let mut half = 1;
    while half < n {
        for pair in values.chunks_exact_mut(2 * half) {
            let (first, second) = pair.split_at_mut(half);
            for (a, b) in first.iter_mut().zip(second) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    #[expect(clippy::cast_precision_loss, reason = "a small power of two")]
    let by = 1.0 / (n as f32).sqrt();
    values.iter_mut().for_each(|value| *value *= by);
}

/// The largest magnitude over `most`, rounded up; no number if there is a value that is
/// none or infinite.
#[inline(always)]
fn scale_of(values: &[f32], most: f32) -> bf16 {
    // Of magnitudes the bits order as the numbers do, with what is not finite on top.
    let largest = values
        .iter()
        .fold(0, |largest, value| value.abs().to_bits().max(largest));
    let scale = f32::from_bits(largest) / most;
    if !scale.is_finite() {
        return bf16::NAN;
    }
    let bits = scale.to_bits().div_ceil(1 << 16);
    bf16::from_bits(u16::try_from(bits).unwrap_or(u16::MAX))
}

const SCALE_BYTES: usize = 2;
const SMALLEST_BLOCK: usize = 16;
const LARGEST_BLOCK: usize = 128;
/// Decoded at once.
const MOST_VALUES: usize = 256;

#[cfg(test)]
mod tests;
