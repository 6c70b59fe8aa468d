//! Tiers together: write-through, promotion, pins, events, throttling.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvasir_store::policy::PolicyKind;
use kvasir_store::{
    Clock, DiskConfig, Environment, EventKind, MemoryConfig, PayloadShape, PinRefused, PutError,
    PutOptions, PutOutcome, ReadError, Store, StoreConfig, TierKind, WriteError,
};
use kvasir_types::{ByteSize, DType, Durability, ExtentIdx, ExtentRange, Hints, KvLayout, Planes};

use crate::{all, close, disk_takes, get, key, layout, memory_only, object, object_of, on_disk};

#[tokio::test]
async fn lookup_finds_the_longest_prefix_and_changes_nothing() {
    let store = Store::open(memory_only(ByteSize::mib(1))).await.unwrap();
    for number in [1, 2, 4] {
        assert_eq!(store.put(object(number)).await.unwrap(), PutOutcome::Stored);
    }
    let before = store.stats();
    let result = store.lookup(&[1, 2, 3, 4].map(key));
    assert_eq!(result.prefix, 2);
    assert!(result.found[2].is_none());
    let found = result.found[3].unwrap();
    assert_eq!(found.tier, TierKind::Memory);
    assert_eq!(found.bytes, object(4).header().object_bytes());
    assert_eq!(found.layout_digest, layout().digest());
    assert_eq!(store.lookup(&[]).prefix, 0);
    assert_eq!(store.stats(), before);
}

#[tokio::test]
async fn writes_go_through_and_reads_promote() {
    let directory = tempfile::tempdir().unwrap();
    let chunk = Store::charged_bytes(object(0).header());
    let config = StoreConfig {
        // Two chunks and a block to write them from, and not a third.
        memory: lru(ByteSize::bytes(chunk * 2 + 4096)),
        disk: Some(DiskConfig::at(directory.path())),
        ..StoreConfig::default()
    };
    let store = Store::open(config).await.unwrap();
    for number in 0..3 {
        assert_eq!(store.put(object(number)).await.unwrap(), PutOutcome::Stored);
    }
    let stats = store.stats();
    assert_eq!((stats.memory.chunks, stats.disk.unwrap().chunks), (2, 3));
    let tier_of = |number| store.lookup(&[key(number)]).found[0].unwrap().tier;
    assert_eq!(tier_of(0), TierKind::Disk);
    assert_eq!(tier_of(2), TierKind::Memory);
    let listed = store.list(Some(&key(0)), 1);
    assert_eq!(listed[0].key, key(1));
    assert_eq!(listed[0].tiers, [TierKind::Memory, TierKind::Disk]);
    assert_eq!(store.list(None, 10).len(), 3);
    let pages = [None, Some(key(0)), Some(key(1)), Some(key(2))];
    let pages = pages.map(|after| store.list(after.as_ref(), 1));
    assert_eq!(pages.concat(), store.list(None, usize::MAX));
    assert!(store.list(None, 0).is_empty());

    // Layer by layer, out of order, through one lease.
    let lease = store.lease(key(0)).await.unwrap();
    assert_eq!((lease.tier(), *lease.layout()), (TierKind::Disk, layout()));
    for (start, end) in [(2, 4), (0, 1), (1, 2)] {
        assert_eq!(tier_of(0), TierKind::Disk);
        let range = ExtentRange::new(start, end).unwrap();
        let layers = lease.read_extents(range).await.unwrap();
        let expected = object(0).extents()[start as usize..end as usize].to_vec();
        assert_eq!(layers, expected);
    }
    assert_eq!(tier_of(0), TierKind::Memory);
    drop(lease);
    assert_eq!(store.lease(key(0)).await.unwrap().tier(), TierKind::Memory);
    assert_eq!(get(&store, 0).await.unwrap(), object(0).extents());
    assert_eq!(store.stats().leases, 0);
    // One of the two was read together with the block of its header.
    assert!(store.stats().memory.bytes <= chunk * 2 + 4096);
}

/// What a lease read ahead is nobody's yet, so it does not stand in the way.
#[tokio::test]
async fn what_was_read_ahead_gives_way() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(0)).await.unwrap();
    close(store).await;
    let mut config = on_disk(directory.path());
    config.memory.capacity = ByteSize::bytes(Store::charged_bytes_of_raw(&layout()) * 2);
    let store = Store::open(config).await.unwrap();
    let lease = store.lease(key(0)).await.unwrap();
    let ahead = store.stats().memory.bytes;
    assert!(ahead > layout().chunk_bytes(), "{ahead}");
    let other = [(); 2].map(|()| store.payload(PayloadShape::raw(layout())));
    let other = futures::future::try_join_all(other).await;
    assert!(other.is_ok(), "{other:?}");
    drop(other);
    assert_eq!(
        lease.read_extents(all()).await.unwrap(),
        object(0).extents()
    );
}

