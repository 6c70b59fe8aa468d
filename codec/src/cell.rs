//! The lossy coding of a few tokens of one group of heads: cells.
//!
//! A cell holds up to [`CELL_TOKENS`] rows of channels, in the terms of a [`Quantiser`].
//! A value is a number of steps; the number is coded by the channel's class
//! ([`crate::classes`]) in up to [`LADDER`] levels, each three times finer than the one
//! before:
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
//! base part := outliers (u16) ‖ outliers × { position (u16) ‖ f32 } ‖ states ‖ words
//! refinement part := words
//! ```
//!
//! States and words are those of [`crate::rans`], in which the levels of a cell follow each
//! other. The lanes of its rows are 32 channels; they run over all tokens before the next
//! 32 channels, so that what codes a lane stays the same for long.
//!
//! Outliers are stored as they are: not a number, infinite, too far out for the class.
//! Encoding and decoding are f32 throughout; what a number stands for is
//! `number * step + offset`, with two roundings.

use crate::channels::Quantiser;
use crate::classes::THIRDS;
use crate::input::Input;
use crate::quantise::{self, Limits};
use crate::rans::{self, AT_ONCE, LANES, Lanes, Reader, Row, StreamError, Writer};

/// Tokens of a cell.
pub const CELL_TOKENS: usize = 64;
/// Parts of a cell: the base and its refinements.
pub const LADDER: usize = 3;
/// Channels of a cell at most: positions and their number fit a `u16`.
pub(crate) const MAX_WIDTH: usize = 512;

/// Why bytes are not a part of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CellError {
    /// It ends before its outliers do, or they do not ascend, or leave the cell.
    #[error("a cell's outliers are damaged")]
    Outliers,
    /// Its symbols cannot be decoded.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// Bytes that a part of a cell of so many values has at most.
pub(crate) const fn most_bytes(level: usize, values: usize) -> usize {
    if level == 0 {
        OUTLIER_COUNT_BYTES + OUTLIER_BYTES * values + rans::STATE_BYTES + 2 * values
    } else {
        2 * values
    }
}

/// Codes cells, a few at a time; keeps its buffers.
#[derive(Debug)]
pub(crate) struct Encoder {
    writers: [Writer; AT_ONCE],
    /// By block of lanes, cell and token.
    rows: Vec<Row>,
    outliers: [Outliers; AT_ONCE],
}

impl Encoder {
    pub(crate) fn new() -> Self {
        Self {
            writers: std::array::from_fn(|_| Writer::new()),
            rows: Vec::new(),
            outliers: Default::default(),
        }
    }

    /// Codes up to [`AT_ONCE`] cells of `tokens` tokens each, from token `first` on. Tokens
    /// before `exact` become zeros. Adds a cell to each of `parts`, for each of them.
    ///
    /// # Panics
    /// There are more cells, or larger ones; or the input has fewer tokens.
    pub(crate) fn encode(
        &mut self,
        quantiser: &Quantiser,
        input: &Input<'_>,
        (first, cells, tokens): (usize, usize, usize),
        exact: usize,
        parts: &mut [impl CellSink; LADDER],
    ) {
        let width = quantiser.width();
        assert!(
            tokens <= CELL_TOKENS && width <= MAX_WIDTH && cells <= AT_ONCE,
            "a few cells"
        );
        let blocks = quantiser.blocks();
        self.rows.resize(blocks.len() * cells * tokens, [0; LANES]);
        let limits = Limits::of(quantiser);
        for (cell, outliers) in self.outliers[..cells].iter_mut().enumerate() {
            outliers.clear();
            let start = first + cell * tokens;
            let ignored = exact.saturating_sub(start).min(tokens);
            input.show(start..start + tokens, width, |values| {
                let limits = &limits[values.block];
                let of_block = (values.block * cells + cell) * tokens;
                let numbers = &mut self.rows[of_block..][..tokens];
                if !quantise::quantise(values, limits, &mut numbers[values.token..]) {
                    return;
                }
                for (token, row) in (values.token..).zip(values.rows()) {
                    for (lane, &value) in row.iter().enumerate() {
                        if token >= ignored && limits.is_outlier(lane, value) {
                            let position = token * width + values.block * LANES + lane;
                            let position = u16::try_from(position);
                            let position = position.expect("a cell has at most 2^15 values");
                            outliers.push((position, value));
                        }
                    }
                }
            });
            for of_block in self.rows.chunks_exact_mut(cells * tokens) {
                of_block[cell * tokens..][..ignored].fill([0; LANES]);
            }
            outliers.sort_unstable_by_key(|&(position, _)| position);
        }
        let writers = &mut self.writers[..cells];
        for writer in writers.iter_mut() {
            writer.begin(width * tokens);
        }
        for level in (0..LADDER).rev() {
            let of_block = self.rows.chunks_exact_mut(cells * tokens);
            for (classes, rows) in blocks.iter().zip(of_block).rev() {
                let lanes = Lanes::new(classes);
                match level {
                    0 => rans::encode_base(lanes, writers, rows),
                    _ => rans::encode_thirds(lanes, &THIRDS[level - 1], writers, rows),
                }
            }
            for (writer, outliers) in writers.iter_mut().zip(&self.outliers) {
                parts[level].add(|out| {
                    if level == 0 {
                        write_outliers(outliers, out);
                        writer.write_states(out);
                    }
                    writer.write_words(out);
                });
            }
        }
    }
}

