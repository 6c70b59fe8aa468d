//! Tiers that are full: eviction, pins, and the budget.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use futures::future::join_all;
use kvasir_store::{Facts, PinId, PinRefused, Read, WriteError, Written};
use kvasir_types::{ByteSize, ChunkKey, DType, KvLayout, Planes};

use super::{
    Fixture, Setup, Suite, VirtualTime, all_extents, assert_holds, is_there, key, layout, object,
    object_with, read, write,
};

const MINUTE: Duration = Duration::from_secs(60);

pub(super) async fn the_least_recently_used_goes_first<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = full(suite, 4).await;
    // Reading 0 and writing 1 again are uses; 2 and then 3 are the oldest.
    assert!(matches!(read(&fixture, 0).await, Read::Extents(_)));
    assert_eq!(write(&fixture, object(1)).await, Written::AlreadyPresent);
    assert_eq!(write(&fixture, object(4)).await, Written::Stored);
    assert_eq!(write(&fixture, object(5)).await, Written::Stored);
    assert_eq!(keys(&fixture), BTreeSet::from([0, 1, 4, 5].map(key)));
    assert_eq!(read(&fixture, 2).await, Read::Miss);
    let usage = fixture.tier.usage();
    assert_eq!((usage.evictions, usage.throttled), (2, 0));
}

pub(super) async fn looking_does_not_extend_a_life<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = full(suite, 3).await;
    for _ in 0..10 {
        assert!(is_there(&fixture, 0));
        assert_eq!(fixture.tier.entries().len(), 3);
        assert_eq!(fixture.tier.usage().chunks, 3);
    }
    assert_eq!(write(&fixture, object(3)).await, Written::Stored);
    let untouched = full(suite, 3).await;
    assert_eq!(write(&untouched, object(3)).await, Written::Stored);
    assert_eq!(keys(&fixture), keys(&untouched), "as if nobody had looked");
}

pub(super) async fn the_budget_holds_under_load<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    const ROOM: u64 = 6;
    const TASKS: u64 = 8;
    let fixture = suite.with_room_for(ROOM).await;
    let capacity = suite.chunk_bytes * ROOM;
    let tasks = (0..TASKS).map(|task| {
        let tier = fixture.tier.clone();
        tokio::spawn(async move {
            let mut held = Vec::new();
            for round in 0..40 {
                let number = (task * 7 + round * 3) % 16;
                let object = object(number);
                let written = tier.write(object.clone()).await.unwrap();
                assert!(tier.usage().bytes <= capacity, "{written:?}");
                let read = tier
                    .read_extents(key(number), all_extents(&layout()))
                    .await
                    .unwrap();
                assert!(tier.usage().bytes <= capacity);
                if let Read::Extents(layers) = read {
                    assert_eq!(layers, object.extents());
                    held.push((number, layers));
                }
                if let Some(reader) = tier.open(key(number)).await.unwrap() {
                    tokio::task::yield_now().await;
                    drop(reader);
                }
                if held.len() > 3 {
                    held.remove(0);
                }
            }
            // What was held all the while has not changed.
            for (number, layers) in held {
                assert_eq!(layers, super::object(number).extents());
            }
        })
    });
    for task in join_all(tasks).await {
        task.unwrap();
    }
    for key in keys(&fixture) {
        assert!(fixture.tier.remove(key).await.unwrap());
    }
    let usage = fixture.tier.usage();
    assert_eq!((usage.chunks, usage.bytes), (0, 0), "nothing leaked");
    assert_eq!((usage.corrupt, usage.failures), (0, 0));
}

pub(super) async fn what_is_held_is_not_evicted<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = full(suite, 2).await;
    let first = fixture.tier.open(key(0)).await.unwrap().unwrap();
    let second = fixture.tier.open(key(1)).await.unwrap().unwrap();
    let throttled = write(&fixture, object(2)).await;
    assert!(matches!(throttled, Written::Throttled(_)));
    let usage = fixture.tier.usage();
    assert_eq!((usage.evictions, usage.throttled), (0, 1));
    assert!(is_there(&fixture, 0) && is_there(&fixture, 1));
    assert!(!is_there(&fixture, 2));

    // 1 was used last, but 0 is held.
    drop(second);
    assert_eq!(write(&fixture, object(2)).await, Written::Stored);
    assert_eq!(keys(&fixture), BTreeSet::from([0, 2].map(key)));
    drop(first);
    assert_holds(&fixture, &object(0)).await;
}

