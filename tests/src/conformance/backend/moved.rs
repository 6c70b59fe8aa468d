//! Content chunks, at any place.

use half::{bf16, f16};
use kvasir_plugin::{BackendError, EngineBackend, Placement};
use kvasir_types::{DType, KvLayout, LayerIdx, Plane, Planes, Slice, TokenRange};

use super::{CHUNKS, Keys};

/// Runs the suite on the pages of one sequence.
pub(super) fn run<B: EngineBackend>(backend: &mut B, pages: &B::Pages, keys: &Keys<'_>) {
    unmoved_chunks_are_the_same_bytes(backend, pages);
    keys_turn_and_values_stay(backend, pages, keys);
    a_chunk_lies_at_two_places(backend, pages, keys);
    refusals_change_nothing(backend, pages);
}

/// Tokens of the sequence.
fn tokens(layout: &KvLayout) -> usize {
    CHUNKS * layout.tokens() as usize
}

/// Ranges of tokens that begin and end anywhere.
fn ranges(layout: &KvLayout) -> Vec<std::ops::Range<usize>> {
    let all = tokens(layout);
    vec![0..1, 1..6, 7..16, 5..all - 3, 17..all, 0..all, all - 1..all]
}

/// Bytes of every value, so that floats of every kind occur, NaN included.
fn any_bytes(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|index| u8::try_from((index * 11 + index / 256 + seed * 29) % 256).unwrap_or(0))
        .collect()
}

fn of_tokens(layout: &KvLayout, tokens: usize) -> KvLayout {
    let tokens = u32::try_from(tokens).expect("a sequence is short");
    layout.with_tokens(tokens).expect("a sequence is short")
}

/// One layer of the whole sequence, as the backend's chunks say.
fn read<B: EngineBackend>(backend: &B, pages: &B::Pages, layer: LayerIdx) -> Vec<u8> {
    let layout = *backend.layout();
    let whole = of_tokens(&layout, tokens(&layout));
    let mut all = vec![0; whole.layer_bytes()];
    for chunk in 0..CHUNKS {
        let mut payload = vec![0; layout.layer_bytes()];
        backend
            .read_layer(pages, chunk, layer, &mut payload)
            .expect("a chunk inside the pages can be read");
        let start = u32::try_from(chunk).expect("a few chunks") * layout.tokens();
        put(&whole, start..start + layout.tokens(), &payload, &mut all);
    }
    all
}

/// Puts a layer of some tokens into that of the sequence.
fn put(whole: &KvLayout, at: std::ops::Range<u32>, payload: &[u8], all: &mut [u8]) {
    let mut rest = payload;
    for range in whole.cut(slice(at)) {
        let (run, after) = rest.split_at(range.len());
        all[range].copy_from_slice(run);
        rest = after;
    }
    assert!(rest.is_empty(), "a layer is all of its runs");
}

fn take(whole: &KvLayout, at: std::ops::Range<u32>, all: &[u8]) -> Vec<u8> {
    whole
        .cut(slice(at))
        .flat_map(|range| all[range].to_vec())
        .collect()
}

fn slice(tokens: std::ops::Range<u32>) -> Slice {
    Slice {
        heads: None,
        tokens: TokenRange::new(tokens.start, tokens.end).ok(),
    }
}

fn narrow(range: &std::ops::Range<usize>) -> std::ops::Range<u32> {
    let narrow = |at| u32::try_from(at).expect("a sequence is short");
    narrow(range.start)..narrow(range.end)
}

fn unmoved_chunks_are_the_same_bytes<B: EngineBackend>(backend: &mut B, pages: &B::Pages) {
    let layout = *backend.layout();
    let whole = of_tokens(&layout, tokens(&layout));
    let layers = || (0..layout.layers()).map(LayerIdx);
    let mut expected: Vec<_> = layers().map(|layer| read(backend, pages, layer)).collect();
    for (seed, range) in ranges(&layout).into_iter().enumerate() {
        for layer in layers() {
            let at = Placement {
                first: range.start,
                compiled_at: range.start,
                tokens: range.len(),
            };
            let length = of_tokens(&layout, range.len()).layer_bytes();
            let payload = any_bytes(length, seed * 7 + usize::from(layer.0));
            backend
                .write_moved(pages, at, layer, &payload)
                .expect("a chunk inside the pages can be written");
            put(
                &whole,
                narrow(&range),
                &payload,
                &mut expected[usize::from(layer.0)],
            );
        }
        for layer in layers() {
            let found = read(backend, pages, layer);
            assert!(
                found == expected[usize::from(layer.0)],
                "{range:?}, layer {layer}"
            );
        }
    }
}

