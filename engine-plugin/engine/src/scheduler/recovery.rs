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
    pub(super) fn start_over(&mut self, index: usize) -> bool {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::fixtures;
    use super::super::pages::PageSelection;
    use super::*;
    use crate::kv::BlockId;
    use crate::model::Logits;
    use crate::paging::Options;
    use crate::request::Event;

    fn planned(sequence: usize) -> Planned {
        Planned {
            sequence,
            from: 40,
            to: 41,
            wants_logits: true,
            rows: None,
        }
    }

    fn paging(step: Option<usize>, source: PagingError) -> ForwardError {
        ForwardError::Paging { step, source }
    }

    fn restarts(engine: &EngineLoop) -> Vec<u32> {
        engine.running.iter().map(|it| it.restarts).collect()
    }

    /// Where nothing can be written, what has ended otherwise is given up first, then what came
    /// last of that which holds memory, whether it runs or not; who holds none has no room to
    /// give.
    #[test]
    fn who_came_last_makes_room() {
        for source in [
            PagingError::Full,
            PagingError::Timeout {
                timeout: Duration::from_secs(1),
            },
        ] {
            let (mut engine, _commands, _file) = fixtures::engine(64, Duration::from_secs(10));
            let mut listeners = Vec::new();
            for _ in 0..4 {
                let (sequence, events) = fixtures::decoding(&mut engine);
                engine.running.push(sequence);
                listeners.push(events);
            }
            engine.running[0].phase = Phase::Draining;
            engine.running[3].turn.is_parked = true;
            let full = paging(None, source);
            engine.fail(&[planned(1)], &full);
            assert_eq!(restarts(&engine), [0, 0, 0]);
            engine.fail(&[planned(0)], &full);
            assert_eq!(restarts(&engine), [0, 1, 0]);
            assert_eq!(engine.running[1].position, 0);
            // Who was about to come in has begun to write.
            engine.fail(&[planned(0), planned(2)], &full);
            assert_eq!(restarts(&engine), [0, 1, 1]);
            engine.fail(&[planned(0)], &full);
            assert_eq!(restarts(&engine), [1, 1, 1]);
            engine.fail(&[planned(0), planned(1)], &full);
            assert_eq!(restarts(&engine), [1, 2, 1]);
            assert!(listeners.iter_mut().all(|it| it.try_recv().is_err()));
        }
    }

    /// What was fetched is forgotten, with the digests of it; what was computed cannot be helped.
    #[test]
    fn who_fetched_what_is_no_number_computes_it() {
        let (mut engine, _commands, _file) = fixtures::engine(64, Duration::from_secs(10));
        let selection = PageSelection {
            options: Options::default(),
            from_tokens: 32,
            reads_ahead: false,
            digest_bytes: usize::MAX,
        };
        engine.paged.as_mut().unwrap().selection = Some(selection);
        let (mut sequence, mut events) = fixtures::decoding(&mut engine);
        sequence.usage.cached_tokens = 32;
        sequence.capture = 2..3;
        sequence.choice = engine.choice(sequence.limit());
        engine.running.push(sequence);
        let nothing = engine.digest_bytes();
        engine.digest(0);
        assert!(engine.digest_bytes() > nothing);
        let logits = Logits::of_one(vec![0.0, f32::NAN]);

        engine.apply(&[planned(0)], &logits);
        assert_eq!(restarts(&engine), [1]);
        assert_eq!(engine.digest_bytes(), nothing);
        let sequence = &engine.running[0];
        assert!(matches!(sequence.phase, Phase::Prefill) && sequence.choice.is_some());
        assert_eq!((sequence.position, sequence.usage.cached_tokens), (0, 0));
        assert!(sequence.capture.is_empty() && events.try_recv().is_err());

        engine.apply(&[planned(0)], &logits);
        assert!(engine.running.is_empty());
        let failed = events.try_recv().unwrap();
        assert!(matches!(failed, Event::Failed(RequestError::NotFinite)));
        assert_eq!(engine.pool.free_blocks(), fixtures::BLOCKS);
    }

    /// Whose page cannot be read is computed again, as often as it may be, and then fails; nobody
    /// else is.
    #[test]
    fn who_lost_a_page_is_computed_again() {
        let (block, layer) = (BlockId(0), 1);
        let timeout = Duration::from_secs(1);
        let lost = [
            PagingError::Corrupt { block, layer },
            PagingError::ReadTimeout {
                block,
                layer,
                timeout,
            },
        ];
        for source in lost {
            assert_eq!(source.block(), Some(block));
            let (mut engine, _commands, _file) = fixtures::engine(64, Duration::from_secs(10));
            let (first, mut events) = fixtures::decoding(&mut engine);
            let (second, mut others) = fixtures::decoding(&mut engine);
            engine.running.extend([first, second]);
            let plan = [planned(1), planned(0)];
            for round in 1..=RESTARTS {
                engine.fail(&plan, &paging(Some(1), source));
                assert_eq!(restarts(&engine), [round, 0]);
            }
            engine.fail(&plan, &paging(Some(1), source));
            assert_eq!(restarts(&engine), [0]);
            let failed = events.try_recv().unwrap();
            assert!(matches!(failed, Event::Failed(RequestError::Pages(error)) if error == source));
            assert!(others.try_recv().is_err());
            assert_eq!(engine.pool.free_blocks(), fixtures::BLOCKS - 4);
        }
    }
}
