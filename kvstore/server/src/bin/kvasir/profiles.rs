//! `kvasir profiles`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use kvasir_client::{ListedProfile, PutOutcome};
use kvasir_codec::Profile;
use kvasir_types::ProfileDigest;
use serde::Serialize;
use serde_json::json;

use crate::context::Context;
use crate::output::{size, write_whole};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List profiles; also without a command.
    Ls,
    /// Store a profile that `kvasir-bench profile` made.
    Put {
        /// The profile.
        file: PathBuf,
    },
    /// Write a profile to a file.
    Get {
        /// Its digest, as `ls` prints it.
        digest: ProfileDigest,
        /// File to write.
        file: PathBuf,
    },
    /// Delete a profile. Chunks that were encoded with it are of use only to engines that
    /// have it; one that was started with it stores it again.
    Rm {
        /// Its digest, as `ls` prints it.
        digest: ProfileDigest,
    },
}

#[derive(Serialize)]
struct Listing {
    profiles: Vec<Listed>,
}

#[derive(Serialize)]
struct Listed {
    digest: String,
    bytes: u64,
    layers: u32,
    kv_heads: u32,
    key_dim: u32,
    /// 0 for a single-plane (MLA) cache.
    value_dim: u32,
}

impl From<ListedProfile> for Listed {
    fn from(listed: ListedProfile) -> Self {
        let [key_dim, value_dim] = listed.dims;
        Self {
            digest: listed.digest.to_string(),
            bytes: listed.bytes,
            layers: listed.layers,
            kv_heads: listed.kv_heads,
            key_dim,
            value_dim,
        }
    }
}

pub(crate) async fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<()> {
    match &arguments.command {
        None | Some(Command::Ls) => list(context).await,
        Some(Command::Put { file }) => put(context, file).await,
        Some(Command::Get { digest, file }) => get(context, *digest, file).await,
        Some(Command::Rm { digest }) => remove(context, *digest).await,
    }
}

async fn list(context: &Context) -> anyhow::Result<()> {
    let profiles = context.connect().await?.profiles().await?;
    let profiles = profiles.into_iter().map(Listed::from).collect();
    let listing = Listing { profiles };
    context.print(&listing, |out| {
        let mut bytes = 0;
        for (row, profile) in listing.profiles.iter().enumerate() {
            if row == 0 {
                writeln!(
                    out,
                    "{:<64} {:>10} {:>6} {:>5} DIMS",
                    "DIGEST", "BYTES", "LAYERS", "HEADS"
                )?;
            }
            bytes += profile.bytes;
            writeln!(
                out,
                "{} {:>10} {:>6} {:>5} {}+{}",
                profile.digest,
                size(profile.bytes),
                profile.layers,
                profile.kv_heads,
                profile.key_dim,
                profile.value_dim
            )?;
        }
        let count = listing.profiles.len();
        writeln!(out, "{count} profiles, {}", size(bytes))
    })
}

async fn put(context: &Context, file: &Path) -> anyhow::Result<()> {
    let client = context.connect().await?;
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let profile = Profile::parse(&bytes).with_context(|| {
        format!(
            "{} is not an intact profile as `kvasir-bench profile` writes it",
            file.display()
        )
    })?;
    let digest = ProfileDigest::from_bytes(*profile.digest());
    let put = client
        .put_profile(&Arc::new(profile))
        .await
        .with_context(|| format!("cannot store {}", file.display()))?;
    let outcome = match put.outcome {
        PutOutcome::Stored => "stored",
        PutOutcome::AlreadyPresent => "already-present",
    };
    let bytes = bytes.len() as u64;
    let report = json!({
        "digest": digest.to_string(),
        "file": file,
        "bytes": bytes,
        "outcome": outcome,
        "durable": put.durable,
    });
    let durable = if put.durable { "" } else { ", in memory only" };
    context.print(&report, |out| {
        writeln!(out, "{digest} {} {outcome}{durable}", size(bytes))
    })
}

async fn get(context: &Context, digest: ProfileDigest, file: &Path) -> anyhow::Result<()> {
    let client = context.connect().await?;
    let Some(profile) = client.get_profile(digest).await? else {
        bail!("profile {digest} is not stored; `kvasir profiles` lists what is");
    };
    write_whole(file, &[profile.as_bytes()])
        .with_context(|| format!("cannot write {}", file.display()))?;
    let bytes = profile.as_bytes().len() as u64;
    let report = json!({"digest": digest.to_string(), "file": file, "bytes": bytes});
    context.print(&report, |out| {
        writeln!(out, "{} in {}", size(bytes), file.display())
    })
}

async fn remove(context: &Context, digest: ProfileDigest) -> anyhow::Result<()> {
    let client = context.connect().await?;
    if !client.delete_profile(digest).await? {
        bail!("profile {digest} is not stored; `kvasir profiles` lists what is");
    }
    context.print(&json!({"deleted": 1}), |out| writeln!(out, "1 deleted"))
}
