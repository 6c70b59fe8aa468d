//! Sequences whose KV is mostly on disk.

use std::sync::Arc;
use std::time::Duration;

use kvasir_engine::paging::{Options, Rule};
use kvasir_engine::request::{FinishReason, RequestError};
use kvasir_engine::scheduler::{
    Engine, EngineConfig, PageSelection, PagingConfig, PagingStats, StartError,
};
use kvasir_engine::{Backing, Model, ScratchBits, ScratchFile};

use super::*;

/// Positions that the fixtures' models know.
pub(super) const LONGEST: usize = 256;

/// A file that is gone with the engine.
pub(super) fn file() -> Arc<dyn Backing> {
    let directory = tempfile::tempdir().unwrap();
    Arc::new(ScratchFile::create(directory.path()).unwrap())
}

/// Memory for so many tokens of one layer.
pub(super) fn frames(model: &Model, tokens: usize) -> usize {
    tokens.div_ceil(16) * model.config().kv_heads
}

/// Pages for ten sequences, frames as given, and short turns.
pub(super) fn paging(frames: usize, backing: Arc<dyn Backing>) -> EngineConfig {
    EngineConfig {
        paging: Some(PagingConfig {
            turn_batches: 8.try_into().unwrap(),
            ..PagingConfig::new(frames, backing)
        }),
        ..config(10 * LONGEST)
    }
}

pub(super) fn start(model: &Arc<Model>, config: &EngineConfig) -> Engine {
    Engine::start(Arc::clone(model), config, None).unwrap()
}

/// Prompts of different lengths, for sequences of 200 tokens.
pub(super) fn prompts(model: &Model, count: usize) -> Vec<Vec<u32>> {
    let vocabulary = u32::try_from(model.config().vocab_size).unwrap();
    let prompt = |seed: usize| {
        let length = u32::try_from(120 + 10 * (seed % 5)).unwrap();
        let seed = u32::try_from(seed).unwrap();
        let token = |at| (at * at + 7 * at + 3 + seed * (at + 1)) % vocabulary;
        (0..length).map(token).collect()
    };
    (0..count).map(prompt).collect()
}

/// Tokens, and digests of the logits that they were chosen from.
pub(super) type Answer = (Vec<u32>, Vec<[u8; 32]>);

/// Sequences of 200 tokens, all at once.
pub(super) fn run(engine: &Engine, prompts: &[Vec<u32>]) -> Vec<Answer> {
    let handle = engine.handle();
    let all: Vec<_> = prompts
        .iter()
        .map(|prompt| submit(&handle, prompt, 200 - prompt.len()))
        .collect();
    let answers = all.into_iter().map(finish);
    answers
        .map(|(tokens, digests, ..)| (tokens, digests))
        .collect()
}

pub(super) fn stats(engine: &Engine) -> PagingStats {
    // A batch is counted when its events are out, and before those of the next one.
    let handle = engine.handle();
    finish(submit(&handle, &[3], 1));
    handle.paging().unwrap()
}

pub(super) fn whole(model: &Arc<Model>, prompts: &[Vec<u32>]) -> Vec<Answer> {
    run(&start(model, &config(10 * LONGEST)), prompts)
}

fn select(config: EngineConfig, share: f32, digest_bytes: usize) -> EngineConfig {
    let paging = config.paging.clone().unwrap();
    let selection = PageSelection {
        options: Options {
            share,
            ..Options::default()
        },
        from_tokens: 64,
        reads_ahead: true,
        digest_bytes,
    };
    EngineConfig {
        paging: Some(PagingConfig {
            selection: Some(selection),
            ..paging
        }),
        ..config
    }
}

const AMPLE: usize = 1 << 24;

