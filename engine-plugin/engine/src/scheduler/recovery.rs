//! What becomes of sequences whose pages cannot be moved.
//!
//! One whose page cannot be read back is computed again from its tokens, those that it has
//! generated included, and goes on where it was: nothing is emitted twice. Where nothing can be
//! written, what holds memory is given up, beginning with what came last, so that the others have
//! room; it is computed again behind them. A sequence to which that happens more than
//! [`RESTARTS`] times fails, with an error that says why; others go on.
//!
//! A disk that hangs is no different, but that each failure of it holds up everybody for as long
//! as the [timeout](super::PagingConfig::timeout) says, and the next ones a tenth as long while
//! nothing comes from it.

use super::batch::Planned;
use super::engine_loop::EngineLoop;
use super::sequence::{Phase, Sequence};
use crate::model::ForwardError;
use crate::paging::PagingError;
use crate::request::RequestError;

/// How often a sequence is computed again, at most.
pub(super) const RESTARTS: u32 = 2;

impl EngineLoop {
    /// Sees to a batch that failed: none of its sequences has moved on.
    pub(super) fn fail(&mut self, plan: &[Planned], error: &ForwardError) {
        let ForwardError::Paging { step, source } = error else {
            tracing::error!(error = error as &dyn std::error::Error, "a batch failed");
            let failed: Vec<usize> = plan.iter().map(|planned| planned.sequence).collect();
            for &index in &failed {
                self.running[index].fail(RequestError::Internal);
            }
            self.end_all(failed);
            return;
        };
        tracing::warn!(
            error = source as &dyn std::error::Error,
            "pages of a sequence cannot be moved"
        );
        let at_fault = match step.and_then(|step| plan.get(step)) {
            Some(planned) => Some(planned.sequence),
            None if self.drop_capture() => return,
            None => self.latest_in_memory(plan),
        };
        if let Some(index) = at_fault {
            // Too little memory is too little the next time, too.
            let is_hopeless = matches!(source, PagingError::Frames { .. });
            if is_hopeless || !self.start_over(index) {
                self.running[index].fail(RequestError::Pages(*source));
                self.end(index);
            }
        }
    }

    /// Gives up chunks of a sequence that has ended otherwise. False when there is none.
    fn drop_capture(&mut self) -> bool {
        let drains = |phase: &Phase| matches!(phase, Phase::Draining);
        let Some(index) = self.running.iter().position(|it| drains(&it.phase)) else {
            return false;
        };
        let sequence = self.running.remove(index);
        if let Some(plugin) = &self.plugin {
            plugin.note_dropped_captures(sequence.capture.len());
        }
        self.give_back(&sequence.blocks);
        true
    }

    /// The latest of those that have something in memory.
    fn latest_in_memory(&self, plan: &[Planned]) -> Option<usize> {
        let planned = plan.iter().map(|planned| planned.sequence).max();
        let latest = self.running.iter().rposition(Sequence::is_in_memory);
        latest.max(planned)
    }

    /// Forgets all KV of a sequence, which is computed again when others have had their turn.
    /// False when that was done often enough.
    fn start_over(&mut self, index: usize) -> bool {
        if self.running[index].restarts == RESTARTS {
            return false;
        }
        let choice = self.choice(self.running[index].limit());
        let sequence = &mut self.running[index];
        self.pool.forget(&sequence.blocks);
        sequence.start_over();
        sequence.restarts += 1;
        sequence.choice = choice;
        if let Some(paged) = &mut self.paged {
            sequence.turn.end(paged.now);
            sequence.turn.is_parked = false;
            paged.stats.restarts += 1;
        }
        true
    }
}
