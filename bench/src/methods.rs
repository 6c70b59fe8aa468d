//! Ways to code the KV of a chunk: our own, and its peers, behind one face.
//!
//! A method takes a chunk's raw layers and gives bytes; everything that a decoder needs
//! besides what an object's header says (layout, model, position) is in these bytes and
//! counted. Decoding gives raw layers again. Suites `codec` and `quality` measure the same
//! bytes.
//!
//! # Names
//! `METHOD` or `METHOD:VARIANT`; METHOD alone is the variant that stands for it.
//!
//! - `kvasir:L1`, `kvasir:s2-L1`, `kvasir:s2k0.5-L1`: our codec at a level, where level 0
//!   has a step of so many (default [`STEP`]) deviations of the layer's plane, and keys one
//!   of `k` times that; `kvasir` is `kvasir:L1`. After `-`, `klt` puts a Karhunen–Loève
//!   transform before it: `-klthead` per head, `-kltlayer` per layer, `-kltall` over all
//!   layers, `-kltflat` the same without weighing them; see [`klt`]. These measure what a profile could gain and do not ship.
//!   `kvasir:profile-L1`: what ships, with a profile of the model, see [`calibration`]; steps
//!   are in its units.
//! - `int8`, `int4-hadamard`: fixed rate, for pages; `kvasir_codec::FixedCodec`.
//! - `zstd-planes`: byte planes under zstd, exact, of bf16 (`zstd-planes:f16`: of f16).
//! - `cachegen`: as its paper has it; `cachegen:x2` with steps twice as large.
//!   `cachegen-circulated`: as its code circulates; `:L1` its coarse level, `:L3` its fine one.
//! - `kivi4`, `kivi2`: see [`kivi`]; `:r128` keeps the last 128 tokens of every chunk.
//! - `turboquant4`, `turboquant3`: see [`turboquant`].
//! - `kvtc:B`, at a budget of B bits a value before DEFLATE, in places of `2`; see [`kvtc`].
//! - `raw`: f16 as it is, what rounding to it costs.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, ensure};
use kvasir_codec::{CirculatedLevel, FixedRate, Pairing, Profile, Rotation};
use kvasir_engine::ModelConfig;
use kvasir_engine::rope::Frequencies;
use kvasir_types::{DType, KvLayout, Planes};

use crate::quality::reader::Kv;

mod cachegen;
pub(crate) mod calibration;
mod frame;
mod kivi;
mod klt;
mod kvtc;
mod metric;
mod ours;
mod simple;
mod table;
mod turboquant;

pub(crate) use ours::{Kvasir, Variant};

/// The step of level 0 of `kvasir` in deviations, where a name says none.
pub(crate) const STEP: f32 = 3.0;
/// Tokens at the start of a context that methods with protection keep as they are.
pub(crate) const PROTECTED: usize = 4;

/// KV of consecutive tokens, as an engine hands it over.
#[derive(Clone, Debug)]
pub(crate) struct Chunk {
    pub(crate) layout: KvLayout,
    /// Position of the first token.
    pub(crate) start: u64,
    /// Raw layers.
    pub(crate) layers: Vec<Vec<u8>>,
}

/// What a method made of a chunk: parts, of which the bytes count.
pub(crate) type Parts = Vec<Vec<u8>>;

/// Codes chunks.
pub(crate) trait Coder: Send + Sync {
    /// Parts from which a chunk of the same layout and position is decoded.
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts>;

    /// Fills the layers of `chunk`; what they held before is lost.
    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()>;

    /// Tokens at the start of a context that are kept as they are.
    fn protected(&self) -> usize {
        0
    }
}

/// What methods need to know of a model.
#[derive(Debug)]
pub(crate) struct Geometry {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    frequencies: Frequencies,
    rotations: Mutex<BTreeMap<(u64, u32), Arc<Rotation>>>,
}

/// A method and its variant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Spec {
    Raw,
    Kvasir(ours::Variant),
    Int8,
    Int4Hadamard,
    ZstdPlanes(DType),
    /// With steps so many times those of the paper.
    CacheGen(f32),
    Circulated(CirculatedLevel),
    /// Bits, and tokens that stay as they are.
    Kivi(u32, usize),
    TurboQuant(u32),
    /// Bits a value before DEFLATE.
    Kvtc(f64),
}

/// What methods with a profile are made from: KV of contexts that no question is about.
#[derive(Debug, Default)]
pub(crate) struct Training {
    chunks: Vec<Chunk>,
    /// What steps are multiplied by, by layer and plane, where a variant asks for it.
    factors: Option<Vec<[f32; 2]>>,
    /// For variants that ask for it.
    profile: Option<Arc<Profile>>,
    kvtc: Mutex<Option<Arc<kvtc::Profile>>>,
    bases: Mutex<BTreeMap<(ours::Transform, bool), Arc<klt::Bases>>>,
}

