//! Decoders for the NEON of 64-bit ARM, which all such CPUs have. [`super::scalar`] says what
//! they compute, and the kernels for AVX-512 how: here a row is four registers of eight
//! lanes, masks are registers too, and words find their lanes by a table. Encoding, and what
//! looks symbols up by slot, is the scalar code.

#![expect(
    unsafe_code,
    reason = "kernels are compiled for their features, and loads take pointers"
)]

use std::arch::aarch64::*;

use super::spread::SPREAD;
use super::{LANES, Lanes, PRECISION, Reader, Row, TOTAL, scalar};
use crate::classes::{BASE, DISTANCES, NUMBER_BIT, ThirdTables};

/// Registers of a row, and lanes of a register.
const PARTS: usize = 4;
const WIDTH: usize = LANES / PARTS;

type Parts = [uint16x8_t; PARTS];

pub(super) fn decode_base(lanes: Lanes<'_>, readers: &mut [Reader], rows: &mut [Row]) {
    if !lanes.are_narrow() {
        return scalar::decode_base(lanes, readers, rows);
    }
    // A row of channels that are all zero has a bound all the same.
    let numbers = usize::from(lanes.largest).max(1);
    let bounds = BASE.firsts.iter().zip(&BASE.packed).take(numbers + 1);
    let bounds: Vec<_> = bounds
        .map(|(firsts, packed)| [lanes.of(firsts), lanes.of(packed)])
        .collect();
    let of_stream = rows.chunks_exact_mut((rows.len() / readers.len()).max(1));
    for (reader, rows) in readers.iter_mut().zip(of_stream) {
        // SAFETY: every CPU of this architecture has the feature.
        unsafe { narrow(&bounds, reader, rows) }
    }
}

pub(super) fn decode_thirds(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    readers: &mut [Reader],
    rows: &mut [Row],
) {
    let bounds = std::array::from_fn(|distance| {
        [&tables.middle, &tables.away].map(|bounds| lanes.of(&bounds[distance]))
    });
    let of_stream = rows.chunks_exact_mut((rows.len() / readers.len()).max(1));
    for (reader, rows) in readers.iter_mut().zip(of_stream) {
        // SAFETY: every CPU of this architecture has the feature.
        unsafe { thirds(&bounds, reader, rows) }
    }
}

/// A reader's states in registers.
#[derive(Clone, Copy)]
struct Reading {
    low: Parts,
    high: Parts,
    next: usize,
}

impl Reading {
    #[target_feature(enable = "neon")]
    fn of(reader: &Reader) -> Self {
        let (low, high) = (&reader.states.low, &reader.states.high);
        let mut state = Self {
            low: [load(low, 0); PARTS],
            high: [load(high, 0); PARTS],
            next: reader.next,
        };
        for part in 1..PARTS {
            (state.low[part], state.high[part]) = (load(low, part), load(high, part));
        }
        state
    }

    #[target_feature(enable = "neon")]
    fn put_back(self, reader: &mut Reader) {
        for part in 0..PARTS {
            store(&mut reader.states.low, part, self.low[part]);
            store(&mut reader.states.high, part, self.high[part]);
        }
        reader.next = self.next;
    }

    /// After a part of a row of symbols of these frequencies, in which the slots had these
    /// places; gives how many of `words` they read, of which `read` were read before.
    #[inline]
    #[target_feature(enable = "neon")]
    fn advance(
        &mut self,
        part: usize,
        frequency: uint16x8_t,
        place: uint16x8_t,
        words: &[u16; LANES],
        read: usize,
    ) -> usize {
        const DOWN: i32 = PRECISION.cast_signed();
        let (low, high) = (self.low[part], self.high[part]);
        let quotient_low = vorrq_u16(vshlq_n_u16::<5>(high), vshrq_n_u16::<DOWN>(low));
        let quotient_high = vshrq_n_u16::<DOWN>(high);
        let upper = vuzp2q_u16(
            vreinterpretq_u16_u32(vmull_u16(
                vget_low_u16(frequency),
                vget_low_u16(quotient_low),
            )),
            vreinterpretq_u16_u32(vmull_high_u16(frequency, quotient_low)),
        );
        let low = vmlaq_u16(place, frequency, quotient_low);
        let high = vmlaq_u16(upper, frequency, quotient_high);
        // A mask is less one.
        let high = vsubq_u16(high, vcltq_u16(low, place));
        let refill = vceqzq_u16(high);
        let spread = &SPREAD[lanes_of(refill)];
        self.high[part] = vbslq_u16(refill, low, high);
        self.low[part] = vbslq_u16(refill, taken(words, read, &spread.places), low);
        spread.count
    }
}

