//! What 8 bits a value lose, by which values share a step.

use super::plane::{Plane, Shape};
use crate::quality::reader::Kv;

/// Tokens of a page.
const PAGE: usize = 16;
/// Channels of a group.
const GROUP: usize = 32;

/// Sums of squares: of values, and of errors by rule.
#[derive(Clone, Debug, Default)]
pub(super) struct Rounding {
    values: f64,
    errors: [f64; 3],
}

impl Rounding {
    /// Adds the whole pages of a context, the token at position 0 left out.
    pub(super) fn add(&mut self, shape: Shape, kv: &Kv, layer: usize, plane: Plane) {
        let rows: Vec<Vec<&[f32]>> = (1..kv.tokens)
            .map(|token| shape.heads(kv, layer, plane, token).collect())
            .collect();
        for page in rows.chunks_exact(PAGE) {
            for head in 0..shape.kv_heads {
                for row in page {
                    self.values += row[head].iter().map(|x| square(*x)).sum::<f64>();
                    self.errors[0] += error(row[head].iter().copied());
                    let groups = row[head].chunks(GROUP);
                    self.errors[2] += groups.map(|it| error(it.iter().copied())).sum::<f64>();
                }
                for channel in 0..shape.head_dim {
                    self.errors[1] += error(page.iter().map(|row| row[head][channel]));
                }
            }
        }
    }

    /// By rule.
    pub(super) fn errors(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let of_values = |error: f64| (error / self.values).sqrt();
        ["token", "channel", "group"]
            .into_iter()
            .zip(self.errors.map(of_values))
    }
}

/// Sum of squared errors of values that share a step.
fn error(values: impl Iterator<Item = f32> + Clone) -> f64 {
    let largest = values.clone().fold(0.0, |most: f32, x| most.max(x.abs()));
    let step = (largest / 127.0).max(f32::MIN_POSITIVE);
    values
        .map(|x| square((x / step).round_ties_even() * step - x))
        .sum()
}

fn square(x: f32) -> f64 {
    f64::from(x).powi(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvstats::plane::synthetic;

    /// One channel a hundred times as large as all others: tokens pay for it, channels do not, and
    /// of two groups one does.
    #[test]
    fn an_outlier_costs_who_shares_its_step() {
        let shape = Shape {
            layers: 1,
            kv_heads: 2,
            head_dim: 64,
        };
        let kv = synthetic(shape, 33, |_, head, token, d| {
            let small = ((token * 31 + d * 17 + head) % 97) as f32 / 97.0 - 0.5;
            if d == 40 { 100.0 * small } else { small }
        });
        let mut rounding = Rounding::default();
        rounding.add(shape, &kv, 0, Plane::K);
        let [token, channel, group] = rounding.errors;
        assert!(channel < group / 4.0, "{channel} {group}");
        assert!((1.8..2.2).contains(&(token / group)), "{token} {group}");
        // Of a uniform step, a twelfth of its square is lost.
        let even: Vec<f32> = (0u16..4096).map(|at| f32::from(at) / 4096.0).collect();
        let step = even[4095] / 127.0;
        let expected = f64::from(step).powi(2) / 12.0 * 4096.0;
        assert!((error(even.iter().copied()) / expected - 1.0).abs() < 0.02);
    }
}
