//! What is kept of keys in memory to judge pages that are elsewhere.
//!
//! Per layer and KV head, the pages of [`BLOCK_TOKENS`] tokens in groups of [`GROUP_PAGES`]:
//!
//! | what | shape | element |
//! |---|---|---|
//! | lower ends of a group's box, and steps | `[group][channel]` each | f16 |
//! | ends of a page's box | `[page][channel]` | 2 x 4 bits, in the group's steps |
//! | in which half or quarter of its page's box a token's key is | `[page][row]` | 16 x 1 bit |
//! | channels by how much keys of a page differ in them | `[group][channel]` | u16 |
//!
//! Bits of tokens tell a page with one key that a query looks for from one whose box only
//! happens to be large. They are in as many rows as there are channels, and each is spent where
//! it tells most: channels in which keys differ much get two, as many of those in which they
//! differ least none. All in all that is, a page and channel, one byte, two for its tokens and
//! 6 / [`GROUP_PAGES`] for the group, beside 64 of K and V in f16: 5.9 %.
//!
//! Ends are rounded outward, at every stage, so a box holds all its keys and bounds from it
//! are safe.
//!
//! Boxes per channel are Quest's (arXiv 2406.10774), two levels of them LeoAM's (arXiv
//! 2506.20187). For rules that want these as published, digests can have, in place of what
//! they tell of tokens, ends of 8 bits and a third row, see [`Detail`]: 5.5 %.
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

/// Share of a channel's variance in a page that the first bit of its tokens tells, and that the
/// second tells more: of a normal distribution, 0.64 and 0.24; less where boxes are rounded.
const FIRST_BIT: f32 = 0.6;
const SECOND_BIT: f32 = 0.24;

/// The largest magnitude that f16 holds.
const LARGEST: f32 = 65504.0;

/// What is known of a page beside its box.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detail {
    /// Roughly where in the box each key is.
    #[default]
    Tokens,
    /// The mean of its keys.
    Mean,
    /// Their mean distance from the middle of the box: half the widths of a mean box.
    Deviation,
}

impl Detail {
    /// Steps that a group's box is wide.
    pub(super) const fn steps(self) -> u8 {
        match self {
            Self::Tokens => 15,
            Self::Mean | Self::Deviation => 255,
        }
    }

    /// Rows of bytes that a page's codes take.
    pub(super) const fn rows(self) -> usize {
        match self {
            Self::Tokens => 1,
            Self::Mean | Self::Deviation => CODE_ROWS,
        }
    }
}

/// Digests of the pages of one sequence, or of a chunk, from its first page on.
#[derive(Clone, Debug, PartialEq)]
pub struct Digests {
    layers: usize,
    kv_heads: usize,
    dim: usize,
    detail: Detail,
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
    /// `[page][row][channel]`.
    pub(super) codes: Vec<u8>,
    /// `[group][channel]`: those in which keys differ most first. Codes of tokens, and of ends
    /// beside them, are in this order.
    pub(super) order: Vec<u16>,
    /// `[group]`: how many of them have two bits.
    pub(super) twice: Vec<u16>,
    /// `[page][row]`: a bit for each token. Rows are the upper bits of all channels that have
    /// any, then the lower bits of those that have two.
    pub(super) signs: Vec<u16>,
    /// Pages that no box holds, ascending.
    pub(super) odd: Vec<u32>,
}

impl Digests {
    /// Of no pages yet.
    pub fn new(config: &ModelConfig, detail: Detail) -> Self {
        Self {
            layers: config.layers,
            kv_heads: config.kv_heads,
            dim: config.head_dim,
            detail,
            pages: 0,
            groups: Vec::new(),
            is_open: false,
            moves: vec![(0, 0)],
            heads: vec![Head::default(); config.layers * config.kv_heads],
        }
    }

