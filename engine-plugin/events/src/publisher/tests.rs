//! One thing at a time, and then everything at once.

use std::collections::BTreeSet;

use rand::seq::IteratorRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::wire::{BlockHash, Form, Place, Removed, Stored};

/// A batch at a time that no other has.
fn batch(time: u64, events: Vec<Event>) -> Vec<u8> {
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    let timestamp = time as f64;
    let form = if time.is_multiple_of(2) {
        Form::Maps
    } else {
        Form::Arrays
    };
    let batch = Batch {
        timestamp,
        events,
        ..Batch::default()
    };
    batch.encode(form)
}

fn at(medium: &str) -> Place {
    Place {
        medium: Some(medium.to_owned()),
        ..Place::default()
    }
}

fn stored(medium: &str, blocks: &[u64]) -> Event {
    Event::Stored(Box::new(Stored {
        hashes: blocks.iter().copied().map(BlockHash::Int).collect(),
        place: at(medium),
        ..Stored::default()
    }))
}

fn removed(medium: &str, blocks: &[u64]) -> Event {
    Event::Removed(Removed {
        hashes: blocks.iter().copied().map(BlockHash::Int).collect(),
        place: at(medium),
    })
}

/// Batch `n` stores block `n`.
fn nth(n: u64) -> Vec<u8> {
    batch(n, vec![stored("GPU", &[n])])
}

fn publisher(can_replay: bool) -> Publisher {
    Publisher::new(can_replay, [0; 32], Limits::default())
}

/// In step, with batches 0 to `last`.
fn followed(last: u64) -> Publisher {
    let mut it = publisher(true);
    assert_eq!(it.connected(), Some(Ask { from: 0 }));
    for n in 0..=last {
        it.replayed(n, &nth(n));
    }
    assert_eq!(it.replay_ended(), None);
    assert_eq!(it.standing(), Standing::Complete);
    it
}

fn offered(it: &Publisher) -> usize {
    it.prefix(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]).blocks
}

#[test]
fn nothing_is_offered_before_the_beginning_is_known() {
    let mut it = publisher(true);
    assert_eq!(it.standing(), Standing::Behind);
    it.connected();
    it.live(1, &nth(1));
    it.replayed(0, &nth(0));
    assert_eq!((it.standing(), offered(&it)), (Standing::Behind, 0));
    assert_eq!(it.replay_ended(), None);
    assert_eq!((it.standing(), offered(&it)), (Standing::Complete, 2));
}

#[test]
fn a_batch_twice_changes_nothing() {
    let mut it = followed(1);
    it.live(2, &batch(2, vec![removed("GPU", &[0])]));
    it.live(3, &batch(3, vec![stored("GPU", &[0])]));
    it.live(2, &batch(2, vec![removed("GPU", &[0])]));
    assert_eq!(offered(&it), 2);
    assert_eq!((it.counts().duplicates, it.counts().restarts), (1, 0));
}

#[test]
fn a_gap_is_filled_before_anything_is_offered() {
    let mut it = followed(1);
    assert_eq!(it.live(4, &nth(4)), Some(Ask { from: 1 }));
    assert_eq!(it.live(5, &nth(5)), None);
    assert_eq!(offered(&it), 0);
    for n in 1..=4 {
        it.replayed(n, &nth(n));
    }
    assert_eq!(it.replay_ended(), None);
    assert_eq!((it.standing(), offered(&it)), (Standing::Complete, 6));
    assert_eq!(it.counts().gaps, 1);
}

