//! Methods that the codec crate has layer by layer.

use anyhow::Context as _;
use kvasir_codec::{FixedCodec, FixedRate};

use super::{Chunk, Coder, Parts};

/// The raw layers.
#[derive(Debug)]
pub(super) struct Raw;

impl Coder for Raw {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        Ok(chunk.layers.clone())
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        for (layer, part) in chunk.layers.iter_mut().zip(parts) {
            layer.copy_from_slice(part);
        }
        Ok(())
    }
}

/// A fixed rate.
#[derive(Debug)]
pub(super) struct Fixed(pub(super) FixedRate);

impl Coder for Fixed {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let codec = FixedCodec::new(chunk.layout, self.0)?;
        Ok(chunk.layers.iter().map(|raw| codec.encode(raw)).collect())
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        let codec = FixedCodec::new(chunk.layout, self.0)?;
        for (layer, part) in chunk.layers.iter_mut().zip(parts) {
            codec.decode(part, layer)?;
        }
        Ok(())
    }
}

/// The bytes of 16-bit numbers in two planes, the sign after all others, each under zstd
/// (RFC 8878) at its fastest level, which gives no more at higher ones.
#[derive(Debug)]
pub(super) struct ZstdPlanes;

impl Coder for ZstdPlanes {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let layers = chunk.layers.iter().map(|raw| {
            let numbers = || {
                raw.as_chunks()
                    .0
                    .iter()
                    .map(|&number| u16::from_le_bytes(number))
            };
            let plane = |at: usize| -> Vec<u8> {
                let rotated = numbers().map(|number| number.rotate_left(1).to_be_bytes());
                rotated.map(|bytes| bytes[at]).collect()
            };
            let high = zstd::bulk::compress(&plane(0), 1)?;
            let low = zstd::bulk::compress(&plane(1), 1)?;
            let len = u32::try_from(high.len())?;
            Ok([len.to_le_bytes().to_vec(), high, low].concat())
        });
        layers.collect()
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        for (layer, part) in chunk.layers.iter_mut().zip(parts) {
            let (&len, planes) = part.split_first_chunk().context("a length")?;
            let len = usize::try_from(u32::from_le_bytes(len))?;
            let (high, low) = planes.split_at_checked(len).context("two planes")?;
            let plane = |bytes: &[u8]| zstd::bulk::decompress(bytes, layer.len() / 2);
            let (high, low) = (plane(high)?, plane(low)?);
            let numbers = layer.as_chunks_mut().0.iter_mut();
            for (number, (high, low)) in numbers.zip(high.into_iter().zip(low)) {
                *number = u16::from_be_bytes([high, low])
                    .rotate_right(1)
                    .to_le_bytes();
            }
        }
        Ok(())
    }
}
