//! What a model reads while its KV is measured, or calibrated on.

use std::path::Path;

use anyhow::{Context as _, ensure};
use kvasir_engine::tokenizer::Tokenizer;

use crate::corpus::{self, Profile, Split, Vocabulary};

/// Contexts of the corpus, or pieces of a text.
#[derive(Debug)]
pub(crate) enum Contexts {
    Corpus(Box<Vocabulary>),
    Text(Text),
}

/// Tokens of a text, of which the first half is for tests and the second to train on.
#[derive(Debug)]
pub(crate) struct Text {
    /// What the tokenizer puts in front.
    front: Vec<u32>,
    tokens: Vec<u32>,
}

impl Contexts {
    pub(crate) fn corpus() -> anyhow::Result<Self> {
        Ok(Self::Corpus(Box::new(Vocabulary::load()?)))
    }

    /// Of the text in a file, if one is given; its tokens are those of the model in `model`.
    pub(crate) fn new(model: &Path, text: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = text else {
            return Self::corpus();
        };
        let tokenizer = Tokenizer::load(model, &[])
            .with_context(|| format!("the tokenizer in {}", model.display()))?;
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("reading the text {}", path.display()))?;
        Ok(Self::Text(Text {
            front: tokenizer.encode("", true)?,
            tokens: tokenizer.encode(&text, false)?,
        }))
    }

    /// Context number `index` of a split: at least `tokens` tokens behind a first one. Of the corpus, a multiple of `chunk` tokens.
    ///
    /// # Errors
    /// The text is too short.
    pub(crate) fn context(
        &self,
        index: u64,
        tokens: usize,
        chunk: usize,
        split: Split,
    ) -> anyhow::Result<Vec<u32>> {
        match self {
            Self::Corpus(vocabulary) => {
                let seed = match split {
                    Split::Train => TRAINING_SEED,
                    Split::Test => 1,
                };
                let context = corpus::sample(
                    vocabulary,
                    &Profile::default(),
                    tokens.div_ceil(chunk),
                    chunk,
                    corpus::mix(seed, index),
                    split,
                )?;
                let front = std::iter::once(vocabulary.bos);
                Ok(front.chain(context.chunks.concat()).collect())
            }
            Self::Text(text) => text.context(index, tokens, split),
        }
    }
}

impl Text {
    fn context(&self, index: u64, tokens: usize, split: Split) -> anyhow::Result<Vec<u32>> {
        let (test, train) = self.tokens.split_at(self.tokens.len() / 2);
        let half = match split {
            Split::Train => train,
            Split::Test => test,
        };
        // Where nothing is put in front, a token of the text comes first.
        let tokens = tokens + usize::from(self.front.is_empty());
        let piece = usize::try_from(index).ok();
        let piece = piece.and_then(|index| half.chunks_exact(tokens).nth(index));
        ensure!(
            piece.is_some(),
            "half of the text has {} tokens, {} contexts of {tokens} are needed; give a longer one",
            half.len(),
            index + 1
        );
        let piece = piece.unwrap_or_default();
        Ok(self.front.iter().chain(piece).copied().collect())
    }
}

const TRAINING_SEED: u64 = 0x7261_696e;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_text_follow_each_other_and_its_halves_are_apart() {
        let text = Text {
            front: vec![7],
            tokens: (100..120).collect(),
        };
        let context = |index, split| text.context(index, 4, split);
        assert_eq!(context(1, Split::Test).unwrap(), [7, 104, 105, 106, 107]);
        assert_eq!(context(0, Split::Train).unwrap(), [7, 110, 111, 112, 113]);
        let error = context(2, Split::Test).unwrap_err().to_string();
        assert!(error.contains("10 tokens"), "{error}");
    }
}
