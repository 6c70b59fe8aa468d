//! Methods that the codec crate has layer by layer.

use kvasir_codec::{FixedCodec, FixedRate, decode_lossless, encode_lossless};

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

/// Byte planes under zstd.
#[derive(Debug)]
pub(super) struct Lossless;

impl Coder for Lossless {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let layers = chunk.layers.iter();
        Ok(layers
            .map(|raw| encode_lossless(&chunk.layout, raw))
            .collect())
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        for (layer, part) in chunk.layers.iter_mut().zip(parts) {
            decode_lossless(&chunk.layout, part, layer)?;
        }
        Ok(())
    }
}
