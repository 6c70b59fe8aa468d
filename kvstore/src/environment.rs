//! What a store takes from outside.

use std::sync::Arc;

use crate::clock::Clock;
use crate::disk::{DirectIo, Medium};

/// Where a store takes time and files from. The default is the system's clock and
/// [`DirectIo`]; tests bring time that stands still and devices that fail.
#[derive(Clone, Debug)]
pub struct Environment {
    /// Time, for pins and policies.
    pub clock: Clock,
    /// Files, for segments.
    pub medium: Arc<dyn Medium>,
}

impl Default for Environment {
    fn default() -> Self {
        Self {
            clock: Clock::default(),
            medium: Arc::new(DirectIo),
        }
    }
}
