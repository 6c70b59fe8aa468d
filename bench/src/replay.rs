//! `replay`: request traces against eviction and admission policies.
//!
//! Policies alone are simulated: the data structures of [`kvasir_store::policy`] in the
//! trace's time, without bytes. Then, unless `--dry` is given, a real store serves the
//! trace: see [`wet`]. Capacities are blocks
//! (`4000`), bytes (`256GiB`, in blocks of `--block-bytes`) or shares of the trace's
//! distinct blocks (`2%`).
//!
//! Rows, at the first of the capacities; those of the others end in `@CAPACITY`:
//!
//! * `POLICY/hit_tokens`: share of prompt tokens in the longest stored prefix, with one
//!   tier. `limit` is Belady's, `ratio` the part of it that is reached.
//! * `POLICY/hit_bytes`: the same in blocks; the last block of a prompt is a whole one.
//! * `belady/hit_tokens`, `infinite/hit_tokens`: with knowledge of the whole trace, and
//!   without a limit; see [`ideal`].
//! * `POLICY/disk_writes`: bytes written to disk with the default admission, when that
//!   capacity is memory and a disk of `--disk` is below it. `limit` is what admitting
//!   all writes, `ratio` this part of it.
//! * `POLICY/two_tier/ADMISSION/hit_tokens`, `…/memory_hit_tokens` (blocks found in
//!   memory, as a share of all), `…/disk_writes` likewise.
//!
//! * `POLICY/two_tier/clairvoyant/…`: if those blocks were written that are used again.
//! * `store/POLICY/hit_tokens`, `…/memory_hit_tokens`, `…/disk_writes`: of the real
//!   store, two tiers, at the first of the capacities; `limit` is the simulation's.
//!   `store/POLICY/request`: mean time of a request. Wrong bytes end the run.
//!
//! # Generated traces
//! Without `--trace`, and with `--generate N`, a trace of N requests is made from
//! `--seed`: see [`generate`](mod@generate).

mod dry;
pub(crate) mod generate;
mod ideal;
pub(crate) mod trace;
mod wet;

use std::fs::File;
use std::io::{BufReader, Write as _};
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context as _;
use clap::Args;
use kvasir_store::policy::{Admission, PolicyKind};
use kvasir_types::ByteSize;

use self::dry::{Outcome, Setup};
use self::trace::Trace;
use crate::report::{Report, Row};

/// `kvasir-bench replay`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// A trace as JSON lines in Mooncake's form. Default: a generated one.
    #[arg(long, value_name = "PATH")]
    trace: Option<PathBuf>,
    /// Simulate policies alone, without a store.
    #[arg(long)]
    dry: bool,
    /// Memory: blocks, bytes, or a share of the distinct blocks. The first is the
    /// default, the others are further rows.
    #[arg(long, value_delimiter = ',', default_value = "2%,1%,4%,8%,16%,32%")]
    memory: Vec<Capacity>,
    /// Disk, likewise, of the two-tier rows.
    #[arg(long, default_value = "20%")]
    disk: Capacity,
    /// Bytes of a block of 512 tokens. Default: 128 KiB a token, as of an 8B model.
    #[arg(long, default_value = "64MiB")]
    block_bytes: ByteSize,
    /// Print a generated trace of so many requests instead.
    #[arg(long, value_name = "N")]
    pub(crate) generate: Option<u32>,
    /// Seed of generated traces.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

/// Size of a tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Capacity {
    Blocks(usize),
    Bytes(ByteSize),
    /// Percent of the distinct blocks.
    Percent(f64),
}

#[derive(Debug, thiserror::Error)]
#[error("a capacity is blocks (4000), bytes (256GiB) or a share of the trace's blocks (2%)")]
pub(crate) struct NotACapacity;

impl FromStr for Capacity {
    type Err = NotACapacity;

    fn from_str(text: &str) -> Result<Self, NotACapacity> {
        if let Some(percent) = text.strip_suffix('%') {
            let percent = percent.parse().map_err(|_| NotACapacity)?;
            let valid = (0.0..=100.0).contains(&percent);
            return valid.then_some(Self::Percent(percent)).ok_or(NotACapacity);
        }
        if let Ok(blocks) = text.parse() {
            return Ok(Self::Blocks(blocks));
        }
        text.parse().map(Self::Bytes).map_err(|_| NotACapacity)
    }
}

impl Capacity {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of a number of blocks"
    )]
    /// Of `distinct` blocks of the trace, each of `block` bytes.
    pub(crate) fn blocks(self, distinct: usize, block: ByteSize) -> usize {
        match self {
            Self::Blocks(blocks) => blocks,
            Self::Bytes(bytes) => (bytes.as_u64() / block.as_u64().max(1)) as usize,
            Self::Percent(percent) => (distinct as f64 * percent / 100.0) as usize,
        }
    }

    pub(crate) fn name(self) -> String {
        match self {
            Self::Blocks(blocks) => blocks.to_string(),
            Self::Bytes(bytes) => bytes.human().to_string(),
            Self::Percent(percent) => format!("{percent}%"),
        }
    }
}

