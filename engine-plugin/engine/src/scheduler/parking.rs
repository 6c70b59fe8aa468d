//! Which sequences run, where memory holds the KV of a few only: the others are parked, and take
//! turns.
//!
//! A turn is [`PagingConfig::turn_batches`](super::PagingConfig) batches. Who has one runs on;
//! behind these come those that wait, first who has waited longest, and nobody overtakes one
//! that does not fit yet: so each gets its turn when those before it have had theirs, be it to
//! compute its prompt or to decode.
//!
//! Sequences run together while all that they read is in memory at once, so that a turn moves
//! their pages once. Those that are too large for that even alone read all of theirs with every
//! token, and run together as far as one layer of them fits.
//!
//! Parking waits for its writes, and so does everybody, as long as they come to their end: until
//! none has for [`PagingConfig::timeout`](super::PagingConfig). What could not be parked runs on,
//! and nobody else comes in for a turn.

use super::engine_loop::EngineLoop;
use super::sequence::{Phase, Sequence};
use crate::config::ModelConfig;
use crate::kernels::KEY_TILE;
use crate::kv::BLOCK_TOKENS;
use crate::paging::Pager;

/// What a sequence has of turns.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// Batches that are left of it.
    left: usize,
    /// The batch of the loop in which it last ran, or before which it came.
    since: u64,
    /// What it has is in the scratch file.
    pub(super) is_parked: bool,
}

impl Turn {
    pub(super) fn waiting(since: u64) -> Self {
        Self {
            since,
            ..Self::default()
        }
    }

    /// Lets all others go first that wait now.
    pub(super) fn end(&mut self, now: u64) {
        self.left = 0;
        self.since = now;
    }

    /// Takes note of a batch that it was in.
    pub(super) fn ran(&mut self, now: u64) {
        self.left = self.left.saturating_sub(1);
        self.since = now;
    }
}

/// What a sequence reads in its next batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Need {
    /// Pages of the layer that reads most.
    layer: usize,
    /// Pages of all layers, each counted by itself.
    all: usize,
}

/// Room for what runs together.
#[derive(Debug)]
struct Room {
    /// Pages that fit into memory, those of each layer counted by themselves.
    most: usize,
    /// What is left of these for a layer, and for all layers.
    layer: usize,
    all: usize,
    is_empty: bool,
    /// Nothing in it fits into memory by itself.
    only_large: bool,
}

impl Room {
    fn new(most: usize) -> Self {
        Self {
            most,
            layer: most,
            all: most,
            is_empty: true,
            only_large: true,
        }
    }

    /// The first gets in whatever it needs: admission has seen to it that it fits.
    fn take(&mut self, need: Need) -> bool {
        let is_large = need.all > self.most;
        let fits =
            need.layer <= self.layer && (need.all <= self.all || (is_large && self.only_large));
        if !fits && !self.is_empty {
            return false;
        }
        self.layer = self.layer.saturating_sub(need.layer);
        self.all = self.all.saturating_sub(need.all);
        self.only_large &= is_large;
        self.is_empty = false;
        true
    }
}

/// Who gets in, of those that wish to: what is left of their turns, since when they wait, and
/// what they need.
fn admitted(memory: usize, wishes: &[Option<(usize, u64, Need)>]) -> Vec<bool> {
    let mut order: Vec<(bool, u64, usize, Need)> = wishes
        .iter()
        .enumerate()
        .filter_map(|(index, wish)| {
            let (left, since, need) = (*wish)?;
            Some((left == 0, since, index, need))
        })
        .collect();
    order.sort_by_key(|&(waits, since, index, _)| (waits, since, index));
    let mut room = Room::new(memory);
    let mut runs = vec![false; wishes.len()];
    for (waits, _, index, need) in order {
        runs[index] = room.take(need);
        // Nobody overtakes who waits.
        if waits && !runs[index] {
            break;
        }
    }
    runs
}

