//! Chunks on their way from the daemon, layer by layer.

use std::fmt;
use std::time::Instant;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use kvasir_proto::assembly::Assembly;
use kvasir_proto::sequence::{Place, Sequence, Wanted};
use kvasir_proto::{InvalidField, convert, v1};
use kvasir_types::{KvLayout, LayerIdx, LayerRange, Level};
use tonic::Status;
use v1::get_response::Message;

use crate::deadline::Deadline;
use crate::error::{CallError, Origin, ProtocolError, broken};
use crate::hold::LeaseId;
use crate::stats::Tier;

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
    /// When the whole stream must be over. Default:
    /// [`ClientConfig::transfer_timeout`](crate::ClientConfig::transfer_timeout)
    /// from the call.
    pub deadline: Option<Instant>,
    /// Read by the name of a lease: what it holds, and nothing else. Default: none.
    pub lease: Option<LeaseId>,
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
        /// a chunk that is not stored at a nested level; of a raw one, the layer's bytes.
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
    origin: Origin,
    deadline: Deadline,
    messages: Messages,
    chunks: Vec<ChunkInfo>,
    sequence: Sequence,
    assembly: Assembly,
    /// Parts of the layer that is due.
    parts: Vec<Bytes>,
}

type Messages = futures::stream::BoxStream<'static, Result<v1::GetResponse, Status>>;

impl LayerStream {
    /// Waits for the header and checks it against the request.
    pub(crate) async fn open(
        origin: Origin,
        deadline: Deadline,
        messages: impl Stream<Item = Result<v1::GetResponse, Status>> + Send + 'static,
        keys: usize,
        wanted: Wanted,
    ) -> Result<Self, CallError> {
        let mut messages = messages.boxed();
        let first = deadline
            .bound(&origin, next_message(&mut messages))
            .await?
            .and_then(|response| response.message);
        let Some(Message::Header(header)) = first else {
            return Err(ProtocolError::Header.into());
        };
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
        let sequence = Sequence::new(wanted, layout, levels)
            .map_err(|error| broken(InvalidField::new("layers", error)))?;
        Ok(Self {
            origin,
            deadline,
            messages,
            chunks,
            sequence,
            assembly: Assembly::default(),
            parts: Vec::new(),
        })
    }

    /// The answer to a request for nothing.
    pub(crate) fn empty(origin: Origin, deadline: Deadline) -> Self {
        let nothing = Sequence::new(Wanted::default(), None, Vec::new());
        Self {
            origin,
            deadline,
            messages: futures::stream::empty().boxed(),
            chunks: Vec::new(),
            sequence: nothing.expect("no layers are asked for"),
            assembly: Assembly::default(),
            parts: Vec::new(),
        }
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
            let message = self
                .deadline
                .bound(&self.origin, next_message(&mut self.messages))
                .await?
                .ok_or(ProtocolError::Truncated {
                    chunk: due.chunk,
                    extent: due.extent,
                })?
                .message;
            let event = match message.ok_or(ProtocolError::Empty)? {
                Message::Header(_) => return Err(ProtocolError::Header.into()),
                Message::Lost(lost) => self.lost(&lost)?,
                Message::Piece(piece) => self.piece(due, piece)?,
            };
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    fn lost(&mut self, lost: &v1::ChunkLost) -> Result<Option<GetEvent>, CallError> {
        use v1::chunk_lost::Reason;
        let reason = match lost.reason() {
            Reason::Corrupt => LostReason::Corrupt,
            Reason::Throttled => LostReason::Throttled,
            // A reason this version cannot name is still a loss.
            Reason::Device | Reason::Unspecified => LostReason::Device,
        };
        Ok(self.give_up(lost.chunk as usize, reason))
    }

    fn give_up(&mut self, chunk: usize, reason: LostReason) -> Option<GetEvent> {
        let before = self.sequence.peek();
        if !self.sequence.lose(chunk) {
            return None;
        }
        if self.sequence.peek() != before {
            self.assembly = Assembly::default();
            self.parts.clear();
        }
        Some(GetEvent::Lost { chunk, reason })
    }

    fn piece(&mut self, due: Place, piece: v1::ChunkPiece) -> Result<Option<GetEvent>, CallError> {
        let chunk = piece.chunk as usize;
        if chunk >= self.sequence.live() {
            if chunk >= self.chunks.len() {
                return Err(out_of_order(due, piece.chunk));
            }
            // Still under way when its loss was found.
            return Ok(None);
        }
        if chunk != due.chunk {
            return Err(out_of_order(due, piece.chunk));
        }
        let Some(piece) = piece.piece else {
            return Err(ProtocolError::Empty.into());
        };
        let whole = self
            .assembly
            .push(piece, due.extent, self.sequence.bounds(&due))
            .map_err(broken)?;
        let Some(whole) = whole else {
            return Ok(None);
        };
        if whole.verify().is_err() {
            tracing::warn!(chunk, extent = %due.extent, "an extent arrived corrupt");
            return Ok(self.give_up(chunk, LostReason::Corrupt));
        }
        self.sequence.resume_after(&due);
        let Some(layer) = due.layer else {
            let data = whole.data;
            return Ok(Some(GetEvent::Prelude { chunk, data }));
        };
        self.parts.push(whole.data);
        Ok(due.last.then(|| GetEvent::Layer {
            chunk,
            layer,
            parts: std::mem::take(&mut self.parts),
        }))
    }
}

fn out_of_order(due: Place, got: u32) -> CallError {
    ProtocolError::Order {
        extent: due.extent,
        got,
        due: due.chunk,
    }
    .into()
}

impl fmt::Debug for LayerStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerStream")
            .field("origin", &self.origin)
            .field("deadline", &self.deadline)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

async fn next_message(messages: &mut Messages) -> Result<Option<v1::GetResponse>, Status> {
    messages.next().await.transpose()
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
