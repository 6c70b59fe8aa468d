//! All publishers together.

use crate::hash::Hash;
use crate::holdings::Held;
use crate::mirror::Mirror;
use crate::publisher::{Publisher, Standing};

/// Who publishes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceId {
    /// Name of the engine, or address of the daemon.
    pub name: String,
    /// Data-parallel rank of the engine; 0 of a daemon.
    pub rank: u32,
}

/// One publisher, of either kind.
#[derive(Debug)]
pub enum Source {
    /// A serving engine.
    Engine(Publisher),
    /// A cache daemon, whose blocks are chunks.
    Daemon(Mirror),
}

/// What one publisher holds of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The publisher.
    pub id: SourceId,
    /// How well it is known. [`Behind`](Standing::Behind): nothing is offered.
    pub standing: Standing,
    /// What it holds.
    pub held: Held,
}

/// Every publisher, and what each holds.
#[derive(Debug, Default)]
pub struct Index {
    sources: Vec<(SourceId, Source)>,
}

impl Index {
    /// Of these publishers, in this order.
    pub const fn new(sources: Vec<(SourceId, Source)>) -> Self {
        Self { sources }
    }

    /// The publishers.
    pub fn sources(&self) -> impl Iterator<Item = (&SourceId, &Source)> {
        self.sources.iter().map(|(id, source)| (id, source))
    }

    /// The engine at a place in the list.
    pub fn engine(&mut self, at: usize) -> Option<&mut Publisher> {
        match self.sources.get_mut(at)? {
            (_, Source::Engine(publisher)) => Some(publisher),
            _ => None,
        }
    }

    /// The daemon at a place in the list.
    pub fn daemon(&mut self, at: usize) -> Option<&mut Mirror> {
        match self.sources.get_mut(at)? {
            (_, Source::Daemon(mirror)) => Some(mirror),
            _ => None,
        }
    }

    /// How many leading blocks of a prompt each publisher holds. `blocks` are what engines call
    /// them; `hashes` are whole, and empty where nobody knows more than 64 bits of them: daemons
    /// then have nothing to say.
    ///
    /// Takes time in proportion to the blocks that are found at engines, and to all hashes for
    /// each daemon.
    pub fn locate<'a>(
        &'a self,
        blocks: &'a [u64],
        hashes: &'a [Hash],
    ) -> impl Iterator<Item = Located> + 'a {
        self.sources.iter().map(move |(id, source)| {
            let (standing, held) = match source {
                Source::Engine(publisher) => (publisher.standing(), publisher.prefix(blocks)),
                Source::Daemon(mirror) => (mirror.standing(), mirror.prefix(hashes)),
            };
            Located {
                id: id.clone(),
                standing,
                held,
            }
        })
    }
}
