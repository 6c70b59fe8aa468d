//! Geometry and element type of a chunk.

use std::fmt;
use std::ops::Range;

use crate::canonical::{Canonical, write_hex};
use crate::level::Level;
use crate::range::{ExtentIdx, HeadRange, Slice, TokenRange};

/// Element type of stored keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
    /// FP8 with 4 exponent and 3 mantissa bits (OCP 8-bit floating point, E4M3).
    F8E4m3,
    /// FP8 with 5 exponent and 2 mantissa bits (OCP 8-bit floating point, E5M2).
    F8E5m2,
}

impl DType {
    /// Every element type, in the order of their codes.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::F8E4m3, Self::F8E5m2];

    /// Bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4m3 | Self::F8E5m2 => 1,
        }
    }

    /// The stable code of this type in encodings and on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Self::F32 => 1,
            Self::F16 => 2,
            Self::Bf16 => 3,
            Self::F8E4m3 => 4,
            Self::F8E5m2 => 5,
        }
    }

    /// The type with this code, if there is one.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.code() == code)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F8E4m3 => "f8e4m3",
            Self::F8E5m2 => "f8e5m2",
        })
    }
}

/// One plane of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plane {
    /// Keys, after RoPE; or the one latent plane of an MLA cache.
    Key,
    /// Values.
    Value,
}

/// Which planes a layer has, and how wide a row of each is per head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Planes {
    /// Multi-head and grouped-query attention: keys and values. Their widths may differ.
    KeyValue {
        /// Elements per key row of one head.
        key_dim: u16,
        /// Elements per value row of one head.
        value_dim: u16,
    },
    /// Multi-head latent attention: one compressed plane serves as both.
    Single {
        /// Elements per row.
        dim: u16,
    },
}

impl Planes {
    /// Keys and values of the same width.
    pub const fn symmetric(head_dim: u16) -> Self {
        Self::KeyValue {
            key_dim: head_dim,
            value_dim: head_dim,
        }
    }

    const fn dims(self) -> (u16, u16) {
        match self {
            Self::KeyValue { key_dim, value_dim } => (key_dim, value_dim),
            Self::Single { dim } => (dim, 0),
        }
    }
}

/// Why a [`KvLayout`] was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A dimension is zero.
    #[error("layout field `{0}` is zero; every dimension must be at least 1")]
    Zero(&'static str),
    /// The chunk would exceed [`KvLayout::MAX_CHUNK_BYTES`].
    #[error("a chunk of {0} bytes exceeds the limit of {max} bytes; use fewer tokens per chunk", max = KvLayout::MAX_CHUNK_BYTES)]
    TooLarge(u128),
    /// The encoded form has an unknown version, plane kind or element type.
    #[error("layout field `{0}` has unknown code {1}")]
    Unknown(&'static str, u8),
}

/// Geometry of one unencoded chunk.
///
/// Order, outermost first: `[layer, plane (K, V), kv_head, token, dim]`,
/// row-major, little-endian. Keys are stored after RoPE. Heads lie outside
/// tokens so that a tensor-parallel rank takes its heads as one contiguous
/// slice per plane, and ranks of any degree share the same chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    layers: u16,
    kv_heads: u16,
    planes: Planes,
    tokens: u32,
    dtype: DType,
}

impl KvLayout {
    /// Largest raw chunk, in bytes. Keeps every size in this package well inside
    /// `usize`, and lets readers reject hostile headers before they allocate.
    pub const MAX_CHUNK_BYTES: u64 = 1 << 30;

    /// Largest prelude of an encoded object, in bytes.
    pub const MAX_PRELUDE_BYTES: u64 = 64 << 10;

    /// Bytes of [`encode`](Self::encode).
    pub const ENCODED_BYTES: usize = 16;

    const ENCODING_VERSION: u8 = 1;

    /// A layout of `layers` layers with `kv_heads` KV heads (after grouping, not
    /// query heads), for chunks of `tokens` tokens.
    ///
    /// # Errors
    /// A zero dimension, or a chunk above [`Self::MAX_CHUNK_BYTES`].
    pub fn new(
        layers: u16,
        kv_heads: u16,
        planes: Planes,
        tokens: u32,
        dtype: DType,
    ) -> Result<Self, LayoutError> {
        let (key_dim, value_dim) = planes.dims();
        if layers == 0 {
            return Err(LayoutError::Zero("layers"));
        }
        if kv_heads == 0 {
            return Err(LayoutError::Zero("kv_heads"));
        }
        if tokens == 0 {
            return Err(LayoutError::Zero("tokens"));
        }
        if key_dim == 0 {
            return Err(LayoutError::Zero("key_dim"));
        }
        if value_dim == 0 && matches!(planes, Planes::KeyValue { .. }) {
            return Err(LayoutError::Zero("value_dim"));
        }
        let bytes = u128::from(layers)
            * u128::from(kv_heads)
            * (u128::from(key_dim) + u128::from(value_dim))
            * u128::from(tokens)
            * dtype.bytes() as u128;
        if bytes > u128::from(Self::MAX_CHUNK_BYTES) {
            return Err(LayoutError::TooLarge(bytes));
        }
        Ok(Self {
            layers,
            kv_heads,
            planes,
            tokens,
            dtype,
        })
    }

