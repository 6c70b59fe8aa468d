//! Whole chunks at every level, and damage to them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use bytes::Bytes;
use half::f16;
use kvasir_codec::{ChunkDecoder, ChunkError, Encoding, KeyRotation, Object, Pairing, Prelude};
use kvasir_types::{ChunkKey, DType, KvLayout, LayerIdx, Level, Planes};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

fn layout(tokens: u32) -> KvLayout {
    KvLayout::new(3, 2, Planes::symmetric(16), tokens, DType::F16).unwrap()
}

/// Channels of different means and spreads, turned by nothing.
fn layers(layout: &KvLayout) -> Vec<Bytes> {
    let mut random = StdRng::seed_from_u64(7);
    let mut layer = || {
        let values = (0..layout.layer_bytes() / 2).map(|at| {
            let channel = f32::from(u8::try_from(at % 16).unwrap());
            let noise: f32 = (0..4).map(|_| random.random_range(-1.0..1.0f32)).sum();
            f16::from_f32(channel - 8.0 + noise * (channel + 1.0) / 16.0).to_le_bytes()
        });
        values.flatten().collect::<Vec<u8>>().into()
    };
    (0..layout.layers()).map(|_| layer()).collect()
}

fn prelude() -> Prelude {
    Prelude {
        rotation: Some(KeyRotation {
            pairing: Pairing::Halves,
            factor: 1.0,
            start: 128,
            frequencies: (0..8u8)
                .map(|pair| 10f32.powi(-i32::from(pair) / 2))
                .collect(),
        }),
        ..Prelude::default()
    }
}

fn encoded(layout: &KvLayout, level: Level, layers: Vec<Bytes>) -> Object {
    let key = ChunkKey::from_bytes([5; 32]);
    let encoding = Encoding::at(level);
    encoding.encode(key, layout, &prelude(), layers).unwrap()
}

fn decoder(object: &Object) -> Result<ChunkDecoder, ChunkError> {
    let header = object.header();
    let prelude = object.prelude().cloned().unwrap_or_default();
    ChunkDecoder::new(*header.layout(), header.level(), &prelude, &[])
}

/// A layer decoded from so many of its parts.
fn decoded(object: &Object, layer: u16, parts: usize) -> Result<Vec<u8>, ChunkError> {
    let mut raw = vec![0; object.header().layout().layer_bytes()];
    let of_layer = &object.parts(LayerIdx(layer))[..parts];
    decoder(object)?
        .layer(LayerIdx(layer), of_layer, &mut raw)
        .map(|()| raw)
}

fn error(raw: &[u8], layer: &[u8]) -> f32 {
    let value = |bytes: &[u8; 2]| f16::from_le_bytes(*bytes).to_f32();
    let (raw, layer) = (raw.as_chunks().0, layer.as_chunks().0);
    let squares = raw
        .iter()
        .zip(layer)
        .map(|(a, b)| (value(a) - value(b)).powi(2));
    squares.sum::<f32>()
}

#[test]
fn every_level_comes_back() {
    for tokens in [128, 100] {
        let layout = layout(tokens);
        let layers = layers(&layout);
        let mut errors = Vec::new();
        for level in Level::ALL {
            let object = encoded(&layout, level, layers.clone());
            assert_eq!(object.header().level(), level, "{tokens} tokens");
            let back = Object::parse(&Bytes::from(object.encode())).unwrap();
            let parts = usize::from(level.parts());
            let all: f32 = (0..3)
                .map(|layer| {
                    let raw = decoded(&back, layer, parts).unwrap();
                    let before = &layers[usize::from(layer)];
                    assert!(!level.is_exact() || raw == *before, "{level}");
                    error(&raw, before)
                })
                .sum();
            errors.push((level, all));
        }
        let of = |level| errors.iter().find(|(other, _)| *other == level).unwrap().1;
        let finer = [Level::INT8, Level::INT4, Level::L0];
        assert!(
            finer.windows(2).all(|pair| of(pair[0]) < of(pair[1])),
            "{errors:?}"
        );
        assert!(of(Level::L2) * 4.0 < of(Level::L1), "{errors:?}");
        assert!(of(Level::L1) * 4.0 < of(Level::L0), "{errors:?}");
    }
}

#[test]
fn a_single_token_is_left_exact() {
    let layout = layout(1);
    for level in Level::ALL {
        let object = encoded(&layout, level, layers(&layout));
        let kept = object.header().level();
        assert!(kept == level || kept.is_exact());
        decoded(&object, 2, kept.parts().into()).unwrap();
    }
}

#[test]
fn a_finer_level_holds_the_coarser_ones() {
    let layout = layout(128);
    let fine = encoded(&layout, Level::L2, layers(&layout));
    for level in [Level::L0, Level::L1, Level::L2] {
        let alone = encoded(&layout, level, layers(&layout));
        let parts = usize::from(level.parts());
        for layer in 0..3 {
            let (a, b) = (alone.parts(LayerIdx(layer)), fine.parts(LayerIdx(layer)));
            assert_eq!(a, b[..parts], "{level}");
            assert_eq!(decoded(&alone, layer, parts), decoded(&fine, layer, parts));
        }
    }
}

