//! Kernels for AVX2, with FMA. [`super::scalar`] says what they compute, and the kernels for
//! AVX-512 how: here a row is two registers of 16 lanes, masks are registers too, and words
//! find their lanes by tables of eight lanes.

#![expect(
    unsafe_code,
    reason = "features are checked at run time, and gathers take pointers"
)]

use std::arch::x86_64::*;

use super::spread::{NOTHING, SPREAD};
use super::{ByteTable, LANES, Lanes, PRECISION, Reader, Row, States, TOTAL};
use crate::classes::{BASE, DISTANCES, LARGEST, NUMBER_BIT, SLOT_ZERO, ThirdTables};

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("popcnt")
}

/// Calls a kernel, given by its name, with one stream after the other: the two halves of a
/// row hide some of each other's latency, and there are no registers for more.
macro_rules! with_streams {
    ($kernel:ident($($argument:expr),*; $streams:expr, $rows:expr)) => {{
        assert!(is_available(), "checked when the kernel was chosen");
        let tokens = $rows.len() / $streams.len();
        for (at, stream) in $streams.iter_mut().enumerate() {
            let rows = &mut $rows[at * tokens..][..tokens];
            // SAFETY: the CPU has the features.
            unsafe { $kernel($($argument,)* stream, rows) }
        }
    }};
}

mod encode;

pub(super) use encode::{encode_base, encode_bytes, encode_thirds};

pub(super) fn decode_base(lanes: Lanes<'_>, readers: &mut [Reader], rows: &mut [Row]) {
    if lanes.are_narrow() {
        let bounds = Bounds::of(lanes);
        with_streams!(narrow(&bounds; readers, rows));
    } else {
        with_streams!(wide(lanes; readers, rows));
    }
}

pub(super) fn decode_thirds(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    readers: &mut [Reader],
    rows: &mut [Row],
) {
    let bounds = Thirds::of(lanes, tables);
    with_streams!(thirds(&bounds; readers, rows));
}

pub(super) fn decode_bytes(tables: &[ByteTable], readers: &mut [Reader], rows: &mut [Row]) {
    assert!(is_available(), "checked when the kernel was chosen");
    let of_stream = rows.chunks_exact_mut((rows.len() / readers.len()).max(1));
    for ((reader, table), rows) in readers.iter_mut().zip(tables).zip(of_stream) {
        // SAFETY: the CPU has the features.
        unsafe { by_slot(&table.slots, &[0; LANES], 0, reader, rows) }
    }
}

/// By number from zero on: first slots, less one, and packed frequencies.
struct Bounds {
    all: [[[u16; LANES]; 2]; LARGEST + 1],
    numbers: usize,
}

impl Bounds {
    fn of(lanes: Lanes<'_>) -> Self {
        let mut bounds = Self {
            all: [[[0; LANES]; 2]; LARGEST + 1],
            numbers: usize::from(lanes.largest) + 1,
        };
        // A row of channels that are all zero has a bound all the same.
        for number in 0..bounds.numbers.max(2) {
            let firsts = lanes.of(&BASE.firsts[number]);
            bounds.all[number] = [
                firsts.map(|first| first.wrapping_sub(1)),
                lanes.of(&BASE.packed[number]),
            ];
        }
        bounds
    }
}

/// By distance: the first slots of the symbols 1 and 2.
struct Thirds([[[u16; LANES]; 2]; DISTANCES]);

impl Thirds {
    fn of(lanes: Lanes<'_>, tables: &ThirdTables) -> Self {
        let both = tables.middle.iter().zip(&tables.away);
        let mut bounds = Self([[[0; LANES]; 2]; DISTANCES]);
        for (bounds, (middle, away)) in bounds.0.iter_mut().zip(both) {
            *bounds = [lanes.of(middle), lanes.of(away)];
        }
        bounds
    }

