//! Tokens whose K or V is far from the usual length.
//!
//! Attention sinks tend to have short values and keys unlike the others (Xiao et
//! al., 2024); a codec stores them apart. Without queries only lengths are known.

use super::count;
use crate::report::median;

/// Lengths relative to the median token of their context, summed over contexts.
#[derive(Clone, Debug, Default)]
pub(super) struct Sinks {
    contexts: usize,
    first: f64,
    chunks: Vec<f64>,
}

impl Sinks {
    /// Adds one context: lengths of all tokens, and where its chunks start.
    pub(super) fn add(&mut self, norms: &[f64], starts: &[usize]) {
        let usual = median(&mut norms.to_vec());
        if usual > 0.0 {
            self.contexts += 1;
            self.first += norms[0] / usual;
            self.chunks.resize(starts.len(), 0.0);
            for (chunk, &start) in self.chunks.iter_mut().zip(starts) {
                *chunk += norms[start] / usual;
            }
        }
    }

    /// Of the token at position 0.
    pub(super) fn first(&self) -> f64 {
        self.first / count(self.contexts)
    }

    /// Of the first token of a chunk, by number of the chunk.
    pub(super) fn chunks(&self) -> Vec<f64> {
        let contexts = count(self.contexts);
        self.chunks.iter().map(|sum| sum / contexts).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::plane::{Plane, Shape, synthetic};
    use super::*;

    #[test]
    fn planted_sinks_are_found_in_their_plane() {
        let shape = Shape {
            layers: 1,
            kv_heads: 2,
            head_dim: 4,
        };
        let kv = synthetic(shape, 9, |plane, _, token, _| match (plane, token) {
            (Plane::K, 0) => 6.0,
            (Plane::V, 0) => 0.5,
            (Plane::K, 5) => -4.0,
            _ => 2.0,
        });
        let (mut keys, mut values) = (Sinks::default(), Sinks::default());
        for _ in 0..2 {
            keys.add(&shape.norms(&kv, 0, Plane::K), &[1, 5]);
            values.add(&shape.norms(&kv, 0, Plane::V), &[1, 5]);
        }
        assert_eq!((keys.first(), values.first()), (3.0, 0.25));
        assert_eq!(keys.chunks(), [1.0, 2.0]);
        assert_eq!(values.chunks(), [1.0, 1.0]);
    }
}
