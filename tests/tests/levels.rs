//! Chunks stored encoded, and fetched as coarsely as one likes, through a real daemon.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvasir_client::{Chunk, Client, GetEvent, GetOptions};
use kvasir_codec::{Prelude, ProfileShape};
use kvasir_engine::KvDtype;
use kvasir_engine::cache;
use kvasir_engine::model::Model;
use kvasir_plugin::{CodecConfig, Encoding, LoadPolicy, PluginConfig, Profile};
use kvasir_tests::harness::{self, Answer, Rig, Use, start_daemon};
use kvasir_types::{KvLayout, LayerRange, Level, Planes, ProfileDigest};

const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");
const PROMPT_TOKENS: usize = 6 * harness::CHUNK_TOKENS as usize + 10;

fn config(store: Level, fetch: Option<Level>) -> PluginConfig {
    let model = Model::load(&harness::model_dir()).unwrap();
    PluginConfig {
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(5),
        codec: CodecConfig {
            encoding: Encoding::at(store),
            fetch,
            rotation: Some(cache::rotation(model.config())),
            ..CodecConfig::default()
        },
        ..PluginConfig::default()
    }
}

/// The answer to a prompt whose chunks are in the daemon.
async fn cached(endpoint: &str, prompt: &[u32], store: Level, fetch: Option<Level>) -> Answer {
    let rig = Rig::reader(endpoint, config(store, fetch));
    rig.ask(prompt, Use::Read).await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_stored_chunk_serves_every_level() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let client = Client::connect(daemon.address()).await.unwrap();
    let prompt = harness::prompt(PROMPT_TOKENS, 0);
    let writer = Rig::reader(daemon.address(), config(Level::L2, None));
    let computed = writer.ask(&prompt, Use::Write).await;
    assert_eq!(computed.usage.cached_level, None);
    writer.stored(&client, &prompt).await;

    let stats = client.stats().await.unwrap();
    let levels = &stats.tiers[0].levels;
    assert_eq!((levels.len(), levels[0].level.as_str()), (1, "l2"));
    assert_eq!(levels[0].chunks, 6);
    assert!(levels[0].bytes * 4 < levels[0].raw_bytes, "{levels:?}");

    let mut before = 0;
    for level in [Level::L0, Level::L1, Level::L2] {
        let answer = cached(daemon.address(), &prompt, Level::L2, Some(level)).await;
        let usage = answer.usage;
        assert_eq!(usage.cached_tokens, 6 * harness::CHUNK_TOKENS as usize);
        assert_eq!(usage.cached_level, Some(level));
        assert!(
            usage.fetched_bytes > before,
            "{level} takes more than coarser levels"
        );
        before = usage.fetched_bytes;
        if level == Level::L2 {
            assert_eq!(
                answer.tokens, computed.tokens,
                "twenty decibels are enough for this"
            );
        }
    }
    let all = cached(daemon.address(), &prompt, Level::L2, None).await;
    assert_eq!(all.usage.fetched_bytes, before);
    assert_eq!(all.usage.cached_level, Some(Level::L2));
}

/// As fine as any, in a basis that is none.
fn profile(unit: f32) -> Arc<Profile> {
    let model = Model::load(&harness::model_dir()).unwrap();
    let layout = cache::layout(model.config(), KvDtype::F32, harness::CHUNK_TOKENS).unwrap();
    let rotation = cache::rotation(model.config());
    harness::profile_of(ProfileShape::of(&layout, Some(rotation.pairing)), unit)
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_of_an_unknown_profile_are_computed() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let client = Client::connect(daemon.address()).await.unwrap();
    let prompt = harness::prompt(PROMPT_TOKENS, 0);
    let with = |profile: Option<Arc<Profile>>| {
        let mut config = config(Level::L1, None);
        config.codec.encoding.profile = profile;
        Rig::reader(daemon.address(), config)
    };
    let ours = profile(0.01);
    let digest = ProfileDigest::from_bytes(*ours.digest());
    let writer = with(Some(Arc::clone(&ours)));
    let computed = writer.ask(&prompt, Use::Write).await;
    writer.stored(&client, &prompt).await;

    let answer = with(Some(ours)).ask(&prompt, Use::Read).await;
    let all = 6 * harness::CHUNK_TOKENS as usize;
    assert_eq!(answer.usage.cached_tokens, all);
    assert_eq!(answer.usage.cached_level, Some(Level::L1));
    assert_eq!(answer.tokens, computed.tokens);

    // Nobody is left who would upload it again.
    drop(writer);
    client.delete_profile(digest).await.unwrap();
    for other in [None, Some(profile(0.02))] {
        let reader = with(other);
        for _ in 0..3 {
            let answer = reader.ask(&prompt, Use::Read).await;
            assert_eq!(answer.usage.cached_tokens, 0);
            answer.assert_equals(&computed);
        }
    }
}

