//! The encoders for AVX2: the way back.

use super::*;
use crate::rans::{THIRD, Writer};

pub(in crate::rans) fn encode_base(lanes: Lanes<'_>, writers: &mut [Writer], rows: &mut [Row]) {
    let bounds = Bounds::of(lanes);
    with_streams!(put_base(lanes, &bounds; writers, rows));
}

pub(in crate::rans) fn encode_thirds(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    writers: &mut [Writer],
    rows: &mut [Row],
) {
    let bounds = Thirds::of(lanes, tables);
    with_streams!(put_thirds(&bounds; writers, rows));
}

pub(in crate::rans) fn encode_bytes(tables: &[ByteTable], writers: &mut [Writer], rows: &[Row]) {
    assert!(is_available(), "checked when the kernel was chosen");
    let of_stream = rows.chunks_exact((rows.len() / writers.len()).max(1));
    for ((writer, table), rows) in writers.iter_mut().zip(tables).zip(of_stream) {
        // SAFETY: the CPU has the features.
        unsafe { put_bytes(table, writer, rows) }
    }
}

/// A writer's states in registers.
#[derive(Clone, Copy)]
struct Writing {
    low: [__m256i; 2],
    high: [__m256i; 2],
    next: usize,
}

impl Writing {
    #[target_feature(enable = "avx2,fma,popcnt")]
    fn of(writer: &Writer) -> Self {
        let (low, high) = (&writer.states.low, &writer.states.high);
        Self {
            low: [load(low, 0), load(low, 1)],
            high: [load(high, 0), load(high, 1)],
            next: writer.next,
        }
    }

    #[target_feature(enable = "avx2,fma,popcnt")]
    fn put_back(self, writer: &mut Writer) {
        writer.states = states(self.low, self.high);
        writer.next = self.next;
    }

    /// Makes room for half a row of symbols of these frequencies, which are not zero, and
    /// divides by them: the quotients times [`TOTAL`], and the remainders.
    #[inline]
    #[target_feature(enable = "avx2,fma,popcnt")]
    fn divide(
        &mut self,
        half: usize,
        writer: &mut Writer,
        frequency: __m256i,
    ) -> ([__m256i; 2], __m256i) {
        let (low, high) = (self.low[half], self.high[half]);
        let stays = _mm256_cmpgt_epi16(frequency, _mm256_srli_epi16::<5>(high));
        let [first, second] = lanes_of(stays);
        self.gather(writer, _mm256_extracti128_si256::<1>(low), second ^ 0xff);
        self.gather(writer, _mm256_castsi256_si128(low), first ^ 0xff);
        let low = _mm256_blendv_epi8(high, low, stays);
        let high = _mm256_and_si256(high, stays);
        let zero = _mm256_setzero_si256();
        let (a, rest_a) = quotients(
            _mm256_unpacklo_epi16(low, high),
            _mm256_unpacklo_epi16(frequency, zero),
        );
        let (b, rest_b) = quotients(
            _mm256_unpackhi_epi16(low, high),
            _mm256_unpackhi_epi16(frequency, zero),
        );
        ([a, b], _mm256_packus_epi32(rest_a, rest_b))
    }

    /// Puts the words of some of eight lanes before those that are there.
    #[inline]
    #[target_feature(enable = "avx2,fma,popcnt")]
    fn gather(&mut self, writer: &mut Writer, words: __m128i, lanes: usize) {
        let place: &mut [u16; 8] = writer.words[..self.next]
            .last_chunk_mut()
            .expect("a register more than words");
        // SAFETY: eight words, or 16 bytes, are a register.
        unsafe {
            let places = _mm_loadu_si128(GATHERED[lanes].as_ptr().cast());
            _mm_storeu_si128(place.as_mut_ptr().cast(), _mm_shuffle_epi8(words, places));
        }
        self.next -= SPREAD[lanes].count;
    }

    /// Goes on with the states that quotients and slots make.
    #[inline]
    #[target_feature(enable = "avx2,fma,popcnt")]
    fn set(&mut self, half: usize, [a, b]: [__m256i; 2], slot: __m256i) {
        let words = _mm256_set1_epi32(0xffff);
        // A quotient times TOTAL leaves the lowest bits to the slot.
        self.low[half] = _mm256_or_si256(
            _mm256_packus_epi32(_mm256_and_si256(a, words), _mm256_and_si256(b, words)),
            slot,
        );
        self.high[half] =
            _mm256_packus_epi32(_mm256_srli_epi32::<16>(a), _mm256_srli_epi32::<16>(b));
    }
}

