//! Chunks where a stopped daemon keeps them, to be damaged.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use kvasir_codec::ObjectHeader;
use kvasir_types::ChunkKey;

/// Where a chunk lies in the segments of a stopped daemon.
#[derive(Debug)]
pub struct Frame {
    file: PathBuf,
    start: usize,
    len: usize,
}

impl Frame {
    /// That of `key`, in a daemon's data directory.
    ///
    /// # Panics
    /// When there is not exactly one.
    pub fn of(data: &Path, key: &ChunkKey) -> Self {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(data.join("segments")).unwrap() {
            let file = entry.unwrap().path();
            let bytes = std::fs::read(&file).unwrap();
            for start in (0..bytes.len()).step_by(BLOCK) {
                let Ok((header, _)) = ObjectHeader::parse(&bytes[start..]) else {
                    continue;
                };
                if header.key() == key {
                    let payload = header.payload_bytes();
                    let header = header.object_bytes() - payload;
                    let len = header.next_multiple_of(BLOCK as u64) + payload;
                    let len = usize::try_from(len).unwrap();
                    let file = file.clone();
                    found.push(Self { file, start, len });
                }
            }
        }
        assert_eq!(found.len(), 1, "frames of {key}");
        found.remove(0)
    }

    /// Its bytes.
    ///
    /// # Panics
    /// When its file cannot be read.
    pub fn read(&self) -> Vec<u8> {
        let bytes = std::fs::read(&self.file).unwrap();
        bytes[self.start..][..self.len].to_vec()
    }

    /// Writes over them.
    ///
    /// # Panics
    /// When its file cannot be written.
    pub fn write(&self, bytes: &[u8]) {
        let file = std::fs::File::options().write(true).open(&self.file);
        file.unwrap()
            .write_all_at(bytes, self.start as u64)
            .unwrap();
    }
}

const BLOCK: usize = 4096;
