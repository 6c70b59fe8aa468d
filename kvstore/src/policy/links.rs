//! Doubly linked lists threaded through one flat vector.
//!
//! Lists are circular around a head, so a slot leaves its list without knowing
//! which one it is, and two lists join in constant time.

/// A place in a list: a slot, or the head of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place(u32);

impl Place {
    const HEAD: u32 = 1 << 31;
    /// In no list.
    const NONE: Self = Self(u32::MAX);

    fn of(slot: u32) -> Self {
        debug_assert!(slot < Self::HEAD, "slots have 31 bits");
        Self(slot)
    }
}

/// A list; see [`Links::list`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct List(Place);

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: Place,
    next: Place,
}

impl Link {
    const NONE: Self = Self {
        previous: Place::NONE,
        next: Place::NONE,
    };
}

/// All lists of one policy. A slot is in one of them or in none.
#[derive(Debug, Default)]
pub(super) struct Links {
    slots: Vec<Link>,
    heads: Vec<Link>,
    free: Vec<List>,
}

impl Links {
    /// A new, empty list.
    pub(super) fn list(&mut self) -> List {
        if let Some(list) = self.free.pop() {
            return list;
        }
        let number = u32::try_from(self.heads.len()).expect("there are a few thousand lists");
        let head = Place(Place::HEAD | number);
        self.heads.push(Link {
            previous: head,
            next: head,
        });
        List(head)
    }

    /// Makes room for `more` slots.
    pub(super) fn reserve(&mut self, more: usize) {
        self.slots.reserve(more);
    }

    #[cfg(test)]
    pub(super) fn allocated_bytes(&self) -> usize {
        (self.slots.capacity() + self.heads.capacity()) * size_of::<Link>()
    }

    /// Returns an empty list for reuse.
    pub(super) fn recycle(&mut self, list: List) {
        debug_assert!(self.is_empty(list), "only empty lists are recycled");
        self.free.push(list);
    }

    pub(super) fn is_empty(&self, list: List) -> bool {
        self.at(list.0).next == list.0
    }

    pub(super) fn contains(&self, slot: u32) -> bool {
        let link = self.slots.get(slot as usize);
        link.is_some_and(|link| link.next != Place::NONE)
    }

    pub(super) fn front(&self, list: List) -> Option<u32> {
        Self::slot(self.at(list.0).next)
    }

    pub(super) fn back(&self, list: List) -> Option<u32> {
        Self::slot(self.at(list.0).previous)
    }

    pub(super) fn push_front(&mut self, list: List, slot: u32) {
        let next = self.at(list.0).next;
        self.insert(list.0, slot, next);
    }

    pub(super) fn push_back(&mut self, list: List, slot: u32) {
        let previous = self.at(list.0).previous;
        self.insert(previous, slot, list.0);
    }

    /// Takes a slot out of its list, if it is in one.
    pub(super) fn remove(&mut self, slot: u32) {
        if !self.contains(slot) {
            return;
        }
        let link = std::mem::replace(self.at_mut(Place::of(slot)), Link::NONE);
        self.join(link.previous, link.next);
    }

    /// Moves all of `from` behind the last of `to`.
    pub(super) fn append(&mut self, to: List, from: List) {
        if self.is_empty(from) {
            return;
        }
        let moved = *self.at(from.0);
        let last = self.at(to.0).previous;
        self.join(last, moved.next);
        self.join(moved.previous, to.0);
        self.join(from.0, from.0);
    }

    fn insert(&mut self, previous: Place, slot: u32, next: Place) {
        let place = Place::of(slot);
        if self.slots.len() <= slot as usize {
            self.slots.resize(slot as usize + 1, Link::NONE);
        }
        debug_assert!(!self.contains(slot), "a slot is in one list");
        self.join(previous, place);
        self.join(place, next);
    }

    fn join(&mut self, previous: Place, next: Place) {
        self.at_mut(previous).next = next;
        self.at_mut(next).previous = previous;
    }

    fn slot(place: Place) -> Option<u32> {
        (place.0 & Place::HEAD == 0).then_some(place.0)
    }

    fn at(&self, place: Place) -> &Link {
        match Self::slot(place) {
            Some(slot) => &self.slots[slot as usize],
            None => &self.heads[(place.0 & !Place::HEAD) as usize],
        }
    }

    fn at_mut(&mut self, place: Place) -> &mut Link {
        match Self::slot(place) {
            Some(slot) => &mut self.slots[slot as usize],
            None => &mut self.heads[(place.0 & !Place::HEAD) as usize],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(links: &mut Links, list: List) -> Vec<u32> {
        std::iter::from_fn(|| {
            let slot = links.front(list)?;
            links.remove(slot);
            Some(slot)
        })
        .collect()
    }

    #[test]
    fn slots_leave_lists_that_were_joined() {
        let mut links = Links::default();
        let (left, right) = (links.list(), links.list());
        for slot in 0..3 {
            links.push_back(left, slot);
            links.push_front(right, 10 + slot);
        }
        links.append(left, right);
        assert!(links.is_empty(right));
        links.remove(1);
        links.remove(11);
        links.remove(11);
        assert_eq!(links.back(left), Some(10));
        assert_eq!(drain(&mut links, left), [0, 2, 12, 10]);
        links.push_back(right, 1);
        assert_eq!(drain(&mut links, right), [1]);
    }
}
