//! Identity: published vectors, and one property per field of a key.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use kvasir_types::{Adapter, ChunkKey, DType, KvLayout, ModelIdentity, Namespace, Planes};
use proptest::prelude::*;

/// Every input of a prefix key, as one value that tests can change field by field.
#[derive(Clone, Debug)]
struct Inputs {
    architecture: String,
    weights: String,
    rope: String,
    adapter: Option<(String, String)>,
    layers: u16,
    kv_heads: u16,
    planes: Planes,
    chunk_tokens: u32,
    dtype: DType,
    tokenizer: [u8; 32],
    tenant: Vec<u8>,
    parent: Option<[u8; 32]>,
    tokens: Vec<u32>,
}

impl Inputs {
    fn namespace(&self) -> Namespace {
        let layout = KvLayout::new(
            self.layers,
            self.kv_heads,
            self.planes,
            self.chunk_tokens,
            self.dtype,
        )
        .unwrap();
        let model = ModelIdentity {
            architecture: self.architecture.clone(),
            weights: self.weights.clone(),
            rope: self.rope.clone(),
        };
        let adapter = self.adapter.as_ref().map(|(name, revision)| Adapter {
            name: name.clone(),
            revision: revision.clone(),
        });
        Namespace::new(
            &model,
            adapter.as_ref(),
            layout,
            &self.tokenizer,
            &self.tenant,
        )
    }

    fn prefix(&self) -> ChunkKey {
        let parent = self.parent.map(ChunkKey::from_bytes);
        self.namespace().prefix(parent.as_ref(), &self.tokens)
    }
}

fn any_planes() -> impl Strategy<Value = Planes> {
    prop_oneof![
        (1u16..256, 1u16..256)
            .prop_map(|(key_dim, value_dim)| Planes::KeyValue { key_dim, value_dim }),
        (1u16..600).prop_map(|dim| Planes::Single { dim }),
    ]
}

prop_compose! {
    fn any_inputs()(
        names in ("[a-z0-9 =]{0,20}", "[a-z0-9]{0,20}", "[a-z0-9 =]{0,20}"),
        adapter in prop::option::of(("[a-z]{0,8}", "[a-z]{0,8}")),
        geometry in (1u16..64, 1u16..16, any_planes(), 1u32..64),
        dtype in prop::sample::select(DType::ALL.to_vec()),
        tokenizer in any::<[u8; 32]>(),
        tenant in prop::collection::vec(any::<u8>(), 0..16),
        parent in prop::option::of(any::<[u8; 32]>()),
        tokens in prop::collection::vec(any::<u32>(), 1..600),
    ) -> Inputs {
        let (architecture, weights, rope) = names;
        let (layers, kv_heads, planes, chunk_tokens) = geometry;
        Inputs { architecture, weights, rope, adapter, layers, kv_heads, planes, chunk_tokens,
                 dtype, tokenizer, tenant, parent, tokens }
    }
}

/// One property per field: a change to it, and nothing else, changes the key.
macro_rules! changes_the_key {
    ($($name:ident: |$inputs:ident| $change:expr;)*) => {
        proptest! {
            $(
                #[test]
                fn $name(original in any_inputs()) {
                    let mut $inputs = original.clone();
                    $change;
                    prop_assert_ne!(original.prefix(), $inputs.prefix());
                }
            )*
        }
    };
}

changes_the_key! {
    architecture: |i| i.architecture.push('x');
    weights: |i| i.weights.push('x');
    rope: |i| i.rope.push('x');
    adapter_presence: |i| i.adapter = match i.adapter { None => Some(Default::default()), Some(_) => None };
    adapter_name: |i| i.adapter = match i.adapter.take() {
        None => Some(("x".into(), String::new())),
        Some((name, revision)) => Some((format!("{name}x"), revision)),
    };
    adapter_revision: |i| i.adapter = match i.adapter.take() {
        None => Some((String::new(), "x".into())),
        Some((name, revision)) => Some((name, format!("{revision}x"))),
    };
    layers: |i| i.layers += 1;
    kv_heads: |i| i.kv_heads += 1;
    key_dim: |i| i.planes = match i.planes {
        Planes::KeyValue { key_dim, value_dim } => Planes::KeyValue { key_dim: key_dim + 1, value_dim },
        Planes::Single { dim } => Planes::Single { dim: dim + 1 },
    };
    value_dim: |i| i.planes = match i.planes {
        Planes::KeyValue { key_dim, value_dim } => Planes::KeyValue { key_dim, value_dim: value_dim + 1 },
        Planes::Single { dim } => Planes::KeyValue { key_dim: dim, value_dim: 1 },
    };
    plane_count: |i| i.planes = match i.planes {
        Planes::KeyValue { key_dim, .. } => Planes::Single { dim: key_dim },
        Planes::Single { dim } => Planes::symmetric(dim),
    };
    chunk_tokens: |i| i.chunk_tokens += 1;
    dtype: |i| i.dtype = if i.dtype == DType::F32 { DType::F16 } else { DType::F32 };
    tokenizer: |i| i.tokenizer[31] ^= 1;
    tenant: |i| i.tenant.push(0);
    parent_presence: |i| i.parent = match i.parent { None => Some([0; 32]), Some(_) => None };
    parent: |i| i.parent = match i.parent.take() { None => Some([1; 32]), Some(mut p) => { p[0] ^= 1; Some(p) } };
    token_value: |i| { let last = i.tokens.len() - 1; i.tokens[last] ^= 1; };
    token_count: |i| i.tokens.push(0);
}