/// Waits until the daemon keeps a profile.
async fn kept(client: &Client, digest: ProfileDigest) {
    let begin = Instant::now();
    let is_kept = async || {
        let profiles = client.profiles().await.unwrap_or_default();
        profiles.iter().any(|profile| profile.digest == digest)
    };
    while !is_kept().await {
        assert!(begin.elapsed() < Duration::from_secs(60), "not uploaded");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_without_a_profile_uses_that_of_another() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let client = Client::connect(daemon.address()).await.unwrap();
    let prompt = harness::prompt(PROMPT_TOKENS, 0);
    let ours = profile(0.01);
    let digest = ProfileDigest::from_bytes(*ours.digest());
    let mut with = config(Level::L1, None);
    with.codec.encoding.profile = Some(ours);
    let writer = Rig::reader(daemon.address(), with);
    let computed = writer.ask(&prompt, Use::Write).await;
    writer.stored(&client, &prompt).await;
    kept(&client, digest).await;
    drop((writer, client, daemon));

    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    // How keys were turned, chunks say themselves.
    let mut without = config(Level::L1, None);
    without.codec.rotation = None;
    let reader = Rig::reader(daemon.address(), without);
    // The first one does not wait for the profile.
    let first = reader.ask(&prompt, Use::Read).await;
    assert_eq!(first.usage.cached_tokens, 0);
    first.assert_equals(&computed);
    let begin = Instant::now();
    let answer = loop {
        let answer = reader.ask(&prompt, Use::Read).await;
        if answer.usage.cached_tokens > 0 {
            break answer;
        }
        answer.assert_equals(&computed);
        assert!(begin.elapsed() < Duration::from_secs(60), "never a hit");
    };
    assert_eq!(
        answer.usage.cached_tokens,
        6 * harness::CHUNK_TOKENS as usize
    );
    assert_eq!(answer.usage.cached_level, Some(Level::L1));
    assert_eq!(answer.tokens, computed.tokens);
}

/// A daemon without a disk tier has forgotten it; one that was not there yet never had it.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_lacks_the_profile_gets_it_again() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let address = daemon.address().to_owned();
    drop(daemon);
    let ours = profile(0.01);
    let digest = ProfileDigest::from_bytes(*ours.digest());
    let mut with = config(Level::L1, None);
    with.codec.encoding.profile = Some(ours);
    let engine = Rig::reader(&address, with);
    let prompt = harness::prompt(PROMPT_TOKENS, 0);
    let answer = engine.ask(&prompt, Use::Nothing).await;
    assert_eq!(answer.tokens.len(), 4);

    let daemon = start_daemon(DAEMON, data.path(), &address);
    let client = Client::connect(daemon.address()).await.unwrap();
    kept(&client, digest).await;
    client.delete_profile(digest).await.unwrap();
    kept(&client, digest).await;
    drop(engine);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_of_another_model_is_not_used() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let client = Client::connect(daemon.address()).await.unwrap();
    let prompt = harness::prompt(PROMPT_TOKENS, 0);
    let mut with = config(Level::L1, None);
    with.codec.encoding.profile = Some(profile(0.01));
    let writer = Rig::reader(daemon.address(), with);
    let computed = writer.ask(&prompt, Use::Write).await;
    writer.stored(&client, &prompt).await;
    // The first chunk is made to name a profile of one layer more than the model has.
    let model = Model::load(&harness::model_dir()).unwrap();
    let layout = cache::layout(model.config(), KvDtype::F32, harness::CHUNK_TOKENS).unwrap();
    let rotation = cache::rotation(model.config());
    let planes = Planes::symmetric(ProfileShape::of(&layout, None).dims[0]);
    let more = layout.layers() + 1;
    let taller = KvLayout::new(more, layout.kv_heads(), planes, 16, layout.dtype()).unwrap();
    let other = harness::profile_of(ProfileShape::of(&taller, Some(rotation.pairing)), 0.01);
    client.put_profile(&other).await.unwrap();
    let keys = writer.plugin.namespace().prefix_keys(&prompt);
    let mut stream = client.get(&keys[..1], GetOptions::default()).await.unwrap();
    let mut extents = Vec::new();
    let mut layers = Vec::new();
    while let Some(event) = stream.next().await.unwrap() {
        match event {
            GetEvent::Prelude { data, .. } => {
                let mut prelude = Prelude::parse(&data, &layout).unwrap();
                prelude.profile = Some(*other.digest());
                extents.push(prelude.encode().into());
            }
            GetEvent::Layer { parts, .. } => layers.push(parts),
            GetEvent::Lost { reason, .. } => panic!("{reason}"),
        }
    }
    for part in 0..usize::from(Level::L1.parts()) {
        extents.extend(layers.iter().map(|parts| parts[part].clone()));
    }
    client.delete(&keys[..1]).await.unwrap();
    let strange = Chunk {
        key: keys[0],
        layout,
        level: Level::L1,
        extents,
    };
    client.put(&strange).await.unwrap();
    let reader = Rig::reader(daemon.address(), config(Level::L1, None));
    for _ in 0..5 {
        let answer = reader.ask(&prompt, Use::Read).await;
        assert_eq!(answer.usage.cached_tokens, 0);
        answer.assert_equals(&computed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lossless_chunks_give_the_very_same_logits() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let client = Client::connect(daemon.address()).await.unwrap();
    let prompt = harness::prompt(PROMPT_TOKENS, 0);
    let rig = Rig::reader(daemon.address(), config(Level::LOSSLESS, Some(Level::L0)));
    let computed = rig.ask(&prompt, Use::Write).await;
    rig.stored(&client, &prompt).await;
    let answer = rig.ask(&prompt, Use::Read).await;
    assert_eq!(answer.usage.cached_level, Some(Level::LOSSLESS));
    let raw = client.stats().await.unwrap().tiers[0].levels[0].raw_bytes;
    assert!(answer.usage.fetched_bytes < raw);
    answer.assert_equals(&computed);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_computed_over_coarser_chunks_is_not_stored() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let client = Client::connect(daemon.address()).await.unwrap();
    let long = harness::prompt(PROMPT_TOKENS, 0);
    let short = &long[..3 * harness::CHUNK_TOKENS as usize + 5];
    let writer = Rig::reader(daemon.address(), config(Level::L2, None));
    writer.ask(short, Use::Write).await;
    writer.stored(&client, short).await;

    let coarse = Rig::reader(daemon.address(), config(Level::L2, Some(Level::L0)));
    let answer = coarse.ask(&long, Use::Both).await;
    assert_eq!(answer.usage.cached_level, Some(Level::L0));
    // What is stored at all is stored in order, so a chunk that is captured tells of
    // those that would have been captured before it.
    let other = harness::prompt(PROMPT_TOKENS, 5);
    coarse.ask(&other, Use::Both).await;
    coarse.stored(&client, &other).await;
    let keys = coarse.plugin.namespace().prefix_keys(&long);
    assert_eq!(client.lookup(&keys).await.unwrap().prefix_chunks, 3);

    let fine = Rig::reader(daemon.address(), config(Level::L2, None));
    fine.ask(&long, Use::Both).await;
    fine.stored(&client, &long).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn levels_differ_by_layer_and_an_upgrade_is_the_difference() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let client = Client::connect(daemon.address()).await.unwrap();
    let prompt = harness::prompt(PROMPT_TOKENS, 0);
    let writer = Rig::reader(daemon.address(), config(Level::L2, None));
    writer.ask(&prompt, Use::Write).await;
    writer.stored(&client, &prompt).await;
    let keys = writer.plugin.namespace().prefix_keys(&prompt);

    let parts = async |options: GetOptions| {
        let mut stream = client.get(&keys[..1], options).await.unwrap();
        let (mut preludes, mut layers) = (0, Vec::new());
        while let Some(event) = stream.next().await.unwrap() {
            match event {
                GetEvent::Prelude { .. } => preludes += 1,
                GetEvent::Layer { parts, .. } => layers.push(parts),
                GetEvent::Lost { reason, .. } => panic!("{reason}"),
            }
        }
        (preludes, layers)
    };
    let layers = LayerRange::new(0, 3).ok();
    let all = GetOptions {
        layers,
        ..GetOptions::default()
    };
    let (preludes, whole) = parts(all).await;
    assert_eq!(preludes, 1);
    let mixed = GetOptions {
        layers,
        levels: vec![Level::L2, Level::L0, Level::L1],
        ..GetOptions::default()
    };
    let (_, mixed) = parts(mixed).await;
    let expected = [&whole[0][..], &whole[1][..1], &whole[2][..2]];
    assert_eq!(mixed, expected);
    let upgrade = GetOptions {
        layers,
        have: Some(Level::L0),
        ..GetOptions::default()
    };
    let (preludes, rest) = parts(upgrade).await;
    assert_eq!(preludes, 0);
    let expected: Vec<_> = whole.iter().map(|parts| parts[1..].to_vec()).collect();
    assert_eq!(rest, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_does_not_decode_is_computed() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let client = Client::connect(daemon.address()).await.unwrap();
    let prompt = harness::prompt(PROMPT_TOKENS, 0);
    let rig = Rig::reader(daemon.address(), config(Level::L2, None));
    let computed = rig.ask(&prompt, Use::Write).await;
    rig.stored(&client, &prompt).await;
    // Intact to everyone who does not decode it.
    let keys = rig.plugin.namespace().prefix_keys(&prompt);
    client.delete(&keys[2..3]).await.unwrap();
    let layout = *rig.plugin.namespace().layout();
    let extents = Level::L2.extents(layout.layers());
    let strange = Chunk {
        key: keys[2],
        layout,
        level: Level::L2,
        extents: (0..extents)
            .map(|extent| vec![0; extent as usize].into())
            .collect(),
    };
    client.put(&strange).await.unwrap();
    let answer = rig.ask(&prompt, Use::Read).await;
    assert_eq!(
        answer.usage.cached_tokens,
        2 * harness::CHUNK_TOKENS as usize
    );
    assert_eq!(answer.tokens, computed.tokens);
}
