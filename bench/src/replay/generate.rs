//! Seeded traces for tests and demonstrations: no measurements of real users.
//!
//! Requests come as a Poisson process, two a second. Of the new conversations, half
//! start from one of eight system prompts of 1 to 6 blocks; a quarter ask about one of
//! 400 documents of 4 to 40 blocks, chosen by Zipf's law; a quarter are one-shot
//! prompts, never seen again. Conversations, not one-shots, go on with probability 0.6
//! after every turn, after a pause that is exponential with a mean of two minutes, but
//! 20 seconds at least. A turn adds the answer and a new question.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rand::{Rng, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::trace::{BLOCK_TOKENS, Line};

/// `requests` lines.
pub(crate) fn lines(requests: u32, seed: u64) -> Vec<Line> {
    let mut generator = Generator {
        rng: ChaCha8Rng::seed_from_u64(seed),
        chains: Chains::default(),
        texts: FIRST_OWN_TEXT,
    };
    let mut due: BinaryHeap<Reverse<(u64, u64)>> = BinaryHeap::new();
    let mut waiting: HashMap<u64, Conversation> = HashMap::new();
    let mut arrival = 0;
    let mut lines = Vec::new();
    for number in 0..u64::from(requests) {
        let next = due.peek().map(|Reverse(next)| *next);
        let (now, mut conversation) = match next {
            Some((at, number)) if at <= arrival => {
                due.pop();
                let conversation = waiting.remove(&number);
                (at, conversation.expect("what is due waits"))
            }
            _ => {
                let now = arrival;
                arrival += generator.exponential(ARRIVAL_MILLIS);
                (now, generator.conversation())
            }
        };
        let answer = 20 + generator.exponential(300.0);
        lines.push(generator.line(now, &conversation, answer));
        if conversation.continues && generator.rng.random_bool(0.6) {
            let question = 20 + generator.exponential(200.0);
            conversation.grow(answer + question, generator.text());
            due.push(Reverse((
                now + PAUSE_MILLIS + generator.exponential(MEAN_PAUSE_MILLIS),
                number,
            )));
            waiting.insert(number, conversation);
        }
    }
    lines
}

/// A prompt: texts one after another, with their tokens.
struct Conversation {
    parts: Vec<(u64, u64)>,
    continues: bool,
}

impl Conversation {
    fn grow(&mut self, tokens: u64, text: u64) {
        self.parts.push((text, tokens));
    }
}

struct Generator {
    rng: ChaCha8Rng,
    chains: Chains,
    texts: u64,
}

impl Generator {
    fn conversation(&mut self) -> Conversation {
        let own = self.text();
        let kind = self.rng.random_range(0..4);
        let mut parts = Vec::new();
        let question = match kind {
            0 | 1 => {
                let system = self.rng.random_range(0..SYSTEM_PROMPTS);
                parts.push((system, BLOCK_TOKENS * (1 + system % 6)));
                50 + self.exponential(1000.0)
            }
            2 => {
                let document = self.zipf(DOCUMENTS);
                let blocks = 4 + document * 7 % 37;
                parts.push((SYSTEM_PROMPTS + document, BLOCK_TOKENS * blocks));
                50 + self.exponential(200.0)
            }
            _ => 200 + self.exponential(6000.0),
        };
        parts.push((own, question));
        Conversation {
            parts,
            continues: kind < 3,
        }
    }

    fn line(&mut self, timestamp: u64, conversation: &Conversation, answer: u64) -> Line {
        let parts = &conversation.parts;
        let hash_ids = self.chains.blocks(parts, BLOCK_TOKENS);
        let input_length = tokens(parts);
        Line {
            timestamp,
            input_length,
            output_length: answer,
            hash_ids,
        }
    }

    fn text(&mut self) -> u64 {
        self.texts += 1;
        self.texts
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number of moderate size"
    )]
    fn exponential(&mut self, mean: f64) -> u64 {
        let uniform: f64 = self.rng.random_range(f64::EPSILON..1.0);
        (-uniform.ln() * mean) as u64
    }

    /// A number below `count`, with a probability that falls as its inverse.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a number below `count`"
    )]
    fn zipf(&mut self, count: u64) -> u64 {
        let uniform: f64 = self.rng.random();
        let number = (count as f64 + 1.0).powf(uniform) - 1.0;
        (number as u64).min(count - 1)
    }
}

/// Numbers blocks of prompts, such that a number stands for its block and all before it.
#[derive(Debug, Default)]
pub(crate) struct Chains {
    /// The number of a block, by the number before and what the block is made of.
    ids: HashMap<(u64, Vec<(u64, u64)>), u64>,
}

impl Chains {
    /// The blocks of a prompt, which is `parts`: texts one after another, with their tokens.
    /// The last block may be shorter than the others.
    pub(crate) fn blocks(&mut self, parts: &[(u64, u64)], block_tokens: u64) -> Vec<u64> {
        let length = tokens(parts);
        let mut blocks = Vec::new();
        let mut before = u64::MAX;
        for block in 0..length.div_ceil(block_tokens) {
            let end = length.min((block + 1) * block_tokens);
            let content = spans(parts, block * block_tokens, end);
            let next = self.ids.len() as u64;
            before = *self.ids.entry((before, content)).or_insert(next);
            blocks.push(before);
        }
        blocks
    }
}

fn tokens(parts: &[(u64, u64)]) -> u64 {
    parts.iter().map(|part| part.1).sum()
}

/// What the tokens from `start` to `end` are made of: texts, and how much of each.
fn spans(parts: &[(u64, u64)], start: u64, end: u64) -> Vec<(u64, u64)> {
    let mut at = 0;
    let mut spans = Vec::new();
    for &(text, tokens) in parts {
        let (from, to) = (start.max(at), end.min(at + tokens));
        if from < to {
            spans.push((text, to - at));
        }
        at += tokens;
    }
    spans
}

const ARRIVAL_MILLIS: f64 = 1000.0;
const PAUSE_MILLIS: u64 = 20_000;
const MEAN_PAUSE_MILLIS: f64 = 100_000.0;
const SYSTEM_PROMPTS: u64 = 8;
const DOCUMENTS: u64 = 400;
const FIRST_OWN_TEXT: u64 = SYSTEM_PROMPTS + DOCUMENTS;

#[cfg(test)]
mod tests {
    use super::super::trace::Trace;
    use super::*;

    #[test]
    fn a_seed_always_gives_the_same_trace_of_valid_lines() {
        let made = lines(500, 7);
        assert_eq!(made, lines(500, 7));
        assert_ne!(made, lines(500, 8));
        let text: String = made
            .iter()
            .map(|line| serde_json::to_string(line).unwrap() + "\n")
            .collect();
        let trace = Trace::read(text.as_bytes()).unwrap();
        assert_eq!(trace.requests.len(), 500);
    }
}
