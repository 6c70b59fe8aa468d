//! Benchmarks of Kvasir: each suite beside a raw limit or a peer of the same run.
//!
//! `kvasir-bench SUITE --json` prints one JSON object as its last line; without
//! `--json`, a table. Progress and everything else go to stderr.

#![forbid(unsafe_code)]

mod blend;
mod checkpoint;
mod codec;
mod contexts;
mod controller;
mod corpus;
mod cpu;
mod cuda;
mod daemon;
mod device;
mod faults;
mod kvstats;
mod link;
mod longctx;
mod lookup;
mod methods;
mod network;
mod page;
mod prefill;
mod quality;
mod raw_stream;
mod reference;
mod replay;
mod report;
mod restart;
mod retrieval;
mod select;
mod soak;
mod store;
mod transport;
mod ttft;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

#[derive(Debug, Parser)]
#[command(about = "Benchmarks of Kvasir, each beside a raw limit or a peer of the same run")]
struct Args {
    #[command(subcommand)]
    suite: Suite,
    /// Print one JSON object per suite instead of a table.
    #[arg(long, global = true)]
    json: bool,
    /// Fewer and shorter runs: under a minute per suite.
    #[arg(long, global = true)]
    quick: bool,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Every suite in turn.
    All,
    /// Time to first token: computed, fetched from host memory, fetched from disk.
    Ttft,
    /// Time to first token of prompts whose chunks are cached, by how they are reused.
    Blend,
    /// Time to first token over a slow link, by the level that KV is fetched at.
    Link(link::Options),
    /// What a daemon that stalls in the middle of a fetch costs a request.
    Faults,
    /// Deadlines kept and levels reached over links that change, in virtual time.
    Controller,
    /// Looking up 512 chunk keys in one call.
    Lookup,
    /// Prefill of 512 tokens beside torch on the CPU.
    Prefill {
        /// A Python with the packages of bench/torch/requirements.txt.
        #[arg(long)]
        python: Option<PathBuf>,
    },
    /// The storage engine in memory and on disk, beside memcpy, fio and Redis.
    Store(store::Options),
    /// Contexts of the synthetic reading tasks, as JSON lines; see bench/quality/README.md.
    Corpus(corpus::Arguments),
    /// The engine beside what transformers computed: DIR/reference.json.
    Reference {
        /// A model directory written by bench/quality/export.py and reference.py.
        #[arg(long, value_name = "DIR")]
        model: PathBuf,
    },
    /// A disk tier of a million chunks is opened again.
    Restart(restart::Options),
    /// A daemon at the edge of its budgets: wrong bytes, leaks, resident memory.
    Soak(soak::Options),
    /// Request traces against eviction and admission policies; see bench/src/replay.rs.
    Replay(replay::Options),
    /// Tokens computed where prompts are retrieved chunks: all, behind prefixes, and blended.
    Retrieval(retrieval::Options),
    /// Quality of answers when the KV of a context is reused, beside full prefill.
    Quality(quality::Options),
    /// Calibrates the profile of a model, for its codec; see bench/src/methods/calibration.rs.
    Profile(methods::calibration::Options),
    /// What a value of KV takes under each codec, how exact it stays, and how fast it is.
    Codec(codec::Options),
    /// How fast a GPU decodes nested levels, beside sending it the raw KV.
    Cuda(cuda::Options),
    /// The engine on a GPU: prefill, decoding, and layers between the host and pages.
    Device(device::Options),
    /// Statistics of the KV of a model: what a codec can gain, and where reuse deviates.
    Kvstats(kvstats::Options),
    /// Decoding over contexts whose KV is mostly on disk, beside loading all of it.
    Longctx(longctx::Options),
    /// Which pages of a long context are worth reading: mass and answers against bytes.
    Select(select::Options),
    /// A page of results, made from what `quality` and `kvstats` printed.
    Page(page::Options),
    /// Gets over every path, beside what carries them: raw streams, sockets, and memory.
    Transport(transport::Options),
    /// Gets and fetches between two hosts, over links that are slow, lossy, change and die.
    Network(network::Options),
    /// `kvasird` for the other suites, in a process of its own.
    #[command(hide = true)]
    Daemon {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// A server of bare QUIC and TCP that only sends constant bytes.
    #[command(hide = true)]
    RawSockets { socket: PathBuf },
    /// A gRPC server that only streams constant bytes.
    #[command(hide = true)]
    RawStream {
        #[arg(long)]
        layer_bytes: usize,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let Args { suite, json, quick } = Args::parse();
    if let Suite::Daemon { arguments } = suite {
        let arguments = std::iter::once("kvasird".into()).chain(arguments);
        return Ok(kvasir_server::daemon::main(arguments));
    }
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(run(suite, json, quick))?;
    Ok(ExitCode::SUCCESS)
}

async fn run(suite: Suite, json: bool, quick: bool) -> anyhow::Result<()> {
    match suite {
        Suite::All => {
            lookup::run(quick).await?.print(json)?;
            controller::run(quick).print(json)?;
            prefill::run(quick, None)?.print(json)?;
            faults::run(quick).await?.print(json)?;
            match store::Tools::find() {
                Ok(_) => store::run(&store::Options::default(), quick)
                    .await?
                    .print(json)?,
                Err(error) => eprintln!("the store was not measured: {error}"),
            }
            ttft::run(quick).await?.print(json)
        }
        Suite::Faults => faults::run(quick).await?.print(json),
        Suite::Controller => controller::run(quick).print(json),
        Suite::Ttft => ttft::run(quick).await?.print(json),
        Suite::Blend => blend::run(quick).await?.print(json),
        Suite::Link(options) => link::run(&options, quick).await?.print(json),
        Suite::Replay(options) => match options.generate {
            Some(requests) => replay::generate(requests, options.seed),
            None => replay::run(&options, quick).await?.print(json),
        },
        Suite::Retrieval(options) => match retrieval::run(&options, quick)? {
            Some(report) => report.print(json),
            None => Ok(()),
        },
        Suite::Restart(options) => match restart::run(&options, quick).await? {
            Some(report) => report.print(json),
            None => Ok(()),
        },
        Suite::Soak(options) => soak::run(&options, quick, json).await,
        Suite::Quality(options) => quality::run(&options, quick)?.print(json),
        Suite::Profile(options) => methods::calibration::run(&options)?.print(json),
        Suite::Codec(options) => codec::run(&options, quick)?.print(json),
        Suite::Cuda(options) => cuda::run(&options, quick)?.print(json),
        Suite::Device(options) => device::run(&options, quick)?.print(json),
        Suite::Longctx(options) => longctx::run(&options, quick)?.print(json),
        Suite::Kvstats(options) => kvstats::run(&options, quick)?.print(json),
        Suite::Select(options) => select::run(&options, quick)?.print(json),
        Suite::Lookup => lookup::run(quick).await?.print(json),
        Suite::Store(options) => store::run(&options, quick).await?.print(json),
        Suite::Corpus(arguments) => corpus::run(&arguments),
        Suite::Reference { model } => reference::run(&model),
        Suite::Prefill { python } => prefill::run(quick, python.as_deref())?.print(json),
        Suite::Transport(options) => transport::run(&options, quick).await?.print(json),
        // It has threads of its own, on hosts of its own.
        Suite::Network(options) => {
            tokio::task::block_in_place(|| network::run(&options, quick))?.print(json)
        }
        Suite::RawSockets { socket } => transport::raw::serve(&socket).await,
        Suite::Page(options) => Ok(page::run(&options)?),
        Suite::Daemon { .. } => Ok(()),
        Suite::RawStream { layer_bytes } => raw_stream::serve(layer_bytes).await,
    }
}

/// A progress bar on stderr; invisible when stderr is not a terminal.
fn progress(length: u64, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:<24} {bar:40} {pos}/{len} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length)
        .with_style(style)
        .with_message(what.to_owned())
}
