//! Seeded retrieval traces: the times of real requests, and chunks that nobody retrieved.
//!
//! No public trace says which chunks stood where in real prompts. So times and lengths of
//! answers come from a trace of requests, or from the Poisson process of
//! [`replay`](crate::replay), and the rest is drawn:
//!
//! * A *new conversation* has one of `--prefixes` canonical prefixes, and an anchor, a chunk
//!   of the corpus of `--corpus` chunks; both by Zipf's law with the exponent `--zipf`.
//! * `--chunks` chunks are retrieved. Those beside the anchor are, each with probability
//!   `--topical`, of the anchor's topic, else of the whole corpus; by the same law within
//!   either. Topics are `--topic` chunks next to each other in popularity, so that every
//!   chunk is as popular as Zipf's law has it, but that no prompt has a chunk twice: where
//!   one is drawn again, the next in popularity that is not there yet takes its place.
//! * They are in order of relevance, the largest first: what a chunk has by itself, uniform in
//!   \[0, 1), and noise of this request, uniform in \[0, `--order-noise`).
//! * With probability `--follow-ups` a request goes on with one of the conversations whose last
//!   request is at least `--pause` and at most `--window` seconds ago, any of them, if there is
//!   one. It keeps the prefix, and each chunk with probability `--kept`; others are retrieved
//!   in place of the rest, and all are put in order anew.
//! * Questions have 32 to 64 tokens, and no two are the same.
//!
//! Repeated questions, and histories that grow with a conversation, are not modelled. Both
//! would favour prefix caching.

use std::collections::VecDeque;
use std::ops::Range;

use clap::Args;
use rand::{Rng, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::share;
use super::trace::Request;
use crate::corpus::mix;

/// What prompts are made of.
#[derive(Clone, Debug, Args)]
pub(crate) struct Workload {
    /// Chunks of the corpus.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub(crate) corpus: u32,
    /// Exponent of Zipf's law, by which chunks and prefixes are popular.
    #[arg(long, default_value_t = 1.0, value_parser = not_negative)]
    pub(crate) zipf: f64,
    /// Chunks of a prompt.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) chunks: u32,
    /// Canonical prefixes.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) prefixes: u32,
    /// Chunks of a topic.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) topic: u32,
    /// Probability that a chunk is of the anchor's topic.
    #[arg(long, default_value_t = 0.7, value_parser = share)]
    pub(crate) topical: f64,
    /// Noise of relevance, by which chunks are in order; what they have by themselves is
    /// below 1. 0: the same chunks are always in the same order.
    #[arg(long, default_value_t = 1.0, value_parser = not_negative)]
    pub(crate) order_noise: f64,
    /// Share of requests that go on with a conversation.
    #[arg(long, default_value_t = 0.3, value_parser = share)]
    pub(crate) follow_ups: f64,
    /// Probability that a follow-up keeps a chunk.
    #[arg(long, default_value_t = 0.75, value_parser = share)]
    pub(crate) kept: f64,
    /// Seconds before a conversation goes on.
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    pub(crate) pause: u32,
    /// Seconds after which it goes on no more.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub(crate) window: u32,
    /// Seed of what is drawn.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

/// When a request comes, and how long its answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    pub(crate) millis: u64,
    pub(crate) output_tokens: u64,
}

/// A number that may be 0.
fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.0..f64::INFINITY).contains(&number) => Ok(number),
        _ => Err("give a number that is not negative".to_owned()),
    }
}

/// One request per arrival.
pub(crate) fn requests(workload: &Workload, arrivals: &[Arrival]) -> Vec<Request> {
    let mut generator = Generator {
        workload,
        rng: ChaCha8Rng::seed_from_u64(workload.seed),
        prefixes: Zipf::new(workload.prefixes, workload.zipf),
        corpus: Zipf::new(workload.corpus, workload.zipf),
        recent: VecDeque::new(),
    };
    let request = |arrival| generator.request(arrival);
    arrivals.iter().map(request).collect()
}

struct Generator<'a> {
    workload: &'a Workload,
    rng: ChaCha8Rng,
    prefixes: Zipf,
    corpus: Zipf,
    /// Conversations that may go on, in order of their last request.
    recent: VecDeque<Conversation>,
}

struct Conversation {
    millis: u64,
    prefix: u32,
    /// A chunk of the topic.
    anchor: u32,
    chunks: Vec<u32>,
}

