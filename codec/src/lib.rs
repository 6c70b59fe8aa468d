//! Stored objects, and the coding of keys and values.
//!
//! # The container
//! An object is one chunk as it lies on a disk, in a bundle or in a peer's memory:
//! a header that says what the bytes are, then its extents, each checked by itself.
//!
//! ```text
//! raw     := header ‖ layer 0 ‖ layer 1 ‖ … ‖ layer L-1
//! encoded := header ‖ prelude ‖ part 0 of layer 0 … L-1 ‖ part 1 of layer 0 … L-1 ‖ …
//! ```
//!
//! Of a nested level, part 0 is the coarsest; a level is the parts up to its own. So a
//! coarser level is the beginning of an object, an upgrade is the part that follows, layers
//! can differ in level, and layer 0 comes first in each. All other levels have one part.
//!
//! * [`ObjectHeader`]: identity, geometry, level, and a length and checksum per extent.
//! * [`Object`]: a header together with extents that were checked against it.
//! * [`Prelude`]: what decoding takes besides: how keys were turned, which tokens are exact.
//! * [`Encoding`] makes objects of raw layers; [`ChunkDecoder`] makes raw layers of parts.
//!
//! # What the checks promise
//! Every object repeats its key and the digest of its layout, so that intact
//! bytes of the *wrong* object are told from the right one. The header ends in a
//! checksum over itself; each extent has its own, so that one is verified without
//! reading the others.
//!
//! The checksum is CRC-64/NVME. It runs at memory speed (measured on one
//! core with AVX-512: 8.6 GB/s from DRAM and 73 GB/s from cache, against 5.0 and
//! 7.3 for BLAKE3), detects every burst of up to 64 bits, and leaves a chance of
//! 2^-64 for heavier damage. A 32-bit CRC costs the same from DRAM and would miss one
//! torn object in 4 billion. A CRC guards against accidents, not against an
//! attacker who can rewrite an object: access control does that.
//!
//! # The lossy coding of a layer
//! [`LayerCodec`] turns a raw layer into three nested parts, of which the first is the
//! coarsest level and each further one makes the steps three times finer. Values are
//! quantised in one uniform step a layer and plane, keys after [`Rotation`] is undone, and
//! coded by tables that are part of the format. It follows what is known of rate and
//! distortion: at equal error a uniform quantiser and an entropy coder take less than any
//! fixed number of bits, and what tells channels apart takes two bytes of a channel and
//! chunk, where CacheGen (arXiv 2310.07240), as circulated, ships its tables, two bits a
//! value in chunks of 256 tokens.
//!
//! The levels of a few tokens and heads, a cell, follow each other in one stream of rANS. How
//! symbols are found without tables in memory, and so at several GB/s a core: [`LayerCodec`]'s
//! entropy coder compares all lanes with the bounds of their symbols, which stay the same for
//! 64 tokens. Every cell has a CRC-32C over its bytes and its place, so some heads and tokens
//! are decoded, and checked, without the others: [`LayerCodec::decode_slice`]. The first
//! tokens, which attention leans on, can be kept bit for bit:
//! [`LayerCodec::with_exact_tokens`].
//!
//! With a [`Profile`] of the model, which is calibrated once, channels are projected on a basis
//! in which they say nothing of each other, after [`Rotation`] is undone, and nothing needs to
//! be shipped of them. A chunk names its profile by digest, and cannot be decoded without it.
//! [`Profile::calibrate`] learns one from chunks.
//!
//! What a layer takes, how exact it stays and how fast it is coded: `kvasir-bench codec`.
//!
//! # Other codings
//! * [`FixedCodec`]: every row takes the same bytes, INT8 or INT4, for pages.
//! * [`CacheGen`] and [`CirculatedCacheGen`]: what its paper, and its code, take for the same.
//!
//! # On other processors
//! [`LayerCodec::plan`] reads and checks what comes before the symbols, and says of every cell
//! where its words lie and what its numbers stand for, so that a decoder elsewhere, as the one
//! of `kvasir-cuda`, meets no bytes that were not checked.
//!
//! Code that is `unsafe` is in the kernels of the entropy coder and in those that write
//! values, and nowhere else; a scalar twin says what each computes, and tests compare them.
//! There are kernels for AVX-512 with VBMI2 and for AVX2 with FMA; other CPUs take the scalar
//! code.
//!
//! Not here: where objects lie (`kvasir-store`), how they travel (`kvasir-proto`).

#![deny(unsafe_code)]

mod cachegen;
mod calibration;
mod cell;
mod channels;
mod chunk;
mod classes;
mod elements;
mod fixed;
mod header;
mod input;
mod layer;
mod lossless;
mod object;
mod output;
mod part;
mod prelude;
mod profile;
mod quantise;
mod rans;
mod rotation;
mod transform;
mod values;

pub use cachegen::{CacheGen, CacheGenError, CirculatedCacheGen, CirculatedLevel};
pub use calibration::CalibrationError;
pub use cell::{CELL_TOKENS, CellError, LADDER};
pub use channels::ChannelsError;
pub use chunk::{ChunkDecoder, ChunkError, EncodeError, Encoding};
pub use fixed::{FixedCodec, FixedError, FixedRate, UnsupportedFixed};
pub use header::{Extent, ExtentError, HeaderError, IdentityError, ObjectHeader};
pub use layer::{
    CellPlan, DecodeError, DecodeTables, EncodedLayer, GroupPlan, LayerCodec, LayerPlan, PlanError,
    UnsupportedLayout,
};
pub use lossless::{LosslessError, decode_lossless, encode_lossless};
pub use object::{Object, ObjectError};
pub use prelude::{KeyRotation, Prelude, PreludeError};
pub use profile::{LayerProfile, Profile, ProfileBasis, ProfileError, ProfilePlane, ProfileShape};
pub use rans::StreamError;
pub use rotation::{Pairing, Rotation};
