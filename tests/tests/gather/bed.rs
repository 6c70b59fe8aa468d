//! A daemon, engines as far as this is concerned, and what they store.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::{Client, GetEvent, GetOptions};
use kvasir_codec::{ChunkDecoder, Prelude};
use kvasir_engine::ModelConfig;
use kvasir_engine::cache::{self, PoolBackend, Turns};
use kvasir_engine::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvPool};
use kvasir_plugin::blend::{ChunkLimits, Gather, GatherOutcome, Segment, Segmented};
use kvasir_plugin::{
    CachePlugin, CaptureOutcome, ChunkCopy, CodecConfig, EngineBackend as _, LayerWait, LoadPolicy,
    PluginConfig,
};
use kvasir_server::child::ListeningChild;
use kvasir_tests::harness::start_daemon;
use kvasir_types::{ChunkKey, Hints, KvLayout, LayerIdx, Level, ModelIdentity, Namespace};
use tokio::runtime::Runtime;

pub(crate) const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");
/// What chunks are compiled behind.
pub(crate) const PREFIX: [u32; 1] = [1];
/// What a busy test machine may add to any measured time.
pub(crate) const NOISE: Duration = Duration::from_secs(5);

/// Loads whatever is there, so that it is certain what was tried.
pub(crate) fn eager() -> PluginConfig {
    PluginConfig {
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(5),
        ..PluginConfig::default()
    }
}

pub(crate) fn at_level(level: Level) -> PluginConfig {
    let mut config = eager();
    config.codec = CodecConfig {
        encoding: kvasir_plugin::Encoding::at(level),
        rotation: Some(cache::rotation(&model())),
        ..CodecConfig::default()
    };
    config
}

pub(crate) fn model() -> ModelConfig {
    let path = "../engine-plugin/engine/fixtures/llama3-gqa/config.json";
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    ModelConfig::from_json(&std::fs::read(path).unwrap()).unwrap()
}

pub(crate) fn namespace(tenant: &str) -> Namespace {
    let layout = cache::layout(&model(), KvDtype::F32, 64).unwrap();
    let model = ModelIdentity {
        architecture: "a".into(),
        weights: "w".into(),
        rope: "r".into(),
    };
    Namespace::new(&model, None, layout, &[0; 32], tenant.as_bytes())
}

/// A document, by its number.
pub(crate) fn document(number: u32, length: u32) -> Segment {
    Segment::Chunk((0..length).map(|at| number * 10_000 + at).collect())
}

pub(crate) fn text(length: u32) -> Segment {
    Segment::Text((0..length).map(|at| 5_000_000 + at).collect())
}

pub(crate) fn cut(tenant: &str, segments: &[Segment]) -> Segmented {
    Segmented::new(
        &namespace(tenant),
        &PREFIX,
        ChunkLimits::default(),
        segments,
    )
}

/// Numbers that a codec can make something of; others for every seed and layer.
pub(crate) fn kv(layout: &KvLayout, seed: u64) -> Vec<Bytes> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut value = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f32::from(u16::try_from(state >> 48).unwrap()) / 16384.0 - 2.0
    };
    let layer = |_| {
        let bytes = (0..layout.layer_bytes() / 4).flat_map(|_| value().to_le_bytes());
        Bytes::from(bytes.collect::<Vec<u8>>())
    };
    (0..layout.layers()).map(layer).collect()
}

pub(crate) struct Bed {
    pub(crate) runtime: Runtime,
    pub(crate) data: tempfile::TempDir,
    pub(crate) daemon: Option<ListeningChild>,
    pub(crate) address: String,
    pub(crate) client: Client,
}

