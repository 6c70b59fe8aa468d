//! Which bytes of the segments hold frames, and which may hold the next ones. No I/O.
//!
//! A frame that was freed is a *spare*: its space stays allocated for a frame of the same
//! size, which is then written in place. That is what a full tier does all the time, and
//! it is cheap to make durable: nothing changes but the bytes, so that a sync does not
//! commit the file system's journal. Chunks of one geometry have one size, so spares fit
//! as a rule; those that do not are given back when the space is needed for others.
//!
//! A segment has one writer at a time: what a failed sync leaves unknown is then one
//! frame. It spoils its segment, which is not written any more.

use std::collections::{BTreeSet, HashMap};

use super::segment::{BLOCK_BYTES, Location, SegmentId};

#[derive(Debug)]
pub(super) struct Space {
    next: SegmentId,
    segments: HashMap<SegmentId, Segment>,
    /// Segments that have a spare of so many bytes.
    spares: HashMap<u64, BTreeSet<SegmentId>>,
    /// Segments that frames are still added to.
    open: Vec<SegmentId>,
    live_bytes: u64,
    spare_bytes: u64,
}

#[derive(Debug, Default)]
struct Segment {
    /// Bytes of frames that are stored or being written.
    live_bytes: u64,
    /// Blocks at which spares begin, by their bytes.
    spares: HashMap<u64, Vec<u32>>,
    /// Where the next frame goes, as long as there is one.
    end: Option<u32>,
    /// Whether a frame is being written.
    busy: bool,
    /// Whether nothing is written any more.
    spoiled: bool,
}

impl Segment {
    fn is_dead(&self) -> bool {
        self.is_last(0)
    }

    /// Whether it is dead without a frame of so many bytes.
    fn is_last(&self, bytes: u64) -> bool {
        let idle = !self.busy && self.end.is_none();
        idle && self.live_bytes <= bytes
    }
}

/// Something to give back to the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surplus {
    /// A segment without frames. It is no longer known here.
    Segment(SegmentId),
    /// So many bytes at a place.
    Spare(Location, u64),
}

impl Space {
    /// `live` tells for each segment how many bytes of its frames are stored; none of
    /// them is added to. `next` is greater than any number in use.
    pub(super) fn new(live: impl IntoIterator<Item = (SegmentId, u64)>, next: SegmentId) -> Self {
        let segments: HashMap<_, _> = live
            .into_iter()
            .map(|(id, live_bytes)| {
                let segment = Segment {
                    live_bytes,
                    ..Segment::default()
                };
                (id, segment)
            })
            .collect();
        Self {
            next,
            live_bytes: segments.values().map(|segment| segment.live_bytes).sum(),
            segments,
            spares: HashMap::new(),
            open: Vec::new(),
            spare_bytes: 0,
        }
    }

    /// A number for a new segment.
    pub(super) fn next_id(&mut self) -> SegmentId {
        let id = self.next;
        self.next = SegmentId(id.0.saturating_add(1));
        id
    }

    /// A new segment, which has a header.
    pub(super) fn add(&mut self, id: SegmentId) {
        let segment = Segment {
            end: Some(1),
            ..Segment::default()
        };
        self.segments.insert(id, segment);
        self.open.push(id);
    }

    /// The place of a spare of this size, whose segment nobody else writes until
    /// [`written`](Self::written) or [`spoil`](Self::spoil).
    pub(super) fn reuse(&mut self, bytes: u64) -> Option<Location> {
        let ids = self.spares.get(&bytes)?.iter().copied();
        let segment = ids
            .into_iter()
            .find(|id| self.segments.get(id).is_some_and(|segment| !segment.busy))?;
        let location = self.take_spare(segment, bytes)?;
        self.claim(segment, bytes);
        Some(location)
    }

