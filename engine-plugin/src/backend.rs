//! The seam to an engine's pages.

use std::ops::Range;

use kvasir_types::{KvLayout, LayerIdx};

/// Where a content chunk lies in a sequence, and where it was computed. In tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Placement {
    /// Its first token in the sequence.
    pub first: usize,
    /// The position that its first token had when its keys and values were computed.
    pub compiled_at: usize,
    /// Its tokens.
    pub tokens: usize,
}

impl Placement {
    /// Its tokens in the sequence.
    pub fn range(&self) -> Range<usize> {
        self.first..self.first.saturating_add(self.tokens)
    }

    /// Whether it lies where it was computed.
    pub fn is_unmoved(&self) -> bool {
        self.first == self.compiled_at
    }
}

/// An engine's paged KV, seen chunk by chunk and layer by layer.
///
/// # Contract
/// - A payload is one layer of one chunk in the canonical order of [`KvLayout`]:
///   `[plane (K, V), kv_head, token, dim]`, row-major, little-endian,
///   [`KvLayout::layer_bytes`] long.
/// - `read_layer` after `write_layer` gives the same bytes, bit for bit, NaN included.
/// - `write_moved` writes the tokens of its placement and changes no other. What was not
///   moved is written bit for bit. Values are written bit for bit wherever they come to lie.
///   Keys are turned from the position of each token when it was computed to the one that it
///   has now: keys of the first layer, which depend on nothing but token and position, are
///   those that would be computed here, up to the rounding of the element type.
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

    /// Writes one layer of a content chunk into the pages of a sequence, at any token, with its
    /// keys turned to where it lies now. The payload is in the order of the layout with as many
    /// tokens as the chunk has.
    ///
    /// # Errors
    /// See the contract.
    fn write_moved(
        &mut self,
        pages: &Self::Pages,
        at: Placement,
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
    /// The sequence's pages end before the content chunk does.
    #[error("a content chunk at tokens {first}..{end} lies beyond the sequence's pages")]
    PlacedOutsidePages {
        /// Its first token in the sequence.
        first: usize,
        /// One past its last.
        end: usize,
    },
    /// The backend was not told how the model turns its keys.
    #[error("keys cannot be turned here: give the backend the model's rotation")]
    NoRotation,
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
