use kvasir_types::Planes;
use proptest::prelude::*;

use super::*;
use crate::cell::CellSink as _;
use crate::part::{PartWriter, write_length};
use crate::rotation::Pairing;
use crate::values;

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

/// Parts that are changed in any one bit, or cut anywhere.
#[test]
fn all_damage_of_one_bit_and_every_truncation_is_an_error() {
    let layout = KvLayout::new(1, 2, Planes::symmetric(16), 70, DType::F16).unwrap();
    let codec = LayerCodec::new(layout, None).unwrap().with_exact_tokens(2);
    let encoded = codec.encode(&layer(&layout, None), [1.0; 2]);
    let mut raw = vec![0; layout.layer_bytes()];
    let mut fails = |parts: &[Vec<u8>; LADDER]| {
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let fails = codec.decode(&parts, &mut raw).is_err();
        assert_eq!(codec.plan(&parts).is_err(), fails, "a plan is as careful");
        fails
    };
    assert!(!fails(&encoded.parts));
    for part in 0..LADDER {
        let mut parts = encoded.parts.clone();
        for at in 0..parts[part].len() {
            for bit in 0..8 {
                parts[part][at] ^= 1 << bit;
                assert!(fails(&parts), "bit {bit} of byte {at} of part {part}");
                parts[part][at] ^= 1 << bit;
            }
        }
        while parts[part].pop().is_some() {
            assert!(fails(&parts), "{} bytes of part {part}", parts[part].len());
        }
        let mut parts = encoded.parts.clone();
        parts[part].push(0);
        assert!(fails(&parts), "a byte more in part {part}");
    }
    let [base, middle, finest] = encoded.parts;
    assert!(
        fails(&[base, finest, middle]),
        "parts in each other's place"
    );
}

