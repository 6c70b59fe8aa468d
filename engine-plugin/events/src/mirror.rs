//! What a cache daemon holds, from its `Watch`.
//!
//! The daemon's stream has an epoch, a sequence and snapshots, so that its listener is in step
//! from the end of a snapshot until the stream ends. Chunks are named by keys, which are digests
//! within a namespace: a block's hash becomes a key only for who knows the namespace, and is
//! told the whole hash rather than 64 bits of it. A namespace cannot be guessed from what the
//! daemon says, so it is configured; without one, a daemon is followed and offers nothing.

use kvasir_types::ChunkKey;

use crate::hash::Hash;
use crate::holdings::{Held, Holdings, Limits};
use crate::publisher::Standing;
use crate::wire::Place;

/// A copy of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// The chunk.
    pub key: ChunkKey,
    /// The tier, as `kvasird` calls it: `memory`, `disk`.
    pub tier: &'static str,
}

/// A message of the daemon's, without its epoch and sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A part of what is there at the message's sequence.
    Snapshot {
        /// Copies.
        copies: Vec<Copy>,
        /// Whether more parts follow.
        more: bool,
    },
    /// A copy is there.
    Stored(Copy),
    /// A copy is gone.
    Removed(Copy),
}

/// What a daemon holds.
#[derive(Debug)]
pub struct Mirror {
    namespaces: Vec<[u8; 32]>,
    holdings: Holdings,
    step: Step,
    epoch: u64,
    sequence: u64,
    snapshots: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// A snapshot has to come first.
    Behind,
    /// Within one.
    Filling,
    In,
}

/// The daemon's messages do not follow from each other; ask it for a new snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the daemon's changes do not follow from each other; watch it anew")]
pub struct OutOfStep;

impl Mirror {
    /// Of a daemon that is not connected yet. `namespaces` are digests of the namespaces that an
    /// engine stores in, one for each of its ranks: a block is there when the chunks of all are.
    pub const fn new(namespaces: Vec<[u8; 32]>, limits: Limits) -> Self {
        Self {
            namespaces,
            holdings: Holdings::new(limits),
            step: Step::Behind,
            epoch: 0,
            sequence: 0,
            snapshots: 0,
        }
    }

    /// The stream has ended: what is known of the daemon is void.
    pub fn disconnected(&mut self) {
        self.holdings.clear();
        self.step = Step::Behind;
    }

    /// Takes the next message of the stream.
    ///
    /// # Errors
    /// It does not follow from the one before. The mirror is then as after
    /// [`disconnected`](Self::disconnected).
    pub fn take(&mut self, epoch: u64, sequence: u64, message: &Message) -> Result<(), OutOfStep> {
        let same = epoch == self.epoch;
        match message {
            Message::Snapshot { copies, more } => {
                if self.step != Step::Filling {
                    self.holdings.clear();
                    (self.epoch, self.sequence) = (epoch, sequence);
                } else if !same || sequence != self.sequence {
                    return self.lost();
                }
                for copy in copies {
                    self.store(copy);
                }
                self.step = if *more { Step::Filling } else { Step::In };
                self.snapshots += u64::from(!more);
                return Ok(());
            }
            // Contained in what is known.
            _ if self.step == Step::In && same && sequence <= self.sequence => return Ok(()),
            _ if self.step != Step::In
                || !same
                || self.sequence.checked_add(1) != Some(sequence) =>
            {
                return self.lost();
            }
            Message::Stored(copy) => self.store(copy),
            Message::Removed(copy) => {
                self.holdings
                    .take_out(&place(copy), [name(&copy.key)].into_iter());
            }
        }
        self.sequence = sequence;
        Ok(())
    }

    fn lost(&mut self) -> Result<(), OutOfStep> {
        self.disconnected();
        Err(OutOfStep)
    }

    fn store(&mut self, copy: &Copy) {
        self.holdings
            .insert(&place(copy), None, [name(&copy.key)].into_iter());
    }

    /// How well the daemon is known.
    pub const fn standing(&self) -> Standing {
        match self.step {
            Step::In if self.holdings.refused() == 0 => Standing::Complete,
            Step::In => Standing::Partial,
            _ => Standing::Behind,
        }
    }

    /// How many leading blocks of a prompt it has, in each tier and in all. None while it is
    /// [`Behind`](Standing::Behind), and none without a namespace.
    pub fn prefix(&self, blocks: &[Hash]) -> Held {
        if self.standing() == Standing::Behind {
            return Held::default();
        }
        let of = |namespace: &[u8; 32]| {
            let names = blocks
                .iter()
                .map(|hash| name(&ChunkKey::opaque(namespace, hash)));
            self.holdings.prefix(&names.collect::<Vec<_>>())
        };
        let ranks = self.namespaces.iter().map(of);
        ranks.reduce(Held::least).unwrap_or_default()
    }

