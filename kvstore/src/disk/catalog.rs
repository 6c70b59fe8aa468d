//! Which frames are valid: a small RocksDB.
//!
//! The catalog is the commit point of the disk tier. A chunk exists once its record
//! is synced, and a frame without a record is garbage. It holds no payload, and is
//! read once, at startup.
//!
//! A record's key is the chunk key, then segment and block, big-endian, `u32` each: the
//! place is part of it, so that deleting an old copy of a chunk cannot touch the record
//! of a new one elsewhere, whoever comes first. Its value, little-endian: version `u8` = 2, level
//! code `u8`, layout (16), object bytes `u64`, when written `u64`: nanoseconds since 1970,
//! or one more than the record before it where the clock stands still or goes back;
//! then what the writer told: class `u8`, recompute `u32` (0: nothing), and the key of
//! the parent, which is absent where there is none.
//!
//! Version 1 kept every chunk in a file of its own. Its records have the chunk key
//! alone as their key, and a value of version `u8` = 1, level code, layout, generation
//! `u64`, object bytes `u64`, seconds `u64`; see `legacy`.
//!
//! The key `store-id` holds the random id of the directory.

#![deny(clippy::indexing_slicing)]

use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::iter;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::SystemTime;

use kvasir_types::{ChunkKey, Class, Hints, KvLayout, Level};
#[cfg(not(all(test, kvasir_loom)))]
use rocksdb::DB;
use rocksdb::{DBCompressionType, LogLevel, Options, ReadOptions, WriteBatch, WriteOptions};

#[cfg(all(test, kvasir_loom))]
use super::models::NoDatabase as DB;
use super::segment::{Location, SegmentId, StoreId};
use crate::tier::DeviceError;

/// What the catalog keeps of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) key: ChunkKey,
    pub(super) location: Location,
    pub(super) layout: KvLayout,
    pub(super) level: Level,
    pub(super) object_bytes: u64,
    /// Nanoseconds since 1970, and greater than that of every record before it.
    pub(super) created: u64,
    pub(super) hints: Hints,
}

impl Record {
    /// The key that the record of a frame has in the catalog.
    pub(super) fn key_of(key: &ChunkKey, location: Location) -> [u8; KEY_BYTES] {
        let mut out = [0; KEY_BYTES];
        let place = [location.segment.0, location.block].map(u32::to_be_bytes);
        let bytes = key.as_bytes().iter().chain(place.iter().flatten());
        for (slot, byte) in out.iter_mut().zip(bytes) {
            *slot = *byte;
        }
        out
    }

    fn encode(&self) -> Vec<u8> {
        let hints = &self.hints;
        let recompute = hints.recompute.map_or(0, NonZeroU32::get);
        let fields: [&[u8]; 8] = [
            &[VERSION],
            &[self.level.code()],
            &self.layout.encode(),
            &self.object_bytes.to_le_bytes(),
            &self.created.to_le_bytes(),
            &[hints.class.number()],
            &recompute.to_le_bytes(),
            hints.parent.as_ref().map_or(&[], |key| key.as_bytes()),
        ];
        fields.concat()
    }

    /// `None` for what this version did not write.
    fn decode(mut key: &[u8], mut value: &[u8]) -> Option<Self> {
        if key.len() != KEY_BYTES {
            return None;
        }
        let chunk = ChunkKey::from_bytes(take(&mut key)?);
        let segment = SegmentId(u32::from_be_bytes(take(&mut key)?));
        let block = u32::from_be_bytes(take(&mut key)?);
        let [version, level] = take(&mut value)?;
        if version != VERSION {
            return None;
        }
        let layout = KvLayout::decode(&take(&mut value)?).ok()?;
        let object_bytes = u64::from_le_bytes(take(&mut value)?);
        let created = u64::from_le_bytes(take(&mut value)?);
        let [class] = take(&mut value)?;
        let recompute = u32::from_le_bytes(take(&mut value)?);
        let parent = match value {
            [] => None,
            key => Some(ChunkKey::from_bytes(key.try_into().ok()?)),
        };
        Some(Self {
            key: chunk,
            location: Location { segment, block },
            layout,
            level: Level::from_code(level).ok()?,
            object_bytes,
            created,
            hints: Hints {
                parent,
                class: Class::new(class)?,
                recompute: NonZeroU32::new(recompute),
            },
        })
    }
}