impl EngineLoop {
    /// Which sequences may be in the next batch, by index. Parks those that gave way.
    pub(super) fn take_turns(&mut self) -> Vec<bool> {
        let count = self.running.len();
        let Some(paged) = &self.paged else {
            return vec![true; count];
        };
        let turn_batches = paged.turn_batches;
        let is_pause = paged.now < paged.unwritable_until;
        if is_pause && self.running.iter().any(Sequence::is_in_memory) {
            return self.who_fits(Sequence::is_in_memory);
        }
        let mut runs = self.who_fits(|_| true);
        let gives_way: Vec<usize> = (0..count)
            .filter(|&index| !runs[index] && self.running[index].is_runnable())
            .collect();
        for index in gives_way {
            if self.running[index].is_in_memory() && !self.park(index) {
                // What is in memory stays there, and runs before others come in.
                runs = self.who_fits(Sequence::is_in_memory);
                break;
            }
        }
        for (sequence, _) in self
            .running
            .iter_mut()
            .zip(&runs)
            .filter(|(_, runs)| **runs)
        {
            if std::mem::take(&mut sequence.turn.is_parked)
                && let Some(paged) = &mut self.paged
            {
                paged.stats.resumes += 1;
            }
            if sequence.turn.left == 0 {
                sequence.turn.left = turn_batches;
            }
        }
        runs
    }

    /// Those that run, of the ones that may.
    fn who_fits(&self, may: impl Fn(&Sequence) -> bool) -> Vec<bool> {
        let config = self.model.config();
        let pages = |pager: &Pager| pager.usable_frames() / config.kv_heads;
        let memory = self.pool.pager().map_or(usize::MAX, pages);
        let wishes = self.running.iter().map(|sequence| {
            let turn = &sequence.turn;
            let wishes = sequence.is_runnable() && may(sequence);
            wishes.then(|| {
                (
                    turn.left,
                    turn.since,
                    sequence.need(config, self.batch_tokens),
                )
            })
        });
        admitted(memory, &wishes.collect::<Vec<_>>())
    }

    /// Moves what a sequence has to the scratch file. False when that cannot be written.
    pub(super) fn park(&mut self, index: usize) -> bool {
        let sequence = &mut self.running[index];
        let Some(paged) = &mut self.paged else {
            return false;
        };
        match self.pool.park(&sequence.blocks) {
            Ok(bytes) => {
                sequence.turn.left = 0;
                sequence.turn.is_parked = true;
                paged.stats.parks += 1;
                paged.stats.parked_bytes += bytes;
                true
            }
            Err(error) => {
                paged.unwritable_until = paged.now + paged.turn_batches as u64;
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a sequence cannot be parked: fewer run at a time"
                );
                false
            }
        }
    }
}

impl Sequence {
    fn is_runnable(&self) -> bool {
        matches!(
            self.phase,
            Phase::Prefill | Phase::Decode | Phase::Blending(_)
        )
    }

    /// Whether it runs, and has something that is not parked.
    pub(super) fn is_in_memory(&self) -> bool {
        self.is_runnable() && self.position > 0 && !self.turn.is_parked
    }

    /// What it reads in its next batch, at most.
    fn need(&self, config: &ModelConfig, batch_tokens: usize) -> Need {
        let end = match self.phase {
            // Few rows reach far.
            Phase::Blending(_) => self.tokens.len(),
            _ => self.tokens.len().min(self.position + batch_tokens),
        };
        let chosen = self.chosen_pages();
        let (mut most, mut all) = (0, 0);
        for window in &config.windows {
            let seen = seen(*window, self.position, end);
            let (layer, kept) = match chosen {
                // From token to token others are chosen.
                Some(chosen) if window.is_none() => (chosen.min(seen), (2 * chosen).min(seen)),
                _ => (seen, seen),
            };
            most = most.max(layer);
            all += kept;
        }
        Need { layer: most, all }
    }
}

