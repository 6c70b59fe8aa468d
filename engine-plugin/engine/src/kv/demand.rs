//! Which pages a layer needs in memory.

use super::BlockId;
use crate::paging::frames::{Heat, PieceId};
use crate::paging::pager::Shape;

/// What a sequence reads, or is about to write, in one layer. Pages are indices into `blocks`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demand<'a> {
    pub(crate) blocks: &'a [BlockId],
    pub(crate) pages: Demanded<'a>,
}

/// Which pages.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Demanded<'a> {
    /// All heads of some pages in a row.
    Range { first: usize, end: usize },
    /// By KV head, pages in any order.
    Listed(&'a [Vec<u32>]),
}

/// The pieces of some demands, and how hot they are. Pages behind a table are nobody's.
pub(super) fn demanded(
    shape: &Shape,
    layer: usize,
    demands: &[Demand<'_>],
) -> (Vec<PieceId>, Heat) {
    let mut pieces = Vec::new();
    let mut heat = Heat::Scanned;
    for Demand { blocks, pages } in demands {
        for kv_head in 0..shape.kv_heads {
            let piece = |&block: &BlockId| shape.piece(layer, kv_head, block);
            match *pages {
                Demanded::Range { first, end } => {
                    let range = first.min(blocks.len())..end.min(blocks.len());
                    pieces.extend(blocks[range].iter().map(piece));
                }
                Demanded::Listed(lists) => {
                    heat = Heat::Chosen;
                    let list = lists.get(kv_head).into_iter().flatten();
                    pieces.extend(
                        list.filter_map(|&page| blocks.get(page as usize))
                            .map(piece),
                    );
                }
            }
        }
    }
    (pieces, heat)
}
