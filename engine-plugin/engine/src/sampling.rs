//! The choice of the next token from a row of logits.
//!
//! Order of the steps, as in Hugging Face transformers: temperature, `top_k`,
//! `top_p` over what `top_k` left, one draw. Candidates are ordered by logit,
//! equal ones by id, so every step has one possible outcome.
//!
//! Invariant: the token depends on the logits, the parameters, the seed and
//! the number of draws before it, and on nothing else. Weights use an `exp` of
//! our own rather than the platform's, and ChaCha8 gives the same stream
//! everywhere, so one seed gives one text on any machine that computes the
//! same logits.

#![forbid(unsafe_code)]

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How the next token is chosen; always valid.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    temperature: f32,
    top_k: Option<usize>,
    top_p: f32,
    seed: Option<u64>,
}

impl SamplingParams {
    /// Checks and keeps the four values.
    ///
    /// `temperature` 0 chooses the likeliest token, whatever the rest says.
    /// `top_k` none and `top_p` 1 keep the whole vocabulary. Without a seed,
    /// [`Sampler::new`] takes the caller's.
    ///
    /// # Errors
    /// [`InvalidSampling`] names the first field that is out of range.
    pub fn new(
        temperature: f32,
        top_k: Option<usize>,
        top_p: f32,
        seed: Option<u64>,
    ) -> Result<Self, InvalidSampling> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(InvalidSampling::Temperature(temperature));
        }
        if top_k == Some(0) {
            return Err(InvalidSampling::TopK);
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(InvalidSampling::TopP(top_p));
        }
        Ok(Self {
            temperature,
            top_k,
            top_p,
            seed,
        })
    }

    /// Always the likeliest token.
    pub const fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            seed: None,
        }
    }

    /// Divisor of the logits; 0 means greedy.
    pub const fn temperature(&self) -> f32 {
        self.temperature
    }

    /// Candidates kept; at least 1.
    pub const fn top_k(&self) -> Option<usize> {
        self.top_k
    }

    /// Probability mass kept, in `(0, 1]`.
    pub const fn top_p(&self) -> f32 {
        self.top_p
    }

    /// Seed of the draws, if the caller chose one.
    pub const fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// Whether no draw is made.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}

/// A sampling parameter is out of range.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidSampling {
    /// Negative, infinite or not a number.
    #[error("temperature must be a finite number of at least 0, not {0}")]
    Temperature(f32),
    /// Zero candidates.
    #[error("top_k must be at least 1; leave it out to keep every token")]
    TopK,
    /// Outside `(0, 1]`.
    #[error("top_p must be above 0 and at most 1, not {0}")]
    TopP(f32),
}

impl InvalidSampling {
    /// The field at fault, by the name it has in a request.
    pub const fn field(&self) -> &'static str {
        match self {
            Self::Temperature(_) => "temperature",
            Self::TopK => "top_k",
            Self::TopP(_) => "top_p",
        }
    }
}

/// A row of logits is empty or holds NaN or an infinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the logits are not finite")]
pub struct NotFinite;

/// One chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Its id.
    pub id: u32,
    /// Natural logarithm of its probability before temperature and filters.
    pub logprob: f32,
}

