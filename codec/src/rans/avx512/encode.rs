//! The encoders for AVX-512: the way back.

use super::*;
use crate::rans::{THIRD, Writer};

pub(in crate::rans) fn encode_base(lanes: Lanes<'_>, writers: &mut [Writer], rows: &mut [Row]) {
    with_streams!(put_base(lanes; writers, rows));
}

pub(in crate::rans) fn encode_thirds(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    writers: &mut [Writer],
    rows: &mut [Row],
) {
    with_streams!(put_thirds(lanes, tables; writers, rows));
}

pub(in crate::rans) fn encode_bytes(tables: &[ByteTable], writers: &mut [Writer], rows: &[Row]) {
    with_streams!(put_bytes(tables; writers, rows));
}

/// A writer's states in registers.
#[derive(Clone, Copy)]
struct Writing {
    low: __m512i,
    high: __m512i,
    next: usize,
}

impl Writing {
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn of(writer: &Writer) -> Self {
        Self {
            low: load(&writer.states.low),
            high: load(&writer.states.high),
            next: writer.next,
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn put_back(self, writer: &mut Writer) {
        writer.states = States {
            low: array(self.low),
            high: array(self.high),
        };
        writer.next = self.next;
    }

    /// Makes room for symbols of these frequencies, which are not zero, and divides by them:
    /// the quotients times [`TOTAL`], and the remainders.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn divide(&mut self, writer: &mut Writer, frequency: __m512i) -> ([__m512i; 2], __m512i) {
        let full = _mm512_cmpge_epu16_mask(_mm512_srli_epi16::<5>(self.high), frequency);
        let words = _mm512_maskz_compress_epi16(full, self.low);
        let count = full.count_ones();
        self.next -= count as usize;
        let place = writer.words[self.next..]
            .first_chunk_mut()
            .expect("a register more than words");
        let some = u32::MAX.unbounded_shr(32 - count);
        store_some(place, some, words);
        let low = _mm512_mask_mov_epi16(self.low, full, self.high);
        let high = _mm512_maskz_mov_epi16(!full, self.high);
        let zero = _mm512_setzero_si512();
        let (a, rest_a) = quotients(
            _mm512_unpacklo_epi16(low, high),
            _mm512_unpacklo_epi16(frequency, zero),
        );
        let (b, rest_b) = quotients(
            _mm512_unpackhi_epi16(low, high),
            _mm512_unpackhi_epi16(frequency, zero),
        );
        ([a, b], _mm512_packus_epi32(rest_a, rest_b))
    }

    /// Goes on with the states that quotients and slots make.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn set(&mut self, quotients: [__m512i; 2], slot: __m512i) {
        let [a, b] = quotients;
        let words = _mm512_set1_epi32(0xffff);
        // A quotient times TOTAL leaves the lowest bits to the slot.
        self.low = _mm512_or_si512(
            _mm512_packus_epi32(_mm512_and_si512(a, words), _mm512_and_si512(b, words)),
            slot,
        );
        self.high = _mm512_packus_epi32(_mm512_srli_epi32::<16>(a), _mm512_srli_epi32::<16>(b));
    }
}

