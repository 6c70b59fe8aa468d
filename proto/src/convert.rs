//! Conversions between wire messages and `kvasir-types`, parsed once at the border.

use std::num::NonZeroU32;

use bytes::Bytes;
use kvasir_types::{
    ChunkKey, Class, DType, Durability, ExtentIdx, HeadRange, Hints, KvLayout, LayerRange, Level,
    MAX_PROFILE_BYTES, Planes, ProfileDigest, Slice, TokenRange,
};

use crate::sequence::Wanted;
use crate::{MAX_KEYS, v1};

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

/// A digest of exactly 32 bytes.
///
/// # Errors
/// Another length; the error names `field`.
pub fn profile_digest(field: &str, bytes: &[u8]) -> Result<ProfileDigest, InvalidField> {
    let array = <[u8; 32]>::try_from(bytes).map_err(|_| {
        let problem = format!("a digest has 32 bytes, this one has {}", bytes.len());
        InvalidField::new(field, problem)
    })?;
    Ok(ProfileDigest::from_bytes(array))
}

/// A digest as the wire carries it.
pub fn profile_digest_to_wire(digest: &ProfileDigest) -> Bytes {
    Bytes::copy_from_slice(digest.as_bytes())
}

/// Bytes that a profile may have.
///
/// # Errors
/// None, or more than [`MAX_PROFILE_BYTES`]; the error names `field`.
pub fn profile_bytes(field: &str, bytes: u64) -> Result<usize, InvalidField> {
    let narrow = usize::try_from(bytes).ok();
    let fits = narrow.filter(|_| (1..=MAX_PROFILE_BYTES).contains(&bytes));
    fits.ok_or_else(|| {
        let problem = format!("{bytes} is not from 1 to {MAX_PROFILE_BYTES}");
        InvalidField::new(field, problem)
    })
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

/// What a get asks for.
///
/// # Errors
/// A range that is none, more levels than there are layers, a code that is no level.
pub fn wanted(request: &v1::GetRequest) -> Result<Wanted, InvalidField> {
    let layers = match &request.layers {
        Some(range) => Some(layer_range("layers", range)?),
        None => None,
    };
    if request.levels.len() > usize::from(u16::MAX) {
        let problem = "more levels than a chunk may have layers";
        return Err(InvalidField::new("levels", problem));
    }
    let levels = request.levels.iter().map(|&code| level("levels", code));
    Ok(Wanted {
        layers,
        levels: levels.collect::<Result<_, _>>()?,
        have: match request.have {
            Some(code) => Some(level("have", code)?),
            None => None,
        },
        slice: slice(request)?,
    })
}

fn slice(request: &v1::GetRequest) -> Result<Option<Slice>, InvalidField> {
    if request.heads.is_none() && request.tokens.is_none() {
        return Ok(None);
    }
    let heads = request.heads.as_ref().map(|range| {
        let narrow = |value: u32| {
            let problem = |_| InvalidField::new("heads", format!("{value} is not a head"));
            u16::try_from(value).map_err(problem)
        };
        let range = HeadRange::new(narrow(range.start)?, narrow(range.end)?);
        range.map_err(|error| InvalidField::new("heads", error))
    });
    let tokens = request.tokens.as_ref().map(|range| {
        let range = TokenRange::new(range.start, range.end);
        range.map_err(|error| InvalidField::new("tokens", error))
    });
    Ok(Some(Slice {
        heads: heads.transpose()?,
        tokens: tokens.transpose()?,
    }))
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
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Bytes of its extents, in order; none where it is raw.
    pub extent_bytes: Vec<u64>,
}

impl PutHeader {
    /// Bytes of each extent that follows.
    pub fn extents(&self) -> Vec<u64> {
        if self.level.is_encoded() {
            return self.extent_bytes.clone();
        }
        vec![self.layout.layer_bytes() as u64; usize::from(self.layout.layers())]
    }
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
            extent_bytes: header.extent_bytes.clone(),
        }
    }
}

impl TryFrom<&v1::PutHeader> for PutHeader {
    type Error = InvalidField;

    fn try_from(wire: &v1::PutHeader) -> Result<Self, InvalidField> {
        let layout = layout("header.layout", wire.layout.as_ref())?;
        let level = level("header.level", wire.level)?;
        check_extents(&layout, level, &wire.extent_bytes)?;
        Ok(Self {
            key: key("header.key", &wire.key)?,
            layout,
            level,
            extent_bytes: wire.extent_bytes.clone(),
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

/// Whether the extents of a put have lengths that its layout and level allow.
fn check_extents(layout: &KvLayout, level: Level, lengths: &[u64]) -> Result<(), InvalidField> {
    let expected = if level.is_encoded() {
        level.extents(layout.layers())
    } else {
        0
    };
    if lengths.len() as u64 != u64::from(expected) {
        let problem = format!(
            "a chunk of {} layers at level {level} states {expected} lengths, not {}",
            layout.layers(),
            lengths.len()
        );
        return Err(InvalidField::new("header.extent_bytes", problem));
    }
    for (extent, &len) in (0..).map(ExtentIdx).zip(lengths) {
        let [least, most] = layout.extent_bounds(level, extent);
        if len < least || len > most {
            let field = format!("header.extent_bytes[{extent}]");
            let problem = format!("{len} is not from {least} to {most}");
            return Err(InvalidField::new(field, problem));
        }
    }
    Ok(())
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
        for (start, end) in [(1, 1), (2, 1), (70_000, 70_001)] {
            let request = v1::GetRequest {
                heads: Some(v1::HeadRange { start, end }),
                ..v1::GetRequest::default()
            };
            assert_eq!(wanted(&request).unwrap_err().field, "heads");
        }
        let request = v1::GetRequest {
            tokens: Some(v1::TokenRange { start: 5, end: 5 }),
            ..v1::GetRequest::default()
        };
        assert_eq!(wanted(&request).unwrap_err().field, "tokens");
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
}
