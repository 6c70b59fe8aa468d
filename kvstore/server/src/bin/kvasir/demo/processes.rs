//! The two processes of the demo, found beside this one.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use kvasir_client::{Client, Tier, TierStats};
use kvasir_server::child::{ListeningChild, daemon_command, drop_page_cache};
use kvasir_types::ByteSize;

/// A `kvasird` and its data.
#[derive(Debug)]
pub(super) struct Daemon {
    child: ListeningChild,
    data: PathBuf,
}

impl Daemon {
    pub(super) fn start(data: &Path, memory: ByteSize, listen: &str) -> anyhow::Result<Self> {
        let mut command = daemon_command(beside("kvasird")?.as_ref(), data, memory, listen);
        quiet(&mut command);
        Ok(Self {
            child: ListeningChild::start(command)?,
            data: data.to_owned(),
        })
    }

    pub(super) fn address(&self) -> &str {
        self.child.address()
    }

    pub(super) fn peak_resident_bytes(&self) -> u64 {
        self.child.peak_resident_bytes()
    }

    pub(super) async fn memory_tier(&self) -> anyhow::Result<TierStats> {
        let stats = Client::connect(self.address()).await?.stats().await?;
        let tier = stats
            .tier(Tier::Memory)
            .context("the daemon has a memory tier")?;
        Ok(tier.clone())
    }

    /// Stops the daemon as an operator would, and makes the next one read its data from
    /// the disk, not from the page cache.
    pub(super) async fn stop(self) -> anyhow::Result<()> {
        let Self { child, data } = self;
        // Waiting on a thread of its own: our own connections must close meanwhile.
        tokio::task::spawn_blocking(move || {
            child.stop()?;
            drop_page_cache(&data).context("dropping cached pages of the daemon's data")
        })
        .await?
    }
}

/// Starts `kvasir-engine serve` on a free port.
pub(super) fn start_engine(
    model: &Path,
    daemon: &str,
    chunk_tokens: u32,
) -> anyhow::Result<ListeningChild> {
    let mut command = Command::new(beside("kvasir-engine")?);
    command
        .args(["serve", "--kvasir", daemon, "--listen", "127.0.0.1:0"])
        .args(["--chunk-tokens", &chunk_tokens.to_string(), "--model"])
        .arg(model);
    quiet(&mut command);
    Ok(ListeningChild::start(command)?)
}

/// Warnings only, unless the user asks for more: the table is what counts here.
fn quiet(command: &mut Command) {
    if std::env::var_os("RUST_LOG").is_none() {
        command.env("RUST_LOG", "warn");
    }
}

/// A binary that was built with this one.
pub(crate) fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    ensure!(
        path.exists(),
        "{} does not exist; build the whole workspace with `make build`",
        path.display()
    );
    Ok(path)
}
