//! The cache of engines whose memory does not hold their sequences.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use kvasir_client::Client;
use kvasir_engine::model::Model;
use kvasir_engine::scheduler::{EngineConfig, PagingConfig};
use kvasir_engine::{BLOCK_TOKENS, ScratchBits, ScratchFile};
use kvasir_plugin::{LoadPolicy, PluginConfig};
use kvasir_tests::harness::{self, CHUNK_TOKENS, Rig, Use, model_dir, start_daemon};

const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");

/// Loads whatever is there, on however busy a test machine.
fn patient() -> PluginConfig {
    PluginConfig {
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(5),
        ..PluginConfig::default()
    }
}

/// Memory for a layer of one sequence, and turns of two batches: what sequences store that are
/// parked again and again is what they would have computed in memory, and what they fetch is
/// what they go on from.
#[tokio::test(flavor = "multi_thread")]
async fn parked_sequences_store_and_fetch_the_same() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let client = Client::connect(daemon.address()).await.unwrap();
    let whole = Rig::reader(daemon.address(), patient());
    let lengths = [640, 703, 900, 1000];
    let prompts: Vec<_> = lengths
        .iter()
        .enumerate()
        .map(|(seed, &tokens)| harness::prompt(tokens, 6 * seed))
        .collect();
    let ask = |rig, cache| {
        let rig: &Rig = rig;
        join_all(prompts.iter().map(move |prompt| rig.ask(prompt, cache)))
    };
    let expected = ask(&whole, Use::Nothing).await;

    let model = Model::load(&model_dir()).unwrap();
    let namespace = harness::namespace(&model, &harness::tokenizer());
    let frames = 1008 / BLOCK_TOKENS * model.config().kv_heads;
    let file = Arc::new(ScratchFile::create(data.path()).unwrap());
    let config = EngineConfig {
        batch_tokens: 200,
        paging: Some(PagingConfig {
            turn_batches: NonZeroUsize::new(2).unwrap(),
            ..PagingConfig::new(frames, file)
        }),
        ..EngineConfig::for_tokens(8000)
    };
    let endpoint = daemon.address();
    let paged = Rig::start_with(Arc::new(model), namespace, config, endpoint, patient());
    let equal = |answers: Vec<harness::Answer>, cached: bool| {
        for ((answer, expected), tokens) in answers.iter().zip(&expected).zip(lengths) {
            answer.assert_equals(expected);
            let whole = tokens / CHUNK_TOKENS as usize * CHUNK_TOKENS as usize;
            let expected = if cached { whole.min(tokens - 1) } else { 0 };
            assert_eq!(answer.usage.cached_tokens, expected, "{tokens}");
        }
    };
    equal(ask(&paged, Use::Write).await, false);
    for prompt in &prompts {
        paged.stored(&client, prompt).await;
    }
    let written = paged.engine.paging().unwrap();
    assert!(written.parks >= 4, "{written:?}");
    equal(ask(&whole, Use::Read).await, true);
    equal(ask(&paged, Use::Read).await, true);
    // One by one, behind its fetch.
    for (prompt, expected) in prompts.iter().zip(&expected) {
        paged.ask(prompt, Use::Read).await.assert_equals(expected);
    }
    let stats = paged.engine.paging().unwrap();
    assert!(stats.parks > written.parks, "{stats:?}");
    assert_eq!(stats.restarts, 0);
}

/// What was computed over pages that came back from 8 bits is not stored; what never left memory is.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_rounded_is_not_stored() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let client = Client::connect(daemon.address()).await.unwrap();
    let whole = Rig::reader(daemon.address(), patient());
    let [one, two, alone] = [(900, 0), (1000, 6), (640, 12)].map(|it| harness::prompt(it.0, it.1));
    let ask = |rig, cache| {
        let rig: &Rig = rig;
        join_all([&one, &two].map(|prompt| rig.ask(prompt, cache)))
    };
    let expected = ask(&whole, Use::Nothing).await;

    let model = Model::load(&model_dir()).unwrap();
    let namespace = harness::namespace(&model, &harness::tokenizer());
    let layers = model.config().layers;
    // Two sequences do not fit, one does.
    let frames = 1200 / BLOCK_TOKENS * model.config().kv_heads * layers;
    let file = Arc::new(ScratchFile::create(data.path()).unwrap());
    let config = EngineConfig {
        batch_tokens: 200,
        paging: Some(PagingConfig {
            turn_batches: NonZeroUsize::new(2).unwrap(),
            bits: ScratchBits::Eight,
            ..PagingConfig::new(frames, file)
        }),
        ..EngineConfig::for_tokens(8000)
    };
    let endpoint = daemon.address();
    let paged = Rig::start_with(Arc::new(model), namespace, config, endpoint, patient());
    ask(&paged, Use::Write).await;
    let stats = paged.engine.paging().unwrap();
    assert!(stats.pager.read_bytes > 0 && stats.resumes > 0, "{stats:?}");
    let exact = whole.ask(&alone, Use::Nothing).await;
    paged.ask(&alone, Use::Write).await;
    paged.stored(&client, &alone).await;
    whole.ask(&alone, Use::Read).await.assert_equals(&exact);
    // Whatever was stored before is exact.
    for (answer, expected) in ask(&whole, Use::Read).await.iter().zip(&expected) {
        answer.assert_equals(expected);
    }
}
