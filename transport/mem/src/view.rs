//! An arena, seen from another process.

use std::fmt;
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::mm::ProtFlags;

use crate::arena::{Mapping, sealed_len};

/// The arena of another process, mapped to be read.
pub struct View {
    mapping: Mapping,
}

/// Bytes of a [`View`] that its owner has lent.
pub struct Lent {
    view: Arc<View>,
    range: Range<usize>,
}

impl View {
    /// Maps what an [`Arena::descriptor`](crate::Arena::descriptor) is of.
    ///
    /// # Errors
    /// The file may shrink, or cannot be mapped.
    pub fn new(file: OwnedFd) -> io::Result<Arc<Self>> {
        let len = sealed_len(&file)?;
        let mapping = Mapping::of(&file, len, ProtFlags::READ)?;
        Ok(Arc::new(Self { mapping }))
    }

    /// How long it is.
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.mapping.len() == 0
    }

    /// Some of its bytes; `None` where it has not so many.
    ///
    /// # Safety
    /// The arena's owner must not write to the range until the last handle on it is gone,
    /// whatever becomes of either process.
    pub unsafe fn lent(self: &Arc<Self>, at: u64, len: u64) -> Option<Lent> {
        let start = usize::try_from(at).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        (end <= self.mapping.len()).then(|| Lent {
            view: Arc::clone(self),
            range: start..end,
        })
    }
}

impl Deref for Lent {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies in the mapping, which lasts as long as the view, and cannot
        // end under it, since the file is sealed against shrinking. It is readable and
        // initialised, as all of a file is. That nobody writes to it is the contract of
        // `View::lent`.
        unsafe {
            let start = self.view.mapping.start().add(self.range.start);
            std::slice::from_raw_parts(start.as_ptr(), self.range.len())
        }
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View")
            .field("len", &self.mapping.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent").field("range", &self.range).finish()
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;
    use crate::Arena;

    #[test]
    fn what_is_written_is_seen_and_bounds_are_checked() {
        let arena = Arena::new(1 << 20).unwrap();
        let mut block = arena.block(4096).unwrap().unwrap();
        block.fill(9);
        let view = View::new(arena.descriptor().unwrap()).unwrap();
        assert_eq!(view.len(), 1 << 20);
        // SAFETY: nobody writes to the block from here on.
        let lent = |at, len| unsafe { view.lent(at, len) };
        let all = lent(block.offset(), 4096).unwrap();
        assert!(all.iter().all(|&byte| byte == 9));
        assert!(lent(1 << 20, 1).is_none());
        assert!(lent((1 << 20) - 1, 2).is_none());
        assert!(lent(u64::MAX, 1).is_none());
        assert!(lent(0, u64::MAX).is_none());
        // The mapping lasts as long as anything lent.
        drop((view, arena));
        assert!(all.iter().all(|&byte| byte == 9));
    }

    #[test]
    fn a_file_that_may_shrink_is_refused() {
        let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, 4096).unwrap();
        assert!(View::new(file).is_err());
    }

    #[test]
    fn the_descriptor_only_reads() {
        let arena = Arena::new(4096).unwrap();
        let file = arena.descriptor().unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        assert!(Mapping::of(&file, 4096, access).is_err());
        assert!(rustix::io::write(&file, b"x").is_err());
    }
}
