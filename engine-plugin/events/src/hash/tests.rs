//! Against hashes that vLLM computed; see `vectors/make.py`.

use super::*;

#[test]
fn hashes_are_those_of_vllm() {
    let text = include_str!("../../vectors/hashes.json");
    let cases: serde_json::Value = serde_json::from_str(text).unwrap();
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 11);
    let number = |value: &serde_json::Value| usize::try_from(value.as_u64().unwrap()).unwrap();
    let hex = |hash: &Hash| -> String { hash.iter().map(|it| format!("{it:02x}")).collect() };
    for case in cases {
        let name = &case["name"];
        let none = none_hash(case["seed"].as_str().unwrap_or(DEFAULT_SEED));
        assert_eq!(hex(&none), case["none_hash"].as_str().unwrap(), "{name}");
        let tokens: Vec<u32> = case["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|token| token.as_u64().unwrap().try_into().unwrap())
            .collect();
        let items: Vec<Item<'_>> = case["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| Item {
                identifier: item["identifier"].as_str().unwrap(),
                offset: number(&item["offset"]),
                length: number(&item["length"]),
            })
            .collect();
        let lora = case["lora"]["name"].as_str();
        let prompt = Prompt {
            tokens: &tokens,
            lora: lora.map(|name| (name, case["lora"]["path"].as_str())),
            salt: case["salt"].as_str().unwrap_or(""),
            items: &items,
        };
        let hashes = prompt_hashes(&none, number(&case["block_size"]), &prompt);
        let expected = case["hashes"].as_array().unwrap();
        let made: Vec<_> = hashes.iter().map(hex).collect();
        assert_eq!(
            made,
            expected
                .iter()
                .map(|it| it.as_str().unwrap())
                .collect::<Vec<_>>(),
            "{name}"
        );
        let events = case["events"].as_array().unwrap().iter();
        let events: Vec<u64> = events
            .map(|it| it.as_str().unwrap().parse().unwrap())
            .collect();
        assert_eq!(
            hashes.iter().map(low64).collect::<Vec<_>>(),
            events,
            "{name}"
        );
    }
}

/// No engine here makes these; the bytes are written out.
#[test]
fn what_no_vector_has_is_as_the_source_says() {
    let by_hand = |cbor: &[u8]| -> Hash { digest(&SHA256, cbor).as_ref().try_into().unwrap() };
    let mut cbor = vec![0x83, 0x58, 32];
    cbor.extend([9; 32]);
    cbor.extend([0x81, 0x18, 0x18, 0x82]);
    // ["lora", "a"], ["prompt_embeds", h'0102']
    cbor.extend([0x82, 0x64]);
    cbor.extend(b"lora");
    cbor.extend([0x61, b'a', 0x82, 0x6d]);
    cbor.extend(b"prompt_embeds");
    cbor.extend([0x42, 1, 2]);
    let lora = ExtraKey::Lora {
        name: "a",
        path: None,
    };
    let extra = [lora, ExtraKey::Embeddings(&[1, 2])];
    assert_eq!(block_hash(&[9; 32], &[24], &extra), by_hand(&cbor));
    let prompt = Prompt {
        tokens: &[1],
        ..Prompt::default()
    };
    assert!(prompt_hashes(&[0; 32], 0, &prompt).is_empty());
}
