//! Buffers that devices can read into and write from directly.
//!
//! An [`AlignedBuffer`] is a private anonymous mapping: aligned to pages, zeroed,
//! and given back to the system when it is dropped. Fresh memory costs more than
//! copying (every page is a fault), so who needs speed keeps buffers and uses them
//! again; this crate does not decide which.
//!
//! An [`Arena`] is memory that other processes of the host read through a [`View`], without a
//! copy: what is lent to them is a range of it.
//!
//! All of the project's `unsafe` that concerns such memory is here.

mod arena;
mod view;

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

pub use arena::{Arena, Block, Memory, Pages, Watcher};
pub use view::{Lent, View};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// What direct I/O asks of addresses, lengths and offsets: the largest logical block
/// size in use. Linux's own pages are no smaller.
pub const ALIGNMENT: usize = 4096;

/// From this size on, the system is asked for huge pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Memory whose address and length are multiples of [`ALIGNMENT`].
///
/// Invariant: `start` is a mapping of `len` bytes that this value owns alone, and
/// `len` is a multiple of the page size.
pub struct AlignedBuffer {
    start: NonNull<u8>,
    len: NonZeroUsize,
}

impl AlignedBuffer {
    /// At least `len` zeroed bytes, rounded up to [`ALIGNMENT`]; one block at least.
    /// Huge pages where the system grants them.
    ///
    /// # Errors
    /// The system has no memory or address space left.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let len = len
            .max(1)
            .checked_next_multiple_of(ALIGNMENT)
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: no address is asked for, so no existing mapping is replaced.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len.get(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let buffer = Self { start, len };
        if len.get() >= HUGE_PAGE_BYTES {
            // SAFETY: the range is the mapping just made. The advice changes how it
            // is backed, never what it holds. Systems without huge pages refuse it.
            let _ = unsafe { madvise(start.as_ptr().cast(), len.get(), Advice::LinuxHugepage) };
        }
        Ok(buffer)
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: by the invariant the range is mapped, readable, and owned by this
        // value; anonymous memory is initialised (zero) from the start. `&self`
        // keeps writers out.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len.get()) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, the range is writable, and `&mut self` keeps
        // everyone else out.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len.get()) }
    }
}

impl AsRef<[u8]> for AlignedBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is owned by this value, nothing borrows from it any
        // more, and it is unmapped once. An error would leak it, nothing worse.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len.get()) };
    }
}

// SAFETY: the mapping is owned, and not tied to the thread that made it.
unsafe impl Send for AlignedBuffer {}
// SAFETY: shared references only read.
unsafe impl Sync for AlignedBuffer {}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuffer")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn aligned_zeroed_and_as_long_as_asked(len in 0usize..5_000_000) {
            let mut buffer = AlignedBuffer::zeroed(len).unwrap();
            prop_assert_eq!(buffer.as_ptr().addr() % ALIGNMENT, 0);
            prop_assert_eq!(buffer.len(), len.max(1).next_multiple_of(ALIGNMENT));
            prop_assert!(buffer.iter().all(|&byte| byte == 0));
            buffer.fill(7);
            prop_assert!(buffer.iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn what_no_system_has_is_an_error() {
        assert!(AlignedBuffer::zeroed(usize::MAX).is_err());
        assert!(AlignedBuffer::zeroed(isize::MAX as usize - ALIGNMENT).is_err());
    }

    #[test]
    fn moves_between_threads() {
        let mut buffer = AlignedBuffer::zeroed(1).unwrap();
        let buffer = std::thread::spawn(move || {
            buffer[0] = 1;
            buffer
        })
        .join()
        .unwrap();
        assert_eq!(buffer[0], 1);
    }
}
