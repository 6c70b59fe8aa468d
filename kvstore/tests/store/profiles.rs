//! Codec profiles: kept, found again, and never served damaged.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use kvasir_codec::{Profile, ProfileBasis, ProfileError, ProfilePlane, ProfileShape};
use kvasir_store::{Put, PutOutcome, PutProfileError, Store};
use kvasir_types::{ByteSize, DType, KvLayout, MAX_PROFILE_BYTES, Planes, ProfileDigest};

use crate::{close, memory_only, object, on_disk};

const STORED: Put = Put {
    outcome: PutOutcome::Stored,
    durable: true,
};
const CHANNELS: usize = 32;

/// Profiles of one shape that differ in their units.
fn profile(number: u8) -> (ProfileDigest, Bytes) {
    let dim = u16::try_from(CHANNELS).unwrap();
    let layout = KvLayout::new(3, 1, Planes::symmetric(dim), 16, DType::F16).unwrap();
    let matrix = vec![1.0; CHANNELS * CHANNELS];
    let ones = vec![1.0; CHANNELS];
    let plane = ProfilePlane {
        unit: f32::from(number) + 1.0,
        bases: vec![ProfileBasis::new(ones.clone(), ones, &matrix, &matrix)],
    };
    let profile = Profile::new(ProfileShape::of(&layout, None), vec![plane; 6]).unwrap();
    let digest = ProfileDigest::from_bytes(*profile.digest());
    (digest, Bytes::copy_from_slice(profile.as_bytes()))
}

async fn put(store: &Store, digest: ProfileDigest, data: &[u8]) -> Result<Put, PutProfileError> {
    let mut incoming = store.receive_profile(digest, data.len() as u64).await?;
    for piece in data.chunks(1000) {
        incoming.push(piece)?;
    }
    store.profiles().put(incoming).await
}

fn file(directory: &Path, digest: ProfileDigest) -> PathBuf {
    directory.join("profiles").join(digest.to_string())
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn profiles_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (profile(1), profile(2));
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(store.profile(first.0).await.unwrap(), None);
    assert_eq!(put(&store, first.0, &first.1).await.unwrap(), STORED);
    assert_eq!(put(&store, second.0, &second.1).await.unwrap(), STORED);
    let again = put(&store, first.0, &first.1).await.unwrap();
    assert_eq!(again.outcome, PutOutcome::AlreadyPresent);
    assert_eq!(store.profile(first.0).await.unwrap().unwrap(), first.1);
    let listed = store.profiles().list();
    assert!(listed.is_sorted_by_key(|profile| profile.digest));
    close(store).await;

    // What a crash leaves of a put, and what is nobody's.
    let partial = file(directory.path(), first.0).with_extension("partial");
    fs::write(&partial, b"KVPROFIL").unwrap();
    let strange = directory.path().join("profiles/README");
    fs::write(&strange, b"hands off").unwrap();

    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(store.profiles().list(), listed);
    let [info, _] = listed[..] else {
        panic!("{listed:?}");
    };
    assert_eq!((info.shape.layers, info.shape.dims), (3, [32, 32]));
    let usage = store.stats().profiles;
    let bytes = (first.1.len() + second.1.len()) as u64;
    assert_eq!((usage.profiles, usage.bytes), (2, bytes));
    for (digest, data) in [&first, &second] {
        assert_eq!(store.profile(*digest).await.unwrap().as_ref(), Some(data));
    }
    assert!(!partial.exists() && strange.exists());

    assert!(store.profiles().delete(first.0).await.unwrap());
    assert!(!store.profiles().delete(first.0).await.unwrap());
    assert_eq!(store.profile(first.0).await.unwrap(), None);
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(store.profiles().find(&first.0), None);
    assert_eq!(store.stats().profiles.bytes, second.1.len() as u64);
}

#[tokio::test]
async fn without_a_disk_tier_profiles_are_in_memory_and_paid_for() {
    let store = Store::open(memory_only(ByteSize::mib(1))).await.unwrap();
    let (digest, data) = profile(1);
    let put = put(&store, digest, &data).await.unwrap();
    assert_eq!((put.outcome, put.durable), (PutOutcome::Stored, false));
    assert_eq!(store.profile(digest).await.unwrap().unwrap(), data);
    let blocks = (data.len() as u64).div_ceil(4096) * 4096;
    let memory = store.stats().memory;
    assert_eq!(memory.bytes - memory.idle_bytes, blocks);
    // Chunks make room for each other, and not for themselves at its cost.
    for number in 0..100 {
        let _ = store.put(object(number)).await.unwrap();
    }
    assert!(store.stats().memory.evictions > 0);
    assert_eq!(store.profile(digest).await.unwrap().unwrap(), data);
    assert!(store.profiles().delete(digest).await.unwrap());
    assert_eq!(store.profile(digest).await.unwrap(), None);
}

