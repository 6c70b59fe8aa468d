//! Leases with names, and what a put promises.

use std::time::Duration;

use kvasir_client::{CallError, GetEvent, GetOptions, LeaseId, Put, PutOptions, PutOutcome};
use kvasir_proto::v1;
use kvasir_types::{ByteSize, Class, Durability, Hints};
use tonic::Code;
use v1::put_request::Message;

use crate::support::{chunk, events, key, layer, memory, on_disk, raw, soon, start};

fn by(lease: LeaseId) -> GetOptions {
    GetOptions {
        lease: Some(lease),
        ..GetOptions::default()
    }
}

#[tokio::test]
async fn what_is_held_is_read_by_name_after_it_was_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let (server, client) = start(on_disk(directory.path())).await;
    for number in 0..3 {
        client.put(&chunk(number)).await.unwrap();
    }
    let keys = [0, 1, 2, 9].map(key);
    let mut hold = client.hold().await.unwrap();
    let held = hold.acquire(&keys).await.unwrap();
    assert_eq!(held.chunks.len(), 3);
    assert_eq!(client.delete(&keys).await.unwrap(), 3);
    let stream = client.get(&keys, GetOptions::default()).await.unwrap();
    assert!(stream.chunks().is_empty());

    // In several gets, as a reader of pages would.
    for part in [&keys[..2], &keys[2..]] {
        let stream = client.get(part, by(held.id)).await.unwrap();
        for (index, at, data) in events(stream).await.layers {
            let number = part[index].as_bytes()[0];
            assert_eq!(data, layer(number, at));
        }
    }
    let none = client.get(&[key(7)], by(held.id)).await.unwrap();
    assert!(none.chunks().is_empty(), "only what is held");

    hold.renew().await.unwrap();
    assert!(hold.release(held.id).await.unwrap());
    assert!(!hold.release(held.id).await.unwrap());
    let ended = client.get(&keys, by(held.id)).await;
    assert!(matches!(ended, Err(CallError::LeaseEnded)), "{ended:?}");
    assert_eq!(server.store().stats().leases, 0);
    server.shutdown().await;
}

#[tokio::test]
async fn leases_end_with_their_session() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    let mut hold = client.hold().await.unwrap();
    let held = hold.acquire(&[key(1)]).await.unwrap();
    let mut other = client.hold().await.unwrap();
    assert!(!other.release(held.id).await.unwrap(), "another's");
    assert_eq!(server.store().stats().leases, 1);
    drop(hold);
    soon("the leases end", || server.store().stats().leases == 0).await;
    let ended = client.get(&[key(1)], by(held.id)).await;
    assert!(matches!(ended, Err(CallError::LeaseEnded)), "{ended:?}");
    server.shutdown().await;
}

#[tokio::test]
async fn traffic_renews_and_silence_ends() {
    let mut config = memory(ByteSize::mib(64));
    config.limits.stream_idle_ms = 300;
    let (server, client) = start(config).await;
    client.put(&chunk(1)).await.unwrap();
    let mut hold = client.hold().await.unwrap();
    let held = hold.acquire(&[key(1)]).await.unwrap();
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut stream = client.get(&[key(1)], by(held.id)).await.unwrap();
        let event = stream.next().await.unwrap();
        assert!(matches!(event, Some(GetEvent::Layer { .. })));
    }
    soon("the leases end", || server.store().stats().leases == 0).await;
    let error = hold.renew().await.unwrap_err();
    assert!(matches!(error, CallError::DeadlineExceeded), "{error:?}");
    server.shutdown().await;
}

#[tokio::test]
async fn a_put_says_what_it_promises() {
    let directory = tempfile::tempdir().unwrap();
    let (server, client) = start(on_disk(directory.path())).await;
    let options = PutOptions {
        durability: Durability::Memory,
        hints: Hints {
            parent: Some(key(7)),
            class: Class::new(2).unwrap(),
            ..Hints::default()
        },
    };
    let put = client.put_with(&chunk(1), options).await.unwrap();
    let expected = |durable| Put {
        outcome: PutOutcome::Stored,
        durable,
    };
    assert_eq!(put, expected(false));
    assert_eq!(server.store().stats().disk.unwrap().chunks, 0);
    assert_eq!(client.put(&chunk(1)).await.unwrap(), expected(true));
    server.shutdown().await;

    let (server, client) = start(memory(ByteSize::mib(64))).await;
    assert_eq!(client.put(&chunk(1)).await.unwrap(), expected(false));
    server.shutdown().await;
}

#[tokio::test]
async fn malformed_hints_are_named() {
    let (server, _client) = start(memory(ByteSize::mib(64))).await;
    let header = |change: fn(&mut v1::PutHeader)| {
        let mut header = v1::PutHeader {
            key: kvasir_proto::convert::key_to_wire(&key(1)),
            layout: Some(v1::Layout::from(&crate::support::layout())),
            ..v1::PutHeader::default()
        };
        change(&mut header);
        v1::PutRequest {
            message: Some(Message::Header(header)),
        }
    };
    let wrong: [(&str, v1::PutRequest); 3] = [
        ("header.durability", header(|header| header.durability = 9)),
        ("header.class", header(|header| header.class = 16)),
        (
            "header.parent",
            header(|header| header.parent = bytes::Bytes::from_static(&[1; 31])),
        ),
    ];
    for (field, request) in wrong {
        let mut client = raw(&server).await;
        let status = client
            .put(futures::stream::iter([request]))
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let violation = kvasir_proto::status::first_violation(&status).unwrap();
        assert_eq!(violation.field, field);
    }
    server.shutdown().await;
}
