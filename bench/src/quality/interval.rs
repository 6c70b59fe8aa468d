//! Bootstrap intervals over contexts.
//!
//! Questions over one context share its KV and are not independent: whole
//! contexts are drawn (Efron and Tibshirani, 1993, ch. 8), and both methods of a
//! difference are seen on the same draws.

use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

const DRAWS: usize = 1000;
/// Share of draws below, and above, an interval of 95 %.
const TAIL: f64 = 0.025;

/// A mean and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    pub(crate) value: f64,
    /// Ends of the interval. `None` when there is one context only, which says
    /// nothing about others.
    pub(crate) interval: Option<(f64, f64)>,
}

/// Mean over all values, drawn by context: `[context][value]`. For a paired
/// difference, pass the differences. `None` without any value.
pub(crate) fn estimate(contexts: &[Vec<f64>], seed: u64) -> Option<Estimate> {
    let groups: Vec<(f64, f64)> = contexts
        .iter()
        .filter(|values| !values.is_empty())
        .map(|values| (values.iter().sum(), count(values.len())))
        .collect();
    if groups.is_empty() {
        return None;
    }
    let mean = |groups: &mut dyn Iterator<Item = (f64, f64)>| {
        let (sum, count) = groups.fold((0.0, 0.0), |(s, c), (sum, count)| (s + sum, c + count));
        sum / count
    };
    let value = mean(&mut groups.iter().copied());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut draws: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let mut drawn = (0..groups.len()).map(|_| groups[below(&mut rng, groups.len())]);
            mean(&mut drawn)
        })
        .collect();
    draws.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rank within the draws"
    )]
    let tail = (count(DRAWS) * TAIL) as usize;
    let interval = (draws[tail], draws[DRAWS - 1 - tail]);
    Some(Estimate {
        value,
        interval: (groups.len() > 1).then_some(interval),
    })
}

#[expect(clippy::cast_possible_truncation, reason = "a value below `bound`")]
fn below(rng: &mut ChaCha8Rng, bound: usize) -> usize {
    ((u128::from(rng.next_u64()) * bound as u128) >> 64) as usize
}

#[expect(clippy::cast_precision_loss, reason = "counts of a benchmark")]
fn count(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_has_no_width() {
        let contexts = vec![vec![0.5, 0.5], vec![0.5]];
        let found = estimate(&contexts, 1).unwrap();
        assert_eq!((found.value, found.interval), (0.5, Some((0.5, 0.5))));
        assert_eq!(estimate(&[vec![0.5]], 1).unwrap().interval, None);
    }

    #[test]
    fn the_interval_covers_the_mean_and_knows_that_groups_repeat() {
        // 50 groups of ten equal values are 50 observations, not 500.
        let grouped: Vec<Vec<f64>> = (0..50).map(|i| vec![f64::from(i % 2); 10]).collect();
        let single: Vec<Vec<f64>> = (0..500).map(|i| vec![f64::from(i % 2)]).collect();
        let (grouped, single) = (
            estimate(&grouped, 1).unwrap(),
            estimate(&single, 1).unwrap(),
        );
        let (lo, hi) = grouped.interval.unwrap();
        let width = single.interval.map(|(lo, hi)| hi - lo).unwrap();
        assert!(lo < 0.5 && 0.5 < hi);
        assert!(hi - lo > 2.0 * width);
        assert_eq!(estimate(&[vec![]], 1), None);
    }
}
