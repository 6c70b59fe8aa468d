//! Queries of the next layer, before this one has run.
//!
//! A layer adds little to the residual stream, so what it gets is nearly what the next one will:
//! InfiniGen (OSDI 2024) looks ahead like this, with a part of the weights; here it is all of
//! those of Q.

use std::ops::Range;

use super::weights::Layer;
use crate::config::ModelConfig;
use crate::kernels::{Isa, add_bias, matmul_row, rms_norm, rms_norm_in_place, rotate};

/// The next layer, and the rows that this one is about to attend with.
#[derive(Clone, Copy)]
pub struct NextLayer<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) layer: &'a Layer,
    pub(super) isa: Isa,
    /// `[row][hidden]`.
    pub(super) stream: &'a [f32],
    /// `[row][head_dim]`: cosines, then sines.
    pub(super) angles: &'a [f32],
}

impl std::fmt::Debug for NextLayer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NextLayer").finish_non_exhaustive()
    }
}

impl NextLayer<'_> {
    /// What some rows would ask for, `[row][heads · head_dim]` after RoPE, had this layer
    /// nothing to add. Costs a product with the weights of Q for each row.
    ///
    /// # Panics
    ///
    /// When there are no such rows.
    pub fn queries(&self, rows: Range<usize>) -> Vec<f32> {
        let Self {
            config, layer, isa, ..
        } = *self;
        let (hidden, dim) = (config.hidden, config.head_dim);
        let width = config.heads * dim;
        let mut queries = vec![0.0; rows.len() * width];
        let mut normed = vec![0.0; hidden];
        for (row, queries) in rows.zip(queries.chunks_exact_mut(width)) {
            let stream = &self.stream[row * hidden..][..hidden];
            rms_norm(
                isa,
                stream,
                &layer.attention_norm,
                config.rms_norm_eps,
                &mut normed,
            );
            matmul_row(isa, &layer.qkv.matrix, &normed, queries);
            if let Some(bias) = &layer.qkv.bias {
                add_bias(isa, queries, &bias[..width]);
            }
            let (cos, sin) = self.angles[row * dim..][..dim].split_at(dim / 2);
            for head in queries.chunks_exact_mut(dim) {
                if let Some((weight, _)) = &layer.head_norms {
                    rms_norm_in_place(isa, head, weight, config.rms_norm_eps);
                }
                rotate(isa, head, cos, sin);
            }
        }
        queries
    }
}
