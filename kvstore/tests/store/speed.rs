//! Throughput of one 4 MiB object, for a quick look: `cargo test -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_codec::Object;
use kvasir_store::{DiskConfig, MemoryConfig, Store, StoreConfig};
use kvasir_types::{ByteSize, ChunkKey, DType, KvLayout, LayerRange, Planes};

const ROUNDS: u32 = 40;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints timings, checks nothing"]
async fn throughput() {
    let layout = KvLayout::new(4, 8, Planes::symmetric(128), 256, DType::Bf16).unwrap();
    let objects: Vec<Object> = (0..ROUNDS).map(|round| object(&layout, round)).collect();
    let bytes = u64::from(ROUNDS) * layout.chunk_bytes();
    let all = LayerRange::new(0, layout.layers()).unwrap();

    let directory = tempfile::tempdir().unwrap();
    let memory = MemoryConfig::with_capacity(ByteSize::gib(1));
    for drop_page_cache in [None, Some(false), Some(true)] {
        let disk = drop_page_cache.map(|drop_page_cache| DiskConfig {
            drop_page_cache,
            ..DiskConfig::at(directory.path().join(drop_page_cache.to_string()))
        });
        let name = match drop_page_cache {
            None => "memory",
            Some(false) => "disk, cached",
            Some(true) => "disk, uncached",
        };
        let config = StoreConfig {
            memory: memory.clone(),
            disk: disk.clone(),
        };
        let mut store = Store::open(config.clone()).await.unwrap();
        let start = Instant::now();
        for object in &objects {
            // What a daemon does with an object that arrives: copy, check, store.
            let layers = object.layers().iter();
            let layers = layers.map(|layer| Bytes::copy_from_slice(layer)).collect();
            let received = Object::from_parts(object.header().clone(), layers).unwrap();
            let _ = store.put(received).await.unwrap();
        }
        report(name, "put", bytes, start.elapsed());
        if disk.is_some() {
            crate::close(store).await;
            store = Store::open(config).await.unwrap();
        }
        let start = Instant::now();
        for object in &objects {
            let lease = store.lease(*object.header().key()).await.unwrap();
            let layers = lease.read_layers(all).await.unwrap();
            assert_eq!(layers.len(), object.layers().len());
        }
        report(name, "get", bytes, start.elapsed());
    }
}

#[expect(clippy::cast_precision_loss, reason = "printed with two decimals")]
fn report(tier: &str, what: &str, bytes: u64, time: Duration) {
    let rate = bytes as f64 / time.as_secs_f64() / 1e9;
    println!("{tier}: {what} {rate:.2} GB/s");
}

fn object(layout: &KvLayout, round: u32) -> Object {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&round.to_be_bytes());
    key[0] = round.to_le_bytes()[0];
    let fill = round.to_le_bytes()[0];
    let layers = (0..layout.layers())
        .map(|_| Bytes::from(vec![fill; layout.layer_bytes()]))
        .collect();
    Object::raw(ChunkKey::from_bytes(key), layout, layers).unwrap()
}
