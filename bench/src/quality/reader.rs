//! The model under test, and KV caches taken out of it and put back.

use std::ops::{ControlFlow, Range};
use std::path::Path;

use anyhow::Context as _;
use kvasir_engine::blend::{self, Probes};
use kvasir_engine::kernels::{Isa, rotate};
use kvasir_engine::logits::argmax;
use kvasir_engine::paging::{Detail, Digests};
use kvasir_engine::rope::Frequencies;
use kvasir_engine::{
    BLOCK_TOKENS, BeforeLayer, BlockId, KvDtype, KvPool, LogitsWanted, Model, ModelConfig,
    Positions, Scratch, Step, Threads,
};
use kvasir_plugin::blend::Selection;
use nalgebra::DMatrix;

/// Tokens of one step while filling pages.
const STEP_TOKENS: usize = 512;

/// A model with pages of f32, driven directly: no scheduler, no sampling.
#[derive(Debug)]
pub(crate) struct Reader {
    model: Model,
    pool: KvPool,
    scratch: Scratch,
    frequencies: Frequencies,
    isa: Isa,
}

/// The first `tokens` positions of a sequence, in pages.
#[derive(Debug)]
pub(crate) struct Pages {
    blocks: Vec<BlockId>,
    tokens: usize,
}

impl Pages {
    /// Back to position 0; the pages keep their contents until they are computed again.
    pub(crate) fn rewind(&mut self) {
        self.tokens = 0;
    }
}

/// K and V of consecutive tokens outside of pages.
///
/// One buffer per layer, order `[2 (K, V), kv_head, token, head_dim]`; K after RoPE.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kv {
    pub(crate) tokens: usize,
    pub(crate) layers: Vec<Vec<f32>>,
}

/// Which pages a step attends to; see [`Reader::follow`].
pub(crate) type Choose<'a> =
    dyn FnMut(usize, &BeforeLayer<'_>, usize, &[BlockId]) -> kvasir_engine::Pages + Send + 'a;

/// What a model looked for while it read consecutive tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queries {
    /// By layer, after RoPE: `[token, head, head_dim]`.
    pub(crate) layers: Vec<Vec<f32>>,
}

impl Kv {
    /// K and V of some of the tokens, for heads of `dim` channels.
    pub(crate) fn tokens_of(&self, dim: usize, range: Range<usize>) -> Self {
        let layer = |layer: &Vec<f32>| {
            let heads = layer.chunks_exact(self.tokens * dim);
            let rows = heads.flat_map(|head| &head[range.start * dim..range.end * dim]);
            rows.copied().collect()
        };
        Self {
            tokens: range.len(),
            layers: self.layers.iter().map(layer).collect(),
        }
    }
}

