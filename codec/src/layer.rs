//! The lossy coding of one layer of a chunk.
//!
//! ```text
//! layer  := base ‖ refinement ‖ refinement          one part a level
//! parameters of the base := exact tokens (LEB128) ‖ plane × { step (f32) ‖ group × channels }
//! channels with a profile := 0 (u8)  |  1 (u8) ‖ channels
//! cells of the base      := group × { exact tokens, as they are ‖ cell … }
//! cells of a refinement  := cell …
//! ```
//!
//! What else is in a part, and how it is checked: [`crate::part`]. Cells are in the order of
//! planes, groups, and each [`CELL_TOKENS`] tokens.
//!
//! A *group* is a number of heads that share cells, so that a cell has enough values for
//! its fixed costs; see [`heads_of_a_group`]. Cells of other groups, and of other tokens,
//! are not needed to decode one. Channels of a group are padded with zeros to a multiple
//! of the lanes, which costs nothing.
//!
//! *Exact* tokens, the first ones of a chunk, are stored as they are besides, and do not
//! count for the quantiser: attention sinks are unlike all others, and errors in them are
//! felt everywhere. No cell is stored of exact tokens where there are none.
//!
//! With a profile, coefficients take the places of channels, and a group whose coefficients
//! are as the profile says has nothing said of them: its channels are a 0.
//!
//! All integers are little-endian.

mod encode;
mod plan;

use kvasir_types::{DType, HeadRange, KvLayout, Plane, TokenRange};

use crate::cell::{CELL_TOKENS, CellError, Decoder, LADDER, MAX_WIDTH, most_bytes};
use crate::channels::{ChannelsError, Quantiser};
use crate::output::Output;
use crate::part::{EXACT, HeadReader, Part, Place};
use crate::profile::{LayerProfile, ProfileBasis, ProfileShape};
use crate::rans::{AT_ONCE, LANES, STATE_BYTES};
use crate::rotation::Rotation;

pub use plan::{CellPlan, DecodeTables, GroupPlan, LayerPlan, PlanError};

/// Codes the layers of chunks of one layout, whose keys were turned in one way.
#[derive(Debug)]
pub struct LayerCodec<'a> {
    layout: KvLayout,
    rotation: Option<&'a Rotation>,
    exact_tokens: u32,
    profile: Option<LayerProfile<'a>>,
    planes: Vec<PlaneShape>,
}

/// One plane, in the terms of cells.
#[derive(Clone, Copy, Debug)]
struct PlaneShape {
    plane: Plane,
    number: u8,
    heads: u16,
    dim: usize,
    heads_per_group: u16,
    /// Channels of a group, padding included.
    width: usize,
}

/// A layer in parts: the base, and what each further level needs besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncodedLayer {
    /// From the coarsest level on.
    pub parts: [Vec<u8>; LADDER],
}

/// Why chunks of a layout cannot be coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnsupportedLayout {
    /// Eight bits a value are quantised already.
    #[error("values of type {0} are quantised already; store them raw or lossless")]
    DType(DType),
    /// A head is too wide for a cell.
    #[error("a head of {0} channels is wider than {MAX_WIDTH}")]
    Width(usize),
    /// The profile is of another layout, or of keys that were turned in another way.
    #[error("the profile is not one of such chunks")]
    Profile,
    /// The rotation is of more channels than a key has, or of other tokens.
    #[error("the rotation does not fit keys of {dim} channels and {tokens} tokens")]
    Rotation {
        /// Channels of a key.
        dim: usize,
        /// Tokens of a chunk.
        tokens: u32,
    },
}

