//! Layers on their way from disk into memory.
//!
//! A lease that reads a chunk from disk gathers its layers; when none is missing,
//! the chunk moves into the memory tier. What was gathered so far serves nobody
//! yet, so it gives way to every request for memory that would be refused
//! otherwise: many chunks read side by side, layer by layer, would else fill the
//! memory with chunks none of which is whole.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvasir_types::LayerRange;

use crate::budget::ChargedBytes;

/// The promotions of one memory tier.
#[derive(Debug, Default)]
pub(crate) struct Promotions(Mutex<Vec<Weak<Promotion>>>);

impl Promotions {
    /// A promotion of a chunk of `layers` layers; it ends with its last handle.
    pub(crate) fn begin(&self, layers: u16) -> Arc<Promotion> {
        let promotion = Arc::new(Promotion::new(layers));
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The layers that a lease has read so far.
#[derive(Debug)]
pub(crate) struct Promotion(Mutex<Gathered>);

#[derive(Debug)]
struct Gathered {
    layers: Vec<Option<ChargedBytes>>,
    /// No longer wanted: done, or the memory was needed.
    over: bool,
}

impl Promotion {
    fn new(layers: u16) -> Self {
        Self(Mutex::new(Gathered {
            layers: vec![None; usize::from(layers)],
            over: false,
        }))
    }

    /// Keeps `layers`; gives all of them, once, when none is missing.
    pub(crate) fn add(
        &self,
        range: LayerRange,
        layers: Vec<ChargedBytes>,
    ) -> Option<Vec<ChargedBytes>> {
        let mut gathered = self.lock();
        if gathered.over {
            return None;
        }
        let slots = gathered.layers.iter_mut().skip(range.start().into());
        for (slot, layer) in slots.zip(layers) {
            *slot = Some(layer);
        }
        if gathered.layers.iter().any(Option::is_none) {
            return None;
        }
        gathered.over = true;
        std::mem::take(&mut gathered.layers).into_iter().collect()
    }

    fn abandon(&self) -> bool {
        let mut gathered = self.lock();
        gathered.over = true;
        std::mem::take(&mut gathered.layers)
            .iter()
            .any(Option::is_some)
    }

    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::budget::Budget;

    fn range(start: u16, end: u16) -> LayerRange {
        LayerRange::new(start, end).unwrap()
    }

    #[test]
    fn whole_chunks_come_out_once() {
        let budget = Budget::new(100);
        let mut reservation = budget.try_reserve(20).unwrap();
        let mut layer = || reservation.charge(Bytes::from(vec![0; 5])).unwrap();
        let promotion = Promotions::default().begin(2);
        assert!(promotion.add(range(1, 2), vec![layer()]).is_none());
        assert_eq!(promotion.add(range(0, 1), vec![layer()]).unwrap().len(), 2);
        assert!(promotion.add(range(0, 1), vec![layer()]).is_none());
    }

    #[test]
    fn gathered_layers_give_way() {
        let budget = Budget::new(100);
        let promotions = Promotions::default();
        let promotion = promotions.begin(2);
        assert!(!promotions.abandon(), "nothing was gathered");
        let promotion = [promotion, promotions.begin(2)];
        for promotion in &promotion {
            let mut reservation = budget.try_reserve(5).unwrap();
            let layer = reservation.charge(Bytes::from(vec![0; 5])).unwrap();
            promotion.add(range(0, 1), vec![layer]);
        }
        // The first was abandoned before it gathered anything, and stays so.
        assert_eq!(budget.used(), 5);
        assert!(promotions.abandon());
        assert_eq!(budget.used(), 0);
    }
}