#[tokio::test]
async fn a_put_is_repeatable_and_concurrent_puts_converge() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let puts = (0..8).map(|_| {
        let store = store.clone();
        tokio::spawn(async move { store.put(object(1)).await.unwrap() })
    });
    let outcomes: Vec<PutOutcome> = futures::future::join_all(puts)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let stored = outcomes.iter().filter(|o| **o == PutOutcome::Stored);
    assert_eq!(stored.count(), 1);
    let stats = store.stats();
    assert_eq!(stats.disk.unwrap().writes, 1, "the others did not write");
    let chunk = Store::charged_bytes(object(1).header());
    assert_eq!(stats.memory.bytes - stats.memory.idle_bytes, chunk);
}

#[tokio::test]
async fn deleting_removes_every_copy_but_not_what_is_held() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    let lease = store.lease(key(1)).await.unwrap();
    assert!(store.delete(key(1)).await.unwrap());
    assert!(!store.delete(key(1)).await.unwrap());
    assert!(store.lease(key(1)).await.is_none());
    assert_eq!(
        lease.read_extents(all()).await.unwrap(),
        object(1).extents()
    );
    drop(lease);
    let stats = store.stats();
    assert_eq!(stats.memory.bytes, stats.memory.idle_bytes);
    disk_takes(&store, 0).await;
}

/// What is received lies in memory of the store, and its memory serves the next one.
#[tokio::test]
async fn payload_is_received_in_place() {
    let store = Store::open(memory_only(ByteSize::mib(1))).await.unwrap();
    let mut places = Vec::new();
    for number in 0..2 {
        let mut payload = store.payload(PayloadShape::raw(layout())).await.unwrap();
        for (layer, bytes) in (0..).zip(object(number).extents()) {
            payload
                .extent_mut(ExtentIdx(layer))
                .unwrap()
                .copy_from_slice(bytes);
        }
        assert!(
            payload
                .extent_mut(ExtentIdx(layout().layers().into()))
                .is_none()
        );
        places.push(payload.extent_mut(ExtentIdx(0)).unwrap().as_ptr().addr());
        let received = payload.into_object(key(number)).unwrap();
        let options = PutOptions {
            durability: Durability::Memory,
            hints: Hints::default(),
        };
        let put = store.put_received(received, options);
        assert_eq!(put.await.unwrap().outcome, PutOutcome::Stored);
        let layers = get(&store, number).await.unwrap();
        assert_eq!(layers, object(number).extents());
        assert_eq!(layers[0].as_ptr().addr(), places[number as usize]);
        drop(layers);
        assert!(store.delete(key(number)).await.unwrap());
    }
    assert_eq!(places[0], places[1]);
    let too_large = KvLayout::new(4, 2, Planes::symmetric(512), 512, DType::Bf16).unwrap();
    let refused = store
        .payload(PayloadShape::raw(too_large))
        .await
        .unwrap_err();
    let PutError::Throttled(throttled) = refused else {
        panic!("{refused}");
    };
    assert!(throttled.wanted > throttled.capacity);
    let memory = store.stats().memory;
    assert_eq!(memory.bytes, memory.idle_bytes);
    assert_eq!(memory.idle_bytes, layout().chunk_bytes());
}

/// A delete that nobody waits for leaves no copy behind.
#[tokio::test]
async fn an_abandoned_delete_finishes() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    let mut delete = Box::pin(store.delete(key(1)));
    assert!(futures::poll!(&mut delete).is_pending());
    drop(delete);
    while store.lookup(&[key(1)]).prefix > 0 {
        tokio::task::yield_now().await;
    }
}

/// What memory serves is used on disk too.
#[tokio::test]
async fn the_most_read_chunk_is_not_the_first_to_leave_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let config = StoreConfig {
        memory: MemoryConfig::default(),
        disk: Some(DiskConfig {
            // Three files of 16 KiB payload and a header.
            capacity: ByteSize::kib(60),
            ..DiskConfig::at(directory.path())
        }),
        ..StoreConfig::default()
    };
    let store = Store::open(config).await.unwrap();
    for number in 0..3 {
        let _ = store.put(object(number)).await.unwrap();
    }
    assert!(get(&store, 0).await.is_some());
    let _ = store.put(object(3)).await.unwrap();
    let on_disk = |number| {
        let listed = store.list(None, 100);
        let mut here = listed.iter().filter(|item| item.key == key(number));
        here.any(|item| item.tiers.contains(&TierKind::Disk))
    };
    assert!(on_disk(0) && !(on_disk(1) && on_disk(2)));
}