    /// The bounds of half a row whose coarser numbers are that far from zero.
    #[inline]
    #[target_feature(enable = "avx2,fma,popcnt")]
    fn at(&self, distance: __m256i, half: usize) -> (__m256i, __m256i) {
        let [middle, away] = &self.0[0];
        let (mut middle, mut away) = (load(middle, half), load(away, half));
        for (d, [of_middle, of_away]) in (0i16..).zip(&self.0[1..]) {
            let reached = _mm256_cmpgt_epi16(distance, _mm256_set1_epi16(d));
            middle = _mm256_blendv_epi8(middle, load(of_middle, half), reached);
            away = _mm256_blendv_epi8(away, load(of_away, half), reached);
        }
        (middle, away)
    }
}

/// A reader's states in registers.
#[derive(Clone, Copy)]
struct Reading {
    low: [__m256i; 2],
    high: [__m256i; 2],
    next: usize,
}

impl Reading {
    #[target_feature(enable = "avx2,fma,popcnt")]
    fn of(reader: &Reader) -> Self {
        let (low, high) = (&reader.states.low, &reader.states.high);
        Self {
            low: [load(low, 0), load(low, 1)],
            high: [load(high, 0), load(high, 1)],
            next: reader.next,
        }
    }

    #[target_feature(enable = "avx2,fma,popcnt")]
    fn put_back(self, reader: &mut Reader) {
        reader.states = states(self.low, self.high);
        reader.next = self.next;
    }

    /// After half a row of symbols of these frequencies, in which the slots had these places;
    /// gives how many of `words` they read, of which `read` were read before.
    #[inline]
    #[target_feature(enable = "avx2,fma,popcnt")]
    fn advance(
        &mut self,
        half: usize,
        frequency: __m256i,
        place: __m256i,
        words: &[u16; LANES],
        read: usize,
    ) -> usize {
        let (low, high) = (self.low[half], self.high[half]);
        let quotient_low = _mm256_or_si256(
            _mm256_slli_epi16::<5>(high),
            _mm256_srli_epi16::<{ PRECISION.cast_signed() }>(low),
        );
        let quotient_high = _mm256_srli_epi16::<{ PRECISION.cast_signed() }>(high);
        let low = _mm256_add_epi16(_mm256_mullo_epi16(frequency, quotient_low), place);
        let no_carry = _mm256_cmpeq_epi16(_mm256_max_epu16(low, place), low);
        let high = _mm256_add_epi16(
            _mm256_mulhi_epu16(frequency, quotient_low),
            _mm256_mullo_epi16(frequency, quotient_high),
        );
        // One more, less one where there is no carry.
        let high = _mm256_add_epi16(high, _mm256_set1_epi16(1));
        let high = _mm256_add_epi16(high, no_carry);
        let refill = _mm256_cmpeq_epi16(high, _mm256_setzero_si256());
        let [first, second] = lanes_of(refill);
        let some = SPREAD[first].count;
        let expanded = _mm256_set_m128i(
            spread(words, read + some, second),
            spread(words, read, first),
        );
        self.high[half] = _mm256_blendv_epi8(high, low, refill);
        self.low[half] = _mm256_blendv_epi8(low, expanded, refill);
        some + SPREAD[second].count
    }
}

/// The words that eight lanes read, in their places.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn spread(words: &[u16; LANES], from: usize, lanes: usize) -> __m128i {
    let words: &[u16; 8] = words[from..].first_chunk().expect("a word a lane");
    // SAFETY: eight words, or 16 bytes, are a register.
    unsafe {
        let words = _mm_loadu_si128(words.as_ptr().cast());
        let places = _mm_loadu_si128(SPREAD[lanes].places.as_ptr().cast());
        _mm_shuffle_epi8(words, places)
    }
}

