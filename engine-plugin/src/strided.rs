//! Pages of engines that this project does not build: KV in one buffer a layer, with a step for
//! each axis.
//!
//! A row is one token of one head of one plane; its elements adjoin. Where all others are is
//! said by [`Strides`], which holds for tensors of any order of axes, such as
//! `[block, head, token, K and V]` or `[K and V, block, token, head, dim]`.

use std::sync::Arc;

use kvasir_types::{KvLayout, LayerIdx, Planes};

use crate::{BackendError, EngineBackend, Placement};

/// Memory that an engine owns, of one layer. Others may use other parts of it meanwhile.
pub trait Memory {
    /// Its bytes.
    fn len(&self) -> usize;

    /// Whether it has none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes out of it.
    ///
    /// # Errors
    /// When the range does not lie in it; `into` is unchanged then.
    fn read(&self, at: usize, into: &mut [u8]) -> Result<(), OutsideMemory>;

    /// Copies bytes into it.
    ///
    /// # Errors
    /// When the range does not lie in it; nothing is written then.
    fn write(&self, at: usize, from: &[u8]) -> Result<(), OutsideMemory>;
}

/// A range that does not lie in a layer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {at}.. do not lie in a layer's memory")]
pub struct OutsideMemory {
    /// Where the range begins.
    pub at: usize,
}

/// Where rows are in a layer's memory; all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// Where the first block begins.
    pub start: usize,
    /// From a block to the next.
    pub block: usize,
    /// From the keys of a token and head to its values, if those are apart.
    pub plane: usize,
    /// From a KV head to the next.
    pub head: usize,
    /// From a token to the next.
    pub token: usize,
}

/// Why strides cannot be those of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StridesError {
    /// The layout needs more layers, or fewer.
    #[error("the layout has {expected} layers, and there is memory for {found}")]
    Layers {
        /// Layers of the layout.
        expected: u16,
        /// Layers given.
        found: usize,
    },
    /// The last row of the last block ends behind the memory.
    #[error("{blocks} blocks take {needed} bytes of a layer, which has {found}")]
    TooSmall {
        /// Blocks of a layer.
        blocks: u32,
        /// Bytes up to the end of the last row.
        needed: u64,
        /// Bytes of the layer.
        found: usize,
    },
    /// Keys and values differ in width.
    #[error("keys and values of different widths cannot be in such memory")]
    Planes,
}

/// The layers of an engine's KV. Cheap to clone.
#[derive(Debug)]
pub struct Strided<M> {
    layout: KvLayout,
    strides: Strides,
    blocks: u32,
    layers: Arc<[M]>,
}

impl<M> Clone for Strided<M> {
    fn clone(&self) -> Self {
        Self {
            layers: Arc::clone(&self.layers),
            ..*self
        }
    }
}

impl<M: Memory> Strided<M> {
    /// `blocks` blocks in each of the layers, a block holding the tokens of a chunk of `layout`.
    ///
    /// # Errors
    /// When the layers cannot hold them.
    pub fn new(
        layout: KvLayout,
        strides: Strides,
        blocks: u32,
        layers: Vec<M>,
    ) -> Result<Self, StridesError> {
        if layers.len() != usize::from(layout.layers()) {
            return Err(StridesError::Layers {
                expected: layout.layers(),
                found: layers.len(),
            });
        }
        let (planes, dim) = match layout.planes() {
            Planes::KeyValue { key_dim, value_dim } if key_dim == value_dim => (2, key_dim),
            Planes::KeyValue { .. } => return Err(StridesError::Planes),
            Planes::Single { dim } => (1, dim),
        };
        let steps = [
            (strides.block, u64::from(blocks)),
            (strides.plane, planes),
            (strides.head, u64::from(layout.kv_heads())),
            (strides.token, u64::from(layout.tokens())),
        ];
        let mut needed = strides.start as u64;
        for (step, count) in steps {
            let last = (step as u64).saturating_mul(count.saturating_sub(1));
            needed = needed.saturating_add(last);
        }
        let row = u64::from(dim) * layout.dtype().bytes() as u64;
        needed = needed.saturating_add(row);
        for layer in &layers {
            if needed > layer.len() as u64 {
                return Err(StridesError::TooSmall {
                    blocks,
                    needed,
                    found: layer.len(),
                });
            }
        }
        Ok(Self {
            layout,
            strides,
            blocks,
            layers: layers.into(),
        })
    }

