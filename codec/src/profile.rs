//! What is known of a model's keys and values beforehand: a basis, and what to expect in it.
//!
//! Channels of a head, and heads of a layer, say much the same. A profile has, for every
//! layer, plane and group of heads that share cells, the basis in which they do not, the mean
//! of every channel, and how far each coefficient lies from it. So a chunk need not say these,
//! and its coefficients take fewer bits than its channels would. It also says what errors in
//! each layer's keys and values are worth: the unit that steps are a multiple of.
//!
//! Errors in some directions do more harm than in others: queries hardly look along some of
//! those of keys, and what the output projection does not pass on of values is lost anyway.
//! All coefficients have one step, so a basis is to be one in which errors do the same harm
//! along each: the eigenvectors of the covariance, not of channels, but of channels times a
//! root of that metric. Only where the metric is the identity is it orthonormal, a
//! Karhunen–Loève transform. So there are two matrices, one for each way; a calibration
//! chooses them, the format does not care.
//!
//! ```text
//! profile := magic "KVPROFIL" ‖ version (u16) ‖ layers (u16) ‖ heads (u16) ‖
//!            channels of a key (u16) ‖ of a value (u16) ‖ pairing (u8) ‖ 0 (u8) ‖
//!            layer × plane × { unit (f32) ‖ group × basis } ‖ CRC-64/NVME of all before (u64)
//! basis   := means (f32 …) ‖ deviations (f32 …) ‖ analysis (f16 …) ‖ synthesis (f16 …)
//! ```
//!
//! A coefficient is the product of its row of the analysis with the channels less their
//! means; channels are their means and the sum of rows of the synthesis, each times its
//! coefficient. Rows follow each other. Keys are those before RoPE; the pairing is 0 where there is none, 1 for halves, 2 for neighbours. All integers are
//! little-endian. A plane without channels has no unit.
//!
//! Its name is the BLAKE3 digest of its bytes, which the prelude of every chunk has that was
//! encoded with it: [`Prelude::profile`](crate::Prelude::profile).

#![deny(clippy::indexing_slicing)]

use crc_fast::CrcAlgorithm;
use half::f16;
use kvasir_types::{KvLayout, LayerIdx, Plane};

use crate::cell::MAX_WIDTH;
use crate::channels::Quantiser;
use crate::classes::{RATIOS, ZERO};
use crate::layer::heads_of_a_group;
use crate::rans::LANES;
use crate::rotation::Pairing;
use crate::transform;

/// A basis for each layer, plane and group of heads.
pub struct Profile {
    shape: ProfileShape,
    planes: Vec<ProfilePlane>,
    bytes: Vec<u8>,
    digest: [u8; 32],
}

/// What a profile is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfileShape {
    /// Layers of the model.
    pub layers: u16,
    /// KV heads.
    pub kv_heads: u16,
    /// Channels of a head, of keys and of values; 0 for a plane that is not there.
    pub dims: [u16; 2],
    /// How RoPE pairs the channels of keys, if it turns them.
    pub pairing: Option<Pairing>,
}

/// One plane of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct ProfilePlane {
    /// What a step of 1 is of this plane.
    pub unit: f32,
    /// By group of heads.
    pub bases: Vec<ProfileBasis>,
}

/// The basis of some heads.
#[derive(Clone, Debug, PartialEq)]
pub struct ProfileBasis {
    /// Of each channel.
    pub means: Vec<f32>,
    /// Of each coefficient.
    pub deviations: Vec<f32>,
    /// What takes channels to coefficients: a row of channels for each coefficient.
    pub analysis: Vec<f16>,
    /// What takes them back: a row of channels for each coefficient.
    pub synthesis: Vec<f16>,
    /// What takes rows of channels to coefficients, and back.
    matrices: [Vec<f32>; 2],
    /// Means, padded.
    padded: Vec<f32>,
}

/// What a layer of a profile is: planes that have channels.
#[derive(Clone, Copy, Debug)]
pub struct LayerProfile<'a> {
    planes: &'a [ProfilePlane],
    shape: &'a ProfileShape,
}

/// Why there is no such profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// These are no bytes of a profile.
    #[error("not a profile")]
    Magic,
    /// Of a version that this reader does not know.
    #[error("a profile of version {0}; upgrade the reader")]
    Version(u16),
    /// Cut short, or too long.
    #[error("a profile of {actual} bytes, expected {expected}")]
    Length {
        /// Bytes of a profile of its shape.
        expected: u64,
        /// Bytes given.
        actual: u64,
    },
    /// It fails its checksum.
    #[error("a profile is damaged")]
    Checksum,
    /// No model is like this, or planes and bases are not those of the shape.
    #[error("a profile of no model")]
    Shape,
    /// A unit or a deviation is not positive, or a number is none.
    #[error("a profile holds what is no number, or not positive")]
    Number,
}

