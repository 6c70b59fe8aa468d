//! The lossy coding of one layer of a chunk.
//!
//! ```text
//! layer  := base ‖ refinement ‖ refinement          one part a level
//! base   := plane × { step (f32) ‖ group × channels } ‖ cells
//! refinement := cells
//! cells  := cell × length (u32) ‖ cell × bytes      by plane, group, 64 tokens
//! ```
//!
//! A *group* is a number of heads that share cells, so that a cell has enough values for
//! its fixed costs; see [`heads_of_a_group`]. Cells of other groups, and of other tokens,
//! are not needed to decode one. Channels of a group are padded with zeros to a multiple
//! of the lanes, which costs nothing.
//!
//! All integers are little-endian.

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use kvasir_types::{DType, HeadRange, KvLayout, Plane};

use crate::cell::{CELL_TOKENS, CellError, LADDER, MAX_WIDTH, Quantiser, moments};
use crate::rans::{LANES, STATE_BYTES};
use crate::rotation::Rotation;

/// Codes the layers of chunks of one layout, whose keys were turned in one way.
#[derive(Debug)]
pub struct LayerCodec<'a> {
    layout: KvLayout,
    rotation: Option<&'a Rotation>,
    planes: Vec<PlaneShape>,
}

/// One plane, in the terms of cells.
#[derive(Clone, Copy, Debug)]
struct PlaneShape {
    plane: Plane,
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
    /// A part ends too early, or goes on after its end.
    #[error("part {part} of a layer has {actual} bytes, {expected} are stated")]
    Length {
        /// The part.
        part: usize,
        /// Bytes that it states.
        expected: u64,
        /// Bytes that are there.
        actual: usize,
    },
    /// A step is zero, negative or no number.
    #[error("a step of {0} is no step")]
    Step(f32),
    /// A cell is damaged.
    #[error(transparent)]
    Cell(#[from] CellError),
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
        for plane in [Plane::Key, Plane::Value] {
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
            planes,
        })
    }

    /// How far the values of a raw layer's keys, and values, lie from the means of their
    /// channels: the root of the mean square, which steps are a multiple of.
    ///
    /// # Panics
    /// The layer has not the bytes that the layout says.
    pub fn deviations(&self, raw: &[u8]) -> [f32; 2] {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        let mut deviations = [0.0; 2];
        for (shape, deviation) in self.planes.iter().zip(&mut deviations) {
            let variances = shape.groups().map(|group| {
                let rows = self.gather(raw, shape, group);
                moments(&rows, shape.width)
                    .iter()
                    .map(|channel| channel.variance())
                    .sum::<f32>()
            });
            let channels =
                f32::from(shape.heads) * f32::from(u16::try_from(shape.dim).unwrap_or(u16::MAX));
            *deviation = (variances.sum::<f32>() / channels).sqrt();
        }
        deviations
    }

    /// Bytes of a layer at level 0 that are not symbols: steps, offsets, classes, lengths
    /// and states; not those of what is exceptional, outliers and wide offsets.
    pub fn side_bytes(&self) -> usize {
        let cells = (self.layout.tokens() as usize).div_ceil(CELL_TOKENS);
        let of_plane = |shape: &PlaneShape| {
            let group = 2 * shape.width + cells * (4 + CELL_BYTES);
            4 + shape.groups().count() * group
        };
        self.planes.iter().map(of_plane).sum()
    }

    /// Codes a raw layer, with a step for level 0 of its keys and one of its values. Each
    /// level divides them by three.
    ///
    /// # Panics
    /// The layer has not the bytes that the layout says, or a step is no positive number.
    pub fn encode(&self, raw: &[u8], steps: [f32; 2]) -> EncodedLayer {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        assert!(
            steps.iter().all(|&step| is_step(step)),
            "steps are positive"
        );
        let mut parameters = Vec::new();
        let mut lengths: [Vec<u8>; LADDER] = Default::default();
        let mut cells: [Vec<u8>; LADDER] = Default::default();
        for (shape, step) in self.planes.iter().zip(steps) {
            parameters.extend_from_slice(&step.to_le_bytes());
            for group in shape.groups() {
                let rows = self.gather(raw, shape, group);
                let quantiser = Quantiser::of(&rows, shape.width, step);
                quantiser.write(&mut parameters);
                let mut encoder = quantiser.encoder();
                for rows in rows.chunks(shape.width * CELL_TOKENS) {
                    let before = cells.each_ref().map(Vec::len);
                    encoder.encode(rows, cells.each_mut());
                    for ((lengths, cells), before) in lengths.iter_mut().zip(&cells).zip(before) {
                        let len = u32::try_from(cells.len() - before)
                            .expect("a cell is smaller than its values");
                        lengths.extend_from_slice(&len.to_le_bytes());
                    }
                }
            }
        }
        let [base, middle, finest] = cells;
        let [base_lengths, middle_lengths, finest_lengths] = lengths;
        EncodedLayer {
            parts: [
                [parameters, base_lengths, base].concat(),
                [middle_lengths, middle].concat(),
                [finest_lengths, finest].concat(),
            ],
        }
    }

    /// Decodes a layer into its raw form, as exactly as the parts allow that are there:
    /// the base, and any number of refinements in order.
    ///
    /// # Errors
    /// Every truncation, and most damage.
    ///
    /// # Panics
    /// There is no part, or more than there are levels; or `raw` has not the bytes that
    /// the layout says.
    pub fn decode(&self, parts: &[&[u8]], raw: &mut [u8]) -> Result<(), DecodeError> {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        assert!((1..=LADDER).contains(&parts.len()), "the parts of a layer");
        let mut base = Part::new(0, parts[0]);
        let mut quantisers = Vec::new();
        for shape in &self.planes {
            let step = f32::from_le_bytes(base.take()?);
            if !is_step(step) {
                return Err(DecodeError::Step(step));
            }
            for _ in shape.groups() {
                quantisers.push(base.quantiser(step, shape.width)?);
            }
        }
        let tokens = self.layout.tokens() as usize;
        let cells_of_group = tokens.div_ceil(CELL_TOKENS);
        let groups: usize = self.planes.iter().map(|shape| shape.groups().count()).sum();
        let count = groups * cells_of_group;
        let mut cells = vec![base.cells(count)?];
        for (number, part) in parts.iter().enumerate().skip(1) {
            cells.push(Part::new(number, part).cells(count)?);
        }
        let mut next = 0;
        let mut quantisers = quantisers.iter();
        for shape in &self.planes {
            for (group, quantiser) in shape.groups().zip(quantisers.by_ref()) {
                let of_cells: Vec<Vec<&[u8]>> = (next..next + cells_of_group)
                    .map(|cell| cells.iter().map(|part| part[cell]).collect())
                    .collect();
                let of_cells: Vec<&[&[u8]]> = of_cells.iter().map(Vec::as_slice).collect();
                next += cells_of_group;
                let mut out = self.scatter(shape, group, raw);
                // A last cell of fewer tokens by itself.
                let (whole, last) = of_cells.split_at(tokens / CELL_TOKENS);
                quantiser.decode(whole, CELL_TOKENS, |cell, token, row| {
                    out.put(cell * CELL_TOKENS + token, row);
                })?;
                quantiser.decode(last, tokens % CELL_TOKENS, |_, token, row| {
                    out.put(whole.len() * CELL_TOKENS + token, row);
                })?;
            }
        }
        Ok(())
    }

    /// The values of a group, a row a token, with RoPE undone.
    fn gather(&self, raw: &[u8], shape: &PlaneShape, group: HeadRange) -> Vec<f32> {
        let tokens = self.layout.tokens() as usize;
        let mut rows = vec![0.0; tokens * shape.width];
        let mut values = vec![0.0; tokens * shape.dim];
        let place = self.layout.head_slice(shape.plane, group);
        let bytes = place.and_then(|place| raw.get(place)).unwrap_or(&[]);
        let head_bytes = self.layout.head_bytes(shape.plane);
        for (head, bytes) in bytes.chunks_exact(head_bytes).enumerate() {
            read_values(self.layout.dtype(), bytes, &mut values);
            let rows = rows.chunks_exact_mut(shape.width);
            for (token, (row, value)) in rows.zip(values.chunks_exact_mut(shape.dim)).enumerate() {
                if let (Plane::Key, Some(rotation)) = (shape.plane, self.rotation) {
                    rotation.undo(token, value);
                }
                row[head * shape.dim..][..shape.dim].copy_from_slice(value);
            }
        }
        rows
    }

    /// Where the rows of a group go.
    fn scatter<'r>(
        &self,
        shape: &PlaneShape,
        group: HeadRange,
        raw: &'r mut [u8],
    ) -> Heads<'r, '_> {
        let place = self.layout.head_slice(shape.plane, group);
        let bytes = place
            .and_then(|place| raw.get_mut(place))
            .unwrap_or(&mut []);
        Heads {
            heads: bytes
                .chunks_exact_mut(self.layout.head_bytes(shape.plane))
                .collect(),
            dim: shape.dim,
            dtype: self.layout.dtype(),
            rotation: self.rotation.filter(|_| shape.plane == Plane::Key),
        }
    }
}

