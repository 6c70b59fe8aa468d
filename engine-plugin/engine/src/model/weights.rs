//! Weights by layer, in the layout that kernels read.

use std::path::Path;

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::{Architecture, ModelConfig};
use crate::kernels::{PANEL, PackedMatrix};

/// All weights of a model.
pub(super) struct Weights {
    pub(super) embedding: Embedding,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Vec<f32>,
    pub(super) lm_head: PackedMatrix,
}

/// Token embeddings.
pub(super) enum Embedding {
    /// `[vocab][hidden]`.
    Rows(Vec<f32>),
    /// Read from `lm_head`; saves a second copy of the largest matrix.
    Tied,
}

/// One transformer layer.
pub(super) struct Layer {
    pub(super) attention_norm: Vec<f32>,
    /// Q, K and V, in this order.
    pub(super) qkv: Linear,
    /// RMSNorm of each head of Q and of K.
    pub(super) head_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub(super) output: Linear,
    pub(super) mlp_norm: Vec<f32>,
    /// Gate, then up.
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
}

/// A matrix, perhaps with a bias.
pub(super) struct Linear {
    pub(super) matrix: PackedMatrix,
    pub(super) bias: Option<Vec<f32>>,
}

impl Weights {
    /// Reads all weights; also gives their digest.
    pub(super) fn load(
        dir: &Path,
        config: &ModelConfig,
    ) -> Result<(Self, [u8; 32]), CheckpointError> {
        let mut checkpoint = Checkpoint::open(dir)?;
        let name = "model.embed_tokens.weight";
        let shape = [config.vocab_size, config.hidden];
        let (embedding, lm_head) = if config.tie_word_embeddings {
            (
                Embedding::Tied,
                read_matrix(
                    &mut checkpoint,
                    &[(name.to_owned(), config.vocab_size)],
                    config.hidden,
                )?,
            )
        } else {
            checkpoint.check(name, &shape)?;
            let mut rows = Vec::with_capacity(config.vocab_size * config.hidden);
            checkpoint.read_rows(name, &shape, PANEL, |part| rows.extend_from_slice(part))?;
            let parts = [("lm_head.weight".to_owned(), config.vocab_size)];
            (
                Embedding::Rows(rows),
                read_matrix(&mut checkpoint, &parts, config.hidden)?,
            )
        };
        let layers = (0..config.layers)
            .map(|layer| Layer::load(&mut checkpoint, config, &format!("model.layers.{layer}")))
            .collect::<Result<_, _>>()?;
        let final_norm = checkpoint.read_vector("model.norm.weight", config.hidden)?;
        Ok((
            Self {
                embedding,
                layers,
                final_norm,
                lm_head,
            },
            checkpoint.digest(),
        ))
    }

    /// Bytes in memory, small vectors aside.
    pub(super) fn bytes(&self) -> u64 {
        let embedding = match &self.embedding {
            Embedding::Rows(rows) => size_of_val::<[f32]>(rows) as u64,
            Embedding::Tied => 0,
        };
        let layers = self.layers.iter().flat_map(|layer| {
            [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]
                .map(|linear| linear.matrix.bytes())
        });
        embedding + layers.sum::<u64>() + self.lm_head.bytes()
    }

    /// Writes the embedding of `token`, which is below the vocabulary's size.
    pub(super) fn embed(&self, token: u32, row: &mut [f32]) {
        let token = token as usize;
        match &self.embedding {
            Embedding::Rows(rows) => {
                let width = row.len();
                row.copy_from_slice(&rows[token * width..][..width]);
            }
            Embedding::Tied => self.lm_head.copy_row(token, row),
        }
    }
}

impl Layer {
    fn load(
        checkpoint: &mut Checkpoint,
        config: &ModelConfig,
        prefix: &str,
    ) -> Result<Self, CheckpointError> {
        let queries = config.heads * config.head_dim;
        let keys = config.kv_heads * config.head_dim;
        let linear = |checkpoint: &mut Checkpoint, parts: &[(&str, usize)], inputs, bias| {
            let parts: Vec<(String, usize)> = parts
                .iter()
                .map(|(name, rows)| (format!("{prefix}.{name}"), *rows))
                .collect();
            Linear::load(checkpoint, &parts, inputs, bias)
        };
        let vector = |checkpoint: &mut Checkpoint, name: &str, len| {
            checkpoint.read_vector(&format!("{prefix}.{name}.weight"), len)
        };
        Ok(Self {
            attention_norm: vector(checkpoint, "input_layernorm", config.hidden)?,
            qkv: linear(
                checkpoint,
                &[
                    ("self_attn.q_proj", queries),
                    ("self_attn.k_proj", keys),
                    ("self_attn.v_proj", keys),
                ],
                config.hidden,
                config.qkv_bias,
            )?,
            head_norms: if config.architecture == Architecture::Qwen3 {
                Some((
                    vector(checkpoint, "self_attn.q_norm", config.head_dim)?,
                    vector(checkpoint, "self_attn.k_norm", config.head_dim)?,
                ))
            } else {
                None
            },
            output: linear(
                checkpoint,
                &[("self_attn.o_proj", config.hidden)],
                queries,
                config.o_bias,
            )?,
            mlp_norm: vector(checkpoint, "post_attention_layernorm", config.hidden)?,
            gate_up: linear(
                checkpoint,
                &[
                    ("mlp.gate_proj", config.intermediate),
                    ("mlp.up_proj", config.intermediate),
                ],
                config.hidden,
                config.mlp_bias,
            )?,
            down: linear(
                checkpoint,
                &[("mlp.down_proj", config.hidden)],
                config.intermediate,
                config.mlp_bias,
            )?,
        })
    }
}

impl Linear {
    /// Stacks the outputs of `parts`, given as name prefix and rows.
    fn load(
        checkpoint: &mut Checkpoint,
        parts: &[(String, usize)],
        inputs: usize,
        bias: bool,
    ) -> Result<Self, CheckpointError> {
        let weights: Vec<(String, usize)> = parts
            .iter()
            .map(|(name, rows)| (format!("{name}.weight"), *rows))
            .collect();
        let matrix = read_matrix(checkpoint, &weights, inputs)?;
        let mut stacked = Vec::new();
        if bias {
            for (name, rows) in parts {
                stacked.extend(checkpoint.read_vector(&format!("{name}.bias"), *rows)?);
            }
        }
        Ok(Self {
            matrix,
            bias: bias.then_some(stacked),
        })
    }
}

fn read_matrix(
    checkpoint: &mut Checkpoint,
    parts: &[(String, usize)],
    inputs: usize,
) -> Result<PackedMatrix, CheckpointError> {
    // Shapes are checked before the memory is taken: the config alone must not
    // make the engine allocate.
    for (name, rows) in parts {
        checkpoint.check(name, &[*rows, inputs])?;
    }
    let outputs = parts.iter().map(|(_, rows)| rows).sum();
    let mut matrix = PackedMatrix::new(outputs, inputs);
    for (name, rows) in parts {
        // One panel's rows at a time stay in cache while they are transposed.
        checkpoint.read_rows(name, &[*rows, inputs], PANEL, |part| matrix.push_rows(part))?;
    }
    Ok(matrix)
}
