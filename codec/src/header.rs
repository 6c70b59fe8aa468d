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
//! | 12 | 4 | critical features; a reader refuses a bit that it does not know |
//! | 16 | 16 | layout |
//! | 32 | 32 | layout digest |
//! | 64 | 32 | chunk key |
//! | 96 | 4 | layer count, `L` |
//! | 100 | 4 | zero |
//! | 104 | 16 · `L` | per layer: payload length `u64`, checksum `u64` |
//! | 104 + 16 · `L` | 8 | checksum over everything before it |
//!
//! Invariant: nothing is allocated before the sizes were checked, and every size
//! follows from the layout, whose chunk is bounded.

#![deny(clippy::indexing_slicing)]

use kvasir_types::{
    ChunkKey, KvLayout, LayerIdx, LayerRange, LayoutDigest, LayoutError, Level, UnknownLevel,
};

use kvasir_types::Checksum;

/// Where one layer lies in an object, and what it must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerEntry {
    /// First byte, counted from the end of the header.
    pub offset: u64,
    /// Payload bytes.
    pub len: u64,
    /// Checksum of the payload.
    pub checksum: Checksum,
}

/// What a stored object is: its key, geometry, level and layer table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectHeader {
    key: ChunkKey,
    layout: KvLayout,
    level: Level,
    layers: Vec<LayerEntry>,
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
    /// The layer table does not fit the layout.
    #[error("layout has {expected} layers, the table {actual}")]
    LayerCount {
        /// Layers of the layout.
        expected: u32,
        /// Layers stated or given.
        actual: u32,
    },
    /// A layer has an impossible length.
    #[error("layer {layer} has {actual} bytes, its layout and level need {expected}")]
    LayerLength {
        /// The layer.
        layer: LayerIdx,
        /// Bytes that the layout and level need.
        expected: u64,
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

/// Why bytes are not the payload of a layer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The object has no such layer.
    #[error("there is no layer {layer} among {layers}")]
    OutOfRange {
        /// Layer asked for.
        layer: LayerIdx,
        /// Layers of the object.
        layers: u16,
    },
    /// Wrong number of bytes.
    #[error("layer {layer} has {actual} bytes, expected {expected}")]
    Length {
        /// The layer.
        layer: LayerIdx,
        /// Bytes the header states.
        expected: u64,
        /// Bytes given.
        actual: u64,
    },
    /// The payload was damaged.
    #[error("layer {layer} has checksum {actual}, expected {expected}")]
    Checksum {
        /// The layer.
        layer: LayerIdx,
        /// Checksum the header states.
        expected: Checksum,
        /// Checksum of the bytes given.
        actual: Checksum,
    },
}

impl ObjectHeader {
    /// The header of a raw object with these layers, in order. Checksums them.
    ///
    /// # Errors
    /// Layers whose number or length differ from the layout's.
    pub fn for_raw(
        key: ChunkKey,
        layout: &KvLayout,
        layers: &[impl AsRef<[u8]>],
    ) -> Result<Self, HeaderError> {
        check_count(layout, u32::try_from(layers.len()).unwrap_or(u32::MAX))?;
        let mut table = LayerTable::new(layout, Level::RAW);
        for layer in layers {
            let payload = layer.as_ref();
            table.push(payload.len() as u64, Checksum::of(payload))?;
        }
        Ok(Self {
            key,
            layout: *layout,
            level: Level::RAW,
            layers: table.entries,
        })
    }

