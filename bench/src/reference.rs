//! The engine against Hugging Face transformers on prompts of the evaluation tasks.
//!
//! `bench/quality/reference.py` writes `reference.json` into a model directory: for
//! each prompt transformers' greedy tokens in f32, and at each of them the largest
//! logits and the logsumexp of all. The prompts themselves are made here, so the
//! corpus is compared as well.

use std::path::Path;

use anyhow::{Context as _, ensure};
use kvasir_engine::logits::argmax;
use serde::Deserialize;

use crate::corpus::{self, Vocabulary};
use crate::quality::reader::Reader;

/// Largest difference of a logit from transformers'.
const TOLERANCE: f64 = 1e-3;

/// Compares, and says how much was compared.
pub(crate) fn run(model: &Path) -> anyhow::Result<()> {
    let Agreement {
        prompts,
        tokens,
        right,
        worst,
    } = compare(model)?;
    println!(
        "{prompts} prompts, {right} answered rightly: {tokens} greedy tokens are those of \
         transformers; logits differ by {worst:.1e} at most"
    );
    Ok(())
}

/// What was compared and found equal.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Agreement {
    /// Prompts of the file.
    pub(crate) prompts: usize,
    /// Greedy tokens of all prompts.
    pub(crate) tokens: usize,
    /// Prompts after which the answer is the right one.
    pub(crate) right: usize,
    /// Largest difference of a logit or of a logsumexp.
    pub(crate) worst: f64,
}

/// Compares the engine with `reference.json` in the model directory `dir`.
///
/// # Errors
/// The first greedy token that differs, or the first logit that differs by more than
/// [`TOLERANCE`]; a file that is absent or does not fit the corpus.
pub(crate) fn compare(dir: &Path) -> anyhow::Result<Agreement> {
    let path = dir.join("reference.json");
    let json = std::fs::read(&path).with_context(|| {
        let path = path.display();
        format!("cannot read {path}; bench/quality/reference.py --model DIR writes it")
    })?;
    let reference: Reference = serde_json::from_slice(&json)
        .with_context(|| format!("cannot understand {}", path.display()))?;
    let vocabulary = Vocabulary::load()?;
    let mut reader = Reader::load(dir, TOKENS)?;
    let mut agreement = Agreement::default();
    for prompt in &reference.prompts {
        let (tokens, answer) = reference.tokens_of(prompt, &vocabulary)?;
        let worst = follow(&mut reader, &tokens, prompt)
            .with_context(|| format!("{}, context {}", prompt.task, prompt.index))?;
        agreement.worst = agreement.worst.max(worst);
        agreement.prompts += 1;
        agreement.tokens += prompt.tokens.len();
        agreement.right += usize::from(prompt.tokens == answer);
    }
    Ok(agreement)
}

/// `reference.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    #[serde(rename = "made_with")]
    _made_with: serde_json::Value,
    /// Of the evaluation contexts.
    seed: u64,
    chunk_tokens: usize,
    prompts: Vec<Prompt>,
}

/// One prompt, and transformers' continuation.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Prompt {
    task: String,
    chunks: usize,
    index: u64,
    /// Position among the questions of the context.
    question: usize,
    /// Greedy tokens, `</s>` included.
    tokens: Vec<u32>,
    /// `[step][rank]`: ids of the largest logits.
    ids: Vec<Vec<u32>>,
    /// `[step][rank]`
    logits: Vec<Vec<f64>>,
    /// `[step]`, over the whole vocabulary.
    logsumexp: Vec<f64>,
}

impl Reference {
    /// Tokens of the prompt, and of the right answer with its end.
    fn tokens_of(
        &self,
        prompt: &Prompt,
        vocabulary: &Vocabulary,
    ) -> anyhow::Result<(Vec<u32>, Vec<u32>)> {
        let task = vocabulary
            .task(&prompt.task)
            .with_context(|| format!("no task {:?}", prompt.task))?;
        let (chunks, size) = (prompt.chunks, self.chunk_tokens);
        let context = corpus::evaluation(vocabulary, task, chunks, size, self.seed, prompt.index)?;
        let question = context
            .questions
            .get(prompt.question)
            .context("the context has fewer questions")?;
        let ask = vocabulary.prompt(question);
        let tokens = [&[vocabulary.bos][..], &context.chunks.concat(), &ask].concat();
        let answer = [&question.answer[..], &[vocabulary.eos]].concat();
        Ok((tokens, answer))
    }
}

/// Follows transformers' tokens; the largest difference of a logit.
fn follow(reader: &mut Reader, tokens: &[u32], prompt: &Prompt) -> anyhow::Result<f64> {
    let steps = prompt.tokens.len();
    let lists = [
        prompt.ids.len(),
        prompt.logits.len(),
        prompt.logsumexp.len(),
    ];
    ensure!(
        steps > 0 && lists == [steps; 3],
        "the reference is incomplete"
    );
    let (last, context) = tokens.split_last().context("a prompt has tokens")?;
    let tail = [&[*last][..], &prompt.tokens[..steps - 1]].concat();
    let pages = reader.prefill(context)?;
    let rows = reader.ask(&pages, &[tail])?;
    reader.release(pages)?;
    let mut worst = 0.0;
    for (step, (expected, row)) in prompt.tokens.iter().zip(&rows[0]).enumerate() {
        let differs = difference(row, prompt, step)?;
        ensure!(
            differs <= TOLERANCE,
            "logits of token {step} differ by {differs}"
        );
        let found = argmax(row);
        ensure!(
            found == *expected,
            "token {step} is {found}, not {expected}"
        );
        worst = f64::max(worst, differs);
    }
    Ok(worst)
}

/// Largest difference of the row from what is known of transformers'.
fn difference(row: &[f32], prompt: &Prompt, step: usize) -> anyhow::Result<f64> {
    let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
    let mut worst = (sum.ln() - prompt.logsumexp[step]).abs();
    for (&id, logit) in prompt.ids[step].iter().zip(&prompt.logits[step]) {
        let ours = row.get(id as usize).context("the model has fewer tokens")?;
        worst = worst.max((f64::from(*ours) - logit).abs());
    }
    // A NaN is neither within the tolerance nor the larger of two.
    Ok(if sum.is_finite() {
        worst
    } else {
        f64::INFINITY
    })
}

/// Longest prompt and answer, twice: the answer has pages of its own.
const TOKENS: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    /// The shipped model, on prompts of every task.
    #[test]
    fn the_shipped_model_answers_as_in_transformers() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/reader-9m");
        let agreement = compare(&dir).unwrap();
        assert_eq!(agreement.prompts, 200);
    }

    #[test]
    fn a_model_without_a_reference_says_how_to_make_one() {
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", compare(dir.path()).unwrap_err());
        assert!(error.contains("reference.json"), "{error}");
        assert!(error.contains("reference.py"), "{error}");
    }
}
