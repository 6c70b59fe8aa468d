//! Frames and their readers; see [`crate::models`].
//!
//! A tier of its own code on a [`Blocks`] medium, which knows what lies where and notices
//! what is given back too early or twice. The catalog's database is absent: no model
//! restarts.

#![allow(clippy::unwrap_used, reason = "a model fails by panicking")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};

use bytes::Bytes;
use kvasir_codec::Object;
use kvasir_types::{ByteSize, ChunkKey};
use loom::sync::atomic::AtomicU64;
use loom::thread;
use rocksdb::{Options, ReadOptions, WriteBatch, WriteOptions};
use tempfile::TempDir;

use super::segment::BLOCK;
use super::*;
use crate::models::{check, clock, layout, memory_tier};

/// Of every frame: a block of header, and one of payload.
const FRAME_BYTES: u64 = 2 * BLOCK as u64;

/// Blocks in memory. Every operation on them is a step of its own.
#[derive(Debug)]
struct Blocks {
    files: Mutex<BTreeMap<PathBuf, Blocked>>,
    /// Bytes of frames that take space.
    allocated: AtomicU64,
    capacity: u64,
}

/// `None` for a hole.
type Blocked = BTreeMap<u64, Option<Box<[u8]>>>;

#[derive(Debug)]
struct BlocksFile {
    blocks: Arc<Blocks>,
    path: PathBuf,
}

impl Blocks {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Blocked>> {
        self.files.lock().unwrap()
    }

    fn give_back(&self, bytes: u64) {
        self.allocated.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The medium as a tier takes it.
#[derive(Clone, Debug)]
struct Model(Arc<Blocks>);

impl Model {
    fn opened(&self, path: &Path) -> Box<dyn MediumFile> {
        let (blocks, path) = (Arc::clone(&self.0), path.to_owned());
        Box::new(BlocksFile { blocks, path })
    }
}

impl Medium for Model {
    fn create(&self, path: &Path) -> io::Result<Box<dyn MediumFile>> {
        let before = self.0.lock().insert(path.to_owned(), Blocked::new());
        assert!(before.is_none(), "made twice: {}", path.display());
        Ok(self.opened(path))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn MediumFile>> {
        assert!(self.0.lock().contains_key(path), "{}", path.display());
        Ok(self.opened(path))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let blocks = self.0.lock().remove(path).expect("removed twice");
        let frames = blocks
            .iter()
            .filter(|(at, held)| **at > 0 && held.is_some());
        self.0.give_back((frames.count() * BLOCK) as u64);
        Ok(())
    }

    fn sync_directory(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }
}

impl MediumFile for BlocksFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let files = self.blocks.lock();
        let file = files.get(&self.path).expect("read after it was removed");
        for (at, block) in (offset / BLOCK as u64..).zip(buffer.chunks_mut(BLOCK)) {
            match file.get(&at).expect("read before it was written") {
                Some(bytes) => block.copy_from_slice(bytes),
                None => panic!("read after it was given back"),
            }
        }
        Ok(buffer.len())
    }

    fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<usize> {
        let mut fresh = 0;
        let mut files = self.blocks.lock();
        let file = files.get_mut(&self.path).unwrap();
        for (at, block) in (offset / BLOCK as u64..).zip(buffer.chunks(BLOCK)) {
            let before = file.insert(at, Some(block.into()));
            assert!(
                before != Some(None),
                "a place that was given back is used again"
            );
            fresh += if before.is_none() && at > 0 {
                BLOCK as u64
            } else {
                0
            };
        }
        drop(files);
        let before = self.blocks.allocated.fetch_add(fresh, Ordering::Relaxed);
        assert!(before + fresh <= self.blocks.capacity, "more than allowed");
        Ok(buffer.len())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        {
            let mut files = self.blocks.lock();
            let file = files.get_mut(&self.path).expect("no such file");
            for at in range.start / BLOCK as u64..range.end / BLOCK as u64 {
                let block = file.get_mut(&at).expect("no such frame");
                assert!(block.take().is_some(), "given back twice");
            }
        }
        self.blocks.give_back(range.end - range.start);
        Ok(())
    }

    fn data(&self, _from: u64) -> io::Result<Option<Range<u64>>> {
        Ok(None)
    }
}

/// Stands for the catalog's database: remembers nothing.
#[derive(Debug)]
pub(super) struct NoDatabase;

#[expect(
    clippy::unnecessary_wraps,
    clippy::unused_self,
    reason = "has the signatures of what it stands for"
)]
impl NoDatabase {
    pub(super) fn open(_: &Options, _: &Path) -> Result<Self, rocksdb::Error> {
        Ok(Self)
    }

    pub(super) fn get(&self, _: &[u8]) -> Result<Option<Vec<u8>>, rocksdb::Error> {
        Ok(None)
    }

