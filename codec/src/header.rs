//! The header of a stored object.
//!
//! All integers are little-endian:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic, `89 4b 56 41 53 49 52 0a` |
//! | 8 | 2 | format version, 1 |
//! | 10 | 1 | level code |
//! | 11 | 1 | zero |
//! | 12 | 4 | critical features; a reader refuses a bit that it does not know. 1: encoded, set for every level but raw |
//! | 16 | 16 | layout |
//! | 32 | 32 | layout digest |
//! | 64 | 32 | chunk key |
//! | 96 | 4 | layer count, `L` |
//! | 100 | 4 | zero |
//! | 104 | 16 · `E` | per extent: length `u64`, checksum `u64` |
//! | 104 + 16 · `E` | 8 | checksum over everything before it |
//!
//! A raw object has as many extents as layers. Any other has `1 + P · L`, where `P` is
//! [`Level::parts`]: the [prelude](crate::Prelude), then the first part of every layer,
//! then the second of every layer, and so on. So what a coarser level needs comes first,
//! and in one piece.
//!
//! Invariant: nothing is allocated before the sizes were checked, and every size
//! follows from the layout, whose chunk is bounded.

#![deny(clippy::indexing_slicing)]

use kvasir_types::{
    ChunkKey, ExtentIdx, ExtentRange, KvLayout, LayerIdx, LayoutDigest, LayoutError, Level,
    UnknownLevel,
};

use kvasir_types::Checksum;

/// Where one piece of the payload lies in an object, and what it must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte, counted from the end of the header.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Checksum of these.
    pub checksum: Checksum,
}

/// What a stored object is: its key, geometry, level and extents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectHeader {
    key: ChunkKey,
    layout: KvLayout,
    level: Level,
    extents: Vec<Extent>,
}

/// Why bytes are not the header of an object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The bytes end before the header does.
    #[error("header needs {needed} bytes, {have} are there")]
    Truncated {
        /// Bytes needed to get further.
        needed: usize,
        /// Bytes given.
        have: usize,
    },
    /// The bytes are something else.
    #[error("not a stored object: the magic number differs")]
    Magic,
    /// Written by another format version.
    #[error("object format version {0} is unknown; upgrade the reader")]
    Version(u16),
    /// Written with features that change how the payload is read.
    #[error("object uses unknown critical features {0:#010x}; upgrade the reader")]
    Features(u32),
    /// A reserved byte is set.
    #[error("a reserved header byte is not zero")]
    Reserved,
    /// The header was damaged.
    #[error("header checksum is {actual}, expected {expected}")]
    Checksum {
        /// Checksum the header states.
        expected: Checksum,
        /// Checksum of the bytes read.
        actual: Checksum,
    },
    /// The level is unknown.
    #[error(transparent)]
    Level(#[from] UnknownLevel),
    /// The layout is not one.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The layout does not hash to the stated digest.
    #[error("layout does not match its digest {0}")]
    LayoutDigest(LayoutDigest),
    /// The layer count is not that of the layout.
    #[error("layout has {expected} layers, the header {actual}")]
    LayerCount {
        /// Layers of the layout.
        expected: u32,
        /// Layers stated.
        actual: u32,
    },
    /// Too many or too few extents were given.
    #[error("layout and level have {expected} extents, {actual} were given")]
    ExtentCount {
        /// Extents that they have.
        expected: u32,
        /// Extents given.
        actual: usize,
    },
    /// An extent has an impossible length.
    #[error("extent {extent} has {actual} bytes, its layout and level allow {allowed:?}")]
    ExtentLength {
        /// The extent.
        extent: ExtentIdx,
        /// Fewest and most bytes that the layout and level allow.
        allowed: [u64; 2],
        /// Bytes stated or given.
        actual: u64,
    },
}

/// Why an intact header is not the one that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The object belongs to another chunk.
    #[error("object holds chunk {actual}, expected {expected}")]
    Key {
        /// Key asked for.
        expected: ChunkKey,
        /// Key inside the object.
        actual: ChunkKey,
    },
    /// The object has another geometry.
    #[error("object has layout {actual}, expected {expected}")]
    Layout {
        /// Layout asked for.
        expected: LayoutDigest,
        /// Layout inside the object.
        actual: LayoutDigest,
    },
}

/// Why bytes are not an extent of an object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExtentError {
    /// The object has no such extent.
    #[error("there is no extent {extent} among {extents}")]
    OutOfRange {
        /// Extent asked for.
        extent: ExtentIdx,
        /// Extents of the object.
        extents: usize,
    },
    /// Wrong number of bytes.
    #[error("extent {extent} has {actual} bytes, expected {expected}")]
    Length {
        /// The extent.
        extent: ExtentIdx,
        /// Bytes the header states.
        expected: u64,
        /// Bytes given.
        actual: u64,
    },
    /// The payload was damaged.
    #[error("extent {extent} has checksum {actual}, expected {expected}")]
    Checksum {
        /// The extent.
        extent: ExtentIdx,
        /// Checksum the header states.
        expected: Checksum,
        /// Checksum of the bytes given.
        actual: Checksum,
    },
}

