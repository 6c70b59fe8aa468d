//! Servers, chunks and raw connections for tests.

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::{Chunk, Client, ClientConfig, DataPlane, GetEvent, GetOptions, LayerStream};
use kvasir_proto::v1::cache_client::CacheClient;
use kvasir_server::{Running, Server, ServerConfig};
use kvasir_store::{DiskConfig, MemoryConfig};
use kvasir_types::{ByteSize, ChunkKey, DType, KvLayout, Level, Planes};
use tonic::transport::Channel;

pub(crate) const LAYERS: u16 = 4;

/// 4 layers of 64 KiB.
pub(crate) fn layout() -> KvLayout {
    KvLayout::new(LAYERS, 2, Planes::symmetric(64), 128, DType::F16).unwrap()
}

/// Keys in the order of their numbers.
pub(crate) fn key(number: u8) -> ChunkKey {
    ChunkKey::from_bytes([number; 32])
}

/// Bytes that differ between chunks and layers.
pub(crate) fn layer(number: u8, layer: u16) -> Bytes {
    let seed = u32::from(number) * 251 + u32::from(layer) * 7919;
    let bytes = layout().layer_bytes() as u32;
    (0..bytes).map(|at| ((at ^ seed) % 251) as u8).collect()
}

pub(crate) fn chunk(number: u8) -> Chunk {
    Chunk {
        key: key(number),
        layout: layout(),
        level: Level::RAW,
        extents: (0..LAYERS).map(|index| layer(number, index)).collect(),
    }
}

pub(crate) fn memory(capacity: ByteSize) -> ServerConfig {
    let mut config = ServerConfig::in_memory();
    config.store.memory = MemoryConfig::with_capacity(capacity);
    config
}

pub(crate) fn on_disk(path: &Path) -> ServerConfig {
    let mut config = memory(ByteSize::mib(64));
    config.store.disk = Some(DiskConfig::at(path));
    config
}

pub(crate) async fn start(config: ServerConfig) -> (Running, Client) {
    let server = Server::start(config).await.unwrap();
    let client = Client::connect(&server.endpoint()).await.unwrap();
    (server, client)
}

/// The generated client, for what the SDK would never send.
pub(crate) async fn raw(server: &Running) -> CacheClient<Channel> {
    CacheClient::new(channel(server).await)
}

pub(crate) async fn channel(server: &Running) -> Channel {
    let endpoint = format!("http://{}", server.addr());
    Channel::from_shared(endpoint)
        .unwrap()
        .connect()
        .await
        .unwrap()
}

/// The chunks that a get completes, each compared with what [`chunk`] stored; over the data
/// plane, if the client has found it yet, and over gRPC.
pub(crate) async fn read_all(client: &Client, numbers: &[u8]) -> usize {
    let found = read_over_its_path(client, numbers).await;
    let over_grpc = Client::connect_lazy(ClientConfig {
        data_plane: DataPlane::Grpc,
        ..client.config().clone()
    });
    assert_eq!(read_over_its_path(&over_grpc, numbers).await, found);
    assert_eq!(over_grpc.data_path(), None);
    found
}

async fn read_over_its_path(client: &Client, numbers: &[u8]) -> usize {
    let keys: Vec<_> = numbers.iter().copied().map(key).collect();
    let stream = client.get(&keys, GetOptions::default()).await.unwrap();
    let chunks = stream.chunks().len();
    let seen = events(stream).await;
    let expected: Vec<_> = (0..LAYERS)
        .flat_map(|layer| (0..chunks).map(move |chunk| Seen::Layer(layer, chunk)))
        .collect();
    assert_eq!(seen.order, expected);
    for (chunk, layer_index, data) in seen.layers {
        assert_eq!(data, layer(numbers[chunk], layer_index));
    }
    chunks
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Layer(u16, usize),
    Lost(usize),
}

pub(crate) struct Events {
    pub(crate) order: Vec<Seen>,
    pub(crate) layers: Vec<(usize, u16, Bytes)>,
}

pub(crate) async fn events(mut stream: LayerStream) -> Events {
    let mut events = Events {
        order: Vec::new(),
        layers: Vec::new(),
    };
    while let Some(event) = stream.next().await.unwrap() {
        match event {
            GetEvent::Prelude { .. } => unreachable!("raw chunks have none"),
            GetEvent::Layer {
                chunk,
                layer,
                mut parts,
            } => {
                let data = parts.pop().unwrap();
                assert!(parts.is_empty());
                events.order.push(Seen::Layer(layer.0, chunk));
                events.layers.push((chunk, layer.0, data));
            }
            GetEvent::Lost { chunk, .. } => events.order.push(Seen::Lost(chunk)),
        }
    }
    events
}

/// Waits for something that happens soon, but not when a call returns.
pub(crate) async fn soon(what: &str, mut happened: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !happened() {
        assert!(begin.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
