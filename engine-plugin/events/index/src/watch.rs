//! Follows one cache daemon by its `Watch`.

use std::sync::Arc;
use std::time::Duration;

use kvasir_client::{CallError, Client, ClientConfig, DataPlane, Tier, WatchEvent, WatchedChange};
use kvasir_events::{Copy, Message, Mirror, OutOfStep};
use kvasir_types::ChunkKey;
use tokio::time::sleep;

use crate::config::DaemonConfig;
use crate::state::State;

/// Why a daemon is not followed at the moment. It is tried again.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error("the watch failed")]
    Call(#[from] CallError),
    #[error("the daemon ended the watch")]
    Ended,
    #[error(transparent)]
    OutOfStep(#[from] OutOfStep),
}

/// Follows a daemon for ever, at its place in the index.
pub(crate) async fn follow(state: Arc<State>, at: usize, daemon: DaemonConfig) {
    let client = Client::connect_lazy(ClientConfig {
        endpoint: daemon.endpoint.clone(),
        data_plane: DataPlane::Grpc,
        ..ClientConfig::default()
    });
    loop {
        let Err(error) = session(&state, at, &client).await;
        state.with_daemon(at, Mirror::disconnected);
        warn(&daemon, &error);
        sleep(PAUSE).await;
    }
}

fn warn(daemon: &DaemonConfig, error: &(dyn std::error::Error + 'static)) {
    tracing::warn!(%daemon, error, "not followed; its chunks are not offered");
}

async fn session(
    state: &State,
    at: usize,
    client: &Client,
) -> Result<std::convert::Infallible, WatchError> {
    let mut watch = client.watch().await?;
    loop {
        let event = watch.next().await?.ok_or(WatchError::Ended)?;
        let (epoch, sequence, message) = message(event);
        state.with_daemon(at, |it| it.take(epoch, sequence, &message))?;
    }
}

fn message(event: WatchEvent) -> (u64, u64, Message) {
    let copy = |(key, tier): (ChunkKey, Tier)| Copy {
        key,
        tier: match tier {
            Tier::Memory => "memory",
            Tier::Disk => "disk",
        },
    };
    let message = match event.change {
        WatchedChange::Snapshot { copies, more } => Message::Snapshot {
            copies: copies.into_iter().map(copy).collect(),
            more,
        },
        WatchedChange::Stored { key, tier } => Message::Stored(copy((key, tier))),
        WatchedChange::Removed { key, tier } => Message::Removed(copy((key, tier))),
    };
    (event.epoch, event.sequence, message)
}

/// How long after a failure the daemon is tried again.
const PAUSE: Duration = Duration::from_millis(500);