    /// This layout for chunks of `tokens` tokens: content chunks differ in length, and every
    /// stored object says its own layout.
    ///
    /// # Errors
    /// No tokens, or a chunk above [`Self::MAX_CHUNK_BYTES`].
    pub fn with_tokens(&self, tokens: u32) -> Result<Self, LayoutError> {
        Self::new(self.layers, self.kv_heads, self.planes, tokens, self.dtype)
    }

    /// Transformer layers.
    pub const fn layers(&self) -> u16 {
        self.layers
    }

    /// KV heads after grouping.
    pub const fn kv_heads(&self) -> u16 {
        self.kv_heads
    }

    /// Planes and their widths.
    pub const fn planes(&self) -> Planes {
        self.planes
    }

    /// Tokens per chunk.
    pub const fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Element type.
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of one head of `plane` in one layer: `tokens · dim · size(dtype)`.
    /// Zero for the value plane of a single-plane layout.
    pub const fn head_bytes(&self, plane: Plane) -> usize {
        let (key_dim, value_dim) = self.planes.dims();
        let dim = match plane {
            Plane::Key => key_dim,
            Plane::Value => value_dim,
        };
        self.tokens as usize * dim as usize * self.dtype.bytes()
    }

    /// Bytes of one layer, all planes; 1 MiB for 256 tokens, 8 heads of 128, bf16.
    pub const fn layer_bytes(&self) -> usize {
        self.kv_heads as usize * (self.head_bytes(Plane::Key) + self.head_bytes(Plane::Value))
    }

    /// Bytes of the whole chunk.
    pub const fn chunk_bytes(&self) -> u64 {
        self.layers as u64 * self.layer_bytes() as u64
    }

    /// Fewest and most bytes of an extent of an object at `level`: a raw layer has its
    /// bytes, a prelude at most 64 KiB, and no part more bytes than its raw layer, because
    /// an encoder leaves raw what it cannot make smaller.
    pub const fn extent_bounds(&self, level: Level, extent: ExtentIdx) -> [u64; 2] {
        let layer_bytes = self.layer_bytes() as u64;
        match (level.is_encoded(), extent.0) {
            (false, _) => [layer_bytes, layer_bytes],
            (true, 0) => [0, Self::MAX_PRELUDE_BYTES],
            (true, _) => [0, layer_bytes],
        }
    }

    /// Where `heads` of `plane` lie inside a layer's bytes; `None` when the layout
    /// has no such plane or not that many heads.
    pub fn head_slice(&self, plane: Plane, heads: HeadRange) -> Option<Range<usize>> {
        let head = self.head_bytes(plane);
        if head == 0 || heads.end() > self.kv_heads {
            return None;
        }
        let base = match plane {
            Plane::Key => 0,
            Plane::Value => self.kv_heads as usize * self.head_bytes(Plane::Key),
        };
        Some(base + heads.start() as usize * head..base + heads.end() as usize * head)
    }

    /// The layout of some heads and tokens of a layer; `None` when there are no such ones.
    pub fn sliced(&self, slice: Slice) -> Option<Self> {
        let heads = slice.heads.map_or(Some(self.kv_heads), |heads| {
            (heads.end() <= self.kv_heads).then(|| heads.len())
        });
        let tokens = slice.tokens.map_or(Some(self.tokens), |tokens| {
            (tokens.end() <= self.tokens).then(|| tokens.len())
        });
        Some(Self {
            kv_heads: heads?,
            tokens: tokens?,
            ..*self
        })
    }

