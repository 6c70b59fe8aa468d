//! One batch of steps through all layers.

use std::ops::ControlFlow;

use rayon::prelude::*;

use super::Model;
use super::foresee::NextLayer;
use super::rows::{Rows, check};
use super::step::{BeforeLayer, Fate, Pages, Step};
use super::weights::{Layer, Linear};
use crate::config::ModelConfig;
use crate::device::DeviceError;
use crate::kernels::{
    AlignedBuf, AttentionShape, AttentionWork, Isa, KEY_TILE, QueryRange, Threads, add_bias,
    attend, matmul, rms_norm, rms_norm_in_place, rotate, silu_mul,
};
use crate::kv::{BLOCK_TOKENS, Demand, Demanded, KvError, KvPool};
use crate::paging::PagingError;

/// Logits of one batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    vocab: usize,
    values: Vec<f32>,
    /// Per step: first row, rows.
    steps: Vec<(usize, usize)>,
}

impl Logits {
    /// Of one row of one step.
    #[cfg(test)]
    pub(crate) fn of_one(values: Vec<f32>) -> Self {
        Self {
            vocab: values.len(),
            values,
            steps: vec![(0, 1)],
        }
    }

    /// Of a batch's wanted rows.
    pub(crate) fn new(vocab: usize, values: Vec<f32>, rows: &Rows<'_>) -> Self {
        let mut first = 0;
        let steps = rows.ranges.iter().enumerate().map(|(step, range)| {
            let wanted = range.end - rows.first_wanted(step);
            first += wanted;
            (first - wanted, wanted)
        });
        Self {
            vocab,
            values,
            steps: steps.collect(),
        }
    }

    /// Rows of step `step`, in the order of its tokens; each `vocab_size` long.
    ///
    /// # Panics
    ///
    /// When the batch had no such step.
    pub fn rows(&self, step: usize) -> std::slice::ChunksExact<'_, f32> {
        let (first, rows) = self.steps[step];
        self.values[first * self.vocab..][..rows * self.vocab].chunks_exact(self.vocab)
    }

    /// The last wanted row of step `step`, or `None` when it wanted none.
    ///
    /// # Panics
    ///
    /// When the batch had no such step.
    pub fn last(&self, step: usize) -> Option<&[f32]> {
        self.rows(step).next_back()
    }
}

/// Compute threads, and buffers for activations. One per thread that calls
/// [`Model::forward`]; buffers grow to the largest batch seen.
#[derive(Debug)]
pub struct Scratch {
    threads: Threads,
    isa: Isa,
    /// Residual stream, `[row][hidden]`.
    stream: AlignedBuf<f32>,
    /// `[row][hidden]`.
    normed: AlignedBuf<f32>,
    /// `[row][qkv_width]`.
    qkv: AlignedBuf<f32>,
    /// `[row][heads · head_dim]`.
    attended: AlignedBuf<f32>,
    /// `[row][2 · intermediate]`.
    gate_up: AlignedBuf<f32>,
    /// `[row][intermediate]`.
    activated: AlignedBuf<f32>,
    /// `[row][head_dim]`: cosines, then sines, of the row's position.
    angles: AlignedBuf<f32>,
}

impl Scratch {
    /// Empty buffers; the first batches pay for growing them.
    pub fn new(threads: Threads) -> Self {
        Self {
            threads,
            isa: Isa::detect(),
            stream: AlignedBuf::new(0),
            normed: AlignedBuf::new(0),
            qkv: AlignedBuf::new(0),
            attended: AlignedBuf::new(0),
            gate_up: AlignedBuf::new(0),
            activated: AlignedBuf::new(0),
            angles: AlignedBuf::new(0),
        }
    }

    /// Grows the buffers to batches of `rows` tokens: about
    /// `4 · rows · (2 · hidden + qkv_width + 3 · intermediate)` bytes.
    pub fn reserve(&mut self, config: &ModelConfig, rows: usize) {
        self.stream.ensure(rows * config.hidden);
        self.normed.ensure(rows * config.hidden);
        self.qkv.ensure(rows * config.qkv_width());
        self.attended.ensure(rows * config.heads * config.head_dim);
        self.gate_up.ensure(rows * 2 * config.intermediate);
        self.activated.ensure(rows * config.intermediate);
        self.angles.ensure(rows * config.head_dim);
    }