impl Generator<'_> {
    fn request(&mut self, arrival: &Arrival) -> Request {
        let earlier = match self.rng.random_bool(self.workload.follow_ups) {
            true => self.continued(arrival.millis),
            false => None,
        };
        let (prefix, anchor, mut chunks) = match earlier {
            Some(mut earlier) => {
                let kept = |_: &u32| self.rng.random_bool(self.workload.kept);
                earlier.chunks.retain(kept);
                (earlier.prefix, earlier.anchor, earlier.chunks)
            }
            None => {
                let prefix = self.draw(Of::Prefixes, &[]).unwrap_or_default();
                let anchor = self.draw(Of::Corpus, &[]).unwrap_or_default();
                (prefix, anchor, vec![anchor])
            }
        };
        let wanted = self.workload.chunks.min(self.workload.corpus) as usize;
        while chunks.len() < wanted {
            let topical = self.rng.random_bool(self.workload.topical);
            let drawn = match topical {
                true => self.draw(Of::Topic(anchor), &chunks),
                false => None,
            };
            chunks.extend(drawn.or_else(|| self.draw(Of::Corpus, &chunks)));
        }
        self.order(&mut chunks);
        self.recent.push_back(Conversation {
            millis: arrival.millis,
            prefix,
            anchor,
            chunks: chunks.clone(),
        });
        Request {
            timestamp: arrival.millis,
            prefix,
            chunks,
            question_length: self.rng.random_range(QUESTION_TOKENS),
            output_length: arrival.output_tokens,
        }
    }

    /// Takes a conversation that goes on now.
    fn continued(&mut self, now: u64) -> Option<Conversation> {
        let age = |conversation: &Conversation| now.saturating_sub(conversation.millis);
        let window = u64::from(self.workload.window) * 1000;
        while self.recent.front().is_some_and(|first| age(first) > window) {
            self.recent.pop_front();
        }
        let pause = u64::from(self.workload.pause) * 1000;
        let ready = self.recent.partition_point(|next| age(next) >= pause);
        let chosen = (ready > 0).then(|| self.rng.random_range(0..ready))?;
        self.recent.remove(chosen)
    }

    /// One that is not in `taken`, if there is one.
    fn draw(&mut self, of: Of, taken: &[u32]) -> Option<u32> {
        let (law, range) = match of {
            Of::Prefixes => (&self.prefixes, 0..self.workload.prefixes),
            Of::Corpus => (&self.corpus, 0..self.workload.corpus),
            Of::Topic(chunk) => {
                let first = chunk - chunk % self.workload.topic;
                let end = first.saturating_add(self.workload.topic);
                (&self.corpus, first..end.min(self.workload.corpus))
            }
        };
        let drawn = law.draw(range.clone(), self.rng.random());
        let mut behind = (drawn..range.end).chain(range.start..drawn);
        behind.find(|next| !taken.contains(next))
    }

    fn order(&mut self, chunks: &mut [u32]) {
        let mut relevance = |chunk: u32| {
            let noise: f64 = self.rng.random();
            own_relevance(chunk) + self.workload.order_noise * noise
        };
        let mut scored: Vec<(f64, u32)> = chunks.iter().map(|&c| (relevance(c), c)).collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for (place, (_, chunk)) in chunks.iter_mut().zip(scored) {
            *place = chunk;
        }
    }
}

/// What is drawn from.
#[derive(Clone, Copy)]
enum Of {
    Prefixes,
    Corpus,
    /// The topic of a chunk.
    Topic(u32),
}

/// What a chunk has by itself, in [0, 1).
#[expect(clippy::cast_precision_loss, reason = "32 bits")]
fn own_relevance(chunk: u32) -> f64 {
    (mix(OWN_RELEVANCE, chunk.into()) >> 32) as f64 / 2f64.powi(32)
}

/// Zipf's law: the number n, from 0, with a probability that falls as (n + 1) to the minus
/// exponent.
struct Zipf {
    /// Up to which value numbers below this one take.
    cumulative: Vec<f64>,
}

impl Zipf {
    fn new(count: u32, exponent: f64) -> Self {
        let mut total = 0.0;
        let mut cumulative = vec![0.0];
        for number in 1..=count {
            total += f64::from(number).powf(-exponent);
            cumulative.push(total);
        }
        Self { cumulative }
    }

