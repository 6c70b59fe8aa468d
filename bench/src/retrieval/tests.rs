use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    options: Options,
}

/// As the command line would be without a word.
fn options(arguments: &[&str]) -> Options {
    let arguments = ["retrieval"].iter().chain(arguments);
    Arguments::try_parse_from(arguments).unwrap().options
}

pub(super) fn workload() -> Workload {
    options(&[]).workload
}

/// Prefix and prefix chunk of 100 tokens, chunks of 100, questions of 10, ten layers. A repair
/// is 30 tokens in two layers, 60 rows. Two probes of 50 tokens in one layer are 300.
fn small() -> Options {
    options(&[
        "--prefix-tokens=100",
        "--chunk-tokens=100",
        "--block-tokens=100",
        "--model-layers=10",
        "--probes=2",
        "--probe-tokens=50",
        "--probe-layers=1",
        "--share=0.3",
        "--layers=2",
    ])
}

const CHUNK: u64 = 1000;
const QUESTION: u64 = 100;
const REPAIR: u64 = 60;
const PROBES: u64 = 300;

fn requests(prompts: &[&[u32]]) -> Vec<Request> {
    let request = |(number, chunks): (usize, &&[u32])| Request {
        timestamp: number as u64 * 1000,
        prefix: 0,
        chunks: chunks.to_vec(),
        question_length: 10,
        output_length: 1,
    };
    prompts.iter().enumerate().map(request).collect()
}

fn blended(options: &Options, prompts: &[&[u32]], prefix: bool, capacity: Option<u64>) -> Outcome {
    let blending = Blending {
        repair: options.repair,
        compile: options.compile,
        prefix,
        variants: None,
    };
    Trace::new(&requests(prompts), &options.costs).blending(blending, capacity)
}

fn varied(options: &Options, prompts: &[&[u32]], capacity: Option<u64>) -> Outcome {
    let blending = Blending {
        repair: options.repair,
        compile: options.compile,
        prefix: false,
        variants: Some(&options.variants),
    };
    Trace::new(&requests(prompts), &options.costs).blending(blending, capacity)
}

#[test]
fn prefix_caching_finds_what_stood_behind_the_same() {
    let options = small();
    let requests = requests(&[&[1, 2, 3], &[1, 2, 4], &[2, 1, 3], &[1, 2, 3]]);
    let trace = Trace::new(&requests, &options.costs);
    assert_eq!((trace.tokens(), trace.rows()), (4 * 410, 4 * 4100));
    let outcome = trace.prefix_caching(None);
    // Prefix, 1 and 2; the prefix; all but the question.
    let hit = 3 * CHUNK + CHUNK + 4 * CHUNK;
    assert_eq!(outcome.computed, 4 * 4100 - hit);
    assert_eq!(outcome.touched_tokens * 10, outcome.computed);
    assert_eq!((outcome.found, outcome.compiled), (2 + 3, 0));
    // The prefix, 1 2 3, 4, and 2 1 3.
    assert_eq!(outcome.stored, 8 * CHUNK);
    assert_eq!(trace.prefix_caching(Some(0)).computed, 4 * 4100);
}

#[test]
fn a_prefix_chunk_that_is_not_aligned_ends_at_what_changes() {
    let options = options(&[
        "--prefix-tokens=128",
        "--chunk-tokens=512",
        "--block-tokens=256",
        "--model-layers=1",
    ]);
    let requests = requests(&[&[1, 2], &[1, 3]]);
    let trace = Trace::new(&requests, &options.costs);
    let outcome = trace.prefix_caching(None);
    // 640 tokens are the same, and 512 of them in whole chunks; so chunk 1 is not whole.
    assert_eq!(outcome.computed, 1162 + 1162 - 512);
    assert_eq!(outcome.found, 0);
}

#[test]
fn chunks_are_computed_where_they_stand_and_alone_and_repaired_when_reused() {
    let outcome = blended(&small(), &[&[1, 2], &[2, 1], &[1, 3]], false, None);
    // The first of a prompt is computed alone as it is; 2 and 3 are computed again.
    let first = CHUNK + 2 * CHUNK + QUESTION;
    let compiled = PROBES + (CHUNK + PROBES) + (CHUNK + PROBES);
    let second = REPAIR + QUESTION;
    let third = CHUNK + QUESTION;
    assert_eq!(outcome.compiled, compiled);
    assert_eq!(outcome.computed, first + second + third + compiled);
    assert_eq!(outcome.found, 3);
    assert_eq!(outcome.touched_tokens, 310 + 30 + 10 + 110);
    assert_eq!(outcome.stored, 4 * CHUNK);
}

