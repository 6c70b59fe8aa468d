//! `kvasir get`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::Args;
use kvasir_client::{ChunkInfo, Client, GetEvent, GetOptions};
use kvasir_codec::{Object, ObjectHeader};
use kvasir_types::ChunkKey;
use serde_json::json;

use crate::context::Context;
use crate::output::{size, write_whole};

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
    let (info, extents) = fetch(context, &client, key).await?;
    let object = Object::new(key, &info.layout, info.level, extents)?;
    let path = &arguments.output;
    let header = ObjectHeader::encode(object.header());
    let extents = object.extents().iter().map(Bytes::as_ref);
    let parts: Vec<&[u8]> = std::iter::once(&header[..]).chain(extents).collect();
    write_whole(path, &parts).with_context(|| format!("cannot write {}", path.display()))?;
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
    let layers = info.layout.layers();
    let mut extents = BTreeMap::new();
    while let Some(event) = stream.next().await? {
        match event {
            GetEvent::Prelude { data, .. } => {
                extents.insert(info.level.prelude(), data);
            }
            GetEvent::Layer { layer, parts, .. } => {
                for (part, data) in (0..).zip(parts) {
                    progress.inc(data.len() as u64);
                    let extent = info.level.part_extent(layers, layer.0, part);
                    extents.insert(extent, data);
                }
            }
            GetEvent::Lost { reason, .. } => bail!("chunk {key} was lost on the way: {reason}"),
        }
    }
    progress.finish_and_clear();
    Ok((info, extents.into_values().collect()))
}
