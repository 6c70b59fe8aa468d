//! Keys of content chunks, turned to where the chunks come to lie.

use std::collections::VecDeque;

use half::{bf16, f16};
use kvasir_plugin::Placement;

use crate::config::ModelConfig;
use crate::kernels::{Isa, rotate};
use crate::kv::KvDtype;
use crate::rope::Frequencies;

/// How a model turns its keys, and what that takes for the chunks that are under way.
///
/// Cosines and sines of a token's turn are the same in all layers and heads, and take longer
/// than turning does. They are kept for the placements used last, up to [`MOST_TOKENS`] tokens,
/// each of which takes `4 · head_dim` bytes.
#[derive(Debug)]
pub struct Turns {
    isa: Isa,
    frequencies: Frequencies,
    head_dim: usize,
    /// The one used last at the end.
    known: VecDeque<Turn>,
    /// A layer on its way.
    payload: Vec<u8>,
}

/// One placement: `[token][head_dim / 2]` each.
#[derive(Debug)]
struct Turn {
    at: Placement,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Turns {
    /// Of a model's keys.
    pub fn new(config: &ModelConfig) -> Self {
        Self {
            isa: Isa::detect(),
            frequencies: config.rope.frequencies(config.head_dim),
            head_dim: config.head_dim,
            known: VecDeque::new(),
            payload: Vec::new(),
        }
    }

    /// One layer of a chunk, in canonical order, with its keys turned to where it lies. In
    /// f32, whatever the elements: they are widened, and rounded to nearest.
    ///
    /// `payload` has a whole layer, of as many tokens as the placement.
    pub(crate) fn turn(&mut self, dtype: KvDtype, at: Placement, payload: &[u8]) -> &[u8] {
        self.recall(at);
        self.payload.clear();
        self.payload.extend_from_slice(payload);
        let Some(turn) = self.known.back() else {
            return &self.payload;
        };
        let keys = self.payload.len() / 2;
        let row_bytes = self.head_dim * dtype.bytes();
        let half = self.head_dim / 2;
        let mut row = vec![0.0; self.head_dim];
        let rows = self.payload[..keys].chunks_exact_mut(row_bytes);
        for (index, bytes) in rows.enumerate() {
            let token = index % at.tokens;
            let (cos, sin) = (
                &turn.cos[token * half..][..half],
                &turn.sin[token * half..][..half],
            );
            widen(dtype, bytes, &mut row);
            rotate(self.isa, &mut row, cos, sin);
            narrow(dtype, &row, bytes);
        }
        &self.payload
    }

    /// Makes a placement the last known one.
    fn recall(&mut self, at: Placement) {
        let known = self.known.iter().position(|turn| turn.at == at);
        if let Some(turn) = known.and_then(|index| self.known.remove(index)) {
            self.known.push_back(turn);
            return;
        }
        let tokens = |known: &VecDeque<Turn>| known.iter().map(|it| it.at.tokens).sum::<usize>();
        while tokens(&self.known).saturating_add(at.tokens) > MOST_TOKENS {
            if self.known.pop_front().is_none() {
                break;
            }
        }
        let half = self.head_dim / 2;
        let (mut cos, mut sin) = (vec![0.0; at.tokens * half], vec![0.0; at.tokens * half]);
        let rows = cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half));
        for (token, (cos, sin)) in rows.enumerate() {
            let (from, to) = (at.compiled_at + token, at.first + token);
            self.frequencies.shift(from, to, cos, sin);
        }
        self.known.push_back(Turn { at, cos, sin });
    }
}

fn widen(dtype: KvDtype, bytes: &[u8], row: &mut [f32]) {
    match dtype {
        KvDtype::F32 => {
            for (value, bytes) in row.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        KvDtype::Bf16 => {
            for (value, bytes) in row.iter_mut().zip(bytes.as_chunks().0) {
                *value = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        KvDtype::F16 => {
            for (value, bytes) in row.iter_mut().zip(bytes.as_chunks().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}

fn narrow(dtype: KvDtype, row: &[f32], bytes: &mut [u8]) {
    match dtype {
        KvDtype::F32 => {
            for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(row) {
                *bytes = value.to_le_bytes();
            }
        }
        KvDtype::Bf16 => {
            for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(row) {
                *bytes = bf16::from_f32(*value).to_le_bytes();
            }
        }
        KvDtype::F16 => {
            for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(row) {
                *bytes = f16::from_f32(*value).to_le_bytes();
            }
        }
    }
}

/// Tokens whose turns are kept: those of a long prompt, 16 MiB at 64 elements a head.
pub const MOST_TOKENS: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn turns() -> Turns {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/fixtures/llama2-mha/config.json"
        );
        Turns::new(&ModelConfig::from_json(&std::fs::read(path).unwrap()).unwrap())
    }

    fn placed(first: usize, tokens: usize) -> Placement {
        Placement {
            first,
            compiled_at: 1,
            tokens,
        }
    }

    /// Layers come chunk after chunk: what a chunk takes is still there for its next layer.
    #[test]
    fn a_placement_is_reckoned_once_for_all_layers() {
        let mut turns = turns();
        let places: Vec<_> = (0..20).map(|chunk| placed(10 + chunk * 50, 50)).collect();
        for at in &places {
            turns.recall(*at);
        }
        let reckoned: Vec<_> = turns.known.iter().map(|it| it.cos.as_ptr()).collect();
        for at in &places {
            turns.recall(*at);
        }
        let recalled: Vec<_> = turns.known.iter().map(|it| it.cos.as_ptr()).collect();
        assert_eq!(reckoned, recalled);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut turns = turns();
        for chunk in 0..100 {
            turns.recall(placed(chunk, 1000));
            let kept: usize = turns.known.iter().map(|it| it.at.tokens).sum();
            assert!(kept <= MOST_TOKENS, "{kept}");
        }
        let first = turns.known.front().map(|it| it.at.first);
        assert_eq!(first, Some(100 - MOST_TOKENS / 1000));
        // More than may be kept is turned all the same.
        turns.recall(placed(0, MOST_TOKENS + 1));
        assert_eq!(turns.known.len(), 1);
    }
}
