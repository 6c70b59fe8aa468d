//! Memory that a chunk's payload is received into, and stays in.

use std::ops::Range;

use bytes::Bytes;
use kvasir_codec::{HeaderError, Object};
use kvasir_types::{ChunkKey, ExtentIdx, KvLayout, Level};

use crate::budget::Reservation;
use crate::buffers::Buffer;

/// What a payload is made of, before any of it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PayloadShape {
    layout: KvLayout,
    level: Level,
    /// Where each extent ends.
    ends: Vec<u64>,
}

/// Memory for the payload of one chunk; paid for. Made by
/// [`Store::payload`](crate::Store::payload).
///
/// What it holds at first is whatever it held last.
#[derive(Debug)]
pub struct Payload {
    buffer: Buffer,
    shape: PayloadShape,
    overhead: Reservation,
}

/// An object whose payload lies in memory of the store.
#[derive(Debug)]
pub struct Received {
    pub(crate) object: Object,
    /// Pays for everything but the payload, which pays for itself.
    pub(crate) overhead: Reservation,
}

impl PayloadShape {
    /// That of a raw chunk.
    pub fn raw(layout: KvLayout) -> Self {
        let layer_bytes = layout.layer_bytes() as u64;
        Self::new(
            layout,
            Level::RAW,
            (0..layout.layers()).map(|_| layer_bytes),
        )
    }

    /// Of extents of these lengths. That they fit the layout and the level is checked by
    /// [`Payload::into_object`].
    pub fn new(layout: KvLayout, level: Level, lengths: impl IntoIterator<Item = u64>) -> Self {
        let mut end = 0u64;
        let ends = lengths.into_iter().map(|len| {
            end = end.saturating_add(len);
            end
        });
        Self {
            layout,
            level,
            ends: ends.collect(),
        }
    }

    /// Bytes of all extents.
    pub fn bytes(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    pub(crate) fn extents(&self) -> u32 {
        u32::try_from(self.ends.len()).unwrap_or(u32::MAX)
    }

    fn place(&self, index: usize) -> Option<Range<usize>> {
        let start = match index.checked_sub(1) {
            Some(before) => *self.ends.get(before)?,
            None => 0,
        };
        let place = |at: u64| usize::try_from(at).ok();
        Some(place(start)?..place(*self.ends.get(index)?)?)
    }
}

impl Payload {
    /// The buffer has room for all extents.
    pub(crate) fn new(buffer: Buffer, shape: PayloadShape, overhead: Reservation) -> Self {
        Self {
            buffer,
            shape,
            overhead,
        }
    }

    /// Where an extent belongs. `None` where there is no such extent.
    pub fn extent_mut(&mut self, extent: ExtentIdx) -> Option<&mut [u8]> {
        let place = self.shape.place(usize::try_from(extent.0).ok()?)?;
        self.buffer.as_mut().get_mut(place)
    }

    /// The chunk. Hashes all of it.
    ///
    /// # Errors
    /// As for [`Object::new`].
    pub fn into_object(self, key: ChunkKey) -> Result<Received, HeaderError> {
        let Self {
            buffer,
            shape,
            overhead,
        } = self;
        let whole = Bytes::from_owner(buffer);
        let places = (0..shape.ends.len()).filter_map(|index| shape.place(index));
        let extents = places.map(|place| whole.slice(place)).collect();
        Ok(Received {
            object: Object::new(key, &shape.layout, shape.level, extents)?,
            overhead,
        })
    }
}

impl Received {
    /// The object.
    pub fn object(&self) -> &Object {
        &self.object
    }
}
