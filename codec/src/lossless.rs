//! The exact coding of one layer of a chunk.
//!
//! What repeats in numbers that look random is their size: the exponents. So the bytes of
//! every head are sorted into planes, most significant first, after the sign went from the
//! top of a number to its end, where it does not split the exponent; and a plane that
//! shrinks is coded by how frequent its bytes are ([`crate::rans`]): there is nothing else to
//! find.
//!
//! ```text
//! layer := block × length (u32) ‖ block × bytes     by plane, head, byte of a number
//! block := bytes as they are, or
//!          which bytes occur (256 bits) ‖ frequency - 1 (LEB128) of each that does
//!          ‖ last bytes, up to 31, as they are ‖ states ‖ words
//! ```
//!
//! A block as long as its plane is the bytes as they are. All integers are little-endian.

use kvasir_types::{DType, HeadRange, KvLayout, Plane};
use multiversion::multiversion;

use crate::part::write_length;
use crate::rans::{self, AT_ONCE, ByteTable, LANES, Reader, Row, StreamError, Writer};

/// Why the bytes of an exactly coded layer cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LosslessError {
    /// The lengths of its blocks are not those of its bytes.
    #[error("an exactly coded layer of {0} bytes is not as long as it states")]
    Length(usize),
    /// A block ends before its bytes do, or has no table of them.
    #[error("a coded block is damaged")]
    Block,
    /// The bytes of a block cannot be decoded.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// Codes a raw layer.
///
/// # Panics
/// The layer has not the bytes that the layout says.
pub fn encode_lossless(layout: &KvLayout, raw: &[u8]) -> Vec<u8> {
    assert_eq!(raw.len(), layout.layer_bytes(), "a layer of the layout");
    let size = layout.dtype().bytes();
    let mut coder = Coder::default();
    let mut lengths = Vec::new();
    let mut blocks = Vec::with_capacity(raw.len());
    let mut planes = Vec::new();
    for heads in batches(layout) {
        let raw: Vec<&[u8]> = heads.into_iter().filter_map(|head| raw.get(head)).collect();
        let len = raw.first().map_or(0, |head| head.len() / size);
        planes.resize(raw.len() * size * len, 0);
        for (head, planes) in raw.iter().zip(planes.chunks_exact_mut(size * len)) {
            split(layout.dtype(), head, planes);
        }
        coder.encode(&planes, len, |block| {
            let len = u32::try_from(block.len()).expect("a head has less than 2^30 bytes");
            lengths.extend_from_slice(&len.to_le_bytes());
            blocks.extend_from_slice(block);
        });
    }
    lengths.extend(blocks);
    lengths
}

/// Decodes a layer into its raw form.
///
/// # Errors
/// Every truncation, and most damage; `raw` then holds anything.
///
/// # Panics
/// `raw` has not the bytes that the layout says.
pub fn decode_lossless(
    layout: &KvLayout,
    bytes: &[u8],
    raw: &mut [u8],
) -> Result<(), LosslessError> {
    assert_eq!(raw.len(), layout.layer_bytes(), "a layer of the layout");
    let error = LosslessError::Length(bytes.len());
    let size = layout.dtype().bytes();
    let count = heads(layout).count() * size;
    let (lengths, mut blocks) = bytes.split_at_checked(4 * count).ok_or(error)?;
    let mut lengths = lengths.as_chunks().0.iter();
    let mut decoder = Decoder::default();
    let mut planes = Vec::new();
    for heads in batches(layout) {
        let len = heads.first().map_or(0, |head| head.len() / size);
        planes.resize(heads.len() * size * len, 0);
        let mut of_planes = Vec::with_capacity(heads.len() * size);
        for &length in lengths.by_ref().take(heads.len() * size) {
            let length = u32::from_le_bytes(length) as usize;
            let (block, rest) = blocks.split_at_checked(length).ok_or(error)?;
            blocks = rest;
            of_planes.push(block);
        }
        decoder.decode(&of_planes, &mut planes, len)?;
        for (head, planes) in heads.into_iter().zip(planes.chunks_exact(size * len)) {
            if let Some(head) = raw.get_mut(head) {
                join(layout.dtype(), planes, head);
            }
        }
    }
    if blocks.is_empty() {
        Ok(())
    } else {
        Err(error)
    }
}

