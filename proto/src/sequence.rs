//! What a get sends, in which order: the daemon reads by it, the client expects by it.

use kvasir_types::{ExtentIdx, KvLayout, LayerIdx, LayerRange, Level, Slice};

/// Which extents of chunks a receiver wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Layers. `None`: all.
    pub layers: Option<LayerRange>,
    /// The finest level wanted of each layer, from the first of `layers` on; the last one
    /// also of all that follow. Empty: as stored.
    pub levels: Vec<Level>,
    /// A nested level that the receiver has already.
    pub have: Option<Level>,
    /// Heads and tokens, of chunks that are stored raw; others come whole. `None`: all.
    pub slice: Option<Slice>,
}

/// One extent of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index into the chunks.
    pub chunk: usize,
    /// The extent.
    pub extent: ExtentIdx,
    /// The layer that it is a part of; `None` for a prelude.
    pub layer: Option<LayerIdx>,
    /// Whether the layer has no further part in this get.
    pub last: bool,
}

/// The extents of a get, layer-major: preludes first, then the parts of layer 0 of every
/// chunk, then of layer 1.
#[derive(Clone, Debug)]
pub struct Sequence {
    wanted: Wanted,
    /// By chunk.
    stored: Vec<Level>,
    layout: Option<KvLayout>,
    start: u16,
    end: u16,
    /// Chunks that are not lost: the first `live` ones.
    live: usize,
    next: Cursor,
}

/// The layer, or the preludes; the chunk; and the part.
type Cursor = (Option<u16>, usize, u8);

/// Something was asked for that the chunks do not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotThere {
    /// Layers.
    #[error("layers {asked} lie outside the {layers} layers of the chunks")]
    Layers {
        /// Asked for.
        asked: LayerRange,
        /// Layers that there are.
        layers: u16,
    },
    /// Heads or tokens.
    #[error("heads or tokens lie outside the {heads} heads and {tokens} tokens of the chunks")]
    Slice {
        /// Heads that there are.
        heads: u16,
        /// Tokens that there are.
        tokens: u32,
    },
}

impl NotThere {
    /// The field that asks for it.
    pub const fn field(&self) -> &'static str {
        match self {
            Self::Layers { .. } => "layers",
            Self::Slice { .. } => "heads, tokens",
        }
    }
}

impl Sequence {
    /// What is sent of chunks that are stored at these levels and have this layout; there
    /// is none where there are no chunks.
    ///
    /// # Errors
    /// The layout does not have the layers, heads or tokens that are wanted.
    pub fn new(
        wanted: Wanted,
        layout: Option<KvLayout>,
        stored: Vec<Level>,
    ) -> Result<Self, NotThere> {
        let layers = layout.map_or(0, |layout| layout.layers());
        let (start, end) = match wanted.layers {
            Some(asked) if layout.is_some() && asked.end() > layers => {
                return Err(NotThere::Layers { asked, layers });
            }
            Some(range) => (range.start(), range.end().min(layers)),
            None => (0, layers),
        };
        if let (Some(layout), Some(slice)) = (&layout, wanted.slice)
            && layout.sliced(slice).is_none()
        {
            return Err(NotThere::Slice {
                heads: layout.kv_heads(),
                tokens: layout.tokens(),
            });
        }
        let mut sequence = Self {
            wanted,
            live: if layout.is_some() { stored.len() } else { 0 },
            stored,
            layout,
            start,
            end,
            next: (None, 0, 0),
        };
        sequence.settle();
        Ok(sequence)
    }

    /// The extent that comes next; `None` at the end.
    pub fn peek(&self) -> Option<Place> {
        let (layer, chunk, part) = self.next;
        if self.live == 0 || layer.is_some_and(|layer| layer >= self.end) {
            return None;
        }
        let stored = *self.stored.get(chunk)?;
        let Some(layer) = layer else {
            return Some(Place {
                chunk,
                extent: stored.prelude()?,
                layer: None,
                last: true,
            });
        };
        let parts = self.parts(stored, layer);
        let layers = self.layout?.layers();
        Some(Place {
            chunk,
            extent: stored.part_extent(layers, layer, part)?,
            layer: Some(LayerIdx(layer)),
            last: part + 1 >= parts.end,
        })
    }