/// Where the cells of a level go, one after the other.
pub(crate) trait CellSink {
    /// Adds one, whose bytes `write` appends.
    fn add(&mut self, write: impl FnOnce(&mut Vec<u8>));
}

/// Decodes cells, a few at a time; keeps its buffers.
#[derive(Debug)]
pub(crate) struct Decoder {
    readers: [Reader; AT_ONCE],
    /// By block of lanes, cell and token.
    rows: Vec<Row>,
    outliers: [Outliers; AT_ONCE],
}

/// The numbers of some blocks of the cells that were decoded at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbers<'a> {
    /// The first block.
    pub(crate) first: usize,
    rows: &'a [Row],
    pub(crate) tokens: usize,
    pub(crate) cells: usize,
    outliers: &'a [Outliers],
}

impl<'a> Numbers<'a> {
    /// Blocks that are there.
    pub(crate) fn blocks(&self) -> usize {
        self.rows.len() / (self.tokens * self.cells)
    }

    /// A row a token, of one of the blocks.
    pub(crate) fn rows(&self, block: usize, cell: usize) -> &'a [Row] {
        let at = (block * self.cells + cell) * self.tokens;
        &self.rows[at..at + self.tokens]
    }

    /// Positions and values that the numbers of a cell do not stand for: position
    /// `token * width + channel`, ascending.
    pub(crate) fn outliers(&self, cell: usize) -> &'a [(u16, f32)] {
        &self.outliers[cell]
    }
}

impl Decoder {
    pub(crate) fn new() -> Self {
        Self {
            readers: std::array::from_fn(|_| Reader::new()),
            rows: Vec::new(),
            outliers: Default::default(),
        }
    }

