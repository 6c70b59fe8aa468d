//! Pages that sequences take, and what becomes of sequences whose pages cannot be moved.

use std::sync::Arc;

use super::batch::Planned;
use super::engine_loop::EngineLoop;
use crate::kv::BlockId;
use crate::model::ForwardError;
use crate::paging::Backing;
use crate::request::RequestError;

/// Keeps KV in memory only in part; see [`crate::paging`].
///
/// Sequences attend to all of their pages, a layer at a time: so frames for one layer of all
/// sequences are the limit, not frames for all layers.
#[derive(Clone, Debug)]
pub struct PagingConfig {
    /// Pieces in memory: [`crate::KvPool::frames_in`] says how many some bytes hold.
    pub frames: usize,
    /// Where the others are.
    pub backing: Arc<dyn Backing>,
}

impl EngineLoop {
    /// Ends the sequences of a batch that failed: one, where its pages cannot be moved, so that
    /// the others go on without it, and otherwise all.
    pub(super) fn fail(&mut self, plan: &[Planned], error: &ForwardError) {
        let mut failed: Vec<usize> = plan.iter().map(|planned| planned.sequence).collect();
        let mut reason = RequestError::Internal;
        if let ForwardError::Paging { step, source } = error {
            // Where any could make room, the one that came last does.
            let at_fault = step.map_or_else(
                || failed.iter().copied().max(),
                |step| failed.get(step).copied(),
            );
            failed = at_fault.into_iter().collect();
            reason = RequestError::Pages(*source);
            tracing::error!(error = %source, "pages of a sequence cannot be moved");
        } else {
            tracing::error!(%error, "a batch failed");
        }
        for &index in &failed {
            self.running[index].fail(reason.clone());
        }
        self.end_all(failed);
    }

    pub(super) fn take_blocks(&mut self, count: usize) -> Option<Vec<BlockId>> {
        let taken = self.pool.blocks() - self.pool.free_blocks();
        if taken + count > self.pool.layer_blocks() {
            return None;
        }
        (0..count).map(|_| self.pool.alloc()).collect()
    }

    pub(super) fn give_back(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            if let Err(error) = self.pool.free(block) {
                tracing::error!(%error, "a page was given back twice");
            }
        }
    }
}
