//! Chunks that are coded with a profile, and damage to profiles.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use bytes::Bytes;
use half::f16;
use kvasir_codec::{
    CalibrationError, ChunkDecoder, ChunkError, EncodeError, Encoding, KeyRotation, LayerCodec,
    Object, Pairing, PlanError, Prelude, Profile, ProfileBasis, ProfileError, ProfilePlane,
    ProfileShape, UnsupportedLayout,
};
use kvasir_types::{ChunkKey, DType, HeadRange, KvLayout, LayerIdx, Level, Planes, TokenRange};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const HEADS: u16 = 2;
const DIM: u16 = 16;
const CHANNELS: usize = 32;
const PAIRING: Option<Pairing> = Some(Pairing::Halves);

fn layout(tokens: u32) -> KvLayout {
    KvLayout::new(3, HEADS, Planes::symmetric(DIM), tokens, DType::F16).unwrap()
}

/// A reflection: orthonormal, and of all channels.
fn vector(coefficient: usize) -> [f32; CHANNELS] {
    std::array::from_fn(|channel| {
        let unit = if channel == coefficient { 1.0 } else { 0.0 };
        unit - 2.0 / 32.0
    })
}

/// How far a coefficient of 1 goes.
fn scale_of(coefficient: usize) -> f32 {
    if coefficient.is_multiple_of(2) {
        1.0
    } else {
        0.5
    }
}

/// Of coefficient `n` that deviates by `scale` over n + 1.
fn profile(layout: &KvLayout, pairing: Option<Pairing>, scale: f32) -> Arc<Profile> {
    let shape = ProfileShape::of(layout, pairing);
    let plane = |unit| {
        let number = |at: usize| f32::from(u8::try_from(at).unwrap());
        let means = (0..CHANNELS).map(|at| number(at) / 4.0 - 3.0).collect();
        let deviations = (0..CHANNELS).map(|at| scale / (number(at) + 1.0));
        let times = |factor: fn(usize) -> f32| -> Vec<f32> {
            let rows = (0..CHANNELS).flat_map(|at| vector(at).map(|part| part * factor(at)));
            rows.collect()
        };
        let (analysis, synthesis) = (times(|at| 1.0 / scale_of(at)), times(scale_of));
        let basis = ProfileBasis::new(means, deviations.collect(), &analysis, &synthesis);
        ProfilePlane {
            unit,
            bases: vec![basis],
        }
    };
    let planes = (0..layout.layers()).flat_map(|_| [plane(0.2), plane(0.1)]);
    Arc::new(Profile::new(shape, planes.collect()).unwrap())
}

/// Values as the profile says, their keys turned by nothing.
fn layers(layout: &KvLayout, profile: &Profile) -> Vec<Bytes> {
    let mut random = StdRng::seed_from_u64(7);
    let tokens = layout.tokens() as usize;
    let planes = profile.planes().chunks(2);
    let layer = planes.map(|planes| {
        let mut raw = vec![0; layout.layer_bytes()];
        for (plane, raw) in planes.iter().zip(raw.chunks_mut(tokens * CHANNELS * 2)) {
            let basis = &plane.bases[0];
            for token in 0..tokens {
                let mut row = basis.means.clone();
                for (at, deviation) in basis.deviations.iter().enumerate() {
                    let noise: f32 = (0..3).map(|_| random.random_range(-1.0..1.0f32)).sum();
                    let vector = vector(at);
                    for (value, part) in row.iter_mut().zip(vector) {
                        *value += noise * deviation * part * scale_of(at);
                    }
                }
                for (head, values) in row.chunks(DIM.into()).enumerate() {
                    let at = (head * tokens + token) * values.len() * 2;
                    let halves = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes());
                    for (place, byte) in raw[at..].iter_mut().zip(halves) {
                        *place = byte;
                    }
                }
            }
        }
        raw.into()
    });
    layer.collect()
}

fn prelude() -> Prelude {
    Prelude {
        rotation: Some(KeyRotation {
            pairing: Pairing::Halves,
            factor: 1.0,
            start: 0,
            frequencies: vec![0.0; 8],
        }),
        exact_tokens: 3,
        ..Prelude::default()
    }
}

