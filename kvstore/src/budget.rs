//! A hard limit on bytes, kept by ownership.
//!
//! A [`Reservation`] is the right to some bytes of a [`Budget`]; dropping it gives
//! them back. [`ChargedBytes`] ties a reservation to a buffer, so the budget gets
//! its bytes back when the *last reader* lets go, not when the store does.
//! Eviction therefore cannot free what a reader holds, and what a budget counts
//! is what is really in memory.
//!
//! Invariant: `used <= capacity`, always. There is no way to charge without a
//! reservation and none to reserve beyond the capacity.

use bytes::Bytes;

use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};

/// A limit on bytes, shared by everything that charges to it.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Account>);

#[derive(Debug)]
struct Account {
    capacity: u64,
    used: AtomicU64,
    peak: AtomicU64,
}

/// No room: what fills the budget is pinned, or held by readers and writers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no room for {wanted} bytes: {used} of {capacity} are in use and cannot be evicted; \
     retry when readers or pins let go"
)]
pub struct Throttled {
    /// Bytes asked for.
    pub wanted: u64,
    /// Bytes in use.
    pub used: u64,
    /// The limit.
    pub capacity: u64,
}

impl Budget {
    /// A budget of `capacity` bytes.
    pub fn new(capacity: u64) -> Self {
        Self(Arc::new(Account {
            capacity,
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
        }))
    }

    /// Takes `bytes`, if that many are left.
    pub fn try_reserve(&self, bytes: u64) -> Option<Reservation> {
        self.0
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |used| {
                used.checked_add(bytes)
                    .filter(|&used| used <= self.0.capacity)
            })
            .ok()
            .map(|before| {
                self.0.peak.fetch_max(before + bytes, Ordering::Relaxed);
                Reservation {
                    budget: self.clone(),
                    bytes,
                }
            })
    }

    /// The limit.
    pub fn capacity(&self) -> u64 {
        self.0.capacity
    }

    /// Bytes reserved now.
    pub fn used(&self) -> u64 {
        self.0.used.load(Ordering::Acquire)
    }

    /// Most bytes that were ever reserved at once.
    pub fn peak(&self) -> u64 {
        self.0.peak.load(Ordering::Relaxed)
    }

    /// Takes bytes over that [`Reservation::into_bytes`] gave out.
    pub(crate) fn adopt(&self, bytes: u64) -> Reservation {
        Reservation {
            budget: self.clone(),
            bytes,
        }
    }

    pub(crate) fn throttled(&self, wanted: u64) -> Throttled {
        Throttled {
            wanted,
            used: self.used(),
            capacity: self.capacity(),
        }
    }
}

/// The right to some bytes of a [`Budget`], given back on drop.
#[derive(Debug)]
#[must_use = "dropping a reservation gives its bytes back"]
pub struct Reservation {
    budget: Budget,
    bytes: u64,
}

impl Reservation {
    /// How many bytes.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Moves `bytes` of this reservation into a new one; `None`, and no change,
    /// where it has fewer.
    pub fn split(&mut self, bytes: u64) -> Option<Self> {
        self.bytes = self.bytes.checked_sub(bytes)?;
        Some(Self {
            budget: self.budget.clone(),
            bytes,
        })
    }

    /// Ties the part of this reservation that `bytes` needs to them; `None`, and no
    /// change, where it has fewer.
    ///
    /// `bytes` should own its whole allocation: a slice keeps all of its parent
    /// alive and is charged for its own length only.
    pub fn charge(&mut self, bytes: Bytes) -> Option<ChargedBytes> {
        let reservation = self.split(bytes.len() as u64)?;
        Some(ChargedBytes::new(bytes, Some(reservation)))
    }

    /// The bytes, which stay charged until [`Budget::adopt`] takes them over.
    pub(crate) fn into_bytes(mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }

    pub(crate) fn belongs_to(&self, budget: &Budget) -> bool {
        Arc::ptr_eq(&self.budget.0, &budget.0)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.0.used.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Bytes and the reservation that pays for them. Cloning shares both.
#[derive(Clone, Debug)]
pub struct ChargedBytes(Arc<Charged>);

/// Fields drop in order: the memory is freed before the budget hears of it.
#[derive(Debug)]
struct Charged {
    bytes: Bytes,
    /// `None` where the owner of `bytes` has it.
    _reservation: Option<Reservation>,
}

impl ChargedBytes {
    /// Bytes of a buffer that pays for itself, such as [`Buffer`](crate::buffers::Buffer).
    pub(crate) fn prepaid(bytes: Bytes) -> Self {
        Self::new(bytes, None)
    }

    fn new(bytes: Bytes, reservation: Option<Reservation>) -> Self {
        Self(Arc::new(Charged {
            bytes,
            _reservation: reservation,
        }))
    }

    /// The bytes, to hand to a reader. The charge lasts until they are dropped.
    pub fn share(&self) -> Bytes {
        Bytes::from_owner(self.clone())
    }

    /// Whether someone besides this handle holds the bytes.
    pub fn is_held(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl AsRef<[u8]> for ChargedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_exceeds_its_capacity() {
        let budget = Budget::new(10);
        let six = budget.try_reserve(6).unwrap();
        assert!(budget.try_reserve(5).is_none());
        assert!(budget.try_reserve(u64::MAX).is_none());
        let four = budget.try_reserve(4).unwrap();
        assert_eq!(budget.used(), 10);
        drop((six, four));
        assert_eq!((budget.used(), budget.peak()), (0, 10));
    }

    #[test]
    fn bytes_are_charged_until_the_last_reader_drops() {
        let budget = Budget::new(100);
        let mut reservation = budget.try_reserve(8).unwrap();
        assert!(reservation.charge(Bytes::from(vec![0; 9])).is_none());
        let charged = reservation.charge(Bytes::from(vec![7; 8])).unwrap();
        drop(reservation);
        assert!(!charged.is_held());
        let part = charged.share().slice(2..3);
        assert!(charged.is_held());
        drop(charged);
        assert_eq!(budget.used(), 8);
        assert_eq!(part.as_ref(), [7]);
        drop(part);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn splitting_conserves_bytes() {
        let budget = Budget::new(10);
        let mut all = budget.try_reserve(10).unwrap();
        let part = all.split(3).unwrap();
        assert!(all.split(8).is_none());
        assert_eq!((all.bytes(), part.bytes(), budget.used()), (7, 3, 10));
        drop(part);
        assert_eq!((all.bytes(), budget.used()), (7, 7));
    }
}
