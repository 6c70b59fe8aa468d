//! Frames that are not what they should be: always a miss, counted, and then gone.

use std::fs;
use std::path::Path;

use kvasir_codec::{Object, ObjectHeader};
use kvasir_store::{PutOutcome, ReadError, Store, StoreConfig};
use kvasir_types::{ByteSize, DType, ExtentRange, KvLayout, Level, Planes};

use crate::{
    FRAME, Frame, PAYLOAD, all, close, disk_takes, get, key, layout, object, object_of, on_disk,
    segments,
};

/// Stores chunks 1 and 2, has `damage` change the frame of the second while the store
/// runs, and expects a miss. Restarts first, so that memory does not have it.
async fn expect_miss(damage: impl FnOnce(&Frame)) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    let _ = store.put(object(2)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let frame = Frame::of(directory.path(), 2);
    damage(&frame);

    assert_eq!(store.lookup(&[key(2)]).prefix, 1, "nobody has looked yet");
    assert_eq!(get(&store, 2).await, None);
    assert_eq!(store.lookup(&[key(2)]).prefix, 0);
    let usage = store.stats().disk.unwrap();
    assert_eq!((usage.corrupt, usage.chunks, usage.failures), (1, 1, 0));
    assert_eq!(get(&store, 1).await.unwrap(), object(1).extents());

    // It can be stored again, and stays gone or stored over a restart.
    let _ = store.put(object(2)).await.unwrap();
    close(store).await;
    assert!(frame.is_hole());
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(get(&store, 2).await.unwrap(), object(2).extents());
}

fn header_bytes() -> usize {
    ObjectHeader::header_bytes(&layout(), Level::RAW)
}

#[tokio::test]
async fn a_flipped_bit_in_the_header() {
    for at in [70, 0, header_bytes() - 1] {
        expect_miss(|frame| frame.flip(at)).await;
    }
}

#[tokio::test]
async fn a_flipped_bit_in_the_payload() {
    for at in [PAYLOAD, FRAME - 1] {
        expect_miss(|frame| frame.flip(at)).await;
    }
}

#[tokio::test]
async fn a_truncated_segment() {
    for keep in [0, 10, header_bytes() - 1, header_bytes(), PAYLOAD + 5000] {
        expect_miss(|frame| frame.truncate(keep)).await;
    }
}

/// As a device does that loses power in the middle of a write.
#[tokio::test]
async fn a_torn_frame() {
    for sector in [0, PAYLOAD, PAYLOAD + 512, FRAME - 512] {
        expect_miss(|frame| frame.overwrite(sector, &[0; 512])).await;
    }
}

#[tokio::test]
async fn an_intact_object_of_another_key() {
    expect_miss(|frame| frame.put(&object(9))).await;
}

#[tokio::test]
async fn an_intact_object_of_another_layout() {
    // The same key and the same size: heads and tokens swapped.
    let other = KvLayout::new(4, 16, Planes::symmetric(32), 2, DType::Bf16).unwrap();
    assert_eq!(other.chunk_bytes(), layout().chunk_bytes());
    expect_miss(|frame| frame.put(&object_of(2, &other))).await;
}

#[tokio::test]
async fn two_layers_swapped() {
    expect_miss(|frame| {
        let object = object(2);
        let mut layers = object.extents().to_vec();
        layers.swap(0, 3);
        frame.overwrite(PAYLOAD, &layers.concat());
    })
    .await;
}

/// All that lay in it is lost, and everything else stays.
#[tokio::test]
async fn a_segment_that_vanished() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(2)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    fs::remove_file(Frame::of(directory.path(), 1).file).unwrap();
    assert_eq!(get(&store, 1).await, None);
    assert_eq!(store.lookup(&[key(1)]).prefix, 0);
    assert_eq!(get(&store, 2).await.unwrap(), object(2).extents());
    disk_takes(&store, FRAME as u64).await;
}

/// With room for a chunk in memory, and no more.
fn reading_nothing_ahead(path: &Path) -> StoreConfig {
    let mut config = on_disk(path);
    config.memory.capacity = ByteSize::bytes(FRAME as u64 * 3 / 2);
    config
}

