//! Where the values of a group of heads come from: its heads in a raw layer, with RoPE undone,
//! or coefficients of a basis.

use std::borrow::Cow;
use std::ops::Range;

use kvasir_types::DType;

use crate::rans::LANES;
use crate::rotation::Rotation;
use crate::values;

/// The values of a group, read as often as they are needed.
#[derive(Debug)]
pub(crate) enum Input<'a> {
    Heads(Heads<'a>),
    /// A row a token.
    Rows(Cow<'a, [f32]>),
}

/// Heads of a raw layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads<'a> {
    pub(crate) raw: &'a [u8],
    pub(crate) dtype: DType,
    pub(crate) dim: usize,
    pub(crate) tokens: usize,
    pub(crate) rotation: Option<&'a Rotation>,
}

/// A block of lanes of some tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InputBlock<'a> {
    pub(crate) block: usize,
    /// The first token, counted from the first that was asked for.
    pub(crate) token: usize,
    /// From the block's first lane on.
    values: &'a [f32],
    stride: usize,
}

impl<'a> InputBlock<'a> {
    /// The values of each token.
    #[inline(always)]
    pub(crate) fn rows(self) -> impl Iterator<Item = &'a [f32; LANES]> {
        let rows = self.values.chunks(self.stride);
        rows.map(|row| row.first_chunk().expect("a row of whole blocks"))
    }
}

impl Input<'_> {
    /// Gives `show` every block of some tokens of `width` channels, padding included: a few
    /// tokens at a time, in order.
    pub(crate) fn show(
        &self,
        tokens: Range<usize>,
        width: usize,
        mut show: impl FnMut(InputBlock<'_>),
    ) {
        let mut buffer = Vec::new();
        for start in tokens.clone().step_by(AT_A_TIME) {
            let some = start..(start + AT_A_TIME).min(tokens.end);
            let rows = match self {
                Input::Heads(heads) => {
                    buffer.resize(some.len() * width, 0.0);
                    heads.read(some, width, &mut buffer);
                    &buffer
                }
                Input::Rows(rows) => &rows[some.start * width..some.end * width],
            };
            for block in 0..width / LANES {
                show(InputBlock {
                    block,
                    token: start - tokens.start,
                    values: &rows[block * LANES..],
                    stride: width,
                });
            }
        }
    }
}

impl Heads<'_> {
    /// Reads some tokens, a row of `width` channels each; leaves the padding as it is.
    pub(crate) fn read(&self, tokens: Range<usize>, width: usize, rows: &mut [f32]) {
        let row_bytes = self.dim * self.dtype.bytes();
        let heads = self.raw.chunks_exact(self.tokens * row_bytes);
        for (head, bytes) in heads.enumerate() {
            let bytes = bytes[tokens.start * row_bytes..].chunks_exact(row_bytes);
            let rows = rows.chunks_exact_mut(width);
            for ((row, token), bytes) in rows.zip(tokens.clone()).zip(bytes) {
                let values = &mut row[head * self.dim..][..self.dim];
                values::load(self.dtype, bytes, values);
                if let Some(rotation) = self.rotation {
                    rotation.undo(token, values);
                }
            }
        }
    }
}

/// Tokens that are read at a time: their values stay in the nearest cache.
const AT_A_TIME: usize = 16;
