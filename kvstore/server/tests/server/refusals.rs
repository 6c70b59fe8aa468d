//! What is malformed is refused by name; what exceeds a bound may come back.

use bytes::Bytes;
use futures::stream;
use kvasir_client::{CallError, Chunk, Client, ClientConfig, GetOptions, ListOptions, RetryConfig};
use kvasir_proto::{assembly, convert, status, v1};
use kvasir_types::{ByteSize, Checksum, DType, ExtentIdx, KvLayout, LayerRange, Level, Planes};
use tonic::{Code, Status};
use v1::put_request::Message;

use crate::support::*;

fn wire_keys(numbers: &[u8]) -> Vec<Bytes> {
    numbers
        .iter()
        .map(|number| convert::key_to_wire(&key(*number)))
        .collect()
}

#[track_caller]
fn assert_names<T>(answer: Result<T, Status>, field: &str) {
    let Err(refusal) = answer else {
        panic!("{field} was accepted");
    };
    assert_eq!(refusal.code(), Code::InvalidArgument, "{refusal}");
    assert_eq!(status::first_violation(&refusal).unwrap().field, field);
}

fn header() -> v1::PutHeader {
    v1::PutHeader {
        key: convert::key_to_wire(&key(1)),
        layout: Some(v1::Layout::from(&layout())),
        level: 0,
        ..v1::PutHeader::default()
    }
}

fn pieces(index: u16) -> Vec<v1::ExtentPiece> {
    let data = layer(1, index);
    let checksum = Checksum::of(&data);
    assembly::pieces(ExtentIdx(index.into()), data, checksum).collect()
}

/// Every message of a valid put.
fn messages() -> Vec<Message> {
    let layers = (0..LAYERS).flat_map(pieces).map(Message::Piece);
    std::iter::once(Message::Header(header()))
        .chain(layers)
        .collect()
}

#[tokio::test]
async fn malformed_keys_are_named() {
    let (server, _client) = start(memory(ByteSize::mib(64))).await;
    let mut raw = raw(&server).await;
    let short = vec![wire_keys(&[1])[0].clone(), Bytes::from_static(b"short")];
    let many = vec![wire_keys(&[1])[0].clone(); kvasir_proto::MAX_KEYS + 1];
    for (keys, field) in [(vec![], "keys"), (short, "keys[1]"), (many, "keys")] {
        let lookup = v1::LookupRequest { keys: keys.clone() };
        assert_names(raw.lookup(lookup).await, field);
        let get = v1::GetRequest {
            keys: keys.clone(),
            layers: None,
            ..v1::GetRequest::default()
        };
        assert_names(raw.get(get).await, field);
        let pin = v1::PinRequest {
            keys: keys.clone(),
            ttl_ms: 1,
        };
        assert_names(raw.pin(pin).await, field);
        assert_names(raw.delete(v1::DeleteRequest { keys }).await, field);
    }
    let list = v1::ListRequest {
        after: Bytes::from_static(b"short"),
        limit: 0,
    };
    assert_names(raw.list(list).await, "after");
    server.shutdown().await;
}

#[tokio::test]
async fn malformed_pins_and_ranges_are_named() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    let mut raw = raw(&server).await;
    for ttl_ms in [0, kvasir_proto::MAX_PIN_TTL_MS + 1] {
        let keys = wire_keys(&[1]);
        assert_names(raw.pin(v1::PinRequest { keys, ttl_ms }).await, "ttl_ms");
    }
    for (start, end) in [(2, 2), (3, 1), (0, 70_000), (0, u32::from(LAYERS) + 1)] {
        let get = v1::GetRequest {
            keys: wire_keys(&[1]),
            layers: Some(v1::LayerRange { start, end }),
            ..v1::GetRequest::default()
        };
        assert_names(raw.get(get).await, "layers");
    }
    for (levels, have, field) in [(vec![99], None, "levels"), (vec![], Some(300), "have")] {
        let get = v1::GetRequest {
            keys: wire_keys(&[1]),
            levels,
            have,
            ..v1::GetRequest::default()
        };
        assert_names(raw.get(get).await, field);
    }
    let options = GetOptions {
        layers: Some(LayerRange::new(0, 99).unwrap()),
        ..GetOptions::default()
    };
    let error = client.get(&[key(1)], options).await.unwrap_err();
    assert!(matches!(error, CallError::Invalid { field, .. } if field == "layers"));
    server.shutdown().await;
}

