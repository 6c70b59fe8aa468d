//! An engine here, a daemon on the other host, and a prompt.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use kvasir_client::{Carrier, Client};
use kvasir_engine::kv::KvDtype;
use kvasir_engine::model::Model;
use kvasir_engine::scheduler::EngineConfig;
use kvasir_plugin::{CodecConfig, DataPlane, Encoding, LoadPolicy, PluginConfig};
use kvasir_tests::harness::{Answer, Rig, Use};
use kvasir_tests::network::Network;
use kvasir_types::{ByteSize, KvLayout, Level};

use crate::daemon::Daemon;
use crate::link;

pub(super) struct Bed<'a> {
    pub(super) network: &'a Network,
    pub(super) daemon: Daemon,
    pub(super) model: Arc<Model>,
    pub(super) layout: KvLayout,
    pub(super) prompt: Vec<u32>,
    /// Of context.
    pub(super) tokens: usize,
    /// That engines compute on.
    pub(super) threads: usize,
    _data: tempfile::TempDir,
}

impl<'a> Bed<'a> {
    /// A prompt of the corpus.
    pub(super) fn new(network: &'a Network, model: &Path, tokens: usize) -> anyhow::Result<Self> {
        let model = Arc::new(Model::load(model)?);
        let prompt = link::prompt(tokens)?;
        Self::of(network, model, prompt, tokens)
    }

    /// A prompt whose first `tokens` tokens are its context.
    pub(super) fn of(
        network: &'a Network,
        model: Arc<Model>,
        prompt: Vec<u32>,
        tokens: usize,
    ) -> anyhow::Result<Self> {
        let data = tempfile::tempdir()?;
        Ok(Self {
            daemon: Daemon::start_on(network.far(), data.path(), ByteSize::gib(1), 0)?,
            layout: kvasir_engine::cache::layout(model.config(), KvDtype::F16, CHUNK_TOKENS)?,
            network,
            model,
            prompt,
            tokens,
            threads: EngineConfig::for_tokens(tokens).threads,
            _data: data,
        })
    }

    /// An engine whose chunks are stored at `stored`.
    pub(super) fn rig(&self, stored: Level, change: impl FnOnce(&mut PluginConfig)) -> Rig {
        let mut config = PluginConfig {
            data_plane: DataPlane::Quic,
            load: LoadPolicy::Always,
            lookup_timeout: Duration::from_secs(5),
            cooldown: Duration::from_millis(10),
            codec: CodecConfig {
                encoding: Encoding::at(stored),
                rotation: Some(kvasir_engine::cache::rotation(self.model.config())),
                ..CodecConfig::default()
            },
            ..PluginConfig::default()
        };
        change(&mut config);
        let salt = [stored.code()];
        let namespace = kvasir_engine::cache::namespace(&self.model, self.layout, &[0; 32], &salt);
        let model = Arc::clone(&self.model);
        let engine = EngineConfig {
            threads: self.threads,
            ..EngineConfig::for_tokens(self.prompt.len() + 32)
        };
        Rig::start_with(model, namespace, engine, self.daemon.address(), config)
    }

    /// Has the context stored at each of the levels, over a fast link.
    pub(super) async fn store(&self) -> anyhow::Result<()> {
        for level in [Level::RAW, Level::LOSSLESS, Level::L2] {
            self.store_at(level).await?;
        }
        Ok(())
    }

    pub(super) async fn store_at(&self, level: Level) -> anyhow::Result<Answer> {
        self.network.set_mbps(10_000)?;
        let client = Client::connect(self.daemon.address()).await?;
        let writer = self.rig(level, |_| {});
        let answer = writer.ask(&self.prompt, Use::Write).await;
        let keys = writer.plugin.namespace().prefix_keys(&self.prompt);
        ensure!(keys.len() * CHUNK_TOKENS as usize >= self.tokens);
        // What is computed behind the context is not looked for.
        writer
            .stored(&client, &self.prompt[..self.tokens + 1])
            .await;
        Ok(answer)
    }

    /// Waits until a rig's gets go over QUIC.
    pub(super) async fn connected(&self, rig: &Rig) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            let path = rig.plugin.data_path().filter(|path| path.connected);
            if path.is_some_and(|path| path.carrier == Carrier::Quic) {
                return Ok(());
            }
            let waited = begun.elapsed();
            ensure!(waited < Duration::from_secs(20), "QUIC never connected");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A context that comes from the cache, all of it.
    pub(super) async fn fetch(&self, rig: &Rig) -> anyhow::Result<Answer> {
        let answer = rig.ask(&self.prompt, Use::Read).await;
        let cached = answer.usage.cached_tokens;
        ensure!(cached == self.tokens, "{cached} tokens came from the cache");
        Ok(answer)
    }
}

pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
pub(super) fn as_f64(value: u64) -> f64 {
    value as f64
}

pub(super) const CHUNK_TOKENS: u32 = 256;
