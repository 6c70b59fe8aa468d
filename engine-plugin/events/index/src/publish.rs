//! Publishes KV events as vLLM does, so that routers that read vLLM's can read these.
//!
//! A PUB socket with frames `[topic, number, batch]`, numbers from 0, big-endian; and a ROUTER
//! socket that sends the last batches again to who asks with a number: each as
//! `["", topic, number, batch]`, and `["", "", -1, ""]` behind the last one.
//!
//! ZeroMQ drops what a slow subscriber does not take: that is what replays are for.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use kvasir_events::wire::{Batch, Event, Form, Unknown};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use zeromq::{
    PubSocket, RouterSendHalf, RouterSocket, Socket as _, SocketRecv as _, SocketSend as _,
    ZmqError, ZmqMessage,
};

use crate::subscribe::END;

/// What is published, and how.
#[derive(Clone, Debug)]
pub struct PublishConfig {
    /// Where to publish: `tcp://HOST:PORT`; port 0 takes a free one.
    pub address: String,
    /// Where to send batches again.
    pub replay: Option<String>,
    /// First frame of every batch.
    pub topic: String,
    /// Form of the events.
    pub form: Form,
    /// Rank in every batch.
    pub rank: Option<u32>,
    /// Batches that are kept to be sent again. vLLM's default is 10,000.
    pub buffer: usize,
}

/// A publisher. It ends when it is dropped.
#[derive(Debug)]
pub struct EventPublisher {
    address: String,
    replay: Option<String>,
    batches: mpsc::Sender<(f64, Vec<Event>)>,
    _task: JoinSet<()>,
}

/// Nothing can be published any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the publisher's task has ended")]
pub struct PublisherEnded;

impl EventPublisher {
    /// Listens on both addresses.
    ///
    /// # Errors
    /// One of them cannot be listened on.
    pub async fn bind(config: PublishConfig) -> Result<Self, ZmqError> {
        let mut publish = PubSocket::new();
        let address = publish.bind(&config.address).await?.to_string();
        let mut router = RouterSocket::new();
        let replay = match &config.replay {
            Some(replay) => Some(router.bind(replay).await?.to_string()),
            None => None,
        };
        let (batches, receiver) = mpsc::channel(QUEUE);
        let mut task = JoinSet::new();
        task.spawn(run(config, publish, router, receiver));
        Ok(Self {
            address,
            replay,
            batches,
            _task: task,
        })
    }

    /// Where it publishes, with its port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where it sends batches again.
    pub fn replay(&self) -> Option<&str> {
        self.replay.as_deref()
    }

    /// Publishes a batch. `timestamp`: seconds since 1970; no two batches should have the same,
    /// because readers tell a publisher from the one before it by what its batches contain.
    ///
    /// Waits while 1024 batches are on their way.
    ///
    /// # Errors
    /// The publisher has ended.
    pub async fn publish(&self, timestamp: f64, events: Vec<Event>) -> Result<(), PublisherEnded> {
        let sent = self.batches.send((timestamp, events)).await;
        sent.map_err(|_| PublisherEnded)
    }
}

async fn run(
    config: PublishConfig,
    mut publish: PubSocket,
    router: RouterSocket,
    mut batches: mpsc::Receiver<(f64, Vec<Event>)>,
) {
    let topic = Bytes::from(config.topic.clone());
    let mut buffer: VecDeque<(u64, Bytes)> = VecDeque::new();
    let mut next = 0u64;
    let (replies, mut requests) = router.split();
    // Apart, so that who asks and does not listen holds up nobody else.
    let mut answers = JoinSet::new();
    loop {
        tokio::select! {
            batch = batches.recv() => {
                let Some((timestamp, events)) = batch else { return };
                let batch = Batch {
                    timestamp,
                    events,
                    rank: config.rank,
                    unknown: Unknown::default(),
                };
                let payload = Bytes::from(batch.encode(config.form));
                let message = frames([topic.clone(), number(next), payload.clone()]);
                if let Err(error) = publish.send(message).await {
                    tracing::debug!(%error, "a batch was not published");
                }
                buffer.push_back((next, payload));
                if buffer.len() > config.buffer {
                    buffer.pop_front();
                }
                next += 1;
            }
            request = requests.recv(), if config.replay.is_some() => match request {
                Ok(request) => {
                    while answers.try_join_next().is_some() {}
                    let Some((from, before)) = asked(&request) else { continue };
                    if answers.len() >= ANSWERS {
                        tracing::warn!("too many replays at once; one is not sent");
                        continue;
                    }
                    let kept = buffer.iter().filter(|(at, _)| *at >= from).cloned().collect();
                    let answer = answer(replies.clone(), before, topic.clone(), kept);
                    answers.spawn(timeout(ANSWER, answer));
                }
                Err(error) => tracing::debug!(%error, "a replay was not asked for properly"),
            },
        }
    }
}

/// The number that is asked for, and what stands before it: the peer's name and, from a REQ
/// socket, an empty frame. It stands before the answers, too.
fn asked(request: &ZmqMessage) -> Option<(u64, Vec<Bytes>)> {
    let mut frames: Vec<Bytes> = request.iter().cloned().collect();
    let number = <[u8; 8]>::try_from(frames.pop()?.as_ref()).ok()?;
    Some((u64::from_be_bytes(number), frames))
}

async fn answer(
    mut replies: RouterSendHalf,
    before: Vec<Bytes>,
    topic: Bytes,
    kept: Vec<(u64, Bytes)>,
) {
    let batches = kept
        .into_iter()
        .map(|(at, payload)| [topic.clone(), number(at), payload]);
    let end = [Bytes::new(), number(END), Bytes::new()];
    for frames in batches.chain([end]) {
        let frames: VecDeque<Bytes> = before.iter().cloned().chain(frames).collect();
        let Ok(message) = ZmqMessage::try_from(frames) else {
            return;
        };
        if let Err(error) = replies.send(message).await {
            tracing::debug!(%error, "a replay was not sent");
            return;
        }
    }
}

fn number(number: u64) -> Bytes {
    Bytes::copy_from_slice(&number.to_be_bytes())
}

fn frames(frames: [Bytes; 3]) -> ZmqMessage {
    let [first, rest @ ..] = frames;
    let mut message = ZmqMessage::from(first);
    rest.into_iter().for_each(|frame| message.push_back(frame));
    message
}

/// Replays that are sent at once; who asks for more is not answered, and asks again.
const ANSWERS: usize = 16;
/// How long a replay may wait for its peer.
const ANSWER: Duration = Duration::from_secs(10);
/// Batches that wait to be published.
const QUEUE: usize = 1024;
