//! Kernels for x86-64. The scalar code one level up says what they compute.
//!
//! A row of a stream is two registers of AVX-512 or four of AVX2. Per register:
//!
//! ```text
//! slot     = slots[table << 11 | state & 2047]            one gather
//! state    = frequency(slot) * (state >> 11) + bias(slot)
//! refilled = state < 2^16
//! state    = refilled ? state << 16 | next word : state   words go to lanes in order
//! ```
//!
//! What limits it is the latency of the gather and of this chain, so several streams are
//! decoded in turns.

#![expect(
    unsafe_code,
    reason = "vector loads, stores and gathers take pointers; every use says why it stays in bounds"
)]

use std::arch::x86_64::*;

use super::{Code, LANES, PRECISION, Reader, START, TOTAL, Tables, Words};

/// A stream, the tables of its positions, and where its symbols go.
type Stream<'a> = (Reader, &'a [u8], &'a mut [u8]);

pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("popcnt")
}

pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt")
}

/// # Panics
/// The CPU has no AVX-512, or the streams do not have equally many symbols.
pub(super) fn decode_avx512(tables: &Tables, streams: &mut [Stream<'_>]) {
    assert!(has_avx512(), "checked when the kernel was chosen");
    // SAFETY: the CPU has the features; `check` has seen to the lengths.
    unsafe {
        match streams {
            [] => (),
            [a] => avx512(tables, check([a])),
            [a, b] => avx512(tables, check([a, b])),
            [a, b, c] => avx512(tables, check([a, b, c])),
            [a, b, c, d] => avx512(tables, check([a, b, c, d])),
            more => {
                let (now, later) = more.split_at_mut(4);
                decode_avx512(tables, now);
                decode_avx512(tables, later);
            }
        }
    }
}

/// # Panics
/// The CPU has no AVX2, or the streams do not have equally many symbols.
pub(super) fn decode_avx2(tables: &Tables, streams: &mut [Stream<'_>]) {
    assert!(has_avx2(), "checked when the kernel was chosen");
    for pair in streams.chunks_mut(2) {
        // SAFETY: the CPU has the features; `check` has seen to the lengths.
        unsafe {
            match pair {
                [a] => avx2(tables, check([a])),
                [a, b] => avx2(tables, check([a, b])),
                _ => (),
            }
        }
    }
}

/// What the kernels rely on besides what the caller has checked already: whole rows, and
/// tables that exist.
fn check<'a, 'b, const S: usize>(streams: [&'a mut Stream<'b>; S]) -> [&'a mut Stream<'b>; S] {
    let len = streams.first().map_or(0, |(_, _, output)| output.len());
    for (reader, tables, output) in &streams {
        assert!(output.len() == len && len.is_multiple_of(LANES), "rows");
        assert!(
            !tables.is_empty() && tables.len().is_multiple_of(LANES),
            "rows"
        );
        assert_eq!(reader.words.len(), reader.end + LANES, "room to read");
    }
    streams
}

/// # Safety
/// The streams passed [`check`], and every table that they name is in `tables`.
#[target_feature(enable = "avx512f,popcnt")]
#[expect(
    clippy::needless_range_loop,
    reason = "two arrays by one index each, unrolled"
)]
fn avx512<const S: usize>(tables: &Tables, streams: [&mut Stream<'_>; S]) {
    let slots = tables.slots.as_ptr();
    let low = _mm512_set1_epi32((TOTAL - 1).cast_signed());
    let twelve_bits = _mm512_set1_epi32(0xfff);
    let start = _mm512_set1_epi32(START.cast_signed());
    let mut states = [[_mm512_setzero_si512(); 2]; S];
    let mut next = [0usize; S];
    let mut at_table = [0usize; S];
    for (states, stream) in states.iter_mut().zip(&streams) {
        let stored = stream.0.states.as_ptr();
        // SAFETY: 32 states are two registers.
        *states = unsafe {
            [
                _mm512_loadu_si512(stored.cast()),
                _mm512_loadu_si512(stored.add(16).cast()),
            ]
        };
    }
    let symbols = streams.first().map_or(0, |stream| stream.2.len());
    let mut position = 0;
    while position < symbols {
        for half in 0..2 {
            for s in 0..S {
                let (reader, tables, output) = &mut *streams[s];
                let at = at_table[s] + 16 * half;
                // SAFETY: `at_table` is a multiple of 32 below the length, which is one too.
                let numbers = unsafe { _mm_loadu_si128(tables.as_ptr().add(at).cast()) };
                let first = _mm512_slli_epi32::<PRECISION>(_mm512_cvtepu8_epi32(numbers));
                let state = states[s][half];
                let index = _mm512_or_si512(first, _mm512_and_si512(state, low));
                // SAFETY: every table has 2048 slots, and each that is named exists.
                let slot = unsafe { _mm512_i32gather_epi32::<4>(index, slots.cast()) };
                let frequency = _mm512_and_si512(_mm512_srli_epi32::<8>(slot), twelve_bits);
                let quotient = _mm512_srli_epi32::<PRECISION>(state);
                let state = _mm512_add_epi32(
                    _mm512_mullo_epi32(frequency, quotient),
                    _mm512_srli_epi32::<20>(slot),
                );
                let refill = _mm512_cmplt_epu32_mask(state, start);
                let from = next[s].min(reader.end);
                // SAFETY: 32 words lie at and after `end`.
                let words = unsafe { _mm256_loadu_si256(reader.words.as_ptr().add(from).cast()) };
                let words = _mm512_maskz_expand_epi32(refill, _mm512_cvtepu16_epi32(words));
                let shifted = _mm512_slli_epi32::<16>(state);
                states[s][half] = _mm512_mask_or_epi32(state, refill, shifted, words);
                next[s] += refill.count_ones() as usize;
                let to = position + 16 * half;
                // SAFETY: `position` is a multiple of 32 below the length, which is one too.
                unsafe {
                    _mm_storeu_si128(
                        output.as_mut_ptr().add(to).cast(),
                        _mm512_cvtepi32_epi8(slot),
                    );
                }
            }
        }
        position += LANES;
        for (at, stream) in at_table.iter_mut().zip(&streams) {
            *at += LANES;
            if *at == stream.1.len() {
                *at = 0;
            }
        }
    }
    for ((states, next), stream) in states.iter().zip(next).zip(streams) {
        stream.0.next = next;
        let stored = stream.0.states.as_mut_ptr();
        // SAFETY: 32 states are two registers.
        unsafe {
            _mm512_storeu_si512(stored.cast(), states[0]);
            _mm512_storeu_si512(stored.add(16).cast(), states[1]);
        }
    }
}

/// # Safety
/// As for [`avx512`].
#[target_feature(enable = "avx2,popcnt")]
#[expect(
    clippy::needless_range_loop,
    reason = "two arrays by one index each, unrolled"
)]
fn avx2<const S: usize>(tables: &Tables, streams: [&mut Stream<'_>; S]) {
    let slots = tables.slots.as_ptr();
    let low = _mm256_set1_epi32((TOTAL - 1).cast_signed());
    let twelve_bits = _mm256_set1_epi32(0xfff);
    let zero = _mm256_setzero_si256();
    // Bytes 0, 4, 8 and 12 of each half.
    let lowest = _mm256_set1_epi64x(0x0c08_0400);
    let mut states = [[zero; 4]; S];
    let mut next = [0usize; S];
    let mut at_table = [0usize; S];
    for (states, stream) in states.iter_mut().zip(&streams) {
        for (quarter, state) in states.iter_mut().enumerate() {
            let stored = stream.0.states.as_ptr();
            // SAFETY: 32 states are four registers.
            *state = unsafe { _mm256_loadu_si256(stored.add(8 * quarter).cast()) };
        }
    }
    let symbols = streams.first().map_or(0, |stream| stream.2.len());
    let mut position = 0;
    while position < symbols {
        for quarter in 0..4 {
            for s in 0..S {
                let (reader, tables, output) = &mut *streams[s];
                let at = at_table[s] + 8 * quarter;
                // SAFETY: `at_table` is a multiple of 32 below the length, which is one too.
                let numbers = unsafe { _mm_loadl_epi64(tables.as_ptr().add(at).cast()) };
                let first =
                    _mm256_slli_epi32::<{ PRECISION.cast_signed() }>(_mm256_cvtepu8_epi32(numbers));
                let state = states[s][quarter];
                let index = _mm256_or_si256(first, _mm256_and_si256(state, low));
                // SAFETY: every table has 2048 slots, and each that is named exists.
                let slot = unsafe { _mm256_i32gather_epi32::<4>(slots.cast(), index) };
                let frequency = _mm256_and_si256(_mm256_srli_epi32::<8>(slot), twelve_bits);
                let quotient = _mm256_srli_epi32::<{ PRECISION.cast_signed() }>(state);
                let state = _mm256_add_epi32(
                    _mm256_mullo_epi32(frequency, quotient),
                    _mm256_srli_epi32::<20>(slot),
                );
                let refill = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(state), zero);
                let lanes =
                    _mm256_movemask_ps(_mm256_castsi256_ps(refill)).cast_unsigned() as usize;
                let from = next[s].min(reader.end);
                // SAFETY: 32 words lie at and after `end`.
                let words = unsafe { _mm_loadu_si128(reader.words.as_ptr().add(from).cast()) };
                let places = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(SPREAD[lanes & 0xff]));
                let words = _mm256_permutevar8x32_epi32(_mm256_cvtepu16_epi32(words), places);
                let refilled = _mm256_or_si256(_mm256_slli_epi32::<16>(state), words);
                states[s][quarter] = _mm256_blendv_epi8(state, refilled, refill);
                next[s] += lanes.count_ones() as usize;
                let bytes = _mm256_shuffle_epi8(slot, lowest);
                let lower = _mm256_extract_epi32::<0>(bytes).to_le_bytes();
                let upper = _mm256_extract_epi32::<4>(bytes).to_le_bytes();
                let to = position + 8 * quarter;
                output[to..to + 4].copy_from_slice(&lower);
                output[to + 4..to + 8].copy_from_slice(&upper);
            }
        }
        position += LANES;
        for (at, stream) in at_table.iter_mut().zip(&streams) {
            *at += LANES;
            if *at == stream.1.len() {
                *at = 0;
            }
        }
    }
    for ((states, next), stream) in states.iter().zip(next).zip(streams) {
        stream.0.next = next;
        for (quarter, state) in states.iter().enumerate() {
            let stored = stream.0.states.as_mut_ptr();
            // SAFETY: 32 states are four registers.
            unsafe { _mm256_storeu_si256(stored.add(8 * quarter).cast(), *state) };
        }
    }
}

