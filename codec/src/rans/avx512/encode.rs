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
    fn of(writer: &Writer, rows: usize) -> Self {
        let (before, after) = writer.words.split_at(writer.next);
        assert!(
            before.len() >= rows * LANES && after.len() >= LANES,
            "room for the rows"
        );
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

    /// Makes room for symbols of these frequencies, which are not zero, and divides by them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn divide(&mut self, writer: &mut Writer, frequency: __m512i) -> Quotients {
        let full = _mm512_cmpge_epu16_mask(_mm512_srli_epi16::<5>(self.high), frequency);
        let words = _mm512_maskz_compress_epi16(full, self.low);
        let count = full.count_ones();
        self.next -= count as usize;
        let some = u32::MAX.unbounded_shr(32 - count);
        // SAFETY: there is room for a word a lane before, and a register beyond, as was checked.
        unsafe {
            let place = writer.words.as_mut_ptr().add(self.next);
            _mm512_mask_storeu_epi16(place.cast(), some, words);
        }
        let low = _mm512_mask_mov_epi16(self.low, full, self.high);
        let high = _mm512_maskz_mov_epi16(!full, self.high);
        let zero = _mm512_setzero_si512();
        let a = near_quotients(
            _mm512_unpacklo_epi16(low, high),
            _mm512_unpacklo_epi16(frequency, zero),
        );
        let b = near_quotients(
            _mm512_unpackhi_epi16(low, high),
            _mm512_unpackhi_epi16(frequency, zero),
        );
        let near_low = _mm512_permutex2var_epi16(a, load(&LOW_HALVES), b);
        let near_high = _mm512_permutex2var_epi16(a, load(&HIGH_HALVES), b);
        // Below twice the frequency, so that the low bits tell.
        let rest = _mm512_sub_epi16(low, _mm512_mullo_epi16(near_low, frequency));
        Quotients {
            low: near_low,
            high: near_high,
            under: _mm512_cmpge_epu16_mask(rest, frequency),
            rest: _mm512_min_epu16(rest, _mm512_sub_epi16(rest, frequency)),
        }
    }

    /// Goes on with the states that quotients and slots make.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn set(&mut self, quotients: Quotients, slot: __m512i) {
        let Quotients {
            low, high, under, ..
        } = quotients;
        let total = _mm512_set1_epi16(TOTAL.cast_signed());
        self.high = _mm512_shldi_epi16::<{ PRECISION.cast_signed() }>(high, low);
        let low = _mm512_or_si512(_mm512_slli_epi16::<PRECISION>(low), slot);
        self.low = _mm512_mask_add_epi16(low, under, low, total);
        let carry = _mm512_mask_cmplt_epu16_mask(under, self.low, total);
        self.high = _mm512_mask_add_epi16(self.high, carry, self.high, _mm512_set1_epi16(1));
    }
}

/// What is left of states that were divided by frequencies.
#[derive(Clone, Copy)]
struct Quotients {
    /// Halves of the quotients, of some less one.
    low: __m512i,
    high: __m512i,
    /// Of these.
    under: __mmask32,
    rest: __m512i,
}

/// Quotients for divisors up to [`TOTAL`] that are below 2²¹, or one less.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn near_quotients(state: __m512i, frequency: __m512i) -> __m512i {
    // Rounded down throughout, so that the quotient is never too large; and less than one too
    // small: three roundings of at most 2⁻²³ each, and what a step of Newton's leaves of the
    // error of 2⁻¹⁴.
    const DOWN: i32 = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
    let divisor = _mm512_cvtepi32_ps(frequency);
    let inverse = _mm512_rcp14_ps(divisor);
    let error = _mm512_fnmadd_ps(inverse, divisor, _mm512_set1_ps(1.0));
    let inverse = _mm512_fmadd_round_ps::<DOWN>(inverse, error, inverse);
    let dividend = _mm512_cvt_roundepu32_ps::<DOWN>(state);
    _mm512_cvttps_epu32(_mm512_mul_round_ps::<DOWN>(dividend, inverse))
}

