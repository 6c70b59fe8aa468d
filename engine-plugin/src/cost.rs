//! Load or compute: one model, fed with measured times only.
//!
//! Prefill of tokens `from..to` costs `a · tokens + b · pairs` seconds, where `pairs`
//! is the number of (query, key) pairs of causal attention. Fetching costs
//! `latency + bytes ÷ bandwidth`. `a` and `b` are a least-squares fit with forgetting
//! over observed prefills, latency and bandwidth moving averages over observed
//! fetches. Computing grows faster than loading with the length of the prefix, so
//! the gain of loading is largest at an end: all available chunks, or none.
//!
//! Pure: time comes in as durations.

use std::time::Duration;

/// Weight of the past at each new observation.
const FORGETTING: f64 = 0.9;

/// A fetch may take this many times its estimate before it is given up, if
/// computing would take even longer.
const PATIENCE: f64 = 4.0;

/// Shortest patience: scheduling noise is not a late tier.
const MIN_PATIENCE: Duration = Duration::from_millis(20);

/// Seconds per token assumed before the first prefill was seen. High, so that the
/// first fetch is tried; its deadline still holds.
const UNKNOWN_SECONDS_PER_TOKEN: f64 = 1e-3;

/// Latency and bandwidth assumed before the first fetch was seen: one host, one gRPC stream.
const UNKNOWN_LATENCY_SECONDS: f64 = 2e-3;
const UNKNOWN_BYTES_PER_SECOND: f64 = 0.5e9;

/// Measured speeds of computing and of fetching.
#[derive(Clone, Debug)]
pub struct CostModel {
    prefill: Fit,
    latency_seconds: f64,
    bytes_per_second: f64,
}

/// What a fetch turned out to cost.
#[derive(Clone, Copy, Debug)]
pub struct FetchObservation {
    /// From the request to the first layer.
    pub latency: Duration,
    /// Payload bytes that arrived after the first layer.
    pub bytes: u64,
    /// Time they took, without time in which the receiver was busy.
    pub elapsed: Duration,
}

/// What to do with the chunks that are available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Fetch them all, within `budget`.
    Load {
        /// Longest time the fetch may take.
        budget: Duration,
    },
    /// Computing is expected to be faster.
    Compute,
}

impl Default for CostModel {
    fn default() -> Self {
        Self {
            prefill: Fit::default(),
            latency_seconds: UNKNOWN_LATENCY_SECONDS,
            bytes_per_second: UNKNOWN_BYTES_PER_SECOND,
        }
    }
}

impl CostModel {
    /// Learns from a prefill of tokens `from..to` of one sequence.
    pub fn observe_prefill(&mut self, from: usize, to: usize, elapsed: Duration) {
        if from < to {
            self.prefill
                .observe(tokens(from, to), pairs(from, to), elapsed.as_secs_f64());
        }
    }

    /// Learns from a fetch that went well.
    pub fn observe_fetch(&mut self, fetch: FetchObservation) {
        let blend = |old: f64, new: f64| 0.7 * old + 0.3 * new;
        self.latency_seconds = blend(self.latency_seconds, fetch.latency.as_secs_f64());
        let seconds = fetch.elapsed.as_secs_f64();
        // Little data in little time says nothing about bandwidth.
        if fetch.bytes >= 1 << 20 && seconds > 1e-6 {
            let observed = to_f64(fetch.bytes) / seconds;
            self.bytes_per_second = blend(self.bytes_per_second, observed);
        }
    }