#[tokio::test]
async fn malformed_puts_are_named_and_leave_nothing() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    let mut raw = raw(&server).await;
    let edit_header = |edit: fn(&mut v1::PutHeader)| {
        let mut header = header();
        edit(&mut header);
        vec![Message::Header(header)]
    };
    let edit_piece = |edit: fn(&mut v1::ExtentPiece)| {
        let mut all = messages();
        if let Message::Piece(piece) = &mut all[1] {
            edit(piece);
        }
        all
    };
    let mut trailing = messages();
    trailing.extend(pieces(3).into_iter().map(Message::Piece));
    let cases: Vec<(&str, Vec<Message>)> = vec![
        ("header", vec![]),
        ("header", messages().split_off(1)),
        (
            "header",
            vec![Message::Header(header()), Message::Header(header())],
        ),
        (
            "header.key",
            edit_header(|header| header.key = Bytes::new()),
        ),
        ("header.layout", edit_header(|header| header.layout = None)),
        (
            "header.layout.kv_heads",
            edit_header(|header| header.layout.as_mut().unwrap().kv_heads = 1 << 20),
        ),
        (
            "header.layout.dtype",
            edit_header(|header| header.layout.as_mut().unwrap().dtype = 0),
        ),
        (
            "header.layout.layout",
            edit_header(|header| header.layout.as_mut().unwrap().tokens = 0),
        ),
        ("header.level", edit_header(|header| header.level = 77)),
        (
            "header.extent_bytes",
            edit_header(|header| header.extent_bytes = vec![1]),
        ),
        (
            "header.extent_bytes",
            edit_header(|header| header.level = Level::L1.code().into()),
        ),
        (
            "header.extent_bytes[2]",
            edit_header(|header| {
                header.level = Level::LOSSLESS.code().into();
                header.extent_bytes = vec![8; 1 + usize::from(LAYERS)];
                header.extent_bytes[2] = u64::MAX;
            }),
        ),
        ("piece.extent", edit_piece(|piece| piece.extent = 1)),
        ("piece.offset", edit_piece(|piece| piece.offset = 1)),
        (
            "piece.extent_bytes",
            edit_piece(|piece| piece.extent_bytes = 1),
        ),
        ("piece.data", edit_piece(|piece| piece.data = Bytes::new())),
        ("piece.checksum", edit_piece(|piece| piece.checksum ^= 1)),
        ("piece", messages()[..3].to_vec()),
        ("piece", trailing),
    ];
    for (field, messages) in cases {
        let requests = messages.into_iter().map(|message| v1::PutRequest {
            message: Some(message),
        });
        assert_names(raw.put(stream::iter(requests)).await, field);
    }
    let empty = stream::iter([v1::PutRequest { message: None }]);
    assert_names(raw.put(empty).await, "message");
    assert_eq!(client.lookup(&[key(1)]).await.unwrap().prefix_chunks, 0);
    let memory = server.store().stats().memory;
    assert_eq!((memory.chunks, memory.bytes), (0, memory.idle_bytes));
    server.shutdown().await;
}

#[tokio::test]
async fn a_chunk_that_can_never_fit_is_malformed() {
    let (server, client) = start(memory(ByteSize::kib(100))).await;
    let error = client.put(&chunk(1)).await.unwrap_err();
    assert!(matches!(error, CallError::Invalid { field, .. } if field == "header.layout"));
    server.shutdown().await;
}

/// The daemon answers after the header, while most of the chunk is still on its way.
#[tokio::test]
async fn a_refusal_reaches_a_sender_with_much_left_to_send() {
    let (server, client) = start(memory(ByteSize::mib(8))).await;
    let layout = KvLayout::new(8, 8, Planes::symmetric(128), 2048, DType::F16).unwrap();
    let large = Chunk {
        key: key(1),
        layout,
        level: Level::RAW,
        extents: vec![Bytes::from(vec![1; layout.layer_bytes()]); 8],
    };
    for _ in 0..20 {
        let error = client.put(&large).await.unwrap_err();
        assert!(
            matches!(&error, CallError::Invalid { field, .. } if field == "header.layout"),
            "{error:?}"
        );
    }
    // The connection is as good as before.
    client.put(&chunk(1)).await.unwrap();
    server.shutdown().await;
}

