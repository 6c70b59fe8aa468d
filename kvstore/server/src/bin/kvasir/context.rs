//! What every command has at hand.

use std::env;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kvasir_client::{Client, ClientConfig, Endpoint, TlsConfig};
use serde::Serialize;

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where the daemon listens [default: $KVASIR_ENDPOINT or 127.0.0.1:7420].
    #[arg(long, global = true, value_name = "HOST:PORT")]
    endpoint: Option<String>,
    /// File of certificates in PEM, one of which must vouch for the daemon's data plane
    /// [default: what the daemon says].
    #[arg(long, global = true, value_name = "FILE", env = "KVASIR_CA")]
    ca: Option<PathBuf>,
    /// File of this client's certificate in PEM, for daemons that ask for one.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "KVASIR_CERT",
        requires = "client_key"
    )]
    client_cert: Option<PathBuf>,
    /// File of its key.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "KVASIR_KEY",
        requires = "client_cert"
    )]
    client_key: Option<PathBuf>,
    /// Print JSON instead of text, and no progress.
    #[arg(long, global = true)]
    json: bool,
}

/// Where the daemon is and how to talk to the user.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) endpoint: Endpoint,
    pub(crate) json: bool,
    tls: TlsConfig,
}

impl Context {
    pub(crate) fn new(global: Global) -> anyhow::Result<Self> {
        let endpoint = match (global.endpoint, env::var(VARIABLE)) {
            (Some(text), _) => text.parse().context("--endpoint")?,
            (None, Ok(text)) if !text.is_empty() => text.parse().context(VARIABLE)?,
            _ => Endpoint::default(),
        };
        Ok(Self {
            endpoint,
            json: global.json,
            tls: TlsConfig::from_files(global.ca, global.client_cert.zip(global.client_key))?,
        })
    }

    /// Connects, and finds out at once if nobody is there.
    pub(crate) async fn connect(&self) -> anyhow::Result<Client> {
        let config = ClientConfig {
            endpoint: self.endpoint.clone(),
            tls: self.tls.clone(),
            ..ClientConfig::default()
        };
        Ok(Client::connect_with(config).await?)
    }

    /// Prints `value` with --json, else what `text` writes.
    pub(crate) fn print(
        &self,
        value: &impl Serialize,
        text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        if self.json {
            writeln!(out, "{}", serde_json::to_string(value)?)?;
        } else {
            text(&mut out)?;
        }
        Ok(())
    }

    /// A bar on stderr; hidden with --json, and by itself where stderr is no
    /// terminal.
    pub(crate) fn progress(&self, bytes: u64) -> ProgressBar {
        if self.json {
            return ProgressBar::hidden();
        }
        ProgressBar::new(bytes).with_style(
            ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar()),
        )
    }
}

const VARIABLE: &str = "KVASIR_ENDPOINT";
const BAR: &str = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left {msg}";