#[test]
fn chunks_of_another_prefix_are_other_chunks() {
    let options = small();
    let mut requests = requests(&[&[1], &[1], &[1]]);
    requests[1].prefix = 1;
    let trace = Trace::new(&requests, &options.costs);
    let blending = Blending {
        repair: options.repair,
        compile: options.compile,
        prefix: false,
        variants: None,
    };
    let outcome = trace.blending(blending, None);
    assert_eq!(outcome.computed, 2 * (2 * CHUNK + PROBES) + 3 * QUESTION);
    assert_eq!((outcome.found, distinct(&requests)), (1, 2));
}

#[test]
fn what_finds_no_room_is_not_compiled() {
    let outcome = blended(&small(), &[&[1, 2], &[1, 2]], false, Some(2 * CHUNK));
    // There is room for the prefix and 1.
    let first = 3 * CHUNK + QUESTION + PROBES;
    assert_eq!(outcome.computed, first + CHUNK + QUESTION);
    assert_eq!((outcome.found, outcome.stored), (1, 2 * CHUNK));
    let nothing = blended(&small(), &[&[1, 2], &[1, 2]], false, Some(0));
    assert_eq!(nothing.computed, 2 * (3 * CHUNK + QUESTION));
}

#[test]
fn chunks_are_compiled_when_they_were_missed_often_enough_and_recorded_once() {
    let mut options = small();
    options.compile.compile_after = 2;
    let prompts: [&[u32]; 3] = [&[1, 2], &[1, 2], &[1, 2]];
    let outcome = blended(&options, &prompts, false, None);
    let first = 3 * CHUNK + QUESTION;
    let second = 2 * CHUNK + QUESTION + (CHUNK + 2 * PROBES);
    assert_eq!(outcome.computed, first + second + REPAIR + QUESTION);
    // Room for the prefix and a chunk: 1 and 2 evict each other.
    let prompts: [&[u32]; 4] = [&[1], &[2], &[1], &[2]];
    for (keep_records, probes) in [(false, 4 * PROBES), (true, 2 * PROBES)] {
        let mut options = small();
        options.compile.keep_records = keep_records;
        let outcome = blended(&options, &prompts, false, Some(2 * CHUNK));
        assert_eq!((outcome.compiled, outcome.found), (probes, 0));
    }
}

#[test]
fn a_warm_up_is_served_and_not_counted() {
    let mut options = small();
    options.costs.warm_up = 1;
    let requests = requests(&[&[1, 2], &[1, 2, 3]]);
    let trace = Trace::new(&requests, &options.costs);
    assert_eq!((trace.rows(), trace.chunks()), (4 * CHUNK + QUESTION, 3));
    let outcome = blended(&options, &[&[1, 2], &[1, 2, 3]], false, None);
    let computed = REPAIR + CHUNK + QUESTION + (CHUNK + PROBES);
    assert_eq!((outcome.computed, outcome.found), (computed, 2));
    assert_eq!(trace.prefix_caching(None).computed, CHUNK + QUESTION);
}

#[test]
fn a_repair_in_all_layers_of_all_tokens_is_full_prefill_of_what_is_not_exact() {
    let options = Options {
        repair: Repair {
            share: 1.0,
            layers: 10,
        },
        ..small()
    };
    let outcome = blended(&options, &[&[1, 2], &[1, 2]], false, None);
    let first = 3 * CHUNK + QUESTION + CHUNK + 2 * PROBES;
    assert_eq!(outcome.computed, first + CHUNK + QUESTION);
}