#[test]
fn an_engine_that_starts_over_is_cleared() {
    // Seen by its number.
    let mut it = followed(3);
    assert_eq!(it.live(0, &batch(100, vec![])), None);
    assert_eq!((it.standing(), offered(&it)), (Standing::Complete, 0));
    // By its number, but the beginning is not there.
    let mut it = followed(3);
    assert_eq!(it.live(2, &batch(100, vec![])), Some(Ask { from: 0 }));
    assert_eq!(offered(&it), 0);
    // After a reconnection, though it has come further than it had been seen.
    let mut it = followed(3);
    it.disconnected();
    assert_eq!((it.standing(), offered(&it)), (Standing::Behind, 0));
    assert_eq!(it.connected(), Some(Ask { from: 3 }));
    it.replayed(3, &batch(100, vec![]));
    it.replayed(4, &batch(101, vec![]));
    assert_eq!(it.replay_ended(), Some(Ask { from: 0 }));
    for n in 0..5 {
        it.replayed(n, &batch(100 + n, vec![stored("GPU", &[n + 50])]));
    }
    assert_eq!(it.replay_ended(), None);
    assert_eq!(
        (it.standing(), it.blocks(), offered(&it)),
        (Standing::Complete, 5, 0)
    );
    // After a reconnection, and it has not come as far.
    let mut it = followed(3);
    it.disconnected();
    it.connected();
    assert_eq!(it.replay_ended(), Some(Ask { from: 0 }));
    it.replayed(0, &nth(7));
    assert_eq!(it.replay_ended(), None);
    assert_eq!((it.standing(), it.blocks()), (Standing::Complete, 1));
    assert_eq!(it.counts().restarts, 1);
}

#[test]
fn a_reconnection_to_the_same_engine_keeps_what_is_known() {
    let mut it = followed(3);
    it.disconnected();
    it.connected();
    it.replayed(3, &nth(3));
    it.replayed(4, &nth(4));
    assert_eq!(it.replay_ended(), None);
    assert_eq!((it.standing(), offered(&it)), (Standing::Complete, 5));
    assert_eq!(it.counts().restarts, 0);
}

#[test]
fn an_engine_that_no_longer_has_the_last_batch_is_known_in_part() {
    let mut it = followed(3);
    it.disconnected();
    it.connected();
    it.replayed(8, &nth(8));
    it.replayed(9, &nth(9));
    assert_eq!(it.replay_ended(), None);
    assert_eq!((it.standing(), it.blocks()), (Standing::Partial, 2));
    it.live(10, &batch(10, vec![Event::Cleared, stored("GPU", &[0])]));
    assert_eq!((it.standing(), offered(&it)), (Standing::Complete, 1));
}

#[test]
fn a_check_finds_what_was_lost_at_the_end_and_offers_meanwhile() {
    let mut it = followed(1);
    assert_eq!(it.check(), Some(Ask { from: 1 }));
    assert_eq!(it.standing(), Standing::Complete);
    assert_eq!(it.check(), None, "one at a time");
    it.replayed(1, &nth(1));
    it.replayed(2, &nth(2));
    it.live(2, &nth(2));
    assert_eq!(it.replay_ended(), None);
    assert_eq!((it.standing(), offered(&it)), (Standing::Complete, 3));
    it.check();
    it.unanswered();
    assert_eq!((it.standing(), offered(&it)), (Standing::Behind, 0));
}

#[test]
fn without_replay_what_follows_a_gap_is_known_in_part() {
    let mut it = publisher(false);
    assert_eq!(it.connected(), None);
    assert_eq!(it.standing(), Standing::Partial);
    it.live(0, &nth(0));
    assert_eq!((it.standing(), offered(&it)), (Standing::Complete, 1));
    assert_eq!(it.live(2, &nth(0)), None);
    assert_eq!(
        (it.standing(), offered(&it), it.blocks()),
        (Standing::Partial, 1, 1)
    );
    it.disconnected();
    it.connected();
    assert_eq!((it.standing(), it.blocks()), (Standing::Partial, 0));
    it.live(0, &nth(0));
    assert_eq!(it.standing(), Standing::Complete);
    assert_eq!(it.check(), None);
}

#[test]
fn a_batch_that_cannot_be_read_voids_what_is_known() {
    let mut it = followed(1);
    it.live(2, b"not msgpack");
    assert_eq!((it.standing(), it.blocks()), (Standing::Partial, 0));
    it.live(3, &nth(0));
    assert_eq!(offered(&it), 1);
    assert_eq!((it.counts().malformed, it.counts().gaps), (1, 0));
}

