//! Contexts and what is asked about them.

use serde::{Deserialize, Serialize};

/// What answering takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// A fact in a chunk that names the person.
    Hop1,
    /// A fact of a person who is found by a relation of another, stated in another chunk.
    Hop2,
    /// A fact in a chunk that continues the one before and names nobody.
    Coref2,
    /// As [`Self::Coref2`], two chunks after the name.
    Coref3,
    /// As [`Self::Coref2`], three chunks after the name.
    Coref4,
    /// A fact of a person who is called by a role that an earlier chunk defines.
    Override,
    /// The new value of a fact that an earlier chunk states differently.
    Update,
    /// The total in the chunk of that number.
    Ordinal,
    /// The larger or smaller of the totals in two chunks.
    Compare,
    /// The two-number code of a two-word thing.
    Needle,
    /// The value of a key in a list.
    Kv,
    /// A motto of several words, in a chunk that names the person.
    Copy,
    /// A motto in a chunk that continues an earlier one.
    CopyRef,
}

impl Kind {
    /// What a fact in the `link`-th chunk about a person asks; the first names the person.
    pub(super) fn coref(link: u32) -> Self {
        match link {
            ..=2 => Self::Coref2,
            3 => Self::Coref3,
            4.. => Self::Coref4,
        }
    }

    /// The kind of a question for a motto, whose fact is of this kind.
    pub(super) fn of_motto(self) -> Self {
        match self {
            Self::Hop1 => Self::Copy,
            Self::Coref2 | Self::Coref3 | Self::Coref4 => Self::CopyRef,
            other => other,
        }
    }
}

/// One question, without the tokens that mark it as such; see
/// [`super::Vocabulary::prompt`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    /// What answering takes.
    pub(crate) kind: Kind,
    /// Token ids of the question.
    pub(crate) question: Vec<u32>,
    /// Token ids of the only right answer, without an end token; 1 to 8.
    pub(crate) answer: Vec<u32>,
    /// Chunks that hold the evidence, ascending or in order of reasoning.
    pub(crate) chunks: Vec<usize>,
}

/// Chunks of equal length, and questions about them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Context {
    /// Token ids: `[chunk][token]`. `<s>` goes in front of the first.
    pub(crate) chunks: Vec<Vec<u32>>,
    /// Every question that can be asked, or those of one task.
    pub(crate) questions: Vec<Question>,
}
