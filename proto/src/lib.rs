//! The `kvasir.v1` protocol: generated code and validated conversions.
//!
//! [`v1`] is generated from `kvasir/v1/cache.proto` and `kvasir/v1/index.proto`; nothing outside this package
//! should look at its raw fields without a conversion from [`convert`], which
//! either gives a value of `kvasir-types` or an [`InvalidField`] that names the
//! field and says what is wrong with it.
//!
//! [`sequence`] says what a get sends, in which order; [`assembly`] cuts extents into
//! messages and joins them.
//!
//! [`transfer`] is what the data plane needs besides.
//!
//! [`status`] holds the two refusals every server of this protocol speaks:
//! a malformed field, and "come back later".

#![forbid(unsafe_code)]

pub mod assembly;
pub mod convert;
pub mod sequence;
pub mod status;
pub mod transfer;

/// Generated from `kvasir/v1/*.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("kvasir.v1");

    /// The protocol's descriptors, for server reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/kvasir_v1.bin"));
}

pub use convert::InvalidField;

/// Most keys in one request.
pub const MAX_KEYS: usize = 16_384;

/// Most payload bytes in one [`v1::ExtentPiece`].
pub const MAX_PIECE_BYTES: usize = 4 << 20;

/// Most bytes in one message: a full piece and room for the fields around it.
pub const MAX_MESSAGE_BYTES: usize = MAX_PIECE_BYTES + (64 << 10);

/// Largest HTTP/2 frame that both sides accept. Payload moves twice as fast as in
/// the 16 KiB frames that are HTTP/2's default.
pub const MAX_FRAME_BYTES: u32 = 1 << 20;

/// Longest life of a pin, in milliseconds.
pub const MAX_PIN_TTL_MS: u64 = 24 * 60 * 60 * 1000;