/// Quotients times [`TOTAL`], and remainders, for divisors up to it and quotients below 2²¹.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn quotients(state: __m256i, frequency: __m256i) -> (__m256i, __m256i) {
    let divisor = _mm256_cvtepi32_ps(frequency);
    // 11 bits are exact, and twice as many after one step of Newton's.
    let inverse = _mm256_rcp_ps(divisor);
    let error = _mm256_fnmadd_ps(inverse, divisor, _mm256_set1_ps(1.0));
    let inverse = _mm256_fmadd_ps(inverse, error, inverse);
    let high = _mm256_cvtepi32_ps(_mm256_srli_epi32::<16>(state));
    let low = _mm256_cvtepi32_ps(_mm256_and_si256(state, _mm256_set1_epi32(0xffff)));
    let dividend = _mm256_fmadd_ps(high, _mm256_set1_ps(65_536.0), low);
    // Less than one off, so that the quotient is at most one off.
    let near = _mm256_cvttps_epi32(_mm256_mul_ps(dividend, inverse));
    let rest = _mm256_sub_epi32(state, _mm256_mullo_epi32(near, frequency));
    let over = _mm256_srai_epi32::<31>(rest);
    let rest = _mm256_add_epi32(rest, _mm256_and_si256(over, frequency));
    let fits = _mm256_cmpgt_epi32(frequency, rest);
    let rest = _mm256_sub_epi32(rest, _mm256_andnot_si256(fits, frequency));
    // One more where it does not fit, one less where it was over.
    let exact = _mm256_add_epi32(_mm256_add_epi32(near, over), _mm256_set1_epi32(1));
    let exact = _mm256_add_epi32(exact, fits);
    (
        _mm256_slli_epi32::<{ PRECISION.cast_signed() }>(exact),
        rest,
    )
}

#[target_feature(enable = "avx2,fma,popcnt")]
fn put_base(lanes: Lanes<'_>, bounds: &Bounds, writer: &mut Writer, rows: &mut [Row]) {
    let one = _mm256_set1_epi16(1);
    let zero = _mm256_setzero_si256();
    let frequencies = _mm256_set1_epi16((1 << NUMBER_BIT) - 1);
    let sign = _mm256_set1_epi16(1 << 10);
    let words = _mm256_set1_epi32(0xffff);
    let largest = lanes.of_largest();
    let classes = lanes.classes.map(u16::from);
    let narrow = lanes.are_narrow();
    let [_, zero_packed] = &bounds.all[0];
    let [one_first, _] = &bounds.all[1];
    let others = &bounds.all[1..bounds.numbers];
    let mut strange = zero;
    let mut state = Writing::of(writer);
    for row in rows.iter().rev() {
        for half in [1, 0] {
            let number = load_numbers(row, half);
            let magnitude = _mm256_abs_epi16(number);
            let largest = load(&largest, half);
            strange = _mm256_or_si256(strange, _mm256_cmpgt_epi16(magnitude, largest));
            let (first, frequency) = if narrow {
                let mut first = _mm256_set1_epi16(-1);
                let mut packed = load(zero_packed, half);
                let mut at = zero;
                for [of_first, of_packed] in others {
                    at = _mm256_add_epi16(at, one);
                    let same = _mm256_cmpeq_epi16(magnitude, at);
                    first = _mm256_blendv_epi8(first, load(of_first, half), same);
                    packed = _mm256_blendv_epi8(packed, load(of_packed, half), same);
                }
                let frequency = _mm256_and_si256(packed, frequencies);
                (
                    _mm256_add_epi16(first, one),
                    _mm256_add_epi16(frequency, one),
                )
            } else {
                let magnitude = _mm256_min_epu16(magnitude, largest);
                let shift = (LARGEST + 1).ilog2();
                let [a, b] = look_up(&BASE.codes, shift, load(&classes, half), magnitude);
                let frequency =
                    _mm256_packus_epi32(_mm256_and_si256(a, words), _mm256_and_si256(b, words));
                let first =
                    _mm256_packus_epi32(_mm256_srli_epi32::<16>(a), _mm256_srli_epi32::<16>(b));
                (first, frequency)
            };
            let (quotients, place) = state.divide(half, writer, frequency);
            let zero_half = _mm256_add_epi16(load(one_first, half), one);
            let nothing = _mm256_cmpeq_epi16(number, zero);
            let first_half = _mm256_cmpgt_epi16(zero_half, place);
            let second_half = _mm256_andnot_si256(first_half, nothing);
            let negative = _mm256_or_si256(_mm256_srai_epi16::<15>(number), second_half);
            let slot = _mm256_add_epi16(first, place);
            let slot = _mm256_sub_epi16(slot, _mm256_and_si256(second_half, zero_half));
            let slot = _mm256_add_epi16(slot, _mm256_and_si256(negative, sign));
            state.set(half, quotients, slot);
        }
    }
    state.put_back(writer);
    assert_eq!(
        _mm256_movemask_epi8(strange),
        0,
        "every class has its numbers"
    );
}