impl ObjectHeader {
    /// The header of an object with these extents, in order. Checksums them.
    ///
    /// # Errors
    /// Extents whose number or lengths do not fit the layout and the level.
    pub fn new(
        key: ChunkKey,
        layout: &KvLayout,
        level: Level,
        extents: &[impl AsRef<[u8]>],
    ) -> Result<Self, HeaderError> {
        let expected = level.extents(layout.layers());
        if extents.len() as u64 != u64::from(expected) {
            return Err(HeaderError::ExtentCount {
                expected,
                actual: extents.len(),
            });
        }
        let mut table = Table::new(layout, level);
        for extent in extents {
            let payload = extent.as_ref();
            table.push(payload.len() as u64, Checksum::of(payload))?;
        }
        Ok(Self {
            key,
            layout: *layout,
            level,
            extents: table.extents,
        })
    }

    /// The header's bytes, [`header_bytes`](Self::header_bytes) many.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::header_bytes(&self.layout, self.level));
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.push(self.level.code());
        out.push(0);
        out.extend_from_slice(&features_of(self.level).to_le_bytes());
        out.extend_from_slice(&self.layout.encode());
        out.extend_from_slice(self.layout.digest().as_bytes());
        out.extend_from_slice(self.key.as_bytes());
        out.extend_from_slice(&u32::from(self.layout.layers()).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for entry in &self.extents {
            out.extend_from_slice(&entry.len.to_le_bytes());
            out.extend_from_slice(&entry.checksum.as_u64().to_le_bytes());
        }
        let checksum = Checksum::of(&out);
        out.extend_from_slice(&checksum.as_u64().to_le_bytes());
        out
    }

    /// Reads the header at the start of `bytes`, which may continue with payload.
    /// Gives the header and the number of bytes that it takes.
    ///
    /// # Errors
    /// Every truncation and every flipped bit is one.
    pub fn parse(bytes: &[u8]) -> Result<(Self, usize), HeaderError> {
        let mut reader = Reader { rest: bytes };
        // Magic, version and features come first: a later format may move the
        // checksum, and its header should read as "newer", not as "damaged".
        if reader.take::<8>()? != MAGIC {
            return Err(HeaderError::Magic);
        }
        let version = u16::from_le_bytes(reader.take()?);
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        let [level] = reader.take()?;
        let [reserved] = reader.take()?;
        let features = u32::from_le_bytes(reader.take()?);
        if features & !KNOWN_FEATURES != 0 {
            return Err(HeaderError::Features(features));
        }
        let layout: [u8; KvLayout::ENCODED_BYTES] = reader.take()?;
        let digest = LayoutDigest::from_bytes(reader.take()?);
        let key = ChunkKey::from_bytes(reader.take()?);
        let count = u32::from_le_bytes(reader.take()?);
        let padding: [u8; 4] = reader.take()?;

        // What follows is sized by what was read so far, which is not trusted before the
        // checksum matched: 3 MiB at most.
        let layers = u16::try_from(count).map_err(|_| HeaderError::LayerCount {
            expected: u32::from(u16::MAX),
            actual: count,
        })?;
        let level = Level::from_code(level);
        let extents = match level {
            Ok(level) => level.extents(layers),
            // Which is an error for sure; this says which.
            Err(_) => u32::from(layers),
        };
        let total = bytes_of(extents);
        let truncated = HeaderError::Truncated {
            needed: total,
            have: bytes.len(),
        };
        let (covered, stated) = bytes
            .get(..total)
            .and_then(|header| header.split_last_chunk::<CHECKSUM_BYTES>())
            .ok_or(truncated)?;
        let expected = Checksum::from_u64(u64::from_le_bytes(*stated));
        let actual = Checksum::of(covered);
        if actual != expected {
            return Err(HeaderError::Checksum { expected, actual });
        }

        if reserved != 0 || padding != [0; 4] {
            return Err(HeaderError::Reserved);
        }
        let level = level?;
        if features != features_of(level) {
            return Err(HeaderError::Features(features));
        }
        let layout = KvLayout::decode(&layout)?;
        if layout.digest() != digest {
            return Err(HeaderError::LayoutDigest(digest));
        }
        if layout.layers() != layers {
            return Err(HeaderError::LayerCount {
                expected: u32::from(layout.layers()),
                actual: count,
            });
        }
        let mut table = Table::new(&layout, level);
        for _ in 0..extents {
            let len = u64::from_le_bytes(reader.take()?);
            let checksum = Checksum::from_u64(u64::from_le_bytes(reader.take()?));
            table.push(len, checksum)?;
        }
        let header = Self {
            key,
            layout,
            level,
            extents: table.extents,
        };
        Ok((header, total))
    }