    /// A place at the end of a segment that is then at most `segment_bytes` large or has
    /// this frame alone; see [`reuse`](Self::reuse).
    pub(super) fn extend(&mut self, bytes: u64, segment_bytes: u64) -> Option<Location> {
        let blocks = u32::try_from(bytes / BLOCK_BYTES).ok()?;
        let Self { open, segments, .. } = self;
        let mut found = None;
        open.retain(|id| {
            let Some(segment) = segments.get_mut(id) else {
                return false;
            };
            let Some(end) = segment.end.filter(|_| found.is_none() && !segment.busy) else {
                return segment.end.is_some();
            };
            let used = u64::from(end) * BLOCK_BYTES;
            let fits = used.saturating_add(bytes) <= segment_bytes || end == 1;
            segment.end = end.checked_add(blocks).filter(|_| fits);
            if segment.end.is_some() {
                found = Some(Location {
                    segment: *id,
                    block: end,
                });
            }
            segment.end.is_some()
        });
        self.claim(found?.segment, bytes);
        found
    }

    /// A frame was written; its segment can be written again.
    pub(super) fn written(&mut self, id: SegmentId) {
        if let Some(segment) = self.segments.get_mut(&id) {
            segment.busy = false;
        }
    }

    /// Nothing is written to a segment any more. Its spares are surplus, and what is
    /// freed in it is given back at once.
    pub(super) fn spoil(&mut self, id: SegmentId) {
        self.written(id);
        if let Some(segment) = self.segments.get_mut(&id) {
            segment.end = None;
            segment.spoiled = true;
            for bytes in segment.spares.keys() {
                if let Some(ids) = self.spares.get_mut(bytes) {
                    ids.remove(&id);
                }
            }
        }
    }

    /// Nothing is added to the segments that there are.
    pub(super) fn seal(&mut self) {
        for id in self.open.drain(..) {
            if let Some(segment) = self.segments.get_mut(&id) {
                segment.end = None;
            }
        }
    }

    /// Keeps a frame as a spare. `false` where its space must be given back first; see
    /// [`given_back`](Self::given_back).
    pub(super) fn free(&mut self, location: Location, bytes: u64) -> bool {
        let Some(segment) = self.segments.get(&location.segment) else {
            return true;
        };
        if segment.spoiled && !segment.is_last(bytes) {
            return false;
        }
        self.given_back(location.segment, bytes);
        self.keep_spare(location, bytes);
        true
    }

    /// The space of a frame was given back.
    pub(super) fn given_back(&mut self, id: SegmentId, bytes: u64) {
        if let Some(segment) = self.segments.get_mut(&id) {
            segment.live_bytes = segment.live_bytes.saturating_sub(bytes);
            self.live_bytes = self.live_bytes.saturating_sub(bytes);
        }
    }

    /// Something that must be given back so that no more than `limit` bytes are allocated:
    /// whole segments first, then spares of those with the fewest frames. Segments that
    /// hold nothing at all are surplus whatever the limit.
    pub(super) fn surplus(&mut self, limit: u64) -> Option<Surplus> {
        let excess = self.live_bytes.saturating_add(self.spare_bytes) > limit;
        let candidates = self.segments.iter().filter(|(_, segment)| {
            let nothing = segment.is_dead() && (segment.spoiled || segment.spares.is_empty());
            nothing || (excess && !segment.spares.is_empty())
        });
        let least = candidates.min_by_key(|(_, segment)| (!segment.is_dead(), segment.live_bytes));
        let (&id, segment) = least?;
        if segment.is_dead() {
            self.remove(id);
            return Some(Surplus::Segment(id));
        }
        let bytes = *segment.spares.keys().next()?;
        let location = self.take_spare(id, bytes)?;
        Some(Surplus::Spare(location, bytes))
    }

