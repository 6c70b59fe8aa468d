//! What is kept of keys in memory to judge pages that are elsewhere.
//!
//! Per layer and KV head, the pages of [`BLOCK_TOKENS`] tokens in groups of [`GROUP_PAGES`]:
//!
//! | what | shape | element |
//! |---|---|---|
//! | lower ends of a group's box, and steps | `[group][channel]` each | f16 |
//! | a page's ends, and its mean or deviation | `[page][3][channel]` | u8, in the group's steps |
//!
//! Ends are rounded outward, at every stage, so a box holds all its keys and bounds from it
//! are safe. That is 3 + 4 / [`GROUP_PAGES`] bytes a channel and page, beside 64 of K and V
//! in f16: 5.5 %, and the exact boxes of the group that is still filling.
//!
//! Boxes per channel are Quest's (arXiv 2406.10774), their mean those of ArkVale (NeurIPS
//! 2024), two levels those of LeoAM (arXiv 2506.20187).
//!
//! # Keys that no box holds
//!
//! A page with a key that is not a number, or beyond the range of f16, is not in its group's
//! box. It is listed apart, and judged to reach any height: no rule that reads digests
//! passes it over while there is budget.
//!
//! # Other positions
//!
//! RoPE turns a key by its position, and `q · turned(k) = turned_back(q) · k`. So the digest
//! of a chunk stays as it is when the chunk goes to another place, by whole pages, and
//! queries are turned back for it: [`Digests::append`].

use half::f16;

use crate::config::ModelConfig;
use crate::kernels::{CODE_ROWS, LANES, widen};
use crate::kv::{BLOCK_TOKENS, BlockId, KvError, KvPool, Plane};

/// Pages of a full group: boxes of 128 tokens.
pub const GROUP_PAGES: usize = 8;

/// The largest magnitude that f16 holds.
const LARGEST: f32 = 65504.0;

/// What a page's third row of codes is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Third {
    /// The mean of its keys.
    #[default]
    Mean,
    /// Their mean distance from the middle of the box: half the widths of a mean box.
    Deviation,
}

/// Digests of the pages of one sequence, or of a chunk, from its first page on.
#[derive(Clone, Debug, PartialEq)]
pub struct Digests {
    layers: usize,
    kv_heads: usize,
    dim: usize,
    third: Third,
    pages: usize,
    groups: Vec<Group>,
    /// Whether the next page may join the last group.
    is_open: bool,
    /// Distinct ways by which pages were moved, in pages: from, to. The first is none.
    moves: Vec<(usize, usize)>,
    /// `[layer][kv_head]`.
    heads: Vec<Head>,
}

/// Pages with one box; the same of all layers and heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Index of its first page in the sequence.
    pub(super) first: usize,
    /// Its pages, at most [`GROUP_PAGES`].
    pub(super) pages: usize,
    /// Index of how it was moved.
    pub(super) moved: usize,
}

/// One KV head of one layer. Channels are padded to whole lanes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Head {
    /// `[group][channel]`, f16.
    pub(super) low: Vec<u16>,
    /// `[group][channel]`, f16.
    pub(super) step: Vec<u16>,
    /// `[page][CODE_ROWS][channel]`.
    pub(super) codes: Vec<u8>,
    /// Pages that no box holds, ascending.
    pub(super) odd: Vec<u32>,
    /// Of the open group, exactly: `[page][CODE_ROWS][dim]`.
    open: Vec<f32>,
}

impl Digests {
    /// Of no pages yet.
    pub fn new(config: &ModelConfig, third: Third) -> Self {
        Self {
            layers: config.layers,
            kv_heads: config.kv_heads,
            dim: config.head_dim,
            third,
            pages: 0,
            groups: Vec::new(),
            is_open: false,
            moves: vec![(0, 0)],
            heads: vec![Head::default(); config.layers * config.kv_heads],
        }
    }