    /// Calls `each` for all rows of one layer of a block, in canonical order: where the row is
    /// in the layer's memory, and where in the payload. Rows that adjoin on both sides come as
    /// one.
    fn rows(
        &self,
        pages: &[u32],
        chunk: usize,
        layer: LayerIdx,
        payload: usize,
        mut each: impl FnMut(&M, usize, usize, usize) -> Result<(), OutsideMemory>,
    ) -> Result<(), BackendError> {
        let outside = BackendError::OutsidePages { chunk };
        let block = *pages.get(chunk).ok_or(outside)?;
        if block >= self.blocks {
            return Err(outside);
        }
        let memory = self.layers.get(usize::from(layer.0));
        let memory = memory.ok_or(BackendError::NoSuchLayer(layer))?;
        if payload != self.layout.layer_bytes() {
            return Err(BackendError::WrongLength {
                expected: self.layout.layer_bytes(),
                found: payload,
            });
        }
        let (heads, tokens) = (
            usize::from(self.layout.kv_heads()),
            self.layout.tokens() as usize,
        );
        let planes = match self.layout.planes() {
            Planes::KeyValue { .. } => 2,
            Planes::Single { .. } => 1,
        };
        let mut row = payload / (planes * heads * tokens);
        let mut rows = tokens;
        if self.strides.token == row {
            (row, rows) = (row * tokens, 1);
        }
        let block = self.strides.start + block as usize * self.strides.block;
        let mut at = 0;
        for plane in 0..planes {
            for head in 0..heads {
                let first = block + plane * self.strides.plane + head * self.strides.head;
                for token in 0..rows {
                    let from = first + token * self.strides.token;
                    each(memory, from, at, row).map_err(|_| outside)?;
                    at += row;
                }
            }
        }
        Ok(())
    }
}

impl<M: Memory> EngineBackend for Strided<M> {
    /// By chunk, the block that holds it.
    type Pages = [u32];

    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn write_layer(
        &mut self,
        pages: &[u32],
        chunk: usize,
        layer: LayerIdx,
        payload: &[u8],
    ) -> Result<(), BackendError> {
        self.rows(pages, chunk, layer, payload.len(), |memory, to, at, len| {
            memory.write(to, &payload[at..at + len])
        })
    }

    /// Such engines turn keys themselves, or not at all.
    fn write_moved(
        &mut self,
        pages: &[u32],
        at: Placement,
        layer: LayerIdx,
        payload: &[u8],
    ) -> Result<(), BackendError> {
        let tokens = self.layout.tokens() as usize;
        if !at.is_unmoved() || !at.first.is_multiple_of(tokens) || at.tokens != tokens {
            return Err(BackendError::NoRotation);
        }
        self.write_layer(pages, at.first / tokens, layer, payload)
    }

