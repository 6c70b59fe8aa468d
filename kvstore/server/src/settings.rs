//! `kvasird.toml`.

use std::env;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use kvasir_store::policy::{Admission, PolicyKind};
use kvasir_store::{ClassConfig, DiskConfig, MemoryConfig, ProfilesConfig, StoreConfig};
use kvasir_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::config::{Limits, QuicSettings, RdmaSettings, ServerConfig, SharedMemorySettings};

/// The whole of `kvasird.toml`. Everything has a default, so that the daemon starts
/// without any.
///
/// ```
/// use kvasir_server::DaemonConfig;
///
/// let text = r#"
///     listen = "0.0.0.0:7420"
///     data-dir = "/var/lib/kvasir"
///
///     [memory]
///     capacity = "8GiB"
///
///     [disk]
///     capacity = "200GB"
///
///     [limits]
///     data-streams = 128
/// "#;
/// let config = DaemonConfig::parse(text)?;
/// assert_eq!(config.limits.data_streams, 128);
/// # Ok::<(), kvasir_server::SettingsError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct DaemonConfig {
    /// Address and port to listen on; port 0 takes a free one. Control calls have no
    /// authentication: expose it to trusted networks only.
    /// Default: `127.0.0.1:7420`.
    pub listen: SocketAddr,
    /// Directory of chunks on disk; created where missing, used by one daemon at a
    /// time. Default: `$XDG_DATA_HOME/kvasir`, else `~/.local/share/kvasir`.
    pub data_dir: Option<PathBuf>,
    /// Chunks in memory.
    pub memory: MemoryConfig,
    /// Chunks on disk.
    pub disk: DiskSettings,
    /// What chunks may be encoded with.
    pub profiles: ProfilesConfig,
    /// What classes of traffic may keep. Default: no limits.
    pub class: Vec<ClassConfig>,
    /// What bounds the load.
    pub limits: Limits,
    /// The data plane over QUIC.
    pub quic: QuicSettings,
    /// The data plane on one host.
    pub shared_memory: SharedMemorySettings,
    /// The data plane by one-sided reads.
    pub rdma: RdmaSettings,
}

/// `[disk]` in `kvasird.toml`: chunks in the data directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskSettings {
    /// Whether to store on disk at all. Without it no chunk survives a restart.
    /// Default: true.
    pub enabled: bool,
    /// Bytes of chunks. Default: [`DiskConfig::CAPACITY`], 16 GiB.
    pub capacity: ByteSize,
    /// Most bytes that pins may exempt from eviction. Default: half of `capacity`.
    pub pin_limit: Option<ByteSize>,
    /// Which chunks go first. Default: `reuse`.
    pub policy: PolicyKind,
    /// Which chunks that were put into memory alone are written to disk before memory
    /// evicts them: `"all"`, `"second-use"`, or `{ min-reuse = 0.05 }`, those that are
    /// used again with at least this probability. Default: the latter.
    pub admission: Admission,
    /// Reads and writes in progress at once. Default: [`DiskConfig::IO_DEPTH`], 32.
    pub io_depth: u16,
}

impl Default for DiskSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            capacity: DiskConfig::CAPACITY,
            pin_limit: None,
            policy: PolicyKind::default(),
            admission: Admission::default(),
            io_depth: DiskConfig::IO_DEPTH,
        }
    }
}

impl Default for DaemonConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, ServerConfig::PORT)),
            data_dir: None,
            memory: MemoryConfig::default(),
            disk: DiskSettings::default(),
            profiles: ProfilesConfig::default(),
            class: Vec::new(),
            limits: Limits::default(),
            quic: QuicSettings::default(),
            shared_memory: SharedMemorySettings::default(),
            rdma: RdmaSettings::default(),
        }
    }
}

/// Why there is no configuration to start with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read {path}; check the path given by --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The file's text is not a configuration.
    #[error("{}not a valid configuration", path.as_ref().map(|path| format!("{}: ", path.display())).unwrap_or_default())]
    Parse {
        /// The file, if the text is from one.
        path: Option<PathBuf>,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Nothing says where data belong.
    #[error(
        "neither XDG_DATA_HOME nor HOME is set; say where data belong with --data-dir DIR, or keep them in memory with --no-disk"
    )]
    NoDataDir,
}

impl DaemonConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is not a configuration.
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let text = fs::read_to_string(path).map_err(|source| SettingsError::Read {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|source| SettingsError::Parse {
            path: Some(path.to_owned()),
            source: Box::new(source),
        })
    }

    /// Reads a configuration from text.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self, SettingsError> {
        toml::from_str(text).map_err(|source| SettingsError::Parse {
            path: None,
            source: Box::new(source),
        })
    }

    /// The configured directory, or the default of this user.
    ///
    /// # Errors
    /// Neither is known.
    pub fn data_dir(&self) -> Result<PathBuf, SettingsError> {
        if let Some(path) = &self.data_dir {
            return Ok(path.clone());
        }
        let variable = |name| env::var_os(name).filter(|value| !value.is_empty());
        let base = match (variable("XDG_DATA_HOME"), variable("HOME")) {
            (Some(data), _) => PathBuf::from(data),
            (None, Some(home)) => PathBuf::from(home).join(".local/share"),
            (None, None) => return Err(SettingsError::NoDataDir),
        };
        Ok(base.join("kvasir"))
    }

    /// What a server needs of it.
    ///
    /// # Errors
    /// No data directory is known.
    pub fn server(&self) -> Result<ServerConfig, SettingsError> {
        let disk = if self.disk.enabled {
            Some(DiskConfig {
                path: self.data_dir()?,
                capacity: self.disk.capacity,
                pin_limit: self.disk.pin_limit,
                policy: self.disk.policy,
                admission: self.disk.admission,
                io_depth: self.disk.io_depth,
            })
        } else {
            None
        };
        Ok(ServerConfig {
            listen: self.listen,
            store: StoreConfig {
                memory: self.memory.clone(),
                disk,
                profiles: self.profiles,
                class: self.class.clone(),
            },
            limits: self.limits.clone(),
            quic: self.quic.clone(),
            shared_memory: self.shared_memory.clone(),
            rdma: self.rdma.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_required() {
        let config = DaemonConfig::parse("").unwrap();
        assert_eq!(config, DaemonConfig::default());
        assert_eq!(config.listen.port(), 7420);
    }

    /// The shipped example states every default as it is.
    #[test]
    fn the_example_is_the_default() {
        let example = include_str!("../../../deploy/kvasird.toml");
        assert_eq!(
            DaemonConfig::parse(example).unwrap(),
            DaemonConfig::default()
        );
    }

    #[test]
    fn a_config_survives_writing_and_reading() {
        let text = "[disk]\nenabled = false\n[limits]\nwindow = \"1MiB\"\n";
        let config = DaemonConfig::parse(text).unwrap();
        assert!(config.server().unwrap().store.disk.is_none());
        assert_eq!(config.limits.window_bytes(), 1 << 20);
    }

    #[test]
    fn unknown_names_are_refused() {
        for text in ["lissten = 1", "[memory]\ncapacityy = 1", "[limits]\nx = 1"] {
            let error = DaemonConfig::parse(text).unwrap_err();
            let SettingsError::Parse { source, .. } = error else {
                panic!("{error}");
            };
            assert!(source.to_string().contains("unknown field"), "{source}");
        }
    }
}
