//! A random Llama checkpoint in the Hugging Face layout, written on the spot.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::Context as _;
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

/// Geometry of a random model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) intermediate: usize,
    pub(crate) vocabulary: usize,
    pub(crate) positions: usize,
}

impl Shape {
    /// About 124 M parameters: 24 KiB of f32 KV per token.
    pub(crate) const SERVING: Self = Self {
        hidden: 768,
        layers: 12,
        heads: 12,
        kv_heads: 4,
        intermediate: 2048,
        vocabulary: 32_000,
        positions: 32_768,
    };

    /// The model that prefill is compared with torch on: about 246 M parameters.
    pub(crate) const PREFILL: Self = Self {
        hidden: 1024,
        layers: 16,
        heads: 16,
        kv_heads: 4,
        intermediate: 2816,
        vocabulary: 32_000,
        positions: 4096,
    };

    /// What a GPU is measured with: about 1.1 B parameters, 32 KiB of 16-bit KV per token.
    pub(crate) const BILLION: Self = Self {
        hidden: 2048,
        layers: 16,
        heads: 32,
        kv_heads: 8,
        intermediate: 8192,
        vocabulary: 32_000,
        positions: 8192,
    };

    /// As deep as larger models are: about 71 M parameters, 24 KiB of f16 KV per token.
    pub(crate) const DEEP: Self = Self {
        hidden: 512,
        layers: 24,
        heads: 8,
        kv_heads: 4,
        intermediate: 1408,
        vocabulary: 2048,
        positions: 4096,
    };

    const fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Name and shape of every tensor; norms have one dimension.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let kv = self.kv_heads * self.head_dim();
        let mut tensors = vec![(
            "model.embed_tokens.weight".to_owned(),
            vec![self.vocabulary, self.hidden],
        )];
        for layer in 0..self.layers {
            let mut push = |name: &str, shape: &[usize]| {
                tensors.push((
                    format!("model.layers.{layer}.{name}.weight"),
                    shape.to_vec(),
                ));
            };
            push("input_layernorm", &[self.hidden]);
            push("self_attn.q_proj", &[self.hidden, self.hidden]);
            push("self_attn.k_proj", &[kv, self.hidden]);
            push("self_attn.v_proj", &[kv, self.hidden]);
            push("self_attn.o_proj", &[self.hidden, self.hidden]);
            push("post_attention_layernorm", &[self.hidden]);
            push("mlp.gate_proj", &[self.intermediate, self.hidden]);
            push("mlp.up_proj", &[self.intermediate, self.hidden]);
            push("mlp.down_proj", &[self.hidden, self.intermediate]);
        }
        tensors.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        tensors.push((
            "lm_head.weight".to_owned(),
            vec![self.vocabulary, self.hidden],
        ));
        tensors
    }

    pub(crate) fn parameters(&self) -> usize {
        self.tensors()
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum()
    }
}

/// Writes `config.json` and `model.safetensors` (f32) into `dir`.
pub(crate) fn write(dir: &Path, shape: &Shape) -> anyhow::Result<()> {
    write_with(dir, shape, Attention::default())
}

/// What attention of a random model is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    /// By how much projections to queries and keys are scaled: attention of such a model is
    /// skewed, where a random model's is nearly even.
    pub(crate) scale: f32,
    /// Whether tokens attend to those like them, by [`Content`].
    pub(crate) is_by_content: bool,
}

impl Default for Attention {
    fn default() -> Self {
        Self {
            scale: 1.0,
            is_by_content: false,
        }
    }
}

/// What makes tokens attend to those like them, as in trained models, and not to others that
/// have nothing in common but chance.
///
/// Queries are projected as the keys of their group are, but for [`Self::OWN`]. What tokens are
/// is in the channels that RoPE turns slowly, others count less, as in trained models (Barbero
/// et al., arXiv 2410.06205). And embeddings are large beside what a layer adds to them, so that
/// a token is itself in all layers, and a layer gets nearly what the one before got.
#[derive(Clone, Copy, Debug)]
struct Content;