/// A lease from before a deletion must not bring the chunk back by promotion.
#[tokio::test]
async fn a_deleted_chunk_does_not_come_back_through_a_lease() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    crate::close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let lease = store.lease(key(1)).await.unwrap();
    assert_eq!(lease.tier(), TierKind::Disk);
    assert!(store.delete(key(1)).await.unwrap());
    assert_eq!(
        lease.read_extents(all()).await.unwrap(),
        object(1).extents()
    );
    assert_eq!(store.lookup(&[key(1)]).prefix, 0);
}

#[tokio::test]
async fn what_cannot_be_evicted_throttles() {
    let chunk = Store::charged_bytes(object(0).header());
    let store = Store::open(memory_only(ByteSize::bytes(chunk * 2)))
        .await
        .unwrap();
    let _ = store.put(object(0)).await.unwrap();
    // One chunk held as bytes alone, after its lease ended; one pinned.
    let held = get(&store, 0).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    let pin = store.pin(&[key(1)], Duration::from_secs(60)).unwrap();

    let error = store.put(object(2)).await.unwrap_err();
    assert!(matches!(error, PutError::Throttled(_)), "{error}");
    assert!(store.payload(PayloadShape::raw(layout())).await.is_err());
    assert_eq!(store.stats().memory.evictions, 0);
    assert_eq!(store.lookup(&[key(0), key(1)]).prefix, 2);

    assert!(store.unpin(pin));
    assert_eq!(store.put(object(2)).await.unwrap(), PutOutcome::Stored);
    assert_eq!(held, object(0).extents());

    let large = KvLayout::new(4, 2, Planes::symmetric(128), 128, DType::Bf16).unwrap();
    let error = store.put(object_of(9, &large)).await.unwrap_err();
    assert!(matches!(
        error,
        PutError::Write(WriteError::TooLarge { .. })
    ));
}

/// Reading from disk needs memory; where there is none, the chunk is not lost.
#[tokio::test]
async fn a_read_without_memory_is_throttled_and_works_later() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    crate::close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let lease = store.lease(key(1)).await.unwrap();
    let mut everything = Vec::new();
    while let Ok(payload) = store.payload(PayloadShape::raw(layout())).await {
        everything.push(payload);
    }
    assert!(matches!(
        lease.read_extents(all()).await,
        Err(ReadError::Throttled(_))
    ));
    drop(everything);
    assert_eq!(
        lease.read_extents(all()).await.unwrap(),
        object(1).extents()
    );
}

#[tokio::test]
async fn pins_live_in_the_lowest_tier_and_expire_in_virtual_time() {
    let directory = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let seconds = Arc::new(AtomicU64::new(0));
    let passed = Arc::clone(&seconds);
    let clock = Clock::new(move || start + Duration::from_secs(passed.load(Ordering::SeqCst)));
    // Three files of 16 KiB payload and a header.
    let disk = DiskConfig {
        capacity: ByteSize::kib(60),
        pin_limit: Some(ByteSize::kib(20)),
        policy: PolicyKind::Lru,
        ..DiskConfig::at(directory.path())
    };
    let config = StoreConfig {
        memory: MemoryConfig::default(),
        disk: Some(disk),
        ..StoreConfig::default()
    };
    let environment = Environment {
        clock,
        ..Environment::default()
    };
    let store = Store::open_in(environment, config).await.unwrap();
    for number in 0..3 {
        let _ = store.put(object(number)).await.unwrap();
    }
    let minute = Duration::from_secs(60);
    let pins = || {
        let stats = store.stats();
        (stats.memory.pins, stats.disk.unwrap().pins, stats.pins)
    };
    store.pin(&[key(0)], minute).unwrap();
    assert_eq!(pins(), (0, 1, 1));
    let refused = store.pin(&[key(1)], minute).unwrap_err();
    assert!(matches!(refused, PinRefused::OverLimit { .. }));
    let refused = store.pin(&[key(0), key(77)], minute).unwrap_err();
    assert_eq!(refused, PinRefused::Missing(key(77)));
    assert_eq!(pins(), (0, 1, 1), "all or none");

    let disk_has = |number| {
        let listed = store.list(None, 100);
        listed
            .iter()
            .any(|item| item.key == key(number) && item.tiers.contains(&TierKind::Disk))
    };
    let _ = store.put(object(3)).await.unwrap();
    assert!(disk_has(0) && !disk_has(1));
    seconds.store(60, Ordering::SeqCst);
    let _ = store.put(object(4)).await.unwrap();
    assert!(!disk_has(0));
    assert_eq!(pins(), (0, 0, 0));
    // Memory still has chunk 0, so it is pinned there.
    store.pin(&[key(0)], Duration::MAX).unwrap();
    assert_eq!(pins(), (1, 0, 1));
    let both = store.pin(&[key(0), key(4)], Duration::MAX).unwrap();
    assert_eq!(pins(), (2, 1, 2));
    assert!(store.delete(key(4)).await.unwrap());
    assert_eq!(pins(), (2, 0, 2), "what is gone is not pinned");
    assert!(store.unpin(both));
    assert_eq!(pins(), (1, 0, 1));
    assert!(!store.unpin(store.pin(&[], minute).unwrap()));
}

