//! Causal attention over paged K and V, with online softmax.
//!
//! FlashAttention's recurrence (Dao et al., arXiv 2205.14135) over tiles of
//! [`KEY_TILE`] keys. A unit of work is one KV head of up to [`QUERY_TILE`]
//! query rows: all query heads of the group, for some tokens of a sequence. So a
//! tile of K and V is widened and transposed once per unit and stays in cache.
//!
//! # Order of summation
//!
//! Tiles are every [`KEY_TILE`] keys of the pages that are read, which are all, from
//! position 0, or those that were chosen for the KV head, in ascending order. Scores are chains
//! over dimensions; a tile's values are a chain over its tokens, started from
//! the rescaled sum so far. Keys that a row does not see get weight 0, which
//! changes no value of a sum as long as V is finite, so a row's result does not
//! depend on the rows it is tiled with. An infinity or NaN in V may also reach
//! rows of its tile that do not see it, as 0 · ∞ is NaN. All f32.

use rayon::prelude::*;

use super::elementwise::{LANES, exp, max_lanes, sum_lanes};
use super::isa::{Kind, dispatch};
use super::{AlignedBuf, Isa};
use crate::kv::{BLOCK_TOKENS, BlockId, HeadBlock, KvPool, Plane};

mod pages;

use pages::{PageList, Tile};

/// Keys per step of the online softmax.
pub const KEY_TILE: usize = 4 * BLOCK_TOKENS;

/// Query rows per unit of work, about: tokens times query heads of one group.
const QUERY_TILE: usize = 192;

/// Rows whose scores are computed together, in registers.
const ROW_BLOCK: usize = 6;

/// What attention computes in one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    /// Query heads.
    pub(crate) heads: usize,
    /// KV heads; divides `heads`.
    pub(crate) kv_heads: usize,
    /// Elements per head.
    pub(crate) head_dim: usize,
    /// Most recent positions that a query sees, itself included.
    pub(crate) window: Option<usize>,
}

/// Queries of one sequence, in consecutive rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryRange<'a> {
    /// Row of the first query in the matrix of queries and in the output.
    pub(crate) first_row: usize,
    /// Position of each query in the sequence, ascending; their own K and V are in the
    /// pages, and those of all positions between.
    pub(crate) positions: &'a [usize],
    /// The sequence's pages, from position 0.
    pub(crate) blocks: &'a [BlockId],
    /// By KV head, ascending indices of the pages that are read; those of the queries are
    /// among them. `None` for all.
    pub(crate) pages: Option<&'a [Vec<u32>]>,
}

/// Everything [`attend`] reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionWork<'a> {
    /// Heads and window.
    pub(crate) shape: AttentionShape,
    /// Which queries attend, by ascending rows; no two share one.
    pub(crate) ranges: &'a [QueryRange<'a>],
    /// Rows of queries, after RoPE: `[row][query_stride]`, of which the first
    /// `heads · head_dim` elements are the query heads.
    pub(crate) queries: &'a [f32],
    /// Elements from one row of `queries` to the next.
    pub(crate) query_stride: usize,
    /// Pages that hold K and V of all positions up to each query.
    pub(crate) pool: &'a KvPool,
    /// Layer of the pages.
    pub(crate) layer: usize,
}

