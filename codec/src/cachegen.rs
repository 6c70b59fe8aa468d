//! CacheGen (Liu et al., SIGCOMM 2024, arXiv 2310.07240), to compare with and to read.
//!
//! Two codings go by this name:
//!
//! * [`CacheGen`] follows the paper: in groups of ten tokens the first is an anchor, the
//!   others are coded as differences from it, by arithmetic coding with one distribution a
//!   layer and channel.
//! * [`CirculatedCacheGen`] follows the code that circulates under the name (UChi-JCL/CacheGen
//!   and the CacheGen serializer of LMCache), which has neither anchors nor differences.
//!
//! Both ship their distributions with the object. The entropy coder is the range coder of
//! `constriction` with frequencies of 16 bits. Keys are coded as they are stored, after RoPE.
//! A layer with a value that is not finite is refused: store it raw.

#![deny(clippy::indexing_slicing)]

use constriction::stream::model::ContiguousCategoricalEntropyModel;
use constriction::stream::queue::{DefaultRangeDecoder, DefaultRangeEncoder};
use constriction::stream::{Decode as _, Encode as _};
use kvasir_types::{DType, KvLayout, Plane};

use crate::elements;

mod circulated;
mod published;

pub use circulated::{CirculatedCacheGen, CirculatedLevel};
pub use published::CacheGen;

/// Why a layer, or a layout, cannot be coded so, or bytes are not such a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheGenError {
    /// Eight bits a value are quantised already.
    #[error("values of type {0} are quantised already; store them raw")]
    DType(DType),
    /// A value is infinite or no number.
    #[error("a value is not finite; store the layer raw")]
    NotFinite,
    /// The bytes end early, or go on after their end.
    #[error("a layer of {0} bytes is not as long as it states")]
    Length(usize),
    /// A step or scale is no positive number.
    #[error("a step or scale is no positive number")]
    Scale,
    /// A distribution is none, or of other values than there are.
    #[error("the distribution of a channel is damaged")]
    Table,
    /// An arithmetic-coded stream cannot be decoded.
    #[error("an arithmetic-coded stream is damaged")]
    Stream,
}

/// Frequencies of symbols, whose sum is [`TOTAL`].
type Model = ContiguousCategoricalEntropyModel<u32, Vec<u32>, PRECISION>;

fn model(frequencies: &[u32]) -> Result<Model, CacheGenError> {
    Model::from_nonzero_fixed_point_probabilities(frequencies.iter().copied(), false)
        .map_err(|()| CacheGenError::Table)
}

/// One plane of a raw layer, channel by channel: `[head × dim][token]`.
struct Channels {
    plane: Plane,
    tokens: usize,
    values: Vec<f32>,
}

/// The planes of a raw layer.
fn channels(layout: &KvLayout, raw: &[u8]) -> Result<Vec<Channels>, CacheGenError> {
    let tokens = layout.tokens() as usize;
    let mut planes: Vec<Channels> = Vec::new();
    let mut rows = Vec::new();
    for head in elements::heads(layout) {
        rows.resize(tokens * head.dim, 0.0);
        elements::read(
            layout.dtype(),
            raw.get(head.place).unwrap_or(&[]),
            &mut rows,
        );
        if !rows.iter().all(|value| value.is_finite()) {
            return Err(CacheGenError::NotFinite);
        }
        if planes.last().is_none_or(|last| last.plane != head.plane) {
            planes.push(Channels {
                plane: head.plane,
                tokens,
                values: Vec::new(),
            });
        }
        if let Some(plane) = planes.last_mut() {
            for channel in 0..head.dim {
                let values = rows.iter().skip(channel).step_by(head.dim);
                plane.values.extend(values);
            }
        }
    }
    Ok(planes)
}

/// Channels of each plane that a layout has.
fn widths(layout: &KvLayout) -> Vec<(Plane, usize)> {
    let mut widths: Vec<(Plane, usize)> = Vec::new();
    for head in elements::heads(layout) {
        match widths.last_mut() {
            Some((plane, width)) if *plane == head.plane => *width += head.dim,
            _ => widths.push((head.plane, head.dim)),
        }
    }
    widths
}

/// The opposite of [`channels`].
fn to_raw(layout: &KvLayout, planes: &[Channels], raw: &mut [u8]) {
    let tokens = layout.tokens() as usize;
    let mut rows = Vec::new();
    for channels in planes {
        let mut rest = channels.values.as_slice();
        let heads = elements::heads(layout).filter(|head| head.plane == channels.plane);
        for head in heads {
            let (values, after) = rest.split_at_checked(tokens * head.dim).unwrap_or_default();
            rest = after;
            rows.resize(tokens * head.dim, 0.0);
            for (channel, values) in values.chunks_exact(tokens).enumerate() {
                let slots = rows.iter_mut().skip(channel).step_by(head.dim);
                slots.zip(values).for_each(|(slot, value)| *slot = *value);
            }
            if let Some(raw) = raw.get_mut(head.place) {
                elements::write(layout.dtype(), &rows, raw);
            }
        }
    }
}

/// Arithmetic-codes runs of symbols, each with its own model; bytes of whole words.
fn encode_runs<'a>(runs: impl Iterator<Item = (&'a [usize], &'a Model)>) -> Vec<u8> {
    let mut encoder = DefaultRangeEncoder::new();
    for (symbols, model) in runs {
        encoder
            .encode_iid_symbols(symbols, model)
            .expect("a model has every symbol that its histogram counted");
    }
    let words = encoder.into_compressed().unwrap_or_default();
    words.into_iter().flat_map(u32::to_be_bytes).collect()
}

/// Opens a stream of bytes, as if zeros followed them.
fn decoder(bytes: &[u8]) -> Result<DefaultRangeDecoder, CacheGenError> {
    let word = |bytes: &[u8]| {
        let mut word = [0; 4];
        word.iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        u32::from_be_bytes(word)
    };
    let words: Vec<u32> = bytes.chunks(4).map(word).collect();
    DefaultRangeDecoder::from_compressed(words).map_err(|_| CacheGenError::Stream)
}

/// Decodes a run of symbols.
fn decode_run(
    decoder: &mut DefaultRangeDecoder,
    count: usize,
    model: &Model,
    mut symbol: impl FnMut(usize),
) -> Result<(), CacheGenError> {
    for found in decoder.decode_iid_symbols(count, model) {
        symbol(found.map_err(|_| CacheGenError::Stream)?);
    }
    Ok(())
}

/// Bytes that are being read.
struct Reader<'a> {
    len: usize,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            len: bytes.len(),
            rest: bytes,
        }
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], CacheGenError> {
        let error = CacheGenError::Length(self.len);
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or(error)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], CacheGenError> {
        let error = CacheGenError::Length(self.len);
        let (&bytes, rest) = self.rest.split_first_chunk().ok_or(error)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn end(self) -> Result<(), CacheGenError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(CacheGenError::Length(self.len))
        }
    }
}

const PRECISION: usize = 16;
const TOTAL: u32 = 1 << PRECISION;

#[cfg(test)]
mod tests;
