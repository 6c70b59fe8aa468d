//! Chunks of a prompt in another order: engine, plugin, client, daemon, and back into
//! attention, over real processes and sockets.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvasir_engine::Model;
use kvasir_engine::blend::check::{self, CheckError, Context};
use kvasir_engine::scheduler::{BlendConfig, EngineConfig};
use kvasir_plugin::PluginConfig;
use kvasir_plugin::blend::{ContentCuts, Gate, Quality};
use kvasir_tests::harness::{self, Rig, Use, model_dir};

mod bed;
mod paged;

use bed::*;

#[tokio::test(flavor = "multi_thread")]
async fn chunks_that_were_computed_once_are_reused_in_another_order() {
    let bed = Bed::start().await;
    let rig = bed.engine(Some(proven()), None);
    let first = order(&PREFIX, &[0, 1, 2, 3], 0);
    let answer = first.ask(&rig, Use::Both).await;
    assert_eq!(answer.usage.blended_tokens, 0, "the cache is empty");
    bed.compiled(&rig, &first).await;

    let second = order(&PREFIX, &[3, 1, 0, 2], 1);
    let full = second.ask(&rig, Use::Nothing).await;
    let blended = second.ask(&rig, Use::Read).await;
    assert_eq!(
        blended.usage.cached_tokens, 0,
        "nothing of its front was seen"
    );
    assert_eq!(blended.usage.blended_tokens, second.chunk_tokens());
    let recomputed = blended.usage.recomputed;
    assert!(recomputed > 0.0 && recomputed <= BUDGET, "{recomputed}");
    assert!(blended.usage.fetched_bytes > 0);
    // An approximation, and no more: it must differ somewhere, or nothing was reused.
    assert_ne!(blended.logits, full.logits);

    // What was computed over moved chunks is not stored as a prefix.
    let before = second.ask(&rig, Use::Both).await;
    assert_eq!(before.usage.blended_tokens, second.chunk_tokens());
    tokio::time::sleep(Duration::from_millis(200)).await;
    let again = second.ask(&rig, Use::Read).await;
    assert_eq!(again.usage.cached_tokens, 0);

    // An engine that compiled nothing finds what was recorded, and repairs as little.
    let other = bed.engine(Some(proven()), None);
    let elsewhere = second.ask(&other, Use::Read).await;
    assert_eq!(elsewhere.usage.blended_tokens, second.chunk_tokens());
    elsewhere.assert_equals(&blended);

    // With some of them unknown, those are computed.
    let third = order(&PREFIX, &[4, 1, 2], 1);
    let mixed = third.ask(&rig, Use::Read).await;
    let known = third.chunk_tokens() - third.chunks[0].len();
    assert_eq!(mixed.usage.blended_tokens, known);
}

/// Most chunks are asked for once.
#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_is_compiled_when_it_was_missed_often_enough() {
    let bed = Bed::start().await;
    let twice = Some(BlendConfig::new(proven()));
    let rig = bed.engine_that(twice, |namespace| namespace, patient());
    let first = order(&PREFIX, &[0, 1], 0);
    let second = order(&PREFIX, &[2, 1], 0);
    first.ask(&rig, Use::Both).await;
    second.ask(&rig, Use::Both).await;
    bed.compiled(&rig, &order(&PREFIX, &[1], 0)).await;
    // Those before it in the queue would be there.
    let third = order(&PREFIX, &[1, 2, 0], 1);
    let answer = third.ask(&rig, Use::Both).await;
    assert_eq!(answer.usage.blended_tokens, third.chunks[0].len());
    bed.compiled(&rig, &third).await;
}