    /// Where some heads and tokens lie inside a layer's bytes: one after the other they are a
    /// layer of the layout that [`sliced`](Self::sliced) gives. None, when there are no such
    /// heads or tokens.
    pub fn cut(&self, slice: Slice) -> impl Iterator<Item = Range<usize>> + use<> {
        let sliced = self.sliced(slice);
        let all = *self;
        let first_head = usize::from(slice.heads.map_or(0, HeadRange::start));
        let first_token = slice.tokens.map_or(0, TokenRange::start) as usize;
        let heads = sliced.map_or(0, |sliced| usize::from(sliced.kv_heads));
        let tokens = sliced.map_or(0, |sliced| sliced.tokens as usize);
        // Whole heads lie next to each other.
        let (runs, length) = if sliced.is_some_and(|sliced| sliced.tokens == self.tokens) {
            (1, heads * tokens)
        } else {
            (heads, tokens)
        };
        let planes = [(Plane::Key, 0), (Plane::Value, all.head_bytes(Plane::Key))];
        let planes = planes.map(|(plane, before)| {
            let (head, base) = (all.head_bytes(plane), usize::from(all.kv_heads) * before);
            let row = head / all.tokens as usize;
            (0..if row == 0 { 0 } else { runs }).map(move |run| {
                let start = base + (first_head + run) * head + first_token * row;
                start..start + length * row
            })
        });
        planes.into_iter().flatten()
    }

    /// The canonical 16 bytes of this layout, little-endian: version, dtype code,
    /// plane kind (1 = K and V, 2 = single), zero, layers, KV heads, key width,
    /// value width (`u16` each), tokens (`u32`).
    pub fn encode(&self) -> [u8; Self::ENCODED_BYTES] {
        let (key_dim, value_dim) = self.planes.dims();
        let kind = match self.planes {
            Planes::KeyValue { .. } => 1,
            Planes::Single { .. } => 2,
        };
        let mut out = [0u8; Self::ENCODED_BYTES];
        out[0] = Self::ENCODING_VERSION;
        out[1] = self.dtype.code();
        out[2] = kind;
        out[4..6].copy_from_slice(&self.layers.to_le_bytes());
        out[6..8].copy_from_slice(&self.kv_heads.to_le_bytes());
        out[8..10].copy_from_slice(&key_dim.to_le_bytes());
        out[10..12].copy_from_slice(&value_dim.to_le_bytes());
        out[12..16].copy_from_slice(&self.tokens.to_le_bytes());
        out
    }

    /// Reads back [`encode`](Self::encode).
    ///
    /// # Errors
    /// Unknown codes, and everything [`KvLayout::new`] refuses.
    pub fn decode(bytes: &[u8; Self::ENCODED_BYTES]) -> Result<Self, LayoutError> {
        let [
            version,
            dtype,
            kind,
            pad,
            l0,
            l1,
            h0,
            h1,
            k0,
            k1,
            v0,
            v1,
            t0,
            t1,
            t2,
            t3,
        ] = *bytes;
        if version != Self::ENCODING_VERSION {
            return Err(LayoutError::Unknown("version", version));
        }
        if pad != 0 {
            return Err(LayoutError::Unknown("reserved", pad));
        }
        let dtype = DType::from_code(dtype).ok_or(LayoutError::Unknown("dtype", dtype))?;
        let key_dim = u16::from_le_bytes([k0, k1]);
        let value_dim = u16::from_le_bytes([v0, v1]);
        let planes = match kind {
            1 => Planes::KeyValue { key_dim, value_dim },
            2 if value_dim == 0 => Planes::Single { dim: key_dim },
            other => return Err(LayoutError::Unknown("planes", other)),
        };
        Self::new(
            u16::from_le_bytes([l0, l1]),
            u16::from_le_bytes([h0, h1]),
            planes,
            u32::from_le_bytes([t0, t1, t2, t3]),
            dtype,
        )
    }

    /// BLAKE3 of the canonical bytes, in the layout domain.
    pub fn digest(&self) -> LayoutDigest {
        LayoutDigest(
            Canonical::new("kvasir v1 layout")
                .field(1, &self.encode())
                .digest(),
        )
    }
}

/// Digest of a [`KvLayout`]; travels inside every stored object.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayoutDigest([u8; 32]);