#[target_feature(enable = "neon")]
fn narrow(bounds: &[[[u16; LANES]; 2]], reader: &mut Reader, rows: &mut [Row]) {
    let one = vdupq_n_u16(1);
    let sign = vdupq_n_u16(1 << 10);
    let magnitudes = vdupq_n_u16((1 << 10) - 1);
    let frequencies = vdupq_n_u16((1 << NUMBER_BIT) - 1);
    let (zero, others) = bounds.split_first().expect("a bound of zero");
    let [one_first, _] = &others[0];
    let mut state = Reading::of(reader);
    for row in rows {
        let words = reader.upcoming(state.next);
        let mut read = 0;
        let mut magnitude = state.low;
        let mut first = [vdupq_n_u16(0); PARTS];
        let mut packed = first;
        for part in 0..PARTS {
            magnitude[part] = vandq_u16(state.low[part], magnitudes);
            packed[part] = load(&zero[1], part);
        }
        for [of_first, of_packed] in others {
            for part in 0..PARTS {
                let of_first = load(of_first, part);
                let reached = vcgeq_u16(magnitude[part], of_first);
                first[part] = vbslq_u16(reached, of_first, first[part]);
                packed[part] = vbslq_u16(reached, load(of_packed, part), packed[part]);
            }
        }
        for part in 0..PARTS {
            let negative = vtstq_u16(state.low[part], sign);
            let one_first = load(one_first, part);
            let second_half = vandq_u16(negative, vcltq_u16(magnitude[part], one_first));
            let place = vsubq_u16(magnitude[part], first[part]);
            let place = vaddq_u16(place, vandq_u16(second_half, one_first));
            let frequency = vaddq_u16(vandq_u16(packed[part], frequencies), one);
            let number = vshrq_n_u16::<{ NUMBER_BIT.cast_signed() }>(packed[part]);
            let number = vsubq_u16(veorq_u16(number, negative), negative);
            store_numbers(row, part, vreinterpretq_s16_u16(number));
            read += state.advance(part, frequency, place, words, read);
        }
        state.next += read;
    }
    state.put_back(reader);
}

#[target_feature(enable = "neon")]
fn thirds(bounds: &[[[u16; LANES]; 2]; DISTANCES], reader: &mut Reader, rows: &mut [Row]) {
    let one = vdupq_n_s16(1);
    let slots = vdupq_n_u16(TOTAL - 1);
    let total = vdupq_n_u16(TOTAL);
    let mut state = Reading::of(reader);
    for row in rows {
        let words = reader.upcoming(state.next);
        let mut read = 0;
        for part in 0..PARTS {
            let number = load_numbers(row, part);
            let distance = vreinterpretq_u16_s16(vabsq_s16(number));
            let [middle, away] = &bounds[0];
            let (mut middle, mut away) = (load(middle, part), load(away, part));
            for (d, [of_middle, of_away]) in (1..).zip(&bounds[1..]) {
                let reached = vcgeq_u16(distance, vdupq_n_u16(d));
                middle = vbslq_u16(reached, load(of_middle, part), middle);
                away = vbslq_u16(reached, load(of_away, part), away);
            }
            let slot = vandq_u16(state.low[part], slots);
            let is_middle = vcgeq_u16(slot, middle);
            let is_away = vcgeq_u16(slot, away);
            let first = vandq_u16(is_middle, middle);
            let first = vbslq_u16(is_away, away, first);
            let end = vbslq_u16(is_middle, away, middle);
            let end = vbslq_u16(is_away, total, end);
            // Less one for towards zero, one more for every bound that was reached.
            let reached = vreinterpretq_s16_u16(vaddq_u16(is_middle, is_away));
            let third = vnegq_s16(vaddq_s16(reached, one));
            let negative = vshrq_n_s16::<15>(number);
            let third = vsubq_s16(veorq_s16(third, negative), negative);
            let tripled = vaddq_s16(vaddq_s16(number, number), number);
            store_numbers(row, part, vaddq_s16(tripled, third));
            let (frequency, place) = (vsubq_u16(end, first), vsubq_u16(slot, first));
            read += state.advance(part, frequency, place, words, read);
        }
        state.next += read;
    }
    state.put_back(reader);
}

/// Which lanes a mask has.
#[inline]
#[target_feature(enable = "neon")]
fn lanes_of(mask: uint16x8_t) -> usize {
    let bits = load_eight(&[1, 2, 4, 8, 16, 32, 64, 128]);
    vaddvq_u16(vandq_u16(mask, bits)).into()
}

/// The words that eight lanes read, in their places.
#[inline]
#[target_feature(enable = "neon")]
fn taken(words: &[u16; LANES], from: usize, places: &[u8; 16]) -> uint16x8_t {
    let words = words[from..].first_chunk().expect("a word a lane");
    // SAFETY: 16 bytes are a register.
    let places = unsafe { vld1q_u8(places.as_ptr()) };
    vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(load_eight(words)), places))
}

#[inline]
#[target_feature(enable = "neon")]
fn load(lanes: &[u16; LANES], part: usize) -> uint16x8_t {
    load_eight(&lanes.as_chunks().0[part])
}

#[inline]
#[target_feature(enable = "neon")]
fn load_eight(lanes: &[u16; WIDTH]) -> uint16x8_t {
    // SAFETY: eight lanes of 16 bits are a register.
    unsafe { vld1q_u16(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store(lanes: &mut [u16; LANES], part: usize, values: uint16x8_t) {
    let (parts, _) = lanes.as_chunks_mut::<WIDTH>();
    // SAFETY: eight lanes of 16 bits are a register.
    unsafe { vst1q_u16(parts[part].as_mut_ptr(), values) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_numbers(row: &Row, part: usize) -> int16x8_t {
    let (parts, _) = row.as_chunks::<WIDTH>();
    // SAFETY: eight lanes of 16 bits are a register.
    unsafe { vld1q_s16(parts[part].as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store_numbers(row: &mut Row, part: usize, numbers: int16x8_t) {
    let (parts, _) = row.as_chunks_mut::<WIDTH>();
    // SAFETY: eight lanes of 16 bits are a register.
    unsafe { vst1q_s16(parts[part].as_mut_ptr(), numbers) }
}