/// A document is found again behind other text, though nobody says where it begins.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_that_name_no_chunks_are_cut_by_their_content() {
    let bed = Bed::start().await;
    let cuts = ContentCuts {
        min: 40,
        mean: 64,
        max: 160,
    };
    let cutting = BlendConfig {
        cuts: Some(cuts),
        compile_after: NonZeroU32::MIN,
        ..BlendConfig::new(proven())
    };
    let rig = bed.engine_that(Some(cutting), |namespace| namespace, patient());
    let document = harness::prompt(900, 5);
    let prompt = |before: &[u32]| Order {
        tokens: [&PREFIX[..], before, &document, &harness::prompt(20, 75)].concat(),
        chunks: Vec::new(),
    };
    let first = prompt(&[]);
    first.ask(&rig, Use::Both).await;
    // All but the last, which is what is asked.
    let pieces = |prompt: &Order| {
        let mut pieces = cuts.segments(&prompt.tokens[PREFIX.len()..]);
        pieces.pop();
        pieces
    };
    let mut cut = Order {
        tokens: PREFIX.to_vec(),
        chunks: Vec::new(),
    };
    for piece in pieces(&first) {
        let start = cut.tokens.len();
        cut.tokens.extend(piece.tokens());
        cut.chunks.push(start..cut.tokens.len());
    }
    bed.compiled(&rig, &cut).await;

    let second = prompt(&harness::prompt(37, 33));
    let answer = second.ask(&rig, Use::Read).await;
    assert_eq!(answer.usage.cached_tokens, 0);
    let known = pieces(&first);
    let found = pieces(&second).into_iter().filter(|it| known.contains(it));
    let found: usize = found.map(|it| it.tokens().len()).sum();
    assert!(found > document.len() / 2, "{found}");
    assert_eq!(answer.usage.blended_tokens, found);

    // Chunks that a prompt names are all that it has.
    let named = Order {
        chunks: std::iter::once(38..138).collect(),
        ..prompt(&harness::prompt(37, 33))
    };
    let answer = named.ask(&rig, Use::Read).await;
    assert_eq!(answer.usage.blended_tokens, 0);
}

/// Over fetched chunks as over computed ones: with every token computed anew, and before and
/// behind a prefix that the cache has.
#[tokio::test(flavor = "multi_thread")]
async fn computing_everything_anew_gives_the_logits_of_full_prefill() {
    let bed = Bed::start().await;
    let rig = bed.engine(Some(unproven()), Some(EVERYTHING));
    let first = order(&PREFIX, &[0, 1, 2], 0);
    first.ask(&rig, Use::Both).await;
    bed.compiled(&rig, &first).await;
    let second = order(&PREFIX, &[2, 0, 1], 1);
    let full = second.ask(&rig, Use::Nothing).await;
    let blended = second.ask(&rig, Use::Read).await;
    blended.assert_equals(&full);
    assert_eq!(blended.usage.blended_tokens, second.chunk_tokens());
    // All but those of the first, which stands where it was compiled.
    let exact = second.chunks[0].len() as f32 / second.chunk_tokens() as f32;
    assert!((blended.usage.recomputed - (1.0 - exact)).abs() < 1e-6);

    // The same order again comes as a prefix, and as the same logits.
    let known = first.ask(&rig, Use::Nothing).await;
    rig.stored(&bed.client, &first.tokens).await;
    let prefix = first.ask(&rig, Use::Read).await;
    assert!(prefix.usage.cached_tokens > 0);
    prefix.assert_equals(&known);

    // Behind text that was seen, chunks in another order: prefix first, then chunks.
    let before: Vec<u32> = first.tokens[..first.chunks[0].end + 40].to_vec();
    let behind = order(&before, &[2, 1], 1);
    let full = behind.ask(&rig, Use::Nothing).await;
    let blended = behind.ask(&rig, Use::Read).await;
    blended.assert_equals(&full);
    assert_eq!(blended.usage.cached_tokens, 64);
    assert_eq!(blended.usage.blended_tokens, behind.chunk_tokens());
}

/// An engine with other probes finds chunks of which nothing says to it what depends on their
/// context: they are computed like text, and do not count as reused.
#[tokio::test(flavor = "multi_thread")]
async fn what_nothing_is_known_of_is_computed() {
    let bed = Bed::start().await;
    let compiling = bed.engine(Some(proven()), None);
    let first = order(&PREFIX, &[0, 1, 2], 0);
    first.ask(&compiling, Use::Both).await;
    bed.compiled(&compiling, &first).await;
    let others = Gate {
        probes: vec![harness::prompt(48, 35)],
        ..proven()
    };
    let rig = bed.engine(Some(others), None);
    let second = order(&PREFIX, &[2, 0, 1], 1);
    let full = second.ask(&rig, Use::Nothing).await;
    let blended = second.ask(&rig, Use::Read).await;
    blended.assert_equals(&full);
    // But for the first, which stands where it was compiled.
    assert_eq!(blended.usage.blended_tokens, second.chunks[0].len());
    assert_eq!(blended.usage.recomputed, 0.0);
}

