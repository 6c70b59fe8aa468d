//! `kvasir blend-check`: `kvasir-engine blend-check`, which has the model.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context as _, ensure};

use crate::demo::beside;

/// `kvasir blend-check`.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// Arguments of `kvasir-engine blend-check`; `--help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

pub(crate) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let status = Command::new(beside("kvasir-engine")?)
        .arg("blend-check")
        .args(arguments.arguments)
        .status()
        .context("starting kvasir-engine")?;
    ensure!(status.success(), "the model was not checked: {status}");
    Ok(())
}