    /// Adds the pages up to position `tokens` that are full and not there yet, from the
    /// blocks that hold them; a paged pool brings them, a layer of a group at a time. A last group that
    /// was not full is made anew, so up to [`GROUP_PAGES`] pages before must still be in their
    /// blocks. Costs a pass over keys.
    ///
    /// # Errors
    ///
    /// When `blocks` does not cover the tokens: nothing is added then. When a group cannot be
    /// brought: those before it are added.
    ///
    /// # Panics
    ///
    /// When the pool was made for another model.
    pub fn extend(
        &mut self,
        pool: &mut KvPool,
        blocks: &[BlockId],
        tokens: usize,
    ) -> Result<(), KvError> {
        let full = tokens / BLOCK_TOKENS;
        pool.check_table(blocks, full * BLOCK_TOKENS)?;
        let page = BLOCK_TOKENS * self.dim;
        // Of a group in all layers: `[layer][kv_head][page]`. Nothing is changed before they
        // are there.
        let mut keys = Vec::new();
        while self.pages < full {
            let first = self.open().map_or(self.pages, |group| group.first);
            let blocks = &blocks[first..full.min(first + GROUP_PAGES)];
            keys.clear();
            for layer in 0..self.layers {
                pool.bring(blocks, 0, blocks.len() * BLOCK_TOKENS, layer..layer + 1)?;
                for kv_head in 0..self.kv_heads {
                    for &block in blocks {
                        let at = keys.len();
                        keys.resize(at + page, 0.0);
                        let block = pool.head_block(layer, block, Plane::K, kv_head);
                        block.widen(self.dim, &mut keys[at..], self.dim);
                    }
                }
            }
            let group = self.open_group(full);
            let of_heads = keys.chunks_exact(blocks.len() * page);
            for (head, keys) in self.heads.iter_mut().zip(of_heads) {
                head.code(group.first, keys, self.dim, self.detail);
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
    /// When `chunk` is of another model, or tells something else of pages.
    pub fn append(&mut self, chunk: &Self) {
        assert_eq!(
            (self.layers, self.kv_heads, self.dim, self.detail),
            (chunk.layers, chunk.kv_heads, chunk.dim, chunk.detail),
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
            head.order.extend_from_slice(&other.order);
            head.twice.extend_from_slice(&other.twice);
            head.signs.extend_from_slice(&other.signs);
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
            2 * (head.low.len() + head.step.len() + head.signs.len())
                + 2 * (head.order.len() + head.twice.len())
                + head.codes.len()
                + 4 * head.odd.len()
        });
        heads.sum::<usize>() + size_of_val(&self.groups[..]) + size_of_val(&self.moves[..])
    }

    /// What they tell of pages.
    pub fn detail(&self) -> Detail {
        self.detail
    }

    /// Channels of a head.
    pub(super) fn dim(&self) -> usize {
        self.dim
    }

    /// The same, padded to whole lanes.
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

    /// The last group, if more pages may be of it.
    fn open(&self) -> Option<Group> {
        let last = self.groups.last().copied();
        last.filter(|group| self.is_open && group.pages < GROUP_PAGES)
    }

    /// The group that the next pages are of, with as many of those before `full` as fit.
    fn open_group(&mut self, full: usize) -> Group {
        let padded = self.padded();
        let mut group = match self.open() {
            Some(group) => group,
            None => {
                let group = Group {
                    first: self.pages,
                    pages: 0,
                    moved: 0,
                };
                self.groups.push(group);
                for head in &mut self.heads {
                    head.low.resize(head.low.len() + padded, 0);
                    head.step.resize(head.step.len() + padded, 0);
                }
                group
            }
        };
        group.pages = GROUP_PAGES.min(full - group.first);
        self.pages = group.first + group.pages;
        self.is_open = true;
        if let Some(last) = self.groups.last_mut() {
            *last = group;
        }
        group
    }
}

impl Head {
    /// Codes the last group, whose pages have these keys; codes that are there of its first
    /// pages are lost.
    fn code(&mut self, first: usize, keys: &[f32], dim: usize, detail: Detail) {
        let padded = dim.next_multiple_of(LANES);
        let group = self.low.len() - padded;
        let width = detail.rows() * padded;
        let pages = keys.len() / (BLOCK_TOKENS * dim);
        self.codes.truncate(first * width);
        self.codes.resize((first + pages) * width, 0);
        self.odd.retain(|&page| (page as usize) < first);
        let mut rows: Vec<Option<Vec<f32>>> = Vec::with_capacity(pages);
        for (page, keys) in keys.chunks_exact(BLOCK_TOKENS * dim).enumerate() {
            let is_whole = keys.iter().all(|key| key.abs() <= LARGEST);
            if !is_whole {
                self.odd
                    .push(u32::try_from(first + page).unwrap_or(u32::MAX));
            }
            rows.push(is_whole.then(|| summarise(keys, dim, detail)));
        }
        // By channel, how much keys of a page differ.
        let mut widths = vec![0.0; dim];
        for channel in 0..dim {
            let ends = rows
                .iter()
                .flatten()
                .map(|it| (it[channel], it[dim + channel]));
            let Some((from, to)) = ends.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))) else {
                continue;
            };
            let scale = Scale::over(from, to, detail.steps());
            self.low[group + channel] = scale.low;
            self.step[group + channel] = scale.step;
            let pages = self.codes[first * width..].chunks_exact_mut(width);
            for (codes, rows) in pages.zip(&rows) {
                let Some(rows) = rows else { continue };
                let low = scale.below(rows[channel]);
                let high = scale.above(rows[dim + channel]);
                if detail == Detail::Tokens {
                    codes[channel] = low | high << 4;
                    widths[channel] += (scale.value(high) - scale.value(low)).powi(2);
                } else {
                    codes[channel] = low;
                    codes[padded + channel] = high;
                    let third = rows[2 * dim + channel];
                    codes[2 * padded + channel] = scale.nearest(third, detail);
                }
            }
        }
        if detail == Detail::Tokens {
            self.code_tokens(first, keys, &widths);
        }
    }

    /// Codes the tokens of the last group, whose pages' ends are coded by channel, and puts
    /// these in order.
    fn code_tokens(&mut self, first: usize, keys: &[f32], widths: &[f32]) {
        let dim = widths.len();
        let padded = dim.next_multiple_of(LANES);
        let group = self.low.len() / padded - 1;
        let pages = keys.len() / (BLOCK_TOKENS * dim);
        let mut order: Vec<u16> = (0..dim).filter_map(|it| u16::try_from(it).ok()).collect();
        let width = |channel: u16| widths[usize::from(channel)];
        order.sort_by(|a, b| width(*b).total_cmp(&width(*a)));
        let pays =
            |at: usize| SECOND_BIT * width(order[at]) > FIRST_BIT * width(order[dim - 1 - at]);
        let twice = (0..dim / 2).take_while(|&at| pays(at)).count();
        self.signs.truncate(first * padded);
        self.signs.resize((first + pages) * padded, 0);
        let each = keys.chunks_exact(BLOCK_TOKENS * dim);
        let signs = self.signs[first * padded..].chunks_exact_mut(padded);
        let codes = self.codes[first * padded..].chunks_exact_mut(padded);
        for ((keys, signs), codes) in each.zip(signs).zip(codes) {
            let of_channel = codes.to_vec();
            for (at, &channel) in order.iter().enumerate() {
                let channel = usize::from(channel);
                codes[at] = of_channel[channel];
                let scale = Scale {
                    low: self.low[group * padded + channel],
                    step: self.step[group * padded + channel],
                    steps: Detail::Tokens.steps(),
                };
                let low = scale.value(codes[at] & 15);
                let quarter = (scale.value(codes[at] >> 4) - low) / 4.0;
                for (token, key) in keys.iter().skip(channel).step_by(dim).enumerate() {
                    let code = u16::from(whole((key - low) / quarter, 3));
                    if at < dim - twice {
                        signs[at] |= (code >> 1) << token;
                    }
                    if at < twice {
                        signs[dim - twice + at] |= (code & 1) << token;
                    }
                }
            }
        }
        self.order.truncate(group * dim);
        self.order.extend(order);
        self.twice.truncate(group);
        self.twice.push(u16::try_from(twice).unwrap_or(0));
    }
}

