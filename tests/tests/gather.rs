//! Content chunks, stored and gathered through a real daemon.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::{Chunk, Client, GetEvent, GetOptions};
use kvasir_codec::{ChunkDecoder, ProfileShape};
use kvasir_engine::ModelConfig;
use kvasir_engine::cache::{self, PoolBackend, Turns};
use kvasir_engine::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvPool};
use kvasir_plugin::blend::{ChunkLimits, Gather, GatherOutcome, Segment, Segmented};
use kvasir_plugin::{
    CachePlugin, CaptureOutcome, ChunkCopy, CodecConfig, DataPlane, EngineBackend as _,
    FetchOutcome, LayerWait, LoadPolicy, PluginConfig, Prompt,
};
use kvasir_server::child::ListeningChild;
use kvasir_tests::frame::Frame;
use kvasir_tests::harness::{self, Proxy, signal, start_daemon};
use kvasir_types::{
    ChunkKey, DType, Hints, KvLayout, LayerIdx, Level, ModelIdentity, Namespace, Planes,
    ProfileDigest,
};
use rustix::process::Signal;
use tokio::runtime::Runtime;

const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");
/// What chunks are compiled behind.
const PREFIX: [u32; 1] = [1];
/// What a busy test machine may add to any measured time.
const NOISE: Duration = Duration::from_secs(5);

/// Loads whatever is there, so that it is certain what was tried.
fn eager() -> PluginConfig {
    PluginConfig {
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(5),
        ..PluginConfig::default()
    }
}

fn at_level(level: Level) -> PluginConfig {
    let mut config = eager();
    config.codec = CodecConfig {
        encoding: kvasir_plugin::Encoding::at(level),
        rotation: Some(cache::rotation(&model())),
        ..CodecConfig::default()
    };
    config
}

fn model() -> ModelConfig {
    let path = "../engine-plugin/engine/fixtures/llama3-gqa/config.json";
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    ModelConfig::from_json(&std::fs::read(path).unwrap()).unwrap()
}

fn namespace(tenant: &str) -> Namespace {
    let layout = cache::layout(&model(), KvDtype::F32, 64).unwrap();
    let model = ModelIdentity {
        architecture: "a".into(),
        weights: "w".into(),
        rope: "r".into(),
    };
    Namespace::new(&model, None, layout, &[0; 32], tenant.as_bytes())
}

/// A document, by its number.
fn document(number: u32, length: u32) -> Segment {
    Segment::Chunk((0..length).map(|at| number * 10_000 + at).collect())
}

fn text(length: u32) -> Segment {
    Segment::Text((0..length).map(|at| 5_000_000 + at).collect())
}

fn cut(tenant: &str, segments: &[Segment]) -> Segmented {
    Segmented::new(
        &namespace(tenant),
        &PREFIX,
        ChunkLimits::default(),
        segments,
    )
}

