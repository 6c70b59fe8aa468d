//! What one question, or one continuation, says about a method.

use std::collections::BTreeMap;

use kvasir_engine::logits::{argmax, kl_divergence, log_softmax};

use super::reader::{Pages, Reader};

/// Longest answer that is decoded; every answer of the corpus is shorter.
const LONGEST_ANSWER: usize = 10;

/// A question with the answer that counts.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// What follows the context, up to the first token of the answer.
    pub(crate) prompt: Vec<u32>,
    /// The answer, without the end token.
    pub(crate) answer: Vec<u32>,
}

/// One question under one method.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    /// Greedy tokens, without the end token.
    pub(crate) tokens: Vec<u32>,
    /// Whether they are the answer.
    pub(crate) exact: bool,
    /// Harmonic mean of precision and recall over tokens, as in SQuAD
    /// (Rajpurkar et al., 2016).
    pub(crate) f1: f64,
    /// At each token of the true answer and its end, teacher-forced:
    /// `[token][vocabulary]`.
    logits: Vec<Vec<f32>>,
}

/// How far an answer is from that of full prefill.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Distance {
    /// KL(full ‖ method) in nats at each token of the true answer and its end.
    pub(crate) kl: Vec<f64>,
    /// Whether both think the same token most likely, at each of them.
    pub(crate) agrees: Vec<bool>,
    /// First greedy token that differs; `None` when none does.
    pub(crate) divergence: Option<usize>,
    /// Largest difference of a logit.
    pub(crate) logit: f64,
}

/// Answers all questions over one context.
pub(crate) fn answer(
    reader: &mut Reader,
    context: &Pages,
    questions: &[Asked],
    end: u32,
) -> anyhow::Result<Vec<Answer>> {
    let tails: Vec<Vec<u32>> = questions
        .iter()
        .map(|question| [&question.prompt[..], &question.answer].concat())
        .collect();
    let rows = reader.ask(context, &tails)?;
    let exact: Vec<bool> = questions
        .iter()
        .zip(&rows)
        .map(|(question, rows)| {
            let rows = &rows[question.prompt.len() - 1..];
            let likeliest: Vec<u32> = rows.iter().map(|row| argmax(row)).collect();
            let (last, before) = likeliest.split_last().expect("a prompt has a token");
            // Greedy decoding sees what teacher forcing sees up to its first mistake.
            before == question.answer && *last == end
        })
        .collect();
    let wrong = questions.iter().zip(&exact).filter(|(_, exact)| !**exact);
    let prompts: Vec<&[u32]> = wrong.map(|(question, _)| &question.prompt[..]).collect();
    let mut greedy = reader
        .greedy(context, &prompts, end, LONGEST_ANSWER)?
        .into_iter();
    let answers = questions.iter().zip(rows).zip(exact);
    let answers = answers.map(|((question, rows), exact)| {
        let tokens = match exact {
            true => question.answer.clone(),
            false => greedy.next().unwrap_or_default(),
        };
        Answer {
            exact,
            f1: f1(&tokens, &question.answer),
            tokens,
            logits: rows[question.prompt.len() - 1..].to_vec(),
        }
    });
    Ok(answers.collect())
}

/// Mean negative log-likelihood in nats of the tokens after the context; the
/// first, which nothing but the context's last row predicts, is not counted.
pub(crate) fn negative_log_likelihood(
    reader: &mut Reader,
    context: &Pages,
    continuation: &[u32],
) -> anyhow::Result<f64> {
    let rows = reader.ask(context, &[continuation.to_vec()])?;
    let losses: Vec<f64> = rows[0]
        .iter()
        .zip(&continuation[1..])
        .map(|(row, &next)| -log_softmax(row)[next as usize])
        .collect();
    Ok(mean(&losses))
}

impl Answer {
    /// How far it is from the answer of full prefill to the same question.
    pub(crate) fn distance(&self, full: &Self) -> Distance {
        let rows = || full.logits.iter().zip(&self.logits);
        let kl = rows()
            .map(|(full, this)| kl_divergence(full, this))
            .collect();
        let agrees = rows()
            .map(|(full, this)| argmax(full) == argmax(this))
            .collect();
        let logit = rows()
            .flat_map(|(full, this)| full.iter().zip(this))
            .map(|(full, this)| f64::from((full - this).abs()))
            .fold(0.0, f64::max);
        let same = self
            .tokens
            .iter()
            .zip(&full.tokens)
            .take_while(|(this, full)| this == full)
            .count();
        Distance {
            kl,
            agrees,
            divergence: (self.tokens != full.tokens).then_some(same),
            logit,
        }
    }
}

fn f1(found: &[u32], expected: &[u32]) -> f64 {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for &token in expected {
        *counts.entry(token).or_default() += 1;
    }
    let mut common = 0usize;
    for token in found {
        if let Some(count) = counts.get_mut(token).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    if common == 0 {
        return 0.0;
    }
    #[expect(clippy::cast_precision_loss, reason = "answers are short")]
    let (common, both) = (common as f64, (found.len() + expected.len()) as f64);
    2.0 * common / both
}

/// Arithmetic mean; 0 of nothing.
pub(crate) fn mean(values: &[f64]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts of a benchmark")]
    let count = values.len().max(1) as f64;
    values.iter().sum::<f64>() / count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f1_counts_tokens_with_repetition() {
        assert_eq!(f1(&[1, 2], &[1, 2]), 1.0);
        assert_eq!(f1(&[], &[1]), 0.0);
        assert_eq!(f1(&[1, 1, 1], &[1, 2, 3]), 1.0 / 3.0);
        assert_eq!(f1(&[3, 4], &[4]), 2.0 / 3.0);
    }
}
