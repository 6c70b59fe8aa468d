//! Chunks as gRPC messages.

use std::fmt;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _};
use kvasir_proto::assembly::Assembly;
use kvasir_proto::sequence::{Place, Sequence};
use kvasir_proto::v1;
use kvasir_types::Checksum;
use tonic::Status;
use v1::get_response::Message;

use super::{Arrival, LostReason};
use crate::deadline::Deadline;
use crate::error::{CallError, Origin, ProtocolError, broken};

/// The messages of one get.
pub(super) struct Messages {
    origin: Origin,
    stream: BoxStream<'static, Result<v1::GetResponse, Status>>,
    /// Of the extent that is due.
    assembly: Assembly,
}

impl Messages {
    pub(super) fn new(
        origin: Origin,
        stream: impl Stream<Item = Result<v1::GetResponse, Status>> + Send + 'static,
    ) -> Self {
        Self {
            origin,
            stream: stream.boxed(),
            assembly: Assembly::default(),
        }
    }

    /// The first one.
    pub(super) async fn header(&mut self, deadline: Deadline) -> Result<v1::GetHeader, CallError> {
        match self.message(deadline).await?.map(|first| first.message) {
            Some(Some(Message::Header(header))) => Ok(header),
            _ => Err(ProtocolError::Header.into()),
        }
    }

    /// What the next one brings of the extent that is due.
    pub(super) async fn next(
        &mut self,
        deadline: Deadline,
        due: &Place,
        sequence: &Sequence,
    ) -> Result<Arrival, CallError> {
        let message = self.message(deadline).await?;
        let truncated = || ProtocolError::Truncated {
            chunk: due.chunk,
            extent: due.extent,
        };
        let message = message.ok_or_else(truncated)?.message;
        match message.ok_or(ProtocolError::Empty)? {
            Message::Header(_) => Err(ProtocolError::Header.into()),
            Message::Lost(lost) => {
                let chunk = lost.chunk as usize;
                if chunk <= due.chunk {
                    self.assembly = Assembly::default();
                }
                let reason = LostReason::from_wire(lost.reason());
                Ok(Arrival::Lost(chunk, reason))
            }
            Message::Piece(piece) => self.piece(due, piece, sequence),
        }
    }

    fn piece(
        &mut self,
        due: &Place,
        piece: v1::ChunkPiece,
        sequence: &Sequence,
    ) -> Result<Arrival, CallError> {
        let chunk = piece.chunk as usize;
        let out_of_order = || ProtocolError::Order {
            extent: due.extent,
            got: piece.chunk,
            due: due.chunk,
        };
        if chunk >= sequence.live() {
            if chunk >= sequence.chunks() {
                return Err(out_of_order().into());
            }
            // Still under way when its loss was found.
            return Ok(Arrival::Nothing);
        }
        if chunk != due.chunk {
            return Err(out_of_order().into());
        }
        let piece = piece.piece.ok_or(ProtocolError::Empty)?;
        let bounds = sequence.bounds(due);
        let whole = self.assembly.push(piece, due.extent, bounds);
        Ok(match whole.map_err(broken)? {
            Some(whole) => Arrival::Whole {
                found: Checksum::of(&whole.data),
                stated: Some(whole.checksum),
                data: whole.data,
            },
            None => Arrival::Nothing,
        })
    }

    async fn message(&mut self, deadline: Deadline) -> Result<Option<v1::GetResponse>, CallError> {
        let next = async { self.stream.next().await.transpose() };
        deadline.bound(&self.origin, next).await
    }
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messages").finish_non_exhaustive()
    }
}
