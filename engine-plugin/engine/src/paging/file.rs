//! Where pieces are that are not in memory.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, OFlags, StatxFlags, statx};
use rustix::io::{Errno, preadv};

use super::PagingError;

/// What direct I/O asks of addresses, lengths and offsets, at most: the largest logical block in use.
pub const SECTOR_BYTES: usize = 4096;

/// Bytes outside memory, which nobody needs once the pool is gone. [`ScratchFile`] is the real
/// one; others exist to make I/O fail.
///
/// # Contract
/// - Offsets, lengths and addresses are multiples of [`Self::sector_bytes`].
/// - Reads and writes may be short; zero bytes read means the end of the file.
/// - After a write that succeeded, reads see it. Ranges never written are never read.
/// - Many threads call at once. Writes do not overlap then; what is read while it is written may
///   be anything, and is not used.
/// - Calls may take any time: nobody waits for them for ever.
pub trait Backing: Send + Sync + fmt::Debug {
    /// What offsets, lengths and addresses have to be multiples of: a power of two, at most
    /// [`SECTOR_BYTES`], which is the default.
    fn sector_bytes(&self) -> usize {
        SECTOR_BYTES
    }

    /// Prepares for `bytes` bytes, of which none need be reserved.
    ///
    /// # Errors
    /// The device failed, or cannot hold so many.
    fn prepare(&self, bytes: u64) -> io::Result<()>;

    /// Reads at `offset`.
    ///
    /// # Errors
    /// The device failed.
    fn read_at(&self, into: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize>;

    /// Writes at `offset`.
    ///
    /// # Errors
    /// The device failed or is full.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;
}

/// A file without a name: its space is given back when it is dropped, be it by `kill -9`.
///
/// Opened with `O_DIRECT`, so that pages are not in memory a second time as page cache.
#[derive(Debug)]
pub struct ScratchFile {
    file: File,
    direct: bool,
    sector_bytes: usize,
}

impl ScratchFile {
    /// A file in `directory`, which must exist. A file system without direct I/O gives an
    /// ordinary file, and a line in the log.
    ///
    /// # Errors
    /// [`PagingError::Create`].
    pub fn create(directory: &Path) -> Result<Self, PagingError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!(".kvasir-kv-{}-{number}", std::process::id());
        let path = directory.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let direct = OFlags::DIRECT.bits().cast_signed();
        let opened = match options.clone().custom_flags(direct).open(&path) {
            // A file system without direct I/O says so here. The file may have been made.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                tracing::warn!(
                    directory = %directory.display(),
                    "pages go through the page cache: the file system has no direct I/O"
                );
                let options = options.create_new(false).create(true);
                options.open(&path).map(|file| (file, false))
            }
            opened => opened.map(|file| (file, true)),
        };
        let made = opened.and_then(|opened| fs::remove_file(&path).map(|()| opened));
        let (file, direct) = made.map_err(|error| PagingError::Create(errno(&error)))?;
        let sector_bytes = if direct {
            direct_sector_bytes(&file)
        } else {
            SMALLEST_SECTOR_BYTES
        };
        Ok(Self {
            file,
            direct,
            sector_bytes,
        })
    }

    /// Whether reads and writes go past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }
}

/// What direct I/O asks for, if the file system says so (Linux 6.1), and what does everywhere if
/// not.
fn direct_sector_bytes(file: &File) -> usize {
    let Ok(found) = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else {
        return SECTOR_BYTES;
    };
    let bytes = found.stx_dio_mem_align.max(found.stx_dio_offset_align);
    let says = found.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    match usize::try_from(bytes) {
        Ok(bytes) if says && bytes.is_power_of_two() => {
            bytes.clamp(SMALLEST_SECTOR_BYTES, SECTOR_BYTES)
        }
        _ => SECTOR_BYTES,
    }
}

const SMALLEST_SECTOR_BYTES: usize = 512;

impl Backing for ScratchFile {
    fn sector_bytes(&self) -> usize {
        self.sector_bytes
    }

    fn prepare(&self, bytes: u64) -> io::Result<()> {
        // Writes past the end of a file take turns, those inside do not.
        self.file.set_len(bytes)
    }

    fn read_at(&self, into: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        Ok(preadv(&self.file, into, offset)?)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.file.write_at(bytes, offset)
    }
}

/// Fills all of `into`.
pub(super) fn read_full(
    file: &dyn Backing,
    mut into: &mut [IoSliceMut<'_>],
    mut offset: u64,
) -> Result<(), Errno> {
    while !into.is_empty() {
        match file.read_at(into, offset) {
            // The file is shorter than what was written to it.
            Ok(0) => return Err(Errno::IO),
            Ok(read) => {
                offset += read as u64;
                IoSliceMut::advance_slices(&mut into, read);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(errno(&error)),
        }
    }
    Ok(())
}

/// Writes all of `bytes`.
pub(super) fn write_full(
    file: &dyn Backing,
    mut bytes: &[u8],
    mut offset: u64,
) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match file.write_at(bytes, offset) {
            Ok(0) => return Err(Errno::NOSPC),
            Ok(written) => {
                offset += written as u64;
                bytes = bytes.get(written..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(errno(&error)),
        }
    }
    Ok(())
}

/// The system's number for an error; an I/O error where it has none.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
