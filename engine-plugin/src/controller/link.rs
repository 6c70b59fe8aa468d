//! How fast a link is, as its arrivals tell.
//!
//! Arrivals are gathered into windows of [`WINDOW`] of *busy* time: time in which something
//! was asked for and had begun to come. So a burst counts with the silence before it, and
//! silence in which nothing was asked for does not count. A window's rate `y` (natural
//! logarithm of bytes a second) corrects the estimate `x` by exponential smoothing whose
//! gain follows the tracking signal (Trigg & Leach, Operational Research Quarterly 18, 1967):
//!
//! ```text
//! e = y − x      E ← E + β (e − E)      M ← M + β (|e| − M)      x ← x + |E| ÷ M · e
//! ```
//!
//! Errors that cancel out leave `x` alone; errors of one sign, such as after a step, make it
//! follow within a few windows. `M` is the mean absolute error of the forecasts, of which
//! 1.25 `M` is the standard deviation where they are Gaussian, so that a quantile of the rate
//! is `exp(x − z · 1.25 M)`. No error counts for more than a factor of ten, so that an outage
//! does not make everything after it uncertain.
//!
//! A stall says something before it ends: no more than what came, and the arrival that is
//! under way, in the time so far. Where that is less than the forecast, the forecast is made
//! with it, and nothing is kept of it. The round trip is smoothed as in RFC 6298.
//!
//! What was observed grows old: within [`STALE_AFTER`] the estimate falls half-way back to
//! what an unknown link is credited with.
//!
//! Pure: time is a parameter.

use std::time::{Duration, Instant};

/// What is believed of a link.
#[derive(Clone, Debug)]
pub struct LinkEstimate {
    /// `x`: logarithm of bytes a second.
    log_rate: f64,
    /// `E`: smoothed error.
    bias: f64,
    /// `M`: smoothed absolute error.
    spread: f64,
    /// Windows that were seen.
    windows: u32,
    /// Seconds from a request to its first arrival, and their mean deviation.
    round_trip: f64,
    round_trip_deviation: f64,
    round_trips: u32,
    /// Bytes of an arrival, smoothed.
    arrival: f64,
    /// Of the open window.
    bytes: f64,
    seconds: f64,
    /// Of the requests that are under way, if any are.
    busy: Option<Busy>,
    seen: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Busy {
    asked: Instant,
    last: Option<Instant>,
}

/// A forecast of the near future. All numbers are finite, and all rates positive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forecast {
    /// Bytes a second that the link exceeds half of the time.
    pub median: f64,
    /// Bytes a second that it exceeds nine times out of ten.
    pub low: f64,
    /// Bytes a second that it exceeds one time out of ten; a stall under way does not count.
    pub high: f64,
    /// Seconds from a request to its first byte, where nothing else is under way.
    pub round_trip: f64,
}

impl Default for LinkEstimate {
    fn default() -> Self {
        Self {
            log_rate: UNKNOWN_RATE.ln(),
            bias: 0.0,
            spread: UNKNOWN_SPREAD,
            windows: 0,
            round_trip: UNKNOWN_ROUND_TRIP,
            round_trip_deviation: UNKNOWN_ROUND_TRIP / 2.0,
            round_trips: 0,
            arrival: 0.0,
            bytes: 0.0,
            seconds: 0.0,
            busy: None,
            seen: None,
        }
    }
}

impl LinkEstimate {
    /// Something was asked for.
    pub fn requested(&mut self, now: Instant) {
        self.busy.get_or_insert(Busy {
            asked: now,
            last: None,
        });
    }

    /// `bytes` came. `idle`: nothing else is under way.
    pub fn arrived(&mut self, now: Instant, bytes: u64, idle: bool) {
        let bytes = to_f64(bytes);
        self.arrival += if self.arrival == 0.0 {
            bytes
        } else {
            SMOOTHING * (bytes - self.arrival)
        };
        if let Some(busy) = &mut self.busy {
            let before = busy.last.replace(now);
            let asked = busy.asked;
            match before {
                // What came first waited for its request, not for the link alone.
                None => self.answered(seconds(asked, now)),
                Some(before) => {
                    self.bytes += bytes;
                    self.seconds += seconds(before, now);
                }
            }
        }
        if self.seconds >= WINDOW.as_secs_f64() {
            self.observe(self.bytes, self.seconds);
            (self.bytes, self.seconds) = (0.0, 0.0);
        }
        self.seen = Some(now);
        if idle {
            self.busy = None;
        }
    }

    /// Nothing is under way any more, whether it came or not.
    pub fn idle(&mut self) {
        self.busy = None;
    }

