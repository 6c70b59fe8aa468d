//! A device's pages as the cache plugin sees them.

use kvasir_plugin::{BackendError, EngineBackend, Placement};
use kvasir_types::{KvLayout, LayerIdx};

use super::{DevicePool, DevicePoolError};
use crate::cache::{Turns, check_chunk, check_moved};
use crate::kv::BlockId;

/// A [`DevicePool`] that exchanges chunks of a fixed layout, as
/// [`PoolBackend`](crate::cache::PoolBackend) does for pages on the host.
///
/// Keys of content chunks are turned on the host, before they are copied.
#[derive(Debug)]
pub struct DeviceBackend<'a> {
    pool: &'a mut DevicePool,
    layout: &'a KvLayout,
    turns: Option<&'a mut Turns>,
}

impl<'a> DeviceBackend<'a> {
    /// `pool` must have the geometry and element type of `layout`.
    pub fn new(pool: &'a mut DevicePool, layout: &'a KvLayout) -> Self {
        Self {
            pool,
            layout,
            turns: None,
        }
    }

    /// Lands content chunks too. `turns` must be of the pool's model; it lasts longer than
    /// this, so that what it knows of a chunk serves all of its layers.
    #[must_use]
    pub fn with_turns(mut self, turns: &'a mut Turns) -> Self {
        self.turns = Some(turns);
        self
    }
}

impl EngineBackend for DeviceBackend<'_> {
    type Pages = [BlockId];

    fn layout(&self) -> &KvLayout {
        self.layout
    }

    fn write_layer(
        &mut self,
        pages: &[BlockId],
        chunk: usize,
        layer: LayerIdx,
        payload: &[u8],
    ) -> Result<(), BackendError> {
        let (first, tokens) = check_chunk(self.layout, pages, chunk, layer, payload.len())?;
        self.pool
            .write_layer(pages, first, tokens, layer.0.into(), payload)
            .map_err(|error| {
                warn(&error);
                BackendError::OutsidePages { chunk }
            })
    }

    fn write_moved(
        &mut self,
        pages: &[BlockId],
        at: Placement,
        layer: LayerIdx,
        payload: &[u8],
    ) -> Result<(), BackendError> {
        let layer_bytes = |tokens| self.pool.layer_bytes(tokens);
        check_moved(self.layout, layer_bytes, pages, at, layer, payload.len())?;
        let payload = match &mut self.turns {
            _ if at.is_unmoved() => payload,
            Some(turns) => turns.turn(self.pool.dtype(), at, payload),
            None => return Err(BackendError::NoRotation),
        };
        self.pool
            .write_layer(pages, at.first, at.tokens, layer.0.into(), payload)
            .map_err(|error| {
                warn(&error);
                BackendError::PlacedOutsidePages {
                    first: at.first,
                    end: at.range().end,
                }
            })
    }

    fn read_layer(
        &self,
        pages: &[BlockId],
        chunk: usize,
        layer: LayerIdx,
        payload: &mut [u8],
    ) -> Result<(), BackendError> {
        let (first, tokens) = check_chunk(self.layout, pages, chunk, layer, payload.len())?;
        self.pool
            .read_layer(pages, first, tokens, layer.0.into(), payload)
            .map_err(|error| {
                warn(&error);
                BackendError::OutsidePages { chunk }
            })
    }
}

/// The plugin's errors have no place for a device that failed; whatever they say, the span is
/// computed.
fn warn(error: &DevicePoolError) {
    tracing::warn!(
        error = error as &dyn std::error::Error,
        "pages of the device"
    );
}
