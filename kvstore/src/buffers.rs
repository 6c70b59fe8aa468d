//! Aligned buffers that devices read into and write from, used again and again.
//!
//! Fresh memory costs more than copying (see `kvasir_mem`), so a buffer that nobody
//! reads any more is kept, and still charged to the memory budget, until its size is
//! asked for again or nothing else can be evicted. A full memory tier evicts all the
//! time: if buffers went first, none would ever be used again.
//!
//! Payload that stays lies in such buffers too, and never on the heap. Chunks of all
//! sizes come and go in any order for months, and an allocator that serves them from one
//! heap keeps the holes between them, which no budget knows of: under a load of mixed
//! sizes glibc's came to two thirds of a memory tier of 1 GiB within two minutes.

use std::collections::HashMap;
use std::io;
use std::sync::PoisonError;

use kvasir_mem::Arena;
#[cfg(not(all(test, kvasir_loom)))]
use kvasir_mem::Memory;

use crate::budget::{Reservation, Throttled};
#[cfg(all(test, kvasir_loom))]
use crate::models::Memory;
use crate::sync::{Arc, Mutex, MutexGuard};
use crate::tier::{DeviceError, ReadError};

/// Buffers that wait for their next use.
#[derive(Clone, Debug)]
pub(crate) struct Buffers {
    idle: Arc<Mutex<Idle>>,
    /// Where new ones lie.
    arena: Option<std::sync::Arc<Arena>>,
}

#[derive(Debug)]
struct Idle {
    by_len: HashMap<usize, Vec<Paid>>,
    bytes: u64,
    limit: u64,
}

/// A buffer and the reservation that pays for it. Fields drop in order: the memory is
/// freed before the budget hears of it.
#[derive(Debug)]
struct Paid {
    memory: Memory,
    reservation: Reservation,
}

/// A buffer on loan; goes back when dropped, and not before. What it holds at first is
/// whatever it held last.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// `None` only while being dropped.
    paid: Option<Paid>,
    home: Buffers,
}

/// Why there is no buffer.
#[derive(Debug)]
pub(crate) enum BufferError {
    /// The budget has no room.
    Throttled(Throttled),
    /// The system has no memory.
    Io(io::Error),
}

impl From<BufferError> for ReadError {
    fn from(error: BufferError) -> Self {
        match error {
            BufferError::Throttled(throttled) => throttled.into(),
            BufferError::Io(error) => DeviceError::from(error).into(),
        }
    }
}

impl Buffers {
    /// Keeps at most `limit` bytes that nobody uses; new ones lie in `arena`, if there is one.
    pub(crate) fn new(limit: u64, arena: Option<std::sync::Arc<Arena>>) -> Self {
        Self {
            idle: Arc::new(Mutex::new(Idle {
                by_len: HashMap::new(),
                bytes: 0,
                limit,
            })),
            arena,
        }
    }

    /// Where new ones lie.
    pub(crate) fn arena(&self) -> Option<&std::sync::Arc<Arena>> {
        self.arena.as_ref()
    }

    /// A buffer of exactly `len` bytes that waits for use.
    pub(crate) fn reuse(&self, len: usize) -> Option<Buffer> {
        let mut idle = self.lock();
        let paid = idle.by_len.get_mut(&len)?.pop()?;
        idle.bytes -= len as u64;
        Some(self.lend(paid))
    }

    /// A new buffer of the size of `reservation`, which is a multiple of a block.
    ///
    /// # Errors
    /// The system has no memory left.
    pub(crate) fn create(&self, reservation: Reservation) -> io::Result<Buffer> {
        let len = usize::try_from(reservation.bytes()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let memory = Memory::zeroed(len, self.arena.as_ref())?;
        Ok(self.lend(Paid {
            memory,
            reservation,
        }))
    }

    /// Bytes of buffers that nobody uses.
    pub(crate) fn idle_bytes(&self) -> u64 {
        self.lock().bytes
    }

    /// Frees everything that nobody uses. Says whether there was anything.
    pub(crate) fn trim(&self) -> bool {
        let trimmed = {
            let mut idle = self.lock();
            idle.bytes = 0;
            std::mem::take(&mut idle.by_len)
        };
        trimmed.values().any(|buffers| !buffers.is_empty())
    }

    fn lend(&self, paid: Paid) -> Buffer {
        Buffer {
            paid: Some(paid),
            home: self.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.paid.as_ref().map_or(&[], |paid| &paid.memory)
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.paid.as_mut().map_or(&mut [], |paid| &mut paid.memory)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(paid) = self.paid.take() else {
            return;
        };
        let mut idle = self.home.lock();
        let bytes = paid.reservation.bytes();
        // What does not fit is freed after the lock is.
        if idle.bytes + bytes <= idle.limit {
            idle.bytes += bytes;
            let same = idle.by_len.entry(paid.memory.len()).or_default();
            same.push(paid);
        } else {
            drop(idle);
            drop(paid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;

    #[test]
    fn buffers_are_used_again_and_stay_charged() {
        let budget = Budget::new(100 << 10);
        let buffers = Buffers::new(8 << 10, None);
        let reserve = |bytes| budget.try_reserve(bytes).unwrap();
        assert!(buffers.reuse(8192).is_none());
        let mut first = buffers.create(reserve(8192)).unwrap();
        let second = buffers.create(reserve(4096)).unwrap();
        let address = first.as_ref().as_ptr();
        first.as_mut().fill(9);
        drop(first);
        assert_eq!(budget.used(), 8192 + 4096);
        drop(second);
        assert_eq!(budget.used(), 8192, "above the limit");
        assert!(buffers.reuse(4096).is_none());
        let again = buffers.reuse(8192).unwrap();
        assert_eq!(again.as_ref().as_ptr(), address);
        assert!(!buffers.trim());
        drop(again);
        assert!(buffers.trim());
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_buffer_may_outlive_the_pool() {
        let budget = Budget::new(100 << 10);
        let buffers = Buffers::new(8 << 10, None);
        let buffer = buffers.create(budget.try_reserve(4096).unwrap()).unwrap();
        drop(buffers);
        assert_eq!(buffer.as_ref().len(), 4096);
        drop(buffer);
        assert_eq!(budget.used(), 0);
    }
}
