//! Chunks on their way from the daemon, layer by layer.
//!
//! Over gRPC ([`messages`]) or the data plane ([`transfer`]); what comes is checked here.

mod messages;
mod transfer;

use std::fmt;
use std::time::Instant;

use bytes::Bytes;
use futures::Stream;
use kvasir_proto::sequence::{Place, Sequence, Wanted};
use kvasir_proto::transfer::Line;
use kvasir_proto::v1::cache_client::CacheClient;
use kvasir_proto::v1::chunk_lost::Reason;
use kvasir_proto::{InvalidField, convert, v1};
use kvasir_transport::Fetch;
use kvasir_types::{Checksum, KvLayout, LayerIdx, LayerRange, Level, Slice};
use tonic::Status;
use tonic::transport::Channel;

use crate::deadline::Deadline;
use crate::error::{CallError, Origin, ProtocolError, broken};
use crate::hold::LeaseId;
use crate::paths::Gone;
use crate::stats::Tier;

use messages::Messages;
use transfer::{Opening, Transfer};

/// What to get, and by when.
#[derive(Clone, Debug, Default)]
pub struct GetOptions {
    /// Which layers. Default: all.
    pub layers: Option<LayerRange>,
    /// The finest level wanted of each layer, from the first of `layers` on; the last one
    /// also of all that follow. What is stored at a nested level comes up to this one, and
    /// anything else as it is. Default: as stored.
    pub levels: Vec<Level>,
    /// A nested level that is here already: what chunks at nested levels have up to this
    /// one does not come again, their preludes neither. Default: none.
    pub have: Option<Level>,
    /// Heads and tokens wanted of each layer, of chunks that are stored raw: what comes is a
    /// layer of so many heads and tokens. Other chunks come whole, and all do from a daemon that
    /// does not know of these; see [`LayerStream::slice`]. Default: all.
    pub slice: Option<Slice>,
    /// When the whole stream must be over. Default:
    /// [`ClientConfig::transfer_timeout`](crate::ClientConfig::transfer_timeout)
    /// from the call.
    pub deadline: Option<Instant>,
    /// Read by the name of a lease: what it holds, and nothing else. Default: none.
    pub lease: Option<LeaseId>,
    /// Whether nobody waits for it yet: on the data plane, gets that somebody waits for
    /// overtake it. Default: false.
    pub ahead: bool,
}

/// A chunk that the daemon holds for the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkInfo {
    /// Its layout.
    pub layout: KvLayout,
    /// The level that it is stored at.
    pub level: Level,
    /// Tier it is read from.
    pub tier: Tier,
}

/// What came next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GetEvent {
    /// What decoding an encoded chunk takes besides its layers, which come later. Its bytes
    /// match their checksum.
    Prelude {
        /// Index into the requested keys.
        chunk: usize,
        /// The prelude; see `kvasir_codec::Prelude`.
        data: Bytes,
    },
    /// A whole layer, as far as it was asked for, whose bytes match their checksums.
    Layer {
        /// Index into the requested keys.
        chunk: usize,
        /// The layer.
        layer: LayerIdx,
        /// Its parts, from the coarsest on, without those that were here already. One of
        /// a chunk that is not stored at a nested level; of a raw one, the layer's bytes, or
        /// those of its [`slice`](LayerStream::slice).
        parts: Vec<Bytes>,
    },
    /// This chunk and every later one will not be completed; drop what came of
    /// them. Earlier chunks go on.
    Lost {
        /// Index into the requested keys.
        chunk: usize,
        /// Why.
        reason: LostReason,
    },
}

/// Why a chunk was lost in the middle of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostReason {
    /// Its bytes do not match their checksum, at the daemon or on arrival.
    Corrupt,
    /// The daemon's device failed.
    Device,
    /// The daemon ran out of memory for it.
    Throttled,
}

impl fmt::Display for LostReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Corrupt => "its bytes failed their checksum",
            Self::Device => "the daemon's device failed",
            Self::Throttled => "the daemon ran out of memory for it",
        })
    }
}

