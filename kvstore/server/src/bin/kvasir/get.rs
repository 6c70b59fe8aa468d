//! `kvasir get`.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::Args;
use kvasir_client::{ChunkInfo, Client, GetEvent, GetOptions};
use kvasir_codec::{Object, ObjectHeader};
use kvasir_types::{ChunkKey, Level};
use serde_json::json;

use crate::context::Context;
use crate::output::size;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Key of the chunk, as `ls` prints it.
    key: ChunkKey,
    /// File to write; `put` stores it again.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub(crate) async fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<()> {
    let client = context.connect().await?;
    let key = arguments.key;
    let (info, layers) = fetch(context, &client, key).await?;
    if info.level != Level::RAW {
        bail!(
            "the chunk is stored at level {}, which this version cannot write to a file",
            info.level
        );
    }
    let object = Object::raw(key, &info.layout, layers)?;
    let path = &arguments.output;
    write_whole(path, &object).with_context(|| format!("cannot write {}", path.display()))?;
    let bytes = object.header().object_bytes();
    let report = json!({"key": key.to_string(), "file": path, "bytes": bytes, "tier": info.tier});
    context.print(&report, |out| {
        writeln!(
            out,
            "{} from {} in {}",
            size(bytes),
            info.tier,
            path.display()
        )
    })
}

async fn fetch(
    context: &Context,
    client: &Client,
    key: ChunkKey,
) -> anyhow::Result<(ChunkInfo, Vec<Bytes>)> {
    let mut stream = client.get(&[key], GetOptions::default()).await?;
    let Some(info) = stream.chunks().first().copied() else {
        bail!("chunk {key} is not stored; `kvasir ls` lists what is");
    };
    let progress = context.progress(info.layout.chunk_bytes());
    let mut layers = Vec::new();
    while let Some(event) = stream.next().await? {
        match event {
            GetEvent::Layer { data, .. } => {
                progress.inc(data.len() as u64);
                layers.push(data);
            }
            GetEvent::Lost { reason, .. } => bail!("chunk {key} was lost on the way: {reason}"),
        }
    }
    progress.finish_and_clear();
    Ok((info, layers))
}

/// The file is there whole or not at all.
fn write_whole(path: &Path, object: &Object) -> std::io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let write = || {
        let mut file = File::create(&partial)?;
        file.write_all(&ObjectHeader::encode(object.header()))?;
        for layer in object.layers() {
            file.write_all(layer)?;
        }
        fs::rename(&partial, path)
    };
    write().inspect_err(|_| {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_file(&partial);
    })
}
