//! The composed store, over its public interface.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compose;
mod damage;
mod demotion;
mod leases;
mod profiles;
mod recovery;

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_codec::{Object, ObjectHeader};
use kvasir_store::{DiskConfig, MemoryConfig, Store, StoreConfig};
use kvasir_types::{ByteSize, ChunkKey, DType, ExtentRange, KvLayout, Planes};

/// 4 layers of 4 KiB.
fn layout() -> KvLayout {
    KvLayout::new(4, 2, Planes::symmetric(32), 16, DType::Bf16).unwrap()
}

fn all() -> ExtentRange {
    ExtentRange::new(0, layout().layers().into()).unwrap()
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
        ..StoreConfig::default()
    }
}

fn on_disk(path: &Path) -> StoreConfig {
    StoreConfig {
        memory: MemoryConfig::with_capacity(ByteSize::mib(16)),
        disk: Some(DiskConfig::at(path)),
        ..StoreConfig::default()
    }
}

/// The chunk's layers, if the store has it and it is whole.
async fn get(store: &Store, number: u8) -> Option<Vec<Bytes>> {
    let lease = store.lease(key(number)).await?;
    lease.read_extents(all()).await.ok()
}

/// Waits until chunks take so many bytes on disk: space is given back in the background.
async fn disk_takes(store: &Store, bytes: u64) {
    let begin = Instant::now();
    while store.stats().disk.unwrap().bytes != bytes {
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "{:?}",
            store.stats()
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Where a chunk's frame lies: found by looking for its header.
struct Frame {
    file: PathBuf,
    offset: usize,
}

impl Frame {
    fn of(directory: &Path, number: u8) -> Self {
        let mut frames = Self::all(directory);
        frames.retain(|(_, found)| *found == key(number));
        assert_eq!(frames.len(), 1, "chunk {number}");
        frames.remove(0).0
    }

    /// Every frame in a directory, and whose it is.
    fn all(directory: &Path) -> Vec<(Self, ChunkKey)> {
        let mut frames = Vec::new();
        for file in segments(directory) {
            let bytes = std::fs::read(&file).unwrap_or_default();
            for (block, rest) in bytes.chunks(4096).enumerate() {
                if let Ok((header, _)) = ObjectHeader::parse(rest) {
                    let offset = block * 4096;
                    let file = file.clone();
                    frames.push((Self { file, offset }, *header.key()));
                }
            }
        }
        frames
    }

    /// Puts `bytes` into the file, counted from the start of the frame.
    fn overwrite(&self, at: usize, bytes: &[u8]) {
        let file = std::fs::File::options().write(true).open(&self.file);
        let at = (self.offset + at) as u64;
        file.unwrap().write_all_at(bytes, at).unwrap();
    }

    fn flip(&self, at: usize) {
        let bytes = std::fs::read(&self.file).unwrap();
        self.overwrite(at, &[bytes[self.offset + at] ^ 0x10]);
    }

    /// The object's header padded to a block, then the payload, as it lies there.
    fn put(&self, object: &Object) {
        self.overwrite(0, &object.header().encode());
        self.overwrite(PAYLOAD, &object.extents().concat());
    }

    /// Cuts the file `at` bytes after the start of the frame.
    fn truncate(&self, at: usize) {
        let file = std::fs::File::options().write(true).open(&self.file);
        file.unwrap().set_len((self.offset + at) as u64).unwrap();
    }

    fn is_hole(&self) -> bool {
        let bytes = std::fs::read(&self.file).unwrap_or_default();
        let rest = bytes.get(self.offset..).unwrap_or_default();
        rest.iter().take(FRAME).all(|&byte| byte == 0)
    }
}

/// Where the payload starts in a frame of [`layout`].
const PAYLOAD: usize = 4096;
/// Bytes of such a frame.
const FRAME: usize = 5 * 4096;

/// The segment files of a store.
fn segments(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory.join("segments"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

/// Closes a store and gives its directory back.
async fn close(store: Store) {
    store.close().await.unwrap();
    drop(store);
}
