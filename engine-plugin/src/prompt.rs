//! A prompt cut into chunks.

use kvasir_types::{ChunkKey, Namespace};

/// A prompt's chunks, and where prefill goes on behind them.
#[derive(Clone, Debug)]
pub struct Prompt {
    tokens: usize,
    chunk_tokens: usize,
    keys: Vec<ChunkKey>,
}

impl Prompt {
    /// Cuts `tokens` into the whole prefix chunks of `namespace`.
    pub fn new(namespace: &Namespace, tokens: &[u32]) -> Self {
        Self {
            tokens: tokens.len(),
            chunk_tokens: namespace.layout().tokens() as usize,
            keys: namespace.prefix_keys(tokens),
        }
    }

    /// Chunks that an engine names itself ([`Namespace::opaque`]), of `chunk_tokens` tokens each, in
    /// a prompt that goes on behind them.
    pub fn named(chunk_tokens: usize, keys: Vec<ChunkKey>) -> Self {
        Self {
            tokens: keys.len() * chunk_tokens + 1,
            chunk_tokens,
            keys,
        }
    }

    /// Tokens of the prompt.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens of a chunk.
    pub fn chunk_tokens(&self) -> usize {
        self.chunk_tokens
    }

    /// Keys of the whole chunks, in order.
    pub fn keys(&self) -> &[ChunkKey] {
        &self.keys
    }

    /// Where prefill goes on when the first `chunks` chunks are in the pages.
    ///
    /// The last token is always computed, for its logits are needed.
    pub fn resume_at(&self, chunks: usize) -> usize {
        (chunks * self.chunk_tokens).min(self.tokens.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_types::{DType, KvLayout, ModelIdentity, Planes};

    fn prompt(tokens: u32) -> Prompt {
        let layout = KvLayout::new(2, 1, Planes::symmetric(8), 64, DType::F32).unwrap();
        let model = ModelIdentity {
            architecture: "a".into(),
            weights: "w".into(),
            rope: "r".into(),
        };
        let namespace = Namespace::new(&model, None, layout, &[0; 32], b"");
        Prompt::new(&namespace, &(0..tokens).collect::<Vec<_>>())
    }

    #[test]
    fn the_last_token_is_always_computed() {
        assert_eq!(prompt(128).resume_at(2), 127);
        assert_eq!(prompt(128).resume_at(1), 64);
        assert_eq!(prompt(130).resume_at(2), 128);
        assert_eq!(prompt(10).resume_at(0), 0);
        assert_eq!(prompt(64).resume_at(1), 63);
    }

    #[test]
    fn only_whole_chunks_have_keys() {
        assert_eq!(prompt(63).keys().len(), 0);
        assert_eq!(prompt(64).keys().len(), 1);
        assert_eq!(prompt(191).keys().len(), 2);
    }
}