/// Pages that tokens `from..end` attend to in a layer with this window.
fn seen(window: Option<usize>, from: usize, end: usize) -> usize {
    let first = window.map_or(0, |window| (from + 1).saturating_sub(window));
    // Attention reads whole tiles.
    end.div_ceil(BLOCK_TOKENS) - first / KEY_TILE * (KEY_TILE / BLOCK_TOKENS)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::fixtures;
    use super::*;
    use crate::kv::KvError;
    use crate::paging::PagingError;

    fn fits(most: usize, needs: &[(usize, usize)]) -> Vec<bool> {
        let mut room = Room::new(most);
        let needs = needs.iter().map(|&(layer, all)| Need { layer, all });
        needs.map(|need| room.take(need)).collect()
    }

    #[test]
    fn together_what_memory_holds() {
        assert_eq!(
            fits(100, &[(10, 40), (10, 60), (1, 1)]),
            [true, true, false]
        );
        // Large ones share layers, and nothing else.
        let large = [(40, 160), (60, 240), (1, 101), (1, 1)];
        assert_eq!(fits(100, &large), [true, true, false, false]);
        assert_eq!(fits(100, &[(40, 160), (1, 1)]), [true, false]);
        assert_eq!(fits(100, &[(1, 1), (40, 160)]), [true, false]);
        // Never nothing at all.
        assert_eq!(fits(100, &[(101, 101)]), [true]);
    }

    #[test]
    fn nobody_is_overtaken() {
        let wish = |left, since, all| Some((left, since, Need { layer: 1, all }));
        // Who has a turn goes on, though others have waited longer; who does not fit any more
        // keeps nobody else from going on.
        let wishes = [
            wish(0, 1, 60),
            wish(3, 9, 50),
            wish(1, 9, 60),
            wish(2, 9, 40),
        ];
        assert_eq!(admitted(100, &wishes), [false, true, false, true]);
        // Behind these, first who has waited longest, until one does not fit.
        let wishes = [
            wish(0, 7, 10),
            wish(3, 9, 50),
            wish(0, 5, 60),
            wish(0, 4, 20),
        ];
        assert_eq!(admitted(100, &wishes), [false, true, false, true]);
        let wishes = [wish(0, 7, 10), None, wish(0, 5, 60), wish(0, 4, 20)];
        assert_eq!(admitted(100, &wishes), [true, false, true, true]);
    }

    #[test]
    fn windows_are_seen_by_whole_tiles() {
        assert_eq!(seen(None, 0, 1), 1);
        assert_eq!(seen(None, 100, 161), 11);
        assert_eq!(seen(Some(16), 15, 16), 1);
        assert_eq!(seen(Some(16), 79, 80), 1);
        assert_eq!(seen(Some(16), 78, 80), 5);
    }

    /// Frames that are held by reads which hang are no room for anybody.
    #[test]
    fn what_hangs_is_no_room() {
        let timeout = Duration::from_millis(50);
        let (mut engine, _commands, file) = fixtures::engine(12, timeout);
        let mut listeners = Vec::new();
        for _ in 0..2 {
            let (sequence, events) = fixtures::decoding(&mut engine);
            engine.running.push(sequence);
            listeners.push(events);
        }
        // Three pages of two layers each.
        assert_eq!(engine.who_fits(|_| true), [true, true]);
        let blocks = engine.take_blocks(1).unwrap();
        let payload = vec![0; engine.pool.layer_bytes(16)];
        engine
            .pool
            .write_layer(&blocks, 0, 16, 0, &payload)
            .unwrap();
        engine.pool.park(&blocks).unwrap();
        file.reads.close_all();
        let hung = engine.pool.bring(&blocks, 0, 16, 0..1).unwrap_err();
        let (block, layer) = (blocks[0], 0);
        let expected = PagingError::ReadTimeout {
            block,
            layer,
            timeout,
        };
        assert!(matches!(hung, KvError::Paging(error) if error == expected));
        assert_eq!(engine.who_fits(|_| true), [true, false]);
        file.reads.open();
        let started = Instant::now();
        while engine.who_fits(|_| true) != [true, true] {
            assert!(started.elapsed() < Duration::from_secs(60));
            let _ = engine.pool.bring(&blocks, 0, 16, 0..1);
        }
    }
}
