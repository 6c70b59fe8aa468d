use std::fs;
use std::ops::ControlFlow;

use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

use super::*;
use crate::kernels::Threads;
use crate::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvError};

const CONFIG: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 70, "hidden_size": 72,
    "intermediate_size": 524, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 40, "max_position_embeddings": 400
}"#;

/// Name and shape.
type Tensor = (String, Vec<usize>);
type Tensors = Vec<Tensor>;

/// Tensors of [`CONFIG`].
fn tensors() -> Tensors {
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![70, 72]),
        ("lm_head.weight".to_owned(), vec![70, 72]),
        ("model.norm.weight".to_owned(), vec![72]),
    ];
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", vec![72]),
            ("self_attn.q_proj", vec![240, 72]),
            ("self_attn.k_proj", vec![80, 72]),
            ("self_attn.v_proj", vec![80, 72]),
            ("self_attn.q_norm", vec![40]),
            ("self_attn.k_norm", vec![40]),
            ("self_attn.o_proj", vec![72, 240]),
            ("post_attention_layernorm", vec![72]),
            ("mlp.gate_proj", vec![524, 72]),
            ("mlp.up_proj", vec![524, 72]),
            ("mlp.down_proj", vec![72, 524]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    tensors
}

/// A safetensors file of random weights.
fn checkpoint(tensors: &[Tensor], dtype: Dtype) -> Vec<u8> {
    let mut state = 7;
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape)| {
            let values = (0..shape.iter().product()).map(|_| {
                crate::kernels::noise(&mut state) / 4.0 + f32::from(u8::from(shape.len() == 1))
            });
            match dtype {
                Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
                _ => values
                    .flat_map(|x| half::bf16::from_f32(x).to_le_bytes())
                    .collect(),
            }
        })
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
        (
            name.clone(),
            TensorView::new(dtype, shape.clone(), data).unwrap(),
        )
    });
    safetensors::serialize(views, None).unwrap()
}

