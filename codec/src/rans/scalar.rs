//! What the kernels compute, a lane at a time.

use super::{ByteTable, HALF, LANES, Lanes, PRECISION, Reader, Row, START, TOTAL, Writer};
use crate::classes::{BASE, DISTANCES, LARGEST, SLOT_ZERO, ThirdTables};

pub(super) fn decode_base(lanes: Lanes<'_>, readers: &mut [Reader], rows: &mut [Row]) {
    let of_stream = rows.chunks_exact_mut((rows.len() / readers.len()).max(1));
    for (reader, rows) in readers.iter_mut().zip(of_stream) {
        for (lane, number) in in_order(rows) {
            let table = usize::from(lanes.classes[lane]) << PRECISION;
            let entry = BASE.slots[table | usize::from(reader.slot(lane))];
            *number = reader.take(lane, entry) - SLOT_ZERO;
        }
    }
}

pub(super) fn decode_thirds(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    readers: &mut [Reader],
    rows: &mut [Row],
) {
    let of_stream = rows.chunks_exact_mut((rows.len() / readers.len()).max(1));
    for (reader, rows) in readers.iter_mut().zip(of_stream) {
        for (lane, number) in in_order(rows) {
            let slot = reader.slot(lane);
            let [middle, away] = bounds(lanes, tables, lane, number.unsigned_abs());
            let (third, first, end) = if slot < middle {
                (-1, 0, middle)
            } else if slot < away {
                (0, middle, away)
            } else {
                (1, away, TOTAL)
            };
            let third = if *number < 0 { -third } else { third };
            *number = number.wrapping_mul(3).wrapping_add(third);
            reader.advance(lane, u32::from(end - first), u32::from(slot - first));
        }
    }
}

pub(super) fn encode_base(lanes: Lanes<'_>, writers: &mut [Writer], rows: &mut [Row]) {
    let of_stream = rows.chunks_exact((rows.len() / writers.len()).max(1));
    for (writer, rows) in writers.iter_mut().zip(of_stream) {
        for (lane, number) in rows
            .iter()
            .rev()
            .flat_map(|row| row.iter().enumerate().rev())
        {
            let magnitude = usize::from(number.unsigned_abs());
            assert!(magnitude <= LARGEST, "a class has no such number");
            let code = BASE.codes[usize::from(lanes.classes[lane]) * (LARGEST + 1) + magnitude];
            let (frequency, first) = (code & 0xffff, code >> 16);
            assert!(frequency > 0, "a class has no such number");
            writer.put(lane, frequency, |place| {
                let half = u32::from(HALF);
                match number {
                    0 if place >= frequency / 2 => half + place - frequency / 2,
                    0 => place,
                    1.. => first + place,
                    _ => half + first + place,
                }
            });
        }
    }
}

pub(super) fn encode_thirds(
    lanes: Lanes<'_>,
    tables: &ThirdTables,
    writers: &mut [Writer],
    rows: &mut [Row],
) {
    let of_stream = rows.chunks_exact_mut((rows.len() / writers.len()).max(1));
    for (writer, rows) in writers.iter_mut().zip(of_stream) {
        for row in rows.iter_mut().rev() {
            for (lane, number) in row.iter_mut().enumerate().rev() {
                let coarser = (number.unsigned_abs() + 1) / 3;
                let signed = i32::from(coarser) * i32::from(number.signum());
                let third = i32::from(*number) - 3 * signed;
                let away = if signed < 0 { -third } else { third };
                let [middle, end] = bounds(lanes, tables, lane, coarser);
                let (first, end) = match away {
                    ..0 => (0, middle),
                    0 => (middle, end),
                    1.. => (end, TOTAL),
                };
                writer.put(lane, u32::from(end - first), |place| {
                    u32::from(first) + place
                });
                *number = i16::try_from(signed).expect("a third of a number");
            }
        }
    }
}

pub(super) fn decode_bytes(tables: &[ByteTable], readers: &mut [Reader], rows: &mut [Row]) {
    let of_stream = rows.chunks_exact_mut((rows.len() / readers.len()).max(1));
    for ((reader, table), rows) in readers.iter_mut().zip(tables).zip(of_stream) {
        for (lane, number) in in_order(rows) {
            *number = reader.take(lane, table.slots[usize::from(reader.slot(lane))]);
        }
    }
}

pub(super) fn encode_bytes(tables: &[ByteTable], writers: &mut [Writer], rows: &[Row]) {
    let of_stream = rows.chunks_exact((rows.len() / writers.len()).max(1));
    for ((writer, table), rows) in writers.iter_mut().zip(tables).zip(of_stream) {
        for row in rows.iter().rev() {
            for (lane, &number) in row.iter().enumerate().rev() {
                let byte = u8::try_from(number).expect("a byte");
                let code = table.codes[usize::from(byte)];
                assert!(code & 0xffff > 0, "a table has no such byte");
                writer.put(lane, code & 0xffff, |place| (code >> 16) + place);
            }
        }
    }
}

/// The first slots of the symbols 1 and 2.
fn bounds(lanes: Lanes<'_>, tables: &ThirdTables, lane: usize, coarser: u16) -> [u16; 2] {
    let distance = usize::from(coarser).min(DISTANCES - 1);
    let class = usize::from(lanes.classes[lane]);
    [tables.middle[distance][class], tables.away[distance][class]]
}

fn in_order(rows: &mut [Row]) -> impl Iterator<Item = (usize, &mut i16)> {
    rows.iter_mut().flat_map(|row| row.iter_mut().enumerate())
}

impl Reader {
    fn slot(&self, lane: usize) -> u16 {
        self.states.low[lane] % TOTAL
    }

    /// The symbol of a slot's entry.
    fn take(&mut self, lane: usize, entry: u32) -> i16 {
        self.advance(lane, (entry >> 8 & 0x7ff) + 1, entry >> 19);
        let [symbol, ..] = entry.to_le_bytes();
        symbol.into()
    }

    /// After a symbol of this frequency, in which the slot had this place.
    fn advance(&mut self, lane: usize, frequency: u32, place: u32) {
        let mut state = frequency * (self.states.get(lane) >> PRECISION) + place;
        if state < START {
            let word = self.words[..self.end].get(self.next).copied().unwrap_or(0);
            state = state << 16 | u32::from(word);
            self.next += 1;
        }
        self.states.set(lane, state);
    }
}

impl Writer {
    /// A symbol of this frequency, whose places are these slots.
    fn put(&mut self, lane: usize, frequency: u32, slot: impl Fn(u32) -> u32) {
        let mut state = self.states.get(lane);
        if u64::from(state) >= u64::from(frequency) << (32 - PRECISION) {
            self.next -= 1;
            self.words[self.next] = self.states.low[lane];
            state >>= 16;
        }
        let (quotient, place) = (state / frequency, state % frequency);
        self.states.set(lane, (quotient << PRECISION) + slot(place));
    }
}

const _: () = assert!(LANES.is_multiple_of(16), "whole registers");
