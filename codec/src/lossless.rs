//! The exact coding of one layer of a chunk.
//!
//! What repeats in numbers that look random is their size: the exponents. So the bytes of
//! every head are sorted into planes, most significant first, after the sign went from the
//! top of a number to its end, where it does not split the exponent; and a plane that
//! shrinks is compressed by zstd (RFC 8878), level 1. Higher levels take more time and give
//! no less: there is nothing but frequencies to find.
//!
//! ```text
//! layer := block × length (u32) ‖ block × bytes     by plane, head, byte of a number
//! ```
//!
//! A block as long as its plane is not compressed. All integers are little-endian.

use kvasir_types::{DType, HeadRange, KvLayout, Plane};
use zstd::bulk::{Compressor, Decompressor};

/// Why the bytes of an exactly coded layer cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LosslessError {
    /// The lengths of its blocks are not those of its bytes.
    #[error("an exactly coded layer of {0} bytes is not as long as it states")]
    Length(usize),
    /// A block cannot be decompressed, or not to what it should be.
    #[error("a compressed block is damaged")]
    Block,
}

/// Codes a raw layer.
///
/// # Panics
/// The layer has not the bytes that the layout says.
pub fn encode_lossless(layout: &KvLayout, raw: &[u8]) -> Vec<u8> {
    assert_eq!(raw.len(), layout.layer_bytes(), "a layer of the layout");
    let size = layout.dtype().bytes();
    let mut zstd = Compressor::new(LEVEL).ok();
    let mut lengths = Vec::new();
    let mut blocks = Vec::with_capacity(raw.len());
    let mut planes = Vec::new();
    for head in heads(layout) {
        let head = raw.get(head).unwrap_or(&[]);
        planes.resize(head.len(), 0);
        split(layout.dtype(), head, &mut planes);
        for plane in planes.chunks_exact(head.len() / size) {
            let small = zstd.as_mut().and_then(|zstd| zstd.compress(plane).ok());
            // What hardly shrinks is not worth the time to decompress it.
            let small = small.filter(|small| small.len() < plane.len() / 64 * 63);
            let block = small.as_deref().unwrap_or(plane);
            let len = u32::try_from(block.len()).expect("a head has less than 2^30 bytes");
            lengths.extend_from_slice(&len.to_le_bytes());
            blocks.extend_from_slice(block);
        }
    }
    lengths.extend(blocks);
    lengths
}

/// Decodes a layer into its raw form.
///
/// # Errors
/// Every truncation, and most damage; `raw` then holds anything.
///
/// # Panics
/// `raw` has not the bytes that the layout says.
pub fn decode_lossless(
    layout: &KvLayout,
    bytes: &[u8],
    raw: &mut [u8],
) -> Result<(), LosslessError> {
    assert_eq!(raw.len(), layout.layer_bytes(), "a layer of the layout");
    let error = LosslessError::Length(bytes.len());
    let size = layout.dtype().bytes();
    let count = heads(layout).count() * size;
    let (lengths, mut blocks) = bytes.split_at_checked(4 * count).ok_or(error)?;
    let mut lengths = lengths.as_chunks().0.iter();
    let mut zstd = Decompressor::new().map_err(|_| LosslessError::Block)?;
    let mut planes = Vec::new();
    for head in heads(layout) {
        planes.resize(head.len(), 0);
        for plane in planes.chunks_exact_mut(head.len() / size) {
            let len = lengths.next().map_or(0, |&len| u32::from_le_bytes(len));
            let (block, rest) = blocks.split_at_checked(len as usize).ok_or(error)?;
            blocks = rest;
            if block.len() == plane.len() {
                plane.copy_from_slice(block);
                continue;
            }
            match zstd.decompress_to_buffer(block, plane) {
                Ok(written) if written == plane.len() => (),
                _ => return Err(LosslessError::Block),
            }
        }
        if let Some(head) = raw.get_mut(head) {
            join(layout.dtype(), &planes, head);
        }
    }
    if blocks.is_empty() {
        Ok(())
    } else {
        Err(error)
    }
}

/// Where the heads of a layer lie, in order.
fn heads(layout: &KvLayout) -> impl Iterator<Item = std::ops::Range<usize>> {
    [Plane::Key, Plane::Value]
        .into_iter()
        .flat_map(move |plane| {
            let one = |head| HeadRange::new(head, head + 1).ok();
            (0..layout.kv_heads()).filter_map(move |head| layout.head_slice(plane, one(head)?))
        })
}

