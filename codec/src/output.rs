//! Where the numbers of a group of heads go: its heads in a raw layer, or in a slice of one.

use kvasir_types::DType;

use crate::cell::{MAX_WIDTH, Numbers};
use crate::channels::Quantiser;
use crate::profile::ProfileBasis;
use crate::rans::LANES;
use crate::rotation::Rotation;
use crate::values::{self, Block};

/// The heads of a group, by head, token and channel.
#[derive(Debug)]
pub(crate) struct Output<'r, 'a> {
    raw: &'r mut [u8],
    dtype: DType,
    dim: usize,
    /// The first token, in the chunk.
    first: usize,
    tokens: usize,
    rotation: Option<&'a Rotation>,
    way: Way,
    basis: Option<Restored<'a>>,
}

/// Where numbers are of coefficients, and values of channels.
#[derive(Debug)]
struct Restored<'a> {
    basis: &'a ProfileBasis,
    /// Channels where all numbers are zero.
    origin: Vec<f32>,
    /// Of a cell, a row a token.
    coefficients: Vec<f32>,
    rows: Vec<f32>,
}

/// How numbers become values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Each block of channels for itself.
    Blocks,
    /// A head at a time, whose blocks are turned against each other.
    TurnedBlocks,
    /// A row at a time.
    Rows,
    /// A cell at a time, from coefficients.
    Restored,
}

impl<'r, 'a> Output<'r, 'a> {
    pub(crate) fn new(
        raw: &'r mut [u8],
        dtype: DType,
        dim: usize,
        first: usize,
        tokens: usize,
        rotation: Option<&'a Rotation>,
    ) -> Self {
        let way = match rotation {
            _ if !dim.is_multiple_of(LANES) => Way::Rows,
            None => Way::Blocks,
            Some(rotation) if rotation.angles(first, 0).is_some() => Way::TurnedBlocks,
            Some(_) => Way::Rows,
        };
        Self {
            raw,
            dtype,
            dim,
            first,
            tokens,
            rotation,
            way,
            basis: None,
        }
    }

    /// For numbers of coefficients of a basis.
    pub(crate) fn with_basis(mut self, basis: &'a ProfileBasis, quantiser: &Quantiser) -> Self {
        self.way = Way::Restored;
        self.basis = Some(Restored {
            basis,
            origin: basis.origin(&quantiser.offsets),
            coefficients: Vec::new(),
            rows: Vec::new(),
        });
        self
    }

    /// How many blocks [`put`](Self::put) needs at a time, of those that there are.
    pub(crate) fn blocks_at_a_time(&self, all: usize) -> usize {
        match self.way {
            Way::Blocks => 1,
            Way::TurnedBlocks => self.dim / LANES,
            Way::Rows | Way::Restored => all,
        }
    }

    /// Puts the numbers of some cells, of which the first token is `token` here.
    pub(crate) fn put(
        &mut self,
        numbers: Numbers<'_>,
        quantiser: &Quantiser,
        step: f32,
        token: usize,
    ) {
        for cell in 0..numbers.cells {
            let token = token + cell * numbers.tokens;
            match self.way {
                Way::Blocks | Way::TurnedBlocks => {
                    self.put_blocks(&numbers, quantiser, step, cell, token);
                    self.correct(&numbers, quantiser, step, cell, token);
                }
                Way::Restored => self.put_restored(&numbers, quantiser, step, cell, token),
                Way::Rows => {
                    for row in 0..numbers.tokens {
                        let heads = self.raw.len() / (self.tokens * self.row_bytes());
                        for head in 0..heads {
                            self.put_row(&numbers, quantiser, step, (cell, row, head), token + row);
                        }
                    }
                }
            }
        }
    }

    /// Puts exact tokens, from the first of the chunk on.
    pub(crate) fn put_exact(&mut self, bytes: &[u8], exact: usize) {
        let row_bytes = self.row_bytes();
        let skipped = self.first * row_bytes;
        let heads = self.raw.chunks_exact_mut(self.tokens * row_bytes);
        for (head, bytes) in heads.zip(bytes.chunks_exact(exact * row_bytes)) {
            for (slot, &byte) in head.iter_mut().zip(bytes.iter().skip(skipped)) {
                *slot = byte;
            }
        }
    }