/// Codes byte planes, and keeps its buffers.
#[derive(Default)]
struct Coder {
    writers: Vec<Writer>,
    rows: Vec<Row>,
}

impl Coder {
    /// Gives `add` a block for each plane of `len` bytes, in order.
    fn encode(&mut self, planes: &[u8], len: usize, mut add: impl FnMut(&[u8])) {
        let frequencies: Vec<Option<[u16; 256]>> =
            planes.chunks_exact(len).map(frequencies_of).collect();
        let coded = planes.chunks_exact(len).zip(&frequencies);
        let mut coded = coded.filter_map(|(plane, of)| Some((plane, of.as_ref()?)));
        let mut blocks = Vec::new();
        loop {
            let batch: Vec<(&[u8], &[u16; 256])> = coded.by_ref().take(AT_ONCE).collect();
            if batch.is_empty() {
                break;
            }
            self.encode_some(&batch, &mut blocks);
        }
        let mut blocks = blocks.iter();
        for (plane, frequencies) in planes.chunks_exact(len).zip(&frequencies) {
            let block = frequencies.and_then(|_| blocks.next());
            // What hardly shrinks is not worth the time to decode it.
            let block = block.filter(|block: &&Vec<u8>| block.len() < len / 64 * 63);
            add(block.map_or(plane, Vec::as_slice));
        }
    }

    fn encode_some(&mut self, batch: &[(&[u8], &[u16; 256])], blocks: &mut Vec<Vec<u8>>) {
        self.rows.clear();
        let mut tables = Vec::with_capacity(batch.len());
        for (plane, frequencies) in batch {
            let (rows, _) = plane.as_chunks::<LANES>();
            self.rows.extend(rows.iter().map(|row| row.map(i16::from)));
            tables.push(ByteTable::new(frequencies).expect("frequencies that add up"));
        }
        self.writers.resize_with(batch.len(), Writer::new);
        for (writer, (plane, _)) in self.writers.iter_mut().zip(batch) {
            writer.begin(plane.len());
        }
        rans::encode_bytes(&tables, &mut self.writers, &self.rows);
        for (writer, (plane, frequencies)) in self.writers.iter_mut().zip(batch) {
            let mut block = Vec::with_capacity(plane.len() / 2);
            write_frequencies(frequencies, &mut block);
            block.extend_from_slice(plane.as_chunks::<LANES>().1);
            writer.write_states(&mut block);
            writer.write_words(&mut block);
            blocks.push(block);
        }
    }
}

/// Decodes byte planes, and keeps its buffers.
#[derive(Default)]
struct Decoder {
    readers: Vec<Reader>,
    rows: Vec<Row>,
}

impl Decoder {
    fn decode(
        &mut self,
        blocks: &[&[u8]],
        planes: &mut [u8],
        len: usize,
    ) -> Result<(), LosslessError> {
        let mut coded = Vec::with_capacity(AT_ONCE);
        for (block, plane) in blocks.iter().zip(planes.chunks_exact_mut(len)) {
            if block.len() == plane.len() {
                plane.copy_from_slice(block);
                continue;
            }
            coded.push((*block, plane));
            if coded.len() == AT_ONCE {
                self.decode_some(&mut coded)?;
            }
        }
        self.decode_some(&mut coded)
    }

    fn decode_some(&mut self, coded: &mut Vec<(&[u8], &mut [u8])>) -> Result<(), LosslessError> {
        let Some(len) = coded.first().map(|(_, plane)| plane.len()) else {
            return Ok(());
        };
        let rows = len / LANES;
        self.rows.resize(coded.len() * rows, [0; LANES]);
        self.readers.resize_with(coded.len(), Reader::new);
        let mut tables = Vec::with_capacity(coded.len());
        for (reader, (block, plane)) in self.readers.iter_mut().zip(coded.iter_mut()) {
            let (table, rest) = read_frequencies(block).ok_or(LosslessError::Block)?;
            tables.push(table);
            let (_, last) = plane.as_chunks_mut::<LANES>();
            let bytes = rest.split_at_checked(last.len());
            let (bytes, stream) = bytes.ok_or(LosslessError::Block)?;
            last.copy_from_slice(bytes);
            let words = reader.begin(stream)?;
            reader.go_on(words, rows * LANES)?;
        }
        if rows > 0 {
            rans::decode_bytes(&tables, &mut self.readers, &mut self.rows);
        }
        for (at, (reader, (_, plane))) in self.readers.iter().zip(coded.drain(..)).enumerate() {
            reader.check_words()?;
            reader.check_states()?;
            let (to, _) = plane.as_chunks_mut();
            narrow(&self.rows[at * rows..][..rows], to);
        }
        Ok(())
    }
}

