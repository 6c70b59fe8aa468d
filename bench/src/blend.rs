//! `blend`: time to the first token of prompts whose chunks are cached, by how they are reused.
//!
//! The engine runs in this process and the daemon in its own. A prompt is a token of canonical
//! prefix, six chunks of 512 random tokens, and a question of 32. Chunks are compiled once, and
//! then asked for in other orders, never twice in the same. What is computed anew is forced:
//! weights are random, so that nothing can be said of quality here; `quality` does that. Which
//! rows are computed anew is up to the probes as always, in a third of the layers. The first chunk
//! of an order stands where it was compiled, and needs no repair.
//!
//! # Rows
//! - `full`: everything computed, in ms; `prefix`: the order that is stored, as a prefix;
//! - `naive`: chunks reused as they are; `blend/S`: S of their rows computed anew
//!   ([`Rule::Graded`]); `blend-tokens/0.15`: any 15 % of their tokens, in all layers, which is
//!   as much as CacheBlend computes. `limit` is `full`, `ratio` is full ÷ this;
//! - some of these with `/disk`: from a daemon that has just been started; with `/l2`, `/l1`:
//!   chunks stored at that level;
//! - `load`, `compute`, `together`, `hidden`: see [`hidden`];
//! - `throughput/full`, `throughput/blend/0.15`: requests a second, eight at a time;
//! - `bar/blend-0.15`, `bar/throughput`, `bar/hidden`, `bar/hidden/spare`: these ratios, and those
//!   shares, once more,
//!   with what is hoped for as `limit`.
//!
//! A run fails that was not answered in the way that its row is about.

mod bed;
mod hidden;

use std::time::Instant;

use anyhow::ensure;
use futures::StreamExt as _;
use kvasir_plugin::blend::{Rule, Selector};
use kvasir_tests::harness::Use;
use kvasir_types::Level;

use self::bed::{Bed, Reader, Size};
use crate::report::{Report, Row, median};

/// What is measured at once, round after round.
struct Method {
    name: String,
    reader: usize,
    cache: Cache,
    times: Vec<f64>,
}

#[derive(Clone, Copy, PartialEq)]
enum Cache {
    Unused,
    Prefix,
    Blend,
}

pub(crate) async fn run(quick: bool) -> anyhow::Result<Report> {
    let size = if quick { Size::QUICK } else { Size::FULL };
    if !quick {
        eprintln!("this takes about ten minutes on two cores; --quick takes less than one");
    }
    let mut report = Report::new("blend");
    report.set("chunks", size.chunks);
    report.set("chunk_tokens", size.chunk_tokens);
    let mut bed = Bed::start(size)?;

    // The first also stores what all read.
    let mut readers = vec![bed.reader(graded(0.15), Level::RAW, CONCURRENT).await?];
    for selector in [Selector::NONE, graded(0.05), graded(0.3), ANY_TOKENS] {
        readers.push(bed.reader(selector, Level::RAW, 1).await?);
    }
    for level in [Level::L2, Level::L1] {
        readers.push(bed.reader(graded(0.15), level, 1).await?);
        readers.push(bed.reader(Selector::NONE, level, 1).await?);
    }
    if let Some(path) = readers[0].rig.plugin.data_path() {
        report.set("path", path.carrier.to_string());
    }

    let method = |name: &str, reader, cache| Method {
        name: name.to_owned(),
        reader,
        cache,
        times: Vec::new(),
    };
    let mut host = vec![
        method("full", 0, Cache::Unused),
        method("prefix", 0, Cache::Prefix),
        method("naive", 1, Cache::Blend),
        method("blend/0.05", 2, Cache::Blend),
        method("blend/0.15", 0, Cache::Blend),
        method("blend/0.30", 3, Cache::Blend),
        method("blend-tokens/0.15", 4, Cache::Blend),
        method("blend/0.15/l2", 5, Cache::Blend),
        method("naive/l2", 6, Cache::Blend),
        method("blend/0.15/l1", 7, Cache::Blend),
        method("naive/l1", 8, Cache::Blend),
    ];
    rounds(&mut bed, &readers, &mut host, false).await?;
    let full = median(&mut host[0].times);
    report.push(Row::new("full", full, "ms"));
    push(&mut report, &mut host[1..], full);
    let blended = full / median(&mut host[4].times);

    let mut disk = vec![
        method("prefix/disk", 0, Cache::Prefix),
        method("naive/disk", 1, Cache::Blend),
        method("blend/0.05/disk", 2, Cache::Blend),
        method("blend/0.15/disk", 0, Cache::Blend),
        method("blend/0.30/disk", 3, Cache::Blend),
    ];
    rounds(&mut bed, &readers, &mut disk, true).await?;
    push(&mut report, &mut disk, full);

    readers.truncate(1);
    let [hidden, spared] = hidden::run(&mut bed, &mut report).await?;
    let faster = throughput(&mut bed, &readers[0], &mut report).await?;
    for (name, value, hoped) in [
        ("bar/blend-0.15", blended, 4.0),
        ("bar/throughput", faster, 2.8),
        ("bar/hidden", hidden, 0.8),
        ("bar/hidden/spare", spared, 0.8),
    ] {
        report.push(Row::new(name, value, "times").against(hoped, value / hoped));
    }
    Ok(report)
}