#[target_feature(enable = "avx2,fma,popcnt")]
fn narrow(bounds: &Bounds, reader: &mut Reader, rows: &mut [Row]) {
    let one = _mm256_set1_epi16(1);
    let magnitudes = _mm256_set1_epi16((1 << 10) - 1);
    let frequencies = _mm256_set1_epi16((1 << NUMBER_BIT) - 1);
    let [_, zero_packed] = &bounds.all[0];
    let [one_first, one_packed] = &bounds.all[1];
    let others = bounds.all.get(2..bounds.numbers).unwrap_or_default();
    let mut state = Reading::of(reader);
    for row in rows {
        let words = reader.upcoming(state.next);
        let mut read = 0;
        let mut magnitude = [one; 2];
        let mut first = [one; 2];
        let mut packed = [one; 2];
        let mut reached_one = [one; 2];
        for half in 0..2 {
            magnitude[half] = _mm256_and_si256(state.low[half], magnitudes);
            let of_first = load(one_first, half);
            let reached = _mm256_cmpgt_epi16(magnitude[half], of_first);
            // Of zero, less one: all bits.
            first[half] = _mm256_blendv_epi8(_mm256_set1_epi16(-1), of_first, reached);
            packed[half] =
                _mm256_blendv_epi8(load(zero_packed, half), load(one_packed, half), reached);
            reached_one[half] = reached;
        }
        for [of_first, of_packed] in others {
            for half in 0..2 {
                let of_first = load(of_first, half);
                let reached = _mm256_cmpgt_epi16(magnitude[half], of_first);
                first[half] = _mm256_blendv_epi8(first[half], of_first, reached);
                packed[half] = _mm256_blendv_epi8(packed[half], load(of_packed, half), reached);
            }
        }
        for half in 0..2 {
            let negative = _mm256_srai_epi16::<15>(_mm256_slli_epi16::<5>(state.low[half]));
            let second_half = _mm256_andnot_si256(reached_one[half], negative);
            let zero_half = _mm256_add_epi16(load(one_first, half), one);
            let place = _mm256_sub_epi16(_mm256_sub_epi16(magnitude[half], one), first[half]);
            let place = _mm256_add_epi16(place, _mm256_and_si256(second_half, zero_half));
            let frequency = _mm256_add_epi16(_mm256_and_si256(packed[half], frequencies), one);
            let number = _mm256_srli_epi16::<{ NUMBER_BIT.cast_signed() }>(packed[half]);
            let number = _mm256_sub_epi16(_mm256_xor_si256(number, negative), negative);
            store(row, half, number);
            read += state.advance(half, frequency, place, words, read);
        }
        state.next += read;
    }
    state.put_back(reader);
}

#[target_feature(enable = "avx2,fma,popcnt")]
fn wide(lanes: Lanes<'_>, reader: &mut Reader, rows: &mut [Row]) {
    by_slot(
        &BASE.slots,
        &lanes.classes.map(u16::from),
        SLOT_ZERO,
        reader,
        rows,
    );
}

/// Looks symbols up, of which zero has the number `zero`.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn by_slot(
    table: &[u32],
    classes: &[u16; LANES],
    zero: i16,
    reader: &mut Reader,
    rows: &mut [Row],
) {
    let slots = _mm256_set1_epi16((TOTAL - 1).cast_signed());
    let zero = _mm256_set1_epi16(zero);
    let symbol_bits = _mm256_set1_epi32(0xff);
    let frequency_bits = _mm256_set1_epi32(0x7ff);
    let mut state = Reading::of(reader);
    for row in rows {
        let words = reader.upcoming(state.next);
        let mut read = 0;
        for half in 0..2 {
            let slot = _mm256_and_si256(state.low[half], slots);
            let [a, b] = look_up(table, PRECISION, load(classes, half), slot);
            let symbol = _mm256_packus_epi32(
                _mm256_and_si256(a, symbol_bits),
                _mm256_and_si256(b, symbol_bits),
            );
            let frequency = _mm256_packus_epi32(
                _mm256_and_si256(_mm256_srli_epi32::<8>(a), frequency_bits),
                _mm256_and_si256(_mm256_srli_epi32::<8>(b), frequency_bits),
            );
            let place = _mm256_packus_epi32(_mm256_srli_epi32::<19>(a), _mm256_srli_epi32::<19>(b));
            store(row, half, _mm256_sub_epi16(symbol, zero));
            let frequency = _mm256_add_epi16(frequency, _mm256_set1_epi16(1));
            read += state.advance(half, frequency, place, words, read);
        }
        state.next += read;
    }
    state.put_back(reader);
}