    /// Adds the pages up to position `tokens` that are full and not there yet, from the
    /// blocks that hold them now. Costs a pass over their keys.
    ///
    /// # Errors
    ///
    /// When `blocks` does not cover the tokens; nothing is added then.
    ///
    /// # Panics
    ///
    /// When the pool was made for another model.
    pub fn extend(
        &mut self,
        pool: &KvPool,
        blocks: &[BlockId],
        tokens: usize,
    ) -> Result<(), KvError> {
        let full = tokens / BLOCK_TOKENS;
        pool.check_table(blocks, full * BLOCK_TOKENS)?;
        let mut keys = vec![0.0; BLOCK_TOKENS * self.dim];
        for (page, &block) in blocks[..full].iter().enumerate().skip(self.pages) {
            self.open_group();
            for layer in 0..self.layers {
                for kv_head in 0..self.kv_heads {
                    let block = pool.head_block(layer, block, Plane::K, kv_head);
                    block.widen(self.dim, &mut keys, self.dim);
                    let head = &mut self.heads[layer * self.kv_heads + kv_head];
                    head.push(page, &keys, self.dim, self.third);
                }
            }
        }
        Ok(())
    }

    /// Adds the pages of a chunk that stand behind those there are, wherever they stood when
    /// `chunk` was made of them: their keys have been turned to their new positions since,
    /// which leaves digests as they are. Costs a copy of them.
    ///
    /// # Panics
    ///
    /// When `chunk` is of another model, or has another third row.
    pub fn append(&mut self, chunk: &Self) {
        assert_eq!(
            (self.layers, self.kv_heads, self.dim, self.third),
            (chunk.layers, chunk.kv_heads, chunk.dim, chunk.third),
            "digests of one kind"
        );
        for group in &chunk.groups {
            // From where it stands in the chunk, and before that from where it was made.
            let (from, to) = chunk.moves[group.moved];
            let made = group.first + from - to;
            let first = self.pages + group.first;
            let by = |&(from, to): &(usize, usize)| to + made == first + from;
            let moved = self.moves.iter().position(by).unwrap_or_else(|| {
                self.moves.push((made, first));
                self.moves.len() - 1
            });
            self.groups.push(Group {
                first,
                moved,
                ..*group
            });
        }
        for (head, other) in self.heads.iter_mut().zip(&chunk.heads) {
            head.low.extend_from_slice(&other.low);
            head.step.extend_from_slice(&other.step);
            head.codes.extend_from_slice(&other.codes);
            let base = u32::try_from(self.pages).unwrap_or(u32::MAX);
            let odd = other.odd.iter().map(|page| page.saturating_add(base));
            head.odd.extend(odd);
            head.open = Vec::new();
        }
        self.pages += chunk.pages;
        self.is_open = false;
    }

    /// Pages that are digested: the first of the sequence.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes that they take in memory.
    pub fn bytes(&self) -> usize {
        let heads = self.heads.iter().map(|head| {
            2 * (head.low.len() + head.step.len())
                + head.codes.len()
                + 4 * (head.odd.len() + head.open.len())
        });
        heads.sum::<usize>() + size_of_val(&self.groups[..]) + size_of_val(&self.moves[..])
    }

    /// What a page's third row is.
    pub fn third(&self) -> Third {
        self.third
    }

    /// Channels of a head, padded to whole lanes.
    pub(super) fn padded(&self) -> usize {
        self.dim.next_multiple_of(LANES)
    }

    pub(super) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Distinct ways by which pages were moved, in tokens: from, to. The first is none.
    pub(super) fn moves(&self) -> impl Iterator<Item = (usize, usize)> {
        let tokens = |&(from, to): &(usize, usize)| (from * BLOCK_TOKENS, to * BLOCK_TOKENS);
        self.moves.iter().map(tokens)
    }

    pub(super) fn head(&self, layer: usize, kv_head: usize) -> &Head {
        &self.heads[layer * self.kv_heads + kv_head]
    }

    /// Makes room for one more page in the last group, or in a new one.
    fn open_group(&mut self) {
        let padded = self.padded();
        match self.groups.last_mut() {
            Some(group) if self.is_open && group.pages < GROUP_PAGES => group.pages += 1,
            _ => {
                self.groups.push(Group {
                    first: self.pages,
                    pages: 1,
                    moved: 0,
                });
                for head in &mut self.heads {
                    head.open = Vec::new();
                    head.low.resize(head.low.len() + padded, 0);
                    head.step.resize(head.step.len() + padded, 0);
                }
                self.is_open = true;
            }
        }
        self.pages += 1;
        for head in &mut self.heads {
            let codes = head.codes.len() + CODE_ROWS * padded;
            head.codes.resize(codes, 0);
        }
    }
}