/// Memory for a layer of one sequence, of two, for all of one, and for all of two and a bit:
/// parked and resumed, sequences give the tokens and logits of those that are all in memory.
#[test]
fn parked_sequences_are_as_those_in_memory() {
    for name in ["llama3-gqa", "qwen3", "mistral-window"] {
        let model = fixture(name).model;
        let layers = model.config().layers;
        let prompts = prompts(&model, 6);
        let expected = whole(&model, &prompts);
        for tokens in [208, 2 * 208, layers * 208, layers * 500] {
            let engine = start(&model, &paging(frames(&model, tokens), file()));
            assert!(run(&engine, &prompts) == expected, "{name}: {tokens}");
            let stats = stats(&engine);
            // Little is read of sequences that attend to a window: all fit together sooner.
            let has_windows = model.config().windows[0].is_some();
            assert!(
                stats.parks > 0 || has_windows,
                "{name}: {tokens}: {stats:?}"
            );
            assert!(stats.resumes <= stats.parks, "{stats:?}");
            assert!(stats.resumes > 0 || has_windows, "{stats:?}");
            assert!(stats.pager.read_bytes > 0, "{name}: {tokens}: {stats:?}");
            assert_eq!(stats.restarts, 0, "{name}: {tokens}");
        }
        let engine = start(&model, &paging(frames(&model, 6 * layers * 208), file()));
        assert!(run(&engine, &prompts) == expected, "{name}");
        let stats = stats(&engine);
        assert_eq!((stats.parks, stats.pager.read_bytes), (0, 0), "{name}");
    }
}

/// Tokens and their log probabilities, of sequences of 200 tokens, all at once.
fn choices(engine: &Engine, prompts: &[Vec<u32>]) -> Vec<Vec<(u32, f32)>> {
    let handle = engine.handle();
    let all: Vec<_> = prompts
        .iter()
        .map(|prompt| submit(&handle, prompt, 200 - prompt.len()))
        .collect();
    all.into_iter()
        .map(|mut events| {
            std::iter::from_fn(|| events.blocking_recv())
                .filter_map(|event| match event {
                    Event::Token { id, logprob, .. } => Some((id, logprob)),
                    Event::Failed(error) => panic!("{error}"),
                    _ => None,
                })
                .collect()
        })
        .collect()
}

/// With 8 bits an element on disk, sequences are parked and resumed as ever, move fewer bytes, and
/// choose the tokens that they would have chosen, up to one that is next to a tie.
#[test]
fn parked_sequences_in_8_bits_answer_alike() {
    for name in ["llama3-gqa", "qwen3", "mistral-window"] {
        let model = fixture(name).model;
        let prompts = prompts(&model, 6);
        let mut moved = Vec::new();
        let [exact, close] = [ScratchBits::AsInMemory, ScratchBits::Eight].map(|bits| {
            let mut config = paging(frames(&model, 2 * 208), file());
            if let Some(paging) = &mut config.paging {
                paging.bits = bits;
            }
            let engine = start(&model, &config);
            let answers = choices(&engine, &prompts);
            let stats = stats(&engine);
            assert!(stats.parks > 0 && stats.resumes > 0, "{name}: {stats:?}");
            assert_eq!(stats.restarts, 0, "{name}");
            moved.push((stats.pager.read_bytes, stats.parked_bytes));
            answers
        });
        let (mut same, mut all) = (0, 0);
        for (exact, close) in exact.iter().zip(&close) {
            assert_eq!(exact.len(), close.len());
            all += exact.len();
            for ((token, likely), (other, as_likely)) in exact.iter().zip(close) {
                let off = (likely - as_likely).abs();
                assert!(off < 0.05, "{name}: {off}");
                if token != other {
                    break;
                }
                same += 1;
            }
        }
        assert!(2 * same > all, "{name}: {same} of {all}");
        assert!(2 * moved[1].0 < moved[0].0, "{name}: {moved:?}");
        assert!(2 * moved[1].1 < moved[0].1, "{name}: {moved:?}");
    }
}

/// Turns last as long as they should: sequences that do not fit together are parked every so
/// many tokens, neither at each token nor only when others have ended.
#[test]
fn sequences_take_turns() {
    let model = fixture("llama3-gqa").model;
    let layers = model.config().layers;
    let prompts = prompts(&model, 4);
    // All of one fits.
    let engine = start(&model, &paging(frames(&model, layers * 208), file()));
    run(&engine, &prompts);
    let batches: usize = prompts.iter().map(|prompt| 200 - prompt.len()).sum();
    let parks = usize::try_from(stats(&engine).parks).unwrap();
    let turns = batches / 8;
    assert!(
        (turns / 2..=turns + 4).contains(&parks),
        "{parks} of {turns}"
    );
}

/// A disk on which every operation takes its time.
#[derive(Debug)]
struct Slow(ScratchFile);

impl Backing for Slow {
    fn prepare(&self, bytes: u64) -> std::io::Result<()> {
        self.0.prepare(bytes)
    }

