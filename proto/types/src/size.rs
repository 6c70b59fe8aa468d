//! A number of bytes as people write it.

use std::fmt;
use std::str::FromStr;

/// A number of bytes; reads and prints `4GiB`, `512MiB`, `64KiB`, `10GB`, `123`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteSize(u64);

const BINARY_UNITS: [(&str, u64); 4] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];
const OTHER_UNITS: [(&str, u64); 5] = [
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

impl ByteSize {
    /// This many bytes.
    pub const fn bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// This many KiB.
    pub const fn kib(kib: u64) -> Self {
        Self(kib << 10)
    }

    /// This many MiB.
    pub const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// This many GiB.
    pub const fn gib(gib: u64) -> Self {
        Self(gib << 30)
    }

    /// For people: in the largest unit that it reaches, rounded to one decimal.
    pub fn human(self) -> impl fmt::Display {
        Human(self.0)
    }

    /// The number of bytes.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

/// Text that is not a number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size; write a whole number with a unit, such as 512MiB, 4GiB or 10GB")]
pub struct ParseByteSizeError(String);

impl FromStr for ByteSize {
    type Err = ParseByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseByteSizeError(text.to_owned());
        let trimmed = text.trim();
        let digits = trimmed.len()
            - trimmed
                .trim_start_matches(|c: char| c.is_ascii_digit())
                .len();
        let (number, unit) = trimmed.split_at(digits);
        let number: u64 = number.parse().map_err(|_| error())?;
        let unit = unit.trim();
        let factor = if unit.is_empty() {
            1
        } else {
            BINARY_UNITS
                .iter()
                .chain(&OTHER_UNITS)
                .find(|(name, _)| name.eq_ignore_ascii_case(unit))
                .ok_or_else(error)?
                .1
        };
        number.checked_mul(factor).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for ByteSize {
    /// In the largest binary unit that divides the size; reads back as the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = BINARY_UNITS
            .iter()
            .rev()
            .find(|(_, unit)| self.0 >= *unit && self.0.is_multiple_of(*unit))
            .unwrap_or(&("B", 1));
        write!(f, "{}{name}", self.0 / unit)
    }
}

/// See [`ByteSize::human`].
#[derive(Clone, Copy, Debug)]
struct Human(u64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = BINARY_UNITS
            .iter()
            .rev()
            .find(|(_, unit)| self.0 >= *unit)
            .unwrap_or(&("B", 1));
        if self.0.is_multiple_of(*unit) {
            return write!(f, "{}{name}", self.0 / unit);
        }
        #[expect(clippy::cast_precision_loss, reason = "printed with one decimal")]
        let value = self.0 as f64 / *unit as f64;
        write!(f, "{value:.1}{name}")
    }
}

impl<'de> serde::Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(bytes) => Ok(Self(bytes)),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

impl serde::Serialize for ByteSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!("4GiB".parse(), Ok(ByteSize::gib(4)));
        assert_eq!("512 mib".parse(), Ok(ByteSize::mib(512)));
        assert_eq!("10GB".parse(), Ok(ByteSize::bytes(10_000_000_000)));
        assert_eq!("77".parse(), Ok(ByteSize::bytes(77)));
        for bad in ["", "GiB", "-1", "4 Gib ibs", "99999999999TiB", "1.5GiB"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn prints_for_people() {
        assert_eq!(ByteSize::gib(4).human().to_string(), "4GiB");
        assert_eq!(ByteSize::mib(1536).human().to_string(), "1.5GiB");
        assert_eq!(ByteSize::mib(1536).to_string(), "1536MiB");
        assert_eq!(ByteSize::bytes(1023).human().to_string(), "1023B");
        assert_eq!(ByteSize::bytes(0).to_string(), "0B");
    }

    proptest::proptest! {
        #[test]
        fn reads_what_it_prints(number in 0..=u64::MAX, shift in 0..64u32) {
            let size = ByteSize::bytes(number >> shift << (shift / 2));
            proptest::prop_assert_eq!(size.to_string().parse(), Ok(size));
        }
    }
}