/// The heads of a group in a raw layer.
struct Heads<'r, 'a> {
    heads: Vec<&'r mut [u8]>,
    dim: usize,
    dtype: DType,
    rotation: Option<&'a Rotation>,
}

impl Heads<'_, '_> {
    /// Puts the row of a token into its places, keys with RoPE done again.
    fn put(&mut self, token: usize, row: &mut [f32]) {
        let size = self.dim * self.dtype.bytes();
        for (head, values) in self.heads.iter_mut().zip(row.chunks_exact_mut(self.dim)) {
            if let Some(rotation) = self.rotation {
                rotation.redo(token, values);
            }
            write_values(self.dtype, values, &mut head[token * size..][..size]);
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
}

/// How many heads share cells: few enough for ranks of tensor parallelism to take theirs,
/// and enough for a cell to have 256 channels where the layer has as many.
fn heads_of_a_group(heads: u16, dim: usize) -> u16 {
    let fits = |&group: &u16| heads.is_multiple_of(group) && usize::from(group) * dim <= MAX_WIDTH;
    let enough = |&group: &u16| usize::from(group) * dim >= ENOUGH_CHANNELS;
    let mut groups = (1..=heads).filter(fits);
    let most = (1..=heads).rev().find(fits).unwrap_or(1);
    groups.find(enough).unwrap_or(most)
}

fn is_step(step: f32) -> bool {
    step.is_normal() && step > 0.0
}

fn read_values(dtype: DType, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        DType::F16 => {
            let halves: Vec<f16> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| f16::from_le_bytes(b))
                .collect();
            halves.convert_to_f32_slice(values);
        }
        DType::Bf16 => {
            let halves: Vec<bf16> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| bf16::from_le_bytes(b))
                .collect();
            halves.convert_to_f32_slice(values);
        }
        _ => {
            for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(bytes);
            }
        }
    }
}

