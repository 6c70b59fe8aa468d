//! The conformance suite of [`EngineBackend`], run against every implementation.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use kvasir_engine::cache::{PoolBackend, Turns};
use kvasir_engine::kernels::{self, Isa};
use kvasir_engine::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvPool};
use kvasir_engine::rope::RopeScaling;
use kvasir_engine::{ModelConfig, Replacement, ScratchBits, ScratchFile};
use kvasir_plugin::{BackendError, EngineBackend, Placement};
use kvasir_tests::conformance::backend::{self, Keys};
use kvasir_types::{KvLayout, LayerIdx, Slice, TokenRange};

/// The engine's paged pool, with a page table that is not in order: every element type, and
/// every kind of RoPE.
#[test]
fn paged_pool() {
    let of_fixture = |name: &str| {
        let path = format!(
            "{}/../engine-plugin/engine/fixtures/{name}/config.json",
            env!("CARGO_MANIFEST_DIR")
        );
        ModelConfig::from_json(&std::fs::read(path).unwrap()).unwrap()
    };
    let kinds = ["llama2-mha", "llama-linear", "llama3-gqa", "llama-yarn"];
    let scalings: Vec<_> = kinds.iter().map(|it| of_fixture(it).rope.scaling).collect();
    assert!(matches!(
        scalings.as_slice(),
        [
            RopeScaling::None,
            RopeScaling::Linear { .. },
            RopeScaling::Llama3 { .. },
            RopeScaling::Yarn { .. },
        ]
    ));
    for name in kinds {
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16] {
            for chunk_tokens in [16, 48] {
                run_on_pool(&of_fixture(name), dtype, chunk_tokens);
            }
        }
    }
}

/// Blocks of the conformance suite: of two sequences.
fn blocks(chunk_tokens: u32) -> usize {
    2 * chunk_tokens as usize / BLOCK_TOKENS * backend::CHUNKS
}

