use constriction::stream::Decode as _;
use constriction::stream::model::ContiguousCategoricalEntropyModel;
use constriction::stream::stack::AnsCoder;
use proptest::prelude::*;

use super::*;
use crate::classes::{DISTANCES, LARGEST, THIRDS, ZERO};

/// Classes of the lanes, and streams of rows of the finest level that they can code.
#[derive(Clone, Debug)]
struct Case {
    classes: [u8; LANES],
    streams: Vec<Vec<Row>>,
}

/// The parts of a stream: the states and the words of three levels.
type Parts = [Vec<u8>; 3];

impl Case {
    fn lanes(&self) -> Lanes<'_> {
        Lanes::new(&self.classes)
    }

    fn rows(&self) -> usize {
        self.streams[0].len()
    }

    fn encoded(&self, kernel: Kernel) -> Vec<Parts> {
        let mut writers: Vec<Writer> = self.streams.iter().map(|_| Writer::new()).collect();
        let mut parts = vec![Parts::default(); self.streams.len()];
        let mut rows = self.streams.concat();
        for writer in &mut writers {
            writer.begin(self.rows() * LANES);
        }
        for (level, tables) in [(2, &THIRDS[1]), (1, &THIRDS[0])] {
            kernel.encode_thirds(self.lanes(), tables, &mut writers, &mut rows);
            for (writer, parts) in writers.iter_mut().zip(&mut parts) {
                writer.write_words(&mut parts[level]);
            }
        }
        kernel.encode_base(self.lanes(), &mut writers, &mut rows);
        for (writer, parts) in writers.iter_mut().zip(&mut parts) {
            writer.write_states(&mut parts[0]);
            writer.write_words(&mut parts[0]);
        }
        parts
    }

    /// The rows of a level, and how every reader ended.
    fn decoded(
        &self,
        kernel: Kernel,
        parts: &[Parts],
        level: usize,
    ) -> Result<(Vec<Row>, String), StreamError> {
        let mut readers: Vec<Reader> = parts.iter().map(|_| Reader::new()).collect();
        let mut rows = vec![[0; LANES]; parts.len() * self.rows()];
        for (reader, parts) in readers.iter_mut().zip(parts) {
            let words = reader.begin(&parts[0])?;
            reader.go_on(words, self.rows() * LANES)?;
        }
        kernel.decode_base(self.lanes(), &mut readers, &mut rows);
        let mut ends = String::new();
        for finer in 1..=level {
            for (reader, parts) in readers.iter_mut().zip(parts) {
                ends += &format!("{:?}", reader.check_words());
                reader.go_on(&parts[finer], self.rows() * LANES)?;
            }
            kernel.decode_thirds(self.lanes(), &THIRDS[finer - 1], &mut readers, &mut rows);
        }
        for reader in &readers {
            ends += &format!("{:?} {:?}", reader.check_words(), reader.states);
        }
        Ok((rows, ends))
    }

    /// The numbers of a level.
    fn at(&self, level: usize) -> Vec<Row> {
        let mut rows = self.streams.concat();
        for _ in level..2 {
            for number in rows.iter_mut().flatten() {
                *number = (*number + number.signum()) / 3;
            }
        }
        rows
    }
}

fn case() -> impl Strategy<Value = Case> {
    let classes = prop_oneof![
        prop::collection::vec(0..=ZERO, LANES),
        prop::collection::vec(0..20u8, LANES),
        prop::collection::vec(5..9u8, LANES),
    ];
    (classes, 1..70usize, 1..=AT_ONCE, any::<u64>()).prop_map(|(classes, rows, streams, seed)| {
        let classes: [u8; LANES] = classes.try_into().unwrap();
        let mut state = seed | 1;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state >> 33
        };
        let mut row = |_| {
            classes.map(|class| {
                let largest = i64::from(BASE.largest[usize::from(class)]);
                let range = if class == ZERO { 0 } else { 9 * largest + 4 };
                // All there is, or what is likely.
                let range = if random() % 8 == 0 {
                    range
                } else {
                    range.min(1 << (class / 5))
                };
                let number = i64::try_from(random()).unwrap() % (2 * range + 1) - range;
                i16::try_from(number).unwrap()
            })
        };
        let streams = (0..streams)
            .map(|_| (0..rows).map(&mut row).collect())
            .collect();
        Case { classes, streams }
    })
}

/// Another implementation's rANS, lane by lane.
struct Oracle<'a> {
    states: [u32; LANES],
    words: &'a [u8],
}

