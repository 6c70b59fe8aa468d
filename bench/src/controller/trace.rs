//! Seeded traces of a link's bandwidth.

use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// How bandwidth changes. Factors are of the trace's base rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It does not, but for 5 % from one step to the next.
    Constant,
    /// A quarter, half, all or twice, for 1.5 s in the mean.
    Steps,
    /// From 0.3 up to 1.7 in two to six seconds, and back at once.
    Sawtooth,
    /// Markov-modulated, as a moving receiver sees: five states from 0.1 to 2.2, left for a
    /// neighbour after 300 ms in the mean, and fading by 30 % within them.
    Lte,
    /// Steady, with outages of 0.2 to 1.5 s, every 3 s in the mean.
    Outage,
}

/// Bandwidth over time: so many bytes in each [`STEP`], over and over again.
#[derive(Clone, Debug)]
pub(super) struct Trace {
    bytes: Vec<f64>,
    /// Bytes before each step.
    before: Vec<f64>,
}

impl Kind {
    pub(super) const ALL: [Self; 5] = [
        Self::Constant,
        Self::Steps,
        Self::Sawtooth,
        Self::Lte,
        Self::Outage,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Steps => "steps",
            Self::Sawtooth => "sawtooth",
            Self::Lte => "lte",
            Self::Outage => "outage",
        }
    }
}

impl Trace {
    /// `base`: bytes a second.
    pub(super) fn new(kind: Kind, base: f64, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut factors = Vec::with_capacity(STEPS);
        match kind {
            Kind::Constant => {
                factors.extend((0..STEPS).map(|_| (0.05 * gaussian(&mut rng)).exp()));
            }
            Kind::Steps => {
                while factors.len() < STEPS {
                    let factor = [0.25, 0.5, 1.0, 2.0][rng.random_range(0..4)];
                    hold(&mut factors, factor, exponential(&mut rng, 1.5));
                }
            }
            Kind::Sawtooth => {
                let period = steps(rng.random_range(2.0..6.0));
                let rising = |step: usize| 0.3 + 1.4 * as_f64(step % period) / as_f64(period);
                factors.extend((0..STEPS).map(rising));
            }
            Kind::Lte => {
                let mut state = rng.random_range(0..LTE_STATES.len());
                while factors.len() < STEPS {
                    for _ in 0..steps(exponential(&mut rng, 0.3)) {
                        factors.push(LTE_STATES[state] * (0.3 * gaussian(&mut rng)).exp());
                    }
                    let up = rng.next_u32() & 1 == 0;
                    state = match (up, state) {
                        (true, state) if state + 1 < LTE_STATES.len() => state + 1,
                        (_, 0) => 1,
                        (_, state) => state - 1,
                    };
                }
            }
            Kind::Outage => {
                while factors.len() < STEPS {
                    for _ in 0..steps(exponential(&mut rng, 3.0)) {
                        factors.push((0.1 * gaussian(&mut rng)).exp());
                    }
                    hold(&mut factors, 0.0, rng.random_range(0.2..1.5));
                }
            }
        }
        factors.truncate(STEPS);
        let bytes: Vec<f64> = factors.iter().map(|factor| factor * base * STEP).collect();
        let before = bytes.iter().scan(0.0, |sum, bytes| {
            let before = *sum;
            *sum += bytes;
            Some(before)
        });
        Self {
            before: before.collect(),
            bytes,
        }
    }

    /// Bytes that can pass until `at`, seconds from the beginning.
    pub(super) fn until(&self, at: f64) -> f64 {
        let whole = (at / STEP).floor();
        let rounds = (whole / as_f64(STEPS)).floor();
        let step = as_index(whole - rounds * as_f64(STEPS)).min(STEPS - 1);
        let of_step = self.bytes[step] * (at / STEP - whole);
        rounds * self.all() + self.before[step] + of_step
    }

    /// When `bytes` more than before `from` have passed.
    pub(super) fn after(&self, from: f64, bytes: f64) -> f64 {
        let goal = self.until(from) + bytes;
        let rounds = (goal / self.all()).floor();
        let rest = goal - rounds * self.all();
        let step = self.before.partition_point(|before| *before < rest);
        let step = step.saturating_sub(1);
        let of_step = if self.bytes[step] > 0.0 {
            (rest - self.before[step]) / self.bytes[step]
        } else {
            0.0
        };
        let at = (rounds * as_f64(STEPS) + as_f64(step) + of_step.min(1.0)) * STEP;
        at.max(from)
    }

    fn all(&self) -> f64 {
        self.before[STEPS - 1] + self.bytes[STEPS - 1]
    }
}

fn hold(factors: &mut Vec<f64>, factor: f64, seconds: f64) {
    factors.extend(std::iter::repeat_n(factor, steps(seconds)));
}

fn steps(seconds: f64) -> usize {
    as_index((seconds / STEP).round()).max(1)
}

fn exponential(rng: &mut ChaCha8Rng, mean: f64) -> f64 {
    -mean * (1.0 - rng.random::<f64>()).ln()
}

/// Of mean 0 and deviation 1 (Box & Muller 1958).
pub(super) fn gaussian(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
pub(super) fn as_f64(value: usize) -> f64 {
    value as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a step of a trace"
)]
fn as_index(value: f64) -> usize {
    value as usize
}

/// Seconds.
const STEP: f64 = 0.01;
/// Of a minute.
const STEPS: usize = 6000;
const LTE_STATES: [f64; 5] = [0.1, 0.4, 0.8, 1.3, 2.2];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_lets_pass_what_it_says() {
        for kind in Kind::ALL {
            let trace = Trace::new(kind, 1e8, 5);
            for (from, bytes) in [(0.0, 1e6), (3.3, 5e7), (59.9, 3e8), (130.0, 1e10)] {
                let at = trace.after(from, bytes);
                let passed = trace.until(at) - trace.until(from);
                assert!(
                    (passed / bytes - 1.0).abs() < 1e-6,
                    "{kind:?} {passed} {bytes}"
                );
            }
        }
        let outage = Trace::new(Kind::Outage, 1e8, 5);
        assert!(outage.bytes.contains(&0.0));
    }
}