/// Draws the tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at its first draw; `fallback_seed` serves when `params` has no seed.
    pub fn new(params: SamplingParams, fallback_seed: u64) -> Self {
        let seed = params.seed.unwrap_or(fallback_seed);
        Self {
            params,
            rng: ChaCha8Rng::seed_from_u64(seed),
        }
    }

    /// Chooses a token from one row of logits, in vocabulary order.
    ///
    /// Draws once per call, or not at all when greedy.
    ///
    /// # Errors
    /// [`NotFinite`] when the row is empty or holds NaN or an infinity.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Choice, NotFinite> {
        let best = argmax(logits)?;
        let id = if self.params.is_greedy() {
            best.id
        } else {
            self.draw(logits, best.logit)
        };
        let chosen = logits.get(id as usize).copied().unwrap_or(best.logit);
        Ok(Choice {
            id,
            logprob: log_softmax(logits, best.logit, chosen),
        })
    }

    fn draw(&mut self, logits: &[f32], max: f32) -> u32 {
        let temperature = f64::from(self.params.temperature);
        let weigh = |logit: f32| exp_nonpositive((f64::from(logit) - f64::from(max)) / temperature);
        let weighted = |c: Candidate| (c.id, weigh(c.logit));
        let all = candidates(logits);
        let keeps_all = self.params.top_k.is_none_or(|k| k >= logits.len());
        let kept: Vec<(u32, f64)> = match (keeps_all, self.params.top_p < 1.0) {
            (true, false) => all.map(weighted).collect(),
            (true, true) => self.nucleus(all.collect(), weigh),
            (false, narrow) => {
                let mut all: Vec<Candidate> = all.collect();
                let k = self.params.top_k.unwrap_or(all.len());
                all.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
                all.truncate(k);
                if narrow {
                    self.nucleus(all, weigh)
                } else {
                    all.sort_unstable_by(|a, b| b.cmp(a));
                    all.into_iter().map(weighted).collect()
                }
            }
        };
        self.pick(&kept)
    }

    /// The likeliest candidates up to and including the one that reaches `top_p`.
    fn nucleus(&self, all: Vec<Candidate>, weigh: impl Fn(f32) -> f64) -> Vec<(u32, f64)> {
        let total: f64 = all.iter().map(|c| weigh(c.logit)).sum();
        let enough = f64::from(self.params.top_p) * total;
        // A heap, because a nucleus is small and a vocabulary is not.
        let mut heap = BinaryHeap::from(all);
        let mut kept = Vec::new();
        let mut mass = 0.0;
        while mass < enough
            && let Some(c) = heap.pop()
        {
            let weight = weigh(c.logit);
            mass += weight;
            kept.push((c.id, weight));
        }
        kept
    }

    /// One draw from a non-empty list of weighted ids.
    fn pick(&mut self, kept: &[(u32, f64)]) -> u32 {
        let total: f64 = kept.iter().map(|&(_, weight)| weight).sum();
        // 53 bits, the precision of f64, of the stream's next 64.
        let unit = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = unit * total;
        let mut last = 0;
        for &(id, weight) in kept {
            if weight > 0.0 {
                last = id;
                if left < weight {
                    return id;
                }
                left -= weight;
            }
        }
        // Rounding in the subtractions can leave a sliver past the end.
        last
    }
}

/// A finite logit and its token, greatest logit first, then lowest id.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        // Zeros of either sign are one value; the id decides between them.
        let by_logit = self.logit.partial_cmp(&other.logit);
        by_logit
            .unwrap_or(Ordering::Equal)
            .then_with(|| other.id.cmp(&self.id))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

fn candidates(logits: &[f32]) -> impl Iterator<Item = Candidate> {
    (0..)
        .zip(logits)
        .map(|(id, &logit)| Candidate { id, logit })
}

fn argmax(logits: &[f32]) -> Result<Candidate, NotFinite> {
    if !logits.iter().all(|logit| logit.is_finite()) {
        return Err(NotFinite);
    }
    candidates(logits).max().ok_or(NotFinite)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a logarithm is reported in single precision"
)]
fn log_softmax(logits: &[f32], max: f32, chosen: f32) -> f32 {
    let max = f64::from(max);
    let sum: f64 = logits
        .iter()
        .map(|&logit| exp_nonpositive(f64::from(logit) - max))
        .sum();
    (f64::from(chosen) - max - sum.ln()) as f32
}

/// `e^x` for `x <= 0`, within 1e-15 relative, by IEEE operations only.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; the Taylor series of degree 13
/// gives `e^r`, and `2^n` is put into the exponent bits. Anything below the
/// least normal number is 0.
#[expect(
    clippy::cast_possible_truncation,
    reason = "n is within -1022..=0 after the early return"
)]
fn exp_nonpositive(x: f64) -> f64 {
    // ln 2 in two parts; n * LN_2_HIGH is exact for |n| < 2^20.
    const LN_2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
    const LN_2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
    const SMALLEST: f64 = -708.0;
    if x < SMALLEST {
        return 0.0;
    }
    let n = (x * std::f64::consts::LOG2_E).round();
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let sum = INVERSE_FACTORIALS
        .iter()
        .rev()
        .fold(0.0, |sum, term| sum * r + term);
    let scale = f64::from_bits(((n as i64 + 1023) as u64) << 52);
    sum * scale
}

/// `1 / k!` for `k` in `0..=13`.
const INVERSE_FACTORIALS: [f64; 14] = {
    let mut terms = [1.0; 14];
    let mut k = 1;
    while k < terms.len() {
        // Factorials up to 13! are exact, so each term is rounded once.
        let mut factorial = 1.0;
        let mut i = 2;
        while i <= k {
            factorial *= i as f64;
            i += 1;
        }
        terms[k] = 1.0 / factorial;
        k += 1;
    }
    terms
};

#[cfg(test)]
mod tests;