/// The frequencies that a plane is worth coding by.
fn frequencies_of(plane: &[u8]) -> Option<[u16; 256]> {
    // A few bytes tell what is too even to shrink.
    let some: Vec<u8> = plane
        .iter()
        .step_by(plane.len().div_ceil(SAMPLE))
        .copied()
        .collect();
    if some.len() == SAMPLE && bits(&counts(&some)) > TOO_EVEN {
        return None;
    }
    (plane.len() >= LANES).then(|| ByteTable::frequencies(&counts(plane)))
}

fn counts(bytes: &[u8]) -> [u32; 256] {
    // Several, so that equal bytes in a row need not wait for each other.
    let mut counts = [[0u32; 256]; 4];
    let (fours, rest) = bytes.as_chunks::<4>();
    for four in fours {
        for (counts, &byte) in counts.iter_mut().zip(four) {
            counts[usize::from(byte)] += 1;
        }
    }
    let [mut all, others @ ..] = counts;
    for byte in rest {
        all[usize::from(*byte)] += 1;
    }
    for others in others {
        all.iter_mut()
            .zip(others)
            .for_each(|(sum, count)| *sum += count);
    }
    all
}

/// The entropy of a byte.
fn bits(counts: &[u32; 256]) -> f64 {
    let all: f64 = counts.iter().map(|&count| f64::from(count)).sum();
    let share = |&count: &u32| f64::from(count) / all;
    let all = counts.iter().filter(|count| **count > 0).map(share);
    all.map(|share| -share * share.log2()).sum()
}

fn write_frequencies(frequencies: &[u16; 256], out: &mut Vec<u8>) {
    let (eights, _) = frequencies.as_chunks::<8>();
    out.extend(eights.iter().map(|eight| {
        let bit = |(at, &frequency): (usize, &u16)| u8::from(frequency > 0) << at;
        eight.iter().enumerate().map(bit).sum::<u8>()
    }));
    for &frequency in frequencies.iter().filter(|frequency| **frequency > 0) {
        write_length(u32::from(frequency - 1), out);
    }
}

/// The table at the start of a block, and what follows.
fn read_frequencies(block: &[u8]) -> Option<(ByteTable, &[u8])> {
    let (occur, mut rest) = block.split_first_chunk::<32>()?;
    let mut frequencies = [0; 256];
    for (at, frequency) in frequencies.iter_mut().enumerate() {
        if occur[at / 8] >> (at % 8) & 1 == 0 {
            continue;
        }
        let (&[low], after) = rest.split_first_chunk()?;
        rest = after;
        *frequency = u16::from(low & 0x7f) + 1;
        if low & 0x80 != 0 {
            let (&[high], after) = rest.split_first_chunk()?;
            rest = after;
            *frequency += u16::from(high) << 7;
        }
    }
    Some((ByteTable::new(&frequencies)?, rest))
}

/// Numbers that are bytes.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn narrow(rows: &[Row], bytes: &mut [[u8; LANES]]) {
    for (bytes, row) in bytes.iter_mut().zip(rows) {
        for (byte, number) in bytes.iter_mut().zip(row) {
            [*byte, _] = number.to_le_bytes();
        }
    }
}

/// Where the heads of a layer lie, in order.
fn heads(layout: &KvLayout) -> impl Iterator<Item = std::ops::Range<usize>> {
    [Plane::Key, Plane::Value]
        .into_iter()
        .flat_map(move |plane| {
            let one = |head| HeadRange::new(head, head + 1).ok();
            (0..layout.kv_heads()).filter_map(move |head| layout.head_slice(plane, one(head)?))
        })
}

/// As many of them as are coded at once, all of one plane.
fn batches(layout: &KvLayout) -> Vec<Vec<std::ops::Range<usize>>> {
    let mut batches: Vec<Vec<std::ops::Range<usize>>> = Vec::new();
    for head in heads(layout) {
        match batches.last_mut() {
            Some(batch) if batch.len() < AT_ONCE && batch[0].len() == head.len() => {
                batch.push(head);
            }
            _ => batches.push(vec![head]),
        }
    }
    batches
}

