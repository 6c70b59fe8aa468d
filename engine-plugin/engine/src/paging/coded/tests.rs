use proptest::prelude::*;

use super::*;

const DTYPES: [KvDtype; 3] = [KvDtype::F32, KvDtype::Bf16, KvDtype::F16];

/// A piece and its slot, coded and decoded as in a pool.
fn round(coding: Coding, piece: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let slots = Slots::new(piece.len(), Some(coding), 512);
    assert!(slots.are_coded());
    let mut frame = vec![0; frame_bytes(piece.len())];
    frame[..piece.len()].copy_from_slice(piece);
    let mut slot = vec![0xa5; slots.bytes()];
    slots.pack(&frame, &mut slot);
    frame.fill(0x5a);
    slots.part(&mut frame).copy_from_slice(&slot);
    slots.unpack(&mut frame);
    frame.truncate(piece.len());
    (slot, frame)
}

fn bytes_of(dtype: KvDtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.bytes()];
    let parts = bytes.chunks_mut(GROUP * dtype.bytes());
    for (values, bytes) in values.chunks(GROUP).zip(parts) {
        narrow(Isa::detect(), dtype, values, bytes);
    }
    bytes
}

fn values_of(dtype: KvDtype, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.bytes()];
    let parts = bytes.chunks(GROUP * dtype.bytes());
    for (values, bytes) in values.chunks_mut(GROUP).zip(parts) {
        widen(dtype, bytes, values);
    }
    values
}

/// How far from a value its type may round, of the value.
fn unit(dtype: KvDtype) -> f32 {
    match dtype {
        KvDtype::F32 => 0.0,
        KvDtype::Bf16 => 0.5f32.powi(8),
        KvDtype::F16 => 0.5f32.powi(11),
    }
}

/// Of usual and of all sizes: what is zero, subnormal, next to overflow.
fn any_value() -> impl Strategy<Value = f32> {
    let signed = |sizes: std::ops::Range<f32>| {
        (sizes, any::<bool>()).prop_map(|(power, minus)| {
            let value = power.exp2();
            if minus { -value } else { value }
        })
    };
    prop_oneof![
        8 => -4.0..4.0f32,
        2 => signed(-30.0..16.0),
        1 => signed(-149.0..127.99),
        1 => Just(0.0),
        1 => prop::sample::select(vec![f32::MAX, f32::MIN, 65504.0, f32::MIN_POSITIVE, 1e-45]),
    ]
}

/// A size for each group, so that groups of one size, of all of them, are there.
fn any_piece() -> impl Strategy<Value = (usize, KvDtype, Vec<f32>)> {
    let dims = prop_oneof![(2..=128usize).prop_map(|half| 2 * half), 1..=256usize];
    (dims, prop::sample::select(DTYPES.to_vec())).prop_flat_map(|(dim, dtype)| {
        let sizes = prop_oneof![Just(1.0f32), (-140.0..120.0f32).prop_map(f32::exp2)];
        let values = prop::collection::vec(any_value(), dim * 4);
        (values, prop::collection::vec(sizes, ROWS), any::<u64>()).prop_map(
            move |(some, sizes, mut seed)| {
                let most = match dtype {
                    KvDtype::F16 => 65504.0,
                    // The largest of the type.
                    KvDtype::Bf16 => f32::from_bits(0x7f7f_0000),
                    KvDtype::F32 => f32::MAX,
                };
                let value = |at: usize| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let pick = usize::try_from(seed >> 33).unwrap() % some.len();
                    (some[pick] * sizes[at / dim]).clamp(-most, most)
                };
                (dim, dtype, (0..ROWS * dim).map(value).collect())
            },
        )
    })
}

