//! Conversions between wire messages and `kvasir-types`, parsed once at the border.

use std::num::NonZeroU32;

use bytes::Bytes;
use kvasir_types::{
    Checksum, ChunkKey, Class, DType, Durability, Hints, KvLayout, LayerRange, Level, Planes,
};

use crate::{MAX_KEYS, MAX_PIECE_BYTES, v1};

/// A wire field that cannot be what it says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidField {
    /// Path of the field, such as `header.layout.kv_heads`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl InvalidField {
    /// `problem` with the field at `field`.
    pub fn new(field: impl Into<String>, problem: impl ToString) -> Self {
        Self {
            field: field.into(),
            problem: problem.to_string(),
        }
    }

    /// The same error, seen from the message that contains `parent`.
    #[must_use]
    pub fn within(mut self, parent: &str) -> Self {
        self.field = format!("{parent}.{}", self.field);
        self
    }
}

/// A key of exactly 32 bytes.
///
/// # Errors
/// Another length; the error names `field`.
pub fn key(field: &str, bytes: &[u8]) -> Result<ChunkKey, InvalidField> {
    let array = <[u8; 32]>::try_from(bytes).map_err(|_| {
        InvalidField::new(
            field,
            format!("a key has 32 bytes, this one has {}", bytes.len()),
        )
    })?;
    Ok(ChunkKey::from_bytes(array))
}

/// One to [`MAX_KEYS`] keys.
///
/// # Errors
/// None, too many, or one of another length; the error names the first bad one.
pub fn keys(field: &str, list: &[Bytes]) -> Result<Vec<ChunkKey>, InvalidField> {
    if list.is_empty() {
        return Err(InvalidField::new(field, "at least one key is needed"));
    }
    if list.len() > MAX_KEYS {
        return Err(InvalidField::new(
            field,
            format!(
                "{} keys exceed the limit of {MAX_KEYS}; ask in several calls",
                list.len()
            ),
        ));
    }
    list.iter()
        .enumerate()
        .map(|(index, bytes)| match key(field, bytes) {
            Ok(key) => Ok(key),
            Err(error) => Err(InvalidField::new(
                format!("{field}[{index}]"),
                error.problem,
            )),
        })
        .collect()
}

/// A key as the wire carries it.
pub fn key_to_wire(key: &ChunkKey) -> Bytes {
    Bytes::copy_from_slice(key.as_bytes())
}

/// A level this version knows.
///
/// # Errors
/// Any other code.
pub fn level(field: &str, code: u32) -> Result<Level, InvalidField> {
    let narrow = u8::try_from(code)
        .map_err(|_| InvalidField::new(field, format!("{code} is not a level")))?;
    Level::from_code(narrow).map_err(|error| InvalidField::new(field, error))
}

/// A non-empty range of layers.
///
/// # Errors
/// Empty, backward, or beyond 65535.
pub fn layer_range(field: &str, range: &v1::LayerRange) -> Result<LayerRange, InvalidField> {
    let narrow = |value: u32| {
        u16::try_from(value)
            .map_err(|_| InvalidField::new(field, format!("{value} is not a layer")))
    };
    LayerRange::new(narrow(range.start)?, narrow(range.end)?)
        .map_err(|error| InvalidField::new(field, error))
}

impl From<&KvLayout> for v1::Layout {
    fn from(layout: &KvLayout) -> Self {
        let (key_dim, value_dim) = match layout.planes() {
            Planes::KeyValue { key_dim, value_dim } => (key_dim, value_dim),
            Planes::Single { dim } => (dim, 0),
        };
        Self {
            layers: layout.layers().into(),
            kv_heads: layout.kv_heads().into(),
            key_dim: key_dim.into(),
            value_dim: value_dim.into(),
            tokens: layout.tokens(),
            // The wire's enumeration uses the codes of `DType`.
            dtype: layout.dtype().code().into(),
        }
    }
}

impl TryFrom<&v1::Layout> for KvLayout {
    type Error = InvalidField;

    fn try_from(wire: &v1::Layout) -> Result<Self, InvalidField> {
        let narrow = |field: &str, value: u32| {
            u16::try_from(value)
                .map_err(|_| InvalidField::new(field, format!("{value} is more than 65535")))
        };
        let dtype = u8::try_from(wire.dtype)
            .ok()
            .and_then(DType::from_code)
            .ok_or_else(|| {
                InvalidField::new("dtype", format!("{} is not an element type", wire.dtype))
            })?;
        let key_dim = narrow("key_dim", wire.key_dim)?;
        let planes = match narrow("value_dim", wire.value_dim)? {
            0 => Planes::Single { dim: key_dim },
            value_dim => Planes::KeyValue { key_dim, value_dim },
        };
        Self::new(
            narrow("layers", wire.layers)?,
            narrow("kv_heads", wire.kv_heads)?,
            planes,
            wire.tokens,
            dtype,
        )
        .map_err(|error| InvalidField::new("layout", error))
    }
}

