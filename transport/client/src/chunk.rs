//! A chunk to store, and what became of it.

use bytes::Bytes;
use futures::Stream;
use kvasir_proto::convert::{self, PutHeader};
use kvasir_proto::{InvalidField, v1};
use kvasir_types::{Checksum, ChunkKey, Durability, Hints, KvLayout, Level};

use crate::error::{CallError, ProtocolError, broken, invalid};

/// One chunk to store.
///
/// Layers are shared, not copied, so that a retry costs no second buffer.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Its key.
    pub key: ChunkKey,
    /// Its layout.
    pub layout: KvLayout,
    /// Codec level of `layers`.
    pub level: Level,
    /// One buffer per layer, in order; each of
    /// [`KvLayout::layer_bytes`] bytes when the level is raw.
    pub layers: Vec<Bytes>,
}

/// How a chunk is to be stored. The default is the strongest promise, and no hints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutOptions {
    /// What the daemon promises.
    pub durability: Durability,
    /// What the chunk is worth.
    pub hints: Hints,
}

/// What became of a stored chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Put {
    /// Whether the daemon took it.
    pub outcome: PutOutcome,
    /// Whether the chunk now survives a crash of the daemon.
    pub durable: bool,
}

/// Whether a put changed anything. Both are success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// The chunk is stored now.
    Stored,
    /// The daemon had it already.
    AlreadyPresent,
}

impl Chunk {
    pub(crate) fn check(&self) -> Result<(), CallError> {
        let layers = usize::from(self.layout.layers());
        if self.layers.len() != layers {
            return Err(invalid(InvalidField::new(
                "layers",
                format!(
                    "the layout has {layers} layers, the chunk {}",
                    self.layers.len()
                ),
            )));
        }
        let expected = self.layout.layer_bytes();
        match self.layers.iter().position(|data| data.len() != expected) {
            None => Ok(()),
            Some(index) => Err(invalid(InvalidField::new(
                format!("layers[{index}]"),
                format!("the layout gives {expected} bytes per layer"),
            ))),
        }
    }

    /// The chunk as a stream of messages; a layer's checksum is computed when its
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
        });
        let layers = self.layers.clone();
        let pieces = (0u16..).zip(layers).flat_map(|(layer, data)| {
            let checksum = Checksum::of(&data);
            convert::pieces(layer, data, checksum).map(Message::Piece)
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
            layers: vec![whole.clone(), whole.slice(1..)],
        };
        assert!(
            chunk
                .check()
                .unwrap_err()
                .to_string()
                .starts_with("layers[1]:")
        );
        chunk.layers = vec![whole.clone()];
        assert!(
            chunk
                .check()
                .unwrap_err()
                .to_string()
                .starts_with("layers:")
        );
        chunk.layers = vec![whole.clone(), whole];
        assert!(chunk.check().is_ok());
    }
}
