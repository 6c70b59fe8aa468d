//! What rows of logits say, and how far they are from one another: for measurements.
//!
//! Not here: the choice of a token that a request gets ([`crate::sampling`]), whose arithmetic
//! is the same on every machine, and which refuses rows that are no numbers.

#![forbid(unsafe_code)]

/// Index of the largest value; the first of equals. 0 of an empty row.
pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    u32::try_from(best).unwrap_or(u32::MAX)
}

/// Logarithm of each token's probability, in nats.
pub fn log_softmax(row: &[f32]) -> Vec<f64> {
    let top = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - top).exp()).sum();
    row.iter().map(|&x| f64::from(x) - top - sum.ln()).collect()
}

/// KL(`reference` ‖ `found`) of two rows, in nats (Kullback and Leibler, 1951).
pub fn kl_divergence(reference: &[f32], found: &[f32]) -> f64 {
    let (reference, found) = (log_softmax(reference), log_softmax(found));
    let terms = reference.iter().zip(&found);
    let sum: f64 = terms.map(|(p, q)| p.exp() * (p - q)).sum();
    // Rounding can take a sum of nearly equal terms just below zero.
    sum.max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest_is_taken() {
        assert_eq!(argmax(&[-3.0, 2.0, 1.0, 2.0]), 1);
        assert_eq!(argmax(&[]), 0);
    }

    #[test]
    fn probabilities_sum_to_one_however_large_the_logits_are() {
        let row = log_softmax(&[1000.0, 1000.0 + 3f32.ln()]);
        assert!((row[0].exp() - 0.25).abs() < 1e-5);
        assert!((row.iter().map(|x| x.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn kl_is_zero_of_equals_and_right_of_a_coin() {
        let (fair, biased) = ([0.0, 0.0], [0.0, 3f32.ln()]);
        assert_eq!(kl_divergence(&fair, &fair), 0.0);
        // KL((1/2, 1/2) ‖ (1/4, 3/4)) = ln(2 / √3), and not that of the other direction.
        let expected = (2.0 / 3f64.sqrt()).ln();
        assert!((kl_divergence(&fair, &biased) - expected).abs() < 1e-6);
    }
}
