//! A context whose KV was coded and decoded before questions are asked.
//!
//! What full prefill computed is cut into chunks of [`STORED_TOKENS`], as a store keeps
//! them, keys rotated as they are. Each is encoded and decoded by itself and lands in
//! pages again; tokens behind the last whole chunk, one at least, are computed. Tokens
//! that a method protects are kept as they are, at 16 bits, and count.

use std::sync::Arc;

use anyhow::Context as _;
use kvasir_types::DType;

use super::method::{Caches, Charge};
use super::reader::{Pages, Reader};
use crate::contexts::Contexts;
use crate::corpus::Split;
use crate::methods::{Chunk, Coder, Geometry, Spec, Training};

/// Tokens of a chunk.
pub(crate) const STORED_TOKENS: usize = 256;
/// Contexts that methods with a profile are calibrated on.
pub(crate) const TRAINING_CONTEXTS: u64 = 64;
/// Chunks of the corpus in each.
const TRAINING_CHUNKS: usize = 8;
/// Tokens of each of these, where nothing else is asked for.
pub(crate) const TRAINING_CHUNK_TOKENS: usize = 64;
/// Tokens of a context, and room for more.
pub(crate) const TRAINING_TOKENS: usize = 2 * TRAINING_CHUNKS * TRAINING_CHUNK_TOKENS;

/// A method of coding, ready to use.
pub(crate) struct Coded {
    pub(crate) name: String,
    spec: Spec,
    coder: Box<dyn Coder>,
    geometry: Arc<Geometry>,
}

impl std::fmt::Debug for Coded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coded")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Coded {
    /// Under the name of its specification.
    pub(crate) fn new(
        spec: Spec,
        geometry: &Arc<Geometry>,
        training: &Training,
    ) -> anyhow::Result<Self> {
        let name = spec.name();
        let coder = spec
            .coder(geometry, training)
            .with_context(|| format!("preparing {name}"))?;
        Ok(Self::of(name, spec, coder, geometry))
    }

    /// A coder under a name of its own.
    pub(crate) fn of(
        name: String,
        spec: Spec,
        coder: Box<dyn Coder>,
        geometry: &Arc<Geometry>,
    ) -> Self {
        Self {
            name,
            spec,
            coder,
            geometry: Arc::clone(geometry),
        }
    }

    /// Fills pages with the whole context.
    pub(super) fn prepare(
        &self,
        reader: &mut Reader,
        caches: &Caches,
    ) -> anyhow::Result<(Pages, Charge)> {
        let tokens = caches.tokens();
        let full = caches.full().context("full prefill comes first")?;
        let mut pages = reader.empty(tokens.len())?;
        let chunks = (tokens.len() - 1) / STORED_TOKENS;
        let (mut bytes, mut values) = (0, 0);
        for chunk in 0..chunks {
            let place = chunk * STORED_TOKENS..(chunk + 1) * STORED_TOKENS;
            let mut start = place.start;
            if chunk == 0 && self.coder.protected() > 0 {
                start += self.coder.protected();
                let kept = Chunk::of(
                    &full.tokens_of(self.geometry.head_dim, 0..start),
                    &self.geometry,
                    0,
                    self.spec.dtype(),
                )?;
                bytes += kept.layers.iter().map(Vec::len).sum::<usize>();
                values += kept.values();
                reader.land(&mut pages, &kept.to_kv())?;
            }
            let kv = full.tokens_of(self.geometry.head_dim, start..place.end);
            let chunk = Chunk::of(&kv, &self.geometry, start, self.spec.dtype())?;
            let parts = self.coder.encode(&chunk)?;
            bytes += parts.iter().map(Vec::len).sum::<usize>();
            values += chunk.values();
            let mut decoded = chunk.empty();
            self.coder.decode(&parts, &mut decoded)?;
            reader.land(&mut pages, &decoded.to_kv())?;
        }
        let rest = &tokens[chunks * STORED_TOKENS..];
        reader.extend(&mut pages, rest)?;
        #[expect(clippy::cast_precision_loss, reason = "sizes of a benchmark")]
        let share = |amount: usize, of: usize| amount as f64 / of as f64;
        let charge = Charge {
            recomputed: share(rest.len(), tokens.len()),
            host_bytes: share(bytes, tokens.len()),
            bits: share(8 * bytes, values.max(1)),
        };
        Ok((pages, charge))
    }
}

/// KV of contexts that no question is asked about, to calibrate on.
pub(crate) fn training(
    reader: &mut Reader,
    source: &Contexts,
    geometry: &Geometry,
    chunk_tokens: usize,
) -> anyhow::Result<Training> {
    let bar = crate::progress(TRAINING_CONTEXTS, "calibration");
    let contexts = (0..TRAINING_CONTEXTS).map(|index| {
        let tokens = training_context(source, chunk_tokens, index)?;
        let pages = reader.prefill(&tokens)?;
        let kv = reader.take(&pages, 0..tokens.len())?;
        reader.release(pages)?;
        bar.inc(1);
        Chunk::of(&kv, geometry, 0, DType::F32)
    });
    let contexts: anyhow::Result<Vec<Chunk>> = contexts.collect();
    bar.finish_and_clear();
    Ok(Training::new(contexts?))
}

/// The tokens of one of the [`TRAINING_CONTEXTS`].
pub(crate) fn training_context(
    source: &Contexts,
    chunk_tokens: usize,
    index: u64,
) -> anyhow::Result<Vec<u32>> {
    let tokens = TRAINING_CHUNKS * chunk_tokens;
    source.context(index, tokens, chunk_tokens, Split::Train)
}
