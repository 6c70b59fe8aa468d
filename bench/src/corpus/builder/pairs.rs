//! Key-value lists.

use super::{Builder, MIN_FILLER};
use crate::corpus::SampleError;
use crate::corpus::question::{Context, Kind, Question};
use crate::corpus::template::Slot;
use crate::corpus::vocabulary::Vocabulary;

impl Builder<'_> {
    /// Lines of keys and values over all chunks; values are one number. A line
    /// that does not fit is left out.
    pub(super) fn pair_list(mut self) -> Result<Context, SampleError> {
        let Self {
            vocabulary,
            profile,
            count,
            ..
        } = self;
        let pairs = profile.pairs as usize;
        let per_chunk = pairs.div_ceil(count);
        let mut questions = Vec::new();
        for index in 0..count {
            self.open_chunk();
            for _ in 0..per_chunk.min(pairs - questions.len()) {
                let name = self.names.draw(vocabulary, profile, &[], self.rng)?;
                let value = *self.rng.pick(&vocabulary.numbers);
                let key = (Slot::Name, &name.tokens[..]);
                if self.add(&vocabulary.pair.fill(&[key, (Slot::Value, &[value])])) {
                    questions.push(Question {
                        kind: Kind::Kv,
                        question: vocabulary.questions.pair.fill(&[key]),
                        answer: vec![value],
                        chunks: vec![index],
                    });
                }
            }
            self.close_chunk();
        }
        Ok(Context {
            chunks: self.chunks,
            questions,
        })
    }
}

/// Key-value lines of one chunk, whose rest can still be filled.
pub(in crate::corpus) fn pairs_that_fit(vocabulary: &Vocabulary, chunk_tokens: usize) -> usize {
    let line = [(Slot::Name, &[0, 0][..]), (Slot::Value, &[0])];
    let length = vocabulary.pair.fill(&line).len();
    let room = chunk_tokens.saturating_sub(1);
    let count = room / length;
    match room - count * length {
        1..MIN_FILLER => count.saturating_sub(1),
        _ => count,
    }
}