    pub(super) fn write_opt(&self, _: WriteBatch, _: &WriteOptions) -> Result<(), rocksdb::Error> {
        Ok(())
    }

    pub(super) fn put_opt(
        &self,
        _: impl AsRef<[u8]>,
        _: impl AsRef<[u8]>,
        _: &WriteOptions,
    ) -> Result<(), rocksdb::Error> {
        Ok(())
    }

    pub(super) fn delete_opt(&self, _: &[u8], _: &WriteOptions) -> Result<(), rocksdb::Error> {
        Ok(())
    }

    pub(super) fn flush_wal(&self, _sync: bool) -> Result<(), rocksdb::Error> {
        Ok(())
    }

    pub(super) fn raw_iterator_opt(&self, _: ReadOptions) -> NoItems {
        NoItems
    }
}

/// Its iterator.
pub(super) struct NoItems;

#[expect(
    clippy::unnecessary_wraps,
    clippy::unused_self,
    reason = "has the signatures of what it stands for"
)]
impl NoItems {
    pub(super) fn seek_to_first(&mut self) {}

    pub(super) fn item(&self) -> Option<(&[u8], &[u8])> {
        None
    }

    pub(super) fn next(&mut self) {}

    pub(super) fn status(&self) -> Result<(), rocksdb::Error> {
        Ok(())
    }
}

/// A tier with room for `frames`, and its medium.
fn tier(directory: &TempDir, frames: u64) -> (DiskTier, Arc<Blocks>) {
    let capacity = frames * FRAME_BYTES;
    let blocks = Arc::new(Blocks {
        files: Mutex::default(),
        allocated: AtomicU64::new(0),
        capacity,
    });
    let environment = Environment {
        clock: clock(),
        medium: Arc::new(Model(Arc::clone(&blocks))),
    };
    let config = DiskConfig {
        capacity: ByteSize::bytes(capacity),
        ..DiskConfig::at(directory.path())
    };
    let lock = File::open(directory.path()).unwrap();
    let tier =
        DiskTier::recover(environment, &config, memory_tier(), EventLog::new(), lock).unwrap();
    (tier, blocks)
}

fn key(number: u8) -> ChunkKey {
    ChunkKey::from_bytes([number; 32])
}

/// Stores a chunk, as far as room is; evicts what it must.
fn put(tier: &DiskTier, key: ChunkKey) -> bool {
    let layout = layout();
    let layer = Bytes::from(vec![key.as_bytes()[0]; layout.layer_bytes()]);
    let layers = vec![layer; usize::from(layout.layers())];
    let object = Object::raw(key, &layout, layers).unwrap();
    let (header, layers) = object.into_parts();
    let bytes = frame_bytes(&layout, Level::RAW, header.object_bytes());
    assert_eq!(bytes, FRAME_BYTES);
    tier.0
        .store(&header, &layers, &Worth::new(Hints::default()), bytes)
        .unwrap()
        == Written::Stored
}

/// A chunk that is being read.
#[derive(Clone)]
struct Reading {
    reader: DiskReader,
    tier: DiskTier,
    location: Location,
}

impl Reading {
    /// Opens a chunk as a lease does.
    fn open(tier: &DiskTier, key: ChunkKey) -> Option<Self> {
        let hold = tier.hold(&key)?;
        let location = hold.location;
        let opened = tier.open_whole_or_head(hold, None).unwrap();
        Some(Self {
            reader: opened.expect("a held frame is whole").reader,
            tier: tier.clone(),
            location,
        })
    }

    /// Reads the payload and lets go. The medium refuses what was given back, and what was
    /// written there since is of another key.
    fn finish(self) {
        let file = self.tier.0.segments.file(self.location.segment).unwrap();
        let mut payload = [0; BLOCK];
        let offset = self.location.offset() + BLOCK as u64;
        file.read_at(&mut payload, offset).unwrap();
        assert_eq!(payload[0], self.reader.header().key().as_bytes()[0]);
    }
}

/// What is stored takes space, and nothing else does.
fn assert_holds(tier: &DiskTier, blocks: &Blocks, frames: u64) {
    tier.0.segments.give_back_spares().unwrap();
    let chunks = tier.0.lock();
    assert!(chunks.retired.is_empty(), "nobody reads any more");
    assert!(chunks.index.iter().all(|entry| entry.readers == 0));
    assert_eq!(chunks.index.iter().count() as u64, frames);
    assert_eq!(tier.0.budget.used(), frames * FRAME_BYTES);
    let allocated = blocks.allocated.load(Ordering::Relaxed);
    assert_eq!(allocated, frames * FRAME_BYTES);
}

fn in_a_directory(model: impl Fn(&TempDir) + Send + Sync + 'static) {
    let directory = tempfile::tempdir().unwrap();
    check(move || model(&directory));
}