/// The places of the lower halves of what two unpacked registers hold.
static LOW_HALVES: [u16; LANES] = halves(0);
/// And of the upper ones.
static HIGH_HALVES: [u16; LANES] = halves(1);

const fn halves(which: u16) -> [u16; LANES] {
    let mut places = [0; LANES];
    let mut lane = 0;
    while lane < 32 {
        // Of every eight lanes four are in the first register.
        let register = lane & 4;
        places[lane as usize] = (register << 3) + (lane & !7) + 2 * (lane & 3) + which;
        lane += 1;
    }
    places
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
        *state = Writing::of(writer, tokens);
    }
    for token in (0..tokens).rev() {
        each_stream!(s in S {
            // SAFETY: there are so many rows of every stream.
            let number = load_numbers(unsafe { rows.get_unchecked(s * tokens + token) });
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
            let quotients = states[s].divide(writers[s], frequency);
            let place = quotients.rest;
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
    let five = _mm512_set1_epi16(5);
    let mut least = one;
    let mut states = [Writing {
        low: zero,
        high: zero,
        next: 0,
    }; S];
    for (state, writer) in states.iter_mut().zip(&writers) {
        *state = Writing::of(writer, tokens);
    }
    for token in (0..tokens).rev() {
        each_stream!(s in S {
            // SAFETY: there are so many rows of every stream.
            let row = unsafe { rows.get_unchecked_mut(s * tokens + token) };
            let number = load_numbers(row);
            let magnitude = _mm512_abs_epi16(number);
            let coarser = _mm512_mulhi_epu16(_mm512_add_epi16(magnitude, one), third);
            let nothing = _mm512_cmple_epu16_mask(magnitude, one);
            let far = _mm512_cmpge_epu16_mask(magnitude, five);
            let (middle, away) = bounds.of_masks(!nothing, far);
            let tripled = _mm512_add_epi16(_mm512_add_epi16(coarser, coarser), coarser);
            // Next to zero the symbol is the sign itself.
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
            least = _mm512_min_epu16(least, frequency);
            let quotients = states[s].divide(writers[s], frequency);
            states[s].set(quotients, _mm512_add_epi16(first, quotients.rest));
        });
    }
    for (state, writer) in states.into_iter().zip(&mut writers) {
        state.put_back(writer);
    }
    let impossible = _mm512_testn_epi16_mask(least, least);
    assert_eq!(impossible, 0, "every class has its thirds");
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn put_bytes<const S: usize>(tables: &[ByteTable], mut writers: [&mut Writer; S], rows: &[Row]) {
    let tokens = rows.len() / S;
    let none = [_mm512_setzero_si512(); 2];
    let words = _mm512_set1_epi32(0xffff);
    let byte_bits = _mm512_set1_epi16(0xff);
    let mut impossible = 0;
    let mut states = [Writing::of(writers[0], tokens); S];
    for (state, writer) in states.iter_mut().zip(&writers) {
        *state = Writing::of(writer, tokens);
    }
    for token in (0..tokens).rev() {
        each_stream!(s in S {
            // SAFETY: there are so many rows of every stream.
            let byte = load_numbers(unsafe { rows.get_unchecked(s * tokens + token) });
            impossible |= _mm512_cmpgt_epu16_mask(byte, byte_bits);
            let [a, b] = look_up(&tables[s].codes, none, byte);
            let frequency = narrowed(_mm512_and_si512(a, words), _mm512_and_si512(b, words));
            impossible |= _mm512_testn_epi16_mask(frequency, frequency);
            let first = narrowed(_mm512_srli_epi32::<16>(a), _mm512_srli_epi32::<16>(b));
            let quotients = states[s].divide(writers[s], frequency);
            states[s].set(quotients, _mm512_add_epi16(first, quotients.rest));
        });
    }
    for (state, writer) in states.into_iter().zip(&mut writers) {
        state.put_back(writer);
    }
    assert_eq!(impossible, 0, "every table has its bytes");
}
