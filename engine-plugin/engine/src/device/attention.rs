//! Which blocks of threads attend to what.
//!
//! Pure: from the positions of rows and the pages that they read to the units that kernels run.
//! Few rows are for `attend_rows`, whose units share the pages of a row, so that even one
//! sequence keeps a device busy; many are for `attend_tiles`.

use super::launch::narrow;
use crate::kv::{BLOCK_TOKENS, KvDtype};

/// Heads, window, and the device that is to be kept busy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) window: Option<usize>,
    pub(super) processors: usize,
}

/// Rows of one sequence that attend.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queries<'a> {
    pub(super) first_row: usize,
    pub(super) positions: &'a [usize],
    /// Where the page table of the sequence begins in that of the batch.
    pub(super) table: usize,
    /// By KV head, ascending pages that are read; `None` for all.
    pub(super) pages: Option<&'a [Vec<u32>]>,
}

/// What a layer's attention is launched with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Pages, of all lists side by side.
    pub(super) lists: Vec<u32>,
    pub(super) rows: Vec<Unit>,
    /// Of `rows`, by what `merge` puts together: the first, and how many.
    pub(super) merges: Vec<[u32; 2]>,
    pub(super) tiles: Vec<Unit>,
}

/// `Unit` in attention.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) row: u32,
    pub(super) tokens: u32,
    pub(super) head: u32,
    pub(super) heads: u32,
    pub(super) kv_head: u32,
    pub(super) table: u32,
    pub(super) list: u32,
    pub(super) first: u32,
    pub(super) end: u32,
}

impl Plan {
    pub(super) fn new(shape: Shape, queries: &[Queries<'_>]) -> Self {
        let mut plan = Self::default();
        let splits = splits(shape, queries);
        for queries in queries {
            for kv_head in 0..shape.kv_heads {
                plan.add(shape, queries, kv_head, splits);
            }
        }
        plan
    }

    fn add(&mut self, shape: Shape, queries: &Queries<'_>, kv_head: usize, splits: usize) {
        let list = queries.pages.map(|pages| &pages[kv_head][..]);
        let list_at = match list {
            Some(list) => {
                self.lists.extend(list);
                narrow(self.lists.len() - list.len())
            }
            None => NONE,
        };
        let group = shape.heads / shape.kv_heads;
        let unit = |rows: std::ops::Range<usize>, head: usize, heads: usize| {
            let (first, end) = slots(shape, list, &queries.positions[rows.clone()]);
            Unit {
                row: narrow(queries.first_row + rows.start),
                tokens: narrow(rows.len()),
                head: narrow(kv_head * group + head),
                heads: narrow(heads),
                kv_head: narrow(kv_head),
                table: narrow(queries.table),
                list: list_at,
                first: narrow(first),
                end: narrow(end),
            }
        };
        let count = queries.positions.len();
        if is_tiled(shape, queries) {
            for head in (0..group).step_by(TILE_ROWS) {
                let heads = TILE_ROWS.min(group - head);
                let tokens = TILE_ROWS / heads;
                for row in (0..count).step_by(tokens) {
                    let rows = row..count.min(row + tokens);
                    self.tiles.push(unit(rows, head, heads));
                }
            }
            return;
        }
        for row in 0..count {
            for head in (0..group).step_by(ROW_HEADS) {
                let whole = unit(row..row + 1, head, ROW_HEADS.min(group - head));
                let slots = (whole.end - whole.first) as usize;
                let each = narrow(slots.div_ceil(splits).max(LEAST_SLOTS));
                let first_unit = self.rows.len();
                let mut first = whole.first;
                loop {
                    let end = whole.end.min(first.saturating_add(each));
                    self.rows.push(Unit {
                        first,
                        end,
                        ..whole
                    });
                    first = end;
                    if first >= whole.end {
                        break;
                    }
                }
                let units = self.rows.len() - first_unit;
                self.merges.push([narrow(first_unit), narrow(units)]);
            }
        }
    }
}

impl Unit {
    pub(super) fn words(&self) -> [u32; 9] {
        [
            self.row,
            self.tokens,
            self.head,
            self.heads,
            self.kv_head,
            self.table,
            self.list,
            self.first,
            self.end,
        ]
    }
}

/// The kernel for rows, by pages' element type and the width of a head.
pub(super) fn row_kernel(dtype: KvDtype, head_dim: usize) -> &'static str {
    match (dtype, head_dim) {
        (KvDtype::F32, ..=64) => "attend_rows_f32_64",
        (KvDtype::F32, ..=128) => "attend_rows_f32_128",
        (KvDtype::F32, ..=256) => "attend_rows_f32_256",
        (KvDtype::F32, _) => "attend_rows_f32_512",
        (KvDtype::F16, ..=64) => "attend_rows_f16_64",
        (KvDtype::F16, ..=128) => "attend_rows_f16_128",
        (KvDtype::F16, ..=256) => "attend_rows_f16_256",
        (KvDtype::F16, _) => "attend_rows_f16_512",
        (KvDtype::Bf16, ..=64) => "attend_rows_bf16_64",
        (KvDtype::Bf16, ..=128) => "attend_rows_bf16_128",
        (KvDtype::Bf16, ..=256) => "attend_rows_bf16_256",
        (KvDtype::Bf16, _) => "attend_rows_bf16_512",
    }
}

