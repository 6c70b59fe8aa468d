//! Asks a running index, from a shell.

use std::io::{self, Read as _};

use anyhow::{Context as _, anyhow};
use clap::{Args, Subcommand};
use kvasir_client::Endpoint;
use kvasir_proto::v1;
use kvasir_proto::v1::prefix_index_client::PrefixIndexClient;
use serde_json::{Value, json};
use tonic::transport::Channel;

#[derive(Debug, Subcommand)]
pub(crate) enum Question {
    /// Ask an index how much of a prompt each publisher holds; prints a line of JSON for each.
    Locate(Locate),
    /// Ask an index how well it knows each publisher; prints a line of JSON for each.
    Publishers(Whom),
}

#[derive(Debug, Args)]
pub(crate) struct Whom {
    /// Address of the index.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7430")]
    index: Endpoint,
}

/// Reads token ids from stdin, as a JSON array.
#[derive(Debug, Args)]
pub(crate) struct Locate {
    #[command(flatten)]
    whom: Whom,
    /// Tokens in a block, as the engines have it.
    #[arg(long, value_name = "TOKENS")]
    block_size: u32,
    /// Name of the adapter.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    lora: String,
    /// Path of the adapter.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "",
        hide_default_value = true
    )]
    lora_path: String,
    /// `cache_salt` of the request.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    salt: String,
    /// Leave out publishers of other models.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    model: String,
}

pub(crate) async fn ask(question: Question) -> anyhow::Result<()> {
    match question {
        Question::Locate(locate) => {
            let mut text = String::new();
            io::stdin()
                .read_to_string(&mut text)
                .context("cannot read stdin")?;
            let ids: Value = serde_json::from_str(&text).context("stdin is not JSON")?;
            let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
            let ids = ids.as_array().and_then(|ids| ids.iter().map(id).collect());
            let token_ids = ids.ok_or_else(|| anyhow!("stdin is not an array of token ids"))?;
            let request = v1::LocateRequest {
                prompt: Some(v1::Prompt {
                    token_ids,
                    block_size: locate.block_size,
                    lora_name: locate.lora,
                    lora_path: locate.lora_path,
                    cache_salt: locate.salt,
                    items: Vec::new(),
                }),
                model: locate.model,
                ..v1::LocateRequest::default()
            };
            let answer = connect(&locate.whom).await?.locate(request).await?;
            for it in answer.into_inner().locations {
                let media = it
                    .media
                    .iter()
                    .map(|it| (it.medium.clone(), it.blocks.into()));
                let media: serde_json::Map<String, Value> = media.collect();
                let mut line = id_fields(it.publisher.as_ref());
                line["standing"] = standing(it.standing());
                line["blocks"] = it.blocks.into();
                line["tokens"] = it.tokens.into();
                line["media"] = media.into();
                println!("{line}");
            }
        }
        Question::Publishers(whom) => {
            let request = v1::PublishersRequest {};
            let answer = connect(&whom).await?.publishers(request).await?;
            for it in answer.into_inner().publishers {
                let mut line = id_fields(it.id.as_ref());
                line["standing"] = standing(it.standing());
                line["sequence"] = it.sequence.into();
                line["hash_function"] = match it.hash_function() {
                    v1::HashFunction::Unspecified => Value::Null,
                    v1::HashFunction::Sha256Cbor => "sha256_cbor".into(),
                    v1::HashFunction::Other => "other".into(),
                };
                for (name, count) in [
                    ("blocks", it.blocks),
                    ("refused", it.refused),
                    ("batches", it.batches),
                    ("duplicates", it.duplicates),
                    ("gaps", it.gaps),
                    ("malformed", it.malformed),
                    ("restarts", it.restarts),
                    ("replays", it.replays),
                    ("unknown", it.unknown),
                    ("block_size", it.block_size.into()),
                ] {
                    line[name] = count.into();
                }
                println!("{line}");
            }
        }
    }
    Ok(())
}

async fn connect(whom: &Whom) -> anyhow::Result<PrefixIndexClient<Channel>> {
    let address = &whom.index;
    let channel = Channel::from_shared(address.to_string())?;
    let channel = channel.connect().await;
    let channel = channel
        .with_context(|| format!("no index answers at {address}; is kvasir-index running?"))?;
    Ok(PrefixIndexClient::new(channel).max_encoding_message_size(8 << 20))
}

fn id_fields(id: Option<&v1::PublisherId>) -> Value {
    let kind = id.map(|id| match id.kind() {
        v1::publisher_id::Kind::Unspecified => "unknown",
        v1::publisher_id::Kind::Engine => "engine",
        v1::publisher_id::Kind::Daemon => "daemon",
    });
    json!({
        "publisher": id.map(|id| id.name.as_str()),
        "rank": id.map(|id| id.rank),
        "kind": kind,
    })
}

fn standing(standing: v1::Standing) -> Value {
    match standing {
        v1::Standing::Unspecified => Value::Null,
        v1::Standing::Behind => "behind".into(),
        v1::Standing::Partial => "partial".into(),
        v1::Standing::Complete => "complete".into(),
    }
}