    fn read_at(&self, into: &mut [std::io::IoSliceMut<'_>], offset: u64) -> std::io::Result<usize> {
        std::thread::sleep(Duration::from_millis(2));
        self.0.read_at(into, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> std::io::Result<usize> {
        std::thread::sleep(Duration::from_millis(2));
        self.0.write_at(bytes, offset)
    }
}

/// Who comes last gets its first token while those before it still decode, and they go on
/// after it: nobody starves, be the disk as slow as it likes.
#[test]
fn prefill_has_its_turn() {
    let model = fixture("llama3-gqa").model;
    let directory = tempfile::tempdir().unwrap();
    let slow = Arc::new(Slow(ScratchFile::create(directory.path()).unwrap()));
    let prompts = prompts(&model, 4);
    let expected = whole(&model, &prompts);
    let engine = start(&model, &paging(frames(&model, 208), slow));
    let handle = engine.handle();
    let mut all: Vec<_> = prompts
        .iter()
        .map(|prompt| submit(&handle, prompt, 200 - prompt.len()))
        .collect();
    let mut last = all.pop().unwrap();
    let mut found = vec![Vec::new(); 3];
    let mut first = Vec::new();
    loop {
        match last.blocking_recv().unwrap() {
            Event::Token { id, .. } => break first.push(id),
            Event::Prefilled { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    for (events, found) in all.iter_mut().zip(&mut found) {
        while let Ok(event) = events.try_recv() {
            match event {
                Event::Token { id, .. } => found.push(id),
                Event::Prefilled { .. } => {}
                other => panic!("before the last one began: {other:?}"),
            }
        }
        assert!(!found.is_empty());
    }
    for ((events, mut tokens), expected) in all.into_iter().zip(found).zip(&expected) {
        tokens.extend(finish(events).0);
        assert_eq!(tokens, expected.0);
    }
    first.extend(finish(last).0);
    assert_eq!(first, expected[3].0);
}

/// Sequences that are cancelled while they are parked give back what they hold.
#[test]
fn cancelled_sequences_give_back_their_pages() {
    let model = fixture("llama3-gqa").model;
    let prompts = prompts(&model, 3);
    let expected = whole(&model, &prompts);
    let config = EngineConfig {
        blocks: 3 * 13,
        ..paging(frames(&model, 208), file())
    };
    let engine = start(&model, &config);
    let handle = engine.handle();
    for round in 0..4 {
        let mut all: Vec<_> = prompts
            .iter()
            .map(|prompt| submit(&handle, prompt, 200 - prompt.len()))
            .collect();
        // The others are parked, in the middle of their answers.
        let kept = all.remove(round % 3);
        for events in &mut all {
            assert!(matches!(
                events.blocking_recv(),
                Some(Event::Prefilled { .. })
            ));
        }
        drop(all);
        assert_eq!(finish(kept).0, expected[round % 3].0);
    }
    assert!(stats(&engine).parks > 0);
}

/// While a layer computes, the next one is read.
#[test]
fn layers_are_read_ahead() {
    let model = fixture("llama3-gqa").model;
    let prompts = prompts(&model, 1);
    let expected = whole(&model, &prompts);
    let engine = start(&model, &paging(frames(&model, 300), file()));
    assert!(run(&engine, &prompts) == expected);
    let pager = stats(&engine).pager;
    let used = pager.hits_ahead + pager.late;
    assert!(used > 0 && 2 * used > pager.ahead, "{pager:?}");
}

/// A share of everything gives the bits of no selection at all, with memory for a layer.
#[test]
fn choosing_everything_changes_nothing() {
    for name in ["llama3-gqa", "qwen3", "mistral-window"] {
        let model = fixture(name).model;
        let prompts = prompts(&model, 4);
        let expected = whole(&model, &prompts);
        for tokens in [208, 500] {
            let config = paging(frames(&model, tokens), file());
            let engine = start(&model, &select(config, 1.0, AMPLE));
            assert!(run(&engine, &prompts) == expected, "{name}: {tokens}");
            assert_eq!(stats(&engine).undigested, 0);
        }
    }
}

/// Which pages are chosen depends on the sequence alone, not on what is in memory or who runs
/// beside it; fewer are read.
#[test]
fn choosing_reads_less() {
    let model = fixture("llama3-gqa").model;
    let prompts = prompts(&model, 4);
    let with = |tokens: usize, share: f32| {
        let config = paging(frames(&model, tokens), file());
        let engine = start(&model, &select(config, share, AMPLE));
        let answers: Vec<_> = prompts
            .iter()
            .map(|prompt| run(&engine, std::slice::from_ref(prompt)).remove(0))
            .collect();
        let together = run(&engine, &prompts);
        assert!(answers == together, "{tokens}, {share}");
        (answers, stats(&engine).pager)
    };
    let (all, every) = with(208, 1.0);
    let (some, few) = with(208, 0.25);
    assert!(some == with(4000, 0.25).0);
    assert!(some != all, "a quarter of the pages is not all");
    assert!(2 * few.read_bytes < every.read_bytes, "{few:?} {every:?}");
}

/// While a layer of decoding computes, what the token before chose in the next is read.
#[test]
fn choices_are_predicted() {
    let model = fixture("llama3-gqa").model;
    let prompt = prompts(&model, 1).remove(0);
    let config = paging(frames(&model, 208), file());
    let engine = start(&model, &select(config, 0.75, AMPLE));
    let handle = engine.handle();
    let mut events = submit(&handle, &prompt, 200 - prompt.len());
    // What prefill has read ahead is counted by then.
    let mut tokens = 0;
    while tokens < 10 {
        tokens += usize::from(matches!(events.blocking_recv(), Some(Event::Token { .. })));
    }
    let before = handle.paging().unwrap().pager;
    finish(events);
    let pager = stats(&engine).pager.since(&before);
    assert!(pager.hits_ahead + pager.late > 0, "{pager:?}");
}

/// Digests take the memory that they may, at any moment; who finds no room attends to all.
#[test]
fn digests_are_bounded() {
    let model = fixture("llama3-gqa").model;
    let prompts = prompts(&model, 4);
    let expected = whole(&model, &prompts);
    let config = paging(frames(&model, 208), file());
    let engine = start(&model, &select(config.clone(), 0.25, 0));
    assert!(run(&engine, &prompts) == expected);
    assert_eq!(stats(&engine).undigested, 4);

    let limit = 8192;
    let engine = start(&model, &select(config, 0.25, limit));
    let handle = engine.handle();
    let all: Vec<_> = prompts
        .iter()
        .map(|prompt| submit(&handle, prompt, 200 - prompt.len()))
        .collect();
    let mut most = 0;
    for mut events in all {
        while events.blocking_recv().is_some() {
            most = most.max(handle.paging().unwrap().digest_bytes);
        }
    }
    assert!(0 < most && most <= limit, "{most}");
    let stats = stats(&engine);
    assert!((1..4).contains(&stats.undigested), "{stats:?}");
    assert_eq!(stats.digest_bytes, 0);
}

/// What can never fit is refused when it comes, or when the engine starts; what its prompt
/// leaves is generated.
#[test]
fn what_never_fits_is_refused() {
    let model = fixture("llama3-gqa").model;
    let engine = start(&model, &paging(frames(&model, 160), file()));
    let handle = engine.handle();
    assert_eq!(handle.limits().sequence_tokens, 160);
    let refused = handle.submit(request(&[3; 160], 4)).unwrap_err();
    let (needed, limit) = (161, 160);
    assert_eq!(refused, RequestError::TooLong { needed, limit });
    let (tokens, _, reason, _) = finish(submit(&handle, &[3; 150], 100));
    assert_eq!((tokens.len(), reason), (10, FinishReason::Length));

    let config = EngineConfig {
        context_tokens: Some(LONGEST),
        ..paging(frames(&model, 160), file())
    };
    let refused = Engine::start(Arc::clone(&model), &config, None).unwrap_err();
    let heads = model.config().kv_heads;
    assert!(
        matches!(refused, StartError::Frames { tokens: LONGEST, needed, frames }
            if (needed, frames) == (16 * heads, 10 * heads)),
        "{refused:?}"
    );
    let config = EngineConfig {
        context_tokens: Some(100),
        ..config
    };
    let engine = start(&model, &config);
    assert_eq!(engine.handle().limits().sequence_tokens, 100);

    let mut config = select(paging(frames(&model, 160), file()), 0.5, AMPLE);
    if let Some(PagingConfig {
        selection: Some(selection),
        ..
    }) = &mut config.paging
    {
        selection.options.rule = Rule::Oracle;
    }
    let refused = Engine::start(Arc::clone(&model), &config, None).unwrap_err();
    assert!(matches!(refused, StartError::Selection), "{refused:?}");
}
