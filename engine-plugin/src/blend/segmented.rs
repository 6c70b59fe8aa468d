//! A prompt cut into content chunks.

use std::ops::Range;

use kvasir_types::{ChunkKey, KvLayout, Namespace};

use crate::Placement;

/// A piece of a prompt, in token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Text of this prompt alone: instructions, a question.
    Text(Vec<u32>),
    /// Text that other prompts have too, wherever it stands: a document.
    Chunk(Vec<u32>),
}

impl Segment {
    /// Its tokens.
    pub fn tokens(&self) -> &[u32] {
        match self {
            Self::Text(tokens) | Self::Chunk(tokens) => tokens,
        }
    }

    /// Its tokens, for themselves.
    pub fn into_tokens(self) -> Vec<u32> {
        match self {
            Self::Text(tokens) | Self::Chunk(tokens) => tokens,
        }
    }
}

/// How long content chunks are, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkLimits {
    /// What is shorter counts as text: a get would cost more than it brings. Default: 32.
    pub min: usize,
    /// What is longer is cut into parts of equal length, each a chunk of its own. Default: 512.
    pub max: usize,
}

impl Default for ChunkLimits {
    fn default() -> Self {
        Self { min: 32, max: 512 }
    }
}

/// One content chunk of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentChunk {
    range: Range<usize>,
    key: ChunkKey,
    layout: KvLayout,
}

impl ContentChunk {
    /// Its tokens in the prompt.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Its key: the same wherever the same tokens stand.
    pub fn key(&self) -> ChunkKey {
        self.key
    }

    /// The layout of its KV: the namespace's, with as many tokens as it has.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }
}

/// A prompt, and the content chunks it is made of.
#[derive(Clone, Debug)]
pub struct Segmented {
    tokens: Vec<u32>,
    prefix: Vec<u32>,
    chunks: Vec<ContentChunk>,
}

impl Segmented {
    /// Puts `segments` together, and cuts content chunks of `namespace` out of them that are
    /// compiled behind `prefix`. The prompt is the segments and nothing else: if it begins
    /// with the prefix, they do.
    pub fn new(
        namespace: &Namespace,
        prefix: &[u32],
        limits: ChunkLimits,
        segments: &[Segment],
    ) -> Self {
        let mut tokens = Vec::new();
        let mut chunks = Vec::new();
        for segment in segments {
            let start = tokens.len();
            match segment {
                Segment::Text(text) => tokens.extend_from_slice(text),
                Segment::Chunk(text) => {
                    tokens.extend_from_slice(text);
                    let parts = parts(text.len(), limits.max);
                    let long_enough = parts.filter(|part| part.len() >= limits.min.max(1));
                    chunks.extend(long_enough.filter_map(|part| {
                        // One too large for a layout is computed.
                        let count = u32::try_from(part.len()).ok()?;
                        let layout = namespace.layout().with_tokens(count).ok()?;
                        Some(ContentChunk {
                            key: namespace.content_after(prefix, &text[part.clone()]),
                            range: start + part.start..start + part.end,
                            layout,
                        })
                    }));
                }
            }
        }
        Self {
            tokens,
            prefix: prefix.to_vec(),
            chunks,
        }
    }

    /// The whole prompt.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// What its chunks are compiled behind. A chunk's first token has, when it is compiled,
    /// the position behind the last of these.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Its content chunks, in order. Whatever lies between them is text.
    pub fn chunks(&self) -> &[ContentChunk] {
        &self.chunks
    }

    /// Where a chunk lies and was compiled.
    pub fn placement(&self, chunk: &ContentChunk) -> Placement {
        Placement {
            first: chunk.range.start,
            compiled_at: self.prefix.len(),
            tokens: chunk.range.len(),
        }
    }

    /// Whether any of its chunks begins at `token` or behind it.
    pub fn begins_behind(&self, token: usize) -> bool {
        self.chunks.iter().any(|chunk| chunk.range.start >= token)
    }

    /// This prompt without the chunks that begin before `token`: those that came with a
    /// cached prefix.
    #[must_use]
    pub fn behind(mut self, token: usize) -> Self {
        self.chunks.retain(|chunk| chunk.range.start >= token);
        self
    }
}

/// Parts of a text of `length` tokens, none longer than `max`, whose lengths differ by one
/// at most.
fn parts(length: usize, max: usize) -> impl Iterator<Item = Range<usize>> {
    let count = length.div_ceil(max.max(1));
    let at = move |part: usize| {
        let (each, more) = (length / count, length % count);
        each * part + part.min(more)
    };
    (0..count).map(move |part| at(part)..at(part + 1))
}

#[cfg(test)]
mod tests {
    use kvasir_types::{DType, ModelIdentity, Planes};
    use proptest::prelude::*;

    use super::*;

