//! The calls.

use std::sync::Arc;

use kvasir_events::hash::{self, Hash, Item, Prompt};
use kvasir_events::{Counts, Held, Located, Source, SourceId, Standing};
use kvasir_proto::v1::prefix_index_server::PrefixIndex;
use kvasir_proto::{InvalidField, v1};
use tonic::{Request, Response, Status};

use crate::state::State;

/// Serves one index.
#[derive(Clone, Debug)]
pub(crate) struct Service(Arc<State>);

/// What a prompt's blocks are called.
#[derive(Debug, Default)]
struct Names {
    blocks: Vec<u64>,
    /// Whole; none where only 64 bits are known.
    whole: Vec<Hash>,
    block_size: u64,
}

impl Service {
    pub(crate) const fn new(state: Arc<State>) -> Self {
        Self(state)
    }
}

#[tonic::async_trait]
impl PrefixIndex for Service {
    async fn locate(
        &self,
        request: Request<v1::LocateRequest>,
    ) -> Result<Response<v1::LocateResponse>, Status> {
        let state = Arc::clone(&self.0);
        // A long prompt takes tens of milliseconds to hash.
        let answer = tokio::task::spawn_blocking(move || locate(&state, request.get_ref()));
        let answer = answer
            .await
            .map_err(|_| Status::internal("locating failed"))?;
        Ok(Response::new(answer?))
    }

    async fn publishers(
        &self,
        _: Request<v1::PublishersRequest>,
    ) -> Result<Response<v1::PublishersResponse>, Status> {
        let publishers = self.0.read(|index| {
            let all = index.sources().map(|(id, source)| publisher(id, source));
            all.collect()
        });
        Ok(Response::new(v1::PublishersResponse { publishers }))
    }
}

fn locate(state: &State, request: &v1::LocateRequest) -> Result<v1::LocateResponse, InvalidField> {
    let names = names(state, request)?;
    let asked = |at: usize| {
        let model = state.model(at);
        request.model.is_empty() || model.is_empty() || model == request.model
    };
    let locations = state.read(|index| {
        let kinds = index.sources().map(|(_, source)| kind(source));
        index
            .locate(&names.blocks, &names.whole)
            .zip(kinds)
            .enumerate()
            .filter(|(at, _)| asked(*at))
            .map(|(_, (located, kind))| location(located, kind, names.block_size))
            .collect()
    });
    Ok(v1::LocateResponse {
        locations,
        blocks: count(names.blocks.len()),
    })
}

fn names(state: &State, request: &v1::LocateRequest) -> Result<Names, InvalidField> {
    let given = [
        !request.hashes.is_empty(),
        !request.whole_hashes.is_empty(),
        request.prompt.is_some(),
    ];
    if given.iter().filter(|given| **given).count() > 1 {
        let problem = "give one of hashes, whole_hashes and prompt";
        return Err(InvalidField::new("prompt", problem));
    }
    if let Some(wire) = &request.prompt {
        return of_prompt(state, wire);
    }
    let most = |field, length: usize| {
        let problem = || format!("{length} are more than {MAX_BLOCKS}");
        (length <= MAX_BLOCKS)
            .then_some(())
            .ok_or_else(|| InvalidField::new(field, problem()))
    };
    most("hashes", request.hashes.len())?;
    most("whole_hashes", request.whole_hashes.len())?;
    if !request.hashes.is_empty() {
        return Ok(Names {
            blocks: request.hashes.clone(),
            ..Names::default()
        });
    }
    let whole = request
        .whole_hashes
        .iter()
        .map(|bytes| Hash::try_from(bytes.as_ref()));
    let whole: Vec<Hash> = whole
        .collect::<Result<_, _>>()
        .map_err(|_| InvalidField::new("whole_hashes", "a hash of sha256_cbor has 32 bytes"))?;
    Ok(Names {
        blocks: whole.iter().map(hash::low64).collect(),
        whole,
        block_size: 0,
    })
}

