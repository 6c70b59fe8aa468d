//! The seam to an engine's pages.

use kvasir_types::{KvLayout, LayerIdx};

/// An engine's paged KV, seen chunk by chunk and layer by layer.
///
/// # Contract
/// - A payload is one layer of one chunk in the canonical order of [`KvLayout`]:
///   `[plane (K, V), kv_head, token, dim]`, row-major, little-endian,
///   [`KvLayout::layer_bytes`] long.
/// - `read_layer` after `write_layer` gives the same bytes, bit for bit, NaN included.
/// - Writing one chunk or layer changes no other.
/// - A chunk outside the sequence's pages, or a payload of another length, is an
///   error and changes nothing.
///
/// Every implementation passes `kvasir_tests::conformance::backend`.
pub trait EngineBackend {
    /// The pages of one sequence, such as a block table.
    type Pages: ?Sized;

    /// Geometry of the chunks this engine exchanges.
    fn layout(&self) -> &KvLayout;

    /// Writes one layer of the `chunk`-th chunk of a sequence into its pages.
    ///
    /// # Errors
    /// See the contract.
    fn write_layer(
        &mut self,
        pages: &Self::Pages,
        chunk: usize,
        layer: LayerIdx,
        payload: &[u8],
    ) -> Result<(), BackendError>;

    /// Reads one layer of the `chunk`-th chunk of a sequence out of its pages.
    ///
    /// # Errors
    /// See the contract.
    fn read_layer(
        &self,
        pages: &Self::Pages,
        chunk: usize,
        layer: LayerIdx,
        payload: &mut [u8],
    ) -> Result<(), BackendError>;
}

/// Why a layer could not be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The sequence's pages end before the chunk does.
    #[error("chunk {chunk} lies beyond the sequence's pages")]
    OutsidePages {
        /// Index of the chunk in its sequence.
        chunk: usize,
    },
    /// The layout has no such layer.
    #[error("layer {0} does not exist")]
    NoSuchLayer(LayerIdx),
    /// The payload is not one layer long.
    #[error("a layer has {expected} bytes, the payload {found}")]
    WrongLength {
        /// Bytes of a layer.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
}