/// A get under way; made by [`Client::get`](crate::Client::get).
///
/// Layers come layer-major: layer 0 of every chunk, then layer 1, and so on, so
/// that attention over layer 0 can start while layer 1 is on the wire. Dropping
/// the stream ends it at the daemon too.
pub struct LayerStream {
    deadline: Deadline,
    wire: Wire,
    chunks: Vec<ChunkInfo>,
    sequence: Sequence,
    /// Parts of the layer that is due.
    parts: Vec<Bytes>,
    /// Has the daemon look after chunks that came corrupt, where it does not itself.
    doubts: Option<Doubts>,
}

/// Chunks of memory that a daemon shares are compared with their checksums here alone. It
/// reads one that does not match again, for itself, and drops it if it went bad.
pub(crate) struct Doubts {
    pub(crate) grpc: CacheClient<Channel>,
    /// Of the get, in order.
    pub(crate) keys: Vec<Bytes>,
}

impl Doubts {
    fn tell(&self, chunk: usize) {
        let mut grpc = self.grpc.clone();
        let request = v1::GetRequest {
            keys: self.keys.get(chunk).into_iter().cloned().collect(),
            ..v1::GetRequest::default()
        };
        tokio::spawn(async move {
            let Ok(response) = grpc.get(request).await else {
                return;
            };
            // The daemon reads it in order to send it.
            let mut messages = response.into_inner();
            while let Ok(Some(_)) = messages.message().await {}
        });
    }
}

/// What extents come over.
enum Wire {
    Grpc(Messages),
    Data(Transfer),
}

/// What came of the extent that is due.
enum Arrival {
    /// All of it, the checksum that the daemon states, if it does, and that of what came.
    Whole {
        data: Bytes,
        stated: Option<Checksum>,
        found: Checksum,
    },
    /// This chunk and every later one will not come.
    Lost(usize, LostReason),
    /// Not all of it, yet.
    Nothing,
}

impl LayerStream {
    /// Waits for the header and checks it against the request.
    pub(crate) async fn over_grpc(
        origin: Origin,
        deadline: Deadline,
        messages: impl Stream<Item = Result<v1::GetResponse, Status>> + Send + 'static,
        keys: usize,
        wanted: Wanted,
    ) -> Result<Self, CallError> {
        let mut messages = Messages::new(origin, messages);
        let header = messages.header(deadline).await?;
        let (chunks, sequence) = announced(&header, keys, wanted)?;
        Ok(Self::new(deadline, Wire::Grpc(messages), chunks, sequence))
    }

    /// Waits for the description and checks it against the request.
    pub(crate) async fn over_data_plane(
        origin: Origin,
        deadline: Deadline,
        fetch: Fetch,
        gone: Gone,
        doubts: Doubts,
        wanted: Wanted,
    ) -> Result<Self, CallError> {
        let mut opening = Opening::new(origin, fetch, gone);
        let (total, described) = opening.description(deadline).await?;
        let header = described.header.as_ref().ok_or(ProtocolError::Header)?;
        let (chunks, sequence) = announced(header, doubts.keys.len(), wanted)?;
        let line = Line::parse(&described, &sequence).map_err(broken)?;
        let transfer = opening.transfer(total, line)?;
        let wire = Wire::Data(transfer);
        Ok(Self {
            doubts: Some(doubts),
            ..Self::new(deadline, wire, chunks, sequence)
        })
    }

    /// The answer to a request for nothing.
    pub(crate) fn empty(origin: Origin, deadline: Deadline) -> Self {
        let nothing = Sequence::new(Wanted::default(), None, Vec::new());
        let nothing = nothing.expect("no layers are asked for");
        let wire = Wire::Grpc(Messages::new(origin, futures::stream::empty()));
        Self::new(deadline, wire, Vec::new(), nothing)
    }

    fn new(deadline: Deadline, wire: Wire, chunks: Vec<ChunkInfo>, sequence: Sequence) -> Self {
        Self {
            deadline,
            wire,
            chunks,
            sequence,
            parts: Vec::new(),
            doubts: None,
        }
    }

    /// Which heads and tokens come of a chunk's layers; `None`, if all. The layout of what comes
    /// is [`KvLayout::sliced`].
    pub fn slice(&self, chunk: usize) -> Option<Slice> {
        self.sequence.slice(chunk)
    }

