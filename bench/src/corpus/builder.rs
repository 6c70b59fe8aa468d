//! One context, chunk by chunk. The order of draws is part of the format.

use super::SampleError;
use super::names::{Names, Split};
use super::profile::Profile;
use super::question::Context;
use super::rng::Rng;
use super::vocabulary::Vocabulary;
use super::world::{PersonIndex, World};

mod ask;
mod chunks;
mod pairs;
mod sentences;

pub(super) use pairs::pairs_that_fit;

/// A chunk's free space is always 0 or at least this: the shortest filler.
pub(super) const MIN_FILLER: usize = 4;

/// Builds one context and is used up by it.
#[derive(Debug)]
pub(super) struct Builder<'a> {
    vocabulary: &'a Vocabulary,
    profile: &'a Profile,
    count: usize,
    size: usize,
    rng: &'a mut Rng,
    names: Names,
    world: World,
    chunks: Vec<Vec<u32>>,
    /// The chunk being written; its index is the number of chunks before it.
    chunk: Vec<u32>,
    /// Attributes of this context, ascending.
    pool: Vec<usize>,
    /// The person whom a continuation goes on about.
    subject: Option<PersonIndex>,
    /// The town named last.
    last_town: Option<usize>,
}

/// What a chunk is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChunkKind {
    Person,
    Continuation,
    Roles,
    Updates,
    Needles,
}

impl<'a> Builder<'a> {
    /// Starts a context of `chunks` chunks of `chunk_tokens` tokens.
    ///
    /// # Errors
    /// Every [`SampleError`] but [`SampleError::NamesExhausted`] and
    /// [`SampleError::NoQuestion`].
    pub(super) fn new(
        vocabulary: &'a Vocabulary,
        profile: &'a Profile,
        chunks: usize,
        chunk_tokens: usize,
        rng: &'a mut Rng,
        split: Split,
    ) -> Result<Self, SampleError> {
        if chunks == 0 {
            return Err(SampleError::NoChunk);
        }
        if chunk_tokens < MIN_CHUNK_TOKENS {
            return Err(SampleError::ChunkTooShort);
        }
        if chunks.saturating_mul(chunk_tokens) > MAX_CONTEXT_TOKENS {
            return Err(SampleError::ContextTooLong);
        }
        if profile.total > 0 && chunks > vocabulary.ordinals.len() {
            return Err(SampleError::TooManyChunks(vocabulary.ordinals.len()));
        }
        if profile.facts_min > profile.facts_max {
            return Err(SampleError::Facts);
        }
        Ok(Self {
            vocabulary,
            profile,
            count: chunks,
            size: chunk_tokens,
            rng,
            names: Names::new(split),
            world: World::default(),
            chunks: Vec::with_capacity(chunks),
            chunk: Vec::new(),
            pool: Vec::new(),
            subject: None,
            last_town: None,
        })
    }

    /// Draws all chunks, then the questions.
    ///
    /// # Errors
    /// [`SampleError::NamesExhausted`].
    pub(super) fn build(mut self) -> Result<Context, SampleError> {
        if self.profile.pairs > 0 {
            return self.pair_list();
        }
        self.pool = (0..self.vocabulary.attributes.len()).collect();
        self.rng.shuffle(&mut self.pool);
        self.pool.truncate(self.profile.attributes as usize);
        self.pool.sort_unstable();
        let with_totals = self.rng.chance(self.profile.total);
        // The kind of the chunk before, and how many in a row are about one person.
        let (mut kind, mut link) = (None, 0);
        for _ in 0..self.count {
            let next;
            (next, link) = self.next_kind(kind, link);
            kind = Some(next);
            self.open_chunk();
            match next {
                ChunkKind::Continuation => self.continuation(link),
                ChunkKind::Roles => self.roles(),
                ChunkKind::Updates => self.updates(),
                ChunkKind::Needles => self.needles(),
                ChunkKind::Person => {}
            }
            if with_totals {
                self.total();
            }
            if next == ChunkKind::Person {
                self.persons()?;
            }
            let anybody = !self.world.people.is_empty();
            if anybody && next != ChunkKind::Needles && self.rng.chance(self.profile.alias) {
                self.alias();
            }
            self.close_chunk();
        }
        let questions = self.ask();
        Ok(Context {
            chunks: self.chunks,
            questions,
        })
    }

    fn next_kind(&mut self, before: Option<ChunkKind>, link: u32) -> (ChunkKind, u32) {
        let Self { rng, profile, .. } = self;
        let continues = matches!(before, Some(ChunkKind::Person | ChunkKind::Continuation));
        if self.subject.is_some()
            && continues
            && link < MAX_LINKS
            && rng.chance(profile.continuation)
        {
            return (ChunkKind::Continuation, link + 1);
        }
        if !self.world.meanings.is_empty() && rng.chance(profile.role) {
            return (ChunkKind::Roles, 0);
        }
        if !self.world.people.is_empty() && rng.chance(profile.update) {
            return (ChunkKind::Updates, 0);
        }
        if rng.chance(profile.needles) {
            return (ChunkKind::Needles, 0);
        }
        (ChunkKind::Person, 1)
    }

    /// Index of the chunk being written.
    fn index(&self) -> usize {
        self.chunks.len()
    }

    /// Tokens left in the chunk.
    fn left(&self) -> usize {
        self.size - self.chunk.len()
    }

    fn open_chunk(&mut self) {
        self.chunk = Vec::with_capacity(self.size);
        self.chunk.push(self.vocabulary.doc);
    }

    /// Fills the chunk to its last token.
    fn close_chunk(&mut self) {
        let by_length = &self.vocabulary.fillers_by_length;
        while self.left() > 0 {
            let exact = by_length.get(self.left().saturating_sub(MIN_FILLER));
            let filler = self.rng.pick(exact.unwrap_or(&self.vocabulary.fillers));
            self.add(filler);
        }
        self.chunks.push(std::mem::take(&mut self.chunk));
    }

    /// Appends the sentence if what is left then can still be filled.
    fn add(&mut self, sentence: &[u32]) -> bool {
        match self.left().checked_sub(sentence.len()) {
            None | Some(1..MIN_FILLER) => false,
            Some(_) => {
                self.chunk.extend_from_slice(sentence);
                true
            }
        }
    }

    fn maybe_filler(&mut self) {
        if self.rng.chance(self.profile.filler) {
            let filler = self.rng.pick(&self.vocabulary.fillers);
            self.add(filler);
        }
    }
}

/// `<doc>` and a filler.
pub(super) const MIN_CHUNK_TOKENS: usize = 1 + MIN_FILLER;

/// Of all chunks together: far below the number of names and of needles.
pub(super) const MAX_CONTEXT_TOKENS: usize = 8192;

/// Chunks in a row about one person at most.
const MAX_LINKS: u32 = 4;