impl<'a> Oracle<'a> {
    fn new(stream: &'a [u8]) -> Self {
        let (stored, words) = stream.split_first_chunk::<STATE_BYTES>().unwrap();
        let mut states = [0; LANES];
        for (state, &bytes) in states.iter_mut().zip(stored.as_chunks().0) {
            *state = u32::from_le_bytes(bytes);
        }
        Self { states, words }
    }

    /// Decodes a symbol; `renamed` says which slot of the model a slot stands for.
    fn symbol(&mut self, lane: usize, frequencies: &[u16], renamed: impl Fn(u32) -> u32) -> usize {
        let total = u32::from(TOTAL);
        let state = self.states[lane] / total * total + renamed(self.states[lane] % total);
        let kept: Vec<usize> = (0..frequencies.len())
            .filter(|&at| frequencies[at] > 0)
            .collect();
        if let [only] = kept[..] {
            return only;
        }
        let frequencies: Vec<u16> = kept.iter().map(|&at| frequencies[at]).collect();
        let model = ContiguousCategoricalEntropyModel::<u16, Vec<u16>, 11>
            ::from_nonzero_fixed_point_probabilities(&frequencies, false)
            .unwrap();
        let next = self.words.split_first_chunk();
        let bulk: Vec<u16> = next
            .iter()
            .map(|(word, _)| u16::from_le_bytes(**word))
            .collect();
        let mut coder = AnsCoder::<u16, u32>::from_raw_parts(bulk, state);
        let symbol = coder.decode_symbol(model).unwrap();
        let (rest, state) = coder.into_raw_parts();
        if let (Some((_, words)), true) = (next, rest.is_empty()) {
            self.words = words;
        }
        self.states[lane] = state;
        kept[symbol]
    }
}

/// What another implementation makes of a stream.
fn decoded_by_constriction(case: &Case, parts: &Parts) -> Vec<Row> {
    let mut oracle = Oracle::new(&parts[0]);
    let mut rows = vec![[0; LANES]; case.rows()];
    for row in &mut rows {
        for (lane, number) in row.iter_mut().enumerate() {
            let class = usize::from(case.classes[lane]);
            let codes = &BASE.codes[class * (LARGEST + 1)..][..=LARGEST];
            let of = |code: &u32| u16::try_from(code & 0xffff).unwrap();
            let zero = of(&codes[0]);
            // Zero's two halves side by side, then the positive and the negative numbers.
            let positive = codes[1..].iter().map(of);
            let all: Vec<u16> = std::iter::once(zero)
                .chain(positive.clone())
                .chain(positive)
                .collect();
            let (half, zero_half) = (u32::from(HALF), u32::from(zero / 2));
            let symbol = oracle.symbol(lane, &all, |slot| match slot {
                _ if slot < zero_half => slot,
                _ if slot < half => slot + zero_half,
                _ if slot < half + zero_half => slot - half + zero_half,
                _ => slot,
            });
            let symbol = i16::try_from(symbol).unwrap();
            *number = if symbol > 63 { 63 - symbol } else { symbol };
        }
    }
    for (words, tables) in parts[1..].iter().zip(THIRDS.iter()) {
        assert!(oracle.words.is_empty());
        oracle.words = words;
        for row in &mut rows {
            for (lane, number) in row.iter_mut().enumerate() {
                let distance = usize::from(number.unsigned_abs()).min(DISTANCES - 1);
                let class = usize::from(case.classes[lane]);
                let [a, b] = [tables.middle[distance][class], tables.away[distance][class]];
                let symbol = oracle.symbol(lane, &[a, b - a, TOTAL - b], |slot| slot);
                let third = i16::try_from(symbol).unwrap() - 1;
                *number = 3 * *number + if *number < 0 { -third } else { third };
            }
        }
    }
    assert!(oracle.words.is_empty() && oracle.states == [START; LANES]);
    rows
}