    /// One of a range, by the law restricted to it, from a number that is uniform in [0, 1).
    fn draw(&self, range: Range<u32>, uniform: f64) -> u32 {
        let at = |number: u32| self.cumulative[number as usize];
        let (low, high) = (at(range.start), at(range.end));
        let value = low + uniform * (high - low);
        let number = self.cumulative.partition_point(|&upto| upto <= value);
        let number = u32::try_from(number.saturating_sub(1)).unwrap_or(u32::MAX);
        // Where weights are too small to be told apart, rounding leads out of the range.
        number.clamp(range.start, range.end - 1)
    }
}

/// Tokens of questions.
const QUESTION_TOKENS: std::ops::RangeInclusive<u32> = 32..=64;
/// Seed of what chunks have by themselves, the same for all traces.
const OWN_RELEVANCE: u64 = 0x7265_6c65_7661_6e74;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::retrieval::tests::workload;

    fn made(workload: &Workload, count: u64) -> Vec<Request> {
        let arrival = |number| Arrival {
            millis: number * 500,
            output_tokens: number,
        };
        requests(workload, &(0..count).map(arrival).collect::<Vec<_>>())
    }

    #[test]
    fn a_seed_always_gives_the_same_requests_which_can_be_read() {
        let workload = workload();
        let first = made(&workload, 400);
        assert_eq!(first, made(&workload, 400));
        let other = Workload {
            seed: workload.seed + 1,
            ..workload
        };
        assert_ne!(first, made(&other, 400));
        let text: String = first
            .iter()
            .map(|request| serde_json::to_string(request).unwrap() + "\n")
            .collect();
        assert_eq!(super::super::trace::read(text.as_bytes()).unwrap(), first);
        for request in &first {
            assert_eq!(request.chunks.len(), 6);
            assert!(QUESTION_TOKENS.contains(&request.question_length));
        }
    }

    #[test]
    fn popularity_falls_as_zipfs_law_has_it() {
        let law = Zipf::new(3, 1.0);
        // 1, 1/2 and 1/3 of 11/6.
        let drawn = [0.0, 0.54, 0.55, 0.81, 0.82, 0.999].map(|uniform| law.draw(0..3, uniform));
        assert_eq!(drawn, [0, 0, 1, 1, 2, 2]);
        let drawn = [0.0, 0.59, 0.61].map(|uniform| law.draw(1..3, uniform));
        assert_eq!(drawn, [1, 1, 2]);
        let steep = Zipf::new(1000, 2.0);
        let even = Zipf::new(1000, 0.0);
        assert_eq!(
            (steep.draw(0..1000, 0.6), even.draw(0..1000, 0.6)),
            (0, 600)
        );
    }

    #[test]
    fn chunks_of_a_topic_come_together() {
        let apart = |topical| {
            let workload = Workload {
                topical,
                follow_ups: 0.0,
                ..workload()
            };
            let topics = made(&workload, 300).into_iter().map(move |request| {
                let topics = request.chunks.iter().map(|chunk| chunk / workload.topic);
                topics.collect::<HashSet<_>>().len()
            });
            topics.sum::<usize>()
        };
        assert_eq!(apart(1.0), 300);
        assert!(apart(0.0) > 2 * 300);
    }

    #[test]
    fn without_noise_chunks_have_one_order() {
        let orders = |order_noise| {
            // Always the same six.
            let workload = Workload {
                corpus: 6,
                order_noise,
                ..workload()
            };
            let orders = made(&workload, 100).into_iter().map(|made| made.chunks);
            orders.collect::<HashSet<_>>().len()
        };
        assert_eq!(orders(0.0), 1);
        assert!(orders(1.0) > 20);
    }

    #[test]
    fn follow_ups_keep_chunks_of_a_request_between_pause_and_window() {
        let workload = Workload {
            corpus: 1_000_000,
            zipf: 0.0,
            topical: 0.0,
            follow_ups: 1.0,
            kept: 1.0,
            order_noise: 0.0,
            ..workload()
        };
        // Every half second one, and the pause is ten seconds: twenty conversations begin.
        let requests = made(&workload, 200);
        let begun: HashSet<_> = requests.iter().map(|made| &made.chunks).collect();
        assert_eq!(begun.len(), 20);
        let forgetful = Workload {
            window: 9,
            ..workload
        };
        let requests = made(&forgetful, 200);
        let begun: HashSet<_> = requests.iter().map(|made| &made.chunks).collect();
        assert_eq!(begun.len(), 200);
    }
}
