//! The parts of a layer as bytes: what comes before the cells, where each cell lies, and the
//! checksums.
//!
//! ```text
//! part  := head ‖ CRC of the head (u32) ‖ cell …
//! head  := parameters ‖ cell × { length (LEB128) ‖ CRC (u32) }
//! ```
//!
//! All are CRC-32C (RFC 3720, appendix B.4): it finds every burst of up to 32 bits. That of
//! a head begins with the number of the part; that of a cell with its [`Place`], so that a
//! cell in another's place is found too.

use crc_fast::{CrcAlgorithm, Digest};

use crate::cell::CellSink;
use crate::layer::DecodeError;

/// Which cell of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) plane: u8,
    /// The part, or [`EXACT`].
    pub(crate) level: u8,
    pub(crate) group: u16,
    /// In the order of tokens.
    pub(crate) cell: u32,
}

/// The level of the exact tokens of a group.
pub(crate) const EXACT: u8 = 0xff;

impl Place {
    pub(crate) fn checksum(self, bytes: &[u8]) -> u32 {
        let mut place = [self.plane, self.level, 0, 0, 0, 0, 0, 0];
        place[2..4].copy_from_slice(&self.group.to_le_bytes());
        place[4..].copy_from_slice(&self.cell.to_le_bytes());
        checksum(&place, bytes)
    }
}

/// Behind a checksum, a fuzzer would not get any further.
fn is_same(checksum: u32, stated: u32) -> bool {
    checksum == stated || cfg!(fuzzing)
}

pub(crate) fn checksum(before: &[u8], bytes: &[u8]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    digest.update(before);
    digest.update(bytes);
    let [a, b, c, d, ..] = digest.finalize().to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// A part being written.
#[derive(Debug)]
pub(crate) struct PartWriter {
    /// Where the next cell belongs.
    pub(crate) next: Place,
    index: Vec<u8>,
    cells: Vec<u8>,
}

impl PartWriter {
    pub(crate) fn new(level: u8) -> Self {
        Self {
            next: Place {
                plane: 0,
                level,
                group: 0,
                cell: 0,
            },
            index: Vec::new(),
            cells: Vec::new(),
        }
    }

    /// The bytes of the part, with these parameters.
    pub(crate) fn finish(self, parameters: Vec<u8>) -> Vec<u8> {
        let mut part = parameters;
        part.reserve_exact(self.index.len() + CHECKSUM_BYTES + self.cells.len());
        part.extend_from_slice(&self.index);
        let of_head = checksum(&[self.next.level], &part);
        part.extend_from_slice(&of_head.to_le_bytes());
        part.extend_from_slice(&self.cells);
        part
    }

    /// Adds a cell that is not the next.
    pub(crate) fn add_at(&mut self, place: Place, write: impl FnOnce(&mut Vec<u8>)) {
        let before = self.cells.len();
        write(&mut self.cells);
        let bytes = &self.cells[before..];
        let len = u32::try_from(bytes.len()).expect("a cell has a bounded number of values");
        write_length(len, &mut self.index);
        let of_cell = place.checksum(bytes);
        self.index.extend_from_slice(&of_cell.to_le_bytes());
    }
}

impl CellSink for PartWriter {
    fn add(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        self.add_at(self.next, write);
        self.next.cell += 1;
    }
}

/// The head of a part, being read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadReader<'a> {
    number: u8,
    part: &'a [u8],
    rest: &'a [u8],
}

/// A part whose head was read and checked.
#[derive(Debug)]
pub(crate) struct Part<'a> {
    cells: &'a [u8],
    entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    start: usize,
    len: usize,
    checksum: u32,
}

impl<'a> HeadReader<'a> {
    pub(crate) fn new(number: u8, part: &'a [u8]) -> Self {
        Self {
            number,
            part,
            rest: part,
        }
    }

    /// # Errors
    /// The part ends before.
    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let error = DecodeError::Length(self.number);
        let (&bytes, rest) = self.rest.split_first_chunk().ok_or(error)?;
        self.rest = rest;
        Ok(bytes)
    }

    /// A length of at most `most`.
    ///
    /// # Errors
    /// The part ends before, or the length is greater.
    pub(crate) fn take_length(&mut self, most: usize) -> Result<usize, DecodeError> {
        let mut len = 0;
        for shift in (0..28).step_by(7) {
            let [byte] = self.take()?;
            len |= usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return (len <= most)
                    .then_some(len)
                    .ok_or(DecodeError::Length(self.number));
            }
        }
        Err(DecodeError::Length(self.number))
    }

    /// What is left of the part, for a reader that gives back what it did not take.
    ///
    /// # Errors
    /// Those of the reader.
    pub(crate) fn read<T, E>(
        &mut self,
        read: impl FnOnce(&'a [u8]) -> Result<(T, &'a [u8]), E>,
    ) -> Result<T, E> {
        let (value, rest) = read(self.rest)?;
        self.rest = rest;
        Ok(value)
    }

    /// Reads where the cells lie, each of at most so many bytes, and checks the head.
    ///
    /// # Errors
    /// The part ends before, or goes on after its last cell; or the checksum is another.
    pub(crate) fn cells(
        mut self,
        most: impl ExactSizeIterator<Item = usize>,
    ) -> Result<Part<'a>, DecodeError> {
        let mut entries = Vec::with_capacity(most.len().min(self.rest.len() / ENTRY_BYTES));
        let mut start = 0;
        for most in most {
            let len = self.take_length(most)?;
            let checksum = u32::from_le_bytes(self.take()?);
            entries.push(Entry {
                start,
                len,
                checksum,
            });
            start += len;
        }
        let head = &self.part[..self.part.len() - self.rest.len()];
        let stated = u32::from_le_bytes(self.take()?);
        if !is_same(checksum(&[self.number], head), stated) {
            return Err(DecodeError::Head(self.number));
        }
        if self.rest.len() != start {
            return Err(DecodeError::Length(self.number));
        }
        Ok(Part {
            cells: self.rest,
            entries,
        })
    }
}

impl<'a> Part<'a> {
    /// The bytes of a cell, checked, by its number in the part.
    ///
    /// # Errors
    /// The checksum is another.
    ///
    /// # Panics
    /// There is no such cell.
    pub(crate) fn cell(&self, number: usize, place: Place) -> Result<&'a [u8], DecodeError> {
        let entry = self.entries[number];
        let bytes = &self.cells[entry.start..entry.start + entry.len];
        if is_same(place.checksum(bytes), entry.checksum) {
            Ok(bytes)
        } else {
            Err(DecodeError::Checksum(self.number_of(place)))
        }
    }

    fn number_of(&self, place: Place) -> u8 {
        if place.level == EXACT { 0 } else { place.level }
    }
}

/// Seven bits a byte, lowest first; all but the last have bit 7.
pub(crate) fn write_length(mut len: u32, out: &mut Vec<u8>) {
    loop {
        let [low, ..] = len.to_le_bytes();
        len >>= 7;
        if len == 0 {
            out.push(low & 0x7f);
            return;
        }
        out.push(low | 0x80);
    }
}

const CHECKSUM_BYTES: usize = 4;
/// Of a cell at least.
const ENTRY_BYTES: usize = 1 + CHECKSUM_BYTES;