    /// Decodes up to [`AT_ONCE`] cells of `tokens` tokens each, given by level and cell from
    /// the base on. Gives `show` the numbers of so many blocks at a time; those that
    /// [`outliers`](Numbers::outliers) names stand for nothing.
    ///
    /// # Errors
    /// Parts that were not made for so many tokens; most damage. Numbers may have been shown
    /// by then.
    ///
    /// # Panics
    /// There are no cells, or too many, or not so many of each level.
    pub(crate) fn decode(
        &mut self,
        quantiser: &Quantiser,
        levels: &[[&[u8]; AT_ONCE]],
        cells: usize,
        tokens: usize,
        at_a_time: usize,
        mut show: impl FnMut(Numbers<'_>),
    ) -> Result<(), CellError> {
        let values = quantiser.width() * tokens;
        let blocks = quantiser.blocks();
        self.rows.resize(blocks.len() * cells * tokens, [0; LANES]);
        let readers = &mut self.readers[..cells];
        for (level, parts) in levels.iter().enumerate() {
            for ((reader, &part), outliers) in readers.iter_mut().zip(parts).zip(&mut self.outliers)
            {
                let words = if level == 0 {
                    reader.begin(read_outliers(part, values, outliers)?)?
                } else {
                    reader.check_words()?;
                    part
                };
                reader.go_on(words, values)?;
            }
            let is_last = level + 1 == levels.len();
            let units = self.rows.chunks_mut(at_a_time * cells * tokens);
            for (unit, rows) in units.enumerate() {
                let first = unit * at_a_time;
                let of_block = rows.chunks_exact_mut(cells * tokens);
                for (classes, rows) in blocks[first..].iter().zip(of_block) {
                    let lanes = Lanes::new(classes);
                    match level {
                        0 => rans::decode_base(lanes, readers, rows),
                        _ => rans::decode_thirds(lanes, &THIRDS[level - 1], readers, rows),
                    }
                }
                if is_last {
                    show(Numbers {
                        first,
                        rows,
                        tokens,
                        cells,
                        outliers: &self.outliers,
                    });
                }
            }
        }
        for reader in readers {
            reader.check_words()?;
            if levels.len() == LADDER {
                reader.check_states()?;
            }
        }
        Ok(())
    }
}

/// What a cell is decoded from, by a decoder of its own.
#[derive(Debug)]
pub(crate) struct Streams<'a> {
    pub(crate) outliers: Outliers,
    pub(crate) states: [u32; LANES],
    /// By level; nothing of a level that is not there.
    pub(crate) words: [&'a [u8]; LADDER],
}

impl<'a> Streams<'a> {
    /// Of a cell of so many values, given by level from the base on.
    ///
    /// # Errors
    /// What [`Decoder::decode`] finds before it looks at symbols.
    pub(crate) fn of(levels: &[&'a [u8]], values: usize) -> Result<Self, CellError> {
        let mut outliers = Outliers::new();
        let mut words = [&[][..]; LADDER];
        for (slot, level) in words.iter_mut().zip(levels) {
            *slot = level;
        }
        let base = read_outliers(words[0], values, &mut outliers)?;
        let (states, base) = rans::split_states(base)?;
        words[0] = base;
        for words in words {
            rans::check_length(words, values)?;
        }
        Ok(Self {
            outliers,
            states,
            words,
        })
    }
}

/// Positions, ascending, and values.
type Outliers = Vec<(u16, f32)>;

fn write_outliers(outliers: &Outliers, out: &mut Vec<u8>) {
    let count = u16::try_from(outliers.len()).expect("a cell has at most 2^15 values");
    out.extend_from_slice(&count.to_le_bytes());
    for (position, value) in outliers {
        out.extend_from_slice(&position.to_le_bytes());
        out.extend_from_slice(&value.to_le_bytes());
    }
}

/// Reads the outliers of a cell of so many values; gives what follows.
fn read_outliers<'a>(
    part: &'a [u8],
    values: usize,
    outliers: &mut Outliers,
) -> Result<&'a [u8], CellError> {
    let (&count, rest) = part.split_first_chunk().ok_or(CellError::Outliers)?;
    let bytes = usize::from(u16::from_le_bytes(count)) * OUTLIER_BYTES;
    let (all, stream) = rest.split_at_checked(bytes).ok_or(CellError::Outliers)?;
    outliers.clear();
    let all = all.as_chunks::<OUTLIER_BYTES>().0.iter();
    outliers.extend(all.map(|&[low, high, a, b, c, d]| {
        let position = u16::from_le_bytes([low, high]);
        (position, f32::from_le_bytes([a, b, c, d]))
    }));
    let ascend = outliers.is_sorted_by(|(before, _), (after, _)| before < after);
    let stay = outliers
        .last()
        .is_none_or(|(last, _)| usize::from(*last) < values);
    (ascend && stay)
        .then_some(stream)
        .ok_or(CellError::Outliers)
}

const OUTLIER_COUNT_BYTES: usize = 2;
const OUTLIER_BYTES: usize = 6;

#[cfg(test)]
pub(crate) mod tests;
