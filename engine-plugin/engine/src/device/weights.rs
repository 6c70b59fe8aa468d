//! Weights by layer, as kernels and products read them.

use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};

use super::machine::{Machine, Memory};
use super::{DeviceError, DeviceLoadError};
use crate::checkpoint::Checkpoint;
use crate::config::{Architecture, ModelConfig};
use crate::kv::KvDtype;

/// All weights of a model. Vectors are f32.
pub(super) struct DeviceWeights {
    /// `[vocab][hidden]`; that of the output, where they are tied.
    pub(super) embedding: Option<Memory>,
    pub(super) layers: Vec<DeviceLayer>,
    pub(super) final_norm: Memory,
    /// `[vocab][hidden]`.
    pub(super) lm_head: Memory,
    /// Of the rotation, per position.
    pub(super) radians: Memory,
    pub(super) attention_factor: f32,
}

/// One transformer layer.
pub(super) struct DeviceLayer {
    pub(super) attention_norm: Memory,
    /// Q, K and V, in this order.
    pub(super) qkv: DeviceLinear,
    /// RMSNorm of each head of Q and of K.
    pub(super) head_norms: Option<(Memory, Memory)>,
    pub(super) output: DeviceLinear,
    pub(super) mlp_norm: Memory,
    /// Gate, then up.
    pub(super) gate_up: DeviceLinear,
    pub(super) down: DeviceLinear,
}

/// `[outputs][inputs]`, perhaps with a bias.
pub(super) struct DeviceLinear {
    pub(super) matrix: Memory,
    pub(super) bias: Option<Memory>,
}

impl DeviceWeights {
    /// Bytes of all matrices.
    pub(super) fn bytes(config: &ModelConfig, dtype: KvDtype) -> u64 {
        let attended = config.heads * config.head_dim;
        let of_layer = config.hidden * (config.qkv_width() + attended + 3 * config.intermediate);
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        let elements = config.layers as u64 * of_layer as u64
            + tables * config.vocab_size as u64 * config.hidden as u64;
        elements * dtype.bytes() as u64
    }

    /// Reads all weights, in the order that the CPU's engine does; also gives their digest.
    pub(super) fn load(
        machine: &Arc<Machine>,
        dir: &Path,
        config: &ModelConfig,
        dtype: KvDtype,
    ) -> Result<(Self, [u8; 32]), DeviceLoadError> {
        let checkpoint = Checkpoint::open(dir)?;
        let mut loader = Loader {
            machine,
            checkpoint,
            dtype,
        };
        let vocab = config.vocab_size;
        let table = [("model.embed_tokens.weight".to_owned(), vocab)];
        let table = loader.matrix(&table, config.hidden)?;
        let (embedding, lm_head) = if config.tie_word_embeddings {
            (None, table)
        } else {
            let head = [("lm_head.weight".to_owned(), vocab)];
            (Some(table), loader.matrix(&head, config.hidden)?)
        };
        let layers = (0..config.layers)
            .map(|layer| loader.layer(config, &format!("model.layers.{layer}")))
            .collect::<Result<_, _>>()?;
        let final_norm = loader.vector("model.norm.weight", config.hidden)?;
        let frequencies = config.rope.frequencies(config.head_dim);
        let weights = Self {
            embedding,
            layers,
            final_norm,
            lm_head,
            radians: put(machine, &frequencies.radians)?,
            attention_factor: frequencies.attention_factor,
        };
        Ok((weights, loader.checkpoint.digest()))
    }
}

struct Loader<'a> {
    machine: &'a Arc<Machine>,
    checkpoint: Checkpoint,
    dtype: KvDtype,
}

