//! `kill -9` of a real daemon.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use kvasir_client::{
    Chunk, Client, ClientConfig, GetEvent, GetOptions, LostReason, PutOptions, RetryConfig, Tier,
};
use kvasir_server::child::{ListeningChild, daemon_command};
use kvasir_types::{ByteSize, Durability};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::power::{CLIENTS, ROOMY, TIGHT};
use super::{Chunks, Got, Ledger, Load, Outcome, Target, check};

/// A series of kills of daemons on one directory.
#[derive(Clone, Copy, Debug)]
pub struct Kills<'a> {
    /// The daemon's binary.
    pub binary: &'a str,
    /// Decides everything but timing.
    pub seed: u64,
    /// How many.
    pub crashes: u32,
    /// Less than the chunks take, so that there are evictions.
    pub tight: bool,
}

impl Kills<'_> {
    /// Loads a daemon, kills it, starts it again, checks it, and goes on.
    ///
    /// # Errors
    /// A daemon does not start or does not answer.
    pub async fn run(self, chunks: &Chunks) -> anyhow::Result<Outcome> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let directory = tempfile::tempdir()?;
        let data = directory.path();
        let ledger = Ledger::new(chunks.count());
        let mut outcome = Outcome::default();
        let (mut daemon, mut target) = self.start(data, chunks).await?;
        for crash in 0..self.crashes {
            let load = Load::start(&target, &ledger, CLIENTS, random.random());
            tokio::time::sleep(random.random_range(MIN_LOAD..MAX_LOAD)).await;
            let snapshot = ledger.snapshot();
            // Dropped, it is killed.
            drop(daemon);
            load.stop().await;
            let capacity = self.tight.then_some(TIGHT.as_u64());
            let expected = ledger.expectations(&snapshot, chunks, capacity);
            (daemon, target) = self.start(data, chunks).await?;
            let checked = check(&target, data, &expected).await?;
            ledger.restart(&expected, &checked.found);
            outcome.record(self.seed, crash, &checked);
        }
        Ok(outcome)
    }

    async fn start(
        self,
        data: &Path,
        chunks: &Chunks,
    ) -> anyhow::Result<(ListeningChild, DaemonTarget)> {
        let config = data.join("kvasird.toml");
        std::fs::write(&config, "[disk]\npolicy = \"lru\"\n")?;
        let mut command = daemon_command(self.binary.as_ref(), data, MEMORY, "127.0.0.1:0");
        let capacity = if self.tight { TIGHT } else { ROOMY };
        command.arg("--config").arg(config);
        command.arg("--disk").arg(capacity.to_string());
        command.env("RUST_LOG", "error");
        let daemon = ListeningChild::start(command)?;
        let client = Client::connect_with(ClientConfig {
            endpoint: daemon.address().parse()?,
            retry: RetryConfig::NEVER,
            ..ClientConfig::default()
        })
        .await
        .context("a daemon that was killed starts again and answers")?;
        let target = DaemonTarget {
            client,
            chunks: chunks.clone(),
        };
        Ok((daemon, target))
    }
}

#[derive(Clone, Debug)]
struct DaemonTarget {
    client: Client,
    chunks: Chunks,
}

impl Target for DaemonTarget {
    async fn put(&self, number: u32, durability: Durability) -> bool {
        let object = self.chunks.object(number);
        let chunk = Chunk {
            key: self.chunks.key(number),
            layout: *object.header().layout(),
            level: object.header().level(),
            extents: object.extents().to_vec(),
        };
        let options = PutOptions {
            durability,
            ..PutOptions::default()
        };
        let put = self.client.put_with(&chunk, options).await;
        put.is_ok_and(|put| put.durable)
    }

    async fn get(&self, number: u32) -> Got {
        let key = self.chunks.key(number);
        let Ok(mut stream) = self.client.get(&[key], GetOptions::default()).await else {
            return Got::Failed;
        };
        let Some(info) = stream.chunks().first().copied() else {
            return Got::Miss;
        };
        let mut layers: Vec<Bytes> = Vec::new();
        loop {
            match stream.next().await {
                Ok(Some(GetEvent::Prelude { .. })) => (),
                Ok(Some(GetEvent::Layer { parts, .. })) => layers.extend(parts),
                Ok(Some(GetEvent::Lost { reason, .. })) => {
                    return match reason {
                        LostReason::Corrupt => Got::Miss,
                        _ => Got::Failed,
                    };
                }
                Ok(None) => return self.chunks.compare(number, &info.layout, &layers),
                Err(_) => return Got::Failed,
            }
        }
    }

    async fn delete(&self, number: u32) -> bool {
        self.client.delete(&[self.chunks.key(number)]).await.is_ok()
    }

    async fn disk_usage(&self) -> (u64, u64) {
        let stats = self.client.stats().await.ok();
        let disk = stats.and_then(|stats| stats.tier(Tier::Disk).cloned());
        disk.map_or((0, 0), |disk| (disk.bytes, disk.capacity_bytes))
    }
}

const MIN_LOAD: Duration = Duration::from_millis(5);
const MAX_LOAD: Duration = Duration::from_millis(150);
const MEMORY: ByteSize = ByteSize::mib(8);