impl Training {
    pub(crate) fn new(chunks: Vec<Chunk>) -> Self {
        Self {
            chunks,
            ..Self::default()
        }
    }

    fn kvtc(&self, geometry: &Geometry) -> anyhow::Result<Arc<kvtc::Profile>> {
        let mut known = self.kvtc.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*known {
            return Ok(Arc::clone(known));
        }
        let new = Arc::new(kvtc::Profile::new(&self.chunks, geometry)?);
        *known = Some(Arc::clone(&new));
        Ok(new)
    }

    /// With these factors for variants that ask for them.
    pub(crate) fn allocated(self, factors: Option<Vec<[f32; 2]>>) -> Self {
        Self { factors, ..self }
    }

    /// With a profile for variants that ask for it.
    pub(crate) fn with_profile(self, profile: Option<Arc<Profile>>) -> Self {
        Self { profile, ..self }
    }

    /// By layer and plane.
    fn factors(&self, variant: Variant, geometry: &Geometry) -> anyhow::Result<Vec<[f32; 2]>> {
        if !variant.allocated {
            return Ok(vec![[1.0; 2]; geometry.layers]);
        }
        let factors = self.factors.clone().context("pass --allocation")?;
        ensure!(
            factors.len() == geometry.layers,
            "--allocation is of another model"
        );
        Ok(factors)
    }

    fn bases(
        &self,
        transform: ours::Transform,
        variant: Variant,
        geometry: &Geometry,
    ) -> anyhow::Result<Arc<klt::Bases>> {
        let factors = self.factors(variant, geometry)?;
        let transform = (transform, variant.allocated);
        let mut known = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.get(&transform) {
            return Ok(Arc::clone(known));
        }
        let new = Arc::new(klt::Bases::new(
            transform.0,
            &factors,
            &self.chunks,
            geometry,
        )?);
        known.insert(transform, Arc::clone(&new));
        Ok(new)
    }
}

/// What `codecs` stands for.
pub(crate) const CODECS: [&str; 24] = [
    "raw",
    "zstd-planes",
    "int8",
    "int4-hadamard",
    "cachegen",
    "cachegen:x2",
    "cachegen-circulated:L1",
    "cachegen-circulated",
    "cachegen-circulated:L3",
    "kivi4",
    "kivi2",
    "turboquant4",
    "turboquant3",
    "kvtc:4",
    "kvtc:3",
    "kvtc",
    "kvtc:1.5",
    "kvtc:1",
    "kvasir:L0",
    "kvasir",
    "kvasir:L2",
    "kvasir:s2-L0",
    "kvasir:s2-L1",
    "kvasir:s2-L2",
];

/// No method has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no method is called {0}; there are raw, kvasir, int8, int4-hadamard, zstd-planes, cachegen, \
     cachegen-circulated, kivi4, kivi2, turboquant4, turboquant3, kvtc; see bench/src/methods.rs"
)]
pub(crate) struct UnknownMethod(String);

impl Geometry {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Self {
            layers: config.layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            frequencies: config.rope.frequencies(config.head_dim),
            rotations: Mutex::default(),
        }
    }

    /// The same for a model without its rotations.
    fn unturned(&self) -> Self {
        Self {
            frequencies: self.frequencies.clone(),
            rotations: Mutex::default(),
            ..*self
        }
    }

    pub(crate) fn layout(&self, tokens: usize, dtype: DType) -> anyhow::Result<KvLayout> {
        KvLayout::new(
            u16::try_from(self.layers)?,
            u16::try_from(self.kv_heads)?,
            Planes::symmetric(u16::try_from(self.head_dim)?),
            u32::try_from(tokens)?,
            dtype,
        )
        .context("the layout of a chunk")
    }

    /// How the keys of a chunk were turned; made once.
    pub(crate) fn rotation(&self, start: u64, tokens: u32) -> Arc<Rotation> {
        let mut known = self
            .rotations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Frequencies {
            radians,
            attention_factor,
        } = &self.frequencies;
        let new = || Rotation::new(radians, Pairing::Halves, *attention_factor, start, tokens);
        Arc::clone(
            known
                .entry((start, tokens))
                .or_insert_with(|| Arc::new(new())),
        )
    }
}

