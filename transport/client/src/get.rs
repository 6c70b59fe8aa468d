//! Chunks on their way from the daemon, layer by layer.

use std::fmt;
use std::time::Instant;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use kvasir_proto::convert::{self, LayerAssembly};
use kvasir_proto::{InvalidField, v1};
use kvasir_types::{KvLayout, LayerIdx, LayerRange, Level};
use tonic::Status;
use v1::get_response::Message;

use crate::deadline::Deadline;
use crate::error::{CallError, Origin, ProtocolError, broken};
use crate::hold::LeaseId;
use crate::stats::Tier;

/// What to get, and by when.
#[derive(Clone, Copy, Debug, Default)]
pub struct GetOptions {
    /// Which layers. Default: all.
    pub layers: Option<LayerRange>,
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
    /// Codec level of its layers.
    pub level: Level,
    /// Tier it is read from.
    pub tier: Tier,
}

/// What came next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GetEvent {
    /// A whole layer whose bytes match their checksum.
    Layer {
        /// Index into the requested keys.
        chunk: usize,
        /// The layer.
        layer: LayerIdx,
        /// Its bytes.
        data: Bytes,
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
    cursor: Cursor,
    assembly: LayerAssembly,
}

type Messages = futures::stream::BoxStream<'static, Result<v1::GetResponse, Status>>;

impl LayerStream {
    /// Waits for the header and checks it against the request.
    pub(crate) async fn open(
        origin: Origin,
        deadline: Deadline,
        messages: impl Stream<Item = Result<v1::GetResponse, Status>> + Send + 'static,
        keys: usize,
        layers: Option<LayerRange>,
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
        let cursor = Cursor::new(&chunks, layers)?;
        Ok(Self {
            origin,
            deadline,
            messages,
            chunks,
            cursor,
            assembly: LayerAssembly::default(),
        })
    }

    /// The answer to a request for nothing.
    pub(crate) fn empty(origin: Origin, deadline: Deadline) -> Self {
        Self {
            origin,
            deadline,
            messages: futures::stream::empty().boxed(),
            chunks: Vec::new(),
            cursor: Cursor::empty(),
            assembly: LayerAssembly::default(),
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
            let Some(due) = self.cursor.due() else {
                return Ok(None);
            };
            let message = self
                .deadline
                .bound(&self.origin, next_message(&mut self.messages))
                .await?
                .ok_or(ProtocolError::Truncated {
                    chunk: due.chunk,
                    layer: LayerIdx(due.layer),
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
        let before = self.cursor.due();
        if !self.cursor.lose(chunk) {
            return None;
        }
        if self.cursor.due() != before {
            self.assembly = LayerAssembly::default();
        }
        Some(GetEvent::Lost { chunk, reason })
    }

    fn piece(&mut self, due: Due, piece: v1::ChunkPiece) -> Result<Option<GetEvent>, CallError> {
        let chunk = piece.chunk as usize;
        if chunk >= self.cursor.live {
            if chunk >= self.chunks.len() {
                return Err(self.order(due, piece.chunk));
            }
            // Still under way when its loss was found.
            return Ok(None);
        }
        if chunk != due.chunk {
            return Err(self.order(due, piece.chunk));
        }
        let Some(piece) = piece.piece else {
            return Err(ProtocolError::Empty.into());
        };
        let whole = self
            .assembly
            .push(piece, due.layer, self.cursor.layer_bytes)
            .map_err(broken)?;
        let Some(whole) = whole else {
            return Ok(None);
        };
        if whole.verify().is_err() {
            tracing::warn!(chunk, layer = due.layer, "a layer arrived corrupt");
            return Ok(self.give_up(chunk, LostReason::Corrupt));
        }
        self.cursor.advance();
        Ok(Some(GetEvent::Layer {
            chunk,
            layer: LayerIdx(whole.layer),
            data: whole.data,
        }))
    }

    fn order(&self, due: Due, got: u32) -> CallError {
        ProtocolError::Order {
            layer: LayerIdx(due.layer),
            got,
            due: due.chunk,
        }
        .into()
    }
}

impl fmt::Debug for LayerStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerStream")
            .field("origin", &self.origin)
            .field("deadline", &self.deadline)
            .field("cursor", &self.cursor)
            .finish_non_exhaustive()
    }
}

/// What must come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Due {
    layer: u16,
    chunk: usize,
}

/// Position of a stream in layer-major order.
#[derive(Debug)]
struct Cursor {
    layer_bytes: usize,
    end: u16,
    /// Chunks that are not lost: the first `live` ones.
    live: usize,
    next: Due,
}

impl Cursor {
    fn empty() -> Self {
        Self {
            layer_bytes: 0,
            end: 0,
            live: 0,
            next: Due { layer: 0, chunk: 0 },
        }
    }

    fn new(chunks: &[ChunkInfo], layers: Option<LayerRange>) -> Result<Self, CallError> {
        let Some(first) = chunks.first() else {
            return Ok(Self::empty());
        };
        let layout = first.layout;
        if let Some(index) = chunks.iter().position(|chunk| chunk.layout != layout) {
            return Err(ProtocolError::MixedLayouts(index).into());
        }
        let (start, end) =
            layers.map_or((0, layout.layers()), |range| (range.start(), range.end()));
        if end > layout.layers() {
            let problem = format!("the stored chunks have {} layers", layout.layers());
            return Err(broken(InvalidField::new("layers", problem)));
        }
        Ok(Self {
            layer_bytes: layout.layer_bytes(),
            end,
            live: chunks.len(),
            next: Due {
                layer: start,
                chunk: 0,
            },
        })
    }

    fn due(&self) -> Option<Due> {
        (self.next.layer < self.end && self.live > 0).then_some(self.next)
    }

    fn advance(&mut self) {
        self.next.chunk += 1;
        self.wrap();
    }

    /// Whether that changed anything.
    fn lose(&mut self, chunk: usize) -> bool {
        if chunk >= self.live {
            return false;
        }
        self.live = chunk;
        self.wrap();
        true
    }

    fn wrap(&mut self) {
        if self.next.chunk >= self.live {
            self.next = Due {
                layer: self.next.layer + 1,
                chunk: 0,
            };
        }
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
