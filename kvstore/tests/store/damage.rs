//! Files that are not what they should be: always a miss, counted, and then gone.

use std::fs;
use std::path::Path;

use kvasir_codec::{Object, ObjectHeader};
use kvasir_store::{PutOutcome, ReadError, Store};
use kvasir_types::{DType, KvLayout, LayerRange, Planes};

use crate::{all, close, file_of, get, key, layout, object, object_of, on_disk};

/// Stores chunk 1, has `damage` change its file while the store runs, and expects
/// a miss. Restarts first, so that memory does not have it.
async fn expect_miss(damage: impl FnOnce(&Path)) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    let _ = store.put(object(2)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let file = file_of(directory.path(), 1);
    damage(&file);

    assert_eq!(store.lookup(&[key(1)]).prefix, 1, "nobody has looked yet");
    assert_eq!(get(&store, 1).await, None);
    assert_eq!(store.lookup(&[key(1)]).prefix, 0);
    assert!(!file.exists());
    let usage = store.stats().disk.unwrap();
    assert_eq!((usage.corrupt, usage.chunks, usage.failures), (1, 1, 0));
    assert_eq!(get(&store, 2).await.unwrap(), object(2).layers());

    // It can be stored again, and stays gone or stored over a restart.
    let _ = store.put(object(1)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(get(&store, 1).await.unwrap(), object(1).layers());
}

fn flip(file: &Path, at: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at] ^= 0x10;
    fs::write(file, bytes).unwrap();
}

fn header_bytes() -> usize {
    ObjectHeader::header_bytes(layout().layers())
}

fn last_byte() -> usize {
    object(1).encode().len() - 1
}

#[tokio::test]
async fn a_flipped_bit_in_the_header() {
    expect_miss(|file| flip(file, 70)).await;
    expect_miss(|file| flip(file, 0)).await;
    expect_miss(|file| flip(file, header_bytes() - 1)).await;
}

#[tokio::test]
async fn a_flipped_bit_in_the_payload() {
    expect_miss(|file| flip(file, header_bytes())).await;
    expect_miss(|file| flip(file, last_byte())).await;
}

#[tokio::test]
async fn a_truncated_file() {
    for keep in [
        0,
        10,
        header_bytes() - 1,
        header_bytes(),
        header_bytes() + 5000,
    ] {
        expect_miss(|file| {
            let bytes = fs::read(file).unwrap();
            fs::write(file, &bytes[..keep]).unwrap();
        })
        .await;
    }
}

#[tokio::test]
async fn a_file_that_vanished() {
    expect_miss(|file| fs::remove_file(file).unwrap()).await;
}

#[tokio::test]
async fn an_intact_object_of_another_key() {
    expect_miss(|file| fs::write(file, object(9).encode()).unwrap()).await;
}

#[tokio::test]
async fn an_intact_object_of_another_layout() {
    // The same key and the same size: heads and tokens swapped.
    let other = KvLayout::new(4, 16, Planes::symmetric(32), 2, DType::Bf16).unwrap();
    assert_eq!(other.chunk_bytes(), layout().chunk_bytes());
    expect_miss(|file| fs::write(file, object_of(1, &other).encode()).unwrap()).await;
}

#[tokio::test]
async fn two_layers_swapped() {
    expect_miss(|file| {
        let object = object(1);
        let mut layers = object.layers().to_vec();
        layers.swap(0, 3);
        let mut bytes = object.header().encode();
        bytes.extend(layers.concat());
        fs::write(file, bytes).unwrap();
    })
    .await;
}

/// Damage after the chunk was opened: the layer that is bad fails, and only then
/// is the chunk gone.
#[tokio::test]
async fn damage_behind_an_open_lease() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let lease = store.lease(key(1)).await.unwrap();
    flip(&file_of(directory.path(), 1), last_byte());

    let good = LayerRange::new(0, 3).unwrap();
    assert_eq!(
        lease.read_layers(good).await.unwrap(),
        object(1).layers()[..3]
    );
    assert_eq!(store.lookup(&[key(1)]).prefix, 1);
    let error = lease.read_layers(all()).await.unwrap_err();
    assert!(matches!(error, ReadError::Corrupt { .. }), "{error}");
    assert_eq!(store.lookup(&[key(1)]).prefix, 0);
    // A second reader of the same bad copy does not count twice.
    assert!(lease.read_layers(all()).await.is_err());
    assert_eq!(store.stats().disk.unwrap().corrupt, 1);
}

/// The old reader of a bad copy must not take down a good one that replaced it.
#[tokio::test]
async fn a_stale_lease_does_not_drop_a_newer_copy() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let stale = store.lease(key(1)).await.unwrap();
    flip(&file_of(directory.path(), 1), header_bytes());
    assert!(store.delete(key(1)).await.unwrap());
    let replacement: Object = object(1);
    let _ = store.put(replacement.clone()).await.unwrap();
    assert!(stale.read_layers(all()).await.is_err());
    assert_eq!(get(&store, 1).await.unwrap(), replacement.layers());
    assert_eq!(store.stats().disk.unwrap().corrupt, 0);
}

/// A bad sector: the copy is dropped, so that the next put repairs it.
#[tokio::test]
async fn a_file_that_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    replace_by_directory(&file_of(directory.path(), 1));
    assert_eq!(get(&store, 1).await, None);
    assert_eq!(store.lookup(&[key(1)]).prefix, 0);
    assert_eq!(store.stats().disk.unwrap().corrupt, 1);
    assert_eq!(store.put(object(1)).await.unwrap(), PutOutcome::Stored);
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(get(&store, 1).await.unwrap(), object(1).layers());
}

/// A file that cannot be deleted keeps its space, and the call says so.
#[tokio::test]
async fn space_is_free_only_when_its_file_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let _ = store.put(object(1)).await.unwrap();
    let before = store.stats().disk.unwrap();
    replace_by_directory(&file_of(directory.path(), 1));

    assert!(store.delete(key(1)).await.is_err());
    assert_eq!(store.lookup(&[key(1)]).prefix, 0);
    let after = store.stats().disk.unwrap();
    assert_eq!((after.bytes, after.chunks), (before.bytes, 0));
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(store.stats().disk.unwrap().bytes, 0);
}

/// Opens, and fails to be read and to be unlinked.
fn replace_by_directory(file: &Path) {
    fs::remove_file(file).unwrap();
    fs::create_dir(file).unwrap();
}