pub(super) async fn what_is_pinned_is_not_evicted<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let time = VirtualTime::new();
    let fixture = suite.with_clock(4, time.clock()).await;
    for number in 0..4 {
        assert_eq!(write(&fixture, object(number)).await, Written::Stored);
    }
    let (tier, pin) = (&fixture.tier, PinId::from_u64(7));
    tier.pin(pin, &[key(0), key(1)], time.now() + MINUTE)
        .unwrap();
    assert_eq!(tier.usage().pinned_bytes, 2 * suite.chunk_bytes);
    for number in 4..8 {
        assert_eq!(write(&fixture, object(number)).await, Written::Stored);
    }
    let pinned = BTreeSet::from([0, 1].map(key));
    assert!(keys(&fixture).is_superset(&pinned));

    // Pinned and held together leave nothing to evict.
    let mut held = Vec::new();
    for other in keys(&fixture).difference(&pinned) {
        held.push(tier.open(*other).await.unwrap().unwrap());
    }
    assert_eq!(held.len(), 2);
    assert!(matches!(
        write(&fixture, object(8)).await,
        Written::Throttled(_)
    ));
    assert!(tier.unpin(pin));
    assert!(!tier.unpin(pin));
    assert_eq!(write(&fixture, object(8)).await, Written::Stored);
    assert_eq!(keys(&fixture).intersection(&pinned).count(), 1);
    drop(held);

    // A pin guards against eviction, not against its owner.
    tier.pin(pin, &[key(8)], time.now() + MINUTE).unwrap();
    assert!(tier.remove(key(8)).await.unwrap());
    assert!(!is_there(&fixture, 8));
}

pub(super) async fn pins_are_capped_and_expire<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let time = VirtualTime::new();
    let fixture = suite.with_clock(4, time.clock()).await;
    for number in 0..4 {
        assert_eq!(write(&fixture, object(number)).await, Written::Stored);
    }
    let tier = &fixture.tier;
    let expires = time.now() + MINUTE;
    tier.pin(PinId::from_u64(1), &[key(0)], expires).unwrap();
    let refused = tier.pin(PinId::from_u64(2), &[key(1), key(2)], expires);
    assert!(matches!(refused, Err(PinRefused::OverLimit { .. })));
    assert_eq!(tier.usage().pinned_bytes, suite.chunk_bytes, "all or none");
    tier.pin(PinId::from_u64(2), &[key(0), key(1)], expires + MINUTE)
        .unwrap();

    time.pass(MINUTE - Duration::from_millis(1));
    assert_eq!(tier.usage().pins, 2);
    time.pass(Duration::from_millis(1));
    assert_eq!(tier.usage().pins, 1);
    assert!(!tier.unpin(PinId::from_u64(1)), "expired");
    assert_eq!(write(&fixture, object(4)).await, Written::Stored);
    assert!(is_there(&fixture, 0), "the second pin covers it too");

    time.pass(MINUTE);
    assert_eq!(tier.usage().pinned_bytes, 0);
    let mut held = Vec::new();
    for other in keys(&fixture).iter().filter(|other| **other != key(0)) {
        held.push(tier.open(*other).await.unwrap().unwrap());
    }
    assert_eq!(write(&fixture, object(5)).await, Written::Stored);
    assert!(!is_there(&fixture, 0));
}

pub(super) async fn what_can_never_fit_is_refused<F, O>(suite: &Suite<F>)
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = full(suite, 3).await;
    let layout = KvLayout::new(4, 2, Planes::symmetric(64), 64, DType::Bf16).unwrap();
    let error = fixture.tier.write(object_with(9, &layout, 9)).await;
    assert!(matches!(error, Err(WriteError::TooLarge { .. })));
    assert_eq!(
        fixture.tier.usage().chunks,
        3,
        "nothing was evicted in vain"
    );

    let nothing = (suite.open)(Setup {
        capacity: ByteSize::bytes(0),
        pin_limit: ByteSize::bytes(0),
        policy: suite.policy,
        clock: VirtualTime::new().clock(),
    })
    .await;
    let error = nothing.tier.write(object(0)).await;
    assert!(matches!(error, Err(WriteError::TooLarge { .. })));
}

/// A tier that chunks `0..chunks` fill.
async fn full<F, O>(suite: &Suite<F>, chunks: u64) -> Fixture
where
    F: Fn(Setup) -> O,
    O: Future<Output = Fixture>,
{
    let fixture = suite.with_room_for(chunks).await;
    for number in 0..chunks {
        assert_eq!(write(&fixture, object(number)).await, Written::Stored);
    }
    let usage = fixture.tier.usage();
    assert_eq!(usage.bytes, usage.capacity);
    fixture
}

fn keys(fixture: &Fixture) -> BTreeSet<ChunkKey> {
    let key_of = |facts: Facts| facts.key;
    fixture.tier.entries().into_iter().map(key_of).collect()
}
