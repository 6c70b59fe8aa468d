//! What blending does to a model's answers: the measurement behind a [`Gate`].
//!
//! Over each context, the same questions are asked three ways: behind full prefill, over chunks
//! reused as they are, and over chunks repaired within a few budgets. What counts is whether the
//! expected answer comes, how far the distribution at its tokens is from that of full prefill
//! (KL divergence, teacher-forced), and what reuse adds to the loss of text behind the chunks.

use std::ops::ControlFlow;

use kvasir_plugin::blend::{Gate, Repair, Reused, Rule, Selection, Selector};
use kvasir_plugin::{BackendError, EngineBackend as _, Placement};
use kvasir_types::{KvLayout, LayerIdx, LayoutError};
use serde::Deserialize;

use super::{Probes, Prompt, run};
use crate::cache::{self, PoolBackend, Turns};
use crate::kernels::Threads;
use crate::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvError, KvPool};
use crate::logits::{argmax, kl_divergence, log_softmax};
use crate::model::{ForwardError, LogitsWanted, Model, Positions, Scratch, Step};

/// Chunks, and questions about them, in tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// The chunks, in order.
    pub chunks: Vec<Vec<u32>>,
    /// What follows them, up to the answer; and the answer.
    pub questions: Vec<(Vec<u32>, Vec<u32>)>,
}

/// The same as a line of a file of questions, in text or tokens.
#[derive(Clone, Debug, Deserialize)]
pub struct ContextLine {
    /// The chunks, in order.
    pub chunks: Vec<Words>,
    /// About them.
    pub questions: Vec<QuestionLine>,
}

/// A question of a [`ContextLine`].
#[derive(Clone, Debug, Deserialize)]
pub struct QuestionLine {
    /// What follows the chunks, up to the answer; `prompt_text` in what `kvasir-bench corpus`
    /// prints.
    #[serde(alias = "prompt_text")]
    pub prompt: Words,
    /// The answer.
    pub answer: Words,
}

/// A text.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Words {
    /// To be encoded.
    Text(String),
    /// In tokens.
    Tokens(Vec<u32>),
}

