//! Names, each used once in a context, and those kept for tests.

use std::collections::HashSet;

use super::SampleError;
use super::profile::Profile;
use super::rng::Rng;
use super::vocabulary::Vocabulary;
use super::world::{Name, Person};

/// Which names a context may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Split {
    /// Names seen in training.
    Train,
    /// Names kept for tests: no training context has one.
    Test,
}

/// Whether a name is kept for tests: one in eight, by position in the lists.
pub(super) fn is_held_out((initial, last): (usize, usize)) -> bool {
    (initial * 31 + last * 17 + initial * last) % 8 == 0
}

/// Names that a context has used up.
#[derive(Debug)]
pub(super) struct Names {
    split: Split,
    used: HashSet<(usize, usize)>,
}

impl Names {
    pub(super) fn new(split: Split) -> Self {
        Self {
            split,
            used: HashSet::new(),
        }
    }

    /// Draws a name that nobody has; it may look like one of `people`.
    pub(super) fn draw(
        &mut self,
        vocabulary: &Vocabulary,
        profile: &Profile,
        people: &[Person],
        rng: &mut Rng,
    ) -> Result<Name, SampleError> {
        let Vocabulary {
            initials, finals, ..
        } = vocabulary;
        let lookalike = !people.is_empty() && rng.chance(profile.lookalike);
        for _ in 0..DRAWS {
            let mut pair = (rng.index(initials.len()), rng.index(finals.len()));
            if lookalike {
                let other = rng.pick(people).name.pair;
                if rng.chance(500) {
                    pair.0 = other.0;
                } else {
                    pair.1 = other.1;
                }
            }
            let fits = is_held_out(pair) == (self.split == Split::Test);
            if fits && self.used.insert(pair) {
                let tokens = [initials[pair.0], finals[pair.1]];
                return Ok(Name { pair, tokens });
            }
        }
        Err(SampleError::NamesExhausted)
    }
}

/// Draws of one name before it is given up.
const DRAWS: usize = 100_000;
