//! S3-FIFO's queues: Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need
//! for cache eviction", SOSP 2023.
//!
//! What is new enters the small queue, or the main queue if it was evicted from the
//! small one lately. At the head of the small queue, what was used moves on to the
//! main queue; at the head of the main queue, it goes round again.

use super::ghosts::{Ghost, Ghosts};
use super::links::{Links, List};
use super::{ChunkFacts, Class, Node, classes, oldest};

#[derive(Debug)]
pub(super) struct S3Fifo {
    small: [List; Class::LIMIT as usize],
    main: [List; Class::LIMIT as usize],
    small_bytes: u64,
    small_target: u64,
    ghosts: Ghosts,
}

impl S3Fifo {
    pub(super) fn new(capacity_bytes: u64, links: &mut Links) -> Self {
        Self {
            small: std::array::from_fn(|_| links.list()),
            main: std::array::from_fn(|_| links.list()),
            small_bytes: 0,
            small_target: capacity_bytes / SMALL_SHARE,
            ghosts: Ghosts::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn allocated_bytes(&self) -> usize {
        self.ghosts.allocated_bytes()
    }

    pub(super) fn inserted(&mut self, node: &mut Node, facts: &ChunkFacts, now: u32) {
        node.set(Node::MAIN, self.ghosts.take(facts.key_hash, now).is_some());
    }

    #[expect(clippy::unused_self, reason = "beside the other orders' methods")]
    pub(super) fn used(&mut self, node: &mut Node) {
        node.uses = node.uses.saturating_add(1);
        node.detail = (node.detail + 1).min(MOST_USES);
    }

    pub(super) fn evicted(&mut self, node: &Node, key_hash: u64, now: u32, chunks: usize) {
        if !node.is(Node::MAIN) {
            self.ghosts.reserve(chunks);
            let (uses, last) = (0, node.last);
            self.ghosts.insert(key_hash, Ghost { uses, last }, now);
        }
    }

    pub(super) fn entered(&mut self, node: &Node) {
        if !node.is(Node::MAIN) {
            self.small_bytes += u64::from(node.bytes);
        }
    }

    pub(super) fn left(&mut self, node: &Node) {
        if !node.is(Node::MAIN) {
            self.small_bytes -= u64::from(node.bytes);
        }
    }

    pub(super) fn queue(&self, node: &Node) -> List {
        let queues = if node.is(Node::MAIN) {
            &self.main
        } else {
            &self.small
        };
        queues[usize::from(node.class)]
    }

    /// The heads of the queues of a class.
    pub(super) fn fronts(&self, class: u8, links: &Links) -> impl Iterator<Item = u32> {
        [&self.small, &self.main]
            .map(|queues| links.front(queues[usize::from(class)]))
            .into_iter()
            .flatten()
    }

    pub(super) fn candidate(
        &mut self,
        class: Option<u8>,
        now: u32,
        links: &mut Links,
        nodes: &mut [Node],
    ) -> Option<u32> {
        loop {
            let head = |queues: &[List; Class::LIMIT as usize]| {
                let heads = classes(class).map(|class| queues[usize::from(class)]);
                oldest(heads.filter_map(|queue| links.front(queue)), nodes)
            };
            let (small, main) = (head(&self.small), head(&self.main));
            let slot = if self.small_bytes >= self.small_target {
                small.or(main)
            } else {
                main.or(small)
            }?;
            let node = &mut nodes[slot as usize];
            if node.detail == 0 {
                return Some(slot);
            }
            // Ends: every round takes a use away.
            if node.is(Node::MAIN) {
                node.detail -= 1;
            } else {
                self.left(node);
                node.set(Node::MAIN, true);
                node.detail = 0;
            }
            node.last = now;
            links.remove(slot);
            links.push_back(self.queue(node), slot);
        }
    }
}

/// The small queue's part of the capacity, as in the paper: one tenth.
const SMALL_SHARE: u64 = 10;
/// Uses that are remembered, as in the paper.
const MOST_USES: u8 = 3;