/// What version 1 kept of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LegacyRecord {
    pub(super) key: ChunkKey,
    pub(super) generation: u64,
}

impl LegacyRecord {
    fn decode(key: &[u8], mut value: &[u8]) -> Option<Self> {
        let key = ChunkKey::from_bytes(key.try_into().ok()?);
        let [version, _level] = take(&mut value)?;
        let _layout: [u8; KvLayout::ENCODED_BYTES] = take(&mut value)?;
        let generation = u64::from_le_bytes(take(&mut value)?);
        (version == 1 && value.len() == 16).then_some(Self { key, generation })
    }
}

/// What a catalog holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) records: Vec<Record>,
    pub(super) legacy: Vec<LegacyRecord>,
    /// Raw keys of entries that are no records.
    pub(super) unreadable: Vec<Box<[u8]>>,
}

/// The records of one directory.
#[derive(Debug)]
pub(super) struct Catalog {
    db: Arc<DB>,
    committer: Committer,
    /// The last time that a record got.
    latest: AtomicU64,
    /// Removals that were not synced, and how many of them were since.
    removed: AtomicU64,
    settled: Mutex<u64>,
}

impl Catalog {
    /// Opens or creates the catalog in `path`.
    pub(super) fn open(path: &Path) -> Result<Self, DeviceError> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_compression_type(DBCompressionType::None);
        options.set_write_buffer_size(4 << 20);
        options.set_max_write_buffer_number(2);
        options.set_max_total_wal_size(16 << 20);
        options.set_max_background_jobs(2);
        options.set_max_open_files(64);
        options.set_keep_log_file_num(2);
        options.set_log_level(LogLevel::Warn);
        let db = Arc::new(DB::open(&options, path)?);
        Ok(Self {
            committer: Committer::start(&db)?,
            db,
            latest: AtomicU64::new(0),
            removed: AtomicU64::new(0),
            settled: Mutex::new(0),
        })
    }

    /// The directory's id; chosen now where there is none.
    pub(super) fn store_id(&self) -> Result<StoreId, rocksdb::Error> {
        let stored = self.db.get(STORE_ID)?;
        if let Some(id) = stored.and_then(|id| StoreId::try_from(id).ok()) {
            return Ok(id);
        }
        // Hashing nothing under fresh random keys is a random number.
        let random = || u128::from(RandomState::new().hash_one(()));
        let id = (random() << 64 | random()).to_le_bytes();
        self.db.put_opt(STORE_ID, id, &durable(true))?;
        Ok(id)
    }

    /// Everything in the catalog.
    pub(super) fn contents(&self) -> Result<Contents, rocksdb::Error> {
        let mut contents = Contents::default();
        let mut options = ReadOptions::default();
        // All of it is read, once.
        options.set_readahead_size(READ_AHEAD_BYTES);
        options.fill_cache(false);
        let mut items = self.db.raw_iterator_opt(options);
        items.seek_to_first();
        while let Some((key, value)) = items.item() {
            if let Some(record) = Record::decode(key, value) {
                self.latest.fetch_max(record.created, Ordering::Relaxed);
                contents.records.push(record);
            } else if let Some(legacy) = LegacyRecord::decode(key, value) {
                contents.legacy.push(legacy);
            } else if key != STORE_ID {
                contents.unreadable.push(key.into());
            }
            items.next();
        }
        items.status()?;
        Ok(contents)
    }

    /// A time for a new record. Later than every other one's, so that the newest of
    /// several copies of a chunk is known.
    pub(super) fn now(&self) -> u64 {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let clock = since.map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        });
        let later = |latest: u64| Some(clock.max(latest.saturating_add(1)));
        let latest = self
            .latest
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
        latest.ok().and_then(later).unwrap_or(clock)
    }

    /// Begins to commit a record, which survives a power cut once the wait for it is
    /// over. Records that are put at the same time share a sync.
    pub(super) fn put(&self, record: &Record) -> Committing {
        let (done, outcome) = mpsc::sync_channel(1);
        let commit = Commit {
            key: Record::key_of(&record.key, record.location),
            value: record.encode(),
            done,
        };
        if let Some(requests) = &self.committer.requests {
            // A thread that is gone says so when it is waited for.
            let _ = requests.send(commit);
        }
        Committing(outcome)
    }

    /// Removes a record. Without `sync` it may come back after a power cut, together
    /// with its frame or not, until [`settle`](Self::settle).
    pub(super) fn delete(&self, key: &[u8], sync: bool) -> Result<(), rocksdb::Error> {
        let deleted = self.db.delete_opt(key, &durable(sync));
        if !sync {
            self.removed.fetch_add(1, Ordering::SeqCst);
        }
        deleted
    }

    /// Whether every removal is durable. Waits for nobody.
    pub(super) fn is_settled(&self) -> bool {
        let removed = self.removed.load(Ordering::SeqCst);
        self.settled
            .try_lock()
            .is_ok_and(|settled| *settled >= removed)
    }

    /// Makes every removal durable.
    pub(super) fn settle(&self) -> Result<(), rocksdb::Error> {
        let removed = self.removed.load(Ordering::SeqCst);
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        if *settled < removed {
            self.db.flush_wal(true)?;
            *settled = removed;
        }
        Ok(())
    }

    /// Makes everything durable.
    pub(super) fn flush(&self) -> Result<(), rocksdb::Error> {
        self.db.flush_wal(true)
    }
}

