//! CacheGen of both kinds, layer by layer.

use kvasir_codec::{CacheGen, CirculatedCacheGen, CirculatedLevel};

use super::{Chunk, Coder, Parts};

/// As the paper has it, with steps so many times its own.
#[derive(Debug)]
pub(super) struct Published(pub(super) f32);

impl Coder for Published {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let codec = CacheGen::new(chunk.layout, self.0)?;
        let layers = (0..).zip(&chunk.layers);
        Ok(layers
            .map(|(layer, raw)| codec.encode(layer, raw))
            .collect::<Result<_, _>>()?)
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        let codec = CacheGen::new(chunk.layout, self.0)?;
        for (layer, part) in chunk.layers.iter_mut().zip(parts) {
            codec.decode(part, layer)?;
        }
        Ok(())
    }
}

/// As its code circulates.
#[derive(Debug)]
pub(super) struct Circulated(pub(super) CirculatedLevel);

impl Coder for Circulated {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let codec = CirculatedCacheGen::new(chunk.layout, self.0)?;
        let layers = (0..).zip(&chunk.layers);
        Ok(layers
            .map(|(layer, raw)| codec.encode(layer, raw))
            .collect::<Result<_, _>>()?)
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        let codec = CirculatedCacheGen::new(chunk.layout, self.0)?;
        for (layer, (raw, part)) in (0..).zip(chunk.layers.iter_mut().zip(parts)) {
            codec.decode(layer, part, raw)?;
        }
        Ok(())
    }
}