fn write_values(dtype: DType, values: &[f32], bytes: &mut [u8]) {
    // Converted a few at a time, where they stay close.
    let size = dtype.bytes();
    for (values, bytes) in values.chunks(SOME).zip(bytes.chunks_mut(SOME * size)) {
        match dtype {
            DType::F16 => {
                let mut halves = [f16::ZERO; SOME];
                let halves = &mut halves[..values.len()];
                halves.convert_from_f32_slice(values);
                for (slot, half) in bytes.as_chunks_mut().0.iter_mut().zip(halves) {
                    *slot = half.to_le_bytes();
                }
            }
            DType::Bf16 => {
                let mut halves = [bf16::ZERO; SOME];
                let halves = &mut halves[..values.len()];
                halves.convert_from_f32_slice(values);
                for (slot, half) in bytes.as_chunks_mut().0.iter_mut().zip(halves) {
                    *slot = half.to_le_bytes();
                }
            }
            _ => {
                for (slot, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                    *slot = value.to_le_bytes();
                }
            }
        }
    }
}

/// A part of a layer that is being read.
struct Part<'a> {
    number: usize,
    len: usize,
    rest: &'a [u8],
}

impl<'a> Part<'a> {
    fn new(number: usize, bytes: &'a [u8]) -> Self {
        Self {
            number,
            len: bytes.len(),
            rest: bytes,
        }
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let read = self.len - self.rest.len();
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or(DecodeError::Length {
            part: self.number,
            expected: read as u64 + len as u64,
            actual: self.len,
        })?;
        self.rest = rest;
        Ok(bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let bytes = self.bytes(N)?;
        let mut out = [0; N];
        out.copy_from_slice(bytes);
        Ok(out)
    }

    fn quantiser(&mut self, step: f32, width: usize) -> Result<Quantiser, DecodeError> {
        let (quantiser, rest) = Quantiser::read(step, width, self.rest)?;
        self.rest = rest;
        Ok(quantiser)
    }

    /// All cells, up to the end of the part.
    fn cells(mut self, count: usize) -> Result<Vec<&'a [u8]>, DecodeError> {
        let lengths = self.bytes(4 * count)?.as_chunks().0.iter();
        let lengths: Vec<u32> = lengths.map(|&bytes| u32::from_le_bytes(bytes)).collect();
        let cells = lengths.iter().map(|&len| self.bytes(len as usize));
        let cells = cells.collect::<Result<_, _>>()?;
        if self.rest.is_empty() {
            return Ok(cells);
        }
        Err(DecodeError::Length {
            part: self.number,
            expected: (self.len - self.rest.len()) as u64,
            actual: self.len,
        })
    }
}

