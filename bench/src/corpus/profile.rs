//! What happens in a context, and how often.

use serde::Deserialize;

/// How often things happen, in permille where not said otherwise.
///
/// Written as JSON with the fields that differ from the default.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Profile {
    /// Chunks that go on about the person of the chunk before. Default: 300.
    pub(crate) continuation: u32,
    /// Chunks that call persons by roles defined before. Default: 150.
    pub(crate) role: u32,
    /// Chunks with new values for facts stated before. Default: 100.
    pub(crate) update: u32,
    /// Chunks that list the codes of things. Default: 120.
    pub(crate) needles: u32,
    /// Chunks that end by giving a person a role. Default: 150.
    pub(crate) alias: u32,
    /// Contexts whose chunks have totals. Default: 300.
    pub(crate) total: u32,
    /// Persons with a relation to another. Default: 600.
    pub(crate) relation: u32,
    /// Sentences that repeat the name. Default: 200.
    pub(crate) name_again: u32,
    /// Facts with a filler after them. Default: 80.
    pub(crate) filler: u32,
    /// Names that share a syllable with another one. Default: 250.
    pub(crate) lookalike: u32,
    /// Continuations that first go on about a town. Default: 120.
    pub(crate) town: u32,
    /// Number of distinct attributes of a context. Default: 10.
    pub(crate) attributes: u32,
    /// Fewest facts of a person in a chunk, room permitting. Default: 2.
    pub(crate) facts_min: u32,
    /// Most facts of a person in a chunk. Default: 4.
    pub(crate) facts_max: u32,
    /// Most persons of a chunk; 0 is one, and one more for every 56 tokens.
    /// Default: 0.
    pub(crate) persons: u32,
    /// Above 0, the context is a key-value list of at most so many pairs.
    /// Default: 0.
    pub(crate) pairs: u32,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            continuation: 300,
            role: 150,
            update: 100,
            needles: 120,
            alias: 150,
            total: 300,
            relation: 600,
            name_again: 200,
            filler: 80,
            lookalike: 250,
            town: 120,
            attributes: 10,
            facts_min: 2,
            facts_max: 4,
            persons: 0,
            pairs: 0,
        }
    }
}
