//! Blocks on their way out of an engine's memory, layer by layer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use kvasir_plugin::{
    BackendError, CachePlugin, CaptureOutcome, ChunkCopy, EngineBackend as _, Strided,
};
use kvasir_types::{ChunkKey, Hints, LayerIdx};
use pyo3::prelude::*;

use crate::cache::Sent;
use crate::invalid;
use crate::memory::Region;

/// Blocks that are being copied, to be stored when all of their layers are.
#[pyclass(frozen, module = "kvasir")]
pub(crate) struct Save {
    plugin: CachePlugin,
    pages: Strided<Region>,
    sent: Arc<Sent>,
    copies: Mutex<Vec<Copy>>,
}

/// A block, as far as it has been copied.
struct Copy {
    key: ChunkKey,
    parent: Option<ChunkKey>,
    block: u32,
    layers: Vec<Option<Bytes>>,
}

impl Copy {
    fn layer(&mut self, pages: &Strided<Region>, layer: usize) -> Result<(), BackendError> {
        if let Some(copied @ None) = self.layers.get_mut(layer) {
            *copied = Some(read_layer(pages, self.block, layer)?);
        }
        Ok(())
    }

    /// With the layers that are still missing.
    fn whole(mut self, pages: &Strided<Region>) -> Result<ChunkCopy, BackendError> {
        for layer in 0..self.layers.len() {
            self.layer(pages, layer)?;
        }
        let layers = self.layers.into_iter().flatten().collect();
        Ok(chunk(pages, self.key, self.parent, layers))
    }
}

fn read_layer(pages: &Strided<Region>, block: u32, layer: usize) -> Result<Bytes, BackendError> {
    let layer = LayerIdx(u16::try_from(layer).unwrap_or(u16::MAX));
    let mut payload = vec![0; pages.layout().layer_bytes()];
    pages.read_layer(&[block], 0, layer, &mut payload)?;
    Ok(payload.into())
}

/// A block's layers.
pub(crate) fn read(pages: &Strided<Region>, block: u32) -> Result<Vec<Bytes>, BackendError> {
    let layers = 0..usize::from(pages.layout().layers());
    layers.map(|it| read_layer(pages, block, it)).collect()
}

pub(crate) fn chunk(
    pages: &Strided<Region>,
    key: ChunkKey,
    parent: Option<ChunkKey>,
    layers: Vec<Bytes>,
) -> ChunkCopy {
    ChunkCopy {
        key,
        layout: *pages.layout(),
        // Behind a parent it is not known, and counts only in that it is not the prompt's start.
        start: parent.map_or(0, |_| pages.layout().tokens().into()),
        layers,
        hints: Hints {
            parent,
            ..Hints::default()
        },
    }
}

impl Save {
    /// Of blocks that have not been sent before, as many as there is room for.
    pub(crate) fn new(
        plugin: CachePlugin,
        pages: Strided<Region>,
        sent: Arc<Sent>,
        mut parent: Option<ChunkKey>,
        blocks: impl Iterator<Item = (ChunkKey, u32)>,
    ) -> Self {
        let (mut copies, mut bytes) = (Vec::new(), 0);
        for (key, block) in blocks {
            if !sent.has(&key) {
                bytes += pages.layout().chunk_bytes();
                if !plugin.has_capture_room(bytes) {
                    plugin.note_dropped_captures(1);
                    break;
                }
                copies.push(Copy {
                    key,
                    parent,
                    block,
                    layers: vec![None; usize::from(pages.layout().layers())],
                });
            }
            parent = Some(key);
        }
        Self {
            plugin,
            pages,
            sent,
            copies: Mutex::new(copies),
        }
    }

    fn copies(&self) -> MutexGuard<'_, Vec<Copy>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies what is still missing, and has it all stored: how many blocks will be. Once.
    pub(crate) fn end(&self) -> Result<usize, BackendError> {
        let mut copies = self.copies();
        let mut queued = 0;
        for copy in std::mem::take(&mut *copies) {
            let key = copy.key;
            if self.plugin.capture(copy.whole(&self.pages)?) == CaptureOutcome::Dropped {
                break;
            }
            self.sent.note(key);
            queued += 1;
        }
        Ok(queued)
    }
}

#[pymethods]
impl Save {
    /// Copies a layer of all blocks.
    fn layer(&self, py: Python<'_>, layer: usize) -> PyResult<()> {
        let copied = py.detach(|| {
            let mut copies = self.copies();
            copies
                .iter_mut()
                .try_for_each(|copy| copy.layer(&self.pages, layer))
        });
        copied.map_err(invalid)
    }

    /// Copies the layers that were not, and has the blocks stored behind the caller's back: how
    /// many of them will be. What is not ended is not stored.
    #[pyo3(name = "end")]
    fn end_detached(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| self.end()).map_err(invalid)
    }

    /// Forgets them.
    fn drop(&self) {
        self.copies().clear();
    }
}
