//! `kvasir`: the command line of the cache daemon.

#![forbid(unsafe_code)]

mod blend_check;
mod cert;
mod context;
mod demo;
mod get;
mod list;
mod output;
mod profiles;
mod put;
mod remove;
mod status;
mod top;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use crate::context::Context;

/// Looks into and works with a cache daemon (`kvasird`).
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    global: context::Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// See the cache at work, without any preparation.
    Demo(demo::Arguments),
    /// What the daemon holds and how it is doing.
    Status,
    /// Status and rates, refreshed.
    Top(top::Arguments),
    /// List chunks in the order of their keys.
    Ls(list::Arguments),
    /// Write a chunk to a file.
    Get(get::Arguments),
    /// Store chunks from files that `get` wrote.
    Put(put::Arguments),
    /// Delete chunks.
    Rm(remove::Arguments),
    /// Make certificates for the data plane between hosts.
    Cert(cert::Arguments),
    /// Measure what reuse of chunks at other places does to a model's answers, and store the
    /// verdict with the model.
    BlendCheck(blend_check::Arguments),
    /// List, store, fetch or delete codec profiles.
    Profiles(profiles::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough.
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvasir: {}", output::explain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let context = Context::new(arguments.global)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(dispatch(&context, arguments.command))
}

/// Completes at SIGINT or SIGTERM.
async fn interrupted() {
    let signals = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    );
    let (Ok(mut interrupt), Ok(mut terminate)) = signals else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

async fn dispatch(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        // Ending the demo early must end the processes it started, too.
        Command::Demo(arguments) => tokio::select! {
            outcome = demo::run(context, &arguments) => outcome,
            () = interrupted() => anyhow::bail!("interrupted"),
        },
        Command::Status => status::run(context).await,
        Command::Top(arguments) => top::run(context, &arguments).await,
        Command::Ls(arguments) => list::run(context, &arguments).await,
        Command::Get(arguments) => get::run(context, &arguments).await,
        Command::Put(arguments) => put::run(context, &arguments).await,
        Command::Rm(arguments) => remove::run(context, &arguments).await,
        Command::Cert(arguments) => cert::run(context, &arguments),
        Command::BlendCheck(arguments) => blend_check::run(arguments),
        Command::Profiles(arguments) => profiles::run(context, &arguments).await,
    }
}