/// The kernel for tiles.
pub(super) fn tile_kernel(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::F32 => "attend_tiles_f32",
        KvDtype::F16 => "attend_tiles_f16",
        KvDtype::Bf16 => "attend_tiles_bf16",
    }
}

/// Floats of shared memory of the kernel for rows: queries, and what each warp found.
pub(super) const fn row_shared(head_dim: usize) -> usize {
    ROW_HEADS * head_dim + ROW_WARPS * ROW_HEADS * (head_dim + 2)
}

/// Floats of a unit's partial result.
pub(super) const fn partial_floats(head_dim: usize) -> usize {
    ROW_HEADS * (head_dim + 2)
}

/// Floats of shared memory of the kernel for tiles: queries, keys or values, weights.
pub(super) const fn tile_shared(head_dim: usize) -> usize {
    let stride = head_dim.next_multiple_of(4) + 4;
    (TILE_ROWS + TILE_KEYS) * stride + TILE_ROWS * (TILE_KEYS + 1)
}

/// Sequences of few rows, and heads that tiles have no room for, go row by row.
fn is_tiled(shape: Shape, queries: &Queries<'_>) -> bool {
    queries.positions.len() >= TILED_ROWS && shape.head_dim <= TILE_DIM
}

/// Into how many units a row's pages are split at most, so that all processors have some.
fn splits(shape: Shape, queries: &[Queries<'_>]) -> usize {
    let by_row = queries.iter().filter(|queries| !is_tiled(shape, queries));
    let rows: usize = by_row.map(|queries| queries.positions.len()).sum();
    let group = shape.heads / shape.kv_heads;
    let units = rows * shape.kv_heads * group.div_ceil(ROW_HEADS);
    (shape.processors * UNITS_OF_PROCESSOR)
        .div_ceil(units.max(1))
        .max(1)
}

/// Which of a list the rows at ascending `positions` see.
fn slots(shape: Shape, list: Option<&[u32]>, positions: &[usize]) -> (usize, usize) {
    let (Some(first), Some(last)) = (positions.first(), positions.last()) else {
        return (0, 0);
    };
    let seen = shape
        .window
        .map_or(0, |window| (first + 1).saturating_sub(window));
    let pages = (seen / BLOCK_TOKENS, last / BLOCK_TOKENS + 1);
    match list {
        None => pages,
        Some(list) => {
            let before = |end: usize| list.partition_point(|&page| (page as usize) < end);
            (before(pages.0), before(pages.1))
        }
    }
}

// As in attention.cu.
const NONE: u32 = u32::MAX;
const ROW_HEADS: usize = 4;
const ROW_WARPS: usize = 4;
const TILE_ROWS: usize = 32;
const TILE_KEYS: usize = 32;
const TILE_DIM: usize = 128;

/// Rows of a sequence from which on tiles are worth filling.
const TILED_ROWS: usize = 8;
/// Pages of a unit, at least: one for each warp.
const LEAST_SLOTS: usize = ROW_WARPS;
/// Blocks that a processor runs at once, about.
const UNITS_OF_PROCESSOR: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        heads: 6,
        kv_heads: 1,
        head_dim: 64,
        window: None,
        processors: 3,
    };

    fn queries<'a>(positions: &'a [usize], pages: Option<&'a [Vec<u32>]>) -> Queries<'a> {
        Queries {
            first_row: 10,
            positions,
            table: 100,
            pages,
        }
    }

    /// Every page that a row sees is in one unit of each of its heads, and no other page.
    #[test]
    fn rows_are_split_without_gaps() {
        for (position, window, pages) in [
            (0, None, 0..1),
            (159, None, 0..10),
            (1000, None, 0..63),
            (1000, Some(20), 61..63),
            (1000, Some(5000), 0..63),
        ] {
            let shape = Shape { window, ..SHAPE };
            let plan = Plan::new(shape, &[queries(&[position], None)]);
            assert!(plan.tiles.is_empty());
            // Four heads, and two.
            let heads: Vec<(u32, u32)> = plan
                .merges
                .iter()
                .map(|&[first, count]| {
                    let units = &plan.rows[first as usize..][..count as usize];
                    let seen: Vec<u32> = units.iter().flat_map(|it| it.first..it.end).collect();
                    assert_eq!(seen, pages.clone().collect::<Vec<_>>(), "{position}");
                    (units[0].head, units[0].heads)
                })
                .collect();
            assert_eq!(heads, [(0, 4), (4, 2)]);
        }
        // 12 units for two rows of heads.
        let plan = Plan::new(SHAPE, &[queries(&[1000], None)]);
        assert_eq!(plan.rows.len(), 12);
        let units = Plan::new(SHAPE, &[queries(&[0, 1000], None)]).rows.len();
        assert_eq!(units, 2 * (1 + 3));
    }

    #[test]
    fn tiles_hold_whole_tokens() {
        let positions: Vec<usize> = (40..60).collect();
        let shape = Shape {
            window: Some(8),
            ..SHAPE
        };
        let plan = Plan::new(shape, &[queries(&positions, None)]);
        assert!(plan.rows.is_empty() && plan.merges.is_empty());
        let tiles: Vec<_> = plan
            .tiles
            .iter()
            .map(|it| (it.row, it.tokens, it.first, it.end))
            .collect();
        let expected = [(10, 5, 2, 3), (15, 5, 2, 4), (20, 5, 2, 4), (25, 5, 3, 4)];
        assert_eq!(tiles, expected);
        assert!(plan.tiles.iter().all(|it| it.heads == 6 && it.table == 100));
        // Heads too wide for tiles.
        let wide = Shape {
            head_dim: 256,
            ..SHAPE
        };
        assert!(
            Plan::new(wide, &[queries(&positions, None)])
                .tiles
                .is_empty()
        );
    }

    #[test]
    fn chosen_pages_are_places_in_a_list() {
        let shape = Shape {
            heads: 2,
            kv_heads: 2,
            window: Some(64),
            ..SHAPE
        };
        let pages = [vec![0, 3, 7, 9], vec![1, 9]];
        let plan = Plan::new(shape, &[queries(&[150], Some(&pages))]);
        assert_eq!(plan.lists, [0, 3, 7, 9, 1, 9]);
        let units: Vec<_> = plan
            .rows
            .iter()
            .map(|it| (it.kv_head, it.list, it.first, it.end))
            .collect();
        // Position 87 is the first that is seen: page 5.
        assert_eq!(units, [(0, 0, 2, 4), (1, 4, 1, 2)]);
    }
}
