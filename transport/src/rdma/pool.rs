//! Registered buffers that are used again.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use kvasir_mem::{ALIGNMENT, AlignedBuffer};
use tokio::sync::Semaphore;

use super::device::Device;
use super::region::{Memory, Region, RegisterError};

/// Registered buffers of one size, cheap to clone. Reads fill them; what is to be lent and
/// lies elsewhere is copied into one.
///
/// It never grows: who asks when all are in use waits, first come, first served. A buffer comes
/// back when the last [`Bytes`] made of it is dropped.
#[derive(Clone, Debug)]
pub struct Pool {
    slots: Arc<Slots>,
    region: Region,
}

/// A buffer of a [`Pool`]. It holds what was last in it.
pub struct Buffer {
    slots: Arc<Slots>,
    /// Which one; in no other `Buffer`, and not in `Slots::free`.
    index: usize,
}

/// The memory of a pool, and which parts of it are free.
struct Slots {
    /// Never looked at itself, only through `start`.
    _memory: AlignedBuffer,
    start: NonNull<u8>,
    /// Of one of them; a multiple of [`ALIGNMENT`].
    bytes: usize,
    count: usize,
    free: Mutex<Vec<usize>>,
    /// As many permits as are free.
    permits: Semaphore,
}

impl Pool {
    /// Buffers of so many bytes at least, rounded up to whole pages: one of one page at least.
    /// All their memory is taken and locked at once, which takes a while.
    ///
    /// # Errors
    /// There is no memory, or the device does not take it.
    pub fn new(device: &Device, buffers: usize, bytes: usize) -> Result<Self, RegisterError> {
        let slots = Slots::new(buffers, bytes).map_err(RegisterError::Memory)?;
        let slots = Arc::new(slots);
        let memory: Arc<dyn Memory> = Arc::clone(&slots) as _;
        let limit = device.limits().region_bytes;
        let region = Region::new(device.domain(), memory, slots.bytes as u64, limit)?;
        Ok(Self { slots, region })
    }

    /// A free buffer, once there is one.
    pub async fn buffer(&self) -> Buffer {
        self.slots.take().await
    }

    /// Bytes of each.
    pub fn buffer_bytes(&self) -> usize {
        self.slots.bytes
    }

    /// How many are free.
    pub fn free(&self) -> usize {
        self.slots.permits.available_permits()
    }

    /// Where they are registered, to lend what was written into them.
    pub fn region(&self) -> &Region {
        &self.region
    }
}

impl Buffer {
    /// The first `len` bytes; all, if there are fewer. They keep the buffer until they are
    /// dropped.
    pub fn freeze(self, len: usize) -> Bytes {
        let len = len.min(self.slots.bytes);
        Bytes::from_owner(self).slice(..len)
    }

    /// Where it is in the pool's region.
    pub(super) fn place(&self) -> u64 {
        (self.index * self.slots.bytes) as u64
    }
}

impl Slots {
    fn new(count: usize, bytes: usize) -> std::io::Result<Self> {
        let count = count.clamp(1, Semaphore::MAX_PERMITS);
        let bytes = bytes.max(1).checked_next_multiple_of(ALIGNMENT);
        let bytes = bytes.ok_or(std::io::ErrorKind::OutOfMemory)?;
        let all = bytes.checked_mul(count);
        let mut memory = AlignedBuffer::zeroed(all.ok_or(std::io::ErrorKind::OutOfMemory)?)?;
        Ok(Self {
            start: NonNull::from(&mut *memory).cast(),
            _memory: memory,
            bytes,
            count,
            free: Mutex::new((0..count).rev().collect()),
            permits: Semaphore::new(count),
        })
    }

    async fn take(self: &Arc<Self>) -> Buffer {
        let permit = self.permits.acquire().await;
        permit.expect("the semaphore is never closed").forget();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let index = free.pop().expect("there are as many permits as are free");
        drop(free);
        Buffer {
            slots: Arc::clone(self),
            index,
        }
    }
}