/// A record on its way into the catalog.
#[derive(Debug)]
struct Commit {
    key: [u8; KEY_BYTES],
    value: Vec<u8>,
    done: SyncSender<Result<(), rocksdb::Error>>,
}

/// The outcome of a [`put`](Catalog::put), once there is one.
#[derive(Debug)]
#[must_use = "a record is not durable before"]
pub(super) struct Committing(Receiver<Result<(), rocksdb::Error>>);

impl Committing {
    /// Blocks.
    pub(super) fn wait(self) -> Result<(), DeviceError> {
        let outcome = self.0.recv().map_err(|_| DeviceError::Closed)?;
        Ok(outcome?)
    }
}

/// The thread that writes records.
#[derive(Debug)]
struct Committer {
    /// `None` only while being dropped.
    requests: Option<Sender<Commit>>,
    thread: Option<JoinHandle<()>>,
}

impl Committer {
    fn start(db: &Arc<DB>) -> io::Result<Self> {
        let (sender, requests) = mpsc::channel();
        let db = Arc::clone(db);
        let thread = thread::Builder::new()
            .name("kvasir-catalog".to_owned())
            .spawn(move || commit(&db, &requests))?;
        Ok(Self {
            requests: Some(sender),
            thread: Some(thread),
        })
    }
}

impl Drop for Committer {
    /// Waits for the thread, so that the database is closed when the catalog is gone.
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported where it happened, and every waiter knows.
            let _ = thread.join();
        }
    }
}

/// Writes what is asked for, with one sync for all that is there at the time.
fn commit(db: &DB, requests: &Receiver<Commit>) {
    while let Ok(first) = requests.recv() {
        let mut batch = WriteBatch::default();
        let mut waiting = Vec::new();
        for commit in iter::once(first).chain(requests.try_iter()) {
            batch.put(commit.key, commit.value);
            waiting.push(commit.done);
        }
        let outcome = db.write_opt(batch, &durable(true));
        for done in waiting {
            // Who stopped waiting finds out at the next start.
            let _ = done.send(outcome.clone());
        }
    }
}

fn durable(sync: bool) -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(sync);
    options
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (bytes, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*bytes)
}

const STORE_ID: &[u8] = b"store-id";
const READ_AHEAD_BYTES: usize = 2 << 20;
const VERSION: u8 = 2;
const KEY_BYTES: usize = 32 + 2 * 4;

#[cfg(test)]
mod tests {
    use kvasir_types::{DType, Planes};

    use super::*;

