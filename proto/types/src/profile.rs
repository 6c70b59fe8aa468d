//! Names of codec profiles.

use std::fmt;
use std::str::FromStr;

use crate::canonical::{parse_hex, write_hex};

/// Name of a codec profile: BLAKE3 of its bytes, as chunks state it that were encoded with it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProfileDigest([u8; 32]);

/// Most bytes of a profile that is stored or sent: 256 MiB. Those of large models have some
/// 70 MB.
pub const MAX_PROFILE_BYTES: u64 = 256 << 20;

impl ProfileDigest {
    /// The digest of a profile's bytes.
    pub fn of(profile: &[u8]) -> Self {
        Self(blake3::hash(profile).into())
    }

    /// A digest read from a chunk, from storage or the wire.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest's bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ProfileDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for ProfileDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProfileDigest({self})")
    }
}

/// Text that is not the digest of a profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the digest of a profile; a digest is 64 hexadecimal digits")]
pub struct ParseProfileDigestError(String);

impl FromStr for ProfileDigest {
    type Err = ParseProfileDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_hex(text)
            .map(Self)
            .ok_or_else(|| ParseProfileDigestError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_as_they_are_written() {
        let digest = ProfileDigest::of(b"profile");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        for text in ["", "abc", &digest.to_string()[1..]] {
            assert!(text.parse::<ProfileDigest>().is_err());
        }
    }
}
