//! What was evicted lately: a bounded table of fingerprints.

/// An evicted chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ghost {
    /// How often the chunk was used: a number below 4.
    pub(super) uses: u8,
    /// When it was last used, in ticks, to 8 of them.
    pub(super) last: u32,
}

/// Four ways a set, 4 bytes an entry. Of one set, the least recently used ghost gives
/// way. A chunk is taken for another one in 4000 times, and a ghost of 36 hours for a
/// young one, which statistics bear.
#[derive(Debug)]
pub(super) struct Ghosts {
    /// From the lowest bit: 16 of the time, 2 of the lane, 14 of the key. 0 is none.
    entries: Vec<u32>,
}

impl Ghosts {
    pub(super) fn new() -> Self {
        Self {
            entries: vec![0; MIN_ENTRIES],
        }
    }

    /// Grows to `entries` at least, and then forgets all.
    pub(super) fn reserve(&mut self, entries: usize) {
        if entries > self.entries.len() {
            self.entries = vec![0; entries.next_power_of_two()];
        }
    }

    #[cfg(test)]
    pub(super) fn allocated_bytes(&self) -> usize {
        self.entries.capacity() * size_of::<u32>()
    }

    /// Remembers a chunk. Returns the ghost that gave way.
    pub(super) fn insert(&mut self, key: u64, ghost: Ghost, now: u32) -> Option<Ghost> {
        let entry = tag(key) | u32::from(ghost.uses) << TIME_BITS | time(ghost.last);
        let oldest = self
            .set(key)
            .iter_mut()
            .max_by_key(|entry| parse(**entry, now).map_or(u32::MAX, |ghost| now - ghost.last))
            .expect("a set has four ways");
        parse(std::mem::replace(oldest, entry), now)
    }

    /// Forgets a chunk, and says what was known of it.
    pub(super) fn take(&mut self, key: u64, now: u32) -> Option<Ghost> {
        let same = |entry: &&mut u32| **entry & TAG == tag(key);
        let entry = self.set(key).iter_mut().find(same)?;
        parse(std::mem::take(entry), now)
    }

    /// Some of the ghosts, and how many each stands for.
    pub(super) fn sample(&self, now: u32) -> impl Iterator<Item = (Ghost, f32)> {
        // Odd, so that it meets all ways of sets.
        let step = self.entries.len().div_ceil(SAMPLE_ENTRIES) | 1;
        #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
        let weight = step as f32;
        let entries = self.entries.iter().step_by(step);
        entries.filter_map(move |entry| Some((parse(*entry, now)?, weight)))
    }

    fn set(&mut self, key: u64) -> &mut [u32] {
        let sets = self.entries.len() / WAYS;
        #[expect(clippy::cast_possible_truncation, reason = "the low bits are meant")]
        let set = key as usize & (sets - 1);
        &mut self.entries[set * WAYS..][..WAYS]
    }
}

/// The ghost of an entry, whose time is the last such before `now`.
fn parse(entry: u32, now: u32) -> Option<Ghost> {
    if entry == 0 {
        return None;
    }
    let age = time(now).wrapping_sub(entry) & TIME;
    Some(Ghost {
        uses: ((entry >> TIME_BITS) & 3) as u8,
        last: now.saturating_sub(age * TICKS_PER_TIME),
    })
}

/// Never zero, so that no entry is.
fn tag(key: u64) -> u32 {
    let tag = (key >> 32) as u32;
    (tag & TAG).max(1 << (TIME_BITS + 2))
}

fn time(tick: u32) -> u32 {
    (tick / TICKS_PER_TIME) & TIME
}

const TIME_BITS: u32 = 16;
const TIME: u32 = (1 << TIME_BITS) - 1;
const TAG: u32 = !0 << (TIME_BITS + 2);
/// Two seconds.
const TICKS_PER_TIME: u32 = 8;
const WAYS: usize = 4;
/// Looked at for statistics, at most.
const SAMPLE_ENTRIES: usize = 1 << 16;
/// 64 KiB.
const MIN_ENTRIES: usize = 1 << 14;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ghosts_are_found_once_and_the_oldest_of_a_set_gives_way() {
        let mut ghosts = Ghosts::new();
        let key = |n: u32| (u64::from(n) + 1) << 60 | 7;
        let ghost = |last| Ghost { uses: 3, last };
        let now = 1 << 20;
        for n in 0..4 {
            assert_eq!(ghosts.insert(key(n), ghost(now - 80 + 8 * n), now), None);
        }
        assert_eq!(ghosts.take(key(2), now), Some(ghost(now - 64)));
        assert_eq!(ghosts.take(key(2), now), None);
        assert_eq!(ghosts.insert(key(4), ghost(now), now), None);
        let lost = ghosts.insert(key(5), ghost(now), now);
        assert_eq!(lost, Some(ghost(now - 80)));
        assert_eq!(ghosts.take(key(0), now), None);
        assert_eq!(ghosts.take(key(1), now), Some(ghost(now - 72)));
    }
}