impl Reader {
    /// Loads the model in `dir`, with pages for `tokens` tokens.
    pub(crate) fn load(dir: &Path, tokens: usize) -> anyhow::Result<Self> {
        let model = Model::load(dir).with_context(|| format!("loading {}", dir.display()))?;
        let config = model.config();
        let pool = KvPool::new(config, tokens.div_ceil(BLOCK_TOKENS), KvDtype::F32);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let frequencies = config.rope.frequencies(config.head_dim);
        Ok(Self {
            pool,
            scratch: Scratch::new(Threads::new(cores)?),
            frequencies,
            isa: Isa::detect(),
            model,
        })
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// The weights' digest, in hexadecimal.
    pub(crate) fn digest(&self) -> String {
        let digest = self.model.weights_digest();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Values of K and V of one token in all layers.
    pub(crate) fn values_per_token(&self) -> usize {
        let config = self.config();
        2 * config.layers * config.kv_heads * config.head_dim
    }

    /// Bits that a value of K or V takes in pages and caches.
    pub(crate) fn bits_per_value(&self) -> f64 {
        8.0 * self.pool.dtype().bytes() as f64
    }

    /// Runs the tokens from position 0 and keeps their pages.
    pub(crate) fn prefill(&mut self, tokens: &[u32]) -> anyhow::Result<Pages> {
        let mut pages = self.empty(tokens.len())?;
        self.extend(&mut pages, tokens)?;
        Ok(pages)
    }

    /// Runs the tokens from position 0; keeps their pages, and their queries.
    pub(crate) fn observe(&mut self, tokens: &[u32]) -> anyhow::Result<(Pages, Queries)> {
        let config = self.config();
        let width = config.heads * config.head_dim;
        let mut layers = vec![Vec::new(); config.layers];
        let mut pages = self.empty(tokens.len())?;
        self.extend_with(&mut pages, tokens, &mut |before| {
            let rows = before.rows.chunks_exact(before.stride);
            layers[before.layer].extend(rows.flat_map(|row| &row[..width]));
            ControlFlow::Continue(())
        })?;
        Ok((pages, Queries { layers }))
    }

    /// By layer and query head: what takes what it attended to into the residual stream,
    /// `[hidden, head_dim]`.
    pub(crate) fn projections(&self) -> Vec<Vec<DMatrix<f32>>> {
        let config = self.config();
        let layers = (0..config.layers).map(|layer| {
            let rows = self.model.output_projection(layer);
            let width = config.heads * config.head_dim;
            let all = DMatrix::from_row_slice(config.hidden, width, &rows);
            let head = |head| all.columns(head * config.head_dim, config.head_dim);
            let heads = (0..config.heads).map(|it| head(it).into_owned());
            heads.collect()
        });
        layers.collect()
    }

    /// No tokens yet, and room for `tokens`.
    pub(crate) fn empty(&mut self, tokens: usize) -> anyhow::Result<Pages> {
        let blocks = (0..tokens.div_ceil(BLOCK_TOKENS))
            .map(|_| self.pool.alloc())
            .collect::<Option<_>>()
            .context("the reader has too few pages")?;
        Ok(Pages { blocks, tokens: 0 })
    }

    /// Runs the tokens at the next positions; what the pages held there is lost.
    pub(crate) fn extend(&mut self, pages: &mut Pages, tokens: &[u32]) -> anyhow::Result<()> {
        self.extend_with(pages, tokens, &mut |_| ControlFlow::Continue(()))
    }

    fn extend_with(
        &mut self,
        pages: &mut Pages,
        tokens: &[u32],
        before_layer: &mut (dyn FnMut(BeforeLayer<'_>) -> ControlFlow<()> + Send),
    ) -> anyhow::Result<()> {
        for part in tokens.chunks(STEP_TOKENS) {
            let step = Step {
                tokens: part,
                positions: Positions::From(pages.tokens),
                blocks: &pages.blocks,
                logits: LogitsWanted::None,
            };
            self.model
                .forward(&mut self.pool, &mut self.scratch, &[step], before_layer)?;
            pages.tokens += part.len();
        }
        Ok(())
    }

    /// Logits of every token of every tail, as if each followed the context
    /// alone: `[tail][token][vocabulary]`. The context stays as it is.
    pub(crate) fn ask(
        &mut self,
        context: &Pages,
        tails: &[Vec<u32>],
    ) -> anyhow::Result<Vec<Vec<Vec<f32>>>> {
        let forks = tails
            .iter()
            .map(|tail| self.fork(context, tail.len()))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let steps: Vec<Step<'_>> = tails
            .iter()
            .zip(&forks)
            .map(|(tail, fork)| Step {
                tokens: tail,
                positions: Positions::From(context.tokens),
                blocks: &fork.blocks,
                logits: LogitsWanted::All,
            })
            .collect();
        let logits = self
            .model
            .forward(&mut self.pool, &mut self.scratch, &steps, &mut |_| {
                ControlFlow::Continue(())
            })?;
        let rows = (0..tails.len())
            .map(|step| logits.rows(step).map(<[f32]>::to_vec).collect())
            .collect();
        for fork in forks {
            self.release_fork(context, fork)?;
        }
        Ok(rows)
    }

    /// Greedy tokens after each prompt, up to and without the end token, as if each
    /// followed the context alone.
    pub(crate) fn greedy(
        &mut self,
        context: &Pages,
        prompts: &[&[u32]],
        end: u32,
        limit: usize,
    ) -> anyhow::Result<Vec<Vec<u32>>> {
        let mut out: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
        let mut forks = prompts
            .iter()
            .map(|prompt| self.fork(context, prompt.len() + limit))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut going: Vec<usize> = (0..prompts.len()).collect();
        for round in 0..limit {
            let next = |&index: &usize| match round {
                0 => prompts[index],
                _ => &out[index][round - 1..],
            };
            let steps: Vec<Step<'_>> = going
                .iter()
                .map(|index| Step {
                    tokens: next(index),
                    positions: Positions::From(forks[*index].tokens),
                    blocks: &forks[*index].blocks,
                    logits: LogitsWanted::Last,
                })
                .collect();
            let logits =
                self.model
                    .forward(&mut self.pool, &mut self.scratch, &steps, &mut |_| {
                        ControlFlow::Continue(())
                    })?;
            let lengths: Vec<usize> = steps.iter().map(|step| step.tokens.len()).collect();
            let mut left = Vec::with_capacity(going.len());
            for (step, (index, length)) in going.into_iter().zip(lengths).enumerate() {
                // Where the own tokens begin: a fork's `tokens` counts what its pages share.
                forks[index].tokens += length;
                let token = argmax(logits.last(step).context("asked for the last row")?);
                if token != end {
                    out[index].push(token);
                    left.push(index);
                }
            }
            going = left;
            if going.is_empty() {
                break;
            }
        }
        for fork in forks {
            self.release_fork(context, fork)?;
        }
        Ok(out)
    }

    /// Runs what `selection` names of the tokens over KV that lands at the positions given,
    /// and the rows of all others; no logits. `before_layer` sees what is about to attend.
    pub(crate) fn blend(
        &mut self,
        pages: &mut Pages,
        tokens: &[u32],
        selection: &mut Selection,
        landing: &[(usize, &Kv)],
    ) -> anyhow::Result<()> {
        let blocks = &pages.blocks;
        let prompt = blend::Prompt {
            tokens,
            blocks,
            selection,
            ready: 0,
            logits: LogitsWanted::None,
        };
        blend::run(
            &self.model,
            &mut self.pool,
            &mut self.scratch,
            &mut [prompt],
            &mut |layer, pool| {
                for (first, kv) in landing {
                    let bytes: Vec<u8> = to_bytes(&kv.layers[layer]);
                    pool.write_layer(blocks, *first, kv.tokens, layer, &bytes)
                        .expect("a context fits its pages");
                }
                ControlFlow::Continue(())
            },
        )?;
        pages.tokens = tokens.len();
        Ok(())
    }

    /// What probes tell of a chunk behind `prefix`.
    pub(crate) fn record(
        &mut self,
        probes: &Probes,
        prefix: &[u32],
        chunk: &[u32],
    ) -> anyhow::Result<Vec<Vec<f32>>> {
        let pages = self.empty(probes.tokens(prefix.len(), chunk.len()))?;
        let (pool, scratch) = (&mut self.pool, &mut self.scratch);
        let scores = probes.record(&self.model, pool, scratch, &pages.blocks, prefix, chunk)?;
        self.release(pages)?;
        Ok(scores)
    }

    /// Runs each tail token by token, as if it followed the context alone, and `choose` says
    /// for each layer of each token which pages it attends to: of which tail, what is about
    /// to attend, which of its steps this is, and the tail's page table. Likeliest token
    /// after each token of each tail.
    pub(crate) fn follow(
        &mut self,
        context: &Pages,
        tails: &[Vec<u32>],
        choose: &mut Choose<'_>,
    ) -> anyhow::Result<Vec<Vec<u32>>> {
        let forks = tails
            .iter()
            .map(|tail| self.fork(context, tail.len()))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut likeliest: Vec<Vec<u32>> = vec![Vec::new(); tails.len()];
        for at in 0..tails.iter().map(Vec::len).max().unwrap_or(0) {
            let going: Vec<usize> = (0..tails.len())
                .filter(|&tail| tails[tail].len() > at)
                .collect();
            let step = |&tail: &usize| Step {
                tokens: &tails[tail][at..=at],
                positions: Positions::From(context.tokens + at),
                blocks: &forks[tail].blocks,
                logits: LogitsWanted::Last,
            };
            let steps: Vec<Step<'_>> = going.iter().map(step).collect();
            let (pool, scratch) = (&mut self.pool, &mut self.scratch);
            let logits = self.model.forward(pool, scratch, &steps, &mut |before| {
                for (step, &tail) in going.iter().enumerate() {
                    before.pages[step] = choose(tail, &before, step, &forks[tail].blocks);
                }
                ControlFlow::Continue(())
            })?;
            for (step, &tail) in going.iter().enumerate() {
                let row = logits.last(step).context("asked for the last row")?;
                likeliest[tail].push(argmax(row));
            }
        }
        for fork in forks {
            self.release_fork(context, fork)?;
        }
        Ok(likeliest)
    }

    /// Digests of the full pages of a context.
    pub(crate) fn digests(&mut self, context: &Pages, detail: Detail) -> anyhow::Result<Digests> {
        let mut digests = Digests::new(self.config(), detail);
        digests.extend(&mut self.pool, &context.blocks, context.tokens)?;
        Ok(digests)
    }

    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// By token of the context, the attention that a question pays it, and by layer.
    pub(crate) fn attention(
        &mut self,
        context: &Pages,
        question: &[u32],
    ) -> anyhow::Result<Vec<Vec<f32>>> {
        let fork = self.fork(context, question.len())?;
        let step = Step {
            tokens: question,
            positions: Positions::From(context.tokens),
            blocks: &fork.blocks,
            logits: LogitsWanted::None,
        };
        let mut layers = Vec::new();
        let model = &self.model;
        model.forward(&mut self.pool, &mut self.scratch, &[step], &mut |before| {
            layers.push(blend::attention_of(
                model,
                &before,
                0,
                &fork.blocks,
                context.tokens,
            ));
            ControlFlow::Continue(())
        })?;
        self.release_fork(context, fork)?;
        Ok(layers)
    }

    /// Copies K and V of a range of positions out of the pages.
    pub(crate) fn take(&self, pages: &Pages, range: Range<usize>) -> anyhow::Result<Kv> {
        let tokens = range.len();
        let mut bytes = vec![0; self.pool.layer_bytes(tokens)];
        let layers = (0..self.config().layers)
            .map(|layer| {
                self.pool
                    .read_layer(&pages.blocks, range.start, tokens, layer, &mut bytes)?;
                Ok(bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&value| f32::from_le_bytes(value))
                    .collect())
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Kv { tokens, layers })
    }

    /// Puts K and V at the next positions.
    pub(crate) fn land(&mut self, pages: &mut Pages, kv: &Kv) -> anyhow::Result<()> {
        for (layer, values) in kv.layers.iter().enumerate() {
            let bytes = to_bytes(values);
            self.pool
                .write_layer(&pages.blocks, pages.tokens, kv.tokens, layer, &bytes)?;
        }
        pages.tokens += kv.tokens;
        Ok(())
    }

    /// Rotates the keys from positions `from..` to positions `to..`.
    pub(crate) fn reposition(&self, kv: &mut Kv, from: usize, to: usize) {
        let dim = self.config().head_dim;
        turn(kv, dim, &self.frequencies, self.isa, |token| {
            (from + token, to + token)
        });
    }

    /// Undoes RoPE of keys at positions `from..`, but for a factor of its lengths.
    pub(crate) fn unrotate(&self, kv: &mut Kv, from: usize) {
        let dim = self.config().head_dim;
        turn(kv, dim, &self.frequencies, self.isa, |token| {
            (from + token, 0)
        });
    }

    /// Gives the pages back.
    pub(crate) fn release(&mut self, pages: Pages) -> anyhow::Result<()> {
        for block in pages.blocks {
            self.pool.free(block)?;
        }
        Ok(())
    }

    /// A sequence that shares the context's full pages and owns the rest.
    fn fork(&mut self, context: &Pages, tail: usize) -> anyhow::Result<Pages> {
        let shared = context.tokens / BLOCK_TOKENS;
        let own = (context.tokens + tail).div_ceil(BLOCK_TOKENS) - shared;
        let mut pages = self.empty(own * BLOCK_TOKENS)?;
        pages
            .blocks
            .splice(..0, context.blocks[..shared].iter().copied());
        pages.tokens = shared * BLOCK_TOKENS;
        if context.tokens > pages.tokens {
            let rest = self.take(context, pages.tokens..context.tokens)?;
            self.land(&mut pages, &rest)?;
        }
        Ok(pages)
    }

    fn release_fork(&mut self, context: &Pages, mut fork: Pages) -> anyhow::Result<()> {
        fork.blocks.drain(..context.tokens / BLOCK_TOKENS);
        self.release(fork)
    }
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// Rotates the keys of every token between the positions that `positions` gives.
fn turn(
    kv: &mut Kv,
    dim: usize,
    frequencies: &Frequencies,
    isa: Isa,
    positions: impl Fn(usize) -> (usize, usize),
) {
    let (mut cos, mut sin) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
    for token in 0..kv.tokens {
        let (from, to) = positions(token);
        frequencies.shift(from, to, &mut cos, &mut sin);
        for layer in &mut kv.layers {
            let keys = layer.len() / 2;
            for head in layer[..keys].chunks_exact_mut(kv.tokens * dim) {
                rotate(isa, &mut head[token * dim..][..dim], &cos, &sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kvasir_engine::rope::{RopeConfig, RopeScaling};

    use super::*;

    #[test]
    fn undoing_rope_gives_a_constant_key_back() {
        let rope = RopeConfig {
            theta: 10_000.0,
            scaling: RopeScaling::None,
        };
        let (tokens, dim) = (300, 8);
        let frequencies = rope.frequencies(dim);
        let key = [1.0, -2.0, 3.0, 0.5, 0.0, 4.0, -1.0, 2.0];
        // Two heads of K, then two of V.
        let constant = key.repeat(4 * tokens);
        let mut kv = Kv {
            tokens,
            layers: vec![constant.clone(); 2],
        };
        let (mut cos, mut sin) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
        for layer in &mut kv.layers {
            for (index, key) in layer[..2 * tokens * dim].chunks_exact_mut(dim).enumerate() {
                frequencies.angles(7 + index % tokens, &mut cos, &mut sin);
                rotate(Isa::detect(), key, &cos, &sin);
            }
        }
        assert_ne!(kv.layers[0][..dim], key);
        turn(&mut kv, dim, &frequencies, Isa::detect(), |token| {
            (7 + token, 0)
        });
        for layer in &kv.layers {
            for (found, expected) in layer.iter().zip(&constant) {
                assert!((found - expected).abs() < 1e-5);
            }
        }
    }
}
