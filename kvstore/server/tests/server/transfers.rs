//! Puts and gets under stress.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream;
use kvasir_client::{
    CallError, Chunk, Client, ClientConfig, DataPlane, GetOptions, LostReason, PutOutcome, Tier,
};
use kvasir_proto::{assembly, convert, v1};
use kvasir_types::{ByteSize, DType, ExtentIdx, KvLayout, LayerRange, Level, Planes};
use v1::put_request::Message;

use crate::support::*;

#[tokio::test]
async fn only_the_asked_layers_are_sent() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    client.put(&chunk(2)).await.unwrap();
    let options = GetOptions {
        layers: Some(LayerRange::new(1, 3).unwrap()),
        ..GetOptions::default()
    };
    let stream = client.get(&[key(1), key(2)], options).await.unwrap();
    let seen = events(stream).await.order;
    let expected = [(1, 0), (1, 1), (2, 0), (2, 1)].map(|(layer, chunk)| Seen::Layer(layer, chunk));
    assert_eq!(seen, expected);
    server.shutdown().await;
}

#[tokio::test]
async fn a_get_of_nothing_is_empty() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    let mut stream = client.get(&[], GetOptions::default()).await.unwrap();
    assert!(stream.chunks().is_empty());
    assert!(stream.next().await.unwrap().is_none());
    server.shutdown().await;
}

#[tokio::test]
async fn layers_longer_than_a_message_arrive_whole() {
    let (server, client) = start(memory(ByteSize::mib(128))).await;
    // 10 MiB a layer: three pieces.
    let layout = KvLayout::new(2, 8, Planes::symmetric(128), 2560, DType::F16).unwrap();
    let data: Bytes = (0..layout.layer_bytes())
        .map(|at| (at % 253) as u8)
        .collect();
    let chunk = Chunk {
        key: key(1),
        layout,
        level: Level::RAW,
        extents: vec![data.clone(), data.clone()],
    };
    client.put(&chunk).await.unwrap();
    let stream = client.get(&[key(1)], GetOptions::default()).await.unwrap();
    let seen = events(stream).await;
    assert_eq!(seen.layers.len(), 2);
    assert!(seen.layers.iter().all(|(_, _, layer)| *layer == data));
    server.shutdown().await;
}

#[tokio::test]
async fn a_get_stops_before_another_layout() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    let layout = KvLayout::new(1, 1, Planes::Single { dim: 8 }, 16, DType::F16).unwrap();
    let other = Chunk {
        key: key(2),
        layout,
        level: Level::RAW,
        extents: vec![Bytes::from(vec![1; layout.layer_bytes()])],
    };
    client.put(&other).await.unwrap();
    assert_eq!(read_all(&client, &[1, 2]).await, 1);
    server.shutdown().await;
}

#[tokio::test]
async fn a_put_cut_in_the_middle_leaves_nothing() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    let mut raw = raw(&server).await;
    let header = Message::Header(v1::PutHeader {
        key: convert::key_to_wire(&key(1)),
        layout: Some(v1::Layout::from(&layout())),
        level: 0,
        ..v1::PutHeader::default()
    });
    let data = layer(1, 0);
    let checksum = kvasir_types::Checksum::of(&data);
    let piece = assembly::pieces(ExtentIdx(0), data, checksum)
        .next()
        .map(Message::Piece);
    let begun = [Some(header), piece].map(|message| v1::PutRequest { message });
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    for request in begun {
        sender.unbounded_send(request).unwrap();
    }
    let put = tokio::spawn(async move { raw.put(receiver).await });
    soon("the put holds memory", || {
        server.store().stats().memory.bytes > layout().chunk_bytes()
    })
    .await;
    put.abort();
    soon("its memory is given back", || {
        let memory = server.store().stats().memory;
        memory.bytes == memory.idle_bytes
    })
    .await;
    drop(sender);
    assert_eq!(client.lookup(&[key(1)]).await.unwrap().prefix_chunks, 0);
    client.put(&chunk(1)).await.unwrap();
    assert_eq!(read_all(&client, &[1]).await, 1);
    server.shutdown().await;
}

#[tokio::test]
async fn a_silent_put_is_ended() {
    let mut config = memory(ByteSize::mib(64));
    config.limits.stream_idle_ms = 50;
    let (server, _client) = start(config).await;
    let mut raw = raw(&server).await;
    let refusal = raw.put(stream::pending()).await.unwrap_err();
    assert_eq!(refusal.code(), tonic::Code::DeadlineExceeded, "{refusal}");
    server.shutdown().await;
}

#[tokio::test]
async fn a_get_that_is_not_read_is_ended() {
    let mut config = memory(ByteSize::mib(512));
    config.limits.stream_idle_ms = 100;
    let (server, client) = start(config).await;
    // Far more than the windows and queues on the way hold.
    let numbers: Vec<u8> = (0..200).collect();
    for number in &numbers {
        client.put(&chunk(*number)).await.unwrap();
    }
    let keys: Vec<_> = numbers.iter().copied().map(key).collect();
    let client = Client::connect_lazy(ClientConfig {
        data_plane: DataPlane::Grpc,
        ..client.config().clone()
    });
    let mut stream = client.get(&keys, GetOptions::default()).await.unwrap();
    assert!(stream.next().await.unwrap().is_some());
    soon("the leases end", || server.store().stats().leases == 0).await;
    let ended = loop {
        match stream.next().await {
            Ok(Some(_)) => (),
            Ok(None) => panic!("all of it came"),
            Err(error) => break error,
        }
    };
    assert!(matches!(ended, CallError::DeadlineExceeded), "{ended}");
    server.shutdown().await;
}

