//! Chunks in groups of like prospects: by class, uses, value and age.
//!
//! Of each class, number of uses and value there is a row of groups, ordered by the
//! time of last use. A new group begins with every tick; groups whose ages the
//! statistics no longer tell apart are merged.

use std::collections::VecDeque;

use super::ghosts::{Ghost, Ghosts};
use super::links::{Links, List};
use super::reuse::{Reuse, USES, bucket};
use super::{ChunkFacts, Class, Node, classes};

#[derive(Debug)]
pub(super) struct ByReuse {
    rows: Vec<VecDeque<Group>>,
    reuse: Reuse,
    ghosts: Ghosts,
    /// Octave of recompute cost per byte that counts as [`MIDDLE_VALUE`].
    reference: Option<i32>,
}

/// Chunks last used from `first` to `last`, in ticks.
#[derive(Clone, Copy, Debug)]
struct Group {
    first: u32,
    last: u32,
    list: List,
}

impl ByReuse {
    pub(super) fn new() -> Self {
        let rows = usize::from(Class::LIMIT) * usize::from(USES) * usize::from(VALUES);
        Self {
            rows: vec![VecDeque::new(); rows],
            reuse: Reuse::new(usize::from(USES)),
            ghosts: Ghosts::new(),
            reference: None,
        }
    }

    #[cfg(test)]
    pub(super) fn allocated_bytes(&self) -> usize {
        self.ghosts.allocated_bytes()
    }

    pub(super) fn inserted(
        &mut self,
        node: &mut Node,
        facts: &ChunkFacts,
        now: u32,
        chunks: usize,
    ) {
        node.detail = self.value(facts);
        if let Some(ghost) = self.ghosts.take(facts.key_hash, now) {
            let age = now.saturating_sub(ghost.last);
            self.reuse.used(ghost.uses, age);
            self.learn(now, chunks);
            node.uses = node.uses.max(ghost.uses + 2);
        }
    }

    pub(super) fn used(&mut self, node: &mut Node, now: u32, chunks: usize) {
        let age = now.saturating_sub(node.last);
        self.reuse.used(lane(node), age);
        self.learn(now, chunks);
        node.last = now;
    }

    pub(super) fn evicted(&mut self, node: &Node, key_hash: u64, now: u32, chunks: usize) {
        self.ghosts.reserve(chunks * GHOSTS_PER_CHUNK);
        let ghost = Ghost {
            uses: lane(node),
            last: node.last,
        };
        if let Some(lost) = self.ghosts.insert(key_hash, ghost, now) {
            let age = now.saturating_sub(lost.last);
            self.reuse.lost(lost.uses, age);
        }
        self.learn(now, chunks);
    }

    fn learn(&mut self, now: u32, chunks: usize) {
        if self.reuse.is_due(chunks) {
            let waiting = self.ghosts.sample(now).map(|(ghost, weight)| {
                let age = now.saturating_sub(ghost.last);
                (ghost.uses, age, weight)
            });
            self.reuse.learn(waiting);
        }
    }

    pub(super) fn probability(&self, node: &Node, now: u32) -> f32 {
        let age = now.saturating_sub(node.last);
        self.reuse.probability(lane(node), age)
    }

    /// The list that a chunk belongs to now.
    pub(super) fn group(&mut self, node: &Node, links: &mut Links) -> List {
        let row = &mut self.rows[row(node.class, lane(node), node.detail)];
        let at = row.partition_point(|group| group.first <= node.last);
        if at == row.len() && row.back().is_none_or(|group| group.last < node.last) {
            merge(row, node.last, links);
            let list = links.list();
            row.push_back(Group {
                first: node.last,
                last: node.last,
                list,
            });
            return list;
        }
        let group = &mut row[at.saturating_sub(1)];
        group.first = group.first.min(node.last);
        group.last = group.last.max(node.last);
        group.list
    }

    pub(super) fn candidate(&self, class: Option<u8>, now: u32, links: &Links) -> Option<u32> {
        let mut least = f32::INFINITY;
        let mut found = None;
        for class in classes(class) {
            for lane in 0..USES {
                for value in 0..VALUES {
                    let weight = f32::from(1u8 << value);
                    for group in &self.rows[row(class, lane, value)] {
                        let Some(slot) = links.back(group.list) else {
                            continue;
                        };
                        let used = group.first.midpoint(group.last);
                        let rate = weight * self.reuse.rate(lane, now.saturating_sub(used));
                        if rate < least {
                            (least, found) = (rate, Some(slot));
                        }
                    }
                }
            }
        }
        found
    }

    /// A chunk of a class last used at `before` or earlier.
    pub(super) fn older(
        &self,
        class: u8,
        before: u32,
        links: &Links,
        nodes: &[Node],
    ) -> Option<u32> {
        let row = |lane| move |value| row(class, lane, value);
        let rows = (0..USES).flat_map(|lane| (0..VALUES).map(row(lane)));
        rows.filter_map(|row| {
            let mut groups = self.rows[row].iter();
            groups.find_map(|group| links.front(group.list))
        })
        .find(|slot| nodes[*slot as usize].last <= before)
    }

    /// The octave of recompute cost per byte, around the first chunk's.
    fn value(&mut self, facts: &ChunkFacts) -> u8 {
        let cost = f64::from(facts.recompute.max(1));
        #[expect(clippy::cast_precision_loss, reason = "only the octave matters")]
        let bytes = facts.bytes.max(1) as f64;
        #[expect(clippy::cast_possible_truncation, reason = "a small logarithm")]
        let octave = (cost / bytes).log2().round() as i32;
        let reference = *self.reference.get_or_insert(octave);
        let value = octave - reference + i32::from(MIDDLE_VALUE);
        u8::try_from(value.max(0))
            .unwrap_or(u8::MAX)
            .min(VALUES - 1)
    }
}

fn lane(node: &Node) -> u8 {
    node.uses.clamp(1, USES) - 1
}

fn row(class: u8, lane: u8, value: u8) -> usize {
    let [class, lane, value] = [class, lane, value].map(usize::from);
    (class * usize::from(USES) + lane) * usize::from(VALUES) + value
}

/// Drops empty groups and joins neighbours of one age.
fn merge(row: &mut VecDeque<Group>, now: u32, links: &mut Links) {
    let mut kept: usize = 0;
    for at in 0..row.len() {
        let group = row[at];
        if links.is_empty(group.list) {
            links.recycle(group.list);
            continue;
        }
        if let Some(before) = kept.checked_sub(1).map(|before| &mut row[before]) {
            let oldest = bucket(now.saturating_sub(before.first));
            if oldest == bucket(now.saturating_sub(group.last)) {
                links.append(before.list, group.list);
                before.last = group.last;
                links.recycle(group.list);
                continue;
            }
        }
        row[kept] = group;
        kept += 1;
    }
    row.truncate(kept);
}

/// Octaves of recompute cost per byte that are told apart.
const VALUES: u8 = 5;
const MIDDLE_VALUE: u8 = 2;
/// More see further, and less of what is recent: with four, conversations are hit more
/// where memory holds a minute of them, and less where it holds ten.
const GHOSTS_PER_CHUNK: usize = 2;
