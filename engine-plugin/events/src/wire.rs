//! Batches of KV events, as engines send them.
//!
//! A batch is the msgpack array `[timestamp, events, data_parallel_rank]`. An event is, by
//! engine and version,
//!
//! * a map with a tag, `{"type": "BlockStored", "block_hashes": […], …}`: vLLM; or
//! * an array, `["BlockStored", [hashes…], …]`, its fields in a fixed order: older vLLM, SGLang,
//!   and what routers of their time read.
//!
//! Both are read, and either is written. Fields follow `vllm/distributed/kv_events.py`. What is
//! not known here, fields and whole events, is counted and left out: engines add some with
//! every release. What is known has to be well formed.

#![deny(clippy::indexing_slicing)]

mod decode;
mod encode;
#[cfg(test)]
mod tests;

pub use decode::DecodeError;

/// What an engine says about its blocks, in one message.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Seconds since 1970, by the engine's clock.
    pub timestamp: f64,
    /// What happened, in order.
    pub events: Vec<Event>,
    /// Data-parallel rank of the engine.
    pub rank: Option<u32>,
    /// What was left out when it was read.
    pub unknown: Unknown,
}

/// What was left out of a batch, because it is not known here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unknown {
    /// Fields of known events, and of the batch.
    pub fields: u32,
    /// Whole events.
    pub events: u32,
}

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Maps with a tag.
    Maps,
    /// Arrays, fields in order.
    Arrays,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Blocks are there, or were used again.
    Stored(Box<Stored>),
    /// Blocks are gone.
    Removed(Removed),
    /// Every block is gone.
    Cleared,
}

/// `BlockStored`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// The blocks, each the one behind the one before it.
    pub hashes: Vec<BlockHash>,
    /// The block before the first; `None` at the beginning of a prompt.
    pub parent: Option<BlockHash>,
    /// Tokens of the blocks, one block's after the other's. Empty where an engine's tokens are
    /// not plain numbers.
    pub tokens: Vec<u32>,
    /// Tokens in a block.
    pub block_size: u32,
    /// Number of the adapter; engines go by its name.
    pub lora_id: Option<i64>,
    /// Name of the adapter.
    pub lora_name: Option<String>,
    /// What else the hash of each block covers, one entry a block.
    pub extra_keys: Option<Vec<Option<Vec<ExtraKey>>>>,
    /// Where they are.
    pub place: Place,
    /// What the layers of the group do, such as `full_attention`.
    pub kind: Option<String>,
    /// Tokens that layers with a window see.
    pub sliding_window: Option<u32>,
    /// Whose request it was.
    pub session_id: Option<String>,
}

/// `BlockRemoved`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Removed {
    /// The blocks.
    pub hashes: Vec<BlockHash>,
    /// Where they were.
    pub place: Place,
}

/// Where a block is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// `GPU`, `CPU`, `STORAGE`; engines without tiers say nothing, and mean `GPU`.
    pub medium: Option<String>,
    /// Group of layers that share a block table. `None` is group 0.
    pub group: Option<u32>,
    /// `LOCAL` or `REMOTE`, seen from the engine.
    pub locality: Option<String>,
    /// The tier that says so.
    pub ownership: Option<String>,
}

/// Name of a block.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BlockHash {
    /// 64 bits; those of a longer hash are its last, big-endian. Negative numbers are taken as
    /// their two's complement.
    Int(u64),
    /// All bytes of it.
    Bytes(Box<[u8]>),
}

impl BlockHash {
    /// The 64 bits by which engines call a block in events: the last eight bytes, big-endian.
    pub fn low64(&self) -> u64 {
        match self {
            Self::Int(bits) => *bits,
            Self::Bytes(bytes) => {
                let tail = bytes.iter().skip(bytes.len().saturating_sub(8));
                tail.fold(0, |bits, &byte| bits << 8 | u64::from(byte))
            }
        }
    }
}

/// What a block's hash covers besides tokens, as events say it: without the tags that the hash
/// itself has, so that a name and a salt look alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtraKey {
    /// Name of an adapter, or a salt.
    Text(String),
    /// An image or the like, and where it begins, counted from the block's first token.
    Item(String, i64),
    /// Digest of embeddings that stand for tokens.
    Bytes(Box<[u8]>),
}

impl Batch {
    /// Reads a batch, in either form.
    ///
    /// Takes memory in proportion to `bytes`, whatever lengths these claim.
    ///
    /// # Errors
    /// The bytes are not msgpack, end early, go on behind the batch, or a known field is
    /// missing or of another type.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        decode::batch(bytes)
    }

    /// Writes a batch, byte for byte as msgspec does for vLLM.
    pub fn encode(&self, form: Form) -> Vec<u8> {
        encode::batch(self, form)
    }
}

/// Names of the events.
const STORED: &str = "BlockStored";
const REMOVED: &str = "BlockRemoved";
const CLEARED: &str = "AllBlocksCleared";

/// Fields of `BlockStored` in order, as an array has them behind the tag.
const STORED_FIELDS: [&str; 14] = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
    "locality",
    "ownership",
    "session_id",
];

/// Those without a default, which a map always has.
const STORED_ALWAYS: usize = 7;

const REMOVED_FIELDS: [&str; 5] = [
    "block_hashes",
    "medium",
    "group_idx",
    "locality",
    "ownership",
];
const REMOVED_ALWAYS: usize = 2;
