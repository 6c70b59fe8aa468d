//! What runs together: a token of every decoding sequence, and parts of prompts.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::blend::end_rows;
use crate::model::{BeforeLayer, ForwardError, Logits, LogitsWanted, Positions, Step};
use crate::request::RequestError;

use super::choosing::Choice;
use super::engine_loop::EngineLoop;
use super::sequence::{Phase, Progress, Sequence};

/// Share of a batch that decoding leaves to waiting prefill: one in this many tokens.
const PREFILL_SHARE: usize = 4;

/// Shortest prefill whose time says something about the next one.
const MIN_OBSERVED_TOKENS: usize = 32;

/// Rows of one sequence in the next batch.
pub(super) struct Planned {
    pub(super) sequence: usize,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) wants_logits: bool,
    /// Of a sequence that blends: those of the positions `from..to` that are computed.
    pub(super) rows: Option<(Vec<u32>, Vec<usize>)>,
}

impl Planned {
    fn rows(&self) -> usize {
        match &self.rows {
            Some((tokens, _)) => tokens.len(),
            None => self.to - self.from,
        }
    }
}

impl EngineLoop {
    /// Runs one batch; false when no sequence could run.
    pub(super) fn run_batch(&mut self) -> bool {
        let plan = self.plan();
        if plan.is_empty() {
            return self.run_behind_fetch() || self.run_behind_gather();
        }
        let started = Instant::now();
        let outcome = self.forward(&plan, &mut |_| ControlFlow::Continue(()));
        match outcome {
            Ok(logits) => {
                if let ([step], Some(plugin)) = (plan.as_slice(), &self.plugin)
                    && step.rows.is_none()
                    && step.to - step.from >= MIN_OBSERVED_TOKENS
                {
                    plugin.observe_prefill(step.from, step.to, started.elapsed());
                }
                self.apply(&plan, &logits);
            }
            Err(error) => self.fail(&plan, &error),
        }
        true
    }

    /// The rows of the next batch: a token of every decoding sequence that has its turn, then
    /// prefill in the order of arrival. When not all fit, decoding takes turns and leaves
    /// prefill its share.
    fn plan(&mut self) -> Vec<Planned> {
        let runs = self.take_turns();
        let is_prefill =
            |sequence: &Sequence| matches!(sequence.phase, Phase::Prefill | Phase::Blending(_));
        let mut running = self.running.iter().zip(&runs);
        let reserved = if running.any(|(sequence, runs)| *runs && is_prefill(sequence)) {
            self.batch_tokens / PREFILL_SHARE
        } else {
            0
        };
        let count = self.running.len();
        let mut plan = Vec::new();
        for turn in 0..count {
            if plan.len() == self.batch_tokens - reserved {
                self.decode_turn = (self.decode_turn + turn) % count;
                break;
            }
            let index = (self.decode_turn + turn) % count;
            let sequence = &self.running[index];
            if runs[index] && matches!(sequence.phase, Phase::Decode) {
                plan.push(Planned {
                    sequence: index,
                    from: sequence.position,
                    to: sequence.position + 1,
                    wants_logits: true,
                    rows: None,
                });
            }
        }
        let mut room = self.batch_tokens - plan.len();
        for (index, sequence) in self.running.iter().enumerate() {
            if runs[index] && is_prefill(sequence) && room > 0 {
                let planned = self.planned(index, room);
                room -= planned.rows();
                plan.push(planned);
            }
        }
        plan
    }

    /// The next rows of what is to be computed of a sequence before it goes on, `room` at most.
    pub(super) fn planned(&self, index: usize, room: usize) -> Planned {
        let sequence = &self.running[index];
        let (from, end) = (sequence.position, sequence.tokens.len());
        let (to, rows) = match &sequence.phase {
            Phase::Blending(selection) => {
                let selected = |&position: &usize| selection.layers[position] > 0;
                let mut positions: Vec<usize> = (from..end).filter(selected).collect();
                positions.truncate(room);
                let tokens = positions.iter().map(|&position| sequence.tokens[position]);
                let to = positions.last().map_or(end, |&last| last + 1);
                (to, Some((tokens.collect(), positions)))
            }
            _ => (end.min(from + room), None),
        };
        Planned {
            sequence: index,
            from,
            to,
            wants_logits: to == end,
            rows,
        }
    }

    /// Whether a request waits for its first token.
    pub(super) fn is_prefilling(&self) -> bool {
        let waits =
            |sequence: &Sequence| !matches!(sequence.phase, Phase::Decode | Phase::Draining);
        !self.waiting.is_empty() || self.running.iter().any(waits)
    }

    pub(super) fn forward(
        &mut self,
        plan: &[Planned],
        before_layer: &mut (dyn FnMut(BeforeLayer<'_>) -> ControlFlow<()> + Send),
    ) -> Result<Logits, ForwardError> {
        let mut choices: Vec<Option<Choice>> = plan
            .iter()
            .map(|planned| self.running[planned.sequence].take_choice())
            .collect();
        let steps: Vec<Step<'_>> = plan
            .iter()
            .map(|planned| {
                let sequence = &self.running[planned.sequence];
                let (tokens, positions) = match &planned.rows {
                    Some((tokens, positions)) => (&tokens[..], Positions::At(positions)),
                    None => {
                        let tokens = &sequence.tokens[planned.from..planned.to];
                        (tokens, Positions::From(planned.from))
                    }
                };
                Step {
                    tokens,
                    positions,
                    blocks: &sequence.blocks,
                    logits: if planned.wants_logits {
                        LogitsWanted::Last
                    } else {
                        LogitsWanted::None
                    },
                }
            })
            .collect();
        let running = &self.running;
        let outcome = self.model.forward(
            &mut self.pool,
            &mut self.scratch,
            &steps,
            &mut |mut before| {
                let layer = u16::try_from(before.layer).unwrap_or(u16::MAX);
                for (planned, rows) in plan.iter().zip(before.steps) {
                    if let Phase::Blending(selection) = &running[planned.sequence].phase {
                        let positions = before.positions;
                        end_rows(before.fates, positions, rows, layer, selection);
                    }
                }
                for (step, choice) in choices.iter_mut().enumerate() {
                    if let Some(choice) = choice {
                        choice.choose(&mut before, step, steps[step].blocks);
                    }
                }
                before_layer(before)
            },
        );
        for (planned, choice) in plan.iter().zip(choices) {
            let sequence = &mut self.running[planned.sequence];
            sequence.choice = choice.or(sequence.choice.take());
        }
        outcome
    }

    pub(super) fn apply(&mut self, plan: &[Planned], logits: &Logits) {
        if let Some(paged) = &mut self.paged {
            paged.now += 1;
        }
        let mut ended = Vec::new();
        for (row, planned) in plan.iter().enumerate() {
            let sequence = &mut self.running[planned.sequence];
            sequence.position = planned.to;
            if let Some(paged) = &mut self.paged {
                sequence.turn.ran(paged.now);
            }
            let index = planned.sequence;
            let progress = logits.last(row).map(|logits| sequence.advance(logits));
            match progress.unwrap_or(Progress::Goes) {
                Progress::Goes => self.digest(index),
                Progress::StartsOver if self.start_over(index) => (),
                Progress::StartsOver => {
                    self.running[index].fail(RequestError::NotFinite);
                    ended.push(index);
                }
                Progress::Ends => ended.push(index),
            }
        }
        self.end_all(ended);
    }
}