fn encoded(
    layout: &KvLayout,
    level: Level,
    profile: Option<&Arc<Profile>>,
    layers: &[Bytes],
) -> Result<Object, EncodeError> {
    let mut encoding = Encoding::at(level);
    encoding.profile = profile.cloned();
    let key = ChunkKey::from_bytes([5; 32]);
    encoding.encode(key, layout, &prelude(), layers.to_vec())
}

fn decoder(object: &Object, profiles: &[Arc<Profile>]) -> Result<ChunkDecoder, ChunkError> {
    let header = object.header();
    let prelude = object.prelude().unwrap();
    ChunkDecoder::new(*header.layout(), header.level(), prelude, profiles)
}

fn error(raw: &[u8], layer: &[u8]) -> f32 {
    let value = |bytes: &[u8; 2]| f16::from_le_bytes(*bytes).to_f32();
    let pairs = raw.as_chunks().0.iter().zip(layer.as_chunks().0);
    let squares: f32 = pairs.map(|(a, b)| (value(a) - value(b)).powi(2)).sum();
    squares / f32::from(u16::try_from(raw.len() / 2).unwrap())
}

#[test]
fn chunks_come_back_at_every_level_and_name_their_profile() {
    for tokens in [130, 50] {
        let layout = layout(tokens);
        let profile = profile(&layout, PAIRING, 4.0);
        let layers = layers(&layout, &profile);
        let object = encoded(&layout, Level::L2, Some(&profile), &layers).unwrap();
        let parsed = Prelude::parse(object.prelude().unwrap(), &layout).unwrap();
        assert_eq!(parsed.profile, Some(*profile.digest()));
        let decoder = decoder(&object, &[Arc::clone(&profile)]).unwrap();
        let mut raw = vec![0; layout.layer_bytes()];
        for index in 0..3 {
            let layer = &layers[usize::from(index)];
            let parts = object.parts(LayerIdx(index));
            for (level, step) in [(1, 0.2f32), (2, 0.2 / 3.0), (3, 0.2 / 9.0)] {
                decoder
                    .layer(LayerIdx(index), &parts[..level], &mut raw)
                    .unwrap();
                // Both planes, and what f16 rounds.
                assert!(error(&raw, layer) < step * step / 12.0 + 1e-5, "{level}");
            }
            let row = usize::from(DIM) * 2;
            let heads = raw.chunks(tokens as usize * row);
            for (head, before) in heads.zip(layer.chunks(tokens as usize * row)) {
                assert_eq!(head[..3 * row], before[..3 * row], "exact tokens");
            }
        }
    }
}

#[test]
fn what_a_profile_says_need_not_be_shipped() {
    let layout = layout(128);
    let profile = profile(&layout, PAIRING, 4.0);
    let layers = layers(&layout, &profile);
    let bytes = |profile: &Arc<Profile>| {
        let object = encoded(&layout, Level::L0, Some(profile), &layers).unwrap();
        let decoder = decoder(&object, &[Arc::clone(profile)]).unwrap();
        let mut raw = vec![0; layout.layer_bytes()];
        let parts = object.parts(LayerIdx(0));
        decoder.layer(LayerIdx(0), &parts, &mut raw).unwrap();
        assert!(error(&raw, &layers[0]) < 0.04 / 12.0);
        parts[0].len()
    };
    let fitting = bytes(&profile);
    // One that is far off costs what a chunk says of its own channels, and no more.
    let other = bytes(&self::profile(&layout, PAIRING, 400.0));
    let said = 2 * 2 * CHANNELS;
    assert!(
        fitting + said / 2 < other && other < fitting + said + 40,
        "{fitting} {other}"
    );
}

