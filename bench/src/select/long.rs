//! Contexts of 32k tokens, of models of random weights.
//!
//! The text is without meaning, but goes from topic to topic: every 128 tokens come from a
//! few words, as documents do. `flat` is a model as it is before training, whose attention
//! is nearly even; `skewed` the same with queries and keys scaled, so that a few pages have
//! most of it.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::mass::Masses;
use super::{Digested, Way};
use crate::checkpoint::{self, Attention, Shape};
use crate::quality::reader::Reader;
use crate::report::Report;

const SHAPE: Shape = Shape {
    hidden: 256,
    layers: 4,
    heads: 4,
    kv_heads: 2,
    intermediate: 512,
    vocabulary: 2048,
    positions: 32_768,
};
const TOPIC_TOKENS: usize = 128;
const TOPIC_WORDS: u32 = 24;
/// Tokens behind the context along which mass is measured.
const TAIL: usize = 12;
/// By how much `skewed` scales queries, and keys.
const SKEW: f32 = 6.0;

pub(super) fn run(ways: &[Way], quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let context = if quick { 8 * 1024 } else { 32 * 1024 } - TAIL;
    let text = text(context + TAIL);
    for (name, scale) in [("flat", 1.0), ("skewed", SKEW)] {
        eprintln!("reading {context} tokens with random weights, {name}");
        let dir = tempfile::tempdir()?;
        let attention = Attention {
            scale,
            ..Attention::default()
        };
        checkpoint::write_with(dir.path(), &SHAPE, attention)?;
        let mut reader = Reader::load(dir.path(), context + 64)?;
        let pages = reader.prefill(&text[..context])?;
        let digests = Digested::of(&mut reader, &pages)?;
        let mut masses = Masses::new(ways, SHAPE.layers);
        let tails = [text[context..].to_vec()];
        masses.measure(&mut reader, &pages, &digests, &tails, ways)?;
        masses.report(&format!("{name}/"), report);
    }
    Ok(())
}

fn text(tokens: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let vocabulary = u32::try_from(SHAPE.vocabulary).unwrap_or(u32::MAX);
    let mut words = Vec::new();
    let mut text = Vec::with_capacity(tokens);
    for token in 0..tokens {
        if token % TOPIC_TOKENS == 0 {
            words = (0..TOPIC_WORDS)
                .map(|_| rng.random_range(0..vocabulary))
                .collect();
        }
        text.push(words[rng.random_range(0..words.len())]);
    }
    text
}
