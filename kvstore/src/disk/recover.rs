//! Startup: makes catalog and files agree, one chunk at a time.
//!
//! A crash can leave temporary files, whole files whose record was never synced,
//! and records whose file is gone. Each is dropped by itself; the rest of the
//! index stays. Files under other names are left alone.

use std::collections::HashMap;
use std::fs;

use kvasir_types::ChunkKey;

use super::catalog::{Catalog, Contents, Record};
use super::files::{ChunkFiles, Name, remove_if_there};
use crate::tier::DeviceError;

/// What a directory holds.
#[derive(Debug)]
pub(super) struct Recovered {
    /// Chunks whose file is there with the right size, oldest first.
    pub(super) records: Vec<Record>,
    /// Greater than any generation in use.
    pub(super) next_generation: u64,
    pub(super) swept: Swept,
}

/// What was dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Swept {
    /// Files of writes that never finished.
    pub(super) temporary: u64,
    /// Whole files without a record.
    pub(super) orphans: u64,
    /// Records without a file, with one of another size, or unreadable.
    pub(super) records: u64,
}

pub(super) fn recover(catalog: &Catalog, files: &ChunkFiles) -> Result<Recovered, DeviceError> {
    let Contents {
        records,
        unreadable,
    } = catalog.contents()?;
    let mut swept = Swept::default();
    for key in unreadable {
        catalog.delete(&key, false)?;
        swept.records += 1;
    }
    let mut missing: HashMap<ChunkKey, Record> = records
        .into_iter()
        .map(|record| (record.facts.key, record))
        .collect();
    let mut found = Vec::with_capacity(missing.len());
    let mut newest = missing
        .values()
        .map(|record| record.generation)
        .max()
        .unwrap_or(0);

    for first_byte in 0..=u8::MAX {
        for item in fs::read_dir(files.directory(first_byte))? {
            let item = item?;
            let Some(name) = item.file_name().to_str().and_then(Name::parse) else {
                continue;
            };
            if !item.file_type()?.is_file() {
                continue;
            }
            let Name::Chunk { key, generation } = name else {
                remove_if_there(&item.path())?;
                swept.temporary += 1;
                continue;
            };
            if item.path() != files.path(&key, generation) {
                continue;
            }
            newest = newest.max(generation);
            let recorded = missing
                .get(&key)
                .filter(|record| record.generation == generation)
                .copied();
            match recorded {
                Some(record) if item.metadata()?.len() == record.facts.bytes => {
                    missing.remove(&key);
                    found.push(record);
                }
                // Its record stays in `missing`, and goes with the others.
                Some(_) => remove_if_there(&item.path())?,
                None => {
                    remove_if_there(&item.path())?;
                    swept.orphans += 1;
                }
            }
        }
    }
    for key in missing.keys() {
        catalog.delete(key.as_bytes(), false)?;
        swept.records += 1;
    }
    found.sort_unstable_by_key(|record| record.generation);
    Ok(Recovered {
        records: found,
        next_generation: newest.saturating_add(1),
        swept,
    })
}
