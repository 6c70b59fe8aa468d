//! TurboQuant (Zandieh et al., arXiv 2504.19874), the variant for small errors.
//!
//! A row of a head is divided by its length, which is stored as f16, and turned by a random
//! rotation, after which every coordinate is nearly normal with variance 1 over their
//! number; each is quantised by the Lloyd–Max quantiser of that distribution. The residual
//! sketch of its other variant, which makes inner products unbiased, is left out: it has
//! been seen to cost quality.

use anyhow::ensure;
use half::f16;
use nalgebra::DMatrix;
use rand::{Rng as _, SeedableRng as _};

use super::table::{self, Packer, Unpacker};
use super::{Chunk, Coder, Geometry, Parts};

#[derive(Debug)]
pub(super) struct TurboQuant {
    bits: u32,
    /// Of the standard normal distribution, ascending.
    levels: Vec<f32>,
    /// `[channel, channel]`, orthogonal.
    rotation: DMatrix<f32>,
}

impl TurboQuant {
    pub(super) fn new(bits: u32, geometry: &Geometry) -> Self {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(SEED);
        let mut normal = || {
            let (a, b): (f32, f32) = (rng.random(), rng.random());
            (-2.0 * (1.0 - a).ln()).sqrt() * (std::f32::consts::TAU * b).cos()
        };
        let dim = geometry.head_dim;
        let noise = DMatrix::from_fn(dim, dim, |_, _| normal());
        Self {
            bits,
            levels: lloyd_max(1 << bits),
            rotation: noise.qr().q(),
        }
    }

    /// Rows as columns, all at once.
    fn turned(&self, rows: &[f32], back: bool) -> DMatrix<f32> {
        let dim = self.rotation.nrows();
        let rows = DMatrix::from_column_slice(dim, rows.len() / dim, rows);
        if back {
            self.rotation.tr_mul(&rows)
        } else {
            &self.rotation * rows
        }
    }
}

impl Coder for TurboQuant {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let root = root(self.rotation.nrows());
        let bounds: Vec<f32> = self
            .levels
            .windows(2)
            .map(|pair| f32::midpoint(pair[0], pair[1]))
            .collect();
        let tables = table::tables(chunk).into_iter();
        let parts = tables.map(|table| {
            let turned = self.turned(&table.rows, false);
            let mut norms = Vec::new();
            let mut codes = Packer::default();
            for row in turned.column_iter() {
                let norm = f16::from_f32(row.norm());
                norms.extend(norm.to_le_bytes());
                let by = root / norm.to_f32();
                for value in row.iter() {
                    let level = bounds.iter().filter(|&bound| value * by > *bound).count();
                    codes.put(level.to_le_bytes()[0], self.bits);
                }
            }
            [norms, codes.finish()].concat()
        });
        Ok(parts.collect())
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        let tokens = chunk.layout.tokens() as usize;
        let root = root(self.rotation.nrows());
        let mut tables = table::tables(chunk);
        for (table, part) in tables.iter_mut().zip(parts) {
            ensure!(part.len() >= 2 * tokens, "a norm a row");
            let (norms, codes) = part.split_at(2 * tokens);
            let mut codes = Unpacker::new(codes);
            for (row, &norm) in table
                .rows
                .chunks_exact_mut(table.dim)
                .zip(norms.as_chunks().0)
            {
                let by = f16::from_le_bytes(norm).to_f32() / root;
                for value in row {
                    *value = self.levels[usize::from(codes.take(self.bits))] * by;
                }
            }
            let turned = self.turned(&table.rows, true);
            table.rows.copy_from_slice(turned.as_slice());
        }
        table::fill(chunk, &tables);
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "channels of a head")]
fn root(dim: usize) -> f32 {
    (dim as f32).sqrt()
}

/// The quantiser of a standard normal value with the least mean square error (Max, 1960).
fn lloyd_max(count: u16) -> Vec<f32> {
    // A grid with its weights stands for the distribution. It must be fine: a round moves
    // levels by little, and where no point changes sides, by nothing.
    let grid: Vec<(f64, f64)> = (-100_000..=100_000i32)
        .map(|at| f64::from(at) / 20_000.0)
        .map(|x| (x, (-x * x / 2.0).exp()))
        .collect();
    let mut levels: Vec<f64> = (0..count)
        .map(|at| (f64::from(at) + 0.5) / f64::from(count) * 4.0 - 2.0)
        .collect();
    for _ in 0..ROUNDS {
        let mut sums = vec![(0.0, 0.0); levels.len()];
        let mut nearest = 0;
        for &(x, weight) in &grid {
            while nearest + 1 < levels.len()
                && x > f64::midpoint(levels[nearest], levels[nearest + 1])
            {
                nearest += 1;
            }
            sums[nearest].0 += weight * x;
            sums[nearest].1 += weight;
        }
        for (level, (sum, weight)) in levels.iter_mut().zip(sums) {
            *level = sum / weight;
        }
    }
    #[expect(clippy::cast_possible_truncation, reason = "rounded to f32")]
    levels.into_iter().map(|level| level as f32).collect()
}

const SEED: u64 = 0x7475_7262;
const ROUNDS: usize = 500;

#[cfg(test)]
mod tests {
    use super::*;

    /// Table I of Max (1960), within what the grid tells apart.
    #[test]
    fn levels_are_those_of_max() {
        let four = lloyd_max(4);
        assert!((four[3] - 1.510).abs() < 2e-3 && (four[2] - 0.4528).abs() < 2e-3);
        let eight = lloyd_max(8);
        assert!((eight[7] - 2.152).abs() < 2e-3 && (eight[4] - 0.2451).abs() < 2e-3);
    }
}