#[tokio::test]
async fn what_is_damaged_is_set_aside_and_may_be_put_again() {
    let directory = tempfile::tempdir().unwrap();
    let (digest, data) = profile(1);
    let path = file(directory.path(), digest);
    let aside = path.with_extension("damaged");
    let truncate = |path: &Path| fs::write(path, &data[..data.len() - 1]).unwrap();
    let lengthen = |path: &Path| fs::write(path, [&data[..], &[0]].concat()).unwrap();
    for damage in [&flip as &dyn Fn(&Path), &truncate, &lengthen] {
        let store = Store::open(on_disk(directory.path())).await.unwrap();
        assert_eq!(put(&store, digest, &data).await.unwrap(), STORED);
        // Behind the store's back, while it runs.
        damage(&path);
        assert_eq!(store.profile(digest).await.unwrap(), None);
        assert_eq!(store.stats().profiles.bytes, 0);
        assert!(!path.exists() && aside.exists());
        assert_eq!(put(&store, digest, &data).await.unwrap(), STORED);
        assert_eq!(store.profile(digest).await.unwrap().unwrap(), data);
        fs::remove_file(&aside).unwrap();
        close(store).await;

        // While it does not.
        damage(&path);
        let store = Store::open(on_disk(directory.path())).await.unwrap();
        assert_eq!(store.profiles().list(), []);
        assert!(!path.exists() && aside.exists());
        close(store).await;
        fs::remove_file(&aside).unwrap();
    }
    // Deleted by hand.
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(put(&store, digest, &data).await.unwrap(), STORED);
    fs::remove_file(&path).unwrap();
    assert_eq!(store.profile(digest).await.unwrap(), None);
    assert_eq!(put(&store, digest, &data).await.unwrap(), STORED);
}

/// Its name is right, and its bytes are those that were put: but no profile.
#[tokio::test]
async fn what_is_no_profile_is_not_served_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    close(Store::open(on_disk(directory.path())).await.unwrap()).await;
    let digest = ProfileDigest::of(b"garbage");
    fs::write(file(directory.path(), digest), b"garbage").unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    assert_eq!(store.profiles().list(), []);
    assert_eq!(store.profile(digest).await.unwrap(), None);
}

#[tokio::test]
async fn nothing_is_evicted_for_a_profile_that_finds_no_room() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (profile(1), profile(2));
    let bytes = first.1.len() as u64;
    let mut config = on_disk(directory.path());
    config.profiles.capacity = Some(ByteSize::bytes(2 * bytes - 1));
    let store = Store::open(config.clone()).await.unwrap();
    assert_eq!(put(&store, first.0, &first.1).await.unwrap(), STORED);
    let full = store.receive_profile(second.0, bytes).await.unwrap_err();
    assert!(matches!(full, PutProfileError::Full { used, .. } if used == bytes));
    assert!(full.to_string().contains("kvasir profiles rm"), "{full}");
    assert!(full.to_string().contains("[profiles]"), "{full}");
    assert_eq!(store.profile(first.0).await.unwrap().unwrap(), first.1);
    assert!(store.profiles().delete(first.0).await.unwrap());

    // There is room for either, until the first of them is whole.
    let mut incoming = store.receive_profile(first.0, bytes).await.unwrap();
    incoming.push(&first.1).unwrap();
    assert_eq!(put(&store, second.0, &second.1).await.unwrap(), STORED);
    let late = store.profiles().put(incoming).await.unwrap_err();
    assert!(matches!(late, PutProfileError::Full { .. }), "{late}");
    assert!(!file(directory.path(), first.0).exists());
    close(store).await;

    // A lower capacity drops nothing.
    config.profiles.capacity = Some(ByteSize::bytes(1));
    let store = Store::open(config).await.unwrap();
    assert_eq!(store.profile(second.0).await.unwrap().unwrap(), second.1);
    let full = put(&store, first.0, &first.1).await.unwrap_err();
    assert!(matches!(full, PutProfileError::Full { .. }), "{full}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_put_the_same_profile_one_stores_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let (digest, data) = profile(1);
    let mut all = Vec::new();
    for _ in 0..8 {
        let mut incoming = store
            .receive_profile(digest, data.len() as u64)
            .await
            .unwrap();
        incoming.push(&data).unwrap();
        all.push(incoming);
    }
    let puts = all.into_iter().map(|incoming| {
        let profiles = store.profiles().clone();
        tokio::spawn(async move { profiles.put(incoming).await.unwrap().outcome })
    });
    let puts: Vec<_> = puts.collect();
    let mut stored = 0;
    for put in puts {
        stored += u32::from(put.await.unwrap() == PutOutcome::Stored);
    }
    assert_eq!(stored, 1);
    let usage = store.stats().profiles;
    assert_eq!((usage.profiles, usage.bytes), (1, data.len() as u64));
    assert_eq!(store.profile(digest).await.unwrap().unwrap(), data);
}

#[tokio::test]
async fn what_is_not_what_it_says_is_refused_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let (digest, data) = profile(1);
    let (other, _) = profile(2);
    let error = put(&store, other, &data).await.unwrap_err();
    assert!(matches!(error, PutProfileError::Digest { actual } if actual == digest));
    let garbage = vec![7; 5000];
    let named = ProfileDigest::of(&garbage);
    let error = put(&store, named, &garbage).await.unwrap_err();
    assert!(matches!(
        error,
        PutProfileError::Profile(ProfileError::Magic)
    ));
    for bytes in [0, MAX_PROFILE_BYTES + 1, u64::MAX] {
        let error = store.receive_profile(digest, bytes).await.unwrap_err();
        assert!(matches!(error, PutProfileError::Size(_)), "{error}");
    }
    let announced = data.len() as u64;
    let short = store.receive_profile(digest, announced + 1).await.unwrap();
    let mut short = short;
    short.push(&data).unwrap();
    let error = store.profiles().put(short).await.unwrap_err();
    assert!(matches!(error, PutProfileError::Length { actual, .. } if actual == announced));
    let mut long = store.receive_profile(digest, announced - 1).await.unwrap();
    let error = long.push(&data).unwrap_err();
    assert!(matches!(error, PutProfileError::Length { actual, .. } if actual == announced));
    drop(long);
    assert_eq!(store.profiles().list(), []);
    assert_eq!(
        fs::read_dir(directory.path().join("profiles"))
            .unwrap()
            .count(),
        0
    );
    let memory = store.stats().memory;
    assert_eq!(memory.bytes, memory.idle_bytes);
}
