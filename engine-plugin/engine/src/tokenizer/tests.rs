use super::*;
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

/// `expected.json` of a chat fixture, made by transformers.
#[derive(Deserialize)]
struct Expected {
    bos_token: Option<String>,
    eos_token: String,
    eos_token_id: u32,
    texts: Vec<Text>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
    ids_with_special: Vec<u32>,
}

fn fixture(name: &str) -> (Arc<Tokenizer>, Expected) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(name);
    let expected = fs::read(dir.join("expected.json")).unwrap();
    (
        Arc::new(Tokenizer::load(&dir, &[]).unwrap()),
        serde_json::from_slice(&expected).unwrap(),
    )
}

/// A tokenizer from JSON, with `config` as its `tokenizer_config.json`.
fn made(model: Value, rest: Value, config: Value) -> Arc<Tokenizer> {
    let mut tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": null, "model": model,
    });
    for (key, value) in rest.as_object().unwrap() {
        tokenizer[key] = value.clone();
    }
    let bytes = serde_json::to_vec(&tokenizer).unwrap();
    let config = serde_json::from_value(config).unwrap();
    Arc::new(Tokenizer::from_bytes(&bytes, config, None).unwrap())
}

fn special(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true})
}

/// Words split at spaces, no decoder: ids 0 `<s>`, 1 `</s>`, then words.
fn words() -> Arc<Tokenizer> {
    let words = ["<s>", "</s>", "<unk>", "the", "store", "keeps", "keys"];
    let vocab: BTreeMap<&str, usize> = words.into_iter().zip(0..).collect();
    made(
        json!({"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}),
        json!({
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "added_tokens": [special(0, "<s>"), special(1, "</s>"), special(2, "<unk>")],
        }),
        json!({"bos_token": "<s>", "eos_token": "</s>"}),
    )
}

/// SentencePiece manner: `▁` for spaces, bytes for what has no token.
fn pieces() -> Arc<Tokenizer> {
    let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    vocab.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    vocab.extend(["▁the", "▁store", "▁", "s"].map(str::to_owned));
    let vocab: BTreeMap<String, usize> = vocab.into_iter().zip(0..).collect();
    made(
        json!({"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>",
            "byte_fallback": true, "fuse_unk": true, "ignore_merges": true}),
        json!({
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁",
                "prepend_scheme": "first", "split": true},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        }),
        json!({"bos_token": "<s>", "add_bos_token": true}),
    )
}

fn pushed(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32]) -> Vec<String> {
    let mut detokenizer = tokenizer.detokenizer(prompt).unwrap();
    let mut pieces: Vec<String> = ids
        .iter()
        .map(|&id| detokenizer.push(id).unwrap())
        .collect();
    pieces.push(detokenizer.finish().unwrap());
    pieces
}

#[test]
fn agrees_with_transformers() {
    for name in ["chat-config", "chat-jinja"] {
        let (tokenizer, expected) = fixture(name);
        assert_eq!(
            tokenizer.special_tokens().get("bos_token"),
            expected.bos_token.as_ref()
        );
        assert_eq!(
            tokenizer.special_tokens().get("eos_token"),
            Some(&expected.eos_token)
        );
        assert_eq!(tokenizer.stop_tokens(), [expected.eos_token_id]);
        for Text {
            text,
            ids,
            ids_with_special,
        } in expected.texts
        {
            assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{text:?}");
            assert_eq!(
                tokenizer.encode(&text, true).unwrap(),
                ids_with_special,
                "{text:?}"
            );
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
            assert_eq!(pushed(&tokenizer, &[], &ids).concat(), text);
        }
    }
}

#[test]
fn digest_is_of_the_file() {
    let (tokenizer, _) = fixture("chat-jinja");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/chat-jinja/tokenizer.json");
    assert_eq!(
        tokenizer.digest(),
        *blake3::hash(&fs::read(path).unwrap()).as_bytes()
    );
}

#[test]
fn characters_are_never_cut() {
    let (tokenizer, _) = fixture("chat-jinja");
    let text = "naïve 今日は 🙂🙂";
    let ids = tokenizer.encode(text, false).unwrap();
    let pieces = pushed(&tokenizer, &[], &ids);
    assert!(pieces.len() > text.chars().count(), "some tokens are parts");
    assert_eq!(pieces.concat(), text);
    assert!(
        pieces.iter().all(|piece| !piece.contains('\u{fffd}')),
        "{pieces:?}"
    );
}

#[test]
fn cut_character_is_replaced_at_the_end() {
    let (tokenizer, _) = fixture("chat-jinja");
    let ids = tokenizer.encode("a🙂", false).unwrap();
    let pieces = pushed(&tokenizer, &[], &ids[..ids.len() - 1]);
    assert_eq!(pieces.concat(), "a\u{fffd}");
}

#[test]
fn bytes_of_no_character_do_not_wait_forever() {
    let tokenizer = pieces();
    let stray = tokenizer.inner.token_to_id("<0xFF>").unwrap();
    let pieces = pushed(&tokenizer, &[], &[stray; 30]);
    assert!(!pieces[..10].concat().is_empty());
    assert_eq!(pieces.concat(), "\u{fffd}".repeat(30));
}

