//! A whole object in memory, checked.

use std::sync::Arc;

use bytes::Bytes;
use kvasir_types::{ChunkKey, ExtentIdx, KvLayout, LayerIdx, Level};

use crate::header::{ExtentError, HeaderError, ObjectHeader};

/// A header and the extents it describes.
///
/// Invariant: every extent has the length and checksum that the header states;
/// there is no way to make an `Object` that was not checked. Cloning shares the
/// payload.
#[derive(Clone, Debug)]
pub struct Object {
    header: Arc<ObjectHeader>,
    extents: Vec<Bytes>,
}

/// Why bytes are not an object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ObjectError {
    /// The header is broken.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// An extent is broken.
    #[error(transparent)]
    Extent(#[from] ExtentError),
    /// More or fewer extents than the header has.
    #[error("header has {expected} extents, {actual} were given")]
    ExtentCount {
        /// Extents of the header.
        expected: usize,
        /// Extents given.
        actual: usize,
    },
    /// More or fewer bytes than the header states.
    #[error("object has {actual} bytes, its header states {expected}")]
    Length {
        /// Bytes the header states.
        expected: u64,
        /// Bytes given.
        actual: u64,
    },
}

impl Object {
    /// A raw object from what an engine captured: one payload per layer, in order.
    ///
    /// # Errors
    /// Layers whose number or length differ from the layout's.
    pub fn raw(key: ChunkKey, layout: &KvLayout, layers: Vec<Bytes>) -> Result<Self, HeaderError> {
        Self::new(key, layout, Level::RAW, layers)
    }

    /// An object of its extents, in order. Checksums them; that they decode is not checked.
    ///
    /// # Errors
    /// Extents whose number or lengths do not fit the layout and the level.
    pub fn new(
        key: ChunkKey,
        layout: &KvLayout,
        level: Level,
        extents: Vec<Bytes>,
    ) -> Result<Self, HeaderError> {
        let header = ObjectHeader::new(key, layout, level, &extents)?;
        Ok(Self {
            header: Arc::new(header),
            extents,
        })
    }

    /// An object received piece by piece. Checks every extent.
    ///
    /// # Errors
    /// Extents that are not the header's.
    pub fn from_parts(header: ObjectHeader, extents: Vec<Bytes>) -> Result<Self, ObjectError> {
        if extents.len() != header.extents().len() {
            return Err(ObjectError::ExtentCount {
                expected: header.extents().len(),
                actual: extents.len(),
            });
        }
        for (index, payload) in (0..).zip(&extents) {
            header.verify_extent(ExtentIdx(index), payload)?;
        }
        Ok(Self {
            header: Arc::new(header),
            extents,
        })
    }

    /// An object from its bytes, without copying them. Checks all of it.
    ///
    /// # Errors
    /// Every truncation, every trailing byte and every flipped bit is one.
    pub fn parse(bytes: &Bytes) -> Result<Self, ObjectError> {
        let (header, start) = ObjectHeader::parse(bytes)?;
        let expected = header.object_bytes();
        if bytes.len() as u64 != expected {
            return Err(ObjectError::Length {
                expected,
                actual: bytes.len() as u64,
            });
        }
        let mut rest = bytes.slice(start..);
        let mut extents = Vec::with_capacity(header.extents().len());
        for entry in header.extents() {
            // Lossless: all lengths together fit in `bytes`, as checked above.
            let len = usize::try_from(entry.len).unwrap_or(usize::MAX);
            extents.push(rest.split_to(len));
        }
        Self::from_parts(header, extents)
    }

    /// The header.
    pub fn header(&self) -> &ObjectHeader {
        &self.header
    }

    /// The bytes of every extent, in order.
    pub fn extents(&self) -> &[Bytes] {
        &self.extents
    }

    /// The prelude; `None` of a raw object.
    pub fn prelude(&self) -> Option<&Bytes> {
        self.extent(self.header.level().prelude()?)
    }

    /// The parts of a layer, from the coarsest on; none where there is no such layer.
    pub fn parts(&self, layer: LayerIdx) -> Vec<&Bytes> {
        (0..self.header.level().parts())
            .filter_map(|part| self.extent(self.header.part(layer, part)?))
            .collect()
    }

    fn extent(&self, extent: ExtentIdx) -> Option<&Bytes> {
        self.extents.get(usize::try_from(extent.0).ok()?)
    }

    /// The header and the extents.
    pub fn into_parts(self) -> (Arc<ObjectHeader>, Vec<Bytes>) {
        (self.header, self.extents)
    }

    /// All bytes of the object, copied into one buffer.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.header.encode();
        for extent in &self.extents {
            out.extend_from_slice(extent);
        }
        out
    }
}