/// For each set of lanes that read a word, which word each of them reads: a byte a lane.
static SPREAD: [i64; 256] = spread();

const fn spread() -> [i64; 256] {
    let mut all = [0; 256];
    let mut lanes = 0;
    while lanes < all.len() {
        let (mut lane, mut word) = (0, 0);
        while lane < 8 {
            if lanes >> lane & 1 == 1 {
                all[lanes] |= word << (8 * lane);
                word += 1;
            }
            lane += 1;
        }
        lanes += 1;
    }
    all
}

/// # Panics
/// The CPU has no AVX-512, or a symbol is one that its table does not have.
pub(super) fn encode(
    tables: &Tables,
    symbols: &[u8],
    numbers: &[u8],
    words: &mut Words,
) -> [u32; LANES] {
    assert!(has_avx512(), "checked when the kernel was chosen");
    let largest = |all: &[u8]| usize::from(all.iter().copied().max().unwrap_or(0));
    assert!(
        largest(symbols) < tables.alphabet && largest(numbers) < tables.len(),
        "the tables, and the symbols of the largest, are there"
    );
    assert!(
        symbols.len().is_multiple_of(LANES)
            && !numbers.is_empty()
            && numbers.len().is_multiple_of(LANES)
            && words.next >= symbols.len() + LANES,
        "rows, and room for a word a symbol"
    );
    // SAFETY: the CPU has the features, and the assertions are the contract.
    unsafe { encode_avx512(tables, symbols, numbers, words) }
}

