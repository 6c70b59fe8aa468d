//! What is lost on the way, and daemons that die.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::Chunk;
use kvasir_codec::ProfileShape;
use kvasir_engine::cache;
use kvasir_plugin::blend::{GatherOutcome, Segment};
use kvasir_plugin::{DataPlane, PluginConfig};
use kvasir_tests::frame::Frame;
use kvasir_tests::harness::{self, Proxy, signal};
use kvasir_types::{DType, KvLayout, Level, Planes, ProfileDigest};
use rustix::process::Signal;

use crate::bed::*;

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
        let short = pages.compute(&mut gather);
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