impl ProfileShape {
    /// Of a model whose chunks have this layout.
    pub fn of(layout: &KvLayout, pairing: Option<Pairing>) -> Self {
        let row = layout.tokens() as usize * layout.dtype().bytes();
        let dim = |plane| u16::try_from(layout.head_bytes(plane) / row).unwrap_or(u16::MAX);
        Self {
            layers: layout.layers(),
            kv_heads: layout.kv_heads(),
            dims: [dim(Plane::Key), dim(Plane::Value)],
            pairing,
        }
    }

    /// Heads that share a basis, by plane.
    pub fn heads_per_basis(&self) -> [u16; 2] {
        self.dims
            .map(|dim| heads_of_a_group(self.kv_heads, usize::from(dim).max(1)))
    }

    /// By layer and plane that is there: how many bases, and of how many channels.
    fn planes(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let Self { layers, dims, .. } = *self;
        let heads = usize::from(self.kv_heads);
        let per_basis = self.heads_per_basis().map(usize::from);
        let planes = dims.into_iter().zip(per_basis);
        let planes = planes.map(move |(dim, per)| (heads / per.max(1), per * usize::from(dim)));
        let planes: Vec<_> = planes.filter(|&(_, channels)| channels > 0).collect();
        (0..layers).flat_map(move |_| planes.clone())
    }

    fn is_sane(&self) -> bool {
        let [key, value] = self.dims.map(usize::from);
        let some = self.layers > 0 && self.kv_heads > 0 && key.max(value) > 0;
        some && key.max(value) <= MAX_WIDTH
    }

    /// Bytes of a profile.
    fn bytes(&self) -> u64 {
        let plane = |(bases, channels): (usize, usize)| {
            let basis = 2 * 4 * channels + 2 * 2 * channels * channels;
            (4 + bases * basis) as u64
        };
        let planes = self.planes().map(plane).sum::<u64>();
        (HEADER_BYTES + CHECKSUM_BYTES) as u64 + planes
    }
}

impl ProfileBasis {
    /// Of these numbers, with matrices rounded to 16 bits.
    pub fn new(means: Vec<f32>, deviations: Vec<f32>, analysis: &[f32], synthesis: &[f32]) -> Self {
        let rounded = |matrix: &[f32]| -> Vec<f16> {
            let numbers = matrix.iter().map(|&number| f16::from_f32(number));
            numbers.collect()
        };
        let (analysis, synthesis) = (rounded(analysis), rounded(synthesis));
        let channels = means.len();
        let width = channels.next_multiple_of(LANES);
        let mut matrices = [vec![0.0; width * width], vec![0.0; width * width]];
        let rows = analysis.chunks_exact(channels.max(1));
        let rows = rows.zip(synthesis.chunks_exact(channels.max(1)));
        for (coefficient, (analysis, synthesis)) in rows.take(channels).enumerate() {
            for (channel, (to, from)) in analysis.iter().zip(synthesis).enumerate() {
                let [forward, inverse] = &mut matrices;
                if let Some(place) = forward.get_mut(channel * width + coefficient) {
                    *place = to.to_f32();
                }
                if let Some(place) = inverse.get_mut(coefficient * width + channel) {
                    *place = from.to_f32();
                }
            }
        }
        let mut padded = means.clone();
        padded.resize(width, 0.0);
        Self {
            means,
            deviations,
            analysis,
            synthesis,
            matrices,
            padded,
        }
    }

    fn is_whole(&self, channels: usize) -> bool {
        let lists = [&self.means, &self.deviations];
        let matrices = [&self.analysis, &self.synthesis];
        let square = channels * channels;
        lists.iter().all(|list| list.len() == channels)
            && matrices.iter().all(|matrix| matrix.len() == square)
    }

    fn is_sane(&self) -> bool {
        let positive = |number: &f32| number.is_normal() && *number > 0.0;
        self.means.iter().all(|mean| mean.is_finite())
            && self.deviations.iter().all(positive)
            && self.analysis.iter().all(|number| number.is_finite())
            && self.synthesis.iter().all(|number| number.is_finite())
    }

    fn write(&self, out: &mut Vec<u8>) {
        for list in [&self.means, &self.deviations] {
            out.extend(list.iter().flat_map(|number| number.to_le_bytes()));
        }
        for matrix in [&self.analysis, &self.synthesis] {
            out.extend(matrix.iter().flat_map(|number| number.to_le_bytes()));
        }
    }

