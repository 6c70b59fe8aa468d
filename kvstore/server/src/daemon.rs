//! The `kvasird` process: arguments, signals, logs.
//!
//! Starts without any configuration. Prints where its data are and where it
//! listens on stdout, logs on stderr (`RUST_LOG` filters), drains on SIGTERM and
//! SIGINT, and exits with 0. A second signal ends it at once.

use std::ffi::OsString;
use std::fs;
use std::io::{self, IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Parser;
use kvasir_types::ByteSize;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::{DaemonConfig, Running, Server};

/// Cache daemon: stores and serves the KV caches of language models.
///
/// Needs no configuration. What is given here overrides the file.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address and port to listen on; port 0 takes a free one [default: 127.0.0.1:7420].
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Directory of chunks on disk [default: $XDG_DATA_HOME/kvasir or ~/.local/share/kvasir].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Memory for chunks and transfers, such as 4GiB [default: 1GiB].
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Disk space for chunks, such as 100GiB [default: 16GiB].
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,
    /// Keep chunks in memory only; none survives a restart.
    #[arg(long, conflicts_with_all = ["disk", "data_dir"])]
    no_disk: bool,
    /// File to write the address to once the daemon listens.
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
}

/// Runs a daemon until SIGTERM or SIGINT. `arguments` are those of `kvasird`, its
/// name first; wrong ones end the process with a message.
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
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Below the log level, so that no filter hides it.
            eprintln!("kvasird: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = configure(arguments)?;
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(serve(&config, arguments.ready_file.as_deref()));
    // A thread that a device holds must not hold the process.
    runtime.shutdown_timeout(THREADS_END);
    result
}

async fn serve(config: &DaemonConfig, ready_file: Option<&Path>) -> anyhow::Result<()> {
    // Handlers come first: a parent that reads the address may signal at once.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let running = Server::start(config.server()?).await?;
    announce(config, &running, ready_file)?;
    let stopped = tokio::select! {
        _ = terminate.recv() => {
            tracing::info!("SIGTERM: draining");
            Ok(())
        }
        _ = interrupt.recv() => {
            tracing::info!("SIGINT: draining");
            Ok(())
        }
        () = running.ended() => Err(anyhow!("stopped serving; the log above says why")),
    };
    tokio::select! {
        () = running.shutdown() => tracing::info!("stopped"),
        _ = terminate.recv() => bail!("SIGTERM while draining: stopped at once"),
        _ = interrupt.recv() => bail!("SIGINT while draining: stopped at once"),
    }
    stopped
}

/// The file, overridden by the flags.
fn configure(arguments: &Arguments) -> anyhow::Result<DaemonConfig> {
    let mut config = match &arguments.config {
        Some(path) => DaemonConfig::read(path)?,
        None => DaemonConfig::default(),
    };
    if let Some(listen) = arguments.listen {
        config.listen = listen;
    }
    if let Some(memory) = arguments.memory {
        config.memory.capacity = memory;
    }
    if let Some(disk) = arguments.disk {
        config.disk.capacity = disk;
        config.disk.enabled = true;
    }
    if let Some(path) = &arguments.data_dir {
        config.data_dir = Some(path.clone());
        config.disk.enabled = true;
    }
    if arguments.no_disk {
        config.disk.enabled = false;
    }
    Ok(config)
}

/// Says where the data are and where it listens. The last line's form is fixed:
/// parents parse it.
fn announce(
    config: &DaemonConfig,
    running: &Running,
    ready_file: Option<&Path>,
) -> anyhow::Result<()> {
    if let Some(path) = ready_file {
        write_whole(path, &format!("{}\n", running.addr()))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let memory = config.memory.capacity;
    let mut out = io::stdout().lock();
    // A parent that closed the pipe does not want to know.
    let _ = if config.disk.enabled {
        let path = config.data_dir()?;
        let disk = config.disk.capacity;
        writeln!(
            out,
            "data in {} ({memory} memory, {disk} disk)",
            path.display()
        )
    } else {
        writeln!(out, "data in memory only ({memory})")
    };
    let _ = writeln!(out, "listening on {}", running.addr());
    let _ = out.flush();
    Ok(())
}

/// Readers see nothing or everything.
fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    fs::write(&partial, text)?;
    fs::rename(&partial, path)
}

/// Every chunk that is being read from disk holds a file open, and the usual soft
/// limit of 1024 is meant for programs that use `select`.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

const THREADS_END: Duration = Duration::from_secs(1);