/// Damage after the chunk was opened: the layer that is bad fails, and only then
/// is the chunk gone.
#[tokio::test]
async fn damage_behind_an_open_lease() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    close(store).await;
    let store = Store::open(reading_nothing_ahead(directory.path()))
        .await
        .unwrap();
    let lease = store.lease(key(1)).await.unwrap();
    Frame::of(directory.path(), 1).flip(FRAME - 1);

    let good = ExtentRange::new(0, 3).unwrap();
    assert_eq!(
        lease.read_extents(good).await.unwrap(),
        object(1).extents()[..3]
    );
    assert_eq!(store.lookup(&[key(1)]).prefix, 1);
    let error = lease.read_extents(all()).await.unwrap_err();
    assert!(matches!(error, ReadError::Corrupt { .. }), "{error}");
    assert_eq!(store.lookup(&[key(1)]).prefix, 0);
    // A second reader of the same bad copy does not count twice.
    assert!(lease.read_extents(all()).await.is_err());
    assert_eq!(store.stats().disk.unwrap().corrupt, 1);
}

/// A small chunk is read when it is leased, and verified when it is asked for.
#[tokio::test]
async fn damage_behind_a_lease_that_read_ahead() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    let _ = store.put(object(2)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let early = store.lease(key(1)).await.unwrap();
    for number in [1, 2] {
        Frame::of(directory.path(), number).flip(FRAME - 1);
    }
    let late = store.lease(key(2)).await.unwrap();
    assert_eq!(
        early.read_extents(all()).await.unwrap(),
        object(1).extents()
    );
    let error = late.read_extents(all()).await.unwrap_err();
    assert!(matches!(error, ReadError::Corrupt { .. }), "{error}");
    assert_eq!(store.lookup(&[key(1)]).prefix, 1);
    assert_eq!(store.lookup(&[key(2)]).prefix, 0);
    assert_eq!(store.stats().disk.unwrap().corrupt, 1);
}

/// The old reader of a bad copy must not take down a good one that replaced it.
#[tokio::test]
async fn a_stale_lease_does_not_drop_a_newer_copy() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    close(store).await;
    let store = Store::open(reading_nothing_ahead(directory.path()))
        .await
        .unwrap();
    let stale = store.lease(key(1)).await.unwrap();
    Frame::of(directory.path(), 1).flip(PAYLOAD);
    assert!(store.delete(key(1)).await.unwrap());
    let replacement: Object = object(1);
    let _ = store.put(replacement.clone()).await.unwrap();
    assert!(stale.read_extents(all()).await.is_err());
    assert_eq!(get(&store, 1).await.unwrap(), replacement.extents());
    assert_eq!(store.stats().disk.unwrap().corrupt, 0);
}

/// The device refuses to read: the copy is dropped, so that the next put repairs it.
#[tokio::test]
async fn a_segment_that_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let file = Frame::of(directory.path(), 1).file;
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();

    assert_eq!(get(&store, 1).await, None);
    assert_eq!(store.lookup(&[key(1)]).prefix, 0);
    let usage = store.stats().disk.unwrap();
    assert_eq!(usage.corrupt, 1);
    assert!(usage.bytes > 0, "what cannot be deleted keeps its space");
    assert_eq!(store.put(object(1)).await.unwrap(), PutOutcome::Stored);
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(get(&store, 1).await.unwrap(), object(1).extents());
    assert_eq!(store.stats().disk.unwrap().bytes, FRAME as u64);
}

/// A deleted chunk keeps its space as long as somebody reads it.
#[tokio::test]
async fn space_is_free_when_the_last_reader_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let first = store.lease(key(1)).await.unwrap();
    let second = store.lease(key(1)).await.unwrap();
    let frame = Frame::of(directory.path(), 1);
    assert!(store.delete(key(1)).await.unwrap());
    let used = || store.stats().disk.unwrap().bytes;
    assert_eq!(used(), FRAME as u64);
    drop(first);
    assert_eq!(
        second.read_extents(all()).await.unwrap(),
        object(1).extents()
    );
    drop(second);
    while used() > 0 {
        tokio::task::yield_now().await;
    }
    // The next one lies there.
    let _ = store.put(object(2)).await.unwrap();
    let next = Frame::of(directory.path(), 2);
    assert_eq!((&next.file, next.offset), (&frame.file, frame.offset));
    assert!(store.delete(key(2)).await.unwrap());
    close(store).await;
    close(Store::open(on_disk(directory.path())).await.unwrap()).await;
    assert_eq!(segments(directory.path()), [] as [std::path::PathBuf; 0]);
}