proptest! {
    /// Every value is within the bound of the module, and what has come back once comes back
    /// as it is.
    #[test]
    fn values_come_back_within_half_a_step((dim, dtype, values) in any_piece()) {
        let piece = bytes_of(dtype, &values);
        let values = values_of(dtype, &piece);
        let coding = Coding::new(dim, dtype);
        let (slot, back) = round(coding, &piece);
        let found = values_of(dtype, &back);
        let rows = values.chunks(dim).zip(found.chunks(dim));
        let groups = rows.flat_map(|(row, found)| row.chunks(coding.group).zip(found.chunks(coding.group)));
        for (group, found) in groups {
            let largest = group.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            for (&value, &found) in group.iter().zip(found) {
                let step = f64::from(largest) / 254.0 * (1.0 + 0.5f64.powi(14));
                let rounded = f64::from(value.abs().max(found.abs()) * unit(dtype));
                let least = 0.5f64.powi(127) + if dtype == KvDtype::F16 { 0.5f64.powi(25) } else { 0.0 };
                let error = (f64::from(value) - f64::from(found)).abs();
                prop_assert!(error <= step + rounded + least, "{value} {found} of {largest}");
            }
        }
        let (again, same) = round(coding, &back);
        prop_assert_eq!(same, back);
        // Where the type holds every number of steps, so do the codes.
        if dtype == KvDtype::F32 {
            prop_assert_eq!(again, slot);
        }
    }

    /// A group with a value that is none is nothing else, and others are as they would be.
    #[test]
    fn what_is_no_number_stays_in_its_group(
        (dim, dtype, values) in any_piece(),
        at: prop::sample::Index,
        stray in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        let coding = Coding::new(dim, dtype);
        let whole = round(coding, &bytes_of(dtype, &values)).1;
        let whole = values_of(dtype, &whole);
        let at = at.index(values.len());
        let mut values = values;
        values[at] = stray;
        let piece = bytes_of(dtype, &values);
        let (_, back) = round(coding, &piece);
        let found = values_of(dtype, &back);
        let group = |at: usize| (at / dim, at % dim / coding.group);
        for (index, (&found, &whole)) in found.iter().zip(&whole).enumerate() {
            if group(index) == group(at) {
                prop_assert!(found.is_nan());
            } else {
                prop_assert_eq!(found.to_bits(), whole.to_bits());
            }
        }
        prop_assert_eq!(round(coding, &back).1, back);
    }
}

/// Every half comes back as it did before, whatever is largest beside it.
#[test]
fn every_half_settles_at_once() {
    let coding = Coding::new(32, KvDtype::F16);
    for first in (0..0x7c00u16).step_by(16) {
        for largest in [first | 15, 0x3c00, 0x7bff] {
            let row = (0..32).map(|at| match at {
                0 => largest,
                at if at % 2 == 0 => (first + at / 2) | 0x8000,
                at => first + at / 2,
            });
            let piece: Vec<u8> = row
                .flat_map(u16::to_le_bytes)
                .collect::<Vec<_>>()
                .repeat(ROWS);
            let back = round(coding, &piece).1;
            assert!(round(coding, &back).1 == back, "{first:x} {largest:x}");
        }
    }
}

#[test]
fn slots_take_the_sectors_that_they_need() {
    let bytes = |dim: usize, dtype: KvDtype, sector| {
        let slots = Slots::new(
            2 * 16 * dim * dtype.bytes(),
            Some(Coding::new(dim, dtype)),
            sector,
        );
        (slots.bytes(), slots.are_coded())
    };
    assert_eq!(bytes(128, KvDtype::F16, 512), (4608, true));
    assert_eq!(bytes(128, KvDtype::F32, 512), (4608, true));
    assert_eq!(bytes(64, KvDtype::Bf16, 512), (2560, true));
    assert_eq!(bytes(128, KvDtype::F32, 4096), (8192, true));
    // No fewer sectors: nothing is lost for nothing.
    assert_eq!(bytes(128, KvDtype::F16, 4096), (8192, false));
    assert_eq!(bytes(32, KvDtype::F16, 4096), (4096, false));
}

/// Zeros are zeros, and the largest of a group is what it was.
#[test]
fn the_largest_of_a_group_is_exact() {
    for dtype in DTYPES {
        let row: Vec<f32> = (0..64u8).map(|at| f32::from(at % 32) * 0.3 - 3.0).collect();
        let piece = bytes_of(dtype, &row.repeat(ROWS));
        let back = values_of(dtype, &round(Coding::new(64, dtype), &piece).1);
        let was = values_of(dtype, &piece);
        let off = (back[31] / was[31] - 1.0).abs();
        assert!(
            off <= if dtype == KvDtype::F32 {
                0.5f32.powi(15)
            } else {
                0.0
            },
            "{off}"
        );
        let zeros = vec![0; piece.len()];
        assert_eq!(round(Coding::new(64, dtype), &zeros).1, zeros);
    }
}
