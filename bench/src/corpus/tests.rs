use std::collections::HashSet;
use std::path::Path;

use kvasir_engine::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde::Deserialize;

use super::names::is_held_out;
use super::rng::Rng;
use super::*;

/// One entry of `vectors.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vector {
    task: String,
    profile: Option<serde_json::Value>,
    chunks: usize,
    size: usize,
    split: String,
    seed: u64,
    count: u64,
    crc32: u32,
}

/// What `corpus.py --vectors` wrote, the profiles of training included.
#[test]
fn lines_are_those_of_python() {
    let vectors: Vec<Vector> =
        serde_json::from_str(include_str!("../../quality/vectors.json")).unwrap();
    for vector in &vectors {
        let arguments = Arguments {
            task: vector.profile.is_none().then(|| vector.task.clone()),
            profile: vector.profile.as_ref().map(ToString::to_string),
            chunks: vector.chunks,
            size: vector.size,
            seed: vector.seed,
            count: vector.count,
            split: split(&vector.split),
        };
        let mut lines = Vec::new();
        command::write(&arguments, &mut lines).unwrap();
        let digest = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32IsoHdlc, &lines);
        assert_eq!(digest, u64::from(vector.crc32), "{vector:?}");
    }
    let vocabulary = Vocabulary::load().unwrap();
    for task in vocabulary.tasks() {
        for split in ["train", "test"] {
            let covered = |vector: &Vector| vector.task == task.name && vector.split == split;
            assert!(vectors.iter().any(covered), "{} {split}", task.name);
        }
    }
}

fn split(name: &str) -> Split {
    match name {
        "train" => Split::Train,
        "test" => Split::Test,
        other => panic!("{other}"),
    }
}

/// `SplitMix64` from seed 0, as published.
#[test]
fn random_numbers_are_those_published() {
    let mut rng = Rng::new(0);
    assert_eq!(rng.next(), 0xE220_A839_7B1D_CDAF);
    assert_eq!(rng.next(), 0x6E78_9E6A_A1B9_65F4);
    assert_eq!(rng.next(), 0x06C4_5D18_8009_454F);
}

/// A context of 8 chunks of 64 tokens has questions enough to be worth its prefill.
#[test]
fn every_task_is_asked_often() {
    let vocabulary = Vocabulary::load().unwrap();
    for task in vocabulary.tasks() {
        let asked: usize = (0..100)
            .map(|index| {
                let context = evaluation(&vocabulary, task, 8, 64, 5, index).unwrap();
                context.questions.len()
            })
            .sum();
        // Few mottos and few fourth chunks about one person fit, and as many totals as chunks.
        let least = match task.name.as_str() {
            "copyref" => 1,
            "coref4" => 4,
            "copy" | "coref3" | "compare" | "ordinal" => 5,
            _ => 8,
        };
        assert!(asked >= 100 * least, "{}: {asked}", task.name);
    }
}

#[test]
fn odd_requests_are_errors() {
    let vocabulary = Vocabulary::load().unwrap();
    let sampled = |profile: &Profile, chunks, size| {
        sample(&vocabulary, profile, chunks, size, 1, Split::Test).map(|_| ())
    };
    let default = Profile::default();
    assert_eq!(sampled(&default, 0, 64), Err(SampleError::NoChunk));
    assert_eq!(sampled(&default, 4, 4), Err(SampleError::ChunkTooShort));
    assert_eq!(sampled(&default, 4, 0), Err(SampleError::ChunkTooShort));
    assert_eq!(
        sampled(&default, 17, 64),
        Err(SampleError::TooManyChunks(16))
    );
    let long = Err(SampleError::ContextTooLong);
    assert_eq!(sampled(&default, 2, 4097), long);
    assert_eq!(sampled(&default, usize::MAX, usize::MAX), long);
    let facts_min = 5;
    let few = Profile {
        facts_min,
        ..default.clone()
    };
    assert_eq!(sampled(&few, 4, 64), Err(SampleError::Facts));
    let pairs = u32::MAX;
    let many = Profile {
        pairs,
        ..default.clone()
    };
    assert_eq!(sampled(&many, 4, 64), Err(SampleError::NamesExhausted));
    let hop2 = vocabulary.task("hop2").unwrap();
    let one_chunk = evaluation(&vocabulary, hop2, 1, 64, 1, 0);
    assert_eq!(one_chunk.err(), Some(SampleError::NoQuestion));
}