#[test]
fn slices_are_slices_of_the_whole() {
    let layout = layout(130);
    let profile = profile(&layout, PAIRING, 4.0);
    let raw = &layers(&layout, &profile)[1];
    let rotation = prelude().rotation.unwrap().angles(130);
    let codec = LayerCodec::new(layout, Some(&rotation)).unwrap();
    let codec = codec.with_exact_tokens(2);
    let codec = codec
        .with_profile(profile.layer(LayerIdx(1)).unwrap())
        .unwrap();
    let encoded = codec.encode(raw, [0.2, 0.1]);
    let parts = encoded.parts.each_ref().map(Vec::as_slice);
    let mut whole = vec![0; layout.layer_bytes()];
    codec.decode(&parts, &mut whole).unwrap();
    assert_eq!(codec.plan(&parts).unwrap_err(), PlanError::Profile);
    let heads = HeadRange::new(0, HEADS).unwrap();
    for (from, to) in [(0, 64), (64, 130), (128, 130)] {
        let tokens = TokenRange::new(from, to).unwrap();
        let row = usize::from(DIM) * 2;
        let mut slice = vec![0; 2 * usize::from(HEADS) * tokens.len() as usize * row];
        codec
            .decode_slice(&parts, heads, tokens, &mut slice)
            .unwrap();
        let of_whole = whole.chunks(130 * row).flat_map(|head| {
            let place = from as usize * row..to as usize * row;
            head[place].to_vec()
        });
        assert_eq!(slice, of_whole.collect::<Vec<u8>>());
    }
}

#[test]
fn another_profile_is_none() {
    let layout = layout(64);
    let ours = profile(&layout, PAIRING, 4.0);
    let layers = layers(&layout, &ours);
    let object = encoded(&layout, Level::L1, Some(&ours), &layers).unwrap();
    let other = profile(&layout, PAIRING, 5.0);
    assert_ne!(ours, other);
    for profiles in [&[][..], &[Arc::clone(&other)]] {
        assert_eq!(decoder(&object, profiles).unwrap_err(), ChunkError::Profile);
    }
    assert!(decoder(&object, &[other, ours.clone()]).is_ok());
    // Keys that are not turned, or in other pairs, and another layout.
    let unturned = profile(&layout, None, 4.0);
    let wrong = EncodeError::Layout(UnsupportedLayout::Profile);
    let refused = encoded(&layout, Level::L1, Some(&unturned), &layers);
    assert_eq!(refused.unwrap_err(), wrong);
    let wider = KvLayout::new(3, HEADS, Planes::symmetric(32), 64, DType::F16).unwrap();
    let mut encoding = Encoding::at(Level::L1);
    encoding.profile = Some(Arc::clone(&ours));
    assert_eq!(encoding.check(&wider).unwrap_err(), wrong);
    assert_eq!(encoding.check(&layout), Ok(()));
    // Levels that are not nested do without.
    for level in [Level::RAW, Level::LOSSLESS, Level::INT4] {
        let object = encoded(&layout, level, Some(&ours), &layers).unwrap();
        let prelude = object.prelude().cloned().unwrap_or_default();
        assert_eq!(Prelude::parse(&prelude, &layout).unwrap().profile, None);
    }
}

#[test]
fn damaged_parts_are_errors() {
    let layout = layout(64);
    let profile = profile(&layout, PAIRING, 4.0);
    let layers = layers(&layout, &profile);
    let object = encoded(&layout, Level::L1, Some(&profile), &layers).unwrap();
    let decoder = decoder(&object, &[profile]).unwrap();
    let mut raw = vec![0; layout.layer_bytes()];
    let part = object.parts(LayerIdx(0))[0].to_vec();
    for at in 0..part.len() {
        let mut damaged = part.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(
            decoder.layer(LayerIdx(0), &[&damaged], &mut raw).is_err(),
            "{at}"
        );
        assert!(
            decoder
                .layer(LayerIdx(0), &[&part[..at]], &mut raw)
                .is_err(),
            "{at}"
        );
    }
}

