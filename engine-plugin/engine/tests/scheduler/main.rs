//! The scheduler over real checkpoints: concurrency, limits, cancellation.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::path::Path;
use std::sync::Arc;

use kvasir_engine::Model;
use kvasir_engine::request::{Event, FinishReason, GenerateRequest, RequestError, Usage};
use kvasir_engine::sampling::SamplingParams;
use kvasir_engine::scheduler::{Engine, EngineConfig, EngineHandle};
use safetensors::SafeTensors;
use tokio::sync::mpsc::Receiver;

mod broken;
mod hanging;
mod paged;

const PROMPTS: usize = 6;
const GREEDY: usize = 12;

struct Fixture {
    model: Arc<Model>,
    prompts: Vec<Vec<u32>>,
    greedy: Vec<Vec<u32>>,
}

fn fixture(name: &str) -> Fixture {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(name);
    let bytes = std::fs::read(dir.join("reference.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tokens = |name: String| -> Vec<u32> {
        tensors
            .tensor(&name)
            .unwrap()
            .data()
            .chunks_exact(8)
            .map(|bytes| u32::try_from(i64::from_le_bytes(bytes.try_into().unwrap())).unwrap())
            .collect()
    };
    Fixture {
        model: Arc::new(Model::load(&dir).unwrap()),
        prompts: (0..PROMPTS)
            .map(|i| tokens(format!("prompt.{i}")))
            .collect(),
        greedy: (0..PROMPTS)
            .map(|i| tokens(format!("greedy.{i}")))
            .collect(),
    }
}

fn request(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.to_vec(),
        chunks: Vec::new(),
        max_tokens,
        sampling: SamplingParams::greedy(),
        stop_tokens: Vec::new(),
        read_cache: true,
        write_cache: true,
        logits_digest: true,
    }
}

fn finish(mut events: Receiver<Event>) -> (Vec<u32>, Vec<[u8; 32]>, FinishReason, Usage) {
    let mut tokens = Vec::new();
    let mut digests = Vec::new();
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Prefilled { .. } => {}
            Event::Token {
                id, logits_digest, ..
            } => {
                tokens.push(id);
                digests.push(logits_digest.unwrap());
            }
            Event::Finished { reason, usage } => return (tokens, digests, reason, usage),
            Event::Failed(error) => panic!("{error}"),
        }
    }
    panic!("the sequence never finished");
}

fn config(tokens: usize) -> EngineConfig {
    EngineConfig {
        threads: 2,
        ..EngineConfig::for_tokens(tokens)
    }
}

fn submit(handle: &EngineHandle, prompt: &[u32], max_tokens: usize) -> Receiver<Event> {
    handle.submit(request(prompt, max_tokens)).unwrap()
}

/// Alone or beside others, a prompt gives transformers' tokens, and the very same logits.
#[test]
fn concurrent_sequences_do_not_touch_each_other() {
    for name in ["llama3-gqa", "qwen3", "mistral-window"] {
        let fixture = fixture(name);
        let engine = Engine::start(Arc::clone(&fixture.model), &config(4096), None).unwrap();
        let handle = engine.handle();
        let alone: Vec<_> = fixture
            .prompts
            .iter()
            .map(|prompt| finish(submit(&handle, prompt, GREEDY)))
            .collect();
        let together: Vec<_> = fixture
            .prompts
            .iter()
            .map(|prompt| submit(&handle, prompt, GREEDY))
            .collect();
        for ((events, alone), expected) in together.into_iter().zip(alone).zip(&fixture.greedy) {
            let (tokens, digests, reason, usage) = finish(events);
            assert_eq!(&tokens, expected, "{name}");
            assert_eq!(digests, alone.1, "{name}: logits depend on the batch");
            assert_eq!(reason, FinishReason::Length);
            assert_eq!(usage.completion_tokens, GREEDY);
            assert_eq!(usage.cached_tokens, 0);
        }
    }
}

/// More sequences than fit run one after the other; none is lost.
#[test]
fn sequences_wait_for_free_pages() {
    let fixture = fixture("llama2-mha");
    let prompt = &fixture.prompts[4];
    let engine = Engine::start(Arc::clone(&fixture.model), &config(96), None).unwrap();
    let handle = engine.handle();
    let all: Vec<_> = (0..8).map(|_| submit(&handle, prompt, GREEDY)).collect();
    for events in all {
        assert_eq!(finish(events).0, fixture.greedy[4]);
    }
}

#[test]
fn requests_that_can_never_run_are_refused() {
    let fixture = fixture("llama2-mha");
    let engine = Engine::start(Arc::clone(&fixture.model), &config(64), None).unwrap();
    let handle = engine.handle();
    let refusal = |prompt: &[u32]| handle.submit(request(prompt, 4)).unwrap_err();
    assert_eq!(refusal(&[]), RequestError::EmptyPrompt);
    assert!(matches!(
        refusal(&[u32::MAX]),
        RequestError::UnknownToken { .. }
    ));
    assert!(matches!(
        refusal(&[3; 64]),
        RequestError::TooLong { limit: 64, .. }
    ));
    let (tokens, _, reason, _) = finish(submit(&handle, &[3; 60], 100));
    assert_eq!((tokens.len(), reason), (4, FinishReason::Length));
}

#[test]
fn a_full_queue_refuses_and_cancelling_makes_room() {
    let fixture = fixture("llama2-mha");
    let config = EngineConfig {
        max_waiting: 2,
        ..config(128)
    };
    let engine = Engine::start(Arc::clone(&fixture.model), &config, None).unwrap();
    let handle = engine.handle();
    let mut held = Vec::new();
    let refused = loop {
        match handle.submit(request(&[3; 8], 120)) {
            Ok(events) => held.push(events),
            Err(error) => break error,
        }
        assert!(held.len() < 10_000, "the queue never fills");
    };
    assert!(matches!(refused, RequestError::Overloaded { .. }));
    drop(held);
    let (tokens, ..) = loop {
        match handle.submit(request(&fixture.prompts[2], GREEDY)) {
            Ok(events) => break finish(events),
            Err(RequestError::Overloaded { .. }) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(tokens, fixture.greedy[2]);
}

#[test]
fn stop_tokens_end_a_sequence() {
    let fixture = fixture("llama2-mha");
    let engine = Engine::start(Arc::clone(&fixture.model), &config(1024), None).unwrap();
    let expected = &fixture.greedy[3];
    let stop = expected[5];
    let first = expected.iter().position(|&token| token == stop).unwrap();
    let events = engine
        .handle()
        .submit(GenerateRequest {
            stop_tokens: vec![stop],
            ..request(&fixture.prompts[3], 100)
        })
        .unwrap();
    let (tokens, _, reason, _) = finish(events);
    assert_eq!(tokens, expected[..=first]);
    assert_eq!(reason, FinishReason::Stop);
}
