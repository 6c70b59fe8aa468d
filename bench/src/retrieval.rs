//! `retrieval`: tokens that a serving node computes where prompts are retrieved chunks in
//! changing order.
//!
//! A prompt is a canonical prefix, some chunks, and a question; see
//! [`generate`](mod@generate) for how they are drawn, and [`trace`] for the form of
//! `--generate N`, which prints them, and of `--requests PATH`, which replays what was
//! printed. Times come from a Mooncake trace (`--trace PATH`), or from the generator of
//! [`replay`](crate::replay).
//!
//! This counts tokens, and says nothing of quality: that is what
//! `kvasir-bench quality` is for. Nor of time: a token costs the same wherever it stands, and
//! loading costs nothing.
//!
//! # Policies
//! All have a store of the same size, with the daemon's default policy of eviction in the
//! trace's time, empty at first; the first `--warm-up` requests are not counted.
//!
//! * `full`: everything is computed.
//! * `prefix`: prefix chunks of `--block-tokens` tokens, chained over the whole prompt.
//! * `content`: chunks are reused at any position. A chunk that was compiled behind another
//!   canonical prefix is another chunk. Right behind its prefix, a reused chunk is exact;
//!   elsewhere a `--share` of its tokens is computed anew in the first `--layers` of
//!   `--model-layers` layers. A missing chunk is computed where it stands, and once more
//!   alone for the store, unless it stands right behind its prefix; and in `--probe-layers`
//!   layers behind each of `--probes` texts of `--probe-tokens` tokens, to record which of its
//!   tokens depend on what stands before them. Both only when `--compile-after` requests have
//!   missed it, and the latter only once with `--keep-records`.
//! * `charged/S`: the same, but a share S (`--uniform-share`) is computed anew, in all layers.
//! * `second-miss`: `content`, with `--compile-after 2 --keep-records`.
//! * `prefix-content`: the longest stored prefix first, content chunks for the rest. What was
//!   computed behind a chunk that is not exact is never stored as a prefix chunk. Prefix
//!   chunks that give no more than the canonical prefix and the first chunk are not stored.
//! * `variants`: `content`, where what was computed anew of a chunk is kept with the chunks
//!   before it; see [`variants`]. Behind the same chunks in the same order nothing is computed
//!   anew, behind chunks with an overlap of `--overlap` only `--overlap-share` of the share;
//!   that so much is enough there is assumed, not measured.
//!
//! # Rows
//! At the first `--store`; those of others end in `@CAPACITY`, without a limit in
//! `@infinite`. Capacities are chunks (`4000`), bytes (`256GiB`, of `--token-bytes` a token)
//! or shares of the KV of the trace's distinct content chunks (`20%`).
//!
//! * `POLICY/computed`: tokens computed as a share of all prompt tokens, those for the store
//!   included. A token that is computed in some layers counts as their share of all layers:
//!   this is the charged budget, of the whole prompt. `limit` is prefix caching's, `ratio`
//!   how many times fewer.
//! * `POLICY/against_full`, `POLICY/against_prefix`: by which share of these less is
//!   computed. `limit` is what Cache-Craft (SIGMOD 2025) reports, 0.75 and 0.51.
//! * `POLICY/request`: the part of it that requests wait for. `POLICY/compile`: the rest,
//!   which is for the store and can wait until the node is idle.
//! * `POLICY/touched`: prompt tokens that are computed in one layer at least.
//! * `POLICY/hits`: chunks of prompts that were found.
//! * `variants/exact`, `variants/near`: chunks of prompts that had a variant, as a share of
//!   all. `variants/stored`: what variants take of the store's bytes at the end, and
//!   `variants/kept`: how many there are.

mod generate;
mod simulate;
mod store;
mod trace;
mod variants;

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::Args;
use kvasir_types::ByteSize;

use self::generate::{Arrival, Workload};
use self::simulate::{Blending, Compile, Costs, Outcome, Repair, Trace, VariantOptions};
use self::trace::Request;
use crate::replay::trace::Trace as Arrivals;
use crate::replay::{Capacity, SHARE, generate as poisson, ratio, share as share_of};
use crate::report::{Report, Row};

/// `kvasir-bench retrieval`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Times of requests: a trace as JSON lines in Mooncake's form. Default: generated.
    #[arg(long, value_name = "PATH")]
    trace: Option<PathBuf>,
    /// Replay these requests: JSON lines, as `--generate` prints them.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["trace", "generate"])]
    requests: Option<PathBuf>,
    /// Print so many requests instead, or as many as the trace has.
    #[arg(long, value_name = "N")]
    generate: Option<u32>,
    #[command(flatten)]
    workload: Workload,
    #[command(flatten)]
    costs: Costs,
    #[command(flatten)]
    repair: Repair,
    #[command(flatten)]
    compile: Compile,
    #[command(flatten)]
    variants: VariantOptions,
    /// Share of reused tokens that `charged` computes anew in all layers.
    #[arg(long, default_value_t = 0.15, value_parser = share)]
    uniform_share: f64,
    /// The store: chunks, bytes, or a share of the distinct content chunks. The first is the
    /// default, the others are further rows.
    #[arg(long, value_delimiter = ',', default_value = "20%,5%,10%,40%,100%")]
    store: Vec<Capacity>,
    /// Bytes of KV of a token. Default: as of an 8B model.
    #[arg(long, default_value = "128KiB")]
    token_bytes: ByteSize,
}