/// Writes `[row][heads · head_dim]` for the rows of all ranges; other rows of
/// `out` keep their values. Runs on the current rayon pool.
///
/// # Panics
///
/// When a range reaches outside `queries`, `out` or its page table, or begins
/// before the end of the one before it.
pub(crate) fn attend(isa: Isa, work: &AttentionWork<'_>, out: &mut [f32]) {
    let shape = work.shape;
    let group = shape.heads / shape.kv_heads;
    let tokens_per_unit = (QUERY_TILE / group).max(1);
    let width = shape.heads * shape.head_dim;
    let mut units = Vec::new();
    let mut next_row = 0;
    for range in work.ranges {
        // Ranges are checked here so that units may trust their rows.
        assert!(next_row <= range.first_row, "ranges ascend");
        next_row = range.first_row.saturating_add(range.positions.len());
        assert!(next_row <= out.len() / width, "rows of out");
        for (index, positions) in range.positions.chunks(tokens_per_unit).enumerate() {
            for kv_head in 0..shape.kv_heads {
                units.push(Unit {
                    range: QueryRange {
                        first_row: range.first_row + index * tokens_per_unit,
                        positions,
                        blocks: range.blocks,
                        pages: range.pages,
                    },
                    pages: PageList::new(range.pages, kv_head),
                    kv_head,
                });
            }
        }
    }
    // Later queries see more keys; the longest units first keep threads level.
    units.reverse();

    let out = HeadRows {
        start: out.as_mut_ptr(),
        len: out.len(),
    };
    units.par_iter().for_each_init(
        || Workspace::new(shape.head_dim),
        |space, unit| {
            unit.run(isa, work, space);
            for row in 0..unit.range.positions.len() * group {
                let at = (unit.range.first_row + row / group) * width
                    + (unit.kv_head * group + row % group) * shape.head_dim;
                // SAFETY: no other unit has this row and KV head, ranges being
                // disjoint as asserted; and the borrow of `out` in `attend`
                // outlives the loop.
                let to = unsafe { out.stretch(at, shape.head_dim) };
                space.finish_row(row, to);
            }
        },
    );
}

/// The output, of which each unit writes its rows of its heads.
struct HeadRows {
    start: *mut f32,
    len: usize,
}

// SAFETY: units write disjoint parts; see `attend`.
unsafe impl Sync for HeadRows {}

impl HeadRows {
    /// Elements `at..at + len`.
    ///
    /// # Safety
    ///
    /// The output is still borrowed, and nobody else uses these elements while
    /// the result lives.
    #[expect(clippy::mut_from_ref, reason = "the contract of the function")]
    unsafe fn stretch(&self, at: usize, len: usize) -> &mut [f32] {
        assert!(at + len <= self.len, "rows of out");
        // SAFETY: inside the output as asserted; alive and unaliased as promised.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

/// One KV head of a few queries.
struct Unit<'a> {
    range: QueryRange<'a>,
    pages: PageList<'a>,
    kv_head: usize,
}

/// Scratch of one thread. `dim` is the head dimension, `padded` the next
/// multiple of [`LANES`].
struct Workspace {
    dim: usize,
    padded: usize,
    /// `[row][dim]`, scaled by `1 / sqrt(dim)`.
    queries: AlignedBuf<f32>,
    /// `[row][padded]`: weighted sums of V so far.
    sums: AlignedBuf<f32>,
    /// Per row: largest score so far, sum of weights so far.
    softmax: Vec<(f32, f32)>,
    /// `[dim][KEY_TILE]`.
    keys: AlignedBuf<f32>,
    /// `[KEY_TILE][padded]`.
    values: AlignedBuf<f32>,
    /// `[BLOCK_TOKENS][padded]`: keys of a page before transposition.
    page: AlignedBuf<f32>,
}

impl Workspace {
    fn new(dim: usize) -> Self {
        let padded = dim.next_multiple_of(LANES);
        Self {
            dim,
            padded,
            queries: AlignedBuf::new(0),
            sums: AlignedBuf::new(0),
            softmax: Vec::new(),
            keys: AlignedBuf::new(padded * KEY_TILE),
            values: AlignedBuf::new(KEY_TILE * padded),
            page: AlignedBuf::new(BLOCK_TOKENS * padded),
        }
    }

    fn finish_row(&self, row: usize, out: &mut [f32]) {
        let (_, weights) = self.softmax[row];
        for (out, sum) in out.iter_mut().zip(&self.sums[row * self.padded..]) {
            *out = sum / weights;
        }
    }