    /// Whether blocks can be told from chunks.
    pub fn has_namespace(&self) -> bool {
        !self.namespaces.is_empty()
    }

    /// Copies of chunks, and what the daemon calls its present.
    pub fn position(&self) -> (usize, u64, u64) {
        (self.holdings.len(), self.epoch, self.sequence)
    }

    /// Copies that were not taken, because the index was full.
    pub const fn refused(&self) -> u64 {
        self.holdings.refused()
    }

    /// Snapshots that were taken.
    pub const fn snapshots(&self) -> u64 {
        self.snapshots
    }
}

/// Keys are digests: any 64 bits of them will do.
fn name(key: &ChunkKey) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *key.as_bytes();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

fn place(copy: &Copy) -> Place {
    Place {
        medium: Some(copy.tier.to_owned()),
        ..Place::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMESPACE: [u8; 32] = [7; 32];

    fn hash(block: u8) -> Hash {
        [block; 32]
    }

    fn copy(block: u8, tier: &'static str) -> Copy {
        let key = ChunkKey::opaque(&NAMESPACE, &hash(block));
        Copy { key, tier }
    }

    fn snapshot(blocks: &[u8], more: bool) -> Message {
        let copies = blocks.iter().map(|block| copy(*block, "memory")).collect();
        Message::Snapshot { copies, more }
    }

    fn mirror() -> Mirror {
        Mirror::new(vec![NAMESPACE], Limits::default())
    }

    fn found(mirror: &Mirror) -> usize {
        mirror.prefix(&[hash(1), hash(2), hash(3)]).blocks
    }

    #[test]
    fn it_offers_what_a_whole_snapshot_and_what_followed_it_say() {
        let mut mirror = mirror();
        mirror.take(9, 4, &snapshot(&[1], true)).unwrap();
        assert_eq!((mirror.standing(), found(&mirror)), (Standing::Behind, 0));
        mirror.take(9, 4, &snapshot(&[2], false)).unwrap();
        assert_eq!((mirror.standing(), found(&mirror)), (Standing::Complete, 2));
        mirror
            .take(9, 4, &Message::Removed(copy(1, "memory")))
            .unwrap();
        assert_eq!(found(&mirror), 2, "contained in the snapshot");
        mirror
            .take(9, 5, &Message::Stored(copy(3, "disk")))
            .unwrap();
        let held = mirror.prefix(&[hash(1), hash(2), hash(3)]);
        assert_eq!(held.blocks, 3);
        assert_eq!(held.media, [("memory".into(), 2), ("disk".into(), 0)]);
        mirror
            .take(9, 6, &Message::Removed(copy(1, "memory")))
            .unwrap();
        assert_eq!(found(&mirror), 0);
        // A new snapshot, in the middle: what was known is void.
        mirror.take(9, 20, &snapshot(&[1], false)).unwrap();
        assert_eq!((found(&mirror), mirror.snapshots()), (1, 2));
        mirror.disconnected();
        assert_eq!((mirror.standing(), found(&mirror)), (Standing::Behind, 0));
    }

    #[test]
    fn what_does_not_follow_voids_what_is_known() {
        let change = Message::Stored(copy(2, "memory"));
        for (epoch, sequence) in [(9, 6), (8, 5), (8, 4), (0, 0)] {
            let mut mirror = mirror();
            mirror.take(9, 4, &snapshot(&[1], false)).unwrap();
            assert_eq!(mirror.take(epoch, sequence, &change), Err(OutOfStep));
            assert_eq!((mirror.standing(), found(&mirror)), (Standing::Behind, 0));
        }
        let mut mirror = mirror();
        assert_eq!(mirror.take(0, 1, &change), Err(OutOfStep));
        mirror.take(9, 4, &snapshot(&[1], true)).unwrap();
        assert_eq!(mirror.take(9, 5, &snapshot(&[2], false)), Err(OutOfStep));
    }

    #[test]
    fn every_rank_has_to_have_a_block() {
        let mut mirror = Mirror::new(vec![NAMESPACE, [8; 32]], Limits::default());
        mirror.take(1, 0, &snapshot(&[1, 2], false)).unwrap();
        assert_eq!(found(&mirror), 0);
        let other = Copy {
            key: ChunkKey::opaque(&[8; 32], &hash(1)),
            tier: "memory",
        };
        mirror.take(1, 1, &Message::Stored(other)).unwrap();
        assert_eq!(found(&mirror), 1);
        assert_eq!(
            Mirror::new(vec![], Limits::default()).prefix(&[hash(1)]),
            Held::default()
        );
    }
}
