//! Prompts whose chunks come from a cache, at any position, with some tokens computed anew.
//!
//! [`run`] is the layer loop of [`Model::forward`] over those tokens only: before a layer,
//! the caller lands the reused K and V of that layer in the pages, keys rotated to their new
//! positions; the tokens that a [`Selection`] names are computed and take their places; every
//! query sees all positions up to its own, reused and computed ones alike, and none behind it.
//! When all tokens are chosen this is prefill, bit for bit; when none is, reuse alone.
//!
//! Pages belong to one sequence: what is computed anew overwrites what landed, and decoding
//! goes on over the pages as after any prefill. Chunks stay as they are in the cache. Sharing
//! their pages between sequences instead, with queries turned back for each chunk, would
//! save a copy of the reused KV a request; but transformers rounds angles to f32, so that
//! rotations by a common offset would leave keys off by up to half a unit in the last place
//! of their angle, a tenth of a milliradian at position 2048.

use std::ops::{ControlFlow, Range};

use kvasir_plugin::blend::{Compared, Selection};
use rayon::prelude::*;

use crate::kernels::{Isa, rotate};
use crate::kv::{BlockId, KvPool, Plane};
use crate::model::{
    BeforeLayer, Fate, ForwardError, Logits, LogitsWanted, Model, Positions, Scratch, Step,
};

pub mod check;
mod probe;

pub use probe::Probes;
pub(crate) use probe::Recording;

/// One prompt.
#[derive(Debug)]
pub struct Prompt<'a> {
    /// All of its tokens, from position 0.
    pub tokens: &'a [u32],
    /// Pages of the sequence.
    pub blocks: &'a [BlockId],
    /// What is computed; tells afterwards what was.
    pub selection: &'a mut Selection,
    /// Tokens at the start whose K and V are in the pages for good.
    pub ready: usize,
    /// Rows of logits to return, of the tokens that are computed.
    pub logits: LogitsWanted,
}