proptest! {
    #[test]
    fn kernels_agree_with_each_other_and_with_constriction(case in case()) {
        let reference = case.encoded(Kernel::Scalar);
        let decoded_elsewhere: Vec<Row> = reference
            .iter()
            .flat_map(|parts| decoded_by_constriction(&case, parts))
            .collect();
        prop_assert_eq!(decoded_elsewhere, case.at(2));
        for kernel in Kernel::available() {
            prop_assert_eq!(&case.encoded(kernel), &reference, "{:?}", kernel);
            for level in 0..3 {
                let (rows, ends) = case.decoded(kernel, &reference, level).unwrap();
                prop_assert_eq!(rows, case.at(level));
                prop_assert!(!ends.contains("Err"));
            }
        }
    }

    #[test]
    fn kernels_agree_on_damage(
        case in case(),
        flips in prop::collection::vec((0..3usize, any::<prop::sample::Index>(), 0..8u8), 0..4),
        (part, cut) in (0..3usize, any::<prop::sample::Index>()),
    ) {
        let mut parts = case.encoded(Kernel::Scalar);
        for (part, at, bit) in flips {
            let part = &mut parts[0][part];
            if !part.is_empty() {
                let at = at.index(part.len());
                part[at] ^= 1 << bit;
            }
        }
        let cut = cut.index(parts[0][part].len() + 1);
        for cut in [None, Some(cut)] {
            if let Some(cut) = cut {
                parts[0][part].truncate(cut);
            }
            let reference = case.decoded(Kernel::Scalar, &parts, 2);
            for kernel in Kernel::available() {
                prop_assert_eq!(&case.decoded(kernel, &parts, 2), &reference, "{:?}", kernel);
            }
        }
    }

    #[test]
    fn no_bytes_are_too_strange(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        class in 0..=ZERO,
    ) {
        let case = Case { classes: [class; LANES], streams: vec![vec![[0; LANES]; 4]] };
        let parts = [bytes.clone(), bytes.clone(), bytes];
        let reference = case.decoded(Kernel::Scalar, std::slice::from_ref(&parts), 2);
        for kernel in Kernel::available() {
            let other = case.decoded(kernel, std::slice::from_ref(&parts), 2);
            prop_assert_eq!(&other, &reference, "{:?}", kernel);
        }
    }
}

#[test]
fn every_truncation_of_a_level_is_an_error() {
    let row = |at: i16| std::array::from_fn(|lane| (at * 5 + i16::try_from(lane).unwrap()) % 13);
    let case = Case {
        classes: [17; LANES],
        streams: vec![(0..60).map(row).collect()],
    };
    for kernel in Kernel::available() {
        let parts = case.encoded(kernel);
        for level in 0..3 {
            assert!(!parts[0][level].is_empty());
            for cut in 0..parts[0][level].len() {
                let mut parts = parts.clone();
                parts[0][level].truncate(cut);
                let got = case.decoded(kernel, &parts, level);
                assert!(
                    got.map_or(true, |(_, ends)| ends.contains("Err")),
                    "{level} {cut}"
                );
            }
        }
    }
}

#[test]
fn a_number_that_is_certain_takes_nothing() {
    let case = Case {
        classes: [ZERO; LANES],
        streams: vec![vec![[0; LANES]; 64]; 2],
    };
    for kernel in Kernel::available() {
        let lengths = case.encoded(kernel)[1].each_ref().map(Vec::len);
        assert_eq!(lengths, [STATE_BYTES, 0, 0]);
    }
}

/// Every class and number, so that every frequency divides states of any size.
#[test]
fn kernels_divide_alike() {
    for class in 0..ZERO {
        let largest = i32::from(BASE.largest[usize::from(class)]);
        let range = 9 * largest + 4;
        let mut state = 1u32;
        let mut row = |_| {
            std::array::from_fn(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let number = (state >> 8).cast_signed() % (2 * range + 1) - range;
                i16::try_from(number).unwrap()
            })
        };
        let case = Case {
            classes: [class; LANES],
            streams: vec![(0..512).map(&mut row).collect()],
        };
        let reference = case.encoded(Kernel::Scalar);
        for kernel in Kernel::available() {
            assert!(case.encoded(kernel) == reference, "{kernel:?}, {class}");
        }
    }
}

#[test]
fn a_number_that_its_class_does_not_have_is_a_mistake() {
    for kernel in Kernel::available() {
        for (class, number) in [(ZERO, 1), (0, 3), (30, -64)] {
            let classes = [class; LANES];
            let result = std::panic::catch_unwind(|| {
                let mut writer = Writer::new();
                writer.begin(LANES);
                kernel.encode_base(Lanes::new(&classes), &mut [writer], &mut [[number; LANES]]);
            });
            assert!(result.is_err(), "{kernel:?}, {class}");
        }
    }
}

/// Rows of bytes, a few of them often, and the frequencies of each stream.
fn bytes() -> impl Strategy<Value = (Vec<[u16; 256]>, Vec<Vec<Row>>)> {
    let stream = |rows| {
        let byte = prop_oneof![4 => 120..126u8, 1 => any::<u8>()];
        prop::collection::vec(byte.prop_map(i16::from), rows * LANES)
    };
    (1..40usize, 1..=AT_ONCE)
        .prop_flat_map(move |(rows, streams)| prop::collection::vec(stream(rows), streams))
        .prop_map(|streams| {
            let of = |stream: &Vec<i16>| {
                let mut counts = [0; 256];
                for &byte in stream {
                    counts[usize::try_from(byte).unwrap()] += 1;
                }
                ByteTable::frequencies(&counts)
            };
            let frequencies = streams.iter().map(of).collect();
            let rows = |stream: Vec<i16>| stream.as_chunks().0.to_vec();
            (frequencies, streams.into_iter().map(rows).collect())
        })
}

