//! When chunks are used again, learnt from when they were.
//!
//! Chunks of one *lane* (how often they were used) are taken to be alike. For each lane
//! and each age since the last use, a decaying count of the chunks that reached that
//! age and of those used again at it gives the hazard of reuse; ghosts, that still may
//! be used again, count as having reached their age (Kaplan and Meier, 1958). From
//! hazards follow two numbers:
//!
//! * [`Reuse::rate`], the order of eviction: the best hits per second of residence
//!   that keeping the chunk from now on, for as long as is best, promises. This is
//!   the index of Gittins (1979), and hit density as in LHD (Beckmann, Chen and
//!   Cidon, NSDI 2018) with the optimal stopping time instead of the policy's own.
//! * [`Reuse::probability`], for admission: that the chunk is used again at all.
//!
//! Conversations show why recency is not enough: nobody answers within seconds, so a
//! chunk is worth less right after its use than a minute later, and then less again.

/// Lanes: used once, twice, three times, more often.
pub(super) const USES: u8 = 4;

/// Ages that are told apart: exact below 8 ticks, then four per doubling.
pub(super) const AGES: usize = 8 + 4 * 22;

/// The bucket of an age in ticks.
pub(super) fn bucket(age: u32) -> usize {
    if age < 8 {
        return age as usize;
    }
    let octave = age.ilog2();
    let quarter = (age >> (octave - 2)) & 3;
    (8 + 4 * (octave as usize - 3) + quarter as usize).min(AGES - 1)
}

/// Ticks that a bucket spans.
fn width(bucket: usize) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "powers of two are exact")]
    let ticks = (1u32 << (bucket.saturating_sub(4) / 4)) as f32;
    ticks
}

#[derive(Debug)]
pub(super) struct Reuse {
    lanes: Vec<Lane>,
    events: u64,
}

#[derive(Clone, Debug)]
struct Lane {
    used: [f32; AGES],
    /// Chunks that were last seen at this age, and not used again.
    lost: [f32; AGES],
    rate: [f32; AGES],
    probability: [f32; AGES],
}

impl Reuse {
    pub(super) fn new(lanes: usize) -> Self {
        Self {
            lanes: vec![Lane::new(); lanes],
            events: 0,
        }
    }

    /// A chunk was used again at `age`.
    pub(super) fn used(&mut self, lane: u8, age: u32) {
        self.lanes[usize::from(lane)].used[bucket(age)] += 1.0;
        self.events += 1;
    }

    /// A chunk was lost sight of at `age`.
    pub(super) fn lost(&mut self, lane: u8, age: u32) {
        self.lanes[usize::from(lane)].lost[bucket(age)] += 1.0;
        self.events += 1;
    }

    /// Whether there is enough to learn from, in relation to the number of chunks.
    pub(super) fn is_due(&self, chunks: usize) -> bool {
        self.events >= REFIT_EVENTS.max(chunks as u64 / 8)
    }

    /// Learns from the events so far, and from chunks that may be used again: lane, age
    /// and how many each stands for. Then old events count a little less.
    pub(super) fn learn(&mut self, waiting: impl Iterator<Item = (u8, u32, f32)>) {
        let mut counts = vec![[0.0; AGES]; self.lanes.len()];
        for (lane, age, weight) in waiting {
            counts[usize::from(lane)][bucket(age)] += weight;
        }
        for (lane, waiting) in self.lanes.iter_mut().zip(&counts) {
            lane.learn(waiting);
        }
        self.events = 0;
    }

    /// Uses per tick that a chunk promises; see the module's documentation.
    pub(super) fn rate(&self, lane: u8, age: u32) -> f32 {
        self.lanes[usize::from(lane)].rate[bucket(age)]
    }

    /// Probability that a chunk will be used again.
    pub(super) fn probability(&self, lane: u8, age: u32) -> f32 {
        self.lanes[usize::from(lane)].probability[bucket(age)]
    }
}

impl Lane {
    /// As if all had been learnt from least recently used chunks.
    fn new() -> Self {
        let mut rate = [0.0; AGES];
        let mut age = 1.0;
        for (bucket, rate) in rate.iter_mut().enumerate() {
            *rate = 1.0 / age;
            age += width(bucket);
        }
        Self {
            used: [0.0; AGES],
            lost: [0.0; AGES],
            rate,
            probability: [1.0; AGES],
        }
    }

    fn learn(&mut self, waiting: &[f32; AGES]) {
        let mut hazard = [0.0f32; AGES];
        let mut reached = 0.0;
        for age in (0..AGES).rev() {
            reached += self.used[age] + self.lost[age] + waiting[age];
            hazard[age] = self.used[age] / (reached + PRIOR_CHUNKS);
        }
        if reached < PRIOR_CHUNKS {
            return;
        }
        let mut never = 1.0;
        for age in (0..AGES).rev() {
            never *= 1.0 - hazard[age];
            self.probability[age] = 1.0 - never;
            let (mut alive, mut uses, mut ticks) = (1.0, 0.0, 0.0);
            let mut best = 0.0f32;
            for (later, hazard) in hazard.iter().enumerate().skip(age) {
                let used = alive * hazard;
                uses += used;
                ticks += (alive - used / 2.0) * width(later);
                alive -= used;
                best = best.max(uses / ticks);
            }
            self.rate[age] = best;
        }
        for count in self.used.iter_mut().chain(&mut self.lost) {
            *count *= DECAY;
        }
    }
}

/// Events between two fits, at least. Each takes some 20 µs a lane.
const REFIT_EVENTS: u64 = 4096;
/// What is left of a count at the next fit: the last ten fits or so matter.
const DECAY: f32 = 0.9;
/// Unseen chunks that are never used again, so that little evidence claims little.
const PRIOR_CHUNKS: f32 = 20.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_tile_the_ages() {
        let mut start = 0.0;
        for age in 0..100_000u32 {
            let before = bucket(age);
            let after = bucket(age + 1);
            assert!(after == before || after == before + 1, "{age}");
            if after > before {
                start += width(before);
                assert_eq!(start, (age + 1) as f32, "bucket {before}");
            }
        }
        assert_eq!(bucket(u32::MAX), AGES - 1);
    }

    #[test]
    fn what_is_used_again_after_a_pause_is_worth_most_at_its_end() {
        let mut reuse = Reuse::new(2);
        for n in 0..4000 {
            reuse.used(0, 100 + n % 20);
            reuse.lost(1, 1000);
        }
        reuse.learn(std::iter::empty());
        let rates = [0, 50, 99, 300].map(|age| reuse.rate(0, age));
        assert!(rates[0] < rates[1] && rates[1] < rates[2], "{rates:?}");
        assert_eq!(rates[3], 0.0);
        assert_eq!(reuse.rate(1, 0), 0.0);
        assert!(reuse.probability(0, 0) > 0.9 && reuse.probability(1, 0) < 0.1);
    }
}