/// Asks in new orders, by each of `methods` in turn.
async fn rounds(
    bed: &mut Bed,
    readers: &[Reader],
    methods: &mut [Method],
    from_disk: bool,
) -> anyhow::Result<()> {
    let runs = bed.size.runs;
    let progress = crate::progress((runs * methods.len()) as u64, "time to first token");
    // The first round meets cold connections and buffers.
    for run in 0..=runs {
        let order = bed.next_order();
        for method in methods.iter_mut() {
            if run == 0 && method.cache == Cache::Unused {
                continue;
            }
            if from_disk {
                bed.restart().await?;
            }
            let reader = &readers[method.reader];
            let answer = match method.cache {
                Cache::Unused => reader.ask(&order, Use::Nothing).await?,
                Cache::Blend => reader.blend(&order).await?,
                Cache::Prefix => {
                    let answer = reader.ask(&bed.stored, Use::Read).await?;
                    let context = bed.size.context();
                    ensure!(
                        answer.usage.cached_tokens + bed.size.prefix_tokens as usize > context,
                        "{} of {context} tokens came as a prefix",
                        answer.usage.cached_tokens
                    );
                    answer
                }
            };
            if run > 0 {
                method.times.push(bed::millis(answer.ttft()));
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();
    Ok(())
}

fn push(report: &mut Report, methods: &mut [Method], full: f64) {
    for method in methods {
        let time = median(&mut method.times);
        report.push(Row::new(&method.name, time, "ms").against(full, full / time));
    }
}

/// Requests a second, eight at a time; how many times more they are when blended.
async fn throughput(bed: &mut Bed, reader: &Reader, report: &mut Report) -> anyhow::Result<f64> {
    let requests = bed.size.requests;
    let progress = crate::progress(2 * requests as u64, "throughput");
    let mut rates = Vec::new();
    for cache in [Use::Nothing, Use::Read] {
        let orders: Vec<_> = (0..requests).map(|_| bed.next_order()).collect();
        let begun = Instant::now();
        let mut answers = futures::stream::iter(&orders)
            .map(|order| async move {
                match cache {
                    Use::Nothing => reader.ask(order, cache).await,
                    _ => reader.blend(order).await,
                }
            })
            .buffer_unordered(CONCURRENT);
        while let Some(answer) = answers.next().await {
            answer?;
            progress.inc(1);
        }
        #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
        rates.push(requests as f64 / begun.elapsed().as_secs_f64());
    }
    progress.finish_and_clear();
    let (full, blended) = (rates[0], rates[1]);
    report.push(Row::new("throughput/full", full, "requests/s"));
    report.push(
        Row::new("throughput/blend/0.15", blended, "requests/s").against(full, blended / full),
    );
    Ok(blended / full)
}

const fn graded(share: f32) -> Selector {
    Selector {
        rule: Rule::Graded,
        share,
        layers: None,
    }
}

const ANY_TOKENS: Selector = Selector {
    rule: Rule::Random { seed: 15 },
    share: 0.15,
    layers: None,
};

/// Requests at a time.
const CONCURRENT: usize = 8;
