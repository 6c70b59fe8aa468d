//! Chunks whose bytes follow from their keys, so that none needs to be kept.

use std::sync::Arc;

use bytes::Bytes;
use kvasir_client::Chunk;
use kvasir_types::{ChunkKey, DType, KvLayout, Level, Planes};

/// Chunks with the numbers `0..count`, of 5.6 KiB to 16 MiB. Clones share it.
#[derive(Clone, Debug)]
pub struct WorkingSet {
    layouts: Arc<[KvLayout]>,
    count: u32,
}

impl WorkingSet {
    /// As many chunks as take about `bytes` together.
    ///
    /// # Panics
    /// Never: the geometries are valid.
    pub fn new(bytes: u64) -> Self {
        let layout = |layers, heads, dim, tokens| {
            KvLayout::new(layers, heads, Planes::symmetric(dim), tokens, DType::Bf16)
                .expect("a small geometry")
        };
        // How many of each there are in one turn.
        let mix = [
            (8, layout(3, 1, 24, 20)),
            (12, layout(16, 8, 64, 8)),
            (8, layout(16, 8, 64, 32)),
            (3, layout(32, 8, 128, 32)),
            (1, layout(32, 8, 128, 128)),
        ];
        let layouts: Arc<[KvLayout]> = mix
            .into_iter()
            .flat_map(|(count, layout)| std::iter::repeat_n(layout, count))
            .collect();
        let turn: u64 = layouts.iter().map(KvLayout::chunk_bytes).sum();
        let count = (bytes / turn).max(1) * layouts.len() as u64;
        Self {
            count: u32::try_from(count).expect("a working set of less than 2^32 chunks"),
            layouts,
        }
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The layout of a chunk.
    pub fn layout(&self, number: u32) -> &KvLayout {
        &self.layouts[number as usize % self.layouts.len()]
    }

    /// The key of a chunk.
    pub fn key(&self, number: u32) -> ChunkKey {
        let mut bytes = [0; 32];
        for (word, index) in bytes.chunks_exact_mut(8).zip(0..) {
            word.copy_from_slice(&mix(u64::from(number) << 2 | index).to_le_bytes());
        }
        bytes[..4].copy_from_slice(&number.to_be_bytes());
        ChunkKey::from_bytes(bytes)
    }

    /// The chunk that has a key; `None` for keys of others.
    pub fn number(&self, key: &ChunkKey) -> Option<u32> {
        let number = u32::from_be_bytes(*key.as_bytes().first_chunk()?);
        (number < self.count && self.key(number) == *key).then_some(number)
    }

    /// At most `count` chunks of one layout, `first` the first.
    pub fn alike(&self, first: u32, count: usize) -> Vec<u32> {
        let alike = (first..self.count).step_by(self.layouts.len());
        alike.take(count).collect()
    }

    /// A whole chunk.
    pub fn chunk(&self, number: u32) -> Chunk {
        let (key, layout) = (self.key(number), *self.layout(number));
        let layer = |layer| {
            let mut bytes = vec![0; layout.layer_bytes()];
            for (word, expected) in bytes.chunks_mut(8).zip(pattern(&key, layer)) {
                word.copy_from_slice(&expected[..word.len()]);
            }
            Bytes::from(bytes)
        };
        Chunk {
            key,
            layout,
            level: Level::RAW,
            extents: (0..layout.layers()).map(layer).collect(),
        }
    }

    /// Whether `bytes` are a layer of a chunk.
    pub fn is_layer(&self, number: u32, layer: u16, bytes: &[u8]) -> bool {
        let mut words = bytes.chunks(8).zip(pattern(&self.key(number), layer));
        bytes.len() == self.layout(number).layer_bytes()
            && words.all(|(word, expected)| *word == expected[..word.len()])
    }
}

/// Words that differ with key, layer and place.
fn pattern(key: &ChunkKey, layer: u16) -> impl Iterator<Item = [u8; 8]> + use<> {
    let key = key
        .as_bytes()
        .last_chunk()
        .map_or(0, |word| u64::from_le_bytes(*word));
    let mut word = mix(key ^ u64::from(layer) << 48);
    std::iter::repeat_with(move || {
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (word ^ word >> 29).to_le_bytes()
    })
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_known_by_their_keys_and_bytes() {
        let set = WorkingSet::new(100 << 20);
        assert!(set.count() >= 64);
        for number in [0, 9, set.count() - 1] {
            let chunk = set.chunk(number);
            assert_eq!(set.number(&chunk.key), Some(number));
            for (layer, bytes) in (0..).zip(&chunk.extents) {
                assert!(set.is_layer(number, layer, bytes));
                assert!(!set.is_layer(number, layer + 1, bytes));
                assert!(!set.is_layer(number ^ 32, layer, bytes));
                assert!(!set.is_layer(number, layer, &bytes[1..]));
                let mut flipped = bytes.to_vec();
                *flipped.last_mut().unwrap() ^= 1;
                assert!(!set.is_layer(number, layer, &flipped));
            }
        }
        assert_eq!(set.number(&set.key(set.count())), None);
        assert_eq!(set.number(&ChunkKey::from_bytes([0; 32])), None);
    }
}