#[test]
fn words_are_joined_to_the_prompt() {
    let tokenizer = words();
    let prompt = tokenizer.encode("<s> the store", true).unwrap();
    assert_eq!(prompt, [0, 3, 4], "no post-processor adds a second <s>");
    assert_eq!(
        pushed(&tokenizer, &prompt, &[5, 6, 1]),
        [" keeps", " keys", "", ""]
    );
    assert_eq!(
        pushed(&tokenizer, &[], &[5, 6, 1]),
        ["keeps", " keys", "", ""]
    );
    assert_eq!(
        tokenizer.decode(&[0, 5, 6], false).unwrap(),
        "<s> keeps keys"
    );
}

#[test]
fn special_tokens_do_not_lose_the_space() {
    assert_eq!(
        pushed(&words(), &[], &[3, 0, 0, 4]),
        ["the", "", "", " store", ""]
    );
}

#[test]
fn pieces_keep_spaces_and_assemble_bytes() {
    let tokenizer = pieces();
    let ids = tokenizer.encode("the store", true).unwrap();
    assert_eq!(ids.len(), 3);
    assert_eq!(ids[0], 1, "add_bos_token adds what the processor does not");
    assert_eq!(pushed(&tokenizer, &[], &ids[1..]), ["the", " store", ""]);
    assert_eq!(pushed(&tokenizer, &ids[..2], &ids[2..]), [" store", ""]);
    let smiles = tokenizer.encode("the 🙂🙂", false).unwrap();
    let pieces = pushed(&tokenizer, &[], &smiles);
    assert_eq!(pieces.concat(), "the 🙂🙂");
    assert_eq!(
        pieces.iter().filter(|piece| piece.contains('🙂')).count(),
        2
    );
}

#[test]
fn bos_is_removed_when_the_configuration_says_so() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/chat-config/tokenizer.json");
    let bytes = fs::read(path).unwrap();
    let first = |config: Value| {
        let config = serde_json::from_value(config).unwrap();
        let tokenizer = Tokenizer::from_bytes(&bytes, config, None).unwrap();
        tokenizer.encode("<s>Hello", true).unwrap()[..2].to_vec()
    };
    assert_eq!(first(json!({"bos_token": "<s>"})), [1, 1]);
    assert_eq!(
        first(json!({"bos_token": "<s>", "add_bos_token": true})),
        [1, 1]
    );
    assert_ne!(
        first(json!({"bos_token": "<s>", "add_bos_token": false}))[1],
        1
    );
}

#[test]
fn files_are_optional_except_the_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let error = Tokenizer::load(dir.path(), &[]).unwrap_err();
    assert!(matches!(error, LoadError::Read { .. }), "{error}");

    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/chat-jinja/tokenizer.json");
    fs::copy(source, dir.path().join("tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::load(dir.path(), &[9]).unwrap();
    assert_eq!(tokenizer.stop_tokens(), [9]);
    assert!(tokenizer.templates().is_empty());

    let write = |name: &str, value: Value| {
        fs::write(dir.path().join(name), value.to_string()).unwrap();
    };
    write("generation_config.json", json!({"eos_token_id": [7, 9]}));
    write(
        "tokenizer_config.json",
        json!({
            "eos_token": {"content": "<|im_end|>", "lstrip": false},
            "pad_token": null,
            "chat_template": [
                {"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}],
        }),
    );
    let tokenizer = Tokenizer::load(dir.path(), &[9]).unwrap();
    assert_eq!(tokenizer.stop_tokens(), [2, 7, 9]);
    assert_eq!(tokenizer.templates()["default"], "A");
    assert_eq!(tokenizer.templates()["tool_use"], "B");

    fs::write(dir.path().join("chat_template.jinja"), "C").unwrap();
    write("generation_config.json", json!({"eos_token_id": 7}));
    let tokenizer = Tokenizer::load(dir.path(), &[]).unwrap();
    assert_eq!(tokenizer.stop_tokens(), [2, 7]);
    assert_eq!(tokenizer.templates()["default"], "C");

    fs::write(dir.path().join("generation_config.json"), "{").unwrap();
    let error = Tokenizer::load(dir.path(), &[]).unwrap_err();
    assert!(matches!(error, LoadError::Config { .. }), "{error}");
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    let error = Tokenizer::load(dir.path(), &[]).unwrap_err();
    assert!(matches!(error, LoadError::Tokenizer { .. }), "{error}");
}

/// A character that begins just as bytes of none are given up on.
#[test]
fn character_after_stray_bytes_is_whole() {
    let (tokenizer, _) = fixture("chat-jinja");
    let [lead, continuation] = [129, 97];
    assert_eq!(tokenizer.decode(&[lead, continuation], true).unwrap(), "¡");
    for stray in 0..20 {
        let ids = [vec![continuation; stray], vec![lead, continuation]].concat();
        let text = pushed(&tokenizer, &[], &ids).concat();
        assert_eq!(text, tokenizer.decode(&ids, true).unwrap(), "{stray}");
    }
}

/// Any tokens, often single bytes of characters with several.
fn token() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..300, 90u32..190]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Pieces of any tokens are the text of all of them.
    #[test]
    fn pieces_are_the_whole(ids in prop::collection::vec(token(), 0..40)) {
        let (tokenizer, _) = fixture("chat-jinja");
        // The whole text may join stray bytes that were given out one by one.
        let whole = tokenizer.decode(&ids, true).unwrap().replace('\u{fffd}', "");
        let pieces = pushed(&tokenizer, &[], &ids).concat().replace('\u{fffd}', "");
        prop_assert_eq!(pieces, whole);
    }
}
