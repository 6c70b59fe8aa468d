//! Which chunk files are valid: a small RocksDB.
//!
//! The catalog is the commit point of the disk tier. A chunk exists once its
//! record is synced, and a file without a record is garbage. It holds no payload,
//! and is read once, at startup.
//!
//! Key: the chunk key. Value, little-endian: version `u8` = 1, level code `u8`,
//! layout (16), generation `u64`, object bytes `u64`, seconds since 1970 when
//! written `u64`.

#![deny(clippy::indexing_slicing)]

use std::path::Path;
use std::time::SystemTime;

use kvasir_types::{ChunkKey, KvLayout, Level};
use rocksdb::{DB, DBCompressionType, IteratorMode, LogLevel, Options, WriteOptions};

use crate::tier::Facts;

/// What the catalog keeps of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) facts: Facts,
    /// Tells this file from earlier and later ones of the same key.
    pub(super) generation: u64,
    /// Seconds since 1970.
    pub(super) created: u64,
}

impl Record {
    /// A record written now.
    pub(super) fn new(facts: Facts, generation: u64) -> Self {
        let created = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        Self {
            facts,
            generation,
            created,
        }
    }

    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut out = [0; RECORD_BYTES];
        let fields: [&[u8]; 6] = [
            &[RECORD_VERSION],
            &[self.facts.level.code()],
            &self.facts.layout.encode(),
            &self.generation.to_le_bytes(),
            &self.facts.bytes.to_le_bytes(),
            &self.created.to_le_bytes(),
        ];
        for (slot, byte) in out.iter_mut().zip(fields.into_iter().flatten()) {
            *slot = *byte;
        }
        out
    }

    /// `None` for what this version did not write.
    fn decode(key: &[u8], value: &[u8]) -> Option<Self> {
        let key = ChunkKey::from_bytes(key.try_into().ok()?);
        let mut rest = (value.len() == RECORD_BYTES).then_some(value)?;
        let [version] = take(&mut rest)?;
        let [level] = take(&mut rest)?;
        if version != RECORD_VERSION {
            return None;
        }
        let layout = KvLayout::decode(&take(&mut rest)?).ok()?;
        let generation = u64::from_le_bytes(take(&mut rest)?);
        let bytes = u64::from_le_bytes(take(&mut rest)?);
        let created = u64::from_le_bytes(take(&mut rest)?);
        Some(Self {
            facts: Facts {
                key,
                layout,
                layout_digest: layout.digest(),
                level: Level::from_code(level).ok()?,
                bytes,
            },
            generation,
            created,
        })
    }
}

/// What a catalog holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) records: Vec<Record>,
    /// Raw keys of entries that are no records.
    pub(super) unreadable: Vec<Box<[u8]>>,
}

/// The records of one directory.
#[derive(Debug)]
pub(super) struct Catalog {
    db: DB,
}

impl Catalog {
    /// Opens or creates the catalog in `path`.
    pub(super) fn open(path: &Path) -> Result<Self, rocksdb::Error> {
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
        Ok(Self {
            db: DB::open(&options, path)?,
        })
    }

    /// Everything in the catalog.
    pub(super) fn contents(&self) -> Result<Contents, rocksdb::Error> {
        let mut contents = Contents::default();
        for item in self.db.iterator(IteratorMode::Start) {
            let (key, value) = item?;
            match Record::decode(&key, &value) {
                Some(record) => contents.records.push(record),
                None => contents.unreadable.push(key),
            }
        }
        Ok(contents)
    }

    /// Commits a record; survives a power cut once this returns.
    pub(super) fn put(&self, record: &Record) -> Result<(), rocksdb::Error> {
        let key = record.facts.key;
        self.db
            .put_opt(key.as_bytes(), record.encode(), &durable(true))
    }

    /// Removes a record. Without `sync` it may come back after a power cut, and
    /// then is dropped at startup because its file is gone.
    pub(super) fn delete(&self, key: &[u8], sync: bool) -> Result<(), rocksdb::Error> {
        self.db.delete_opt(key, &durable(sync))
    }

    /// Makes everything durable.
    pub(super) fn flush(&self) -> Result<(), rocksdb::Error> {
        self.db.flush_wal(true)
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

const RECORD_VERSION: u8 = 1;
const RECORD_BYTES: usize = 2 + KvLayout::ENCODED_BYTES + 3 * 8;

#[cfg(test)]
mod tests {
    use kvasir_types::{DType, Planes};

    use super::*;

    fn record() -> Record {
        let layout = KvLayout::new(3, 2, Planes::Single { dim: 5 }, 7, DType::F16).unwrap();
        Record::new(
            Facts {
                key: ChunkKey::from_bytes([4; 32]),
                layout,
                layout_digest: layout.digest(),
                level: Level::RAW,
                bytes: 12345,
            },
            u64::MAX - 1,
        )
    }

    #[test]
    fn records_round_trip() {
        let record = record();
        let decoded = Record::decode(record.facts.key.as_bytes(), &record.encode());
        assert_eq!(decoded, Some(record));
    }

    #[test]
    fn what_another_version_wrote_is_not_a_record() {
        let record = record();
        let (key, value) = (record.facts.key, record.encode());
        for cut in 0..value.len() {
            let truncated = value.get(..cut).unwrap();
            assert_eq!(Record::decode(key.as_bytes(), truncated), None);
        }
        let mut newer = value;
        newer[0] = 2;
        assert_eq!(Record::decode(key.as_bytes(), &newer), None);
        assert_eq!(Record::decode(b"short key", &value), None);
    }
}
