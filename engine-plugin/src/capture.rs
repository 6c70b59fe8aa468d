//! Storing new chunks, off the request's path.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kvasir_client::{CallError, Client, PutOptions};
use kvasir_types::{ByteSize, ChunkKey, Durability, Hints, KvLayout};
use tokio::sync::mpsc;
use tracing::warn;

use crate::PluginConfig;
use crate::coding::Coder;

/// Gauge: chunks that wait to be stored.
const WAITING: &str = "kvasir_plugin_chunks_waiting";

/// One chunk copied out of an engine's pages.
#[derive(Clone, Debug)]
pub struct ChunkCopy {
    /// Its key.
    pub key: ChunkKey,
    /// What it holds: the namespace's layout, or, of a content chunk, one with as many
    /// tokens as that has.
    pub layout: KvLayout,
    /// Position of its first token.
    pub start: u64,
    /// Its layers, in order, each in the canonical order of the layout.
    pub layers: Vec<Bytes>,
    /// What it is worth. With the key of the chunk before it as its parent, the cache
    /// drops prompts from their ends.
    pub hints: Hints,
}

/// What became of a chunk handed to [`CachePlugin::capture`](crate::CachePlugin::capture).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptureOutcome {
    /// It will be stored.
    Queued,
    /// Too much is waiting already; it was counted and dropped.
    Dropped,
}

/// What became of captured chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureStats {
    /// Chunks waiting to be stored.
    pub waiting: u64,
    /// Chunks stored, or found present.
    pub stored: u64,
    /// Chunks the daemon refused or could not be reached for.
    pub failed: u64,
    /// Chunks dropped because too much was waiting.
    pub dropped: u64,
}

/// A queue bounded in bytes; overflow drops the newest chunk.
#[derive(Debug)]
pub(crate) struct CaptureQueue {
    // Bounded by `counters.waiting_bytes`, which `push` checks.
    sender: mpsc::UnboundedSender<ChunkCopy>,
    counters: Arc<Counters>,
    capacity: u64,
}

#[derive(Debug, Default)]
struct Counters {
    waiting_bytes: AtomicU64,
    waiting: AtomicU64,
    stored: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
}

impl Counters {
    fn note(&self, stored: Stored) {
        let counter = if stored == Stored::Yes {
            &self.stored
        } else {
            &self.failed
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether the daemon has a chunk now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    Yes,
    /// It answers, and does not take this one.
    Refused,
    NoAnswer,
}

/// How chunks are stored.
#[derive(Clone, Debug)]
pub(crate) struct Storing {
    client: Client,
    coder: Arc<Coder>,
    timeout: Duration,
    durability: Durability,
}

impl Storing {
    pub(crate) fn new(client: Client, coder: Arc<Coder>, config: &PluginConfig) -> Self {
        Self {
            client,
            coder,
            timeout: config.store_timeout,
            durability: config.durability,
        }
    }

    pub(crate) async fn store(&self, chunk: ChunkCopy) -> Stored {
        let (key, timeout) = (chunk.key, self.timeout);
        let options = PutOptions {
            durability: self.durability,
            hints: chunk.hints,
        };
        let chunk = self.coder.encode(chunk).await;
        let put = self.client.put_with(&chunk, options);
        match tokio::time::timeout(timeout, put).await {
            Ok(Ok(_)) => Stored::Yes,
            Ok(Err(error)) => {
                warn!(%key, %error, "a chunk was not stored");
                match error {
                    CallError::Unavailable { .. } | CallError::DeadlineExceeded => Stored::NoAnswer,
                    _ => Stored::Refused,
                }
            }
            Err(_) => {
                warn!(%key, ?timeout, "a chunk was not stored in time");
                Stored::NoAnswer
            }
        }
    }
}

impl CaptureQueue {
    pub(crate) fn start(
        runtime: &tokio::runtime::Handle,
        storing: Storing,
        capacity: ByteSize,
    ) -> Self {
        let (sender, mut chunks) = mpsc::unbounded_channel::<ChunkCopy>();
        let counters = Arc::new(Counters::default());
        metrics::gauge!(WAITING).set(0.0);
        let shared = Arc::clone(&counters);
        runtime.spawn(async move {
            while let Some(chunk) = chunks.recv().await {
                let bytes = chunk.bytes();
                shared.note(storing.store(chunk).await);
                shared.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
                shared.waiting.fetch_sub(1, Ordering::Relaxed);
                metrics::gauge!(WAITING).decrement(1.0);
            }
        });
        Self {
            sender,
            counters,
            capacity: capacity.as_u64(),
        }
    }

    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        self.counters.waiting_bytes.load(Ordering::Relaxed) + bytes <= self.capacity
    }

    pub(crate) fn push(&self, chunk: ChunkCopy) -> CaptureOutcome {
        let bytes = chunk.bytes();
        let queued = self
            .counters
            .waiting_bytes
            .fetch_add(bytes, Ordering::Relaxed)
            + bytes;
        self.counters.waiting.fetch_add(1, Ordering::Relaxed);
        metrics::gauge!(WAITING).increment(1.0);
        // The receiver is gone only when the runtime is shutting down.
        if queued <= self.capacity && self.sender.send(chunk).is_ok() {
            return CaptureOutcome::Queued;
        }
        self.counters
            .waiting_bytes
            .fetch_sub(bytes, Ordering::Relaxed);
        self.counters.waiting.fetch_sub(1, Ordering::Relaxed);
        metrics::gauge!(WAITING).decrement(1.0);
        self.counters.dropped.fetch_add(1, Ordering::Relaxed);
        CaptureOutcome::Dropped
    }

    /// Counts a chunk that did not wait.
    pub(crate) fn note(&self, stored: Stored) {
        self.counters.note(stored);
    }

    pub(crate) fn note_dropped(&self, chunks: u64) {
        self.counters.dropped.fetch_add(chunks, Ordering::Relaxed);
    }

    pub(crate) fn stats(&self) -> CaptureStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CaptureStats {
            waiting: load(&self.counters.waiting),
            stored: load(&self.counters.stored),
            failed: load(&self.counters.failed),
            dropped: load(&self.counters.dropped),
        }
    }
}

impl ChunkCopy {
    fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.len() as u64).sum()
    }
}
