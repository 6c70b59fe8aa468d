//! Codec profiles: what chunks of nested levels may be encoded with.

use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, stream};
use kvasir_codec::Profile;
use kvasir_proto::{InvalidField, MAX_PIECE_BYTES, convert, v1};
use kvasir_types::ProfileDigest;
use tonic::Streaming;

use crate::chunk::{Put, PutOutcome};
use crate::client::Client;
use crate::deadline::Deadline;
use crate::error::{CallError, Origin, ProtocolError, broken, invalid};
use crate::retry::Repeat;

/// A profile of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListedProfile {
    /// Its name.
    pub digest: ProfileDigest,
    /// Its bytes.
    pub bytes: u64,
    /// Layers of the model that it is of.
    pub layers: u32,
    /// Its KV heads.
    pub kv_heads: u32,
    /// Channels of a head, of keys and of values; 0 where there is no such plane.
    pub dims: [u32; 2],
}

impl Client {
    /// Gives the daemon a profile to keep, durably if it has a disk tier. Where it has the
    /// profile already, nothing much is sent.
    ///
    /// # Errors
    /// See [`CallError`]; [`CallError::Refused`] where the daemon keeps as much as it may.
    pub async fn put_profile(&self, profile: &Arc<Profile>) -> Result<Put, CallError> {
        let bytes = profile.as_bytes().len() as u64;
        convert::profile_bytes("profile", bytes).map_err(invalid)?;
        let deadline = Deadline::after(self.config().transfer_timeout);
        let response = self
            .call(deadline, Repeat::Always, |mut grpc| {
                let messages = messages(Arc::clone(profile));
                async move { grpc.put_profile(messages).await }
            })
            .await?;
        let outcome = match response.outcome() {
            v1::put_profile_response::Outcome::Stored => PutOutcome::Stored,
            v1::put_profile_response::Outcome::AlreadyPresent => PutOutcome::AlreadyPresent,
            v1::put_profile_response::Outcome::Unspecified => {
                return Err(broken(InvalidField::new("outcome", "unspecified")));
            }
        };
        Ok(Put {
            outcome,
            durable: response.durable,
        })
    }

    /// The profile of this digest; `None` where the daemon does not have it. Parsing takes
    /// some four times its bytes in memory, for a moment.
    ///
    /// # Errors
    /// See [`CallError`]; an absent profile is none. [`CallError::Profile`] where this
    /// version cannot read it.
    pub async fn get_profile(&self, digest: ProfileDigest) -> Result<Option<Profile>, CallError> {
        let deadline = Deadline::after(self.config().transfer_timeout);
        let stream = self
            .call(deadline, Repeat::Always, |mut grpc| {
                let digest = convert::profile_digest_to_wire(&digest);
                async move { grpc.get_profile(v1::GetProfileRequest { digest }).await }
            })
            .await?;
        let Some(data) = receive(&self.origin(), deadline, stream).await? else {
            return Ok(None);
        };
        let parsed = tokio::task::spawn_blocking(move || parse(digest, &data));
        match parsed.await {
            Ok(parsed) => parsed.map(Some),
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down, and nobody waits any more.
                Err(_) => Err(CallError::DeadlineExceeded),
            },
        }
    }

    /// The profiles that the daemon keeps, in the order of their digests.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn profiles(&self) -> Result<Vec<ListedProfile>, CallError> {
        let deadline = Deadline::after(self.config().call_timeout);
        let response = self
            .call(deadline, Repeat::Always, |mut grpc| async move {
                grpc.list_profiles(v1::ListProfilesRequest {}).await
            })
            .await?;
        let profiles = response.profiles.iter().map(|wire| {
            Ok(ListedProfile {
                digest: convert::profile_digest("digest", &wire.digest).map_err(broken)?,
                bytes: wire.bytes,
                layers: wire.layers,
                kv_heads: wire.kv_heads,
                dims: [wire.key_dim, wire.value_dim],
            })
        });
        profiles.collect()
    }

    /// Makes the daemon forget a profile; whether it had it. Chunks that were encoded with
    /// it are of use only to those who have it.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn delete_profile(&self, digest: ProfileDigest) -> Result<bool, CallError> {
        let deadline = Deadline::after(self.config().call_timeout);
        let response = self
            .call(deadline, Repeat::Always, |mut grpc| {
                let digest = convert::profile_digest_to_wire(&digest);
                async move {
                    grpc.delete_profile(v1::DeleteProfileRequest { digest })
                        .await
                }
            })
            .await?;
        Ok(response.found)
    }
}

