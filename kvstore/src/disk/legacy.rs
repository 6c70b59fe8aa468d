//! Directories of version 1, which had a file for every chunk:
//! `chunks/ab/ab…64 digits…-0123456789abcdef.chunk`, the second number being the
//! generation of the catalog record. Their chunks move into segments when the
//! directory is opened.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use kvasir_codec::Object;
use kvasir_types::ChunkKey;

use super::catalog::LegacyRecord;

const ROOT: &str = "chunks";

/// The object of a record; `None` where its file is missing or not whole.
pub(super) fn read(directory: &Path, record: &LegacyRecord) -> Option<Object> {
    let bytes = fs::read(path_of(directory, record)).ok()?;
    let object = Object::parse(&Bytes::from(bytes)).ok()?;
    (object.header().key() == &record.key).then_some(object)
}

/// Deletes the file of a record.
pub(super) fn remove(directory: &Path, record: &LegacyRecord) -> io::Result<()> {
    match fs::remove_file(path_of(directory, record)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Deletes what files and folders version 1 left, and nothing else.
pub(super) fn sweep(directory: &Path) -> io::Result<()> {
    let root = directory.join(ROOT);
    if !root.is_dir() {
        return Ok(());
    }
    for first_byte in 0..=u8::MAX {
        let folder = root.join(format!("{first_byte:02x}"));
        let Ok(items) = fs::read_dir(&folder) else {
            continue;
        };
        for item in items {
            let path = item?.path();
            if is_ours(&path) {
                fs::remove_file(path)?;
            }
        }
        // Folders that hold something else stay.
        let _ = fs::remove_dir(folder);
    }
    let _ = fs::remove_dir(root);
    Ok(())
}

fn path_of(directory: &Path, record: &LegacyRecord) -> PathBuf {
    let LegacyRecord { key, generation } = record;
    let [first_byte, ..] = *key.as_bytes();
    let folder = directory.join(ROOT).join(format!("{first_byte:02x}"));
    folder.join(format!("{key}-{generation:016x}.chunk"))
}

fn is_ours(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    let Some((key, generation)) = stem.and_then(|stem| stem.split_once('-')) else {
        return false;
    };
    matches!(extension, Some("chunk" | "tmp"))
        && path.is_file()
        && key.parse::<ChunkKey>().is_ok()
        && u64::from_str_radix(generation, 16).is_ok()
}
