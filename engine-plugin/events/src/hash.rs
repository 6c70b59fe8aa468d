//! vLLM's block hash `sha256_cbor`.
//!
//! A block's hash is SHA-256 over the canonical CBOR (RFC 8949, 4.2.1) of the array
//! `[parent, tokens, extra keys]`: the hash of the block before it, or for the first block
//! [`none_hash`]; the token ids; and what else its values depend on, or null. It follows
//! `vllm/v1/core/kv_cache_utils.py` of 0.32; the test vectors are that release's own output.
//!
//! vLLM's other hash functions take Python's pickles, or are keyed by a random number of the
//! process: their hashes are names and nothing else. vLLM uses this one when it is told
//! `--prefix-caching-hash-algo sha256_cbor`.
//!
//! Events carry the last 64 bits of a hash, [`low64`], unless the engine runs with
//! `VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0`.
//!
//! ```
//! use kvasir_events::hash::{DEFAULT_SEED, Prompt, none_hash, prompt_hashes};
//!
//! let tokens: Vec<u32> = (0..100).collect();
//! let prompt = Prompt { tokens: &tokens, ..Prompt::default() };
//! let hashes = prompt_hashes(&none_hash(DEFAULT_SEED), 32, &prompt);
//! assert_eq!(hashes.len(), 3); // the last four tokens fill no block
//! ```

use minicbor::Encoder;
use ring::digest::{SHA256, digest};

/// A block's whole hash.
pub type Hash = [u8; 32];

/// What vLLM derives [`none_hash`] from where `PYTHONHASHSEED` is not set.
pub const DEFAULT_SEED: &str = "vllm-none-hash";

/// What stands for the parent of a prompt's first block. `seed` is the value of
/// `PYTHONHASHSEED` in the engine's environment, or [`DEFAULT_SEED`].
pub fn none_hash(seed: &str) -> Hash {
    sha256(|out| {
        out.str(seed)?;
        Ok(())
    })
}

/// Something besides tokens that a block's values depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtraKey<'a> {
    /// An adapter, of every block.
    Lora {
        /// Its name.
        name: &'a str,
        /// The path it was loaded from; releases after 0.32 may leave it out.
        path: Option<&'a str>,
    },
    /// An image or the like that the block has a part of.
    Item {
        /// vLLM's hash of it, or the identifier that came with the request.
        identifier: &'a str,
        /// Its first token, counted from the block's; negative where it began before.
        offset: i64,
    },
    /// What keeps tenants apart, of the first block.
    Salt(&'a str),
    /// SHA-256 of the embeddings that the block has in place of tokens.
    Embeddings(&'a [u8]),
}

/// The hash of one block.
pub fn block_hash(parent: &Hash, tokens: &[u32], extra: &[ExtraKey<'_>]) -> Hash {
    sha256(|out| {
        out.array(3)?.bytes(parent)?;
        out.array(tokens.len() as u64)?;
        for token in tokens {
            out.u32(*token)?;
        }
        if extra.is_empty() {
            out.null()?;
            return Ok(());
        }
        out.array(extra.len() as u64)?;
        for key in extra {
            match key {
                ExtraKey::Lora { name, path } => {
                    out.array(2 + u64::from(path.is_some()))?;
                    out.str("lora")?.str(name)?;
                    if let Some(path) = path {
                        out.str(path)?;
                    }
                }
                ExtraKey::Item { identifier, offset } => {
                    out.array(3)?.str("mm")?.str(identifier)?.i64(*offset)?;
                }
                ExtraKey::Salt(salt) => {
                    out.array(2)?.str("cache_salt")?.str(salt)?;
                }
                ExtraKey::Embeddings(digest) => {
                    out.array(2)?.str("prompt_embeds")?.bytes(digest)?;
                }
            }
        }
        Ok(())
    })
}

/// A prompt, and what its blocks' hashes cover.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prompt<'a> {
    /// Token ids; those of an image are its placeholders.
    pub tokens: &'a [u32],
    /// Name and path of the adapter.
    pub lora: Option<(&'a str, Option<&'a str>)>,
    /// The request's `cache_salt`; an empty one is none.
    pub salt: &'a str,
    /// Images and the like, in the order of their tokens.
    pub items: &'a [Item<'a>],
}

/// An image or the like in a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item<'a> {
    /// vLLM's hash of it, or the identifier that came with the request.
    pub identifier: &'a str,
    /// Its first token.
    pub offset: usize,
    /// Its tokens.
    pub length: usize,
}

/// Hashes of the whole blocks of a prompt, in order; `none` is [`none_hash`]. There are none
/// where `block_size` is 0.
pub fn prompt_hashes(none: &Hash, block_size: usize, prompt: &Prompt<'_>) -> Vec<Hash> {
    if block_size == 0 {
        return Vec::new();
    }
    let mut hashes = Vec::with_capacity(prompt.tokens.len() / block_size);
    let mut parent = *none;
    let mut extra = Vec::new();
    // Items end in the order in which they begin.
    let mut items = prompt.items;
    for (block, tokens) in prompt.tokens.chunks_exact(block_size).enumerate() {
        let start = block * block_size;
        extra.clear();
        if let Some((name, path)) = prompt.lora {
            extra.push(ExtraKey::Lora { name, path });
        }
        while let [first, rest @ ..] = items
            && first.offset.saturating_add(first.length) <= start
        {
            items = rest;
        }
        let within = items
            .iter()
            .take_while(|item| item.offset < start + block_size);
        extra.extend(within.map(|item| ExtraKey::Item {
            identifier: item.identifier,
            offset: distance(start, item.offset),
        }));
        if start == 0 && !prompt.salt.is_empty() {
            extra.push(ExtraKey::Salt(prompt.salt));
        }
        parent = block_hash(&parent, tokens, &extra);
        hashes.push(parent);
    }
    hashes
}

/// The 64 bits of a hash by which events call a block: its last eight bytes, big-endian.
pub fn low64(hash: &Hash) -> u64 {
    let [.., a, b, c, d, e, f, g, h] = *hash;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

fn distance(from: usize, to: usize) -> i64 {
    let signed = |value| i64::try_from(value).expect("a prompt has fewer than 2^63 tokens");
    signed(to) - signed(from)
}

type Written = Result<(), minicbor::encode::Error<std::convert::Infallible>>;

fn sha256(write: impl FnOnce(&mut Encoder<Vec<u8>>) -> Written) -> Hash {
    let mut out = Encoder::new(Vec::with_capacity(256));
    write(&mut out).expect("a buffer in memory takes everything");
    let digest = digest(&SHA256, out.writer());
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests;