    /// Time to compute tokens `from..to` of a sequence.
    pub fn compute_time(&self, from: usize, to: usize) -> Duration {
        let seconds = self.prefill.predict(tokens(from, to), pairs(from, to));
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Time to fetch `bytes`.
    pub fn fetch_time(&self, bytes: u64) -> Duration {
        let seconds = self.latency_seconds + to_f64(bytes) / self.bytes_per_second;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Whether to fetch the first `tokens` tokens of a prompt as `bytes` bytes.
    pub fn decide(&self, tokens: usize, bytes: u64) -> Decision {
        let compute = self.compute_time(0, tokens);
        let fetch = self.fetch_time(bytes);
        if tokens == 0 || fetch >= compute {
            return Decision::Compute;
        }
        let patience = Duration::try_from_secs_f64(fetch.as_secs_f64() * PATIENCE)
            .unwrap_or(Duration::MAX)
            .max(MIN_PATIENCE);
        Decision::Load {
            budget: patience.min(compute),
        }
    }
}

/// Exponentially weighted least squares of `seconds = a · tokens + b · pairs`.
#[derive(Clone, Debug, Default)]
struct Fit {
    tt: f64,
    tp: f64,
    pp: f64,
    ts: f64,
    ps: f64,
}

impl Fit {
    fn observe(&mut self, tokens: f64, pairs: f64, seconds: f64) {
        // Relative errors count, so that long prefills do not drown short ones.
        let weight = 1.0 / (tokens * tokens);
        let add = |sum: &mut f64, value: f64| *sum = *sum * FORGETTING + value * weight;
        add(&mut self.tt, tokens * tokens);
        add(&mut self.tp, tokens * pairs);
        add(&mut self.pp, pairs * pairs);
        add(&mut self.ts, tokens * seconds);
        add(&mut self.ps, pairs * seconds);
    }

    fn predict(&self, tokens: f64, pairs: f64) -> f64 {
        if self.tt == 0.0 {
            return tokens * UNKNOWN_SECONDS_PER_TOKEN;
        }
        let determinant = self.tt * self.pp - self.tp * self.tp;
        // Observations of one shape only cannot tell the two terms apart.
        if determinant > 1e-3 * self.tt * self.pp {
            let a = (self.ts * self.pp - self.ps * self.tp) / determinant;
            let b = (self.ps * self.tt - self.ts * self.tp) / determinant;
            if a >= 0.0 && b >= 0.0 {
                return a * tokens + b * pairs;
            }
        }
        // The linear term alone; where attention is visible it underestimates
        // computing, which errs on the side of not fetching.
        self.ts / self.tt * tokens
    }
}

fn tokens(from: usize, to: usize) -> f64 {
    to_f64(to.saturating_sub(from) as u64)
}

fn pairs(from: usize, to: usize) -> f64 {
    let triangle = |n: usize| {
        let n = to_f64(n as u64);
        n * (n + 1.0) / 2.0
    };
    (triangle(to) - triangle(from)).max(0.0)
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn to_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trained(a: f64, b: f64) -> CostModel {
        let mut model = CostModel::default();
        for to in [64, 256, 1024, 512, 2048, 128, 4096] {
            let seconds = a * tokens(0, to) + b * pairs(0, to);
            model.observe_prefill(0, to, Duration::from_secs_f64(seconds));
        }
        model
    }

    #[test]
    fn recovers_linear_and_quadratic_terms() {
        let model = trained(1e-3, 2e-7);
        let expected = 1e-3 * 8192.0 + 2e-7 * pairs(0, 8192);
        let found = model.compute_time(0, 8192).as_secs_f64();
        assert!((found / expected - 1.0).abs() < 1e-3, "{found} {expected}");
    }

    #[test]
    fn one_shape_gives_a_linear_estimate() {
        let mut model = CostModel::default();
        for _ in 0..5 {
            model.observe_prefill(0, 512, Duration::from_millis(512));
        }
        let found = model.compute_time(0, 1024).as_secs_f64();
        assert!((found - 1.024).abs() < 1e-6, "{found}");
    }

    #[test]
    fn loads_what_is_cheaper_and_never_waits_longer_than_computing() {
        let mut model = trained(1e-3, 0.0);
        for _ in 0..50 {
            model.observe_fetch(FetchObservation {
                latency: Duration::from_millis(1),
                bytes: 1 << 30,
                elapsed: Duration::from_secs(1),
            });
        }
        // 4096 tokens: 4.1 s to compute, 128 MiB in about 0.13 s.
        match model.decide(4096, 128 << 20) {
            Decision::Load { budget } => {
                assert!(budget >= Duration::from_millis(400), "{budget:?}");
                assert!(budget <= model.compute_time(0, 4096));
            }
            Decision::Compute => panic!("loading is 30 times faster"),
        }
        // 16 tokens: 16 ms to compute, 64 MiB in about 63 ms.
        assert_eq!(model.decide(16, 64 << 20), Decision::Compute);
        assert_eq!(model.decide(0, 0), Decision::Compute);
        // Cheaper, but patience is cut to what computing takes.
        match model.decide(64, 32 << 20) {
            Decision::Load { budget } => assert!(budget <= model.compute_time(0, 64)),
            Decision::Compute => panic!("loading is twice as fast"),
        }
    }

    #[test]
    fn a_slow_link_is_noticed() {
        let mut model = trained(1e-4, 0.0);
        assert!(matches!(
            model.decide(4096, 64 << 20),
            Decision::Load { .. }
        ));
        for _ in 0..20 {
            model.observe_fetch(FetchObservation {
                latency: Duration::from_millis(5),
                bytes: 10 << 20,
                elapsed: Duration::from_secs(1),
            });
        }
        assert_eq!(model.decide(4096, 64 << 20), Decision::Compute);
    }
}
