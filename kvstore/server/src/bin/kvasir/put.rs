//! `kvasir put`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use kvasir_client::{Chunk, PutOptions, PutOutcome};
use kvasir_codec::Object;
use kvasir_types::Durability;
use serde::Serialize;

use crate::context::Context;
use crate::output::size;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Files that `get` wrote.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Do not wait until the chunks would survive a crash of the daemon.
    #[arg(long)]
    in_memory: bool,
}

#[derive(Serialize)]
struct Report {
    stored: Vec<Stored>,
}

#[derive(Serialize)]
struct Stored {
    key: String,
    file: PathBuf,
    bytes: u64,
    outcome: &'static str,
    durable: bool,
}

pub(crate) async fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<()> {
    let client = context.connect().await?;
    let sizes = arguments
        .files
        .iter()
        .filter_map(|path| fs::metadata(path).ok());
    let progress = context.progress(sizes.map(|metadata| metadata.len()).sum());
    let options = PutOptions {
        durability: if arguments.in_memory {
            Durability::Memory
        } else {
            Durability::Durable
        },
        ..PutOptions::default()
    };
    let mut stored = Vec::new();
    for path in &arguments.files {
        let chunk = read(path)?;
        let put = client
            .put_with(&chunk, options)
            .await
            .with_context(|| format!("cannot store {}", path.display()))?;
        let bytes = chunk.layout.chunk_bytes();
        progress.inc(bytes);
        stored.push(Stored {
            key: chunk.key.to_string(),
            file: path.clone(),
            bytes,
            outcome: match put.outcome {
                PutOutcome::Stored => "stored",
                PutOutcome::AlreadyPresent => "already-present",
            },
            durable: put.durable,
        });
    }
    progress.finish_and_clear();
    let report = Report { stored };
    context.print(&report, |out| {
        for chunk in &report.stored {
            let durable = if chunk.durable {
                ""
            } else {
                ", in memory only"
            };
            writeln!(
                out,
                "{} {} {}{durable}",
                chunk.key,
                size(chunk.bytes),
                chunk.outcome
            )?;
        }
        Ok(())
    })
}

/// Reads a file and checks all of it.
fn read(path: &Path) -> anyhow::Result<Chunk> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let object = Object::parse(&Bytes::from(bytes)).with_context(|| {
        format!(
            "{} is not an intact chunk as `kvasir get` writes it",
            path.display()
        )
    })?;
    let (header, extents) = object.into_parts();
    Ok(Chunk {
        key: *header.key(),
        layout: *header.layout(),
        level: header.level(),
        extents,
    })
}
