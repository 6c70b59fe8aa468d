//! A second request that skips its prefill: engine, plugin, client, daemon, tiers, and
//! back into attention, over real processes and sockets.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::time::Duration;

use kvasir_client::Client;
use kvasir_engine::cache::{self, PoolBackend};
use kvasir_engine::kernels::Threads;
use kvasir_engine::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvPool};
use kvasir_engine::model::{LogitsWanted, Model, Positions, Scratch, Step};
use kvasir_plugin::{
    CachePlugin, CaptureOutcome, ChunkCopy, EngineBackend as _, FetchOutcome, LoadPolicy,
    PluginConfig, Prompt,
};
use kvasir_tests::harness::{self, CHUNK_TOKENS, Rig, Use, model_dir, start_daemon};
use kvasir_types::{Hints, LayerIdx};
use std::ops::ControlFlow;

const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");

/// Loads whatever is there, on however busy a test machine.
fn patient() -> PluginConfig {
    PluginConfig {
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(5),
        ..PluginConfig::default()
    }
}

/// Computed, from memory, and from disk after a restart: the same logits, at 1, 2 and 8
/// sequences at a time, with prompts that end inside a chunk, at its border, and one
/// token beside it.
#[tokio::test(flavor = "multi_thread")]
async fn fetched_and_computed_answers_are_the_same() {
    let data = tempfile::tempdir().unwrap();
    let mut daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let rig = Rig::reader(daemon.address(), patient());
    let lengths = [640, 703, 704, 705, 900, 1000, 1023, 1151];
    let prompts: Vec<_> = lengths
        .iter()
        .enumerate()
        .map(|(seed, &tokens)| harness::prompt(tokens, 6 * seed))
        .collect();
    let mut computed = Vec::new();
    let client = Client::connect(daemon.address()).await.unwrap();
    for prompt in &prompts {
        let answer = rig.ask(prompt, Use::Write).await;
        assert_eq!(answer.usage.cached_tokens, 0);
        rig.stored(&client, prompt).await;
        computed.push(answer);
    }
    let endpoint = daemon.address().to_owned();
    for restarted in [false, true] {
        if restarted {
            daemon.stop().unwrap();
            daemon = start_daemon(DAEMON, data.path(), &endpoint);
        }
        for concurrency in [1, 2, 8] {
            for group in (0..prompts.len()).collect::<Vec<_>>().chunks(concurrency) {
                let asked = group
                    .iter()
                    .map(|&index| rig.ask(&prompts[index], Use::Read));
                let answers = futures::future::join_all(asked).await;
                for (&index, answer) in group.iter().zip(answers) {
                    answer.assert_equals(&computed[index]);
                    let whole = lengths[index] / CHUNK_TOKENS as usize * CHUNK_TOKENS as usize;
                    let expected = whole.min(lengths[index] - 1);
                    assert_eq!(answer.usage.cached_tokens, expected, "{}", lengths[index]);
                }
            }
        }
    }
}

/// What lands in the pages is byte for byte what prefill wrote into them, and the logits
/// computed on top are bit for bit those of a run that computed everything.
#[tokio::test(flavor = "multi_thread")]
async fn fetched_pages_are_byte_equal() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let model = Model::load(&model_dir()).unwrap();
    let tokenizer = harness::tokenizer();
    let namespace = harness::namespace(&model, &tokenizer);
    let runtime = tokio::runtime::Handle::current();
    let plugin = CachePlugin::connect(daemon.address(), runtime, namespace, patient()).unwrap();
    let tokens: Vec<u32> = (0..500).map(|i| 7 + i * 13 % 800).collect();
    let prompt = Prompt::new(plugin.namespace(), &tokens);
    let layout = *plugin.namespace().layout();
    assert_eq!(
        cache::layout(model.config(), KvDtype::F32, CHUNK_TOKENS).unwrap(),
        layout
    );

    let blocks = tokens.len().div_ceil(BLOCK_TOKENS);
    let mut scratch = Scratch::new(Threads::new(2).unwrap());
    let mut computed = Pages::new(&model, blocks);
    let computed_logits = computed.run(&model, &mut scratch, &tokens, 0);
    for (chunk, key) in prompt.keys().iter().enumerate() {
        let layers = (0..layout.layers())
            .map(|layer| computed.layer(&layout, chunk, layer).into())
            .collect();
        let copy = ChunkCopy {
            key: *key,
            layout,
            start: chunk as u64 * u64::from(layout.tokens()),
            layers,
            hints: Hints::default(),
        };
        assert_eq!(plugin.capture(copy), CaptureOutcome::Queued);
    }
    while plugin.capture_stats().waiting > 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(plugin.capture_stats().stored, 7);

    let mut prefetch = plugin.prefetch(&prompt);
    let mut fetched = tokio::task::spawn_blocking(move || {
        let mut fetched = Pages::new(&model, blocks);
        let outcome = loop {
            let mut backend = PoolBackend::new(&mut fetched.pool, &layout);
            match prefetch.wait(Duration::from_secs(1), &mut backend, &fetched.blocks) {
                FetchOutcome::Done { chunks } => break chunks,
                _ => continue,
            }
        };
        assert_eq!(outcome, 7);
        let fetched_logits = fetched.run(&model, &mut scratch, &tokens, 7 * 64);
        assert_eq!(fetched_logits, computed_logits, "logits differ");
        fetched
    })
    .await
    .unwrap();
    for chunk in 0..7 {
        for layer in 0..layout.layers() {
            assert_eq!(
                fetched.layer(&layout, chunk, layer),
                computed.layer(&layout, chunk, layer),
                "chunk {chunk}, layer {layer}"
            );
        }
    }
}

/// A pool with one sequence's pages.
struct Pages {
    pool: KvPool,
    blocks: Vec<BlockId>,
}

impl Pages {
    fn new(model: &Model, blocks: usize) -> Self {
        let mut pool = KvPool::new(model.config(), blocks, KvDtype::F32);
        let blocks = std::iter::from_fn(|| pool.alloc()).collect();
        Self { pool, blocks }
    }

    fn run(
        &mut self,
        model: &Model,
        scratch: &mut Scratch,
        tokens: &[u32],
        from: usize,
    ) -> Vec<u32> {
        let step = Step {
            tokens: &tokens[from..],
            positions: Positions::From(from),
            blocks: &self.blocks,
            logits: LogitsWanted::Last,
        };
        let logits = model
            .forward(&mut self.pool, scratch, &[step], &mut |_| {
                ControlFlow::Continue(())
            })
            .unwrap();
        logits
            .last(0)
            .unwrap()
            .iter()
            .map(|value| value.to_bits())
            .collect()
    }

    fn layer(&mut self, layout: &kvasir_types::KvLayout, chunk: usize, layer: u16) -> Vec<u8> {
        let mut payload = vec![0; layout.layer_bytes()];
        PoolBackend::new(&mut self.pool, layout)
            .read_layer(&self.blocks, chunk, LayerIdx(layer), &mut payload)
            .unwrap();
        payload
    }
}
