//! Whole chunks at any level: raw layers in, an [`Object`] out, and back layer by layer.

#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use bytes::Bytes;
use kvasir_types::{ChunkKey, KvLayout, LayerIdx, Level};

use crate::cachegen::{CacheGen, CacheGenError};
use crate::cell::LADDER;
use crate::fixed::{FixedCodec, FixedError, FixedRate, UnsupportedFixed};
use crate::header::HeaderError;
use crate::layer::{DecodeError, LayerCodec, UnsupportedLayout};
use crate::lossless::{LosslessError, decode_lossless, encode_lossless};
use crate::object::Object;
use crate::prelude::{Prelude, PreludeError};
use crate::profile::Profile;
use crate::rotation::Rotation;

/// How chunks are encoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoding {
    /// The level.
    pub level: Level,
    /// Steps of [`Level::L0`] by layer, of keys and of values, in deviations of the layer's
    /// values from the means of their channels. The last one also of all layers that
    /// follow. With a profile, in its units instead. None: those that are best for most
    /// models; with a profile, its units.
    pub steps: Vec<[f32; 2]>,
    /// What is known of the model, for nested levels; others do without.
    pub profile: Option<Arc<Profile>>,
}

/// Decodes the layers of one chunk.
#[derive(Debug)]
pub struct ChunkDecoder {
    layout: KvLayout,
    level: Level,
    rotation: Option<Rotation>,
    profile: Option<Arc<Profile>>,
    exact_tokens: u32,
}

