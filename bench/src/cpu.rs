//! CPU time of processes.

use std::fs;
use std::time::Duration;

use anyhow::Context as _;
use rustix::time::{ClockId, clock_gettime};

/// That of this process.
pub(crate) fn here() -> anyhow::Result<Duration> {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Ok(Duration::new(
        now.tv_sec.try_into()?,
        now.tv_nsec.try_into()?,
    ))
}

/// That of the threads of another process, in nanoseconds where `/proc/PID/stat` counts in
/// hundredths of a second.
pub(crate) fn of(process: u32) -> anyhow::Result<Duration> {
    let mut total = Duration::ZERO;
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        let nanos = text.split(' ').next().and_then(|field| field.parse().ok());
        total += Duration::from_nanos(nanos.context("unexpected form of schedstat")?);
    }
    Ok(total)
}
