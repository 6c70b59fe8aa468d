//! Receives one chunk.

use kvasir_proto::assembly::{self, Assembly};
use kvasir_proto::convert::PutHeader;
use kvasir_proto::{InvalidField, v1};
use kvasir_store::{Payload, PayloadShape, PutOptions, PutOutcome, Received};
use kvasir_types::{Checksum, ExtentIdx};
use tonic::{Status, Streaming};
use v1::put_request::Message;

use crate::admission::shutting_down;
use crate::refusal;
use crate::service::Shared;

/// Header, memory, extents, store: whatever fails on the way leaves nothing.
pub(crate) async fn receive(
    shared: &Shared,
    messages: Streaming<v1::PutRequest>,
) -> Result<v1::PutResponse, Status> {
    let _permit = shared.admission.transfer()?;
    let mut sender = Sender { shared, messages };
    let Some(Message::Header(header)) = sender.next().await? else {
        return Err(InvalidField::new("header", "the first message must be the header").into());
    };
    let header = PutHeader::try_from(&header)?;
    let lengths = header.extents();
    let shape = PayloadShape::new(header.layout, header.level, lengths.iter().copied());
    let mut payload = shared
        .store
        .payload(shape)
        .await
        .map_err(|error| refusal::put(&error))?;
    let checksums = sender.extents(&lengths, &mut payload).await?;
    let options = PutOptions {
        durability: header.durability,
        hints: header.hints,
    };
    let received = tokio::task::spawn_blocking(move || assemble(&header, payload, &checksums))
        .await
        .map_err(|_| Status::internal("the chunk could not be assembled"))??;
    let put = shared
        .store
        .put_received(received, options)
        .await
        .map_err(|error| refusal::put(&error))?;
    Ok(v1::PutResponse {
        outcome: match put.outcome {
            PutOutcome::Stored => v1::put_response::Outcome::Stored,
            PutOutcome::AlreadyPresent => v1::put_response::Outcome::AlreadyPresent,
        }
        .into(),
        durable: put.durable,
    })
}

/// Hashes what is going to be stored, once, and compares with what its sender states.
fn assemble(
    header: &PutHeader,
    payload: Payload,
    checksums: &[Checksum],
) -> Result<Received, InvalidField> {
    let received = payload
        .into_object(header.key)
        .map_err(|error| InvalidField::new("piece", error))?;
    let extents = received.object().header().extents().iter();
    for (index, (entry, stated)) in (0..).zip(extents.zip(checksums)) {
        assembly::check(ExtentIdx(index), *stated, entry.checksum)?;
    }
    Ok(received)
}

struct Sender<'a> {
    shared: &'a Shared,
    messages: Streaming<v1::PutRequest>,
}

impl Sender<'_> {
    /// Receives extents of these lengths; gives the checksums that the sender states for
    /// them.
    async fn extents(
        &mut self,
        lengths: &[u64],
        payload: &mut Payload,
    ) -> Result<Vec<Checksum>, Status> {
        let mut checksums = Vec::with_capacity(lengths.len());
        for (extent, &len) in (0..).map(ExtentIdx).zip(lengths) {
            let mut assembly = Assembly::default();
            let whole = loop {
                let piece = match self.next().await? {
                    Some(Message::Piece(piece)) => piece,
                    Some(Message::Header(_)) => {
                        return Err(InvalidField::new("header", "a second header came").into());
                    }
                    None => {
                        let problem = format!("the stream ended before extent {extent} was whole");
                        return Err(InvalidField::new("piece", problem).into());
                    }
                };
                if let Some(whole) = assembly.push(piece, extent, [len; 2])? {
                    break whole;
                }
            };
            let place = payload.extent_mut(extent);
            place
                .ok_or_else(|| Status::internal("the payload has no place for an extent"))?
                .copy_from_slice(&whole.data);
            checksums.push(whole.checksum);
            self.shared.counters.received_bytes.add(whole.data.len());
        }
        match self.next().await? {
            None => Ok(checksums),
            Some(_) => {
                Err(InvalidField::new("piece", "a message came after the last extent").into())
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Message>, Status> {
        match next(self.shared, &mut self.messages).await? {
            None => Ok(None),
            Some(request) => match request.message {
                None => Err(empty_message()),
                message => Ok(message),
            },
        }
    }
}

/// The next message of a sender, who must not take too long.
pub(crate) async fn next<T>(
    shared: &Shared,
    messages: &mut Streaming<T>,
) -> Result<Option<T>, Status> {
    let idle = shared.limits.stream_idle();
    let message = tokio::select! {
        () = shared.admission.aborting.cancelled() => return Err(shutting_down()),
        message = tokio::time::timeout(idle, messages.message()) => message,
    };
    message.unwrap_or_else(|_| {
        Err(Status::deadline_exceeded(
            "no message came for too long; nothing is stored",
        ))
    })
}

pub(crate) fn empty_message() -> Status {
    InvalidField::new("message", "the message is empty").into()
}