/// Behind the gather, and when it is done.
#[tokio::test(flavor = "multi_thread")]
async fn more_rows_than_run_behind_a_gather_follow_it() {
    let bed = Bed::start().await;
    let model = Arc::new(Model::load(&model_dir()).unwrap());
    let namespace = harness::namespace(&model, &harness::tokenizer());
    let mut engine = EngineConfig::for_tokens(20_000);
    engine.batch_tokens = 16;
    engine.blend = Some(BlendConfig {
        forced: Some(EVERYTHING),
        compile_after: NonZeroU32::MIN,
        ..BlendConfig::new(unproven())
    });
    let address = bed.daemon.address();
    let rig = Rig::start_with(model, namespace, engine, address, patient());
    let first = order(&PREFIX, &[0, 1, 2, 3], 0);
    first.ask(&rig, Use::Both).await;
    bed.compiled(&rig, &first).await;
    let second = order(&PREFIX, &[3, 1, 0, 2], 1);
    let full = second.ask(&rig, Use::Nothing).await;
    let blended = second.ask(&rig, Use::Read).await;
    blended.assert_equals(&full);
    assert_eq!(blended.usage.blended_tokens, second.chunk_tokens());
}

#[tokio::test(flavor = "multi_thread")]
async fn several_requests_blend_at_once() {
    let bed = Bed::start().await;
    let rig = bed.engine(Some(unproven()), Some(EVERYTHING));
    let first = order(&PREFIX, &[0, 1, 2, 3, 4], 0);
    first.ask(&rig, Use::Both).await;
    bed.compiled(&rig, &first).await;
    let orders = [[4, 3, 2], [1, 0, 4], [3, 0, 1], [2, 4, 0]];
    let prompts: Vec<Order> = orders.iter().map(|it| order(&PREFIX, it, 2)).collect();
    let mut full = Vec::new();
    for prompt in &prompts {
        full.push(prompt.ask(&rig, Use::Nothing).await);
    }
    let all = prompts.iter().map(|prompt| prompt.ask(&rig, Use::Read));
    for (index, blended) in futures::future::join_all(all).await.iter().enumerate() {
        blended.assert_equals(&full[index]);
        assert_eq!(blended.usage.blended_tokens, prompts[index].chunk_tokens());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_was_not_checked_is_not_blended() {
    let bed = Bed::start().await;
    let compiling = bed.engine(Some(proven()), None);
    let first = order(&PREFIX, &[0, 1, 2], 0);
    first.ask(&compiling, Use::Both).await;
    bed.compiled(&compiling, &first).await;
    let second = order(&PREFIX, &[2, 0, 1], 1);
    for gate in [None, Some(unproven())] {
        let rig = bed.engine(gate, None);
        let full = second.ask(&rig, Use::Nothing).await;
        let answer = second.ask(&rig, Use::Read).await;
        answer.assert_equals(&full);
        assert_eq!(answer.usage.blended_tokens, 0);
    }
}

/// A chunk that is first seen behind a text that wants to steer it is stored as it is alone.
#[tokio::test(flavor = "multi_thread")]
async fn what_stood_before_a_chunk_leaves_no_trace_in_it() {
    let poisoned = Bed::start().await;
    let rig = poisoned.engine(Some(proven()), None);
    let evil = [&PREFIX[..], &harness::prompt(90, 28)].concat();
    let behind_evil = order(&evil, &[3, 0, 2], 0);
    behind_evil.ask(&rig, Use::Both).await;
    poisoned.compiled(&rig, &behind_evil).await;

    let clean = Bed::start().await;
    let rig = clean.engine(Some(proven()), None);
    let alone = order(&PREFIX, &[2], 1);
    alone.ask(&rig, Use::Both).await;
    clean.compiled(&rig, &alone).await;
    let wanted = clean.stored(&rig, &alone).await.remove(0);
    let found = poisoned.stored(&rig, &behind_evil).await.remove(2);
    assert!(wanted == found, "other bytes");
}

/// Engines of two tenants at one daemon.
#[tokio::test(flavor = "multi_thread")]
async fn tenants_do_not_reuse_each_others_chunks() {
    let bed = Bed::start().await;
    let theirs = bed.engine(Some(proven()), None);
    let first = order(&PREFIX, &[0, 1, 2], 0);
    first.ask(&theirs, Use::Both).await;
    bed.compiled(&theirs, &first).await;
    let model = Model::load(&model_dir()).unwrap();
    let layout = *theirs.plugin.namespace().layout();
    let digest = harness::tokenizer().digest();
    let ours = bed.engine_of(Some(proven()), None, |_| {
        kvasir_engine::cache::namespace(&model, layout, &digest, b"another")
    });
    let second = order(&PREFIX, &[2, 0, 1], 1);
    let full = second.ask(&ours, Use::Nothing).await;
    let answer = second.ask(&ours, Use::Read).await;
    answer.assert_equals(&full);
    assert_eq!(answer.usage.blended_tokens, 0);

    // Where they are a corpus for all, and with what was recorded of them.
    let plugin = PluginConfig {
        corpus: Some(*theirs.plugin.namespace()),
        ..patient()
    };
    let readers = bed.engine_with(
        Some(proven()),
        None,
        |_| kvasir_engine::cache::namespace(&model, layout, &digest, b"another"),
        plugin,
    );
    let answer = second.ask(&readers, Use::Read).await;
    assert_eq!(answer.usage.blended_tokens, second.chunk_tokens());
    assert!(answer.usage.recomputed > 0.0 && answer.usage.recomputed <= BUDGET);
}

fn contexts(count: usize) -> Vec<Context> {
    let context = |number: usize| Context {
        chunks: (0..3)
            .map(|chunk| harness::prompt(48, 3 * number + chunk))
            .collect(),
        questions: vec![
            (
                harness::prompt(9, 50 + number),
                harness::prompt(2, 60 + number),
            ),
            (
                harness::prompt(5, 20 + number),
                harness::prompt(3, 30 + number),
            ),
        ],
    };
    (0..count).map(context).collect()
}

#[test]
fn a_check_measures_what_reuse_does_and_what_repairs_bring_back() {
    let model = Model::load(&model_dir()).unwrap();
    let mut seen = Vec::new();
    let gate = check::check(&model, &PREFIX, &contexts(4), |done, all| {
        seen.push((done, all));
    })
    .unwrap();
    assert_eq!(seen, [(1, 3), (2, 3), (3, 3)]);
    assert_eq!(gate.questions, 6);
    assert_eq!(gate.prefix, PREFIX);
    assert_eq!(gate.probes, [contexts(1)[0].chunks[0].clone()]);
    assert!(gate.naive_kl > 0.0 && gate.naive_text != 0.0);
    let kl: Vec<f64> = gate.repairs.iter().map(|repair| repair.kl).collect();
    assert!(kl.iter().all(|&kl| kl > 0.0));
    // Three tenths of the rows bring most of it back.
    assert!(
        kl[kl.len() - 1] < gate.naive_kl / 2.0,
        "{kl:?} {}",
        gate.naive_kl
    );
    // So few questions prove nothing.
    assert_eq!(gate.good(Quality::Fair).count(), 0);
}

#[test]
fn a_check_of_nothing_is_refused() {
    let model = Model::load(&model_dir()).unwrap();
    let check = |contexts: &[Context]| check::check(&model, &PREFIX, contexts, |_, _| ());
    assert!(matches!(check(&contexts(1)), Err(CheckError::TooFew(1))));
    assert!(matches!(check(&[]), Err(CheckError::TooFew(0))));
    let mut short = contexts(6);
    short[5].chunks.truncate(1);
    assert!(matches!(check(&short), Err(CheckError::NoChunks(5))));
}

/// The one that comes with the model is about the model, and lets it blend.
#[test]
fn the_shipped_verdict_is_about_the_shipped_model() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/reader-9m");
    let model = Model::load(&directory).unwrap();
    let gate = Gate::load(&directory).unwrap().unwrap();
    let digest: String = model
        .weights_digest()
        .iter()
        .map(|it| format!("{it:02x}"))
        .collect();
    assert_eq!(gate.weights, digest);
    assert!(gate.good(Quality::High).next().is_some());
}

/// The daemon dies while chunks come: the request computes.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_gone_costs_the_chunks_and_no_answer() {
    let bed = Bed::start().await;
    let rig = bed.engine(Some(proven()), None);
    let first = order(&PREFIX, &[0, 1, 2], 0);
    first.ask(&rig, Use::Both).await;
    bed.compiled(&rig, &first).await;
    let second = order(&PREFIX, &[2, 0, 1], 1);
    let full = second.ask(&rig, Use::Nothing).await;
    drop(bed);
    let answer = second.ask(&rig, Use::Both).await;
    answer.assert_equals(&full);
    assert_eq!(answer.usage.blended_tokens, 0);
}