/// Ends of a page's box, and its third row: `[CODE_ROWS][dim]`.
fn summarise(keys: &[f32], dim: usize, detail: Detail) -> Vec<f32> {
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
                * match detail {
                    Detail::Mean | Detail::Tokens => key,
                    Detail::Deviation => (key - middle).abs(),
                };
        }
    }
    rows
}

/// Evenly spaced values of one channel.
#[derive(Clone, Copy, Debug)]
struct Scale {
    low: u16,
    step: u16,
    /// The last value's code.
    steps: u8,
}

impl Scale {
    /// The first is `from` or below, the last `to` or above.
    fn over(from: f32, to: f32, steps: u8) -> Self {
        let mut low = f16::from_f32(from).to_bits();
        if widen(low) > from {
            low = match low {
                // The next below zero.
                0 | 0x8000 => 0x8001,
                0x8001.. => low + 1,
                _ => low - 1,
            };
        }
        let mut step = f16::from_f32((to - widen(low)) / f32::from(steps)).to_bits();
        while (Self { low, step, steps }).value(steps) < to {
            step += 1;
        }
        Self { low, step, steps }
    }

    fn value(self, code: u8) -> f32 {
        widen(self.low) + widen(self.step) * f32::from(code)
    }

    /// The code of the largest value that is not above `value`, about.
    fn below(self, value: f32) -> u8 {
        let mut code = whole(self.position(value), self.steps);
        while code > 0 && self.value(code) > value {
            code -= 1;
        }
        code
    }

    /// The code of the smallest value that is not below `value`, about.
    fn above(self, value: f32) -> u8 {
        let mut code = whole(self.position(value).ceil(), self.steps);
        while code < self.steps && self.value(code) < value {
            code += 1;
        }
        code
    }

    /// The code that is nearest to a mean; or to a deviation, which has no lower end.
    fn nearest(self, value: f32, detail: Detail) -> u8 {
        let value = match detail {
            Detail::Deviation => value + widen(self.low),
            Detail::Mean | Detail::Tokens => value,
        };
        whole(self.position(value).round(), self.steps)
    }

    /// Steps from the lower end.
    fn position(self, value: f32) -> f32 {
        (value - widen(self.low)) / widen(self.step)
    }
}

/// The whole part, from 0 to `most`; 0 of what is no number.
fn whole(value: f32, most: u8) -> u8 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "casts of floats saturate, and make 0 of what is no number"
    )]
    let whole = value as u8;
    whole.min(most)
}
