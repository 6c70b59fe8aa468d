//! Leaves a failing daemon alone for a while.

use std::time::{Duration, Instant};

/// Says whether a daemon may be asked: not while it is open. Opens on failure, for a time that
/// doubles with each failure in a row, up to 32 times.
///
/// Attempts that began before it opened last saw the same outage: their failures
/// do not count again.
#[derive(Debug)]
pub struct Breaker {
    cooldown: Duration,
    failures: u32,
    opened: Option<Instant>,
}

const MAX_DOUBLINGS: u32 = 5;

impl Breaker {
    /// A closed one, that stays open for `cooldown` after a first failure.
    pub fn new(cooldown: Duration) -> Self {
        Self {
            cooldown,
            failures: 0,
            opened: None,
        }
    }

    /// Whether an attempt may begin.
    pub fn allows(&self, now: Instant) -> bool {
        self.opened.is_none_or(|opened| {
            let doublings = self.failures.saturating_sub(1).min(MAX_DOUBLINGS);
            now >= opened + self.cooldown * (1 << doublings)
        })
    }

    /// An attempt that began at `begun` failed.
    pub fn failed(&mut self, begun: Instant, now: Instant) {
        if self.opened.is_none_or(|opened| begun >= opened) {
            self.failures = self.failures.saturating_add(1);
            self.opened = Some(now);
        }
    }

    /// An attempt succeeded, which closes it.
    pub fn succeeded(&mut self) {
        self.failures = 0;
        self.opened = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn cooldown_doubles_and_success_resets_it() {
        let start = Instant::now();
        let mut breaker = Breaker::new(SECOND);
        assert!(breaker.allows(start));
        breaker.failed(start, start);
        assert!(!breaker.allows(start + SECOND / 2));
        assert!(breaker.allows(start + SECOND));
        breaker.failed(start + SECOND, start + SECOND);
        assert!(!breaker.allows(start + SECOND * 2));
        assert!(breaker.allows(start + SECOND * 3));
        breaker.succeeded();
        assert!(breaker.allows(start));
        for _ in 0..100 {
            breaker.failed(start, start);
        }
        assert!(!breaker.allows(start + SECOND * 31));
        assert!(breaker.allows(start + SECOND * 32));
    }

    /// Six attempts in flight when the daemon fails are one outage.
    #[test]
    fn one_outage_counts_once() {
        let start = Instant::now();
        let mut breaker = Breaker::new(SECOND);
        for attempt in 1..=6 {
            breaker.failed(start, start + SECOND / 100 * attempt);
        }
        assert!(breaker.allows(start + SECOND + SECOND / 100));
    }
}