    fn put_blocks(
        &mut self,
        numbers: &Numbers<'_>,
        quantiser: &Quantiser,
        step: f32,
        cell: usize,
        token: usize,
    ) {
        let (offsets, _) = quantiser.offsets.as_chunks();
        let of = |block: usize| Block {
            rows: numbers.rows(block, cell),
            offsets: &offsets[numbers.first + block],
            step,
        };
        let (dtype, row_bytes) = (self.dtype, self.row_bytes());
        let size = LANES * dtype.bytes();
        let mut block = 0;
        while block < numbers.blocks() {
            let channel = (numbers.first + block) * LANES;
            let (head, in_head) = (channel / self.dim, channel % self.dim);
            if head >= self.raw.len() / (self.tokens * row_bytes) {
                break;
            }
            let rotation = self.rotation;
            let at = (head * self.tokens + token) * row_bytes + in_head * dtype.bytes();
            let out = &mut self.raw[at..];
            let pairs = rotation.map_or(0, |rotation| rotation.channels() / 2);
            let angles = rotation
                .filter(|_| in_head < pairs)
                .and_then(|rotation| rotation.angles(self.first + token, in_head));
            if let Some(angles) = angles {
                let apart = pairs / LANES;
                let places = (row_bytes, apart * size);
                values::write_turned([of(block), of(block + apart)], angles, dtype, out, places);
            } else if in_head >= 2 * pairs {
                values::write(of(block), dtype, out, row_bytes);
            }
            block += 1;
        }
    }

    /// Puts a cell whose numbers are of coefficients.
    fn put_restored(
        &mut self,
        numbers: &Numbers<'_>,
        quantiser: &Quantiser,
        step: f32,
        cell: usize,
        token: usize,
    ) {
        let Some(mut restored) = self.basis.take() else {
            return;
        };
        let width = quantiser.width();
        let Restored {
            basis,
            origin,
            coefficients,
            rows,
        } = &mut restored;
        for of_cell in [&mut *coefficients, &mut *rows] {
            of_cell.resize(numbers.tokens * width, 0.0);
        }
        for block in 0..numbers.blocks() {
            let of_block = &mut coefficients[block * LANES..];
            values::scale(numbers.rows(block, cell), step, of_block, width);
        }
        for &(position, value) in numbers.outliers(cell) {
            let position = usize::from(position);
            // Offsets are in the origin.
            coefficients[position] = value - quantiser.offsets[position % width];
        }
        basis.restore(coefficients, origin, rows);
        let (row_bytes, dim) = (self.row_bytes(), self.dim);
        for (at, row) in rows.chunks_exact_mut(width).enumerate() {
            let heads = self.raw.chunks_exact_mut(self.tokens * row_bytes);
            for (values, head) in row.chunks_exact_mut(dim).zip(heads) {
                if let Some(rotation) = self.rotation {
                    rotation.redo(self.first + token + at, values);
                }
                let out = &mut head[(token + at) * row_bytes..][..row_bytes];
                values::store(self.dtype, values, out);
            }
        }
        self.basis = Some(restored);
    }

    /// Puts outliers in their places.
    fn correct(
        &mut self,
        numbers: &Numbers<'_>,
        quantiser: &Quantiser,
        step: f32,
        cell: usize,
        token: usize,
    ) {
        let width = quantiser.width();
        let channels = numbers.first * LANES..(numbers.first + numbers.blocks()) * LANES;
        for &(position, _) in numbers.outliers(cell) {
            let (row, channel) = (usize::from(position) / width, usize::from(position) % width);
            let head = channel / self.dim;
            if channels.contains(&channel)
                && head < self.raw.len() / (self.tokens * self.row_bytes())
            {
                self.put_row(numbers, quantiser, step, (cell, row, head), token + row);
            }
        }
    }

    /// Puts a row of a head, or of what of it is there.
    fn put_row(
        &mut self,
        numbers: &Numbers<'_>,
        quantiser: &Quantiser,
        step: f32,
        (cell, row, head): (usize, usize, usize),
        token: usize,
    ) {
        let first = (numbers.first * LANES).max(head * self.dim);
        let last = ((numbers.first + numbers.blocks()) * LANES).min((head + 1) * self.dim);
        let mut values = [0.0; MAX_WIDTH];
        let values = &mut values[..last - first];
        for (channel, value) in (first..last).zip(values.iter_mut()) {
            let (block, lane) = (channel / LANES - numbers.first, channel % LANES);
            let number = numbers.rows(block, cell)[row][lane];
            *value = f32::from(number) * step + quantiser.offsets[channel];
        }
        for &(position, value) in numbers.outliers(cell) {
            let position = usize::from(position);
            let (of_row, channel) = (position / quantiser.width(), position % quantiser.width());
            if of_row == row && (first..last).contains(&channel) {
                values[channel - first] = value;
            }
        }
        if let Some(rotation) = self.rotation {
            rotation.redo(self.first + token, values);
        }
        let size = self.dtype.bytes();
        let at = (head * self.tokens + token) * self.row_bytes() + (first - head * self.dim) * size;
        values::store(
            self.dtype,
            values,
            &mut self.raw[at..at + (last - first) * size],
        );
    }

    fn row_bytes(&self) -> usize {
        self.dim * self.dtype.bytes()
    }
}
