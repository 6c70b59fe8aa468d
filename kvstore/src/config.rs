//! `[store]` in `kvasird.toml`.

use std::path::PathBuf;

use kvasir_types::ByteSize;
use serde::{Deserialize, Serialize};

/// The store's tiers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct StoreConfig {
    /// Host memory. Default: 1 GiB.
    pub memory: MemoryConfig,
    /// A directory that makes chunks survive restarts. Default: none; chunks live
    /// in memory only.
    pub disk: Option<DiskConfig>,
}

/// `[store.memory]`: chunks in host memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MemoryConfig {
    /// Bytes of chunks, their index entries, and the buffers of reads and writes in
    /// flight, together. Never exceeded. Default: [`Self::CAPACITY`].
    pub capacity: ByteSize,
    /// Most bytes that pins may exempt from eviction. Default: half of `capacity`.
    pub pin_limit: Option<ByteSize>,
}

impl MemoryConfig {
    /// 1 GiB.
    pub const CAPACITY: ByteSize = ByteSize::gib(1);

    /// A tier of `capacity`, everything else at its default.
    pub fn with_capacity(capacity: ByteSize) -> Self {
        Self {
            capacity,
            pin_limit: None,
        }
    }

    pub(crate) fn pin_limit_bytes(&self) -> u64 {
        self.pin_limit
            .map_or(self.capacity.as_u64() / 2, ByteSize::as_u64)
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self::with_capacity(Self::CAPACITY)
    }
}

/// `[store.disk]`: chunks in a directory of a local file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// The directory; created where missing, used by one daemon at a time.
    /// Default: [`Self::PATH`], in the working directory.
    pub path: PathBuf,
    /// Bytes of chunk files, rounded up to file-system blocks, files that readers
    /// still hold open included. Never exceeded by chunks; the catalog adds a few
    /// hundred bytes per chunk. Where the file system fills up before, chunks are
    /// evicted as if this were less. Default: [`Self::CAPACITY`].
    pub capacity: ByteSize,
    /// Most bytes that pins may exempt from eviction. Default: half of `capacity`.
    pub pin_limit: Option<ByteSize>,
    /// Reads and writes in progress at once; each occupies a thread. More wait.
    /// Default: [`Self::IO_DEPTH`]. Minimum: 1.
    pub io_depth: u16,
    /// Drops chunk files from the page cache after every write and read, so that a
    /// benchmark measures the device. Default: false.
    pub drop_page_cache: bool,
}

impl DiskConfig {
    /// `kvasir-data`.
    pub const PATH: &str = "kvasir-data";
    /// 16 GiB.
    pub const CAPACITY: ByteSize = ByteSize::gib(16);
    /// 32.
    pub const IO_DEPTH: u16 = 32;

    /// A tier in `path`, everything else at its default.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            ..Self::default()
        }
    }

    pub(crate) fn pin_limit_bytes(&self) -> u64 {
        self.pin_limit
            .map_or(self.capacity.as_u64() / 2, ByteSize::as_u64)
    }
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: Self::PATH.into(),
            capacity: Self::CAPACITY,
            pin_limit: None,
            io_depth: Self::IO_DEPTH,
            drop_page_cache: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_names_are_those_of_the_documentation() {
        let empty: StoreConfig = serde_json::from_str("{}").unwrap();
        assert_eq!(empty, StoreConfig::default());
        assert_eq!(empty.memory.capacity, ByteSize::gib(1));

        let text = r#"{"memory": {"capacity": "64MiB", "pin-limit": "8MiB"},
            "disk": {"path": "/tmp/x", "io-depth": 4, "drop-page-cache": true}}"#;
        let config: StoreConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.memory.pin_limit_bytes(), 8 << 20);
        let disk = config.disk.unwrap();
        assert_eq!(disk.capacity, DiskConfig::CAPACITY);
        assert_eq!(disk.pin_limit_bytes(), 8 << 30);

        assert!(serde_json::from_str::<StoreConfig>(r#"{"memroy": {}}"#).is_err());
    }
}
