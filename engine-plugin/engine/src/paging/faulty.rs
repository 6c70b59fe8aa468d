//! A file whose operations fail and hang when told to.

use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};

use rustix::io::Errno;

use super::file::Backing;

/// A file in memory whose operations fail when told to.
#[derive(Debug, Default)]
pub(crate) struct FaultyFile {
    pub(crate) bytes: Mutex<Vec<u8>>,
    pub(crate) full: AtomicBool,
    pub(crate) broken: AtomicBool,
    /// Flips a bit of every read.
    pub(crate) lies: AtomicBool,
    /// Reads and writes move this many bytes at most; 0 for any number.
    pub(crate) short: AtomicU64,
    pub(crate) reads: Gate,
    pub(crate) writes: Gate,
}

/// What starts at some offsets hangs until these are opened.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    closed: Mutex<Range<u64>>,
    opened: Condvar,
}

impl Gate {
    pub(crate) fn close(&self, offsets: Range<u64>) {
        *self.closed.lock().unwrap() = offsets;
    }

    pub(crate) fn close_all(&self) {
        self.close(0..u64::MAX);
    }

    pub(crate) fn open(&self) {
        self.close(0..0);
        self.opened.notify_all();
    }

    fn pass(&self, offset: u64) {
        let closed = self.closed.lock().unwrap();
        let is_closed = |closed: &mut Range<u64>| closed.contains(&offset);
        drop(self.opened.wait_while(closed, is_closed).unwrap());
    }
}

impl FaultyFile {
    fn cut(&self, len: usize) -> usize {
        match self.short.load(Ordering::Relaxed) {
            0 => len,
            most => len.min(usize::try_from(most).unwrap()),
        }
    }
}

impl Backing for FaultyFile {
    fn sector_bytes(&self) -> usize {
        512
    }

    fn prepare(&self, bytes: u64) -> io::Result<()> {
        self.bytes
            .lock()
            .unwrap()
            .resize(usize::try_from(bytes).unwrap(), 0xa5);
        Ok(())
    }

    fn read_at(&self, into: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        self.reads.pass(offset);
        if self.broken.load(Ordering::Relaxed) {
            return Err(Errno::IO.into());
        }
        let bytes = self.bytes.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        let (mut done, most) = (0, self.cut(usize::MAX));
        for slice in into {
            let len = slice.len().min(most - done);
            slice[..len].copy_from_slice(&bytes[start + done..][..len]);
            if self.lies.load(Ordering::Relaxed) {
                slice[len / 2] ^= 4;
            }
            done += len;
            if done == most {
                break;
            }
        }
        Ok(done)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<usize> {
        self.writes.pass(offset);
        let len = self.cut(from.len());
        let start = usize::try_from(offset).unwrap();
        if self.full.load(Ordering::Relaxed) {
            // Some of it may have been written.
            self.bytes.lock().unwrap()[start..][..len / 2].copy_from_slice(&from[..len / 2]);
            return Err(Errno::NOSPC.into());
        }
        self.bytes.lock().unwrap()[start..][..len].copy_from_slice(&from[..len]);
        Ok(len)
    }
}
