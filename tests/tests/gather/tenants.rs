//! Whose chunks are found.

use std::time::Duration;

use kvasir_plugin::blend::Segment;
use kvasir_plugin::{CaptureOutcome, ChunkCopy, FetchOutcome, PluginConfig, Prompt};
use kvasir_types::{ChunkKey, Hints};

use crate::bed::*;

#[test]
fn tenants_do_not_reach_each_other() {
    let bed = Bed::start();
    let documents = documents();
    bed.compile(&bed.plugin("one", eager()), &documents, 0);
    let other = bed.plugin("two", eager());
    let prompt = cut("two", &documents);
    let (gather, landed) = gather_and_compare(&bed, &other, &prompt);
    assert!(landed.is_empty());
    assert_eq!(gather.present().count(), 0);
}

#[test]
fn tenants_share_a_corpus_that_neither_writes() {
    let bed = Bed::start();
    let documents = documents();
    let corpus = namespace("corpus");
    let filler = bed.plugin("corpus", eager());
    bed.compile(&filler, &documents[..4], 0);
    let config = PluginConfig {
        corpus: Some(corpus),
        ..eager()
    };
    let keys = |tenant: &str| -> Vec<ChunkKey> {
        cut(tenant, &documents)
            .chunks()
            .iter()
            .map(|chunk| chunk.key())
            .collect()
    };
    for tenant in ["one", "two"] {
        let plugin = bed.plugin(tenant, config.clone());
        // Its own copy of the third, and one of the fifth.
        let own = [documents[2].clone(), documents[4].clone()];
        bed.compile(&plugin, &own, 99);
        let prompt = cut(tenant, &documents);
        let mut gather = plugin.gather(&prompt);
        let mut pages = Pages::of(&prompt);
        pages.follow(&mut gather);
        assert_eq!(chunks(&gather), [0, 1, 2, 3, 4]);
        let mut expected = Pages::of(&prompt);
        for chunk in [0, 1, 2, 3, 4] {
            let layout = prompt.chunks()[chunk].layout();
            let key = match chunk {
                2 | 4 => keys(tenant)[chunk],
                _ => keys("corpus")[chunk],
            };
            expected.put(&prompt, chunk, &bed.stored(key, layout));
        }
        assert!(
            pages.bytes() == expected.bytes(),
            "a tenant's own copy wins"
        );
    }
    // The corpus is what it was.
    let lookup = bed
        .runtime
        .block_on(bed.client.lookup(&keys("corpus")))
        .unwrap();
    assert_eq!(lookup.prefix_chunks, 4);
    assert!(lookup.found[4..].iter().all(Option::is_none));
    let third = &cut("corpus", &documents).chunks()[2].clone();
    let layers = kv(third.layout(), seed_of(third.key(), 0));
    assert_eq!(bed.stored(third.key(), third.layout()), layers);
}

/// Prefix chunks of the corpus's own prompts are of nobody else.
#[test]
fn prefixes_never_come_from_the_corpus() {
    let bed = Bed::start();
    let filler = bed.plugin("corpus", eager());
    let tokens: Vec<u32> = (0..200).collect();
    let layout = *filler.namespace().layout();
    for (chunk, key) in (0..).zip(filler.namespace().prefix_keys(&tokens)) {
        let copy = ChunkCopy {
            key,
            layout,
            start: chunk * u64::from(layout.tokens()),
            layers: kv(&layout, chunk),
            hints: Hints::default(),
        };
        assert_eq!(filler.capture(copy), CaptureOutcome::Queued);
    }
    while filler.capture_stats().waiting > 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
    let config = PluginConfig {
        corpus: Some(namespace("corpus")),
        ..eager()
    };
    for (plugin, expected) in [(filler, 3), (bed.plugin("one", config), 0)] {
        let mut prefetch = plugin.prefetch(&Prompt::new(plugin.namespace(), &tokens));
        let mut pages = Pages::of(&cut("", &[Segment::Text(tokens.clone())]));
        let chunks = loop {
            let wait = Duration::from_millis(100);
            let outcome = pages.with(|backend, blocks| prefetch.wait(wait, backend, blocks));
            if let FetchOutcome::Done { chunks } = outcome {
                break chunks;
            }
        };
        assert_eq!(chunks, expected);
    }
}
