//! Kernels for AVX-512, with VBMI2: Ice Lake, Zen 4 and later. [`super::scalar`] says what
//! they compute.
//!
//! All lanes of a row fill one register, 16 bits a lane; a state is two of them. Decoding:
//!
//! ```text
//! place, frequency = from comparing the slots with one bound a number
//! high:low         = frequency * (high:low >> 11) + place    three products of 16 bits
//! refill           = high == 0
//! high             = refill ? low : high
//! low              = refill ? next words, in order : low     one expansion
//! ```
//!
//! The bounds of a lane are the same in all rows. Several streams in turns hide the latency
//! of this chain, and share the bounds.

#![expect(
    unsafe_code,
    reason = "features are checked at run time, and gathers take pointers"
)]

use std::arch::x86_64::*;

use super::{ByteTable, LANES, Lanes, PRECISION, Reader, Row, States, TOTAL};
use crate::classes::{BASE, DISTANCES, LARGEST, NUMBER_BIT, PADDED, SLOT_ZERO, ThirdTables};

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vbmi2")
        && is_x86_feature_detected!("popcnt")
}

/// Calls a kernel, given by its name, with the streams as an array of as many.
macro_rules! with_streams {
    ($kernel:ident($($argument:expr),*; $streams:expr, $rows:expr)) => {{
        assert!(is_available(), "checked when the kernel was chosen");
        // SAFETY: the CPU has the features.
        unsafe {
            match $streams {
                [a] => $kernel($($argument,)* [a], $rows),
                [a, b] => $kernel($($argument,)* [a, b], $rows),
                [a, b, c] => $kernel($($argument,)* [a, b, c], $rows),
                [a, b, c, d] => $kernel($($argument,)* [a, b, c, d], $rows),
                _ => unreachable!("a few streams"),
            }
        }
    }};
}

/// A loop over the streams that the compiler unrolls, so that their states stay in registers.
macro_rules! each_stream {
    ($s:ident in $streams:ident $body:block) => {
        each_stream!(@ $s $streams $body 0 1 2 3)
    };
    (@ $s:ident $streams:ident $body:block $($number:literal)*) => {
        $(if $number < $streams {
            let $s = $number;
            $body
        })*
    };
}

mod encode;

pub(super) use encode::{encode_base, encode_bytes, encode_thirds};

