//! What a queue pair was asked for and has not done.
//!
//! Free of verbs: which request is posted next, and when what an operation owns is free again.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

/// Operations of one queue pair, in order, with what they own.
///
/// An operation is posted as one or more requests, its parts, when the send queue has room.
/// Until the completion of every part that was posted has come, the table owns its `T`.
#[derive(Debug)]
pub(super) struct Pending<T> {
    operations: HashMap<u64, Operation<T>>,
    /// Those that have parts to be posted.
    waiting: VecDeque<u64>,
    next: u64,
    /// Parts that were posted, and whose completion has not come.
    outstanding: u32,
    /// Of these at most.
    depth: u32,
}

#[derive(Debug)]
struct Operation<T> {
    owned: T,
    bytes: u64,
    /// Bytes of one part at most.
    part: u64,
    /// What is yet to be posted; `None` if nothing is.
    next: Option<u64>,
    /// Parts that were posted, and whose completion has not come.
    outstanding: u32,
}

impl<T> Pending<T> {
    /// For a send queue with room for `depth` requests.
    pub(super) fn new(depth: u32) -> Self {
        Self {
            operations: HashMap::new(),
            waiting: VecDeque::new(),
            next: 0,
            outstanding: 0,
            depth,
        }
    }

    /// Another operation, behind all others: of so many bytes, posted in parts of `part` bytes
    /// at most; without bytes it is one request.
    pub(super) fn push(&mut self, owned: T, bytes: u64, part: u64) -> u64 {
        let id = self.next;
        self.next += 1;
        let operation = Operation {
            owned,
            bytes,
            part: part.max(1),
            next: Some(0),
            outstanding: 0,
        };
        self.operations.insert(id, operation);
        self.waiting.push_back(id);
        id
    }

    /// The next part to post, if there is room: whose it is, and which bytes.
    pub(super) fn peek(&mut self) -> Option<(u64, Range<u64>, &mut T)> {
        if self.outstanding == self.depth {
            return None;
        }
        let id = *self.waiting.front()?;
        let operation = self.operations.get_mut(&id)?;
        let start = operation.next?;
        let end = operation.bytes.min(start.saturating_add(operation.part));
        Some((id, start..end, &mut operation.owned))
    }

    /// What [`peek`](Self::peek) gave was posted.
    pub(super) fn posted(&mut self) {
        let Some(&id) = self.waiting.front() else {
            return;
        };
        let Some(operation) = self.operations.get_mut(&id) else {
            return;
        };
        let end = operation
            .next
            .map(|start| start.saturating_add(operation.part));
        operation.next = end.filter(|&end| end < operation.bytes);
        operation.outstanding += 1;
        self.outstanding += 1;
        if operation.next.is_none() {
            self.waiting.pop_front();
        }
    }

    /// A completion has come. What the operation owns, if it was the last one.
    pub(super) fn completed(&mut self, id: u64) -> Option<T> {
        let operation = self.operations.get_mut(&id)?;
        if operation.outstanding == 0 {
            return None;
        }
        operation.outstanding -= 1;
        self.outstanding -= 1;
        if operation.outstanding > 0 || operation.next.is_some() {
            return None;
        }
        self.operations.remove(&id).map(|operation| operation.owned)
    }

    /// Nothing further is posted. What operations own of which no part was.
    pub(super) fn stop(&mut self) -> Vec<T> {
        let waiting = std::mem::take(&mut self.waiting);
        let mut free = Vec::new();
        for id in waiting {
            let Some(operation) = self.operations.get_mut(&id) else {
                continue;
            };
            operation.next = None;
            if operation.outstanding == 0
                && let Some(operation) = self.operations.remove(&id)
            {
                free.push(operation.owned);
            }
        }
        free
    }

    /// What all operations own.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut T)> {
        let operations = self.operations.iter_mut();
        operations.map(|(&id, operation)| (id, &mut operation.owned))
    }

    /// Whether every completion has come.
    pub(super) fn is_drained(&self) -> bool {
        self.outstanding == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Push {
            bytes: u64,
            part: u64,
        },
        Post,
        /// Of the requests that are outstanding, this one completes.
        Complete(prop::sample::Index),
        Stop,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0u64..50, 1u64..20).prop_map(|(bytes, part)| Step::Push { bytes, part }),
            8 => Just(Step::Post),
            6 => any::<prop::sample::Index>().prop_map(Step::Complete),
            1 => Just(Step::Stop),
        ];
        prop::collection::vec(step, 0..80)
    }

    proptest! {
        /// However requests are posted and complete: parts are all bytes once and in order, the
        /// send queue is never too full, and what an operation owns comes out exactly once, not
        /// before all of its posted parts have completed.
        #[test]
        fn what_is_owned_stays_until_the_last_completion(steps in steps(), depth in 1u32..5) {
            let mut pending = Pending::new(depth);
            // What each operation has: bytes, bytes posted, parts outstanding.
            let mut model: BTreeMap<u64, (u64, u64, u32)> = BTreeMap::new();
            let mut outstanding: Vec<u64> = Vec::new();
            let mut stopped = false;
            for step in steps {
                match step {
                    Step::Push { bytes, part } if !stopped => {
                        let id = pending.push(bytes, bytes, part);
                        prop_assert!(model.insert(id, (bytes, 0, 0)).is_none());
                    }
                    Step::Push { .. } => {}
                    Step::Post => {
                        let Some((id, range, &mut owned)) = pending.peek() else {
                            let full = outstanding.len() == depth as usize;
                            let done = model.values().all(|(bytes, posted, parts)| {
                                posted == bytes && *parts > 0
                            });
                            prop_assert!(full || done || stopped);
                            continue;
                        };
                        let (bytes, posted, parts) = model.get_mut(&id).unwrap();
                        prop_assert_eq!(owned, *bytes);
                        prop_assert_eq!(range.start, *posted);
                        prop_assert!(range.end <= *bytes && (range.end > range.start || *bytes == 0));
                        *posted = range.end;
                        *parts += 1;
                        outstanding.push(id);
                        prop_assert!(outstanding.len() <= depth as usize);
                        pending.posted();
                    }
                    Step::Complete(which) => {
                        if outstanding.is_empty() {
                            continue;
                        }
                        let id = outstanding.remove(which.index(outstanding.len()));
                        let (bytes, posted, parts) = model.get_mut(&id).unwrap();
                        *parts -= 1;
                        let last = *parts == 0 && (stopped || posted == bytes);
                        prop_assert_eq!(pending.completed(id), last.then_some(*bytes));
                        if last {
                            model.remove(&id);
                        }
                    }
                    Step::Stop => {
                        stopped = true;
                        let mut free = pending.stop();
                        let mut idle: Vec<u64> = Vec::new();
                        model.retain(|_, (bytes, _, parts)| {
                            if *parts == 0 {
                                idle.push(*bytes);
                            }
                            *parts > 0
                        });
                        free.sort_unstable();
                        idle.sort_unstable();
                        prop_assert_eq!(free, idle);
                    }
                }
                prop_assert_eq!(pending.is_drained(), outstanding.is_empty());
                prop_assert_eq!(pending.iter_mut().count(), model.len());
            }
        }
    }

    #[test]
    fn completions_of_nothing_are_passed_over() {
        let mut pending = Pending::new(2);
        let id = pending.push((), 0, 1);
        assert_eq!(pending.completed(id), None);
        assert_eq!(pending.completed(99), None);
        assert!(pending.peek().is_some());
    }
}