/// The layout of an optional message field.
///
/// # Errors
/// Absent, or not a layout; the error names the field inside `field`.
pub fn layout(field: &str, wire: Option<&v1::Layout>) -> Result<KvLayout, InvalidField> {
    let wire = wire.ok_or_else(|| InvalidField::new(field, "missing"))?;
    KvLayout::try_from(wire).map_err(|error| error.within(field))
}

fn durability(field: &str, code: i32) -> Result<Durability, InvalidField> {
    match v1::Durability::try_from(code) {
        Ok(v1::Durability::Memory) => Ok(Durability::Memory),
        Ok(v1::Durability::Durable | v1::Durability::Unspecified) => Ok(Durability::Durable),
        Err(_) => {
            let problem = format!("{code} is no durability that this version knows");
            Err(InvalidField::new(field, problem))
        }
    }
}

/// The parsed first message of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutHeader {
    /// Key of the chunk that follows.
    pub key: ChunkKey,
    /// Its layout.
    pub layout: KvLayout,
    /// Level of its payload.
    pub level: Level,
    /// What its writer is promised.
    pub durability: Durability,
    /// What it is worth.
    pub hints: Hints,
}

impl From<&PutHeader> for v1::PutHeader {
    fn from(header: &PutHeader) -> Self {
        let hints = &header.hints;
        Self {
            key: key_to_wire(&header.key),
            layout: Some(v1::Layout::from(&header.layout)),
            level: header.level.code().into(),
            durability: match header.durability {
                Durability::Memory => v1::Durability::Memory,
                Durability::Durable => v1::Durability::Durable,
            }
            .into(),
            parent: hints.parent.as_ref().map(key_to_wire).unwrap_or_default(),
            class: hints.class.number().into(),
            recompute: hints.recompute.map_or(0, NonZeroU32::get),
        }
    }
}

impl TryFrom<&v1::PutHeader> for PutHeader {
    type Error = InvalidField;

    fn try_from(wire: &v1::PutHeader) -> Result<Self, InvalidField> {
        Ok(Self {
            key: key("header.key", &wire.key)?,
            layout: layout("header.layout", wire.layout.as_ref())?,
            level: level("header.level", wire.level)?,
            durability: durability("header.durability", wire.durability)?,
            hints: Hints {
                parent: match wire.parent.as_ref() {
                    [] => None,
                    bytes => Some(key("header.parent", bytes)?),
                },
                class: Class::try_from(wire.class)
                    .map_err(|error| InvalidField::new("header.class", error))?,
                recompute: NonZeroU32::new(wire.recompute),
            },
        })
    }
}

/// A whole layer that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholeLayer {
    /// Index of the layer.
    pub layer: u16,
    /// Its bytes.
    pub data: Bytes,
    /// The checksum its sender states for it.
    pub checksum: Checksum,
}

impl WholeLayer {
    /// Compares the checksum with the bytes.
    ///
    /// # Errors
    /// They do not match (field `piece.checksum`).
    pub fn verify(&self) -> Result<(), InvalidField> {
        check(self.layer, self.checksum, Checksum::of(&self.data))
    }
}

/// Whether a layer has the checksum that its sender states for it.
///
/// # Errors
/// It has not (field `piece.checksum`).
pub fn check(layer: u16, stated: Checksum, actual: Checksum) -> Result<(), InvalidField> {
    if stated == actual {
        return Ok(());
    }
    let problem = format!("the bytes of layer {layer} do not match their CRC-64/NVME");
    Err(InvalidField::new("piece.checksum", problem))
}

/// Cuts a layer into pieces of at most [`MAX_PIECE_BYTES`], without copying.
pub fn pieces(layer: u16, data: Bytes, checksum: Checksum) -> impl Iterator<Item = v1::LayerPiece> {
    let total = data.len();
    let count = total.div_ceil(MAX_PIECE_BYTES).max(1);
    (0..count).map(move |index| {
        let start = index * MAX_PIECE_BYTES;
        let end = total.min(start + MAX_PIECE_BYTES);
        v1::LayerPiece {
            layer: layer.into(),
            offset: start as u64,
            data: data.slice(start..end),
            layer_bytes: total as u64,
            checksum: checksum.as_u64(),
        }
    })
}

/// Puts the pieces of one layer together again.
///
/// A layer that came as one piece, which is the usual case, is handed on without
/// a copy. No more than `expected_bytes` is ever held.
#[derive(Debug, Default)]
pub struct LayerAssembly {
    partial: Vec<u8>,
}

