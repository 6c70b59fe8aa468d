//! Round trips, and damage of every kind, over the public interface.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use bytes::Bytes;
use kvasir_codec::{ExtentError, HeaderError, IdentityError, Object, ObjectError, ObjectHeader};
use kvasir_types::{Checksum, ChunkKey, DType, ExtentIdx, ExtentRange, KvLayout, Level, Planes};
use proptest::prelude::*;

fn layers_of(layout: &KvLayout, seed: u8) -> Vec<Bytes> {
    (0..layout.layers())
        .map(|layer| {
            let start = u32::from(seed) + u32::from(layer) * 7;
            (0..layout.layer_bytes())
                .zip(start..)
                .map(|(_, value)| value.to_le_bytes()[0])
                .collect()
        })
        .collect()
}

fn small() -> Object {
    let layout = KvLayout::new(2, 1, Planes::symmetric(2), 4, DType::F8E4m3).unwrap();
    Object::raw(
        ChunkKey::from_bytes([9; 32]),
        &layout,
        layers_of(&layout, 3),
    )
    .unwrap()
}

/// The header with `change` applied and its checksum made right again.
fn resealed(change: impl FnOnce(&mut [u8])) -> Result<(ObjectHeader, usize), HeaderError> {
    let mut bytes = small().header().encode();
    let end = bytes.len() - 8;
    change(&mut bytes[..end]);
    let checksum = Checksum::of(&bytes[..end]).as_u64().to_le_bytes();
    bytes[end..].copy_from_slice(&checksum);
    ObjectHeader::parse(&bytes)
}

fn any_layout() -> impl Strategy<Value = KvLayout> {
    let planes = prop_oneof![
        (1u16..9, 1u16..9).prop_map(|(key_dim, value_dim)| Planes::KeyValue { key_dim, value_dim }),
        (1u16..9).prop_map(|dim| Planes::Single { dim }),
    ];
    (
        1u16..5,
        1u16..4,
        planes,
        1u32..9,
        prop::sample::select(&DType::ALL[..]),
    )
        .prop_map(|(layers, heads, planes, tokens, dtype)| {
            KvLayout::new(layers, heads, planes, tokens, dtype).unwrap()
        })
}

proptest! {
    #[test]
    fn objects_round_trip(layout in any_layout(), key: [u8; 32], seed: u8) {
        let key = ChunkKey::from_bytes(key);
        let object = Object::raw(key, &layout, layers_of(&layout, seed)).unwrap();
        let bytes = Bytes::from(object.encode());
        prop_assert_eq!(bytes.len() as u64, object.header().object_bytes());
        let back = Object::parse(&bytes).unwrap();
        prop_assert_eq!(back.header(), object.header());
        prop_assert_eq!(back.extents(), object.extents());
        prop_assert_eq!(back.header().verify(&key, &layout.digest()), Ok(()));
        prop_assert_eq!(back.header().level(), Level::RAW);
    }

    /// Arbitrary bytes, with and without the right magic, never panic.
    #[test]
    fn noise_is_rejected(mut bytes in prop::collection::vec(any::<u8>(), 0..400), magic: bool) {
        if magic {
            let real = small().header().encode();
            for (to, from) in bytes.iter_mut().zip(&real[..16]) {
                *to = *from;
            }
        }
        prop_assert!(ObjectHeader::parse(&bytes).is_err());
    }
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = Bytes::from(small().encode());
    for cut in 0..bytes.len() {
        assert!(Object::parse(&bytes.slice(..cut)).is_err(), "{cut}");
    }
    let mut longer = bytes.to_vec();
    longer.push(0);
    assert!(matches!(
        Object::parse(&Bytes::from(longer)),
        Err(ObjectError::Length { .. })
    ));
}

#[test]
fn every_flipped_bit_is_an_error() {
    let bytes = small().encode();
    for bit in 0..bytes.len() * 8 {
        let mut broken = bytes.clone();
        broken[bit / 8] ^= 1 << (bit % 8);
        assert!(Object::parse(&Bytes::from(broken)).is_err(), "bit {bit}");
    }
}

#[test]
fn intact_headers_that_make_no_sense_are_refused() {
    assert!(resealed(|_| ()).is_ok());
    let error = |change: fn(&mut [u8])| resealed(change).unwrap_err();
    assert_eq!(error(|h| h[0] = b'?'), HeaderError::Magic);
    assert_eq!(error(|h| h[8] = 2), HeaderError::Version(2));
    assert_eq!(error(|h| h[12] = 1), HeaderError::Features(1));
    assert!(matches!(error(|h| h[10] = 9), HeaderError::Level(_)));
    assert_eq!(error(|h| h[11] = 1), HeaderError::Reserved);
    assert_eq!(error(|h| h[100] = 1), HeaderError::Reserved);
    assert!(matches!(error(|h| h[17] = 77), HeaderError::Layout(_)));
    assert!(matches!(
        error(|h| h[40] ^= 1),
        HeaderError::LayoutDigest(_)
    ));
    assert!(matches!(
        error(|h| h[98] = 1),
        HeaderError::LayerCount { .. }
    ));
    assert!(matches!(
        error(|h| h[96] = 200),
        HeaderError::Truncated { .. }
    ));
    assert!(matches!(
        error(|h| h[104] ^= 1),
        HeaderError::ExtentLength { .. }
    ));
}

#[test]
fn another_key_or_layout_is_told_apart() {
    let object = small();
    let header = object.header();
    let other = ChunkKey::from_bytes([1; 32]);
    assert!(matches!(
        header.verify(&other, &header.layout().digest()),
        Err(IdentityError::Key { .. })
    ));
    let layout = KvLayout::new(2, 1, Planes::symmetric(2), 8, DType::F8E4m3).unwrap();
    assert!(matches!(
        header.verify(header.key(), &layout.digest()),
        Err(IdentityError::Layout { .. })
    ));
}

#[test]
fn layers_are_checked_one_by_one() {
    let object = small();
    let header = object.header();
    let first = &object.extents()[0];
    assert_eq!(header.verify_extent(ExtentIdx(0), first), Ok(()));
    assert!(matches!(
        header.verify_extent(ExtentIdx(1), first),
        Err(ExtentError::Checksum { .. })
    ));
    assert!(matches!(
        header.verify_extent(ExtentIdx(0), &first[1..]),
        Err(ExtentError::Length { .. })
    ));
    assert!(matches!(
        header.verify_extent(ExtentIdx(2), first),
        Err(ExtentError::OutOfRange { .. })
    ));
    assert!(header.range(ExtentRange::new(0, 2).unwrap()).is_some());
    assert!(header.range(ExtentRange::new(1, 3).unwrap()).is_none());
}

#[test]
fn layers_must_fit_the_layout() {
    let layout = *small().header().layout();
    let key = ChunkKey::from_bytes([0; 32]);
    let mut layers = layers_of(&layout, 0);
    layers.push(Bytes::new());
    assert!(matches!(
        Object::raw(key, &layout, layers),
        Err(HeaderError::ExtentCount { .. })
    ));
    let mut layers = layers_of(&layout, 0);
    layers[1] = Bytes::from_static(b"short");
    assert!(matches!(
        Object::raw(key, &layout, layers),
        Err(HeaderError::ExtentLength { .. })
    ));
    let (header, mut layers) = small().into_parts();
    layers.pop();
    assert!(matches!(
        Object::from_parts((*header).clone(), layers),
        Err(ObjectError::ExtentCount { .. })
    ));
}