#[test]
fn with_prefixes_what_is_exact_is_found_without_repair() {
    let prompts: [&[u32]; 3] = [&[1, 2, 3], &[1, 2, 3], &[2, 1, 3]];
    let outcome = blended(&small(), &prompts, true, None);
    let first = 4 * CHUNK + QUESTION + (2 * CHUNK + 3 * PROBES);
    // The chain of the first prompt is whole, that of the third is exact for one chunk.
    let second = QUESTION;
    let third = 2 * REPAIR + QUESTION;
    assert_eq!(outcome.computed, first + second + third);
    assert_eq!(outcome.found, 6);
    // Four of prefix and chunks, and four prefix chunks; none over a repaired chunk.
    assert_eq!(outcome.stored, 4 * CHUNK + 4 * CHUNK);
    let without = blended(&small(), &prompts, false, None);
    assert_eq!(without.computed - outcome.computed, 2 * REPAIR);
}

#[test]
fn a_canonical_prefix_that_is_in_prefix_chunks_is_not_computed() {
    let mut options = small();
    options.costs.warm_up = 5;
    // The second finds prefix chunks alone, so the prefix by itself is not used again; with
    // both chunks and one prefix chunk, it goes when the others need room.
    let mut requests = requests(&[&[1, 2], &[1, 2], &[9], &[9], &[9], &[1]]);
    for (request, prefix) in requests.iter_mut().zip([0, 0, 1, 2, 3, 0]) {
        request.prefix = prefix;
    }
    let blending = Blending {
        repair: options.repair,
        compile: options.compile,
        prefix: true,
        variants: None,
    };
    let trace = Trace::new(&requests, &options.costs);
    let outcome = trace.blending(blending, Some(8 * CHUNK));
    assert_eq!(outcome.computed, QUESTION);
}

#[test]
fn what_was_computed_behind_a_repaired_chunk_is_no_prefix() {
    // 4 is computed behind 2, which was compiled behind the prefix alone.
    let prompts: [&[u32]; 3] = [&[2], &[1, 2, 4], &[1, 2, 4]];
    let outcome = blended(&small(), &prompts, true, None);
    let first = 2 * CHUNK + QUESTION + PROBES;
    let second = CHUNK + REPAIR + CHUNK + QUESTION + PROBES + (CHUNK + PROBES);
    assert_eq!(outcome.computed, first + second + 2 * REPAIR + QUESTION);
    assert_eq!(outcome.stored, 4 * CHUNK);
}

#[test]
fn a_variant_needs_no_repair_behind_the_same_chunks_and_half_of_it_behind_most() {
    // 9 is the first of all, so that only the others are repaired.
    let prompts: [&[u32]; 5] = [
        &[9, 1, 2],
        &[9, 1, 2],
        // 3 is new; 2 stands behind 9 and another: overlap 0.5.
        &[9, 3, 2],
        // 2 stands behind 9 and 1 in another order: 0, but behind 9 and another, 0.5. 9 stands
        // behind others for the first time.
        &[1, 9, 2],
        &[1, 9, 2],
    ];
    let outcome = varied(&small(), &prompts, None);
    let first = 4 * CHUNK + QUESTION + (2 * CHUNK + 3 * PROBES);
    let second = QUESTION;
    let third = CHUNK + REPAIR / 2 + QUESTION + (CHUNK + PROBES);
    let fourth = REPAIR + REPAIR / 2 + QUESTION;
    let fifth = QUESTION;
    assert_eq!(outcome.computed, first + second + third + fourth + fifth);
    assert_eq!((outcome.exact_variants, outcome.near_variants), (2 + 2, 2));
    // 1 behind 9; 2 behind 9 1, 9 3 and 1 9; 3 behind 9; 9 behind 1.
    assert_eq!(outcome.variants, 6);
    assert_eq!(outcome.variants_stored, 6 * REPAIR);
    assert_eq!(outcome.stored, 5 * CHUNK + 6 * REPAIR);
    let without = blended(&small(), &prompts, false, None);
    assert_eq!(without.computed - outcome.computed, 4 * REPAIR + REPAIR);
}

