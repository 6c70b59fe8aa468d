//! Cuts that the text itself decides, where nobody says where its pieces begin.
//!
//! Follows FastCDC (Xia et al., USENIX ATC 2016): a gear hash rolls over the text, and a place
//! where it falls below a bound is a cut. Normalised chunking makes that four times rarer than
//! the mean length asks for in front of it, and four times as frequent behind it, so that lengths
//! gather around the mean. Two things differ. Symbols are token ids, of which there are too
//! many for a table: an entry is computed from a fixed seed when it is needed, the same in every
//! engine. And the hash is never begun anew: it depends on the last [`WINDOW`] tokens and on
//! nothing else, so that two texts are cut alike soon behind a difference.
//!
//! A cut decides only where a chunk begins and ends. That a chunk is the same is not read off
//! the gear hash: its key is a digest of all its tokens, so a match is a verified match.

use super::Segment;

/// How texts are cut, in tokens. The lengths are bounds on chunks, as
/// [`ChunkLimits`](super::ChunkLimits) are: a text's last chunk may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentCuts {
    /// Shortest chunk. Default: 64.
    pub min: usize,
    /// What lengths gather around. Default: 192.
    pub mean: usize,
    /// Longest chunk. Default: 512.
    pub max: usize,
}

impl Default for ContentCuts {
    fn default() -> Self {
        Self {
            min: 64,
            mean: 192,
            max: 512,
        }
    }
}

impl ContentCuts {
    /// Cuts a text into chunks, in order; together they are the text.
    pub fn segments(&self, tokens: &[u32]) -> Vec<Segment> {
        let mut chunks = Vec::new();
        let mut start = 0;
        let mut hash = 0u64;
        let mean = u64::try_from(self.mean).unwrap_or(u64::MAX).max(1);
        let rare = u64::MAX / mean / NORMALISATION;
        let frequent = (u64::MAX / mean).saturating_mul(NORMALISATION);
        for (at, &token) in tokens.iter().enumerate() {
            hash = (hash << SHIFT).wrapping_add(gear(token));
            let length = at + 1 - start;
            let bound = if length < self.mean { rare } else { frequent };
            if (length >= self.min.max(1) && hash <= bound) || length >= self.max.max(1) {
                chunks.push(Segment::Chunk(tokens[start..=at].to_vec()));
                start = at + 1;
            }
        }
        if start < tokens.len() {
            chunks.push(Segment::Chunk(tokens[start..].to_vec()));
        }
        chunks
    }
}

