//! The lossy coding of a few tokens of one plane: cells.
//!
//! A cell holds up to [`CELL_TOKENS`] rows of `width` channels. A value is the channel's
//! offset and a whole number of steps; the number is coded by the channel's class
//! ([`classes`]) in up to [`LADDER`] parts, each three times finer than the one before:
//!
//! ```text
//! base        value / step, rounded                          level 0
//! refinement  which third of the step it lies in             level 1: step / 3
//! refinement  which third of that                            level 2: step / 9
//! ```
//!
//! The roundings nest, so a finer level is the coarser one and what it lacks, and costs
//! hardly more than coding it at once, as a test makes sure: under 0.05 bit for normal values.
//!
//! ```text
//! base part := outliers (u16) ‖ outliers × { position (u16) ‖ f32 } ‖ stream
//! refinement part := stream
//! ```
//!
//! Before the cells of a plane, its channels:
//!
//! ```text
//! channels := class (u8, bit 7: wide) … ‖ offset (i8) … ‖ wide offset (f32) …
//! ```
//!
//! An offset is a number of eighths of the class's deviation, or stored as it is.
//!
//! Outliers are stored as they are: not a number, infinite, too far out for the class.
//! Encoding and decoding are f32 throughout; what a number stands for is
//! `offset + number * step`, with one rounding (a fused multiply-add).

use crate::classes::{self, BASE, DISTANCES, REFINEMENT};
use crate::rans::StreamError;
use crate::rows::{self, Channels, Symbols};

/// Tokens of a cell.
pub const CELL_TOKENS: usize = 64;
/// Parts of a cell: the base and its refinements.
pub const LADDER: usize = 3;
/// Channels of a cell at most: positions and their number fit a `u16`.
pub(crate) const MAX_WIDTH: usize = 512;

/// What is common to the cells of one plane: how its values become numbers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Quantiser {
    /// The step of level 0.
    pub(crate) step: f32,
    /// By channel.
    pub(crate) offsets: Vec<f32>,
    /// By channel.
    pub(crate) classes: Vec<u8>,
}

/// Codes cells in one quantiser's terms, one after the other.
#[derive(Debug)]
pub(crate) struct Encoder<'a> {
    quantiser: &'a Quantiser,
    channels: Channels,
    base: Vec<u8>,
    thirds: [Vec<u8>; LADDER - 1],
    tables: [Vec<u8>; LADDER - 1],
}

