//! What decoding an encoded chunk takes besides the bytes of its layers.
//!
//! ```text
//! prelude := { tag (u16) ‖ length (u32) ‖ bytes }*       by ascending tag
//! ```
//!
//! | tag | bytes |
//! |---|---|
//! | 0x8001 | rotation: pairing (`u8`: 0 halves, 1 neighbours), 3 zeros, factor (`f32`), position of the first token (`u64`), radians a token of each pair (`f32` …) |
//! | 0x8002 | tokens at the start that are exact (`u32`) |
//! | 0x8003 | digest of the profile (32 bytes) |
//! | 0x0001 | digest of the model (32 bytes) |
//! | 0x0002 | digest of the tokens (32 bytes) |
//!
//! A tag with bit 15 is critical: a reader that does not know it cannot decode the chunk,
//! and says so. Others are skipped. All integers are little-endian.

#![deny(clippy::indexing_slicing)]

use kvasir_types::{KvLayout, Plane};

use crate::rotation::{Pairing, Rotation};

/// What decoding an encoded chunk takes besides the bytes of its layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prelude {
    /// How its keys were turned; `None` where they were not.
    pub rotation: Option<KeyRotation>,
    /// Tokens at its start that are exact at every level.
    pub exact_tokens: u32,
    /// The profile that it was encoded with, if any.
    pub profile: Option<[u8; 32]>,
    /// The model, for who finds the chunk without its key's origin.
    pub model: Option<[u8; 32]>,
    /// The tokens, likewise.
    pub tokens: Option<[u8; 32]>,
}

/// The rotary position embedding of a chunk's keys. Any kind of RoPE is described by the
/// angles per position that it ends up with.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyRotation {
    /// Which channels form pairs.
    pub pairing: Pairing,
    /// What lengths were multiplied by: the attention factor of YaRN, else 1.
    pub factor: f32,
    /// Position of the chunk's first token.
    pub start: u64,
    /// By pair, radians a token.
    pub frequencies: Vec<f32>,
}

/// Why bytes are not a prelude.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PreludeError {
    /// A section ends beyond the prelude, or has not the bytes that it should.
    #[error("section {0:#06x} of the prelude is cut short, or too long")]
    Length(u16),
    /// Sections come once each, by their tags.
    #[error("section {0:#06x} of the prelude is out of order")]
    Order(u16),
    /// Written by a newer version, for readers that know more.
    #[error("the prelude has a critical section {0:#06x}; upgrade the reader")]
    Critical(u16),
    /// No rotation is like this.
    #[error("the prelude describes a rotation that is none")]
    Rotation,
    /// More exact tokens than there are.
    #[error("{0} tokens would be exact, of fewer")]
    ExactTokens(u32),
}

impl KeyRotation {
    /// The angles of so many tokens.
    pub fn angles(&self, tokens: u32) -> Rotation {
        let Self {
            pairing,
            factor,
            start,
            frequencies,
        } = self;
        Rotation::new(frequencies, *pairing, *factor, *start, tokens)
    }

    fn encode(&self) -> Vec<u8> {
        let pairing = match self.pairing {
            Pairing::Halves => 0,
            Pairing::Neighbours => 1,
        };
        let mut out = vec![pairing, 0, 0, 0];
        out.extend_from_slice(&self.factor.to_le_bytes());
        out.extend_from_slice(&self.start.to_le_bytes());
        let frequencies = self.frequencies.iter();
        out.extend(frequencies.flat_map(|frequency| frequency.to_le_bytes()));
        out
    }

    fn parse(bytes: &[u8]) -> Result<Self, PreludeError> {
        let error = PreludeError::Rotation;
        let (kind, rest) = bytes.split_first_chunk().ok_or(error)?;
        let (&factor, rest) = rest.split_first_chunk().ok_or(error)?;
        let (&start, rest) = rest.split_first_chunk().ok_or(error)?;
        let (frequencies, []) = rest.as_chunks() else {
            return Err(error);
        };
        let parsed = Self {
            pairing: match kind {
                [0, 0, 0, 0] => Pairing::Halves,
                [1, 0, 0, 0] => Pairing::Neighbours,
                _ => return Err(error),
            },
            factor: f32::from_le_bytes(factor),
            start: u64::from_le_bytes(start),
            frequencies: frequencies.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        };
        if parsed.is_sane() {
            Ok(parsed)
        } else {
            Err(error)
        }
    }

    fn is_sane(&self) -> bool {
        let finite = self
            .frequencies
            .iter()
            .all(|frequency| frequency.is_finite());
        finite && self.factor.is_normal() && self.factor > 0.0 && self.start < LAST_POSITION
    }
}

