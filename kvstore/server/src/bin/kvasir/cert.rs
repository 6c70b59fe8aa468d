//! `kvasir cert`.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Args;
use kvasir_transport::quic::{Authority, Issued, Purpose};
use serde_json::json;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Directory of an authority of your own; made where it is missing. Keep `ca.key` there,
    /// and give `ca.pem` to whoever is to believe it.
    directory: PathBuf,
    /// Makes a certificate for a daemon that is reached by this name or address; again for
    /// more of them. The files are named after the first.
    #[arg(long, value_name = "NAME")]
    host: Vec<String>,
    /// Makes a certificate for a client of this name.
    #[arg(long, value_name = "NAME")]
    client: Option<String>,
    /// Days that certificates hold; the authority's own ten times as many.
    #[arg(long, value_name = "DAYS", default_value_t = 730)]
    days: u32,
}

pub(crate) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<()> {
    let directory = &arguments.directory;
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let validity = Duration::from_secs(u64::from(arguments.days) * 24 * 60 * 60);
    let mut written = Vec::new();
    let key = directory.join("ca.key");
    let authority = if key.exists() {
        let pem = fs::read_to_string(&key);
        let pem = pem.with_context(|| format!("cannot read {}", key.display()))?;
        Authority::from_pem(&pem).with_context(|| key.display().to_string())?
    } else {
        let (authority, issued) = Authority::new(validity * 10)?;
        written.extend(write(directory, "ca", &issued)?);
        authority
    };
    let mut issue = |names: &[String], purpose| -> anyhow::Result<()> {
        let Some(name) = names.first() else {
            return Ok(());
        };
        let issued = authority.issue(names, purpose, validity);
        let issued = issued.with_context(|| format!("no certificate can be for {names:?}"))?;
        written.extend(write(directory, name, &issued)?);
        Ok(())
    };
    issue(&arguments.host, Purpose::Server)?;
    issue(arguments.client.as_slice(), Purpose::Client)?;
    context.print(&json!({ "written": written }), |out| {
        if written.is_empty() {
            writeln!(out, "nothing to do: say for whom, with --host or --client")?;
        }
        let mut paths = written.iter();
        paths.try_for_each(|path| writeln!(out, "{}", path.display()))
    })
}

/// Writes both files, where neither is there yet.
fn write(directory: &Path, name: &str, issued: &Issued) -> anyhow::Result<[PathBuf; 2]> {
    // A name is no way out of the directory.
    let name = name.replace(['/', ':', '*'], "_");
    let paths = ["pem", "key"].map(|extension| directory.join(format!("{name}.{extension}")));
    for path in &paths {
        ensure!(
            !path.exists(),
            "{} is there already; move it away first",
            path.display()
        );
    }
    let [certificate, key] = &paths;
    let failed = |path: &Path| format!("cannot write {}", path.display());
    fs::write(certificate, &issued.certificate).with_context(|| failed(certificate))?;
    let mut options = OpenOptions::new();
    // Nobody else may read a key.
    let file = options.write(true).create_new(true).mode(0o600).open(key);
    file.and_then(|mut file| file.write_all(issued.key.as_bytes()))
        .with_context(|| failed(key))?;
    Ok(paths)
}
