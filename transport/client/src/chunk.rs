//! A chunk to store, and what became of it.

use bytes::Bytes;
use futures::Stream;
use kvasir_proto::convert::PutHeader;
use kvasir_proto::{InvalidField, assembly, v1};
use kvasir_types::{Checksum, ChunkKey, Durability, ExtentIdx, Hints, KvLayout, Level};

use crate::error::{CallError, ProtocolError, broken, invalid};

/// One chunk to store.
///
/// Extents are shared, not copied, so that a retry costs no second buffer.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Its key.
    pub key: ChunkKey,
    /// Its layout.
    pub layout: KvLayout,
    /// Codec level of `extents`.
    pub level: Level,
    /// Of a raw chunk one buffer a layer, in order, each of [`KvLayout::layer_bytes`]
    /// bytes. Of any other what `kvasir_codec::Object` holds: the prelude, the first part
    /// of every layer, the second of every layer, and so on.
    pub extents: Vec<Bytes>,
}

/// How a chunk is to be stored. The default is the strongest promise, and no hints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutOptions {
    /// What the daemon promises.
    pub durability: Durability,
    /// What the chunk is worth.
    pub hints: Hints,
}

/// What became of a stored chunk or profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Put {
    /// Whether the daemon took it.
    pub outcome: PutOutcome,
    /// Whether it now survives a crash of the daemon.
    pub durable: bool,
}

/// Whether a put changed anything. Both are success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// It is stored now.
    Stored,
    /// The daemon had it already.
    AlreadyPresent,
}

impl Chunk {
    pub(crate) fn check(&self) -> Result<(), CallError> {
        let expected = self.level.extents(self.layout.layers());
        if self.extents.len() as u64 != u64::from(expected) {
            let problem = format!(
                "{} layers at level {} have {expected} extents, the chunk {}",
                self.layout.layers(),
                self.level,
                self.extents.len()
            );
            return Err(invalid(InvalidField::new("extents", problem)));
        }
        for (extent, data) in (0..).map(ExtentIdx).zip(&self.extents) {
            let [least, most] = self.layout.extent_bounds(self.level, extent);
            if !(least..=most).contains(&(data.len() as u64)) {
                let problem = format!("{} bytes are not from {least} to {most}", data.len());
                let field = format!("extents[{extent}]");
                return Err(invalid(InvalidField::new(field, problem)));
            }
        }
        Ok(())
    }

    /// Bytes of each extent, which the layout does not say of an encoded chunk.
    fn extent_bytes(&self) -> Vec<u64> {
        if !self.level.is_encoded() {
            return Vec::new();
        }
        self.extents.iter().map(|data| data.len() as u64).collect()
    }

    /// The chunk as a stream of messages; an extent's checksum is computed when its
    /// turn comes.
    pub(crate) fn messages(
        &self,
        options: PutOptions,
    ) -> impl Stream<Item = v1::PutRequest> + Send + use<> {
        use v1::put_request::Message;
        let header = v1::PutHeader::from(&PutHeader {
            key: self.key,
            layout: self.layout,
            level: self.level,
            durability: options.durability,
            hints: options.hints,
            extent_bytes: self.extent_bytes(),
        });
        let extents = self.extents.clone();
        let pieces = (0..).zip(extents).flat_map(|(index, data)| {
            let checksum = Checksum::of(&data);
            assembly::pieces(ExtentIdx(index), data, checksum).map(Message::Piece)
        });
        let messages = std::iter::once(Message::Header(header)).chain(pieces);
        futures::stream::iter(messages.map(|message| v1::PutRequest {
            message: Some(message),
        }))
    }
}

impl TryFrom<v1::PutResponse> for Put {
    type Error = CallError;

    fn try_from(wire: v1::PutResponse) -> Result<Self, CallError> {
        use v1::put_response::Outcome;
        let outcome = match wire.outcome() {
            Outcome::Stored => PutOutcome::Stored,
            Outcome::AlreadyPresent => PutOutcome::AlreadyPresent,
            Outcome::Unspecified => {
                return Err(broken(InvalidField::new("outcome", "unspecified")));
            }
        };
        Ok(Self {
            outcome,
            durable: wire.durable,
        })
    }
}

/// Refuses a response that does not answer each of the request's keys.
pub(crate) fn check_count(asked: usize, got: usize) -> Result<(), CallError> {
    if asked == got {
        Ok(())
    } else {
        Err(ProtocolError::Count { asked, got }.into())
    }
}

#[cfg(test)]
mod tests {
    use kvasir_types::{DType, Planes};

    use super::*;

    #[test]
    fn a_chunk_must_fit_its_layout() {
        let layout = KvLayout::new(2, 1, Planes::symmetric(8), 16, DType::F16).unwrap();
        let whole = Bytes::from(vec![0; layout.layer_bytes()]);
        let mut chunk = Chunk {
            key: ChunkKey::from_bytes([1; 32]),
            layout,
            level: Level::RAW,
            extents: vec![whole.clone(), whole.slice(1..)],
        };
        assert!(
            chunk
                .check()
                .unwrap_err()
                .to_string()
                .starts_with("extents[1]:")
        );
        chunk.extents = vec![whole.clone()];
        assert!(
            chunk
                .check()
                .unwrap_err()
                .to_string()
                .starts_with("extents:")
        );
        chunk.extents = vec![whole.clone(), whole];
        assert!(chunk.check().is_ok());
    }
}