/// Why a model could not be checked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// Fewer contexts than probes, or none besides.
    #[error("{0} contexts are too few: the first becomes a probe, and the others are asked about")]
    TooFew(usize),
    /// A context without chunks.
    #[error("context {0} has fewer than two chunks")]
    NoChunks(usize),
    /// The system grants no threads.
    #[error("the system grants no threads to compute on")]
    Threads(#[source] rayon::ThreadPoolBuildError),
    /// The model does not run them.
    #[error("a context cannot be run")]
    Forward(#[from] ForwardError),
    /// Its chunks are too large.
    #[error("a chunk has no layout")]
    Layout(#[from] LayoutError),
    /// Its pages are too few.
    #[error("a chunk does not fit the pages")]
    Pages(#[from] KvError),
    /// Its pages are of another model.
    #[error("a chunk cannot be moved")]
    Moved(#[from] BackendError),
}

/// First chunks of so many contexts become the probes; these are not asked about. More were
/// not seen to find more: `kvasir-bench quality --methods blend:graded-N:BUDGET`.
pub const PROBES: usize = 1;
/// Layers that probes record, of so many: a third. More cost more, and were seen to bring back a
/// little more of the text behind chunks, and no more of the answers.
pub const fn probed_layers(layers: usize) -> usize {
    if layers < 6 { 1 } else { layers / 3 }
}

/// Budgets that are tried, the cheapest first.
pub const BUDGETS: [f32; 6] = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3];

/// Measures `model` on `contexts` with chunks compiled behind `prefix`. `progress` hears how
/// many contexts are done, of how many.
///
/// # Errors
/// [`CheckError`].
pub fn check(
    model: &Model,
    prefix: &[u32],
    contexts: &[Context],
    mut progress: impl FnMut(usize, usize),
) -> Result<Gate, CheckError> {
    let (probes, asked) = contexts
        .split_at_checked(PROBES)
        .filter(|(_, asked)| !asked.is_empty())
        .ok_or(CheckError::TooFew(contexts.len()))?;
    if let Some(index) = contexts.iter().position(|it| it.chunks.len() < 2) {
        return Err(CheckError::NoChunks(index));
    }
    let probes = Probes {
        texts: probes.iter().map(|it| it.chunks[0].clone()).collect(),
        layers: probed_layers(model.config().layers),
    };
    let longest = contexts.iter().map(Context::tokens).max().unwrap_or(0);
    let mut bench = Bench::new(model, prefix, probes, longest)?;
    let mut full = Sums::default();
    let mut naive = Sums::default();
    let mut repaired = [Sums::default(); BUDGETS.len()];
    for (index, context) in asked.iter().enumerate() {
        let chunks = bench.compile(&context.chunks)?;
        let (text, chunks_read) = match chunks.split_last() {
            Some((last, before)) => (last, before),
            None => return Err(CheckError::NoChunks(index)),
        };
        let reference = bench.answers(&chunks, None, &context.questions)?;
        let reference_text = bench.loss(chunks_read, None, &text.tokens)?;
        full.add(&reference, &reference, 0.0);
        let mut measure = |selector: Selector, sums: &mut Sums| -> Result<(), CheckError> {
            let found = bench.answers(&chunks, Some(selector), &context.questions)?;
            let loss = bench.loss(chunks_read, Some(selector), &text.tokens)?;
            sums.add(&found, &reference, loss - reference_text);
            Ok(())
        };
        measure(Selector::NONE, &mut naive)?;
        for (budget, sums) in BUDGETS.into_iter().zip(&mut repaired) {
            measure(graded(budget), sums)?;
        }
        progress(index + 1, asked.len());
    }
    let digest = model.weights_digest();
    Ok(Gate {
        version: Gate::VERSION,
        weights: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        prefix: prefix.to_vec(),
        probe_layers: u16::try_from(bench.probes.layers).unwrap_or(u16::MAX),
        probes: bench.probes.texts,
        questions: full.questions,
        full_exact: full.exact(),
        naive_exact: naive.exact(),
        naive_kl: naive.kl(),
        naive_text: naive.text(),
        repairs: BUDGETS
            .into_iter()
            .zip(repaired)
            .map(|(budget, sums)| Repair {
                budget,
                exact: sums.exact(),
                kl: sums.kl(),
                text: sums.text(),
            })
            .collect(),
    })
}

fn graded(budget: f32) -> Selector {
    Selector {
        rule: Rule::Graded,
        share: budget,
        layers: None,
    }
}

impl Context {
    /// Most tokens that are in the pages at once, but for a prefix.
    fn tokens(&self) -> usize {
        let chunks: usize = self.chunks.iter().map(Vec::len).sum();
        let tails = self
            .questions
            .iter()
            .map(|(prompt, answer)| prompt.len() + answer.len());
        chunks + tails.max().unwrap_or(0)
    }
}

/// An answer: whether it came, and logits at its tokens.
struct Answer {
    exact: bool,
    logits: Vec<Vec<f32>>,
}

/// Over all questions.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    questions: u32,
    exact: u32,
    tokens: u32,
    kl: f64,
    contexts: u32,
    text: f64,
}

impl Sums {
    fn add(&mut self, found: &[Answer], reference: &[Answer], text: f64) {
        for (found, reference) in found.iter().zip(reference) {
            self.questions += 1;
            self.exact += u32::from(found.exact);
            for (found, reference) in found.logits.iter().zip(&reference.logits) {
                self.tokens += 1;
                self.kl += kl_divergence(reference, found);
            }
        }
        self.contexts += 1;
        self.text += text;
    }

    fn exact(&self) -> f64 {
        f64::from(self.exact) / f64::from(self.questions.max(1))
    }

    fn kl(&self) -> f64 {
        self.kl / f64::from(self.tokens.max(1))
    }

    fn text(&self) -> f64 {
        self.text / f64::from(self.contexts.max(1))
    }
}

/// A chunk compiled alone.
struct Compiled {
    tokens: Vec<u32>,
    /// By layer, in canonical order.
    kv: Vec<Vec<u8>>,
    scores: Vec<Vec<f32>>,
}

/// Pages for one sequence.
struct Bench<'a> {
    model: &'a Model,
    prefix: &'a [u32],
    probes: Probes,
    pool: KvPool,
    blocks: Vec<BlockId>,
    scratch: Scratch,
    turns: Turns,
    layout: KvLayout,
}

impl<'a> Bench<'a> {
    fn new(
        model: &'a Model,
        prefix: &'a [u32],
        probes: Probes,
        longest: usize,
    ) -> Result<Self, CheckError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let tokens = prefix.len() + longest + probes.tokens(0, longest);
        let pages = tokens.div_ceil(BLOCK_TOKENS);
        let mut pool = KvPool::new(model.config(), pages, KvDtype::F32);
        Ok(Self {
            blocks: (0..pages).map_while(|_| pool.alloc()).collect(),
            pool,
            scratch: Scratch::new(Threads::new(cores).map_err(CheckError::Threads)?),
            turns: Turns::new(model.config()),
            layout: cache::layout(model.config(), KvDtype::F32, 1)?,
            model,
            prefix,
            probes,
        })
    }

    fn forward(
        &mut self,
        from: usize,
        tokens: &[u32],
        logits: LogitsWanted,
    ) -> Result<Vec<Vec<f32>>, CheckError> {
        let step = Step {
            tokens,
            positions: Positions::From(from),
            blocks: &self.blocks,
            logits,
        };
        let go_on = &mut |_: crate::model::BeforeLayer<'_>| ControlFlow::Continue(());
        let model = self.model;
        let found = model.forward(&mut self.pool, &mut self.scratch, &[step], go_on)?;
        Ok(found.rows(0).map(<[f32]>::to_vec).collect())
    }

    fn compile(&mut self, chunks: &[Vec<u32>]) -> Result<Vec<Compiled>, CheckError> {
        let compile = |tokens: &Vec<u32>| {
            let all = [self.prefix, tokens].concat();
            self.forward(0, &all, LogitsWanted::None)?;
            let mut bytes = vec![0; self.pool.layer_bytes(tokens.len())];
            let mut kv = Vec::new();
            for layer in 0..self.model.config().layers {
                let first = self.prefix.len();
                self.pool
                    .read_layer(&self.blocks, first, tokens.len(), layer, &mut bytes)?;
                kv.push(bytes.clone());
            }
            let (pool, scratch) = (&mut self.pool, &mut self.scratch);
            let (model, blocks, prefix) = (self.model, &self.blocks, self.prefix);
            let scores = self
                .probes
                .record(model, pool, scratch, blocks, prefix, tokens)?;
            Ok(Compiled {
                tokens: tokens.clone(),
                kv,
                scores,
            })
        };
        chunks.iter().map(compile).collect()
    }

    /// Puts prefix and chunks into the pages, computed or reused; returns their number.
    fn prepare(
        &mut self,
        chunks: &[Compiled],
        selector: Option<Selector>,
    ) -> Result<usize, CheckError> {
        let texts = chunks.iter().flat_map(|chunk| &chunk.tokens);
        let tokens: Vec<u32> = self.prefix.iter().chain(texts).copied().collect();
        let Some(selector) = selector else {
            self.forward(0, &tokens, LogitsWanted::None)?;
            return Ok(tokens.len());
        };
        let mut first = self.prefix.len();
        let mut reused = Vec::new();
        let mut scores = vec![vec![0.0; first]; self.probes.layers];
        for (index, chunk) in chunks.iter().enumerate() {
            reused.push(Reused {
                tokens: first..first + chunk.tokens.len(),
                exact: index == 0,
            });
            for (all, of_chunk) in scores.iter_mut().zip(&chunk.scores) {
                all.extend(of_chunk);
            }
            first += chunk.tokens.len();
        }
        let layers = self.layout.layers();
        let mut selection = Selection::new(selector, tokens.len(), &reused, layers, &scores);
        let prompt = Prompt {
            tokens: &tokens,
            blocks: &self.blocks,
            selection: &mut selection,
            ready: 0,
            logits: LogitsWanted::None,
        };
        let (compiled_at, turns, layout) = (self.prefix.len(), &mut self.turns, &self.layout);
        let blocks = &self.blocks;
        let mut failed = None;
        let mut land = |layer: usize, pool: &mut KvPool| {
            let index = LayerIdx(u16::try_from(layer).unwrap_or(u16::MAX));
            for (chunk, reused) in chunks.iter().zip(&reused) {
                let at = Placement {
                    first: reused.tokens.start,
                    compiled_at,
                    tokens: reused.tokens.len(),
                };
                let mut backend = PoolBackend::new(pool, layout).with_turns(turns);
                if let Err(error) = backend.write_moved(blocks, at, index, &chunk.kv[layer]) {
                    failed = Some(error);
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        };
        let (pool, scratch) = (&mut self.pool, &mut self.scratch);
        let outcome = run(self.model, pool, scratch, &mut [prompt], &mut land);
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(outcome.map(|_| tokens.len())?),
        }
    }

    fn answers(
        &mut self,
        chunks: &[Compiled],
        selector: Option<Selector>,
        questions: &[(Vec<u32>, Vec<u32>)],
    ) -> Result<Vec<Answer>, CheckError> {
        let context = self.prepare(chunks, selector)?;
        let mut answers = Vec::with_capacity(questions.len());
        for (prompt, answer) in questions {
            let tail = [&prompt[..], answer].concat();
            let rows = self.forward(context, &tail, LogitsWanted::All)?;
            // The row before a token predicts it.
            let first = prompt.len().saturating_sub(1);
            let rows = &rows[first..first + answer.len()];
            // Greedy decoding sees what teacher forcing sees up to its first mistake.
            let exact = rows
                .iter()
                .zip(answer)
                .all(|(row, &token)| argmax(row) == token);
            answers.push(Answer {
                exact,
                logits: rows.to_vec(),
            });
        }
        Ok(answers)
    }

    /// Nats a token of a text behind the chunks, but for its first.
    fn loss(
        &mut self,
        chunks: &[Compiled],
        selector: Option<Selector>,
        text: &[u32],
    ) -> Result<f64, CheckError> {
        let context = self.prepare(chunks, selector)?;
        let rows = self.forward(context, text, LogitsWanted::All)?;
        let next = text.iter().skip(1);
        let losses = rows
            .iter()
            .zip(next)
            .map(|(row, &token)| -log_softmax(row)[token as usize]);
        #[expect(clippy::cast_precision_loss, reason = "tokens of a chunk")]
        let count = text.len().saturating_sub(1).max(1) as f64;
        Ok(losses.sum::<f64>() / count)
    }
}
