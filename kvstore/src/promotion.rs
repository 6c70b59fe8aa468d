//! Layers on their way from disk into memory.
//!
//! A lease that reads a chunk from disk gathers its extents; when none is missing,
//! the chunk moves into the memory tier. What was gathered so far serves nobody
//! yet, so it gives way to every request for memory that would be refused
//! otherwise.
//!
//! Where memory is full, a gathered extent costs a stored chunk its place. So only as
//! many chunks are gathered at once as half of the memory holds: many cold chunks
//! read side by side, extent by extent, would else drive out all that is stored, and
//! then each other.

use std::sync::{Arc, PoisonError, Weak};

use kvasir_types::ExtentRange;

use crate::budget::{Budget, ChargedBytes, Reservation};
use crate::sync::{Mutex, MutexGuard};

/// The promotions of one memory tier.
#[derive(Debug)]
pub(crate) struct Promotions {
    promised: Budget,
    alive: Mutex<Vec<Weak<Promotion>>>,
}

impl Promotions {
    /// For a tier of `capacity` bytes.
    pub(crate) fn new(capacity: u64) -> Self {
        Self {
            promised: Budget::new(capacity / 2),
            alive: Mutex::default(),
        }
    }

    /// A promotion of a chunk of `extents` extents and `bytes` bytes; it ends with its
    /// last handle. Gathers nothing where too much is being gathered.
    pub(crate) fn begin(&self, extents: u32, bytes: u64) -> Arc<Promotion> {
        let promise = self.promised.try_reserve(bytes);
        let promotion = Arc::new(Promotion::new(extents, promise));
        let mut promotions = self.lock();
        if promotions.len() == promotions.capacity() {
            promotions.retain(|promotion| promotion.strong_count() > 0);
        }
        promotions.push(Arc::downgrade(&promotion));
        promotion
    }

    /// Lets go of all that was gathered. Says whether there was anything.
    pub(crate) fn abandon(&self) -> bool {
        let promotions = std::mem::take(&mut *self.lock());
        let alive = promotions.iter().filter_map(Weak::upgrade);
        alive.fold(false, |any, promotion| promotion.abandon() | any)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Promotion>>> {
        self.alive.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The extents that a lease has read so far, or read ahead.
#[derive(Debug)]
pub(crate) struct Promotion(Mutex<Gathered>);

#[derive(Debug)]
struct Gathered {
    extents: Vec<Slot>,
    /// `None` where nothing is gathered: done, or the memory was needed.
    promise: Option<Reservation>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    bytes: Option<ChargedBytes>,
    /// Whether the holder of the lease asked for it, and it was verified.
    read: bool,
}

impl Promotion {
    fn new(extents: u32, promise: Option<Reservation>) -> Self {
        Self(Mutex::new(Gathered {
            extents: vec![Slot::default(); extents as usize],
            promise,
        }))
    }

    pub(crate) fn gathers(&self) -> bool {
        self.lock().promise.is_some()
    }

    /// Keeps all extents, of which none was asked for yet.
    pub(crate) fn read_ahead(&self, extents: Vec<ChargedBytes>) {
        let mut gathered = self.lock();
        if gathered.promise.is_none() {
            return;
        }
        for (slot, bytes) in gathered.extents.iter_mut().zip(extents) {
            slot.bytes = Some(bytes);
        }
    }

    /// The extents of `range`, where all of them were read ahead or before. Unverified.
    pub(crate) fn get(&self, range: ExtentRange) -> Option<Vec<ChargedBytes>> {
        let gathered = self.lock();
        let range = range.start() as usize..range.end() as usize;
        let slots = gathered.extents.get(range)?.iter();
        slots.map(|slot| slot.bytes.clone()).collect()
    }

    /// Keeps `extents`; gives all of them, once, when none is left to be read.
    pub(crate) fn add(
        &self,
        range: ExtentRange,
        extents: Vec<ChargedBytes>,
    ) -> Option<Vec<ChargedBytes>> {
        let mut gathered = self.lock();
        gathered.promise.as_ref()?;
        let slots = gathered.extents.iter_mut().skip(range.start() as usize);
        for (slot, bytes) in slots.zip(extents) {
            *slot = Slot {
                bytes: Some(bytes),
                read: true,
            };
        }
        if !gathered.extents.iter().all(|slot| slot.read) {
            return None;
        }
        gathered.promise = None;
        let extents = std::mem::take(&mut gathered.extents).into_iter();
        extents.map(|slot| slot.bytes).collect()
    }

    fn abandon(&self) -> bool {
        let mut gathered = self.lock();
        gathered.promise = None;
        std::mem::take(&mut gathered.extents)
            .iter()
            .any(|slot| slot.bytes.is_some())
    }

    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn range(start: u32, end: u32) -> ExtentRange {
        ExtentRange::new(start, end).unwrap()
    }

    #[test]
    fn whole_chunks_come_out_once() {
        let budget = Budget::new(100);
        let mut reservation = budget.try_reserve(20).unwrap();
        let mut extent = || reservation.charge(Bytes::from(vec![0; 5])).unwrap();
        let promotion = Promotions::new(20).begin(2, 10);
        assert!(promotion.add(range(1, 2), vec![extent()]).is_none());
        assert_eq!(promotion.add(range(0, 1), vec![extent()]).unwrap().len(), 2);
        assert!(promotion.add(range(0, 1), vec![extent()]).is_none());
    }

    #[test]
    fn gathered_layers_give_way() {
        let budget = Budget::new(100);
        let promotions = Promotions::new(40);
        let promotion = promotions.begin(2, 10);
        assert!(!promotions.abandon(), "nothing was gathered");
        let promotion = [promotion, promotions.begin(2, 10)];
        for promotion in &promotion {
            let mut reservation = budget.try_reserve(5).unwrap();
            let extent = reservation.charge(Bytes::from(vec![0; 5])).unwrap();
            promotion.add(range(0, 1), vec![extent]);
        }
        // The first was abandoned before it gathered anything, and stays so.
        assert_eq!(budget.used(), 5);
        assert!(promotions.abandon());
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn no_more_is_gathered_than_half_of_the_memory() {
        let budget = Budget::new(100);
        let promotions = Promotions::new(100);
        let [first, second] = [0, 1].map(|_| promotions.begin(1, 30));
        let add = |promotion: &Promotion| {
            let mut reservation = budget.try_reserve(30).unwrap();
            let extent = reservation.charge(Bytes::from(vec![0; 30])).unwrap();
            promotion.add(range(0, 1), vec![extent]).is_some()
        };
        assert!(!add(&second));
        assert_eq!(budget.used(), 0);
        assert!(add(&first));
        assert!(add(&promotions.begin(1, 30)), "the first is done");
    }
}
