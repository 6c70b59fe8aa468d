//! The encoders for AVX-512: the way back.
//!
//! What symbols take does not depend on the states, so it is found for a few rows first; the
//! chain from state to state is short then, and several streams hide its latency.

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

/// What coding a row of symbols takes.
#[derive(Clone, Copy)]
struct Symbols {
    /// The first slots, and how many follow each. None is zero.
    first: __m512i,
    frequency: __m512i,
    /// Places from which on slots are further by a [`Gap`].
    gap_from: __m512i,
    /// Of the frequencies, unpacked.
    inverse: [__m512; 2],
}

/// How much further slots are from some places on: of zero, which has both halves.
type Gap = __m512i;

impl Symbols {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn new(first: __m512i, frequency: __m512i) -> Self {
        let zero = _mm512_setzero_si512();
        Self {
            first,
            frequency,
            gap_from: _mm512_set1_epi16(-1),
            inverse: [
                inverse(_mm512_unpacklo_epi16(frequency, zero)),
                inverse(_mm512_unpackhi_epi16(frequency, zero)),
            ],
        }
    }
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

    /// Makes room for symbols, divides by their frequencies, and goes on with the states that
    /// quotients and slots make.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    fn put(&mut self, writer: &mut Writer, symbols: &Symbols, gap: Option<Gap>) {
        let frequency = symbols.frequency;
        let full = _mm512_cmpge_epu16_mask(_mm512_srli_epi16::<5>(self.high), frequency);
        let words = _mm512_maskz_compress_epi16(full, self.low);
        let count = full.count_ones();
        self.next -= count as usize;
        let [some, _] = low_bits(count);
        // SAFETY: there is room for a word a lane before, and a register beyond, as was checked.
        unsafe {
            let place = writer.words.as_mut_ptr().add(self.next);
            _mm512_mask_storeu_epi16(place.cast(), some, words);
        }
        let low = _mm512_mask_mov_epi16(self.low, full, self.high);
        let high = _mm512_maskz_mov_epi16(!full, self.high);
        let [inverse_a, inverse_b] = symbols.inverse;
        let a = near_quotients(_mm512_unpacklo_epi16(low, high), inverse_a);
        let b = near_quotients(_mm512_unpackhi_epi16(low, high), inverse_b);
        let near_low = _mm512_permutex2var_epi16(a, load(&LOW_HALVES), b);
        let near_high = _mm512_permutex2var_epi16(a, load(&HIGH_HALVES), b);
        // Below twice the frequency, so that the low bits tell.
        let rest = _mm512_sub_epi16(low, _mm512_mullo_epi16(near_low, frequency));
        let under = _mm512_cmpge_epu16_mask(rest, frequency);
        let place = _mm512_min_epu16(rest, _mm512_sub_epi16(rest, frequency));
        let mut slot = _mm512_add_epi16(symbols.first, place);
        if let Some(gap) = gap {
            let beyond = _mm512_cmpge_epu16_mask(place, symbols.gap_from);
            slot = _mm512_mask_add_epi16(slot, beyond, slot, gap);
        }
        // A quotient times TOTAL leaves the lowest bits to the slot.
        let total = _mm512_set1_epi16(TOTAL.cast_signed());
        let high = _mm512_shldi_epi16::<{ PRECISION.cast_signed() }>(near_high, near_low);
        let low = _mm512_or_si512(_mm512_slli_epi16::<PRECISION>(near_low), slot);
        self.low = _mm512_mask_add_epi16(low, under, low, total);
        let carry = _mm512_mask_cmplt_epu16_mask(under, self.low, total);
        self.high = _mm512_mask_add_epi16(high, carry, high, _mm512_set1_epi16(1));
    }
}

/// Codes rows, the last one first, as `symbols` finds what a row of a stream takes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn put<const S: usize>(
    mut writers: [&mut Writer; S],
    tokens: usize,
    gap: Option<Gap>,
    mut symbols: impl FnMut(usize, usize) -> Symbols,
) {
    let mut states = [Writing::of(writers[0], tokens); S];
    for (state, writer) in states.iter_mut().zip(&writers) {
        *state = Writing::of(writer, tokens);
    }
    let none = Symbols::new(_mm512_setzero_si512(), _mm512_set1_epi16(1));
    let mut batch = [[none; S]; BATCH];
    let mut end = tokens;
    while end > 0 {
        let start = end.saturating_sub(BATCH);
        let batch = &mut batch[..end - start];
        for (token, of_token) in (start..end).zip(batch.iter_mut()) {
            each_stream!(s in S {
                of_token[s] = symbols(s, token);
            });
        }
        for of_token in batch.iter().rev() {
            each_stream!(s in S {
                states[s].put(writers[s], &of_token[s], gap);
            });
        }
        end = start;
    }
    for (state, writer) in states.into_iter().zip(&mut writers) {
        state.put_back(writer);
    }
}

