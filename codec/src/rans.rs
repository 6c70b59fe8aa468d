//! Entropy coding: interleaved rANS over tables that both sides know.
//!
//! A stream holds `n` symbols, `n` a multiple of [`LANES`]. Position `p` belongs to lane
//! `p % LANES`; every lane is a range asymmetric numeral system (Duda, arXiv 1311.2540)
//! with a 32-bit state that is renormalised in words of 16 bits, and all lanes share one
//! sequence of words (Giesen, arXiv 1402.3392). Which table codes a position is not in the
//! stream: the caller knows it of both sides.
//!
//! ```text
//! stream := 32 × state (u32) ‖ words (u16), in the order in which they are read
//! ```
//!
//! All integers are little-endian. The decoder starts with the stored states, and every
//! lane of an undamaged stream ends with the state [`START`], after the last word.
//!
//! Kernels for AVX-512 and AVX2 are chosen at run time; all give the same bytes and
//! symbols as the scalar code here.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::LazyLock;

/// Lanes of a stream: a warp, two registers of AVX-512, or four of AVX2.
pub(crate) const LANES: usize = 32;

/// Probabilities are multiples of 2⁻¹¹.
pub(crate) const PRECISION: u32 = 11;
const TOTAL: u32 = 1 << PRECISION;

/// The least state, and the one that every lane of an encoder starts with.
const START: u32 = 1 << 16;

/// Bytes of the states before the words.
pub(crate) const STATE_BYTES: usize = 4 * LANES;

/// Tables by number. A symbol is its place in a table.
#[derive(Debug)]
pub(crate) struct Tables {
    /// `TOTAL` slots per table: symbol in bits 0–7, frequency in 8–19, slot within the
    /// symbol in 20–31.
    slots: Vec<u32>,
    /// By table and symbol.
    codes: Vec<Code>,
    /// Symbols that a table has at most.
    alphabet: usize,
}

/// How a symbol is coded.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Code {
    /// 1 ÷ frequency.
    reciprocal: f64,
    frequency: u32,
    /// The first slot.
    first: u32,
}

/// Why frequencies are not a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum TableError {
    /// They do not add up to the total.
    #[error("the frequencies of a table add up to {0}, not to {TOTAL}")]
    Total(u64),
    /// More symbols than a byte can name.
    #[error("a table has {0} symbols, at most 256 are possible")]
    Alphabet(usize),
}

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

impl Tables {
    /// Tables from the frequencies of their symbols, which add up to 2¹¹ in each. A symbol
    /// of frequency zero cannot be coded.
    ///
    /// # Errors
    /// Frequencies that are not those of a table.
    pub(crate) fn new(tables: &[Vec<u16>]) -> Result<Self, TableError> {
        let alphabet = tables.iter().map(Vec::len).max().unwrap_or(0);
        if alphabet > 256 {
            return Err(TableError::Alphabet(alphabet));
        }
        let mut slots = Vec::with_capacity(tables.len() << PRECISION);
        let mut codes = vec![Code::default(); tables.len() * alphabet];
        for (frequencies, codes) in tables.iter().zip(codes.chunks_mut(alphabet.max(1))) {
            let total = frequencies.iter().map(|&f| u64::from(f)).sum();
            if total != u64::from(TOTAL) {
                return Err(TableError::Total(total));
            }
            let mut first = 0;
            for (symbol, (&frequency, code)) in (0u32..).zip(frequencies.iter().zip(codes)) {
                let frequency = u32::from(frequency);
                *code = Code {
                    reciprocal: 1.0 / f64::from(frequency),
                    frequency,
                    first,
                };
                slots.extend((0..frequency).map(|slot| symbol | frequency << 8 | slot << 20));
                first += frequency;
            }
        }
        Ok(Self {
            slots,
            codes,
            alphabet,
        })
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() >> PRECISION
    }

    /// Whether a symbol can be coded.
    pub(crate) fn has(&self, table: u8, symbol: u8) -> bool {
        usize::from(symbol) < self.alphabet && self.code(table, symbol).frequency > 0
    }

    /// What coding a symbol takes, in bits.
    #[cfg(test)]
    fn cost(&self, table: u8, symbol: u8) -> f64 {
        f64::from(PRECISION) - f64::from(self.code(table, symbol).frequency).log2()
    }

    fn code(&self, table: u8, symbol: u8) -> Code {
        self.codes[usize::from(table) * self.alphabet + usize::from(symbol)]
    }

    /// Appends a stream to `out`: `symbols[p]` coded by table `tables[p % tables.len()]`.
    ///
    /// # Panics
    /// The number of symbols, or of tables, is not a multiple of [`LANES`]; or a symbol
    /// is one that [its table does not have](Self::has).
    pub(crate) fn encode(&self, symbols: &[u8], tables: &[u8], out: &mut Vec<u8>) {
        assert!(
            symbols.len().is_multiple_of(LANES) && tables.len().is_multiple_of(LANES),
            "whole rows of lanes"
        );
        self.encode_with(*KERNEL, symbols, tables, out);
    }