    /// The leading chunks of the request that are present and being streamed. All
    /// have one layout.
    pub fn chunks(&self) -> &[ChunkInfo] {
        &self.chunks
    }

    /// Waits for the next layer; `None` when every layer of every chunk that was
    /// not lost has come.
    ///
    /// # Errors
    /// The daemon went away or broke the protocol, or the deadline passed. What
    /// came before is valid, but no chunk is complete.
    pub async fn next(&mut self) -> Result<Option<GetEvent>, CallError> {
        loop {
            let Some(due) = self.sequence.peek() else {
                return Ok(None);
            };
            let arrival = match &mut self.wire {
                Wire::Grpc(messages) => messages.next(self.deadline, &due, &self.sequence).await?,
                Wire::Data(transfer) => transfer.next(self.deadline, &due).await?,
            };
            let event = match arrival {
                Arrival::Whole {
                    data,
                    stated,
                    found,
                } => self.whole(&due, data, stated.is_none_or(|stated| stated == found)),
                Arrival::Lost(chunk, reason) => self.give_up(chunk, reason),
                Arrival::Nothing => None,
            };
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    fn give_up(&mut self, chunk: usize, reason: LostReason) -> Option<GetEvent> {
        let before = self.sequence.peek();
        if !self.sequence.lose(chunk) {
            return None;
        }
        if self.sequence.peek() != before {
            self.parts.clear();
        }
        Some(GetEvent::Lost { chunk, reason })
    }

    fn whole(&mut self, due: &Place, data: Bytes, sound: bool) -> Option<GetEvent> {
        let chunk = due.chunk;
        if !sound {
            tracing::warn!(chunk, extent = %due.extent, "an extent arrived corrupt");
            if let Some(doubts) = &self.doubts {
                doubts.tell(chunk);
            }
            return self.give_up(chunk, LostReason::Corrupt);
        }
        self.sequence.resume_after(due);
        let Some(layer) = due.layer else {
            return Some(GetEvent::Prelude { chunk, data });
        };
        self.parts.push(data);
        due.last.then(|| GetEvent::Layer {
            chunk,
            layer,
            parts: std::mem::take(&mut self.parts),
        })
    }
}

/// The chunks that a header announces, and what will come of them.
fn announced(
    header: &v1::GetHeader,
    keys: usize,
    wanted: Wanted,
) -> Result<(Vec<ChunkInfo>, Sequence), CallError> {
    let chunks = header
        .chunks
        .iter()
        .map(chunk_info)
        .collect::<Result<Vec<_>, _>>()
        .map_err(broken)?;
    if chunks.len() > keys {
        return Err(ProtocolError::Count {
            asked: keys,
            got: chunks.len(),
        }
        .into());
    }
    let layout = chunks.first().map(|first| first.layout);
    let differs = |chunk: &ChunkInfo| Some(chunk.layout) != layout;
    if let Some(index) = chunks.iter().position(differs) {
        return Err(ProtocolError::MixedLayouts(index).into());
    }
    let levels = chunks.iter().map(|chunk| chunk.level).collect();
    let slice = wanted.slice.filter(|_| header.cut);
    let sequence = Sequence::new(Wanted { slice, ..wanted }, layout, levels);
    let sequence = sequence.map_err(|error| broken(InvalidField::new(error.field(), error)))?;
    Ok((chunks, sequence))
}

impl LostReason {
    fn from_wire(reason: Reason) -> Self {
        match reason {
            Reason::Corrupt => Self::Corrupt,
            Reason::Throttled => Self::Throttled,
            // A reason this version cannot name is still a loss.
            Reason::Device | Reason::Unspecified => Self::Device,
        }
    }
}

impl fmt::Debug for LayerStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerStream")
            .field("deadline", &self.deadline)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

pub(crate) fn chunk_info(wire: &v1::ChunkInfo) -> Result<ChunkInfo, InvalidField> {
    Ok(ChunkInfo {
        layout: convert::layout("header.chunks.layout", wire.layout.as_ref())?,
        level: convert::level("header.chunks.level", wire.level)?,
        tier: Tier::from_wire(wire.tier())
            .ok_or_else(|| InvalidField::new("header.chunks.tier", "unspecified"))?,
    })
}

#[cfg(test)]
mod tests;