    /// Coefficients of rows of padded channels.
    pub(crate) fn project(&self, rows: &[f32], coefficients: &mut Vec<f32>) {
        let width = self.padded.len();
        let mut centred = rows.to_vec();
        for row in centred.chunks_exact_mut(width) {
            for (value, mean) in row.iter_mut().zip(&self.padded) {
                *value -= mean;
            }
        }
        coefficients.clear();
        coefficients.resize(rows.len(), 0.0);
        let [forward, _] = &self.matrices;
        transform::multiply(&centred, forward, &vec![0.0; width], coefficients);
    }

    /// Rows of channels from rows of coefficients, less some that are the same everywhere:
    /// those went into `origin`.
    pub(crate) fn restore(&self, coefficients: &[f32], origin: &[f32], rows: &mut [f32]) {
        let [_, inverse] = &self.matrices;
        transform::multiply(coefficients, inverse, origin, rows);
    }

    /// The row of channels that coefficients of `offsets` stand for.
    pub(crate) fn origin(&self, offsets: &[f32]) -> Vec<f32> {
        let mut origin = self.padded.clone();
        if offsets.iter().any(|&offset| offset != 0.0) {
            self.restore(offsets, &self.padded, &mut origin);
        }
        origin
    }

    /// What coefficients are expected to be like.
    pub(crate) fn quantiser(&self, step: f32) -> Quantiser {
        let width = self.padded.len();
        let mut classes = vec![ZERO; width];
        for (class, deviation) in classes.iter_mut().zip(&self.deviations) {
            *class = class_of(deviation / step);
        }
        Quantiser {
            step,
            offsets: vec![0.0; width],
            classes,
        }
    }
}

/// The class whose ratio is nearest, by comparisons alone: the same on all machines.
fn class_of(ratio: f32) -> u8 {
    let ratios = RATIOS.get(..usize::from(ZERO)).unwrap_or(&[]).windows(2);
    let before = ratios.take_while(|pair| match pair {
        [a, b] => ratio * ratio > a * b,
        _ => false,
    });
    u8::try_from(before.count()).unwrap_or(0)
}

impl Profile {
    /// Of planes in the order of layers, keys before values, without those that are not there.
    ///
    /// # Errors
    /// [`ProfileError::Shape`] and [`ProfileError::Number`].
    pub fn new(shape: ProfileShape, planes: Vec<ProfilePlane>) -> Result<Self, ProfileError> {
        if !shape.is_sane() || planes.len() != shape.planes().count() {
            return Err(ProfileError::Shape);
        }
        for ((bases, channels), plane) in shape.planes().zip(&planes) {
            let whole = plane.bases.iter().all(|basis| basis.is_whole(channels));
            if plane.bases.len() != bases || !whole {
                return Err(ProfileError::Shape);
            }
            let unit = plane.unit.is_normal() && plane.unit > 0.0;
            if !unit || !plane.bases.iter().all(ProfileBasis::is_sane) {
                return Err(ProfileError::Number);
            }
        }
        let mut bytes = Vec::from(MAGIC);
        let [key, value] = shape.dims;
        for number in [VERSION, shape.layers, shape.kv_heads, key, value] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let pairing = match shape.pairing {
            None => 0,
            Some(Pairing::Halves) => 1,
            Some(Pairing::Neighbours) => 2,
        };
        bytes.extend_from_slice(&[pairing, 0]);
        for plane in &planes {
            bytes.extend_from_slice(&plane.unit.to_le_bytes());
            plane.bases.iter().for_each(|basis| basis.write(&mut bytes));
        }
        let sum = crc_fast::checksum(CrcAlgorithm::Crc64Nvme, &bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        let digest = blake3::hash(&bytes).into();
        Ok(Self {
            shape,
            planes,
            bytes,
            digest,
        })
    }

    /// Reads a profile.
    ///
    /// # Errors
    /// Every truncation, all damage but 2^-64 of it, and what is of no model. Nothing is
    /// allocated before the length is known to be right.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProfileError> {
        let (shape, rest) = Self::open(bytes)?;
        let mut reader = Reader { rest };
        let planes = shape.planes().map(|(bases, channels)| {
            let [unit] = reader.floats(1).try_into().unwrap_or([0.0]);
            let bases = (0..bases).map(|_| {
                let [means, deviations] = [(); 2].map(|()| reader.floats(channels));
                let matrices = [(); 2].map(|()| reader.halves(channels * channels));
                let [analysis, synthesis] = &matrices;
                ProfileBasis::new(means, deviations, analysis, synthesis)
            });
            ProfilePlane {
                unit,
                bases: bases.collect(),
            }
        });
        let planes = planes.collect();
        Self::new(shape, planes)
    }