impl Head {
    /// Adds a page to the last group, for which there is room, and codes the group anew.
    fn push(&mut self, page: usize, keys: &[f32], dim: usize, third: Third) {
        if keys.iter().all(|key| key.abs() <= LARGEST) {
            self.open.extend(summarise(keys, dim, third));
        } else {
            self.odd.push(u32::try_from(page).unwrap_or(u32::MAX));
            // Below, what is no number stands for no keys.
            self.open
                .resize(self.open.len() + CODE_ROWS * dim, f32::NAN);
        }
        let padded = dim.next_multiple_of(LANES);
        let group = self.low.len() - padded;
        let (low, step) = (&mut self.low[group..], &mut self.step[group..]);
        let pages = self.open.len() / (CODE_ROWS * dim);
        let first = self.codes.len() - pages * CODE_ROWS * padded;
        let codes = &mut self.codes[first..];
        for channel in 0..dim {
            let at = |page: usize, row: usize| self.open[(page * CODE_ROWS + row) * dim + channel];
            let whole = (0..pages).filter(|&page| !at(page, 0).is_nan());
            let ends = whole.clone().map(|page| (at(page, 0), at(page, 1)));
            let Some((from, to)) = ends.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))) else {
                continue;
            };
            let scale = Scale::over(from, to);
            (low[channel], step[channel]) = (scale.low, scale.step);
            for page in whole {
                let mut set = |row: usize, code: u8| {
                    codes[(page * CODE_ROWS + row) * padded + channel] = code;
                };
                set(0, scale.below(at(page, 0)));
                set(1, scale.above(at(page, 1)));
                set(2, scale.nearest(at(page, 2), third));
            }
        }
        if pages == GROUP_PAGES {
            self.open = Vec::new();
        }
    }
}

/// Ends of a page's box, and its third row: `[CODE_ROWS][dim]`.
fn summarise(keys: &[f32], dim: usize, third: Third) -> Vec<f32> {
    let mut rows = vec![f32::INFINITY; dim];
    rows.resize(2 * dim, f32::NEG_INFINITY);
    rows.resize(3 * dim, 0.0);
    let (ends, thirds) = rows.split_at_mut(2 * dim);
    let (low, high) = ends.split_at_mut(dim);
    for key in keys.chunks_exact(dim) {
        for ((low, high), &key) in low.iter_mut().zip(high.iter_mut()).zip(key) {
            (*low, *high) = (low.min(key), high.max(key));
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a page has few tokens")]
    let share = dim as f32 / keys.len() as f32;
    for key in keys.chunks_exact(dim) {
        for (channel, (mean, &key)) in thirds.iter_mut().zip(key).enumerate() {
            let middle = f32::midpoint(low[channel], high[channel]);
            *mean += share
                * match third {
                    Third::Mean => key,
                    Third::Deviation => (key - middle).abs(),
                };
        }
    }
    rows
}

/// 256 evenly spaced values of one channel.
#[derive(Clone, Copy, Debug)]
struct Scale {
    low: u16,
    step: u16,
}

impl Scale {
    /// The first is `from` or below, the last `to` or above.
    fn over(from: f32, to: f32) -> Self {
        let mut low = f16::from_f32(from).to_bits();
        if widen(low) > from {
            low = match low {
                // The next below zero.
                0 | 0x8000 => 0x8001,
                0x8001.. => low + 1,
                _ => low - 1,
            };
        }
        let mut step = f16::from_f32((to - widen(low)) / 255.0).to_bits();
        while (Self { low, step }).value(255) < to {
            step += 1;
        }
        Self { low, step }
    }

    fn value(self, code: u8) -> f32 {
        widen(self.step).mul_add(f32::from(code), widen(self.low))
    }

    /// The code of the largest value that is not above `value`, about.
    fn below(self, value: f32) -> u8 {
        let mut code = self.round(value, f32::floor);
        while code > 0 && self.value(code) > value {
            code -= 1;
        }
        code
    }

    /// The code of the smallest value that is not below `value`, about.
    fn above(self, value: f32) -> u8 {
        let mut code = self.round(value, f32::ceil);
        while code < u8::MAX && self.value(code) < value {
            code += 1;
        }
        code
    }

    /// The code that is nearest to a mean; or to a deviation, which has no lower end.
    fn nearest(self, value: f32, third: Third) -> u8 {
        let value = match third {
            Third::Mean => value,
            Third::Deviation => value + widen(self.low),
        };
        self.round(value, f32::round)
    }

    fn round(self, value: f32, way: fn(f32) -> f32) -> u8 {
        let steps = (value - widen(self.low)) / widen(self.step);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "casts of floats saturate, and make 0 of what is no number"
        )]
        let code = way(steps) as u8;
        code
    }
}