    /// Fewest and most bytes of an extent of this get.
    pub fn bounds(&self, place: &Place) -> [u64; 2] {
        let stored = self.stored.get(place.chunk).copied().unwrap_or(Level::RAW);
        let layout = self.layout.map(|layout| match self.slice(place.chunk) {
            Some(slice) => layout.sliced(slice).unwrap_or(layout),
            None => layout,
        });
        layout.map_or([0, 0], |layout| layout.extent_bounds(stored, place.extent))
    }

    /// What comes of the layers of a chunk; `None`, if all.
    pub fn slice(&self, chunk: usize) -> Option<Slice> {
        let raw = !self.stored.get(chunk)?.is_encoded();
        self.wanted.slice.filter(|_| raw)
    }

    /// Chunks, lost or not.
    pub fn chunks(&self) -> usize {
        self.stored.len()
    }

    /// Chunks that are not lost: so many of the first ones.
    pub fn live(&self) -> usize {
        self.live
    }

    /// A chunk and all that follow it are lost. Says whether that changed anything.
    pub fn lose(&mut self, chunk: usize) -> bool {
        let changed = chunk < self.live;
        if changed {
            self.live = chunk;
            self.settle();
        }
        changed
    }

    /// Goes back, or on, to what follows `place`.
    pub fn resume_after(&mut self, place: &Place) {
        let layer = place.layer.map(|layer| layer.0);
        self.next = match layer.and(self.part_of(place)) {
            Some(part) if !place.last => (layer, place.chunk, part + 1),
            _ => (layer, place.chunk + 1, 0),
        };
        self.settle();
    }

    fn part_of(&self, place: &Place) -> Option<u8> {
        let stored = *self.stored.get(place.chunk)?;
        let (layer, layers) = (place.layer?.0, self.layout?.layers());
        (0..stored.parts())
            .find(|&part| stored.part_extent(layers, layer, part) == Some(place.extent))
    }

    /// Parts that are sent of a layer of a chunk stored at a level.
    fn parts(&self, stored: Level, layer: u16) -> std::ops::Range<u8> {
        let index = usize::from(layer.saturating_sub(self.start));
        let levels = &self.wanted.levels;
        let finest = levels.get(index).or(levels.last()).copied();
        let end = finest
            .map_or(stored, |finest| stored.at_most(finest))
            .parts();
        self.had(stored).min(end)..end
    }

    /// Parts of each layer that the receiver has.
    fn had(&self, stored: Level) -> u8 {
        match self.wanted.have {
            Some(have) if have.is_nested() && stored.is_nested() => stored.at_most(have).parts(),
            _ => 0,
        }
    }

    /// Moves on to the next extent that is sent, if the cursor is not at one.
    fn settle(&mut self) {
        loop {
            let (layer, chunk, part) = self.next;
            if layer.is_some_and(|layer| layer >= self.end) || self.live == 0 {
                return;
            }
            let Some(&stored) = self.stored.get(chunk).filter(|_| chunk < self.live) else {
                let layer = layer.map_or(self.start, |layer| layer.saturating_add(1));
                self.next = (Some(layer), 0, 0);
                continue;
            };
            match layer {
                None if stored.is_encoded() && self.had(stored) == 0 => return,
                None => self.next = (None, chunk + 1, 0),
                Some(layer) => {
                    let parts = self.parts(stored, layer);
                    if part.max(parts.start) < parts.end {
                        self.next.2 = part.max(parts.start);
                        return;
                    }
                    self.next = (Some(layer), chunk + 1, 0);
                }
            }
        }
    }
}

impl Iterator for Sequence {
    type Item = Place;

    fn next(&mut self) -> Option<Place> {
        let place = self.peek()?;
        self.resume_after(&place);
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use kvasir_types::{DType, HeadRange, Planes, TokenRange};

    use super::*;

    fn layout() -> KvLayout {
        KvLayout::new(3, 1, Planes::symmetric(8), 16, DType::F16).unwrap()
    }

    fn places(wanted: Wanted, stored: &[Level]) -> Vec<(usize, u32)> {
        let sequence = Sequence::new(wanted, Some(layout()), stored.to_vec()).unwrap();
        sequence
            .map(|place| (place.chunk, place.extent.0))
            .collect()
    }

    #[test]
    fn raw_chunks_come_layer_by_layer() {
        let all = places(Wanted::default(), &[Level::RAW; 2]);
        assert_eq!(all, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]);
        let wanted = Wanted {
            layers: LayerRange::new(1, 2).ok(),
            levels: vec![Level::L0],
            have: Some(Level::L0),
            slice: None,
        };
        assert_eq!(places(wanted, &[Level::RAW; 2]), [(0, 1), (1, 1)]);
    }