proptest! {
    /// Text does not leak across field borders.
    #[test]
    fn fields_do_not_run_together(original in any_inputs(), text in "[a-z]{1,8}") {
        let mut left = original.clone();
        left.architecture.push_str(&text);
        let mut right = original;
        right.weights.insert_str(0, &text);
        prop_assert_ne!(left.prefix(), right.prefix());
    }

    /// The three kinds of key never meet.
    #[test]
    fn domains_are_separate(mut inputs in any_inputs()) {
        inputs.parent = None;
        let namespace = inputs.namespace();
        let bytes: Vec<u8> = inputs.tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        let keys = [inputs.prefix(), namespace.content(&inputs.tokens), namespace.opaque(&bytes)];
        prop_assert_ne!(keys[0], keys[1]);
        prop_assert_ne!(keys[1], keys[2]);
        prop_assert_ne!(keys[0], keys[2]);
    }

    /// What a chunk was computed behind is part of its key, and not of its tokens.
    #[test]
    fn a_content_chunk_is_of_its_prefix(
        inputs in any_inputs(),
        prefix in prop::collection::vec(any::<u32>(), 1..8),
    ) {
        let namespace = inputs.namespace();
        let key = namespace.content_after(&prefix, &inputs.tokens);
        prop_assert_ne!(key, namespace.content(&inputs.tokens));
        let mut other = prefix.clone();
        other[0] ^= 1;
        prop_assert_ne!(key, namespace.content_after(&other, &inputs.tokens));
        let longer: Vec<u32> = prefix.iter().chain(&inputs.tokens).copied().collect();
        prop_assert_ne!(key, namespace.content(&longer));
        prop_assert_ne!(key, namespace.content_after(&prefix[1..], &inputs.tokens));
        prop_assert_eq!(
            namespace.content_after(&[], &inputs.tokens),
            namespace.content(&inputs.tokens)
        );
    }

    #[test]
    fn text_form_round_trips(bytes in any::<[u8; 32]>()) {
        let key = ChunkKey::from_bytes(bytes);
        prop_assert_eq!(key.to_string().parse::<ChunkKey>(), Ok(key));
    }

    #[test]
    fn layout_encoding_round_trips(inputs in any_inputs()) {
        let layout = *inputs.namespace().layout();
        prop_assert_eq!(KvLayout::decode(&layout.encode()), Ok(layout));
    }

    /// Arbitrary bytes give a layout or an error, never a panic.
    #[test]
    fn hostile_layouts_are_errors(bytes in any::<[u8; 16]>()) {
        if let Ok(layout) = KvLayout::decode(&bytes) {
            prop_assert_eq!(layout.encode(), bytes);
        }
    }
}

/// The published examples: any implementation that derives these keys agrees with this one.
#[test]
fn published_vectors() {
    let text = include_str!("../vectors/identity.json");
    let file: serde_json::Value = serde_json::from_str(text).unwrap();
    let vectors = file["vectors"].as_array().unwrap();
    assert!(vectors.len() >= 6);
    for vector in vectors {
        let inputs = inputs_of(vector);
        let namespace = inputs.namespace();
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let name = &vector["name"];
        assert_eq!(
            vector["layout_encoding"],
            hex(&namespace.layout().encode()),
            "{name}"
        );
        assert_eq!(
            vector["layout_digest"],
            namespace.layout_digest().to_string(),
            "{name}"
        );
        assert_eq!(vector["namespace"], hex(namespace.as_bytes()), "{name}");
        let prefix: Vec<_> = namespace
            .prefix_keys(&inputs.tokens)
            .iter()
            .map(ChunkKey::to_string)
            .collect();
        assert_eq!(vector["prefix_keys"], serde_json::json!(prefix), "{name}");
        assert_eq!(
            vector["content_key"],
            namespace.content(&inputs.tokens).to_string(),
            "{name}"
        );
        let before = usize::try_from(vector["content_prefix"].as_u64().unwrap()).unwrap();
        let after = namespace.content_after(&inputs.tokens[..before], &inputs.tokens);
        assert_eq!(vector["content_key_after"], after.to_string(), "{name}");
        assert_eq!(
            vector["opaque_key"],
            namespace.opaque(b"block-1").to_string(),
            "{name}"
        );
    }
}

fn inputs_of(vector: &serde_json::Value) -> Inputs {
    let text = |field: &str| vector[field].as_str().unwrap().to_owned();
    let number = |field: &str| vector[field].as_u64().unwrap();
    let u16_of = |value: &serde_json::Value| u16::try_from(value.as_u64().unwrap()).unwrap();
    let planes = match &vector["planes"] {
        serde_json::Value::Array(dims) => Planes::KeyValue {
            key_dim: u16_of(&dims[0]),
            value_dim: u16_of(&dims[1]),
        },
        dim => Planes::Single { dim: u16_of(dim) },
    };
    Inputs {
        architecture: text("architecture"),
        weights: text("weights"),
        rope: text("rope"),
        adapter: vector["adapter"].as_array().map(|pair| {
            (
                pair[0].as_str().unwrap().to_owned(),
                pair[1].as_str().unwrap().to_owned(),
            )
        }),
        layers: u16_of(&vector["layers"]),
        kv_heads: u16_of(&vector["kv_heads"]),
        planes,
        chunk_tokens: u32::try_from(number("chunk_tokens")).unwrap(),
        dtype: serde_json::from_value(vector["dtype"].clone()).unwrap(),
        tokenizer: [u8::try_from(number("tokenizer_byte")).unwrap(); 32],
        tenant: text("tenant").into_bytes(),
        parent: None,
        tokens: (0..u32::try_from(number("token_count")).unwrap())
            .map(|i| i * 7 + 1)
            .collect(),
    }
}
