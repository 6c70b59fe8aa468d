//! Leaves a failing daemon alone for a while.

use std::time::{Duration, Instant};

/// Opens on failure, for a time that doubles with each failure in a row.
#[derive(Debug)]
pub(crate) struct Breaker {
    cooldown: Duration,
    failures: u32,
    open_until: Option<Instant>,
}

const MAX_DOUBLINGS: u32 = 5;

impl Breaker {
    pub(crate) fn new(cooldown: Duration) -> Self {
        Self {
            cooldown,
            failures: 0,
            open_until: None,
        }
    }

    pub(crate) fn allows(&self, now: Instant) -> bool {
        self.open_until.is_none_or(|until| now >= until)
    }

    pub(crate) fn failed(&mut self, now: Instant) {
        let factor = 1 << self.failures.min(MAX_DOUBLINGS);
        self.failures = self.failures.saturating_add(1);
        self.open_until = Some(now + self.cooldown * factor);
    }

    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
        self.open_until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cooldown_doubles_and_success_resets_it() {
        let second = Duration::from_secs(1);
        let start = Instant::now();
        let mut breaker = Breaker::new(second);
        assert!(breaker.allows(start));
        breaker.failed(start);
        assert!(!breaker.allows(start + second / 2));
        assert!(breaker.allows(start + second));
        breaker.failed(start + second);
        assert!(!breaker.allows(start + second * 2));
        assert!(breaker.allows(start + second * 3));
        breaker.succeeded();
        assert!(breaker.allows(start));
        for _ in 0..100 {
            breaker.failed(start);
        }
        assert!(breaker.allows(start + second * 32));
    }
}