/// Prints a trace, or replays one.
pub(crate) fn run(options: &Options, quick: bool) -> anyhow::Result<Option<Report>> {
    let requests = options.read_requests(quick)?;
    if options.generate.is_some() {
        let mut out = std::io::stdout().lock();
        for request in &requests {
            serde_json::to_writer(&mut out, request)?;
            out.write_all(b"\n")?;
        }
        return Ok(None);
    }
    let costs = &options.costs;
    for (name, layers) in [
        ("--layers", options.repair.layers),
        ("--probe-layers", costs.probe_layers),
    ] {
        let all = costs.model_layers;
        ensure!(
            layers <= all,
            "{name} is {layers}, but --model-layers {all}"
        );
    }
    let warm_up = costs.warm_up;
    ensure!(
        (warm_up as usize) < requests.len(),
        "--warm-up is {warm_up}, but there are {} requests",
        requests.len()
    );
    let mut report = Report::new("retrieval");
    options.set(&mut report, &requests);
    let trace = Trace::new(&requests, costs);
    let suite = Suite {
        options,
        trace: &trace,
        distinct: distinct(&requests),
    };
    report.push(Row::new("full/computed", 1.0, SHARE));
    for (number, &capacity) in options.store.iter().enumerate() {
        let suffix = match number {
            0 => String::new(),
            _ => format!("@{}", capacity.name()),
        };
        report.set(&format!("store{suffix}"), capacity.name());
        suite.policies(&mut report, &suffix, Some(suite.capacity(capacity)));
    }
    suite.policies(&mut report, "@infinite", None);
    Ok(Some(report))
}

impl Options {
    fn read_requests(&self, quick: bool) -> anyhow::Result<Vec<Request>> {
        if let Some(path) = &self.requests {
            let what = || format!("cannot replay {}", path.display());
            let file = File::open(path).with_context(what)?;
            return trace::read(BufReader::new(file)).with_context(what);
        }
        let most = self.generate.unwrap_or(if quick { 2_000 } else { 12_000 });
        let arrivals = match &self.trace {
            Some(path) => {
                let what = || format!("cannot take times from {}", path.display());
                let file = File::open(path).with_context(what)?;
                Arrivals::read(BufReader::new(file)).with_context(what)?
            }
            None => Arrivals::from_lines(&poisson::lines(most, self.workload.seed))?,
        };
        let arrival = |request: &crate::replay::trace::Request| Arrival {
            millis: u64::try_from(request.at.as_millis()).unwrap_or(u64::MAX),
            output_tokens: request.output_tokens,
        };
        let mut arrivals: Vec<Arrival> = arrivals.requests.iter().map(arrival).collect();
        if quick || self.generate.is_some() {
            arrivals.truncate(most as usize);
        }
        Ok(generate::requests(&self.workload, &arrivals))
    }

    fn set(&self, report: &mut Report, requests: &[Request]) {
        report.set("requests", requests.len());
        report.set("distinct_chunks", distinct(requests));
        if self.requests.is_none() {
            let workload = &self.workload;
            report.set("corpus", workload.corpus);
            report.set("zipf", workload.zipf);
            report.set("chunks", workload.chunks);
            report.set("prefixes", workload.prefixes);
            report.set("topic", workload.topic);
            report.set("topical", workload.topical);
            report.set("order_noise", workload.order_noise);
            report.set("follow_ups", workload.follow_ups);
            report.set("kept", workload.kept);
            report.set("pause", workload.pause);
            report.set("window", workload.window);
            report.set("seed", workload.seed);
        }
        let costs = &self.costs;
        report.set("prefix_tokens", costs.prefix_tokens);
        report.set("chunk_tokens", costs.chunk_tokens);
        report.set("block_tokens", costs.block_tokens);
        report.set("model_layers", costs.model_layers);
        report.set("probes", costs.probes);
        report.set("probe_tokens", costs.probe_tokens);
        report.set("probe_layers", costs.probe_layers);
        report.set("compile_after", self.compile.compile_after);
        report.set("keep_records", self.compile.keep_records);
        report.set("warm_up", costs.warm_up);
        let Repair { share, layers } = self.repair;
        report.set("share", share);
        report.set("layers", layers);
        let charged = share * f64::from(layers) / f64::from(costs.model_layers);
        report.set("charged", charged);
        let variants = &self.variants;
        report.set("overlap", variants.overlap);
        report.set("order_penalty", variants.order_penalty);
        report.set("overlap_share", variants.overlap_share);
        report.set("variants", variants.variants);
        report.set("variants_bytes", variants.variants_bytes);
        report.set("variants_half_life", variants.variants_half_life);
    }
}

