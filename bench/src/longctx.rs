//! `longctx`: decoding over contexts whose KV is mostly on disk.
//!
//! A model of random weights; memory for a tenth of the KV, the rest in a scratch file read with
//! direct I/O. Tokens attend to those like them, so that a few pages have most of attention, as in
//! trained models, and the text comes back to its topics; `--by-chance` leaves that out: then what
//! a token attends to has nothing to do with what the token before does, nor a layer with the one
//! before, which is the worst case of a cache. Rows, in ms a token, `N` being tokens of context,
//! `p50` and `p99` each; the longest context has rows without `N` too:
//!
//! - `ours/p50/N`: chosen pages, read when they are; `limit` is loading all, `ratio` how many
//!   times sooner ours is;
//! - `foreseen/p50/N`: the same, and what the layer before foresees is read ahead;
//! - `load_all/p50/N`: all pages, every token, one layer ahead;
//! - `lru/p50/N`: as ours, the least recently used page giving way;
//! - `full_memory/p50/N`: the same choice over a pool in memory;
//! - `ours/choosing/N`: what of a token's time goes into choosing;
//! - `METHOD/disk_bytes/N`: bytes from disk a token; `METHOD/hits/N`: share of wanted pieces
//!   that were in memory; `METHOD/stall_CAUSE/N`: what a token waited for, in ms;
//! - `ours/mass/N`: share of attention that the chosen pages have of full attention's, and
//!   `oracle/mass/N`: what the best choice of as many has;
//! - with `--bits 8`, `load_all_8/…`, `ours_8/…`: the same over a scratch file of 8 bits an element;
//!   `limit` is the one as in memory, `ratio` how many times sooner. `park/N` and `resume/N`, and
//!   `park_8/N`, `resume_8/N`: ms to write a layer of the contexts and park it, and to bring it;
//! - `rss/N`: resident memory with the pool less that without, in MB; `limit` is what its
//!   frames and buffers may take. Digests, 5.9 % of the KV, are beside it.
//!
//! `…/batch4/N` is four sequences of N tokens, a token of each.
//!
//! Contexts are not prefilled at their length, which takes hours: chunks of 512 tokens are
//! computed alone, and their keys turned to where they lie, as blending does.

mod bed;

use std::sync::Arc;

use anyhow::Context as _;
use kvasir_engine::paging::{Options as Selection, Rule};
use kvasir_engine::{
    KvPool, Model, Pager, PagerStats, Replacement, ScratchBits, ScratchFile, Threads,
};

use crate::checkpoint::{self, Attention, Shape};
use crate::report::{Report, Row, percentile};
use bed::{Bed, Method};

const SHAPE: Shape = Shape {
    positions: 1 << 18,
    // Of 128 channels, as in most models.
    heads: 6,
    kv_heads: 2,
    ..Shape::SERVING
};

/// Layers that are parked and resumed; the median counts.
const LAYERS_MOVED: usize = 5;

/// What to read.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Share of the pages that is read.
    #[arg(long, default_value_t = 0.04)]
    share: f32,
    /// By how much projections to queries and keys are scaled.
    #[arg(long, default_value_t = 3.5)]
    skew: f32,
    /// Tokens attend to others by chance, and not to those like them.
    #[arg(long)]
    by_chance: bool,
    /// How often a text comes back to each of its topics.
    #[arg(long, default_value_t = 4)]
    returns: usize,
    /// Measures how much attention the chosen pages have, and no times.
    #[arg(long)]
    mass_only: bool,
    /// Thousands of tokens of context; 32 and 128 when left out.
    #[arg(long, value_delimiter = ',')]
    lengths: Vec<usize>,
    /// Sequences of the first length that are decoded together, besides one alone; with
    /// --quick, none.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Measures a scratch file of so many bits an element besides.
    #[arg(long, value_parser = clap::value_parser!(u8).range(8..=8))]
    bits: Option<u8>,
    /// Directory of the scratch file. Default: that of temporary files.
    #[arg(long)]
    scratch: Option<std::path::PathBuf>,
}

