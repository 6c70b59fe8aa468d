//! Leases with names, for as long as their stream lasts.

use std::sync::Arc;

use kvasir_proto::{InvalidField, convert, v1};
use kvasir_store::{LeaseId, LeaseSession};
use tokio::time::timeout;
use tonic::{Status, Streaming};
use v1::hold_request::Message as Request;
use v1::hold_response::Message as Response;

use crate::outgoing::{self, Messages, Over, Sender};
use crate::service::Shared;
use crate::{get, refusal};

/// Starts a session. Its leases end with the stream, whoever ends it.
pub(crate) fn serve(
    shared: Arc<Shared>,
    requests: Streaming<v1::HoldRequest>,
) -> Result<Messages<v1::HoldResponse>, Status> {
    outgoing::serve(shared, |sender| answer(sender, requests))
}

async fn answer(
    sender: Sender<v1::HoldResponse>,
    mut requests: Streaming<v1::HoldRequest>,
) -> Result<(), Over> {
    let shared = sender.shared();
    let mut session = shared.store.lease_session();
    loop {
        let response = match timeout(shared.limits.stream_idle(), requests.message()).await {
            Ok(Ok(Some(request))) => respond(shared, &mut session, request).await,
            Ok(Ok(None) | Err(_)) => return Ok(()),
            Err(_) if session.was_used() => continue,
            Err(_) => Err(Status::deadline_exceeded(
                "no message and no get came for too long; the leases have ended",
            )),
        };
        let last = response.is_err();
        let response = response.map(|message| v1::HoldResponse {
            message: Some(message),
        });
        sender.send(response).await?;
        if last {
            return Ok(());
        }
    }
}

async fn respond(
    shared: &Shared,
    session: &mut LeaseSession,
    request: v1::HoldRequest,
) -> Result<Response, Status> {
    Ok(match request.message {
        None => return Err(InvalidField::new("message", "the message is empty").into()),
        Some(Request::Acquire(acquire)) => {
            let keys = convert::keys("acquire.keys", &acquire.keys)?;
            let leases = get::lease_in_time(shared, &keys).await?;
            let chunks = leases.iter().map(get::info).collect();
            let id = session
                .hold(leases)
                .map_err(|refused| refusal::hold(&refused))?;
            Response::Acquired(v1::Acquired {
                lease_id: id.as_u64(),
                chunks,
            })
        }
        Some(Request::Release(release)) => Response::Released(v1::Released {
            found: session.release(LeaseId::from_u64(release.lease_id)),
        }),
        Some(Request::Renew(v1::Renew {})) => Response::Renewed(v1::Renewed {}),
    })
}
