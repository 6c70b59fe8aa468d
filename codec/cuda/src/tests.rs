//! The kernel beside the CPU's decoder: on a warp of coroutines, and on a device if there is
//! one.

mod emulator;

use half::{bf16, f16};
use kvasir_codec::{
    CellError, ChannelsError, DecodeError, LayerCodec, LayerPlan, Pairing, PlanError, Rotation,
    StreamError,
};
use kvasir_types::{DType, HeadRange, KvLayout, Plane, Planes};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::batch::{Batch, BatchError, CellRecord, LANES, LayerJob};
use crate::decoder::{CudaDecodeError, CudaDecoder, CudaUnavailable};
use crate::placement::{Placement, PlacementError, PlanePlacement};
use emulator::Emulator;

/// What decodes layers into buffers.
trait Decode {
    fn run(&mut self, batch: &Batch<'_>, buffers: &mut [Vec<u8>]) -> Result<(), CudaDecodeError>;

    fn decode(
        &mut self,
        jobs: &[LayerJob<'_>],
        buffers: &mut [Vec<u8>],
    ) -> Result<(), CudaDecodeError> {
        let bytes: Vec<u64> = buffers.iter().map(|buffer| buffer.len() as u64).collect();
        self.run(&Batch::new(jobs, &bytes)?, buffers)
    }
}

impl Decode for CudaDecoder {
    fn run(&mut self, batch: &Batch<'_>, buffers: &mut [Vec<u8>]) -> Result<(), CudaDecodeError> {
        let stream = self.stream().clone();
        let on_device = buffers.iter().map(|buffer| stream.clone_htod(buffer));
        let mut on_device = on_device.collect::<Result<Vec<_>, _>>()?;
        let decoded = self.decode_batch(batch, &mut on_device).map(drop);
        for (buffer, on_device) in buffers.iter_mut().zip(&on_device) {
            *buffer = stream.clone_dtoh(on_device)?;
        }
        decoded
    }
}

/// A device, where there is one.
fn device() -> Option<CudaDecoder> {
    match CudaDecoder::new(0) {
        Ok(decoder) => Some(decoder),
        Err(error @ (CudaUnavailable::Driver | CudaUnavailable::Compiler)) => {
            eprintln!("not tested on a device: {error}");
            None
        }
        Err(CudaUnavailable::Device { source, .. }) => {
            eprintln!("not tested on a device: {source}");
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    layout: KvLayout,
    /// Pairing, pairs and factor.
    rotated: Option<(Pairing, u8, f32)>,
    exact_tokens: u32,
    /// Values that no class has.
    outliers: bool,
}

/// Layouts of all kinds: heads that share a cell, heads that are cells, padding, short last
/// cells, keys unlike values, one plane.
fn cases() -> Vec<Case> {
    let uneven = Planes::KeyValue {
        key_dim: 40,
        value_dim: 24,
    };
    let shapes = [
        (8, Planes::symmetric(128), 70, Some(64)),
        (2, Planes::symmetric(64), 128, Some(32)),
        (3, uneven, 64, Some(12)),
        (1, Planes::Single { dim: 500 }, 65, Some(16)),
        (4, Planes::symmetric(32), 1, Some(16)),
        (1, Planes::symmetric(1), 3, None),
        (6, Planes::symmetric(80), 131, Some(40)),
    ];
    let mut cases = Vec::new();
    for (at, (heads, planes, tokens, pairs)) in shapes.into_iter().enumerate() {
        for (dtype, exact_tokens) in [(DType::F16, 0), (DType::Bf16, 4), (DType::F32, 66)] {
            let layout = KvLayout::new(1, heads, planes, tokens, dtype).unwrap();
            let pairings = [
                None,
                Some((Pairing::Halves, 1.0)),
                Some((Pairing::Neighbours, 1.25)),
            ];
            for (kind, pairing) in pairings.into_iter().enumerate() {
                let rotated = pairing.zip(pairs);
                cases.push(Case {
                    layout,
                    rotated: rotated.map(|((pairing, factor), pairs)| (pairing, pairs, factor)),
                    exact_tokens,
                    outliers: (at + kind) % 2 == 0,
                });
            }
        }
    }
    cases
}

impl Case {
    fn rotation(&self) -> Option<Rotation> {
        let (pairing, pairs, factor) = self.rotated?;
        let frequencies: Vec<f32> = (0..pairs).map(|at| 0.8f32.powi(at.into())).collect();
        let tokens = self.layout.tokens();
        Some(Rotation::new(&frequencies, pairing, factor, 1000, tokens))
    }

    /// A layer whose channels differ in mean and spread, some without any.
    fn layer(&self, seed: u64) -> Vec<u8> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut raw = Vec::new();
        for plane in [Plane::Key, Plane::Value] {
            let row = self.layout.tokens() as usize * self.layout.dtype().bytes();
            let dim = self.layout.head_bytes(plane) / row;
            for _ in 0..self.layout.kv_heads() {
                let mut channel = || {
                    let spread = [0.0, 0.05, 0.3, 1.0, 4.0, 9.0][random.random_range(0..6)];
                    (random.random_range(-3.0..3.0f32), spread)
                };
                let channels: Vec<(f32, f32)> = (0..dim).map(|_| channel()).collect();
                for _ in 0..self.layout.tokens() {
                    for (mean, spread) in &channels {
                        let noise: f32 = (0..4).map(|_| random.random_range(-1.0..1.0f32)).sum();
                        let mut value = mean + spread * noise;
                        if self.outliers && random.random_range(0..200) == 0 {
                            let odd = [1e4, -3e5, 2e-7, f32::INFINITY, f32::NAN, -f32::NAN];
                            value = odd[random.random_range(0..odd.len())];
                        }
                        store(self.layout.dtype(), value, &mut raw);
                    }
                }
            }
        }
        assert_eq!(raw.len(), self.layout.layer_bytes());
        raw
    }
}

fn store(dtype: DType, value: f32, out: &mut Vec<u8>) {
    match dtype {
        DType::F16 => out.extend(f16::from_f32(value).to_le_bytes()),
        DType::Bf16 => out.extend(bf16::from_f32(value).to_le_bytes()),
        _ => out.extend(value.to_le_bytes()),
    }
}

fn is_nan(dtype: DType, bytes: &[u8]) -> bool {
    match *bytes {
        [a, b] if dtype == DType::F16 => f16::from_le_bytes([a, b]).is_nan(),
        [a, b] => bf16::from_le_bytes([a, b]).is_nan(),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]).is_nan(),
        _ => unreachable!("2 or 4 bytes"),
    }
}

/// The same bytes; of keys that were turned, numbers in the same places.
fn assert_same(case: &Case, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    if found == expected {
        return;
    }
    let size = case.layout.dtype().bytes();
    let heads = HeadRange::new(0, case.layout.kv_heads()).unwrap();
    let keys = case.layout.head_slice(Plane::Key, heads).unwrap();
    let values = found.chunks(size).zip(expected.chunks(size));
    for (at, (found, expected)) in values.enumerate() {
        let turned = case.rotated.is_some() && keys.contains(&(at * size));
        let dtype = case.layout.dtype();
        let both_nan = is_nan(dtype, found) && is_nan(dtype, expected);
        assert!(
            found == expected || turned && both_nan,
            "{case:?}: value {at} is {found:?}, not {expected:?}"
        );
    }
}

/// Parts of a layer, and its raw form by how many of them were decoded.
struct Encoded {
    parts: [Vec<u8>; 3],
    decoded: [Vec<u8>; 3],
}

fn encode(codec: &LayerCodec<'_>, raw: &[u8]) -> Encoded {
    let parts = codec.encode(raw, [0.9, 0.7]).parts;
    let borrowed = parts.each_ref().map(Vec::as_slice);
    let decoded = [1, 2, 3].map(|levels| {
        let mut out = vec![0x55; raw.len()];
        codec.decode(&borrowed[..levels], &mut out).unwrap();
        out
    });
    Encoded { parts, decoded }
}

fn raw_layers_are_the_cpus(decoder: &mut impl Decode) {
    for (at, case) in (0..).zip(cases()) {
        let rotation = case.rotation();
        let codec = LayerCodec::new(case.layout, rotation.as_ref()).unwrap();
        let codec = codec.with_exact_tokens(case.exact_tokens);
        let encoded = encode(&codec, &case.layer(at));
        let parts = encoded.parts.each_ref().map(Vec::as_slice);
        // All levels at once, each into a buffer, with something before and after it.
        let placement = Placement::raw(&case.layout, 8);
        let jobs = [0, 1, 2].map(|level| LayerJob {
            codec: &codec,
            parts: &parts[..=level],
            placement: &placement,
            buffer: 2 - level,
        });
        let bytes = case.layout.layer_bytes();
        let mut buffers = vec![vec![0xaa; bytes + 16]; 3];
        decoder.decode(&jobs, &mut buffers).unwrap();
        for (buffer, expected) in buffers.iter().rev().zip(&encoded.decoded) {
            let (before, rest) = buffer.split_at(8);
            let (layer, after) = rest.split_at(bytes);
            assert_eq!((before, after), (&[0xaa; 8][..], &[0xaa; 8][..]));
            assert_same(&case, layer, expected);
        }
    }
}

/// What lies in pages, in the order of a raw layer.
fn gather(case: &Case, placement: &Placement, pool: &[u8]) -> Vec<u8> {
    let layout = &case.layout;
    let mut raw = Vec::new();
    for (plane, place) in [
        (Plane::Key, &placement.keys),
        (Plane::Value, &placement.values),
    ] {
        let row = layout.head_bytes(plane) / layout.tokens() as usize;
        for head in 0..u64::from(layout.kv_heads()) {
            for token in 0..layout.tokens() {
                let page = placement.pages[(token / placement.page_tokens) as usize];
                let at = place.start
                    + u64::from(page) * place.page_stride
                    + u64::from(token % placement.page_tokens) * place.token_stride
                    + head * place.head_stride;
                raw.extend_from_slice(&pool[usize::try_from(at).unwrap()..][..row]);
            }
        }
    }
    raw
}

fn pages_are_the_cpus(decoder: &mut impl Decode) {
    for (at, case) in (0..).zip(cases().into_iter().step_by(2)) {
        let rotation = case.rotation();
        let codec = LayerCodec::new(case.layout, rotation.as_ref()).unwrap();
        let codec = codec.with_exact_tokens(case.exact_tokens);
        let encoded = encode(&codec, &case.layer(at));
        let parts = encoded.parts.each_ref().map(Vec::as_slice);
        // Backwards, every second page; what is between stays.
        let wanted = case.layout.tokens().div_ceil(16);
        let pages: Vec<u32> = (0..wanted).map(|page| 2 * (wanted - page) - 1).collect();
        let mut placement = Placement::pool(&case.layout, 16, 2 * wanted, pages);
        let mut bytes = placement.values.start * 2;
        if at % 2 == 1 {
            // Pages of keys and values by turns, heads before tokens.
            let keys = placement.keys;
            let head_stride = 16 * keys.head_stride;
            let plane = PlanePlacement {
                start: 0,
                page_stride: 2 * keys.page_stride,
                token_stride: keys.head_stride,
                head_stride,
            };
            let start = keys.page_stride;
            placement.keys = plane;
            placement.values = PlanePlacement { start, ..plane };
            bytes = 2 * u64::from(wanted) * plane.page_stride;
        }
        let job = LayerJob {
            codec: &codec,
            parts: &parts,
            placement: &placement,
            buffer: 0,
        };
        let mut pool = vec![vec![0xaa; usize::try_from(bytes).unwrap()]];
        decoder.decode(&[job], &mut pool).unwrap();
        let found = gather(&case, &placement, &pool[0]);
        assert_same(&case, &found, &encoded.decoded[2]);
        // Values of a NaN's bytes are rare enough.
        let untouched = pool[0].iter().filter(|&&byte| byte == 0xaa).count();
        assert!(untouched >= pool[0].len() - found.len(), "{case:?}");
    }
}

fn many_layers_are_decoded_at_once(decoder: &mut impl Decode) {
    let cases: Vec<Case> = cases().into_iter().filter(|case| case.outliers).collect();
    let rotations: Vec<Option<Rotation>> = cases.iter().map(Case::rotation).collect();
    let codecs: Vec<LayerCodec<'_>> = cases
        .iter()
        .zip(&rotations)
        .map(|(case, rotation)| LayerCodec::new(case.layout, rotation.as_ref()).unwrap())
        .collect();
    let encoded: Vec<Encoded> = (0..)
        .zip(cases.iter().zip(&codecs))
        .map(|(seed, (case, codec))| encode(codec, &case.layer(seed)))
        .collect();
    let parts: Vec<[&[u8]; 3]> = encoded
        .iter()
        .map(|encoded| encoded.parts.each_ref().map(Vec::as_slice))
        .collect();
    // Each in pages of another order.
    let placements: Vec<Placement> = (0..)
        .zip(&cases)
        .map(|(at, case)| {
            let count = case.layout.tokens().div_ceil(16);
            let pages = (0..count).map(|page| (page + at) % count).collect();
            Placement::pool(&case.layout, 16, count, pages)
        })
        .collect();
    let jobs: Vec<LayerJob<'_>> = (0..cases.len())
        .map(|at| LayerJob {
            codec: &codecs[at],
            parts: &parts[at][..=at % 3],
            placement: &placements[at],
            buffer: at,
        })
        .collect();
    let pool = |place: &Placement| vec![0xaa; usize::try_from(2 * place.values.start).unwrap()];
    let mut buffers: Vec<Vec<u8>> = placements.iter().map(pool).collect();
    decoder.decode(&jobs, &mut buffers).unwrap();
    for (at, (case, buffer)) in cases.iter().zip(&buffers).enumerate() {
        let found = gather(case, &placements[at], buffer);
        assert_same(case, &found, &encoded[at].decoded[at % 3]);
    }
}

/// Bits of numbers around all that is special to 16 bits: halves between neighbours,
/// subnormals, the largest, what is no number; and any.
fn bits_to_round() -> Vec<u32> {
    let mut random = StdRng::seed_from_u64(2);
    let mut bits: Vec<u32> = Vec::new();
    for upper in [
        0x0000, 0x0080, 0x3300, 0x3380, 0x3800, 0x387f, 0x3880, 0x3f80, 0x477f, 0x4780, 0x7f7f,
        0x7f80, 0x7fa5, 0x7fc0, 0x7fe7,
    ] {
        for lower in [
            0, 1, 0xfff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x5000, 0x7fff, 0x8000, 0x8001, 0xf000,
            0xffff,
        ] {
            let positive: u32 = upper << 16 | lower;
            bits.extend([positive, positive | 1 << 31]);
        }
    }
    bits.extend((bits.len()..64 * 32).map(|_| random.random::<u32>()));
    bits
}

fn values_are_rounded_as_on_the_cpu(decoder: &mut impl Decode) {
    let bits = bits_to_round();
    for dtype in [DType::F16, DType::Bf16, DType::F32] {
        let layout = KvLayout::new(1, 1, Planes::Single { dim: 32 }, 64, dtype).unwrap();
        let codec = LayerCodec::new(layout, None).unwrap();
        let parts = codec.encode(&vec![0; layout.layer_bytes()], [1.0; 2]).parts;
        let parts = parts.each_ref().map(Vec::as_slice);
        let job = LayerJob {
            codec: &codec,
            parts: &parts,
            placement: &Placement::raw(&layout, 0),
            buffer: 0,
        };
        let mut buffers = [vec![0; layout.layer_bytes()]];
        let mut batch = Batch::new(&[job], &[layout.layer_bytes() as u64]).unwrap();
        // All are outliers, which are rounded and nothing else.
        let count = u16::try_from(bits.len()).unwrap();
        set_field(&mut batch, CellRecord::BYTES - 4, count.into());
        batch.outlier_positions = (0..count).flat_map(u16::to_le_bytes).collect();
        batch.outlier_values = bits.iter().copied().flat_map(u32::to_le_bytes).collect();
        decoder.run(&batch, &mut buffers).unwrap();
        let mut expected = Vec::new();
        for &bits in &bits {
            store(dtype, f32::from_bits(bits), &mut expected);
        }
        let size = dtype.bytes();
        let pairs = buffers[0].chunks(size).zip(expected.chunks(size));
        for (bits, (found, expected)) in bits.iter().zip(pairs) {
            assert_eq!(found, expected, "{dtype} of {bits:#x}");
        }
    }
}

/// Streams that pass their checksums and are none.
fn damage_is_an_error(decoder: &mut impl Decode) {
    let layout = KvLayout::new(1, 2, Planes::symmetric(64), 70, DType::F16).unwrap();
    let case = Case {
        layout,
        rotated: None,
        exact_tokens: 0,
        outliers: true,
    };
    let codec = LayerCodec::new(layout, None).unwrap();
    let encoded = encode(&codec, &case.layer(9));
    let parts = encoded.parts.each_ref().map(Vec::as_slice);
    let placement = Placement::raw(&layout, 0);
    let jobs = [0, 1].map(|buffer| LayerJob {
        codec: &codec,
        parts: &parts,
        placement: &placement,
        buffer,
    });
    let bytes = layout.layer_bytes();
    let mut random = StdRng::seed_from_u64(1);
    for at in 0..45 {
        let mut batch = Batch::new(&jobs, &[bytes as u64; 2]).unwrap();
        let cells = batch.layer_of_cell.iter().position(|&layer| layer == 1);
        let cell = random.random_range(cells.unwrap()..batch.layer_of_cell.len());
        if at % 5 == 4 {
            let lane = random.random_range(0..LANES);
            batch.states[4 * (cell * LANES + lane)] ^= 1 << random.random_range(0..8);
        } else {
            move_words(&mut batch, cell, at % 3, |words| match at % 5 {
                0 => words.truncate(2 * random.random_range(0..words.len() / 2)),
                1 => words.extend([0; 2]),
                2 => words.fill(0xff),
                // One bit is not enough: that of a sign makes another stream of the same end.
                _ => random.fill(&mut words[..]),
            });
        }
        let mut buffers = [vec![0; bytes], vec![0; bytes]];
        let error = decoder.run(&batch, &mut buffers);
        let Err(CudaDecodeError::Batch(BatchError::Layer { layer: 1, source })) = error else {
            panic!("{at}: {error:?}");
        };
        let damaged = CellError::Stream(StreamError::Damaged);
        assert_eq!(source, PlanError::Decode(DecodeError::Cell(damaged)));
        assert_same(&case, &buffers[0], &encoded.decoded[2]);
    }
}

/// Alters the words of a level of a cell, and puts them where nothing follows.
fn move_words(batch: &mut Batch<'_>, cell: usize, level: usize, alter: impl FnOnce(&mut Vec<u8>)) {
    let record = CellRecord::BYTES * cell;
    let [place, count] = [3, 3 + LayerPlan::LEVELS].map(|field| record + 4 * (field + level));
    let end = u32::try_from(batch.words.len() / 2).unwrap();
    let from = 2 * set_field(batch, place, end) as usize;
    let len = 2 * set_field(batch, count, 0) as usize;
    let mut words = batch.words[from..from + len].to_vec();
    alter(&mut words);
    set_field(batch, count, u32::try_from(words.len() / 2).unwrap());
    batch.words.extend(words);
}

/// Sets a field of the records of cells, by its byte; gives what it was.
fn set_field(batch: &mut Batch<'_>, at: usize, value: u32) -> u32 {
    let bytes: &mut [u8; 4] = batch.cells[at..].first_chunk_mut().unwrap();
    u32::from_le_bytes(std::mem::replace(bytes, value.to_le_bytes()))
}

fn what_is_wrong_is_refused(decoder: &mut impl Decode) {
    let layout = KvLayout::new(1, 1, Planes::symmetric(32), 20, DType::F16).unwrap();
    let codec = LayerCodec::new(layout, None).unwrap();
    let encoded = codec.encode(&vec![0; layout.layer_bytes()], [1.0; 2]);
    let placement = Placement::raw(&layout, 0);
    let damaged = [&encoded.parts[0][..30]];
    let mut job = LayerJob {
        codec: &codec,
        parts: &damaged,
        placement: &placement,
        buffer: 0,
    };
    let mut buffers = [vec![0; layout.layer_bytes()]];
    let error = |error: Result<(), CudaDecodeError>| match error {
        Err(CudaDecodeError::Batch(error)) => error,
        other => panic!("{other:?}"),
    };
    let (layer, source) = (0, PlanError::Decode(ChannelsError.into()));
    let refused = error(decoder.decode(&[job], &mut buffers));
    assert_eq!(refused, BatchError::Layer { layer, source });
    let parts = [&encoded.parts[0][..]];
    job.parts = &parts;
    decoder.decode(&[job], &mut buffers).unwrap();
    decoder.decode(&[], &mut buffers).unwrap();
    buffers[0].pop();
    let refused = error(decoder.decode(&[job], &mut buffers));
    let [bytes, end] = [1, 0].map(|less| layout.layer_bytes() as u64 - less);
    let source = PlacementError::Bounds { end, bytes };
    assert_eq!(refused, BatchError::Placement { layer, source });
    job.buffer = 1;
    let refused = error(decoder.decode(&[job], &mut buffers));
    assert_eq!(refused, BatchError::Buffer { layer });
}

/// Each as a test of its own, on coroutines and on a device.
macro_rules! on_both {
    ($($name:ident),*) => {
        mod emulated {
            $(
                #[test]
                fn $name() {
                    super::$name(&mut super::Emulator::start());
                }
            )*
        }

        mod on_a_device {
            $(
                #[test]
                fn $name() {
                    if let Some(mut decoder) = super::device() {
                        super::$name(&mut decoder);
                    }
                }
            )*
        }
    };
}

on_both!(
    raw_layers_are_the_cpus,
    pages_are_the_cpus,
    many_layers_are_decoded_at_once,
    values_are_rounded_as_on_the_cpu,
    damage_is_an_error,
    what_is_wrong_is_refused
);
