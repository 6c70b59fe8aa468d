//! The daemon as a process of its own: the benchmark starts itself again.
//!
//! A real process has its own scheduler, allocator and page tables, as it does in
//! production; nothing is measured through a shortcut.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use kvasir_client::Client;
use kvasir_server::child::{ListeningChild, drop_page_cache};
use kvasir_tests::network::Host;
use kvasir_types::ByteSize;

/// A running daemon; killed when dropped.
pub(crate) struct Daemon {
    child: ListeningChild,
    data: PathBuf,
}

impl Daemon {
    /// Starts a daemon with its data in `data`.
    pub(crate) fn start(data: &Path, memory: ByteSize, listen: &str) -> anyhow::Result<Self> {
        Self::run(command(data, memory, listen)?, data)
    }

    /// Starts one on another host, at `port`, or at a free one where it is 0.
    pub(crate) fn start_on(
        host: &Host,
        data: &Path,
        memory: ByteSize,
        port: u16,
    ) -> anyhow::Result<Self> {
        let listen = SocketAddr::new(host.address(), port).to_string();
        Self::run(host.command(&command(data, memory, &listen)?), data)
    }

    fn run(command: Command, data: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            child: ListeningChild::start(command)?,
            data: data.to_owned(),
        })
    }

    pub(crate) fn address(&self) -> &str {
        self.child.address()
    }

    pub(crate) fn pid(&self) -> rustix::process::Pid {
        self.child.pid()
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.pid().as_raw_nonzero().get().unsigned_abs()
    }

    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::connect(self.address()).await?)
    }

    /// Stops the daemon and drops what the page cache holds of its data, so that the
    /// next one reads from the medium.
    pub(crate) fn stop(self) -> anyhow::Result<()> {
        tokio::task::block_in_place(|| {
            self.child.stop()?;
            drop_page_cache(&self.data).context("dropping cached pages of the daemon's data")
        })
    }
}

fn command(data: &Path, memory: ByteSize, listen: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["daemon", "--listen", listen, "--data-dir"])
        .arg(data);
    command.args(["--memory", &memory.to_string()]);
    if std::env::var_os("RUST_LOG").is_none() {
        command.env("RUST_LOG", "warn");
    }
    Ok(command)
}
