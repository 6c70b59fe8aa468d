//! Pages: what goes in and out of them, and the contract of the plugin's seam.

use kvasir_codec::LayerCodec;
use kvasir_plugin::Placement;
use kvasir_tests::conformance::backend::{self, Keys};
use kvasir_types::Plane;

use super::super::{DeviceBackend, DevicePoolError};
use super::{Device, DevicePool, also_late, on_both};
use crate::cache::{self, Turns};
use crate::config::ModelConfig;
use crate::kernels::{Isa, rotate};
use crate::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvError};

fn fixture(name: &str) -> ModelConfig {
    let path = format!("{}/fixtures/{name}/config.json", env!("CARGO_MANIFEST_DIR"));
    ModelConfig::from_json(&std::fs::read(path).unwrap()).unwrap()
}

/// Any bytes, each different from those of another seed.
fn payload(bytes: usize, seed: usize) -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at * 7 + at / 251 + seed * 31) % 251).unwrap();
    (0..bytes).map(byte).collect()
}

/// The conformance suite, with a page table that is not in order: every element type, and keys
/// that turn.
fn the_contract_is_kept(device: &Device) {
    for (name, dtype, chunk_tokens) in [
        ("llama2-mha", KvDtype::F32, 48),
        ("llama-yarn", KvDtype::F16, 16),
        ("mistral", KvDtype::Bf16, 32),
    ] {
        let config = fixture(name);
        let blocks = chunk_tokens as usize / BLOCK_TOKENS * backend::CHUNKS;
        let mut pool = DevicePool::new(device, &config, 2 * blocks, dtype).unwrap();
        let layout = cache::layout(&config, dtype, chunk_tokens).unwrap();
        let mut pages: Vec<BlockId> = std::iter::from_fn(|| pool.alloc()).collect();
        pages.reverse();
        let others = pages.split_off(blocks);
        let frequencies = config.rope.frequencies(config.head_dim);
        let turn = |key: &mut [f32], position: usize| {
            let (mut cos, mut sin) = (vec![0.0; key.len() / 2], vec![0.0; key.len() / 2]);
            frequencies.angles(position, &mut cos, &mut sin);
            rotate(Isa::detect(), key, &cos, &sin);
        };
        let mut turns = Turns::new(&config);
        backend::run(
            &mut DeviceBackend::new(&mut pool, &layout).with_turns(&mut turns),
            &pages[..],
            &others[..],
            &Keys { turn: &turn },
        );
    }
}

/// Payloads of all lengths, more of them than there are buffers, and larger than these were.
fn layers_round_trip(device: &Device) {
    let config = fixture("mistral");
    for dtype in [KvDtype::F32, KvDtype::F16] {
        let mut pool = DevicePool::new(device, &config, 40, dtype).unwrap();
        let mut table: Vec<BlockId> = (0..40).map(|_| pool.alloc().unwrap()).collect();
        table.reverse();
        let parts = [(0, 5), (5, 27), (32, 16), (48, 1), (49, 400), (449, 191)];
        for layer in 0..config.layers {
            for (first, tokens) in parts {
                let payload = payload(pool.layer_bytes(tokens), first + layer);
                pool.write_layer(&table, first, tokens, layer, &payload)
                    .unwrap();
            }
        }
        for layer in 0..config.layers {
            for (first, tokens) in parts {
                let mut found = vec![0; pool.layer_bytes(tokens)];
                pool.read_layer(&table, first, tokens, layer, &mut found)
                    .unwrap();
                assert_eq!(found, payload(found.len(), first + layer), "{first}");
            }
        }
    }
}

/// The baseline of a benchmark, which takes some time.
fn copies_are_timed(device: &Device) {
    let [there, back] = device.time_copies(1 << 16, 3).unwrap();
    assert!(!there.is_zero() && !back.is_zero());
    assert!(!device.name().unwrap().is_empty());
}

fn new_pages_are_zeros(device: &Device) {
    let config = fixture("qwen2");
    let pool = DevicePool::new(device, &config, 3, KvDtype::F32).unwrap();
    let table = [BlockId(2), BlockId(0), BlockId(1)];
    let mut found = vec![1; pool.layer_bytes(48)];
    pool.read_layer(&table, 0, 48, 1, &mut found).unwrap();
    assert!(found.iter().all(|&byte| byte == 0));
}

fn ranges_that_do_not_fit_are_refused(device: &Device) {
    let config = fixture("qwen2");
    let mut pool = DevicePool::new(device, &config, 2, KvDtype::F32).unwrap();
    let table = [BlockId(0), BlockId(1)];
    let payload = vec![0; pool.layer_bytes(4)];
    let mut refusal = |blocks: &[BlockId], first, layer, payload: &[u8]| {
        let refused = pool.write_layer(blocks, first, 4, layer, payload);
        match refused.unwrap_err() {
            DevicePoolError::Pages(error) => error,
            other => panic!("{other:?}"),
        }
    };
    let (last, table_tokens) = (33, 32);
    let range = KvError::Range {
        last,
        table: table_tokens,
    };
    assert_eq!(refusal(&table, 29, 0, &payload), range);
    let (layer, layers) = (2, 2);
    let no_layer = KvError::NoSuchLayer { layer, layers };
    assert_eq!(refusal(&table, 0, 2, &payload), no_layer);
    let (block, blocks) = (BlockId(2), 2);
    let no_block = KvError::NoSuchBlock { block, blocks };
    assert_eq!(refusal(&[block], 0, 0, &payload), no_block);
    let short = refusal(&table, 0, 0, &payload[1..]);
    assert!(matches!(short, KvError::PayloadLength { .. }));

    let (a, b) = (pool.alloc().unwrap(), pool.alloc().unwrap());
    assert_eq!((pool.alloc(), pool.free_blocks()), (None, 0));
    assert_eq!(pool.free(a), Ok(()));
    assert_eq!(pool.free(a), Err(KvError::NotAllocated(a)));
    assert_eq!((pool.alloc(), pool.blocks()), (Some(a), 2));
    assert_ne!(a, b);
}

