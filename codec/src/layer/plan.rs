//! What a decoder elsewhere needs of a layer: everything but the symbols, read and checked.

use kvasir_types::{HeadRange, KvLayout, Plane, TokenRange};

use super::{DecodeError, LayerCodec, PlaneShape};
use crate::cell::{CELL_TOKENS, LADDER, Streams};
use crate::classes::{BASE, DISTANCES, THIRDS, ZERO};
use crate::rans::{HALF, LANES, TOTAL};
use crate::rotation::Rotation;

/// How to decode one layer. Its sizes are checked, and so are the checksums of its cells; what
/// a cell's words decode to is not.
///
/// A decoder takes the levels of a cell one after the other, each over all rows: 32 channels of
/// a token are a row, and rows run over the tokens before the next 32 channels. States pass
/// from a level to the next. A level must end where its words do, and the finest of
/// [three](LayerPlan::LEVELS) with all lanes at [`LayerPlan::LAST_STATE`].
#[derive(Clone, Debug)]
pub struct LayerPlan<'b> {
    /// Levels that are there.
    pub levels: usize,
    /// The first tokens, which are stored as they are.
    pub exact_tokens: u32,
    /// By plane, then heads.
    pub groups: Vec<GroupPlan<'b>>,
}

/// How to decode some heads of a plane.
#[derive(Clone, Debug)]
pub struct GroupPlan<'b> {
    /// Of which plane.
    pub plane: Plane,
    /// Which heads.
    pub heads: HeadRange,
    /// Channels of a head.
    pub dim: usize,
    /// Of the finest level that is there. A number stands for `number * step + offset`, with
    /// two roundings.
    pub step: f32,
    /// By channel, of one head after the other, then padding to a multiple of the lanes.
    pub offsets: Vec<f32>,
    /// By channel, as [`offsets`](Self::offsets): which of [the tables](DecodeTables) code it.
    pub classes: Vec<u8>,
    /// Exact tokens, in the layout's type: by head, token and channel.
    pub exact: &'b [u8],
    /// In the order of tokens.
    pub cells: Vec<CellPlan<'b>>,
}

/// How to decode up to [`CELL_TOKENS`] tokens of a group.
#[derive(Clone, Debug)]
pub struct CellPlan<'b> {
    /// Which tokens.
    pub tokens: TokenRange,
    /// By lane, before the first level.
    pub states: [u32; LANES],
    /// By level, 16 bits each, little-endian, not aligned: at most one a value.
    pub words: [&'b [u8]; LADDER],
    /// Positions, ascending, and what stands there instead: position `token * channels +
    /// channel`, with padding among the channels.
    pub outliers: Vec<(u16, f32)>,
}

/// Why a layer cannot be decoded elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The chunk was coded with a profile.
    #[error("a chunk with a profile is decoded on the CPU only; encode without one")]
    Profile,
    /// The bytes are no layer.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl LayerPlan<'_> {
    /// Levels of a layer that is complete.
    pub const LEVELS: usize = LADDER;
    /// The state of every lane after the last symbol of the finest level.
    pub const LAST_STATE: u32 = 1 << 16;
}

