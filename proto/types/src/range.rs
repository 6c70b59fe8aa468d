//! Parts of a chunk: half-open, non-empty ranges of layers, tokens and heads.

use std::fmt;

/// A transformer layer, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerIdx(pub u16);

impl fmt::Display for LayerIdx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An extent of a stored object, counted from 0: what is read, and checked, at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtentIdx(pub u32);

impl fmt::Display for ExtentIdx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl ExtentIdx {
    /// The range of this extent alone.
    pub const fn alone(self) -> ExtentRange {
        ExtentRange {
            start: self.0,
            end: self.0.saturating_add(1),
        }
    }
}

/// A range that is empty or runs backwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} range {start}..{end} is empty; the end must lie beyond the start")]
pub struct RangeError {
    /// What was counted.
    pub what: &'static str,
    /// First index.
    pub start: u64,
    /// One past the last index.
    pub end: u64,
}

macro_rules! range {
    ($(#[$doc:meta])* $name:ident, $int:ty, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name {
            start: $int,
            end: $int,
        }

        impl $name {
            /// The range `start..end`.
            ///
            /// # Errors
            /// `end <= start`.
            pub fn new(start: $int, end: $int) -> Result<Self, RangeError> {
                if start < end {
                    Ok(Self { start, end })
                } else {
                    Err(RangeError { what: $what, start: start.into(), end: end.into() })
                }
            }

            /// First index.
            pub const fn start(self) -> $int {
                self.start
            }

            /// One past the last index.
            pub const fn end(self) -> $int {
                self.end
            }

            /// How many indices; never zero.
            #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
            pub const fn len(self) -> $int {
                self.end - self.start
            }

            /// Whether `index` lies inside.
            pub const fn contains(self, index: $int) -> bool {
                self.start <= index && index < self.end
            }

            /// The indices, in order.
            pub fn iter(self) -> std::ops::Range<$int> {
                self.start..self.end
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}..{}", self.start, self.end)
            }
        }
    };
}

range!(
    /// Consecutive transformer layers.
    LayerRange, u16, "layer"
);
range!(
    /// Consecutive extents of a stored object.
    ExtentRange, u32, "extent"
);
range!(
    /// Consecutive tokens of a chunk.
    TokenRange, u32, "token"
);
range!(
    /// Consecutive KV heads of a layer.
    HeadRange, u16, "head"
);

/// Some heads and tokens of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Slice {
    /// `None`: all.
    pub heads: Option<HeadRange>,
    /// `None`: all.
    pub tokens: Option<TokenRange>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_and_backward_ranges_are_refused() {
        assert!(LayerRange::new(3, 3).is_err());
        let error = TokenRange::new(7, 2).unwrap_err();
        assert_eq!((error.start, error.end), (7, 2));
        let range = HeadRange::new(2, 5).unwrap();
        assert_eq!(range.len(), 3);
        assert!(range.contains(4) && !range.contains(5));
        assert_eq!(range.iter().collect::<Vec<_>>(), [2, 3, 4]);
    }
}