/// Runs prompts as one batch. `land` is called before each layer, and has the reused K and V
/// of that layer in the pages when it returns; if it breaks, the batch ends without a result.
///
/// # Errors
/// As for [`Model::forward`].
///
/// # Panics
/// When a selection is of fewer tokens than its prompt has.
pub fn run(
    model: &Model,
    pool: &mut KvPool,
    scratch: &mut Scratch,
    prompts: &mut [Prompt<'_>],
    land: &mut (dyn FnMut(usize, &mut KvPool) -> ControlFlow<()> + Send),
) -> Result<Logits, ForwardError> {
    let rows: Vec<(Vec<u32>, Vec<usize>)> = prompts
        .iter()
        .map(|prompt| {
            let wanted = |&position: &usize| prompt.selection.layers[position] > 0;
            let positions: Vec<usize> =
                (prompt.ready..prompt.tokens.len()).filter(wanted).collect();
            let tokens = positions.iter().map(|&position| prompt.tokens[position]);
            (tokens.collect(), positions)
        })
        .collect();
    let steps: Vec<Step<'_>> = prompts
        .iter()
        .zip(&rows)
        .map(|(prompt, (tokens, positions))| Step {
            tokens,
            positions: Positions::At(positions),
            blocks: prompt.blocks,
            logits: prompt.logits,
        })
        .collect();
    let mut selections: Vec<(&[BlockId], &mut Selection)> = prompts
        .iter_mut()
        .map(|prompt| (prompt.blocks, &mut *prompt.selection))
        .collect();
    model.forward(pool, scratch, &steps, &mut |before| {
        land(before.layer, before.pool)?;
        let layer = u16::try_from(before.layer).unwrap_or(u16::MAX);
        for (step, (blocks, selection)) in selections.iter_mut().enumerate() {
            if let Some(compared) = selection.compares_at(layer) {
                let deviations = deviations(model, &before, step, blocks, compared, selection);
                selection.narrow(layer, &deviations);
            }
            end_rows(
                before.fates,
                before.positions,
                &before.steps[step],
                layer,
                selection,
            );
        }
        ControlFlow::Continue(())
    })
}

/// Ends those rows of a step that `selection` has not computed in `layer` and behind it.
pub(crate) fn end_rows(
    fates: &mut [Fate],
    positions: &[usize],
    rows: &Range<usize>,
    layer: u16,
    selection: &Selection,
) {
    for row in rows.clone() {
        let layers = selection.layers[positions[row]];
        fates[row] = match layers.checked_sub(layer + 1) {
            None => Fate::Dropped,
            Some(0) => Fate::Ends,
            Some(_) => Fate::GoesOn,
        };
    }
}

/// By token of the prompt: squared difference of computed from reused K or V, over all heads.
/// Zero for tokens that are no rows of the step, or not reused.
fn deviations(
    model: &Model,
    before: &BeforeLayer<'_>,
    step: usize,
    blocks: &[BlockId],
    compared: Compared,
    selection: &Selection,
) -> Vec<f32> {
    let config = model.config();
    let width = config.kv_heads * config.head_dim;
    let mut deviations = vec![0.0; selection.layers.len()];
    let mut reused = vec![0.0; width];
    for row in before.steps[step].clone() {
        let position = before.positions[row];
        let values = &before.rows[row * before.stride..][..before.stride];
        let kv = &values[config.heads * config.head_dim..];
        let (keys, values) = kv.split_at(width);
        for (plane, computed) in [(Plane::K, keys), (Plane::V, values)] {
            let counts = match compared {
                Compared::Keys => plane == Plane::K,
                Compared::Values => plane == Plane::V,
                Compared::Both => true,
            };
            if counts {
                before
                    .pool
                    .read_token(blocks, position, before.layer, plane, &mut reused);
                let squares = computed.iter().zip(&reused).map(|(a, b)| (a - b) * (a - b));
                deviations[position] += squares.sum::<f32>();
            }
        }
    }
    deviations
}

/// By position before `context`: the attention that the rows of a step pay it in this
/// layer, summed over rows and heads. The step's own tokens stand at `context` and behind it;
/// its K and V need not be in the pages.
pub fn attention_of(
    model: &Model,
    before: &BeforeLayer<'_>,
    step: usize,
    blocks: &[BlockId],
    context: usize,
) -> Vec<f32> {
    let config = model.config();
    let (dim, group) = (config.head_dim, config.heads / config.kv_heads);
    #[expect(clippy::cast_precision_loss, reason = "head_dim is at most 512")]
    let scale = 1.0 / (dim as f32).sqrt();
    let rows = before.steps[step].clone();
    let window = config.windows[before.layer];
    let one_head = |kv_head: usize| {
        let mut keys = vec![0.0; context * dim];
        let mut token = vec![0.0; config.kv_heads * dim];
        for (position, key) in keys.chunks_exact_mut(dim).enumerate() {
            before
                .pool
                .read_token(blocks, position, before.layer, Plane::K, &mut token);
            key.copy_from_slice(&token[kv_head * dim..][..dim]);
        }
        let own = |row: usize| {
            let at = (config.heads + kv_head) * dim;
            &before.rows[row * before.stride + at..][..dim]
        };
        let mut sums = vec![0.0; context];
        let mut scores = Vec::new();
        for row in rows.clone() {
            let first = window.map_or(0, |window| {
                (before.positions[row] + 1).saturating_sub(window)
            });
            for head in kv_head * group..(kv_head + 1) * group {
                let query = &before.rows[row * before.stride + head * dim..][..dim];
                let score = |key: &[f32]| {
                    let dot: f32 = query.iter().zip(key).map(|(a, b)| a * b).sum();
                    dot * scale
                };
                scores.clear();
                scores.extend(keys.chunks_exact(dim).map(score));
                scores[..first.min(context)].fill(f32::NEG_INFINITY);
                scores.extend((rows.start..=row).map(|row| score(own(row))));
                let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f32 = scores.iter_mut().fold(0.0, |total, score| {
                    *score = (*score - top).exp();
                    total + *score
                });
                for (sum, weight) in sums.iter_mut().zip(&scores) {
                    *sum += weight / total;
                }
            }
        }
        sums
    };
    (0..config.kv_heads).into_par_iter().map(one_head).reduce(
        || vec![0.0; context],
        |mut sums, more| {
            for (sum, more) in sums.iter_mut().zip(more) {
                *sum += more;
            }
            sums
        },
    )
}

/// K and V of some tokens in one layer, each `[token][kv_head · head_dim]`.
#[derive(Clone, Debug, Default, PartialEq)]
struct Span {
    width: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Span {
    /// What was just computed for some rows.
    fn of_rows(model: &Model, before: &BeforeLayer<'_>, rows: Range<usize>) -> Self {
        let config = model.config();
        let width = config.kv_heads * config.head_dim;
        let mut span = Self {
            width,
            ..Self::default()
        };
        for row in rows {
            let row = &before.rows[row * before.stride..][..before.stride];
            let kv = &row[config.heads * config.head_dim..];
            span.keys.extend_from_slice(&kv[..width]);
            span.values.extend_from_slice(&kv[width..2 * width]);
        }
        span
    }

    /// Turns keys from positions `from..` to positions `to..`.
    fn turn(&mut self, model: &Model, from: usize, to: usize) {
        let dim = model.config().head_dim;
        let (mut cos, mut sin) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
        let isa = Isa::detect();
        for (token, keys) in self.keys.chunks_exact_mut(self.width).enumerate() {
            let shift = (from + token, to + token);
            model
                .frequencies()
                .shift(shift.0, shift.1, &mut cos, &mut sin);
            for head in keys.chunks_exact_mut(dim) {
                rotate(isa, head, &cos, &sin);
            }
        }
    }
}

/// By token: squared difference of keys and of values, each as a share of its mean square.
fn between(reference: &Span, other: &Span) -> Vec<f32> {
    let width = reference.width.max(1);
    let mut deviations = vec![0.0; reference.keys.len() / width];
    for (a, b) in [
        (&reference.keys, &other.keys),
        (&reference.values, &other.values),
    ] {
        #[expect(clippy::cast_precision_loss, reason = "tokens of a chunk")]
        let tokens = deviations.len() as f32;
        let mean = a.iter().map(|x| x * x).sum::<f32>() / tokens;
        let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
        for (deviation, (a, b)) in deviations.iter_mut().zip(rows) {
            let squares = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b));
            *deviation += squares.sum::<f32>() / mean.max(f32::MIN_POSITIVE);
        }
    }
    deviations
}
