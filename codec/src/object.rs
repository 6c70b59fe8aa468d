//! A whole object in memory, checked.

use std::sync::Arc;

use bytes::Bytes;
use kvasir_types::{ChunkKey, KvLayout, LayerIdx};

use crate::header::{HeaderError, LayerError, ObjectHeader};

/// A header and the layers it describes.
///
/// Invariant: every layer has the length and checksum that the header states;
/// there is no way to make an `Object` that was not checked. Cloning shares the
/// payload.
#[derive(Clone, Debug)]
pub struct Object {
    header: Arc<ObjectHeader>,
    layers: Vec<Bytes>,
}

/// Why bytes are not an object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ObjectError {
    /// The header is broken.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A layer is broken.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// More or fewer layers than the header has.
    #[error("header has {expected} layers, {actual} were given")]
    LayerCount {
        /// Layers of the header.
        expected: usize,
        /// Layers given.
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
        let header = ObjectHeader::for_raw(key, layout, &layers)?;
        Ok(Self {
            header: Arc::new(header),
            layers,
        })
    }

    /// An object received in parts. Checks every layer.
    ///
    /// # Errors
    /// Layers that are not the header's.
    pub fn from_parts(header: ObjectHeader, layers: Vec<Bytes>) -> Result<Self, ObjectError> {
        if layers.len() != header.layers().len() {
            return Err(ObjectError::LayerCount {
                expected: header.layers().len(),
                actual: layers.len(),
            });
        }
        for (index, payload) in (0u16..).zip(&layers) {
            header.verify_layer(LayerIdx(index), payload)?;
        }
        Ok(Self {
            header: Arc::new(header),
            layers,
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
        let mut layers = Vec::with_capacity(header.layers().len());
        for entry in header.layers() {
            // Lossless: all lengths together fit in `bytes`, as checked above.
            let len = usize::try_from(entry.len).unwrap_or(usize::MAX);
            layers.push(rest.split_to(len));
        }
        Self::from_parts(header, layers)
    }

    /// The header.
    pub fn header(&self) -> &ObjectHeader {
        &self.header
    }

    /// The payload of every layer, in order.
    pub fn layers(&self) -> &[Bytes] {
        &self.layers
    }

    /// The header and the layers.
    pub fn into_parts(self) -> (Arc<ObjectHeader>, Vec<Bytes>) {
        (self.header, self.layers)
    }

    /// All bytes of the object, copied into one buffer.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.header.encode();
        for layer in &self.layers {
            out.extend_from_slice(layer);
        }
        out
    }
}