/// Keys as a model has them before it turns them, of a few tokens.
fn raw_keys(layout: &KvLayout, seed: usize) -> Vec<Vec<f32>> {
    let rows = usize::from(layout.kv_heads()) * layout.tokens() as usize;
    let width = width(layout, Plane::Key);
    let value = |row: usize, at: usize| {
        let bits = (row * 131 + at * 37 + seed * 71) % 1021;
        f32::from(u16::try_from(bits).expect("below 1021")) / 512.0 - 1.0
    };
    (0..rows)
        .map(|row| (0..width).map(|at| value(row, at)).collect())
        .collect()
}

fn width(layout: &KvLayout, plane: Plane) -> usize {
    match (layout.planes(), plane) {
        (Planes::KeyValue { key_dim, .. }, Plane::Key)
        | (Planes::Single { dim: key_dim }, Plane::Key) => key_dim.into(),
        (Planes::KeyValue { value_dim, .. }, Plane::Value) => value_dim.into(),
        (Planes::Single { .. }, Plane::Value) => 0,
    }
}

/// What a layer of a chunk is when it is computed at a position: its keys, and any values.
fn computed(
    layout: &KvLayout,
    raw: &[Vec<f32>],
    start: usize,
    values: &[u8],
    keys: &Keys<'_>,
) -> Vec<u8> {
    let mut payload = Vec::with_capacity(layout.layer_bytes());
    for (row, key) in raw.iter().enumerate() {
        let mut key = key.clone();
        (keys.turn)(&mut key, start + row % layout.tokens() as usize);
        payload.extend(
            key.iter()
                .flat_map(|value| to_bytes(layout.dtype(), *value)),
        );
    }
    payload.extend_from_slice(values);
    payload
}

fn to_bytes(dtype: DType, value: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        DType::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        other => panic!("the suite has no {other}"),
    }
}

fn from_bytes(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let of_two = |to: fn([u8; 2]) -> f32| bytes.as_chunks().0.iter().map(|it| to(*it)).collect();
    match dtype {
        DType::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|it| f32::from_le_bytes(*it))
            .collect(),
        DType::F16 => of_two(|it| f16::from_le_bytes(it).to_f32()),
        DType::Bf16 => of_two(|it| bf16::from_le_bytes(it).to_f32()),
        other => panic!("the suite has no {other}"),
    }
}

/// How far a key may be from the one that would be computed here: it was rounded twice, and
/// its values are below 2 times the factor of the rotation.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 3.0 / 1024.0,
        _ => 3.0 / 128.0,
    }
}

/// Asserts that `found` is `expected`, keys up to rounding.
fn assert_layer(layout: &KvLayout, found: &[u8], expected: &[u8], context: &str) {
    let keys = usize::from(layout.kv_heads()) * layout.head_bytes(Plane::Key);
    assert!(
        found[keys..] == expected[keys..],
        "{context}: values changed"
    );
    let found = from_bytes(layout.dtype(), &found[..keys]);
    let expected = from_bytes(layout.dtype(), &expected[..keys]);
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let close = (found - expected).abs() <= tolerance(layout.dtype());
        assert!(
            close,
            "{context}: key element {at} is {found}, not {expected}"
        );
    }
}