fn directory(config: &str, files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn load(files: &[(&str, &[u8])]) -> Result<Model, LoadError> {
    Model::load(directory(CONFIG, files).path())
}

/// The model, four tables of pages, and logits of all rows of a batch of
/// `(sequence, position, tokens)`.
fn run(model: &Model, threads: usize, batches: &[Vec<(usize, usize, &[u32])>]) -> Vec<Logits> {
    let pages = 400 / BLOCK_TOKENS;
    let mut pool = KvPool::new(model.config(), 4 * pages, KvDtype::F32);
    let tables: Vec<Vec<BlockId>> = (0..4)
        .map(|_| (0..pages).map(|_| pool.alloc().unwrap()).collect())
        .collect();
    let mut scratch = Scratch::new(Threads::new(threads).unwrap());
    batches
        .iter()
        .map(|batch| {
            let steps: Vec<Step<'_>> = batch
                .iter()
                .map(|&(sequence, position, tokens)| Step {
                    tokens,
                    positions: Positions::From(position),
                    blocks: &tables[sequence],
                    logits: LogitsWanted::All,
                })
                .collect();
            model
                .forward(&mut pool, &mut scratch, &steps, &mut |_| {
                    ControlFlow::Continue(())
                })
                .unwrap()
        })
        .collect()
}

/// Several tiles of keys, chunked sums, odd head dimension: neither the number
/// of threads, nor cuts, nor company changes a bit.
#[test]
fn a_row_depends_on_nothing_but_its_sequence() {
    let model = load(&[("model.safetensors", &checkpoint(&tensors(), Dtype::F32))]).unwrap();
    let tokens: Vec<u32> = (0..300).map(|i| i * 31 % 70).collect();
    let whole = run(&model, 1, &[vec![(0, 0, &tokens)]]).remove(0);
    let whole: Vec<&[f32]> = whole.rows(0).collect();
    assert!(
        whole
            .iter()
            .flat_map(|row| row.iter())
            .all(|logit| logit.is_finite())
    );
    for threads in [1, 2, 3] {
        for part in [1, 5, 64, 130] {
            let batches: Vec<Vec<(usize, usize, &[u32])>> = tokens
                .chunks(part)
                .enumerate()
                .map(|(index, part_tokens)| {
                    let step = (0, index * part, part_tokens);
                    let beside = (1 + index % 3, 0, &tokens[index % 50..][..1 + index % 80]);
                    if index % 2 == 0 {
                        vec![step]
                    } else {
                        vec![step, beside]
                    }
                })
                .collect();
            let found = run(&model, threads, &batches);
            let rows: Vec<&[f32]> = found.iter().flat_map(|logits| logits.rows(0)).collect();
            assert_eq!(rows, whole, "{threads} threads, parts of {part}");
        }
    }
}

#[test]
fn digest_and_logits_do_not_depend_on_sharding() {
    let (first, second): (Vec<_>, Vec<_>) = tensors()
        .into_iter()
        .partition(|(name, _)| name.contains("mlp"));
    let all = checkpoint(&[first.clone(), second.clone()].concat(), Dtype::BF16);
    let single = load(&[("model.safetensors", &all)]).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&all).unwrap();
    let part = |names: &[Tensor]| {
        let views = names
            .iter()
            .map(|(name, _)| (name, parsed.tensor(name).unwrap()));
        safetensors::serialize(views, None).unwrap()
    };
    let map: std::collections::BTreeMap<&str, &str> = first
        .iter()
        .map(|(name, _)| (name.as_str(), "a.safetensors"))
        .chain(
            second
                .iter()
                .map(|(name, _)| (name.as_str(), "b.safetensors")),
        )
        .collect();
    let index = serde_json::to_vec(&serde_json::json!({ "weight_map": map })).unwrap();
    let files: [(&str, &[u8]); 3] = [
        ("model.safetensors.index.json", &index),
        ("a.safetensors", &part(&first)),
        ("b.safetensors", &part(&second)),
    ];
    let sharded = load(&files).unwrap();
    assert_eq!(sharded.weights_digest(), single.weights_digest());
    let batch = [vec![(0, 0, &[1u32, 2, 3][..])]];
    assert_eq!(run(&sharded, 1, &batch), run(&single, 1, &batch));

    let mut other = all.clone();
    *other.last_mut().unwrap() ^= 1;
    let other = load(&[("model.safetensors", &other)]).unwrap();
    assert_ne!(other.weights_digest(), single.weights_digest());

    let missing = load(&files[..2]).unwrap_err();
    assert!(
        matches!(missing, LoadError::Checkpoint(CheckpointError::Io { .. })),
        "{missing:?}"
    );
    let outside = br#"{"weight_map": {"lm_head.weight": "../a.safetensors"}}"#;
    let outside = load(&[("model.safetensors.index.json", outside)]).unwrap_err();
    assert!(matches!(
        outside,
        LoadError::Checkpoint(CheckpointError::ShardName { .. })
    ));
}

#[test]
fn wrong_tensors_are_named() {
    let refusal = |change: &dyn Fn(&mut Tensors), dtype| {
        let mut tensors = tensors();
        change(&mut tensors);
        load(&[("model.safetensors", &checkpoint(&tensors, dtype))])
            .unwrap_err()
            .to_string()
    };
    let name = "model.layers.1.mlp.up_proj.weight";
    let missing = refusal(
        &|tensors| tensors.retain(|(each, _)| each != name),
        Dtype::F32,
    );
    assert_eq!(
        missing,
        format!("tensor {name} of shape [524, 72] is missing")
    );
    let reshape = |tensors: &mut Tensors| {
        for (_, shape) in tensors.iter_mut().filter(|(each, _)| each == name) {
            *shape = vec![72, 524];
        }
    };
    let reshaped = refusal(&reshape, Dtype::F32);
    assert_eq!(
        reshaped,
        format!("tensor {name} has shape [72, 524], the config implies [524, 72]")
    );
    let integers = refusal(&|_| {}, Dtype::I16);
    assert!(integers.contains("I16"), "{integers}");
}