/// The shipped tokenizer gives exactly the generated tokens, and the text back.
#[test]
fn the_tokenizer_agrees() {
    let vocabulary = Vocabulary::load().unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("quality");
    let tokenizer = Tokenizer::load(&dir, &[]).unwrap();
    let everything = Profile {
        total: 1000,
        role: 300,
        update: 300,
        alias: 500,
        ..Profile::default()
    };
    let pairs = Profile {
        pairs: 40,
        ..Profile::default()
    };
    for (seed, split) in (0..300).zip([Split::Train, Split::Test].into_iter().cycle()) {
        let profile = if seed % 5 == 0 { &pairs } else { &everything };
        let context = sample(&vocabulary, profile, 6, 64, seed, split).unwrap();
        let mut tokens = vec![vocabulary.bos];
        tokens.extend(context.chunks.concat());
        for question in &context.questions {
            tokens.extend(vocabulary.prompt(question));
            tokens.extend(&question.answer);
            tokens.push(vocabulary.eos);
        }
        let text = vocabulary.text(&tokens);
        assert_eq!(tokenizer.encode(&text, true).unwrap(), tokens, "{text}");
        assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text);
        // A chunk's text stands alone too.
        let chunk = &context.chunks[0];
        assert_eq!(
            tokenizer.encode(&vocabulary.text(chunk), true).unwrap(),
            *chunk
        );
    }
}

fn any_split() -> impl Strategy<Value = Split> {
    prop_oneof![Just(Split::Train), Just(Split::Test)]
}

fn permille() -> impl Strategy<Value = u32> {
    prop_oneof![2 => 0..=1000_u32, 1 => Just(0), 1 => Just(1000)]
}

prop_compose! {
    fn any_profile()(
        often in proptest::array::uniform11(permille()),
        attributes in 0..12_u32,
        facts_min in 0..6_u32,
        more in 0..6_u32,
        persons in 0..4_u32,
        pairs in prop_oneof![3 => Just(0), 1 => 1..80_u32],
    ) -> Profile {
        let [continuation, role, update, needles, alias, total, relation, name_again, filler,
            lookalike, town] = often;
        Profile {
            continuation, role, update, needles, alias, total, relation, name_again, filler,
            lookalike, town, attributes, facts_min, facts_max: facts_min + more, persons, pairs,
        }
    }
}

proptest! {
    #[test]
    fn contexts_are_as_promised(
        profile in any_profile(),
        chunks in 1..=16_usize,
        size in MIN_CHUNK_TOKENS..200,
        seed: u64,
        split in any_split(),
    ) {
        let vocabulary = Vocabulary::load().unwrap();
        let context = sample(&vocabulary, &profile, chunks, size, seed, split).unwrap();
        let again = sample(&vocabulary, &profile, chunks, size, seed, split).unwrap();
        prop_assert_eq!(&context, &again);

        prop_assert_eq!(context.chunks.len(), chunks);
        for chunk in &context.chunks {
            prop_assert_eq!(chunk.len(), size);
            prop_assert_eq!(chunk[0], vocabulary.doc);
        }
        let tokens = context.chunks.concat();
        for pair in names_in(&vocabulary, &tokens) {
            prop_assert_eq!(is_held_out(pair), split == Split::Test, "{:?}", pair);
        }
        for question in &context.questions {
            prop_assert!((1..=8).contains(&question.answer.len()), "{:?}", question);
            let stated = question.chunks.iter().any(|&chunk| {
                let tokens = &context.chunks[chunk];
                tokens.windows(question.answer.len()).any(|part| part == question.answer)
            });
            prop_assert!(stated, "{:?}", question);
        }
    }

    /// Every key of a list is new, so a question has one answer.
    #[test]
    fn keys_are_unique(
        pairs in 1..100_u32,
        size in 20..100_usize,
        seed: u64,
        split in any_split(),
    ) {
        let vocabulary = Vocabulary::load().unwrap();
        let profile = Profile { pairs, ..Profile::default() };
        let context = sample(&vocabulary, &profile, 8, size, seed, split).unwrap();
        let names = names_in(&vocabulary, &context.chunks.concat());
        prop_assert_eq!(names.len(), context.questions.len());
        let unique: HashSet<(usize, usize)> = names.iter().copied().collect();
        prop_assert_eq!(names.len(), unique.len());
    }

    /// No two persons share a name, so no attribute is asked twice of one.
    #[test]
    fn questions_are_unique(profile in any_profile(), seed: u64, split in any_split()) {
        let vocabulary = Vocabulary::load().unwrap();
        let context = sample(&vocabulary, &profile, 8, 64, seed, split).unwrap();
        let mut seen = HashSet::new();
        for question in context.questions {
            if question.kind != Kind::Compare {
                prop_assert!(seen.insert(question.question.clone()), "{:?}", question);
            }
        }
    }
}

/// Every two-syllable name of the text, by position in the lists of syllables.
fn names_in(vocabulary: &Vocabulary, tokens: &[u32]) -> Vec<(usize, usize)> {
    let position = |list: &[u32], token| list.iter().position(|&other| other == token);
    let name = |pair: &[u32]| {
        Some((
            position(&vocabulary.initials, pair[0])?,
            position(&vocabulary.finals, pair[1])?,
        ))
    };
    tokens.windows(2).filter_map(name).collect()
}
