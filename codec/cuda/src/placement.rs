//! Where values go in the memory of a device.

use kvasir_types::{HeadRange, KvLayout, Plane};

/// Where the values of one layer go in a buffer: pages of some tokens, in the order of a
/// table. Channels of a head and token lie side by side; all else has a stride.
///
/// A raw layer is one page. Places may not overlap: which value stays where they do is left
/// to chance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Tokens of a page.
    pub page_tokens: u32,
    /// By page of the chunk: its number in the buffer. The first token of a chunk is the
    /// first of a page.
    pub pages: Vec<u32>,
    /// Of the keys, or the only plane.
    pub keys: PlanePlacement,
    /// Of the values; not looked at where a layout has none.
    pub values: PlanePlacement,
}

/// Where one plane lies in pages. All are bytes, and multiples of a value's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanePlacement {
    /// From the start of the buffer to the first token and head of page 0.
    pub start: u64,
    /// From a page to the next.
    pub page_stride: u64,
    /// From a token of a page to the next.
    pub token_stride: u64,
    /// From a head to the next.
    pub head_stride: u64,
}

/// Why values cannot be put in places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// A page has no tokens.
    #[error("a page has at least one token")]
    PageTokens,
    /// The table has fewer pages than the chunk has.
    #[error("a chunk has {wanted} pages, and the table {given}")]
    Pages {
        /// Pages of the chunk.
        wanted: u32,
        /// Pages of the table.
        given: usize,
    },
    /// A start or a stride is not a multiple of a value's bytes.
    #[error("places are multiples of the {0} bytes of a value")]
    Alignment(usize),
    /// A place lies beyond the buffer.
    #[error("places end at byte {end}, and the buffer at {bytes}")]
    Bounds {
        /// Where the last place ends; the greatest number if that is greater still.
        end: u64,
        /// Bytes of the buffer.
        bytes: u64,
    },
}

impl Placement {
    /// The raw form of a layer, from `start` on.
    pub fn raw(layout: &KvLayout, start: u64) -> Self {
        let plane = |plane| {
            let first = HeadRange::new(0, 1).ok();
            let place = first.and_then(|first| layout.head_slice(plane, first));
            PlanePlacement {
                start: start + place.map_or(0, |place| place.start as u64),
                page_stride: 0,
                token_stride: layout.head_bytes(plane) as u64 / u64::from(layout.tokens()),
                head_stride: layout.head_bytes(plane) as u64,
            }
        };
        Self {
            page_tokens: layout.tokens(),
            pages: vec![0],
            keys: plane(Plane::Key),
            values: plane(Plane::Value),
        }
    }

    /// A pool `[2 (K, V), page, token, head, channel]` of so many pages, as vLLM has one for
    /// each layer with FlashAttention. Heads are as wide as the layout's keys.
    pub fn pool(layout: &KvLayout, page_tokens: u32, pool_pages: u32, pages: Vec<u32>) -> Self {
        let head_stride = layout.head_bytes(Plane::Key) as u64 / u64::from(layout.tokens());
        let token_stride = head_stride * u64::from(layout.kv_heads());
        let page_stride = token_stride * u64::from(page_tokens);
        let keys = PlanePlacement {
            start: 0,
            page_stride,
            token_stride,
            head_stride,
        };
        let start = page_stride * u64::from(pool_pages);
        Self {
            page_tokens,
            pages,
            keys,
            values: PlanePlacement { start, ..keys },
        }
    }

    pub(crate) fn plane(&self, plane: Plane) -> &PlanePlacement {
        match plane {
            Plane::Key => &self.keys,
            Plane::Value => &self.values,
        }
    }

    /// That every place lies in a buffer of so many bytes.
    ///
    /// # Errors
    /// One does not, or is not aligned, or the table is too short.
    pub fn check(&self, layout: &KvLayout, bytes: u64) -> Result<(), PlacementError> {
        if self.page_tokens == 0 {
            return Err(PlacementError::PageTokens);
        }
        let wanted = layout.tokens().div_ceil(self.page_tokens);
        let pages = self.pages.get(..wanted as usize);
        let pages = pages.ok_or(PlacementError::Pages {
            wanted,
            given: self.pages.len(),
        })?;
        let last_page = pages.iter().max().copied().unwrap_or(0);
        let size = layout.dtype().bytes() as u64;
        for plane in [Plane::Key, Plane::Value] {
            let row = layout.head_bytes(plane) as u64 / u64::from(layout.tokens());
            if row == 0 {
                continue;
            }
            let place = self.plane(plane);
            let PlanePlacement {
                start,
                page_stride,
                token_stride,
                head_stride,
            } = *place;
            let all = [start, page_stride, token_stride, head_stride];
            if !all.iter().all(|bytes| bytes.is_multiple_of(size)) {
                return Err(PlacementError::Alignment(layout.dtype().bytes()));
            }
            // Of the last page a chunk has tokens in, as if it were full: pages are.
            let last_token = self.page_tokens.min(layout.tokens()) - 1;
            let end = [
                (page_stride, last_page),
                (token_stride, last_token),
                (head_stride, u32::from(layout.kv_heads()) - 1),
            ]
            .into_iter()
            .try_fold(start, |end, (stride, count)| {
                end.checked_add(stride.checked_mul(count.into())?)
            })
            .and_then(|end| end.checked_add(row))
            .unwrap_or(u64::MAX);
            if end > bytes {
                return Err(PlacementError::Bounds { end, bytes });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use kvasir_types::{DType, Planes};

    use super::*;

    fn layout() -> KvLayout {
        KvLayout::new(1, 2, Planes::symmetric(8), 40, DType::F16).unwrap()
    }

    #[test]
    fn places_end_with_the_buffer() {
        let layout = layout();
        let raw = Placement::raw(&layout, 64);
        let end = 64 + layout.layer_bytes() as u64;
        assert_eq!(raw.check(&layout, end), Ok(()));
        let bytes = end - 1;
        let beyond = PlacementError::Bounds { end, bytes };
        assert_eq!(raw.check(&layout, bytes), Err(beyond));

        let pool = |pages| Placement::pool(&layout, 16, 7, pages);
        let end = 2 * 7 * 16 * 2 * 8 * 2;
        assert_eq!(pool(vec![6, 0, 3]).check(&layout, end), Ok(()));
        assert!(pool(vec![6, 0, 3]).check(&layout, end - 1).is_err());
        assert!(pool(vec![7, 0, 3]).check(&layout, end).is_err());
        let short = pool(vec![1, 2]).check(&layout, end);
        let (wanted, given) = (3, 2);
        assert_eq!(short, Err(PlacementError::Pages { wanted, given }));
    }

    #[test]
    fn places_that_no_buffer_has_are_refused() {
        let layout = layout();
        let mut placement = Placement::raw(&layout, 0);
        placement.values.head_stride = u64::MAX - 1;
        let (end, bytes) = (u64::MAX, 1 << 40);
        let beyond = PlacementError::Bounds { end, bytes };
        assert_eq!(placement.check(&layout, bytes), Err(beyond));
        placement.values.head_stride = 0;
        placement.values.token_stride = 1 << 60;
        assert_eq!(placement.check(&layout, bytes), Err(beyond));
        placement.values.token_stride = 31;
        let odd = placement.check(&layout, bytes);
        assert_eq!(odd, Err(PlacementError::Alignment(2)));
        placement.page_tokens = 0;
        let none = placement.check(&layout, bytes);
        assert_eq!(none, Err(PlacementError::PageTokens));
    }
}