const ENOUGH_CHANNELS: usize = 256;
const SOME: usize = 64;
/// Of a base part: the number of outliers, and the states.
const CELL_BYTES: usize = 2 + STATE_BYTES;

#[cfg(test)]
mod tests {
    use kvasir_types::Planes;
    use proptest::prelude::*;

    use super::*;
    use crate::rotation::Pairing;

    /// A layer whose channels differ, and whose keys turn with their position.
    fn layer(layout: &KvLayout, rotation: Option<&Rotation>) -> Vec<u8> {
        let codec = LayerCodec::new(*layout, rotation).unwrap();
        let mut raw = vec![0; layout.layer_bytes()];
        let mut state = 1u32;
        for shape in &codec.planes {
            for group in shape.groups() {
                let mut rows = vec![0.0; layout.tokens() as usize * shape.width];
                for (at, value) in rows.iter_mut().enumerate() {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let noise = f32::from((state >> 16) as u16) / 65_536.0 - 0.5;
                    let channel = u8::try_from(at % shape.width % 7).unwrap();
                    *value = f32::from(channel) * (1.0 + noise) - 2.0;
                }
                let mut heads = codec.scatter(shape, group, &mut raw);
                for (token, row) in rows.chunks_exact_mut(shape.width).enumerate() {
                    heads.put(token, row);
                }
            }
        }
        raw
    }