    fn encode_with(&self, kernel: Kernel, symbols: &[u8], tables: &[u8], out: &mut Vec<u8>) {
        let mut words = Words::new(symbols.len());
        let states = match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => x86::encode(self, symbols, tables, &mut words),
            _ => self.encode_scalar(symbols, tables, &mut words),
        };
        for state in states {
            out.extend_from_slice(&state.to_le_bytes());
        }
        let (words, end) = (words.written(), out.len());
        out.resize(end + 2 * words.len(), 0);
        let slots = out[end..].as_chunks_mut().0;
        for (slot, word) in slots.iter_mut().zip(words) {
            *slot = word.to_le_bytes();
        }
    }

    fn encode_scalar(&self, symbols: &[u8], tables: &[u8], words: &mut Words) -> [u32; LANES] {
        let mut states = [START; LANES];
        for (position, &symbol) in symbols.iter().enumerate().rev() {
            let code = self.code(tables[position % tables.len()], symbol);
            assert!(code.frequency > 0, "the table has this symbol");
            let state = &mut states[position % LANES];
            if u64::from(*state) >= u64::from(code.frequency) << (32 - PRECISION) {
                words.push(*state);
                *state >>= 16;
            }
            let (quotient, rest) = (*state / code.frequency, *state % code.frequency);
            *state = (quotient << PRECISION) + code.first + rest;
        }
        states
    }

    /// Decodes several streams of as many symbols each; `outputs[s][p]` becomes what table
    /// `tables[s][p % tables[s].len()]` says. Streams that are decoded together take less
    /// time than one after the other.
    ///
    /// # Errors
    /// Every truncation is one, and most damage; the outputs then hold anything.
    ///
    /// # Panics
    /// As for [`encode`](Self::encode), with outputs in place of symbols; or the numbers of
    /// streams, tables and outputs, or the lengths of the outputs, differ; or there is no
    /// such table.
    pub(crate) fn decode(
        &self,
        streams: &[&[u8]],
        tables: &[&[u8]],
        outputs: &mut [&mut [u8]],
    ) -> Result<(), StreamError> {
        self.decode_with(*KERNEL, streams, tables, outputs)
    }

    fn decode_with(
        &self,
        kernel: Kernel,
        streams: &[&[u8]],
        tables: &[&[u8]],
        outputs: &mut [&mut [u8]],
    ) -> Result<(), StreamError> {
        assert!(
            streams.len() == outputs.len() && streams.len() == tables.len(),
            "one table list and one output a stream"
        );
        let mut streams =
            streams
                .iter()
                .zip(tables)
                .zip(outputs)
                .map(|((&stream, &tables), output)| {
                    assert!(
                        output.len().is_multiple_of(LANES) && tables.len().is_multiple_of(LANES),
                        "whole rows of lanes"
                    );
                    let last = tables.iter().copied().max().unwrap_or(0);
                    assert!(usize::from(last) < self.len(), "there is no such table");
                    Reader::new(stream, output.len()).map(|reader| (reader, tables, &mut **output))
                });
        let mut batch = Vec::with_capacity(MOST_AT_ONCE);
        loop {
            batch.clear();
            for stream in streams.by_ref().take(MOST_AT_ONCE) {
                batch.push(stream?);
            }
            if batch.is_empty() {
                return Ok(());
            }
            match kernel {
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx512 => x86::decode_avx512(self, &mut batch),
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => x86::decode_avx2(self, &mut batch),
                Kernel::Scalar => {
                    for (reader, tables, output) in &mut batch {
                        self.decode_scalar(reader, tables, output);
                    }
                }
            }
            if batch.iter().any(|(reader, _, _)| !reader.is_done()) {
                return Err(StreamError::Damaged);
            }
        }
    }

    fn decode_scalar(&self, reader: &mut Reader, tables: &[u8], output: &mut [u8]) {
        for (position, symbol) in output.iter_mut().enumerate() {
            let state = &mut reader.states[position % LANES];
            let table = usize::from(tables[position % tables.len()]);
            let slot = self.slots[table << PRECISION | (*state & (TOTAL - 1)) as usize];
            *symbol = slot.to_le_bytes()[0];
            *state = (slot >> 8 & 0xfff) * (*state >> PRECISION) + (slot >> 20);
            if *state < START {
                let word = reader.words.get(reader.next).copied().unwrap_or(0);
                *state = *state << 16 | u32::from(word);
                reader.next += 1;
            }
        }
    }
}

/// Words on their way out of an encoder, last one first.
struct Words {
    words: Vec<u16>,
    /// Words from here on are written.
    next: usize,
}

