//! Codec profiles: receives, sends, lists and forgets them.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use kvasir_proto::{InvalidField, MAX_PIECE_BYTES, convert, v1};
use kvasir_store::{IncomingProfile, ProfileInfo, PutOutcome};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use v1::get_profile_response::Message as Sent;
use v1::put_profile_request::Message as Received;
use v1::put_profile_response::Outcome;

use crate::admission::shutting_down;
use crate::put::{empty_message, next};
use crate::refusal;
use crate::service::Shared;

type Messages = BoxStream<'static, Result<v1::GetProfileResponse, Status>>;

/// Header, memory, bytes, store: whatever fails on the way leaves nothing.
pub(crate) async fn put(
    shared: &Shared,
    mut messages: Streaming<v1::PutProfileRequest>,
) -> Result<v1::PutProfileResponse, Status> {
    let _permit = shared.admission.transfer()?;
    let first = next(shared, &mut messages).await?;
    let Some(Received::Header(header)) = first.and_then(|request| request.message) else {
        return Err(InvalidField::new("header", "the first message must be the header").into());
    };
    let digest = convert::profile_digest("header.digest", &header.digest)?;
    convert::profile_bytes("header.bytes", header.bytes)?;
    let answer = |outcome: Outcome, durable| v1::PutProfileResponse {
        outcome: outcome.into(),
        digest: header.digest.clone(),
        durable,
    };
    let profiles = shared.store.profiles();
    if profiles.find(&digest).is_some() {
        return Ok(answer(Outcome::AlreadyPresent, profiles.is_durable()));
    }
    let incoming = shared.store.receive_profile(digest, header.bytes).await;
    let mut incoming = incoming.map_err(|error| refusal::put_profile(&error))?;
    receive(shared, &mut messages, &mut incoming).await?;
    let put = profiles.put(incoming).await;
    let put = put.map_err(|error| refusal::put_profile(&error))?;
    let outcome = match put.outcome {
        PutOutcome::Stored => Outcome::Stored,
        PutOutcome::AlreadyPresent => Outcome::AlreadyPresent,
    };
    Ok(answer(outcome, put.durable))
}

async fn receive(
    shared: &Shared,
    messages: &mut Streaming<v1::PutProfileRequest>,
    incoming: &mut IncomingProfile,
) -> Result<(), Status> {
    while let Some(request) = next(shared, messages).await? {
        let data = match request.message {
            Some(Received::Data(data)) => data,
            Some(Received::Header(_)) => {
                return Err(InvalidField::new("header", "a second header came").into());
            }
            None => return Err(empty_message()),
        };
        if data.is_empty() {
            return Err(InvalidField::new("data", "a piece has at least one byte").into());
        }
        let pushed = incoming.push(&data);
        pushed.map_err(|error| refusal::put_profile(&error))?;
    }
    Ok(())
}

/// Reads a profile and starts sending it. It is in memory, charged, until it is sent.
pub(crate) async fn get(
    shared: Arc<Shared>,
    request: &v1::GetProfileRequest,
) -> Result<Messages, Status> {
    let digest = convert::profile_digest("digest", &request.digest)?;
    let permit = shared.admission.transfer()?;
    let read = tokio::select! {
        () = shared.admission.aborting.cancelled() => return Err(shutting_down()),
        read = timeout(shared.limits.read_timeout(), shared.store.profile(digest)) => read,
    };
    let read = read.map_err(|_| Status::deadline_exceeded("the device does not answer"))?;
    let data = read.map_err(|error| refusal::get_profile(&error))?;

    let (sender, receiver) = mpsc::channel(SEND_QUEUE);
    let (end, ended) = oneshot::channel();
    tokio::spawn(async move {
        let _permit = permit;
        if let Err(status) = send(&shared, data, &sender).await {
            // The receiver may be gone too.
            let _ = end.send(status);
        }
    });
    let last = stream::once(ended).filter_map(|status| async move { status.ok().map(Err) });
    Ok(ReceiverStream::new(receiver).map(Ok).chain(last).boxed())
}

async fn send(
    shared: &Shared,
    data: Option<Bytes>,
    sender: &mpsc::Sender<v1::GetProfileResponse>,
) -> Result<(), Status> {
    let header = Sent::Header(v1::GetProfileHeader {
        bytes: data.as_ref().map(|data| data.len() as u64),
    });
    let data = data.unwrap_or_default();
    let pieces = (0..data.len()).step_by(MAX_PIECE_BYTES).map(|start| {
        let end = data.len().min(start + MAX_PIECE_BYTES);
        Sent::Data(data.slice(start..end))
    });
    for message in std::iter::once(header).chain(pieces) {
        let message = Some(message);
        let sent = sender.send(v1::GetProfileResponse { message });
        let sent = tokio::select! {
            () = shared.admission.aborting.cancelled() => return Err(shutting_down()),
            sent = timeout(shared.limits.stream_idle(), sent) => sent,
        };
        match sent {
            Ok(Ok(())) => (),
            // Nobody receives any more.
            Ok(Err(_)) => return Ok(()),
            Err(_) => {
                let problem = "the receiver took nothing for too long";
                return Err(Status::deadline_exceeded(problem));
            }
        }
    }
    Ok(())
}

pub(crate) fn list(shared: &Shared) -> v1::ListProfilesResponse {
    let profiles = shared.store.profiles().list();
    v1::ListProfilesResponse {
        profiles: profiles.iter().map(info).collect(),
    }
}

fn info(profile: &ProfileInfo) -> v1::ProfileInfo {
    let shape = &profile.shape;
    let [key_dim, value_dim] = shape.dims.map(u32::from);
    v1::ProfileInfo {
        digest: convert::profile_digest_to_wire(&profile.digest),
        bytes: profile.bytes,
        layers: shape.layers.into(),
        kv_heads: shape.kv_heads.into(),
        key_dim,
        value_dim,
    }
}

pub(crate) async fn delete(
    shared: &Shared,
    request: &v1::DeleteProfileRequest,
) -> Result<v1::DeleteProfileResponse, Status> {
    let digest = convert::profile_digest("digest", &request.digest)?;
    let deleted = shared.store.profiles().delete(digest).await;
    let found = deleted.map_err(|error| refusal::delete(&error))?;
    Ok(v1::DeleteProfileResponse { found })
}

/// Messages between the task and the socket.
const SEND_QUEUE: usize = 2;
