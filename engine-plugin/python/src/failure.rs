//! Why a call failed, and the exceptions that say so.

use kvasir_client::CallError;
use kvasir_plugin::{ChunkError, EncodeError, ProfileError as BadProfile};
use kvasir_types::ProfileDigest;
use pyo3::exceptions::{PyConnectionError, PyTimeoutError, PyValueError};
use pyo3::prelude::*;

pyo3::create_exception!(
    kvasir,
    Error,
    pyo3::exceptions::PyException,
    "A call of a daemon failed."
);

pyo3::create_exception!(
    kvasir,
    DecodeError,
    Error,
    "A chunk came as it was stored, and cannot be decoded."
);

pyo3::create_exception!(
    kvasir,
    ProfileError,
    DecodeError,
    "The profile that a chunk was encoded with is missing, or of no use."
);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The daemon did not do it.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A chunk cannot be encoded like this.
    #[error(transparent)]
    Encode(EncodeError),
    /// Nobody has the profile.
    #[error(
        "chunk {chunk} was encoded with profile {digest}, which the daemon does not have: give it \
         the profile with put_profile, or get the chunks before this one"
    )]
    NoProfile {
        /// Of those asked for.
        chunk: usize,
        digest: ProfileDigest,
    },
    /// What the daemon has is no profile.
    #[error(
        "chunk {chunk} was encoded with profile {digest}, which cannot be used: {source}; replace \
         it (`kvasir profiles rm`, then put_profile), or get the chunks before this one"
    )]
    Profile {
        chunk: usize,
        digest: ProfileDigest,
        source: BadProfile,
    },
    /// A chunk is not what it says.
    #[error("chunk {chunk} cannot be decoded: {source}; delete it, or get the chunks before it")]
    Decode { chunk: usize, source: ChunkError },
    /// The process ends.
    #[error("the interpreter is shutting down")]
    Ending,
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        let text = failure.to_string();
        match failure {
            // As the exception that Python's own calls raise for it, where there is one.
            Failure::Call(CallError::Invalid { .. }) | Failure::Encode(_) => {
                PyValueError::new_err(text)
            }
            Failure::Call(CallError::DeadlineExceeded) => PyTimeoutError::new_err(text),
            Failure::Call(CallError::Unavailable { .. }) => PyConnectionError::new_err(text),
            Failure::NoProfile { .. } | Failure::Profile { .. } => ProfileError::new_err(text),
            Failure::Decode { .. } => DecodeError::new_err(text),
            Failure::Call(_) | Failure::Ending => Error::new_err(text),
        }
    }
}
