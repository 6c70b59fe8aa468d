//! Leases with names.

use std::time::Duration;

use kvasir_proto::v1;
use kvasir_types::ChunkKey;
use tokio::sync::mpsc;
use tonic::Streaming;
use v1::hold_request::Message as Request;
use v1::hold_response::Message as Response;

use crate::client::{check_keys, wire_keys};
use crate::deadline::Deadline;
use crate::error::{CallError, Origin, ProtocolError, broken};
use crate::get::{ChunkInfo, chunk_info};

/// The name of some leases; see [`Hold::acquire`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId(pub(crate) u64);

/// What was leased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its name, for [`GetOptions::lease`](crate::GetOptions::lease).
    pub id: LeaseId,
    /// The leading chunks of the request that are present and leased.
    pub chunks: Vec<ChunkInfo>,
}

/// A session that holds chunks at the daemon; made by
/// [`Client::hold`](crate::Client::hold).
///
/// What is held stays readable by its name, even when it is evicted or deleted, until
/// it is released, this is dropped, or the connection ends. The daemon also ends a
/// session of which it hears nothing for its `stream-idle-ms`: get what is held, or
/// [`renew`](Self::renew). A lease that has ended costs a
/// [`CallError::LeaseEnded`], and never gives other bytes.
#[derive(Debug)]
pub struct Hold {
    origin: Origin,
    timeout: Duration,
    requests: mpsc::Sender<v1::HoldRequest>,
    responses: Streaming<v1::HoldResponse>,
}

impl Hold {
    pub(crate) fn new(
        origin: Origin,
        timeout: Duration,
        requests: mpsc::Sender<v1::HoldRequest>,
        responses: Streaming<v1::HoldResponse>,
    ) -> Self {
        Self {
            origin,
            timeout,
            requests,
            responses,
        }
    }

    /// Leases the leading chunks that are present.
    ///
    /// # Errors
    /// See [`CallError`]; after any, the session has ended, and all that it held.
    /// [`CallError::Throttled`] where leases hold too much already.
    pub async fn acquire(&mut self, keys: &[ChunkKey]) -> Result<Held, CallError> {
        check_keys(keys)?;
        let keys = wire_keys(keys);
        match self.call(Request::Acquire(v1::Acquire { keys })).await? {
            Response::Acquired(acquired) => Ok(Held {
                id: LeaseId(acquired.lease_id),
                chunks: acquired
                    .chunks
                    .iter()
                    .map(chunk_info)
                    .collect::<Result<_, _>>()
                    .map_err(broken)?,
            }),
            _ => Err(ProtocolError::Empty.into()),
        }
    }

    /// Ends leases. Says whether this session had them.
    ///
    /// # Errors
    /// See [`acquire`](Self::acquire).
    pub async fn release(&mut self, id: LeaseId) -> Result<bool, CallError> {
        match self
            .call(Request::Release(v1::Release { lease_id: id.0 }))
            .await?
        {
            Response::Released(released) => Ok(released.found),
            _ => Err(ProtocolError::Empty.into()),
        }
    }

    /// Tells the daemon that the leases are still wanted.
    ///
    /// # Errors
    /// See [`acquire`](Self::acquire).
    pub async fn renew(&mut self) -> Result<(), CallError> {
        match self.call(Request::Renew(v1::Renew {})).await? {
            Response::Renewed(_) => Ok(()),
            _ => Err(ProtocolError::Empty.into()),
        }
    }

    async fn call(&mut self, request: Request) -> Result<Response, CallError> {
        let request = v1::HoldRequest {
            message: Some(request),
        };
        // Where the stream has ended, the daemon's reason comes as its response.
        let _ = self.requests.send(request).await;
        let deadline = Deadline::after(self.timeout);
        let response = deadline
            .bound(&self.origin, self.responses.message())
            .await?;
        match response {
            Some(response) => Ok(response.message.ok_or(ProtocolError::Empty)?),
            None => Err(CallError::LeaseEnded),
        }
    }
}
