//! Which keys make a tile.

use super::KEY_TILE;
use crate::kv::BLOCK_TOKENS;

/// Pages of one tile.
const TILE_PAGES: usize = KEY_TILE / BLOCK_TOKENS;

/// The pages that a KV head reads, in ascending order.
#[derive(Clone, Copy, Debug)]
pub(super) enum PageList<'a> {
    All,
    Chosen(&'a [u32]),
}

impl<'a> PageList<'a> {
    /// What is read for `kv_head` of a range's pages.
    pub(super) fn new(pages: Option<&'a [Vec<u32>]>, kv_head: usize) -> Self {
        pages.map_or(Self::All, |pages| Self::Chosen(&pages[kv_head]))
    }

    /// The tiles that hold keys of positions `from..end`. Which pages share one depends on
    /// neither bound.
    pub(super) fn tiles(self, from: usize, end: usize) -> impl Iterator<Item = Tile> {
        let first = self.ending_by(from) / TILE_PAGES * TILE_PAGES;
        // Pages that begin before `end`.
        let last = self.ending_by(end + BLOCK_TOKENS - 1);
        (first..last).step_by(TILE_PAGES).map(move |first| {
            let len = TILE_PAGES.min(last - first);
            let mut pages = [0; TILE_PAGES];
            for (page, index) in pages[..len].iter_mut().zip(first..) {
                *page = match self {
                    Self::All => index,
                    Self::Chosen(list) => list[index] as usize,
                };
            }
            Tile { pages, len }
        })
    }

    /// Number of pages all of whose positions are before `position`.
    fn ending_by(self, position: usize) -> usize {
        let pages = position / BLOCK_TOKENS;
        match self {
            Self::All => pages,
            Self::Chosen(list) => list.partition_point(|&page| (page as usize) < pages),
        }
    }
}

/// Up to [`KEY_TILE`] keys that are scored together.
#[derive(Debug)]
pub(super) struct Tile {
    pages: [usize; TILE_PAGES],
    len: usize,
}

impl Tile {
    /// Its pages; each has the next [`BLOCK_TOKENS`] lanes.
    pub(super) fn pages(&self) -> impl Iterator<Item = usize> {
        self.pages[..self.len].iter().copied()
    }

    /// Number of lanes whose keys stand before `position`: these come first.
    pub(super) fn lanes_before(&self, position: usize) -> usize {
        let before = |page: usize| {
            position
                .saturating_sub(page * BLOCK_TOKENS)
                .min(BLOCK_TOKENS)
        };
        self.pages().map(before).sum()
    }
}
