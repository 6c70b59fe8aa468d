//! Receives one chunk.

use bytes::Bytes;
use kvasir_codec::Object;
use kvasir_proto::convert::{self, LayerAssembly, PutHeader};
use kvasir_proto::{InvalidField, v1};
use kvasir_store::{PutOutcome, Store};
use kvasir_types::{Checksum, KvLayout};
use tonic::{Status, Streaming};
use v1::put_request::Message;

use crate::admission::shutting_down;
use crate::refusal;
use crate::service::Shared;

/// Header, reservation, layers, store: whatever fails on the way leaves nothing.
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
    let reservation = shared
        .store
        .reserve(Store::charged_bytes_of_raw(&header.layout))
        .map_err(|error| refusal::throttled(&error))?;
    let (layers, checksums) = sender.layers(&header.layout).await?;
    let object = tokio::task::spawn_blocking(move || assemble(&header, layers, &checksums))
        .await
        .map_err(|_| Status::internal("the chunk could not be assembled"))??;
    let outcome = shared
        .store
        .put_reserved(object, reservation)
        .await
        .map_err(|error| refusal::put(&error))?;
    Ok(v1::PutResponse {
        outcome: match outcome {
            PutOutcome::Stored => v1::put_response::Outcome::Stored,
            PutOutcome::AlreadyPresent => v1::put_response::Outcome::AlreadyPresent,
        }
        .into(),
        durable: shared.store.stats().disk.is_some(),
    })
}

/// Hashes what is going to be stored, once, and compares with what its sender states.
fn assemble(
    header: &PutHeader,
    layers: Vec<Bytes>,
    checksums: &[Checksum],
) -> Result<Object, InvalidField> {
    let object = Object::raw(header.key, &header.layout, layers)
        .map_err(|error| InvalidField::new("piece", error))?;
    for (index, (entry, stated)) in (0..).zip(object.header().layers().iter().zip(checksums)) {
        convert::check(index, *stated, entry.checksum)?;
    }
    Ok(object)
}

struct Sender<'a> {
    shared: &'a Shared,
    messages: Streaming<v1::PutRequest>,
}

impl Sender<'_> {
    /// The layers, and the checksums that the sender states for them.
    async fn layers(&mut self, layout: &KvLayout) -> Result<(Vec<Bytes>, Vec<Checksum>), Status> {
        let expected = layout.layer_bytes();
        let mut layers = Vec::with_capacity(layout.layers().into());
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
                let one_piece = piece.data.len() == expected;
                if let Some(whole) = assembly.push(piece, layer, expected)? {
                    // A single piece is a slice of a receive buffer of unknown size,
                    // which would stay alive with it and be charged to nobody.
                    checksums.push(whole.checksum);
                    break if one_piece {
                        Bytes::copy_from_slice(&whole.data)
                    } else {
                        whole.data
                    };
                }
            };
            layers.push(whole);
            self.shared.counters.received_bytes.add(expected);
        }
        match self.next().await? {
            None => Ok((layers, checksums)),
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