/// # Safety
/// There are whole rows of symbols and of tables, all tables exist, no symbol is beyond the
/// largest alphabet, and `words` has room for a word a symbol and one register more.
#[target_feature(enable = "avx512f,popcnt")]
unsafe fn encode_avx512(
    tables: &Tables,
    symbols: &[u8],
    numbers: &[u8],
    words: &mut Words,
) -> [u32; LANES] {
    let codes = tables.codes.as_ptr();
    let alphabet = _mm512_set1_epi32(i32::try_from(tables.alphabet).unwrap_or(0));
    let half = _mm512_set1_pd(0.5);
    let mut states = [_mm512_set1_epi32(START.cast_signed()); 2];
    let mut impossible = 0;
    let rows = numbers.len() / LANES;
    let mut row = (symbols.len() / LANES)
        .checked_sub(1)
        .map_or(0, |last| last % rows);
    let mut position = symbols.len();
    while position > 0 {
        position -= LANES;
        for register in [1, 0] {
            let offset = 16 * register;
            // SAFETY: `position` is a multiple of 32 below the length, which is one too,
            // and so is the table's place.
            let (symbol, number) = unsafe {
                (
                    _mm_loadu_si128(symbols.as_ptr().add(position + offset).cast()),
                    _mm_loadu_si128(numbers.as_ptr().add(row * LANES + offset).cast()),
                )
            };
            let index = _mm512_add_epi32(
                _mm512_mullo_epi32(_mm512_cvtepu8_epi32(number), alphabet),
                _mm512_cvtepu8_epi32(symbol),
            );
            // In units of 8 bytes: a code has its reciprocal first, then the rest.
            let doubled = _mm512_slli_epi32::<1>(index);
            let (low, high) = halves(doubled);
            // SAFETY: there is a code for each symbol of each table, and it has 16 bytes.
            let (reciprocals, fields) = unsafe {
                let base = codes.cast::<f64>();
                let rest = codes.cast::<i64>().add(1);
                (
                    [
                        _mm512_i32gather_pd::<8>(low, base),
                        _mm512_i32gather_pd::<8>(high, base),
                    ],
                    [
                        _mm512_i32gather_epi64::<8>(low, rest),
                        _mm512_i32gather_epi64::<8>(high, rest),
                    ],
                )
            };
            let frequency = join(
                _mm512_cvtepi64_epi32(fields[0]),
                _mm512_cvtepi64_epi32(fields[1]),
            );
            let first = join(
                _mm512_cvtepi64_epi32(_mm512_srli_epi64::<32>(fields[0])),
                _mm512_cvtepi64_epi32(_mm512_srli_epi64::<32>(fields[1])),
            );
            let mut state = states[register];
            let full =
                _mm512_cmpge_epu32_mask(_mm512_srli_epi32::<{ 32 - PRECISION }>(state), frequency);
            impossible |= _mm512_testn_epi32_mask(frequency, frequency);
            let count = full.count_ones() as usize;
            words.next -= count;
            let out = _mm512_maskz_compress_epi32(full, state);
            #[expect(clippy::cast_possible_truncation, reason = "at most 16 bits")]
            let some = ((1u32 << count) - 1) as u16;
            // SAFETY: `next` went down by at most one for each symbol, and as many words
            // are stored as it just went down by.
            unsafe {
                _mm512_mask_cvtepi32_storeu_epi16(
                    words.words.as_mut_ptr().add(words.next).cast(),
                    some,
                    out,
                );
            }
            state = _mm512_mask_srli_epi32::<16>(state, full, state);
            // Exact: states have 32 bits and doubles 53, so that half a unit is more than
            // the error of the reciprocal and the product, and less than a step.
            let (low, high) = halves(state);
            let quotient = join(
                _mm512_cvttpd_epu32(_mm512_mul_pd(
                    _mm512_add_pd(_mm512_cvtepu32_pd(low), half),
                    reciprocals[0],
                )),
                _mm512_cvttpd_epu32(_mm512_mul_pd(
                    _mm512_add_pd(_mm512_cvtepu32_pd(high), half),
                    reciprocals[1],
                )),
            );
            let rest = _mm512_sub_epi32(state, _mm512_mullo_epi32(quotient, frequency));
            states[register] = _mm512_add_epi32(
                _mm512_add_epi32(_mm512_slli_epi32::<PRECISION>(quotient), rest),
                first,
            );
        }
        row = row.checked_sub(1).unwrap_or(rows - 1);
    }
    assert_eq!(impossible, 0, "every table has its symbols");
    let mut stored = [0; LANES];
    // SAFETY: 32 states are two registers.
    unsafe {
        _mm512_storeu_si512(stored.as_mut_ptr().cast(), states[0]);
        _mm512_storeu_si512(stored.as_mut_ptr().add(16).cast(), states[1]);
    }
    stored
}

#[target_feature(enable = "avx512f")]
fn halves(all: __m512i) -> (__m256i, __m256i) {
    (
        _mm512_castsi512_si256(all),
        _mm512_extracti64x4_epi64::<1>(all),
    )
}

#[target_feature(enable = "avx512f")]
fn join(low: __m256i, high: __m256i) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
}

const _: () = assert!(size_of::<Code>() == 16, "two units of the gathers");
