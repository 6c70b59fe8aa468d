//! Where segment files lie, and what the disk tier asks of it.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

/// A file system, as the disk tier uses it for segments. [`DirectIo`] is the real one;
/// others exist to make I/O fail.
///
/// # Contract
/// - Offsets, lengths and addresses of reads and writes are multiples of 4096.
/// - Reads and writes may be short; zero bytes read means the end of the file.
/// - Bytes written before a successful [`sync`](MediumFile::sync) survive a power cut
///   once it returned; of what was written after it, any 512-byte sectors may. After
///   a failed sync nothing is known of what was written since the last one.
/// - A name survives a power cut after [`sync_directory`](Self::sync_directory).
pub trait Medium: Send + Sync + fmt::Debug {
    /// Creates a file that must not exist.
    ///
    /// # Errors
    /// It exists, or the device failed.
    fn create(&self, path: &Path) -> io::Result<Box<dyn MediumFile>>;

    /// Opens a file.
    ///
    /// # Errors
    /// It does not exist, or the device failed.
    fn open(&self, path: &Path) -> io::Result<Box<dyn MediumFile>>;

    /// Deletes a file; one that does not exist is no error.
    ///
    /// # Errors
    /// The device failed.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes creations and removals in a directory durable.
    ///
    /// # Errors
    /// The device failed.
    fn sync_directory(&self, path: &Path) -> io::Result<()>;
}

/// An open segment file. See [`Medium`] for its contract.
pub trait MediumFile: Send + Sync + fmt::Debug {
    /// Reads at `offset`.
    ///
    /// # Errors
    /// The device failed.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes at `offset`; the file grows as needed.
    ///
    /// # Errors
    /// The device failed or is full.
    fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<usize>;

    /// Makes what was written durable.
    ///
    /// # Errors
    /// The device failed.
    fn sync(&self) -> io::Result<()>;

    /// Gives the space of a range back; it reads as zeros. The length of the file
    /// stays.
    ///
    /// # Errors
    /// The device failed, or cannot do this.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;

    /// The first range at or after `from` that takes space, `None` if there is none.
    ///
    /// # Errors
    /// The device failed.
    fn data(&self, from: u64) -> io::Result<Option<Range<u64>>>;
}

/// Files opened with `O_DIRECT`: bytes go between device and buffer without a copy in
/// the page cache. File systems that cannot do this get ordinary files.
#[derive(Clone, Copy, Debug, Default)]
pub struct DirectIo;

impl DirectIo {
    fn options() -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options
    }
}

impl Medium for DirectIo {
    fn create(&self, path: &Path) -> io::Result<Box<dyn MediumFile>> {
        let mut options = Self::options();
        options.create_new(true);
        open_direct(options, path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn MediumFile>> {
        open_direct(Self::options(), path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
}

fn open_direct(mut options: OpenOptions, path: &Path) -> io::Result<Box<dyn MediumFile>> {
    let direct = OFlags::DIRECT.bits().cast_signed();
    match options.clone().custom_flags(direct).open(path) {
        // A file system without direct I/O says so here. The file may have been made.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
            options.create_new(false).create(true);
            Ok(Box::new(options.open(path)?))
        }
        opened => Ok(Box::new(opened?)),
    }
}

impl MediumFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, buffer, offset)
    }

    fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::write_at(self, buffer, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(
            self,
            flags,
            range.start,
            range.end - range.start,
        )?)
    }

    fn data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let start = match seek(self, SeekFrom::Data(from)) {
            Err(Errno::NXIO) => return Ok(None),
            start => start?,
        };
        Ok(Some(start..seek(self, SeekFrom::Hole(start))?))
    }
}

/// Fills as much of `buffer` as the file has from `offset` on; says how much.
pub(super) fn read_full(
    file: &dyn MediumFile,
    buffer: &mut [u8],
    offset: u64,
) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Writes all of `bytes` at `offset`.
pub(super) fn write_full(file: &dyn MediumFile, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut written = 0;
    while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
        match file.write_at(rest, offset + written as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