    /// Widens and lays out the pages of a tile.
    fn load_tile(&mut self, isa: Isa, work: &AttentionWork<'_>, unit: &Unit<'_>, tile: &Tile) {
        for (index, page) in tile.pages().enumerate() {
            let block = unit.range.blocks[page];
            let keys = work
                .pool
                .head_block(work.layer, block, Plane::K, unit.kv_head);
            let lane = index * BLOCK_TOKENS;
            match keys {
                HeadBlock::F32(rows) if self.dim == self.padded => {
                    transpose(isa, rows, self.padded, &mut self.keys[lane..]);
                }
                other => {
                    other.widen(self.dim, &mut self.page, self.padded);
                    transpose(isa, &self.page, self.padded, &mut self.keys[lane..]);
                }
            }
            let values = work
                .pool
                .head_block(work.layer, block, Plane::V, unit.kv_head);
            values.widen(
                self.dim,
                &mut self.values[lane * self.padded..],
                self.padded,
            );
        }
    }
}

impl Unit<'_> {
    fn run(&self, isa: Isa, work: &AttentionWork<'_>, space: &mut Workspace) {
        let shape = work.shape;
        let dim = shape.head_dim;
        let group = shape.heads / shape.kv_heads;
        let positions = self.range.positions;
        let rows = positions.len() * group;

        space.queries.ensure(rows * dim);
        space.sums.ensure(rows * space.padded);
        space.sums.fill(0.0);
        space.softmax.clear();
        space.softmax.resize(rows, (f32::NEG_INFINITY, 0.0));
        #[expect(clippy::cast_precision_loss, reason = "head_dim is at most 512")]
        let scale = 1.0 / (dim as f32).sqrt();
        for row in 0..rows {
            let at = (self.range.first_row + row / group) * work.query_stride
                + (self.kv_head * group + row % group) * dim;
            for (to, from) in space.queries[row * dim..][..dim]
                .iter_mut()
                .zip(&work.queries[at..][..dim])
            {
                *to = from * scale;
            }
        }

        // First and one past the last key that the query at `position` sees.
        let visible = |position: usize| {
            let first = shape
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window));
            (first, position + 1)
        };
        let (Some(&first), Some(&last)) = (positions.first(), positions.last()) else {
            return;
        };
        let (from, _) = visible(first);
        let (_, end) = visible(last);
        for tile in self.pages.tiles(from, end) {
            let tokens = tile.lanes_before(end);
            space.load_tile(isa, work, self, &tile);
            for start in (0..rows).step_by(ROW_BLOCK) {
                let count = ROW_BLOCK.min(rows - start);
                // Lanes of the tile that each row sees; empty for none.
                let mut lanes = [(0, 0); ROW_BLOCK];
                for (row, lanes) in lanes[..count].iter_mut().enumerate() {
                    let (from, to) = visible(positions[(start + row) / group]);
                    *lanes = (tile.lanes_before(from), tile.lanes_before(to));
                }
                if lanes.iter().all(|(from, to)| from >= to) {
                    continue;
                }
                let mut scores = [[0.0; KEY_TILE]; ROW_BLOCK];
                let queries = &space.queries[start * dim..][..count * dim];
                score_rows(isa, queries, dim, &space.keys, &mut scores[..count]);
                let mut rescale = [1.0; ROW_BLOCK];
                let softmax = &mut space.softmax[start..start + count];
                soften(isa, &mut scores, &lanes, softmax, &mut rescale);
                let sums = &mut space.sums[start * space.padded..][..count * space.padded];
                add_values(
                    isa,
                    &scores,
                    &rescale,
                    tokens,
                    &space.values,
                    space.padded,
                    sums,
                );
            }
        }
    }
}

/// `out[lane + token] of column d = rows[token][d]`: a page of keys into one
/// quarter of a tile. `rows` is `[BLOCK_TOKENS][dim]`, `out` starts at the
/// quarter's first lane.
fn transpose(isa: Isa, rows: &[f32], dim: usize, out: &mut [f32]) {
    match isa.kind() {
        // SAFETY: an `Isa` of this kind exists only after detection.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512::transpose(rows, dim, out) },
        _ => transpose_scalar(rows, dim, out),
    }
}

fn transpose_scalar(rows: &[f32], dim: usize, out: &mut [f32]) {
    for (token, row) in rows.chunks_exact(dim).enumerate() {
        for (d, &key) in row.iter().enumerate() {
            out[d * KEY_TILE + token] = key;
        }
    }
}

/// Dot products of query rows, each `dim` long, with all keys of a tile.
fn score_rows(isa: Isa, queries: &[f32], dim: usize, keys: &[f32], scores: &mut [[f32; KEY_TILE]]) {
    match isa.kind() {
        // SAFETY: an `Isa` of this kind exists only after detection.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512::score_rows(queries, dim, keys, scores) },
        _ => score_rows_compiled(isa, queries, dim, keys, scores),
    }
}

