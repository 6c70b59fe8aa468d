//! Entropy coding: interleaved rANS over tables that both sides know.
//!
//! A stream holds rows of [`LANES`] numbers; lane `l` codes number `l` of every row. Each
//! lane is a range asymmetric numeral system (Duda, arXiv 1311.2540) with a 32-bit state
//! that is renormalised in words of 16 bits, and all lanes share one sequence of words
//! (Giesen, arXiv 1402.3392). Which table codes a number is not in the stream: the caller
//! knows it of both sides.
//!
//! # Two kinds of rows
//! *Base* rows hold numbers from -63 to 63, coded by the class of their lane. The tables
//! are even, so one bit of a slot is the sign and ten bits find the number from zero on:
//!
//! ```text
//! sign, magnitude = slot >> 10, slot & 1023
//! number          = the last n with firsts[n] <= magnitude
//! place           = magnitude - firsts[number]; zero has both halves, the negative last
//! ```
//!
//! *Third* rows take numbers that are there already to the next level, three times finer:
//! a symbol of three by the class of the lane and the number's distance from zero.
//!
//! Either way a symbol is found by comparing the slot with a few bounds, which are the same
//! for a lane in every row: a kernel compares all lanes with one bound at a time and never
//! looks into memory. Only base rows with a class of many numbers take a table by slot.
//!
//! # Streams that follow each other
//! States pass from one stream to the next. A reader starts with stored states, and reads
//! the base, then the words of each level on from the states that the level before ended
//! with; a writer takes the levels from the finest on. So the states are stored once, and
//! it is the end of the finest level where every lane is at [`START`] again. Every level
//! ends where its words do.
//!
//! All integers are little-endian. Kernels are chosen at run time; all give the same bytes
//! and numbers as the scalar code in [`scalar`]. On 64-bit ARM decoders are for NEON, which
//! all such CPUs have, and encoders are scalar.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bytes;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
mod scalar;
#[cfg(any(
    target_arch = "x86_64",
    all(target_arch = "aarch64", target_endian = "little")
))]
mod spread;
#[cfg(test)]
mod tests;

use std::sync::LazyLock;

pub(crate) use bytes::ByteTable;

use crate::classes::{BASE, ByClass, PADDED, ThirdTables};

/// Lanes of a stream: a warp, one register of AVX-512 with 16 bits a lane, or two of AVX2.
pub(crate) const LANES: usize = 32;

/// A number a lane.
pub(crate) type Row = [i16; LANES];

/// Probabilities are multiples of 2⁻¹¹.
pub(crate) const PRECISION: u32 = 11;
pub(crate) const TOTAL: u16 = 1 << PRECISION;
/// Slots of a half of an even table.
pub(crate) const HALF: u16 = TOTAL / 2;

/// The least state, and the one that every lane of a writer starts with.
const START: u32 = 1 << 16;

/// Bytes of stored states.
pub(crate) const STATE_BYTES: usize = 4 * LANES;

/// Streams that a kernel takes at once at most: enough for the latency of one to be hidden
/// behind the others.
pub(crate) const AT_ONCE: usize = 4;

/// Why a stream cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// It is shorter than its states, has half a word, or more words than symbols.
    #[error("{0} bytes are no stream of this many symbols")]
    Length(usize),
    /// It does not end where its symbols do.
    #[error("the stream is damaged")]
    Damaged,
}

/// The states of all lanes, in halves: what fills a register is handled 16 bits a lane.
#[derive(Clone, Debug)]
struct States {
    low: [u16; LANES],
    high: [u16; LANES],
}

impl States {
    const START: Self = Self {
        low: [0; LANES],
        high: [1; LANES],
    };

    fn get(&self, lane: usize) -> u32 {
        u32::from(self.high[lane]) << 16 | u32::from(self.low[lane])
    }

    fn set(&mut self, lane: usize, state: u32) {
        let [a, b, c, d] = state.to_le_bytes();
        self.low[lane] = u16::from_le_bytes([a, b]);
        self.high[lane] = u16::from_le_bytes([c, d]);
    }
}