/// The same with room in memory for next to nothing, the rest being in a file.
#[test]
fn pool_on_disk() {
    let path = "../engine-plugin/engine/fixtures/llama3-gqa/config.json";
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    let config = ModelConfig::from_json(&std::fs::read(path).unwrap()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for frames in [1, 7] {
        for dtype in [KvDtype::F32, KvDtype::F16] {
            let file = Arc::new(ScratchFile::create(directory.path()).unwrap());
            let (replacement, bits) = (Replacement::Clock, ScratchBits::AsInMemory);
            let pool = KvPool::paged(&config, blocks(48), dtype, frames, replacement, file, bits);
            run_over(pool.unwrap(), &config, 48);
        }
    }
}

fn run_on_pool(config: &ModelConfig, dtype: KvDtype, chunk_tokens: u32) {
    let pool = KvPool::new(config, blocks(chunk_tokens), dtype);
    run_over(pool, config, chunk_tokens);
}

fn run_over(mut pool: KvPool, config: &ModelConfig, chunk_tokens: u32) {
    let layout = kvasir_engine::cache::layout(config, pool.dtype(), chunk_tokens).unwrap();
    let blocks = blocks(chunk_tokens) / 2;
    let mut pages: Vec<BlockId> = std::iter::from_fn(|| pool.alloc()).collect();
    pages.reverse();
    let others = pages.split_off(blocks);
    let frequencies = config.rope.frequencies(config.head_dim);
    let turn = |key: &mut [f32], position: usize| {
        let (mut cos, mut sin) = (vec![0.0; key.len() / 2], vec![0.0; key.len() / 2]);
        frequencies.angles(position, &mut cos, &mut sin);
        kernels::rotate(Isa::detect(), key, &cos, &sin);
    };
    let mut turns = Turns::new(config);
    backend::run(
        &mut PoolBackend::new(&mut pool, &layout).with_turns(&mut turns),
        &pages[..],
        &others[..],
        &Keys { turn: &turn },
    );
}

/// Pages whose backend was not told how keys turn take what needs no turning, and no more.
#[test]
fn keys_are_not_left_as_they_were() {
    let path = "../engine-plugin/engine/fixtures/llama2-mha/config.json";
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    let config = ModelConfig::from_json(&std::fs::read(path).unwrap()).unwrap();
    let layout = kvasir_engine::cache::layout(&config, KvDtype::F32, 16).unwrap();
    let mut pool = KvPool::new(&config, 2, KvDtype::F32);
    let pages: Vec<BlockId> = std::iter::from_fn(|| pool.alloc()).collect();
    let mut backend = PoolBackend::new(&mut pool, &layout);
    let payload = vec![1; layout.layer_bytes()];
    let mut put = |first| {
        let at = Placement {
            first,
            compiled_at: 1,
            tokens: 16,
        };
        backend.write_moved(&pages[..], at, LayerIdx(0), &payload)
    };
    assert_eq!(put(1), Ok(()));
    assert_eq!(put(2), Err(BackendError::NoRotation));
}

/// The simplest thing that keeps the contract: of a model without RoPE, whose keys are the
/// same everywhere.
#[derive(Debug)]
struct MapBackend {
    layout: KvLayout,
    /// By sequence and layer: all tokens.
    layers: HashMap<(u32, u16), Vec<u8>>,
}

/// A sequence by its number.
struct MapPages(u32);

impl MapBackend {
    fn whole(&self) -> KvLayout {
        let chunks = u32::try_from(backend::CHUNKS).unwrap();
        self.layout
            .with_tokens(chunks * self.layout.tokens())
            .unwrap()
    }

    /// Where some tokens of a layer lie.
    fn runs(
        &self,
        tokens: Range<usize>,
        layer: LayerIdx,
        length: usize,
        outside: BackendError,
    ) -> Result<Vec<Range<usize>>, BackendError> {
        if tokens.end > self.whole().tokens() as usize {
            return Err(outside);
        }
        if layer.0 >= self.layout.layers() {
            return Err(BackendError::NoSuchLayer(layer));
        }
        let narrow = |at: usize| u32::try_from(at).unwrap();
        let tokens = TokenRange::new(narrow(tokens.start), narrow(tokens.end)).unwrap();
        let slice = Slice {
            heads: None,
            tokens: Some(tokens),
        };
        let expected = self.layout.with_tokens(tokens.len()).unwrap().layer_bytes();
        if length != expected {
            return Err(BackendError::WrongLength {
                expected,
                found: length,
            });
        }
        Ok(self.whole().cut(slice).collect())
    }

    fn of_chunk(&self, chunk: usize) -> (Range<usize>, BackendError) {
        let tokens = self.layout.tokens() as usize;
        let start = chunk.saturating_mul(tokens);
        let outside = BackendError::OutsidePages { chunk };
        (start..start.saturating_add(tokens), outside)
    }

    fn write(
        &mut self,
        pages: &MapPages,
        layer: LayerIdx,
        runs: Vec<Range<usize>>,
        payload: &[u8],
    ) {
        let bytes = self.whole().layer_bytes();
        let all = self.layers.entry((pages.0, layer.0));
        let all = all.or_insert_with(|| vec![0; bytes]);
        let mut rest = payload;
        for run in runs {
            let (now, later) = rest.split_at(run.len());
            all[run].copy_from_slice(now);
            rest = later;
        }
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
        let (tokens, outside) = self.of_chunk(chunk);
        let runs = self.runs(tokens, layer, payload.len(), outside)?;
        self.write(pages, layer, runs, payload);
        Ok(())
    }

    fn write_moved(
        &mut self,
        pages: &MapPages,
        at: Placement,
        layer: LayerIdx,
        payload: &[u8],
    ) -> Result<(), BackendError> {
        let Range { start: first, end } = at.range();
        let outside = BackendError::PlacedOutsidePages { first, end };
        let runs = self.runs(at.range(), layer, payload.len(), outside)?;
        self.write(pages, layer, runs, payload);
        Ok(())
    }

    fn read_layer(
        &self,
        pages: &MapPages,
        chunk: usize,
        layer: LayerIdx,
        payload: &mut [u8],
    ) -> Result<(), BackendError> {
        let (tokens, outside) = self.of_chunk(chunk);
        let runs = self.runs(tokens, layer, payload.len(), outside)?;
        payload.fill(0);
        if let Some(all) = self.layers.get(&(pages.0, layer.0)) {
            let bytes: Vec<u8> = runs.into_iter().flat_map(|run| all[run].to_vec()).collect();
            payload.copy_from_slice(&bytes);
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
        let keys = Keys { turn: &|_, _| {} };
        backend::run(&mut backend, &MapPages(0), &MapPages(1), &keys);
    }
}
