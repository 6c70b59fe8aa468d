//! Blocks that an engine names itself, in memory that it lays out itself: what `kvasir-python`
//! has of the plugin.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use kvasir_plugin::{
    BackendError, CachePlugin, ChunkCopy, EngineBackend as _, FetchOutcome, LoadPolicy, Memory,
    OutsideMemory, Placement, PluginConfig, Prompt, Strided, Strides,
};
use kvasir_tests::conformance::backend;
use kvasir_tests::harness::start_daemon;
use kvasir_types::{ChunkKey, DType, Hints, KvLayout, LayerIdx, ModelIdentity, Namespace, Planes};

const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");
/// Of two sequences of [`backend::CHUNKS`] each.
const BLOCKS: u32 = 6;
const ROW: usize = 32;

#[derive(Debug)]
struct Layer(Mutex<Vec<u8>>);

impl Memory for Layer {
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn read(&self, at: usize, into: &mut [u8]) -> Result<(), OutsideMemory> {
        let bytes = self.0.lock().unwrap();
        let from = bytes.get(at..at + into.len()).ok_or(OutsideMemory { at })?;
        into.copy_from_slice(from);
        Ok(())
    }

    fn write(&self, at: usize, from: &[u8]) -> Result<(), OutsideMemory> {
        let mut bytes = self.0.lock().unwrap();
        let to = bytes.get_mut(at..at + from.len());
        to.ok_or(OutsideMemory { at })?.copy_from_slice(from);
        Ok(())
    }
}

fn layout() -> KvLayout {
    KvLayout::new(3, 2, Planes::symmetric(16), 16, DType::F16).unwrap()
}

fn namespace() -> Namespace {
    let model = ModelIdentity {
        architecture: "strided".into(),
        weights: "w".into(),
        rope: String::new(),
    };
    Namespace::new(&model, None, layout(), &[0; 32], b"")
}

/// `[block][token][head][K, V]`, as engines have it that put a token's heads together.
fn engine() -> Strided<Layer> {
    let strides = Strides {
        start: 0,
        block: 16 * 2 * 2 * ROW,
        plane: ROW,
        head: 2 * ROW,
        token: 2 * 2 * ROW,
    };
    let bytes = BLOCKS as usize * strides.block;
    let layers = (0..3).map(|_| Layer(Mutex::new(vec![0; bytes]))).collect();
    Strided::new(layout(), strides, BLOCKS, layers).unwrap()
}

#[test]
fn strided_memory_keeps_the_contract() {
    let mut engine = engine();
    backend::run_in_place(&mut engine, &[5, 0, 3], &[1, 4, 2], |engine| {
        let payload = vec![1; layout().layer_bytes()];
        let mut put = |first, compiled_at| {
            let at = Placement {
                first,
                compiled_at,
                tokens: 16,
            };
            engine.write_moved(&[5, 0, 3], at, LayerIdx(0), &payload)
        };
        assert_eq!(put(16, 16), Ok(()));
        assert_eq!(put(16, 0), Err(BackendError::NoRotation));
        assert_eq!(put(8, 8), Err(BackendError::NoRotation));
    });
}

/// What was stored by name is found and comes back, in whatever blocks; a daemon that is gone is
/// left alone, and found again.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_found_by_their_names() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let endpoint = daemon.address().to_owned();
    let config = PluginConfig {
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(5),
        cooldown: Duration::from_millis(200),
        ..PluginConfig::default()
    };
    let runtime = tokio::runtime::Handle::current();
    let plugin = CachePlugin::connect(&endpoint, runtime, namespace(), config).unwrap();
    let keys: Vec<ChunkKey> = (0..3_u8)
        .map(|name| namespace().opaque(&[name; 32]))
        .collect();
    assert_eq!(plugin.find(&keys).await, 0);

    let mut engine = engine();
    let payload = |chunk: u8, layer: u8| vec![16 * chunk + layer; layout().layer_bytes()];
    for chunk in 0..2_u8 {
        let copy = ChunkCopy {
            key: keys[usize::from(chunk)],
            layout: layout(),
            start: 0,
            layers: (0..3)
                .map(|layer| Bytes::from(payload(chunk, layer)))
                .collect(),
            hints: Hints::default(),
        };
        plugin.capture(copy);
    }
    while plugin.capture_stats().waiting > 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(plugin.find(&keys).await, 2);

    let mut load = plugin.prefetch(&Prompt::named(16, keys.clone()));
    let engine = tokio::task::spawn_blocking(move || {
        loop {
            let outcome = load.wait(Duration::from_secs(1), &mut engine, &[4, 0, 2]);
            if let FetchOutcome::Done { chunks } = outcome {
                assert_eq!(chunks, 2);
                return engine;
            }
        }
    });
    let engine = engine.await.unwrap();
    for (chunk, block) in [(0, 4), (1, 0)] {
        for layer in 0..3_u8 {
            let mut read = vec![0; layout().layer_bytes()];
            engine
                .read_layer(&[block], 0, LayerIdx(layer.into()), &mut read)
                .unwrap();
            assert!(read == payload(chunk, layer), "{chunk}, {layer}");
        }
    }

    daemon.stop().unwrap();
    let failed = plugin.fetch_stats().failed;
    assert_eq!(plugin.find(&keys).await, 0);
    assert_eq!(plugin.fetch_stats().failed, failed + 1);
    assert_eq!(plugin.find(&keys).await, 0);
    assert_eq!(plugin.fetch_stats().skipped, 1);
    let _daemon = start_daemon(DAEMON, data.path(), &endpoint);
    let found = async {
        while plugin.find(&keys).await < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(60), found).await;
    found.expect("the daemon is found again");
}
