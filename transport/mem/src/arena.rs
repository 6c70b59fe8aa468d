//! Memory that other processes of this host may read.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use rustix::fs::{
    FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags, fallocate, fcntl_add_seals, fstat,
    ftruncate, memfd_create,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{ALIGNMENT, AlignedBuffer};

/// A file in memory that grows no longer and no shorter, cut into [`Block`]s.
///
/// Its length is address space, and no memory: what no block has takes none. So it may be
/// several times as long as what its blocks may have, and blocks of all sizes find their
/// place long after the first ones were given back.
///
/// Others map it through a descriptor that only reads; see [`View`](crate::View).
pub struct Arena {
    mapping: Mapping,
    file: OwnedFd,
    free: Mutex<Free>,
    /// Those of all blocks, by where they start.
    pages: Mutex<BTreeMap<usize, Weak<Place>>>,
    watchers: RwLock<Vec<Weak<Watcher>>>,
}

/// Some memory of an arena, whose address, offset and length are multiples of
/// [`ALIGNMENT`]. Given back to the system when it is dropped, and all of its [`Pages`] are.
///
/// Invariant: no other block has any of its range.
pub struct Block {
    place: Arc<Place>,
}

/// The memory of a [`Block`], without its bytes: for as long as they live, the system gives the
/// range no other memory, also when the block is gone.
///
/// A device that memory is registered with knows pages, not addresses. If a range were given
/// back and taken again, a process would find new pages there, and the device the old ones.
#[derive(Clone)]
pub struct Pages {
    place: Arc<Place>,
}

/// Is told where each block started that is gone.
pub type Watcher = dyn Fn(u64) + Send + Sync;

/// A range that is taken. Dropping it gives it back.
struct Place {
    arena: Arc<Arena>,
    range: Range<usize>,
}

/// A whole mapping, unmapped when it is dropped.
///
/// Invariant: `start` is a mapping of `len` bytes that this value owns alone.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

/// Ranges that no block has: by start, and their ends. None adjoins another.
#[derive(Debug, Default)]
struct Free(BTreeMap<usize, usize>);

impl Arena {
    /// Of `len` bytes, rounded up to [`ALIGNMENT`].
    ///
    /// # Errors
    /// The system has no such files, or not so much address space.
    pub fn new(len: usize) -> io::Result<Arc<Self>> {
        let len = len.max(1).checked_next_multiple_of(ALIGNMENT);
        let len = len.ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("kvasir", flags)?;
        ftruncate(&file, len as u64)?;
        // Whoever maps it can rely on its length: no read ever meets an end.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mapping = Mapping::of(&file, len, ProtFlags::READ | ProtFlags::WRITE)?;
        Ok(Arc::new(Self {
            mapping,
            file,
            free: Mutex::new(Free::whole(len)),
            pages: Mutex::default(),
            watchers: RwLock::default(),
        }))
    }

    /// Zeroed memory of at least `len` bytes, rounded up to [`ALIGNMENT`]; one unit at
    /// least. `None` where no range is long enough.
    ///
    /// # Errors
    /// The system has no memory left.
    pub fn block(self: &Arc<Self>, len: usize) -> io::Result<Option<Block>> {
        let Some(len) = len.max(1).checked_next_multiple_of(ALIGNMENT) else {
            return Ok(None);
        };
        let Some(range) = self.lock().take(len) else {
            return Ok(None);
        };
        let place = Arc::new(Place {
            arena: Arc::clone(self),
            range,
        });
        // Memory that is only missed when it is touched would end the process.
        let (start, len) = (place.range.start, place.range.len() as u64);
        fallocate(&self.file, FallocateFlags::empty(), start as u64, len)?;
        self.lock_pages().insert(start, Arc::downgrade(&place));
        Ok(Some(Block { place }))
    }

    /// The memory of the block that these bytes are of; `None` if they are not in this arena.
    pub fn pages(&self, bytes: &[u8]) -> Option<Pages> {
        let found = self.locate(bytes)?;
        let start = usize::try_from(found.start).ok()?;
        let pages = self.lock_pages();
        let (_, place) = pages.range(..=start).next_back()?;
        let place = place.upgrade()?;
        (found.end <= place.range.end as u64).then_some(Pages { place })
    }

    /// From now on `watcher` is told of every block that is gone, as long as it lives itself:
    /// who has its pages is to let go of them, since they take memory that nobody uses.
    pub fn watch(&self, watcher: &Arc<Watcher>) {
        let mut watchers = self
            .watchers
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(Arc::downgrade(watcher));
    }

    /// Where these bytes lie; `None` if they are not in this arena.
    pub fn locate(&self, bytes: &[u8]) -> Option<Range<u64>> {
        let start = bytes
            .as_ptr()
            .addr()
            .checked_sub(self.mapping.start.addr().get())?;
        let end = start.checked_add(bytes.len())?;
        (end <= self.mapping.len).then_some(start as u64..end as u64)
    }