impl Spec {
    /// As in the rows of a report.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Raw => "raw".to_owned(),
            Self::Kvasir(variant) => variant.name(),
            Self::Int8 => "int8".to_owned(),
            Self::Int4Hadamard => "int4-hadamard".to_owned(),
            Self::ZstdPlanes(DType::F16) => "zstd-planes:f16".to_owned(),
            Self::ZstdPlanes(_) => "zstd-planes".to_owned(),
            Self::CacheGen(coarser) if coarser.to_bits() == 1f32.to_bits() => "cachegen".to_owned(),
            Self::CacheGen(coarser) => format!("cachegen:x{coarser}"),
            Self::Circulated(CirculatedLevel::Coarse) => "cachegen-circulated:L1".to_owned(),
            Self::Circulated(CirculatedLevel::Default) => "cachegen-circulated".to_owned(),
            Self::Circulated(CirculatedLevel::Fine) => "cachegen-circulated:L3".to_owned(),
            Self::Kivi(bits, 0) => format!("kivi{bits}"),
            Self::Kivi(bits, residual) => format!("kivi{bits}:r{residual}"),
            Self::TurboQuant(bits) => format!("turboquant{bits}"),
            Self::Kvtc(budget) if budget.to_bits() == 2f64.to_bits() => "kvtc".to_owned(),
            Self::Kvtc(budget) => format!("kvtc:{budget}"),
        }
    }

    /// Which type of number the method takes.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::ZstdPlanes(dtype) => *dtype,
            _ => DType::F16,
        }
    }

    /// Whether it is made for a model, from KV that the model computed.
    pub(crate) fn is_calibrated(&self) -> bool {
        match self {
            Self::Kvasir(variant) => variant.transform.is_some(),
            Self::Kvtc(_) => true,
            _ => false,
        }
    }

    /// The method, ready to code chunks of a model.
    pub(crate) fn coder(
        &self,
        geometry: &Arc<Geometry>,
        training: &Training,
    ) -> anyhow::Result<Box<dyn Coder>> {
        Ok(match self {
            Self::Raw => Box::new(simple::Raw),
            Self::Kvasir(
                variant @ Variant {
                    transform: Some(transform),
                    ..
                },
            ) => Box::new(klt::Transformed {
                variant: *variant,
                geometry: Arc::clone(geometry),
                factors: training.factors(*variant, geometry)?,
                bases: training.bases(*transform, *variant, geometry)?,
            }),
            Self::Kvasir(variant) => {
                let factors = training.factors(*variant, geometry)?;
                let mut profile = None;
                if variant.profile {
                    profile = Some(training.profile.clone().context("pass --profile")?);
                }
                let coder = Kvasir::new(*variant, geometry).times(&factors);
                Box::new(coder.with_profile(profile))
            }
            Self::Int8 => Box::new(simple::Fixed(FixedRate::Int8)),
            Self::Int4Hadamard => Box::new(simple::Fixed(FixedRate::Int4Hadamard)),
            Self::ZstdPlanes(_) => Box::new(simple::ZstdPlanes),
            Self::CacheGen(coarser) => Box::new(cachegen::Published(*coarser)),
            Self::Circulated(level) => Box::new(cachegen::Circulated(*level)),
            &Self::Kivi(bits, residual) => Box::new(kivi::Kivi { bits, residual }),
            Self::TurboQuant(bits) => Box::new(turboquant::TurboQuant::new(*bits, geometry)),
            Self::Kvtc(budget) => {
                let profile = training.kvtc(geometry)?;
                Box::new(kvtc::Kvtc::new(&profile, *budget, geometry))
            }
        })
    }
}

impl FromStr for Spec {
    type Err = UnknownMethod;