pub(crate) fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    let mut report = Report::new("longctx");
    report.set("share", f64::from(options.share));
    report.set("skew", f64::from(options.skew));
    let dir = tempfile::tempdir()?;
    eprintln!(
        "writing a random checkpoint of {} M parameters; {} to go",
        SHAPE.parameters() / 1_000_000,
        if quick { "a minute" } else { "ten minutes" }
    );
    let attention = Attention {
        scale: options.skew,
        is_by_content: !options.by_chance,
    };
    checkpoint::write_with(dir.path(), &SHAPE, attention)?;
    let model = Model::load(dir.path())?;
    let mut lengths = options.lengths.clone();
    if lengths.is_empty() {
        lengths = if quick { vec![8] } else { vec![32, 128] };
    }
    let mut cases: Vec<(usize, usize)> = lengths.iter().map(|&length| (length, 1)).collect();
    if options.batch > 1 && !quick {
        cases.insert(0, (lengths[0], options.batch));
    }
    for &(thousands, sequences) in &cases {
        let mut name = format!("{thousands}k");
        if sequences > 1 {
            name = format!("batch{sequences}/{name}");
        }
        let case = Case {
            model: &model,
            options,
            tokens: thousands * 1024,
            sequences,
            quick,
        };
        case.measure(&name, &mut report)?;
        if (thousands, sequences) == cases[cases.len() - 1] {
            report.repeat_without(&format!("/{name}"));
        }
    }
    Ok(report)
}

/// One length of context.
struct Case<'a> {
    model: &'a Model,
    options: &'a Options,
    tokens: usize,
    sequences: usize,
    quick: bool,
}

impl Case<'_> {
    fn measure(&self, name: &str, report: &mut Report) -> anyhow::Result<()> {
        let threads = Threads::new(std::thread::available_parallelism()?.get())?;
        let steps = if self.quick { 12 } else { 40 };
        let mut bed = Bed::new(
            self.model,
            self.tokens,
            self.sequences,
            self.options.returns,
            &threads,
        )?;
        let ours = Selection {
            share: self.options.share,
            ..Selection::default()
        };
        let mut full = bed.decode(Method::Chosen(ours), steps)?;
        push(report, "full_memory", name, &mut full.times, None);
        let oracle = Selection {
            rule: Rule::Oracle,
            ..ours
        };
        let [mass, most] = bed.masses([ours, oracle])?;
        report.push(Row::new(format!("ours/mass/{name}"), mass, "share").against(0.9, mass / 0.9));
        report.push(Row::new(format!("oracle/mass/{name}"), most, "share"));

        if self.options.mass_only {
            return Ok(());
        }
        let exact = ScratchBits::AsInMemory;
        let lru = bed.copied(|blocks| self.paged(&bed, blocks, Replacement::LeastRecent, exact))?;
        let before = resident_bytes()?;
        let clock = bed.copied(|blocks| self.paged(&bed, blocks, Replacement::Clock, exact))?;
        let taken = resident_bytes()? - before;
        let eight = match self.options.bits {
            None => None,
            Some(_) => {
                let bits = ScratchBits::Eight;
                let pool = bed.copied(|blocks| self.paged(&bed, blocks, Replacement::Clock, bits));
                Some(pool?)
            }
        };
        let cap = clock.pager().map_or(0, Pager::resident_bytes);
        #[expect(clippy::cast_precision_loss, reason = "bytes of memory")]
        let (taken, cap) = (taken as f64 / 1e6, cap as f64 / 1e6);
        report.push(Row::new(format!("rss/{name}"), taken, "MB").against(cap, taken / cap));
        drop(bed.replace(clock));
        let steps_all = if self.quick { 3 } else { 6 };
        let mut all = bed.decode(Method::All, steps_all)?;
        push(report, "load_all", name, &mut all.times, None);
        costs(report, "load_all", name, &all.stats, all.times.len());
        let limit = [0.5, 0.99].map(|share| percentile(&mut all.times, share));

        let mut chosen = limit;
        for (method, how) in [
            ("ours", Method::Chosen(ours)),
            ("foreseen", Method::Foreseen(ours)),
        ] {
            let mut of_method = bed.decode(how, steps)?;
            push(report, method, name, &mut of_method.times, Some(limit));
            costs(
                report,
                method,
                name,
                &of_method.stats,
                of_method.times.len(),
            );
            if method == "ours" {
                chosen = [0.5, 0.99].map(|share| percentile(&mut of_method.times, share));
            }
            let choosing = percentile(&mut of_method.choosing, 0.5);
            report.push(Row::new(
                format!("{method}/choosing/{name}"),
                choosing,
                "ms",
            ));
        }

        if let Some(eight) = eight {
            let before = bed.moves(LAYERS_MOVED)?;
            drop(bed.replace(eight));
            let mut all = bed.decode(Method::All, steps_all)?;
            push(report, "load_all_8", name, &mut all.times, Some(limit));
            costs(report, "load_all_8", name, &all.stats, all.times.len());
            let mut ours = bed.decode(Method::Chosen(ours), steps)?;
            push(report, "ours_8", name, &mut ours.times, Some(chosen));
            costs(report, "ours_8", name, &ours.stats, ours.times.len());
            let after = bed.moves(LAYERS_MOVED)?;
            for (what, [before, after]) in [
                ("park", [before.park, after.park]),
                ("resume", [before.resume, after.resume]),
            ] {
                report.push(Row::new(format!("{what}/{name}"), before, "ms"));
                let row = Row::new(format!("{what}_8/{name}"), after, "ms");
                report.push(row.against(before, before / after));
            }
        }

        drop(bed.replace(lru));
        let mut lru = bed.decode(Method::Chosen(ours), steps)?;
        push(report, "lru", name, &mut lru.times, Some(limit));
        costs(report, "lru", name, &lru.stats, lru.times.len());
        Ok(())
    }

    /// A pool with memory for a tenth of its pieces.
    fn paged(
        &self,
        bed: &Bed<'_>,
        blocks: usize,
        replacement: Replacement,
        bits: ScratchBits,
    ) -> anyhow::Result<KvPool> {
        let config = self.model.config();
        let directory = self
            .options
            .scratch
            .clone()
            .unwrap_or_else(std::env::temp_dir);
        let file = ScratchFile::create(&directory)?;
        let bytes = bed.pool().bytes() / 10;
        let frames = KvPool::frames_in(config, bed::DTYPE, bytes);
        Ok(KvPool::paged(
            config,
            blocks,
            bed::DTYPE,
            frames,
            replacement,
            Arc::new(file),
            bits,
        )?)
    }
}

