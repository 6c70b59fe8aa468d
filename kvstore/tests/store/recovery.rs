//! Restarts: what survives, what is swept, who may open a directory.

use std::fs;

use kvasir_store::{
    DirectIo, DiskConfig, Medium as _, OpenError, PutError, PutOutcome, Store, StoreConfig,
    TierKind,
};
use kvasir_types::{ByteSize, DType, KvLayout, Planes};

use crate::{FRAME, Frame, close, get, key, layout, object, object_of, on_disk, segments};

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
        let expected = (number != 3).then(|| object(number).extents().to_vec());
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
    assert_eq!(get(&recovered, 1).await.unwrap(), object(1).extents());
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
    let other = tempfile::tempdir().unwrap();
    for path in [directory.path(), other.path()] {
        let store = Store::open(on_disk(path)).await.unwrap();
        for number in 1..=4 {
            let _ = store.put(object(number)).await.unwrap();
        }
        close(store).await;
    }
    let root = directory.path().join("segments");
    let [first, lost, last] = [1, 2, 4].map(|number| Frame::of(directory.path(), number));
    let stranger = Frame::of(other.path(), 1).file;
    let first = first.file;
    let beside = |name: &str| root.join(name);
    // A segment whose creation never ended, one without records, one of another
    // store, and files that are no segments at all.
    fs::write(beside("000000a0.seg"), "").unwrap();
    fs::write(beside("000000a1.seg"), [7; 9000]).unwrap();
    fs::copy(stranger, beside("000000a2.seg")).unwrap();
    fs::copy(&first, beside("0000000.seg")).unwrap();
    fs::write(beside("notes.txt"), "mine").unwrap();
    fs::create_dir(beside("000000a3.seg")).unwrap();
    // A frame without a record, and a chunk whose frame is a hole.
    last.overwrite(10 * FRAME, &[1; 8192]);
    let file = fs::File::options().write(true).open(&first).unwrap();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, lost.offset as u64, FRAME as u64).unwrap();

    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let there: Vec<bool> = [
        "000000a0.seg",
        "000000a1.seg",
        "000000a2.seg",
        "0000000.seg",
    ]
    .into_iter()
    .chain(["notes.txt", "000000a3.seg"])
    .map(|name| beside(name).exists())
    .collect();
    assert_eq!(there, [false, false, true, true, true, true]);
    let found = store.lookup(&[1, 2, 3, 4].map(key)).found;
    let there: Vec<bool> = found.iter().map(Option::is_some).collect();
    assert_eq!(there, [true, false, true, true], "one by one");
    assert_eq!(get(&store, 1).await.unwrap(), object(1).extents());
    assert_eq!(
        allocated(&first),
        4096 + 3 * FRAME as u64,
        "no orphan bytes"
    );
    // Numbers are not used twice, even those of strangers.
    assert_eq!(store.put(object(2)).await.unwrap(), PutOutcome::Stored);
    assert!(beside("000000a4.seg").exists());
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(store.stats().disk.unwrap().chunks, 4);
}

/// Bytes of data in a file. Not the blocks of `stat`: those include a file system's
/// own bookkeeping.
fn allocated(file: &std::path::Path) -> u64 {
    let file = DirectIo.open(file).unwrap();
    let next = |from| file.data(from).unwrap();
    std::iter::successors(next(0), |data| next(data.end))
        .map(|data| data.end - data.start)
        .sum()
}

/// Places that were freed are used again where the size fits, and given back where it does
/// not.
#[tokio::test]
async fn the_files_take_no_more_than_the_capacity() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = on_disk(directory.path());
    let capacity = 8 * FRAME as u64;
    config.disk.as_mut().unwrap().capacity = ByteSize::bytes(capacity);
    let store = Store::open(config).await.unwrap();
    let long = KvLayout::new(8, 2, Planes::symmetric(32), 16, DType::Bf16).unwrap();
    for round in 0..6u8 {
        for number in 0..20 {
            let number = 20 * round + number;
            let layout = if round % 2 == 0 { layout() } else { long };
            let put = store.put(object_of(number, &layout)).await.unwrap();
            assert_eq!(put, PutOutcome::Stored);
            let files = segments(directory.path());
            let taken: u64 = files.iter().map(|file| allocated(file)).sum();
            let headers = 4096 * files.len() as u64;
            assert!(
                taken <= capacity + headers,
                "{taken} of {capacity}, and {headers}"
            );
        }
        assert!(segments(directory.path()).len() <= 2);
    }
}

/// A directory of version 1: a file for every chunk.
#[tokio::test]
async fn a_directory_of_the_previous_version_is_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let catalog = directory.path().join("catalog");
    fs::create_dir_all(&catalog).unwrap();
    {
        let mut options = rocksdb::Options::default();
        options.create_if_missing(true);
        let db = rocksdb::DB::open(&options, &catalog).unwrap();
        for number in 1..=4u8 {
            let object = object(number);
            let mut value = vec![1, object.header().level().code()];
            value.extend(object.header().layout().encode());
            value.extend(u64::from(number).to_le_bytes());
            value.extend(object.header().object_bytes().to_le_bytes());
            value.extend([0; 8]);
            db.put(key(number).as_bytes(), value).unwrap();
            let folder = directory.path().join(format!("chunks/{number:02x}"));
            fs::create_dir_all(&folder).unwrap();
            let mut bytes = object.encode();
            if number == 3 {
                bytes[5000] ^= 1;
            }
            let name = format!("{}-{number:016x}.chunk", key(number));
            if number != 4 {
                fs::write(folder.join(name), bytes).unwrap();
            }
        }
    }
    let unfinished = format!("chunks/01/{}-00000000000000aa.tmp", key(1));
    fs::write(directory.path().join(unfinished), "half").unwrap();
    fs::write(directory.path().join("chunks/02/notes.txt"), "mine").unwrap();

    for _ in 0..2 {
        let store = Store::open(on_disk(directory.path())).await.unwrap();
        for (number, whole) in [(1, true), (2, true), (3, false), (4, false)] {
            let expected = whole.then(|| object(number).extents().to_vec());
            assert_eq!(get(&store, number).await, expected);
        }
        assert_eq!(store.stats().disk.unwrap().chunks, 2);
        close(store).await;
    }
    let left: Vec<_> = fs::read_dir(directory.path().join("chunks"))
        .unwrap()
        .map(|item| item.unwrap().file_name())
        .collect();
    assert_eq!(left, ["02"], "it holds a file that is not ours");
    assert!(directory.path().join("chunks/02/notes.txt").exists());
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
    assert_eq!(get(&store, 1).await.unwrap(), object(1).extents());
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