impl Bed {
    pub(crate) fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let data = tempfile::tempdir().unwrap();
        let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
        let address = daemon.address().to_owned();
        let client = runtime.block_on(Client::connect(&address)).unwrap();
        Self {
            runtime,
            data,
            daemon: Some(daemon),
            address,
            client,
        }
    }

    pub(crate) fn stop(&mut self) {
        self.daemon.take().unwrap().stop().unwrap();
    }

    pub(crate) fn start_again(&mut self) {
        self.daemon = Some(start_daemon(DAEMON, self.data.path(), &self.address));
    }

    pub(crate) fn plugin(&self, tenant: &str, config: PluginConfig) -> CachePlugin {
        self.plugin_at(&self.address, tenant, config)
    }

    pub(crate) fn plugin_at(
        &self,
        address: &str,
        tenant: &str,
        config: PluginConfig,
    ) -> CachePlugin {
        let runtime = self.runtime.handle().clone();
        CachePlugin::connect(address, runtime, namespace(tenant), config).unwrap()
    }

    /// Stores the chunks of `segments` as `plugin`'s engine would that compiled them. Their KV
    /// differs by `seed`.
    pub(crate) fn compile(&self, plugin: &CachePlugin, segments: &[Segment], seed: u64) {
        let limits = ChunkLimits::default();
        let prompt = Segmented::new(plugin.namespace(), &PREFIX, limits, segments);
        for chunk in prompt.chunks() {
            let copy = ChunkCopy {
                key: chunk.key(),
                layout: *chunk.layout(),
                start: prompt.prefix().len() as u64,
                layers: kv(chunk.layout(), seed_of(chunk.key(), seed)),
                hints: Hints::default(),
            };
            assert_eq!(plugin.capture(copy), CaptureOutcome::Queued);
        }
        while plugin.capture_stats().waiting > 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(plugin.capture_stats().failed, 0);
    }

    pub(crate) fn delete(&self, key: ChunkKey) {
        let deleted = self.runtime.block_on(self.client.delete(&[key]));
        assert_eq!(deleted.unwrap(), 1);
    }

    /// The layers of a stored chunk as they are once decoded.
    pub(crate) fn stored(&self, key: ChunkKey, layout: &KvLayout) -> Vec<Bytes> {
        let get = self
            .client
            .get(std::slice::from_ref(&key), GetOptions::default());
        let mut stream = self.runtime.block_on(get).unwrap();
        let info = stream.chunks()[0];
        assert_eq!(info.layout, *layout);
        let (mut prelude, mut layers) = (Bytes::new(), Vec::new());
        while let Some(event) = self.runtime.block_on(stream.next()).unwrap() {
            match event {
                GetEvent::Prelude { data, .. } => prelude = data,
                GetEvent::Layer { layer, parts, .. } => layers.push((layer, parts)),
                GetEvent::Lost { reason, .. } => panic!("{reason}"),
            }
        }
        if info.level == Level::RAW {
            return layers
                .into_iter()
                .map(|(_, parts)| parts[0].clone())
                .collect();
        }
        let parsed = Prelude::parse(&prelude, layout).unwrap();
        if info.level.is_nested() {
            // The tokens behind the prefix, where keys are turned by that much.
            let start = PREFIX.len() as u64;
            assert_eq!(parsed.rotation.map(|it| it.start), Some(start));
            assert_eq!(u64::from(parsed.exact_tokens), 4 - start);
        }
        let decoder = ChunkDecoder::new(*layout, info.level, &prelude, &[]).unwrap();
        let decode = |(layer, parts): (LayerIdx, Vec<Bytes>)| {
            let mut raw = vec![0; layout.layer_bytes()];
            decoder.layer(layer, &parts, &mut raw).unwrap();
            Bytes::from(raw)
        };
        layers.into_iter().map(decode).collect()
    }
}

pub(crate) fn seed_of(key: ChunkKey, seed: u64) -> u64 {
    u64::from_le_bytes(*key.as_bytes().first_chunk().unwrap()).wrapping_add(seed)
}

/// An engine's pages, as far as this is concerned.
pub(crate) struct Pages {
    pool: KvPool,
    blocks: Vec<BlockId>,
    turns: Turns,
    layout: KvLayout,
}

impl Pages {
    pub(crate) fn of(prompt: &Segmented) -> Self {
        let blocks = prompt.tokens().len().div_ceil(BLOCK_TOKENS);
        let mut pool = KvPool::new(&model(), blocks, KvDtype::F32);
        let mut blocks: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
        blocks.reverse();
        Self {
            pool,
            blocks,
            turns: Turns::new(&model()),
            layout: *namespace("").layout(),
        }
    }

