//! The raw limit of a device, as fio measures it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use super::sample::{IN_FLIGHT, Rates};
use crate::report::median;

/// One file that fio reads and overwrites.
pub(super) struct Fio {
    file: PathBuf,
    file_bytes: u64,
    window: Duration,
    engines: Vec<Engine>,
}

/// How fio asks the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Engine {
    Psync,
    IoUring,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Psync => "psync",
            Self::IoUring => "io_uring",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// Random reads.
    Read,
    /// Overwrites in sequence, synced one by one.
    Write,
}

/// One fio job: an engine, and an entry of [`IN_FLIGHT`] by its index.
type Job = (Engine, usize);

impl Fio {
    /// Lays out a file of `file_bytes` in `dir`, and finds out which engines work.
    ///
    /// # Errors
    /// fio cannot write there.
    pub(super) fn prepare(dir: &Path, file_bytes: u64, window: Duration) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut fio = Self {
            file: dir.join("data"),
            file_bytes,
            window,
            engines: vec![Engine::Psync],
        };
        // Written once in whole, so that no block reads as a hole.
        fio.call(&["--name=layout", "--rw=write", "--bs=1m", "--end_fsync=1"].map(Into::into))?;
        // Containers often forbid io_uring.
        let probe = ["--name=probe", "--rw=read", "--bs=4k", "--number_ios=1"];
        let engine = format!("--ioengine={}", Engine::IoUring);
        let arguments: Vec<String> = probe.map(Into::into).into_iter().chain([engine]).collect();
        match fio.call(&arguments) {
            Ok(_) => fio.engines.push(Engine::IoUring),
            Err(error) => eprintln!("fio cannot use io_uring here, only psync: {error:#}"),
        }
        Ok(fio)
    }

    pub(super) fn engine_names(&self) -> Vec<String> {
        self.engines.iter().map(Engine::to_string).collect()
    }

    fn call(&self, job: &[String]) -> anyhow::Result<String> {
        let output = Command::new("fio")
            .args(["--output-format=json", "--thread", "--group_reporting"])
            .args(["--direct=1", "--eta=never", "--name=global"])
            .arg(format!("--filename={}", self.file.display()))
            .arg(format!("--size={}", self.file_bytes))
            .args(job)
            .output()
            .context("cannot start fio")?;
        ensure!(
            output.status.success(),
            "fio ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8(output.stdout)?)
    }
}

/// The limit of one direction and block size: rounds of both engines, of which the
/// faster stays after the first.
pub(super) struct Limit<'a> {
    fio: &'a Fio,
    direction: Direction,
    block_bytes: u64,
    /// How much of the file is used.
    region_bytes: u64,
    rounds: BTreeMap<Job, Vec<f64>>,
}

impl<'a> Limit<'a> {
    /// With blocks of `block_bytes`, in the first `region_bytes` of the file.
    pub(super) fn new(
        fio: &'a Fio,
        direction: Direction,
        block_bytes: u64,
        region_bytes: u64,
    ) -> Self {
        Self {
            fio,
            direction,
            block_bytes,
            region_bytes,
            rounds: BTreeMap::new(),
        }
    }

    /// One round.
    pub(super) fn measure(&mut self) -> anyhow::Result<()> {
        let entries = 0..IN_FLIGHT.len();
        let jobs: Vec<Job> = if self.rounds.is_empty() {
            let engines = self.fio.engines.iter();
            engines
                .flat_map(|engine| entries.clone().map(|at| (*engine, at)))
                .collect()
        } else {
            entries.filter_map(|at| self.fastest(at)).collect()
        };
        let mut arguments = Vec::new();
        for &(engine, at) in &jobs {
            arguments.extend(self.job(engine, IN_FLIGHT[at]));
        }
        let rates = parse(&self.fio.call(&arguments)?, self.direction)?;
        ensure!(rates.len() == jobs.len(), "fio did not report every job");
        for (job, rate) in jobs.into_iter().zip(rates) {
            self.rounds.entry(job).or_default().push(rate);
        }
        Ok(())
    }

    fn job(&self, engine: Engine, in_flight: usize) -> Vec<String> {
        let mut arguments = vec![
            format!("--name={engine}-{in_flight}"),
            "--stonewall".into(),
            format!("--ioengine={engine}"),
            format!("--bs={}", self.block_bytes),
            "--time_based".into(),
            format!("--runtime={}ms", self.fio.window.as_millis()),
        ];
        let deep = self.direction == Direction::Read && engine == Engine::IoUring;
        match self.direction {
            Direction::Read => {
                arguments.extend(["--rw=randread".into(), "--randrepeat=0".into()]);
                arguments.push(format!("--size={}", self.region_bytes));
            }
            Direction::Write => {
                // Each job a part of the file. One block in flight per job: a sync that
                // is queued beside a write need not cover it.
                let part = self.region_bytes / in_flight as u64;
                arguments.extend(["--rw=write".into(), "--overwrite=1".into()]);
                arguments.push("--fdatasync=1".into());
                arguments.extend([
                    format!("--size={part}"),
                    format!("--offset_increment={part}"),
                ]);
            }
        }
        arguments.push(if deep {
            format!("--iodepth={in_flight}")
        } else {
            format!("--numjobs={in_flight}")
        });
        arguments
    }

    /// Medians of the rounds so far.
    pub(super) fn rates(&self) -> Option<Rates> {
        let mut rates = Rates::default();
        for (at, rate) in rates.iter_mut().enumerate() {
            let rounds = self.rounds.get(&self.fastest(at)?)?;
            *rate = median(&mut rounds.clone());
        }
        Some(rates)
    }