/// As many bits, up to 32, and what is beyond.
#[inline(always)]
fn low_bits(count: u32) -> [u32; 2] {
    let bits = (1u64 << count) - 1;
    #[expect(clippy::cast_possible_truncation, reason = "halves")]
    let halves = [bits as u32, (bits >> 32) as u32];
    halves
}

/// The inverses of frequencies up to [`TOTAL`], not too large: 2⁻²² less at most.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn inverse(frequency: __m512i) -> __m512 {
    let divisor = _mm512_cvtepi32_ps(frequency);
    let near = _mm512_rcp14_ps(divisor);
    let error = _mm512_fnmadd_ps(near, divisor, _mm512_set1_ps(1.0));
    _mm512_fmadd_round_ps::<DOWN>(near, error, near)
}

/// Quotients that are below 2²¹, or one less.
///
/// Rounded down throughout, so that the quotient is never too large; and less than one too
/// small: three roundings of at most 2⁻²³ each, and what a step of Newton's leaves of the
/// error of 2⁻¹⁴.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn near_quotients(state: __m512i, inverse: __m512) -> __m512i {
    let dividend = _mm512_cvt_roundepu32_ps::<DOWN>(state);
    _mm512_cvttps_epu32(_mm512_mul_round_ps::<DOWN>(dividend, inverse))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn put_base<const S: usize>(lanes: Lanes<'_>, writers: [&mut Writer; S], rows: &mut [Row]) {
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
    let one = _mm512_set1_epi16(1);
    let half = _mm512_set1_epi16(1 << 10);
    let gap = _mm512_sub_epi16(half, zero_half);
    let largest = load(&lanes.of_largest());
    let mut strange = 0;
    put(writers, tokens, Some(gap), |stream, token| {
        // SAFETY: there are so many rows of every stream.
        let number = load_numbers(unsafe { rows.get_unchecked(stream * tokens + token) });
        let magnitude = _mm512_abs_epi16(number);
        strange |= _mm512_cmpgt_epu16_mask(magnitude, largest);
        let (mut first, mut frequency) = (zero_first, zero_frequency);
        if narrow {
            let mut at = _mm512_setzero_si512();
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
        let nothing = _mm512_testn_epi16_mask(number, number);
        let negative = _mm512_movepi16_mask(number);
        let first = _mm512_mask_add_epi16(first, negative, first, half);
        let symbols = Symbols::new(first, frequency);
        Symbols {
            gap_from: _mm512_mask_mov_epi16(symbols.gap_from, nothing, zero_half),
            ..symbols
        }
    });
    assert_eq!(strange, 0, "every class has its numbers");
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn put_thirds<const S: usize>(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    writers: [&mut Writer; S],
    rows: &mut [Row],
) {
    let tokens = rows.len() / S;
    let bounds = Thirds::of(lanes, tables);
    let zero = _mm512_setzero_si512();
    let one = _mm512_set1_epi16(1);
    let five = _mm512_set1_epi16(5);
    let third = _mm512_set1_epi16(THIRD.cast_signed());
    let total = _mm512_set1_epi16(TOTAL.cast_signed());
    let mut least = one;
    put(writers, tokens, None, |stream, token| {
        // SAFETY: there are so many rows of every stream.
        let row = unsafe { rows.get_unchecked_mut(stream * tokens + token) };
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
        store_numbers(row, _mm512_mask_sub_epi16(coarser, negative, zero, coarser));
        least = _mm512_min_epu16(least, frequency);
        Symbols::new(first, frequency)
    });
    let impossible = _mm512_testn_epi16_mask(least, least);
    assert_eq!(impossible, 0, "every class has its thirds");
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn put_bytes<const S: usize>(tables: &[ByteTable], writers: [&mut Writer; S], rows: &[Row]) {
    let tokens = rows.len() / S;
    let none = [_mm512_setzero_si512(); 2];
    let words = _mm512_set1_epi32(0xffff);
    let byte_bits = _mm512_set1_epi16(0xff);
    let mut impossible = 0;
    put(writers, tokens, None, |stream, token| {
        let byte = load_numbers(&rows[stream * tokens + token]);
        impossible |= _mm512_cmpgt_epu16_mask(byte, byte_bits);
        let [a, b] = look_up(&tables[stream].codes, none, byte);
        let frequency = narrowed(_mm512_and_si512(a, words), _mm512_and_si512(b, words));
        impossible |= _mm512_testn_epi16_mask(frequency, frequency);
        let first = narrowed(_mm512_srli_epi32::<16>(a), _mm512_srli_epi32::<16>(b));
        Symbols::new(first, frequency)
    });
    assert_eq!(impossible, 0, "every table has its bytes");
}

const DOWN: i32 = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;

/// Rows of a stream whose symbols are found at once: they stay in the nearest cache.
const BATCH: usize = 8;

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
