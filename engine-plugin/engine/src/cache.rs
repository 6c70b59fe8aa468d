//! The engine's pages as the cache plugin sees them, and what its KV is.

mod turns;

use kvasir_plugin::{BackendError, EngineBackend, KeyRotation, Pairing, Placement};
use kvasir_types::{DType, KvLayout, LayerIdx, LayoutError, ModelIdentity, Namespace, Planes};

use crate::config::ModelConfig;
use crate::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvPool};
use crate::model::Model;

pub use turns::{MOST_TOKENS, Turns};

/// Geometry of the chunks a model exchanges.
///
/// # Errors
/// A model too large for the layout's fields, or a chunk above its size limit.
pub fn layout(
    config: &ModelConfig,
    dtype: KvDtype,
    chunk_tokens: u32,
) -> Result<KvLayout, LayoutError> {
    let narrow =
        |value: usize| u16::try_from(value).map_err(|_| LayoutError::TooLarge(value as u128));
    let dtype = match dtype {
        KvDtype::F32 => DType::F32,
        KvDtype::Bf16 => DType::Bf16,
        KvDtype::F16 => DType::F16,
    };
    KvLayout::new(
        narrow(config.layers)?,
        narrow(config.kv_heads)?,
        Planes::symmetric(narrow(config.head_dim)?),
        chunk_tokens,
        dtype,
    )
}

/// What this model's KV is: every configuration value, the weights' digest, the
/// layout, the tokenizer, and the tenant.
pub fn namespace(
    model: &Model,
    layout: KvLayout,
    tokenizer: &[u8; 32],
    tenant_salt: &[u8],
) -> Namespace {
    let digest: String = model
        .weights_digest()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let identity = ModelIdentity {
        architecture: model.config().canonical(),
        weights: digest,
        rope: model.config().rope.canonical(),
    };
    Namespace::new(&identity, None, layout, tokenizer, tenant_salt)
}

/// How this model turns its keys.
pub fn rotation(config: &ModelConfig) -> KeyRotation {
    let frequencies = config.rope.frequencies(config.head_dim);
    KeyRotation {
        pairing: Pairing::Halves,
        factor: frequencies.attention_factor,
        start: 0,
        frequencies: frequencies.radians,
    }
}

/// A [`KvPool`] that exchanges chunks of a fixed layout.
#[derive(Debug)]
pub struct PoolBackend<'a> {
    pool: &'a mut KvPool,
    layout: &'a KvLayout,
    turns: Option<&'a mut Turns>,
}

impl<'a> PoolBackend<'a> {
    /// `pool` must have the geometry and element type of `layout`.
    pub fn new(pool: &'a mut KvPool, layout: &'a KvLayout) -> Self {
        Self {
            pool,
            layout,
            turns: None,
        }
    }

    /// Lands content chunks too. `turns` must be of the pool's model; it lasts longer than
    /// this, so that what it knows of a chunk serves all of its layers.
    #[must_use]
    pub fn with_turns(mut self, turns: &'a mut Turns) -> Self {
        self.turns = Some(turns);
        self
    }
}

/// The tokens of a chunk of a sequence, of which a payload of so many bytes is one layer.
pub(crate) fn check_chunk(
    layout: &KvLayout,
    pages: &[BlockId],
    chunk: usize,
    layer: LayerIdx,
    length: usize,
) -> Result<(usize, usize), BackendError> {
    let tokens = layout.tokens() as usize;
    if layer.0 >= layout.layers() {
        return Err(BackendError::NoSuchLayer(layer));
    }
    if length != layout.layer_bytes() {
        return Err(BackendError::WrongLength {
            expected: layout.layer_bytes(),
            found: length,
        });
    }
    let outside = BackendError::OutsidePages { chunk };
    let first = chunk.checked_mul(tokens).ok_or(outside)?;
    let end = first.checked_add(tokens).ok_or(outside)?;
    if end > pages.len() * BLOCK_TOKENS {
        return Err(outside);
    }
    Ok((first, tokens))
}

/// That a content chunk lies inside pages; `layer_bytes` gives those of a layer of tokens.
pub(crate) fn check_moved(
    layout: &KvLayout,
    layer_bytes: impl FnOnce(usize) -> usize,
    pages: &[BlockId],
    at: Placement,
    layer: LayerIdx,
    length: usize,
) -> Result<(), BackendError> {
    if layer.0 >= layout.layers() {
        return Err(BackendError::NoSuchLayer(layer));
    }
    let end = at.first.saturating_add(at.tokens);
    if end > pages.len() * BLOCK_TOKENS {
        let first = at.first;
        return Err(BackendError::PlacedOutsidePages { first, end });
    }
    // The pages hold that many tokens, so this is far from overflowing.
    let expected = layer_bytes(at.tokens);
    if length != expected {
        return Err(BackendError::WrongLength {
            expected,
            found: length,
        });
    }
    Ok(())
}

impl EngineBackend for PoolBackend<'_> {
    type Pages = [BlockId];

    fn layout(&self) -> &KvLayout {
        self.layout
    }

    fn write_layer(
        &mut self,
        pages: &[BlockId],
        chunk: usize,
        layer: LayerIdx,
        payload: &[u8],
    ) -> Result<(), BackendError> {
        let (first, tokens) = check_chunk(self.layout, pages, chunk, layer, payload.len())?;
        self.pool
            .write_layer(pages, first, tokens, layer.0.into(), payload)
            .map_err(|_| BackendError::OutsidePages { chunk })
    }

    fn write_moved(
        &mut self,
        pages: &[BlockId],
        at: Placement,
        layer: LayerIdx,
        payload: &[u8],
    ) -> Result<(), BackendError> {
        let layer_bytes = |tokens| self.pool.layer_bytes(tokens);
        check_moved(self.layout, layer_bytes, pages, at, layer, payload.len())?;
        let payload = match &mut self.turns {
            _ if at.is_unmoved() => payload,
            Some(turns) => turns.turn(self.pool.dtype(), at, payload),
            None => return Err(BackendError::NoRotation),
        };
        self.pool
            .write_layer(pages, at.first, at.tokens, layer.0.into(), payload)
            .map_err(|_| BackendError::PlacedOutsidePages {
                first: at.first,
                end: at.range().end,
            })
    }

    fn read_layer(
        &self,
        pages: &[BlockId],
        chunk: usize,
        layer: LayerIdx,
        payload: &mut [u8],
    ) -> Result<(), BackendError> {
        let (first, tokens) = check_chunk(self.layout, pages, chunk, layer, payload.len())?;
        self.pool
            .read_layer(pages, first, tokens, layer.0.into(), payload)
            .map_err(|_| BackendError::OutsidePages { chunk })
    }
}