    fn read_layer(
        &self,
        pages: &[u32],
        chunk: usize,
        layer: LayerIdx,
        payload: &mut [u8],
    ) -> Result<(), BackendError> {
        self.rows(
            pages,
            chunk,
            layer,
            payload.len(),
            |memory, from, at, len| memory.read(from, &mut payload[at..at + len]),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use kvasir_types::DType;

    use super::*;

    #[derive(Debug)]
    struct Bytes(RefCell<Vec<u8>>);

    impl Memory for Bytes {
        fn len(&self) -> usize {
            self.0.borrow().len()
        }

        fn read(&self, at: usize, into: &mut [u8]) -> Result<(), OutsideMemory> {
            let bytes = self.0.borrow();
            let from = bytes.get(at..at + into.len()).ok_or(OutsideMemory { at })?;
            into.copy_from_slice(from);
            Ok(())
        }

        fn write(&self, at: usize, from: &[u8]) -> Result<(), OutsideMemory> {
            let mut bytes = self.0.borrow_mut();
            let to = bytes.get_mut(at..at + from.len());
            to.ok_or(OutsideMemory { at })?.copy_from_slice(from);
            Ok(())
        }
    }

    const BLOCKS: usize = 5;
    const HEADS: usize = 3;
    const TOKENS: usize = 4;
    const DIM: usize = 8;

    fn layout() -> KvLayout {
        KvLayout::new(2, 3, Planes::symmetric(8), 4, DType::Bf16).unwrap()
    }

    /// Orders of axes that engines have, outermost first; B block, P plane, H head, T token.
    const ORDERS: [&str; 5] = ["BHTP", "PBTH", "BPTH", "PBHT", "BTHP"];

    fn strides(order: &str, start: usize) -> Strides {
        let count = |axis| match axis {
            'B' => BLOCKS,
            'P' => 2,
            'H' => HEADS,
            _ => TOKENS,
        };
        let step = |axis: char| {
            let inner = order.chars().skip_while(|other| *other != axis).skip(1);
            inner.map(count).product::<usize>() * DIM * 2
        };
        Strides {
            start,
            block: step('B'),
            plane: step('P'),
            head: step('H'),
            token: step('T'),
        }
    }

    fn strided(order: &str, start: usize) -> Strided<Bytes> {
        let bytes = start + BLOCKS * 2 * HEADS * TOKENS * DIM * 2;
        let layers = (0..2)
            .map(|_| Bytes(RefCell::new(vec![0; bytes])))
            .collect();
        Strided::new(layout(), strides(order, start), 5, layers).unwrap()
    }

    /// Every row is where its strides say, whatever the order of axes, and nothing else changes.
    #[test]
    fn rows_are_where_their_strides_say() {
        for order in ORDERS {
            let mut pages = strided(order, 6);
            let payload: Vec<u8> = (0..pages.layout.layer_bytes())
                .map(|at| u8::try_from(at % 251).unwrap() + 1)
                .collect();
            pages
                .write_layer(&[4, 1], 1, LayerIdx(1), &payload)
                .unwrap();
            let at = strides(order, 6);
            let memory = pages.layers[1].0.borrow().clone();
            let mut expected = vec![0; memory.len()];
            for (row, bytes) in payload.chunks(DIM * 2).enumerate() {
                let (plane, head, token) =
                    (row / TOKENS / HEADS, row / TOKENS % HEADS, row % TOKENS);
                let to = at.start + at.block + plane * at.plane + head * at.head + token * at.token;
                expected[to..to + DIM * 2].copy_from_slice(bytes);
            }
            assert!(memory == expected, "{order}");
            assert!(pages.layers[0].0.borrow().iter().all(|byte| *byte == 0));
            let mut back = vec![0; payload.len()];
            pages.read_layer(&[1], 0, LayerIdx(1), &mut back).unwrap();
            assert!(back == payload, "{order}");
        }
    }

    /// A latent cache: one plane, of one head, and rows that do not adjoin.
    #[test]
    fn one_plane_is_enough() {
        let layout = KvLayout::new(2, 1, Planes::Single { dim: 6 }, 4, DType::Bf16).unwrap();
        let strides = Strides {
            start: 0,
            block: 4 * 2 * 12,
            plane: 0,
            head: 0,
            token: 2 * 12,
        };
        let layers = |bytes| {
            (0..2)
                .map(|_| Bytes(RefCell::new(vec![0; bytes])))
                .collect()
        };
        let whole = 3 * strides.block - 12;
        assert!(Strided::new(layout, strides, 3, layers(whole - 1)).is_err());
        let mut pages = Strided::new(layout, strides, 3, layers(whole)).unwrap();
        let payload: Vec<u8> = (1..=48).collect();
        pages.write_layer(&[2], 0, LayerIdx(1), &payload).unwrap();
        let memory = pages.layers[1].0.borrow().clone();
        for (token, row) in payload.chunks(12).enumerate() {
            let at = 2 * strides.block + token * strides.token;
            assert_eq!(memory[at..at + 12], *row);
        }
        assert_eq!(memory.iter().filter(|byte| **byte != 0).count(), 48);
        let mut back = vec![0; 48];
        pages.read_layer(&[2], 0, LayerIdx(1), &mut back).unwrap();
        assert_eq!(back, payload);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut pages = strided("BHTP", 0);
        let mut payload = vec![0; pages.layout.layer_bytes()];
        let write = pages.write_layer(&[5], 0, LayerIdx(0), &payload);
        assert_eq!(write, Err(BackendError::OutsidePages { chunk: 0 }));
        let write = pages.write_layer(&[0], 1, LayerIdx(0), &payload);
        assert_eq!(write, Err(BackendError::OutsidePages { chunk: 1 }));
        let read = pages.read_layer(&[0], 0, LayerIdx(2), &mut payload);
        assert_eq!(read, Err(BackendError::NoSuchLayer(LayerIdx(2))));
        let read = pages.read_layer(&[0], 0, LayerIdx(0), &mut payload[1..]);
        assert!(matches!(read, Err(BackendError::WrongLength { .. })));

        let small = |bytes| {
            (0..2)
                .map(|_| Bytes(RefCell::new(vec![0; bytes])))
                .collect()
        };
        let whole = BLOCKS * 2 * HEADS * TOKENS * DIM * 2;
        let new = |bytes| Strided::new(layout(), strides("PBTH", 0), 5, small(bytes)).map(|_| ());
        assert_eq!(new(whole), Ok(()));
        let refused = StridesError::TooSmall {
            blocks: 5,
            needed: whole as u64,
            found: whole - 1,
        };
        assert_eq!(new(whole - 1), Err(refused));
        // Memory behind the blocks is not theirs.
        let mut fewer = Strided::new(layout(), strides("BHTP", 0), 4, small(whole)).unwrap();
        let write = fewer.write_layer(&[4], 0, LayerIdx(0), &payload);
        assert_eq!(write, Err(BackendError::OutsidePages { chunk: 0 }));
        let one = vec![Bytes(RefCell::new(Vec::new()))];
        let refused = Strided::new(layout(), strides("PBTH", 0), 5, one).map(|_| ());
        assert!(matches!(refused, Err(StridesError::Layers { .. })));
    }
}
