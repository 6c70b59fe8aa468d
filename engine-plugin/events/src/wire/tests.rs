//! Against what vLLM's encoder wrote, and against damage.

#![allow(clippy::indexing_slicing, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::*;

struct Vector {
    name: String,
    maps: Vec<u8>,
    arrays: Vec<u8>,
}

fn vectors() -> Vec<Vector> {
    let text = include_str!("../../vectors/events.json");
    let all: serde_json::Value = serde_json::from_str(text).unwrap();
    let field = |it: &serde_json::Value, name: &str| it[name].as_str().unwrap().to_owned();
    let hex = |text: String| -> Vec<u8> {
        let digits = |at| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        (0..text.len()).step_by(2).map(digits).collect()
    };
    let vector = |it| Vector {
        name: field(it, "name"),
        maps: hex(field(it, "maps")),
        arrays: hex(field(it, "arrays")),
    };
    all.as_array().unwrap().iter().map(vector).collect()
}

fn named(name: &str) -> Batch {
    let vectors = vectors();
    let vector = vectors.iter().find(|it| it.name == name).unwrap();
    Batch::decode(&vector.maps).unwrap()
}

#[test]
fn both_forms_of_vllms_own_bytes_say_the_same_and_are_written_the_same() {
    let vectors = vectors();
    assert_eq!(vectors.len(), 5);
    for Vector { name, maps, arrays } in vectors {
        let batch = Batch::decode(&maps).unwrap();
        assert_eq!(batch.unknown, Unknown::default(), "{name}");
        assert_eq!(Batch::decode(&arrays).unwrap(), batch, "{name}");
        assert_eq!(batch.encode(Form::Maps), maps, "{name}");
        assert_eq!(batch.encode(Form::Arrays), arrays, "{name}");
    }
}

#[test]
fn every_field_is_what_vllm_put_there() {
    let digest: Box<[u8]> = (0..32).collect();
    let backwards: Box<[u8]> = (0..32).rev().collect();
    let batch = named("every field");
    assert_eq!((batch.timestamp, batch.rank), (1.5, Some(300)));
    let expected = Stored {
        hashes: vec![
            BlockHash::Bytes(digest.clone()),
            BlockHash::Bytes(backwards),
        ],
        parent: Some(BlockHash::Bytes(digest.clone())),
        tokens: vec![0, 127, 128, 255, 256, 65_535, 65_536, u32::MAX],
        block_size: 4,
        lora_id: Some(3),
        lora_name: Some("sql".into()),
        extra_keys: Some(vec![
            Some(vec![
                ExtraKey::Text("sql".into()),
                ExtraKey::Item("image".into(), -12),
                ExtraKey::Text("salt".into()),
            ]),
            None,
        ]),
        place: Place {
            medium: Some("CPU".into()),
            group: Some(1),
            locality: Some("REMOTE".into()),
            ownership: Some("obj".into()),
        },
        kind: Some("sliding_window".into()),
        sliding_window: Some(4096),
        session_id: Some("s-1".into()),
    };
    assert_eq!(batch.events[0], Event::Stored(Box::new(expected)));
    let Event::Stored(second) = &batch.events[1] else {
        panic!("{batch:?}");
    };
    let keys = vec![Some(vec![ExtraKey::Bytes(digest.clone())])];
    assert_eq!(second.extra_keys, Some(keys));

    let removed = named("removed");
    let Event::Removed(first) = &removed.events[0] else {
        panic!("{removed:?}");
    };
    assert_eq!(
        first.hashes,
        [BlockHash::Int(1), BlockHash::Bytes(digest.clone())]
    );
    assert_eq!(first.hashes[1].low64(), 0x1819_1a1b_1c1d_1e1f);
    assert_eq!(BlockHash::Bytes([1, 2].into()).low64(), 0x0102);
    assert_eq!(named("cleared").events[1], Event::Cleared);
}

/// Bytes that say something.
macro_rules! pack {
    ($($byte:expr),* $(,)?) => {{
        let mut bytes: Vec<u8> = Vec::new();
        $(bytes.extend_from_slice(&$byte[..]);)*
        bytes
    }};
}

#[test]
fn what_older_engines_leave_out_is_not_missed() {
    // vLLM before tiers, and SGLang: no medium, no rank, hashes of either sign.
    let old = pack![
        [0x92, 0x01, 0x92],
        [0x96, 0xab],
        b"BlockStored",
        [
            0x92, 0xff, 0xd3, 0x80, 0, 0, 0, 0, 0, 0, 1, 0xc0, 0x92, 7, 8, 1, 0xc0
        ],
        [0x92, 0xac],
        b"BlockRemoved",
        [0x91, 0xff],
    ];
    let batch = Batch::decode(&old).unwrap();
    assert_eq!((batch.timestamp, batch.rank), (1.0, None));
    let hashes = [BlockHash::Int(u64::MAX), BlockHash::Int((1 << 63) + 1)];
    let Event::Stored(stored) = &batch.events[0] else {
        panic!("{batch:?}");
    };
    assert_eq!(stored.hashes, hashes);
    assert_eq!((stored.block_size, &stored.tokens[..]), (1, &[7, 8][..]));
    assert_eq!(stored.place, Place::default());
    let Event::Removed(removed) = &batch.events[1] else {
        panic!("{batch:?}");
    };
    assert_eq!(removed.hashes, hashes[..1]);
}

