//! `kvasir ls`.

use std::io::{self, Write as _};

use clap::Args;
use kvasir_client::{ListOptions, ListedChunk, Tier};
use kvasir_types::ChunkKey;
use serde::Serialize;

use crate::context::Context;
use crate::output::{Layout, size};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Only chunks after this key.
    #[arg(long, value_name = "KEY")]
    after: Option<ChunkKey>,
    /// At most this many; 0 means all.
    #[arg(long, default_value_t = 0, value_name = "N")]
    limit: u64,
}

#[derive(Serialize)]
struct Listing {
    chunks: Vec<Chunk>,
}

#[derive(Serialize)]
struct Chunk {
    key: String,
    layout: Layout,
    level: u8,
    bytes: u64,
    tiers: Vec<Tier>,
}

impl From<ListedChunk> for Chunk {
    fn from(listed: ListedChunk) -> Self {
        Self {
            key: listed.key.to_string(),
            layout: Layout::from(&listed.layout),
            level: listed.level.code(),
            bytes: listed.bytes,
            tiers: listed.tiers,
        }
    }
}

pub(crate) async fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<()> {
    let client = context.connect().await?;
    let mut listing = client
        .list(ListOptions {
            after: arguments.after,
            limit: arguments.limit,
        })
        .await?;
    if context.json {
        let chunks = listing.collect().await?;
        let chunks = chunks.into_iter().map(Chunk::from).collect();
        return context.print(&Listing { chunks }, |_| Ok(()));
    }
    // Rows appear as they come: a listing may be long.
    let mut out = io::stdout();
    let (mut count, mut bytes) = (0u64, 0u64);
    while let Some(chunk) = listing.next().await? {
        if count == 0 {
            writeln!(
                out,
                "{:<64} {:>10} {:>7} {:<7} TIERS",
                "KEY", "BYTES", "TOKENS", "DTYPE"
            )?;
        }
        count += 1;
        bytes += chunk.bytes;
        let tiers: Vec<String> = chunk.tiers.iter().map(Tier::to_string).collect();
        writeln!(
            out,
            "{} {:>10} {:>7} {:<7} {}",
            chunk.key,
            size(chunk.bytes),
            chunk.layout.tokens(),
            chunk.layout.dtype().to_string(),
            tiers.join(",")
        )?;
    }
    writeln!(out, "{count} chunks, {}", size(bytes))?;
    Ok(())
}