    /// The engine of the most rounds, and of the faster first one.
    fn fastest(&self, at: usize) -> Option<Job> {
        let jobs = self.rounds.iter().filter(|((_, entry), _)| *entry == at);
        let first = |rounds: &Vec<f64>| rounds.first().copied().unwrap_or(0.0);
        jobs.max_by(|(_, a), (_, b)| first(a).total_cmp(&first(b)))
            .map(|(job, _)| *job)
    }
}

/// What `--output-format=json` prints, as far as it is read here.
#[derive(Deserialize)]
struct Output {
    jobs: Vec<JobOutput>,
}

#[derive(Deserialize)]
struct JobOutput {
    jobname: String,
    error: i32,
    read: Transfer,
    write: Transfer,
}

#[derive(Deserialize)]
struct Transfer {
    /// Bytes per second.
    bw_bytes: u64,
}

/// The rate of each job, in GB/s.
#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
fn parse(output: &str, direction: Direction) -> anyhow::Result<Vec<f64>> {
    // Warnings may precede the object.
    let start = output.find('{').context("fio printed no JSON")?;
    let output: Output = serde_json::from_str(&output[start..]).context("fio's JSON")?;
    let rate = |job: JobOutput| {
        let transfer = match direction {
            Direction::Read => job.read,
            Direction::Write => job.write,
        };
        let name = job.jobname;
        ensure!(job.error == 0, "fio's job {name} failed: {}", job.error);
        ensure!(transfer.bw_bytes > 0, "fio's job {name} moved nothing");
        Ok(transfer.bw_bytes as f64 / 1e9)
    };
    output.jobs.into_iter().map(rate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cut from what fio 3.33 prints.
    const OUTPUT: &str = r#"fio: a warning
{
  "fio version" : "fio-3.33",
  "time" : "Sat Nov 21 14:42:23 2026",
  "jobs" : [
    {
      "jobname" : "psync-1", "groupid" : 0, "error" : 0, "eta" : 0, "elapsed" : 1,
      "job options" : { "name" : "psync-1", "rw" : "randread", "bs" : "1048576" },
      "read" : { "io_bytes" : 260046848, "bw_bytes" : 1036043219, "bw" : 1011761,
        "iops" : 988.047809, "runtime" : 251, "total_ios" : 248 },
      "write" : { "io_bytes" : 0, "bw_bytes" : 0, "bw" : 0, "iops" : 0.000000 },
      "usr_cpu" : 0.8
    },
    {
      "jobname" : "io_uring-4", "groupid" : 1, "error" : 0,
      "read" : { "io_bytes" : 569376768, "bw_bytes" : 1879131247 },
      "write" : { "io_bytes" : 0, "bw_bytes" : 0 }
    }
  ],
  "disk_util" : [ { "name" : "vda", "util" : 24.6 } ]
}"#;

    fn fio() -> Fio {
        Fio {
            file: "/data/file".into(),
            file_bytes: 64 << 20,
            window: Duration::from_millis(150),
            engines: vec![Engine::Psync, Engine::IoUring],
        }
    }

    #[test]
    fn rates_come_in_the_order_of_jobs() {
        let rates = parse(OUTPUT, Direction::Read).unwrap();
        assert_eq!(rates, [1.036_043_219, 1.879_131_247]);
    }

    #[test]
    fn output_without_a_result_is_an_error() {
        for (output, complaint) in [
            ("", "no JSON"),
            ("{", "fio's JSON"),
            ("{\"jobs\": [{}]}", "fio's JSON"),
            (&OUTPUT.replace("\"error\" : 0", "\"error\" : 5"), "failed"),
        ] {
            let error = parse(output, Direction::Read).unwrap_err().to_string();
            assert!(error.contains(complaint), "{error}");
        }
        assert!(
            parse(OUTPUT, Direction::Write).is_err(),
            "nothing was written"
        );
    }

    #[test]
    fn jobs_have_as_many_blocks_in_flight_as_asked() {
        let fio = fio();
        let job = |direction, engine| {
            let limit = Limit::new(&fio, direction, 4096, 32 << 20);
            limit.job(engine, 4).join(" ")
        };
        let read = job(Direction::Read, Engine::IoUring);
        assert!(read.contains("--iodepth=4") && read.contains("--bs=4096"));
        assert!(read.contains("--size=33554432"));
        let read = job(Direction::Read, Engine::Psync);
        assert!(read.contains("--numjobs=4") && !read.contains("--fdatasync"));
        let write = job(Direction::Write, Engine::IoUring);
        assert!(write.contains("--numjobs=4") && write.contains("--fdatasync=1"));
        assert!(write.contains("--size=8388608"));
    }

    #[test]
    fn the_faster_engine_of_the_first_round_stays() {
        let fio = fio();
        let mut limit = Limit::new(&fio, Direction::Read, 4096, 32 << 20);
        assert_eq!(limit.rates(), None);
        for (job, rates) in [
            ((Engine::Psync, 0), vec![3.0, 1.0, 2.0]),
            ((Engine::IoUring, 0), vec![2.5]),
            ((Engine::Psync, 1), vec![4.0]),
            ((Engine::IoUring, 1), vec![5.0, 7.0]),
        ] {
            limit.rounds.insert(job, rates);
        }
        assert_eq!(limit.rates(), Some([2.0, 6.0]));
    }
}
