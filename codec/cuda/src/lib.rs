//! Decoding of KV cache objects on a GPU.
mod batch;
mod placement;
pub use batch::{BatchError, LayerJob};
pub use placement::{Placement, PlacementError, PlanePlacement};
