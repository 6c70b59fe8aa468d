//! Content chunks, stored and gathered through a real daemon.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bed;
mod failures;
mod tenants;

use std::time::Duration;

use kvasir_plugin::blend::GatherOutcome;
use kvasir_plugin::{LoadPolicy, PluginConfig};
use kvasir_types::Level;

use bed::*;

#[test]
fn chunks_land_wherever_they_stand() {
    for level in [Level::RAW, Level::LOSSLESS, Level::L2] {
        let bed = Bed::start();
        let plugin = bed.plugin("", at_level(level));
        let documents = documents();
        bed.compile(&plugin, &documents, 0);
        let of = |number: usize| documents[number].clone();
        let prompt = cut(
            "",
            &[
                text(3),
                of(4),
                of(2),
                document(50, 80),
                of(0),
                text(21),
                of(4),
                of(6),
                of(1),
                text(9),
            ],
        );
        // Both halves of 6, and 4 twice; 50 was never stored.
        let (gather, landed) = gather_and_compare(&bed, &plugin, &prompt);
        assert_eq!(landed, [0, 1, 3, 4, 5, 6, 7], "{level}");
        assert_eq!(gather.present().collect::<Vec<_>>(), landed);
        let levels: Vec<_> = gather.levels().collect();
        let expected: Vec<_> = landed.iter().map(|chunk| (*chunk, level)).collect();
        assert_eq!(levels, expected);
        let keys: Vec<_> = [0, 1, 3, 5, 6, 7]
            .map(|it| prompt.chunks()[it].key())
            .into();
        let found = bed
            .runtime
            .block_on(bed.client.lookup(&keys))
            .unwrap()
            .found;
        let stored: u64 = found.iter().map(|it| it.unwrap().bytes).sum();
        assert!(
            gather.bytes() <= stored,
            "what stands there twice comes once"
        );
        assert!(gather.bytes() * 10 > stored * 9);
    }
}

/// Prompts of any shape.
#[test]
fn what_is_gathered_is_what_is_stored() {
    let mut bed = Bed::start();
    let plugin = bed.plugin("", eager());
    let documents: Vec<_> = (0..30).map(|it| document(it, 20 + it * 37 % 150)).collect();
    bed.compile(&plugin, &documents[..20], 0);
    let mut state = 7u32;
    let mut next = |bound: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % bound
    };
    let mut landed = 0;
    for round in 0..25 {
        // From memory, and from the disk.
        if round == 12 {
            bed.stop();
            bed.start_again();
        }
        let segments: Vec<_> = (0..1 + next(20))
            .map(|_| match next(3) {
                0 => text(u32::try_from(next(40)).unwrap()),
                _ => documents[next(documents.len())].clone(),
            })
            .collect();
        let prompt = cut("", &segments);
        let known = |text: &&[u32]| text[0] / 10_000 < 20;
        let of = |it: usize| &prompt.tokens()[prompt.chunks()[it].range()];
        let expected: Vec<_> = (0..prompt.chunks().len())
            .filter(|it| known(&of(*it)))
            .collect();
        let (_, found) = gather_and_compare(&bed, &plugin, &prompt);
        assert_eq!(found, expected);
        landed += found.len();
    }
    assert!(landed > 50, "{landed}");
}

#[test]
fn a_prompt_without_chunks_asks_nobody() {
    let bed = Bed::start();
    let plugin = bed.plugin("", eager());
    let prompt = cut("", &[text(100), document(1, 31)]);
    let mut gather = plugin.gather(&prompt);
    let outcome = Pages::of(&prompt).with(|backend, blocks| gather.poll(backend, blocks));
    assert_eq!(outcome, GatherOutcome::Done);
    assert_eq!(plugin.fetch_stats().loads, 0);
}

/// What is fetched coarser than stored comes so, and says so.
#[test]
fn chunks_come_at_the_level_that_is_wanted() {
    let bed = Bed::start();
    let writer = bed.plugin("", at_level(Level::L2));
    let documents = documents();
    bed.compile(&writer, &documents, 0);
    let prompt = cut("", &documents);
    let mut bytes = Vec::new();
    for level in [Level::L0, Level::L1, Level::L2] {
        let mut config = at_level(Level::L2);
        config.codec.fetch = Some(level);
        let mut gather = bed.plugin("", config).gather(&prompt);
        Pages::of(&prompt).follow(&mut gather);
        assert_eq!(chunks(&gather).len(), prompt.chunks().len());
        assert!(gather.levels().all(|(_, found)| found == level));
        bytes.push(gather.bytes());
    }
    assert!(
        bytes.is_sorted_by(|finer, coarser| finer < coarser),
        "{bytes:?}"
    );
}

#[test]
fn what_is_faster_computed_is_not_fetched() {
    let bed = Bed::start();
    let config = PluginConfig {
        load: LoadPolicy::WhenFaster,
        ..eager()
    };
    let plugin = bed.plugin("", config);
    let documents = documents();
    bed.compile(&plugin, &documents, 0);
    let prompt = cut("", &documents);
    for (per_token, fetched) in [
        (Duration::from_millis(50), true),
        (Duration::from_nanos(10), false),
    ] {
        for tokens in [64usize, 256, 1024, 512, 128].repeat(20) {
            plugin.observe_prefill(0, tokens, per_token * u32::try_from(tokens).unwrap());
        }
        let mut gather = plugin.gather(&prompt);
        Pages::of(&prompt).follow(&mut gather);
        assert_eq!(
            !chunks(&gather).is_empty(),
            fetched,
            "{per_token:?} a token"
        );
    }
}
