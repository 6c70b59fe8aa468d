//! Load or compute: one model, fed with measured times only.
//!
//! Prefill of tokens `from..to` costs `a · tokens + b · pairs` seconds, where `pairs`
//! is the number of (query, key) pairs of causal attention. Fetching costs
//! `latency + bytes ÷ bandwidth`, each tier of the daemon having its own two. `a` and `b` are a
//! least-squares fit with forgetting over observed prefills, latency and bandwidth moving
//! averages over observed fetches. Computing grows faster than loading with the length of the prefix, so
//! the gain of loading is largest at an end: all available chunks, or none.
//!
//! What was observed grows old: within [`STALE_AFTER`] without a fetch, latency and
//! bandwidth fall back towards what an unknown daemon is credited with, so that one
//! bad minute does not turn the cache off for ever.
//!
//! Pure: time is a parameter.

use std::ops::AddAssign;
use std::time::{Duration, Instant};

use crate::Tier;

/// Weight of the past at each new observation.
const FORGETTING: f64 = 0.9;

/// A fetch may take this many times its estimate before it is given up, if
/// computing would take even longer.
const PATIENCE: f64 = 4.0;

/// Fewest bytes whose time says something about bandwidth.
const MIN_OBSERVED_BYTES: u64 = 1 << 20;

/// Shortest patience: scheduling noise is not a late tier.
const MIN_PATIENCE: Duration = Duration::from_millis(20);

/// Age at which observed fetches have lost half their weight.
const STALE_AFTER: Duration = Duration::from_secs(30);

/// Seconds per token assumed before the first prefill was seen. High, so that the
/// first fetch is tried; its deadline still holds.
const UNKNOWN_SECONDS_PER_TOKEN: f64 = 1e-3;

/// Measured speeds of computing and of fetching.
#[derive(Clone, Debug)]
pub struct CostModel {
    prefill: Fit,
    memory: Source,
    disk: Source,
}

/// What fetches from one tier were like.
#[derive(Clone, Copy, Debug)]
struct Source {
    link: Link,
    /// When `link` was observed last.
    observed: Option<Instant>,
}

/// Bytes to fetch, by the tier that they are read from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierBytes {
    /// From the daemon's memory.
    pub memory: u64,
    /// From its disk.
    pub disk: u64,
}

/// How long fetching takes: `latency + bytes ÷ bandwidth`.
#[derive(Clone, Copy, Debug)]
struct Link {
    latency_seconds: f64,
    seconds_per_byte: f64,
}

/// Latency and bandwidth assumed before the first fetch was seen: one host, one gRPC
/// stream.
const UNKNOWN_LINK: Link = Link {
    latency_seconds: 2e-3,
    seconds_per_byte: 1.0 / 0.5e9,
};

const UNKNOWN_SOURCE: Source = Source {
    link: UNKNOWN_LINK,
    observed: None,
};

/// What a fetch turned out to cost.
#[derive(Clone, Copy, Debug)]
pub struct FetchObservation {
    /// Where most of it was read from.
    pub tier: Tier,
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
            memory: UNKNOWN_SOURCE,
            disk: UNKNOWN_SOURCE,
        }
    }
}

impl TierBytes {
    /// So many of one tier.
    pub fn of(tier: Tier, bytes: u64) -> Self {
        match tier {
            Tier::Memory => Self {
                memory: bytes,
                ..Self::default()
            },
            Tier::Disk => Self {
                disk: bytes,
                ..Self::default()
            },
        }
    }

    /// Together.
    pub fn total(self) -> u64 {
        self.memory.saturating_add(self.disk)
    }

    /// What `of` makes of either.
    pub fn map(self, of: impl Fn(u64) -> u64) -> Self {
        Self {
            memory: of(self.memory),
            disk: of(self.disk),
        }
    }

    /// Where most of them are.
    pub fn tier(self) -> Tier {
        if self.disk > self.memory {
            Tier::Disk
        } else {
            Tier::Memory
        }
    }
}