impl Words {
    /// Room for what `symbols` symbols take at most, and for one register too much.
    fn new(symbols: usize) -> Self {
        let room = symbols + LANES;
        Self {
            words: vec![0; room],
            next: room,
        }
    }

    /// The lower half of a state.
    fn push(&mut self, state: u32) {
        let [a, b, ..] = state.to_le_bytes();
        self.next -= 1;
        self.words[self.next] = u16::from_le_bytes([a, b]);
    }

    fn written(&self) -> &[u16] {
        &self.words[self.next..]
    }
}

/// A stream that is being decoded.
struct Reader {
    states: [u32; LANES],
    /// The words, and zeros that a kernel may read beyond them.
    words: Vec<u16>,
    next: usize,
    end: usize,
}

impl Reader {
    fn new(stream: &[u8], symbols: usize) -> Result<Self, StreamError> {
        let error = StreamError::Length(stream.len());
        let (states, words) = stream.split_at_checked(STATE_BYTES).ok_or(error)?;
        // A symbol reads at most one word.
        if words.len() > 2 * symbols || !words.len().is_multiple_of(2) {
            return Err(error);
        }
        let (states, _) = states.as_chunks();
        let end = words.len() / 2;
        let mut reader = Self {
            states: [0; LANES],
            words: vec![0; end + LANES],
            next: 0,
            end,
        };
        for (word, &bytes) in reader.words.iter_mut().zip(words.as_chunks().0) {
            *word = u16::from_le_bytes(bytes);
        }
        for (state, &bytes) in reader.states.iter_mut().zip(states) {
            *state = u32::from_le_bytes(bytes);
        }
        Ok(reader)
    }

    fn is_done(&self) -> bool {
        self.next == self.end && self.states == [START; LANES]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Scalar,
}

impl Kernel {
    /// Those that this CPU has, best first.
    fn available() -> Vec<Self> {
        let mut kernels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if x86::has_avx512() {
                kernels.push(Self::Avx512);
            }
            if x86::has_avx2() {
                kernels.push(Self::Avx2);
            }
        }
        kernels.push(Self::Scalar);
        kernels
    }
}

static KERNEL: LazyLock<Kernel> = LazyLock::new(|| Kernel::available()[0]);

/// Streams that one kernel decodes at once: enough for the latency of one to be hidden
/// behind the others.
const MOST_AT_ONCE: usize = 4;

#[cfg(test)]
mod tests {
    use constriction::stream::Decode as _;
    use constriction::stream::model::ContiguousCategoricalEntropyModel;
    use constriction::stream::stack::AnsCoder;
    use proptest::prelude::*;

    use super::*;

    /// Three tables: one steep, one even, one that has a single symbol.
    fn frequencies() -> Vec<Vec<u16>> {
        let steep = vec![1, 40, 1900, 100, 6, 1];
        let even = vec![341, 341, 341, 341, 342, 342];
        vec![steep, even, vec![0, 0, 2048]]
    }

    fn tables() -> Tables {
        Tables::new(&frequencies()).unwrap()
    }