impl Loader<'_> {
    fn layer(
        &mut self,
        config: &ModelConfig,
        prefix: &str,
    ) -> Result<DeviceLayer, DeviceLoadError> {
        let queries = config.heads * config.head_dim;
        let keys = config.kv_heads * config.head_dim;
        let name = |name: &str| format!("{prefix}.{name}");
        let qkv = [
            (name("self_attn.q_proj"), queries),
            (name("self_attn.k_proj"), keys),
            (name("self_attn.v_proj"), keys),
        ];
        let gate_up = [
            (name("mlp.gate_proj"), config.intermediate),
            (name("mlp.up_proj"), config.intermediate),
        ];
        let output = [(name("self_attn.o_proj"), config.hidden)];
        let down = [(name("mlp.down_proj"), config.hidden)];
        let norm = |norm: &str| format!("{prefix}.{norm}.weight");
        Ok(DeviceLayer {
            attention_norm: self.vector(&norm("input_layernorm"), config.hidden)?,
            qkv: self.linear(&qkv, config.hidden, config.qkv_bias)?,
            head_norms: if config.architecture == Architecture::Qwen3 {
                Some((
                    self.vector(&norm("self_attn.q_norm"), config.head_dim)?,
                    self.vector(&norm("self_attn.k_norm"), config.head_dim)?,
                ))
            } else {
                None
            },
            output: self.linear(&output, queries, config.o_bias)?,
            mlp_norm: self.vector(&norm("post_attention_layernorm"), config.hidden)?,
            gate_up: self.linear(&gate_up, config.hidden, config.mlp_bias)?,
            down: self.linear(&down, config.intermediate, config.mlp_bias)?,
        })
    }

    /// Stacks the outputs of `parts`, given as name prefix and rows.
    fn linear(
        &mut self,
        parts: &[(String, usize)],
        inputs: usize,
        bias: bool,
    ) -> Result<DeviceLinear, DeviceLoadError> {
        let weights: Vec<(String, usize)> = parts
            .iter()
            .map(|(name, rows)| (format!("{name}.weight"), *rows))
            .collect();
        let matrix = self.matrix(&weights, inputs)?;
        let mut stacked = Vec::new();
        if bias {
            for (name, rows) in parts {
                let name = format!("{name}.bias");
                stacked.extend(self.checkpoint.read_vector(&name, *rows)?);
            }
        }
        let bias = if bias {
            Some(put(self.machine, &stacked)?)
        } else {
            None
        };
        Ok(DeviceLinear { matrix, bias })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Memory, DeviceLoadError> {
        Ok(put(self.machine, &self.checkpoint.read_vector(name, len)?)?)
    }

    fn matrix(
        &mut self,
        parts: &[(String, usize)],
        inputs: usize,
    ) -> Result<Memory, DeviceLoadError> {
        // Shapes are checked before the memory is taken: the config alone must not make the
        // engine allocate.
        for (name, rows) in parts {
            self.checkpoint.check(name, &[*rows, inputs])?;
        }
        let outputs: usize = parts.iter().map(|(_, rows)| rows).sum();
        let matrix = self.machine.alloc(outputs * inputs * self.dtype.bytes())?;
        let mut at = 0;
        let mut failed = Ok(());
        let (machine, dtype) = (self.machine, self.dtype);
        for (name, rows) in parts {
            let shape = [*rows, inputs];
            let rows_per_call = (CALL_ELEMENTS / inputs).max(1);
            self.checkpoint
                .read_rows(name, &shape, rows_per_call, |part| {
                    if failed.is_ok() {
                        let part = narrowed(part, dtype);
                        failed = machine.upload(&matrix, at, &part);
                        at += part.len();
                    }
                })?;
        }
        failed?;
        Ok(matrix)
    }
}

/// Elements that are read and sent at once.
const CALL_ELEMENTS: usize = 1 << 20;

fn put(machine: &Machine, values: &[f32]) -> Result<Memory, DeviceError> {
    let memory = machine.alloc(size_of_val(values))?;
    machine.upload(&memory, 0, bytemuck::cast_slice(values))?;
    Ok(memory)
}

/// Rounded to an element type.
fn narrowed(values: &[f32], dtype: KvDtype) -> Vec<u8> {
    let values = values.iter();
    match dtype {
        KvDtype::F32 => values.flat_map(|value| value.to_le_bytes()).collect(),
        KvDtype::Bf16 => values
            .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
            .collect(),
        KvDtype::F16 => values
            .flat_map(|&value| f16::from_f32(value).to_le_bytes())
            .collect(),
    }
}
