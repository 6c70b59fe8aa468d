//! Which tokens of a chunk depend on what stands before it: recorded once, when the chunk is
//! compiled.
//!
//! The chunk is computed behind a few probes, texts that have nothing to do with any request,
//! and each token's K and V of one layer are held against those that it has alone. A token
//! that deviates behind a stranger's text reads its context: those are the ones to compute anew
//! when the chunk is reused, whatever stands before it then. Deviations behind different texts
//! hit the same tokens, so the largest of few probes says enough; and unlike HKVD
//! ([`kvasir_plugin::blend::Check`]), nothing has to be computed for it when a request is
//! waiting, and no layer is run for all tokens.

use std::ops::ControlFlow;

use super::{Span, between};
use crate::kv::{BlockId, KvPool};
use crate::model::{ForwardError, LogitsWanted, Model, Positions, Scratch, Step};

/// What is recorded, and behind what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probes {
    /// Texts, without the canonical prefix.
    pub texts: Vec<Vec<u32>>,
    /// The layer whose K and V are compared, from 0. In layer 0 nothing deviates.
    pub layer: usize,
}

impl Probes {
    /// Tokens that pages are needed for.
    pub fn tokens(&self, prefix: usize, chunk: usize) -> usize {
        let longest = self.texts.iter().map(Vec::len).max();
        prefix + longest.unwrap_or(0) + chunk
    }

    /// By token of `chunk`: squared deviation of K and of V behind a probe from what they are
    /// behind `prefix` alone, each as a share of its mean square over the chunk; the largest of
    /// all probes. `blocks` are scratch pages for [`Self::tokens`].
    ///
    /// # Errors
    /// As for [`Model::forward`].
    pub fn record(
        &self,
        model: &Model,
        pool: &mut KvPool,
        scratch: &mut Scratch,
        blocks: &[BlockId],
        prefix: &[u32],
        chunk: &[u32],
    ) -> Result<Vec<f32>, ForwardError> {
        let mut recording = Recording::default();
        while recording.step(self, model, pool, scratch, blocks, prefix, chunk)? {}
        Ok(recording.scores)
    }
}

/// What is recorded of a chunk, a prefill at a time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recording {
    alone: Option<Span>,
    /// Probes that have been compared.
    done: usize,
    /// By token.
    pub(crate) scores: Vec<f32>,
}

impl Recording {
    /// Computes the chunk alone, or behind the next probe. False when there is none left.
    #[expect(clippy::too_many_arguments, reason = "what a prefill takes")]
    pub(crate) fn step(
        &mut self,
        probes: &Probes,
        model: &Model,
        pool: &mut KvPool,
        scratch: &mut Scratch,
        blocks: &[BlockId],
        prefix: &[u32],
        chunk: &[u32],
    ) -> Result<bool, ForwardError> {
        let mut behind = |text: &[u32]| {
            let tokens = [prefix, text, chunk].concat();
            let step = Step {
                tokens: &tokens,
                positions: Positions::From(0),
                blocks,
                logits: LogitsWanted::None,
            };
            let mut found = Span::default();
            let first = prefix.len() + text.len();
            let outcome = model.forward(pool, scratch, &[step], &mut |before| {
                if before.layer < probes.layer {
                    return ControlFlow::Continue(());
                }
                found = Span::of_rows(model, &before, first..tokens.len());
                ControlFlow::Break(())
            });
            match outcome {
                Ok(_) | Err(ForwardError::Stopped) => {
                    found.turn(model, first, prefix.len());
                    Ok(found)
                }
                Err(error) => Err(error),
            }
        };
        let Some(alone) = &self.alone else {
            self.alone = Some(behind(&[])?);
            self.scores = vec![0.0; chunk.len()];
            return Ok(true);
        };
        let Some(text) = probes.texts.get(self.done) else {
            return Ok(false);
        };
        let moved = behind(text)?;
        for (score, deviation) in self.scores.iter_mut().zip(between(alone, &moved)) {
            *score = score.max(deviation);
        }
        self.done += 1;
        Ok(true)
    }
}
