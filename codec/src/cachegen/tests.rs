//! Both kinds of CacheGen: what comes back, what it takes, what is refused.

#![expect(clippy::indexing_slicing, reason = "a test that panics fails")]

use kvasir_types::Planes;
use proptest::prelude::*;

use super::*;

fn layout(tokens: u32, dtype: DType) -> KvLayout {
    let planes = Planes::KeyValue {
        key_dim: 6,
        value_dim: 4,
    };
    KvLayout::new(6, 2, planes, tokens, dtype).unwrap()
}

/// Channels with means of their own.
fn raw(layout: &KvLayout, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut raw = vec![0; layout.layer_bytes()];
    let values: Vec<f32> = (0..raw.len() / layout.dtype().bytes())
        .map(|at| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let channel = u8::try_from(at % 6).unwrap();
            f32::from((state >> 16) as u16) / 65_536.0 - 0.5 + f32::from(channel) * 0.2
        })
        .collect();
    elements::write(layout.dtype(), &values, &mut raw);
    raw
}

fn worst(layout: &KvLayout, before: &[u8], after: &[u8]) -> f32 {
    let values = |raw: &[u8]| {
        let mut values = vec![0.0; raw.len() / layout.dtype().bytes()];
        elements::read(layout.dtype(), raw, &mut values);
        values
    };
    let (before, after) = (values(before), values(after));
    let errors = before.iter().zip(&after).map(|(a, b)| (a - b).abs());
    errors.fold(0.0, f32::max)
}

fn published(layout: &KvLayout, bytes: &[u8]) -> Result<Vec<u8>, CacheGenError> {
    let mut raw = vec![0xff; layout.layer_bytes()];
    CacheGen::new(*layout, 1.0)?.decode(bytes, &mut raw)?;
    Ok(raw)
}

fn circulated(layout: &KvLayout, layer: u16, bytes: &[u8]) -> Result<Vec<u8>, CacheGenError> {
    let mut raw = vec![0xff; layout.layer_bytes()];
    CirculatedCacheGen::new(*layout, CirculatedLevel::Default)?.decode(layer, bytes, &mut raw)?;
    Ok(raw)
}

#[test]
fn what_the_paper_says_comes_back_within_its_bins() {
    for tokens in [1, 7, 10, 11, 256] {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let layout = layout(tokens, dtype);
            let codec = CacheGen::new(layout, 1.0).unwrap();
            let raw = raw(&layout, 1);
            for (layer, bin) in [(0, 0.5), (3, 1.0), (5, 1.5)] {
                let bytes = codec.encode(layer, &raw).unwrap();
                let after = published(&layout, &bytes).unwrap();
                // Differences deviate by 1/√6, and in values, whose channels mix, by less than 0.65.
                let bound = bin * 0.65 / 2.0 + 0.02;
                let found = worst(&layout, &raw, &after);
                assert!(found <= bound, "{tokens} {dtype} {layer}: {found}");
            }
        }
    }
}

#[test]
fn what_circulates_comes_back_within_its_steps() {
    for tokens in [1, 255, 256, 700] {
        for level in [
            CirculatedLevel::Coarse,
            CirculatedLevel::Default,
            CirculatedLevel::Fine,
        ] {
            let layout = layout(tokens, DType::F16);
            let codec = CirculatedCacheGen::new(layout, level).unwrap();
            let raw = raw(&layout, 2);
            for layer in [0, 5] {
                let bytes = codec.encode(layer, &raw).unwrap();
                let mut after = vec![0xff; raw.len()];
                codec.decode(layer, &bytes, &mut after).unwrap();
                let steps = codec
                    .steps(layer, Plane::Key)
                    .min(codec.steps(layer, Plane::Value));
                let bound = 1.5 / f32::from(steps) / 2.0 + 0.01;
                assert!(worst(&layout, &raw, &after) <= bound);
            }
        }
    }
}

/// 33 ends of 16 bits, a length of 32 and part of a maximum beside what symbols take.
#[test]
fn tables_lengths_and_maxima_of_what_circulates_are_counted() {
    let layout = KvLayout::new(1, 8, Planes::symmetric(128), 256, DType::F16).unwrap();
    let codec = CirculatedCacheGen::new(layout, CirculatedLevel::Fine).unwrap();
    let constant = vec![0; layout.layer_bytes()];
    let bytes = codec.encode(0, &constant).unwrap();
    let channels = 2 * 8 * 128;
    let side = channels * (33 * 2 + 4) + 2 * 256 * 2;
    // A stream of one symbol has a byte at most.
    assert!(
        (side..=side + channels).contains(&bytes.len()),
        "{}",
        bytes.len()
    );
}

#[test]
fn values_that_are_not_finite_are_refused_and_zeros_come_back() {
    let layout = layout(20, DType::F32);
    let zeros = vec![0; layout.layer_bytes()];
    let paper = CacheGen::new(layout, 1.0).unwrap();
    let code = CirculatedCacheGen::new(layout, CirculatedLevel::Default).unwrap();
    let bytes = paper.encode(0, &zeros).unwrap();
    assert_eq!(published(&layout, &bytes).unwrap(), zeros);
    let bytes = code.encode(0, &zeros).unwrap();
    assert_eq!(circulated(&layout, 0, &bytes).unwrap(), zeros);
    let mut tiny = zeros.clone();
    tiny[..4].copy_from_slice(&f32::from_bits(3).to_le_bytes());
    for bytes in [paper.encode(0, &tiny), code.encode(0, &tiny)] {
        assert!(bytes.is_ok());
    }
    for stranger in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut raw = zeros.clone();
        raw[80..84].copy_from_slice(&stranger.to_le_bytes());
        assert_eq!(paper.encode(0, &raw), Err(CacheGenError::NotFinite));
        assert_eq!(code.encode(0, &raw), Err(CacheGenError::NotFinite));
    }
    let fp8 = KvLayout::new(1, 1, Planes::symmetric(8), 4, DType::F8E4m3).unwrap();
    let refused = CacheGenError::DType(DType::F8E4m3);
    assert_eq!(CacheGen::new(fp8, 1.0).unwrap_err(), refused);
    let found = CirculatedCacheGen::new(fp8, CirculatedLevel::Fine).unwrap_err();
    assert_eq!(found, refused);
}

proptest! {
    #[test]
    fn damage_is_an_error_or_other_values_and_no_panic(
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        seed in any::<u32>(),
    ) {
        let layout = layout(23, DType::F16);
        let raw = raw(&layout, seed);
        let mut bytes = CacheGen::new(layout, 1.0).unwrap().encode(2, &raw).unwrap();
        let place = at.index(bytes.len());
        bytes[place] = byte;
        let _ = published(&layout, &bytes);
        bytes.truncate(place);
        prop_assert!(published(&layout, &bytes).is_err());
        let codec = CirculatedCacheGen::new(layout, CirculatedLevel::Default).unwrap();
        let mut bytes = codec.encode(2, &raw).unwrap();
        let place = at.index(bytes.len());
        bytes[place] = byte;
        let _ = circulated(&layout, 2, &bytes);
        bytes.truncate(place);
        prop_assert!(circulated(&layout, 2, &bytes).is_err());
    }
}
