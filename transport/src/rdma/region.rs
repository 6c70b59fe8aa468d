//! Memory that a device may use.

use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;
use kvasir_mem::{ALIGNMENT, AlignedBuffer, Pages};

use super::device::Device;
use super::verbs::{MemoryRegion, ProtectionDomain};

/// Memory that stays where it is.
///
/// # Safety
/// For as long as the value lives, wherever it is moved to:
/// - [`start`](Self::start) and [`len`](Self::len) stay the same;
/// - the bytes between are mapped, readable and writable, and not mapped anew;
/// - the pages that back them stay, or else a device would go on with the old ones.
///
/// A mapping of a file is fine, and may be shared with other processes, unless somebody
/// truncates the file or punches holes into it.
#[expect(
    clippy::len_without_is_empty,
    reason = "what is empty cannot be registered"
)]
pub unsafe trait Memory: Send + Sync + 'static {
    /// Where it begins: a multiple of [`ALIGNMENT`].
    fn start(&self) -> NonNull<u8>;

    /// How many bytes.
    fn len(&self) -> usize;
}

// SAFETY: a buffer is a mapping of its own, for reading and writing, unmapped when it is
// dropped and never before.
unsafe impl Memory for AlignedBuffer {
    fn start(&self) -> NonNull<u8> {
        NonNull::from(&**self).cast()
    }

    fn len(&self) -> usize {
        (**self).len()
    }
}

// SAFETY: they are mapped for reading and writing where they say, for as long as they live,
// and the arena gives them back to the system when they are dropped, and not before.
unsafe impl Memory for Pages {
    fn start(&self) -> NonNull<u8> {
        Pages::start(self)
    }

    fn len(&self) -> usize {
        Pages::len(self)
    }
}

// SAFETY: what is shared lives for as long as any share of it, at the same place.
unsafe impl<M: Memory + ?Sized> Memory for Arc<M> {
    fn start(&self) -> NonNull<u8> {
        (**self).start()
    }

    fn len(&self) -> usize {
        (**self).len()
    }
}

impl fmt::Debug for dyn Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

/// Registered memory, cheap to clone.
///
/// It is registered in pieces, as large as the device takes; a loan lies within one. The
/// device takes its pages for good: registering reads in what was not in memory, and locks it.
#[derive(Clone, Debug)]
pub struct Region {
    memory: Arc<dyn Memory>,
    pieces: Arc<[Arc<MemoryRegion>]>,
    piece_bytes: u64,
}

/// Why memory cannot be registered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// There is none.
    #[error("memory without bytes cannot be registered")]
    Empty,
    /// It begins within a page.
    #[error("memory to be registered begins at no multiple of {ALIGNMENT}")]
    Unaligned,
    /// One buffer, or one page, is more than the device takes at once.
    #[error("{bytes} bytes are to be registered at once, and the device takes {limit}")]
    Limit {
        /// What has to be one piece.
        bytes: u64,
        /// The most that one can have.
        limit: u64,
    },
    /// There is no memory for a pool.
    #[error("there is no memory for the pool")]
    Memory(#[source] io::Error),
    /// The device took no more.
    #[error(
        "the device registered {done} bytes and then no more; where the cause is memory, raise \
         the limit of locked memory (ulimit -l, LimitMEMLOCK)"
    )]
    Device {
        /// Bytes that were registered before.
        done: u64,
        /// What the device said.
        #[source]
        source: io::Error,
    },
}

impl Region {
    /// Registers memory, and keeps it. That takes a system call, and as long as it takes to read
    /// in and lock all of it: not for a thread that others wait for.
    ///
    /// # Errors
    /// It is nothing to be registered, or the device does not take it.
    pub fn register(device: &Device, memory: impl Memory) -> Result<Self, RegisterError> {
        Self::in_pieces(device, memory, u64::MAX)
    }

    /// Registers memory in pieces of `most` bytes, or as many as the device takes if that is
    /// less.
    ///
    /// # Errors
    /// It is nothing to be registered, or the device does not take it.
    pub fn in_pieces(
        device: &Device,
        memory: impl Memory,
        most: u64,
    ) -> Result<Self, RegisterError> {
        let limit = most.min(device.limits().region_bytes);
        Self::new(device.domain(), Arc::new(memory), ALIGNMENT as u64, limit)
    }

    /// With pieces that are whole units.
    pub(super) fn new(
        domain: &Arc<ProtectionDomain>,
        memory: Arc<dyn Memory>,
        unit: u64,
        limit: u64,
    ) -> Result<Self, RegisterError> {
        if memory.len() == 0 {
            return Err(RegisterError::Empty);
        }
        if !memory.start().addr().get().is_multiple_of(ALIGNMENT) {
            return Err(RegisterError::Unaligned);
        }
        let piece_bytes = piece_bytes(unit, limit)?;
        let pieces = pieces(memory.len() as u64, piece_bytes).map(|range| {
            let done = range.start;
            MemoryRegion::register(domain, Arc::clone(&memory), range)
                .map(Arc::new)
                .map_err(|source| RegisterError::Device { done, source })
        });
        let pieces = pieces.collect::<Result<_, _>>()?;
        Ok(Self {
            memory,
            pieces,
            piece_bytes,
        })
    }