/// Content chunks that a trace has.
fn distinct(requests: &[Request]) -> usize {
    let contents = requests
        .iter()
        .flat_map(|request| request.chunks.iter().map(|chunk| request.content(*chunk)));
    contents.collect::<HashSet<_>>().len()
}

struct Suite<'a> {
    options: &'a Options,
    trace: &'a Trace<'a>,
    distinct: usize,
}

impl Suite<'_> {
    /// Rows that a store holds.
    fn capacity(&self, capacity: Capacity) -> u64 {
        let costs = &self.options.costs;
        let tokens = u64::from(costs.chunk_tokens);
        let bytes = tokens.saturating_mul(self.options.token_bytes.as_u64());
        let chunks = capacity.blocks(self.distinct, ByteSize::bytes(bytes)) as u64;
        chunks.saturating_mul(tokens * costs.layers())
    }

    fn policies(&self, report: &mut Report, suffix: &str, capacity: Option<u64>) {
        let options = self.options;
        let content = Blending {
            repair: options.repair,
            compile: options.compile,
            prefix: false,
            variants: None,
        };
        let uniform = Repair {
            share: options.uniform_share,
            layers: options.costs.model_layers,
        };
        let blendings = [
            ("content".to_owned(), content),
            (
                format!("charged/{}", options.uniform_share),
                Blending {
                    repair: uniform,
                    ..content
                },
            ),
            (
                "second-miss".to_owned(),
                Blending {
                    compile: Compile {
                        compile_after: 2,
                        keep_records: true,
                    },
                    ..content
                },
            ),
            (
                "prefix-content".to_owned(),
                Blending {
                    prefix: true,
                    ..content
                },
            ),
            (
                "variants".to_owned(),
                Blending {
                    variants: Some(&options.variants),
                    ..content
                },
            ),
        ];
        let prefix = self.trace.prefix_caching(capacity);
        self.rows(report, "prefix", suffix, &prefix, &prefix);
        for (name, blending) in blendings {
            let outcome = self.trace.blending(blending, capacity);
            self.rows(report, &name, suffix, &outcome, &prefix);
            if blending.variants.is_some() {
                self.variants(report, suffix, &outcome);
            }
        }
    }

    fn rows(
        &self,
        report: &mut Report,
        policy: &str,
        suffix: &str,
        outcome: &Outcome,
        prefix: &Outcome,
    ) {
        let all = self.trace.rows();
        let limit = share_of(prefix.computed, all);
        let request = outcome.computed - outcome.compiled;
        for (name, rows) in [("computed", outcome.computed), ("request", request)] {
            let value = share_of(rows, all);
            let row = Row::new(format!("{policy}/{name}{suffix}"), value, SHARE);
            report.push(row.against(limit, ratio(limit, value)));
        }
        let touched = share_of(outcome.touched_tokens, self.trace.tokens());
        let shares = [
            ("compile", share_of(outcome.compiled, all)),
            ("touched", touched),
            ("hits", share_of(outcome.found, self.trace.chunks())),
        ];
        for (name, value) in shares {
            report.push(Row::new(format!("{policy}/{name}{suffix}"), value, SHARE));
        }
        let against = [
            ("against_full", all, OTHERS_AGAINST_FULL),
            ("against_prefix", prefix.computed, OTHERS_AGAINST_PREFIX),
        ];
        for (name, baseline, limit) in against {
            let value = 1.0 - share_of(outcome.computed, baseline);
            let row = Row::new(format!("{policy}/{name}{suffix}"), value, SHARE);
            report.push(row.against(limit, ratio(value, limit)));
        }
    }

    fn variants(&self, report: &mut Report, suffix: &str, outcome: &Outcome) {
        let chunks = self.trace.chunks();
        let shares = [
            ("exact", share_of(outcome.exact_variants, chunks)),
            ("near", share_of(outcome.near_variants, chunks)),
            ("stored", share_of(outcome.variants_stored, outcome.stored)),
        ];
        for (name, value) in shares {
            report.push(Row::new(format!("variants/{name}{suffix}"), value, SHARE));
        }
        #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
        let kept = outcome.variants as f64;
        report.push(Row::new(format!("variants/kept{suffix}"), kept, "variants"));
    }
}

/// A share, as an option.
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("give a number from 0 to 1".to_owned()),
    }
}

/// Less computed than all, and than behind prefix caching, as Cache-Craft reports.
const OTHERS_AGAINST_FULL: f64 = 0.75;
const OTHERS_AGAINST_PREFIX: f64 = 0.51;

#[cfg(test)]
mod tests;