/// Two readers and a deletion: the last one out gives the frame back.
#[test]
fn a_frame_is_given_back_once_and_not_while_it_is_read() {
    in_a_directory(|directory| {
        let (tier, blocks) = tier(directory, 1);
        assert!(put(&tier, key(1)));
        let read = || {
            let tier = tier.clone();
            move || {
                let Some(reader) = Reading::open(&tier, key(1)) else {
                    return;
                };
                let other = reader.clone();
                drop(reader);
                other.finish();
            }
        };
        let reader = thread::spawn(read());
        let remover = {
            let tier = tier.clone();
            thread::spawn(move || tier.0.remove(&key(1)).unwrap())
        };
        read()();
        reader.join().unwrap();
        assert!(remover.join().unwrap());
        assert_holds(&tier, &blocks, 0);
    });
}

/// A deletion, and a check that failed, of the same copy.
#[test]
fn a_frame_is_given_back_by_one_of_those_who_drop_it() {
    in_a_directory(|directory| {
        let (tier, blocks) = tier(directory, 1);
        assert!(put(&tier, key(1)));
        let location = tier.0.lock().index.peek(&key(1)).unwrap().location;
        let reader = Reading::open(&tier, key(1)).unwrap();
        let discard = {
            let tier = tier.clone();
            thread::spawn(move || tier.0.discard_corrupt(&key(1), location))
        };
        let remover = {
            let tier = tier.clone();
            thread::spawn(move || tier.0.remove(&key(1)).unwrap())
        };
        reader.finish();
        discard.join().unwrap();
        remover.join().unwrap();
        assert_holds(&tier, &blocks, 0);
    });
}

/// A writer needs the place of a chunk that is being read.
#[test]
fn a_frame_that_is_read_is_not_evicted() {
    in_a_directory(|directory| {
        let (tier, blocks) = tier(directory, 1);
        assert!(put(&tier, key(1)));
        let reader = {
            let tier = tier.clone();
            thread::spawn(move || {
                let Some(reader) = Reading::open(&tier, key(1)) else {
                    return;
                };
                assert!(tier.contains(&key(1)), "evicted while read");
                reader.finish();
            })
        };
        let stored = put(&tier, key(2));
        reader.join().unwrap();
        assert_eq!(tier.contains(&key(1)), !stored);
        assert_holds(&tier, &blocks, 1);
        assert!(put(&tier, key(3)), "nobody reads any more");
        assert_holds(&tier, &blocks, 1);
    });
}

/// A writer takes the place of a chunk that is being deleted.
#[test]
fn a_deleted_frame_makes_room_when_it_is_gone() {
    in_a_directory(|directory| {
        let (tier, blocks) = tier(directory, 1);
        assert!(put(&tier, key(1)));
        let remover = {
            let tier = tier.clone();
            thread::spawn(move || tier.0.remove(&key(1)).unwrap())
        };
        let stored = put(&tier, key(2));
        let removed = remover.join().unwrap();
        assert!(stored || removed, "one of the two made room");
        assert_holds(&tier, &blocks, stored.into());
    });
}

/// A key is deleted and stored again, elsewhere, while the old copy is read and found
/// bad, and the new one is read.
#[test]
fn who_holds_or_drops_an_old_copy_does_not_touch_the_new_one() {
    in_a_directory(|directory| {
        let (tier, blocks) = tier(directory, 2);
        assert!(put(&tier, key(1)));
        let old = Reading::open(&tier, key(1)).unwrap();
        let reader = {
            let tier = tier.clone();
            thread::spawn(move || {
                tier.0.discard_corrupt(&key(1), old.location);
                old.finish();
                if let Some(reader) = Reading::open(&tier, key(1)) {
                    reader.finish();
                }
            })
        };
        tier.0.remove(&key(1)).unwrap();
        assert!(put(&tier, key(1)), "there is room for both");
        reader.join().unwrap();
        assert_holds(&tier, &blocks, 1);
    });
}

/// The last frames of a segment that nobody writes any more go, and its file with them.
#[test]
fn a_segment_goes_with_its_last_frame() {
    in_a_directory(|directory| {
        let (tier, blocks) = tier(directory, 2);
        assert!(put(&tier, key(1)) && put(&tier, key(2)));
        tier.0.segments.close().unwrap();
        let held = Reading::open(&tier, key(1)).unwrap();
        let removers = [1, 2].map(|number| {
            let tier = tier.clone();
            thread::spawn(move || assert!(tier.0.remove(&key(number)).unwrap()))
        });
        held.finish();
        for remover in removers {
            remover.join().unwrap();
        }
        assert_holds(&tier, &blocks, 0);
        assert!(blocks.lock().is_empty(), "the file is still there");
    });
}
