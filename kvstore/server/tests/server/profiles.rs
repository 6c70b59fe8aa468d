//! Codec profiles: kept by the daemon, fetched by digest.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream;
use kvasir_client::{CallError, PutOutcome};
use kvasir_codec::{Profile, ProfileBasis, ProfilePlane, ProfileShape};
use kvasir_proto::{MAX_PIECE_BYTES, status, v1};
use kvasir_types::{ByteSize, DType, KvLayout, MAX_PROFILE_BYTES, Planes, ProfileDigest};
use tonic::{Code, Status};
use v1::put_profile_request::Message;

use crate::support::*;

/// Of a model of so many layers; 260 KiB each.
pub(crate) fn profile(layers: u16, unit: f32) -> Arc<Profile> {
    let layout = KvLayout::new(layers, 2, Planes::symmetric(128), 16, DType::F16).unwrap();
    let shape = ProfileShape::of(&layout, None);
    let heads = shape.heads_per_basis()[0];
    let channels = usize::from(heads * 128);
    let ones = vec![1.0; channels];
    let matrix = vec![0.5; channels * channels];
    let basis = ProfileBasis::new(ones.clone(), ones, &matrix, &matrix);
    let plane = ProfilePlane {
        unit,
        bases: vec![basis; usize::from(2 / heads)],
    };
    Arc::new(Profile::new(shape, vec![plane; 2 * usize::from(layers)]).unwrap())
}

pub(crate) fn digest(profile: &Profile) -> ProfileDigest {
    ProfileDigest::from_bytes(*profile.digest())
}

#[tokio::test]
async fn profiles_survive_the_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let (server, client) = start(on_disk(directory.path())).await;
    // Several pieces.
    let (large, small) = (profile(40, 1.0), profile(1, 1.0));
    assert!(large.as_bytes().len() > 2 * MAX_PIECE_BYTES);
    assert_eq!(client.get_profile(digest(&large)).await.unwrap(), None);
    for profile in [&large, &small] {
        let put = client.put_profile(profile).await.unwrap();
        assert_eq!((put.outcome, put.durable), (PutOutcome::Stored, true));
    }
    server.shutdown().await;

    let (server, client) = start(on_disk(directory.path())).await;
    for profile in [&large, &small] {
        let got = client.get_profile(digest(profile)).await.unwrap().unwrap();
        assert_eq!(got.as_bytes(), profile.as_bytes());
    }
    let listed = client.profiles().await.unwrap();
    assert_eq!(listed.len(), 2);
    let of_large = listed
        .iter()
        .find(|it| it.digest == digest(&large))
        .unwrap();
    assert_eq!(of_large.bytes, large.as_bytes().len() as u64);
    assert_eq!(
        (of_large.layers, of_large.kv_heads, of_large.dims),
        (40, 2, [128, 128])
    );
    let stats = client.stats().await.unwrap();
    let bytes = (large.as_bytes().len() + small.as_bytes().len()) as u64;
    assert_eq!((stats.profiles, stats.profile_bytes), (2, bytes));
    assert_eq!(stats.profile_capacity_bytes, 1 << 30);

    assert!(client.delete_profile(digest(&small)).await.unwrap());
    assert!(!client.delete_profile(digest(&small)).await.unwrap());
    assert_eq!(client.get_profile(digest(&small)).await.unwrap(), None);
    server.shutdown().await;
}

/// The daemon answers after the header, while most of it is still on its way.
#[tokio::test]
async fn a_profile_that_is_there_is_not_sent_again() {
    let (server, client) = start(memory(ByteSize::mib(256))).await;
    let profile = profile(100, 1.0);
    let put = client.put_profile(&profile).await.unwrap();
    assert_eq!((put.outcome, put.durable), (PutOutcome::Stored, false));
    for _ in 0..20 {
        let put = client.put_profile(&profile).await.unwrap();
        assert_eq!(put.outcome, PutOutcome::AlreadyPresent);
    }
    // With nothing but a header.
    let mut raw = raw(&server).await;
    let header = message(Message::Header(header(&profile)));
    let answer = raw.put_profile(stream::iter([header])).await.unwrap();
    assert_eq!(answer.get_ref().digest, profile.digest().as_slice());
    server.shutdown().await;
}

#[tokio::test]
async fn a_full_daemon_says_what_to_do() {
    let (first, second) = (profile(1, 1.0), profile(1, 2.0));
    let mut config = memory(ByteSize::mib(64));
    let bytes = first.as_bytes().len() as u64;
    config.store.profiles.capacity = Some(ByteSize::bytes(bytes));
    let (server, client) = start(config).await;
    client.put_profile(&first).await.unwrap();
    let error = client.put_profile(&second).await.unwrap_err();
    assert!(!error.is_transient(), "nothing changes by waiting: {error}");
    let CallError::Refused(refusal) = error else {
        panic!("{error}");
    };
    assert_eq!(refusal.code(), Code::ResourceExhausted);
    assert!(
        refusal.message().contains("kvasir profiles rm"),
        "{refusal}"
    );
    assert!(client.get_profile(digest(&first)).await.unwrap().is_some());
    client.delete_profile(digest(&first)).await.unwrap();
    client.put_profile(&second).await.unwrap();
    server.shutdown().await;
}

