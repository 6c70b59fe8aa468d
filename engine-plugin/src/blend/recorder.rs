//! What was recorded of a chunk when it was compiled, beside it in the cache.
//!
//! Which tokens of a chunk depend on what stands before it, and in which layers, is found out
//! once, by whichever engine compiles it, and serves all that reuse it. It is stored as a chunk
//! of its own: a half-precision number for each layer and token, raw, under an opaque name made of
//! the chunk's key and of how it was recorded.

use bytes::Bytes;
use kvasir_types::{ChunkKey, DType, KvLayout, LayoutError, Namespace, Planes};

/// How scores are recorded: those of others are of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorder {
    /// Digest of what they are recorded behind.
    pub digest: [u8; 32],
    /// Layers that they are recorded of.
    pub layers: u16,
}

impl Recorder {
    /// The key of a chunk's scores.
    pub fn key(&self, namespace: &Namespace, chunk: &ChunkKey) -> ChunkKey {
        let name = [
            NAME,
            &self.digest,
            &self.layers.to_le_bytes(),
            chunk.as_bytes(),
        ];
        namespace.opaque(&name.concat())
    }

    /// The layout that a chunk's scores are stored in: one plane, `[layer][token]`.
    ///
    /// # Errors
    /// No tokens, or far too many.
    pub fn layout(&self, tokens: u32) -> Result<KvLayout, LayoutError> {
        KvLayout::new(
            self.layers,
            1,
            Planes::Single { dim: 1 },
            tokens,
            DType::F16,
        )
    }
}

/// A chunk's scores as they are stored: by layer, of 2 bytes a token.
pub(crate) type Recorded = Vec<Bytes>;

const NAME: &[u8] = b"kvasir blend scores";
