//! Ends a store or a daemon at any moment, and checks what is left.
//!
//! ```text
//! Load ── put, get, delete ──▶ Target: a store on a Faulty medium, or a daemon
//!   │                             │ power cut, or kill -9
//!   └─▶ Ledger ── expectations ──▶ check ──▶ violations
//! ```
//!
//! * [`Chunks`]: chunks whose bytes follow from their number.
//! * [`Ledger`]: what was acknowledged, and what must follow from it.
//! * [`Target`]: what is loaded and checked; [`PowerCuts`] and [`Kills`] end one.
//! * [`Violation`]: what a check found. A check gives a list and does not panic, so
//!   that a test can hold the checks against broken devices.

mod chunks;
mod kill;
mod ledger;
mod load;
mod power;

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use kvasir_store::{DirectIo, Medium as _};

pub use self::chunks::{Chunks, Got};
pub use self::kill::Kills;
pub use self::ledger::{Expectation, Ledger};
pub use self::load::{Load, Target};
pub use self::power::{PowerCuts, StoreTarget, get};

/// What must never be seen after a crash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// An acknowledged chunk is not there.
    Lost(u32),
    /// A chunk whose deletion was acknowledged is there again.
    Undead(u32),
    /// A read gave other bytes than were stored.
    Wrong(u32),
    /// A read failed although the device works.
    Unreadable(u32),
    /// The files take other space than is accounted for.
    Space {
        /// Bytes that the segments' files take.
        allocated: u64,
        /// Bytes of chunks, and of one header a file.
        accounted: u64,
    },
    /// More is stored than the capacity allows.
    OverCapacity {
        /// Bytes of chunks.
        bytes: u64,
        /// The limit.
        capacity: u64,
    },
    /// Another start finds something else, without a crash between them.
    Unstable(u32),
}

/// A violation, and where it was found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Seed of the run.
    pub seed: u64,
    /// How many crashes came before.
    pub crash: u32,
    /// What was found.
    pub violation: Violation,
}

/// What became of a series of crashes.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Crashes that were checked.
    pub points: u64,
    /// Chunks that had to be there, all checks together.
    pub kept: u64,
    /// Chunks that had to be gone.
    pub gone: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

impl Outcome {
    /// Adds another series.
    pub fn merge(&mut self, other: Self) {
        self.points += other.points;
        self.kept += other.kept;
        self.gone += other.gone;
        self.findings.extend(other.findings);
    }

    fn record(&mut self, seed: u64, crash: u32, checked: &Checked) {
        self.points += 1;
        self.kept += checked.kept;
        self.gone += checked.gone;
        let findings = checked.violations.iter().map(|violation| Finding {
            seed,
            crash,
            violation: violation.clone(),
        });
        self.findings.extend(findings);
    }
}

/// What one check saw.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// Which chunks are there.
    pub found: Vec<bool>,
    /// Chunks that had to be there.
    pub kept: u64,
    /// Chunks that had to be gone.
    pub gone: u64,
    /// What is wrong.
    pub violations: Vec<Violation>,
}

/// Reads every chunk of a healthy target whose directory is `data`.
///
/// # Errors
/// The directory cannot be read.
pub async fn check<T: Target>(
    target: &T,
    data: &Path,
    expected: &[Expectation],
) -> io::Result<Checked> {
    let mut checked = Checked::default();
    for (number, expectation) in (0..).zip(expected) {
        let got = target.get(number).await;
        checked.found.push(got == Got::Right);
        checked.kept += u64::from(*expectation == Expectation::Present);
        checked.gone += u64::from(*expectation == Expectation::Absent);
        checked.violations.extend(match (got, expectation) {
            (Got::Wrong, _) => Some(Violation::Wrong(number)),
            (Got::Failed, _) => Some(Violation::Unreadable(number)),
            (Got::Miss, Expectation::Present) => Some(Violation::Lost(number)),
            (Got::Right, Expectation::Absent) => Some(Violation::Undead(number)),
            _ => None,
        });
    }
    checked.violations.extend(check_space(target, data).await?);
    Ok(checked)
}

/// Holds the space that segments take against what the target accounts for. What was
/// just read and dropped is freed a moment later, so this waits for a while.
async fn check_space<T: Target>(target: &T, data: &Path) -> io::Result<Option<Violation>> {
    let mut tries = 200;
    loop {
        let (bytes, capacity) = target.disk_usage().await;
        let (allocated, files) = allocated(&data.join("segments"))?;
        let accounted = bytes + files * BLOCK_BYTES;
        let violation = if bytes > capacity {
            Violation::OverCapacity { bytes, capacity }
        } else if allocated != accounted {
            Violation::Space {
                allocated,
                accounted,
            }
        } else {
            return Ok(None);
        };
        tries -= 1;
        if tries == 0 {
            return Ok(Some(violation));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Bytes that the segments in `directory` take, and how many there are. Counts ranges
/// rather than the blocks of `stat`, which include a file system's own bookkeeping.
///
/// # Errors
/// The directory cannot be read.
pub fn allocated(directory: &Path) -> io::Result<(u64, u64)> {
    let (mut bytes, mut files) = (0, 0);
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "seg") {
            continue;
        }
        // It may be deleted right now.
        let file = match DirectIo.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        files += 1;
        let mut from = 0;
        while let Some(data) = file.data(from)? {
            bytes += data.end - data.start;
            from = data.end;
        }
    }
    Ok((bytes, files))
}

/// A count from the environment, or `default`.
///
/// # Panics
/// The variable is not a number.
pub fn count_from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |count| {
        count
            .parse()
            .unwrap_or_else(|_| panic!("{name}={count} is not a number"))
    })
}

const BLOCK_BYTES: u64 = 4096;