#[test]
fn directories_without_a_model_are_refused() {
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(
        Model::load(empty.path()),
        Err(LoadError::ConfigFile { .. })
    ));
    let no_weights = load(&[]).unwrap_err();
    assert!(matches!(
        no_weights,
        LoadError::Checkpoint(CheckpointError::NoWeights(_))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A file cut or extended anywhere, or with a broken header, is an error.
    #[test]
    fn damaged_files_are_errors(cut: prop::sample::Index, flip: prop::sample::Index, bit in 0u8..8) {
        let good = checkpoint(&tensors(), Dtype::BF16);
        let attempt = |bytes: &[u8]| load(&[("model.safetensors", bytes)]);
        let cut = cut.index(good.len());
        prop_assert!(attempt(&good[..cut]).is_err());
        prop_assert!(attempt(&[&good[..], &[0]].concat()).is_err());
        let mut flipped = good.clone();
        let header = 8 + usize::try_from(u64::from_le_bytes(good[..8].try_into().unwrap())).unwrap();
        flipped[flip.index(header)] ^= 1 << bit;
        prop_assert!(attempt(&flipped).is_err());
    }
}

#[test]
fn steps_that_do_not_fit_are_refused() {
    let model = load(&[("model.safetensors", &checkpoint(&tensors(), Dtype::F32))]).unwrap();
    let mut pool = KvPool::new(model.config(), 2, KvDtype::F32);
    let mut scratch = Scratch::new(Threads::new(1).unwrap());
    let blocks = [BlockId(0), BlockId(1)];
    let mut refusal = |tokens: &[u32], position, blocks: &[BlockId]| {
        let step = Step {
            tokens,
            positions: Positions::From(position),
            blocks,
            logits: LogitsWanted::Last,
        };
        model
            .forward(&mut pool, &mut scratch, &[step], &mut |_| {
                ControlFlow::Continue(())
            })
            .unwrap_err()
    };
    assert!(matches!(
        refusal(&[], 0, &blocks),
        ForwardError::Empty { step: 0 }
    ));
    assert!(matches!(
        refusal(&[70], 0, &blocks),
        ForwardError::Token { token: 70, .. }
    ));
    assert!(matches!(
        refusal(&[1], 400, &blocks),
        ForwardError::TooLong { end: 401, .. }
    ));
    assert!(matches!(
        refusal(&[1], usize::MAX, &blocks),
        ForwardError::TooLong { .. }
    ));
    assert!(matches!(
        refusal(&[1], 32, &blocks),
        ForwardError::Pages {
            source: KvError::Range { .. },
            ..
        }
    ));
    assert!(matches!(
        refusal(&[1], 0, &[BlockId(2)]),
        ForwardError::Pages {
            source: KvError::NoSuchBlock { .. },
            ..
        }
    ));
    let smaller = CONFIG.replace("\"head_dim\": 40", "\"head_dim\": 20");
    let config = ModelConfig::from_json(smaller.as_bytes()).unwrap();
    let mut pool = KvPool::new(&config, 2, KvDtype::F32);
    let step = Step {
        tokens: &[1],
        positions: Positions::From(0),
        blocks: &blocks,
        logits: LogitsWanted::None,
    };
    let error = model
        .forward(&mut pool, &mut scratch, &[step], &mut |_| {
            ControlFlow::Continue(())
        })
        .unwrap_err();
    assert!(matches!(error, ForwardError::Pool));
}

#[test]
fn steps_without_logits_fill_pages_and_every_layer_is_announced() {
    let model = load(&[("model.safetensors", &checkpoint(&tensors(), Dtype::F32))]).unwrap();
    let mut pool = KvPool::new(model.config(), 2, KvDtype::F32);
    let mut scratch = Scratch::new(Threads::new(2).unwrap());
    let blocks = [pool.alloc().unwrap(), pool.alloc().unwrap()];
    let tokens = [5, 6, 7, 8];
    let mut announced = Vec::new();
    let mut step = |tokens, position, logits, pool: &mut KvPool| {
        let step = Step {
            tokens,
            positions: Positions::From(position),
            blocks: &blocks,
            logits,
        };
        model
            .forward(pool, &mut scratch, &[step], &mut |before| {
                announced.push(before.layer);
                ControlFlow::Continue(())
            })
            .unwrap()
    };
    let none = step(&tokens[..3], 0, LogitsWanted::None, &mut pool);
    assert_eq!((none.rows(0).len(), none.last(0)), (0, None));
    let last = step(&tokens[3..], 3, LogitsWanted::Last, &mut pool);
    let all = step(&tokens, 0, LogitsWanted::All, &mut pool);
    assert_eq!(last.last(0), all.rows(0).nth(3));
    assert_eq!(announced, [0, 1, 0, 1, 0, 1]);
}