fn keys_turn_and_values_stay<B: EngineBackend>(backend: &mut B, pages: &B::Pages, keys: &Keys<'_>) {
    let layout = *backend.layout();
    let whole = of_tokens(&layout, tokens(&layout));
    for (seed, range) in ranges(&layout).into_iter().enumerate() {
        let chunk = of_tokens(&layout, range.len());
        for compiled_at in [0, 1, 9, 3000] {
            let at = Placement {
                first: range.start,
                compiled_at,
                tokens: range.len(),
            };
            let mut before = Vec::new();
            for layer in (0..layout.layers()).map(LayerIdx) {
                let raw = raw_keys(&chunk, seed + usize::from(layer.0));
                let values = usize::from(layout.kv_heads()) * chunk.head_bytes(Plane::Value);
                let values = any_bytes(values, seed);
                let compiled = computed(&chunk, &raw, compiled_at, &values, keys);
                let here = computed(&chunk, &raw, range.start, &values, keys);
                before.push((read(backend, pages, layer), here));
                backend
                    .write_moved(pages, at, layer, &compiled)
                    .expect("a chunk inside the pages can be written");
            }
            for (layer, (before, here)) in (0..).map(LayerIdx).zip(before) {
                let context = format!("{at:?}, layer {layer}");
                let found = read(backend, pages, layer);
                let landed = take(&whole, narrow(&range), &found);
                assert_layer(&chunk, &landed, &here, &context);
                // All else is as it was.
                let mut expected = before;
                put(&whole, narrow(&range), &landed, &mut expected);
                assert!(found == expected, "{context}: other tokens changed");
            }
        }
    }
}

/// Layer by layer at both places, as a chunk that stands in a prompt twice is landed.
fn a_chunk_lies_at_two_places<B: EngineBackend>(
    backend: &mut B,
    pages: &B::Pages,
    keys: &Keys<'_>,
) {
    let layout = *backend.layout();
    let whole = of_tokens(&layout, tokens(&layout));
    let chunk = of_tokens(&layout, 11);
    let values = any_bytes(
        usize::from(layout.kv_heads()) * chunk.head_bytes(Plane::Value),
        3,
    );
    for layer in (0..layout.layers()).map(LayerIdx) {
        let raw = raw_keys(&chunk, 5 + usize::from(layer.0));
        let compiled = computed(&chunk, &raw, 1, &values, keys);
        let places = [2, 1, tokens(&layout) - 11];
        for first in places {
            let at = Placement {
                first,
                compiled_at: 1,
                tokens: 11,
            };
            let written = backend.write_moved(pages, at, layer, &compiled);
            written.expect("a chunk inside the pages can be written");
        }
        let found = read(backend, pages, layer);
        for first in &places[1..] {
            let here = computed(&chunk, &raw, *first, &values, keys);
            let landed = take(&whole, narrow(&(*first..first + 11)), &found);
            assert_layer(
                &chunk,
                &landed,
                &here,
                &format!("at {first}, layer {layer}"),
            );
        }
    }
}

fn refusals_change_nothing<B: EngineBackend>(backend: &mut B, pages: &B::Pages) {
    let layout = *backend.layout();
    let layers = || (0..layout.layers()).map(LayerIdx);
    let before: Vec<_> = layers().map(|layer| read(backend, pages, layer)).collect();
    let all = tokens(&layout);
    let payload = any_bytes(of_tokens(&layout, 5).layer_bytes(), 1);
    let placed = |first| Placement {
        first,
        compiled_at: 1,
        tokens: 5,
    };
    for first in [all - 4, all, usize::MAX - 4, usize::MAX] {
        let end = first.saturating_add(5);
        assert_eq!(
            backend.write_moved(pages, placed(first), LayerIdx(0), &payload),
            Err(BackendError::PlacedOutsidePages { first, end })
        );
    }
    let endless = Placement {
        tokens: usize::MAX,
        ..placed(0)
    };
    assert_eq!(
        backend.write_moved(pages, endless, LayerIdx(0), &payload),
        Err(BackendError::PlacedOutsidePages {
            first: 0,
            end: usize::MAX
        })
    );
    let none = LayerIdx(layout.layers());
    assert_eq!(
        backend.write_moved(pages, placed(0), none, &payload),
        Err(BackendError::NoSuchLayer(none))
    );
    for length in [0, payload.len() - 1, payload.len() + 1] {
        let wrong = BackendError::WrongLength {
            expected: payload.len(),
            found: length,
        };
        assert_eq!(
            backend.write_moved(pages, placed(0), LayerIdx(0), &vec![0; length]),
            Err(wrong)
        );
    }
    for (layer, before) in layers().zip(before) {
        assert!(
            read(backend, pages, layer) == before,
            "layer {layer} changed"
        );
    }
}
