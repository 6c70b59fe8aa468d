//! Undoing rotary position embedding, and doing it again.
//!
//! Keys are cached after RoPE (Su et al., arXiv 2104.09864), which turns each pair of
//! channels by an angle that grows with the position. Without it a channel keeps its mean
//! and its spread over all tokens, and takes fewer bits. Any kind of RoPE is described by
//! the angles per position that it ends up with.

use std::slice::{from_mut, from_ref};

use crate::rans::LANES;
use crate::values::{self, Angles};

/// Which channels of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Channel `i` and channel `i + n`, for `n` pairs: Llama, Qwen, Mistral.
    Halves,
    /// Channels `2 i` and `2 i + 1`: GPT-J, the RoPE part of MLA.
    Neighbours,
}

/// How the keys of some consecutive positions were turned.
///
/// Channels beyond the pairs were not.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    pairing: Pairing,
    pairs: usize,
    /// What the rotation multiplied lengths by: the attention factor of YaRN, else 1.
    factor: f32,
    /// By token and pair.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    /// Of `tokens` tokens from position `start` on, where pair `i` turns by
    /// `frequencies[i]` radians a token and `factor` multiplies lengths.
    pub fn new(
        frequencies: &[f32],
        pairing: Pairing,
        factor: f32,
        start: u64,
        tokens: u32,
    ) -> Self {
        let angle = |token: u32, frequency: f32| {
            #[expect(clippy::cast_precision_loss, reason = "positions are far below 2^53")]
            let position = (start + u64::from(token)) as f64;
            let (sin, cos) = (position * f64::from(frequency)).sin_cos();
            #[expect(clippy::cast_possible_truncation, reason = "rounded to f32")]
            let both = (cos as f32, sin as f32);
            both
        };
        let (cos, sin) = (0..tokens)
            .flat_map(|token| {
                frequencies
                    .iter()
                    .map(move |&frequency| angle(token, frequency))
            })
            .unzip();
        Self {
            pairing,
            pairs: frequencies.len(),
            factor,
            cos,
            sin,
        }
    }

    /// Which channels form pairs.
    pub fn pairing(&self) -> Pairing {
        self.pairing
    }

    /// Channels that take part.
    pub fn channels(&self) -> usize {
        2 * self.pairs
    }

    /// Tokens that it knows the angles of.
    pub fn tokens(&self) -> usize {
        self.cos.len().checked_div(self.pairs).unwrap_or(0)
    }

    /// What lengths are multiplied by.
    pub fn factor(&self) -> f32 {
        self.factor
    }

    /// Cosines, and sines, of the angles: by token and pair.
    pub fn cosines_and_sines(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// The angles from `token` on of the pairs from `pair` on, where channels that are whole
    /// rows of lanes apart form them; else nothing.
    pub(crate) fn angles(&self, token: usize, pair: usize) -> Option<Angles<'_>> {
        let aligned = self.pairing == Pairing::Halves && self.pairs.is_multiple_of(LANES);
        let from = token * self.pairs + pair;
        aligned.then(|| Angles {
            cos: &self.cos[from..],
            sin: &self.sin[from..],
            pairs: self.pairs,
            factor: self.factor,
        })
    }

    /// Turns the key of one head at `token` back.
    pub(crate) fn undo(&self, token: usize, key: &mut [f32]) {
        self.scale(1.0 / self.factor, key);
        // With the two of a pair in each other's place, an angle is the opposite one.
        self.turn(token, key, |a, b, cos, sin| values::turn(b, a, cos, sin));
    }

    /// Turns it again.
    pub(crate) fn redo(&self, token: usize, key: &mut [f32]) {
        self.turn(token, key, values::turn);
        self.scale(self.factor, key);
    }

    fn turn(
        &self,
        token: usize,
        key: &mut [f32],
        turn: impl Fn(&mut [f32], &mut [f32], &[f32], &[f32]),
    ) {
        let place = token * self.pairs..(token + 1) * self.pairs;
        let (cos, sin) = (&self.cos[place.clone()], &self.sin[place]);
        match self.pairing {
            Pairing::Halves => {
                let (first, second) = key.split_at_mut(self.pairs);
                turn(first, &mut second[..self.pairs], cos, sin);
            }
            Pairing::Neighbours => {
                let pairs = key.as_chunks_mut().0.iter_mut();
                for ([a, b], (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
                    turn(from_mut(a), from_mut(b), from_ref(cos), from_ref(sin));
                }
            }
        }
    }

    fn scale(&self, by: f32, key: &mut [f32]) {
        if self.factor.to_bits() != 1f32.to_bits() {
            let turned = key.iter_mut().take(self.channels());
            turned.for_each(|value| *value *= by);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_turned_back_and_again_is_the_same() {
        for pairing in [Pairing::Halves, Pairing::Neighbours] {
            let rotation = Rotation::new(&[1.0, 0.1, 0.003], pairing, 1.3, 1_000_000, 5);
            assert_eq!((rotation.tokens(), rotation.channels()), (5, 6));
            let key: Vec<f32> = (0u8..8).map(|at| 0.5 - f32::from(at)).collect();
            let mut turned = key.clone();
            rotation.undo(3, &mut turned);
            assert_ne!(turned, key);
            assert_eq!(turned[6..], key[6..], "beyond the pairs");
            rotation.redo(3, &mut turned);
            let close = turned.iter().zip(&key).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(close, "{turned:?}");
        }
    }

    #[test]
    fn pairs_turn_by_position_times_frequency() {
        let rotation = Rotation::new(&[0.5], Pairing::Halves, 2.0, 3, 1);
        let mut key = [1.0, 0.0];
        rotation.redo(0, &mut key);
        let expected = [2.0 * 1.5f32.cos(), 2.0 * 1.5f32.sin()];
        assert!((key[0] - expected[0]).abs() < 1e-6 && (key[1] - expected[1]).abs() < 1e-6);
    }
}
