//! Restarts: what survives, what is swept, who may open a directory.

use std::fs;

use kvasir_store::{DiskConfig, OpenError, PutError, PutOutcome, Store, StoreConfig, TierKind};
use kvasir_types::ByteSize;

use crate::{close, file_of, get, key, object, on_disk};

#[tokio::test]
async fn a_restarted_store_is_warm() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    for number in 0..10 {
        assert_eq!(store.put(object(number)).await.unwrap(), PutOutcome::Stored);
    }
    assert!(store.delete(key(3)).await.unwrap());
    let used = store.stats().disk.unwrap().bytes;
    close(store).await;

    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(store.stats().disk.unwrap().bytes, used);
    assert_eq!(store.stats().disk.unwrap().chunks, 9);
    assert_eq!(store.snapshot().copies.len(), 9);
    for number in 0..10 {
        let expected = (number != 3).then(|| object(number).layers().to_vec());
        let tier = store.lookup(&[key(number)]).found[0].map(|found| found.tier);
        assert_eq!(tier, expected.as_ref().map(|_| TierKind::Disk));
        assert_eq!(get(&store, number).await, expected);
        // What was recovered is not written again.
        if number != 3 {
            let again = store.put(object(number)).await.unwrap();
            assert_eq!(again, PutOutcome::AlreadyPresent);
        }
    }
}

/// No `close`: what was acknowledged does not depend on it.
#[tokio::test]
async fn an_acknowledged_chunk_needs_no_clean_shutdown() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    // The directory as a crash would leave it.
    let crashed = tempfile::tempdir().unwrap();
    copy(directory.path(), crashed.path());
    let recovered = Store::open(on_disk(crashed.path())).await.unwrap();
    assert_eq!(get(&recovered, 1).await.unwrap(), object(1).layers());
}

#[tokio::test]
async fn a_directory_has_one_user() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let error = Store::open(on_disk(directory.path())).await.unwrap_err();
    assert!(matches!(&error, OpenError::Locked(path) if path == directory.path()));
    assert!(error.to_string().contains("in use"));
    close(store).await;
    assert!(Store::open(on_disk(directory.path())).await.is_ok());

    let file = directory.path().join("a-file");
    fs::write(&file, "").unwrap();
    let error = Store::open(on_disk(&file)).await.unwrap_err();
    assert!(matches!(error, OpenError::Directory { .. }), "{error}");
}

#[tokio::test]
async fn leftovers_are_swept_and_foreign_files_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    for number in 1..=4 {
        let _ = store.put(object(number)).await.unwrap();
    }
    close(store).await;

    let first = file_of(directory.path(), 1);
    let name = first.file_name().unwrap().to_str().unwrap().to_owned();
    let beside = |name: String| first.with_file_name(name);
    let generation = name.rsplit_once('-').unwrap().1;
    let temporary = beside(name.replace(generation, "00000000000000aa.tmp"));
    let orphan = beside(name.replace(generation, "00000000000000ab.chunk"));
    let foreign = beside("notes.txt".to_owned());
    for path in [&temporary, &orphan, &foreign] {
        fs::copy(&first, path).unwrap();
    }
    let folder = beside(name.replace(generation, "00000000000000ac.chunk"));
    fs::create_dir(&folder).unwrap();
    fs::remove_file(file_of(directory.path(), 2)).unwrap();
    fs::write(file_of(directory.path(), 3), "too short").unwrap();

    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert!(!temporary.exists() && !orphan.exists());
    assert!(foreign.exists() && folder.exists());
    let found = store.lookup(&[1, 2, 3, 4].map(key)).found;
    let there: Vec<bool> = found.iter().map(Option::is_some).collect();
    assert_eq!(there, [true, false, false, true], "one by one");
    assert_eq!(get(&store, 1).await.unwrap(), object(1).layers());
    // Names are not used twice, even those of orphans.
    assert_eq!(store.put(object(2)).await.unwrap(), PutOutcome::Stored);
    let fresh = file_of(directory.path(), 2);
    assert!(fresh.to_str().unwrap().contains("-00000000000000ac."));
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(store.stats().disk.unwrap().chunks, 3);
}

#[tokio::test]
async fn a_smaller_capacity_keeps_the_newest() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    for number in 0..6 {
        let _ = store.put(object(number)).await.unwrap();
    }
    close(store).await;
    let config = StoreConfig {
        disk: Some(DiskConfig {
            capacity: ByteSize::kib(44),
            ..DiskConfig::at(directory.path())
        }),
        ..StoreConfig::default()
    };
    let store = Store::open(config).await.unwrap();
    let numbers = [0, 1, 2, 3, 4, 5];
    let found = store.lookup(&numbers.map(key)).found;
    let there: Vec<bool> = found.iter().map(Option::is_some).collect();
    assert_eq!(there, [false, false, false, false, true, true]);
    assert!(store.stats().disk.unwrap().bytes <= 44 << 10);
}

#[tokio::test]
async fn a_closed_store_refuses_writes() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    store.close().await.unwrap();
    store.close().await.unwrap();
    let error = store.put(object(2)).await.unwrap_err();
    assert!(matches!(error, PutError::Write(_)), "{error}");
    assert_eq!(get(&store, 1).await.unwrap(), object(1).layers());
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