fn push(report: &mut Report, method: &str, name: &str, times: &mut [f64], limit: Option<[f64; 2]>) {
    for (index, (rank, share)) in [("p50", 0.5), ("p99", 0.99)].into_iter().enumerate() {
        let value = percentile(times, share);
        let row = Row::new(format!("{method}/{rank}/{name}"), value, "ms");
        report.push(match limit {
            Some(limit) => row.against(limit[index], limit[index] / value),
            None => row,
        });
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a short run")]
fn costs(report: &mut Report, method: &str, name: &str, stats: &PagerStats, tokens: usize) {
    let tokens = tokens as f64;
    let mut row = |what: &str, value: f64, unit: &'static str| {
        report.push(Row::new(format!("{method}/{what}/{name}"), value, unit));
    };
    row("disk_bytes", stats.read_bytes as f64 / tokens / 1e6, "MB");
    row("disk_reads", stats.reads as f64 / tokens, "reads");
    let wanted = stats.hits + stats.late + stats.misses;
    row("hits", stats.hits as f64 / wanted.max(1) as f64, "share");
    row("late", stats.late as f64 / wanted.max(1) as f64, "share");
    row("ahead_unused", stats.ahead_unused as f64 / tokens, "pieces");
    let stalls = stats.stalls;
    for (cause, time) in [
        ("read", stalls.read),
        ("late", stalls.late),
        ("frame", stalls.frame),
        ("write", stalls.write),
    ] {
        let value = time.as_secs_f64() * 1e3 / tokens;
        row(&format!("stall_{cause}"), value, "ms");
    }
}

/// Resident memory of this process.
fn resident_bytes() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
    Ok(kib.context("/proc/self/status has no VmRSS")? * 1024)
}
