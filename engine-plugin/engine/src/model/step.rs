//! What a caller asks of a batch, and may say before each of its layers.

use std::ops::Range;

use super::foresee::NextLayer;
use crate::kv::{BLOCK_TOKENS, BlockId, KvPool};

/// Tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Token ids; at least one.
    pub tokens: &'a [u32],
    /// Where they stand. K and V of all positions up to the last that are not among them
    /// are in the pages, or will be once `before_layer` has run for a layer.
    pub positions: Positions<'a>,
    /// The sequence's page table from position 0; covers the tokens.
    pub blocks: &'a [BlockId],
    /// Rows of logits to return.
    pub logits: LogitsWanted,
}

/// Where the tokens of a step stand in their sequence.
#[derive(Clone, Copy, Debug)]
pub enum Positions<'a> {
    /// One after another, from this position on.
    From(usize),
    /// As listed, ascending; as many as there are tokens.
    At(&'a [usize]),
}

impl Positions<'_> {
    /// Position of the `index`-th token, if it has one.
    pub(crate) fn get(&self, index: usize) -> Option<usize> {
        match self {
            Self::From(first) => first.checked_add(index),
            Self::At(positions) => positions.get(index).copied(),
        }
    }
}

/// What a layer is about to attend with.
///
/// Rows are the tokens of the steps, in order, that have gone on so far.
#[derive(Debug)]
pub struct BeforeLayer<'a> {
    /// Its index.
    pub layer: usize,
    /// Pages, which do not hold K and V of the rows yet.
    pub pool: &'a mut KvPool,
    /// Projections after RoPE: `[row][stride]`, of which the first `heads · head_dim`
    /// elements are the query heads, the next `kv_heads · head_dim` K and as many V.
    pub rows: &'a [f32],
    /// Elements from one row to the next.
    pub stride: usize,
    /// Position of each row in its sequence.
    pub positions: &'a [usize],
    /// Rows of each step.
    pub steps: &'a [Range<usize>],
    /// What becomes of each row; all go on until told otherwise. Rows whose logits are
    /// wanted go on in any case.
    pub fates: &'a mut [Fate],
    /// Which pages each step attends to in this layer; all until told otherwise.
    pub pages: &'a mut [Pages],
    /// Which pages each step is expected to attend to in the next layer, and after the last
    /// layer in the first one for the next token. They are read ahead while this layer
    /// computes, if they are not in memory. None until told otherwise, but for steps that
    /// attend to all pages: these are expected to do so again.
    pub expected: &'a mut [Option<Pages>],
    /// From what the next layer's queries are foreseen; none before the last layer.
    pub next: Option<NextLayer<'a>>,
}

/// What becomes of a row in a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fate {
    /// Its K and V are written, and it goes on to the next layer.
    #[default]
    GoesOn,
    /// Its K and V are written, which is all that is wanted of it. In later layers, those of
    /// its position are what the pages hold.
    Ends,
    /// It has ended before: K and V of its position are what the pages hold.
    Dropped,
}

/// Which pages the rows of a step attend to in one layer.
///
/// A page is named by its index in the page table, so page `p` holds positions
/// `p · BLOCK_TOKENS ..`. Others are not read at all: what their blocks hold does not
/// matter, nor which blocks the table names for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// All.
    #[default]
    All,
    /// By KV head, the pages that its query heads attend to, and no others but those in
    /// which rows of the step stand that go on: these are seen by all of its heads, whole up
    /// to the row that attends. Order, repetition and pages behind the last row do not
    /// matter; a KV head without a list has chosen none.
    Chosen(Vec<Vec<u32>>),
}

impl Pages {
    /// By KV head, what is to be read: ascending pages, each once, none behind the last of
    /// `positions`, where the rows stand. `None` for all.
    pub(crate) fn listed(&self, kv_heads: usize, positions: &[usize]) -> Option<Vec<Vec<u32>>> {
        let Self::Chosen(chosen) = self else {
            return None;
        };
        let page = |position: &usize| u32::try_from(position / BLOCK_TOKENS).unwrap_or(u32::MAX);
        let mut own: Vec<u32> = positions.iter().map(page).collect();
        own.dedup();
        let last = own.last().copied().unwrap_or(0);
        let list = |kv_head: usize| {
            let chosen = chosen.get(kv_head).into_iter().flatten();
            let mut list: Vec<u32> = chosen.copied().filter(|&page| page <= last).collect();
            list.extend(&own);
            list.sort_unstable();
            list.dedup();
            list
        };
        Some((0..kv_heads).map(list).collect())
    }
}

/// Which rows of logits a step returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsWanted {
    /// None: the step only fills pages.
    None,
    /// Of its last token.
    Last,
    /// Of every token.
    All,
}

impl LogitsWanted {
    /// First of `tokens` rows that is wanted; `tokens` for none.
    pub(crate) fn first(self, tokens: usize) -> usize {
        match self {
            Self::None => tokens,
            Self::Last => tokens - 1,
            Self::All => 0,
        }
    }
}
