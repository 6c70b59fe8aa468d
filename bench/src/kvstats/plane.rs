//! K or V of one layer as a matrix.

use std::ops::Range;

use nalgebra::DMatrix;

use crate::quality::reader::Kv;

/// Which half of a layer's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plane {
    K,
    V,
}

/// Sizes of one token's K, and of its V.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl Shape {
    /// Values of one token's K in one layer.
    pub(crate) fn channels(self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The heads of one token, in order.
    pub(super) fn heads(
        self,
        kv: &Kv,
        layer: usize,
        plane: Plane,
        token: usize,
    ) -> impl Iterator<Item = &[f32]> {
        let first = plane as usize * self.kv_heads;
        (first..first + self.kv_heads).map(move |head| {
            &kv.layers[layer][(head * kv.tokens + token) * self.head_dim..][..self.head_dim]
        })
    }

    /// `[channel, token]`, channels of one token adjacent in memory.
    pub(super) fn matrix(
        self,
        kv: &Kv,
        layer: usize,
        plane: Plane,
        tokens: Range<usize>,
    ) -> DMatrix<f64> {
        let columns = tokens.len();
        let values = tokens
            .flat_map(|token| self.heads(kv, layer, plane, token))
            .flatten()
            .map(|&value| f64::from(value));
        DMatrix::from_iterator(self.channels(), columns, values)
    }

    /// Euclidean length of every token's K, or V.
    pub(super) fn norms(self, kv: &Kv, layer: usize, plane: Plane) -> Vec<f64> {
        (0..kv.tokens)
            .map(|token| {
                let values = self.heads(kv, layer, plane, token).flatten();
                values.map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
            })
            .collect()
    }
}

/// K and V of one layer whose value at (plane, head, token, dimension) is `of` these.
#[cfg(test)]
pub(super) fn synthetic(
    shape: Shape,
    tokens: usize,
    of: impl Fn(Plane, usize, usize, usize) -> f32,
) -> Kv {
    let mut values = Vec::new();
    for plane in [Plane::K, Plane::V] {
        for head in 0..shape.kv_heads {
            for token in 0..tokens {
                values.extend((0..shape.head_dim).map(|d| of(plane, head, token, d)));
            }
        }
    }
    Kv {
        tokens,
        layers: vec![values; shape.layers],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_has_channels_of_all_heads_and_only_the_tokens_asked_for() {
        let shape = Shape {
            layers: 1,
            kv_heads: 2,
            head_dim: 3,
        };
        let kv = synthetic(shape, 4, |plane, head, token, d| {
            [0.0, 1000.0][plane as usize] + (100 * head + 10 * token + d) as f32
        });
        let values = shape.matrix(&kv, 0, Plane::V, 1..3);
        assert_eq!(values.shape(), (6, 2));
        let expected = [1010.0, 1011.0, 1012.0, 1110.0, 1111.0, 1112.0];
        assert_eq!(values.column(0).as_slice(), expected);
        assert_eq!(shape.norms(&kv, 0, Plane::K)[0], {
            let squares = [1.0, 4.0, 1e4, 101.0 * 101.0, 102.0 * 102.0];
            squares.iter().sum::<f64>().sqrt()
        });
    }
}