pub(super) fn decode_base(lanes: Lanes<'_>, readers: &mut [Reader], rows: &mut [Row]) {
    if lanes.are_narrow() {
        with_streams!(narrow(lanes; readers, rows));
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
    with_streams!(thirds(lanes, tables; readers, rows));
}

pub(super) fn decode_bytes(tables: &[ByteTable], readers: &mut [Reader], rows: &mut [Row]) {
    with_streams!(bytes(tables; readers, rows));
}

/// A reader's states in registers.
#[derive(Clone, Copy)]
struct Reading {
    low: __m512i,
    high: __m512i,
    next: usize,
}

impl Reading {
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn of(reader: &Reader) -> Self {
        let readable = reader.words.len().checked_sub(LANES);
        assert!(readable >= Some(reader.end), "zeros beyond the words");
        Self {
            low: load(&reader.states.low),
            high: load(&reader.states.high),
            next: reader.next,
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn put_back(self, reader: &mut Reader) {
        reader.states = States {
            low: array(self.low),
            high: array(self.high),
        };
        reader.next = self.next;
    }

    /// After symbols of these frequencies, in which the slots had these places.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn advance(&mut self, reader: &Reader, frequency: __m512i, place: __m512i) {
        let quotient_low = _mm512_shldi_epi16::<5>(self.high, self.low);
        let quotient_high = _mm512_srli_epi16::<PRECISION>(self.high);
        let product = _mm512_mullo_epi16(frequency, quotient_low);
        let low = _mm512_add_epi16(product, place);
        let high = _mm512_add_epi16(
            _mm512_mulhi_epu16(frequency, quotient_low),
            _mm512_mullo_epi16(frequency, quotient_high),
        );
        let carry = _mm512_srli_epi16::<15>(_mm512_andnot_si512(low, product));
        let high = _mm512_add_epi16(high, carry);
        let refill = _mm512_testn_epi16_mask(high, high);
        // SAFETY: there is a register of zeros beyond the words, as was checked.
        let words = unsafe {
            let from = reader.words.as_ptr().add(self.next.min(reader.end));
            _mm512_loadu_si512(from.cast())
        };
        self.high = _mm512_mask_mov_epi16(high, refill, low);
        self.low = expand(low, refill, words);
        self.next += refill.count_ones() as usize;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn narrow<const S: usize>(lanes: Lanes<'_>, readers: [&mut Reader; S], rows: &mut [Row]) {
    let tokens = rows.len() / S;
    let classes = load_classes(lanes);
    let zero_packed = pick(&BASE.packed[0], classes);
    let one_first = pick(&BASE.firsts[1], classes);
    let one_packed = pick(&BASE.packed[1], classes);
    let mut bounds = [[_mm512_setzero_si512(); 2]; LARGEST];
    let largest = usize::from(lanes.largest);
    let bounds = bounds
        .get_mut(..largest.saturating_sub(1))
        .unwrap_or_default();
    for (number, bound) in (2..).zip(bounds.iter_mut()) {
        *bound = [
            pick(&BASE.firsts[number], classes),
            pick(&BASE.packed[number], classes),
        ];
    }
    let zero = _mm512_setzero_si512();
    let one = _mm512_set1_epi16(1);
    let sign = _mm512_set1_epi16(1 << 10);
    let magnitudes = _mm512_set1_epi16((1 << 10) - 1);
    let frequencies = _mm512_set1_epi16((1 << NUMBER_BIT) - 1);
    let mut states = [Reading {
        low: zero,
        high: zero,
        next: 0,
    }; S];
    for (state, reader) in states.iter_mut().zip(&readers) {
        *state = Reading::of(reader);
    }
    for token in 0..tokens {
        let mut magnitude = [zero; S];
        let mut first = [zero; S];
        let mut packed = [zero; S];
        each_stream!(s in S {
            magnitude[s] = _mm512_and_si512(states[s].low, magnitudes);
            let reached = _mm512_cmpge_epu16_mask(magnitude[s], one_first);
            first[s] = _mm512_maskz_mov_epi16(reached, one_first);
            packed[s] = _mm512_mask_mov_epi16(zero_packed, reached, one_packed);
        });
        for &[of_first, of_packed] in bounds.iter() {
            each_stream!(s in S {
                let reached = _mm512_cmpge_epu16_mask(magnitude[s], of_first);
                first[s] = _mm512_mask_mov_epi16(first[s], reached, of_first);
                packed[s] = _mm512_mask_mov_epi16(packed[s], reached, of_packed);
            });
        }
        each_stream!(s in S {
            let negative = _mm512_test_epi16_mask(states[s].low, sign);
            let second_half = _mm512_mask_cmplt_epu16_mask(negative, magnitude[s], one_first);
            let place = _mm512_sub_epi16(magnitude[s], first[s]);
            let place = _mm512_mask_add_epi16(place, second_half, place, one_first);
            let frequency = _mm512_add_epi16(_mm512_and_si512(packed[s], frequencies), one);
            let number = _mm512_srli_epi16::<NUMBER_BIT>(packed[s]);
            let number = _mm512_mask_sub_epi16(number, negative, zero, number);
            // SAFETY: there are so many rows of every stream.
            let row = unsafe { rows.get_unchecked_mut(s * tokens + token) };
            store_numbers(row, number);
            states[s].advance(readers[s], frequency, place);
        });
    }
    for (state, reader) in states.into_iter().zip(readers) {
        state.put_back(reader);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn wide<const S: usize>(lanes: Lanes<'_>, readers: [&mut Reader; S], rows: &mut [Row]) {
    let first = wide_classes(lanes, PRECISION);
    by_slot([&BASE.slots; S], first, SLOT_ZERO, readers, rows);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn bytes<const S: usize>(tables: &[ByteTable], readers: [&mut Reader; S], rows: &mut [Row]) {
    let mut slots = [&[][..]; S];
    for (slots, table) in slots.iter_mut().zip(tables) {
        *slots = &table.slots;
    }
    by_slot(slots, [_mm512_setzero_si512(); 2], 0, readers, rows);
}

/// Looks symbols up, of which zero has the number `zero`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn by_slot<const S: usize>(
    tables: [&[u32]; S],
    first: [__m512i; 2],
    zero: i16,
    readers: [&mut Reader; S],
    rows: &mut [Row],
) {
    let tokens = rows.len() / S;
    let slots = _mm512_set1_epi16((TOTAL - 1).cast_signed());
    let zero = _mm512_set1_epi16(zero);
    let symbol_bits = _mm512_set1_epi32(0xff);
    let frequency_bits = _mm512_set1_epi32(0x7ff);
    let mut states = [Reading::of(readers[0]); S];
    for (state, reader) in states.iter_mut().zip(&readers) {
        *state = Reading::of(reader);
    }
    for token in 0..tokens {
        each_stream!(s in S {
            let slot = _mm512_and_si512(states[s].low, slots);
            let [a, b] = look_up(tables[s], first, slot);
            let symbol = narrowed(
                _mm512_and_si512(a, symbol_bits),
                _mm512_and_si512(b, symbol_bits),
            );
            let frequency = narrowed(
                _mm512_and_si512(_mm512_srli_epi32::<8>(a), frequency_bits),
                _mm512_and_si512(_mm512_srli_epi32::<8>(b), frequency_bits),
            );
            let frequency = _mm512_add_epi16(frequency, _mm512_set1_epi16(1));
            let place = narrowed(_mm512_srli_epi32::<19>(a), _mm512_srli_epi32::<19>(b));
            // SAFETY: there are so many rows of every stream.
            let row = unsafe { rows.get_unchecked_mut(s * tokens + token) };
            store_numbers(row, _mm512_sub_epi16(symbol, zero));
            states[s].advance(readers[s], frequency, place);
        });
    }
    for (state, reader) in states.into_iter().zip(readers) {
        state.put_back(reader);
    }
}

/// The bounds of third symbols.
#[derive(Clone, Copy)]
struct Thirds {
    middle: [__m512i; DISTANCES],
    away: [__m512i; DISTANCES],
}

impl Thirds {
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn of(lanes: Lanes<'_>, tables: &ThirdTables) -> Self {
        let classes = load_classes(lanes);
        let mut bounds = Self {
            middle: [classes; DISTANCES],
            away: [classes; DISTANCES],
        };
        for distance in 0..DISTANCES {
            bounds.middle[distance] = pick(&tables.middle[distance], classes);
            bounds.away[distance] = pick(&tables.away[distance], classes);
        }
        bounds
    }

    /// The bounds of a row of which these coarser numbers are not zero, and these as far from
    /// it as is told apart.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn of_masks(&self, some: __mmask32, far: __mmask32) -> (__m512i, __m512i) {
        let [a, b, c] = self.middle;
        let middle = _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(a, some, b), far, c);
        let [a, b, c] = self.away;
        let away = _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(a, some, b), far, c);
        (middle, away)
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn thirds<const S: usize>(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    readers: [&mut Reader; S],
    rows: &mut [Row],
) {
    let tokens = rows.len() / S;
    let bounds = Thirds::of(lanes, tables);
    let zero = _mm512_setzero_si512();
    let one = _mm512_set1_epi16(1);
    let two = _mm512_set1_epi16(2);
    let slots = _mm512_set1_epi16((TOTAL - 1).cast_signed());
    let ends = _mm512_set1_epi16(TOTAL.cast_signed().wrapping_neg());
    let mut states = [Reading {
        low: zero,
        high: zero,
        next: 0,
    }; S];
    for (state, reader) in states.iter_mut().zip(&readers) {
        *state = Reading::of(reader);
    }
    for token in 0..tokens {
        each_stream!(s in S {
            // SAFETY: there are so many rows of every stream.
            let row = unsafe { rows.get_unchecked_mut(s * tokens + token) };
            let number = load_numbers(row);
            let some = _mm512_test_epi16_mask(number, number);
            let far = _mm512_cmpgt_epu16_mask(_mm512_add_epi16(number, one), two);
            let (middle, away) = bounds.of_masks(some, far);
            // From bounds that are not reached it is more than from any that is: the place is
            // the least of these, and the frequency less than the least that is not reached.
            let slot = _mm512_and_si512(states[s].low, slots);
            let of_middle = _mm512_sub_epi16(slot, middle);
            let of_away = _mm512_sub_epi16(slot, away);
            let of_end = _mm512_or_si512(states[s].low, ends);
            let place = _mm512_min_epu16(_mm512_min_epu16(of_middle, of_away), slot);
            let end = _mm512_max_epu16(_mm512_max_epu16(of_middle, of_away), of_end);
            let frequency = _mm512_sub_epi16(place, end);
            let is_middle = _mm512_cmpge_epu16_mask(slot, middle);
            let is_away = _mm512_cmpge_epu16_mask(slot, away);
            // Towards zero is one less for a positive number, and one more for a negative
            // one; away is the opposite.
            let sign = _mm512_or_si512(_mm512_srai_epi16::<15>(number), one);
            let doubled = _mm512_add_epi16(number, number);
            let number = _mm512_add_epi16(doubled, _mm512_sub_epi16(number, sign));
            let number = _mm512_mask_add_epi16(number, is_middle, number, sign);
            let number = _mm512_mask_add_epi16(number, is_away, number, sign);
            store_numbers(row, number);
            states[s].advance(readers[s], frequency, place);
        });
    }
    for (state, reader) in states.into_iter().zip(readers) {
        state.put_back(reader);
    }
}

/// The words in order, in the lanes that are to be refilled. Said as an instruction, because
/// the compiler would expand straight from memory, which takes Zen 4 four times as long.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn expand(low: __m512i, refill: __mmask32, words: __m512i) -> __m512i {
    let mut low = low;
    // SAFETY: the instruction moves words from register to register.
    unsafe {
        std::arch::asm!(
            "vpexpandw {low}{{{refill}}}, {words}",
            low = inout(zmm_reg) low,
            refill = in(kreg) refill,
            words = in(zmm_reg) words,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    low
}

/// Zero-extended classes, shifted: in the order of [`look_up`].
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn wide_classes(lanes: Lanes<'_>, shift: u32) -> [__m512i; 2] {
    let [low, high] = widened(load_classes(lanes));
    let shift = _mm_cvtsi32_si128(shift.cast_signed());
    [_mm512_sll_epi32(low, shift), _mm512_sll_epi32(high, shift)]
}

/// The entries of a table of 2^n a class, for indices below 2^n, where `first` are those of
/// [`wide_classes`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn look_up(table: &[u32], first: [__m512i; 2], index: __m512i) -> [__m512i; 2] {
    let [low, high] = widened(index);
    let last = _mm512_set1_epi32(i32::try_from(table.len() - 1).expect("a small table"));
    let low = _mm512_min_epu32(_mm512_or_si512(first[0], low), last);
    let high = _mm512_min_epu32(_mm512_or_si512(first[1], high), last);
    // SAFETY: no index is beyond the last entry.
    unsafe {
        [
            _mm512_i32gather_epi32::<4>(low, table.as_ptr().cast()),
            _mm512_i32gather_epi32::<4>(high, table.as_ptr().cast()),
        ]
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn widened(all: __m512i) -> [__m512i; 2] {
    [
        _mm512_cvtepu16_epi32(_mm512_castsi512_si256(all)),
        _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(all)),
    ]
}

/// The opposite.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn narrowed(low: __m512i, high: __m512i) -> __m512i {
    let low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(low));
    _mm512_inserti64x4::<1>(low, _mm512_cvtepi32_epi16(high))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn load_classes(lanes: Lanes<'_>) -> __m512i {
    load(&lanes.classes.map(u16::from))
}

/// The entries of the classes.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn pick(table: &[u16; PADDED], classes: __m512i) -> __m512i {
    let (halves, _) = table.as_chunks();
    _mm512_permutex2var_epi16(load(&halves[0]), classes, load(&halves[1]))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn load(lanes: &[u16; LANES]) -> __m512i {
    // SAFETY: 32 lanes of 16 bits are a register.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn load_numbers(row: &Row) -> __m512i {
    // SAFETY: 32 lanes of 16 bits are a register.
    unsafe { _mm512_loadu_si512(row.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn array(lanes: __m512i) -> [u16; LANES] {
    let mut all = [0; LANES];
    // SAFETY: 32 lanes of 16 bits are a register.
    unsafe { _mm512_storeu_si512(all.as_mut_ptr().cast(), lanes) };
    all
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn store_numbers(row: &mut Row, numbers: __m512i) {
    // SAFETY: 32 lanes of 16 bits are a register.
    unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), numbers) }
}