    /// Takes a spare, or one that could not be given back, in again.
    pub(super) fn keep_spare(&mut self, location: Location, bytes: u64) {
        let id = location.segment;
        let Some(segment) = self.segments.get_mut(&id) else {
            return;
        };
        segment
            .spares
            .entry(bytes)
            .or_default()
            .push(location.block);
        if !segment.spoiled {
            self.spares.entry(bytes).or_default().insert(id);
        }
        self.spare_bytes += bytes;
    }

    fn take_spare(&mut self, id: SegmentId, bytes: u64) -> Option<Location> {
        let segment = self.segments.get_mut(&id)?;
        let blocks = segment.spares.get_mut(&bytes)?;
        let block = blocks.pop()?;
        if blocks.is_empty() {
            segment.spares.remove(&bytes);
            if let Some(ids) = self.spares.get_mut(&bytes) {
                ids.remove(&id);
                if ids.is_empty() {
                    self.spares.remove(&bytes);
                }
            }
        }
        self.spare_bytes = self.spare_bytes.saturating_sub(bytes);
        Some(Location { segment: id, block })
    }

    fn claim(&mut self, id: SegmentId, bytes: u64) {
        if let Some(segment) = self.segments.get_mut(&id) {
            segment.busy = true;
            segment.live_bytes += bytes;
            self.live_bytes += bytes;
        }
    }

