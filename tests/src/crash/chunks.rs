//! Chunks whose bytes follow from their number.

use std::sync::Arc;

use bytes::Bytes;
use kvasir_codec::{Object, ObjectHeader};
use kvasir_types::{ChunkKey, DType, KvLayout, Planes};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};

use super::BLOCK_BYTES;

/// What a read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Got {
    /// The chunk's own bytes.
    Right,
    /// Other bytes, or another layout.
    Wrong,
    /// Nothing.
    Miss,
    /// An error.
    Failed,
}

/// A set of chunks. Clones share it.
#[derive(Clone, Debug)]
pub struct Chunks(Arc<Vec<Object>>);

impl Chunks {
    /// `count` chunks of three geometries: of whole blocks, of odd ends, and large.
    ///
    /// # Panics
    /// Never: the geometries are valid.
    pub fn new(count: u32) -> Self {
        let layouts = [
            KvLayout::new(4, 2, Planes::symmetric(32), 16, DType::Bf16),
            KvLayout::new(3, 1, Planes::symmetric(24), 20, DType::Bf16),
            KvLayout::new(8, 4, Planes::symmetric(32), 16, DType::Bf16),
        ]
        .map(|layout| layout.expect("a small geometry"));
        let chunk = |number: u32| {
            let layout = &layouts[number as usize % layouts.len()];
            let mut random = StdRng::seed_from_u64(number.into());
            let mut layer = || {
                let mut bytes = vec![0; layout.layer_bytes()];
                random.fill_bytes(&mut bytes);
                Bytes::from(bytes)
            };
            let layers = (0..layout.layers()).map(|_| layer()).collect();
            let mut key = [0x5a; 32];
            key[..4].copy_from_slice(&number.to_be_bytes());
            Object::raw(ChunkKey::from_bytes(key), layout, layers).expect("layers of the layout")
        };
        Self(Arc::new((0..count).map(chunk).collect()))
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    /// One of them.
    ///
    /// # Panics
    /// There are fewer.
    pub fn object(&self, number: u32) -> &Object {
        &self.0[number as usize]
    }

    /// Its key.
    pub fn key(&self, number: u32) -> ChunkKey {
        *self.object(number).header().key()
    }

    /// Bytes that it takes on disk.
    pub fn frame_bytes(&self, number: u32) -> u64 {
        let header = self.object(number).header();
        let head = ObjectHeader::header_bytes(header.layout(), header.level()) as u64;
        head.next_multiple_of(BLOCK_BYTES) + header.payload_bytes().next_multiple_of(BLOCK_BYTES)
    }

    /// Whether what a read gave is all of the chunk.
    pub fn compare(&self, number: u32, layout: &KvLayout, layers: &[Bytes]) -> Got {
        let object = self.object(number);
        if object.header().layout() == layout && object.extents() == layers {
            Got::Right
        } else {
            Got::Wrong
        }
    }
}