/// The entry of a token in the table of the gear hash: the output function of SplitMix64
/// (Steele et al., OOPSLA 2014), a bijection.
fn gear(token: u32) -> u64 {
    let mixed = SEED.wrapping_add(u64::from(token).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Part of what makes cuts: another seed, other cuts.
const SEED: u64 = u64::from_le_bytes(*b"kvasir-1");
/// Bits that the hash moves by with each token: after 64 of them a token has left it.
const SHIFT: u32 = 4;
/// Tokens that the hash depends on.
#[cfg(test)]
const WINDOW: usize = 64 / SHIFT as usize;
/// How much rarer cuts are before the mean length, and more frequent behind it: two bits, the
/// paper's choice.
const NORMALISATION: u64 = 4;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// Words of a language: some are frequent.
    fn text(length: usize, seed: u64) -> Vec<u32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            u32::try_from(state >> 40).unwrap()
        };
        (0..length)
            .map(|_| (next() % 2000).min(next() % 30_000))
            .collect()
    }

    fn lengths(segments: &[Segment]) -> Vec<usize> {
        segments
            .iter()
            .map(|segment| segment.tokens().len())
            .collect()
    }

    /// Other cuts would find nothing of what is stored.
    #[test]
    fn cuts_are_the_same_for_ever() {
        assert_eq!(gear(0), 0x134f_f8f1_31e8_aab8);
        assert_eq!(gear(1), 0xe3b7_fb7a_93ba_f746);
        let cut = ContentCuts::default().segments(&text(2000, 1));
        assert_eq!(lengths(&cut), [194, 203, 323, 196, 294, 316, 105, 207, 162]);
    }

    #[test]
    fn lengths_gather_around_the_mean() {
        let cuts = ContentCuts::default();
        let mut lengths = lengths(&cuts.segments(&text(200_000, 3)));
        lengths.pop();
        let count = lengths.len();
        let mean = lengths.iter().sum::<usize>() / count;
        assert!((154..=250).contains(&mean), "{mean}");
        assert!(
            lengths
                .iter()
                .all(|&it| (cuts.min..=cuts.max).contains(&it))
        );
        let longest = lengths.iter().filter(|&&it| it == cuts.max).count();
        assert!(
            longest * 100 < count,
            "{longest} of {count} are cut by force"
        );
        let near = lengths
            .iter()
            .filter(|&&it| (96..=288).contains(&it))
            .count();
        assert!(near * 10 > count * 7, "{near} of {count}");
    }

    /// A document in a prompt is found again behind any other text.
    #[test]
    fn most_chunks_are_the_same_behind_an_insertion() {
        let cuts = ContentCuts::default();
        let document = text(8192, 7);
        let known: HashSet<_> = cuts
            .segments(&document)
            .iter()
            .map(Segment::tokens)
            .map(Vec::from)
            .collect();
        for inserted in (0..300).step_by(7) {
            let mut prompt = text(inserted, 1000 + inserted as u64);
            prompt.extend(&document);
            let found = cuts.segments(&prompt);
            let same = found.iter().filter(|it| known.contains(it.tokens()));
            let same = same.map(|it| it.tokens().len()).sum::<usize>();
            assert!(same * 10 > document.len() * 7, "{same} behind {inserted}");
        }
    }

    proptest! {
        #[test]
        fn pieces_are_the_text_and_as_long_as_they_may_be(
            text in prop::collection::vec(any::<u32>(), 0..2000),
            min in 0usize..100,
            mean in 0usize..200,
            max in 0usize..300,
        ) {
            let pieces = ContentCuts { min, mean, max }.segments(&text);
            let together: Vec<u32> = pieces.iter().flat_map(Segment::tokens).copied().collect();
            prop_assert_eq!(together, text);
            let (_, whole) = pieces.split_last().unzip();
            for piece in whole.unwrap_or_default() {
                let length = piece.tokens().len();
                prop_assert!(length <= max.max(1) && length >= min.max(1).min(max.max(1)));
            }
        }

        /// Whether there may be a cut is read off the last tokens of the text, even where the
        /// chunk is shorter than those.
        #[test]
        fn cuts_are_of_the_text_and_not_of_the_cut_before(seed in any::<u64>()) {
            let cuts = ContentCuts { min: 2, mean: 24, max: 200 };
            let text = text(3000, seed);
            let bound = |by: u64| u64::MAX / 24 * by;
            let hash = |end: usize| {
                let window = &text[end.saturating_sub(WINDOW)..end];
                window.iter().fold(0u64, |hash, token| (hash << SHIFT).wrapping_add(gear(*token)))
            };
            let mut start = 0;
            let lengths = lengths(&cuts.segments(&text));
            for length in &lengths[..lengths.len() - 1] {
                let end = start + length;
                let by_force = *length == cuts.max;
                prop_assert!(by_force || hash(end) <= bound(NORMALISATION), "{start}..{end}");
                for inside in start + cuts.min..end {
                    prop_assert!(hash(inside) > bound(1) / NORMALISATION, "{inside}");
                }
                start = end;
            }
        }

        /// What made a cut is the window in front of it: the same window, the same hash.
        #[test]
        fn the_hash_forgets(before in prop::collection::vec(any::<u32>(), 0..40)) {
            let roll = |hash: u64, token: &u32| (hash << SHIFT).wrapping_add(gear(*token));
            let window = text(WINDOW, 9);
            let alone = window.iter().fold(0, roll);
            prop_assert_eq!(before.iter().chain(&window).fold(0, roll), alone);
        }
    }
}