#[tokio::test]
async fn dropping_a_get_ends_its_leases() {
    let (server, client) = start(memory(ByteSize::mib(512))).await;
    let numbers: Vec<u8> = (0..200).collect();
    for number in &numbers {
        client.put(&chunk(*number)).await.unwrap();
    }
    let keys: Vec<_> = numbers.iter().copied().map(key).collect();
    let mut stream = client.get(&keys, GetOptions::default()).await.unwrap();
    assert!(stream.next().await.unwrap().is_some());
    assert_eq!(server.store().stats().leases, 200);
    drop(stream);
    soon("the leases end", || server.store().stats().leases == 0).await;
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_concurrent_puts_of_one_key_one_stores() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    let puts: Vec<_> = (0..16)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.put(&chunk(1)).await.unwrap().outcome })
        })
        .collect();
    let mut stored = 0;
    for put in puts {
        stored += usize::from(put.await.unwrap() == PutOutcome::Stored);
    }
    assert_eq!(stored, 1);
    assert_eq!(read_all(&client, &[1]).await, 1);
    soon("only the chunk is charged", || {
        let memory = server.store().stats().memory;
        memory.chunks == 1 && memory.bytes - memory.idle_bytes < layout().chunk_bytes() * 2
    })
    .await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_deleted_chunk_is_read_to_its_end() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    let stream = client.get(&[key(1)], GetOptions::default()).await.unwrap();
    assert_eq!(client.delete(&[key(1)]).await.unwrap(), 1);
    assert_eq!(events(stream).await.layers.len(), usize::from(LAYERS));
    server.shutdown().await;
}

/// All files below a directory.
fn files(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// Flips a bit in a layer of the only chunk file that holds `data`.
fn damage(directory: &Path, data: &[u8]) {
    for path in files(directory) {
        let mut bytes = fs::read(&path).unwrap();
        if let Some(at) = bytes.windows(data.len()).position(|window| window == data) {
            bytes[at + data.len() / 2] ^= 1;
            fs::write(&path, bytes).unwrap();
            return;
        }
    }
    panic!("no file holds the layer");
}

#[tokio::test]
async fn a_corrupt_chunk_is_lost_with_all_later_ones() {
    let directory = tempfile::tempdir().unwrap();
    let (server, client) = start(on_disk(directory.path())).await;
    for number in [1, 2, 3] {
        client.put(&chunk(number)).await.unwrap();
    }
    drop(client);
    server.shutdown().await;
    // Enough of the layer to be found, short enough to be searched for quickly.
    damage(directory.path(), &layer(2, 2)[..64]);

    let (server, client) = start(on_disk(directory.path())).await;
    let keys = [key(1), key(2), key(3)];
    let stream = client.get(&keys, GetOptions::default()).await.unwrap();
    assert!(stream.chunks().iter().all(|chunk| chunk.tier == Tier::Disk));
    let seen = events(stream).await.order;
    // Sooner or later: it is told when it is found out.
    let lost = seen.iter().position(|it| *it == Seen::Lost(1)).unwrap();
    let first = |it: &Seen| matches!(it, Seen::Layer(_, 0));
    assert_eq!(
        seen.iter().filter(|it| first(it)).count(),
        usize::from(LAYERS)
    );
    assert!(seen[lost + 1..].iter().all(first), "{seen:?}");
    assert!(!seen.contains(&Seen::Layer(2, 1)), "{seen:?}");
    let disk = client
        .stats()
        .await
        .unwrap()
        .tier(Tier::Disk)
        .unwrap()
        .clone();
    assert_eq!(disk.corrupt, 1);
    // The bad copy is gone; the chunks around it are not.
    let lookup = client.lookup(&keys).await.unwrap();
    let present: Vec<_> = lookup.found.iter().map(Option::is_some).collect();
    assert_eq!(present, [true, false, true]);
    assert_eq!(
        LostReason::Corrupt.to_string(),
        "its bytes failed their checksum"
    );
    server.shutdown().await;
}

#[tokio::test]
async fn more_than_the_memory_is_read_from_disk() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = on_disk(directory.path());
    // Two chunks fit into memory, twenty are on disk.
    config.store.memory = kvasir_store::MemoryConfig::with_capacity(ByteSize::kib(700));
    let (server, client) = start(config).await;
    let numbers: Vec<u8> = (1..=20).collect();
    for number in &numbers {
        assert!(client.put(&chunk(*number)).await.unwrap().durable);
    }
    assert_eq!(read_all(&client, &numbers).await, 20);
    let memory = server.store().stats().memory;
    assert!(memory.bytes <= memory.capacity);
    server.shutdown().await;
}

#[tokio::test]
async fn a_deadline_covers_the_whole_stream() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    let deadline = Instant::now() + Duration::from_millis(50);
    let options = GetOptions {
        deadline: Some(deadline),
        ..GetOptions::default()
    };
    let mut stream = client.get(&[key(1)], options).await.unwrap();
    assert!(stream.next().await.unwrap().is_some());
    tokio::time::sleep_until((deadline + Duration::from_millis(1)).into()).await;
    // Although the rest has arrived.
    let late = stream.next().await;
    assert!(matches!(late, Err(CallError::DeadlineExceeded)));
    server.shutdown().await;
}
