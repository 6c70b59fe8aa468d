//! The `kvasir-index` process: arguments, signals, logs.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, anyhow};
use clap::Parser;
use kvasir_events::Limits;
use kvasir_events::hash::DEFAULT_SEED;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::ask::{self, Question};
use crate::config::{DaemonConfig, EngineConfig};
use crate::server::{Server, ServerConfig};

/// Says which serving engines and cache daemons hold how much of a prompt's KV.
///
/// Follows the KV events of vLLM and SGLang, and the changes of `kvasird`, and answers the calls
/// of `kvasir.v1.PrefixIndex`.
#[derive(Debug, Parser)]
#[command(name = "kvasir-index", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    question: Option<Question>,
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7430")]
    listen: SocketAddr,
    /// An engine, NAME=tcp://HOST:PORT, and options after commas: replay=tcp://HOST:PORT,
    /// model=NAME, topic=TEXT, ranks=COUNT (at the ports that follow), check-ms=1000. Again for
    /// each engine.
    #[arg(long = "engine", value_name = "ENGINE")]
    engines: Vec<EngineConfig>,
    /// A cache daemon, HOST:PORT, and options after commas: namespace=HEX (the log of its
    /// connector in vLLM says it; once for each rank), model=NAME. Again for each daemon.
    #[arg(long = "daemon", value_name = "DAEMON")]
    daemons: Vec<DaemonConfig>,
    /// PYTHONHASHSEED in the engines' environment, if it is set there.
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_SEED, hide_default_value = true)]
    hash_seed: String,
    /// Blocks to keep of each engine, of 10 to 21 bytes of memory. More are not taken.
    #[arg(long, value_name = "COUNT", default_value_t = Limits::default().blocks)]
    blocks: usize,
    /// Address and port of `/metrics` and `/health`, over HTTP [default: not served].
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    /// File to write the address to once it listens.
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
}

/// Runs until SIGTERM or SIGINT; a second one ends it at once. `arguments` are those of
/// `kvasir-index`, its name first; wrong ones end the process with a message.
///
/// Installs the process's log subscriber.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = Arguments::parse_from(arguments);
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Below the log level, so that no filter hides it.
            eprintln!("kvasir-index: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    match arguments.question {
        Some(question) => runtime.block_on(ask::ask(question)),
        None => runtime.block_on(serve(arguments)),
    }
}

async fn serve(arguments: Arguments) -> anyhow::Result<()> {
    // Handlers come first: a parent that reads the address may signal at once.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    if arguments.engines.is_empty() && arguments.daemons.is_empty() {
        tracing::warn!("nobody is followed; name some with --engine and --daemon");
    }
    let ready_file = arguments.ready_file;
    let mut running = Server::start(ServerConfig {
        listen: arguments.listen,
        metrics: arguments.metrics,
        engines: arguments.engines,
        daemons: arguments.daemons,
        hash_seed: arguments.hash_seed,
        limits: Limits {
            blocks: arguments.blocks,
            ..Limits::default()
        },
    })
    .await?;
    if let Some(path) = &ready_file {
        // Readers see nothing or everything.
        let partial = path.with_extension("partial");
        std::fs::write(&partial, format!("{}\n", running.addr()))
            .and_then(|()| std::fs::rename(&partial, path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut out = io::stdout().lock();
    // The last line's form is fixed: parents parse it. One that closed the pipe does not want to.
    if let Some(metrics) = running.metrics() {
        let _ = writeln!(out, "metrics on http://{metrics}/metrics");
    }
    let _ = writeln!(out, "listening on {}", running.addr());
    let _ = out.flush();
    drop(out);
    let stopped = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        () = running.ended() => Err(anyhow!("stopped serving; the log above says why")),
    };
    tokio::select! {
        () = running.shutdown() => stopped,
        _ = terminate.recv() => Err(anyhow!("SIGTERM while stopping: stopped at once")),
        _ = interrupt.recv() => Err(anyhow!("SIGINT while stopping: stopped at once")),
    }
}