    /// A descriptor that another process can map, and only read.
    ///
    /// # Errors
    /// The system gives none.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        // One that is duplicated could write; one that is opened again has its own mode.
        let path = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&self.file)
        );
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(path, flags, Mode::empty())?)
    }

    /// Bytes, with those that no block has.
    pub fn len(&self) -> usize {
        self.mapping.len
    }

    /// Whether it has no bytes; never.
    pub fn is_empty(&self) -> bool {
        self.mapping.len == 0
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_pages(&self) -> MutexGuard<'_, BTreeMap<usize, Weak<Place>>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Free {
    fn whole(len: usize) -> Self {
        Self(BTreeMap::from([(0, len)]))
    }

    /// The first range that is long enough: blocks gather at the start.
    fn take(&mut self, len: usize) -> Option<Range<usize>> {
        let mut ranges = self.0.iter();
        let (&start, &end) = ranges.find(|&(start, end)| end - start >= len)?;
        self.0.remove(&start);
        if start + len < end {
            self.0.insert(start + len, end);
        }
        Some(start..start + len)
    }

    /// Takes a range back, which joins its neighbours.
    fn give(&mut self, range: Range<usize>) {
        let Range { mut start, mut end } = range;
        if let Some((&before, &until)) = self.0.range(..start).next_back()
            && until == start
        {
            self.0.remove(&before);
            start = before;
        }
        if let Some(until) = self.0.remove(&end) {
            end = until;
        }
        self.0.insert(start, end);
    }
}

