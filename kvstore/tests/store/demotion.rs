//! Chunks that were put into memory alone, and what hints do to the order of eviction.

use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use kvasir_store::policy::{Admission, PolicyKind};
use kvasir_store::{
    ClassConfig, DiskConfig, MemoryConfig, Put, PutOptions, PutOutcome, Store, StoreConfig,
    TierKind,
};
use kvasir_types::{ByteSize, Class, Durability, Hints};

use crate::{close, get, key, memory_only, object, on_disk};

fn in_memory() -> PutOptions {
    PutOptions {
        durability: Durability::Memory,
        ..PutOptions::default()
    }
}

fn tier_of(store: &Store, number: u8) -> Option<TierKind> {
    store.lookup(&[key(number)]).found[0].map(|found| found.tier)
}

fn is_on_disk(store: &Store, number: u8) -> bool {
    let listed = store.list(None, usize::MAX);
    let mut copies = listed.iter().filter(|listed| listed.key == key(number));
    copies.any(|listed| listed.tiers.contains(&TierKind::Disk))
}

#[tokio::test]
async fn an_answer_says_which_promise_it_keeps() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let put = |options| store.put_with(object(1), options);
    let [stored, present] = [PutOutcome::Stored, PutOutcome::AlreadyPresent];
    let expect = |outcome, durable| Put { outcome, durable };
    assert_eq!(put(in_memory()).await.unwrap(), expect(stored, false));
    assert!(!is_on_disk(&store, 1));
    assert_eq!(put(in_memory()).await.unwrap(), expect(present, false));
    // Memory has it, but that is not what is asked for.
    let durable = || put(PutOptions::default());
    assert_eq!(durable().await.unwrap(), expect(stored, true));
    assert!(is_on_disk(&store, 1));
    assert_eq!(durable().await.unwrap(), expect(present, true));
    assert_eq!(put(in_memory()).await.unwrap(), expect(present, true));

    let store = Store::open(memory_only(ByteSize::mib(1))).await.unwrap();
    let put = store.put_with(object(1), PutOptions::default());
    assert_eq!(put.await.unwrap(), expect(stored, false));
}

/// A store of `chunks` chunks in memory.
async fn small(path: &Path, chunks: u64, admission: Admission) -> Store {
    let config = StoreConfig {
        memory: MemoryConfig {
            policy: PolicyKind::Lru,
            // And blocks to write them from.
            ..MemoryConfig::with_capacity(ByteSize::bytes(
                Store::charged_bytes(object(0).header()) * chunks + (64 << 10),
            ))
        },
        disk: Some(DiskConfig {
            admission,
            ..DiskConfig::at(path)
        }),
        ..StoreConfig::default()
    };
    Store::open(config).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_memory_evicts_is_on_disk_by_then() {
    let directory = tempfile::tempdir().unwrap();
    let store = small(directory.path(), 16, Admission::All).await;
    for number in 0..100 {
        store.put_with(object(number), in_memory()).await.unwrap();
    }
    assert!(store.stats().disk.unwrap().writes < 100, "none is early");
    for number in 0..100 {
        assert!(tier_of(&store, number).is_some(), "{number}");
    }
    for number in (0..100).filter(|number| is_on_disk(&store, *number)) {
        assert_eq!(get(&store, number).await.unwrap(), object(number).extents());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn admission_spares_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let store = small(directory.path(), 16, Admission::SecondUse).await;
    for number in 0..100 {
        store.put_with(object(number), in_memory()).await.unwrap();
        if number % 4 == 0 {
            assert!(get(&store, number).await.is_some());
        }
    }
    for number in 0..80 {
        let expected = (number % 4 == 0).then_some(TierKind::Disk);
        assert_eq!(tier_of(&store, number), expected, "{number}");
    }
}

#[tokio::test]
async fn closing_keeps_what_is_in_memory_alone() {
    let directory = tempfile::tempdir().unwrap();
    let store = small(directory.path(), 16, Admission::All).await;
    for number in 0..8 {
        store.put_with(object(number), in_memory()).await.unwrap();
    }
    // Neither a pin nor a reader keeps a chunk from being copied.
    store.pin(&[key(3)], Duration::from_secs(60)).unwrap();
    let held = get(&store, 4).await.unwrap();
    assert_eq!(store.stats().disk.unwrap().chunks, 0);
    close(store).await;
    drop(held);
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    for number in 0..8 {
        assert_eq!(get(&store, number).await.unwrap(), object(number).extents());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_while_it_moves_stays_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let store = small(directory.path(), 16, Admission::All).await;
    for number in 0..200 {
        store.put_with(object(number), in_memory()).await.unwrap();
        if let Some(victim) = number.checked_sub(16) {
            assert!(store.delete(key(victim)).await.unwrap(), "{victim}");
            assert_eq!(tier_of(&store, victim), None);
        }
    }
    for number in 0..184 {
        assert_eq!(tier_of(&store, number), None, "{number}");
    }
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(store.stats().disk.unwrap().chunks, 16);
}

fn after(parent: Option<u8>) -> PutOptions {
    PutOptions {
        hints: Hints {
            parent: parent.map(key),
            ..Hints::default()
        },
        ..PutOptions::default()
    }
}

/// Of a chain, the end goes first: also after a restart.
#[tokio::test]
async fn chains_are_evicted_from_their_ends() {
    for restart in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let config = StoreConfig {
            disk: Some(DiskConfig {
                // Four frames of 20 KiB.
                capacity: ByteSize::kib(80),
                ..DiskConfig::at(directory.path())
            }),
            ..StoreConfig::default()
        };
        let mut store = Store::open(config.clone()).await.unwrap();
        for number in 0..4u8 {
            let options = after(number.checked_sub(1));
            store.put_with(object(number), options).await.unwrap();
        }
        if restart {
            close(store).await;
            store = Store::open(config).await.unwrap();
        }
        for number in 4..6 {
            let _ = store.put(object(number)).await.unwrap();
        }
        let here: Vec<_> = (0..4).map(|number| is_on_disk(&store, number)).collect();
        let prefix = here.iter().take_while(|here| **here).count();
        assert!((1..4).contains(&prefix), "restart: {restart}: {here:?}");
        assert!(here[prefix..].iter().all(|here| !here), "{here:?}");
    }
}

#[tokio::test]
async fn a_class_over_its_quota_goes_first() {
    let class = Class::new(3).unwrap();
    let chunk = Store::charged_bytes(object(0).header());
    let config = StoreConfig {
        class: vec![ClassConfig {
            number: class,
            time_to_live_s: None,
            quota: Some(ByteSize::bytes(chunk)),
        }],
        ..memory_only(ByteSize::bytes(chunk * 4))
    };
    let store = Store::open(config).await.unwrap();
    for number in 0..6 {
        let hints = Hints {
            class: if number < 2 { Class::default() } else { class },
            recompute: NonZeroU32::new(16),
            ..Hints::default()
        };
        let options = PutOptions {
            hints,
            ..PutOptions::default()
        };
        store.put_with(object(number), options).await.unwrap();
    }
    assert_eq!(store.lookup(&[key(0), key(1)]).prefix, 2);
}