    fn remove(&mut self, id: SegmentId) {
        let Some(segment) = self.segments.remove(&id) else {
            return;
        };
        for (bytes, blocks) in segment.spares {
            self.spare_bytes = self.spare_bytes.saturating_sub(bytes * blocks.len() as u64);
            if let Some(ids) = self.spares.get_mut(&bytes) {
                ids.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    const SEGMENT_BYTES: u64 = 8 * BLOCK_BYTES;

    fn place(space: &mut Space, bytes: u64) -> Location {
        if let Some(location) = space.reuse(bytes) {
            return location;
        }
        loop {
            if let Some(location) = space.extend(bytes, SEGMENT_BYTES) {
                return location;
            }
            let id = space.next_id();
            space.add(id);
        }
    }

    fn store(space: &mut Space, blocks: u64) -> Location {
        let location = place(space, blocks * BLOCK_BYTES);
        space.written(location.segment);
        location
    }

    fn at(segment: u32, block: u32) -> Location {
        let segment = SegmentId(segment);
        Location { segment, block }
    }

    #[test]
    fn a_freed_place_is_used_again_by_what_has_its_size() {
        let mut space = Space::new([], SegmentId(4));
        let places = [2, 3, 2].map(|blocks| store(&mut space, blocks));
        assert_eq!(places, [at(4, 1), at(4, 3), at(4, 6)]);
        assert!(space.free(places[0], 2 * BLOCK_BYTES));
        assert_eq!(store(&mut space, 3), at(5, 1), "the first segment is full");
        assert_eq!(store(&mut space, 2), places[0]);
        assert_eq!(space.surplus(u64::MAX), None);
    }

    #[test]
    fn a_segment_has_one_writer() {
        let mut space = Space::new([], SegmentId(0));
        let bytes = BLOCK_BYTES;
        let stored = store(&mut space, 1);
        let writing = place(&mut space, bytes);
        assert_eq!(writing.segment, stored.segment);
        assert!(space.free(stored, bytes));
        let other = place(&mut space, bytes);
        assert_ne!(other.segment, writing.segment);
        space.written(writing.segment);
        assert_eq!(place(&mut space, bytes), stored);
    }

    #[test]
    fn nothing_is_written_to_a_spoiled_segment() {
        let mut space = Space::new([], SegmentId(0));
        let bytes = BLOCK_BYTES;
        let [first, second, third] = [(); 3].map(|()| store(&mut space, 1));
        assert!(space.free(first, bytes));
        space.spoil(SegmentId(0));
        assert_eq!(store(&mut space, 1).segment, SegmentId(1));
        assert!(!space.free(second, bytes), "its space is given back");
        space.given_back(second.segment, bytes);
        assert!(space.free(third, bytes));
        assert_eq!(
            space.surplus(u64::MAX),
            Some(Surplus::Segment(SegmentId(0)))
        );
        assert_eq!(space.surplus(bytes), None);
    }

    #[test]
    fn segments_without_frames_go_first() {
        let bytes = BLOCK_BYTES;
        let mut space = Space::new([(SegmentId(1), bytes)], SegmentId(2));
        let stored = [(); 8].map(|()| store(&mut space, 1));
        assert!(space.free(stored[7], bytes));
        assert!(space.free(at(1, 1), bytes));
        assert_eq!(space.surplus(9 * bytes), None);
        assert_eq!(
            space.surplus(7 * bytes),
            Some(Surplus::Segment(SegmentId(1)))
        );
        assert_eq!(
            space.surplus(7 * bytes),
            Some(Surplus::Spare(stored[7], bytes))
        );
        assert_eq!(space.surplus(0), None);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Store(u64),
        Free(usize),
        Trim(u64),
        Spoil(u32),
    }

    fn step() -> impl proptest::strategy::Strategy<Value = Step> {
        use proptest::prelude::*;
        prop_oneof![
            4 => (1..5u64).prop_map(Step::Store),
            4 => any::<usize>().prop_map(Step::Free),
            1 => (0..40u64).prop_map(Step::Trim),
            1 => (0..6u32).prop_map(Step::Spoil),
        ]
    }

    proptest::proptest! {
        /// Frames never overlap, and all that is allocated is known.
        #[test]
        fn places_are_kept_apart(steps in proptest::collection::vec(step(), 0..120)) {
            let mut space = Space::new([], SegmentId(0));
            // What the file system has, frames and spares; and frames alone.
            let mut allocated: Vec<(SegmentId, Range<u64>)> = Vec::new();
            let mut frames: Vec<(Location, u64)> = Vec::new();
            let range = |location: Location, bytes| {
                let start = location.offset();
                (location.segment, start..start + bytes)
            };
            for step in steps {
                match step {
                    Step::Store(blocks) => {
                        let bytes = blocks * BLOCK_BYTES;
                        let location = store(&mut space, blocks);
                        let (id, place) = range(location, bytes);
                        for &(other, bytes) in &frames {
                            let (of, other) = range(other, bytes);
                            let apart = other.end <= place.start || place.end <= other.start;
                            proptest::prop_assert!(of != id || apart);
                        }
                        frames.push((location, bytes));
                        if !allocated.contains(&(id, place.clone())) {
                            allocated.push((id, place));
                        }
                    }
                    Step::Free(number) if !frames.is_empty() => {
                        let (location, bytes) = frames.swap_remove(number % frames.len());
                        if !space.free(location, bytes) {
                            allocated.retain(|place| *place != range(location, bytes));
                            space.given_back(location.segment, bytes);
                        }
                    }
                    Step::Free(_) => (),
                    Step::Spoil(id) => space.spoil(SegmentId(id)),
                    Step::Trim(blocks) => {
                        let limit = blocks * BLOCK_BYTES;
                        while let Some(surplus) = space.surplus(limit) {
                            match surplus {
                                Surplus::Segment(id) => {
                                    let dead = frames.iter().all(|(at, _)| at.segment != id);
                                    proptest::prop_assert!(dead);
                                    allocated.retain(|(of, _)| *of != id);
                                }
                                Surplus::Spare(location, bytes) => {
                                    let place = range(location, bytes);
                                    let before = allocated.len();
                                    allocated.retain(|other| *other != place);
                                    proptest::prop_assert_eq!(allocated.len() + 1, before);
                                }
                            }
                        }
                        let live: u64 = frames.iter().map(|(_, bytes)| bytes).sum();
                        let taken: u64 = allocated.iter().map(|(_, at)| at.end - at.start).sum();
                        proptest::prop_assert!(taken <= limit.max(live), "{taken} {limit} {live}");
                    }
                }
            }
        }
    }
}
