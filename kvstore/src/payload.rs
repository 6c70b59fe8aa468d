//! Memory that a chunk's payload is received into, and stays in.

use bytes::Bytes;
use kvasir_codec::{HeaderError, Object};
use kvasir_types::{ChunkKey, KvLayout};

use crate::budget::Reservation;
use crate::buffers::Buffer;

/// Memory for the payload of one raw chunk; paid for. Made by
/// [`Store::payload`](crate::Store::payload).
///
/// What it holds at first is whatever it held last.
#[derive(Debug)]
pub struct Payload {
    buffer: Buffer,
    layout: KvLayout,
    overhead: Reservation,
}

/// An object whose payload lies in memory of the store.
#[derive(Debug)]
pub struct Received {
    pub(crate) object: Object,
    /// Pays for everything but the payload, which pays for itself.
    pub(crate) overhead: Reservation,
}

impl Payload {
    /// The buffer has room for a raw chunk of the layout.
    pub(crate) fn new(buffer: Buffer, layout: KvLayout, overhead: Reservation) -> Self {
        Self {
            buffer,
            layout,
            overhead,
        }
    }

    /// Where a layer belongs: [`KvLayout::layer_bytes`] bytes. `None` where the layout
    /// has no such layer.
    pub fn layer_mut(&mut self, layer: u16) -> Option<&mut [u8]> {
        if layer >= self.layout.layers() {
            return None;
        }
        let bytes = self.layout.layer_bytes();
        let start = usize::from(layer) * bytes;
        self.buffer.as_mut().get_mut(start..start + bytes)
    }

    /// The chunk. Hashes all of it.
    ///
    /// # Errors
    /// As for [`Object::raw`].
    pub fn into_object(self, key: ChunkKey) -> Result<Received, HeaderError> {
        let bytes = self.layout.layer_bytes();
        let whole = Bytes::from_owner(self.buffer);
        let layers = (0..usize::from(self.layout.layers()))
            .map(|layer| whole.slice(layer * bytes..(layer + 1) * bytes))
            .collect();
        Ok(Received {
            object: Object::raw(key, &self.layout, layers)?,
            overhead: self.overhead,
        })
    }
}

impl Received {
    /// The object.
    pub fn object(&self) -> &Object {
        &self.object
    }
}
