//! What a chunk is: namespaces and keys.
//!
//! A [`Namespace`] fixes everything outside the tokens that changes a value:
//! model, adapter, layout, tokenizer and tenant. A [`ChunkKey`] adds the tokens,
//! and for prefix chunks everything before them through the parent's key.
//!
//! Not in a key: codec level, tensor-parallel degree, process, environment.

use std::fmt;
use std::str::FromStr;

use crate::canonical::{Canonical, parse_hex, write_hex};
use crate::layout::{KvLayout, LayoutDigest};

/// Identity of a chunk: 256 bits of BLAKE3.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkKey([u8; 32]);

impl ChunkKey {
    /// A key read from storage or the wire.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key's bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// [`Namespace::opaque`], for who knows a namespace by its digest alone.
    pub fn opaque(namespace: &[u8; 32], name: &[u8]) -> Self {
        let mut canonical = Canonical::new("kvasir v1 chunk opaque");
        canonical.field(1, namespace).field(4, name);
        Self(canonical.digest())
    }
}

impl fmt::Display for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkKey({self})")
    }
}

/// Text that is not a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a chunk key; a key is 64 hexadecimal digits")]
pub struct ParseKeyError(String);

impl FromStr for ChunkKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_hex(text)
            .map(Self)
            .ok_or_else(|| ParseKeyError(text.to_owned()))
    }
}

/// The model whose KV a chunk holds. Every field is part of the key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ModelIdentity {
    /// Architecture and every configuration value that changes the computation,
    /// as canonical text.
    pub architecture: String,
    /// Revision of the weights; a digest of their bytes where one is at hand.
    pub weights: String,
    /// Kind and parameters of the rotary position embedding, as canonical text.
    pub rope: String,
}

/// A fine-tuning adapter (LoRA) applied on top of the model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Adapter {
    /// Name of the adapter.
    pub name: String,
    /// Its revision.
    pub revision: String,
}

/// Everything outside the tokens that changes a value, reduced to a digest.
///
/// ```
/// use kvasir_types::{DType, KvLayout, ModelIdentity, Namespace, Planes};
///
/// let layout = KvLayout::new(16, 4, Planes::symmetric(64), 256, DType::F32)?;
/// let model = ModelIdentity {
///     architecture: "llama hidden=1024".into(),
///     weights: "a1b2".into(),
///     rope: "default theta=10000".into(),
/// };
/// let namespace = Namespace::new(&model, None, layout, &[7; 32], b"tenant-1");
/// let tokens: Vec<u32> = (0..600).collect();
/// let keys = namespace.prefix_keys(&tokens);
/// assert_eq!(keys.len(), 2); // 600 tokens hold two whole chunks of 256
/// # Ok::<(), kvasir_types::LayoutError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Namespace {
    digest: [u8; 32],
    layout: KvLayout,
}

impl Namespace {
    /// A namespace. `tokenizer` is a digest of the tokenizer's definition;
    /// `tenant_salt` separates tenants and is empty in a store with one tenant.
    pub fn new(
        model: &ModelIdentity,
        adapter: Option<&Adapter>,
        layout: KvLayout,
        tokenizer: &[u8; 32],
        tenant_salt: &[u8],
    ) -> Self {
        let mut canonical = Canonical::new("kvasir v1 namespace");
        canonical
            .field(1, model.architecture.as_bytes())
            .field(2, model.weights.as_bytes())
            .field(3, model.rope.as_bytes());
        // An absent adapter has no fields 4 and 5, which differs from an empty name.
        if let Some(adapter) = adapter {
            canonical
                .field(4, adapter.name.as_bytes())
                .field(5, adapter.revision.as_bytes());
        }
        canonical
            .field(6, &layout.encode())
            .field(7, tokenizer)
            .field(8, tenant_salt);
        Self {
            digest: canonical.digest(),
            layout,
        }
    }

    /// The layout of this namespace's chunks.
    pub const fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The digest of that layout.
    pub fn layout_digest(&self) -> LayoutDigest {
        self.layout.digest()
    }

    /// The namespace's digest.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Key of the prefix chunk holding `tokens` after the chunk `parent`
    /// (`None` for the first chunk of a sequence).
    pub fn prefix(&self, parent: Option<&ChunkKey>, tokens: &[u32]) -> ChunkKey {
        let mut canonical = Canonical::new("kvasir v1 chunk prefix");
        canonical.field(1, &self.digest);
        if let Some(parent) = parent {
            canonical.field(2, parent.as_bytes());
        }
        canonical.tokens(3, tokens);
        ChunkKey(canonical.digest())
    }

    /// Keys of all whole prefix chunks of a token sequence, in order. Tokens after
    /// the last whole chunk have no key.
    pub fn prefix_keys(&self, tokens: &[u32]) -> Vec<ChunkKey> {
        let mut keys: Vec<ChunkKey> = Vec::new();
        for chunk in tokens.chunks_exact(self.layout.tokens() as usize) {
            keys.push(self.prefix(keys.last(), chunk));
        }
        keys
    }

    /// Key of a content chunk: its own tokens only, reusable at any position.
    pub fn content(&self, tokens: &[u32]) -> ChunkKey {
        self.content_after(&[], tokens)
    }

    /// Key of a content chunk whose KV was computed behind `prefix`, such as the token
    /// that every prompt begins with: it is part of what the chunk's values came from. With
    /// no prefix, [`content`](Self::content).
    pub fn content_after(&self, prefix: &[u32], tokens: &[u32]) -> ChunkKey {
        let mut canonical = Canonical::new("kvasir v1 chunk content");
        canonical.field(1, &self.digest).tokens(3, tokens);
        // Absent rather than empty: keys without a prefix are older than this field.
        if !prefix.is_empty() {
            canonical.tokens(5, prefix);
        }
        ChunkKey(canonical.digest())
    }

    /// Key of a chunk that an engine names by its own block hash.
    pub fn opaque(&self, name: &[u8]) -> ChunkKey {
        ChunkKey::opaque(&self.digest, name)
    }
}