#[target_feature(enable = "avx2,fma,popcnt")]
fn thirds(bounds: &Thirds, reader: &mut Reader, rows: &mut [Row]) {
    let one = _mm256_set1_epi16(1);
    let slots = _mm256_set1_epi16((TOTAL - 1).cast_signed());
    let total = _mm256_set1_epi16(TOTAL.cast_signed());
    let mut state = Reading::of(reader);
    for row in rows {
        let words = reader.upcoming(state.next);
        let mut read = 0;
        for half in 0..2 {
            let number = load_numbers(row, half);
            let (middle, away) = bounds.at(_mm256_abs_epi16(number), half);
            let slot = _mm256_and_si256(state.low[half], slots);
            let is_towards = _mm256_cmpgt_epi16(middle, slot);
            let not_away = _mm256_cmpgt_epi16(away, slot);
            let first = _mm256_andnot_si256(is_towards, middle);
            let first = _mm256_blendv_epi8(away, first, not_away);
            let end = _mm256_blendv_epi8(away, middle, is_towards);
            let end = _mm256_blendv_epi8(total, end, not_away);
            // One for away, less one for every bound that was not reached.
            let third = _mm256_add_epi16(_mm256_add_epi16(one, is_towards), not_away);
            let negative = _mm256_srai_epi16::<15>(number);
            let third = _mm256_sub_epi16(_mm256_xor_si256(third, negative), negative);
            let tripled = _mm256_add_epi16(_mm256_add_epi16(number, number), number);
            store(row, half, _mm256_add_epi16(tripled, third));
            let (frequency, place) = (_mm256_sub_epi16(end, first), _mm256_sub_epi16(slot, first));
            read += state.advance(half, frequency, place, words, read);
        }
        state.next += read;
    }
    state.put_back(reader);
}

/// The entries of a table of 2^`shift` a class, for indices below that.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn look_up(table: &[u32], shift: u32, classes: __m256i, index: __m256i) -> [__m256i; 2] {
    let zero = _mm256_setzero_si256();
    let shift = _mm_cvtsi32_si128(shift.cast_signed());
    let last = _mm256_set1_epi32(i32::try_from(table.len() - 1).expect("a small table"));
    let low = _mm256_or_si256(
        _mm256_sll_epi32(_mm256_unpacklo_epi16(classes, zero), shift),
        _mm256_unpacklo_epi16(index, zero),
    );
    let high = _mm256_or_si256(
        _mm256_sll_epi32(_mm256_unpackhi_epi16(classes, zero), shift),
        _mm256_unpackhi_epi16(index, zero),
    );
    // SAFETY: no index is beyond the last entry.
    unsafe {
        [
            _mm256_i32gather_epi32::<4>(table.as_ptr().cast(), _mm256_min_epu32(low, last)),
            _mm256_i32gather_epi32::<4>(table.as_ptr().cast(), _mm256_min_epu32(high, last)),
        ]
    }
}

/// Which lanes a mask has, by eight.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn lanes_of(mask: __m256i) -> [usize; 2] {
    let bytes = _mm256_packs_epi16(mask, _mm256_setzero_si256());
    let bits = _mm256_movemask_epi8(bytes).cast_unsigned() as usize;
    [bits & 0xff, bits >> 16 & 0xff]
}

#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn load(lanes: &[u16; LANES], half: usize) -> __m256i {
    let (halves, _) = lanes.as_chunks::<16>();
    // SAFETY: 16 lanes of 16 bits are a register.
    unsafe { _mm256_loadu_si256(halves[half].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn load_numbers(row: &Row, half: usize) -> __m256i {
    let (halves, _) = row.as_chunks::<16>();
    // SAFETY: 16 lanes of 16 bits are a register.
    unsafe { _mm256_loadu_si256(halves[half].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn store(row: &mut Row, half: usize, numbers: __m256i) {
    let (halves, _) = row.as_chunks_mut::<16>();
    // SAFETY: 16 lanes of 16 bits are a register.
    unsafe { _mm256_storeu_si256(halves[half].as_mut_ptr().cast(), numbers) }
}

#[target_feature(enable = "avx2,fma,popcnt")]
fn states(low: [__m256i; 2], high: [__m256i; 2]) -> States {
    let mut rows = [[0; LANES]; 2];
    for half in 0..2 {
        store(&mut rows[0], half, low[half]);
        store(&mut rows[1], half, high[half]);
    }
    let [low, high] = rows.map(|row| row.map(i16::cast_unsigned));
    States { low, high }
}