/// Sorts the bytes of numbers into planes.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn split(dtype: DType, head: &[u8], planes: &mut [u8]) {
    match dtype.bytes() {
        4 => {
            let len = head.len() / 4;
            for (at, &number) in head.as_chunks().0.iter().enumerate() {
                let bytes = u32::from_le_bytes(number).rotate_left(1).to_be_bytes();
                for (plane, byte) in bytes.into_iter().enumerate() {
                    planes[plane * len + at] = byte;
                }
            }
        }
        2 => {
            let (high, low) = planes.split_at_mut(head.len() / 2);
            for ((high, low), &number) in high.iter_mut().zip(low).zip(head.as_chunks().0) {
                [*high, *low] = u16::from_le_bytes(number).rotate_left(1).to_be_bytes();
            }
        }
        _ => planes.copy_from_slice(head),
    }
}

/// The opposite.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn join(dtype: DType, planes: &[u8], head: &mut [u8]) {
    match dtype.bytes() {
        4 => {
            let len = head.len() / 4;
            for (at, number) in head.as_chunks_mut().0.iter_mut().enumerate() {
                let bytes = [0, 1, 2, 3].map(|plane| planes[plane * len + at]);
                *number = u32::from_be_bytes(bytes).rotate_right(1).to_le_bytes();
            }
        }
        2 => {
            let (high, low) = planes.split_at(head.len() / 2);
            for (number, (&high, &low)) in
                head.as_chunks_mut().0.iter_mut().zip(high.iter().zip(low))
            {
                *number = u16::from_be_bytes([high, low])
                    .rotate_right(1)
                    .to_le_bytes();
            }
        }
        _ => head.copy_from_slice(planes),
    }
}

/// Bytes of a plane that tell whether it is too even.
const SAMPLE: usize = 2048;
/// Bits a byte of such a sample, of which 7.9 are what even bytes have.
const TOO_EVEN: f64 = 7.85;

#[cfg(test)]
mod tests {
    use half::bf16;
    use kvasir_types::Planes;
    use proptest::prelude::*;

    use super::*;

    fn layout(dtype: DType) -> KvLayout {
        let planes = Planes::KeyValue {
            key_dim: 12,
            value_dim: 9,
        };
        KvLayout::new(1, 3, planes, 17, dtype).unwrap()
    }

    fn decoded(layout: &KvLayout, bytes: &[u8]) -> Result<Vec<u8>, LosslessError> {
        let mut raw = vec![0; layout.layer_bytes()];
        decode_lossless(layout, bytes, &mut raw)?;
        Ok(raw)
    }

    #[test]
    fn numbers_of_similar_size_take_less() {
        let layout = KvLayout::new(1, 2, Planes::symmetric(64), 256, DType::Bf16).unwrap();
        let mut state = 1u32;
        let raw: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16::from_f32(f32::from((state >> 16) as u16) / 32_768.0 - 1.0).to_le_bytes()
        })
        .take(layout.layer_bytes() / 2)
        .flatten()
        .collect();
        let encoded = encode_lossless(&layout, &raw);
        assert_eq!(decoded(&layout, &encoded).unwrap(), raw);
        assert!(encoded.len() * 4 < raw.len() * 3, "{}", encoded.len());
    }

    proptest! {
        #[test]
        fn every_bit_comes_back(
            dtype in prop::sample::select(DType::ALL.to_vec()),
            bytes in prop::collection::vec(any::<u8>(), 1..200),
        ) {
            let layout = layout(dtype);
            let raw: Vec<u8> = bytes.iter().copied().cycle().take(layout.layer_bytes()).collect();
            let encoded = encode_lossless(&layout, &raw);
            prop_assert_eq!(decoded(&layout, &encoded).unwrap(), raw);
        }

        #[test]
        fn damage_is_an_error_or_other_bytes_and_no_panic(
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let layout = layout(DType::Bf16);
            let raw: Vec<u8> = (0..layout.layer_bytes()).map(|at| (at % 5).to_le_bytes()[0]).collect();
            let mut encoded = encode_lossless(&layout, &raw);
            let at = at.index(encoded.len());
            encoded[at] = byte;
            let _ = decoded(&layout, &encoded);
            encoded.truncate(at);
            prop_assert!(decoded(&layout, &encoded).is_err());
        }
    }
}