    #[test]
    fn preludes_come_first_and_parts_together() {
        let stored = [Level::L1, Level::RAW, Level::LOSSLESS];
        let all = places(Wanted::default(), &stored);
        let layer = |layer: u32| [(0, 1 + layer), (0, 4 + layer), (1, layer), (2, 1 + layer)];
        let expected: Vec<_> = [(0, 0), (2, 0)]
            .into_iter()
            .chain((0..3).flat_map(layer))
            .collect();
        assert_eq!(all, expected);
    }

    #[test]
    fn levels_differ_by_layer() {
        let wanted = Wanted {
            levels: vec![Level::L2, Level::L0],
            ..Wanted::default()
        };
        let all = places(wanted, &[Level::L2]);
        assert_eq!(all, [(0, 0), (0, 1), (0, 4), (0, 7), (0, 2), (0, 3)]);
    }

    #[test]
    fn an_upgrade_is_the_difference() {
        let wanted = Wanted {
            have: Some(Level::L0),
            levels: vec![Level::L1, Level::L0, Level::L2],
            ..Wanted::default()
        };
        assert_eq!(
            places(wanted.clone(), &[Level::L2]),
            [(0, 4), (0, 6), (0, 9)]
        );
        // Nothing is finer than what is stored.
        assert_eq!(places(wanted, &[Level::L0]), []);
    }

    #[test]
    fn what_is_lost_is_left_out_and_what_was_read_ahead_comes_again() {
        let stored = vec![Level::L1; 3];
        let mut sequence = Sequence::new(Wanted::default(), Some(layout()), stored).unwrap();
        let all: Vec<Place> = sequence.clone().collect();
        for _ in 0..4 {
            sequence.next();
        }
        sequence.resume_after(&all[1]);
        assert_eq!(sequence.peek(), Some(all[2]));
        assert!(sequence.lose(1) && !sequence.lose(1));
        let rest: Vec<_> = sequence.clone().collect();
        let expected: Vec<_> = all[3..].iter().filter(|place| place.chunk == 0).collect();
        assert_eq!(rest.iter().collect::<Vec<_>>(), expected);
        assert!(sequence.lose(0));
        assert_eq!(sequence.next(), None);
    }

    #[test]
    fn a_slice_is_of_raw_chunks_and_of_heads_and_tokens_that_there_are() {
        let of = |heads, tokens| Wanted {
            slice: Some(Slice {
                heads: HeadRange::new(0, heads).ok(),
                tokens: TokenRange::new(0, tokens).ok(),
            }),
            ..Wanted::default()
        };
        let (heads, tokens) = (layout().kv_heads(), layout().tokens());
        let stored = vec![Level::RAW, Level::LOSSLESS];
        let sequence = Sequence::new(of(heads, tokens / 2), Some(layout()), stored.clone());
        let sequence = sequence.unwrap();
        assert!(sequence.slice(0).is_some() && sequence.slice(1).is_none());
        let half = layout().layer_bytes() as u64 / 2;
        let bounds: Vec<_> = sequence.clone().map(|it| sequence.bounds(&it)).collect();
        // A prelude, and a layer of each.
        assert_eq!(bounds[1..3], [[half, half], [0, 2 * half]]);
        for (heads, tokens) in [(heads + 1, tokens), (heads, tokens + 1)] {
            let refused = Sequence::new(of(heads, tokens), Some(layout()), stored.clone());
            assert_eq!(refused.unwrap_err().field(), "heads, tokens");
        }
    }

    #[test]
    fn layers_that_do_not_exist_are_refused() {
        let wanted = Wanted {
            layers: LayerRange::new(2, 4).ok(),
            ..Wanted::default()
        };
        assert!(Sequence::new(wanted.clone(), Some(layout()), vec![Level::RAW]).is_err());
        assert!(
            Sequence::new(wanted, None, Vec::new())
                .unwrap()
                .next()
                .is_none()
        );
    }
}