impl AddAssign for TierBytes {
    fn add_assign(&mut self, other: Self) {
        self.memory = self.memory.saturating_add(other.memory);
        self.disk = self.disk.saturating_add(other.disk);
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

    /// Learns from a fetch that went to its end. One that was given up says that
    /// something is wrong, not how fast the link is; the caller leaves the cache alone
    /// for a while instead.
    pub fn observe_fetch(&mut self, fetch: FetchObservation, now: Instant) {
        match fetch.tier {
            Tier::Memory => self.memory.observe(fetch, now),
            Tier::Disk => self.disk.observe(fetch, now),
        }
    }

    /// Time to compute tokens `from..to` of a sequence.
    pub fn compute_time(&self, from: usize, to: usize) -> Duration {
        self.work_time(tokens(from, to), pairs(from, to))
    }

    /// Time to compute so many rows, which see so many keys together.
    pub fn work_time(&self, rows: f64, pairs: f64) -> Duration {
        let seconds = self.prefill.predict(rows, pairs);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Time to fetch `bytes`, as far as is known at `now`: one tier's behind the other's, and
    /// the longer of their latencies.
    pub fn fetch_time(&self, bytes: TierBytes, now: Instant) -> Duration {
        let (memory, disk) = (self.memory.at(now), self.disk.at(now));
        let latency = match bytes {
            TierBytes { disk: 0, .. } => memory.latency_seconds,
            TierBytes { memory: 0, .. } => disk.latency_seconds,
            _ => memory.latency_seconds.max(disk.latency_seconds),
        };
        let seconds = latency
            + to_f64(bytes.memory) * memory.seconds_per_byte
            + to_f64(bytes.disk) * disk.seconds_per_byte;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Whether to fetch the first `tokens` tokens of a prompt as `bytes`.
    pub fn decide(&self, tokens: usize, bytes: TierBytes, now: Instant) -> Decision {
        self.decide_against(self.compute_time(0, tokens), bytes, now)
    }

    /// Whether to fetch `bytes` instead of computing what takes so long.
    pub fn decide_against(&self, compute: Duration, bytes: TierBytes, now: Instant) -> Decision {
        let fetch = self.fetch_time(bytes, now);
        if fetch >= compute {
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

impl Source {
    fn observe(&mut self, fetch: FetchObservation, now: Instant) {
        let blend = |old: f64, new: f64| 0.7 * old + 0.3 * new;
        let known = self.at(now);
        let seconds = fetch.elapsed.as_secs_f64();
        self.link = Link {
            latency_seconds: blend(known.latency_seconds, fetch.latency.as_secs_f64()),
            // Little data in little time says nothing about bandwidth.
            seconds_per_byte: if fetch.bytes >= MIN_OBSERVED_BYTES {
                blend(known.seconds_per_byte, seconds / to_f64(fetch.bytes))
            } else {
                known.seconds_per_byte
            },
        };
        self.observed = Some(now);
    }

    /// What is believed of the link at `now`: the observed, the more the fresher.
    fn at(&self, now: Instant) -> Link {
        let Some(observed) = self.observed else {
            return UNKNOWN_LINK;
        };
        let age = now.saturating_duration_since(observed).as_secs_f64();
        let weight = 0.5f64.powf(age / STALE_AFTER.as_secs_f64());
        let mix = |seen: f64, unknown: f64| weight * seen + (1.0 - weight) * unknown;
        Link {
            latency_seconds: mix(self.link.latency_seconds, UNKNOWN_LINK.latency_seconds),
            seconds_per_byte: mix(self.link.seconds_per_byte, UNKNOWN_LINK.seconds_per_byte),
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
        // One term alone: the smaller, to err on the side of not fetching.
        (self.ts / self.tt * tokens).min(self.ps / self.pp * pairs)
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

    /// Steps late in a long sequence are slow; they must not make short prompts look so.
    #[test]
    fn late_steps_do_not_inflate_short_prompts() {
        let mut model = CostModel::default();
        for _ in 0..5 {
            model.observe_prefill(30_000, 30_512, Duration::from_secs(2));
        }
        // The same cost per pair; per token it would be a second.
        let found = model.compute_time(0, 256).as_secs_f64();
        assert!(found < 0.01, "{found}");
    }

    fn memory(bytes: u64) -> TierBytes {
        TierBytes::of(Tier::Memory, bytes)
    }

    fn fetched(bytes: u64, millis: u64) -> FetchObservation {
        FetchObservation {
            tier: Tier::Memory,
            latency: Duration::from_millis(1),
            bytes,
            elapsed: Duration::from_millis(millis),
        }
    }

    #[test]
    fn loads_what_is_cheaper_and_never_waits_longer_than_computing() {
        let now = Instant::now();
        let mut model = trained(1e-3, 0.0);
        for _ in 0..50 {
            model.observe_fetch(fetched(1 << 30, 1000), now);
        }
        // 4096 tokens: 4.1 s to compute, 128 MiB in about 0.13 s.
        match model.decide(4096, memory(128 << 20), now) {
            Decision::Load { budget } => {
                assert!(budget >= Duration::from_millis(400), "{budget:?}");
                assert!(budget <= model.compute_time(0, 4096));
            }
            Decision::Compute => panic!("loading is 30 times faster"),
        }
        // 16 tokens: 16 ms to compute, 64 MiB in about 63 ms.
        assert_eq!(model.decide(16, memory(64 << 20), now), Decision::Compute);
        assert_eq!(
            model.decide(0, TierBytes::default(), now),
            Decision::Compute
        );
        // Cheaper, but patience is cut to what computing takes.
        match model.decide(64, memory(32 << 20), now) {
            Decision::Load { budget } => assert!(budget <= model.compute_time(0, 64)),
            Decision::Compute => panic!("loading is twice as fast"),
        }
    }

    #[test]
    fn a_slow_link_is_noticed_and_tried_again_later() {
        let now = Instant::now();
        let mut model = trained(1e-4, 0.0);
        let loads = |model: &CostModel, now| {
            matches!(
                model.decide(4096, memory(64 << 20), now),
                Decision::Load { .. }
            )
        };
        assert!(loads(&model, now));
        for _ in 0..20 {
            model.observe_fetch(fetched(10 << 20, 1000), now);
        }
        assert!(!loads(&model, now));
        assert!(!loads(&model, now + STALE_AFTER));
        assert!(loads(&model, now + STALE_AFTER * 10));
    }
    /// A slow disk says nothing of memory, and what lies on both takes the time of both.
    #[test]
    fn each_tier_has_its_own_speed() {
        let now = Instant::now();
        let mut model = trained(1e-4, 0.0);
        for _ in 0..50 {
            model.observe_fetch(fetched(1 << 30, 500), now);
            let slow = FetchObservation {
                tier: Tier::Disk,
                latency: Duration::from_millis(10),
                ..fetched(1 << 30, 5000)
            };
            model.observe_fetch(slow, now);
        }
        let millis = |memory: u64, disk: u64| {
            let bytes = TierBytes {
                memory: memory << 20,
                disk: disk << 20,
            };
            model.fetch_time(bytes, now).as_secs_f64() * 1e3
        };
        for (found, expected) in [
            (millis(1024, 0), 501.0),
            (millis(0, 1024), 5010.0),
            (millis(1024, 1024), 5510.0),
            (millis(0, 0), 1.0),
        ] {
            assert!((found / expected - 1.0).abs() < 0.01, "{found} {expected}");
        }
        let decision = |tier| model.decide(4096, TierBytes::of(tier, 256 << 20), now);
        assert!(matches!(decision(Tier::Memory), Decision::Load { .. }));
        assert_eq!(decision(Tier::Disk), Decision::Compute);
    }
}
