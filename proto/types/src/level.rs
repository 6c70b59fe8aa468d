//! The codec's quality ladder.

use std::fmt;
use std::str::FromStr;

use crate::range::ExtentIdx;

/// A rung of the codec's quality ladder.
///
/// A level is a property of stored bytes, not of identity: one key may be
/// stored at any level.
///
/// [`L0`](Self::L0), [`L1`](Self::L1) and [`L2`](Self::L2) are nested: what is stored at
/// one of them serves the coarser ones too, as its first parts.
///
/// | code | name | a layer of a chunk is |
/// |---|---|---|
/// | 0 | `raw` | its bytes |
/// | 1 | `lossless` | its bytes, compressed |
/// | 2 | `int8` | whole numbers of 8 bits |
/// | 3 | `int4` | whole numbers of 4 bits |
/// | 4 | `cachegen` | differences from anchors, entropy-coded (arXiv 2310.07240) |
/// | 16, 17, 18 | `l0`, `l1`, `l2` | one, two, three nested parts |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Level(u8);

impl Level {
    /// Bytes exactly as the engine wrote them, uncompressed.
    pub const RAW: Self = Self(0);
    /// Bytes exactly as the engine wrote them, compressed.
    pub const LOSSLESS: Self = Self(1);
    /// 8 bits a value and one scale a token and head.
    pub const INT8: Self = Self(2);
    /// 4 bits a value after a rotation, and one scale a token and head.
    pub const INT4: Self = Self(3);
    /// CacheGen as published (arXiv 2310.07240), to compare with.
    pub const CACHEGEN: Self = Self(4);
    /// The coarsest nested level.
    pub const L0: Self = Self(16);
    /// Steps three times finer than [`L0`](Self::L0)'s.
    pub const L1: Self = Self(17);
    /// Steps three times finer than [`L1`](Self::L1)'s.
    pub const L2: Self = Self(18);

    /// Every level of this version, in the order of their codes.
    pub const ALL: [Self; 8] = [
        Self::RAW,
        Self::LOSSLESS,
        Self::INT8,
        Self::INT4,
        Self::CACHEGEN,
        Self::L0,
        Self::L1,
        Self::L2,
    ];

    /// The level with this code.
    ///
    /// # Errors
    /// A code this version does not know.
    pub fn from_code(code: u8) -> Result<Self, UnknownLevel> {
        let known = Self::ALL.into_iter().find(|level| level.0 == code);
        known.ok_or(UnknownLevel(code))
    }

    /// The stable code of this level in objects and on the wire.
    pub const fn code(self) -> u8 {
        self.0
    }

    /// Whether a layer's bytes are exactly those that the engine wrote.
    pub const fn is_exact(self) -> bool {
        self.0 <= Self::LOSSLESS.0
    }

    /// The coarsest of some levels, by the errors that are expected of them.
    pub fn coarsest(levels: impl IntoIterator<Item = Self>) -> Option<Self> {
        let order = [
            Self::L0,
            Self::INT4,
            Self::CACHEGEN,
            Self::L1,
            Self::L2,
            Self::INT8,
            Self::LOSSLESS,
            Self::RAW,
        ];
        let place = |level: &Self| order.iter().position(|other| other == level);
        levels.into_iter().min_by_key(place)
    }

    /// Whether this is one of [`L0`](Self::L0) to [`L2`](Self::L2).
    pub const fn is_nested(self) -> bool {
        self.0 >= Self::L0.0
    }

    /// Parts that a layer has at this level, from the coarsest on.
    pub const fn parts(self) -> u8 {
        if self.is_nested() {
            self.0 - Self::L0.0 + 1
        } else {
            1
        }
    }

    /// Whether a stored object has a prelude, and parts instead of raw layers.
    pub const fn is_encoded(self) -> bool {
        self.0 != Self::RAW.0
    }

    /// Extents of an object of `layers` layers: of a raw object, its layers; else its
    /// prelude, then the first part of every layer, then the second of every layer, and so
    /// on.
    pub const fn extents(self, layers: u16) -> u32 {
        let parts = layers as u32 * self.parts() as u32;
        if self.is_encoded() { 1 + parts } else { parts }
    }

