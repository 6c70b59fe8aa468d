//! A model in memory, and running it.
//!
//! [`Model`] is weights and config, immutable and shared. [`Model::forward`]
//! runs one batch of [`Step`]s over the pages of a [`KvPool`]; prompts, parts of
//! prompts and single decoded tokens mix freely.
//!
//! Not here: which steps to run, sampling, sharing of pages.

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointError;
use crate::config::{ConfigError, ModelConfig};
use crate::kv::KvPool;
use crate::rope::Frequencies;

mod foresee;
mod forward;
mod rows;
mod step;
#[cfg(test)]
mod tests;
mod weights;

pub use foresee::NextLayer;
pub use forward::{ForwardError, Logits, Scratch};
pub(crate) use rows::{Rows, check};
pub use step::{BeforeLayer, Fate, LogitsWanted, Pages, Positions, Step};

/// Weights and config of one model.
pub struct Model {
    config: ModelConfig,
    weights: weights::Weights,
    weights_digest: [u8; 32],
    frequencies: Frequencies,
}

impl Model {
    /// Reads `config.json` and the safetensors checkpoint in `dir`, converting
    /// weights to f32 and to the layout that the kernels want.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; nothing of the model is kept then.
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        let config = read_config(dir)?;
        let (weights, weights_digest) = weights::Weights::load(dir, &config)?;
        let frequencies = config.rope.frequencies(config.head_dim);
        Ok(Self {
            config,
            weights,
            weights_digest,
            frequencies,
        })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How keys and queries turn with their positions.
    pub(crate) fn frequencies(&self) -> &Frequencies {
        &self.frequencies
    }

    /// Bytes that weights take in memory.
    pub fn weights_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// BLAKE3 over name, element type, shape and data of all tensors that the
    /// model uses, as stored. The same for every way of sharding them.
    pub fn weights_digest(&self) -> [u8; 32] {
        self.weights_digest
    }

    /// The rows of a layer's output projection, `[hidden][heads · head_dim]`: what attention
    /// adds to the residual stream is their products with what the heads attended to.
    ///
    /// # Panics
    ///
    /// When the model has no such layer.
    pub fn output_projection(&self, layer: usize) -> Vec<f32> {
        let matrix = &self.weights.layers[layer].output.matrix;
        let width = self.config.heads * self.config.head_dim;
        let mut rows = vec![0.0; self.config.hidden * width];
        for (output, row) in rows.chunks_exact_mut(width).enumerate() {
            matrix.copy_row(output, row);
        }
        rows
    }

    /// Runs all `steps` as one batch and writes their K and V into the pages.
    ///
    /// For each layer, `before_layer` is called, then K and V of the new tokens are
    /// written, then attention reads the pages: so a caller may land fetched K and V of
    /// that layer from there, those of positions included that it lets the steps compute
    /// anew, and may [end](BeforeLayer::fates) rows that need not be computed any
    /// further, and [choose](BeforeLayer::pages) which pages are attended to. It runs on a thread of the scratch's pool, and other threads wait for it.
    /// If it breaks, the batch ends there without a result.
    ///
    /// Steps must not write to one page twice.
    ///
    /// # Errors
    ///
    /// [`ForwardError::Stopped`] when `before_layer` broke off; any other
    /// [`ForwardError`] when a step does not fit model or pages, and nothing is
    /// written then.
    pub fn forward(
        &self,
        pool: &mut KvPool,
        scratch: &mut Scratch,
        steps: &[Step<'_>],
        before_layer: &mut (dyn FnMut(BeforeLayer<'_>) -> ControlFlow<()> + Send),
    ) -> Result<Logits, ForwardError> {
        forward::run(self, pool, scratch, steps, before_layer)
    }
}

/// What `config.json` in `dir` says.
pub(crate) fn read_config(dir: &Path) -> Result<ModelConfig, LoadError> {
    let path = dir.join("config.json");
    let bytes = std::fs::read(&path).map_err(|source| LoadError::ConfigFile {
        path: path.clone(),
        source,
    })?;
    ModelConfig::from_json(&bytes).map_err(|source| LoadError::Config { path, source })
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("config", &self.config)
            .field("weights_bytes", &self.weights_bytes())
            .finish_non_exhaustive()
    }
}

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// `config.json` cannot be read.
    #[error("{}: cannot be read", .path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The config is wrong, or of a model that the engine does not run.
    #[error("{}: not a model that the engine runs", .path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field and the reason.
        #[source]
        source: ConfigError,
    },
    /// The weights cannot be read, or are not those that the config implies.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}