    pub(crate) fn with<T>(
        &mut self,
        work: impl FnOnce(&mut PoolBackend<'_>, &[BlockId]) -> T,
    ) -> T {
        let mut backend =
            PoolBackend::new(&mut self.pool, &self.layout).with_turns(&mut self.turns);
        work(&mut backend, &self.blocks)
    }

    /// Lands these layers of a chunk as the cache is expected to.
    pub(crate) fn put(&mut self, prompt: &Segmented, chunk: usize, layers: &[Bytes]) {
        let at = prompt.placement(&prompt.chunks()[chunk]);
        for (layer, payload) in (0..).map(LayerIdx).zip(layers) {
            let put = self.with(|backend, blocks| backend.write_moved(blocks, at, layer, payload));
            put.unwrap();
        }
    }

    pub(crate) fn bytes(&self) -> Vec<Vec<u8>> {
        let tokens = self.blocks.len() * BLOCK_TOKENS;
        let layer = |layer: u16| {
            let mut bytes = vec![0; self.pool.layer_bytes(tokens)];
            let read = self
                .pool
                .read_layer(&self.blocks, 0, tokens, layer.into(), &mut bytes);
            read.map(|()| bytes).unwrap()
        };
        (0..self.layout.layers()).map(layer).collect()
    }

    /// Waits until it is decided what comes.
    pub(crate) fn decide(&mut self, gather: &mut Gather) {
        loop {
            let wait = Duration::from_millis(100);
            let outcome = self.with(|backend, blocks| gather.wait(wait, backend, blocks));
            if outcome != GatherOutcome::Deciding {
                return;
            }
        }
    }

    /// Waits for all that comes.
    pub(crate) fn follow(&mut self, gather: &mut Gather) {
        self.decide(gather);
        self.compute(gather);
    }

    /// Computes behind the fetch, as an engine does; how often in vain.
    pub(crate) fn compute(&mut self, gather: &mut Gather) -> usize {
        let (mut short, mut layer) = (0, 0);
        let begun = Instant::now();
        while layer < self.layout.layers() {
            let wait = Duration::from_millis(100);
            let waited = self
                .with(|backend, blocks| gather.wait_layer(LayerIdx(layer), wait, backend, blocks));
            assert!(begun.elapsed() < Duration::from_secs(60), "no end");
            match waited {
                LayerWait::Landed => layer += 1,
                LayerWait::Pending => {}
                LayerWait::Short => {
                    short += 1;
                    layer = 0;
                }
            }
        }
        let outcome = self.with(|backend, blocks| gather.poll(backend, blocks));
        assert_eq!(outcome, GatherOutcome::Done, "all layers have landed");
        short
    }
}

pub(crate) fn chunks(gather: &Gather) -> Vec<usize> {
    gather.chunks().collect()
}

/// Gathers `prompt`; what lands must be what is stored, and nothing else.
pub(crate) fn gather_and_compare(
    bed: &Bed,
    plugin: &CachePlugin,
    prompt: &Segmented,
) -> (Gather, Vec<usize>) {
    let mut gather = plugin.gather(prompt);
    let mut pages = Pages::of(prompt);
    pages.follow(&mut gather);
    let landed = chunks(&gather);
    let mut expected = Pages::of(prompt);
    for &chunk in &landed {
        let of = &prompt.chunks()[chunk];
        expected.put(prompt, chunk, &bed.stored(of.key(), of.layout()));
    }
    assert!(
        pages.bytes() == expected.bytes(),
        "other bytes than stored ones"
    );
    (gather, landed)
}

/// Documents of several lengths; 4 and 5 are as long as others.
pub(crate) fn documents() -> Vec<Segment> {
    let lengths = [33, 64, 100, 200, 64, 100, 700];
    (0..)
        .zip(lengths)
        .map(|(number, length)| document(number, length))
        .collect()
}