#[test]
fn an_index_that_is_full_is_known_in_part() {
    let limits = Limits {
        blocks: 2,
        ..Limits::default()
    };
    let mut it = Publisher::new(false, [0; 32], limits);
    it.connected();
    it.live(0, &batch(0, vec![stored("GPU", &[0, 1])]));
    assert_eq!(it.standing(), Standing::Complete);
    it.live(1, &batch(1, vec![stored("GPU", &[2])]));
    assert_eq!(
        (it.standing(), offered(&it), it.refused()),
        (Standing::Partial, 2, 1)
    );
    it.live(2, &batch(2, vec![Event::Cleared]));
    assert_eq!(it.standing(), Standing::Complete);
}

#[test]
fn what_waits_is_bounded_and_replayed() {
    let limits = Limits {
        held: 2,
        held_bytes: 1000,
        ..Limits::default()
    };
    let mut it = Publisher::new(true, [0; 32], limits);
    it.connected();
    for n in 1..6 {
        it.live(n, &nth(n));
        assert!(it.held.len() <= 2);
    }
    it.replayed(0, &nth(0));
    assert_eq!(it.replay_ended(), Some(Ask { from: 0 }));
    for n in 0..6 {
        it.replayed(n, &nth(n));
    }
    assert_eq!(it.replay_ended(), None);
    assert_eq!((it.standing(), offered(&it)), (Standing::Complete, 6));
    // What was dropped came last: nothing that waits tells of it.
    it.disconnected();
    it.connected();
    for n in 6..9 {
        it.live(n, &nth(n));
    }
    assert!(it.held.is_empty());
    it.replayed(5, &nth(5));
    assert_eq!(it.replay_ended(), Some(Ask { from: 5 }));
    it.disconnected();
    it.connected();
    it.live(6, &[0; 1001]);
    assert!(it.held.is_empty() && it.held_bytes == 0);
}

#[test]
fn a_replay_that_never_brings_what_is_missing_is_given_up() {
    let mut it = followed(1);
    let mut ask = it.live(5, &nth(5));
    let mut replays = 0;
    while ask.is_some() {
        replays += 1;
        assert!(replays < 10, "it asks for ever");
        it.replayed(1, &nth(1));
        ask = it.replay_ended();
    }
    assert_eq!((it.standing(), it.blocks()), (Standing::Partial, 1));
}

#[test]
fn it_finds_out_how_an_engine_hashes() {
    let none = hash::none_hash("0");
    let mut first = Stored {
        hashes: vec![BlockHash::Int(5), BlockHash::Int(6)],
        tokens: vec![1, 2, 3, 4],
        block_size: 2,
        ..Stored::default()
    };
    let mut it = Publisher::new(false, none, Limits::default());
    it.connected();
    let mut sequence = 0;
    let mut hears = |it: &mut Publisher, stored: &Stored| {
        it.live(
            sequence,
            &batch(sequence, vec![Event::Stored(Box::new(stored.clone()))]),
        );
        sequence += 1;
    };
    // A block in the middle, one with a salt, and an adapter's say nothing.
    let middle = Stored {
        parent: Some(BlockHash::Int(4)),
        ..first.clone()
    };
    hears(&mut it, &middle);
    let salted = Stored {
        extra_keys: Some(vec![Some(vec![]), None]),
        ..first.clone()
    };
    hears(&mut it, &salted);
    hears(
        &mut it,
        &Stored {
            lora_id: Some(1),
            ..first.clone()
        },
    );
    assert_eq!((it.hashes_agree(), it.block_size()), (None, Some(2)));
    hears(&mut it, &first);
    assert_eq!(it.hashes_agree(), Some(false));
    let whole = hash::block_hash(&none, &[1, 2], &[]);
    for agreeing in [
        BlockHash::Int(hash::low64(&whole)),
        BlockHash::Bytes(whole.into()),
    ] {
        it.hashes_agree = None;
        first.hashes[0] = agreeing;
        hears(&mut it, &first);
        assert_eq!(it.hashes_agree(), Some(true));
    }
}