/// Why bytes are not a part of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CellError {
    /// What is said of the channels ends too early, or is not of this version.
    #[error("the channels of a plane are damaged")]
    Channels,
    /// It ends before its outliers do, or they do not ascend, or leave the cell.
    #[error("a cell's outliers are damaged")]
    Outliers,
    /// Its symbols cannot be decoded.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl Quantiser {
    /// For rows of `width` channels, a multiple of the lanes: offsets are means, and classes
    /// follow from standard deviations. Values that are not finite do not count.
    pub(crate) fn of(rows: &[f32], width: usize, step: f32) -> Self {
        let moments = moments(rows, width);
        let (offsets, classes) = moments
            .iter()
            .map(|moments| moments.quantised(step))
            .unzip();
        Self {
            step,
            offsets,
            classes,
        }
    }

    fn width(&self) -> usize {
        self.classes.len()
    }

    /// Appends what a decoder must know of the channels: [`read`](Self::read) is the
    /// opposite.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let narrow = self
            .offsets
            .iter()
            .zip(&self.classes)
            .map(|(&offset, &class)| {
                let code = narrow_code(offset, class, self.step);
                code.filter(|&code| {
                    narrow_offset(code, class, self.step).to_bits() == offset.to_bits()
                })
            });
        let narrow: Vec<Option<i8>> = narrow.collect();
        for (code, &class) in narrow.iter().zip(&self.classes) {
            out.push(class | if code.is_none() { WIDE } else { 0 });
        }
        out.extend(
            narrow
                .iter()
                .flat_map(|code| code.unwrap_or(0).to_le_bytes()),
        );
        for (code, offset) in narrow.iter().zip(&self.offsets) {
            if code.is_none() {
                out.extend_from_slice(&offset.to_le_bytes());
            }
        }
    }

    /// Reads the channels at the start of `bytes`; gives what follows.
    ///
    /// # Errors
    /// Too few bytes, an unknown class, an offset that is no number.
    pub(crate) fn read(step: f32, width: usize, bytes: &[u8]) -> Result<(Self, &[u8]), CellError> {
        let (classes, rest) = bytes.split_at_checked(width).ok_or(CellError::Channels)?;
        let (codes, mut rest) = rest.split_at_checked(width).ok_or(CellError::Channels)?;
        let mut offsets = Vec::with_capacity(width);
        for (&class, &code) in classes.iter().zip(codes) {
            if class & !WIDE > classes::ZERO {
                return Err(CellError::Channels);
            }
            let offset = if class & WIDE == 0 {
                narrow_offset(i8::from_le_bytes([code]), class, step)
            } else {
                let (&wide, after) = rest.split_first_chunk().ok_or(CellError::Channels)?;
                rest = after;
                f32::from_le_bytes(wide)
            };
            offsets.push(offset);
        }
        if !offsets.iter().all(|offset| offset.is_finite()) {
            return Err(CellError::Channels);
        }
        let quantiser = Self {
            step,
            offsets,
            classes: classes.iter().map(|class| class & !WIDE).collect(),
        };
        Ok((quantiser, rest))
    }

    /// The first refinement table of every channel.
    fn refinement_tables(&self, level: u8) -> Vec<u8> {
        let table = |&class: &u8| classes::refinement_tables(class, level);
        self.classes.iter().map(table).collect()
    }

    /// Codes cells.
    pub(crate) fn encoder(&self) -> Encoder<'_> {
        assert!(self.width() <= MAX_WIDTH, "a cell is not that wide");
        Encoder {
            quantiser: self,
            channels: self.channels(),
            base: Vec::new(),
            thirds: Default::default(),
            tables: Default::default(),
        }
    }

    fn channels(&self) -> Channels {
        let of =
            |value: &dyn Fn(u8) -> f32| self.classes.iter().map(|&class| value(class)).collect();
        Channels {
            offsets: self.offsets.clone(),
            largest: of(&|class| f32::from(classes::LARGEST_OF[usize::from(class)])),
            // No refinement would tell a channel that is zero from others.
            largest_finest: of(&|class| {
                if class == classes::ZERO {
                    0.0
                } else {
                    f32::INFINITY
                }
            }),
            tables: [1, 2].map(|level| self.refinement_tables(level)),
            distances: self.distances(),
        }
    }

    /// Distances that a channel's refinement tables tell apart, less one.
    fn distances(&self) -> Vec<u8> {
        let most = |&class: &u8| {
            if class == classes::ZERO {
                0
            } else {
                DISTANCES - 1
            }
        };
        self.classes.iter().map(most).collect()
    }

    /// Decodes cells of `tokens` rows each, given by their parts from the base up to a
    /// level, the same number for all. Gives `show` every row, with the number of its cell
    /// and of its token; it may change it.
    ///
    /// # Errors
    /// Parts that were not made for this many rows; most damage. Rows may have been shown
    /// by then.
    ///
    /// # Panics
    /// The cells do not have equally many parts; or a class is greater than that of a
    /// channel that is zero.
    pub(crate) fn decode(
        &self,
        cells: &[&[&[u8]]],
        tokens: usize,
        mut show: impl FnMut(usize, usize, &mut [f32]),
    ) -> Result<(), CellError> {
        for (batch, number) in cells.chunks(AT_ONCE).zip((0..).step_by(AT_ONCE)) {
            self.decode_some(batch, tokens, |cell, token, row| {
                show(number + cell, token, row);
            })?;
        }
        Ok(())
    }

    fn decode_some(
        &self,
        cells: &[&[&[u8]]],
        tokens: usize,
        mut show: impl FnMut(usize, usize, &mut [f32]),
    ) -> Result<(), CellError> {
        let width = self.width();
        let len = tokens * width;
        let levels = cells.first().map_or(0, |parts| parts.len());
        assert!(
            cells.iter().all(|parts| parts.len() == levels),
            "equally many parts"
        );
        let mut outliers = Vec::with_capacity(cells.len());
        let mut streams = Vec::with_capacity(cells.len());
        for parts in cells {
            let (of_cell, stream) = read_outliers(parts.first().unwrap_or(&&[][..]), len)?;
            outliers.push(of_cell);
            streams.push(stream);
        }
        let mut symbols = vec![vec![0; len]; cells.len()];
        let classes = vec![self.classes.as_slice(); cells.len()];
        BASE.decode(&streams, &classes, &mut slices(&mut symbols))?;
        let numbers = if levels > 1 {
            self.refined(cells, levels, &mut symbols)?
        } else {
            Vec::new()
        };
        let mut step = self.step;
        (1..levels).for_each(|_| step /= 3.0);
        let mut row = vec![0.0; width];
        for (cell, outliers) in outliers.iter().enumerate() {
            let mut outliers = outliers.iter().peekable();
            for (token, start) in (0..tokens).zip((0..).step_by(width)) {
                let place = start..start + width;
                match numbers.get(cell) {
                    Some(numbers) => {
                        rows::values_of_numbers(&numbers[place], step, &self.offsets, &mut row)
                    }
                    None => rows::values_of_symbols(
                        &symbols[cell][place],
                        step,
                        &self.offsets,
                        &mut row,
                    ),
                }
                while let Some((position, value)) =
                    outliers.next_if(|(position, _)| usize::from(*position) < start + width)
                {
                    row[usize::from(*position) - start] = *value;
                }
                show(cell, token, &mut row);
            }
        }
        Ok(())
    }

    /// The numbers of cells at a level from 1 on, of which `symbols` are the base.
    fn refined(
        &self,
        cells: &[&[&[u8]]],
        levels: usize,
        symbols: &mut [Vec<u8>],
    ) -> Result<Vec<Vec<i16>>, CellError> {
        let width = self.width();
        let len = symbols.first().map_or(0, Vec::len);
        let mut numbers = vec![vec![0; len]; cells.len()];
        for (numbers, symbols) in numbers.iter_mut().zip(symbols.iter()) {
            rows::numbers_of_symbols(symbols, numbers);
        }
        let mut tables = vec![vec![0; len]; cells.len()];
        let distances = self.distances();
        for (level, part) in (1u8..).zip(1..levels) {
            let first = self.refinement_tables(level);
            for (tables, numbers) in tables.iter_mut().zip(&numbers) {
                let rows = tables
                    .chunks_exact_mut(width)
                    .zip(numbers.chunks_exact(width));
                for (tables, numbers) in rows {
                    rows::tables_of_numbers(numbers, &first, &distances, tables);
                }
            }
            let streams: Vec<&[u8]> = cells.iter().map(|parts| parts[part]).collect();
            let named: Vec<&[u8]> = tables.iter().map(Vec::as_slice).collect();
            REFINEMENT.decode(&streams, &named, &mut slices(symbols))?;
            for (numbers, thirds) in numbers.iter_mut().zip(symbols.iter()) {
                rows::refine(numbers, thirds);
            }
        }
        Ok(numbers)
    }
}