/// Prints a generated trace.
pub(crate) fn generate(requests: u32, seed: u64) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for line in generate::lines(requests, seed) {
        serde_json::to_writer(&mut out, &line)?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

pub(crate) async fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    let requests = if quick { 2_000 } else { 12_000 };
    let trace = match &options.trace {
        Some(path) => {
            let what = || format!("cannot replay {}", path.display());
            let file = File::open(path).with_context(what)?;
            Trace::read(BufReader::new(file)).with_context(what)?
        }
        None => Trace::from_lines(&generate::lines(requests, options.seed))?,
    };
    let mut report = Report::new("replay");
    report.set("mode", if options.dry { "dry" } else { "store" });
    report.set("requests", trace.requests.len());
    report.set("distinct_blocks", trace.blocks.len());
    report.set("block_bytes", options.block_bytes.as_u64());
    report.set("disk", options.disk.name());
    let infinite = ideal::infinite_hit_tokens(&trace);
    let suite = Suite {
        options,
        trace: &trace,
        tokens: trace.input_tokens(),
        blocks: trace.requests.iter().map(|r| r.blocks.len() as u64).sum(),
    };
    let infinite = suite.token_share(infinite);
    report.push(Row::new("infinite/hit_tokens", infinite, SHARE));
    for (number, &memory) in options.memory.iter().enumerate() {
        let suffix = match number {
            0 => String::new(),
            _ => format!("@{}", memory.name()),
        };
        report.set(&format!("memory{suffix}"), memory.name());
        suite.one_tier(&mut report, memory, &suffix, infinite);
        suite.two_tiers(&mut report, memory, &suffix);
    }
    if let (false, Some(memory)) = (options.dry, options.memory.first()) {
        suite.store(&mut report, *memory).await?;
    }
    Ok(report)
}

struct Suite<'a> {
    options: &'a Options,
    trace: &'a Trace,
    tokens: u64,
    blocks: u64,
}

impl Suite<'_> {
    fn one_tier(&self, report: &mut Report, memory: Capacity, suffix: &str, infinite: f64) {
        let memory_blocks = self.blocks_of(memory);
        let ideal = self.token_share(ideal::belady_hit_tokens(self.trace, memory_blocks));
        let row = Row::new(format!("belady/hit_tokens{suffix}"), ideal, SHARE);
        report.push(row.against(infinite, ratio(ideal, infinite)));
        for policy in PolicyKind::ALL {
            let outcome = dry::replay(
                self.trace,
                &Setup {
                    policy,
                    memory_blocks,
                    disk_blocks: 0,
                    admission: Admission::All,
                    clairvoyant: false,
                },
            );
            let name = policy.name();
            let hits = self.token_share(outcome.hit_tokens);
            let row = Row::new(format!("{name}/hit_tokens{suffix}"), hits, SHARE);
            report.push(row.against(ideal, ratio(hits, ideal)));
            let hits = share(outcome.hit_blocks, self.blocks);
            report.push(Row::new(format!("{name}/hit_bytes{suffix}"), hits, SHARE));
        }
    }

    fn two_tiers(&self, report: &mut Report, memory: Capacity, suffix: &str) {
        for policy in PolicyKind::ALL {
            let simulate = |admission, clairvoyant| {
                dry::replay(
                    self.trace,
                    &Setup {
                        policy,
                        memory_blocks: self.blocks_of(memory),
                        disk_blocks: self.blocks_of(self.options.disk),
                        admission,
                        clairvoyant,
                    },
                )
            };
            let all = simulate(Admission::All, false);
            let default = simulate(Admission::default(), false);
            let outcomes = [
                ("all", all),
                ("second-use", simulate(Admission::SecondUse, false)),
                ("default", default),
                ("clairvoyant", simulate(Admission::All, true)),
            ];
            let name = policy.name();
            for (admission, outcome) in outcomes {
                let name = format!("{name}/two_tier/{admission}");
                self.two_tier_rows(report, &name, suffix, &outcome);
            }
            let (writes, limit) = (self.written(&default), self.written(&all));
            let row = Row::new(format!("{name}/disk_writes{suffix}"), writes, "bytes");
            report.push(row.against(limit, ratio(writes, limit)));
        }
    }

    async fn store(&self, report: &mut Report, memory: Capacity) -> anyhow::Result<()> {
        for (policy, admission) in wet::POLICIES {
            let setup = Setup {
                policy,
                memory_blocks: self.blocks_of(memory),
                disk_blocks: self.blocks_of(self.options.disk),
                admission,
                clairvoyant: false,
            };
            let directory = tempfile::tempdir()?;
            let replayed = wet::replay(self.trace, &setup, directory.path()).await?;
            let simulated = dry::replay(self.trace, &setup);
            let suffix = match admission {
                Admission::All => "-all",
                _ => "",
            };
            let name = format!("store/{}{suffix}", policy.name());
            let mut push = |row: &str, value: f64, limit: f64, unit| {
                let row = Row::new(format!("{name}/{row}"), value, unit);
                report.push(row.against(limit, ratio(value, limit)));
            };
            let (real, dry) = (&replayed.outcome, &simulated);
            let tokens = |outcome: &Outcome| self.token_share(outcome.hit_tokens);
            push("hit_tokens", tokens(real), tokens(dry), SHARE);
            let in_memory = |outcome: &Outcome| share(outcome.memory_hit_blocks, self.blocks);
            push("memory_hit_tokens", in_memory(real), in_memory(dry), SHARE);
            push(
                "disk_writes",
                self.written(real),
                self.written(dry),
                "bytes",
            );
            let refused = share(replayed.refused, self.blocks);
            report.push(Row::new(format!("{name}/refused"), refused, SHARE));
            let requests = self.trace.requests.len().max(1);
            let each = replayed.took.as_secs_f64() * 1e3 / requests as f64;
            report.push(Row::new(format!("{name}/request"), each, "ms"));
        }
        Ok(())
    }

    fn two_tier_rows(&self, report: &mut Report, name: &str, suffix: &str, outcome: &Outcome) {
        let hits = self.token_share(outcome.hit_tokens);
        report.push(Row::new(format!("{name}/hit_tokens{suffix}"), hits, SHARE));
        let hits = share(outcome.memory_hit_blocks, self.blocks);
        let row = Row::new(format!("{name}/memory_hit_tokens{suffix}"), hits, SHARE);
        report.push(row);
        let writes = self.written(outcome);
        let row = Row::new(format!("{name}/disk_writes{suffix}"), writes, "bytes");
        report.push(row);
    }

    fn blocks_of(&self, capacity: Capacity) -> usize {
        capacity.blocks(self.trace.blocks.len(), self.options.block_bytes)
    }

    fn token_share(&self, tokens: u64) -> f64 {
        share(tokens, self.tokens)
    }

    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    fn written(&self, outcome: &Outcome) -> f64 {
        outcome.disk_writes as f64 * self.options.block_bytes.as_u64() as f64
    }
}

