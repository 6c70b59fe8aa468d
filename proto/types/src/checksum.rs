//! The checksum that travels with every layer, stored or sent.

use std::fmt;

/// CRC-64/NVME of a run of bytes.
///
/// A CRC finds every burst of up to 64 bits and runs at memory speed with
/// carry-less multiplication (7 to 70 GB/s per core, against 5 to 7 for BLAKE3).
/// It guards against accident, not against an adversary who writes the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Checksum(u64);

impl Checksum {
    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes))
    }

    /// A checksum read from storage or the wire.
    pub const fn from_u64(value: u64) -> Self {
        Self(value)
    }

    /// The value that is stored or sent.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checksum({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of the CRC catalogue, and the all-zero page of the NVMe text.
    #[test]
    fn agrees_with_the_published_values() {
        assert_eq!(Checksum::of(b"123456789").as_u64(), 0xae8b_1486_0a79_9888);
        assert_eq!(Checksum::of(&[0; 4096]).as_u64(), 0x6482_d367_eb22_b64e);
    }
}