/// What a decoder of cells is told, against where layers are landed.
fn decoders_write_where_layers_land(device: &Device) {
    let config = fixture("llama3-gqa");
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        let mut pool = DevicePool::new(device, &config, 8, dtype).unwrap();
        let table = [5, 0, 7, 3, 1].map(BlockId);
        let (first, tokens, layer) = (16, 40, 1);
        let layout = cache::layout(&config, dtype, 40).unwrap();
        let payload = payload(layout.layer_bytes(), 3);
        pool.write_layer(&table, first, tokens, layer, &payload)
            .unwrap();
        let whole = pool.download().unwrap();

        let place = pool.placement(&table, first, tokens, layer).unwrap();
        place.check(&layout, pool.bytes()).unwrap();
        let row = config.head_dim * dtype.bytes();
        let mut found = Vec::new();
        for plane in [Plane::Key, Plane::Value] {
            let of_plane = match plane {
                Plane::Key => place.keys,
                Plane::Value => place.values,
            };
            for head in 0..config.kv_heads as u64 {
                for token in 0..40u32 {
                    let page = place.pages[(token / place.page_tokens) as usize];
                    let at = of_plane.start
                        + u64::from(page) * of_plane.page_stride
                        + u64::from(token % place.page_tokens) * of_plane.token_stride
                        + head * of_plane.head_stride;
                    let at = usize::try_from(at).unwrap();
                    found.extend_from_slice(&whole[at..at + row]);
                }
            }
        }
        assert_eq!(found, payload);

        let inside = pool.placement(&table, 8, tokens, layer).unwrap_err();
        assert!(matches!(inside, DevicePoolError::FirstToken(8)));
        let beyond = pool.placement(&table, 48, tokens, layer).unwrap_err();
        assert!(matches!(
            beyond,
            DevicePoolError::Pages(KvError::Range { .. })
        ));
    }
}

/// Encoded layers, decoded by the GPU into pages: what the CPU decodes. There is no emulation of
/// both in one place.
#[test]
fn encoded_layers_are_decoded_into_pages() {
    let Some(device) = super::gpu() else {
        return;
    };
    let config = fixture("llama3-gqa");
    let mut pool = DevicePool::new(&device, &config, 8, KvDtype::F16).unwrap();
    let table = [5, 0, 7, 3, 1].map(BlockId);
    let layout = cache::layout(&config, KvDtype::F16, 40).unwrap();
    let codec = LayerCodec::new(layout, None).unwrap();
    let raw: Vec<u8> = (0..layout.layer_bytes() / 2)
        .flat_map(|at| {
            let at = u16::try_from(at % 997).unwrap();
            half::f16::from_f32(f32::from(at) / 300.0).to_le_bytes()
        })
        .collect();
    let parts = codec.encode(&raw, [0.9, 0.7]).parts;
    let parts = parts.each_ref().map(Vec::as_slice);
    let mut expected = vec![0; raw.len()];
    codec.decode(&parts, &mut expected).unwrap();
    let mut decoder = kvasir_cuda::CudaDecoder::new(0).unwrap();
    let layers = [0, 1].map(|layer| super::super::EncodedLayer {
        codec: &codec,
        parts: &parts,
        blocks: &table,
        first_token: 16,
        layer,
    });
    pool.decode_layers(&mut decoder, &layers).unwrap();
    for layer in 0..2 {
        let mut found = vec![0; raw.len()];
        pool.read_layer(&table, 16, 40, layer, &mut found).unwrap();
        assert_eq!(found, expected);
    }
}

/// What is not for the pages is said before anything is decoded.
fn layers_of_another_shape_are_refused(device: &Device) {
    let config = fixture("llama3-gqa");
    let mut pool = DevicePool::new(device, &config, 8, KvDtype::F16).unwrap();
    let table = [5, 0, 7].map(BlockId);
    let other = cache::layout(&fixture("mistral"), KvDtype::F16, 16).unwrap();
    let codec = LayerCodec::new(other, None).unwrap();
    assert!(pool.check_encoded(&codec).is_none());
    let same = cache::layout(&config, KvDtype::F16, 16).unwrap();
    let codec = LayerCodec::new(same, None).unwrap();
    assert!(pool.check_encoded(&codec).is_some());
    let placed = Placement {
        first: 3,
        compiled_at: 1,
        tokens: 16,
    };
    // Turning takes the model's rotation, here as on the host.
    let bytes = vec![0; pool.layer_bytes(16)];
    let mut backend = DeviceBackend::new(&mut pool, &same);
    let refused = kvasir_plugin::EngineBackend::write_moved(
        &mut backend,
        &table[..],
        placed,
        kvasir_types::LayerIdx(0),
        &bytes,
    );
    assert_eq!(refused, Err(kvasir_plugin::BackendError::NoRotation));
}

on_both!(
    the_contract_is_kept,
    layers_round_trip,
    copies_are_timed,
    new_pages_are_zeros,
    ranges_that_do_not_fit_are_refused,
    decoders_write_where_layers_land,
    layers_of_another_shape_are_refused,
);

also_late!(
    the_contract_is_kept,
    layers_round_trip,
    new_pages_are_zeros,
    decoders_write_where_layers_land,
);
