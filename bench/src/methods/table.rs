//! A chunk as tables of numbers: what comparisons compute on.

use super::{Chunk, from_raw, to_raw};

/// K or V of one head of one layer: `[token][channel]`.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) keys: bool,
    pub(super) dim: usize,
    pub(super) rows: Vec<f32>,
}

/// All tables of a chunk, by layer, K before V, by head.
pub(super) fn tables(chunk: &Chunk) -> Vec<Table> {
    let heads = usize::from(chunk.layout.kv_heads());
    let tokens = chunk.layout.tokens() as usize;
    let mut tables = Vec::new();
    for layer in &chunk.layers {
        let values = from_raw(chunk.layout.dtype(), layer);
        let size = values.len() / (2 * heads);
        for (index, rows) in values.chunks_exact(size).enumerate() {
            tables.push(Table {
                keys: index < heads,
                dim: size / tokens,
                rows: rows.to_vec(),
            });
        }
    }
    tables
}

/// The opposite.
pub(super) fn fill(chunk: &mut Chunk, tables: &[Table]) {
    let per_layer = 2 * usize::from(chunk.layout.kv_heads());
    let dtype = chunk.layout.dtype();
    for (layer, tables) in chunk.layers.iter_mut().zip(tables.chunks(per_layer)) {
        let values: Vec<f32> = tables
            .iter()
            .flat_map(|table| &table.rows)
            .copied()
            .collect();
        *layer = to_raw(dtype, &values);
    }
}

/// Writes numbers of fewer bits than a byte, the first in the lowest.
#[derive(Debug, Default)]
pub(super) struct Packer {
    pub(super) bytes: Vec<u8>,
    bits: u32,
    used: u32,
}

impl Packer {
    pub(super) fn put(&mut self, number: u8, bits: u32) {
        self.bits |= u32::from(number) << self.used;
        self.used += bits;
        while self.used >= 8 {
            self.bytes.push(self.bits.to_le_bytes()[0]);
            self.bits >>= 8;
            self.used -= 8;
        }
    }

    /// The bytes, the last filled up with zeros.
    pub(super) fn finish(mut self) -> Vec<u8> {
        if self.used > 0 {
            self.bytes.push(self.bits.to_le_bytes()[0]);
        }
        self.bytes
    }
}

/// Reads them again.
#[derive(Debug)]
pub(super) struct Unpacker<'a> {
    bytes: std::slice::Iter<'a, u8>,
    bits: u32,
    used: u32,
}

impl<'a> Unpacker<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes: bytes.iter(),
            bits: 0,
            used: 0,
        }
    }

    pub(super) fn take(&mut self, bits: u32) -> u8 {
        while self.used < bits {
            self.bits |= u32::from(self.bytes.next().copied().unwrap_or(0)) << self.used;
            self.used += 8;
        }
        let number = self.bits & ((1 << bits) - 1);
        self.bits >>= bits;
        self.used -= bits;
        number.to_le_bytes()[0]
    }
}