/// The states that a stream begins with, and the words that follow.
///
/// # Errors
/// There are not that many bytes.
pub(crate) fn split_states(stream: &[u8]) -> Result<([u32; LANES], &[u8]), StreamError> {
    let error = StreamError::Length(stream.len());
    let (bytes, words) = stream.split_first_chunk().ok_or(error)?;
    let bytes: &[u8; STATE_BYTES] = bytes;
    let mut states = [0; LANES];
    for (state, &bytes) in states.iter_mut().zip(bytes.as_chunks().0) {
        *state = u32::from_le_bytes(bytes);
    }
    Ok((states, words))
}

/// That these may be the words of so many symbols.
///
/// # Errors
/// There is half a word, or there are more words than symbols.
pub(crate) fn check_length(words: &[u8], symbols: usize) -> Result<(), StreamError> {
    // A symbol reads at most one word.
    if words.len() > 2 * symbols || !words.len().is_multiple_of(2) {
        return Err(StreamError::Length(words.len()));
    }
    Ok(())
}

/// Streams being read.
#[derive(Debug)]
pub(crate) struct Reader {
    states: States,
    /// The words, and as many zeros as a kernel may read beyond them.
    words: Vec<u16>,
    next: usize,
    end: usize,
}

impl Reader {
    pub(crate) fn new() -> Self {
        Self {
            states: States::START,
            words: vec![0; LANES],
            next: 0,
            end: 0,
        }
    }

    /// Takes the states from the start of `stream`; gives the words that follow.
    ///
    /// # Errors
    /// There are not that many bytes.
    pub(crate) fn begin<'a>(&mut self, stream: &'a [u8]) -> Result<&'a [u8], StreamError> {
        let (states, words) = split_states(stream)?;
        for (lane, state) in states.into_iter().enumerate() {
            self.states.set(lane, state);
        }
        Ok(words)
    }

    /// Goes on with the words of a level, of so many symbols.
    ///
    /// # Errors
    /// There is half a word, or there are more words than symbols.
    pub(crate) fn go_on(&mut self, words: &[u8], symbols: usize) -> Result<(), StreamError> {
        check_length(words, symbols)?;
        (self.next, self.end) = (0, words.len() / 2);
        self.words.clear();
        let words = words.as_chunks().0.iter();
        self.words
            .extend(words.map(|&word| u16::from_le_bytes(word)));
        self.words.resize(self.end + LANES, 0);
        Ok(())
    }

    /// That all words of the level were read, and no more.
    ///
    /// # Errors
    /// They were not: the level is damaged, or one before it.
    pub(crate) fn check_words(&self) -> Result<(), StreamError> {
        if self.next == self.end {
            Ok(())
        } else {
            Err(StreamError::Damaged)
        }
    }

    /// That the finest level ended where a writer began.
    ///
    /// # Errors
    /// It did not: a level is damaged.
    pub(crate) fn check_states(&self) -> Result<(), StreamError> {
        let done = (0..LANES).all(|lane| self.states.get(lane) == START);
        done.then_some(()).ok_or(StreamError::Damaged)
    }

    /// The words from the next on, and zeros beyond their end.
    #[inline(always)]
    fn upcoming(&self, next: usize) -> &[u16; LANES] {
        let from = next.min(self.end);
        self.words[from..]
            .first_chunk()
            .expect("as many zeros follow")
    }
}

/// Streams being written, the last row of the finest level first.
#[derive(Debug)]
pub(crate) struct Writer {
    states: States,
    words: Vec<u16>,
    /// Words from here on are written.
    next: usize,
    /// Where they end.
    end: usize,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self {
            states: States::START,
            words: Vec::new(),
            next: 0,
            end: 0,
        }
    }

    /// Starts with the finest level of a cell of so many symbols at most.
    pub(crate) fn begin(&mut self, symbols: usize) {
        self.states = States::START;
        // A word a symbol, and a register that a kernel may write on both sides.
        self.end = symbols + LANES;
        self.next = self.end;
        if self.words.len() < self.end + LANES {
            self.words.resize(self.end + LANES, 0);
        }
    }

    /// Appends the states that the last level ended with.
    pub(crate) fn write_states(&self, out: &mut Vec<u8>) {
        out.extend((0..LANES).flat_map(|lane| self.states.get(lane).to_le_bytes()));
    }

    /// Appends the words of the level that just ended. The next one goes on from its states.
    pub(crate) fn write_words(&mut self, out: &mut Vec<u8>) {
        let words = &self.words[self.next..self.end];
        let at = out.len();
        out.resize(at + 2 * words.len(), 0);
        for (slot, word) in out[at..].as_chunks_mut().0.iter_mut().zip(words) {
            *slot = word.to_le_bytes();
        }
        self.next = self.end;
    }
}