/// Why a chunk could not be encoded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The level cannot be of such a layout.
    #[error(transparent)]
    Layout(#[from] UnsupportedLayout),
    /// A fixed rate cannot be of such a layout.
    #[error(transparent)]
    Fixed(#[from] UnsupportedFixed),
    /// CacheGen cannot be of such a layout.
    #[error(transparent)]
    CacheGen(#[from] CacheGenError),
    /// A step is zero, negative or no number.
    #[error("steps must be positive numbers")]
    Steps,
    /// Layers that are not those of the layout.
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// Why a chunk could not be decoded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ChunkError {
    /// The level cannot be of such a layout.
    #[error(transparent)]
    Layout(#[from] UnsupportedLayout),
    /// A fixed rate cannot be of such a layout.
    #[error(transparent)]
    FixedLayout(#[from] UnsupportedFixed),
    /// CacheGen cannot be of such a layout, or its bytes are no layer.
    #[error(transparent)]
    CacheGen(#[from] CacheGenError),
    /// The prelude is damaged, or needs a newer reader.
    #[error(transparent)]
    Prelude(#[from] PreludeError),
    /// The chunk was encoded with a profile that is not here.
    #[error("the chunk needs a profile that is not here")]
    Profile,
    /// No layer has so many parts at its level.
    #[error("a layer at level {level} cannot have {parts} parts here")]
    Parts {
        /// The level it is stored at.
        level: Level,
        /// Parts given.
        parts: usize,
    },
    /// A raw layer of another length.
    #[error("a raw layer has {actual} bytes, expected {expected}")]
    Length {
        /// Bytes of a raw layer.
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
    /// Its bytes are no exactly coded layer.
    #[error(transparent)]
    Lossless(#[from] LosslessError),
    /// Its bytes are no layer at a fixed rate.
    #[error(transparent)]
    Fixed(#[from] FixedError),
    /// Its parts are no lossy layer.
    #[error(transparent)]
    Layer(#[from] DecodeError),
}

impl Encoding {
    /// At a level, with the steps that are best for most models, and no profile.
    pub fn at(level: Level) -> Self {
        Self {
            level,
            steps: Vec::new(),
            profile: None,
        }
    }

    /// Whether chunks of `layout` can be encoded like this.
    ///
    /// # Errors
    /// What is wrong: the level cannot be of the layout, or steps are none.
    pub fn check(&self, layout: &KvLayout) -> Result<(), EncodeError> {
        match self.level {
            Level::RAW | Level::LOSSLESS => (),
            level if level.is_nested() => {
                LayerCodec::new(*layout, None)?;
                if let Some(profile) = &self.profile
                    && !profile.fits(layout, profile.shape().pairing)
                {
                    return Err(UnsupportedLayout::Profile.into());
                }
                let steps = |step: &[f32; 2]| step.iter().all(|it| it.is_normal() && *it > 0.0);
                if !self.steps.iter().all(steps) {
                    return Err(EncodeError::Steps);
                }
            }
            Level::CACHEGEN => {
                CacheGen::new(*layout, CACHEGEN_STEPS)?;
            }
            level => {
                FixedCodec::new(*layout, rate_of(level))?;
            }
        }
        Ok(())
    }

    /// Encodes a chunk: `layers` are raw, in order. A chunk of which a layer would take more
    /// bytes than it has is left exact instead: lossless where that is smaller, else raw.
    ///
    /// # Errors
    /// The level cannot be of the layout, or the layers are not of the layout.
    pub fn encode(
        &self,
        key: ChunkKey,
        layout: &KvLayout,
        prelude: &Prelude,
        layers: Vec<Bytes>,
    ) -> Result<Object, EncodeError> {
        let whole = |layer: &Bytes| layer.len() == layout.layer_bytes();
        let raw = self.level == Level::RAW || !layers.iter().all(whole);
        if raw || layers.len() != usize::from(layout.layers()) {
            return Ok(Object::raw(key, layout, layers)?);
        }
        self.check(layout)?;
        let profile = self.profile.as_ref().filter(|_| self.level.is_nested());
        let named = profile.map(|profile| *profile.digest());
        let parts: Vec<Vec<Vec<u8>>> = match self.level {
            Level::LOSSLESS => lossless(layout, &layers),
            level if level.is_nested() => self.nested(layout, prelude, &layers)?,
            Level::CACHEGEN => match cachegen(layout, &layers) {
                Err(CacheGenError::NotFinite) => {
                    return Self::at(Level::LOSSLESS).encode(key, layout, prelude, layers);
                }
                parts => parts?,
            },
            level => fixed(layout, level, &layers)?,
        };
        let most = layout.layer_bytes();
        if parts.iter().flatten().any(|part| part.len() > most) {
            let exact = match self.level {
                Level::LOSSLESS => Level::RAW,
                _ => Level::LOSSLESS,
            };
            return Self::at(exact).encode(key, layout, prelude, layers);
        }
        let prelude = Prelude {
            profile: named,
            ..prelude.clone()
        };
        // Each layer's parts in turn become each part of all layers.
        let mut extents = vec![Bytes::from(prelude.encode())];
        let mut parts: Vec<_> = parts.into_iter().map(Vec::into_iter).collect();
        for _ in 0..self.level.parts() {
            let part = parts.iter_mut().filter_map(Iterator::next);
            extents.extend(part.map(Bytes::from));
        }
        Ok(Object::new(key, layout, self.level, extents)?)
    }

    fn nested(
        &self,
        layout: &KvLayout,
        prelude: &Prelude,
        layers: &[Bytes],
    ) -> Result<Vec<Vec<Vec<u8>>>, EncodeError> {
        let tokens = layout.tokens();
        let rotation = prelude.rotation.as_ref().map(|of| of.angles(tokens));
        let mut steps = self.steps.iter().copied();
        let mut last = match &self.profile {
            None => DEFAULT_STEPS,
            Some(_) => [1.0; 2],
        };
        let encoded = (0..).map(LayerIdx).zip(layers).map(|(index, layer)| {
            let mut codec = LayerCodec::new(*layout, rotation.as_ref())?;
            codec = codec.with_exact_tokens(prelude.exact_tokens);
            last = steps.next().unwrap_or(last);
            let steps = |deviations: [f32; 2]| {
                let [keys, values] = deviations;
                let [of_keys, of_values] = last;
                [keys * of_keys, values * of_values].map(|step| {
                    // Of a plane that is all the same, or full of what is no number.
                    if step.is_finite() {
                        step.max(SMALLEST_STEP)
                    } else {
                        SMALLEST_STEP
                    }
                })
            };
            let encoded = if let Some(profile) = &self.profile {
                let profile = profile.layer(index).ok_or(UnsupportedLayout::Profile)?;
                let mut units = [0.0; 2];
                for (unit, of_plane) in units.iter_mut().zip(profile.units()) {
                    *unit = of_plane;
                }
                codec = codec.with_profile(profile)?;
                codec.encode(layer, steps(units))
            } else {
                codec.encode_by_deviations(layer, steps)
            };
            let mut parts = Vec::from(encoded.parts);
            parts.truncate(self.level.parts().into());
            Ok(parts)
        });
        encoded.collect()
    }
}

impl ChunkDecoder {
    /// For a chunk that is stored at `level`, and has this prelude; a raw chunk has none.
    /// If it names a profile, that is one of `profiles`.
    ///
    /// # Errors
    /// The prelude is damaged, or says that this version cannot decode the chunk; or its
    /// profile is not there, or of other chunks.
    pub fn new(
        layout: KvLayout,
        level: Level,
        prelude: &[u8],
        profiles: &[Arc<Profile>],
    ) -> Result<Self, ChunkError> {
        let prelude = Prelude::parse(prelude, &layout)?;
        let named = |digest| {
            let found = profiles.iter().find(|profile| *profile.digest() == digest);
            found.cloned().ok_or(ChunkError::Profile)
        };
        let profile = prelude.profile.map(named).transpose()?;
        if !level.is_nested() && profile.is_some() {
            return Err(ChunkError::Profile);
        }
        let rotation = prelude.rotation.filter(|_| level.is_nested());
        let rotation = rotation.map(|of| of.angles(layout.tokens()));
        match level {
            Level::RAW | Level::LOSSLESS => (),
            level if level.is_nested() => {
                let codec = LayerCodec::new(layout, rotation.as_ref())?;
                let of_first = profile.as_ref().and_then(|of| of.layer(LayerIdx(0)));
                if let Some(of_first) = of_first {
                    codec.with_profile(of_first)?;
                }
            }
            Level::CACHEGEN => {
                CacheGen::new(layout, CACHEGEN_STEPS)?;
            }
            level => {
                FixedCodec::new(layout, rate_of(level))?;
            }
        }
        Ok(Self {
            layout,
            level,
            rotation,
            profile,
            exact_tokens: prelude.exact_tokens,
        })
    }

    /// What codes a layer of a chunk at a nested level, for decoders elsewhere; `None` at all
    /// other levels.
    ///
    /// # Errors
    /// The profile has no such layer.
    pub fn codec(&self, layer: LayerIdx) -> Result<Option<LayerCodec<'_>>, ChunkError> {
        let nested = self.level.is_nested();
        nested.then(|| self.nested(layer)).transpose()
    }

    fn nested(&self, layer: LayerIdx) -> Result<LayerCodec<'_>, ChunkError> {
        let codec = LayerCodec::new(self.layout, self.rotation.as_ref())?;
        let codec = codec.with_exact_tokens(self.exact_tokens);
        let Some(profile) = &self.profile else {
            return Ok(codec);
        };
        let profile = profile.layer(layer).ok_or(ChunkError::Profile)?;
        Ok(codec.with_profile(profile)?)
    }

    /// Decodes a layer into its raw form, as exactly as the parts allow that are there: of
    /// a nested level its first part and any number of those that follow, of any other
    /// level its one part.
    ///
    /// # Errors
    /// Parts that are damaged, or not of this chunk; `raw` then holds anything.
    ///
    /// # Panics
    /// `raw` has not the bytes that the layout says.
    pub fn layer(
        &self,
        layer: LayerIdx,
        parts: &[impl AsRef<[u8]>],
        raw: &mut [u8],
    ) -> Result<(), ChunkError> {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        let parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
        let wrong = ChunkError::Parts {
            level: self.level,
            parts: parts.len(),
        };
        if self.level.is_nested() {
            if !(1..=LADDER.min(self.level.parts().into())).contains(&parts.len()) {
                return Err(wrong);
            }
            return Ok(self.nested(layer)?.decode(&parts, raw)?);
        }
        let &[part] = parts.as_slice() else {
            return Err(wrong);
        };
        match self.level {
            Level::RAW if part.len() == raw.len() => raw.copy_from_slice(part),
            Level::RAW => {
                return Err(ChunkError::Length {
                    expected: raw.len(),
                    actual: part.len(),
                });
            }
            Level::LOSSLESS => decode_lossless(&self.layout, part, raw)?,
            Level::CACHEGEN => CacheGen::new(self.layout, CACHEGEN_STEPS)?.decode(part, raw)?,
            level => FixedCodec::new(self.layout, rate_of(level))?.decode(part, raw)?,
        }
        Ok(())
    }
}

fn cachegen(layout: &KvLayout, layers: &[Bytes]) -> Result<Vec<Vec<Vec<u8>>>, CacheGenError> {
    let codec = CacheGen::new(*layout, CACHEGEN_STEPS)?;
    let encoded = (0..).zip(layers);
    encoded
        .map(|(layer, raw)| Ok(vec![codec.encode(layer, raw)?]))
        .collect()
}

fn fixed(
    layout: &KvLayout,
    level: Level,
    layers: &[Bytes],
) -> Result<Vec<Vec<Vec<u8>>>, UnsupportedFixed> {
    let codec = FixedCodec::new(*layout, rate_of(level))?;
    Ok(layers.iter().map(|raw| vec![codec.encode(raw)]).collect())
}

/// Of a level that is neither exact nor nested.
fn rate_of(level: Level) -> FixedRate {
    match level {
        Level::INT4 => FixedRate::Int4Hadamard,
        _ => FixedRate::Int8,
    }
}

fn lossless(layout: &KvLayout, layers: &[Bytes]) -> Vec<Vec<Vec<u8>>> {
    let encoded = layers.iter().map(|raw| vec![encode_lossless(layout, raw)]);
    encoded.collect()
}

/// The paper's own.
const CACHEGEN_STEPS: f32 = 1.0;
/// Far from where a ninth of it, or its reciprocal, is no number any more.
pub(crate) const SMALLEST_STEP: f32 = 1e-30;
/// Of keys and of values. Attention takes the error of a key through an exponential, that of a
/// value as it is: on the model that ships with the project, keys are worth a third of the
/// step of values.
pub(crate) const DEFAULT_STEPS: [f32; 2] = [1.35, 4.5];