impl LayerAssembly {
    /// Takes the next piece; returns the layer when it is whole, not yet
    /// [verified](WholeLayer::verify).
    ///
    /// # Errors
    /// A piece of another layer than `layer`, of another total than
    /// `expected_bytes`, out of order, empty, or beyond the layer's end.
    pub fn push(
        &mut self,
        piece: v1::LayerPiece,
        layer: u16,
        expected_bytes: usize,
    ) -> Result<Option<WholeLayer>, InvalidField> {
        if piece.layer != u32::from(layer) {
            return Err(InvalidField::new(
                "piece.layer",
                format!("layer {} came where layer {layer} was due", piece.layer),
            ));
        }
        if piece.layer_bytes != expected_bytes as u64 {
            return Err(InvalidField::new(
                "piece.layer_bytes",
                format!(
                    "the layout gives {expected_bytes} bytes per layer, not {}",
                    piece.layer_bytes
                ),
            ));
        }
        if piece.offset != self.partial.len() as u64 {
            return Err(InvalidField::new(
                "piece.offset",
                format!(
                    "offset {} came where {} was due",
                    piece.offset,
                    self.partial.len()
                ),
            ));
        }
        let received = self.partial.len() + piece.data.len();
        if piece.data.is_empty() || received > expected_bytes {
            return Err(InvalidField::new(
                "piece.data",
                format!("{received} bytes of a layer of {expected_bytes}"),
            ));
        }
        let checksum = Checksum::from_u64(piece.checksum);
        let data = if received == expected_bytes && self.partial.is_empty() {
            piece.data
        } else {
            if self.partial.is_empty() {
                self.partial.reserve_exact(expected_bytes);
            }
            self.partial.extend_from_slice(&piece.data);
            if received < expected_bytes {
                return Ok(None);
            }
            Bytes::from(std::mem::take(&mut self.partial))
        };
        Ok(Some(WholeLayer {
            layer,
            data,
            checksum,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_survive_the_wire() {
        for planes in [
            Planes::symmetric(64),
            Planes::KeyValue {
                key_dim: 192,
                value_dim: 128,
            },
            Planes::Single { dim: 576 },
        ] {
            for dtype in DType::ALL {
                let layout = KvLayout::new(4, 2, planes, 32, dtype).unwrap();
                let wire = v1::Layout::from(&layout);
                assert_eq!(KvLayout::try_from(&wire), Ok(layout));
            }
        }
    }

    #[test]
    fn errors_name_the_field() {
        let bad = [Bytes::from_static(&[0; 32]), Bytes::from_static(&[0; 31])];
        assert_eq!(keys("keys", &bad).unwrap_err().field, "keys[1]");
        assert_eq!(keys("keys", &[]).unwrap_err().field, "keys");
        let wire = v1::PutHeader {
            key: Bytes::from_static(&[0; 32]),
            layout: Some(v1::Layout {
                layers: 1,
                kv_heads: 70_000,
                key_dim: 1,
                value_dim: 1,
                tokens: 1,
                dtype: 1,
            }),
            level: 0,
            ..v1::PutHeader::default()
        };
        let error = PutHeader::try_from(&wire).unwrap_err();
        assert_eq!(error.field, "header.layout.kv_heads");
    }

    #[test]
    fn layers_are_cut_and_joined() {
        let data = Bytes::from(vec![7u8; MAX_PIECE_BYTES * 2 + 5]);
        let mut assembly = LayerAssembly::default();
        let mut whole = None;
        let checksum = Checksum::of(&data);
        for piece in pieces(3, data.clone(), checksum) {
            assert!(whole.is_none());
            whole = assembly.push(piece, 3, data.len()).unwrap();
        }
        assert_eq!(
            whole,
            Some(WholeLayer {
                layer: 3,
                data,
                checksum,
            })
        );
    }

    #[test]
    fn pieces_out_of_order_are_refused() {
        let data = Bytes::from(vec![7u8; MAX_PIECE_BYTES + 5]);
        let parts: Vec<_> = pieces(0, data.clone(), Checksum::from_u64(0)).collect();
        let mut assembly = LayerAssembly::default();
        let error = assembly.push(parts[1].clone(), 0, data.len()).unwrap_err();
        assert_eq!(error.field, "piece.offset");
        let error = assembly.push(parts[0].clone(), 1, data.len()).unwrap_err();
        assert_eq!(error.field, "piece.layer");
        let error = assembly.push(parts[0].clone(), 0, 8).unwrap_err();
        assert_eq!(error.field, "piece.layer_bytes");
        assert_eq!(assembly.push(parts[0].clone(), 0, data.len()), Ok(None));
        let whole = assembly.push(parts[1].clone(), 0, data.len()).unwrap();
        assert_eq!(whole.unwrap().verify().unwrap_err().field, "piece.checksum");
    }
}