#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
pub(crate) fn share(part: u64, whole: u64) -> f64 {
    ratio(part as f64, whole as f64)
}

pub(crate) fn ratio(value: f64, limit: f64) -> f64 {
    if limit > 0.0 { value / limit } else { 1.0 }
}

pub(crate) const SHARE: &str = "share";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacities_are_blocks_bytes_or_shares() {
        let lines = generate::lines(50, 1);
        let trace = Trace::from_lines(&lines).unwrap();
        let blocks = |text: &str| {
            let capacity: Capacity = text.parse().unwrap();
            capacity.blocks(trace.blocks.len(), ByteSize::mib(64))
        };
        assert_eq!(blocks("4000"), 4000);
        assert_eq!(blocks("1GiB"), 16);
        assert_eq!(blocks("100%"), trace.blocks.len());
        for bad in ["", "%", "101%", "-1", "many"] {
            assert!(bad.parse::<Capacity>().is_err(), "{bad}");
        }
    }

    #[test]
    fn no_policy_beats_belady_and_all_reach_what_is_possible_without_a_limit() {
        let trace = Trace::from_lines(&generate::lines(300, 2)).unwrap();
        let infinite = ideal::infinite_hit_tokens(&trace);
        assert!(infinite > trace.input_tokens() / 4);
        for policy in PolicyKind::ALL {
            for memory_blocks in [50, 400, trace.blocks.len()] {
                let setup = Setup {
                    policy,
                    memory_blocks,
                    disk_blocks: 0,
                    admission: Admission::All,
                    clairvoyant: false,
                };
                let outcome = dry::replay(&trace, &setup);
                let ideal = ideal::belady_hit_tokens(&trace, memory_blocks);
                // The last blocks of prompts are shorter than Belady takes them to be.
                assert!(
                    outcome.hit_tokens as f64 <= ideal as f64 * 1.02,
                    "{setup:?}"
                );
                if memory_blocks == trace.blocks.len() {
                    assert_eq!(outcome.hit_tokens, infinite);
                }
                // A disk for the rest makes up for memory.
                let setup = Setup {
                    disk_blocks: trace.blocks.len(),
                    ..setup
                };
                assert_eq!(
                    dry::replay(&trace, &setup).hit_tokens,
                    infinite,
                    "{setup:?}"
                );
            }
        }
    }
}