    /// The threads it computes on.
    pub fn threads(&self) -> &Threads {
        &self.threads
    }
}

pub(super) fn run(
    model: &Model,
    pool: &mut KvPool,
    scratch: &mut Scratch,
    steps: &[Step<'_>],
    before_layer: &mut (dyn FnMut(BeforeLayer<'_>) -> ControlFlow<()> + Send),
) -> Result<Logits, ForwardError> {
    check(&model.config, pool.geometry(), steps)?;
    let rows = steps.iter().map(|step| step.tokens.len()).sum();
    scratch.reserve(&model.config, rows);
    let threads = scratch.threads.clone();
    let rows = Rows::new(steps);
    threads.run(|| Batch { model, rows }.run(pool, scratch, before_layer))
}

/// Checked steps.
struct Batch<'a> {
    model: &'a Model,
    rows: Rows<'a>,
}

impl<'a> Batch<'a> {
    fn run(
        mut self,
        pool: &mut KvPool,
        scratch: &mut Scratch,
        before_layer: &mut (dyn FnMut(BeforeLayer<'_>) -> ControlFlow<()> + Send),
    ) -> Result<Logits, ForwardError> {
        let model = self.model;
        let config = &model.config;
        self.embed(scratch);
        let mut fates = Vec::new();
        let mut pages = vec![Pages::All; self.rows.steps.len()];
        let mut expected = vec![None; self.rows.steps.len()];
        let mut rows = self.rows.positions.len();
        for (index, layer) in model.weights.layers.iter().enumerate() {
            self.project_qkv(layer, scratch);
            let width = config.qkv_width();
            fates.clear();
            fates.resize(rows, Fate::GoesOn);
            pages.fill(Pages::All);
            expected.fill(None);
            let before = BeforeLayer {
                layer: index,
                pool,
                rows: &scratch.qkv[..rows * width],
                stride: width,
                positions: &self.rows.positions,
                steps: &self.rows.ranges,
                fates: &mut fates,
                pages: &mut pages,
                expected: &mut expected,
                next: model.weights.layers.get(index + 1).map(|layer| NextLayer {
                    config,
                    layer,
                    isa: scratch.isa,
                    stream: &scratch.stream,
                    angles: &scratch.angles,
                }),
            };
            if before_layer(before).is_break() {
                return Err(ForwardError::Stopped);
            }
            if pool.pager().is_some() {
                self.bring(pool, index, &pages, &expected)?;
            }
            for (step, range) in self.rows.ranges.iter().enumerate() {
                fates[self.rows.first_wanted(step)..range.end].fill(Fate::GoesOn);
            }
            self.write_pages(pool, scratch, index, &fates);
            self.drop_rows(&fates, scratch);
            rows = self.rows.positions.len();
            let last = index + 1 == config.layers;
            self.attend(pool, scratch, index, &pages, last);
            if last {
                // What follows is wanted only for rows with logits.
                rows = self.keep_wanted(scratch);
            }
            self.finish_layer(layer, scratch, rows);
        }
        Ok(self.logits(scratch, rows))
    }

    /// Has all pages in memory that the layer reads and writes, and starts to read ahead what
    /// the next one is expected to, be it the first layer of the next token.
    fn bring(
        &self,
        pool: &mut KvPool,
        layer: usize,
        pages: &[Pages],
        expected: &[Option<Pages>],
    ) -> Result<(), ForwardError> {
        let kv_heads = self.model.config.kv_heads;
        let listed = |pages: &Pages, step: usize| {
            pages.listed(
                kv_heads,
                &self.rows.positions[self.rows.ranges[step].clone()],
            )
        };
        let lists: Vec<_> = pages
            .iter()
            .enumerate()
            .map(|(step, pages)| listed(pages, step))
            .collect();
        let all: Vec<usize> = (0..self.rows.steps.len()).collect();
        pool.ensure(layer, &self.demands(layer, &lists, &all))
            .map_err(|(step, source)| ForwardError::Paging { step, source })?;

        let next = (layer + 1) % self.model.config.layers;
        let lists: Vec<_> = expected
            .iter()
            .enumerate()
            .map(|(step, pages)| listed(pages.as_ref()?, step))
            .collect();
        let is_expected = |&step: &usize| expected[step].is_some() || pages[step] == Pages::All;
        let steps: Vec<usize> = all.into_iter().filter(is_expected).collect();
        pool.prefetch(next, &self.demands(next, &lists, &steps));
        Ok(())
    }

    /// What some steps read of a layer: as listed, by step, or everything that they see.
    fn demands<'b>(
        &'b self,
        layer: usize,
        lists: &'b [Option<Vec<Vec<u32>>>],
        steps: &[usize],
    ) -> Vec<Demand<'b>> {
        let demand = |&step: &usize| Demand {
            blocks: self.rows.steps[step].blocks,
            pages: match &lists[step] {
                Some(lists) => Demanded::Listed(lists),
                None => self.seen(layer, step),
            },
        };
        steps.iter().map(demand).collect()
    }

    /// The pages that a step reads of a layer in which it attends to all.
    fn seen(&self, layer: usize, step: usize) -> Demanded<'static> {
        let positions = &self.rows.positions[self.rows.ranges[step].clone()];
        let first = positions.first().copied().unwrap_or(0);
        let end = positions.last().map_or(0, |&last| last + 1);
        let from =
            self.model.config.windows[layer].map_or(0, |window| (first + 1).saturating_sub(window));
        Demanded::Range {
            // Attention reads whole tiles.
            first: from / KEY_TILE * (KEY_TILE / BLOCK_TOKENS),
            end: end.div_ceil(BLOCK_TOKENS),
        }
    }

    /// Takes rows that do not go on out of the buffers that are still to be read.
    fn drop_rows(&mut self, fates: &[Fate], scratch: &mut Scratch) {
        if fates.iter().all(|fate| *fate == Fate::GoesOn) {
            return;
        }
        let config = &self.model.config;
        for (buffer, width) in [
            (&mut scratch.stream, config.hidden),
            (&mut scratch.qkv, config.qkv_width()),
            (&mut scratch.angles, config.head_dim),
        ] {
            for (to, row) in Rows::going_on(fates).enumerate() {
                buffer.copy_within(row * width..(row + 1) * width, to * width);
            }
        }
        self.rows.drop(fates);
    }

    /// Embeddings into the residual stream, and the angles of each row.
    fn embed(&self, scratch: &mut Scratch) {
        let Self { model, rows } = self;
        let (hidden, dim) = (model.config.hidden, model.config.head_dim);
        let tokens = rows.steps.iter().flat_map(|step| step.tokens);
        let stream = scratch.stream.chunks_exact_mut(hidden);
        let angles = scratch.angles.chunks_exact_mut(dim);
        let rows = tokens.zip(&rows.positions).zip(stream).zip(angles);
        for (((&token, &position), row), angles) in rows {
            model.weights.embed(token, row);
            let (cos, sin) = angles.split_at_mut(dim / 2);
            model.frequencies.angles(position, cos, sin);
        }
    }

    /// Normed stream to Q, K and V, with biases, norms and rotation applied.
    fn project_qkv(&self, layer: &Layer, scratch: &mut Scratch) {
        let config = &self.model.config;
        let (isa, rows, dim) = (scratch.isa, self.rows.positions.len(), config.head_dim);
        norm_rows(scratch, config, &layer.attention_norm, rows);
        let width = config.qkv_width();
        let qkv = &mut scratch.qkv[..rows * width];
        matmul(
            isa,
            &layer.qkv.matrix,
            rows,
            &scratch.normed[..rows * config.hidden],
            qkv,
            false,
        );
        let angles = &scratch.angles[..rows * dim];
        qkv.par_chunks_exact_mut(width)
            .zip(angles.par_chunks_exact(dim))
            .for_each(|(row, angles)| {
                if let Some(bias) = &layer.qkv.bias {
                    add_bias(isa, row, bias);
                }
                let (cos, sin) = angles.split_at(dim / 2);
                let rotated = config.heads + config.kv_heads;
                for (index, head) in row.chunks_exact_mut(dim).take(rotated).enumerate() {
                    if let Some((q_norm, k_norm)) = &layer.head_norms {
                        let weight = if index < config.heads { q_norm } else { k_norm };
                        rms_norm_in_place(isa, head, weight, config.rms_norm_eps);
                    }
                    rotate(isa, head, cos, sin);
                }
            });
    }

    fn write_pages(&self, pool: &mut KvPool, scratch: &Scratch, layer: usize, fates: &[Fate]) {
        let config = &self.model.config;
        let mut rows = scratch.qkv.chunks_exact(config.qkv_width()).zip(fates);
        for (step, range) in self.rows.steps.iter().zip(&self.rows.ranges) {
            for (&position, (row, fate)) in
                self.rows.positions[range.clone()].iter().zip(rows.by_ref())
            {
                if *fate == Fate::Dropped {
                    continue;
                }
                let kv = &row[config.heads * config.head_dim..];
                let (k, v) = kv.split_at(config.kv_heads * config.head_dim);
                pool.write_token(step.blocks, position, layer, k, v);
            }
        }
    }

    fn attend(
        &self,
        pool: &KvPool,
        scratch: &mut Scratch,
        layer: usize,
        pages: &[Pages],
        only_wanted: bool,
    ) {
        let config = &self.model.config;
        // From all rows of the steps, those included that attend no more.
        let listed: Vec<Option<Vec<Vec<u32>>>> = self
            .rows
            .ranges
            .iter()
            .zip(pages)
            .map(|(range, pages)| {
                pages.listed(config.kv_heads, &self.rows.positions[range.clone()])
            })
            .collect();
        let ranges: Vec<QueryRange<'_>> = self
            .rows
            .ranges
            .iter()
            .enumerate()
            .map(|(step, range)| {
                let first_row = if only_wanted {
                    self.rows.first_wanted(step)
                } else {
                    range.start
                };
                QueryRange {
                    first_row,
                    positions: &self.rows.positions[first_row..range.end],
                    blocks: self.rows.steps[step].blocks,
                    pages: listed[step].as_deref(),
                }
            })
            .collect();
        let work = AttentionWork {
            shape: AttentionShape {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                window: config.windows[layer],
            },
            ranges: &ranges,
            queries: &scratch.qkv,
            query_stride: config.qkv_width(),
            pool,
            layer,
        };
        attend(scratch.isa, &work, &mut scratch.attended);
    }

    /// Moves the rows that give logits to the front; returns their number.
    fn keep_wanted(&self, scratch: &mut Scratch) -> usize {
        let config = &self.model.config;
        let (hidden, heads) = (config.hidden, config.heads * config.head_dim);
        let mut kept = 0;
        for (step, range) in self.rows.ranges.iter().enumerate() {
            for wanted in self.rows.first_wanted(step)..range.end {
                scratch
                    .stream
                    .copy_within(wanted * hidden..(wanted + 1) * hidden, kept * hidden);
                scratch
                    .attended
                    .copy_within(wanted * heads..(wanted + 1) * heads, kept * heads);
                kept += 1;
            }
        }
        kept
    }

    /// Attention's output projection and the MLP, each added to the stream.
    fn finish_layer(&self, layer: &Layer, scratch: &mut Scratch, rows: usize) {
        let config = &self.model.config;
        let (hidden, wide) = (config.hidden, config.intermediate);
        let isa = scratch.isa;
        let stream = &mut scratch.stream[..rows * hidden];
        let heads = config.heads * config.head_dim;
        linear(
            isa,
            &layer.output,
            rows,
            &scratch.attended[..rows * heads],
            stream,
            true,
        );

        norm_rows(scratch, config, &layer.mlp_norm, rows);
        let gate_up = &mut scratch.gate_up[..rows * 2 * wide];
        linear(
            isa,
            &layer.gate_up,
            rows,
            &scratch.normed[..rows * hidden],
            gate_up,
            false,
        );
        let activated = &mut scratch.activated[..rows * wide];
        activated
            .par_chunks_exact_mut(wide)
            .zip(gate_up.par_chunks_exact(2 * wide))
            .for_each(|(out, gate_up)| silu_mul(isa, gate_up, out));
        linear(
            isa,
            &layer.down,
            rows,
            activated,
            &mut scratch.stream[..rows * hidden],
            true,
        );
    }

    fn logits(&self, scratch: &mut Scratch, rows: usize) -> Logits {
        let config = &self.model.config;
        let vocab = config.vocab_size;
        let weights = &self.model.weights;
        norm_rows(scratch, config, &weights.final_norm, rows);
        let mut values = vec![0.0; rows * vocab];
        let normed = &scratch.normed[..rows * config.hidden];
        matmul(
            scratch.isa,
            &weights.lm_head,
            rows,
            normed,
            &mut values,
            false,
        );
        Logits::new(vocab, values, &self.rows)
    }
}

/// RMSNorm of the first `rows` rows of the stream.
fn norm_rows(scratch: &mut Scratch, config: &ModelConfig, weight: &[f32], rows: usize) {
    let (isa, hidden) = (scratch.isa, config.hidden);
    scratch.normed[..rows * hidden]
        .par_chunks_exact_mut(hidden)
        .zip(scratch.stream[..rows * hidden].par_chunks_exact(hidden))
        .for_each(|(out, row)| rms_norm(isa, row, weight, config.rms_norm_eps, out));
}

/// A product, and the bias if there is one.
fn linear(isa: Isa, linear: &Linear, rows: usize, x: &[f32], y: &mut [f32], accumulate: bool) {
    matmul(isa, &linear.matrix, rows, x, y, accumulate);
    if let Some(bias) = &linear.bias {
        y.par_chunks_exact_mut(bias.len())
            .for_each(|row| add_bias(isa, row, bias));
    }
}

/// Why a batch cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// `before_layer` broke off. The pages hold K and V of the steps' tokens for
    /// the layers before that one.
    #[error("the caller stopped the batch between layers")]
    Stopped,
    /// The pages were made for a model of another shape.
    #[error("the pages were made for a model of another shape")]
    Pool,
    /// A step without tokens.
    #[error("step {step} has no tokens")]
    Empty {
        /// Index of the step.
        step: usize,
    },
    /// Positions that do not ascend, or are not as many as the tokens.
    #[error("step {step} lists positions that do not ascend, or not one for each token")]
    Positions {
        /// Index of the step.
        step: usize,
    },
    /// A step reaches past the positions that the model knows.
    #[error("step {step} ends at position {end}, the model knows {limit}")]
    TooLong {
        /// Index of the step.
        step: usize,
        /// One past its last position.
        end: usize,
        /// Positions of the model.
        limit: usize,
    },
    /// A token id outside the vocabulary.
    #[error("step {step} has token {token}, the vocabulary has {vocab}")]
    Token {
        /// Index of the step.
        step: usize,
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The page table does not cover the step.
    #[error("step {step} does not fit its page table")]
    Pages {
        /// Index of the step.
        step: usize,
        /// The cause.
        #[source]
        source: KvError,
    },
    /// The device failed. What pages of the steps' tokens hold is undefined.
    #[error("the device failed in the middle of a batch")]
    Device(#[from] DeviceError),
    /// Pages cannot be brought to memory. Those of the steps hold what they held, and K and V
    /// of the steps' tokens for the layers before, so the batch may be run again without the
    /// step at fault.
    #[error("pages of a layer cannot be brought to memory")]
    Paging {
        /// The step whose page is at fault; `None` where any may make room.
        step: Option<usize>,
        /// The cause.
        #[source]
        source: PagingError,
    },
}
