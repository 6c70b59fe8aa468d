//! Timed loops, and the rows made of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::cpu;
use crate::report::{Row, median, percentile};

/// How many objects are under way at once: one, and enough to saturate a device.
pub(super) const IN_FLIGHT: [usize; 2] = [1, 4];

/// One rate per entry of [`IN_FLIGHT`], in GB/s.
pub(super) type Rates = [f64; IN_FLIGHT.len()];

/// One loop.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) bytes: u64,
    /// Of all workers together.
    pub(super) wall: Duration,
    /// CPU time that passed meanwhile.
    pub(super) cpu: Duration,
    /// Time of each operation, in µs.
    pub(super) micros: Vec<f64>,
}

impl Sample {
    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    fn gigabytes(&self) -> f64 {
        self.bytes as f64 / 1e9
    }
}

/// How long to loop, over what.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    pub(super) window: Duration,
    pub(super) object_bytes: u64,
    /// Which operation comes next. Goes on where the last loop ended.
    pub(super) next: &'a AtomicUsize,
    /// A process that works for ours, whose CPU time counts too.
    pub(super) server: Option<u32>,
}

impl Work<'_> {
    /// Runs `operation` with consecutive indices for as long as the window, in one
    /// thread per state; each at least once.
    ///
    /// # Errors
    /// The first that an operation gives.
    pub(super) fn drive<S: Send>(
        self,
        states: &mut [S],
        operation: impl Fn(&mut S, usize) -> anyhow::Result<()> + Sync,
    ) -> anyhow::Result<Sample> {
        let cpu_before = self.cpu()?;
        let begun = Instant::now();
        let work = |state: &mut S| -> anyhow::Result<Vec<f64>> {
            let mut micros = Vec::new();
            loop {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                let start = Instant::now();
                operation(state, index)?;
                micros.push(start.elapsed().as_secs_f64() * 1e6);
                if begun.elapsed() >= self.window {
                    return Ok(micros);
                }
            }
        };
        let results: Vec<_> = thread::scope(|scope| {
            let work = &work;
            let workers: Vec<_> = states
                .iter_mut()
                .map(|state| scope.spawn(move || work(state)))
                .collect();
            workers.into_iter().map(|worker| worker.join()).collect()
        });
        let wall = begun.elapsed();
        let cpu = self.cpu()?.saturating_sub(cpu_before);
        let mut micros = Vec::new();
        for result in results {
            match result {
                Ok(times) => micros.extend(times?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(Sample {
            bytes: micros.len() as u64 * self.object_bytes,
            wall,
            cpu,
            micros,
        })
    }

    fn cpu(&self) -> anyhow::Result<Duration> {
        let ours = cpu::here()?;
        Ok(match self.server {
            Some(process) => ours + cpu::of(process)?,
            None => ours,
        })
    }
}

/// All rounds of one operation: the samples of each entry of [`IN_FLIGHT`].
#[derive(Debug, Default)]
pub(super) struct Series([Vec<Sample>; IN_FLIGHT.len()]);

impl Series {
    /// Adds a round with `IN_FLIGHT[at]` objects under way.
    pub(super) fn push(&mut self, at: usize, sample: Sample) {
        self.0[at].push(sample);
    }

    /// Median throughputs.
    pub(super) fn rates(&self) -> Rates {
        IN_FLIGHT.map(|in_flight| self.median(in_flight, |s| s.gigabytes() / s.wall.as_secs_f64()))
    }

    fn median(&self, in_flight: usize, value: impl Fn(&Sample) -> f64) -> f64 {
        let samples = IN_FLIGHT.iter().zip(&self.0);
        let mut values: Vec<f64> = samples
            .filter(|(entry, _)| **entry == in_flight)
            .flat_map(|(_, samples)| samples.iter().map(&value))
            .collect();
        median(&mut values)
    }

    /// The rows called `name`, and what belongs to them; see the suite's documentation.
    pub(super) fn rows(&self, name: &str, limits: Option<Rates>) -> Vec<Row> {
        let rates = self.rates();
        let mut best = 0;
        for at in 1..rates.len() {
            if rates[at] > rates[best] {
                best = at;
            }
        }
        let throughput = |name: String, at: usize| {
            let row = Row::new(name, rates[at], "GB/s");
            match limits {
                Some(limits) => row.against(limits[at], rates[at] / limits[at]),
                None => row,
            }
        };
        let mut rows = vec![throughput(name.to_owned(), best)];
        for (at, in_flight) in IN_FLIGHT.into_iter().enumerate() {
            rows.push(throughput(format!("{name}/c{in_flight}"), at));
        }
        // Of one in flight: with more, an operation also waits for the others.
        let mut micros: Vec<f64> = self.0[0]
            .iter()
            .flat_map(|sample| sample.micros.iter().copied())
            .collect();
        for (quantile, share) in [("p50", 0.5), ("p99", 0.99)] {
            let value = percentile(&mut micros, share);
            rows.push(Row::new(format!("{name}/{quantile}"), value, "us"));
        }
        let cpu = self.median(IN_FLIGHT[best], |s| s.cpu.as_secs_f64() / s.gigabytes());
        rows.push(Row::new(format!("{name}/cpu"), cpu, "s/GB"));
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(gigabytes: u64, millis: u64, micros: &[f64]) -> Sample {
        Sample {
            bytes: gigabytes * 1_000_000_000,
            wall: Duration::from_millis(millis),
            cpu: Duration::from_millis(millis * 2),
            micros: micros.to_vec(),
        }
    }

    #[test]
    fn rows_take_the_better_number_in_flight_and_its_limit() {
        let mut series = Series::default();
        for (one, four) in [(1000, 500), (2000, 250), (500, 400)] {
            series.push(0, sample(1, one, &[10.0, 20.0]));
            series.push(1, sample(1, four, &[1000.0]));
        }
        assert_eq!(series.rates(), [1.0, 2.5]);
        let rows = serde_json::to_value(series.rows("get", Some([2.0, 5.0]))).unwrap();
        let find = |name: &str| {
            let mut rows = rows.as_array().unwrap().iter();
            rows.find(|row| row["name"] == name).unwrap().clone()
        };
        let best = find("get");
        assert_eq!((&best["value"], &best["limit"]), (&2.5.into(), &5.0.into()));
        assert_eq!(best["ratio"], 0.5);
        assert_eq!(find("get/c1")["ratio"], 0.5);
        assert_eq!(find("get/c4")["value"], 2.5);
        assert_eq!(find("get/p50")["value"], 10.0, "of one in flight");
        assert_eq!(find("get/p99")["value"], 20.0);
        assert_eq!(find("get/cpu")["value"], 0.8, "of four in flight");
    }

    #[test]
    fn every_index_is_worked_on_once_and_loops_continue() {
        let next = AtomicUsize::new(0);
        let work = Work {
            window: Duration::ZERO,
            object_bytes: 10,
            next: &next,
            server: Some(std::process::id()),
        };
        let mut seen = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..2 {
            let sample = work.drive(&mut seen, |seen, index| {
                seen.push(index);
                Ok(())
            });
            assert_eq!(sample.unwrap().bytes, 30);
        }
        let mut seen = seen.concat();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn an_error_ends_the_loop() {
        let next = AtomicUsize::new(0);
        let work = Work {
            window: Duration::from_secs(60),
            object_bytes: 1,
            next: &next,
            server: None,
        };
        let failed = work.drive(&mut [()], |(), _| anyhow::bail!("gone"));
        assert_eq!(failed.unwrap_err().to_string(), "gone");
    }
}
