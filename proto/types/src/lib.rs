//! Identity and geometry of KV caches: the vocabulary every other package speaks.
//!
//! * [`KvLayout`]: geometry and element type of a chunk.
//! * [`Namespace`] and [`ChunkKey`]: what a chunk *is*. A key covers everything
//!   that changes a value and nothing that does not.
//! * [`LayerRange`], [`TokenRange`], [`HeadRange`]: parts of a chunk.
//! * [`Level`]: a rung of the codec's quality ladder.
//! * [`ProfileDigest`]: names what chunks of nested levels may be encoded with.
//! * [`Durability`] and [`Hints`]: what a put promises, and what a chunk is worth.
//! * [`Checksum`]: guards every layer, stored or sent.
//! * [`ByteSize`]: a number of bytes as people write it.
//!
//! Everything here is pure: no I/O, no clock, no environment, no async. Two
//! processes on two machines that describe the same tokens under the same model
//! derive the same key; `vectors/identity.json` holds published examples that
//! other implementations can check themselves against.
//!
//! Not here: bytes of a stored object (`kvasir-codec`), the wire (`kvasir-proto`).

#![forbid(unsafe_code)]

mod canonical;
mod checksum;
mod key;
mod layout;
mod level;
mod profile;
mod range;
mod size;
mod worth;

pub use checksum::{Checksum, RunningChecksum};
pub use key::{Adapter, ChunkKey, ModelIdentity, Namespace, ParseKeyError};
pub use layout::{DType, KvLayout, LayoutDigest, LayoutError, Plane, Planes};
pub use level::{Level, ParseLevelError, UnknownLevel};
pub use profile::{MAX_PROFILE_BYTES, ParseProfileDigestError, ProfileDigest};
pub use range::{
    ExtentIdx, ExtentRange, HeadRange, LayerIdx, LayerRange, RangeError, Slice, TokenRange,
};
pub use size::{ByteSize, ParseByteSizeError};
pub use worth::{Class, Durability, Hints, NoSuchClass};