impl Encoder<'_> {
    /// Appends each part of a cell to one of `parts`.
    ///
    /// # Panics
    /// `rows` are not whole rows of at most [`CELL_TOKENS`] tokens.
    pub(crate) fn encode(&mut self, rows: &[f32], parts: [&mut Vec<u8>; LADDER]) {
        let width = self.quantiser.width();
        assert!(
            rows.len().is_multiple_of(width) && rows.len() <= width * CELL_TOKENS,
            "the rows of a cell"
        );
        let Self {
            base,
            thirds,
            tables,
            channels,
            ..
        } = self;
        let per_step = 9.0 / self.quantiser.step;
        base.resize(rows.len(), 0);
        for symbols in thirds.iter_mut().chain(tables.iter_mut()) {
            symbols.resize(rows.len(), 0);
        }
        let mut outliers: Outliers = Vec::new();
        for (row, at) in rows.chunks_exact(width).zip((0..).step_by(width)) {
            let place = at..at + width;
            let mut symbols = Symbols {
                base: &mut base[place.clone()],
                thirds: thirds.each_mut().map(|all| &mut all[place.clone()]),
                tables: tables.each_mut().map(|all| &mut all[place.clone()]),
            };
            if rows::split(row, per_step, channels, &mut symbols) {
                for (channel, &value) in row.iter().enumerate() {
                    if rows::is_stray(value, per_step, channels, channel) {
                        let position = u16::try_from(at + channel).unwrap_or(u16::MAX);
                        outliers.push((position, value));
                    }
                }
            }
        }
        let [part, refinements @ ..] = parts;
        let count = u16::try_from(outliers.len()).unwrap_or(u16::MAX);
        part.extend_from_slice(&count.to_le_bytes());
        for (position, value) in &outliers {
            part.extend_from_slice(&position.to_le_bytes());
            part.extend_from_slice(&value.to_le_bytes());
        }
        BASE.encode(base, &self.quantiser.classes, part);
        for ((part, thirds), tables) in refinements.into_iter().zip(thirds).zip(tables) {
            REFINEMENT.encode(thirds, tables, part);
        }
    }
}

