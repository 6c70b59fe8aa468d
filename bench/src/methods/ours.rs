//! Our codec at a level and a step.

use std::sync::Arc;

use anyhow::Context as _;
use kvasir_codec::{LADDER, LayerCodec, Profile, Rotation};
use kvasir_types::{KvLayout, LayerIdx};

use super::{Chunk, Coder, Geometry, PROTECTED, Parts, STEP};

/// Steps and level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Variant {
    /// Of level 0, in deviations; in units of the profile, of which the usual one is 1.
    pub(crate) step: f32,
    /// What it is multiplied by for keys.
    pub(crate) keys: f32,
    pub(crate) level: usize,
    /// What comes before it; see [`super::klt`].
    pub(crate) transform: Option<Transform>,
    /// Whether it has a profile, in whose units its steps then are.
    pub(crate) profile: bool,
    /// Whether steps follow what each layer's planes are worth.
    pub(crate) allocated: bool,
}

/// What a Karhunen–Loève basis is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Transform {
    /// A head.
    Head,
    /// All heads of a layer.
    Layer,
    /// All layers, each first brought to the same deviation.
    All,
    /// All layers as they are.
    Flat,
}

impl Transform {
    const ALL: [(Self, &str); 4] = [
        (Self::Head, "klthead"),
        (Self::Layer, "kltlayer"),
        (Self::All, "kltall"),
        (Self::Flat, "kltflat"),
    ];
}

impl Variant {
    pub(super) const DEFAULT: Self = Self {
        step: STEP,
        keys: 1.0,
        level: 1,
        transform: None,
        profile: false,
        allocated: false,
    };

    /// `[profile-][sSTEP[kFACTOR]-]LLEVEL[-TRANSFORM][-alloc]`, or nothing.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut variant = Self::DEFAULT;
        if text.is_empty() {
            return Some(variant);
        }
        let mut parts = text.split('-').peekable();
        variant.profile = parts.next_if_eq(&PROFILE).is_some();
        if variant.profile {
            variant.step = 1.0;
        }
        if let Some(steps) = parts.peek().and_then(|part| part.strip_prefix('s')) {
            let (step, keys) = steps.split_once('k').unwrap_or((steps, "1"));
            variant.step = step.parse().ok()?;
            variant.keys = keys.parse().ok()?;
            parts.next();
        }
        variant.level = parts.next()?.strip_prefix('L')?.parse().ok()?;
        if let Some(name) = parts.next_if(|part| *part != ALLOCATED) {
            let named = |&&(_, of): &&(_, &str)| of == name;
            variant.transform = Some(Transform::ALL.iter().find(named)?.0);
        }
        variant.allocated = parts.next_if_eq(&ALLOCATED).is_some();
        let positive = |step: f32| step.is_normal() && step > 0.0;
        let fits = variant.level < LADDER && positive(variant.step) && positive(variant.keys);
        (fits && parts.next().is_none()).then_some(variant)
    }

    pub(super) fn name(self) -> String {
        let Self {
            step, keys, level, ..
        } = self;
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits();
        if self == Self::DEFAULT {
            return "kvasir".to_owned();
        }
        let usual = if self.profile { 1.0 } else { STEP };
        let step = match (same(step, usual), same(keys, 1.0)) {
            (true, true) => String::new(),
            (false, true) => format!("s{step}-"),
            (_, false) => format!("s{step}k{keys}-"),
        };
        let named = Transform::ALL
            .iter()
            .find(|(transform, _)| Some(*transform) == self.transform);
        let transform = named.map_or(String::new(), |(_, name)| format!("-{name}"));
        let allocated = if self.allocated { "-alloc" } else { "" };
        let profile = if self.profile { "profile-" } else { "" };
        format!("kvasir:{profile}{step}L{level}{transform}{allocated}")
    }
}

const ALLOCATED: &str = "alloc";
const PROFILE: &str = "profile";

/// `kvasir_codec::LayerCodec`, layer by layer.
#[derive(Debug)]
pub(crate) struct Kvasir {
    level: usize,
    /// Of level 0, in deviations: by layer, of keys and values.
    steps: Vec<[f32; 2]>,
    geometry: Arc<Geometry>,
    profile: Option<Arc<Profile>>,
}

impl Kvasir {
    pub(crate) fn new(variant: Variant, geometry: &Arc<Geometry>) -> Self {
        let steps = [variant.step * variant.keys, variant.step];
        Self {
            level: variant.level,
            steps: vec![steps; geometry.layers],
            geometry: Arc::clone(geometry),
            profile: None,
        }
    }

    /// With a profile, if any.
    pub(crate) fn with_profile(self, profile: Option<Arc<Profile>>) -> Self {
        Self { profile, ..self }
    }

    fn codec<'a>(
        &'a self,
        layout: KvLayout,
        rotation: &'a Rotation,
        layer: u16,
    ) -> anyhow::Result<LayerCodec<'a>> {
        let codec = LayerCodec::new(layout, Some(rotation))?;
        Ok(match &self.profile {
            None => codec,
            Some(profile) => {
                let profile = profile.layer(LayerIdx(layer)).context("a layer too many")?;
                codec.with_profile(profile)?
            }
        })
    }

    /// What the steps of a layer are a multiple of.
    fn units(&self, codec: &LayerCodec<'_>, layer: u16, raw: &[u8]) -> [f32; 2] {
        let profile = self.profile.as_ref();
        match profile.and_then(|profile| profile.layer(LayerIdx(layer))) {
            None => codec.deviations(raw),
            Some(profile) => {
                let mut units = [1.0; 2];
                units
                    .iter_mut()
                    .zip(profile.units())
                    .for_each(|(to, unit)| *to = unit);
                units
            }
        }
    }

    /// With every step times its factor, by layer and plane.
    pub(crate) fn times(mut self, factors: &[[f32; 2]]) -> Self {
        for (steps, factors) in self.steps.iter_mut().zip(factors) {
            for (step, factor) in steps.iter_mut().zip(factors) {
                *step *= factor;
            }
        }
        self
    }
}

impl Coder for Kvasir {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let rotation = self.geometry.rotation(chunk.start, chunk.layout.tokens());
        let mut parts = Vec::new();
        for (layer, (raw, steps)) in (0..).zip(chunk.layers.iter().zip(&self.steps)) {
            let codec = self.codec(chunk.layout, &rotation, layer)?;
            let [keys, values] = self.units(&codec, layer, raw);
            let step = |deviation: f32, step: f32| (deviation * step).max(f32::MIN_POSITIVE);
            let encoded = codec.encode(raw, [step(keys, steps[0]), step(values, steps[1])]);
            parts.extend(encoded.parts.into_iter().take(self.level + 1));
        }
        Ok(parts)
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        let rotation = self.geometry.rotation(chunk.start, chunk.layout.tokens());
        let layout = chunk.layout;
        let layers = chunk.layers.iter_mut().zip(parts.chunks(self.level + 1));
        for (layer, (raw, parts)) in (0..).zip(layers) {
            let codec = self.codec(layout, &rotation, layer)?;
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            codec.decode(&parts, raw)?;
        }
        Ok(())
    }

    fn protected(&self) -> usize {
        PROTECTED
    }
}