impl Mapping {
    /// The first `len` bytes of a file.
    pub(crate) fn of(file: impl AsFd, len: usize, access: ProtFlags) -> io::Result<Self> {
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: no address is asked for, so no existing mapping is replaced.
        let start = unsafe { mmap(std::ptr::null_mut(), len, access, flags, file, 0) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is owned by this value, nothing borrows from it any more, and
        // it is unmapped once. An error would leak it, nothing worse.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

// SAFETY: the mapping is owned, and not tied to the thread that made it.
unsafe impl Send for Mapping {}
// SAFETY: it gives out its address and length, and no memory.
unsafe impl Sync for Mapping {}

impl Block {
    /// Place of its first byte in the arena.
    pub fn offset(&self) -> u64 {
        self.place.range.start as u64
    }
}

impl Pages {
    /// Place of the first byte in the arena.
    pub fn offset(&self) -> u64 {
        self.place.range.start as u64
    }

    /// Where it is mapped, for reading and writing, for as long as this lives. Whose bytes they
    /// are is not said by that: a [`Block`]'s, if there is one.
    pub fn start(&self) -> NonNull<u8> {
        self.place.start()
    }

    /// How many bytes. Never 0.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.place.range.len()
    }
}

impl Place {
    fn start(&self) -> NonNull<u8> {
        // SAFETY: the range lies in the mapping, which lasts as long as the arena.
        unsafe { self.arena.mapping.start.add(self.range.start) }
    }
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let Place { range, .. } = &*self.place;
        // SAFETY: the range lies in the mapping, which lasts as long as the arena. It is
        // readable, and initialised: the file reads as zero where nothing was written. By the
        // invariant nobody else in this process writes to it while `&self` lasts, and other
        // processes have descriptors that only read.
        unsafe { std::slice::from_raw_parts(self.place.start().as_ptr(), range.len()) }
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        let Place { range, .. } = &*self.place;
        // SAFETY: as for `deref`; the mapping is writable, and `&mut self` keeps everyone
        // else of this process out. Other processes and devices only look at ranges that were
        // lent to them, and a block that is lent is shared (`Bytes::from_owner`), never `&mut`.
        unsafe { std::slice::from_raw_parts_mut(self.place.start().as_ptr(), range.len()) }
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Place { arena, range } = &*self.place;
        // From here on nobody gets its pages, and who has them hears of it.
        arena.lock_pages().remove(&range.start);
        let watchers = arena.watchers.read();
        for watcher in &*watchers.unwrap_or_else(PoisonError::into_inner) {
            if let Some(watcher) = watcher.upgrade() {
                watcher(range.start as u64);
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (start, len) = (self.range.start as u64, self.range.len() as u64);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Where it fails, the memory stays until the arena goes, and what is taken next is
        // not zero: both are harmless to who only wanted room.
        let _ = fallocate(&self.arena.file, flags, start, len);
        self.arena.lock().give(self.range.clone());
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena")
            .field("len", &self.mapping.len)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = &self.place.range;
        f.debug_struct("Block").field("range", range).finish()
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = &self.place.range;
        f.debug_struct("Pages").field("range", range).finish()
    }
}

/// Memory for a device to read into or write from: of its own, or of an arena.
#[derive(Debug)]
pub enum Memory {
    /// Nobody else can read it.
    Private(AlignedBuffer),
    /// Whoever has the arena's descriptor can.
    Shared(Block),
}

impl Memory {
    /// At least `len` zeroed bytes, rounded up to [`ALIGNMENT`]; of `arena`, if there is one
    /// that has room.
    ///
    /// # Errors
    /// The system has no memory or address space left.
    pub fn zeroed(len: usize, arena: Option<&Arc<Arena>>) -> io::Result<Self> {
        let block = match arena {
            Some(arena) => arena.block(len)?,
            None => None,
        };
        Ok(match block {
            Some(block) => Self::Shared(block),
            None => Self::Private(AlignedBuffer::zeroed(len)?),
        })
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Private(buffer) => buffer,
            Self::Shared(block) => block,
        }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Private(buffer) => buffer,
            Self::Shared(block) => block,
        }
    }
}

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// The length of a file that grows no shorter.
pub(crate) fn sealed_len(file: impl AsFd) -> io::Result<usize> {
    let seals = rustix::fs::fcntl_get_seals(&file)?;
    if !seals.contains(SealFlags::SHRINK) {
        let problem = "the file may shrink under whoever reads it";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    usize::try_from(fstat(&file)?.st_size).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_are_zeroed_aligned_and_found() {
        let arena = Arena::new(1 << 20).unwrap();
        let mut block = arena.block(5000).unwrap().unwrap();
        assert_eq!(block.len(), 8192);
        assert!(block.iter().all(|&byte| byte == 0));
        block.fill(7);
        let at = block.offset();
        assert_eq!(arena.locate(&block[10..20]), Some(at + 10..at + 20));
        assert_eq!(arena.locate(&[1, 2, 3]), None);
        let again = {
            drop(block);
            arena.block(8192).unwrap().unwrap()
        };
        assert_eq!(again.offset(), at);
        assert!(again.iter().all(|&byte| byte == 0));
        assert!(arena.block(2 << 20).unwrap().is_none());
        assert!(arena.block(usize::MAX).unwrap().is_none());
    }

    #[test]
    fn memory_goes_back_to_the_system() {
        let arena = Arena::new(64 << 20).unwrap();
        let blocks = || fstat(&arena.file).unwrap().st_blocks;
        let block = arena.block(8 << 20).unwrap().unwrap();
        assert!(blocks() >= (8 << 20) / 512);
        drop(block);
        assert_eq!(blocks(), 0);
    }

    #[test]
    fn pages_stay_when_their_block_is_gone() {
        let arena = Arena::new(1 << 20).unwrap();
        let gone = Arc::new(Mutex::new(Vec::new()));
        let watcher: Arc<Watcher> = {
            let gone = Arc::clone(&gone);
            Arc::new(move |at| gone.lock().unwrap().push(at))
        };
        arena.watch(&watcher);
        let first = arena.block(4096).unwrap().unwrap();
        let second = arena.block(8192).unwrap().unwrap();
        let pages = arena.pages(&second[5000..]).unwrap();
        assert_eq!((pages.offset(), pages.len()), (second.offset(), 8192));
        assert_eq!(pages.start().as_ptr().cast_const(), second.as_ptr());
        let both = std::ptr::slice_from_raw_parts(first.as_ptr(), 8192);
        // SAFETY: the two blocks lie side by side, in one mapping.
        assert!(arena.pages(unsafe { &*both }).is_none(), "of two blocks");
        assert!(arena.pages(&[0; 5]).is_none());
        let blocks = || fstat(&arena.file).unwrap().st_blocks;
        let before = blocks();
        let at = second.offset();
        drop(second);
        assert_eq!(*gone.lock().unwrap(), [at]);
        assert_eq!(blocks(), before, "nothing was given back");
        let third = arena.block(8192).unwrap().unwrap();
        assert!(third.offset() > at, "the range is still taken");
        drop((pages, third));
        assert_eq!(blocks(), 4096 / 512);
        drop(watcher);
        drop(first);
        assert_eq!(
            gone.lock().unwrap().len(),
            2,
            "a watcher that is gone hears nothing"
        );
        let whole = arena.block(1 << 20).unwrap();
        assert!(whole.is_some());
    }

    #[test]
    fn where_an_arena_has_no_room_memory_is_private() {
        let arena = Arena::new(8192).unwrap();
        let shared = Memory::zeroed(8192, Some(&arena)).unwrap();
        assert!(matches!(shared, Memory::Shared(_)));
        let private = Memory::zeroed(1, Some(&arena)).unwrap();
        assert!(matches!(private, Memory::Private(_)));
        assert_eq!(arena.locate(&private), None);
    }

    proptest! {
        #[test]
        fn ranges_never_overlap_and_all_come_back(
            steps in prop::collection::vec((any::<bool>(), 1usize..50, any::<prop::sample::Index>()), 1..200),
        ) {
            let mut free = Free::whole(400);
            let mut taken: Vec<Range<usize>> = Vec::new();
            for (take, len, which) in steps {
                if take {
                    match free.take(len) {
                        Some(range) => {
                            prop_assert!(range.len() == len && range.end <= 400);
                            let apart = |other: &Range<usize>| other.end <= range.start || range.end <= other.start;
                            prop_assert!(taken.iter().all(apart));
                            taken.push(range);
                        }
                        None => prop_assert!(free.0.iter().all(|(start, end)| end - start < len)),
                    }
                } else if !taken.is_empty() {
                    free.give(taken.swap_remove(which.index(taken.len())));
                }
            }
            for range in taken {
                free.give(range);
            }
            prop_assert_eq!(free.0, BTreeMap::from([(0, 400)]));
        }
    }
}