    /// What to expect of the link at `now`.
    pub fn forecast(&self, now: Instant) -> Forecast {
        let [log_rate, deviation] = self.aged(now);
        let high = bounded(log_rate + QUANTILE * deviation);
        let [log_rate, deviation] = self.with_stall(now).aged(now);
        Forecast {
            median: bounded(log_rate),
            low: bounded(log_rate - QUANTILE * deviation),
            high,
            round_trip: self.round_trip,
        }
    }

    /// `x`, and the standard deviation of its errors.
    fn aged(&self, now: Instant) -> [f64; 2] {
        let Some(seen) = self.seen.filter(|_| self.windows > 0) else {
            return [self.log_rate, NORMAL * UNKNOWN_SPREAD];
        };
        let fresh = 0.5f64.powf(seconds(seen, now) / STALE_AFTER.as_secs_f64());
        let mix = |seen: f64, unknown: f64| fresh * seen + (1.0 - fresh) * unknown;
        [
            mix(self.log_rate, UNKNOWN_RATE.ln()),
            NORMAL * mix(self.spread.max(LEAST_SPREAD), UNKNOWN_SPREAD),
        ]
    }

    fn with_stall(&self, now: Instant) -> Self {
        let mut stalled = self.clone();
        let Some(busy) = self.busy else {
            return stalled;
        };
        let silence = match busy.last {
            Some(last) => self.seconds + seconds(last, now),
            None => {
                let due = self.round_trip + 4.0 * self.round_trip_deviation;
                seconds(busy.asked, now) - due
            }
        };
        let most = self.bytes + self.arrival;
        if silence >= WINDOW.as_secs_f64() && (most / silence).max(1.0).ln() < self.log_rate {
            stalled.observe(most, silence);
        }
        stalled
    }

    fn observe(&mut self, bytes: f64, seconds: f64) {
        let rate = (bytes / seconds).max(1.0).ln();
        self.windows = self.windows.saturating_add(1);
        if self.windows == 1 {
            self.log_rate = rate;
            self.spread = FIRST_SPREAD;
            return;
        }
        // A long silence is as much news as the windows that it would have filled.
        let windows = (seconds / WINDOW.as_secs_f64()).max(1.0);
        let error = rate - self.log_rate;
        let counted = error.clamp(-MOST_ERROR, MOST_ERROR);
        let weight = SMOOTHING.max(1.0 / f64::from(self.windows));
        let weight = 1.0 - (1.0 - weight).powf(windows);
        self.bias += weight * (counted - self.bias);
        self.spread += weight * (counted.abs() - self.spread);
        let signal = (self.bias.abs() / self.spread.max(LEAST_SPREAD)).clamp(LEAST_GAIN, 1.0);
        let gain = 1.0 - (1.0 - signal).powf(windows);
        self.log_rate += gain * error.clamp(-MOST_ERROR * windows, MOST_ERROR * windows);
    }

    fn answered(&mut self, seconds: f64) {
        self.round_trips = self.round_trips.saturating_add(1);
        if self.round_trips == 1 {
            self.round_trip = seconds;
            self.round_trip_deviation = seconds / 2.0;
            return;
        }
        let error = seconds - self.round_trip;
        self.round_trip_deviation += (error.abs() - self.round_trip_deviation) / 4.0;
        self.round_trip += error / 8.0;
    }
}

/// Seconds from `from` to `to`, none if it comes first.
fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}

fn bounded(log_rate: f64) -> f64 {
    log_rate.clamp(0.0, MOST_RATE.ln()).exp()
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn to_f64(value: u64) -> f64 {
    value as f64
}

/// Busy time of a window.
pub const WINDOW: Duration = Duration::from_millis(20);
/// Age at which observations have lost half their weight.
const STALE_AFTER: Duration = Duration::from_secs(30);
/// `β`: weight of the newest window.
const SMOOTHING: f64 = 0.2;
/// Nine tenths of a normal distribution lie above so many deviations below its mean.
const QUANTILE: f64 = 1.2816;
/// Standard deviation of a normal distribution, in mean absolute deviations.
const NORMAL: f64 = 1.2533;
/// The least of `|E| ÷ M`.
const LEAST_GAIN: f64 = 0.1;
/// The least `M`: links that were steady need not stay so.
const LEAST_SPREAD: f64 = 0.2;
/// `M` after the first window.
const FIRST_SPREAD: f64 = 0.4;
/// `ln 10`.
const MOST_ERROR: f64 = std::f64::consts::LN_10;
/// Bytes a second, seconds, and `M` of a link of which nothing is known: 1 Gbit/s, or ten
/// times more or less.
const UNKNOWN_RATE: f64 = 125e6;
const UNKNOWN_ROUND_TRIP: f64 = 2e-3;
const UNKNOWN_SPREAD: f64 = 1.8;
/// Faster than any link.
const MOST_RATE: f64 = 1e13;