    /// Symbols and tables of so many rows; the tables repeat every `period` rows.
    fn stream() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        (1..200usize, 1..4usize).prop_flat_map(|(rows, period)| {
            let symbols = prop::collection::vec(0..6u8, rows * LANES);
            let numbers = prop::collection::vec(0..3u8, period * LANES);
            (symbols, numbers).prop_map(|(mut symbols, numbers)| {
                for (symbol, table) in symbols.iter_mut().zip(numbers.iter().cycle()) {
                    if *table == 2 {
                        *symbol = 2;
                    }
                }
                (symbols, numbers)
            })
        })
    }

    fn encoded(kernel: Kernel, symbols: &[u8], numbers: &[u8]) -> Vec<u8> {
        let mut out = vec![7];
        tables().encode_with(kernel, symbols, numbers, &mut out);
        assert_eq!(out.remove(0), 7, "it appends");
        out
    }

    fn decoded(
        kernel: Kernel,
        streams: &[&[u8]],
        numbers: &[u8],
        symbols: usize,
    ) -> Result<Vec<Vec<u8>>, StreamError> {
        let mut outputs = vec![vec![0; symbols]; streams.len()];
        let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
        let numbers = vec![numbers; streams.len()];
        tables().decode_with(kernel, streams, &numbers, &mut slices)?;
        Ok(outputs)
    }

    /// What another implementation makes of a stream, lane by lane.
    fn decoded_by_constriction(stream: &[u8], numbers: &[u8], symbols: usize) -> Vec<u8> {
        let frequencies = frequencies();
        let models: Vec<_> = frequencies
            .iter()
            .take(2)
            .map(|frequencies| {
                ContiguousCategoricalEntropyModel::<u16, Vec<u16>, 11>
                ::from_nonzero_fixed_point_probabilities(frequencies, false).unwrap()
            })
            .collect();
        let (states, words) = stream.split_at(STATE_BYTES);
        let mut states: Vec<u32> = states
            .chunks(4)
            .map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        let mut words = words
            .chunks(2)
            .map(|bytes| u16::from_le_bytes(bytes.try_into().unwrap()));
        let mut next = words.next();
        let symbols = (0..symbols)
            .map(|position| {
                let state = &mut states[position % LANES];
                let Some(model) = models.get(usize::from(numbers[position % numbers.len()])) else {
                    return 2;
                };
                let bulk: Vec<u16> = next.into_iter().collect();
                let mut coder = AnsCoder::<u16, u32>::from_raw_parts(bulk, *state);
                let symbol = coder.decode_symbol(model).unwrap();
                let (rest, after) = coder.into_raw_parts();
                if rest.is_empty() && next.is_some() {
                    next = words.next();
                }
                *state = after;
                symbol.to_le_bytes()[0]
            })
            .collect();
        assert_eq!(next, None);
        symbols
    }

    proptest! {
        #[test]
        fn kernels_agree_with_each_other_and_with_constriction(
            (symbols, numbers) in stream(),
            copies in 1..10usize,
        ) {
            let reference = encoded(Kernel::Scalar, &symbols, &numbers);
            let decoded_elsewhere = decoded_by_constriction(&reference, &numbers, symbols.len());
            prop_assert_eq!(&decoded_elsewhere, &symbols);
            for kernel in Kernel::available() {
                prop_assert_eq!(&encoded(kernel, &symbols, &numbers), &reference);
                let streams = vec![reference.as_slice(); copies];
                let outputs = decoded(kernel, &streams, &numbers, symbols.len()).unwrap();
                prop_assert!(outputs.iter().all(|output| *output == symbols));
            }
        }

        #[test]
        fn kernels_agree_on_damage(
            (symbols, numbers) in stream(),
            flips in prop::collection::vec((any::<prop::sample::Index>(), 0..8u8), 0..4),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut stream = encoded(Kernel::Scalar, &symbols, &numbers);
            for (at, bit) in flips {
                let at = at.index(stream.len());
                stream[at] ^= 1 << bit;
            }
            let cut = &stream[..cut.index(stream.len() + 1)];
            for stream in [stream.as_slice(), cut] {
                let reference = decoded(Kernel::Scalar, &[stream], &numbers, symbols.len());
                for kernel in Kernel::available() {
                    let other = decoded(kernel, &[stream], &numbers, symbols.len());
                    prop_assert_eq!(&other, &reference);
                }
            }
        }

        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            for kernel in Kernel::available() {
                let _ = decoded(kernel, &[&bytes], &[1; LANES], 4 * LANES);
            }
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let symbols: Vec<u8> = (0..8 * LANES).map(|at| (at % 6).to_le_bytes()[0]).collect();
        let stream = encoded(Kernel::Scalar, &symbols, &[1; LANES]);
        for kernel in Kernel::available() {
            for cut in 0..stream.len() {
                let got = decoded(kernel, &[&stream[..cut]], &[1; LANES], symbols.len());
                assert!(got.is_err(), "{kernel:?}, {cut}");
            }
        }
    }

    #[test]
    fn a_symbol_that_is_certain_takes_nothing() {
        let stream = encoded(Kernel::Scalar, &[2; 1024], &[2; LANES]);
        assert_eq!(stream.len(), STATE_BYTES);
        assert_eq!(tables().cost(2, 2), 0.0);
    }

    #[test]
    fn streams_take_what_their_tables_say() {
        let tables = tables();
        let symbols: Vec<u8> = (0..1024u32)
            .map(|at| 1 + (at * 7919 % 4).to_le_bytes()[0])
            .collect();
        let bits: f64 = symbols.iter().map(|&symbol| tables.cost(1, symbol)).sum();
        let stream = encoded(Kernel::Scalar, &symbols, &[1; LANES]);
        let taken = f64::from(u32::try_from(8 * stream.len()).unwrap());
        // The states hold 16 bits a lane of it.
        assert!(
            (taken - bits - 16.0 * 32.0).abs() < 16.0 * 32.0,
            "{taken} {bits}"
        );
    }

    #[test]
    fn frequencies_that_are_no_table_are_refused() {
        assert_eq!(
            Tables::new(&[vec![1, 2]]).unwrap_err(),
            TableError::Total(3)
        );
        assert_eq!(
            Tables::new(&[vec![8; 257]]).unwrap_err(),
            TableError::Alphabet(257)
        );
    }

    #[test]
    #[should_panic(expected = "symbol")]
    fn a_symbol_that_its_table_does_not_have_is_a_mistake() {
        encoded(*KERNEL, &[1; LANES], &[2; LANES]);
    }
}