impl LayoutDigest {
    /// A digest read from storage or the wire.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest's bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for LayoutDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for LayoutDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayoutDigest({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gqa() -> KvLayout {
        KvLayout::new(32, 8, Planes::symmetric(128), 256, DType::Bf16).unwrap()
    }

    #[test]
    fn sizes_follow_the_geometry() {
        assert_eq!(gqa().layer_bytes(), 1 << 20);
        assert_eq!(gqa().chunk_bytes(), 32 << 20);
        let mla = KvLayout::new(61, 1, Planes::Single { dim: 576 }, 64, DType::Bf16).unwrap();
        assert_eq!(mla.layer_bytes(), 64 * 576 * 2);
        assert_eq!(mla.head_bytes(Plane::Value), 0);
    }

    #[test]
    fn a_slice_is_a_layer_of_fewer_heads_and_tokens() {
        let planes = [
            Planes::KeyValue {
                key_dim: 3,
                value_dim: 2,
            },
            Planes::Single { dim: 4 },
        ];
        let ranges = |most: u16| (0..most).flat_map(move |s| (s + 1..=most).map(move |e| (s, e)));
        for layout in planes.map(|planes| KvLayout::new(1, 3, planes, 4, DType::F16).unwrap()) {
            let (key_dim, value_dim) = layout.planes().dims();
            // What lies where, element by element.
            let elements = |heads: (u16, u16), tokens: (u16, u16)| {
                let mut all = Vec::new();
                for (plane, dim) in [(0, key_dim), (1, value_dim)] {
                    for head in heads.0..heads.1 {
                        for token in tokens.0..tokens.1 {
                            all.extend((0..2 * dim).map(|byte| (plane, head, token, byte)));
                        }
                    }
                }
                all
            };
            let layer = elements((0, 3), (0, 4));
            assert_eq!(layer.len(), layout.layer_bytes());
            for heads in ranges(3) {
                for tokens in ranges(4) {
                    let slice = Slice {
                        heads: Some(HeadRange::new(heads.0, heads.1).unwrap()),
                        tokens: Some(TokenRange::new(tokens.0.into(), tokens.1.into()).unwrap()),
                    };
                    let cut: Vec<_> = layout.cut(slice).flat_map(|at| &layer[at]).collect();
                    assert_eq!(cut, elements(heads, tokens).iter().collect::<Vec<_>>());
                    assert_eq!(cut.len(), layout.sliced(slice).unwrap().layer_bytes());
                }
            }
            assert_eq!(layout.sliced(Slice::default()), Some(layout));
            let beyond = Slice {
                heads: Some(HeadRange::new(2, 4).unwrap()),
                tokens: None,
            };
            assert_eq!(layout.sliced(beyond), None);
            assert_eq!(layout.cut(beyond).count(), 0);
        }
    }

    #[test]
    fn heads_of_all_ranks_tile_a_layer() {
        let planes = Planes::KeyValue {
            key_dim: 192,
            value_dim: 128,
        };
        let layout = KvLayout::new(2, 8, planes, 16, DType::F32).unwrap();
        for ranks in [1u16, 2, 4, 8] {
            let per_rank = 8 / ranks;
            let mut next = 0;
            for plane in [Plane::Key, Plane::Value] {
                for rank in 0..ranks {
                    let heads = HeadRange::new(rank * per_rank, (rank + 1) * per_rank).unwrap();
                    let slice = layout.head_slice(plane, heads).unwrap();
                    assert_eq!(slice.start, next);
                    next = slice.end;
                }
            }
            assert_eq!(next, layout.layer_bytes());
        }
        let outside = HeadRange::new(7, 9).unwrap();
        assert_eq!(layout.head_slice(Plane::Key, outside), None);
    }

    #[test]
    fn other_lengths_differ_in_nothing_else() {
        let longer = gqa().with_tokens(300).unwrap();
        assert_eq!(longer.tokens(), 300);
        assert_eq!(longer.with_tokens(256), Ok(gqa()));
        assert_eq!(gqa().with_tokens(0), Err(LayoutError::Zero("tokens")));
        let most = KvLayout::MAX_CHUNK_BYTES / (gqa().chunk_bytes() / 256);
        let most = u32::try_from(most).unwrap();
        assert_eq!(gqa().with_tokens(most).unwrap().tokens(), most);
        assert!(matches!(
            gqa().with_tokens(most + 1),
            Err(LayoutError::TooLarge(_))
        ));
    }

    #[test]
    fn refuses_what_cannot_be_a_cache() {
        let planes = Planes::symmetric(128);
        assert_eq!(
            KvLayout::new(0, 8, planes, 256, DType::F32),
            Err(LayoutError::Zero("layers"))
        );
        assert!(matches!(
            KvLayout::new(u16::MAX, u16::MAX, planes, u32::MAX, DType::F32),
            Err(LayoutError::TooLarge(_))
        ));
    }

    #[test]
    fn encoding_round_trips_and_refuses_unknown_codes() {
        let bytes = gqa().encode();
        assert_eq!(KvLayout::decode(&bytes), Ok(gqa()));
        for (index, field) in [(0, "version"), (1, "dtype"), (2, "planes"), (3, "reserved")] {
            let mut broken = bytes;
            broken[index] = 99;
            assert_eq!(
                KvLayout::decode(&broken),
                Err(LayoutError::Unknown(field, 99))
            );
        }
    }
}