    /// How many bytes. Never 0.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> u64 {
        self.memory.len() as u64
    }

    /// Where bytes lie in it, if they do.
    pub fn locate(&self, bytes: &[u8]) -> Option<Range<u64>> {
        let start = bytes.as_ptr().addr();
        let start = start.checked_sub(self.memory.start().addr().get())?;
        let end = start.checked_add(bytes.len())?;
        (start < end && end <= self.memory.len()).then_some(start as u64..end as u64)
    }

    /// The same bytes, cut where pieces meet, so that each part can be lent. As they are if
    /// they do not lie in the region.
    pub fn split(&self, bytes: Bytes) -> Vec<Bytes> {
        let Some(range) = self.locate(&bytes) else {
            return vec![bytes];
        };
        let mut rest = bytes;
        let mut parts = Vec::new();
        for cut in cuts(range.clone(), self.piece_bytes) {
            let before = rest.len() as u64 - (range.end - cut);
            // Less than what is left of `Bytes`, so it is countable.
            parts.push(rest.split_to(usize::try_from(before).unwrap_or(rest.len())));
        }
        parts.push(rest);
        parts
    }

    /// The registration that all of `range` lies in.
    pub(super) fn piece(&self, range: &Range<u64>) -> Option<&Arc<MemoryRegion>> {
        let index = usize::try_from(range.start / self.piece_bytes).ok()?;
        let piece = self.pieces.get(index)?;
        (range.end <= piece.range().end).then_some(piece)
    }

    /// Whether it is registered there.
    pub(super) fn is_of(&self, domain: &Arc<ProtectionDomain>) -> bool {
        let of = self.pieces.first().map(|piece| piece.domain());
        of.is_some_and(|of| Arc::ptr_eq(of, domain))
    }
}

/// The most that is a whole number of units.
fn piece_bytes(unit: u64, limit: u64) -> Result<u64, RegisterError> {
    match limit - limit % unit {
        0 => Err(RegisterError::Limit { bytes: unit, limit }),
        bytes => Ok(bytes),
    }
}

/// All of `len` bytes, in order.
fn pieces(len: u64, piece_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let starts = (0..len.div_ceil(piece_bytes)).map(move |index| index * piece_bytes);
    starts.map(move |start| start..len.min(start.saturating_add(piece_bytes)))
}

/// Where pieces meet within a range.
fn cuts(range: Range<u64>, piece_bytes: u64) -> impl Iterator<Item = u64> {
    let first = range.start / piece_bytes + 1;
    (first..)
        .map_while(move |index| index.checked_mul(piece_bytes))
        .take_while(move |&cut| cut < range.end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_are_all_of_it_in_order(len in 1u64..1 << 40, bytes in 1u64 << 30..1 << 41) {
            let mut next = 0;
            for piece in pieces(len, bytes) {
                prop_assert_eq!(piece.start, next);
                prop_assert!(piece.start < piece.end && piece.end - piece.start <= bytes);
                next = piece.end;
            }
            prop_assert_eq!(next, len);
        }

        #[test]
        fn cuts_leave_parts_within_pieces(
            start in 0u64..100,
            len in 1u64..100,
            bytes in 1u64..20,
        ) {
            let mut from = start;
            for to in cuts(start..start + len, bytes).chain([start + len]) {
                prop_assert!(from < to);
                prop_assert_eq!(from / bytes, (to - 1) / bytes);
                from = to;
            }
        }

        #[test]
        fn pieces_are_whole_units(unit in 1u64..1 << 30, limit: u64) {
            match piece_bytes(unit, limit) {
                Ok(bytes) => {
                    prop_assert!(bytes <= limit && bytes > 0 && bytes % unit == 0);
                    prop_assert!(limit - bytes < unit);
                }
                Err(error) => {
                    let too_small = matches!(error, RegisterError::Limit { .. });
                    prop_assert!(too_small && limit < unit);
                }
            }
        }
    }

    #[test]
    fn a_device_without_a_limit_takes_one_piece() {
        let bytes = piece_bytes(ALIGNMENT as u64, u64::MAX).unwrap();
        assert_eq!(pieces(1 << 40, bytes).next(), Some(0..1 << 40));
        assert_eq!(pieces(1 << 40, bytes).count(), 1);
        assert_eq!(cuts(5..1 << 40, bytes).count(), 0);
    }

    #[test]
    fn a_buffer_is_where_its_bytes_are() {
        let buffer = Arc::new(AlignedBuffer::zeroed(10_000).unwrap());
        assert_eq!(buffer.start().as_ptr().cast_const(), buffer.as_ptr());
        assert_eq!(Memory::len(&buffer), 12_288);
    }
}
