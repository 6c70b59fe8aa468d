//! Our codec at a level and a step.

use std::sync::Arc;

use kvasir_codec::{LADDER, LayerCodec};

use super::{Chunk, Coder, Geometry, PROTECTED, Parts, STEP};

/// Steps and level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Variant {
    /// Of level 0, in deviations.
    pub(crate) step: f32,
    /// What it is multiplied by for keys.
    pub(crate) keys: f32,
    pub(crate) level: usize,
}

impl Variant {
    const DEFAULT: Self = Self {
        step: STEP,
        keys: 1.0,
        level: 1,
    };

    /// `[sSTEP[kFACTOR]-]LLEVEL`, or nothing.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(Self::DEFAULT);
        }
        let (steps, level) = text.rsplit_once('-').unwrap_or(("", text));
        let level = level.strip_prefix('L')?.parse().ok()?;
        let mut variant = Self {
            level,
            ..Self::DEFAULT
        };
        if !steps.is_empty() {
            let steps = steps.strip_prefix('s')?;
            let (step, keys) = steps.split_once('k').unwrap_or((steps, "1"));
            variant.step = step.parse().ok()?;
            variant.keys = keys.parse().ok()?;
        }
        let positive = |step: f32| step.is_normal() && step > 0.0;
        let fits = level < LADDER && positive(variant.step) && positive(variant.keys);
        fits.then_some(variant)
    }

    pub(super) fn name(self) -> String {
        let Self { step, keys, level } = self;
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits();
        if self == Self::DEFAULT {
            return "kvasir".to_owned();
        }
        let step = match (same(step, STEP), same(keys, 1.0)) {
            (true, true) => String::new(),
            (false, true) => format!("s{step}-"),
            (_, false) => format!("s{step}k{keys}-"),
        };
        format!("kvasir:{step}L{level}")
    }
}

/// `kvasir_codec::LayerCodec`, layer by layer.
#[derive(Debug)]
pub(super) struct Kvasir {
    level: usize,
    /// Of level 0, in deviations: by layer, of keys and values.
    steps: Vec<[f32; 2]>,
    geometry: Arc<Geometry>,
}

impl Kvasir {
    pub(super) fn new(variant: Variant, geometry: &Arc<Geometry>) -> Self {
        let steps = [variant.step * variant.keys, variant.step];
        Self {
            level: variant.level,
            steps: vec![steps; geometry.layers],
            geometry: Arc::clone(geometry),
        }
    }

    /// As [`Self::new`], with the steps of one plane of one layer times `factor`.
    pub(super) fn perturbed(mut self, layer: usize, plane: usize, factor: f32) -> Self {
        self.steps[layer][plane] *= factor;
        self
    }
}

impl Coder for Kvasir {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let rotation = self.geometry.rotation(chunk.start, chunk.layout.tokens());
        let codec = LayerCodec::new(chunk.layout, Some(&rotation))?;
        let mut parts = Vec::new();
        for (raw, steps) in chunk.layers.iter().zip(&self.steps) {
            let [keys, values] = codec.deviations(raw);
            let step = |deviation: f32, step: f32| (deviation * step).max(f32::MIN_POSITIVE);
            let encoded = codec.encode(raw, [step(keys, steps[0]), step(values, steps[1])]);
            parts.extend(encoded.parts.into_iter().take(self.level + 1));
        }
        Ok(parts)
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        let rotation = self.geometry.rotation(chunk.start, chunk.layout.tokens());
        let codec = LayerCodec::new(chunk.layout, Some(&rotation))?;
        for (raw, parts) in chunk.layers.iter_mut().zip(parts.chunks(self.level + 1)) {
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            codec.decode(&parts, raw)?;
        }
        Ok(())
    }

    fn protected(&self) -> usize {
        PROTECTED
    }
}