/// Of every channel of rows of `width` channels; what is not finite does not count.
pub(crate) fn moments(rows: &[f32], width: usize) -> Vec<Moments> {
    let mut counts = vec![0.0; width];
    let mut sums = vec![0.0; width];
    let mut squares = vec![0.0; width];
    for row in rows.chunks_exact(width) {
        rows::add_moments(row, &mut counts, &mut sums, &mut squares);
    }
    let moments = counts.into_iter().zip(sums).zip(squares);
    moments
        .map(|((count, sum), squares)| Moments {
            count,
            sum,
            squares,
        })
        .collect()
}

/// Sums over the values of a channel.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moments {
    count: f32,
    sum: f32,
    squares: f32,
}

impl Moments {
    fn mean(self) -> f32 {
        self.sum / self.count.max(1.0)
    }

    pub(crate) fn variance(self) -> f32 {
        let mean = self.mean();
        (self.squares / self.count.max(1.0) - mean * mean).max(0.0)
    }

    /// The offset and the class: of a mean that is an offset to within a sixteenth of the
    /// deviation.
    fn quantised(self, step: f32) -> (f32, u8) {
        let mean = self.mean();
        let ratio = self.variance().sqrt() / step;
        let class = if ratio > 0.0 {
            classes::class_of(ratio)
        } else {
            classes::ZERO
        };
        let narrow = narrow_code(mean, class, step);
        let offset = narrow.map_or(mean, |code| narrow_offset(code, class, step));
        let offset = if offset.is_finite() { offset } else { 0.0 };
        (offset, class)
    }
}

/// An offset as a number of eighths of the class's deviation; `None` where it is too large.
fn narrow_code(offset: f32, class: u8, step: f32) -> Option<i8> {
    let code = (offset / narrow_offset(1, class, step)).round();
    #[expect(clippy::cast_possible_truncation, reason = "in range")]
    let code = (code.abs() <= f32::from(i8::MAX)).then_some(code as i8);
    code.or((offset == 0.0).then_some(0))
}

fn narrow_offset(code: i8, class: u8, step: f32) -> f32 {
    let ratio = classes::RATIOS.get(usize::from(class)).unwrap_or(&0.0);
    f32::from(code) * (ratio * step / 8.0)
}

/// Positions, ascending, and values.
type Outliers = Vec<(u16, f32)>;

fn read_outliers(part: &[u8], positions: usize) -> Result<(Outliers, &[u8]), CellError> {
    let (&count, rest) = part.split_first_chunk().ok_or(CellError::Outliers)?;
    let bytes = usize::from(u16::from_le_bytes(count)) * OUTLIER_BYTES;
    let (outliers, stream) = rest.split_at_checked(bytes).ok_or(CellError::Outliers)?;
    let (outliers, _) = outliers.as_chunks::<OUTLIER_BYTES>();
    let outliers = outliers.iter().map(|&[low, high, a, b, c, d]| {
        let position = u16::from_le_bytes([low, high]);
        let known = usize::from(position) < positions;
        known
            .then(|| (position, f32::from_le_bytes([a, b, c, d])))
            .ok_or(CellError::Outliers)
    });
    let outliers: Outliers = outliers.collect::<Result<_, _>>()?;
    let ascend = outliers.is_sorted_by(|(before, _), (after, _)| before < after);
    ascend
        .then_some((outliers, stream))
        .ok_or(CellError::Outliers)
}

