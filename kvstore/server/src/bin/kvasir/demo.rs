//! `kvasir demo`.

use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Arguments {}

/// Runs outside of any runtime.
pub(crate) fn run(_context: &Context, _arguments: &Arguments) -> anyhow::Result<()> {
    anyhow::bail!("the demo is not part of this version")
}
