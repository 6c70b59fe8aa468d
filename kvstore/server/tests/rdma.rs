//! Gets by one-sided reads of a server's memory.
//!
//! What needs a device is ignored where there may be none; `make test-rdma` has one, and runs it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use bytes::Bytes;
use kvasir_client::{Carrier, Chunk, Client, ClientConfig, DataPlane, GetEvent, GetOptions};
use kvasir_server::{RdmaError, RdmaSettings, Running, Server, ServerConfig, StartError};
use kvasir_store::MemoryConfig;
use kvasir_types::{ByteSize, ChunkKey, DType, KvLayout, Level, Planes};

/// Layers of 64 KiB.
const LAYERS: u16 = 8;

fn config() -> ServerConfig {
    let mut config = ServerConfig::in_memory();
    config.store.memory = MemoryConfig::with_capacity(ByteSize::mib(64));
    config
}

fn layer(number: u8, layer: u16) -> Bytes {
    let seed = u32::from(number) * 251 + u32::from(layer) * 7919;
    (0..64u32 << 10)
        .map(|at| ((at ^ seed) % 251) as u8)
        .collect()
}

fn chunk(number: u8) -> Chunk {
    Chunk {
        key: ChunkKey::from_bytes([number; 32]),
        layout: KvLayout::new(LAYERS, 2, Planes::symmetric(64), 128, DType::F16).unwrap(),
        level: Level::RAW,
        extents: (0..LAYERS).map(|index| layer(number, index)).collect(),
    }
}

async fn client(server: &Running, data_plane: DataPlane) -> Client {
    let client = Client::connect_with(ClientConfig {
        endpoint: server.endpoint().parse().unwrap(),
        data_plane,
        ..ClientConfig::default()
    });
    client.await.unwrap()
}

/// Gets chunks, and looks at every byte.
async fn get(client: &Client, numbers: &[u8]) {
    let keys: Vec<ChunkKey> = numbers
        .iter()
        .map(|&number| ChunkKey::from_bytes([number; 32]))
        .collect();
    let mut layers = client.get(&keys, GetOptions::default()).await.unwrap();
    let mut came = 0;
    while let Some(event) = layers.next().await.unwrap() {
        let GetEvent::Layer {
            chunk,
            layer: index,
            parts,
        } = event
        else {
            panic!("{event:?}");
        };
        assert_eq!(parts.concat(), layer(numbers[chunk], index.0));
        came += 1;
    }
    assert_eq!(came, numbers.len() * usize::from(LAYERS));
}

/// Packets that RDMA devices sent.
fn packets() -> u64 {
    let devices = fs::read_dir("/sys/class/infiniband").unwrap();
    let sent = devices.map(|device| {
        let counter = device.unwrap().path().join("ports/1/hw_counters/sent_pkts");
        let text = fs::read_to_string(counter).unwrap();
        text.trim().parse::<u64>().unwrap()
    });
    sent.sum()
}

fn carrier(client: &Client) -> Option<Carrier> {
    let path = client.data_path()?;
    path.connected.then_some(path.carrier)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device"]
async fn what_a_server_has_is_read_one_sidedly() {
    let server = Server::start(config()).await.unwrap();
    let reads = client(&server, DataPlane::Rdma).await;
    assert_eq!(carrier(&reads), Some(Carrier::Rdma));
    let numbers = [1, 2, 3, 4, 5, 6];
    for number in numbers {
        reads.put(&chunk(number)).await.unwrap();
    }
    let before = packets();
    for _ in 0..5 {
        get(&reads, &numbers).await;
    }
    // Not over QUIC: that many packets of 4 KiB, and more.
    let bytes = 5 * numbers.len() as u64 * u64::from(LAYERS) * (64 << 10);
    let sent = packets() - before;
    assert!(sent * 4096 >= bytes, "{sent} packets of {bytes} bytes");
    // Memory that was registered serves others when its chunks are gone.
    let keys = numbers.map(|number| ChunkKey::from_bytes([number; 32]));
    assert_eq!(reads.delete(&keys).await.unwrap(), 6);
    let others = [7, 8, 9, 10, 11, 12];
    for number in others {
        reads.put(&chunk(number)).await.unwrap();
    }
    get(&reads, &others).await;
    assert_eq!(carrier(&reads), Some(Carrier::Rdma));

    // On one host, memory is mapped; and who wants QUIC has it.
    for (wanted, has) in [
        (DataPlane::Best, Carrier::SharedMemory),
        (DataPlane::Quic, Carrier::Quic),
    ] {
        let client = client(&server, wanted).await;
        assert_eq!(carrier(&client), Some(has));
        get(&client, &others).await;
    }
    server.shutdown().await;
}

/// Between hosts, where no memory can be mapped, it is what clients choose by themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device"]
async fn it_is_chosen_before_quic() {
    let mut config = config();
    config.shared_memory.enabled = false;
    let server = Server::start(config).await.unwrap();
    let client = client(&server, DataPlane::Best).await;
    assert_eq!(carrier(&client), Some(Carrier::Rdma));
    client.put(&chunk(1)).await.unwrap();
    get(&client, &[1]).await;
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_it_is_not_offered_gets_go_over_quic() {
    let mut config = config();
    config.rdma.enabled = false;
    let server = Server::start(config).await.unwrap();
    let client = client(&server, DataPlane::Rdma).await;
    assert_eq!(carrier(&client), Some(Carrier::Quic));
    client.put(&chunk(1)).await.unwrap();
    get(&client, &[1]).await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_device_that_is_named_has_to_be_there() {
    let mut config = config();
    config.rdma = RdmaSettings {
        device: Some("no-such-device".to_owned()),
        ..RdmaSettings::default()
    };
    let error = Server::start(config).await.map(drop).unwrap_err();
    let absent = matches!(error, StartError::Rdma(RdmaError::NoDevice(_)));
    assert!(absent, "{error}");
}