#[test]
fn what_is_not_known_is_counted_and_left_out() {
    let newer = pack![
        // A field of the batch, two unknown events, and a known one with its tag last.
        [0x94, 0x01, 0x93],
        [0x92, 0xa6],
        b"Novel1",
        [0x81, 0x01, 0x91, 0xc0],
        [0x82, 0xa4],
        b"type",
        [0xa6],
        b"Novel2",
        [0xa1],
        b"x",
        [0x02],
        [0x83, 0xac],
        b"block_hashes",
        [0x91, 0x05],
        [0xa5],
        b"novel",
        [0x92, 0x01, 0xa1],
        b"y",
        [0xa4],
        b"type",
        [0xac],
        b"BlockRemoved",
        [0x05, 0xc3],
    ];
    let batch = Batch::decode(&newer).unwrap();
    let unknown = Unknown {
        fields: 2,
        events: 2,
    };
    assert_eq!(batch.unknown, unknown);
    assert_eq!(batch.rank, Some(5));
    let removed = Removed {
        hashes: vec![BlockHash::Int(5)],
        place: Place::default(),
    };
    assert_eq!(batch.events, [Event::Removed(removed)]);
}

#[test]
fn values_of_every_type_are_left_out() {
    let values: [&[u8]; 32] = [
        &[0x07],
        &[0xe0],
        &[0xc0],
        &[0xc2],
        &[0xc3],
        &[0xcc, 1],
        &[0xcd, 1, 2],
        &[0xce, 1, 2, 3, 4],
        &[0xcf, 1, 2, 3, 4, 5, 6, 7, 8],
        &[0xd0, 1],
        &[0xd1, 1, 2],
        &[0xd2, 1, 2, 3, 4],
        &[0xd3, 1, 2, 3, 4, 5, 6, 7, 8],
        &[0xca, 1, 2, 3, 4],
        &[0xcb, 1, 2, 3, 4, 5, 6, 7, 8],
        &[0xa2, 1, 2],
        &[0xd9, 1, 7],
        &[0xda, 0, 1, 7],
        &[0xdb, 0, 0, 0, 1, 7],
        &[0xc4, 1, 7],
        &[0xc5, 0, 1, 7],
        &[0xc6, 0, 0, 0, 1, 7],
        &[0xd4, 1, 2],
        &[0xd5, 1, 2, 3],
        &[0xd6, 1, 2, 3, 4, 5],
        &[0xd7, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        &[0xc7, 1, 9, 7],
        &[0xc8, 0, 1, 9, 7],
        &[0xc9, 0, 0, 0, 1, 9, 7],
        &[0x92, 0x91, 1, 2],
        &[0xdc, 0, 1, 0x81, 1, 2],
        &[0xdf, 0, 0, 0, 1, 0xde, 0, 1, 1, 2, 0xdd, 0, 0, 0, 1, 3],
    ];
    for value in values {
        let bytes = pack![[0x92, 0x01, 0x91, 0x92, 0xa1], b"x", value];
        let batch = Batch::decode(&bytes).unwrap();
        assert_eq!(
            (batch.unknown.events, batch.events.len()),
            (1, 0),
            "{value:?}"
        );
        for cut in 1..value.len() {
            assert!(
                Batch::decode(&bytes[..bytes.len() - cut]).is_err(),
                "{value:?}"
            );
        }
    }
    let fix_ext_16 = [&[0xd8, 1][..], &[0; 16]].concat();
    assert!(Batch::decode(&pack![[0x92, 0x01, 0x91, 0x92, 0xa1], b"x", fix_ext_16]).is_ok());
}

#[test]
fn pairs_of_tokens_are_left_out_and_counted() {
    let pairs = pack![
        [0x92, 0x01, 0x91, 0x96, 0xab],
        b"BlockStored",
        [0x91, 0x05, 0xc0, 0x92, 0x92, 1, 2, 0x92, 2, 3, 2, 0xc0],
    ];
    let batch = Batch::decode(&pairs).unwrap();
    let Event::Stored(stored) = &batch.events[0] else {
        panic!("{batch:?}");
    };
    assert!(stored.tokens.is_empty());
    assert_eq!((stored.block_size, batch.unknown.fields), (2, 1));
}

#[test]
fn what_is_malformed_is_named() {
    let error = |bytes: &[u8]| Batch::decode(bytes).unwrap_err().to_string();
    assert_eq!(error(&[]), "the batch ends early, in the batch");
    assert_eq!(error(&[0x01]), "the batch is not an array, at byte 0");
    assert_eq!(error(&[0x91, 0x01]), "the batch has no events");
    assert_eq!(
        error(&[0x92, 0x01, 0x90, 0xc0]),
        "1 bytes follow behind the batch"
    );
    assert_eq!(
        error(&[0x92, 0x01, 0x91, 0xc0]),
        "an event is not a map or an array, at byte 3"
    );
    assert_eq!(error(&[0x92, 0x01, 0x91, 0x80]), "an event has no type");
    let short = pack![[0x92, 0x01, 0x91, 0x91, 0xac], b"BlockRemoved"];
    assert_eq!(error(&short), "BlockRemoved has no block_hashes");
    let text = pack![
        [0x92, 0x01, 0x91, 0x92, 0xac],
        b"BlockRemoved",
        [0x91, 0xa1, 0x61],
    ];
    assert_eq!(error(&text), "block_hashes is not an integer, at byte 18");
    let large = pack![
        [0x92, 0x01, 0x91, 0x95, 0xab],
        b"BlockStored",
        [0x90, 0xc0, 0x91, 0xff, 0x01],
    ];
    assert_eq!(
        error(&large),
        "token_ids is not a number of its range, at byte 19"
    );
    // An unknown event of arrays in arrays, without end.
    let mut deep = pack![[0x92, 0x01, 0x91, 0x92, 0xa1], b"x"];
    deep.extend([0x91].repeat(100_000));
    assert_eq!(error(&deep), "the batch ends early, in an event");
    let reserved = pack![[0x92, 0x01, 0x91, 0x92, 0xa1], b"x", [0xc1]];
    assert_eq!(error(&reserved), "an event is not msgpack, at byte 6");
}

fn any_hash() -> impl Strategy<Value = BlockHash> {
    prop_oneof![
        any::<u64>().prop_map(BlockHash::Int),
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(|it| BlockHash::Bytes(it.into())),
    ]
}

fn any_place() -> impl Strategy<Value = Place> {
    let name = || proptest::option::of("[A-Z]{0,8}");
    (name(), any::<Option<u32>>(), name(), name()).prop_map(
        |(medium, group, locality, ownership)| Place {
            medium,
            group,
            locality,
            ownership,
        },
    )
}

fn any_event() -> impl Strategy<Value = Event> {
    let hashes = || proptest::collection::vec(any_hash(), 0..6);
    let stored = (
        hashes(),
        proptest::option::of(any_hash()),
        proptest::collection::vec(any::<u32>(), 0..20),
        any_place(),
        any::<(Option<i64>, Option<u32>)>(),
        proptest::option::of("\\PC{0,40}"),
    );
    let stored = stored.prop_map(|(hashes, parent, tokens, place, numbers, name)| {
        let extra = name.as_ref().map(|it| {
            let item = ExtraKey::Item(it.clone(), numbers.0.unwrap_or(0));
            vec![None, Some(vec![item, ExtraKey::Bytes([1, 2].into())])]
        });
        Event::Stored(Box::new(Stored {
            hashes,
            parent,
            tokens,
            block_size: 16,
            lora_id: numbers.0,
            lora_name: name.clone(),
            extra_keys: extra,
            place,
            kind: name.clone(),
            sliding_window: numbers.1,
            session_id: name,
        }))
    });
    prop_oneof![
        stored,
        (hashes(), any_place())
            .prop_map(|(hashes, place)| Event::Removed(Removed { hashes, place })),
        Just(Event::Cleared),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read_in_either_form(
        timestamp in any::<u32>(),
        events in proptest::collection::vec(any_event(), 0..6),
        rank in any::<Option<u32>>(),
    ) {
        let timestamp = f64::from(timestamp) / 64.0;
        let batch = Batch { timestamp, events, rank, unknown: Unknown::default() };
        for form in [Form::Maps, Form::Arrays] {
            prop_assert_eq!(&Batch::decode(&batch.encode(form)).unwrap(), &batch);
        }
    }

    #[test]
    fn a_batch_that_is_cut_off_is_an_error(
        events in proptest::collection::vec(any_event(), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let batch = Batch { events, ..Batch::default() };
        for form in [Form::Maps, Form::Arrays] {
            let bytes = batch.encode(form);
            prop_assert!(Batch::decode(&bytes[..cut.index(bytes.len())]).is_err());
        }
    }

    #[test]
    fn any_bytes_are_a_batch_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Batch::decode(&bytes);
    }
}