type Blocks = BTreeSet<(&'static str, u64)>;

const MEDIA: [&str; 2] = ["GPU", "CPU"];

/// An engine, and the wires to it.
struct World {
    rng: ChaCha8Rng,
    time: u64,
    blocks: Blocks,
    /// What the engine held after each of its batches; of every life, the last one the present.
    lives: Vec<Vec<Blocks>>,
    buffer: VecDeque<(u64, Vec<u8>)>,
    buffered: usize,
    /// On the way, by a connection to the life of the number.
    live: Vec<(u64, Vec<u8>)>,
    connection: Option<usize>,
    /// Being sent again, and whether the end follows.
    replay: Option<VecDeque<(u64, Vec<u8>)>>,
    lossy: bool,
    /// What is not lost comes in order, as by TCP.
    ordered: bool,
}

impl World {
    fn new(seed: u64, buffered: usize, ordered: bool) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            time: 0,
            blocks: Blocks::new(),
            lives: vec![Vec::new()],
            buffer: VecDeque::new(),
            buffered,
            live: Vec::new(),
            connection: None,
            replay: None,
            lossy: true,
            ordered,
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    fn publish(&mut self) {
        let mut events = Vec::new();
        for _ in 0..self.rng.random_range(0..4) {
            let medium = *MEDIA.iter().choose(&mut self.rng).unwrap();
            let block = self.rng.random_range(0..40);
            events.push(match self.rng.random_range(0..20) {
                0 => {
                    self.blocks.clear();
                    Event::Cleared
                }
                1..12 => {
                    self.blocks.extend([(medium, block), (medium, block + 1)]);
                    stored(medium, &[block, block + 1])
                }
                _ => {
                    self.blocks.remove(&(medium, block));
                    removed(medium, &[block])
                }
            });
        }
        self.time += 1;
        let payload = batch(self.time, events);
        let life = self.lives.last_mut().unwrap();
        let sequence = life.len() as u64;
        life.push(self.blocks.clone());
        self.buffer.push_back((sequence, payload.clone()));
        if self.buffer.len() > self.buffered {
            self.buffer.pop_front();
        }
        let lost = self.lossy && self.chance(10);
        if self.connection == Some(self.lives.len() - 1) && !lost {
            self.live.push((sequence, payload));
        }
    }

    fn restart(&mut self) {
        self.lives.push(Vec::new());
        self.blocks.clear();
        self.buffer.clear();
    }

    /// What an ask is answered with, as far as it comes through.
    fn answer(&mut self, ask: Option<Ask>) {
        let Some(Ask { from }) = ask else { return };
        let all = self.buffer.iter().filter(|(sequence, _)| *sequence >= from);
        let mut all: VecDeque<_> = all.cloned().collect();
        if self.lossy && self.chance(20) && !all.is_empty() {
            let (a, b) = (
                self.rng.random_range(0..all.len()),
                self.rng.random_range(0..all.len()),
            );
            match self.rng.random_range(0..3) {
                0 => drop(all.remove(a)),
                1 => all.swap(a, b),
                _ => all.insert(a, all[b].clone()),
            }
        }
        self.replay = Some(all);
    }

    fn step(&mut self, it: &mut Publisher) {
        // Whoever asks an engine that is another one has seen the end of its connection to the
        // one before: see `Ask`.
        let stale = self
            .connection
            .is_some_and(|life| life + 1 != self.lives.len());
        if stale && (self.chance(30) || self.replay.is_some()) {
            self.disconnect(it);
        }
        if self.connection.is_none() && self.chance(30) {
            self.connection = Some(self.lives.len() - 1);
            let ask = it.connected();
            self.answer(ask);
        }
        match self.rng.random_range(0..100) {
            0..30 => self.publish(),
            30..65 if !self.live.is_empty() => {
                // Mostly in order.
                let last = self.live.len() - 1;
                let at = if self.lossy && !self.ordered && self.chance(5) {
                    last.min(2)
                } else {
                    0
                };
                let (sequence, payload) = self.live.remove(at);
                let twice = self.lossy && self.chance(5);
                for _ in 0..=u32::from(twice) {
                    let ask = it.live(sequence, &payload);
                    self.answer(ask);
                }
                if self.lossy && !self.ordered && self.chance(5) {
                    self.live.push((sequence, payload));
                }
            }
            65..90 => match self.replay.as_mut().map(VecDeque::pop_front) {
                Some(Some((sequence, payload))) => it.replayed(sequence, &payload),
                Some(None) => {
                    self.replay = None;
                    let ask = it.replay_ended();
                    self.answer(ask);
                }
                None => {}
            },
            90..95 => {
                let ask = it.check();
                self.answer(ask);
            }
            95 if self.lossy => self.restart(),
            96 if self.lossy && self.connection.is_some() => self.disconnect(it),
            97 if self.lossy && self.replay.is_some() => {
                self.replay = None;
                it.unanswered();
                let ask = it.connected();
                self.answer(ask);
            }
            _ => {}
        }
    }

    fn disconnect(&mut self, it: &mut Publisher) {
        self.connection = None;
        self.live.clear();
        self.replay = None;
        it.disconnected();
    }

    /// What the engine of the connection held when it had published what was taken.
    fn truth(&self, it: &Publisher) -> Blocks {
        let life = &self.lives[self.connection.unwrap()];
        match it.sequence() {
            Some(sequence) => life[usize::try_from(sequence).unwrap()].clone(),
            None => Blocks::new(),
        }
    }
}

fn known(it: &Publisher) -> Blocks {
    let named = |(medium, block): (&str, u64)| {
        let medium = MEDIA.iter().find(|it| **it == medium).unwrap();
        (*medium, block)
    };
    it.holdings.all().map(named).collect()
}

/// How often it said that it was in step, wholly and in part.
fn storm(seed: u64, steps: usize, buffered: usize, can_replay: bool) -> (usize, usize) {
    let mut world = World::new(seed, buffered, !can_replay);
    let mut it = publisher(can_replay);
    let (mut complete, mut partial) = (0, 0);
    let mut compare = |world: &World, it: &Publisher, step: usize| {
        // An engine that is gone, and whose end has not been noticed, has no truth to compare.
        match it.standing() {
            Standing::Behind => assert_eq!(it.prefix(&[0, 1, 2]), Held::default()),
            Standing::Complete => {
                complete += 1;
                assert_eq!(known(it), world.truth(it), "seed {seed}, step {step}");
            }
            Standing::Partial => {
                partial += 1;
                let truth = world.truth(it);
                assert!(known(it).is_subset(&truth), "seed {seed}, step {step}");
            }
        }
    };
    for step in 0..steps {
        world.step(&mut it);
        compare(&world, &it, step);
    }
    // The wires hold: it comes to the end, and stays.
    world.lossy = false;
    for step in steps..steps + 2000 {
        world.step(&mut it);
        compare(&world, &it, step);
    }
    let last = world.lives.last().unwrap().len() as u64 - 1;
    if can_replay {
        for _ in 0..3 {
            let ask = it.check();
            world.answer(ask);
            while let Some(reply) = world.replay.as_mut().map(VecDeque::pop_front) {
                match reply {
                    Some((sequence, payload)) => it.replayed(sequence, &payload),
                    None => {
                        world.replay = None;
                        let ask = it.replay_ended();
                        world.answer(ask);
                    }
                }
            }
        }
        assert_eq!(it.sequence(), Some(last), "seed {seed}");
        if buffered > steps + 2000 {
            assert_eq!(it.standing(), Standing::Complete, "seed {seed}");
        }
    }
    (complete, partial)
}

#[test]
fn whatever_is_lost_doubled_or_out_of_order_what_is_in_step_is_the_truth() {
    for seed in 0..200 {
        let (complete, _) = storm(seed, 10_000, usize::MAX, true);
        assert!(complete > 1000, "seed {seed}: {complete}");
    }
}

#[test]
fn what_an_engine_does_not_keep_long_enough_is_known_in_part_and_true() {
    let mut all = (0, 0);
    for seed in 1000..1100 {
        let (complete, partial) = storm(seed, 10_000, 8, true);
        all = (all.0 + complete, all.1 + partial);
    }
    assert!(all.0 > 1000 && all.1 > 1000, "{all:?}");
}

#[test]
fn without_replay_what_is_in_step_is_true() {
    let mut all = (0, 0);
    for seed in 2000..2050 {
        let (complete, partial) = storm(seed, 10_000, 0, false);
        all = (all.0 + complete, all.1 + partial);
    }
    assert!(all.0 > 1000 && all.1 > 1000, "{all:?}");
}