    /// The header's bytes, [`header_bytes`](Self::header_bytes) many.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::header_bytes(self.layout.layers()));
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.push(self.level.code());
        out.push(0);
        out.extend_from_slice(&KNOWN_FEATURES.to_le_bytes());
        out.extend_from_slice(&self.layout.encode());
        out.extend_from_slice(self.layout.digest().as_bytes());
        out.extend_from_slice(self.key.as_bytes());
        out.extend_from_slice(&u32::from(self.layout.layers()).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for entry in &self.layers {
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

        // Bounds the header at 1 MiB, before anything trusts `count`.
        let layers = u16::try_from(count).map_err(|_| HeaderError::LayerCount {
            expected: u32::from(u16::MAX),
            actual: count,
        })?;
        let total = Self::header_bytes(layers);
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
        let level = Level::from_code(level)?;
        let layout = KvLayout::decode(&layout)?;
        if layout.digest() != digest {
            return Err(HeaderError::LayoutDigest(digest));
        }
        check_count(&layout, count)?;
        let mut table = LayerTable::new(&layout, level);
        for _ in 0..layers {
            let len = u64::from_le_bytes(reader.take()?);
            let checksum = Checksum::from_u64(u64::from_le_bytes(reader.take()?));
            table.push(len, checksum)?;
        }
        let header = Self {
            key,
            layout,
            level,
            layers: table.entries,
        };
        Ok((header, total))
    }

    /// Bytes of a header with `layers` layers: `112 + 16 · layers`.
    pub const fn header_bytes(layers: u16) -> usize {
        PRELUDE_BYTES + layers as usize * ENTRY_BYTES + CHECKSUM_BYTES
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
    /// No such layer, another length, another checksum.
    pub fn verify_layer(&self, layer: LayerIdx, payload: &[u8]) -> Result<(), LayerError> {
        let entry = self.layer(layer).ok_or(LayerError::OutOfRange {
            layer,
            layers: self.layout.layers(),
        })?;
        if payload.len() as u64 != entry.len {
            return Err(LayerError::Length {
                layer,
                expected: entry.len,
                actual: payload.len() as u64,
            });
        }
        let actual = Checksum::of(payload);
        if actual != entry.checksum {
            return Err(LayerError::Checksum {
                layer,
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

    /// The layer table, in order.
    pub fn layers(&self) -> &[LayerEntry] {
        &self.layers
    }

    /// One entry of the layer table.
    pub fn layer(&self, layer: LayerIdx) -> Option<&LayerEntry> {
        self.layers.get(usize::from(layer.0))
    }

    /// The entries of a range of layers; `None` where it leaves the table.
    pub fn range(&self, range: LayerRange) -> Option<&[LayerEntry]> {
        self.layers
            .get(usize::from(range.start())..usize::from(range.end()))
    }

    /// Bytes of all layers together.
    pub fn payload_bytes(&self) -> u64 {
        self.layers.iter().map(|entry| entry.len).sum()
    }

    /// Bytes of the whole object, header included.
    pub fn object_bytes(&self) -> u64 {
        Self::header_bytes(self.layout.layers()) as u64 + self.payload_bytes()
    }
}

/// A layer table under construction: offsets follow from lengths.
struct LayerTable {
    entries: Vec<LayerEntry>,
    expected: u64,
    offset: u64,
}

impl LayerTable {
    fn new(layout: &KvLayout, level: Level) -> Self {
        // Levels other than raw will state their own bounds here.
        debug_assert_eq!(level, Level::RAW, "the only level that exists");
        Self {
            entries: Vec::with_capacity(usize::from(layout.layers())),
            expected: layout.layer_bytes() as u64,
            offset: 0,
        }
    }

    fn push(&mut self, len: u64, checksum: Checksum) -> Result<(), HeaderError> {
        if len != self.expected {
            return Err(HeaderError::LayerLength {
                layer: LayerIdx(u16::try_from(self.entries.len()).unwrap_or(u16::MAX)),
                expected: self.expected,
                actual: len,
            });
        }
        self.entries.push(LayerEntry {
            offset: self.offset,
            len,
            checksum,
        });
        self.offset += len;
        Ok(())
    }
}

fn check_count(layout: &KvLayout, actual: u32) -> Result<(), HeaderError> {
    let expected = u32::from(layout.layers());
    if actual == expected {
        Ok(())
    } else {
        Err(HeaderError::LayerCount { expected, actual })
    }
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
const KNOWN_FEATURES: u32 = 0;
const PRELUDE_BYTES: usize = 104;
const ENTRY_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 8;