// SAFETY: the memory is `_memory`'s, which is owned, never replaced, and a mapping for reading
// and writing of `count * bytes` bytes.
unsafe impl Memory for Slots {
    fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn len(&self) -> usize {
        self.count * self.bytes
    }
}

// SAFETY: `start` is a part of `_memory`, which may be used from any thread.
unsafe impl Send for Slots {}
// SAFETY: bytes are only reached through a `Buffer`, and each is of one `Buffer` at a time.
unsafe impl Sync for Slots {}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let start = self
            .slots
            .start
            .as_ptr()
            .wrapping_add(self.index * self.slots.bytes);
        // SAFETY:
        // - mapped: `index < count`, and `slots` keeps the memory;
        // - initialised: it was zeroed when it was made;
        // - unaliased: `index` is in no other `Buffer`; a request whose buffer a device writes
        //   into owns it, and does not look at it before the completion has come.
        unsafe { std::slice::from_raw_parts(start, self.slots.bytes) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = self
            .slots
            .start
            .as_ptr()
            .wrapping_add(self.index * self.slots.bytes);
        // SAFETY: as for `deref`, and `&mut self` keeps others out.
        unsafe { std::slice::from_raw_parts_mut(start, self.slots.bytes) }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let free = self.slots.free.lock();
        free.unwrap_or_else(PoisonError::into_inner)
            .push(self.index);
        self.slots.permits.add_permits(1);
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots")
            .field("bytes", &self.bytes)
            .field("count", &self.count)
            .field("free", &self.permits.available_permits())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("index", &self.index)
            .field("len", &self.slots.bytes)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use proptest::prelude::*;

    use super::*;

    /// A buffer, if one is free.
    fn take(slots: &Arc<Slots>) -> Option<Buffer> {
        match pin!(slots.take()).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(buffer) => Some(buffer),
            Poll::Pending => None,
        }
    }

    proptest! {
        /// Buffers that are out never share a byte, and as many are out as there are.
        #[test]
        fn each_is_given_out_once(
            count in 1usize..9,
            bytes in 1usize..9000,
            steps in prop::collection::vec(any::<(bool, prop::sample::Index)>(), 0..60),
        ) {
            let slots = Arc::new(Slots::new(count, bytes).unwrap());
            let mut out: Vec<(u8, Bytes)> = Vec::new();
            for (number, (taking, which)) in (0u8..).zip(steps) {
                if taking {
                    let buffer = take(&slots);
                    prop_assert_eq!(buffer.is_some(), out.len() < count);
                    if let Some(mut buffer) = buffer {
                        buffer.fill(number);
                        out.push((number, buffer.freeze(bytes)));
                    }
                } else if !out.is_empty() {
                    out.swap_remove(which.index(out.len()));
                }
                for (number, bytes) in &out {
                    prop_assert!(bytes.iter().all(|byte| byte == number));
                }
            }
        }
    }

    #[test]
    fn who_waits_gets_what_comes_back() {
        let slots = Arc::new(Slots::new(1, 5000).unwrap());
        let bytes = take(&slots).unwrap().freeze(5000);
        let part = bytes.slice(17..18);
        let mut waiting = pin!(slots.take());
        let mut context = Context::from_waker(Waker::noop());
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        drop(bytes);
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        drop(part);
        let Poll::Ready(buffer) = waiting.as_mut().poll(&mut context) else {
            panic!("the buffer came back");
        };
        assert_eq!(buffer.len(), 8192);
        assert_eq!(buffer.place(), 0);
    }

    #[test]
    fn bytes_outlive_the_pool() {
        let slots = Arc::new(Slots::new(3, 1).unwrap());
        let mut buffer = take(&slots).unwrap();
        buffer[..4].copy_from_slice(b"kept");
        let bytes = buffer.freeze(4);
        drop(slots);
        assert_eq!(&bytes[..], b"kept");
    }

    #[test]
    fn what_no_system_has_is_an_error() {
        assert!(Slots::new(usize::MAX, 1).is_err());
        assert!(Slots::new(1, usize::MAX).is_err());
    }
}