#[test]
fn profiles_are_read_as_they_were_written_and_damage_is_found() {
    let layout = layout(64);
    let profile = profile(&layout, PAIRING, 4.0);
    let bytes = profile.as_bytes();
    assert_eq!(bytes.len(), 20 + 6 * (4 + 2 * 4 * 32 + 2 * 2 * 32 * 32) + 8);
    let again = Profile::parse(bytes).unwrap();
    assert_eq!((&again, again.planes()), (&*profile, profile.planes()));
    assert_eq!(again.shape(), profile.shape());
    assert_eq!(Profile::verify(bytes), Ok(*profile.shape()));
    for cut in 0..bytes.len() {
        assert!(Profile::parse(&bytes[..cut]).is_err(), "{cut}");
    }
    for at in 0..bytes.len() {
        let mut damaged = bytes.to_vec();
        damaged[at] ^= 1 << (at % 8);
        assert!(Profile::parse(&damaged).is_err(), "{at}");
        assert!(Profile::verify(&damaged).is_err(), "{at}");
    }
    let error = |change: fn(&mut Vec<u8>)| {
        let mut bytes = bytes.to_vec();
        change(&mut bytes);
        Profile::parse(&bytes).unwrap_err()
    };
    assert_eq!(error(|it| it[0] = 0), ProfileError::Magic);
    assert_eq!(error(|it| it[8] = 9), ProfileError::Version(9));
    assert_eq!(error(|it| it[18] = 3), ProfileError::Shape);
    assert_eq!(error(|it| it[30] ^= 1), ProfileError::Checksum);
    let length = error(|it| it.push(0));
    assert!(matches!(length, ProfileError::Length { .. }));
    // As many layers as there can be allocate nothing.
    let length = error(|it| it[10..18].fill(0xff));
    assert_eq!(length, ProfileError::Shape);
    let length = error(|it| it[10..14].fill(0xff));
    assert!(matches!(length, ProfileError::Length { .. }));
}

#[test]
fn what_is_no_number_is_no_profile() {
    let layout = layout(64);
    let profile = profile(&layout, PAIRING, 4.0);
    let changed = |change: fn(&mut ProfilePlane)| {
        let mut planes = profile.planes().to_vec();
        change(&mut planes[3]);
        Profile::new(*profile.shape(), planes).unwrap_err()
    };
    assert_eq!(changed(|it| it.unit = 0.0), ProfileError::Number);
    assert_eq!(
        changed(|it| it.bases[0].means[2] = f32::NAN),
        ProfileError::Number
    );
    assert_eq!(
        changed(|it| it.bases[0].deviations[2] = -1.0),
        ProfileError::Number
    );
    assert_eq!(
        changed(|it| it.bases[0].analysis[7] = f16::INFINITY),
        ProfileError::Number
    );
    assert_eq!(
        changed(|it| it.bases[0].synthesis[7] = f16::NAN),
        ProfileError::Number
    );
    let error = changed(|it| it.bases[0].synthesis.truncate(7));
    assert_eq!(error, ProfileError::Shape);
    assert_eq!(changed(|it| it.bases.clear()), ProfileError::Shape);
    assert_eq!(changed(|it| it.bases[0].means.clear()), ProfileError::Shape);
}

/// Rows of random numbers times a matrix, so that channels have much in common.
fn mixed(layout: &KvLayout, seed: u64, chunks: usize) -> Vec<Vec<Bytes>> {
    let mut mixing = StdRng::seed_from_u64(1);
    let tokens = layout.tokens() as usize;
    let heads = 2 * CHANNELS / usize::from(DIM);
    let matrix: Vec<f32> = (0..heads * usize::from(DIM) * SOURCES)
        .map(|_| mixing.random_range(-1.0..1.0))
        .collect();
    let mut random = StdRng::seed_from_u64(seed);
    let mut layer = || -> Bytes {
        let sources: Vec<f32> = (0..tokens * SOURCES)
            .map(|_| random.random_range(-1.0..1.0))
            .collect();
        let value = |head: usize, token: usize, channel: usize| {
            let row = head * usize::from(DIM) + channel;
            let mixed = matrix[row * SOURCES..][..SOURCES].iter();
            let own = sources[token * SOURCES..].iter();
            5.0 + mixed.zip(own).map(|(a, b)| a * b).sum::<f32>()
        };
        let rows = (0..heads).flat_map(|head| (0..tokens).map(move |token| (head, token)));
        let values =
            rows.flat_map(|(head, token)| (0..usize::from(DIM)).map(move |it| (head, token, it)));
        let halves = values.flat_map(|(head, token, channel)| {
            f16::from_f32(value(head, token, channel)).to_le_bytes()
        });
        halves.collect()
    };
    (0..chunks)
        .map(|_| (0..layout.layers()).map(|_| layer()).collect())
        .collect()
}