/// Why the bytes of a layer cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// A part ends too early, or goes on after its end, or states a length that no cell has.
    #[error("part {0} of a layer is not as long as it states")]
    Length(u8),
    /// What comes before the cells of a part fails its checksum.
    #[error("the head of part {0} of a layer is damaged")]
    Head(u8),
    /// A cell fails its checksum, or is another's.
    #[error("a cell in part {0} of a layer is damaged")]
    Checksum(u8),
    /// A step is zero, negative or no number.
    #[error("a step of {0} is no step")]
    Step(f32),
    /// What is said of the channels is not of this version.
    #[error(transparent)]
    Channels(#[from] ChannelsError),
    /// A cell passes its checksum and is none all the same.
    #[error(transparent)]
    Cell(#[from] CellError),
    /// A slice does not begin and end with groups of heads and with cells.
    #[error("a slice is of whole groups of {heads} heads and whole cells of {tokens} tokens")]
    Slice {
        /// Heads that a slice has a multiple of.
        heads: u16,
        /// Tokens that a slice has a multiple of, up to the end of the chunk.
        tokens: u32,
    },
}

impl<'a> LayerCodec<'a> {
    /// For chunks of `layout`, whose keys `rotation` turned, if any.
    ///
    /// # Errors
    /// Layouts and rotations that are not supported.
    pub fn new(
        layout: KvLayout,
        rotation: Option<&'a Rotation>,
    ) -> Result<Self, UnsupportedLayout> {
        if !matches!(layout.dtype(), DType::F32 | DType::F16 | DType::Bf16) {
            return Err(UnsupportedLayout::DType(layout.dtype()));
        }
        let mut planes = Vec::new();
        for (number, plane) in [(0, Plane::Key), (1, Plane::Value)] {
            let row = layout.tokens() as usize * layout.dtype().bytes();
            let dim = layout.head_bytes(plane) / row;
            if dim == 0 {
                continue;
            }
            if dim > MAX_WIDTH {
                return Err(UnsupportedLayout::Width(dim));
            }
            let heads_per_group = heads_of_a_group(layout.kv_heads(), dim);
            planes.push(PlaneShape {
                plane,
                number,
                heads: layout.kv_heads(),
                dim,
                heads_per_group,
                width: (usize::from(heads_per_group) * dim).next_multiple_of(LANES),
            });
        }
        let dim = planes.first().map_or(0, |plane| plane.dim);
        let tokens = layout.tokens();
        if let Some(rotation) = rotation
            && (rotation.channels() > dim || rotation.tokens() != tokens as usize)
        {
            return Err(UnsupportedLayout::Rotation { dim, tokens });
        }
        Ok(Self {
            layout,
            rotation,
            exact_tokens: 0,
            profile: None,
            planes,
        })
    }

    /// With what is known of the layer. Steps stay those of coefficients, in which errors are
    /// as large as in channels unless the profile weighs them.
    ///
    /// A value that is not finite makes all of its token and group so.
    ///
    /// # Errors
    /// [`UnsupportedLayout::Profile`]
    pub fn with_profile(mut self, profile: LayerProfile<'a>) -> Result<Self, UnsupportedLayout> {
        let pairing = self.rotation.map(Rotation::pairing);
        if *profile.shape() != ProfileShape::of(&self.layout, pairing) {
            return Err(UnsupportedLayout::Profile);
        }
        self.profile = Some(profile);
        Ok(self)
    }

    /// Keeps the first tokens of every chunk as they are, bit for bit. Default: 0.
    ///
    /// Of keys that are turned, what is not finite makes its partner in a pair no number; of
    /// exact tokens every bit survives.
    ///
    /// Only encoding needs to know: decoding reads it from the base. They take as much as raw
    /// tokens, besides a little in their cell.
    #[must_use]
    pub fn with_exact_tokens(mut self, tokens: u32) -> Self {
        self.exact_tokens = tokens.min(self.layout.tokens());
        self
    }

    /// Bytes of a layer at level 0 that are not symbols: steps, offsets, classes, lengths,
    /// checksums and states; not those of what is exceptional, outliers, exact tokens and wide
    /// offsets.
    pub fn side_bytes(&self) -> usize {
        let of_plane = |shape: &PlaneShape| {
            let group = 2 * shape.width + self.cells_of_group() * CELL_BYTES;
            4 + shape.groups().count() * group
        };
        HEAD_BYTES + self.planes.iter().map(of_plane).sum::<usize>()
    }

    /// What a [slice](Self::decode_slice) has a multiple of: heads, and tokens.
    pub fn slice_unit(&self) -> (u16, u32) {
        let mut heads = 1;
        for shape in &self.planes {
            let both = (1..=shape.heads)
                .find(|all| all.is_multiple_of(heads) && all.is_multiple_of(shape.heads_per_group));
            heads = both.unwrap_or(shape.heads);
        }
        let tokens = u32::try_from(CELL_TOKENS).expect("64");
        (heads, tokens)
    }

    /// Decodes a layer into its raw form, as exactly as the parts allow that are there:
    /// the base, and any number of refinements in order.
    ///
    /// # Errors
    /// Every truncation, every burst of up to 32 bits of damage, and all but 2^-32 of
    /// anything else.
    ///
    /// # Panics
    /// There is no part, or more than there are levels; or `raw` has not the bytes that
    /// the layout says.
    pub fn decode(&self, parts: &[&[u8]], raw: &mut [u8]) -> Result<(), DecodeError> {
        let whole = "a layout has heads and tokens";
        let heads = HeadRange::new(0, self.layout.kv_heads()).expect(whole);
        let tokens = TokenRange::new(0, self.layout.tokens()).expect(whole);
        self.decode_slice(parts, heads, tokens, raw)
    }

    /// Decodes some heads and tokens of a layer, in the order of a raw layer that has no
    /// others. The cells of others are not looked at: damage in them is not noticed.
    ///
    /// # Errors
    /// The [heads and tokens](Self::slice_unit) are not those of whole cells; or as for
    /// [`decode`](Self::decode).
    ///
    /// # Panics
    /// There is no part, or more than there are levels; or `raw` has not the bytes of the
    /// heads and tokens.
    pub fn decode_slice(
        &self,
        parts: &[&[u8]],
        heads: HeadRange,
        tokens: TokenRange,
        raw: &mut [u8],
    ) -> Result<(), DecodeError> {
        assert!((1..=LADDER).contains(&parts.len()), "the parts of a layer");
        self.check_slice(heads, tokens)?;
        let (quantisers, exact, parts) = self.read_heads(parts)?;
        let mut decoder = Decoder::new();
        let (first_token, slice_tokens) = (tokens.start() as usize, tokens.len() as usize);
        let last_token = first_token + slice_tokens;
        let mut raw = raw;
        let mut before = 0;
        let of_groups = self.cells_of_group();
        let mut quantisers = quantisers.iter();
        for (in_layer, shape) in self.planes.iter().enumerate() {
            for (number, (group, quantiser)) in (0..).zip(shape.groups().zip(quantisers.by_ref())) {
                let in_part = before;
                before += 1;
                if group.start() < heads.start() || group.end() > heads.end() {
                    continue;
                }
                let (out, rest) = std::mem::take(&mut raw)
                    .split_at_mut(shape.group_bytes(self.layout, slice_tokens));
                raw = rest;
                let rotation = self.rotation.filter(|_| shape.plane == Plane::Key);
                let mut output = Output::new(
                    out,
                    self.layout.dtype(),
                    shape.dim,
                    first_token,
                    slice_tokens,
                    rotation,
                );
                if let Some(basis) = self.basis(in_layer, number) {
                    output = output.with_basis(basis, quantiser);
                }
                let mut cell = first_token / CELL_TOKENS;
                while cell * CELL_TOKENS < last_token {
                    let (cells, tokens) = self.at_once(cell);
                    let wanted = (last_token - cell * CELL_TOKENS).div_ceil(tokens);
                    let cells = cells.min(wanted);
                    let mut levels = [[&[][..]; AT_ONCE]; LADDER];
                    for ((part, level), bytes) in parts.iter().zip(0..).zip(&mut levels) {
                        let exacts = if level == 0 && exact > 0 {
                            in_part + 1
                        } else {
                            0
                        };
                        for (at, bytes) in (cell..cell + cells).zip(bytes.iter_mut()) {
                            let entry = exacts + in_part * of_groups + at;
                            let at = u32::try_from(at).expect("tokens fit 32 bits");
                            *bytes = part.cell(entry, shape.place(level, number, at))?;
                        }
                    }
                    let levels = &levels[..parts.len()];
                    let at_a_time = output.blocks_at_a_time(shape.width / LANES);
                    let first = cell * CELL_TOKENS - first_token;
                    let step = quantiser.step_at(levels.len() - 1);
                    decoder.decode(quantiser, levels, cells, tokens, at_a_time, |numbers| {
                        output.put(numbers, quantiser, step, first);
                    })?;
                    cell += cells;
                }
                if exact > first_token {
                    let bytes = self.exact_cell(&parts[0], in_part, (shape, number), exact)?;
                    output.put_exact(bytes, exact);
                }
            }
        }
        assert!(raw.is_empty(), "the bytes of the heads and tokens");
        Ok(())
    }

    /// What comes before the cells: quantisers by plane and group, and how many tokens are
    /// exact.
    fn read_heads<'b>(
        &self,
        parts: &[&'b [u8]],
    ) -> Result<(Vec<Quantiser>, usize, Vec<Part<'b>>), DecodeError> {
        let tokens = self.layout.tokens() as usize;
        let mut heads = (0..)
            .zip(parts)
            .map(|(number, part)| HeadReader::new(number, part));
        let mut base = heads.next().ok_or(DecodeError::Length(0))?;
        let exact = base.take_length(tokens)?;
        let mut quantisers = Vec::new();
        for (in_layer, shape) in self.planes.iter().enumerate() {
            let step = f32::from_le_bytes(base.take()?);
            if !is_step(step) {
                return Err(DecodeError::Step(step));
            }
            for (group, _) in (0..).zip(shape.groups()) {
                if let Some(basis) = self.basis(in_layer, group) {
                    match base.take()? {
                        [OF_PROFILE] => {
                            quantisers.push(basis.quantiser(step));
                            continue;
                        }
                        [OF_CHUNK] => (),
                        _ => return Err(ChannelsError.into()),
                    }
                }
                quantisers.push(base.read(|bytes| Quantiser::read(step, shape.width, bytes))?);
            }
        }
        let most = |level: usize| -> Vec<usize> {
            let of_group = |shape: &PlaneShape| {
                let exact =
                    (level == 0 && exact > 0).then(|| shape.group_bytes(self.layout, exact));
                let width = shape.width;
                let cells = (0..tokens)
                    .step_by(CELL_TOKENS)
                    .map(move |at| most_bytes(level, width * CELL_TOKENS.min(tokens - at)));
                exact.into_iter().chain(cells).collect::<Vec<_>>()
            };
            let groups = self
                .planes
                .iter()
                .flat_map(|shape| shape.groups().map(move |_| shape));
            groups.flat_map(of_group).collect()
        };
        let mut parts = vec![base.cells(most(0).into_iter())?];
        for (level, head) in (1..).zip(heads) {
            parts.push(head.cells(most(level).into_iter())?);
        }
        Ok((quantisers, exact, parts))
    }

    /// The exact tokens of a group, of which there are some; which group it is in the part, and
    /// in its plane.
    fn exact_cell<'b>(
        &self,
        base: &Part<'b>,
        in_part: usize,
        (shape, number): (&PlaneShape, u16),
        exact: usize,
    ) -> Result<&'b [u8], DecodeError> {
        let entry = in_part * (self.cells_of_group() + 1);
        let bytes = base.cell(entry, shape.place(EXACT, number, 0))?;
        let whole = bytes.len() == shape.group_bytes(self.layout, exact);
        whole.then_some(bytes).ok_or(DecodeError::Length(0))
    }

    fn check_slice(&self, heads: HeadRange, tokens: TokenRange) -> Result<(), DecodeError> {
        let (unit_heads, unit_tokens) = self.slice_unit();
        let all = self.layout.tokens();
        let whole = heads.start().is_multiple_of(unit_heads)
            && heads.end().is_multiple_of(unit_heads)
            && heads.end() <= self.layout.kv_heads()
            && tokens.start().is_multiple_of(unit_tokens)
            && (tokens.end().is_multiple_of(unit_tokens) || tokens.end() == all)
            && tokens.end() <= all;
        whole.then_some(()).ok_or(DecodeError::Slice {
            heads: unit_heads,
            tokens: unit_tokens,
        })
    }

    /// Of a plane in the order of those that are there, and a group.
    fn basis(&self, plane: usize, group: u16) -> Option<&'a ProfileBasis> {
        self.profile?.basis(plane, group.into())
    }

    fn cells_of_group(&self) -> usize {
        (self.layout.tokens() as usize).div_ceil(CELL_TOKENS)
    }

    /// How many cells from one on are coded at once, and how many tokens each has: a last
    /// cell of fewer tokens by itself.
    fn at_once(&self, cell: usize) -> (usize, usize) {
        let tokens = self.layout.tokens() as usize;
        match tokens / CELL_TOKENS - cell {
            0 => (1, tokens % CELL_TOKENS),
            whole => (whole.min(AT_ONCE), CELL_TOKENS),
        }
    }
}