fn slices(all: &mut [Vec<u8>]) -> Vec<&mut [u8]> {
    all.iter_mut().map(Vec::as_mut_slice).collect()
}

/// Bit of a class whose offset is stored apart, as it is.
const WIDE: u8 = 0x80;
const OUTLIER_BYTES: usize = 6;
/// Cells that are decoded together: see [`Tables::decode`](crate::rans::Tables::decode).
const AT_ONCE: usize = 4;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Rows of normal values: the width, and the standard deviation of each channel.
    fn gaussian(width: usize, tokens: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        let mut uniform = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            #[expect(clippy::cast_precision_loss, reason = "a random number")]
            let value = (state >> 40) as f32 / (1u32 << 24) as f32;
            value
        };
        (0..width * tokens)
            .map(|at| {
                #[expect(clippy::cast_precision_loss, reason = "small")]
                let scale = 0.2 + (at % width) as f32 / width as f32 * 3.0;
                let sum: f32 = (0..12).map(|_| uniform()).sum();
                (sum - 6.0) * scale + 5.0 * scale
            })
            .collect()
    }

    fn encoded(quantiser: &Quantiser, rows: &[f32]) -> [Vec<u8>; LADDER] {
        let mut parts = [(); LADDER].map(|()| Vec::new());
        quantiser.encoder().encode(rows, parts.each_mut());
        parts
    }

    fn decoded(
        quantiser: &Quantiser,
        parts: &[Vec<u8>],
        len: usize,
    ) -> Result<Vec<f32>, CellError> {
        let mut output = Vec::new();
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let tokens = len / quantiser.width();
        quantiser.decode(&[&parts], tokens, |_, _, row| output.extend_from_slice(row))?;
        Ok(output)
    }

    #[test]
    fn a_level_is_as_exact_as_its_step() {
        let rows = gaussian(64, 50, 3);
        for step in [0.05, 0.5, 3.0, 40.0] {
            let quantiser = Quantiser::of(&rows, 64, step);
            let parts = encoded(&quantiser, &rows);
            let mut level_step = step;
            for level in 0..LADDER {
                let got = decoded(&quantiser, &parts[..=level], rows.len()).unwrap();
                let errors = rows.iter().zip(&got).map(|(a, b)| (a - b).abs());
                let worst = errors.fold(0.0, f32::max);
                assert!(worst <= level_step * 0.5001, "{step} {level}: {worst}");
                level_step /= 3.0;
            }
        }
    }

    #[test]
    fn channels_come_back() {
        let mut rows = gaussian(64, 30, 3);
        for row in rows.chunks_mut(64) {
            (row[3], row[4]) = (7.25, 0.0);
            row[5] += 1000.0;
        }
        let quantiser = Quantiser::of(&rows, 64, 0.7);
        assert_eq!(quantiser.classes[3..5], [classes::ZERO; 2]);
        assert_eq!(quantiser.offsets[3..5], [7.25, 0.0]);
        let mut bytes = Vec::new();
        quantiser.write(&mut bytes);
        // Two offsets are wide: a constant, and one that is far from its deviation.
        assert_eq!(bytes.len(), 2 * 64 + 2 * 4);
        bytes.push(9);
        let (again, rest) = Quantiser::read(0.7, 64, &bytes).unwrap();
        assert_eq!((again, rest), (quantiser, &[9][..]));
        for cut in 0..bytes.len() - 1 {
            assert_eq!(
                Quantiser::read(0.7, 64, &bytes[..cut]),
                Err(CellError::Channels)
            );
        }
        bytes[0] = classes::ZERO + 1;
        assert_eq!(Quantiser::read(0.7, 64, &bytes), Err(CellError::Channels));
    }

    #[test]
    fn what_is_no_number_stays_what_it_is() {
        let mut rows = gaussian(32, 64, 3);
        let strange = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            1e30,
            -1e-40,
            3e8,
        ];
        for (at, value) in strange.into_iter().enumerate() {
            rows[at * 37] = value;
        }
        let quantiser = Quantiser::of(&gaussian(32, 64, 3), 32, 0.3);
        let parts = encoded(&quantiser, &rows);
        let got = decoded(&quantiser, &parts[..1], rows.len()).unwrap();
        assert!(got[0].is_nan());
        assert_eq!(got[37..=37], [f32::INFINITY]);
        assert_eq!(got[2 * 37], f32::NEG_INFINITY);
        assert_eq!(got[3 * 37], 1e30);
        assert!((got[4 * 37]).abs() < 0.16);
        assert_eq!(got[5 * 37], 3e8);
    }

    #[test]
    fn nothing_costs_nothing() {
        let rows = vec![0.0; 64 * 64];
        let quantiser = Quantiser::of(&rows, 64, 0.1);
        let parts = encoded(&quantiser, &rows);
        let lengths = parts.each_ref().map(Vec::len);
        assert_eq!(lengths, [2 + 128, 128, 128]);
        assert_eq!(decoded(&quantiser, &parts, rows.len()).unwrap(), rows);
    }

    /// Close to what a coder that knows every distribution needs, however many levels it
    /// takes.
    #[test]
    fn a_value_takes_what_its_distribution_needs() {
        let (width, tokens) = (256, 64);
        let rows = gaussian(width, tokens, 9);
        let ideal = (0u8..=255).map(|channel| {
            let scale = 0.2 + f64::from(channel) / 256.0 * 3.0;
            // High-rate entropy of a normal variable, and no less than nothing.
            (scale.log2() + 2.047).max(0.3) / 256.0
        });
        let ideal: f64 = ideal.sum();
        let mut at_once = None;
        for (step, level) in [(1.0f32, 0), (3.0, 1), (9.0, 2)] {
            let quantiser = Quantiser::of(&rows, width, step);
            let parts = encoded(&quantiser, &rows);
            let bytes: usize = parts[..=level].iter().map(Vec::len).sum();
            // Half of what is in the states of a stream is symbols.
            let states = 64 * (level + 1) + 2;
            #[expect(clippy::cast_precision_loss, reason = "small")]
            let bits = 8.0 * (bytes - states) as f64 / rows.len() as f64;
            assert!((bits - ideal).abs() < 0.1, "{step}: {bits} {ideal}");
            let at_once = *at_once.get_or_insert(bits);
            assert!((bits - at_once).abs() < 0.05, "{step}: {bits} {at_once}");
        }
    }

    #[test]
    fn outliers_ascend_and_stay_inside() {
        let read = |positions: &[u16]| {
            let count = u16::try_from(positions.len()).unwrap();
            let mut part = count.to_le_bytes().to_vec();
            for position in positions {
                part.extend(position.to_le_bytes());
                part.extend(1f32.to_le_bytes());
            }
            read_outliers(&part, 9).map(|(outliers, _)| outliers.len())
        };
        assert_eq!(read(&[0, 3, 8]), Ok(3));
        for wrong in [&[3, 2][..], &[3, 3], &[9]] {
            assert_eq!(read(wrong), Err(CellError::Outliers));
        }
    }

    proptest! {
        #[test]
        fn damage_is_an_error_or_other_numbers_and_no_panic(
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<prop::sample::Index>(),
            part in 0..LADDER,
        ) {
            let rows = gaussian(32, 8, 5);
            let quantiser = Quantiser::of(&rows, 32, 1.0);
            let mut parts = encoded(&quantiser, &rows);
            let at = at.index(parts[part].len());
            parts[part][at] = byte;
            let _ = decoded(&quantiser, &parts, rows.len());
            let cut = cut.index(parts[part].len());
            parts[part].truncate(cut);
            prop_assert!(decoded(&quantiser, &parts, rows.len()).is_err());
        }
    }
}
