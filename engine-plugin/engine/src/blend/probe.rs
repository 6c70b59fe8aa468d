//! Which tokens of a chunk depend on what stands before it: recorded once, when the chunk is
//! compiled.
//!
//! The chunk is computed behind a probe or a few, texts that have nothing to do with any request,
//! and each token's K and V are held against those that it has alone, layer by layer. A token
//! that deviates behind a stranger's text reads its context: those are the ones to compute anew
//! when the chunk is reused, whatever stands before it then, and as deep as they deviate.
//! Deviations behind different texts hit the same tokens, so that one probe says enough, and the
//! largest of a few no more; and unlike HKVD ([`kvasir_plugin::blend::Check`]), nothing has to be computed for it
//! when a request is waiting, and no layer is run for all tokens.

use std::ops::ControlFlow;

use super::{Span, between};
use crate::kv::{BlockId, KvPool};
use crate::model::{ForwardError, LogitsWanted, Model, Positions, Scratch, Step};

/// What is recorded, and behind what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probes {
    /// Texts, without the canonical prefix.
    pub texts: Vec<Vec<u32>>,
    /// Layers whose K and V are compared: from layer 1, as nothing deviates in layer 0.
    pub layers: usize,
}

impl Probes {
    /// Differs for other probes, and for another way to compare.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher =
            blake3::Hasher::new_derive_key("kvasir v1 blend probes: largest deviation");
        for text in &self.texts {
            hasher.update(&(text.len() as u64).to_le_bytes());
            for token in text {
                hasher.update(&token.to_le_bytes());
            }
        }
        *hasher.finalize().as_bytes()
    }

    /// Tokens that pages are needed for.
    pub fn tokens(&self, prefix: usize, chunk: usize) -> usize {
        let longest = self.texts.iter().map(Vec::len).max();
        prefix + longest.unwrap_or(0) + chunk
    }

    /// By layer, from layer 1, and token of `chunk`: squared deviation of K and of V behind a
    /// probe from what they are behind `prefix` alone, each as a share of its mean square over
    /// the chunk; the largest of all probes. `blocks` are scratch pages for [`Self::tokens`].
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
    ) -> Result<Vec<Vec<f32>>, ForwardError> {
        let mut recording = Recording::default();
        let go_on = &|| true;
        while recording.step(
            self, model, pool, scratch, blocks, prefix, chunk, false, go_on,
        )? {}
        Ok(recording.scores)
    }
}

/// What is recorded of a chunk, a prefill at a time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recording {
    alone: Option<Vec<Span>>,
    /// Probes that have been compared.
    done: usize,
    /// By layer, from layer 1, and token.
    pub(crate) scores: Vec<Vec<f32>>,
}

impl Recording {
    /// Whether the chunk has been computed alone.
    pub(crate) fn is_alone(&self) -> bool {
        self.alone.is_some()
    }

    /// Computes the chunk alone, through all layers if it is `stored`, so that its K and V are in
    /// the pages; then behind the next probe. Breaks off before a layer when `go_on` says so, and
    /// has done nothing then. False when there is none left.
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
        stored: bool,
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<bool, ForwardError> {
        let layers = probes.layers.min(model.config().layers - 1);
        let mut behind = |text: &[u32], to_the_end: bool| {
            let tokens = [prefix, text, chunk].concat();
            let step = Step {
                tokens: &tokens,
                positions: Positions::From(0),
                blocks,
                logits: LogitsWanted::None,
            };
            let mut found = Vec::new();
            let first = prefix.len() + text.len();
            let outcome = model.forward(pool, scratch, &[step], &mut |before| {
                if (1..=layers).contains(&before.layer) {
                    let mut span = Span::of_rows(model, &before, first..tokens.len());
                    span.turn(model, first, prefix.len());
                    found.push(span);
                }
                if (to_the_end || before.layer < layers) && go_on() {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            });
            match outcome {
                Ok(_) => Ok(Some(found)),
                Err(ForwardError::Stopped) => {
                    Ok(Some(found).filter(|found| found.len() == layers && !to_the_end))
                }
                Err(error) => Err(error),
            }
        };
        let Some(alone) = &self.alone else {
            let Some(alone) = behind(&[], stored)? else {
                return Ok(true);
            };
            self.scores = vec![vec![0.0; chunk.len()]; alone.len()];
            self.alone = Some(alone);
            return Ok(true);
        };
        let Some(text) = probes.texts.get(self.done) else {
            return Ok(false);
        };
        let Some(moved) = behind(text, false)? else {
            return Ok(true);
        };
        for (scores, (alone, moved)) in self.scores.iter_mut().zip(alone.iter().zip(&moved)) {
            for (score, deviation) in scores.iter_mut().zip(between(alone, moved)) {
                *score = score.max(deviation);
            }
        }
        self.done += 1;
        Ok(true)
    }
}
