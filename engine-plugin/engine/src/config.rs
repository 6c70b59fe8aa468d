//! What a model is: `config.json` of a Hugging Face checkpoint, normalised.
//!
//! [`ModelConfig::from_json`] parses, applies the defaults that transformers
//! applies for the same `model_type`, and refuses every field that would change
//! values in a way the engine does not implement. What remains is exact.
//!
//! Not here: tensor shapes ([`crate::model`]), tokenizer files.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use crate::rope::RopeConfig;
use fields::Fields;

mod fields;
#[cfg(test)]
mod tests;

/// Model families the engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `LlamaForCausalLM`: Llama 2, 3 and the many models in their form.
    Llama,
    /// `MistralForCausalLM`: Llama with an optional sliding window.
    Mistral,
    /// `Qwen2ForCausalLM`: Llama with biases on Q, K and V.
    Qwen2,
    /// `Qwen3ForCausalLM`: RMSNorm on each head of Q and K, before RoPE.
    Qwen3,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The class name in `architectures`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The value of `model_type`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// Everything about a model that is not a weight.
///
/// Immutable once parsed; every field is already checked against the others.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Model family.
    pub architecture: Architecture,
    /// Rows of the embedding and of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head; even. Not always `hidden / heads`.
    pub head_dim: usize,
    /// Positions the model accepts, in tokens.
    pub max_positions: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// The output projection is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Biases on the Q, K and V projections.
    pub qkv_bias: bool,
    /// Bias on the output projection of attention.
    pub o_bias: bool,
    /// Biases on the three MLP projections.
    pub mlp_bias: bool,
    /// Per layer: the number of most recent positions a query sees, itself
    /// included. `None` sees all.
    pub windows: Vec<Option<usize>>,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Beginning-of-sequence token, where the config names one.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens; possibly none.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Parses and checks the bytes of a `config.json`.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Json`] when it is not a JSON object, [`ConfigError::Missing`]
    /// and [`ConfigError::Invalid`] for absent or ill-typed fields, and
    /// [`ConfigError::Unsupported`] for a model that the engine would not run
    /// exactly as transformers does.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        let object: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(ConfigError::Json)?;
        let fields = Fields(&object);
        let architecture = architecture(fields)?;
        refuse_foreign_features(fields)?;

        let hidden = fields.size("hidden_size")?;
        let heads = fields.size("num_attention_heads")?;
        let layers = fields.size("num_hidden_layers")?;
        let max_positions = fields.size("max_position_embeddings")?;
        let kv_heads = match fields.optional_size("num_key_value_heads")? {
            Some(count) => count,
            // The defaults of transformers' own configuration classes, which
            // apply when a hand-written config leaves the key out.
            None if fields.is_null("num_key_value_heads") => heads,
            None => match architecture {
                Architecture::Llama => heads,
                Architecture::Mistral => 8,
                Architecture::Qwen2 | Architecture::Qwen3 => 32,
            },
        };
        let head_dim = match fields.optional_size("head_dim")? {
            Some(dim) => dim,
            None if architecture == Architecture::Qwen3 && !fields.is_null("head_dim") => 128,
            None if hidden % heads != 0 => {
                return Err(ConfigError::Invalid {
                    field: "num_attention_heads",
                    expected: "a divisor of hidden_size, since head_dim is absent",
                });
            }
            None => hidden / heads,
        };
        if heads % kv_heads != 0 {
            return Err(ConfigError::Invalid {
                field: "num_key_value_heads",
                expected: "a divisor of num_attention_heads",
            });
        }
        if head_dim % 2 != 0 || head_dim > MAX_HEAD_DIM {
            return Err(ConfigError::Unsupported {
                field: "head_dim",
                found: head_dim.to_string(),
                reason: "only even head dimensions up to 512 are implemented",
            });
        }
        if layers > MAX_LAYERS {
            return Err(ConfigError::Unsupported {
                field: "num_hidden_layers",
                found: layers.to_string(),
                reason: "models of up to 1024 layers are supported",
            });
        }
        let intermediate = fields.size("intermediate_size")?;
        for (field, width) in [
            ("hidden_size", hidden),
            ("intermediate_size", intermediate),
            ("num_attention_heads", heads * head_dim),
        ] {
            if width % WIDTH_UNIT != 0 {
                return Err(ConfigError::Unsupported {
                    field,
                    found: width.to_string(),
                    reason: "widths of products must be multiples of 4",
                });
            }
        }
        let attention_bias = fields.flag("attention_bias", false)?;
        let (qkv_bias, o_bias) = match architecture {
            Architecture::Llama | Architecture::Qwen3 => (attention_bias, attention_bias),
            Architecture::Qwen2 => (true, false),
            Architecture::Mistral => (false, false),
        };
        Ok(Self {
            architecture,
            vocab_size: fields.size("vocab_size")?,
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_positions,
            rms_norm_eps: fields.rms_norm_eps()?,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            qkv_bias,
            o_bias,
            mlp_bias: architecture == Architecture::Llama && fields.flag("mlp_bias", false)?,
            windows: windows(fields, architecture, layers, max_positions)?,
            rope: RopeConfig::from_json(&object, max_positions)?,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id")?,
        })
    }

    /// Width of the fused Q, K, V projection: `(heads + 2 · kv_heads) · head_dim`.
    pub const fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Bytes of KV per token over all layers, for elements of `element_bytes`.
    pub const fn kv_token_bytes(&self, element_bytes: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * element_bytes
    }

    /// One line of text that differs whenever two configs give different KV.
    ///
    /// Keys in a fixed order, floats as the hexadecimal of their bits. Names of
    /// special tokens are left out: they change no value.
    pub fn canonical(&self) -> String {
        let mut text = String::new();
        let infallible = "writing to a String does not fail";
        write!(
            text,
            "{} vocab={} hidden={} intermediate={} layers={} heads={} kv_heads={} head_dim={} \
             eps={:08x} tied={} qkv_bias={} o_bias={} mlp_bias={} windows=",
            self.architecture.name(),
            self.vocab_size,
            self.hidden,
            self.intermediate,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.rms_norm_eps.to_bits(),
            self.tie_word_embeddings,
            self.qkv_bias,
            self.o_bias,
            self.mlp_bias,
        )
        .expect(infallible);
        for (layer, window) in self.windows.iter().enumerate() {
            let comma = if layer == 0 { "" } else { "," };
            match window {
                Some(tokens) => write!(text, "{comma}{tokens}"),
                None => write!(text, "{comma}-"),
            }
            .expect(infallible);
        }
        write!(text, " rope={}", self.rope.canonical()).expect(infallible);
        text
    }
}

/// Bounds the stack-allocated tiles of the attention kernel.
const MAX_HEAD_DIM: usize = 512;

/// Bounds what a config alone can make the engine allocate.
const MAX_LAYERS: usize = 1024;

/// The matrix library sums chunks of one or two inputs in another order than
/// longer ones; widths in fours have no such chunks.
const WIDTH_UNIT: usize = 4;

fn architecture(fields: Fields<'_>) -> Result<Architecture, ConfigError> {
    if let Some(names) = fields.0.get("architectures").and_then(Value::as_array) {
        let found = names.first().and_then(Value::as_str).unwrap_or_default();
        return Architecture::ALL
            .into_iter()
            .find(|candidate| candidate.name() == found)
            .ok_or_else(|| ConfigError::Unsupported {
                field: "architectures",
                found: found.to_owned(),
                reason: ARCHITECTURES,
            });
    }
    let Some(found) = fields.0.get("model_type").and_then(Value::as_str) else {
        return Err(ConfigError::Missing {
            field: "architectures",
        });
    };
    Architecture::ALL
        .into_iter()
        .find(|candidate| candidate.model_type() == found)
        .ok_or_else(|| ConfigError::Unsupported {
            field: "model_type",
            found: found.to_owned(),
            reason: ARCHITECTURES,
        })
}

const ARCHITECTURES: &str = "the engine runs LlamaForCausalLM, MistralForCausalLM, \
                             Qwen2ForCausalLM and Qwen3ForCausalLM";

/// Refuses fields that change values and belong to no architecture we run.
fn refuse_foreign_features(fields: Fields<'_>) -> Result<(), ConfigError> {
    for field in ["quantization_config", "compression_config"] {
        if fields.is_set(field) {
            return Err(ConfigError::Unsupported {
                field,
                found: "a value".to_owned(),
                reason: "quantised weights are not implemented; use an f32, bf16 or f16 checkpoint",
            });
        }
    }
    for field in [
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "moe_intermediate_size",
    ] {
        if fields.is_set(field) {
            return Err(ConfigError::Unsupported {
                field,
                found: fields
                    .0
                    .get(field)
                    .map(Value::to_string)
                    .unwrap_or_default(),
                reason: "mixtures of experts are not implemented",
            });
        }
    }
    match fields.0.get("hidden_act") {
        None | Some(Value::Null) => {}
        Some(Value::String(name)) if name == "silu" => {}
        Some(other) => {
            return Err(ConfigError::Unsupported {
                field: "hidden_act",
                found: other.to_string(),
                reason: "only \"silu\" is implemented",
            });
        }
    }
    match fields.0.get("partial_rotary_factor") {
        None | Some(Value::Null) => Ok(()),
        Some(value) if value.as_f64() == Some(1.0) => Ok(()),
        Some(other) => Err(ConfigError::Unsupported {
            field: "partial_rotary_factor",
            found: other.to_string(),
            reason: "RoPE over part of a head is not implemented",
        }),
    }
}

/// The sliding window of each layer, as transformers derives it.
fn windows(
    fields: Fields<'_>,
    architecture: Architecture,
    layers: usize,
    max_positions: usize,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = || -> Result<Option<usize>, ConfigError> {
        let window = match fields.optional_size("sliding_window")? {
            None if fields.is_null("sliding_window") => None,
            // The default of MistralConfig, Qwen2Config and Qwen3Config.
            None => Some(4096),
            found => found,
        };
        // A window of all positions hides nothing.
        Ok(window.filter(|&tokens| tokens < max_positions))
    };
    match architecture {
        Architecture::Llama => Ok(vec![None; layers]),
        Architecture::Mistral if fields.is_set("layer_types") => Err(ConfigError::Unsupported {
            field: "layer_types",
            found: "a list".to_owned(),
            reason: "Mistral with alternating attention is another architecture (Ministral)",
        }),
        Architecture::Mistral => Ok(vec![window()?; layers]),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            if !fields.flag("use_sliding_window", false)? {
                return match fields.layer_types(layers)? {
                    Some(kinds) if kinds.contains(&true) => Err(ConfigError::Invalid {
                        field: "layer_types",
                        expected: "full_attention only, since use_sliding_window is false",
                    }),
                    _ => Ok(vec![None; layers]),
                };
            }
            let window = window()?;
            let sliding = match fields.layer_types(layers)? {
                Some(kinds) => kinds,
                None => {
                    let first = fields.optional_count("max_window_layers")?.unwrap_or(28);
                    (0..layers).map(|layer| layer >= first).collect()
                }
            };
            Ok(sliding
                .into_iter()
                .map(|sliding| window.filter(|_| sliding))
                .collect())
        }
    }
}

/// Why a `config.json` does not describe a model that the engine runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("not a JSON object")]
    Json(#[source] serde_json::Error),
    /// A field without a default is absent.
    #[error("{field} is missing")]
    Missing {
        /// The absent field.
        field: &'static str,
    },
    /// A field has a value that no model can have.
    #[error("{field} must be {expected}")]
    Invalid {
        /// The offending field.
        field: &'static str,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A valid model that the engine would not run exactly.
    #[error("{field} = {found} is not supported: {reason}")]
    Unsupported {
        /// The field that asks for it.
        field: &'static str,
        /// Its value.
        found: String,
        /// What the engine supports instead.
        reason: &'static str,
    },
}
