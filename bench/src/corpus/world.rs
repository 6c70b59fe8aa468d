//! What a context has said so far.

use std::collections::{BTreeMap, HashMap};

use super::question::Kind;

/// Position in [`World::people`].
pub(super) type PersonIndex = usize;

/// Everything that questions can be asked about.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) people: Vec<Person>,
    /// In the order of their first mention.
    pub(super) towns: Vec<Town>,
    /// In the order of their statement.
    pub(super) needles: Vec<Needle>,
    /// Chunk and value.
    pub(super) totals: Vec<(usize, u32)>,
    /// Who is meant by a role's token, for the time being.
    pub(super) meanings: HashMap<u32, PersonIndex>,
}

/// A person whom a chunk names.
#[derive(Debug)]
pub(super) struct Person {
    pub(super) name: Name,
    /// Index of the pronouns.
    pub(super) gender: usize,
    /// By index of the attribute.
    pub(super) facts: BTreeMap<usize, Fact>,
    /// By the relation's token.
    pub(super) relations: BTreeMap<u32, Relation>,
}

/// A name of two syllables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    /// Positions in the lists of first and of second syllables.
    pub(super) pair: (usize, usize),
    /// Their tokens.
    pub(super) tokens: [u32; 2],
}

/// A value, and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Fact {
    pub(super) value: Vec<u32>,
    pub(super) kind: Kind,
    pub(super) chunk: usize,
}

/// A person's relation to another, and where it stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Relation {
    pub(super) other: PersonIndex,
    pub(super) kind: Kind,
    pub(super) chunk: usize,
}

/// A town where somebody lives.
#[derive(Debug)]
pub(super) struct Town {
    pub(super) name: Vec<u32>,
    /// By index of the town attribute.
    pub(super) facts: BTreeMap<usize, Fact>,
}

/// A thing with a code.
#[derive(Debug)]
pub(super) struct Needle {
    pub(super) key: [u32; 2],
    pub(super) code: [u32; 2],
    pub(super) chunk: usize,
}

impl World {
    /// Position of the town of that name, known from now on.
    pub(super) fn town(&mut self, name: &[u32]) -> usize {
        let known = self.towns.iter().position(|town| town.name == name);
        known.unwrap_or_else(|| {
            self.towns.push(Town {
                name: name.to_vec(),
                facts: BTreeMap::new(),
            });
            self.towns.len() - 1
        })
    }
}