    /// Bytes of a header: `112 + 16 · extents`.
    pub const fn header_bytes(layout: &KvLayout, level: Level) -> usize {
        bytes_of(level.extents(layout.layers()))
    }

    /// Checks that this is the header of the chunk that was asked for.
    ///
    /// # Errors
    /// Another key or another layout.
    pub fn verify(&self, key: &ChunkKey, layout: &LayoutDigest) -> Result<(), IdentityError> {
        if self.key != *key {
            return Err(IdentityError::Key {
                expected: *key,
                actual: self.key,
            });
        }
        let actual = self.layout.digest();
        if actual != *layout {
            return Err(IdentityError::Layout {
                expected: *layout,
                actual,
            });
        }
        Ok(())
    }

    /// Checks `payload` against the table.
    ///
    /// # Errors
    /// No such extent, another length, another checksum.
    pub fn verify_extent(&self, extent: ExtentIdx, payload: &[u8]) -> Result<(), ExtentError> {
        let entry = self.extent(extent).ok_or(ExtentError::OutOfRange {
            extent,
            extents: self.extents.len(),
        })?;
        if payload.len() as u64 != entry.len {
            return Err(ExtentError::Length {
                extent,
                expected: entry.len,
                actual: payload.len() as u64,
            });
        }
        let actual = Checksum::of(payload);
        if actual != entry.checksum {
            return Err(ExtentError::Checksum {
                extent,
                expected: entry.checksum,
                actual,
            });
        }
        Ok(())
    }

    /// The chunk's key.
    pub const fn key(&self) -> &ChunkKey {
        &self.key
    }

    /// The chunk's geometry.
    pub const fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The level its payload is stored at.
    pub const fn level(&self) -> Level {
        self.level
    }

    /// The extents, in order.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// One extent.
    pub fn extent(&self, extent: ExtentIdx) -> Option<&Extent> {
        self.extents.get(usize::try_from(extent.0).ok()?)
    }

    /// A range of extents; `None` where it leaves the object.
    pub fn range(&self, range: ExtentRange) -> Option<&[Extent]> {
        let start = usize::try_from(range.start()).ok()?;
        self.extents.get(start..usize::try_from(range.end()).ok()?)
    }

    /// All extents.
    pub fn all(&self) -> ExtentRange {
        ExtentRange::new(0, self.level.extents(self.layout.layers())).expect("a layout has a layer")
    }

    /// Where part `part` of a layer lies; `None` where there is no such part or layer.
    pub const fn part(&self, layer: LayerIdx, part: u8) -> Option<ExtentIdx> {
        self.level.part_extent(self.layout.layers(), layer.0, part)
    }

    /// Bytes of all extents together.
    pub fn payload_bytes(&self) -> u64 {
        self.extents.iter().map(|entry| entry.len).sum()
    }

    /// Bytes of the whole object, header included.
    pub fn object_bytes(&self) -> u64 {
        Self::header_bytes(&self.layout, self.level) as u64 + self.payload_bytes()
    }
}

/// Extents under construction: offsets follow from lengths.
struct Table<'a> {
    layout: &'a KvLayout,
    level: Level,
    extents: Vec<Extent>,
    offset: u64,
}

impl<'a> Table<'a> {
    fn new(layout: &'a KvLayout, level: Level) -> Self {
        let extents = level.extents(layout.layers());
        Self {
            layout,
            level,
            extents: Vec::with_capacity(usize::try_from(extents).unwrap_or(0)),
            offset: 0,
        }
    }

    fn push(&mut self, len: u64, checksum: Checksum) -> Result<(), HeaderError> {
        let extent = ExtentIdx(u32::try_from(self.extents.len()).unwrap_or(u32::MAX));
        let allowed = self.layout.extent_bounds(self.level, extent);
        if len < allowed[0] || len > allowed[1] {
            return Err(HeaderError::ExtentLength {
                extent,
                allowed,
                actual: len,
            });
        }
        self.extents.push(Extent {
            offset: self.offset,
            len,
            checksum,
        });
        self.offset += len;
        Ok(())
    }
}

const fn bytes_of(extents: u32) -> usize {
    FIXED_BYTES + extents as usize * ENTRY_BYTES + CHECKSUM_BYTES
}

const fn features_of(level: Level) -> u32 {
    if level.is_encoded() { ENCODED } else { 0 }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], HeaderError> {
        let (bytes, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(HeaderError::Truncated {
                needed: N,
                have: self.rest.len(),
            })?;
        self.rest = rest;
        Ok(*bytes)
    }
}

/// A first byte above 127 and a line feed show transfers that mangled text, as in
/// PNG (RFC 2083, section 12.11).
const MAGIC: [u8; 8] = *b"\x89KVASIR\n";
const VERSION: u16 = 1;
const KNOWN_FEATURES: u32 = ENCODED;
const ENCODED: u32 = 1;
/// Before the extents.
const FIXED_BYTES: usize = 104;
const ENTRY_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 8;
