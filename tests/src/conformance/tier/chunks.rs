//! Storing, reading and removing chunks in a tier with room to spare.

use std::future::Future;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::join_all;
use kvasir_codec::Object;
use kvasir_store::{Facts, PinId, PinRefused, Read, ReadError, Written};
use kvasir_types::{DType, ExtentIdx, ExtentRange, KvLayout, Level, Planes};

use super::{
    Fixture, Setup, Suite, all_extents, assert_holds, is_there, key, layout, object, object_with,
    read, write,
};

pub(super) async fn every_layout_round_trips<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.roomy().await;
    let uneven = Planes::KeyValue {
        key_dim: 24,
        value_dim: 16,
    };
    let layouts = [
        KvLayout::new(4, 2, Planes::symmetric(16), 16, DType::Bf16),
        KvLayout::new(3, 8, uneven, 4, DType::F16),
        KvLayout::new(5, 1, Planes::Single { dim: 72 }, 8, DType::Bf16),
        KvLayout::new(1, 1, Planes::symmetric(1), 1, DType::F8E4m3),
        KvLayout::new(2, 2, Planes::symmetric(64), 64, DType::F32),
        KvLayout::new(300, 1, Planes::Single { dim: 3 }, 1, DType::F8E5m2),
    ];
    for (number, layout) in (0..).zip(layouts) {
        let layout = layout.unwrap();
        let object = object_with(number, &layout, number);
        assert_eq!(write(&fixture, object.clone()).await, Written::Stored);
        assert_holds(&fixture, &object).await;

        let facts = fixture.tier.find(&[key(number)])[0].unwrap();
        assert_eq!(facts, Facts::of(object.header()));
        let reader = fixture.tier.open(key(number)).await.unwrap().unwrap();
        assert_eq!(reader.header(), object.header());
        let layers = u32::from(layout.layers());
        for start in 0..layers.min(4) {
            let range = ExtentRange::new(start, layers).unwrap();
            let layers = reader.read_extents(range).await.unwrap();
            assert_eq!(layers, &object.extents()[start as usize..]);
            let range = ExtentRange::new(start, start + 1).unwrap();
            let layers = reader.read_extents(range).await.unwrap();
            assert_eq!(layers, [&object.extents()[start as usize]]);
        }
    }
}

/// Extents of all lengths, none at all among them, and headers of more than a block.
pub(super) async fn every_level_round_trips<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.roomy().await;
    let layout = KvLayout::new(120, 1, Planes::symmetric(8), 16, DType::F16).unwrap();
    let mut kept = Vec::new();
    for (number, level) in (0..).zip(Level::ALL) {
        let extents = (0..level.extents(layout.layers())).map(|extent| {
            let [_, most] = layout.extent_bounds(level, ExtentIdx(extent));
            let len = match level.is_encoded() {
                true => (extent as usize * 37) % 512,
                false => usize::try_from(most).unwrap(),
            };
            Bytes::from(vec![extent.to_le_bytes()[0] ^ level.code(); len])
        });
        let object = Object::new(key(number), &layout, level, extents.collect()).unwrap();
        assert_eq!(write(&fixture, object.clone()).await, Written::Stored);
        kept.push(object);
    }
    for (number, object) in (0..).zip(&kept) {
        assert_holds(&fixture, object).await;
        let facts = fixture.tier.find(&[key(number)])[0].unwrap();
        assert_eq!(facts, Facts::of(object.header()));
        let reader = fixture.tier.open(key(number)).await.unwrap().unwrap();
        assert_eq!(reader.header(), object.header());
        // The prelude and the coarsest part of the first layers, and what refines them.
        for (start, end) in [(0, 4), (118, 123), (119, 120)] {
            let end = end.min(object.header().all().end());
            let Ok(range) = ExtentRange::new(start, end) else {
                continue;
            };
            let extents = reader.read_extents(range).await.unwrap();
            assert_eq!(extents, object.extents()[start as usize..end as usize]);
        }
    }
    let usage = fixture.tier.usage();
    assert_eq!(usage.levels.iter().count(), Level::ALL.len());
    for ((level, usage), object) in usage.levels.iter().zip(&kept) {
        assert_eq!((level, usage.chunks), (object.header().level(), 1));
        assert_eq!(usage.bytes, object.header().object_bytes());
        assert_eq!(usage.raw_bytes, layout.chunk_bytes());
    }
    assert!(fixture.tier.remove(key(1)).await.unwrap());
    let levels = fixture.tier.usage().levels;
    assert!(
        levels
            .iter()
            .all(|(level, _)| level != kept[1].header().level())
    );
}

pub(super) async fn a_missing_key_is_a_miss<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.roomy().await;
    assert_eq!(write(&fixture, object(1)).await, Written::Stored);
    assert_eq!(read(&fixture, 2).await, Read::Miss);
    assert!(fixture.tier.open(key(2)).await.unwrap().is_none());
    let found = fixture.tier.find(&[key(2), key(1), key(3)]);
    assert_eq!(
        found.iter().map(Option::is_some).collect::<Vec<_>>(),
        [false, true, false]
    );
    assert!(!fixture.tier.remove(key(2)).await.unwrap());
    let pinned = fixture
        .tier
        .pin(PinId::from_u64(1), &[key(1), key(2)], far_future());
    assert_eq!(pinned, Err(PinRefused::Missing(key(2))));
    assert!(!fixture.tier.unpin(PinId::from_u64(1)), "all or none");

    assert!(fixture.tier.remove(key(1)).await.unwrap());
    assert_eq!(read(&fixture, 1).await, Read::Miss);
    assert!(!fixture.tier.remove(key(1)).await.unwrap());
    let usage = fixture.tier.usage();
    assert_eq!((usage.chunks, usage.bytes), (0, 0));
    assert_eq!((usage.hits, usage.misses), (0, 3));
}

