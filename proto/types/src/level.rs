//! The codec's quality ladder.

use std::fmt;

/// A rung of the codec's quality ladder.
///
/// A level is a property of stored bytes, not of identity: one key may be
/// stored at any level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Level(u8);

impl Level {
    /// Bytes exactly as the engine wrote them, uncompressed.
    pub const RAW: Self = Self(0);

    /// The level with this code.
    ///
    /// # Errors
    /// A code this version does not know.
    pub const fn from_code(code: u8) -> Result<Self, UnknownLevel> {
        match code {
            0 => Ok(Self::RAW),
            other => Err(UnknownLevel(other)),
        }
    }

    /// The stable code of this level in objects and on the wire.
    pub const fn code(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("raw")
    }
}

/// A level code from a newer version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("level {0} is unknown to this version; upgrade the reader, or store at level 0 (raw)")]
pub struct UnknownLevel(pub u8);