/// Cold chunks, more than memory holds, read side by side.
#[tokio::test]
async fn a_cold_scan_leaves_half_of_what_is_hot() {
    let directory = tempfile::tempdir().unwrap();
    let chunk = Store::charged_bytes(object(0).header());
    let config = StoreConfig {
        memory: lru(ByteSize::bytes(chunk * 8 + 4096)),
        disk: Some(DiskConfig::at(directory.path())),
        ..StoreConfig::default()
    };
    let store = Store::open(config).await.unwrap();
    for number in 0..32 {
        let _ = store.put(object(number)).await.unwrap();
    }
    let hot: Vec<_> = (24..32).map(key).collect();
    let in_memory = |keys: &[_]| {
        let found = store.lookup(keys).found.into_iter().flatten();
        found.filter(|found| found.tier == TierKind::Memory).count()
    };
    assert_eq!(in_memory(&hot), 8);
    let mut leases = Vec::new();
    for number in 0..24 {
        leases.push(store.lease(key(number)).await.unwrap());
    }
    for layer in 0..4 {
        let range = ExtentRange::new(layer, layer + 1).unwrap();
        for lease in &leases {
            lease.read_extents(range).await.unwrap();
        }
    }
    assert!(in_memory(&hot) >= 3, "{}", in_memory(&hot));
    let cold: Vec<_> = (0..24).map(key).collect();
    assert_eq!(
        in_memory(&cold),
        4,
        "and some of the cold ones are promoted"
    );
}

#[tokio::test]
async fn events_and_snapshots_agree() {
    let directory = tempfile::tempdir().unwrap();
    let config = StoreConfig {
        memory: MemoryConfig::with_capacity(ByteSize::kib(64)),
        disk: Some(DiskConfig::at(directory.path())),
        ..StoreConfig::default()
    };
    let store = Store::open(config).await.unwrap();
    let mut events = store.events();
    let before = store.snapshot();
    assert_eq!(before.sequence, 0);
    for number in 0..6 {
        let _ = store.put(object(number)).await.unwrap();
    }
    assert!(store.delete(key(2)).await.unwrap());

    let after = store.snapshot();
    let mut copies = std::collections::BTreeSet::new();
    for sequence in 1..=after.sequence {
        let event = events.try_recv().unwrap();
        assert_eq!((event.epoch, event.sequence), (after.epoch, sequence));
        let copy = (event.key, event.tier);
        match event.kind {
            EventKind::Stored => assert!(copies.insert(copy), "stored twice"),
            EventKind::Removed => assert!(copies.remove(&copy), "removed unseen"),
        }
    }
    assert!(events.try_recv().is_err());
    assert_eq!(copies, after.copies.into_iter().collect());
    assert!(store.stats().memory.evictions > 0, "evictions are events");

    let other = Store::open(memory_only(ByteSize::mib(1))).await.unwrap();
    assert_ne!(other.snapshot().epoch, after.epoch);
}

/// Memory of which it is known what goes first.
fn lru(capacity: ByteSize) -> MemoryConfig {
    MemoryConfig {
        policy: PolicyKind::Lru,
        ..MemoryConfig::with_capacity(capacity)
    }
}

/// Whoever begins to watch while chunks come and go knows all of them in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_and_the_events_after_it_tell_all() {
    let store = Store::open(memory_only(ByteSize::mib(4))).await.unwrap();
    let churn = {
        let store = store.clone();
        tokio::spawn(async move {
            for round in 0..20u8 {
                for number in 0..100u8 {
                    if number % 7 == round % 7 {
                        store.delete(key(number)).await.unwrap();
                    } else {
                        let _ = store.put(object(number)).await.unwrap();
                    }
                }
            }
        })
    };
    let mut watchers = Vec::new();
    while watchers.len() < 2 || !churn.is_finished() {
        watchers.push((store.events(), store.snapshot()));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    churn.await.unwrap();
    let truth: HashSet<_> = store.snapshot().copies.into_iter().collect();
    assert!(!truth.is_empty());
    for (mut events, snapshot) in watchers {
        let mut known: HashSet<_> = snapshot.copies.into_iter().collect();
        while let Ok(event) = events.try_recv() {
            let copy = (event.key, event.tier);
            match event.kind {
                _ if event.sequence <= snapshot.sequence => false,
                EventKind::Stored => known.insert(copy),
                EventKind::Removed => known.remove(&copy),
            };
        }
        assert_eq!(known, truth, "after {}", snapshot.sequence);
    }
}