#[test]
fn nested_layers_have_a_codec_of_their_own() {
    let layout = layout(100);
    for level in Level::ALL {
        let object = encoded(&layout, level, layers(&layout));
        let decoder = decoder(&object).unwrap();
        let codec = decoder.codec(LayerIdx(1)).unwrap();
        assert_eq!(codec.is_some(), level.is_nested(), "{level}");
        let Some(codec) = codec else { continue };
        let count = usize::from(level.parts());
        let parts: Vec<&[u8]> = object.parts(LayerIdx(1))[..count]
            .iter()
            .map(|part| &part[..])
            .collect();
        let mut raw = vec![0; layout.layer_bytes()];
        codec.decode(&parts, &mut raw).unwrap();
        assert!(raw == decoded(&object, 1, count).unwrap(), "{level}");
        assert_eq!(codec.plan(&parts).unwrap().levels, count);
        assert_eq!(*codec.layout(), layout);
        assert!(codec.rotation().is_some(), "as the prelude says");
    }
}

#[test]
fn what_would_grow_is_left_exact() {
    // Nothing but values that are no numbers, each of another kind.
    let layout = layout(64);
    let mut random = StdRng::seed_from_u64(3);
    let mut layer = || {
        let mut strange =
            || 0x7c01 | random.random_range(0..0x400u16) | random.random_range(0..2u16) << 15;
        let bytes = (0..layout.layer_bytes() / 2).flat_map(|_| strange().to_le_bytes());
        Bytes::from(bytes.collect::<Vec<u8>>())
    };
    let layers: Vec<Bytes> = (0..3).map(|_| layer()).collect();
    let object = encoded(&layout, Level::L2, layers.clone());
    assert!(
        object.header().level().is_exact(),
        "{}",
        object.header().level()
    );
    for layer in 0..3 {
        let raw = decoded(&object, layer, 1).unwrap();
        assert_eq!(raw, layers[usize::from(layer)]);
    }
}

#[test]
fn values_that_are_no_numbers_survive() {
    let layout = layout(64);
    let mut layers = layers(&layout);
    let mut strange = layers[0].to_vec();
    let values = [
        f16::NAN,
        f16::INFINITY,
        f16::NEG_INFINITY,
        f16::MIN_POSITIVE_SUBNORMAL,
    ];
    // The values' plane, which nothing turns.
    let half = strange.len() / 2;
    for (at, value) in values.into_iter().enumerate() {
        strange[half + 64 * at..][..2].copy_from_slice(&value.to_le_bytes());
    }
    layers[0] = strange.into();
    layers[1] = vec![0; layout.layer_bytes()].into();
    for level in [Level::L0, Level::L2] {
        let object = encoded(&layout, level, layers.clone());
        assert_eq!(object.header().level(), level);
        let raw = decoded(&object, 0, level.parts().into()).unwrap();
        for (at, value) in values.into_iter().enumerate().take(3) {
            let [low, high] = [0, 1].map(|byte| raw[half + 64 * at + byte]);
            let back = f16::from_le_bytes([low, high]);
            assert_eq!(
                (back.is_nan(), back.to_bits() >> 10),
                (value.is_nan(), value.to_bits() >> 10)
            );
        }
        assert!(raw.iter().zip(&layers[0]).any(|(a, b)| a == b));
        let zeros = decoded(&object, 1, level.parts().into()).unwrap();
        assert_eq!(error(&zeros, &layers[1]), 0.0);
    }
}

#[test]
fn exact_tokens_are_exact() {
    let layout = layout(64);
    let layers = layers(&layout);
    let prelude = Prelude {
        exact_tokens: 3,
        ..prelude()
    };
    let key = ChunkKey::from_bytes([5; 32]);
    let encoding = Encoding::at(Level::L0);
    let object = encoding
        .encode(key, &layout, &prelude, layers.clone())
        .unwrap();
    let raw = decoded(&object, 1, 1).unwrap();
    let row = 16 * 2;
    for (head, before) in raw.chunks(64 * row).zip(layers[1].chunks(64 * row)) {
        assert_eq!(head[..3 * row], before[..3 * row]);
        assert_ne!(head[3 * row..4 * row], before[3 * row..4 * row]);
    }
}

#[test]
fn wrong_parts_are_errors() {
    let layout = layout(64);
    let object = encoded(&layout, Level::L1, layers(&layout));
    let decoder = decoder(&object).unwrap();
    let parts = object.parts(LayerIdx(0));
    let mut raw = vec![0; layout.layer_bytes()];
    let mut fails = |parts: &[&Bytes]| decoder.layer(LayerIdx(0), parts, &mut raw).is_err();
    assert!(fails(&[]));
    assert!(fails(&[parts[0], parts[1], parts[1]]));
    assert!(fails(&[parts[1], parts[0]]));
    assert!(!fails(&parts));
    let raw_chunk = encoded(&layout, Level::RAW, layers(&layout));
    let exact = ChunkDecoder::new(layout, Level::RAW, &[], &[]).unwrap();
    let layer = raw_chunk.parts(LayerIdx(0))[0];
    assert!(exact.layer(LayerIdx(0), &[&layer[1..]], &mut raw).is_err());
    assert!(exact.layer(LayerIdx(0), &[layer], &mut raw).is_ok());
}

#[test]
fn chunks_that_need_more_than_this_version_has_are_refused() {
    let prelude = Prelude {
        profile: Some([1; 32]),
        ..prelude()
    };
    let error = ChunkDecoder::new(layout(64), Level::L0, &prelude.encode(), &[]).unwrap_err();
    assert_eq!(error, ChunkError::Profile);
    let mut encoding = Encoding::at(Level::L0);
    let layout = layout(64);
    for steps in [vec![[1.0, 0.0]], vec![[f32::NAN, 1.0]]] {
        encoding.steps = steps;
        let key = ChunkKey::from_bytes([5; 32]);
        let refused = encoding.encode(key, &layout, &Prelude::default(), layers(&layout));
        assert!(refused.is_err());
    }
}