    /// What a profile is of, for who only keeps it: checks all that [`parse`](Self::parse)
    /// does but its numbers, and takes no memory.
    ///
    /// # Errors
    /// As for [`parse`](Self::parse), without [`ProfileError::Number`].
    pub fn verify(bytes: &[u8]) -> Result<ProfileShape, ProfileError> {
        Self::open(bytes).map(|(shape, _)| shape)
    }

    /// What a profile is of, and what follows its header.
    fn open(bytes: &[u8]) -> Result<(ProfileShape, &[u8]), ProfileError> {
        let (magic, rest) = bytes.split_first_chunk().ok_or(ProfileError::Magic)?;
        if *magic != MAGIC {
            return Err(ProfileError::Magic);
        }
        let short = ProfileError::Length {
            expected: HEADER_BYTES as u64,
            actual: bytes.len() as u64,
        };
        let (header, rest) = rest.split_first_chunk::<12>().ok_or(short)?;
        let &[v0, v1, l0, l1, h0, h1, k0, k1, w0, w1, pairing, zero] = header;
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(ProfileError::Version(version));
        }
        let shape = ProfileShape {
            layers: u16::from_le_bytes([l0, l1]),
            kv_heads: u16::from_le_bytes([h0, h1]),
            dims: [[k0, k1], [w0, w1]].map(u16::from_le_bytes),
            pairing: match pairing {
                0 => None,
                1 => Some(Pairing::Halves),
                2 => Some(Pairing::Neighbours),
                _ => return Err(ProfileError::Shape),
            },
        };
        if zero != 0 || !shape.is_sane() {
            return Err(ProfileError::Shape);
        }
        let (expected, actual) = (shape.bytes(), bytes.len() as u64);
        if expected != actual {
            return Err(ProfileError::Length { expected, actual });
        }
        let (body, sum) = bytes.split_last_chunk().ok_or(ProfileError::Checksum)?;
        if crc_fast::checksum(CrcAlgorithm::Crc64Nvme, body) != u64::from_le_bytes(*sum) {
            return Err(ProfileError::Checksum);
        }
        Ok((shape, rest))
    }

    /// As a file; [`parse`](Self::parse) is the opposite.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// BLAKE3 of its bytes.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// What it is of.
    pub fn shape(&self) -> &ProfileShape {
        &self.shape
    }

    /// By layer and plane.
    pub fn planes(&self) -> &[ProfilePlane] {
        &self.planes
    }

    /// Whether chunks of `layout`, whose keys are paired like this, can be coded with it.
    pub fn fits(&self, layout: &KvLayout, pairing: Option<Pairing>) -> bool {
        self.shape == ProfileShape::of(layout, pairing)
    }

    /// What it has for a layer; `None` where there is none.
    pub fn layer(&self, layer: LayerIdx) -> Option<LayerProfile<'_>> {
        let per_layer = self.planes.len() / usize::from(self.shape.layers);
        let planes = self.planes.chunks_exact(per_layer).nth(layer.0.into())?;
        Some(LayerProfile {
            planes,
            shape: &self.shape,
        })
    }
}

impl std::fmt::Debug for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Profile")
            .field("shape", &self.shape)
            .field("digest", &blake3::Hash::from(self.digest).to_hex().as_str())
            .finish_non_exhaustive()
    }
}

impl PartialEq for Profile {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl<'a> LayerProfile<'a> {
    /// What a step of 1 is, of each plane that is there.
    pub fn units(&self) -> impl Iterator<Item = f32> + use<'a> {
        self.planes.iter().map(|plane| plane.unit)
    }

    pub(crate) fn shape(&self) -> &'a ProfileShape {
        self.shape
    }

    /// Of a group of a plane, as cells count them.
    pub(crate) fn basis(&self, plane: usize, group: usize) -> Option<&'a ProfileBasis> {
        self.planes.get(plane)?.bases.get(group)
    }
}

/// Of bytes whose length was checked.
struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn take(&mut self, bytes: usize) -> &[u8] {
        let (taken, rest) = self.rest.split_at_checked(bytes).unwrap_or_default();
        self.rest = rest;
        taken
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        let (numbers, _) = self.take(4 * count).as_chunks();
        numbers.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }

    fn halves(&mut self, count: usize) -> Vec<f32> {
        let (numbers, _) = self.take(2 * count).as_chunks();
        let halves = numbers.iter().map(|&b| f16::from_le_bytes(b));
        halves.map(f16::to_f32).collect()
    }
}

const MAGIC: [u8; 8] = *b"KVPROFIL";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 8 + 12;
const CHECKSUM_BYTES: usize = 8;