pub(super) async fn a_range_outside_the_chunk_is_a_miss<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.roomy().await;
    let object = object(1);
    assert_eq!(write(&fixture, object.clone()).await, Written::Stored);
    let range = ExtentRange::new(2, u32::from(layout().layers()) + 1).unwrap();
    let read = fixture.tier.read_extents(key(1), range).await.unwrap();
    assert_eq!(read, Read::Miss);
    let reader = fixture.tier.open(key(1)).await.unwrap().unwrap();
    let error = reader.read_extents(range).await.unwrap_err();
    assert!(matches!(error, ReadError::OutOfRange { .. }));
    // The question was wrong, not the chunk.
    assert_holds(&fixture, &object).await;
    assert_eq!(fixture.tier.usage().corrupt, 0);
}

pub(super) async fn writing_twice_stores_once<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.roomy().await;
    assert_eq!(write(&fixture, object(1)).await, Written::Stored);
    let before = fixture.tier.usage();
    assert_eq!(write(&fixture, object(1)).await, Written::AlreadyPresent);
    assert_eq!(fixture.tier.usage(), before);
    assert_holds(&fixture, &object(1)).await;
}

pub(super) async fn one_of_many_writers_stores<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.roomy().await;
    for number in 0..8 {
        let writes = (0..8).map(|_| {
            let tier = fixture.tier.clone();
            tokio::spawn(async move { tier.write(object(number)).await.unwrap() })
        });
        let outcomes: Vec<Written> = join_all(writes)
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        let stored = outcomes.iter().filter(|o| **o == Written::Stored).count();
        assert_eq!(stored, 1, "{outcomes:?}");
        assert!(!outcomes.iter().any(|o| matches!(o, Written::Throttled(_))));
        assert_holds(&fixture, &object(number)).await;
    }
    let usage = fixture.tier.usage();
    assert_eq!((usage.chunks, usage.writes), (8, 8));
    assert_eq!(usage.bytes, 8 * suite.chunk_bytes, "losers left nothing");
}

pub(super) async fn a_chunk_is_seen_whole_or_not_at_all<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.roomy().await;
    for number in 0..20 {
        let object = object(number);
        let tier = fixture.tier.clone();
        let copy = object.clone();
        let writer = tokio::spawn(async move { tier.write(copy).await.unwrap() });
        loop {
            // Asked before reading: what was there must be readable.
            let was_there = is_there(&fixture, number);
            match read(&fixture, number).await {
                Read::Extents(layers) => {
                    assert_eq!(layers, object.extents());
                    break;
                }
                Read::Miss => assert!(!was_there, "listed, and then missing"),
                Read::Throttled(throttled) => panic!("{throttled}"),
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(writer.await.unwrap(), Written::Stored);
    }
}

pub(super) async fn an_abandoned_write_leaves_a_whole_chunk_or_none<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.roomy().await;
    for number in 0..12 {
        let object = object(number);
        let mut future = fixture.tier.write(object.clone());
        for _ in 0..number / 3 {
            if future.as_mut().now_or_never().is_some() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(future);
        if is_there(&fixture, number) {
            assert_holds(&fixture, &object).await;
        }
        let again = write(&fixture, object.clone()).await;
        assert!(!matches!(again, Written::Throttled(_)));
        assert_holds(&fixture, &object).await;
    }
    assert_eq!(fixture.tier.usage().chunks, 12);
}

pub(super) async fn readers_survive_removal_and_rewriting<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.roomy().await;
    let old = object_with(1, &layout(), 100);
    let new = object_with(1, &layout(), 200);
    assert_eq!(write(&fixture, old.clone()).await, Written::Stored);
    let reader = fixture.tier.open(key(1)).await.unwrap().unwrap();
    let first = reader
        .read_extents(ExtentRange::new(0, 1).unwrap())
        .await
        .unwrap();

    assert!(fixture.tier.remove(key(1)).await.unwrap());
    assert_eq!(read(&fixture, 1).await, Read::Miss);
    assert!(
        fixture.tier.usage().bytes > 0,
        "what a reader holds still counts"
    );
    assert_eq!(write(&fixture, new.clone()).await, Written::Stored);

    assert_eq!(first, &old.extents()[..1]);
    let all = reader.read_extents(all_extents(&layout())).await.unwrap();
    assert_eq!(all, old.extents());
    assert_holds(&fixture, &new).await;
    drop((reader, first, all));
    // Space on a device is given back in the background.
    let begin = Instant::now();
    while fixture.tier.usage().bytes != suite.chunk_bytes {
        assert!(begin.elapsed() < PATIENCE, "{:?}", fixture.tier.usage());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(fixture.tier.usage().corrupt, 0);
}

pub(super) async fn entries_list_what_is_stored<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.roomy().await;
    assert!(fixture.tier.entries().is_empty());
    for number in 0..10 {
        assert_eq!(write(&fixture, object(number)).await, Written::Stored);
    }
    assert!(fixture.tier.remove(key(4)).await.unwrap());
    let expected: Vec<Facts> = (0..10)
        .filter(|number| *number != 4)
        .map(|number| Facts::of(object(number).header()))
        .collect();
    let mut entries = fixture.tier.entries();
    entries.sort_by_key(|facts| {
        facts.key.as_bytes()[..8]
            .iter()
            .rev()
            .copied()
            .collect::<Vec<u8>>()
    });
    assert_eq!(entries, expected);
    assert_eq!(fixture.tier.usage().chunks, 9);
}

fn far_future() -> std::time::Instant {
    std::time::Instant::now() + std::time::Duration::from_secs(3600)
}

/// More than any device takes.
const PATIENCE: Duration = Duration::from_secs(10);
