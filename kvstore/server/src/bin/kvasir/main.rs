//! `kvasir`: the command line of the cache daemon.

#![forbid(unsafe_code)]

mod context;
mod demo;
mod get;
mod list;
mod output;
mod put;
mod remove;
mod status;
mod top;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    #[command(flatten)]
    Ask(Ask),
    /// See the cache at work, without any preparation.
    Demo(demo::Arguments),
}

/// Commands for a daemon that runs.
#[derive(Debug, Subcommand)]
enum Ask {
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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvasir: {}", output::explain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let context = Context::new(arguments.global)?;
    match arguments.command {
        Command::Ask(command) => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(ask(&context, command)),
        Command::Demo(arguments) => demo::run(&context, &arguments),
    }
}

async fn ask(context: &Context, command: Ask) -> anyhow::Result<()> {
    match command {
        Ask::Status => status::run(context).await,
        Ask::Top(arguments) => top::run(context, &arguments).await,
        Ask::Ls(arguments) => list::run(context, &arguments).await,
        Ask::Get(arguments) => get::run(context, &arguments).await,
        Ask::Put(arguments) => put::run(context, &arguments).await,
        Ask::Rm(arguments) => remove::run(context, &arguments).await,
    }
}