#[target_feature(enable = "avx2,fma,popcnt")]
fn put_thirds(bounds: &Thirds, writer: &mut Writer, rows: &mut [Row]) {
    let one = _mm256_set1_epi16(1);
    let zero = _mm256_setzero_si256();
    let total = _mm256_set1_epi16(TOTAL.cast_signed());
    let third = _mm256_set1_epi16(THIRD.cast_signed());
    let mut impossible = zero;
    let mut state = Writing::of(writer);
    for row in rows.iter_mut().rev() {
        for half in [1, 0] {
            let number = load_numbers(row, half);
            let magnitude = _mm256_abs_epi16(number);
            let coarser = _mm256_mulhi_epu16(_mm256_add_epi16(magnitude, one), third);
            let (middle, away) = bounds.at(coarser, half);
            let tripled = _mm256_add_epi16(_mm256_add_epi16(coarser, coarser), coarser);
            // Next to zero the symbol is the sign itself.
            let nothing = _mm256_cmpeq_epi16(coarser, zero);
            let magnitude = _mm256_blendv_epi8(magnitude, number, nothing);
            let is_towards = _mm256_cmpgt_epi16(tripled, magnitude);
            let is_away = _mm256_cmpgt_epi16(magnitude, tripled);
            let first = _mm256_andnot_si256(is_towards, middle);
            let first = _mm256_blendv_epi8(first, away, is_away);
            let end = _mm256_blendv_epi8(away, middle, is_towards);
            let end = _mm256_blendv_epi8(end, total, is_away);
            let negative = _mm256_srai_epi16::<15>(number);
            let signed = _mm256_sub_epi16(_mm256_xor_si256(coarser, negative), negative);
            store(row, half, signed);
            let frequency = _mm256_sub_epi16(end, first);
            impossible = _mm256_or_si256(impossible, _mm256_cmpeq_epi16(frequency, zero));
            let (quotients, place) = state.divide(half, writer, frequency);
            state.set(half, quotients, _mm256_add_epi16(first, place));
        }
    }
    state.put_back(writer);
    assert_eq!(
        _mm256_movemask_epi8(impossible),
        0,
        "every class has its thirds"
    );
}

#[target_feature(enable = "avx2,fma,popcnt")]
fn put_bytes(table: &ByteTable, writer: &mut Writer, rows: &[Row]) {
    let zero = _mm256_setzero_si256();
    let words = _mm256_set1_epi32(0xffff);
    let byte_bits = _mm256_set1_epi16(0xff);
    let mut impossible = zero;
    let mut state = Writing::of(writer);
    for row in rows.iter().rev() {
        for half in [1, 0] {
            let byte = load_numbers(row, half);
            let more = _mm256_andnot_si256(byte_bits, byte);
            let [a, b] = look_up(&table.codes, 0, zero, byte);
            let frequency =
                _mm256_packus_epi32(_mm256_and_si256(a, words), _mm256_and_si256(b, words));
            let none = _mm256_cmpeq_epi16(frequency, zero);
            impossible = _mm256_or_si256(impossible, _mm256_or_si256(none, more));
            let first = _mm256_packus_epi32(_mm256_srli_epi32::<16>(a), _mm256_srli_epi32::<16>(b));
            let (quotients, place) = state.divide(half, writer, frequency);
            state.set(half, quotients, _mm256_add_epi16(first, place));
        }
    }
    state.put_back(writer);
    assert_eq!(
        _mm256_testz_si256(impossible, impossible),
        1,
        "every table has its bytes"
    );
}

/// For a set of eight lanes that write words: which byte each byte becomes. The words go to
/// the end in order.
static GATHERED: [[u8; 16]; 256] = {
    let mut all = [[NOTHING; 16]; 256];
    let mut lanes = 0;
    while lanes < all.len() {
        let (mut lane, mut place) = (8u8, 16);
        while lane > 0 {
            lane -= 1;
            if lanes >> lane & 1 == 1 {
                place -= 2;
                all[lanes][place] = 2 * lane;
                all[lanes][place + 1] = 2 * lane + 1;
            }
        }
        lanes += 1;
    }
    all
};
