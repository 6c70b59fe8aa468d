use kvasir_types::Planes;
use proptest::prelude::*;

use super::*;
use crate::rotation::Pairing;

/// A layer whose channels differ, and whose keys turn with their position.
fn layer(layout: &KvLayout, rotation: Option<&Rotation>) -> Vec<u8> {
    let codec = LayerCodec::new(*layout, rotation).unwrap();
    let mut raw = vec![0; layout.layer_bytes()];
    let mut state = 1u32;
    for shape in &codec.planes {
        for group in shape.groups() {
            let mut rows = vec![0.0; layout.tokens() as usize * shape.width];
            for (at, value) in rows.iter_mut().enumerate() {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let noise = f32::from((state >> 16) as u16) / 65_536.0 - 0.5;
                let channel = u8::try_from(at % shape.width % 7).unwrap();
                *value = f32::from(channel) * (1.0 + noise) - 2.0;
            }
            let place = layout.head_slice(shape.plane, group).unwrap();
            let heads = raw[place].chunks_exact_mut(layout.head_bytes(shape.plane));
            for (head, bytes) in heads.enumerate() {
                let keys = bytes.chunks_exact_mut(shape.dim * layout.dtype().bytes());
                for (token, (row, out)) in rows.chunks_exact(shape.width).zip(keys).enumerate() {
                    let mut key = row[head * shape.dim..][..shape.dim].to_vec();
                    if let Some(rotation) = rotation.filter(|_| shape.plane == Plane::Key) {
                        rotation.redo(token, &mut key);
                    }
                    values::store(layout.dtype(), &key, out);
                }
            }
        }
    }
    raw
}

fn values(dtype: DType, raw: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; raw.len() / dtype.bytes()];
    values::load(dtype, raw, &mut values);
    values
}

fn decoded(codec: &LayerCodec<'_>, parts: &[Vec<u8>]) -> Result<Vec<u8>, DecodeError> {
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let mut raw = vec![0xff; codec.layout.layer_bytes()];
    codec.decode(&parts, &mut raw)?;
    Ok(raw)
}

#[test]
fn every_layout_comes_back_as_exactly_as_its_level() {
    for (heads, planes, tokens, dtype) in [
        (2, Planes::symmetric(64), 256, DType::F16),
        (8, Planes::symmetric(128), 70, DType::Bf16),
        (
            3,
            Planes::KeyValue {
                key_dim: 40,
                value_dim: 24,
            },
            64,
            DType::F32,
        ),
        (1, Planes::Single { dim: 500 }, 1, DType::F32),
        (1, Planes::symmetric(1), 3, DType::F32),
    ] {
        let layout = KvLayout::new(1, heads, planes, tokens, dtype).unwrap();
        let frequencies = [0.7, 0.1, 0.01];
        let rotation = Rotation::new(&frequencies, Pairing::Halves, 1.0, 90, tokens);
        for rotation in [None, Some(&rotation)] {
            let Ok(codec) = LayerCodec::new(layout, rotation) else {
                assert!(rotation.is_some() && planes == Planes::symmetric(1));
                continue;
            };
            let raw = layer(&layout, rotation);
            let encoded = codec.encode(&raw, [0.5, 0.8]);
            let before = values(dtype, &raw);
            for (level, step) in (1..=LADDER).zip([0.8, 0.8 / 3.0, 0.8 / 9.0]) {
                let raw = decoded(&codec, &encoded.parts[..level]).unwrap();
                let after = values(dtype, &raw);
                let errors = before.iter().zip(&after).map(|(a, b)| (a - b).abs());
                let worst = errors.fold(0.0, f32::max);
                // A pair's errors add up as it turns; then the type rounds.
                assert!(worst <= step * 0.71 + 0.06, "{layout:?} {level}: {worst}");
            }
        }
    }
}

#[test]
fn keys_without_their_rotation_take_less() {
    let layout = KvLayout::new(1, 2, Planes::symmetric(64), 256, DType::F32).unwrap();
    let frequencies: Vec<f32> = (0u8..32).map(|at| 0.75f32.powi(at.into())).collect();
    let rotation = Rotation::new(&frequencies, Pairing::Halves, 1.0, 500, 256);
    let raw = layer(&layout, Some(&rotation));
    let bytes = |rotation| {
        let codec = LayerCodec::new(layout, rotation).unwrap();
        codec.encode(&raw, [0.5; 2]).parts[0].len()
    };
    let (without, with) = (bytes(Some(&rotation)), bytes(None));
    assert!(without * 20 < with * 19, "{without} {with}");
}

#[test]
fn layouts_that_cannot_be_coded_say_so() {
    let layout = |planes, dtype| KvLayout::new(1, 1, planes, 4, dtype).unwrap();
    let refused = |layout| LayerCodec::new(layout, None).unwrap_err();
    let fp8 = layout(Planes::symmetric(8), DType::F8E4m3);
    assert_eq!(refused(fp8), UnsupportedLayout::DType(DType::F8E4m3));
    let wide = layout(Planes::Single { dim: 513 }, DType::F16);
    assert_eq!(refused(wide), UnsupportedLayout::Width(513));
    let narrow = layout(Planes::symmetric(2), DType::F16);
    for (frequencies, tokens) in [(&[1.0, 1.0][..], 4), (&[1.0][..], 3)] {
        let rotation = Rotation::new(frequencies, Pairing::Halves, 1.0, 0, tokens);
        let error = LayerCodec::new(narrow, Some(&rotation)).unwrap_err();
        assert_eq!(error, UnsupportedLayout::Rotation { dim: 2, tokens: 4 });
    }
}

#[test]
fn groups_can_be_shared_out_among_ranks() {
    assert_eq!(heads_of_a_group(8, 128), 2);
    assert_eq!(heads_of_a_group(2, 64), 2);
    assert_eq!(heads_of_a_group(32, 128), 2);
    assert_eq!(heads_of_a_group(1, 576), 1);
    assert_eq!(heads_of_a_group(6, 64), 6);
}

proptest! {
    #[test]
    fn damage_is_an_error_or_other_values_and_no_panic(
        part in 0..LADDER,
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let layout = KvLayout::new(1, 2, Planes::symmetric(16), 66, DType::F16).unwrap();
        let codec = LayerCodec::new(layout, None).unwrap();
        let mut encoded = codec.encode(&layer(&layout, None), [0.5; 2]);
        let at = at.index(encoded.parts[part].len());
        encoded.parts[part][at] = byte;
        let _ = decoded(&codec, &encoded.parts);
        encoded.parts[part].truncate(at);
        prop_assert!(decoded(&codec, &encoded.parts).is_err());
        encoded.parts[part].clear();
        prop_assert!(decoded(&codec, &encoded.parts).is_err());
    }
}
