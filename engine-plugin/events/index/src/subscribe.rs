//! Follows one engine over ZeroMQ.
//!
//! Two sockets: SUB for what is published, and for every replay a DEALER, which the engine's
//! ROUTER answers with the batches that it keeps. The state is [`Publisher`]'s; here are only
//! sockets and time.
//!
//! What comes live is always taken before what is replayed, the end of its connection
//! included: an engine that has been restarted answers replays at the address of the one before.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::channel::mpsc as events;
use kvasir_events::{Ask, Publisher};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use zeromq::{
    DealerSocket, Socket as _, SocketEvent, SocketRecv as _, SocketSend as _, SubSocket, ZmqError,
    ZmqMessage,
};

use crate::config::EngineConfig;
use crate::state::State;

/// Why an engine is not followed at the moment. It is tried again.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    /// Nobody listens, or it is no publisher.
    #[error("cannot connect")]
    Connect(#[source] ZmqError),
    #[error("nobody answered within {CONNECT:?}")]
    ConnectTimeout,
    /// The connection ended.
    #[error("the connection ended")]
    Ended,
    /// What came is not ZeroMQ.
    #[error("the connection failed")]
    Failed(#[source] ZmqError),
}

/// Follows an engine for ever, at its place in the index.
pub(crate) async fn follow(state: Arc<State>, at: usize, engine: EngineConfig) {
    let mut pause = FIRST_PAUSE;
    loop {
        let begun = Instant::now();
        let Err(error) = session(&state, at, &engine).await;
        state.with_engine(at, Publisher::disconnected);
        if begun.elapsed() > LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        warn(&engine, &error, "not followed; its blocks are not offered");
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn session(
    state: &State,
    at: usize,
    engine: &EngineConfig,
) -> Result<std::convert::Infallible, SessionError> {
    let mut socket = SubSocket::new();
    let mut monitor = socket.monitor();
    // Before connecting: it is sent with the greeting.
    socket
        .subscribe(&engine.topic)
        .await
        .map_err(SessionError::Connect)?;
    timeout(CONNECT, socket.connect(&engine.address))
        .await
        .map_err(|_| SessionError::ConnectTimeout)?
        .map_err(SessionError::Connect)?;
    let mut replay = Replay::none();
    let ask = state.with_engine(at, Publisher::connected);
    replay.start(engine, ask);
    let mut check = interval(engine.check);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut retry: Option<Instant> = None;
    let mut standing = None;
    loop {
        let now = state.with_engine(at, |it| it.standing());
        if standing != Some(now) {
            tracing::info!(engine = %engine.id(), standing = ?now, "followed");
            standing = Some(now);
        }
        tokio::select! {
            biased;
            message = socket.recv() => {
                let message = message.map_err(SessionError::Failed)?;
                let Some((sequence, payload)) = numbered(&message) else {
                    tracing::warn!(engine = %engine.id(), frames = message.len(), "not a batch");
                    continue;
                };
                let ask = state.with_engine(at, |it| it.live(sequence, &payload));
                replay.start(engine, ask);
            }
            () = ended(&mut monitor) => return Err(SessionError::Ended),
            reply = replay.next() => match reply {
                Reply::Batch(sequence, payload) => {
                    state.with_engine(at, |it| it.replayed(sequence, &payload));
                }
                Reply::End => {
                    replay = Replay::none();
                    let ask = state.with_engine(at, Publisher::replay_ended);
                    replay.start(engine, ask);
                }
                Reply::Failed(error) => {
                    warn(engine, &error, "no replay; asking again");
                    replay = Replay::none();
                    state.with_engine(at, Publisher::unanswered);
                    retry = Some(Instant::now() + RETRY);
                }
            },
            () = due(retry) => {
                retry = None;
                let ask = state.with_engine(at, Publisher::connected);
                replay.start(engine, ask);
            }
            _ = check.tick() => {
                let ask = state.with_engine(at, Publisher::check);
                replay.start(engine, ask);
            }
        }
    }
}

fn warn(engine: &EngineConfig, error: &(dyn std::error::Error + 'static), what: &str) {
    tracing::warn!(engine = %engine.id(), error, "{what}");
}

/// Waits until then; for ever, where there is no such time.
async fn due(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => futures::future::pending().await,
    }
}

/// Waits until the connection has ended.
async fn ended(monitor: &mut events::Receiver<SocketEvent>) {
    loop {
        match monitor.next().await {
            Some(SocketEvent::Disconnected(_) | SocketEvent::Closed) => return,
            Some(_) => {}
            None => futures::future::pending().await,
        }
    }
}

/// The number and the contents of a batch: the last two frames, whatever stands before them.
fn numbered(message: &ZmqMessage) -> Option<(u64, Bytes)> {
    let last = message.len().checked_sub(1)?;
    let number = message.get(last.checked_sub(1)?)?;
    let number = <[u8; 8]>::try_from(number.as_ref()).ok()?;
    Some((u64::from_be_bytes(number), message.get(last)?.clone()))
}

/// A replay under way, or none.
struct Replay(Option<(tokio::sync::mpsc::Receiver<Reply>, tokio::task::JoinSet<()>)>);

enum Reply {
    Batch(u64, Bytes),
    End,
    Failed(ReplayError),
}

/// Why a replay did not come to its end.
#[derive(Debug, thiserror::Error)]
enum ReplayError {
    #[error("cannot ask at the replay address")]
    Socket(#[source] ZmqError),
    #[error("nobody answered within {ANSWER:?} at the replay address")]
    Timeout,
    #[error("the answer is not a batch")]
    Answer,
}

impl Replay {
    const fn none() -> Self {
        Self(None)
    }

    /// Asks, if that is due. What was asked before is not answered any more.
    fn start(&mut self, engine: &EngineConfig, ask: Option<Ask>) {
        let (Some(ask), Some(address)) = (ask, engine.replay.clone()) else {
            return;
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(REPLIES);
        let mut task = tokio::task::JoinSet::new();
        task.spawn(async move {
            if let Err(error) = replay(&address, ask, &sender).await {
                // Nobody listens to one that was given up.
                let _ = sender.send(Reply::Failed(error)).await;
            }
        });
        self.0 = Some((receiver, task));
    }

    /// Waits for the next answer; for ever where nothing was asked.
    async fn next(&mut self) -> Reply {
        if let Some((replies, _)) = &mut self.0
            && let Some(reply) = replies.recv().await
        {
            return reply;
        }
        futures::future::pending().await
    }
}

async fn replay(
    address: &str,
    ask: Ask,
    replies: &tokio::sync::mpsc::Sender<Reply>,
) -> Result<(), ReplayError> {
    let mut socket = DealerSocket::new();
    let timed = |_| ReplayError::Timeout;
    timeout(ANSWER, socket.connect(address))
        .await
        .map_err(timed)?
        .map_err(ReplayError::Socket)?;
    let mut request = ZmqMessage::from(Bytes::new());
    request.push_back(Bytes::copy_from_slice(&ask.from.to_be_bytes()));
    socket.send(request).await.map_err(ReplayError::Socket)?;
    loop {
        let message = timeout(ANSWER, socket.recv())
            .await
            .map_err(timed)?
            .map_err(ReplayError::Socket)?;
        let (sequence, payload) = numbered(&message).ok_or(ReplayError::Answer)?;
        let reply = match sequence {
            END => Reply::End,
            _ => Reply::Batch(sequence, payload),
        };
        let last = matches!(reply, Reply::End);
        if replies.send(reply).await.is_err() || last {
            return Ok(());
        }
    }
}

/// What stands for a number behind the last batch of a replay: -1.
pub(crate) const END: u64 = u64::MAX;

/// How long an engine may take to greet.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an engine may take to answer, and from one answer to the next.
const ANSWER: Duration = Duration::from_secs(3);
/// When a replay that failed is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Answers that wait to be taken.
const REPLIES: usize = 64;
/// How long after a failure an engine is tried again; twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn message(frames: &[&[u8]]) -> ZmqMessage {
        let frames: Vec<_> = frames.iter().map(|it| Bytes::copy_from_slice(it)).collect();
        ZmqMessage::try_from(frames).unwrap()
    }

    #[test]
    fn number_and_contents_are_the_last_two_frames() {
        let number = 5u64.to_be_bytes();
        let expected = Some((5, Bytes::from_static(b"batch")));
        for before in [&[][..], &[&b"topic"[..]], &[&b""[..], &b"topic"[..]]] {
            let frames = [before, &[&number[..], b"batch"]].concat();
            assert_eq!(numbered(&message(&frames)), expected);
        }
        assert_eq!(
            numbered(&message(&[b"", b"", &[255; 8], b""])),
            Some((END, Bytes::new()))
        );
        assert_eq!(numbered(&message(&[b"batch"])), None);
        assert_eq!(numbered(&message(&[&number[1..], b"batch"])), None);
    }
}