/// More than memory has for anything.
#[tokio::test]
async fn a_profile_that_does_not_fit_memory_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = on_disk(directory.path());
    config.store.memory.capacity = ByteSize::kib(100);
    let (server, client) = start(config).await;
    let error = client.put_profile(&profile(1, 1.0)).await.unwrap_err();
    let CallError::Refused(refusal) = error else {
        panic!("{error}");
    };
    assert!(refusal.message().contains("[memory]"), "{refusal}");
    server.shutdown().await;
}

fn header(profile: &Profile) -> v1::ProfileHeader {
    v1::ProfileHeader {
        digest: Bytes::copy_from_slice(profile.digest()),
        bytes: profile.as_bytes().len() as u64,
    }
}

fn message(message: Message) -> v1::PutProfileRequest {
    let message = Some(message);
    v1::PutProfileRequest { message }
}

#[track_caller]
fn assert_names<T>(answer: Result<T, Status>, field: &str) {
    let Err(refusal) = answer else {
        panic!("{field} was accepted");
    };
    assert_eq!(refusal.code(), Code::InvalidArgument, "{refusal}");
    assert_eq!(status::first_violation(&refusal).unwrap().field, field);
}

#[tokio::test]
async fn malformed_profiles_are_named_and_leave_nothing() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    let mut raw = raw(&server).await;
    let profile = profile(1, 1.0);
    let whole = Bytes::copy_from_slice(profile.as_bytes());
    let data = |data: &Bytes| Message::Data(data.clone());
    let header_of = |data: &Bytes| v1::ProfileHeader {
        digest: Bytes::copy_from_slice(ProfileDigest::of(data).as_bytes()),
        bytes: data.len() as u64,
    };
    let edited = |edit: fn(&mut v1::ProfileHeader)| {
        let mut header = header(&profile);
        edit(&mut header);
        vec![Message::Header(header), data(&whole)]
    };
    let mut flipped = whole.to_vec();
    flipped[1000] ^= 1;
    let flipped = Bytes::from(flipped);
    let garbage = Bytes::from_static(b"garbage");
    let cases: Vec<(&str, Vec<Message>)> = vec![
        ("header", vec![]),
        ("header", vec![data(&whole)]),
        ("header", vec![Message::Header(header(&profile)); 2]),
        ("header.digest", edited(|it| it.digest = Bytes::new())),
        ("header.digest", edited(|it| it.digest = vec![7; 32].into())),
        (
            "header.digest",
            vec![Message::Header(header(&profile)), data(&flipped)],
        ),
        ("header.bytes", edited(|it| it.bytes = 0)),
        (
            "header.bytes",
            edited(|it| it.bytes = MAX_PROFILE_BYTES + 1),
        ),
        ("header.bytes", edited(|it| it.bytes = u64::MAX)),
        ("data", edited(|it| it.bytes += 1)),
        ("data", edited(|it| it.bytes -= 1)),
        (
            "data",
            vec![
                Message::Header(header(&profile)),
                data(&Bytes::new()),
                data(&whole),
            ],
        ),
        (
            "data",
            vec![Message::Header(header_of(&garbage)), data(&garbage)],
        ),
        // Rightly named, and damaged before that.
        (
            "data",
            vec![Message::Header(header_of(&flipped)), data(&flipped)],
        ),
    ];
    for (field, messages) in cases {
        let requests = messages.into_iter().map(message);
        assert_names(raw.put_profile(stream::iter(requests)).await, field);
    }
    let header = message(Message::Header(header(&profile)));
    let empty = stream::iter([header, v1::PutProfileRequest { message: None }]);
    assert_names(raw.put_profile(empty).await, "message");

    let digest = Bytes::from_static(b"short");
    let get = v1::GetProfileRequest {
        digest: digest.clone(),
    };
    assert_names(raw.get_profile(get).await, "digest");
    let delete = v1::DeleteProfileRequest { digest };
    assert_names(raw.delete_profile(delete).await, "digest");

    assert_eq!(client.profiles().await.unwrap(), []);
    let memory = server.store().stats().memory;
    assert_eq!(memory.bytes, memory.idle_bytes);
    server.shutdown().await;
}

#[tokio::test]
async fn transfers_of_profiles_count_as_such() {
    let mut config = memory(ByteSize::mib(64));
    config.limits.data_streams = 1;
    let (server, client) = start(config).await;
    let profile = profile(1, 1.0);
    client.put_profile(&profile).await.unwrap();
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    let other = self::profile(1, 2.0);
    let header = message(Message::Header(header(&other)));
    sender.unbounded_send(header).unwrap();
    let mut raw = raw(&server).await;
    let slow = tokio::spawn(async move { raw.put_profile(receiver).await });
    soon("the slow put holds memory", || {
        server.store().stats().memory.bytes > profile.as_bytes().len() as u64 * 3 / 2
    })
    .await;
    let mut raw = self::raw(&server).await;
    let digest = Bytes::copy_from_slice(profile.digest());
    let get = raw.get_profile(v1::GetProfileRequest { digest }).await;
    assert_eq!(get.unwrap_err().code(), Code::ResourceExhausted);
    // Calls that move no payload are not bounded by it.
    assert_eq!(client.profiles().await.unwrap().len(), 1);
    let data = Bytes::copy_from_slice(other.as_bytes());
    sender.unbounded_send(message(Message::Data(data))).unwrap();
    drop(sender);
    slow.await.unwrap().unwrap();
    assert_eq!(client.profiles().await.unwrap().len(), 2);
    server.shutdown().await;
}