    fn namespace() -> Namespace {
        let layout = KvLayout::new(2, 1, Planes::symmetric(8), 64, DType::F32).unwrap();
        let model = ModelIdentity {
            architecture: "a".into(),
            weights: "w".into(),
            rope: "r".into(),
        };
        Namespace::new(&model, None, layout, &[0; 32], b"")
    }

    fn any_segments() -> impl Strategy<Value = Vec<Segment>> {
        let tokens = prop::collection::vec(0u32..100, 0..200);
        let segment = (any::<bool>(), tokens).prop_map(|(is_chunk, tokens)| match is_chunk {
            true => Segment::Chunk(tokens),
            false => Segment::Text(tokens),
        });
        prop::collection::vec(segment, 0..8)
    }

    fn any_limits() -> impl Strategy<Value = ChunkLimits> {
        (0usize..60, 0usize..120).prop_map(|(min, max)| ChunkLimits { min, max })
    }

    proptest! {
        #[test]
        fn chunks_tile_what_they_are_cut_of(
            segments in any_segments(),
            limits in any_limits(),
            prefix in prop::collection::vec(0u32..100, 0..3),
        ) {
            let cut = Segmented::new(&namespace(), &prefix, limits, &segments);
            let texts = segments.iter().flat_map(|segment| match segment {
                Segment::Text(text) | Segment::Chunk(text) => text,
            });
            prop_assert_eq!(cut.tokens(), &texts.copied().collect::<Vec<_>>());
            let mut end = 0;
            for chunk in cut.chunks() {
                let range = chunk.range();
                prop_assert!(end <= range.start && range.start < range.end);
                prop_assert!(range.end <= cut.tokens().len());
                prop_assert!(range.len() >= limits.min && range.len() <= limits.max.max(1));
                prop_assert_eq!(chunk.layout().tokens() as usize, range.len());
                let of_its_tokens = namespace().content_after(&prefix, &cut.tokens()[range.clone()]);
                prop_assert_eq!(chunk.key(), of_its_tokens);
                end = range.end;
                let at = cut.placement(chunk);
                prop_assert_eq!((at.range(), at.compiled_at), (range, prefix.len()));
            }
        }

        /// Whatever stands around it, a text is cut alike.
        #[test]
        fn the_same_text_has_the_same_keys_at_any_place(
            before in any_segments(),
            text in prop::collection::vec(0u32..100, 0..300),
            after in any_segments(),
            limits in any_limits(),
        ) {
            let alone = Segmented::new(&namespace(), &[1], limits, &[Segment::Chunk(text.clone())]);
            let start = Segmented::new(&namespace(), &[1], limits, &before).tokens().len();
            let mut all = before;
            all.push(Segment::Chunk(text.clone()));
            all.extend(after);
            let cut = Segmented::new(&namespace(), &[1], limits, &all);
            let ours = |chunk: &&ContentChunk| {
                start <= chunk.range.start && chunk.range.end <= start + text.len()
            };
            let keys = |chunk: &ContentChunk| (chunk.key, chunk.range.len());
            let found: Vec<_> = cut.chunks().iter().filter(ours).map(keys).collect();
            prop_assert_eq!(found, alone.chunks().iter().map(keys).collect::<Vec<_>>());
        }
    }

    #[test]
    fn long_texts_are_cut_evenly() {
        let lengths = |length, max| parts(length, max).map(|it| it.len()).collect::<Vec<_>>();
        assert_eq!(lengths(512, 512), [512]);
        assert_eq!(lengths(513, 512), [257, 256]);
        assert_eq!(lengths(1025, 512), [342, 342, 341]);
        assert!(lengths(0, 512).is_empty());
        assert_eq!(lengths(2, 0), [1, 1]);
    }

    #[test]
    fn short_texts_have_no_keys() {
        let of = |length: u32| {
            let text = Segment::Chunk((0..length).collect());
            let cut = Segmented::new(&namespace(), &[], ChunkLimits::default(), &[text]);
            cut.chunks().len()
        };
        assert_eq!([of(31), of(32), of(512), of(513)], [0, 1, 1, 2]);
    }

    #[test]
    fn what_a_prefix_brought_is_left_out() {
        let text = Segment::Chunk((0..100).collect());
        let segments = [text.clone(), Segment::Text(vec![7; 5]), text];
        let cut = Segmented::new(&namespace(), &[], ChunkLimits::default(), &segments);
        let starts = |cut: &Segmented| {
            cut.chunks()
                .iter()
                .map(|it| it.range.start)
                .collect::<Vec<_>>()
        };
        assert_eq!(starts(&cut), [0, 105]);
        assert_eq!(starts(&cut.clone().behind(1)), [105]);
        assert_eq!(starts(&cut.clone().behind(105)), [105]);
        assert!(starts(&cut.behind(106)).is_empty());
    }
}