fn of_prompt(state: &State, wire: &v1::Prompt) -> Result<Names, InvalidField> {
    let size = wire.block_size as usize;
    let blocks = wire.token_ids.len().checked_div(size);
    if blocks.is_none_or(|blocks| blocks > MAX_BLOCKS) || wire.token_ids.len() > MAX_TOKENS {
        let problem = format!(
            "blocks have at least one token, and there are at most {MAX_BLOCKS} blocks and {MAX_TOKENS} tokens"
        );
        return Err(InvalidField::new("prompt.block_size", problem));
    }
    let items: Vec<Item<'_>> = wire
        .items
        .iter()
        .map(|item| Item {
            identifier: &item.identifier,
            offset: item.offset as usize,
            length: item.length as usize,
        })
        .collect();
    let ordered = |pair: &[Item<'_>]| matches!(pair, [a, b] if a.offset + a.length <= b.offset);
    if !items.windows(2).all(ordered) {
        let problem = "items follow each other and do not overlap";
        return Err(InvalidField::new("prompt.items", problem));
    }
    let path = Some(wire.lora_path.as_str()).filter(|path| !path.is_empty());
    let lora = Some((wire.lora_name.as_str(), path)).filter(|(name, _)| !name.is_empty());
    let prompt = Prompt {
        tokens: &wire.token_ids,
        lora,
        salt: &wire.cache_salt,
        items: &items,
    };
    let whole = hash::prompt_hashes(state.none_hash(), size, &prompt);
    Ok(Names {
        blocks: whole.iter().map(hash::low64).collect(),
        whole,
        block_size: u64::from(wire.block_size),
    })
}

fn location(located: Located, kind: v1::publisher_id::Kind, block_size: u64) -> v1::Location {
    let Located { id, standing, held } = located;
    let Held { blocks, media } = held;
    let medium = |(medium, blocks): (String, usize)| v1::MediumBlocks {
        medium,
        blocks: count(blocks),
    };
    v1::Location {
        publisher: Some(id_to_wire(&id, kind)),
        standing: standing_to_wire(standing).into(),
        blocks: count(blocks),
        tokens: blocks as u64 * block_size,
        media: media.into_iter().map(medium).collect(),
    }
}

fn publisher(id: &SourceId, source: &Source) -> v1::Publisher {
    let wire_id = Some(id_to_wire(id, kind(source)));
    match source {
        Source::Engine(it) => {
            let Counts {
                batches,
                duplicates,
                gaps,
                restarts,
                replays,
                malformed,
                unknown,
            } = it.counts();
            v1::Publisher {
                id: wire_id,
                standing: standing_to_wire(it.standing()).into(),
                blocks: it.blocks() as u64,
                sequence: it.sequence(),
                refused: it.refused(),
                batches,
                duplicates,
                gaps,
                malformed,
                restarts,
                replays,
                unknown,
                block_size: it.block_size().unwrap_or(0),
                hash_function: match it.hashes_agree() {
                    None => v1::HashFunction::Unspecified,
                    Some(true) => v1::HashFunction::Sha256Cbor,
                    Some(false) => v1::HashFunction::Other,
                }
                .into(),
                ..v1::Publisher::default()
            }
        }
        Source::Daemon(it) => {
            let (copies, epoch, sequence) = it.position();
            v1::Publisher {
                id: wire_id,
                standing: standing_to_wire(it.standing()).into(),
                blocks: copies as u64,
                sequence: Some(sequence),
                epoch,
                refused: it.refused(),
                replays: it.snapshots(),
                has_namespace: it.has_namespace(),
                ..v1::Publisher::default()
            }
        }
    }
}

const fn kind(source: &Source) -> v1::publisher_id::Kind {
    match source {
        Source::Engine(_) => v1::publisher_id::Kind::Engine,
        Source::Daemon(_) => v1::publisher_id::Kind::Daemon,
    }
}

fn id_to_wire(id: &SourceId, kind: v1::publisher_id::Kind) -> v1::PublisherId {
    v1::PublisherId {
        kind: kind.into(),
        name: id.name.clone(),
        rank: id.rank,
    }
}

const fn standing_to_wire(standing: Standing) -> v1::Standing {
    match standing {
        Standing::Behind => v1::Standing::Behind,
        Standing::Partial => v1::Standing::Partial,
        Standing::Complete => v1::Standing::Complete,
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Most blocks of a request.
const MAX_BLOCKS: usize = 131_072;
/// Most tokens of a request.
const MAX_TOKENS: usize = 1_048_576;
