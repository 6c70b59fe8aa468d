//! The conformance suite of [`EngineBackend`], run against every implementation.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::collections::HashMap;

use kvasir_engine::ModelConfig;
use kvasir_engine::cache::PoolBackend;
use kvasir_engine::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvPool};
use kvasir_plugin::{BackendError, EngineBackend};
use kvasir_tests::conformance::backend;
use kvasir_types::{KvLayout, LayerIdx};

/// The engine's paged pool, with a page table that is not in order.
#[test]
fn paged_pool() {
    for (name, dtype) in [
        ("llama3-gqa", KvDtype::F32),
        ("llama2-mha", KvDtype::Bf16),
        ("qwen3", KvDtype::F16),
    ] {
        let path = format!(
            "{}/../engine-plugin/engine/fixtures/{name}/config.json",
            env!("CARGO_MANIFEST_DIR")
        );
        let config = ModelConfig::from_json(&std::fs::read(path).unwrap()).unwrap();
        for chunk_tokens in [16, 48] {
            let layout = kvasir_engine::cache::layout(&config, dtype, chunk_tokens).unwrap();
            let blocks = chunk_tokens as usize / BLOCK_TOKENS * backend::CHUNKS;
            let mut pool = KvPool::new(&config, 2 * blocks, dtype);
            let mut pages: Vec<BlockId> = std::iter::from_fn(|| pool.alloc()).collect();
            pages.reverse();
            let others = pages.split_off(blocks);
            backend::run(
                &mut PoolBackend::new(&mut pool, &layout),
                &pages[..],
                &others[..],
            );
        }
    }
}

/// The simplest thing that keeps the contract.
#[derive(Debug)]
struct MapBackend {
    layout: KvLayout,
    layers: HashMap<(u32, usize, u16), Vec<u8>>,
}

/// A sequence by its number.
struct MapPages(u32);

impl MapBackend {
    fn check(&self, chunk: usize, layer: LayerIdx, length: usize) -> Result<(), BackendError> {
        if chunk >= backend::CHUNKS {
            return Err(BackendError::OutsidePages { chunk });
        }
        if layer.0 >= self.layout.layers() {
            return Err(BackendError::NoSuchLayer(layer));
        }
        let expected = self.layout.layer_bytes();
        if length != expected {
            return Err(BackendError::WrongLength {
                expected,
                found: length,
            });
        }
        Ok(())
    }
}

impl EngineBackend for MapBackend {
    type Pages = MapPages;

    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn write_layer(
        &mut self,
        pages: &MapPages,
        chunk: usize,
        layer: LayerIdx,
        payload: &[u8],
    ) -> Result<(), BackendError> {
        self.check(chunk, layer, payload.len())?;
        self.layers
            .insert((pages.0, chunk, layer.0), payload.to_vec());
        Ok(())
    }

    fn read_layer(
        &self,
        pages: &MapPages,
        chunk: usize,
        layer: LayerIdx,
        payload: &mut [u8],
    ) -> Result<(), BackendError> {
        self.check(chunk, layer, payload.len())?;
        match self.layers.get(&(pages.0, chunk, layer.0)) {
            Some(stored) => payload.copy_from_slice(stored),
            None => payload.fill(0),
        }
        Ok(())
    }
}

#[test]
fn map() {
    use kvasir_types::{DType, Planes};
    for planes in [Planes::symmetric(8), Planes::Single { dim: 24 }] {
        let layout = KvLayout::new(3, 2, planes, 16, DType::Bf16).unwrap();
        let mut backend = MapBackend {
            layout,
            layers: HashMap::new(),
        };
        backend::run(&mut backend, &MapPages(0), &MapPages(1));
    }
}
