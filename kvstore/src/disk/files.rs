//! Chunk files: one object per file, in 256 directories by the key's first byte.
//!
//! ```text
//! chunks/ab/ab…64 digits…-0123456789abcdef.chunk   a whole, synced object
//! chunks/ab/ab…64 digits…-0123456789abcdef.tmp     one being written
//! ```
//!
//! The second number is the generation. No name is ever used twice, so removing an
//! old copy of a key cannot touch a new one. A file is written under its temporary
//! name, synced, renamed, and then its directory is synced.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use kvasir_types::ChunkKey;
use rustix::buffer::spare_capacity;
use rustix::fs::{Advice, fadvise};

/// The chunk files of one directory.
#[derive(Debug)]
pub(super) struct ChunkFiles {
    root: PathBuf,
    drop_page_cache: bool,
}

/// What a name in a chunk directory means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Chunk { key: ChunkKey, generation: u64 },
    Temporary,
}

impl Name {
    /// `None` for names that this tier does not give.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let (stem, extension) = name.rsplit_once('.')?;
        let (key, generation) = stem.split_once('-')?;
        let key: ChunkKey = key.parse().ok()?;
        let generation = u64::from_str_radix(generation, 16).ok()?;
        // Other spellings of the same numbers are not ours.
        if stem != stem_of(&key, generation) {
            return None;
        }
        match extension {
            CHUNK => Some(Self::Chunk { key, generation }),
            TEMPORARY => Some(Self::Temporary),
            _ => None,
        }
    }
}

/// An object that is whole and synced, under its temporary name. Dropping it
/// unpublished deletes the file.
#[derive(Debug)]
pub(super) struct Unpublished {
    temporary: PathBuf,
    path: PathBuf,
    published: bool,
}

impl Unpublished {
    /// Gives the file its final name, durably.
    pub(super) fn publish(mut self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.path)?;
        self.published = true;
        match self.path.parent() {
            Some(directory) => sync_directory(directory),
            None => Ok(()),
        }
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        if !self.published {
            // The next start sweeps what stays behind.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

impl ChunkFiles {
    /// The chunk files under `root`, whose directories are created where missing.
    pub(super) fn open(root: PathBuf, drop_page_cache: bool) -> io::Result<Self> {
        create_directory(&root)?;
        let files = Self {
            root,
            drop_page_cache,
        };
        for first_byte in 0..=u8::MAX {
            match fs::create_dir(files.directory(first_byte)) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => (),
            }
        }
        sync_directory(&files.root)?;
        Ok(files)
    }

    /// The directory of keys that start with this byte.
    pub(super) fn directory(&self, first_byte: u8) -> PathBuf {
        self.root.join(format!("{first_byte:02x}"))
    }

    /// Where a chunk's file lies.
    pub(super) fn path(&self, key: &ChunkKey, generation: u64) -> PathBuf {
        let [first_byte, ..] = *key.as_bytes();
        self.directory(first_byte)
            .join(format!("{}.{CHUNK}", stem_of(key, generation)))
    }

    /// Writes and syncs an object. Not visible until it is published.
    pub(super) fn write(
        &self,
        key: &ChunkKey,
        generation: u64,
        header: &[u8],
        layers: &[Bytes],
    ) -> io::Result<Unpublished> {
        let path = self.path(key, generation);
        let unpublished = Unpublished {
            temporary: path.with_extension(TEMPORARY),
            path,
            published: false,
        };
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&unpublished.temporary)?;
        file.write_all(header)?;
        for layer in layers {
            file.write_all(layer)?;
        }
        // After a failed sync the pages count as clean, and a second sync would
        // succeed without writing them ("Can Applications Recover from fsync
        // Failures?", USENIX ATC 2020). So a failure abandons the file.
        file.sync_all()?;
        self.finished(&file);
        Ok(unpublished)
    }

    pub(super) fn reader(&self, key: &ChunkKey, generation: u64) -> io::Result<File> {
        File::open(self.path(key, generation))
    }

    pub(super) fn remove(&self, key: &ChunkKey, generation: u64) -> io::Result<()> {
        remove_if_there(&self.path(key, generation))
    }

    /// Reads `len` bytes at `offset`, or as many as the file has.
    pub(super) fn read(&self, file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = offset + bytes.len() as u64;
            match rustix::io::pread(file, spare_capacity(&mut bytes), at) {
                Ok(0) => break,
                Ok(_) | Err(rustix::io::Errno::INTR) => (),
                Err(error) => return Err(error.into()),
            }
        }
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Called after a file was written or read.
    pub(super) fn finished(&self, file: &File) {
        if self.drop_page_cache {
            // Advice: a kernel that ignores it costs a benchmark, not a chunk.
            let _ = fadvise(file, 0, None, Advice::DontNeed);
        }
    }
}

pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Creates a directory, and its parents where missing, durably.
pub(super) fn create_directory(path: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = path.ancestors().take_while(|path| !path.is_dir()).collect();
    fs::create_dir_all(path)?;
    for created in missing {
        match created.parent() {
            Some(parent) if parent == Path::new("") => sync_directory(Path::new("."))?,
            Some(parent) => sync_directory(parent)?,
            None => (),
        }
    }
    Ok(())
}

pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn stem_of(key: &ChunkKey, generation: u64) -> String {
    format!("{key}-{generation:016x}")
}

const CHUNK: &str = "chunk";
const TEMPORARY: &str = "tmp";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_created_with_their_parents() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("a/b/c");
        create_directory(&path).unwrap();
        assert!(path.is_dir());
        create_directory(&path).unwrap();
    }

    #[test]
    fn names_round_trip_and_foreign_ones_are_not_ours() {
        let key = ChunkKey::from_bytes([0xab; 32]);
        let stem = stem_of(&key, 77);
        let chunk = Name::Chunk {
            key,
            generation: 77,
        };
        assert_eq!(Name::parse(&format!("{stem}.chunk")), Some(chunk));
        assert_eq!(Name::parse(&format!("{stem}.tmp")), Some(Name::Temporary));
        let upper = format!("{}.chunk", stem.to_uppercase());
        for foreign in ["notes.txt", "x-1.tmp", "lost+found", ".tmp", &upper, &stem] {
            assert_eq!(Name::parse(foreign), None, "{foreign}");
        }
    }
}