    fn from_str(name: &str) -> Result<Self, UnknownMethod> {
        let unknown = || UnknownMethod(name.to_owned());
        let (method, variant) = name.split_once(':').unwrap_or((name, ""));
        match (method, variant) {
            ("raw", "") => Ok(Self::Raw),
            ("kvasir", _) => ours::Variant::parse(variant)
                .map(Self::Kvasir)
                .ok_or_else(unknown),
            ("int8", "") => Ok(Self::Int8),
            ("int4-hadamard", "") => Ok(Self::Int4Hadamard),
            ("zstd-planes", "") => Ok(Self::ZstdPlanes(DType::Bf16)),
            ("zstd-planes", "f16") => Ok(Self::ZstdPlanes(DType::F16)),
            ("cachegen", "") => Ok(Self::CacheGen(1.0)),
            ("cachegen", _) => {
                let coarser = variant
                    .strip_prefix('x')
                    .and_then(|x| x.parse::<f32>().ok());
                let coarser = coarser.filter(|x| x.is_normal() && *x > 0.0);
                coarser.map(Self::CacheGen).ok_or_else(unknown)
            }
            ("cachegen-circulated", "L1") => Ok(Self::Circulated(CirculatedLevel::Coarse)),
            ("cachegen-circulated", "") => Ok(Self::Circulated(CirculatedLevel::Default)),
            ("cachegen-circulated", "L3") => Ok(Self::Circulated(CirculatedLevel::Fine)),
            ("kivi4" | "kivi2", _) => {
                let residual = match variant.strip_prefix('r') {
                    Some(residual) => residual.parse().ok(),
                    None => variant.is_empty().then_some(0),
                };
                let bits = if method == "kivi4" { 4 } else { 2 };
                let kivi = residual.map(|residual| Self::Kivi(bits, residual));
                kivi.ok_or_else(unknown)
            }
            ("turboquant4", "") => Ok(Self::TurboQuant(4)),
            ("turboquant3", "") => Ok(Self::TurboQuant(3)),
            ("kvtc", "") => Ok(Self::Kvtc(2.0)),
            ("kvtc", _) => {
                let budget = variant.parse::<f64>().ok().filter(|b| *b > 0.0);
                budget.map(Self::Kvtc).ok_or_else(unknown)
            }
            _ => Err(unknown()),
        }
    }
}

impl Chunk {
    /// From what a model computed.
    pub(crate) fn of(
        kv: &Kv,
        geometry: &Geometry,
        start: usize,
        dtype: DType,
    ) -> anyhow::Result<Self> {
        let layers = kv.layers.iter().map(|layer| to_raw(dtype, layer)).collect();
        Ok(Self {
            layout: geometry.layout(kv.tokens, dtype)?,
            start: start as u64,
            layers,
        })
    }

    /// Of the same layout and position, without contents.
    pub(crate) fn empty(&self) -> Self {
        Self {
            layers: vec![vec![0; self.layout.layer_bytes()]; self.layers.len()],
            ..*self
        }
    }

    /// As a model reads it.
    pub(crate) fn to_kv(&self) -> Kv {
        let dtype = self.layout.dtype();
        Kv {
            tokens: self.layout.tokens() as usize,
            layers: self
                .layers
                .iter()
                .map(|layer| from_raw(dtype, layer))
                .collect(),
        }
    }

    /// Values in it.
    pub(crate) fn values(&self) -> usize {
        self.layers.len() * self.layout.layer_bytes() / self.layout.dtype().bytes()
    }
}

/// Numbers of a type, from f32.
pub(crate) fn to_raw(dtype: DType, values: &[f32]) -> Vec<u8> {
    let values = values.iter();
    match dtype {
        DType::F16 => values
            .flat_map(|&value| half::f16::from_f32(value).to_le_bytes())
            .collect(),
        DType::Bf16 => values
            .flat_map(|&value| half::bf16::from_f32(value).to_le_bytes())
            .collect(),
        _ => values.flat_map(|value| value.to_le_bytes()).collect(),
    }
}

/// The opposite.
pub(crate) fn from_raw(dtype: DType, raw: &[u8]) -> Vec<f32> {
    let halves = raw.as_chunks().0.iter();
    match dtype {
        DType::F16 => halves
            .map(|&half| half::f16::from_le_bytes(half).to_f32())
            .collect(),
        DType::Bf16 => halves
            .map(|&half| half::bf16::from_le_bytes(half).to_f32())
            .collect(),
        _ => {
            let numbers = raw.as_chunks().0.iter();
            numbers.map(|&number| f32::from_le_bytes(number)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in [
            "raw",
            "kvasir",
            "kvasir:L0",
            "kvasir:s2-L2",
            "kvasir:s1.5k0.5-L1",
            "int8",
            "int4-hadamard",
            "zstd-planes",
            "zstd-planes:f16",
            "kvasir:s2-L0-kltall",
            "kvasir:profile-L0",
            "kvasir:profile-s2k0.5-L1-alloc",
            "kvasir:L1-klthead",
            "kvasir:s1-L0-alloc",
            "kvasir:s1k2-L0-kltall-alloc",
            "cachegen",
            "cachegen:x1.5",
            "cachegen-circulated:L3",
            "kivi2",
            "kivi4:r128",
            "turboquant3",
            "kvtc",
            "kvtc:1.5",
        ] {
            assert_eq!(name.parse::<Spec>().unwrap().name(), name);
        }
        for name in [
            "",
            "kvasir:L3",
            "kvasir:s-L1",
            "int8:x",
            "kvasir:s0-L1",
            "kvtc:0",
            "kivi3",
        ] {
            assert!(name.parse::<Spec>().is_err(), "{name}");
        }
    }
}
