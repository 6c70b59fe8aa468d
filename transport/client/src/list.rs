//! The chunks of a daemon, in the order of their keys.

use kvasir_proto::{convert, v1};
use kvasir_types::{ChunkKey, KvLayout, Level};
use tonic::Streaming;

use crate::deadline::Deadline;
use crate::error::{CallError, Origin, broken};
use crate::stats::Tier;

/// Which chunks to list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListOptions {
    /// Only chunks after this key. Default: from the first.
    pub after: Option<ChunkKey>,
    /// At most this many; 0 means no limit. Default: 0.
    pub limit: u64,
}

/// A chunk of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedChunk {
    /// Its key.
    pub key: ChunkKey,
    /// Its layout.
    pub layout: KvLayout,
    /// Codec level of its stored payload.
    pub level: Level,
    /// Bytes of the stored object, header included.
    pub bytes: u64,
    /// Tiers that hold it, fastest first.
    pub tiers: Vec<Tier>,
}

/// A listing under way.
#[derive(Debug)]
pub struct Listing {
    pub(crate) origin: Origin,
    pub(crate) deadline: Deadline,
    pub(crate) stream: Streaming<v1::ListResponse>,
}

impl Listing {
    /// The next chunk; `None` at the end.
    ///
    /// # Errors
    /// The daemon went away, or the deadline passed.
    pub async fn next(&mut self) -> Result<Option<ListedChunk>, CallError> {
        let message = self.stream.message();
        match self.deadline.bound(&self.origin, message).await? {
            Some(wire) => parse(wire).map(Some),
            None => Ok(None),
        }
    }

    /// All the chunks that are left.
    ///
    /// # Errors
    /// Like [`next`](Self::next).
    pub async fn collect(mut self) -> Result<Vec<ListedChunk>, CallError> {
        let mut all = Vec::new();
        while let Some(chunk) = self.next().await? {
            all.push(chunk);
        }
        Ok(all)
    }
}

fn parse(wire: v1::ListResponse) -> Result<ListedChunk, CallError> {
    Ok(ListedChunk {
        key: convert::key("key", &wire.key).map_err(broken)?,
        layout: convert::layout("layout", wire.layout.as_ref()).map_err(broken)?,
        level: convert::level("level", wire.level).map_err(broken)?,
        bytes: wire.bytes,
        tiers: wire.tiers().filter_map(Tier::from_wire).collect(),
    })
}