/// What the lanes of a row are coded by: a class each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lanes<'a> {
    classes: &'a [u8; LANES],
    /// The largest number of any of them.
    largest: u8,
}

impl<'a> Lanes<'a> {
    /// # Panics
    /// A class is greater than that of a channel that is zero.
    pub(crate) fn new(classes: &'a [u8; LANES]) -> Self {
        let largest = classes
            .iter()
            .map(|&class| BASE.largest[usize::from(class)]);
        Self {
            classes,
            largest: largest.max().unwrap_or(0),
        }
    }

    /// Whether the largest number is one that a kernel counts up to; else it takes tables
    /// by slot.
    fn are_narrow(self) -> bool {
        self.largest <= MOST_BOUNDS
    }

    /// The largest number of each lane.
    #[cfg(target_arch = "x86_64")]
    fn of_largest(self) -> [u16; LANES] {
        self.classes
            .map(|class| u16::from(BASE.largest[usize::from(class)]))
    }

    /// The entries of the classes.
    #[inline(always)]
    fn of(self, table: &ByClass) -> [u16; LANES] {
        let mut entries = [0; LANES];
        for (entry, &class) in entries.iter_mut().zip(self.classes) {
            *entry = table[usize::from(class) % PADDED];
        }
        entries
    }
}

/// Decodes base rows of several streams at once. `rows` are those of the first stream, then
/// as many of the second, and so on.
///
/// # Panics
/// There are more than [`AT_ONCE`] streams, or they do not have equally many rows.
pub(crate) fn decode_base(lanes: Lanes<'_>, readers: &mut [Reader], rows: &mut [Row]) {
    KERNEL.decode_base(lanes, readers, rows);
}

/// Takes rows of several streams to the next level, one `tables` are of.
///
/// # Panics
/// As for [`decode_base`].
pub(crate) fn decode_thirds(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    readers: &mut [Reader],
    rows: &mut [Row],
) {
    KERNEL.decode_thirds(lanes, tables, readers, rows);
}

/// Codes base rows of several streams at once, which stay as they are.
///
/// # Panics
/// As for [`decode_base`]; or a class does not have a number; or the writers did not begin
/// with as many symbols.
pub(crate) fn encode_base(lanes: Lanes<'_>, writers: &mut [Writer], rows: &mut [Row]) {
    KERNEL.encode_base(lanes, writers, rows);
}

/// Codes what rows of several streams are finer than the level before the one `tables` are
/// of, and takes them to that level.
///
/// # Panics
/// As for [`encode_base`].
pub(crate) fn encode_thirds(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    writers: &mut [Writer],
    rows: &mut [Row],
) {
    KERNEL.encode_thirds(lanes, tables, writers, rows);
}

/// Decodes rows of bytes of several streams at once, each by a table.
///
/// # Panics
/// As for [`decode_base`]; or there are fewer tables than streams.
pub(crate) fn decode_bytes(tables: &[ByteTable], readers: &mut [Reader], rows: &mut [Row]) {
    KERNEL.decode_bytes(tables, readers, rows);
}

/// Codes rows of bytes of several streams at once, each by a table.
///
/// # Panics
/// As for [`decode_bytes`]; or a table does not have a byte, or a number is none; or the
/// writers did not begin with as many symbols.
pub(crate) fn encode_bytes(tables: &[ByteTable], writers: &mut [Writer], rows: &[Row]) {
    KERNEL.encode_bytes(tables, writers, rows);
}

