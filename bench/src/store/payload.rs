//! Objects to store: random bytes in layouts of real models.

use anyhow::ensure;
use bytes::Bytes;
use kvasir_codec::Object;
use kvasir_types::{ChunkKey, DType, ExtentRange, KvLayout, Planes};
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// One size of objects.
pub(super) struct Size {
    /// As in the names of rows.
    pub(super) name: &'static str,
    pub(super) layout: KvLayout,
}

impl Size {
    /// Payload of one object.
    pub(super) fn bytes(&self) -> u64 {
        self.layout.chunk_bytes()
    }

    /// How many objects make up `bytes`.
    pub(super) fn count(&self, bytes: u64) -> anyhow::Result<usize> {
        Ok(usize::try_from(bytes / self.bytes())?)
    }

    pub(super) fn all_extents(&self) -> anyhow::Result<ExtentRange> {
        Ok(ExtentRange::new(0, self.layout.layers().into())?)
    }
}

/// Chunks of 8 and 32 tokens of a model like Llama 3.2 1B, of 32 and 128 tokens of one
/// like Llama 3 8B.
pub(super) fn sizes() -> anyhow::Result<[Size; 4]> {
    let small = |tokens| KvLayout::new(16, 8, Planes::symmetric(64), tokens, DType::Bf16);
    let large = |tokens| KvLayout::new(32, 8, Planes::symmetric(128), tokens, DType::Bf16);
    let size = |name, layout| Size { name, layout };
    Ok([
        size("256KiB", small(8)?),
        size("1MiB", small(32)?),
        size("4MiB", large(32)?),
        size("16MiB", large(128)?),
    ])
}

/// A set of objects with the keys `key(0)`, `key(1)`, ….
pub(super) struct Payload {
    pub(super) objects: Vec<Object>,
    /// The same bytes, each object in one piece.
    pub(super) whole: Vec<Bytes>,
}

impl Payload {
    pub(super) fn random(size: &Size, count: usize) -> anyhow::Result<Self> {
        ensure!(count > 0, "a set needs an object");
        let mut rng = ChaCha8Rng::seed_from_u64(size.bytes());
        let bytes = usize::try_from(size.bytes())?;
        let mut payload = Self {
            objects: Vec::with_capacity(count),
            whole: Vec::with_capacity(count),
        };
        for index in 0..count {
            let mut whole = vec![0; bytes];
            rng.fill_bytes(&mut whole);
            let whole = Bytes::from(whole);
            let mut rest = whole.clone();
            let layers = (0..size.layout.layers())
                .map(|_| rest.split_to(size.layout.layer_bytes()))
                .collect();
            payload
                .objects
                .push(Object::raw(key(index as u64), &size.layout, layers)?);
            payload.whole.push(whole);
        }
        Ok(payload)
    }

    /// The object whose turn it is.
    pub(super) fn object(&self, index: usize) -> &Object {
        &self.objects[index % self.objects.len()]
    }
}

/// Keys that look like hashes, as real ones do.
pub(crate) fn key(index: u64) -> ChunkKey {
    let mut bytes = [0; 32];
    let mut state = index.wrapping_mul(4);
    for word in bytes.chunks_exact_mut(8) {
        state = state.wrapping_add(1);
        word.copy_from_slice(&splitmix64(state).to_le_bytes());
    }
    ChunkKey::from_bytes(bytes)
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
fn splitmix64(seed: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn sizes_are_what_their_names_say() {
        let bytes = sizes().unwrap().map(|size| size.bytes());
        assert_eq!(bytes, [256 << 10, 1 << 20, 4 << 20, 16 << 20]);
    }

    #[test]
    fn keys_differ_and_spread() {
        let keys: HashSet<_> = (0..4096).map(key).collect();
        assert_eq!(keys.len(), 4096);
        let first: HashSet<u8> = keys.iter().map(|key| key.as_bytes()[0]).collect();
        assert_eq!(first.len(), 256);
    }
}