impl PlaneShape {
    fn groups(&self) -> impl Iterator<Item = HeadRange> + use<> {
        let (heads, step) = (self.heads, self.heads_per_group);
        (0..heads)
            .step_by(usize::from(step))
            .filter_map(move |start| HeadRange::new(start, start + step).ok())
    }

    fn place(&self, level: u8, group: u16, cell: u32) -> Place {
        Place {
            plane: self.number,
            level,
            group,
            cell,
        }
    }

    /// Bytes of so many tokens of a group.
    fn group_bytes(&self, layout: KvLayout, tokens: usize) -> usize {
        usize::from(self.heads_per_group) * self.dim * tokens * layout.dtype().bytes()
    }
}

/// How many heads share cells: few enough for ranks of tensor parallelism to take theirs,
/// and enough for a cell to have 256 channels where the layer has as many.
pub(crate) fn heads_of_a_group(heads: u16, dim: usize) -> u16 {
    let fits = |&group: &u16| heads.is_multiple_of(group) && usize::from(group) * dim <= MAX_WIDTH;
    let enough = |&group: &u16| usize::from(group) * dim >= ENOUGH_CHANNELS;
    let mut groups = (1..=heads).filter(fits);
    let most = (1..=heads).rev().find(fits).unwrap_or(1);
    groups.find(enough).unwrap_or(most)
}

fn is_step(step: f32) -> bool {
    step.is_normal() && step > 0.0
}

/// Channels are as the profile says.
const OF_PROFILE: u8 = 0;
/// They are not, and follow.
const OF_CHUNK: u8 = 1;
const ENOUGH_CHANNELS: usize = 256;
/// Of a cell at level 0: length, checksum, the number of outliers, and the states.
const CELL_BYTES: usize = 2 + 4 + 2 + STATE_BYTES;
/// How many tokens are exact, and the checksum of the head.
const HEAD_BYTES: usize = 1 + 4;

#[cfg(test)]
mod tests;