#[test]
fn a_plan_has_all_cells_and_what_is_stored_apart() {
    let planes = Planes::KeyValue {
        key_dim: 128,
        value_dim: 24,
    };
    let layout = KvLayout::new(1, 4, planes, 150, DType::F32).unwrap();
    let codec = LayerCodec::new(layout, None).unwrap().with_exact_tokens(3);
    let mut raw = layer(&layout, None);
    let far = |head: usize, token: usize| 4 * ((head * 150 + token) * 128 + 7);
    raw[far(3, 70)..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let encoded = codec.encode(&raw, [0.5, 0.8]);
    let parts: Vec<&[u8]> = encoded.parts[..2].iter().map(Vec::as_slice).collect();
    let plan = codec.plan(&parts).unwrap();
    assert_eq!((plan.levels, plan.exact_tokens), (2, 3));
    let heads = |start, end| HeadRange::new(start, end).unwrap();
    let groups = plan.groups.iter().map(|group| (group.plane, group.heads));
    let expected = [
        (Plane::Key, heads(0, 2)),
        (Plane::Key, heads(2, 4)),
        (Plane::Value, heads(0, 4)),
    ];
    assert_eq!(groups.collect::<Vec<_>>(), expected);
    for group in &plan.groups {
        let (step, dim) = match group.plane {
            Plane::Key => (0.5 / 3.0, 128),
            Plane::Value => (0.8 / 3.0, 24),
        };
        assert_eq!((group.step, group.dim), (step, dim));
        assert!(group.classes.len().is_multiple_of(LANES));
        assert_eq!(group.classes.len(), group.offsets.len());
        let tokens: Vec<(u32, u32)> = group
            .cells
            .iter()
            .map(|cell| (cell.tokens.start(), cell.tokens.end()))
            .collect();
        assert_eq!(tokens, [(0, 64), (64, 128), (128, 150)]);
        let place = layout.head_slice(group.plane, group.heads).unwrap();
        let kept = 3 * dim * 4;
        let exact = raw[place].chunks(150 * dim * 4).map(|head| &head[..kept]);
        assert!(group.exact == exact.collect::<Vec<_>>().concat());
        for cell in &group.cells {
            assert!(!cell.words[0].is_empty() && !cell.words[1].is_empty());
            assert!(cell.words[2].is_empty());
        }
    }
    let position = 6 * 256 + 128 + 7;
    assert_eq!(
        plan.groups[1].cells[1].outliers,
        [(position, f32::INFINITY)]
    );
    assert!(plan.groups[0].cells[1].outliers.is_empty());
}

/// Cells of a layer that all fit into each other's place but for their checksums.
#[test]
fn a_cell_in_the_place_of_another_is_an_error() {
    let place = |plane, level, group, cell| Place {
        plane,
        level,
        group,
        cell,
    };
    let mut writer = PartWriter::new(1);
    writer.add(|out| out.push(7));
    let part = writer.finish(Vec::new());
    let part = HeadReader::new(1, &part).cells([9].into_iter()).unwrap();
    assert_eq!(part.cell(0, place(0, 1, 0, 0)), Ok(&[7][..]));
    for other in [
        place(1, 1, 0, 0),
        place(0, 2, 0, 0),
        place(0, 1, 1, 0),
        place(0, 1, 0, 1),
    ] {
        let error = DecodeError::Checksum(other.level);
        assert_eq!(part.cell(0, other), Err(error));
    }
}

#[test]
fn lengths_are_bounded() {
    let read = |bytes: &[u8], most| HeadReader::new(2, bytes).take_length(most);
    for len in [0, 1, 127, 128, 300, 200_000] {
        let mut bytes = Vec::new();
        write_length(len, &mut bytes);
        let len = len as usize;
        assert_eq!(read(&bytes, len), Ok(len));
        if len > 0 {
            assert_eq!(read(&bytes, len - 1), Err(DecodeError::Length(2)));
        }
    }
    for bytes in [&[][..], &[0x80], &[0xff; 9]] {
        assert_eq!(read(bytes, usize::MAX), Err(DecodeError::Length(2)));
    }
}

#[test]
fn a_slice_is_what_the_whole_layer_has_there() {
    let layouts = [
        (8, Planes::symmetric(128), DType::F16),
        (4, Planes::symmetric(160), DType::Bf16),
        (
            8,
            Planes::KeyValue {
                key_dim: 64,
                value_dim: 128,
            },
            DType::F32,
        ),
    ];
    for (heads, planes, dtype) in layouts {
        let layout = KvLayout::new(1, heads, planes, 330, dtype).unwrap();
        let rotation = Rotation::new(&[0.5; 32], Pairing::Halves, 1.25, 7, 330);
        let codec = LayerCodec::new(layout, Some(&rotation)).unwrap();
        let codec = codec.with_exact_tokens(70);
        let raw = layer(&layout, Some(&rotation));
        let encoded = codec.encode(&raw, [0.5, 0.8]);
        let whole = decoded(&codec, &encoded.parts[..2]).unwrap();
        let (unit, _) = codec.slice_unit();
        let parts: Vec<&[u8]> = encoded.parts[..2].iter().map(Vec::as_slice).collect();
        for heads in [HeadRange::new(0, unit), HeadRange::new(unit, heads)] {
            for (start, end) in [(0, 64), (0, 128), (64, 330), (128, 256), (320, 330)] {
                let (Ok(heads), tokens) = (heads, TokenRange::new(start, end).unwrap()) else {
                    continue;
                };
                let mut expected = Vec::new();
                for plane in [Plane::Key, Plane::Value] {
                    let place = layout.head_slice(plane, heads).unwrap();
                    let head_bytes = layout.head_bytes(plane);
                    let row = head_bytes / 330;
                    for head in whole[place].chunks(head_bytes) {
                        expected.extend_from_slice(&head[start as usize * row..end as usize * row]);
                    }
                }
                let mut slice = vec![0xff; expected.len()];
                codec
                    .decode_slice(&parts, heads, tokens, &mut slice)
                    .unwrap();
                assert!(slice == expected, "{layout:?} {heads} {tokens}");
            }
        }
        let refused = |heads: (u16, u16), tokens: (u32, u32)| {
            let heads = HeadRange::new(heads.0, heads.1).unwrap();
            let tokens = TokenRange::new(tokens.0, tokens.1).unwrap();
            let result = codec.decode_slice(&parts, heads, tokens, &mut []);
            result
                == Err(DecodeError::Slice {
                    heads: unit,
                    tokens: 64,
                })
        };
        assert!(refused((0, unit + 1), (0, 64)) && refused((1, 1 + unit), (0, 64)));
        assert!(refused((0, unit), (0, 63)) && refused((0, unit), (1, 64)));
        assert!(refused((0, unit), (0, 384)) && refused((0, heads + unit), (0, 64)));
    }
}

#[test]
fn a_slice_does_not_look_at_other_cells() {
    let layout = KvLayout::new(1, 4, Planes::symmetric(128), 128, DType::F16).unwrap();
    let codec = LayerCodec::new(layout, None).unwrap();
    let mut encoded = codec.encode(&layer(&layout, None), [0.5; 2]);
    for part in &mut encoded.parts {
        let last = part.len() - 1;
        part[last] ^= 1;
    }
    let parts: Vec<&[u8]> = encoded.parts.iter().map(Vec::as_slice).collect();
    let mut slice = vec![0; layout.layer_bytes() / 4];
    let heads = |start, end| HeadRange::new(start, end).unwrap();
    let tokens = |start, end| TokenRange::new(start, end).unwrap();
    codec
        .decode_slice(&parts, heads(2, 4), tokens(0, 64), &mut slice)
        .unwrap();
    codec
        .decode_slice(&parts, heads(0, 2), tokens(64, 128), &mut slice)
        .unwrap();
    let damaged = codec.decode_slice(&parts, heads(2, 4), tokens(64, 128), &mut slice);
    assert_eq!(damaged, Err(DecodeError::Checksum(0)));
}

/// What no quantiser takes: payloads of what is no number, infinities, zeros of both signs,
/// the smallest and the largest numbers.
#[test]
fn exact_tokens_come_back_bit_for_bit() {
    for (dtype, rotated) in [(DType::F16, true), (DType::Bf16, false), (DType::F32, true)] {
        let layout = KvLayout::new(1, 2, Planes::symmetric(64), 130, dtype).unwrap();
        let rotation = Rotation::new(&[0.5; 32], Pairing::Halves, 1.0, 7, 130);
        let rotation = rotated.then_some(&rotation);
        let plain = LayerCodec::new(layout, rotation).unwrap();
        let usual = layer(&layout, rotation);
        let size = dtype.bytes();
        let head = layout.head_bytes(Plane::Key);
        for exact in [0, 1, 4, 64, 67, 130, 500] {
            let codec = LayerCodec::new(layout, rotation)
                .unwrap()
                .with_exact_tokens(exact);
            let kept = exact.min(130) as usize * 64 * size;
            let mut raw = usual.clone();
            for head in raw.chunks_exact_mut(head) {
                for (at, byte) in head[..kept].iter_mut().enumerate() {
                    *byte = (at * 89 % 255).to_le_bytes()[0] | 0x70;
                }
            }
            assert_eq!(codec.deviations(&raw).map(f32::is_finite), [true; 2]);
            let encoded = codec.encode(&raw, [0.5; 2]);
            for level in 1..=LADDER {
                let got = decoded(&codec, &encoded.parts[..level]).unwrap();
                for (got, raw) in got.chunks_exact(head).zip(raw.chunks_exact(head)) {
                    assert!(got[..kept] == raw[..kept], "{dtype} {exact}");
                }
                // Others are not the worse for it, neither do they take more.
                let others = plain.encode(&usual, [0.5; 2]);
                let bytes = |layer: &EncodedLayer| layer.parts.iter().map(Vec::len).sum::<usize>();
                let most = bytes(&others) + 4 * kept + 300;
                assert!(bytes(&encoded) < most, "{dtype} {exact}");
                let others = decoded(&plain, &others.parts[..level]).unwrap();
                let pairs = got.chunks_exact(head).zip(others.chunks_exact(head));
                for (got, other) in pairs {
                    let [got, other] = [got, other].map(|head| values(dtype, &head[kept..]));
                    let errors = got.iter().zip(&other).map(|(a, b)| (a - b).abs());
                    assert!(errors.fold(0.0, f32::max) < 1.6, "{dtype} {exact}");
                }
            }
        }
    }
}

#[test]
fn what_is_strange_survives() {
    for dtype in [DType::F16, DType::Bf16, DType::F32] {
        for rotated in [false, true] {
            let layout = KvLayout::new(1, 2, Planes::symmetric(64), 80, dtype).unwrap();
            let rotation = Rotation::new(&[0.0; 32], Pairing::Halves, 1.0, 0, 80);
            let codec = LayerCodec::new(layout, rotated.then_some(&rotation)).unwrap();
            let mut before = values(dtype, &layer(&layout, None));
            let strange = [
                f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                1e30,
                -6e4,
                1e-40,
            ];
            for (at, value) in strange.into_iter().enumerate() {
                before[at * 997 + 3] = value;
            }
            before[20 * 64..40 * 64].fill(0.0);
            let mut raw = vec![0; layout.layer_bytes()];
            values::store(dtype, &before, &mut raw);
            let before = values(dtype, &raw);
            let encoded = codec.encode(&raw, [0.5; 2]);
            for level in 1..=LADDER {
                let after = values(dtype, &decoded(&codec, &encoded.parts[..level]).unwrap());
                for (at, (a, b)) in before.iter().zip(&after).enumerate() {
                    // Keys are turned in pairs, even if by nothing.
                    if rotated && at < before.len() / 2 && !(a + before[at ^ 32]).is_finite() {
                        assert!(!b.is_finite(), "{dtype} {at}: {a} {b}");
                        continue;
                    }
                    let same = a == b || a.is_nan() && b.is_nan();
                    assert!(same || (a - b).abs() < 0.3, "{dtype} {at}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn exact_tokens_that_are_too_few_are_an_error() {
    let layout = KvLayout::new(1, 1, Planes::symmetric(16), 2, DType::F16).unwrap();
    let codec = LayerCodec::new(layout, None).unwrap().with_exact_tokens(2);
    let raw = layer(&layout, None);
    let [mut base, ..] = codec.encode(&raw, [1.0; 2]).parts;
    let place = |bytes: &[u8]| {
        codec.planes[0]
            .place(EXACT, 0, 0)
            .checksum(bytes)
            .to_le_bytes()
    };
    let find = |base: &[u8], bytes: &[u8]| {
        let mut all = base.windows(bytes.len());
        all.position(|window| window == bytes).unwrap()
    };
    // The last byte is gone, and all checksums say that this is as it should be.
    let (whole, short) = (&raw[..64], &raw[..63]);
    let (entry, cell) = (
        find(&base, &[&[64][..], &place(whole)].concat()),
        find(&base, whole),
    );
    base[entry] = 63;
    base[entry + 1..][..4].copy_from_slice(&place(short));
    let head = cell - 4;
    let of_head = crate::part::checksum(&[0], &base[..head]).to_le_bytes();
    base[head..cell].copy_from_slice(&of_head);
    base.remove(cell + 63);
    let mut out = vec![0; layout.layer_bytes()];
    assert_eq!(
        codec.decode(&[&base], &mut out),
        Err(DecodeError::Length(0))
    );
}
