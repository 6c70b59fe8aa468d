//! Where the disk part of the suite lies.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use rustix::fs::{Mode, OFlags};
use tempfile::TempDir;

/// A directory on a device that can be read past the page cache. Deleted when dropped.
pub(super) struct Workspace(TempDir);

impl Workspace {
    /// A new directory in `parent`, or where build outputs lie.
    ///
    /// # Errors
    /// It lies in memory, or `O_DIRECT` does not work there.
    pub(super) fn create(parent: Option<&Path>) -> anyhow::Result<Self> {
        let parent = match parent {
            Some(parent) => parent.to_owned(),
            None => Some(PathBuf::from("target"))
                .filter(|target| target.is_dir())
                .unwrap_or_else(|| ".".into()),
        };
        let dir = tempfile::Builder::new()
            .prefix("kvasir-bench-store-")
            .tempdir_in(&parent)
            .with_context(|| format!("cannot create a directory in {}", parent.display()))?;
        check_device(dir.path())
            .with_context(|| format!("cannot measure a disk in {}", parent.display()))
            .context("choose a directory of a local file system with --dir DIR")?;
        Ok(Self(dir))
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }
}

fn check_device(dir: &Path) -> anyhow::Result<()> {
    let kind = rustix::fs::fstatfs(File::open(dir)?)?.f_type;
    // tmpfs accepts O_DIRECT, and ignores it.
    ensure!(
        !MEMORY_FILE_SYSTEMS.contains(&kind),
        "it is a file system in memory"
    );
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(dir.join("direct"), flags, Mode::RUSR | Mode::WUSR)
        .context("a file cannot be opened with O_DIRECT")?;
    Ok(())
}

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of `linux/magic.h`.
const MEMORY_FILE_SYSTEMS: [rustix::fs::FsWord; 2] = [0x0102_1994, 0x8584_58f6];