dispatch! {
    fn score_rows_compiled(
        queries: &[f32], dim: usize, keys: &[f32], scores: &mut [[f32; KEY_TILE]],
    ) = score_rows_scalar
}

#[inline(always)]
fn score_rows_scalar(queries: &[f32], dim: usize, keys: &[f32], scores: &mut [[f32; KEY_TILE]]) {
    for (query, scores) in queries.chunks_exact(dim).zip(scores) {
        *scores = [0.0; KEY_TILE];
        for (&query, keys) in query.iter().zip(keys.as_chunks::<KEY_TILE>().0) {
            for (score, &key) in scores.iter_mut().zip(keys) {
                *score = key.mul_add(query, *score);
            }
        }
    }
}

dispatch! {
    /// Turns scores into weights relative to the largest score so far, updates
    /// each row's running maximum and sum, and says by how much earlier sums
    /// shrink. Weights of unseen keys are 0.
    fn soften(
        scores: &mut [[f32; KEY_TILE]; ROW_BLOCK],
        lanes: &[(usize, usize); ROW_BLOCK],
        softmax: &mut [(f32, f32)],
        rescale: &mut [f32; ROW_BLOCK],
    ) = soften_body
}

#[inline(always)]
fn soften_body(
    scores: &mut [[f32; KEY_TILE]; ROW_BLOCK],
    lanes: &[(usize, usize); ROW_BLOCK],
    softmax: &mut [(f32, f32)],
    rescale: &mut [f32; ROW_BLOCK],
) {
    for (row, (largest, sum)) in softmax.iter_mut().enumerate() {
        let (scores, (from, to)) = (&mut scores[row], lanes[row]);
        if from >= to {
            *scores = [0.0; KEY_TILE];
            continue;
        }
        scores[..from].fill(f32::NEG_INFINITY);
        scores[to..].fill(f32::NEG_INFINITY);
        let mut highest = [f32::NEG_INFINITY; LANES];
        for chunk in scores.as_chunks::<LANES>().0 {
            for (highest, &score) in highest.iter_mut().zip(chunk) {
                *highest = if score > *highest { score } else { *highest };
            }
        }
        let new = max_lanes(highest).max(*largest);
        rescale[row] = exp(*largest - new);
        let mut lanes = [0.0; LANES];
        for chunk in scores.as_chunks_mut::<LANES>().0 {
            for (lane, score) in lanes.iter_mut().zip(chunk) {
                *score = exp(*score - new);
                *lane += *score;
            }
        }
        *sum = sum.mul_add(rescale[row], sum_lanes(lanes));
        *largest = new;
    }
}

/// `sums = sums · rescale + weights · values` over the first `tokens` values,
/// per row; `values` and `sums` have rows of `padded`.
fn add_values(
    isa: Isa,
    weights: &[[f32; KEY_TILE]; ROW_BLOCK],
    rescale: &[f32; ROW_BLOCK],
    tokens: usize,
    values: &[f32],
    padded: usize,
    sums: &mut [f32],
) {
    match isa.kind() {
        // SAFETY: an `Isa` of this kind exists only after detection.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe {
            avx512::add_values(weights, rescale, tokens, values, padded, sums);
        },
        _ => add_values_compiled(isa, weights, rescale, tokens, values, padded, sums),
    }
}

dispatch! {
    fn add_values_compiled(
        weights: &[[f32; KEY_TILE]; ROW_BLOCK],
        rescale: &[f32; ROW_BLOCK],
        tokens: usize,
        values: &[f32],
        padded: usize,
        sums: &mut [f32],
    ) = add_values_scalar
}

#[inline(always)]
fn add_values_scalar(
    weights: &[[f32; KEY_TILE]; ROW_BLOCK],
    rescale: &[f32; ROW_BLOCK],
    tokens: usize,
    values: &[f32],
    padded: usize,
    sums: &mut [f32],
) {
    for ((sums, weights), rescale) in sums.chunks_exact_mut(padded).zip(weights).zip(rescale) {
        for sum in sums.iter_mut() {
            *sum *= rescale;
        }
        for (&weight, values) in weights[..tokens].iter().zip(values.chunks_exact(padded)) {
            for (sum, &value) in sums.iter_mut().zip(values) {
                *sum = value.mul_add(weight, *sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;
