//! A seeded synthetic corpus of multi-chunk reading tasks, as token ids.
//!
//! `bench/quality/README.md` describes the tasks, `bench/quality/corpus.json`
//! holds words and sentence templates, this module and `bench/quality/corpus.py`
//! hold the algorithm: both make the same bytes from the same seed, so that a
//! model trained with the one is asked by the other.
//!
//! [`sample`] gives contexts as training sees them, [`evaluation`] those of one
//! task over names that training never sees.

mod builder;
mod command;
mod names;
mod profile;
mod question;
mod rng;
mod spec;
mod template;
mod vocabulary;
mod world;

pub(crate) use command::{Arguments, run};
pub(crate) use names::Split;
pub(crate) use profile::Profile;
pub(crate) use question::{Context, Kind};
pub(crate) use rng::mix;
pub(crate) use spec::Task;
pub(crate) use vocabulary::Vocabulary;

use builder::{Builder, MAX_CONTEXT_TOKENS, MIN_CHUNK_TOKENS, pairs_that_fit};
use rng::Rng;

/// A context with every question that can be asked about it.
///
/// # Errors
/// [`SampleError`], but never [`SampleError::NoQuestion`].
pub(crate) fn sample(
    vocabulary: &Vocabulary,
    profile: &Profile,
    chunks: usize,
    chunk_tokens: usize,
    seed: u64,
    split: Split,
) -> Result<Context, SampleError> {
    let mut rng = Rng::new(seed);
    Builder::new(vocabulary, profile, chunks, chunk_tokens, &mut rng, split)?.build()
}

/// Context number `index` of a task over held-out names, with that task's
/// questions in random order. There is always one.
///
/// Contexts without such a question are passed over.
///
/// # Errors
/// [`SampleError`]; [`SampleError::NoQuestion`] when the chunks are too few or
/// too short for the task.
pub(crate) fn evaluation(
    vocabulary: &Vocabulary,
    task: &Task,
    chunks: usize,
    chunk_tokens: usize,
    seed: u64,
    index: u64,
) -> Result<Context, SampleError> {
    let seed = mix(seed, index);
    with_questions(vocabulary, task, chunks, chunk_tokens, seed, Split::Test)
}

/// The first context with a question of the task, of the stream `seed`.
///
/// # Errors
/// As for [`evaluation`].
pub(crate) fn with_questions(
    vocabulary: &Vocabulary,
    task: &Task,
    chunks: usize,
    chunk_tokens: usize,
    seed: u64,
    split: Split,
) -> Result<Context, SampleError> {
    let mut profile = task.profile.clone();
    if task.fill {
        let pairs = chunks.saturating_mul(pairs_that_fit(vocabulary, chunk_tokens));
        profile.pairs = u32::try_from(pairs).unwrap_or(u32::MAX);
    }
    for attempt in 0..ATTEMPTS {
        let mut rng = Rng::new(mix(seed, attempt));
        let builder = Builder::new(vocabulary, &profile, chunks, chunk_tokens, &mut rng, split)?;
        let mut context = builder.build()?;
        context
            .questions
            .retain(|question| task.kinds.contains(&question.kind));
        if !context.questions.is_empty() {
            rng.shuffle(&mut context.questions);
            return Ok(context);
        }
    }
    Err(SampleError::NoQuestion)
}

/// Why there is no such context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SampleError {
    /// Zero chunks were asked for.
    #[error("a context has a chunk at least")]
    NoChunk,
    /// A chunk could not be filled to its last token.
    #[error("a chunk has {MIN_CHUNK_TOKENS} tokens at least")]
    ChunkTooShort,
    /// Names or things to tell about might run out.
    #[error("a context has {MAX_CONTEXT_TOKENS} tokens at most")]
    ContextTooLong,
    /// There is no word for the number of the last chunk.
    #[error("a context with totals has {0} chunks at most")]
    TooManyChunks(usize),
    /// The profile's range of facts is empty.
    #[error("facts_min is above facts_max")]
    Facts,
    /// The profile wants more names than the split has.
    #[error("no name is left")]
    NamesExhausted,
    /// None of [`ATTEMPTS`] contexts has a question of the task.
    #[error("no context of this size has a question of the task")]
    NoQuestion,
}

/// Contexts tried for one that has a question of the task.
const ATTEMPTS: u64 = 1000;

#[cfg(test)]
mod tests;
