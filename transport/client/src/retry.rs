//! When a failed attempt is worth another one.

use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

use crate::{CallError, RetryConfig};

/// What a second attempt could break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// Nothing: the call may have run before without harm.
    Always,
    /// Something, unless the daemon said that it did nothing.
    IfRefused,
}

/// The attempts of one call.
#[derive(Debug)]
pub(crate) struct Attempts {
    config: RetryConfig,
    repeat: Repeat,
    made: u32,
}

impl Attempts {
    pub(crate) const fn new(config: RetryConfig, repeat: Repeat) -> Self {
        Self {
            config,
            repeat,
            made: 0,
        }
    }

    /// How long to wait before the next attempt after `error`; `None` to give up.
    pub(crate) fn after(&mut self, error: &CallError) -> Option<Duration> {
        self.made += 1;
        if self.made >= self.config.attempts {
            return None;
        }
        let asked = match error {
            CallError::Throttled { retry_after, .. } => *retry_after,
            CallError::Unavailable { .. } if self.repeat == Repeat::Always => Duration::ZERO,
            _ => return None,
        };
        let doublings = (self.made - 1).min(20);
        let ceiling = self
            .config
            .base
            .saturating_mul(1 << doublings)
            .min(self.config.max);
        Some(asked + ceiling.mul_f64(random_fraction()))
    }
}

/// A random number in `0.0..1.0`. Jitter needs no better generator than the one
/// the standard library seeds its hash maps with.
fn random_fraction() -> f64 {
    let bits = RandomState::new().hash_one(0u8) >> 11;
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit an f64 exactly")]
    let fraction = bits as f64 / (1u64 << 53) as f64;
    fraction
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: RetryConfig = RetryConfig {
        attempts: 3,
        base: Duration::from_millis(10),
        max: Duration::from_millis(15),
    };

    fn throttled() -> CallError {
        CallError::Throttled {
            reason: "full".into(),
            retry_after: Duration::from_millis(100),
        }
    }

    #[test]
    fn waits_as_asked_and_gives_up() {
        let mut attempts = Attempts::new(CONFIG, Repeat::IfRefused);
        for _ in 0..2 {
            let wait = attempts.after(&throttled()).unwrap();
            assert!(wait >= Duration::from_millis(100), "{wait:?}");
            assert!(wait <= Duration::from_millis(115), "{wait:?}");
        }
        assert_eq!(attempts.after(&throttled()), None);
    }

    #[test]
    fn does_not_repeat_what_will_fail_again() {
        let mut attempts = Attempts::new(CONFIG, Repeat::Always);
        assert_eq!(attempts.after(&CallError::DeadlineExceeded), None);
        let mut attempts = Attempts::new(RetryConfig::NEVER, Repeat::Always);
        assert_eq!(attempts.after(&throttled()), None);
    }

    #[test]
    fn jitter_fills_its_range() {
        let draws: Vec<f64> = (0..200).map(|_| random_fraction()).collect();
        assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
        assert!(draws.iter().any(|draw| *draw < 0.2));
        assert!(draws.iter().any(|draw| *draw > 0.8));
    }
}
