//! What comes back at a fixed rate, and what is refused.

#![expect(clippy::indexing_slicing, reason = "a test that panics fails")]

use kvasir_types::Planes;
use proptest::prelude::*;

use super::*;

const RATES: [FixedRate; 2] = [FixedRate::Int8, FixedRate::Int4Hadamard];

fn layout(dtype: DType) -> KvLayout {
    let planes = Planes::KeyValue {
        key_dim: 48,
        value_dim: 32,
    };
    KvLayout::new(1, 3, planes, 5, dtype).unwrap()
}

fn raw(layout: &KvLayout, values: &[f32]) -> Vec<u8> {
    let mut raw = vec![0; layout.layer_bytes()];
    let values: Vec<f32> = values.iter().copied().cycle().take(raw.len()).collect();
    let count = raw.len() / layout.dtype().bytes();
    elements::write(layout.dtype(), &values[..count], &mut raw);
    raw
}

fn decoded(codec: &FixedCodec, bytes: &[u8]) -> Result<Vec<f32>, FixedError> {
    let mut raw = vec![0xff; codec.layout.layer_bytes()];
    codec.decode(bytes, &mut raw)?;
    let mut values = vec![0.0; raw.len() / codec.layout.dtype().bytes()];
    elements::read(codec.layout.dtype(), &raw, &mut values);
    Ok(values)
}

fn round_trip(codec: &FixedCodec, values: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let raw = raw(&codec.layout, values);
    let mut before = vec![0.0; raw.len() / codec.layout.dtype().bytes()];
    elements::read(codec.layout.dtype(), &raw, &mut before);
    let bytes = codec.encode(&raw);
    assert_eq!(bytes.len(), codec.encoded_bytes());
    (before, decoded(codec, &bytes).unwrap())
}

#[test]
fn rows_have_a_fixed_size() {
    let layout = KvLayout::new(1, 8, Planes::symmetric(128), 16, DType::Bf16).unwrap();
    let int8 = FixedCodec::new(layout, FixedRate::Int8).unwrap();
    let int4 = FixedCodec::new(layout, FixedRate::Int4Hadamard).unwrap();
    assert_eq!((int8.row_bytes(128), int4.row_bytes(128)), (130, 66));
    assert_eq!(int4.encoded_bytes(), 2 * 8 * 16 * 66);
    assert_eq!((int4.row_bytes(576), int4.row_bytes(48)), (9 * 34, 3 * 10));
}

#[test]
fn what_is_not_finite_takes_its_row_with_it_and_no_other() {
    for rate in RATES {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            for stranger in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let codec = FixedCodec::new(layout(dtype), rate).unwrap();
                let mut values = vec![0.25; 3 * 5 * 80];
                values[50] = stranger;
                let (_, after) = round_trip(&codec, &values);
                let block = block_of(rate, 48);
                let start = 50 / block * block;
                for (at, value) in after.iter().enumerate() {
                    let near = (value - 0.25).abs() < 0.02;
                    let inside = (start..start + block).contains(&at);
                    assert!(if inside { value.is_nan() } else { near }, "{at}: {value}");
                }
            }
        }
    }
}

#[test]
fn zeros_and_subnormal_values_come_back() {
    for rate in RATES {
        let codec = FixedCodec::new(layout(DType::F32), rate).unwrap();
        let (_, zeros) = round_trip(&codec, &[0.0]);
        assert!(zeros.iter().all(|&value| value == 0.0));
        let small = f32::from_bits(1 << 22);
        let (before, after) = round_trip(&codec, &[small, 0.0, -small]);
        for (a, b) in before.iter().zip(&after) {
            assert!((a - b).abs() <= small / 2.0, "{a:e} {b:e}");
        }
    }
    let codec = FixedCodec::new(layout(DType::F16), FixedRate::Int8).unwrap();
    let small = half::f16::from_bits(0x200).to_f32();
    let (before, after) = round_trip(&codec, &[small, -small]);
    assert_eq!(before, after);
}

#[test]
fn layouts_that_cannot_be_coded_say_so() {
    let fp8 = layout(DType::F8E5m2);
    for rate in RATES {
        let error = FixedCodec::new(fp8, rate).unwrap_err();
        assert_eq!(error, UnsupportedFixed::DType(DType::F8E5m2));
    }
    let odd = KvLayout::new(1, 1, Planes::symmetric(40), 3, DType::F16).unwrap();
    let error = FixedCodec::new(odd, FixedRate::Int4Hadamard).unwrap_err();
    assert_eq!(error, UnsupportedFixed::Width(40));
    assert!(FixedCodec::new(odd, FixedRate::Int8).is_ok());
    let wide = KvLayout::new(1, 1, Planes::Single { dim: 576 }, 3, DType::F16).unwrap();
    for rate in RATES {
        let codec = FixedCodec::new(wide, rate).unwrap();
        let (before, after) = round_trip(&codec, &[1.0, -0.5, 0.25]);
        let worst = before.iter().zip(&after).map(|(a, b)| (a - b).abs());
        assert!(worst.fold(0.0, f32::max) < 1.0);
    }
}

#[test]
fn other_lengths_and_scales_that_nobody_writes_are_refused() {
    for rate in RATES {
        let codec = FixedCodec::new(layout(DType::Bf16), rate).unwrap();
        let bytes = codec.encode(&raw(&codec.layout, &[1.0, 2.0]));
        for cut in [0, 1, bytes.len() - 1] {
            assert!(decoded(&codec, &bytes[..cut]).is_err());
        }
        assert!(decoded(&codec, &[&bytes[..], &[0]].concat()).is_err());
        for scale in [bf16::NEG_INFINITY, bf16::INFINITY, bf16::NEG_ONE] {
            let mut bytes = bytes.clone();
            bytes[..2].copy_from_slice(&scale.to_le_bytes());
            assert_eq!(decoded(&codec, &bytes), Err(FixedError::Scale));
        }
    }
}

proptest! {
    #[test]
    fn errors_are_half_a_scale_at_most(
        values in prop::collection::vec(-1e4f32..1e4, 1..300),
        rate in prop::sample::select(RATES.to_vec()),
    ) {
        let codec = FixedCodec::new(layout(DType::F32), rate).unwrap();
        let (before, after) = round_trip(&codec, &values);
        let heads: Vec<Head> = elements::heads(&codec.layout).collect();
        for head in heads {
            let place = head.place.start / 4..head.place.end / 4;
            let block = block_of(rate, head.dim);
            let rows = before[place.clone()].chunks(block).zip(after[place].chunks(block));
            for (before, after) in rows {
                let square = |values: &[f32]| values.iter().map(|v| v * v).sum::<f32>();
                let errors: Vec<f32> = before.iter().zip(after).map(|(a, b)| a - b).collect();
                // The transform keeps lengths: so does a bound on the sum of squares.
                let bound = match rate {
                    FixedRate::Int8 => before.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0,
                    FixedRate::Int4Hadamard => square(before).sqrt() / 7.0,
                };
                let count = f32::from(u16::try_from(block).unwrap());
                prop_assert!(square(&errors) <= count * (bound * 0.505).powi(2) + 1e-3);
            }
        }
    }

    #[test]
    fn damage_is_an_error_or_other_values_and_no_panic(
        rate in prop::sample::select(RATES.to_vec()),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let codec = FixedCodec::new(layout(DType::F16), rate).unwrap();
        let mut bytes = codec.encode(&raw(&codec.layout, &[0.5, -3.0, 2.0]));
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = decoded(&codec, &bytes);
    }
}