impl Prelude {
    /// The prelude's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let digest = |digest: Option<[u8; 32]>| digest.map(Vec::from);
        let exact = (self.exact_tokens > 0).then(|| self.exact_tokens.to_le_bytes().into());
        let sections = [
            (MODEL, digest(self.model)),
            (TOKENS, digest(self.tokens)),
            (ROTATION, self.rotation.as_ref().map(KeyRotation::encode)),
            (EXACT_TOKENS, exact),
            (PROFILE, digest(self.profile)),
        ];
        let mut out = Vec::new();
        for (tag, bytes) in sections {
            let Some(bytes) = bytes else { continue };
            let len = u32::try_from(bytes.len()).expect("sections are small");
            out.extend_from_slice(&tag.to_le_bytes());
            out.extend_from_slice(&len.to_le_bytes());
            out.extend_from_slice(&bytes);
        }
        out
    }

    /// Reads a prelude of a chunk of `layout`.
    ///
    /// # Errors
    /// Every truncation inside a section, everything critical that this version does not
    /// know, and what cannot be of such a chunk.
    pub fn parse(mut bytes: &[u8], layout: &KvLayout) -> Result<Self, PreludeError> {
        let mut prelude = Self::default();
        let mut before = None;
        while let Some((&tag, rest)) = bytes.split_first_chunk() {
            let tag = u16::from_le_bytes(tag);
            let cut = PreludeError::Length(tag);
            let (&len, rest) = rest.split_first_chunk().ok_or(cut)?;
            let len = usize::try_from(u32::from_le_bytes(len)).map_err(|_| cut)?;
            let (section, rest) = rest.split_at_checked(len).ok_or(cut)?;
            if before >= Some(tag) {
                return Err(PreludeError::Order(tag));
            }
            before = Some(tag);
            bytes = rest;
            let digest = || <[u8; 32]>::try_from(section).map_err(|_| cut).map(Some);
            match tag {
                MODEL => prelude.model = digest()?,
                TOKENS => prelude.tokens = digest()?,
                PROFILE => prelude.profile = digest()?,
                ROTATION => prelude.rotation = Some(KeyRotation::parse(section)?),
                EXACT_TOKENS => {
                    let count = section.try_into().map_err(|_| cut)?;
                    prelude.exact_tokens = u32::from_le_bytes(count);
                }
                critical if critical & CRITICAL != 0 => {
                    return Err(PreludeError::Critical(critical));
                }
                _ => (),
            }
        }
        if let [tag, ..] = bytes {
            return Err(PreludeError::Length(u16::from(*tag)));
        }
        let dim = layout.head_bytes(Plane::Key) / layout.tokens() as usize / layout.dtype().bytes();
        if let Some(rotation) = &prelude.rotation
            && 2 * rotation.frequencies.len() > dim
        {
            return Err(PreludeError::Rotation);
        }
        if prelude.exact_tokens > layout.tokens() {
            return Err(PreludeError::ExactTokens(prelude.exact_tokens));
        }
        Ok(prelude)
    }
}

const CRITICAL: u16 = 0x8000;
const MODEL: u16 = 1;
const TOKENS: u16 = 2;
const ROTATION: u16 = CRITICAL | 1;
const EXACT_TOKENS: u16 = CRITICAL | 2;
const PROFILE: u16 = CRITICAL | 3;
/// Positions from here on are no exact `f64`.
const LAST_POSITION: u64 = 1 << 52;

#[cfg(test)]
#[allow(clippy::indexing_slicing, reason = "a test fails by panicking")]
mod tests {
    use kvasir_types::{DType, Planes};
    use proptest::prelude::*;

    use super::*;

    fn layout() -> KvLayout {
        KvLayout::new(2, 1, Planes::symmetric(8), 16, DType::F16).unwrap()
    }

    fn full() -> Prelude {
        Prelude {
            rotation: Some(KeyRotation {
                pairing: Pairing::Neighbours,
                factor: 1.5,
                start: 256,
                frequencies: vec![1.0, 0.25, 0.01],
            }),
            exact_tokens: 4,
            profile: Some([1; 32]),
            model: Some([2; 32]),
            tokens: Some([3; 32]),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for prelude in [full(), Prelude::default()] {
            assert_eq!(Prelude::parse(&prelude.encode(), &layout()), Ok(prelude));
        }
    }

    #[test]
    fn only_what_is_optional_is_skipped() {
        let with = |tag: u16| {
            let mut bytes = Prelude::default().encode();
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&[3, 0, 0, 0, 9, 9, 9]);
            Prelude::parse(&bytes, &layout())
        };
        assert_eq!(with(0x7000), Ok(Prelude::default()));
        assert_eq!(with(0xf000), Err(PreludeError::Critical(0xf000)));
        assert_eq!(with(PROFILE), Err(PreludeError::Length(PROFILE)));
        let twice = [full().encode(), full().encode()].concat();
        assert_eq!(
            Prelude::parse(&twice, &layout()),
            Err(PreludeError::Order(MODEL))
        );
    }

    #[test]
    fn truncations_inside_a_section_are_errors() {
        let bytes = full().encode();
        let whole: Vec<usize> = [38, 38, 34, 10, 38]
            .iter()
            .scan(0, |end, len| {
                *end += len;
                Some(*end)
            })
            .collect();
        assert_eq!(whole.last(), Some(&bytes.len()));
        for cut in 1..bytes.len() {
            let parsed = Prelude::parse(&bytes[..cut], &layout());
            assert_eq!(parsed.is_ok(), whole.contains(&cut), "{cut}: {parsed:?}");
        }
    }

    #[test]
    fn what_no_chunk_can_have_is_refused() {
        let prelude = Prelude {
            exact_tokens: 17,
            ..full()
        };
        let parsed = Prelude::parse(&prelude.encode(), &layout());
        assert_eq!(parsed, Err(PreludeError::ExactTokens(17)));
        for change in [
            |it: &mut KeyRotation| it.factor = 0.0,
            |it: &mut KeyRotation| it.factor = f32::NAN,
            |it: &mut KeyRotation| it.start = u64::MAX,
            |it: &mut KeyRotation| it.frequencies[1] = f32::INFINITY,
            |it: &mut KeyRotation| it.frequencies = vec![1.0; 5],
        ] {
            let mut prelude = full();
            change(prelude.rotation.as_mut().unwrap());
            let parsed = Prelude::parse(&prelude.encode(), &layout());
            assert_eq!(parsed, Err(PreludeError::Rotation));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Prelude::parse(&bytes, &layout());
        }
    }
}