/// Quotients times [`TOTAL`], and remainders, for divisors up to it and quotients below 2²¹.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn quotients(state: __m512i, frequency: __m512i) -> (__m512i, __m512i) {
    // Rounded down throughout, so that the quotient is never too large; and less than one too
    // small: three roundings of at most 2⁻²³ each, and what a step of Newton's leaves of the
    // error of 2⁻¹⁴.
    const DOWN: i32 = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
    let divisor = _mm512_cvtepi32_ps(frequency);
    let inverse = _mm512_rcp14_ps(divisor);
    let error = _mm512_fnmadd_ps(inverse, divisor, _mm512_set1_ps(1.0));
    let inverse = _mm512_fmadd_round_ps::<DOWN>(inverse, error, inverse);
    let dividend = _mm512_cvt_roundepu32_ps::<DOWN>(state);
    let near = _mm512_cvttps_epu32(_mm512_mul_round_ps::<DOWN>(dividend, inverse));
    let rest = _mm512_sub_epi32(state, _mm512_mullo_epi32(near, frequency));
    let less = _mm512_sub_epi32(rest, frequency);
    let under = _mm512_cmpge_epu32_mask(rest, frequency);
    let total = _mm512_set1_epi32(i32::from(TOTAL));
    let quotient = _mm512_slli_epi32::<PRECISION>(near);
    let quotient = _mm512_mask_add_epi32(quotient, under, quotient, total);
    (quotient, _mm512_min_epu32(rest, less))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn put_base<const S: usize>(lanes: Lanes<'_>, mut writers: [&mut Writer; S], rows: &mut [Row]) {
    let tokens = rows.len() / S;
    let classes = load_classes(lanes);
    let narrow = lanes.are_narrow();
    let first_codes = wide_classes(lanes, (LARGEST + 1).ilog2());
    let mut bounds = [[_mm512_setzero_si512(); 2]; LARGEST + 1];
    let bounds = &mut bounds[..=usize::from(lanes.largest)];
    for (number, bound) in bounds.iter_mut().enumerate() {
        let packed = pick(&BASE.packed[number], classes);
        let frequencies = _mm512_set1_epi16((1 << NUMBER_BIT) - 1);
        let frequency = _mm512_and_si512(packed, frequencies);
        *bound = [
            pick(&BASE.firsts[number], classes),
            _mm512_add_epi16(frequency, _mm512_set1_epi16(1)),
        ];
    }
    let [zero_first, zero_frequency] = bounds[0];
    let zero_half = _mm512_srli_epi16::<1>(zero_frequency);
    let zero = _mm512_setzero_si512();
    let one = _mm512_set1_epi16(1);
    let half = _mm512_set1_epi16(1 << 10);
    let largest = load(&lanes.of_largest());
    let mut strange = 0;
    let mut states = [Writing {
        low: zero,
        high: zero,
        next: 0,
    }; S];
    for (state, writer) in states.iter_mut().zip(&writers) {
        *state = Writing::of(writer);
    }
    for token in (0..tokens).rev() {
        each_stream!(s in S {
            let number = load_numbers(&rows[s * tokens + token]);
            let magnitude = _mm512_abs_epi16(number);
            strange |= _mm512_cmpgt_epu16_mask(magnitude, largest);
            let (mut first, mut frequency) = (zero_first, zero_frequency);
            if narrow {
                let mut at = zero;
                for &[of_first, of_frequency] in &bounds[1..] {
                    at = _mm512_add_epi16(at, one);
                    let same = _mm512_cmpeq_epi16_mask(magnitude, at);
                    first = _mm512_mask_mov_epi16(first, same, of_first);
                    frequency = _mm512_mask_mov_epi16(frequency, same, of_frequency);
                }
            } else {
                let magnitude = _mm512_min_epu16(magnitude, largest);
                let [a, b] = look_up(&BASE.codes, first_codes, magnitude);
                let words = _mm512_set1_epi32(0xffff);
                frequency = narrowed(_mm512_and_si512(a, words), _mm512_and_si512(b, words));
                first = narrowed(_mm512_srli_epi32::<16>(a), _mm512_srli_epi32::<16>(b));
            }
            let (quotients, place) = states[s].divide(writers[s], frequency);
            let nothing = _mm512_testn_epi16_mask(number, number);
            let second_half = _mm512_mask_cmpge_epu16_mask(nothing, place, zero_half);
            let negative = _mm512_movepi16_mask(number) | second_half;
            let slot = _mm512_add_epi16(first, place);
            let slot = _mm512_mask_sub_epi16(slot, second_half, slot, zero_half);
            let slot = _mm512_mask_add_epi16(slot, negative, slot, half);
            states[s].set(quotients, slot);
        });
    }
    for (state, writer) in states.into_iter().zip(&mut writers) {
        state.put_back(writer);
    }
    assert_eq!(strange, 0, "every class has its numbers");
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn put_thirds<const S: usize>(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    mut writers: [&mut Writer; S],
    rows: &mut [Row],
) {
    let tokens = rows.len() / S;
    let bounds = Thirds::of(lanes, tables);
    let zero = _mm512_setzero_si512();
    let one = _mm512_set1_epi16(1);
    let third = _mm512_set1_epi16(THIRD.cast_signed());
    let total = _mm512_set1_epi16(TOTAL.cast_signed());
    let mut impossible = 0;
    let mut states = [Writing {
        low: zero,
        high: zero,
        next: 0,
    }; S];
    for (state, writer) in states.iter_mut().zip(&writers) {
        *state = Writing::of(writer);
    }
    for token in (0..tokens).rev() {
        each_stream!(s in S {
            let row = &mut rows[s * tokens + token];
            let number = load_numbers(row);
            let magnitude = _mm512_abs_epi16(number);
            let coarser = _mm512_mulhi_epu16(_mm512_add_epi16(magnitude, one), third);
            let (middle, away) = bounds.at(coarser);
            let tripled = _mm512_add_epi16(_mm512_add_epi16(coarser, coarser), coarser);
            // Next to zero the symbol is the sign itself.
            let nothing = _mm512_cmple_epu16_mask(magnitude, one);
            let magnitude = _mm512_mask_mov_epi16(magnitude, nothing, number);
            let is_middle = _mm512_cmpge_epi16_mask(magnitude, tripled);
            let is_away = _mm512_cmpgt_epi16_mask(magnitude, tripled);
            let first = _mm512_maskz_mov_epi16(is_middle, middle);
            let first = _mm512_mask_mov_epi16(first, is_away, away);
            let frequency = _mm512_mask_sub_epi16(middle, is_middle, away, middle);
            let frequency = _mm512_mask_sub_epi16(frequency, is_away, total, away);
            let negative = _mm512_movepi16_mask(number);
            let coarser = _mm512_mask_sub_epi16(coarser, negative, zero, coarser);
            store_numbers(row, coarser);
            impossible |= _mm512_testn_epi16_mask(frequency, frequency);
            let (quotients, place) = states[s].divide(writers[s], frequency);
            states[s].set(quotients, _mm512_add_epi16(first, place));
        });
    }
    for (state, writer) in states.into_iter().zip(&mut writers) {
        state.put_back(writer);
    }
    assert_eq!(impossible, 0, "every class has its thirds");
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn put_bytes<const S: usize>(tables: &[ByteTable], mut writers: [&mut Writer; S], rows: &[Row]) {
    let tokens = rows.len() / S;
    let none = [_mm512_setzero_si512(); 2];
    let words = _mm512_set1_epi32(0xffff);
    let byte_bits = _mm512_set1_epi16(0xff);
    let mut impossible = 0;
    let mut states = [Writing::of(writers[0]); S];
    for (state, writer) in states.iter_mut().zip(&writers) {
        *state = Writing::of(writer);
    }
    for token in (0..tokens).rev() {
        each_stream!(s in S {
            let byte = load_numbers(&rows[s * tokens + token]);
            impossible |= _mm512_cmpgt_epu16_mask(byte, byte_bits);
            let [a, b] = look_up(&tables[s].codes, none, byte);
            let frequency = narrowed(_mm512_and_si512(a, words), _mm512_and_si512(b, words));
            impossible |= _mm512_testn_epi16_mask(frequency, frequency);
            let first = narrowed(_mm512_srli_epi32::<16>(a), _mm512_srli_epi32::<16>(b));
            let (quotients, place) = states[s].divide(writers[s], frequency);
            states[s].set(quotients, _mm512_add_epi16(first, place));
        });
    }
    for (state, writer) in states.into_iter().zip(&mut writers) {
        state.put_back(writer);
    }
    assert_eq!(impossible, 0, "every table has its bytes");
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn store_some(place: &mut [u16; LANES], some: u32, words: __m512i) {
    // SAFETY: 32 lanes of 16 bits are a register.
    unsafe { _mm512_mask_storeu_epi16(place.as_mut_ptr().cast(), some, words) }
}
