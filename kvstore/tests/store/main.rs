//! The composed store, over its public interface.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compose;
mod damage;
mod recovery;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use kvasir_codec::Object;
use kvasir_store::{DiskConfig, MemoryConfig, Store, StoreConfig};
use kvasir_types::{ByteSize, ChunkKey, DType, KvLayout, LayerRange, Planes};

/// 4 layers of 4 KiB.
fn layout() -> KvLayout {
    KvLayout::new(4, 2, Planes::symmetric(32), 16, DType::Bf16).unwrap()
}

fn all() -> LayerRange {
    LayerRange::new(0, layout().layers()).unwrap()
}

fn key(number: u8) -> ChunkKey {
    ChunkKey::from_bytes([number; 32])
}

fn object(number: u8) -> Object {
    object_of(number, &layout())
}

fn object_of(number: u8, layout: &KvLayout) -> Object {
    let layers = (0..layout.layers())
        .map(|layer| {
            let fill = number.wrapping_mul(31).wrapping_add(layer.to_le_bytes()[0]);
            Bytes::from(vec![fill; layout.layer_bytes()])
        })
        .collect();
    Object::raw(key(number), layout, layers).unwrap()
}

fn memory_only(capacity: ByteSize) -> StoreConfig {
    StoreConfig {
        memory: MemoryConfig::with_capacity(capacity),
        disk: None,
    }
}

fn on_disk(path: &Path) -> StoreConfig {
    StoreConfig {
        memory: MemoryConfig::with_capacity(ByteSize::mib(16)),
        disk: Some(DiskConfig::at(path)),
    }
}

/// The chunk's layers, if the store has it and it is whole.
async fn get(store: &Store, number: u8) -> Option<Vec<Bytes>> {
    let lease = store.lease(key(number)).await?;
    lease.read_layers(all()).await.ok()
}

/// The one file of a chunk.
fn file_of(directory: &Path, number: u8) -> PathBuf {
    let fan_out = directory.join(format!("chunks/{number:02x}"));
    let files: Vec<PathBuf> = std::fs::read_dir(fan_out)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

/// Closes a store and gives its directory back.
async fn close(store: Store) {
    store.close().await.unwrap();
    drop(store);
}