/// Fewer than channels.
const SOURCES: usize = 6;

fn numbers(layers: &[Bytes]) -> Vec<f32> {
    let halves = layers.iter().flat_map(|layer| layer.as_chunks().0);
    halves.map(|&it| f16::from_le_bytes(it).to_f32()).collect()
}

/// The bytes that a chunk takes, and the mean square of the errors of its keys, and values.
fn coded(layout: &KvLayout, encoding: &Encoding, layers: &[Bytes]) -> (usize, [f32; 2]) {
    let key = ChunkKey::from_bytes([1; 32]);
    let object = encoding.encode(key, layout, &Prelude::default(), layers.to_vec());
    let object = object.unwrap();
    assert_eq!(object.header().level(), encoding.level);
    let prelude = object.prelude().unwrap();
    let profiles = encoding.profile.as_slice();
    let decoder = ChunkDecoder::new(*layout, encoding.level, prelude, profiles).unwrap();
    let decoded = (0..layout.layers()).map(LayerIdx).map(|layer| {
        let mut raw = vec![0; layout.layer_bytes()];
        decoder
            .layer(layer, &object.parts(layer), &mut raw)
            .unwrap();
        Bytes::from(raw)
    });
    let decoded = numbers(&decoded.collect::<Vec<_>>());
    let plane = layout.layer_bytes() / 4;
    let mut errors = [0.0; 2];
    for (at, (after, before)) in decoded.iter().zip(numbers(layers)).enumerate() {
        errors[at / plane % 2] += (after - before).powi(2);
    }
    (object.extents().iter().map(Bytes::len).sum(), errors)
}

#[test]
fn a_profile_is_learnt_from_chunks_of_any_size() {
    let learnt_on = layout(64);
    let profile = Profile::calibrate(&learnt_on, &mixed(&learnt_on, 2, 8)).unwrap();
    let small = layout(16);
    assert!(profile.fits(&small, None) && !profile.fits(&small, PAIRING));
    let chunk = &mixed(&small, 3, 1)[0];
    let without = Encoding::at(Level::L1);
    let with = Encoding {
        profile: Some(Arc::new(profile)),
        ..without.clone()
    };
    let (bytes, errors) = coded(&small, &without, chunk);
    let (fewer, as_large) = coded(&small, &with, chunk);
    // Sixteen tokens are too few to say what channels are like.
    assert!(3 * fewer < 2 * bytes, "{fewer} of {bytes} bytes");
    for (as_large, errors) in as_large.into_iter().zip(errors) {
        let ratio = as_large / errors;
        // Of the few directions that there are.
        assert!((0.1..0.9).contains(&ratio), "{ratio}");
    }
}

#[test]
fn what_is_no_number_is_not_learnt() {
    let layout = layout(64);
    let mut samples = mixed(&layout, 2, 4);
    let clean = Profile::calibrate(&layout, &samples[1..]).unwrap();
    let nothing = Bytes::from(vec![0xff; layout.layer_bytes()]);
    samples[0].fill(nothing.clone());
    assert_eq!(Profile::calibrate(&layout, &samples).unwrap(), clean);
    samples.truncate(1);
    let error = Profile::calibrate(&layout, &samples).unwrap_err();
    assert_eq!(error, CalibrationError::Nothing);
    samples[0].pop();
    let error = Profile::calibrate(&layout, &samples).unwrap_err();
    assert_eq!(error, CalibrationError::Layers(0));
    let bytes = KvLayout::new(1, 1, Planes::symmetric(8), 16, DType::F8E4m3).unwrap();
    let error = Profile::calibrate(&bytes, &[]).unwrap_err();
    assert_eq!(error, CalibrationError::DType(DType::F8E4m3));
    // All the same, in all tokens.
    let still = vec![vec![Bytes::from(vec![0x3c; layout.layer_bytes()]); 3]];
    Profile::calibrate(&layout, &still).unwrap();
}
