//! `[store]` in `kvasird.toml`.

use std::path::PathBuf;
use std::time::Duration;

use kvasir_types::{ByteSize, Class};
use serde::{Deserialize, Serialize};

use crate::policy::{Admission, ClassLimits, PolicyKind};

/// The store's tiers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct StoreConfig {
    /// Host memory. Default: 1 GiB.
    pub memory: MemoryConfig,
    /// A directory that makes chunks survive restarts. Default: none; chunks live
    /// in memory only.
    pub disk: Option<DiskConfig>,
    /// What chunks may be encoded with.
    pub profiles: ProfilesConfig,
    /// What classes of traffic may keep. Default: no limits.
    pub class: Vec<ClassConfig>,
}

/// `[[store.class]]`: limits of one class of traffic, in every tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ClassConfig {
    /// The class, 0 to 15. Chunks are of class 0 unless their writer says otherwise.
    pub number: Class,
    /// Seconds since the last use after which the class's chunks go first when room is
    /// needed. Default: none.
    #[serde(default)]
    pub time_to_live_s: Option<u64>,
    /// Bytes of a tier above which the class's chunks go before those of others.
    /// Default: none.
    #[serde(default)]
    pub quota: Option<ByteSize>,
}

impl ClassConfig {
    pub(crate) fn limits(&self) -> ClassLimits {
        ClassLimits {
            time_to_live: self.time_to_live_s.map(Duration::from_secs),
            quota_bytes: self.quota.map(ByteSize::as_u64),
        }
    }
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
    /// Which chunks go first. Default: `reuse`.
    pub policy: PolicyKind,
    /// Whether payload lies where other processes of the host can be allowed to read it.
    /// Default: false.
    #[serde(skip)]
    pub shared: bool,
}

impl MemoryConfig {
    /// 1 GiB.
    pub const CAPACITY: ByteSize = ByteSize::gib(1);

    /// A tier of `capacity`, everything else at its default.
    pub fn with_capacity(capacity: ByteSize) -> Self {
        Self {
            capacity,
            pin_limit: None,
            policy: PolicyKind::default(),
            shared: false,
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// The directory; created where missing, used by one daemon at a time.
    /// Default: [`Self::PATH`], in the working directory.
    pub path: PathBuf,
    /// Bytes of chunks, rounded up to blocks, those that readers still hold included.
    /// Never exceeded by chunks; the catalog adds a few hundred bytes per chunk, and
    /// every segment file 4 KiB. The space of chunks that were deleted or evicted is kept
    /// for the next ones, and given back to the file system at the next start. Where the file system fills up before, chunks are
    /// evicted as if this were less. Default: [`Self::CAPACITY`].
    pub capacity: ByteSize,
    /// Most bytes that pins may exempt from eviction. Default: half of `capacity`.
    pub pin_limit: Option<ByteSize>,
    /// Which chunks go first. Default: `reuse`.
    pub policy: PolicyKind,
    /// Which chunks that were put into memory alone are written to disk before memory
    /// evicts them: `"all"`, `"second-use"`, or `{ min-reuse = 0.05 }`, those that are
    /// used again with at least this probability. Default: the latter.
    pub admission: Admission,
    /// Reads and writes in progress at once; each occupies a thread. More wait.
    /// Default: [`Self::IO_DEPTH`]. Minimum: 1.
    pub io_depth: u16,
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
            policy: PolicyKind::default(),
            admission: Admission::default(),
            io_depth: Self::IO_DEPTH,
        }
    }
}

/// `[store.profiles]`: codec profiles, on disk where there is a disk tier, else in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ProfilesConfig {
    /// Bytes of profiles, beside the capacity of chunks on disk, but part of that in memory.
    /// None is ever evicted: when they are spent, more are refused. Default:
    /// [`Self::CAPACITY`] on disk, [`Self::MEMORY_CAPACITY`] in memory, there at most a
    /// quarter of the memory tier.
    pub capacity: Option<ByteSize>,
}

impl ProfilesConfig {
    /// 1 GiB.
    pub const CAPACITY: ByteSize = ByteSize::gib(1);
    /// 256 MiB.
    pub const MEMORY_CAPACITY: ByteSize = ByteSize::mib(256);

    pub(crate) fn capacity_bytes(&self, memory: u64, on_disk: bool) -> u64 {
        let default = match on_disk {
            true => Self::CAPACITY.as_u64(),
            false => Self::MEMORY_CAPACITY.as_u64().min(memory / 4),
        };
        self.capacity.map_or(default, ByteSize::as_u64)
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
            "disk": {"path": "/tmp/x", "io-depth": 4, "policy": "s3-fifo",
                "admission": {"min-reuse": 0.25}},
            "class": [{"number": 3, "time-to-live-s": 60}]}"#;
        let config: StoreConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.memory.pin_limit_bytes(), 8 << 20);
        let disk = config.disk.unwrap();
        assert_eq!(disk.capacity, DiskConfig::CAPACITY);
        assert_eq!(disk.policy, PolicyKind::S3Fifo);
        assert_eq!(disk.pin_limit_bytes(), 8 << 30);
        assert_eq!(disk.admission, Admission::MinReuse(0.25));
        let limits = config.class[0].limits();
        assert_eq!(limits.time_to_live, Some(Duration::from_secs(60)));
        assert_eq!(limits.quota_bytes, None);

        let profiles = ProfilesConfig::default();
        assert_eq!(profiles.capacity_bytes(1 << 30, true), 1 << 30);
        assert_eq!(profiles.capacity_bytes(1 << 30, false), 256 << 20);
        assert_eq!(profiles.capacity_bytes(1 << 20, false), 256 << 10);

        for wrong in [r#"{"memroy": {}}"#, r#"{"class": [{"number": 16}]}"#] {
            assert!(serde_json::from_str::<StoreConfig>(wrong).is_err());
        }
    }
}