/// A client that reports every refusal.
fn impatient(server: &kvasir_server::Running) -> Client {
    Client::connect_lazy(ClientConfig {
        endpoint: server.endpoint().parse().unwrap(),
        retry: RetryConfig::NEVER,
        ..ClientConfig::default()
    })
}

#[tokio::test]
async fn over_the_memory_bound_is_come_back_and_loses_nothing() {
    // Room for two chunks.
    let (server, client) = start(memory(ByteSize::kib(600))).await;
    client.put(&chunk(1)).await.unwrap();
    client.put(&chunk(2)).await.unwrap();
    // Held by a reader, nothing can be evicted.
    let first = server.store().lease(key(1)).await.unwrap();
    let second = server.store().lease(key(2)).await.unwrap();
    let error = impatient(&server).put(&chunk(3)).await.unwrap_err();
    let CallError::Throttled { retry_after, .. } = error else {
        panic!("{error}");
    };
    assert!(!retry_after.is_zero());
    assert_eq!(read_all(&client, &[1, 2]).await, 2);

    // The patient client comes back, and succeeds once the readers let go.
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.put(&chunk(3)).await }
    });
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    drop((first, second));
    waiting.await.unwrap().unwrap();
    assert_eq!(read_all(&client, &[3]).await, 1);
    server.shutdown().await;
}

#[tokio::test]
async fn over_the_stream_bound_is_come_back() {
    let mut config = memory(ByteSize::mib(64));
    config.limits.data_streams = 1;
    let (server, client) = start(config).await;
    client.put(&chunk(1)).await.unwrap();
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    sender
        .unbounded_send(v1::PutRequest {
            message: Some(Message::Header(header())),
        })
        .unwrap();
    let mut raw = raw(&server).await;
    let slow = tokio::spawn(async move { raw.put(receiver).await });
    soon("the slow put holds memory", || {
        server.store().stats().memory.bytes > layout().chunk_bytes() * 3 / 2
    })
    .await;

    let impatient = impatient(&server);
    let put = impatient.put(&chunk(2)).await.unwrap_err();
    assert!(matches!(put, CallError::Throttled { .. }), "{put}");
    let get = impatient
        .get(&[key(1)], GetOptions::default())
        .await
        .unwrap_err();
    assert!(matches!(get, CallError::Throttled { .. }), "{get}");
    // Calls that move no payload are not bounded by it.
    assert_eq!(impatient.lookup(&[key(1)]).await.unwrap().prefix_chunks, 1);

    drop(sender);
    assert_names(slow.await.unwrap(), "piece");
    impatient.put(&chunk(2)).await.unwrap();
    server.shutdown().await;
}

#[tokio::test]
async fn over_the_bound_of_watchers_is_come_back() {
    let mut config = memory(ByteSize::mib(64));
    config.limits.watchers = 1;
    let (server, client) = start(config).await;
    let mut raw = raw(&server).await;
    let watch = raw.watch(v1::WatchRequest {}).await.unwrap();
    let refusal = raw.watch(v1::WatchRequest {}).await.unwrap_err();
    assert!(status::retry_delay(&refusal).is_some(), "{refusal}");
    let list = impatient(&server).list(ListOptions::default()).await;
    assert!(matches!(list, Err(CallError::Throttled { .. })));
    drop(watch);
    // Its end is soon noticed, without any event.
    client.list(ListOptions::default()).await.unwrap();
    server.shutdown().await;
}

#[tokio::test]
async fn more_pins_than_allowed_is_come_back() {
    let (server, client) = start(memory(ByteSize::kib(900))).await;
    for number in [1, 2] {
        client.put(&chunk(number)).await.unwrap();
    }
    let ttl = std::time::Duration::from_secs(9);
    let impatient = impatient(&server);
    let never = impatient.pin(&[key(1), key(2)], ttl).await.unwrap_err();
    assert!(matches!(never, CallError::Invalid { field, .. } if field == "keys"));
    let pin = impatient.pin(&[key(1)], ttl).await.unwrap();
    let later = impatient.pin(&[key(2)], ttl).await.unwrap_err();
    assert!(matches!(later, CallError::Throttled { .. }), "{later}");
    assert_eq!(client.stats().await.unwrap().pins, 1);
    client.unpin(pin.id).await.unwrap();
    impatient.pin(&[key(2)], ttl).await.unwrap();
    server.shutdown().await;
}
