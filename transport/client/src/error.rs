//! Why a call failed. A missing chunk is a value, never an error.

use std::time::Duration;

use kvasir_codec::ProfileError;
use kvasir_proto::{InvalidField, status};
use kvasir_types::{ExtentIdx, ProfileDigest};
use tonic::{Code, Status};

use crate::{Endpoint, ParseEndpointError};

/// Why a [`Client`](crate::Client) could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address cannot be one.
    #[error(transparent)]
    Endpoint(#[from] ParseEndpointError),
    /// The daemon did not answer.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The daemon cannot be reached, went away during the call, or is shutting
    /// down. A call that was not repeated may have taken effect.
    #[error("no cache daemon answers at {endpoint}; start `kvasird` there, or use its endpoint")]
    Unavailable {
        /// Where it was looked for.
        endpoint: Endpoint,
        /// What the transport reports.
        #[source]
        status: Box<Status>,
    },
    /// The call's deadline passed first.
    #[error("the deadline passed before the daemon answered; compute instead, or allow more time")]
    DeadlineExceeded,
    /// A bound of the daemon is reached; nothing was done.
    #[error("the daemon is at a bound: {reason}; come back in {} ms, or raise its budget", retry_after.as_millis())]
    Throttled {
        /// The bound, in the daemon's words.
        reason: String,
        /// When the daemon expects room.
        retry_after: Duration,
    },
    /// The lease has ended: released, or its session is over. Acquire another.
    #[error("the lease has ended; acquire another")]
    LeaseEnded,
    /// A field of the request is malformed, as found by the daemon or before
    /// anything was sent.
    #[error("{field}: {problem}")]
    Invalid {
        /// Path of the field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The daemon sent what the protocol does not allow.
    #[error("the daemon broke the protocol; is it of the same version as this client?")]
    Protocol(#[from] ProtocolError),
    /// A profile arrived as it was stored, but cannot be used.
    #[error("profile {digest} cannot be used; was it made for another version?")]
    Profile {
        /// Which.
        digest: ProfileDigest,
        /// What is wrong with it.
        #[source]
        source: ProfileError,
    },
    /// Any other refusal by the daemon.
    #[error("the daemon refused the call")]
    Refused(#[source] Box<Status>),
}

/// How a daemon broke the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A field cannot be what it says.
    #[error(transparent)]
    Field(#[from] InvalidField),
    /// A stream did not begin with its header, or had a second one.
    #[error("a message other than the one header came first, or a second header came")]
    Header,
    /// The bytes of a profile have another digest.
    #[error("what came is not profile {0}")]
    ProfileDigest(ProfileDigest),
    /// A message without content.
    #[error("an empty message came")]
    Empty,
    /// An extent of another chunk than the next in layer-major order.
    #[error("chunk {got} came where extent {extent} of chunk {due} was due")]
    Order {
        /// The extent that was due.
        extent: ExtentIdx,
        /// The chunk that came.
        got: u32,
        /// The chunk that was due.
        due: usize,
    },
    /// The stream ended before everything it announced.
    #[error("the stream ended before extent {extent} of chunk {chunk}")]
    Truncated {
        /// The chunk that was due.
        chunk: usize,
        /// The extent that was due.
        extent: ExtentIdx,
    },
    /// The chunks of one get have different layouts.
    #[error("chunk {0} has another layout than the chunks before it")]
    MixedLayouts(usize),
    /// A response has another number of entries than the request has keys.
    #[error("{got} entries answer {asked} keys")]
    Count {
        /// Keys of the request.
        asked: usize,
        /// Entries of the response.
        got: usize,
    },
}

impl CallError {
    /// Whether the same call may succeed later without any change.
    pub const fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Unavailable { .. } | Self::DeadlineExceeded | Self::Throttled { .. }
        )
    }
}

pub(crate) fn invalid(error: InvalidField) -> CallError {
    CallError::Invalid {
        field: error.field,
        problem: error.problem,
    }
}

pub(crate) fn broken(error: InvalidField) -> CallError {
    ProtocolError::from(error).into()
}

/// The daemon a status comes from.
#[derive(Clone, Debug)]
pub(crate) struct Origin(pub(crate) Endpoint);

impl Origin {
    pub(crate) fn error(&self, refusal: Status) -> CallError {
        // A status that came over the wire has no source; one with a source was
        // made here, of a connection that failed.
        if std::error::Error::source(&refusal).is_some() || refusal.code() == Code::Unavailable {
            return CallError::Unavailable {
                endpoint: self.0.clone(),
                status: Box::new(refusal),
            };
        }
        match refusal.code() {
            Code::DeadlineExceeded => CallError::DeadlineExceeded,
            Code::NotFound => CallError::LeaseEnded,
            Code::ResourceExhausted => match status::retry_delay(&refusal) {
                Some(retry_after) => CallError::Throttled {
                    reason: refusal.message().to_owned(),
                    retry_after,
                },
                None => CallError::Refused(Box::new(refusal)),
            },
            Code::InvalidArgument => match status::first_violation(&refusal) {
                Some(InvalidField { field, problem }) => CallError::Invalid { field, problem },
                None => CallError::Refused(Box::new(refusal)),
            },
            _ => CallError::Refused(Box::new(refusal)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_become_what_they_mean() {
        let origin = Origin(Endpoint::default());
        let error = origin.error(status::come_back("full", Duration::from_millis(30)));
        assert!(
            matches!(error, CallError::Throttled { retry_after, .. } if retry_after.as_millis() == 30)
        );
        assert!(error.to_string().contains("full"), "{error}");
        assert!(error.is_transient());
        let error = origin.error(InvalidField::new("keys[2]", "too short").into());
        assert_eq!(error.to_string(), "keys[2]: too short");
        assert!(!error.is_transient());
        let error = origin.error(Status::unavailable("shutting down"));
        assert!(error.to_string().contains("kvasird"), "{error}");
        let error = origin.error(Status::internal("?"));
        assert!(matches!(error, CallError::Refused(_)));
    }
}