/// A profile as a stream of messages; a piece is copied when its turn comes.
fn messages(profile: Arc<Profile>) -> impl Stream<Item = v1::PutProfileRequest> + Send {
    use v1::put_profile_request::Message;
    let header = Message::Header(v1::ProfileHeader {
        digest: Bytes::copy_from_slice(profile.digest()),
        bytes: profile.as_bytes().len() as u64,
    });
    let count = profile.as_bytes().len().div_ceil(MAX_PIECE_BYTES);
    let pieces = (0..count).map(move |index| {
        let piece = profile.as_bytes().chunks(MAX_PIECE_BYTES).nth(index);
        Message::Data(Bytes::copy_from_slice(piece.unwrap_or_default()))
    });
    let messages = std::iter::once(header).chain(pieces);
    stream::iter(messages.map(|message| v1::PutProfileRequest {
        message: Some(message),
    }))
}

/// Exactly the bytes that the header states.
async fn receive(
    origin: &Origin,
    deadline: Deadline,
    mut stream: Streaming<v1::GetProfileResponse>,
) -> Result<Option<Vec<u8>>, CallError> {
    use v1::get_profile_response::Message;
    let first = deadline.bound(origin, stream.message()).await?;
    let Some(Message::Header(header)) = first.and_then(|response| response.message) else {
        return Err(ProtocolError::Header.into());
    };
    let Some(bytes) = header.bytes else {
        return Ok(None);
    };
    let expected = convert::profile_bytes("header.bytes", bytes).map_err(broken)?;
    let mut data = Vec::with_capacity(expected);
    while let Some(response) = deadline.bound(origin, stream.message()).await? {
        let piece = match response.message {
            Some(Message::Data(piece)) => piece,
            Some(Message::Header(_)) => return Err(ProtocolError::Header.into()),
            None => return Err(ProtocolError::Empty.into()),
        };
        if piece.len() > expected.saturating_sub(data.len()) {
            let problem = format!("more than the {expected} bytes announced");
            return Err(broken(InvalidField::new("data", problem)));
        }
        data.extend_from_slice(&piece);
    }
    if data.len() < expected {
        let problem = format!("{} of {expected} bytes", data.len());
        return Err(broken(InvalidField::new("data", problem)));
    }
    Ok(Some(data))
}

/// The profile, if it is the one that was asked for.
fn parse(digest: ProfileDigest, data: &[u8]) -> Result<Profile, CallError> {
    if ProfileDigest::of(data) != digest {
        return Err(ProtocolError::ProfileDigest(digest).into());
    }
    Profile::parse(data).map_err(|source| CallError::Profile { digest, source })
}

#[cfg(test)]
mod tests {
    use kvasir_codec::ProfileError;

    use super::*;

    #[test]
    fn what_is_not_the_profile_asked_for_is_not_handed_out() {
        let garbage = b"garbage";
        let error = parse(ProfileDigest::of(garbage), b"other garbage").unwrap_err();
        let CallError::Protocol(ProtocolError::ProfileDigest(_)) = error else {
            panic!("{error}");
        };
        let error = parse(ProfileDigest::of(garbage), garbage).unwrap_err();
        let CallError::Profile { source, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(source, ProfileError::Magic);
    }
}
