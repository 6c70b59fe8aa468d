//! The daemon as a process of its own: the benchmark starts itself again.
//!
//! A real process has its own scheduler, allocator and page tables, as it does in
//! production; nothing is measured through a shortcut.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;
use kvasir_client::Client;
use kvasir_types::ByteSize;

/// A running daemon; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    endpoint: String,
    data: PathBuf,
}

impl Daemon {
    /// Starts a daemon with its data in `data`, on a free port if `port` is 0.
    pub(crate) fn start(data: &Path, memory: ByteSize, port: u16) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("daemon")
            .arg("--data")
            .arg(data)
            .arg("--memory")
            .arg(memory.to_string())
            .arg("--port")
            .arg(port.to_string())
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .context("starting the daemon")?;
        let stdout = child
            .stdout
            .take()
            .context("the daemon's output is piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let endpoint = line
            .trim()
            .strip_prefix("listening on ")
            .context("the daemon did not say where it listens; its log is above")?
            .to_owned();
        Ok(Self {
            child,
            endpoint,
            data: data.to_owned(),
        })
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(crate) fn port(&self) -> anyhow::Result<u16> {
        let (_, port) = self
            .endpoint
            .rsplit_once(':')
            .context("an endpoint has a port")?;
        Ok(port.parse()?)
    }

    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::connect(&self.endpoint).await?)
    }

    /// Stops the daemon and drops what the page cache holds of its data, so that the
    /// next one reads from the medium.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        self.child.wait()?;
        drop_page_cache(&self.data)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already gone after `stop`.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks the kernel to drop its cached pages of every file under `dir`.
fn drop_page_cache(dir: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            drop_page_cache(&path)?;
        } else {
            let file = std::fs::File::open(&path)?;
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}