proptest! {
    #[test]
    fn kernels_agree_on_bytes_with_each_other_and_with_constriction(
        (frequencies, streams) in bytes(),
        flip in prop::option::of((any::<prop::sample::Index>(), 0..8u8)),
    ) {
        let tables: Vec<_> = frequencies.iter().filter_map(ByteTable::new).collect();
        prop_assert_eq!(tables.len(), frequencies.len());
        let rows = streams.concat();
        let encoded = |kernel: Kernel| -> Vec<Vec<u8>> {
            let mut writers: Vec<Writer> = streams.iter().map(|_| Writer::new()).collect();
            writers.iter_mut().for_each(|writer| writer.begin(streams[0].len() * LANES));
            kernel.encode_bytes(&tables, &mut writers, &rows);
            let stream = |mut writer: Writer| {
                let mut out = Vec::new();
                writer.write_states(&mut out);
                writer.write_words(&mut out);
                out
            };
            writers.into_iter().map(stream).collect()
        };
        let decoded = |kernel: Kernel, encoded: &[Vec<u8>]| {
            let mut readers: Vec<Reader> = encoded.iter().map(|_| Reader::new()).collect();
            for (reader, stream) in readers.iter_mut().zip(encoded) {
                let words = reader.begin(stream).unwrap();
                reader.go_on(words, streams[0].len() * LANES).unwrap();
            }
            let mut rows = vec![[0; LANES]; rows.len()];
            kernel.decode_bytes(&tables, &mut readers, &mut rows);
            let end = |reader: &Reader| (reader.check_words(), reader.check_states());
            (rows, readers.iter().map(end).collect::<Vec<_>>())
        };
        let mut reference = encoded(Kernel::Scalar);
        for kernel in Kernel::available() {
            prop_assert_eq!(&encoded(kernel), &reference, "{:?}", kernel);
            let (got, ends) = decoded(kernel, &reference);
            prop_assert_eq!(&got, &rows);
            prop_assert!(ends.iter().all(|end| *end == (Ok(()), Ok(()))));
        }
        for ((stream, rows), frequencies) in reference.iter().zip(&streams).zip(&frequencies) {
            let mut oracle = Oracle::new(stream);
            for (at, &byte) in rows.iter().flatten().enumerate() {
                let symbol = oracle.symbol(at % LANES, frequencies, |slot| slot);
                prop_assert_eq!(symbol, usize::try_from(byte).unwrap());
            }
            prop_assert!(oracle.words.is_empty() && oracle.states == [START; LANES]);
        }
        if let Some((at, bit)) = flip {
            let at = at.index(reference[0].len());
            reference[0][at] ^= 1 << bit;
            let expected = decoded(Kernel::Scalar, &reference);
            for kernel in Kernel::available() {
                prop_assert_eq!(&decoded(kernel, &reference), &expected, "{:?}", kernel);
            }
        }
    }

    #[test]
    fn frequencies_add_up_whatever_the_counts(
        counts in prop::collection::vec(prop_oneof![Just(0), Just(1), 0..u32::MAX], 256),
        one in any::<u8>(),
    ) {
        let mut counts: [u32; 256] = counts.try_into().unwrap();
        counts[usize::from(one)] |= 1;
        let frequencies = ByteTable::frequencies(&counts);
        prop_assert!(ByteTable::new(&frequencies).is_some());
        let have = |(count, frequency): (&u32, &u16)| (*count > 0) == (*frequency > 0);
        prop_assert!(counts.iter().zip(&frequencies).all(have));
    }
}

#[test]
fn a_level_has_at_most_a_word_a_symbol() {
    let mut reader = Reader::new();
    assert_eq!(reader.go_on(&[0; 4 * LANES], 2 * LANES), Ok(()));
    let long = [0; 4 * LANES + 2];
    assert_eq!(
        reader.go_on(&long, 2 * LANES),
        Err(StreamError::Length(long.len()))
    );
    assert_eq!(reader.go_on(&[0; 3], LANES), Err(StreamError::Length(3)));
    assert_eq!(
        reader.begin(&[0; STATE_BYTES - 1]),
        Err(StreamError::Length(STATE_BYTES - 1))
    );
}