/// What decoding a slot takes: the symbol in bits 0 to 7, its frequency less one in 8 to 18,
/// the place of the slot in the symbol in 19 to 29.
pub(crate) fn slot(symbol: u8, frequency: u32, place: u32) -> u32 {
    u32::from(symbol) | (frequency - 1) << 8 | place << 19
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Neon,
    Scalar,
}

impl Kernel {
    /// Those that this CPU has, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut kernels = vec![Self::Scalar];
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        kernels.push(Self::Neon);
        #[cfg(target_arch = "x86_64")]
        {
            if avx2::is_available() {
                kernels.push(Self::Avx2);
            }
            if avx512::is_available() {
                kernels.push(Self::Avx512);
            }
        }
        kernels.reverse();
        kernels
    }

    fn decode_base(self, lanes: Lanes<'_>, readers: &mut [Reader], rows: &mut [Row]) {
        check(readers.len(), rows.len());
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::decode_base(lanes, readers, rows),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::decode_base(lanes, readers, rows),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => neon::decode_base(lanes, readers, rows),
            Self::Scalar => scalar::decode_base(lanes, readers, rows),
        }
    }

    fn decode_thirds(
        self,
        lanes: Lanes<'_>,
        tables: &ThirdTables,
        readers: &mut [Reader],
        rows: &mut [Row],
    ) {
        check(readers.len(), rows.len());
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::decode_thirds(lanes, tables, readers, rows),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::decode_thirds(lanes, tables, readers, rows),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => neon::decode_thirds(lanes, tables, readers, rows),
            Self::Scalar => scalar::decode_thirds(lanes, tables, readers, rows),
        }
    }

    fn decode_bytes(self, tables: &[ByteTable], readers: &mut [Reader], rows: &mut [Row]) {
        check(readers.len(), rows.len());
        assert!(tables.len() >= readers.len(), "a table a stream");
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::decode_bytes(tables, readers, rows),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::decode_bytes(tables, readers, rows),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => scalar::decode_bytes(tables, readers, rows),
            Self::Scalar => scalar::decode_bytes(tables, readers, rows),
        }
    }

    fn encode_bytes(self, tables: &[ByteTable], writers: &mut [Writer], rows: &[Row]) {
        check(writers.len(), rows.len());
        assert!(tables.len() >= writers.len(), "a table a stream");
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::encode_bytes(tables, writers, rows),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::encode_bytes(tables, writers, rows),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => scalar::encode_bytes(tables, writers, rows),
            Self::Scalar => scalar::encode_bytes(tables, writers, rows),
        }
    }

    fn encode_base(self, lanes: Lanes<'_>, writers: &mut [Writer], rows: &mut [Row]) {
        check(writers.len(), rows.len());
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::encode_base(lanes, writers, rows),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::encode_base(lanes, writers, rows),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => scalar::encode_base(lanes, writers, rows),
            Self::Scalar => scalar::encode_base(lanes, writers, rows),
        }
    }

    fn encode_thirds(
        self,
        lanes: Lanes<'_>,
        tables: &ThirdTables,
        writers: &mut [Writer],
        rows: &mut [Row],
    ) {
        check(writers.len(), rows.len());
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::encode_thirds(lanes, tables, writers, rows),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::encode_thirds(lanes, tables, writers, rows),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => scalar::encode_thirds(lanes, tables, writers, rows),
            Self::Scalar => scalar::encode_thirds(lanes, tables, writers, rows),
        }
    }
}

fn check(streams: usize, rows: usize) {
    assert!(
        (1..=AT_ONCE).contains(&streams) && rows.is_multiple_of(streams),
        "a few streams of equally many rows"
    );
}

static KERNEL: LazyLock<Kernel> = LazyLock::new(|| Kernel::available()[0]);

/// Numbers up to this are found by comparing with their bounds: as many as take less time
/// than looking them up, and have room in [`crate::classes::BaseTables::packed`].
const MOST_BOUNDS: u8 = 24;

/// 2¹⁶ / 3, rounded up: a product's upper half is the quotient, for numbers below 2¹⁵.
#[cfg(target_arch = "x86_64")]
const THIRD: u16 = 21_846;
