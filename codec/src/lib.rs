//! The container of one stored object.
//!
//! An object is one chunk as it lies on a disk, in a bundle or in a peer's memory:
//! a header that says what the bytes are, then the payload of every layer, in
//! order. Layer 0 comes first, so that a reader can start attention while later
//! layers are still on their way, and any range of layers is one positioned read.
//!
//! ```text
//! object := header ‖ layer 0 ‖ layer 1 ‖ … ‖ layer L-1
//! ```
//!
//! * [`ObjectHeader`]: identity, geometry and one checksum per layer.
//! * [`Object`]: a header together with layers that were checked against it.
//!
//! # What the checks promise
//! Every object repeats its key and the digest of its layout, so that intact
//! bytes of the *wrong* object are told from the right one. The header ends in a
//! checksum over itself; each layer has its own, so that one layer is verified
//! without reading the others.
//!
//! The checksum is CRC-64/NVME. It runs at memory speed (measured on one
//! core with AVX-512: 8.6 GB/s from DRAM and 73 GB/s from cache, against 5.0 and
//! 7.3 for BLAKE3), detects every burst of up to 64 bits, and leaves a chance of
//! 2^-64 for heavier damage. A 32-bit CRC costs the same from DRAM and would miss one
//! torn object in 4 billion. A CRC guards against accidents, not against an
//! attacker who can rewrite an object: access control does that.
//!
//! Not here: where objects lie (`kvasir-store`), how they travel (`kvasir-proto`).

#![deny(unsafe_code)]

mod cell;
mod classes;
mod header;
mod layer;
mod object;
mod rans;
mod rotation;
mod rows;

pub use cell::{CELL_TOKENS, CellError, LADDER};
pub use header::{HeaderError, IdentityError, LayerEntry, LayerError, ObjectHeader};
pub use layer::{DecodeError, EncodedLayer, LayerCodec, UnsupportedLayout};
pub use object::{Object, ObjectError};
pub use rans::StreamError;
pub use rotation::{Pairing, Rotation};