impl Content {
    /// Share of the variance of a query head's projection that is its own.
    const OWN: f32 = 0.1;
    /// Share of the channels that turn slowly.
    const SLOW: f32 = 0.25;
    /// Size of the others.
    const FAST_SCALE: f32 = 0.5;
    const EMBEDDING_SCALE: f32 = 20.0;
    const ROPE_THETA: f64 = 500_000.0;
}

/// As [`write()`], with such attention.
pub(crate) fn write_with(dir: &Path, shape: &Shape, attention: Attention) -> anyhow::Result<()> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim(),
        "max_position_embeddings": shape.positions,
        "rope_theta": if attention.is_by_content { Content::ROPE_THETA } else { 10_000.0 },
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": false,
        "attention_bias": false,
        "mlp_bias": false,
        "torch_dtype": "float32",
    });
    std::fs::write(dir.join("config.json"), config.to_string())?;
    let path = dir.join("model.safetensors");
    write_tensors(&path, shape, attention).with_context(|| format!("writing {}", path.display()))
}

fn write_tensors(path: &Path, shape: &Shape, attention: Attention) -> anyhow::Result<()> {
    let tensors = shape.tensors();
    let mut header = serde_json::Map::new();
    let mut offset = 0usize;
    for (name, dimensions) in &tensors {
        let end = offset + dimensions.iter().product::<usize>() * 4;
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": dimensions, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    // Of a layer's keys, which are written behind its queries.
    let mut keys = Vec::new();
    for (name, dimensions) in &tensors {
        let count: usize = dimensions.iter().product();
        // Norms are one; matrices uniform with the variance of a trained model's start.
        let mut values: Vec<f32> = match dimensions.len() {
            1 => vec![1.0; count],
            _ => uniform(&mut rng, count),
        };
        if name.contains("q_proj") || name.contains("k_proj") {
            values
                .iter_mut()
                .for_each(|value| *value *= attention.scale);
        }
        if attention.is_by_content {
            if name.contains("embed_tokens") {
                let scale = Content::EMBEDDING_SCALE;
                values.iter_mut().for_each(|value| *value *= scale);
            } else if name.contains("q_proj") {
                keys = uniform(&mut rng, shape.kv_heads * shape.head_dim() * shape.hidden);
                keys.iter_mut().for_each(|value| *value *= attention.scale);
                blend(&mut values, &keys, shape);
                slow(&mut values, shape);
            } else if name.contains("k_proj") {
                values.copy_from_slice(&keys);
                slow(&mut values, shape);
            }
        }
        for value in &values {
            out.write_all(&value.to_le_bytes())?;
        }
    }
    out.flush()?;
    Ok(())
}

fn uniform(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    const SPREAD: f32 = 0.035;
    let value = |_| {
        #[expect(clippy::cast_precision_loss, reason = "24 random bits fit an f32")]
        let unit = (rng.next_u32() >> 8) as f32 / (1u32 << 24) as f32;
        (unit * 2.0 - 1.0) * SPREAD
    };
    (0..count).map(value).collect()
}

/// Makes `queries`, `[heads][dim][hidden]`, those of their group's `keys`, but for a part of
/// their own.
fn blend(queries: &mut [f32], keys: &[f32], shape: &Shape) {
    let head = shape.head_dim() * shape.hidden;
    let group = shape.heads / shape.kv_heads * head;
    let (own, common) = (Content::OWN.sqrt(), (1.0 - Content::OWN).sqrt());
    for (queries, keys) in queries.chunks_exact_mut(group).zip(keys.chunks_exact(head)) {
        for (query, key) in queries.iter_mut().zip(keys.iter().cycle()) {
            *query = own * *query + common * key;
        }
    }
}

/// Makes channels small that RoPE turns fast; `[heads][dim][hidden]`.
fn slow(weights: &mut [f32], shape: &Shape) {
    let half = shape.head_dim() / 2;
    #[expect(clippy::cast_precision_loss, reason = "a few channels")]
    let is_fast = |channel: usize| ((channel % half) as f32) < (1.0 - Content::SLOW) * half as f32;
    for (channel, row) in weights.chunks_exact_mut(shape.hidden).enumerate() {
        if is_fast(channel) {
            row.iter_mut()
                .for_each(|value| *value *= Content::FAST_SCALE);
        }
    }
}