    /// The extent that is the prelude, if there is one.
    pub const fn prelude(self) -> Option<ExtentIdx> {
        if self.is_encoded() {
            Some(ExtentIdx(0))
        } else {
            None
        }
    }

    /// The extent that is part `part` of a layer, in an object of `layers` layers. `None`
    /// where there is no such part or layer.
    pub const fn part_extent(self, layers: u16, layer: u16, part: u8) -> Option<ExtentIdx> {
        if layer >= layers || part >= self.parts() {
            return None;
        }
        let first = if self.is_encoded() { 1 } else { 0 };
        Some(ExtentIdx(
            first + part as u32 * layers as u32 + layer as u32,
        ))
    }

    /// Whether what is stored at this level can be read at `asked`: all of it, or the
    /// first of its nested parts.
    pub const fn serves(self, asked: Self) -> bool {
        let nested = asked.is_nested() && asked.0 <= self.0;
        nested || asked.0 == self.0
    }

    /// What a reader who wants no more than `finest` gets of what is stored at this level:
    /// `finest` where that is one of its nested levels, and all of it otherwise.
    #[must_use]
    pub const fn at_most(self, finest: Self) -> Self {
        if self.serves(finest) { finest } else { self }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::RAW => "raw",
            Self::LOSSLESS => "lossless",
            Self::INT8 => "int8",
            Self::INT4 => "int4",
            Self::CACHEGEN => "cachegen",
            Self::L0 => "l0",
            Self::L1 => "l1",
            _ => "l2",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Level {
    type Err = ParseLevelError;

    fn from_str(name: &str) -> Result<Self, ParseLevelError> {
        let known = Self::ALL.into_iter().find(|level| level.name() == name);
        known.ok_or(ParseLevelError)
    }
}

/// A level code from a newer version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("level {0} is unknown to this version; upgrade the reader, or store at level 0 (raw)")]
pub struct UnknownLevel(pub u8);

/// A word that names no level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a level; use raw, lossless, int8, int4, cachegen, l0, l1 or l2")]
pub struct ParseLevelError;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_are_one_to_one() {
        for level in Level::ALL {
            assert_eq!(Level::from_code(level.code()), Ok(level));
            assert_eq!(level.to_string().parse(), Ok(level));
        }
        assert_eq!(Level::from_code(19), Err(UnknownLevel(19)));
        assert_eq!("L2".parse::<Level>(), Err(ParseLevelError));
    }

    #[test]
    fn nested_levels_serve_the_coarser_ones() {
        let stored = Level::L1;
        assert_eq!(stored.parts(), 2);
        assert!(stored.serves(Level::L0) && stored.serves(Level::L1));
        assert!(!stored.serves(Level::L2) && !stored.serves(Level::RAW));
        assert!(!Level::RAW.serves(Level::L0) && !Level::INT4.serves(Level::INT8));
        assert_eq!(Level::L2.at_most(Level::L0), Level::L0);
        assert_eq!(Level::L0.at_most(Level::L2), Level::L0);
        assert_eq!(Level::RAW.at_most(Level::L0), Level::RAW);
    }

    #[test]
    fn exact_levels_are_the_finest() {
        assert_eq!(Level::coarsest(Level::ALL), Some(Level::L0));
        let exact = [Level::RAW, Level::LOSSLESS];
        assert_eq!(Level::coarsest(exact), Some(Level::LOSSLESS));
        assert_eq!(Level::coarsest([Level::RAW, Level::L2]), Some(Level::L2));
        assert_eq!(Level::coarsest([]), None);
    }

    #[test]
    fn every_extent_is_one_thing() {
        for level in Level::ALL {
            let parts = (0..level.parts()).flat_map(|part| {
                (0..5).map(move |layer| level.part_extent(5, layer, part).unwrap())
            });
            let all: Vec<_> = level.prelude().into_iter().chain(parts).collect();
            let expected: Vec<_> = (0..level.extents(5)).map(ExtentIdx).collect();
            assert_eq!(all, expected, "{level}");
            assert_eq!(level.part_extent(5, 5, 0), None);
            assert_eq!(level.part_extent(5, 0, level.parts()), None);
        }
    }
}