#[test]
fn variants_share_the_store_and_go_with_their_chunk() {
    // Room for prefix, three chunks and a variant.
    let capacity = 4 * CHUNK + REPAIR;
    let mut prompts: Vec<&[u32]> = vec![&[1, 2], &[1, 2], &[3, 1], &[3, 1]];
    let outcome = varied(&small(), &prompts, Some(capacity));
    // The variant of 1 behind 3 needs room: all chunks but 2 are held, and 2 goes with its own.
    assert_eq!(outcome.exact_variants, 2);
    assert_eq!(outcome.stored, 3 * CHUNK + REPAIR);
    assert_eq!(outcome.variants, 1);
    prompts.push(&[1, 2]);
    let outcome = varied(&small(), &prompts, Some(capacity));
    assert_eq!((outcome.exact_variants, outcome.near_variants), (2, 0));
    assert!(outcome.stored <= capacity);
    // Variants may take nothing.
    let mut none = small();
    none.variants.variants_bytes = 0.0;
    let outcome = varied(&none, &prompts, Some(capacity));
    assert_eq!((outcome.exact_variants, outcome.variants), (0, 0));
}

#[test]
fn a_full_store_evicts_variants_that_saved_least() {
    // Room for three variants.
    let mut options = small();
    options.variants.variants_bytes = 200.0 / 8060.0;
    // That of 2 was not used again when that of 4 needs room, that of 1 was.
    let prompts: [&[u32]; 6] = [&[5, 1], &[5, 1], &[5, 2], &[5, 3], &[5, 4], &[5, 1]];
    let outcome = varied(&options, &prompts, Some(8060));
    assert_eq!((outcome.exact_variants, outcome.variants), (2, 3));
}

#[test]
fn a_variant_that_saved_half_outlives_those_that_saved_nothing() {
    // Room for four variants: of 6 behind 5, of 1 behind 5 6 and 5 7, of 7 behind 5.
    let mut options = small();
    options.variants.variants_bytes = 250.0 / 20_000.0;
    // 1 behind 5 6 was used for 1 behind 5 7; 8 and 9 need room of others.
    let prompts: [&[u32]; 5] = [&[5, 6, 1], &[5, 7, 1], &[5, 8], &[5, 9], &[5, 6, 1]];
    let outcome = varied(&options, &prompts, Some(20_000));
    assert_eq!((outcome.exact_variants, outcome.near_variants), (1, 1));
    assert_eq!(outcome.variants, 4);
}

#[test]
fn capacities_are_of_distinct_content_chunks() {
    let options = small();
    let requests = requests(&[&[1, 2], &[3, 4], &[1, 4]]);
    let trace = Trace::new(&requests, &options.costs);
    let suite = Suite {
        options: &options,
        trace: &trace,
        distinct: distinct(&requests),
    };
    let rows = |text: &str| suite.capacity(text.parse().unwrap());
    assert_eq!(rows("50%"), 2 * CHUNK);
    assert_eq!(rows("3"), 3 * CHUNK);
    // 12,800 KiB a chunk.
    assert_eq!(rows("25600KiB"), 2 * CHUNK);
}

#[test]
fn nothing_computes_more_than_full_prefill_but_for_the_store() {
    let options = small();
    let requests = options.read_requests(true).unwrap();
    let trace = Trace::new(&requests, &options.costs);
    for capacity in [Some(0), Some(500 * CHUNK), Some(3000 * CHUNK), None] {
        let prefix = trace.prefix_caching(capacity);
        assert!(prefix.computed <= trace.rows());
        let mut last = trace.rows();
        for variants in [None, Some(&options.variants)] {
            let blending = Blending {
                repair: options.repair,
                compile: options.compile,
                prefix: false,
                variants,
            };
            let outcome = trace.blending(blending, capacity);
            assert!(outcome.computed - outcome.compiled <= last);
            assert!(outcome.stored <= capacity.unwrap_or(u64::MAX));
            if capacity.is_none() {
                // Variants can only save where room does not matter.
                last = outcome.computed - outcome.compiled;
            }
        }
    }
}

#[test]
fn shares_and_layers_that_make_no_sense_are_refused() {
    for bad in [
        "--share=1.1",
        "--kept=-0.1",
        "--zipf=-1",
        "--zipf=NaN",
        "--corpus=0",
        "--chunk-tokens=0",
    ] {
        let parsed = Arguments::try_parse_from(["retrieval", bad]);
        assert!(parsed.is_err(), "{bad}");
    }
    let refused = |argument| run(&options(&[argument]), true).unwrap_err().to_string();
    let message = "--layers is 13, but --model-layers 12";
    assert_eq!(refused("--layers=13"), message);
    let message = "--warm-up is 2000, but there are 2000 requests";
    assert_eq!(refused("--warm-up=2000"), message);
}