    fn record() -> Record {
        Record {
            key: ChunkKey::from_bytes([4; 32]),
            location: Location {
                segment: SegmentId(u32::MAX - 1),
                block: 77,
            },
            layout: KvLayout::new(3, 2, Planes::Single { dim: 5 }, 7, DType::F16).unwrap(),
            level: Level::RAW,
            object_bytes: 12345,
            created: 99,
            hints: Hints {
                parent: Some(ChunkKey::from_bytes([9; 32])),
                class: Class::new(3).unwrap(),
                recompute: NonZeroU32::new(1 << 20),
            },
        }
    }

    #[test]
    fn records_round_trip() {
        let record = record();
        let key = Record::key_of(&record.key, record.location);
        assert_eq!(Record::decode(&key, &record.encode()), Some(record));
        let plain = Record {
            hints: Hints::default(),
            ..record
        };
        assert_eq!(Record::decode(&key, &plain.encode()), Some(plain));
    }

    #[test]
    fn what_another_version_wrote_is_not_a_record() {
        let record = record();
        let (key, value) = (
            Record::key_of(&record.key, record.location),
            record.encode(),
        );
        for cut in 0..value.len() {
            let truncated = value.get(..cut).unwrap();
            // All but the parent, and no more than that, is a record without one.
            let whole = cut == value.len() - 32;
            assert_eq!(Record::decode(&key, truncated).is_some(), whole);
            assert_eq!(LegacyRecord::decode(&key, truncated), None);
        }
        let mut newer = value.clone();
        *newer.first_mut().unwrap() = 3;
        assert_eq!(Record::decode(&key, &newer), None);
        assert_eq!(Record::decode(b"short key", &value), None);
    }

    proptest::proptest! {
        /// What is close to a record is one, and then the one that it says, or none.
        #[test]
        fn no_bytes_are_too_strange_to_be_refused(
            at in 0..120usize,
            byte in proptest::num::u8::ANY,
            cut in 0..150usize,
            version in 0..4u8,
            tail in proptest::collection::vec(proptest::num::u8::ANY, 0..40),
        ) {
            let record = record();
            let mut key = Record::key_of(&record.key, record.location).to_vec();
            let mut value = record.encode();
            if let Some(first) = value.first_mut() {
                *first = version;
            }
            let split = key.len();
            if let Some(hit) = key.iter_mut().chain(&mut value).nth(at) {
                *hit = byte;
            }
            if cut < value.len() {
                value.truncate(cut);
                value.extend(&tail);
            }
            if let Some(record) = Record::decode(&key, &value) {
                assert_eq!(record.encode(), value);
                assert_eq!(Record::key_of(&record.key, record.location).as_slice(), key);
            }
            let _ = LegacyRecord::decode(key.get(..32).unwrap(), &value);
            let _ = LegacyRecord::decode(&tail, &value);
            key.truncate(at.min(split - 1));
            assert_eq!(Record::decode(&key, &value), None);
        }
    }

    #[test]
    fn records_of_version_1_are_read() {
        let key = ChunkKey::from_bytes([4; 32]);
        let mut value = vec![1, Level::RAW.code()];
        value.extend(record().layout.encode());
        value.extend(5u64.to_le_bytes());
        value.extend([0; 16]);
        let expected = LegacyRecord { key, generation: 5 };
        assert_eq!(LegacyRecord::decode(key.as_bytes(), &value), Some(expected));
        value.push(0);
        assert_eq!(LegacyRecord::decode(key.as_bytes(), &value), None);
    }

    #[test]
    fn a_new_record_is_later_than_every_other() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(directory.path()).unwrap();
        let first = catalog.now();
        assert!(catalog.now() > first);
        let created = u64::MAX - 7;
        let ahead = Record {
            created,
            ..record()
        };
        catalog.put(&ahead).wait().unwrap();
        catalog.contents().unwrap();
        assert_eq!([catalog.now(), catalog.now()], [created + 1, created + 2]);
    }

    #[test]
    fn removals_settle_once() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(directory.path()).unwrap();
        assert!(catalog.is_settled());
        catalog.delete(b"key", true).unwrap();
        assert!(catalog.is_settled());
        catalog.delete(b"key", false).unwrap();
        assert!(!catalog.is_settled());
        catalog.settle().unwrap();
        assert!(catalog.is_settled());
    }
}
