//! `kvasir rm`.

use std::collections::BTreeSet;

use anyhow::bail;
use clap::Args;
use kvasir_types::ChunkKey;
use serde_json::json;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Keys of the chunks, as `ls` prints them.
    #[arg(required = true, value_name = "KEY")]
    keys: Vec<ChunkKey>,
}

pub(crate) async fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<()> {
    let client = context.connect().await?;
    let keys: BTreeSet<ChunkKey> = arguments.keys.iter().copied().collect();
    let keys = Vec::from_iter(keys);
    let deleted = client.delete(&keys).await?;
    if deleted == 0 {
        bail!("no such chunk is stored; `kvasir ls` lists what is");
    }
    let absent = keys.len().saturating_sub(deleted as usize);
    context.print(&json!({"deleted": deleted, "absent": absent}), |out| {
        let absent = match absent {
            0 => String::new(),
            count => format!("; {count} were not stored"),
        };
        writeln!(out, "{deleted} deleted{absent}")
    })
}