/// Numbers that a codec can make something of; others for every seed and layer.
fn kv(layout: &KvLayout, seed: u64) -> Vec<Bytes> {
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

struct Bed {
    runtime: Runtime,
    data: tempfile::TempDir,
    daemon: Option<ListeningChild>,
    address: String,
    client: Client,
}

impl Bed {
    fn start() -> Self {
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

    fn stop(&mut self) {
        self.daemon.take().unwrap().stop().unwrap();
    }

    fn start_again(&mut self) {
        self.daemon = Some(start_daemon(DAEMON, self.data.path(), &self.address));
    }

    fn plugin(&self, tenant: &str, config: PluginConfig) -> CachePlugin {
        self.plugin_at(&self.address, tenant, config)
    }

    fn plugin_at(&self, address: &str, tenant: &str, config: PluginConfig) -> CachePlugin {
        let runtime = self.runtime.handle().clone();
        CachePlugin::connect(address, runtime, namespace(tenant), config).unwrap()
    }

    /// Stores the chunks of `segments` as `plugin`'s engine would that compiled them. Their KV
    /// differs by `seed`.
    fn compile(&self, plugin: &CachePlugin, segments: &[Segment], seed: u64) {
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

    fn delete(&self, key: ChunkKey) {
        let deleted = self.runtime.block_on(self.client.delete(&[key]));
        assert_eq!(deleted.unwrap(), 1);
    }

    /// The layers of a stored chunk as they are once decoded.
    fn stored(&self, key: ChunkKey, layout: &KvLayout) -> Vec<Bytes> {
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
        let decoder = ChunkDecoder::new(*layout, info.level, &prelude, &[]).unwrap();
        let decode = |(layer, parts): (LayerIdx, Vec<Bytes>)| {
            let mut raw = vec![0; layout.layer_bytes()];
            decoder.layer(layer, &parts, &mut raw).unwrap();
            Bytes::from(raw)
        };
        layers.into_iter().map(decode).collect()
    }
}

fn seed_of(key: ChunkKey, seed: u64) -> u64 {
    u64::from_le_bytes(*key.as_bytes().first_chunk().unwrap()).wrapping_add(seed)
}

/// An engine's pages, as far as this is concerned.
struct Pages {
    pool: KvPool,
    blocks: Vec<BlockId>,
    turns: Turns,
    layout: KvLayout,
}

impl Pages {
    fn of(prompt: &Segmented) -> Self {
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

    fn with<T>(&mut self, work: impl FnOnce(&mut PoolBackend<'_>, &[BlockId]) -> T) -> T {
        let mut backend =
            PoolBackend::new(&mut self.pool, &self.layout).with_turns(&mut self.turns);
        work(&mut backend, &self.blocks)
    }

    /// Lands these layers of a chunk as the cache is expected to.
    fn put(&mut self, prompt: &Segmented, chunk: usize, layers: &[Bytes]) {
        let at = prompt.placement(&prompt.chunks()[chunk]);
        for (layer, payload) in (0..).map(LayerIdx).zip(layers) {
            let put = self.with(|backend, blocks| backend.write_moved(blocks, at, layer, payload));
            put.unwrap();
        }
    }

    fn bytes(&self) -> Vec<Vec<u8>> {
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
    fn decide(&mut self, gather: &mut Gather) {
        loop {
            let wait = Duration::from_millis(100);
            let outcome = self.with(|backend, blocks| gather.wait(wait, backend, blocks));
            if outcome != GatherOutcome::Deciding {
                return;
            }
        }
    }

    /// Computes behind the fetch, as an engine does; how often in vain.
    fn follow(&mut self, gather: &mut Gather) -> usize {
        self.decide(gather);
        let (mut short, mut layer) = (0, 0);
        while layer < self.layout.layers() {
            let wait = Duration::from_millis(100);
            let waited = self
                .with(|backend, blocks| gather.wait_layer(LayerIdx(layer), wait, backend, blocks));
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

fn chunks(gather: &Gather) -> Vec<usize> {
    gather.chunks().collect()
}

/// Gathers `prompt`; what lands must be what is stored, and nothing else.
fn gather_and_compare(bed: &Bed, plugin: &CachePlugin, prompt: &Segmented) -> (Gather, Vec<usize>) {
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
fn documents() -> Vec<Segment> {
    let lengths = [33, 64, 100, 200, 64, 100, 700];
    (0..)
        .zip(lengths)
        .map(|(number, length)| document(number, length))
        .collect()
}

#[test]
fn chunks_land_wherever_they_stand() {
    for level in [Level::RAW, Level::LOSSLESS, Level::L2] {
        let bed = Bed::start();
        let plugin = bed.plugin("", at_level(level));
        let documents = documents();
        bed.compile(&plugin, &documents, 0);
        let of = |number: usize| documents[number].clone();
        let prompt = cut(
            "",
            &[
                text(3),
                of(4),
                of(2),
                document(50, 80),
                of(0),
                text(21),
                of(4),
                of(6),
                of(1),
                text(9),
            ],
        );
        // Both halves of 6, and 4 twice; 50 was never stored.
        let (gather, landed) = gather_and_compare(&bed, &plugin, &prompt);
        assert_eq!(landed, [0, 1, 3, 4, 5, 6, 7], "{level}");
        assert_eq!(gather.present().collect::<Vec<_>>(), landed);
        let levels: Vec<_> = gather.levels().collect();
        let expected: Vec<_> = landed.iter().map(|chunk| (*chunk, level)).collect();
        assert_eq!(levels, expected);
        let keys: Vec<_> = [0, 1, 3, 5, 6, 7]
            .map(|it| prompt.chunks()[it].key())
            .into();
        let found = bed
            .runtime
            .block_on(bed.client.lookup(&keys))
            .unwrap()
            .found;
        let stored: u64 = found.iter().map(|it| it.unwrap().bytes).sum();
        assert!(
            gather.bytes() <= stored,
            "what stands there twice comes once"
        );
        assert!(gather.bytes() * 10 > stored * 9);
    }
}

/// Prompts of any shape.
#[test]
fn what_is_gathered_is_what_is_stored() {
    let mut bed = Bed::start();
    let plugin = bed.plugin("", eager());
    let documents: Vec<_> = (0..30).map(|it| document(it, 20 + it * 37 % 150)).collect();
    bed.compile(&plugin, &documents[..20], 0);
    let mut state = 7u32;
    let mut next = |bound: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % bound
    };
    let mut landed = 0;
    for round in 0..25 {
        // From memory, and from the disk.
        if round == 12 {
            bed.stop();
            bed.start_again();
        }
        let segments: Vec<_> = (0..1 + next(20))
            .map(|_| match next(3) {
                0 => text(u32::try_from(next(40)).unwrap()),
                _ => documents[next(documents.len())].clone(),
            })
            .collect();
        let prompt = cut("", &segments);
        let known = |text: &&[u32]| text[0] / 10_000 < 20;
        let of = |it: usize| &prompt.tokens()[prompt.chunks()[it].range()];
        let expected: Vec<_> = (0..prompt.chunks().len())
            .filter(|it| known(&of(*it)))
            .collect();
        let (_, found) = gather_and_compare(&bed, &plugin, &prompt);
        assert_eq!(found, expected);
        landed += found.len();
    }
    assert!(landed > 50, "{landed}");
}

#[test]
fn a_prompt_without_chunks_asks_nobody() {
    let bed = Bed::start();
    let plugin = bed.plugin("", eager());
    let prompt = cut("", &[text(100), document(1, 31)]);
    let mut gather = plugin.gather(&prompt);
    let outcome = Pages::of(&prompt).with(|backend, blocks| gather.poll(backend, blocks));
    assert_eq!(outcome, GatherOutcome::Done);
    assert_eq!(plugin.fetch_stats().loads, 0);
}

/// What is fetched coarser than stored comes so, and says so.
#[test]
fn chunks_come_at_the_level_that_is_wanted() {
    let bed = Bed::start();
    let writer = bed.plugin("", at_level(Level::L2));
    let documents = documents();
    bed.compile(&writer, &documents, 0);
    let prompt = cut("", &documents);
    let mut bytes = Vec::new();
    for level in [Level::L0, Level::L1, Level::L2] {
        let mut config = at_level(Level::L2);
        config.codec.fetch = Some(level);
        let mut gather = bed.plugin("", config).gather(&prompt);
        Pages::of(&prompt).follow(&mut gather);
        assert_eq!(chunks(&gather).len(), prompt.chunks().len());
        assert!(gather.levels().all(|(_, found)| found == level));
        bytes.push(gather.bytes());
    }
    assert!(
        bytes.is_sorted_by(|finer, coarser| finer < coarser),
        "{bytes:?}"
    );
}

/// All of one length, and so of one get: what follows a lost chunk there comes all the same.
#[test]
fn a_damaged_chunk_is_absent_and_the_others_come() {
    for same_length in [true, false] {
        let mut bed = Bed::start();
        let plugin = bed.plugin("", eager());
        let length = |it| if same_length { 90 } else { 90 + it };
        let documents: Vec<_> = (0..7).map(|it| document(it, length(it))).collect();
        bed.compile(&plugin, &documents, 0);
        let prompt = cut("", &documents);
        bed.stop();
        for broken in [2, 5] {
            let frame = Frame::of(bed.data.path(), &prompt.chunks()[broken].key());
            let mut bytes = frame.read();
            // In the first layer, and in the last one.
            let at = if broken == 2 {
                4096 + 100
            } else {
                bytes.len() - 100
            };
            bytes[at] ^= 0x10;
            frame.write(&bytes);
        }
        bed.start_again();
        let mut gather = plugin.gather(&prompt);
        let mut pages = Pages::of(&prompt);
        pages.decide(&mut gather);
        let expected_at_first = chunks(&gather).len();
        let short = pages.follow(&mut gather);
        assert_eq!(chunks(&gather), [0, 1, 3, 4, 6]);
        assert_eq!(gather.present().collect::<Vec<_>>(), [0, 1, 3, 4, 6]);
        // Whoever counted on them was told.
        assert!(short > 0 || expected_at_first == 5);
        let (_, landed) = gather_and_compare(&bed, &plugin, &prompt);
        assert_eq!(landed, [0, 1, 3, 4, 6]);
    }
}

/// Deleted when the lookup has seen it.
#[test]
fn a_chunk_deleted_after_the_lookup_is_absent() {
    for same_length in [true, false] {
        let bed = Bed::start();
        let length = |it| if same_length { 90 } else { 90 + it };
        let documents: Vec<_> = (0..6).map(|it| document(it, length(it))).collect();
        bed.compile(&bed.plugin("", eager()), &documents, 0);
        let prompt = cut("", &documents);
        let gone = [prompt.chunks()[0].key(), prompt.chunks()[3].key()];
        let (client, handle) = (bed.client.clone(), bed.runtime.handle().clone());
        let delete = move || {
            let deleted = tokio::task::block_in_place(|| handle.block_on(client.delete(&gone)));
            assert_eq!(deleted.unwrap(), 2);
        };
        let proxy = bed
            .runtime
            .block_on(Proxy::start(bed.address.clone(), delete));
        let config = PluginConfig {
            data_plane: DataPlane::Grpc,
            ..eager()
        };
        let plugin = bed.plugin_at(proxy.address(), "", config);
        // Connects.
        let other = cut("", &[document(40, 90)]);
        Pages::of(&other).follow(&mut plugin.gather(&other));
        // The first thing that comes back is the lookup's answer.
        proxy.arm(1);
        let (gather, landed) = gather_and_compare(&bed, &plugin, &prompt);
        assert!(proxy.has_acted());
        assert_eq!(landed, [1, 2, 4, 5]);
        assert_eq!(gather.present().collect::<Vec<_>>(), landed);
        assert_eq!(plugin.fetch_stats().failed, 0);
    }
}

/// Under the right key lies something of another geometry.
#[test]
fn a_chunk_of_another_layout_is_absent() {
    for wrong in [0, 2] {
        let bed = Bed::start();
        let plugin = bed.plugin("", eager());
        let documents: Vec<_> = (0..4).map(|it| document(it, 90 + it / 2)).collect();
        bed.compile(&plugin, &documents, 0);
        let prompt = cut("", &documents);
        let chunk = &prompt.chunks()[wrong];
        bed.delete(chunk.key());
        // One layer only: later ones cannot even be asked for.
        let right = chunk.layout();
        let planes = Planes::symmetric(8);
        let layout =
            KvLayout::new(1, right.kv_heads(), planes, right.tokens(), DType::F32).unwrap();
        let strange = Chunk {
            key: chunk.key(),
            layout,
            level: Level::RAW,
            extents: kv(&layout, 1),
        };
        bed.runtime.block_on(bed.client.put(&strange)).unwrap();
        let (_, landed) = gather_and_compare(&bed, &plugin, &prompt);
        let others: Vec<_> = (0..4).filter(|it| *it != wrong).collect();
        assert_eq!(landed, others);
        assert_eq!(plugin.fetch_stats().failed, 0);
    }
}

#[test]
fn a_chunk_of_an_unknown_profile_is_absent() {
    let bed = Bed::start();
    let documents: Vec<_> = (0..4).map(|it| document(it, 90)).collect();
    let layout = *namespace("").layout();
    let pairing = cache::rotation(&model()).pairing;
    let profile = harness::profile_of(ProfileShape::of(&layout, Some(pairing)), 0.5);
    let mut config = at_level(Level::L1);
    config.codec.encoding.profile = Some(Arc::clone(&profile));
    let writer = bed.plugin("", config.clone());
    bed.compile(&writer, &documents[1..2], 0);
    let prompt = cut("", &documents);
    // Whoever has the profile can use the chunk.
    let mut gather = writer.gather(&prompt);
    Pages::of(&prompt).follow(&mut gather);
    assert_eq!(chunks(&gather), [1]);
    assert_eq!(gather.levels().collect::<Vec<_>>(), [(1, Level::L1)]);

    let plain = bed.plugin("", at_level(Level::RAW));
    bed.compile(&plain, &documents, 0);
    drop((writer, gather));
    let digest = ProfileDigest::from_bytes(*profile.digest());
    let begun = Instant::now();
    // It may still be on its way there.
    while !bed
        .runtime
        .block_on(bed.client.delete_profile(digest))
        .unwrap()
    {
        assert!(begun.elapsed() < Duration::from_secs(60), "never uploaded");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (_, landed) = gather_and_compare(&bed, &plain, &prompt);
    assert_eq!(landed, [0, 2, 3]);
}

/// Bytes after which a fetch of these documents is well under way.
const MID_FETCH: u64 = 1 << 20;

fn many() -> Vec<Segment> {
    (0..60).map(|it| document(it, 300 + it % 3)).collect()
}

#[test]
fn a_daemon_killed_mid_fetch_leaves_what_is_whole() {
    let bed = Bed::start();
    bed.compile(&bed.plugin("", eager()), &many(), 0);
    let prompt = cut("", &many());
    let whole: Vec<Vec<Bytes>> = prompt
        .chunks()
        .iter()
        .map(|chunk| kv(chunk.layout(), seed_of(chunk.key(), 0)))
        .collect();
    let raw: u64 = prompt
        .chunks()
        .iter()
        .map(|it| it.layout().chunk_bytes())
        .sum();
    assert!(raw > 2 * MID_FETCH, "{raw}");
    let pid = bed.daemon.as_ref().unwrap().pid();
    let kill = move || signal(pid, Signal::KILL);
    let proxy = bed
        .runtime
        .block_on(Proxy::start(bed.address.clone(), kill));
    let config = PluginConfig {
        data_plane: DataPlane::Grpc,
        fetch_timeout: Duration::from_secs(2),
        cooldown: Duration::from_secs(3600),
        ..eager()
    };
    let plugin = bed.plugin_at(proxy.address(), "", config);
    proxy.arm(MID_FETCH);
    let begun = Instant::now();
    let mut gather = plugin.gather(&prompt);
    let mut pages = Pages::of(&prompt);
    pages.follow(&mut gather);
    assert!(
        begun.elapsed() < Duration::from_secs(2) + NOISE,
        "{:?}",
        begun.elapsed()
    );
    assert!(proxy.has_acted(), "the daemon was never killed");
    let landed = chunks(&gather);
    assert!(landed.len() < prompt.chunks().len());
    let found = pages.bytes();
    for &chunk in &landed {
        pages.put(&prompt, chunk, &whole[chunk]);
    }
    assert!(pages.bytes() == found, "what is whole is what was stored");
    assert_eq!(plugin.fetch_stats().failed, 1);
    // And is left alone for a while.
    let mut next = plugin.gather(&prompt);
    let outcome = pages.with(|backend, blocks| next.poll(backend, blocks));
    assert_eq!((outcome, chunks(&next)), (GatherOutcome::Done, vec![]));
    assert_eq!(plugin.fetch_stats().skipped, 1);
}

#[test]
fn a_daemon_stopped_mid_fetch_costs_its_budget_at_most() {
    let bed = Bed::start();
    bed.compile(&bed.plugin("", eager()), &many(), 0);
    let prompt = cut("", &many());
    let pid = bed.daemon.as_ref().unwrap().pid();
    let stop = move || signal(pid, Signal::STOP);
    let proxy = bed
        .runtime
        .block_on(Proxy::start(bed.address.clone(), stop));
    let config = PluginConfig {
        data_plane: DataPlane::Grpc,
        fetch_timeout: Duration::from_secs(1),
        ..eager()
    };
    let plugin = bed.plugin_at(proxy.address(), "", config);
    proxy.arm(MID_FETCH);
    let begun = Instant::now();
    let mut gather = plugin.gather(&prompt);
    Pages::of(&prompt).follow(&mut gather);
    signal(pid, Signal::CONT);
    assert!(
        begun.elapsed() < Duration::from_secs(1) + NOISE,
        "{:?}",
        begun.elapsed()
    );
    assert!(proxy.has_acted(), "the daemon was never stopped");
    assert!(chunks(&gather).len() < prompt.chunks().len());
    let stats = plugin.fetch_stats();
    assert_eq!(stats.loads, 1);
    assert!(stats.late + stats.failed >= 1, "{stats:?}");
}

#[test]
fn what_is_faster_computed_is_not_fetched() {
    let bed = Bed::start();
    let config = PluginConfig {
        load: LoadPolicy::WhenFaster,
        ..eager()
    };
    let plugin = bed.plugin("", config);
    let documents = documents();
    bed.compile(&plugin, &documents, 0);
    let prompt = cut("", &documents);
    for (per_token, fetched) in [
        (Duration::from_millis(50), true),
        (Duration::from_nanos(10), false),
    ] {
        for tokens in [64usize, 256, 1024, 512, 128].repeat(20) {
            plugin.observe_prefill(0, tokens, per_token * u32::try_from(tokens).unwrap());
        }
        let mut gather = plugin.gather(&prompt);
        Pages::of(&prompt).follow(&mut gather);
        assert_eq!(
            !chunks(&gather).is_empty(),
            fetched,
            "{per_token:?} a token"
        );
    }
}

#[test]
fn tenants_do_not_reach_each_other() {
    let bed = Bed::start();
    let documents = documents();
    bed.compile(&bed.plugin("one", eager()), &documents, 0);
    let other = bed.plugin("two", eager());
    let prompt = cut("two", &documents);
    let (gather, landed) = gather_and_compare(&bed, &other, &prompt);
    assert!(landed.is_empty());
    assert_eq!(gather.present().count(), 0);
}

#[test]
fn tenants_share_a_corpus_that_neither_writes() {
    let bed = Bed::start();
    let documents = documents();
    let corpus = namespace("corpus");
    let filler = bed.plugin("corpus", eager());
    bed.compile(&filler, &documents[..4], 0);
    let config = PluginConfig {
        corpus: Some(corpus),
        ..eager()
    };
    let keys = |tenant: &str| -> Vec<ChunkKey> {
        cut(tenant, &documents)
            .chunks()
            .iter()
            .map(|chunk| chunk.key())
            .collect()
    };
    for tenant in ["one", "two"] {
        let plugin = bed.plugin(tenant, config.clone());
        // Its own copy of the third, and one of the fifth.
        let own = [documents[2].clone(), documents[4].clone()];
        bed.compile(&plugin, &own, 99);
        let prompt = cut(tenant, &documents);
        let mut gather = plugin.gather(&prompt);
        let mut pages = Pages::of(&prompt);
        pages.follow(&mut gather);
        assert_eq!(chunks(&gather), [0, 1, 2, 3, 4]);
        let mut expected = Pages::of(&prompt);
        for chunk in [0, 1, 2, 3, 4] {
            let layout = prompt.chunks()[chunk].layout();
            let key = match chunk {
                2 | 4 => keys(tenant)[chunk],
                _ => keys("corpus")[chunk],
            };
            expected.put(&prompt, chunk, &bed.stored(key, layout));
        }
        assert!(
            pages.bytes() == expected.bytes(),
            "a tenant's own copy wins"
        );
    }
    // The corpus is what it was.
    let lookup = bed
        .runtime
        .block_on(bed.client.lookup(&keys("corpus")))
        .unwrap();
    assert_eq!(lookup.prefix_chunks, 4);
    assert!(lookup.found[4..].iter().all(Option::is_none));
    let third = &cut("corpus", &documents).chunks()[2].clone();
    let layers = kv(third.layout(), seed_of(third.key(), 0));
    assert_eq!(bed.stored(third.key(), third.layout()), layers);
}

/// Prefix chunks of the corpus's own prompts are of nobody else.
#[test]
fn prefixes_never_come_from_the_corpus() {
    let bed = Bed::start();
    let filler = bed.plugin("corpus", eager());
    let tokens: Vec<u32> = (0..200).collect();
    let layout = *filler.namespace().layout();
    for (chunk, key) in (0..).zip(filler.namespace().prefix_keys(&tokens)) {
        let copy = ChunkCopy {
            key,
            layout,
            start: chunk * u64::from(layout.tokens()),
            layers: kv(&layout, chunk),
            hints: Hints::default(),
        };
        assert_eq!(filler.capture(copy), CaptureOutcome::Queued);
    }
    while filler.capture_stats().waiting > 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
    let config = PluginConfig {
        corpus: Some(namespace("corpus")),
        ..eager()
    };
    for (plugin, expected) in [(filler, 3), (bed.plugin("one", config), 0)] {
        let mut prefetch = plugin.prefetch(&Prompt::new(plugin.namespace(), &tokens));
        let mut pages = Pages::of(&cut("", &[Segment::Text(tokens.clone())]));
        let chunks = loop {
            let wait = Duration::from_millis(100);
            let outcome = pages.with(|backend, blocks| prefetch.wait(wait, backend, blocks));
            if let FetchOutcome::Done { chunks } = outcome {
                break chunks;
            }
        };
        assert_eq!(chunks, expected);
    }
}
