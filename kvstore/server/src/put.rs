//! Receives one chunk.

use kvasir_proto::convert::{self, LayerAssembly, PutHeader};
use kvasir_proto::{InvalidField, v1};
use kvasir_store::{Payload, PutOptions, PutOutcome, Received};
use kvasir_types::{Checksum, KvLayout};
use tonic::{Status, Streaming};
use v1::put_request::Message;

use crate::admission::shutting_down;
use crate::refusal;
use crate::service::Shared;

/// Header, memory, layers, store: whatever fails on the way leaves nothing.
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
    let mut payload = shared
        .store
        .payload(header.layout)
        .await
        .map_err(|error| refusal::put(&error))?;
    let checksums = sender.layers(&header.layout, &mut payload).await?;
    let received = tokio::task::spawn_blocking(move || assemble(&header, payload, &checksums))
        .await
        .map_err(|_| Status::internal("the chunk could not be assembled"))??;
    let options = PutOptions {
        durability: header.durability,
        hints: header.hints,
    };
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
    let layers = received.object().header().layers().iter();
    for (index, (entry, stated)) in (0..).zip(layers.zip(checksums)) {
        convert::check(index, *stated, entry.checksum)?;
    }
    Ok(received)
}

struct Sender<'a> {
    shared: &'a Shared,
    messages: Streaming<v1::PutRequest>,
}

impl Sender<'_> {
    /// Receives the layers; gives the checksums that the sender states for them.
    async fn layers(
        &mut self,
        layout: &KvLayout,
        payload: &mut Payload,
    ) -> Result<Vec<Checksum>, Status> {
        let expected = layout.layer_bytes();
        let mut checksums = Vec::with_capacity(layout.layers().into());
        for layer in 0..layout.layers() {
            let mut assembly = LayerAssembly::default();
            let whole = loop {
                let piece = match self.next().await? {
                    Some(Message::Piece(piece)) => piece,
                    Some(Message::Header(_)) => {
                        return Err(InvalidField::new("header", "a second header came").into());
                    }
                    None => {
                        let problem = format!("the stream ended before layer {layer} was whole");
                        return Err(InvalidField::new("piece", problem).into());
                    }
                };
                if let Some(whole) = assembly.push(piece, layer, expected)? {
                    break whole;
                }
            };
            let place = payload.layer_mut(layer);
            place
                .ok_or_else(|| Status::internal("the chunk has more layers than its layout"))?
                .copy_from_slice(&whole.data);
            checksums.push(whole.checksum);
            self.shared.counters.received_bytes.add(expected);
        }
        match self.next().await? {
            None => Ok(checksums),
            Some(_) => {
                Err(InvalidField::new("piece", "a message came after the last layer").into())
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Message>, Status> {
        let idle = self.shared.limits.stream_idle();
        let message = tokio::select! {
            () = self.shared.admission.aborting.cancelled() => return Err(shutting_down()),
            message = tokio::time::timeout(idle, self.messages.message()) => message,
        };
        match message {
            Err(_) => Err(Status::deadline_exceeded(
                "no message came for too long; nothing is stored",
            )),
            Ok(Err(status)) => Err(status),
            Ok(Ok(None)) => Ok(None),
            Ok(Ok(Some(request))) => match request.message {
                None => Err(InvalidField::new("message", "the message is empty").into()),
                message => Ok(message),
            },
        }
    }
}