/// Sorts the bytes of numbers into planes.
fn split(dtype: DType, head: &[u8], planes: &mut [u8]) {
    match dtype.bytes() {
        4 => {
            let len = head.len() / 4;
            for (at, &number) in head.as_chunks().0.iter().enumerate() {
                let bytes = u32::from_le_bytes(number).rotate_left(1).to_be_bytes();
                for (plane, byte) in bytes.into_iter().enumerate() {
                    planes[plane * len + at] = byte;
                }
            }
        }
        2 => {
            let (high, low) = planes.split_at_mut(head.len() / 2);
            for ((high, low), &number) in high.iter_mut().zip(low).zip(head.as_chunks().0) {
                [*high, *low] = u16::from_le_bytes(number).rotate_left(1).to_be_bytes();
            }
        }
        _ => planes.copy_from_slice(head),
    }
}

/// The opposite.
fn join(dtype: DType, planes: &[u8], head: &mut [u8]) {
    match dtype.bytes() {
        4 => {
            let len = head.len() / 4;
            for (at, number) in head.as_chunks_mut().0.iter_mut().enumerate() {
                let bytes = [0, 1, 2, 3].map(|plane| planes[plane * len + at]);
                *number = u32::from_be_bytes(bytes).rotate_right(1).to_le_bytes();
            }
        }
        2 => {
            let (high, low) = planes.split_at(head.len() / 2);
            for (number, (&high, &low)) in
                head.as_chunks_mut().0.iter_mut().zip(high.iter().zip(low))
            {
                *number = u16::from_be_bytes([high, low])
                    .rotate_right(1)
                    .to_le_bytes();
            }
        }
        _ => head.copy_from_slice(planes),
    }
}

const LEVEL: i32 = 1;

#[cfg(test)]
mod tests {
    use half::bf16;
    use kvasir_types::Planes;
    use proptest::prelude::*;

    use super::*;

    fn layout(dtype: DType) -> KvLayout {
        let planes = Planes::KeyValue {
            key_dim: 12,
            value_dim: 9,
        };
        KvLayout::new(1, 3, planes, 17, dtype).unwrap()
    }

    fn decoded(layout: &KvLayout, bytes: &[u8]) -> Result<Vec<u8>, LosslessError> {
        let mut raw = vec![0; layout.layer_bytes()];
        decode_lossless(layout, bytes, &mut raw)?;
        Ok(raw)
    }

    #[test]
    fn numbers_of_similar_size_take_less() {
        let layout = KvLayout::new(1, 2, Planes::symmetric(64), 256, DType::Bf16).unwrap();
        let mut state = 1u32;
        let raw: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16::from_f32(f32::from((state >> 16) as u16) / 32_768.0 - 1.0).to_le_bytes()
        })
        .take(layout.layer_bytes() / 2)
        .flatten()
        .collect();
        let encoded = encode_lossless(&layout, &raw);
        assert_eq!(decoded(&layout, &encoded).unwrap(), raw);
        assert!(encoded.len() * 4 < raw.len() * 3, "{}", encoded.len());
    }

    proptest! {
        #[test]
        fn every_bit_comes_back(
            dtype in prop::sample::select(DType::ALL.to_vec()),
            bytes in prop::collection::vec(any::<u8>(), 1..200),
        ) {
            let layout = layout(dtype);
            let raw: Vec<u8> = bytes.iter().copied().cycle().take(layout.layer_bytes()).collect();
            let encoded = encode_lossless(&layout, &raw);
            prop_assert_eq!(decoded(&layout, &encoded).unwrap(), raw);
        }

        #[test]
        fn damage_is_an_error_or_other_bytes_and_no_panic(
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let layout = layout(DType::Bf16);
            let raw: Vec<u8> = (0..layout.layer_bytes()).map(|at| (at % 5).to_le_bytes()[0]).collect();
            let mut encoded = encode_lossless(&layout, &raw);
            let at = at.index(encoded.len());
            encoded[at] = byte;
            let _ = decoded(&layout, &encoded);
            encoded.truncate(at);
            prop_assert!(decoded(&layout, &encoded).is_err());
        }
    }
}