    fn values(dtype: DType, raw: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; raw.len() / dtype.bytes()];
        read_values(dtype, raw, &mut values);
        values
    }

    fn decoded(codec: &LayerCodec<'_>, parts: &[Vec<u8>]) -> Result<Vec<u8>, DecodeError> {
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let mut raw = vec![0xff; codec.layout.layer_bytes()];
        codec.decode(&parts, &mut raw)?;
        Ok(raw)
    }

    #[test]
    fn every_layout_comes_back_as_exactly_as_its_level() {
        for (heads, planes, tokens, dtype) in [
            (2, Planes::symmetric(64), 256, DType::F16),
            (8, Planes::symmetric(128), 70, DType::Bf16),
            (
                3,
                Planes::KeyValue {
                    key_dim: 40,
                    value_dim: 24,
                },
                64,
                DType::F32,
            ),
            (1, Planes::Single { dim: 500 }, 1, DType::F32),
            (1, Planes::symmetric(1), 3, DType::F32),
        ] {
            let layout = KvLayout::new(1, heads, planes, tokens, dtype).unwrap();
            let frequencies = [0.7, 0.1, 0.01];
            let rotation = Rotation::new(&frequencies, Pairing::Halves, 1.0, 90, tokens);
            for rotation in [None, Some(&rotation)] {
                let Ok(codec) = LayerCodec::new(layout, rotation) else {
                    assert!(rotation.is_some() && planes == Planes::symmetric(1));
                    continue;
                };
                let raw = layer(&layout, rotation);
                let encoded = codec.encode(&raw, [0.5, 0.8]);
                let before = values(dtype, &raw);
                for (level, step) in (1..=LADDER).zip([0.8, 0.8 / 3.0, 0.8 / 9.0]) {
                    let raw = decoded(&codec, &encoded.parts[..level]).unwrap();
                    let after = values(dtype, &raw);
                    let errors = before.iter().zip(&after).map(|(a, b)| (a - b).abs());
                    let worst = errors.fold(0.0, f32::max);
                    // A pair's errors add up as it turns; then the type rounds.
                    assert!(worst <= step * 0.71 + 0.06, "{layout:?} {level}: {worst}");
                }
            }
        }
    }

    #[test]
    fn keys_without_their_rotation_take_less() {
        let layout = KvLayout::new(1, 2, Planes::symmetric(64), 256, DType::F32).unwrap();
        let frequencies: Vec<f32> = (0u8..32).map(|at| 0.75f32.powi(at.into())).collect();
        let rotation = Rotation::new(&frequencies, Pairing::Halves, 1.0, 500, 256);
        let raw = layer(&layout, Some(&rotation));
        let bytes = |rotation| {
            let codec = LayerCodec::new(layout, rotation).unwrap();
            codec.encode(&raw, [0.5; 2]).parts[0].len()
        };
        let (without, with) = (bytes(Some(&rotation)), bytes(None));
        assert!(without * 20 < with * 19, "{without} {with}");
    }

    #[test]
    fn layouts_that_cannot_be_coded_say_so() {
        let layout = |planes, dtype| KvLayout::new(1, 1, planes, 4, dtype).unwrap();
        let refused = |layout| LayerCodec::new(layout, None).unwrap_err();
        let fp8 = layout(Planes::symmetric(8), DType::F8E4m3);
        assert_eq!(refused(fp8), UnsupportedLayout::DType(DType::F8E4m3));
        let wide = layout(Planes::Single { dim: 513 }, DType::F16);
        assert_eq!(refused(wide), UnsupportedLayout::Width(513));
        let narrow = layout(Planes::symmetric(2), DType::F16);
        for (frequencies, tokens) in [(&[1.0, 1.0][..], 4), (&[1.0][..], 3)] {
            let rotation = Rotation::new(frequencies, Pairing::Halves, 1.0, 0, tokens);
            let error = LayerCodec::new(narrow, Some(&rotation)).unwrap_err();
            assert_eq!(error, UnsupportedLayout::Rotation { dim: 2, tokens: 4 });
        }
    }

    #[test]
    fn groups_can_be_shared_out_among_ranks() {
        assert_eq!(heads_of_a_group(8, 128), 2);
        assert_eq!(heads_of_a_group(2, 64), 2);
        assert_eq!(heads_of_a_group(32, 128), 2);
        assert_eq!(heads_of_a_group(1, 576), 1);
        assert_eq!(heads_of_a_group(6, 64), 6);
    }

    proptest! {
        #[test]
        fn damage_is_an_error_or_other_values_and_no_panic(
            part in 0..LADDER,
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let layout = KvLayout::new(1, 2, Planes::symmetric(16), 66, DType::F16).unwrap();
            let codec = LayerCodec::new(layout, None).unwrap();
            let mut encoded = codec.encode(&layer(&layout, None), [0.5; 2]);
            let at = at.index(encoded.parts[part].len());
            encoded.parts[part][at] = byte;
            let _ = decoded(&codec, &encoded.parts);
            encoded.parts[part].truncate(at);
            prop_assert!(decoded(&codec, &encoded.parts).is_err());
            encoded.parts[part].clear();
            prop_assert!(decoded(&codec, &encoded.parts).is_err());
        }
    }
}