impl<'a> LayerCodec<'a> {
    /// Reads and checks what [`decode`](Self::decode) does before it looks at symbols.
    ///
    /// # Errors
    /// The codec has a [profile](Self::with_profile); or as for [`decode`](Self::decode), but
    /// for streams that do not end as they should.
    ///
    /// # Panics
    /// There is no part, or more than there are levels.
    pub fn plan<'b>(&self, parts: &[&'b [u8]]) -> Result<LayerPlan<'b>, PlanError> {
        assert!((1..=LADDER).contains(&parts.len()), "the parts of a layer");
        if self.profile.is_some() {
            return Err(PlanError::Profile);
        }
        let (quantisers, exact, parts) = self.read_heads(parts)?;
        let shapes = self.planes.iter().flat_map(|shape| {
            let numbered = (0..).zip(shape.groups());
            numbered.map(move |(number, heads)| (shape, number, heads))
        });
        let exacts = usize::from(exact > 0);
        let mut groups = Vec::with_capacity(quantisers.len());
        for (in_part, ((shape, number, heads), quantiser)) in shapes.zip(quantisers).enumerate() {
            let exact_bytes = if exact > 0 {
                self.exact_cell(&parts[0], in_part, (shape, number), exact)?
            } else {
                &[]
            };
            let mut cells = Vec::with_capacity(self.cells_of_group());
            for at in 0..self.cells_of_group() {
                let mut levels = [&[][..]; LADDER];
                for ((part, level), bytes) in parts.iter().zip(0..).zip(&mut levels) {
                    let before = if level == 0 {
                        exacts * (in_part + 1)
                    } else {
                        0
                    };
                    let entry = before + in_part * self.cells_of_group() + at;
                    let at = u32::try_from(at).expect("tokens fit 32 bits");
                    *bytes = part.cell(entry, shape.place(level, number, at))?;
                }
                cells.push(self.plan_cell(shape, at, &levels[..parts.len()])?);
            }
            groups.push(GroupPlan {
                plane: shape.plane,
                heads,
                dim: shape.dim,
                step: quantiser.step_at(parts.len() - 1),
                offsets: quantiser.offsets,
                classes: quantiser.classes,
                exact: exact_bytes,
                cells,
            });
        }
        Ok(LayerPlan {
            levels: parts.len(),
            exact_tokens: u32::try_from(exact).expect("tokens fit 32 bits"),
            groups,
        })
    }

    /// Of which chunks.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// How keys were turned.
    pub fn rotation(&self) -> Option<&'a Rotation> {
        self.rotation
    }

    fn plan_cell<'b>(
        &self,
        shape: &PlaneShape,
        at: usize,
        levels: &[&'b [u8]],
    ) -> Result<CellPlan<'b>, DecodeError> {
        let (all, cell) = (
            self.layout.tokens(),
            u32::try_from(CELL_TOKENS).expect("64"),
        );
        let start = u32::try_from(at).expect("tokens fit 32 bits") * cell;
        let tokens = TokenRange::new(start, all.min(start + cell)).expect("cells have tokens");
        let streams = Streams::of(levels, shape.width * tokens.len() as usize)?;
        Ok(CellPlan {
            tokens,
            states: streams.states,
            words: streams.words,
            outliers: streams.outliers,
        })
    }
}

/// The tables of the format, in the form that a device looks symbols up in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeTables {
    /// By class, 2^10 entries each: bits 0 to 7 the number from zero on, and 64; bits 8 to 18
    /// its frequency, less one; bits 19 to 31 the place of the slot in it.
    ///
    /// A slot is the lower eleven bits of a state. Bit 10 is the sign, the others find the
    /// entry; a zero that is negative has its place in the second half of its frequency.
    pub base: Vec<u32>,
    /// By refinement, class and the coarser number's distance from zero, 0 to 2 and more: the
    /// first slot of the symbol 1, and in the upper half that of the symbol 2.
    pub thirds: Vec<u32>,
}

impl DecodeTables {
    /// Classes that there are.
    pub const CLASSES: usize = ZERO as usize + 1;
    /// Distances from zero that there are.
    pub const DISTANCES: usize = DISTANCES;

    /// Those of this version.
    pub fn current() -> Self {
        let of_class = BASE.slots.chunks_exact(TOTAL.into());
        let base = of_class
            .take(Self::CLASSES)
            .flat_map(|slots| &slots[..HALF.into()]);
        let mut thirds = Vec::new();
        for tables in THIRDS.iter() {
            for class in 0..Self::CLASSES {
                for (middle, away) in tables.middle.iter().zip(&tables.away) {
                    thirds.push(u32::from(middle[class]) | u32::from(away[class]) << 16);
                }
            }
        }
        Self {
            base: base.copied().collect(),
            thirds,
        }
    }
}
