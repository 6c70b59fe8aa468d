use super::*;
use proptest::prelude::*;

fn params(temperature: f32, top_k: Option<usize>, top_p: f32) -> SamplingParams {
    SamplingParams::new(temperature, top_k, top_p, Some(7)).unwrap()
}

/// How often each token was chosen in `draws` draws.
fn counts(params: SamplingParams, logits: &[f32], draws: usize) -> Vec<usize> {
    let mut sampler = Sampler::new(params, 0);
    let mut counts = vec![0; logits.len()];
    for _ in 0..draws {
        counts[sampler.sample(logits).unwrap().id as usize] += 1;
    }
    counts
}

/// Pearson's statistic of `counts` against `weights`.
fn chi_square(counts: &[usize], weights: &[f64]) -> f64 {
    let draws: usize = counts.iter().sum();
    let total: f64 = weights.iter().sum();
    counts
        .iter()
        .zip(weights)
        .map(|(&seen, weight)| {
            let expected = draws as f64 * weight / total;
            (seen as f64 - expected).powi(2) / expected
        })
        .sum()
}

#[test]
fn out_of_range_names_the_field() {
    let field = |t, k, p| SamplingParams::new(t, k, p, None).unwrap_err().field();
    assert_eq!(field(-0.1, None, 1.0), "temperature");
    assert_eq!(field(f32::NAN, None, 1.0), "temperature");
    assert_eq!(field(f32::INFINITY, None, 1.0), "temperature");
    assert_eq!(field(1.0, Some(0), 1.0), "top_k");
    assert_eq!(field(1.0, None, 0.0), "top_p");
    assert_eq!(field(1.0, None, 1.1), "top_p");
    assert_eq!(field(1.0, None, f32::NAN), "top_p");
}

#[test]
fn greedy_takes_the_lowest_of_equal_ids() {
    let mut sampler = Sampler::new(SamplingParams::greedy(), 0);
    let choice = sampler.sample(&[0.0, 3.0, 3.0, -1.0]).unwrap();
    assert_eq!(choice.id, 1);
    assert_eq!(sampler.sample(&[-0.0, 0.0]).unwrap().id, 0);
}

#[test]
fn logprob_is_of_the_distribution_before_temperature() {
    let logits = [1.0f32, 2.0, 0.5, -3.0];
    let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    let mut sampler = Sampler::new(params(0.3, Some(2), 0.9), 0);
    for _ in 0..20 {
        let choice = sampler.sample(&logits).unwrap();
        let expected = f64::from(logits[choice.id as usize]) - sum.ln();
        assert!((f64::from(choice.logprob) - expected).abs() < 1e-6);
    }
}

#[test]
fn bad_rows_are_errors() {
    for row in [
        &[][..],
        &[f32::NAN],
        &[0.0, f32::INFINITY],
        &[f32::NEG_INFINITY, 0.0],
    ] {
        for params in [SamplingParams::greedy(), params(1.0, Some(1), 0.5)] {
            assert_eq!(Sampler::new(params, 0).sample(row), Err(NotFinite));
        }
    }
}

#[test]
fn frequencies_follow_the_softmax() {
    let logits = [0.0f32, 1.0, -1.0, 2.0, 0.5];
    for temperature in [0.7f32, 1.0, 1.5] {
        let counts = counts(params(temperature, None, 1.0), &logits, 20_000);
        let weights: Vec<f64> = logits
            .iter()
            .map(|&l| (f64::from(l) / f64::from(temperature)).exp())
            .collect();
        // 4 degrees of freedom: 18.5 is exceeded once in a thousand seeds.
        assert!(chi_square(&counts, &weights) < 18.5, "{counts:?}");
    }
}

#[test]
fn top_k_keeps_exactly_k() {
    let logits = [0.1f32, 0.3, 0.2, 0.3, 0.0];
    let kept = |k| {
        let counts = counts(params(1.0, Some(k), 1.0), &logits, 2_000);
        (0..5).filter(|&id| counts[id] > 0).collect::<Vec<_>>()
    };
    assert_eq!(kept(1), [1], "the lowest of equal ids");
    assert_eq!(kept(2), [1, 3]);
    assert_eq!(kept(3), [1, 2, 3]);
    assert_eq!(kept(5), [0, 1, 2, 3, 4]);
    assert_eq!(kept(500), [0, 1, 2, 3, 4]);
}

#[test]
fn top_p_keeps_the_token_that_crosses() {
    // Probabilities 0.5, 0.25, 0.125, 0.125.
    let logits = [0.25f32, 0.5, 0.125, 0.125].map(f32::ln);
    let kept = |p| {
        let counts = counts(params(1.0, None, p), &logits, 2_000);
        (0..4).filter(|&id| counts[id] > 0).collect::<Vec<_>>()
    };
    assert_eq!(kept(0.01), [1]);
    assert_eq!(kept(0.49), [1]);
    assert_eq!(kept(0.51), [0, 1]);
    assert_eq!(kept(0.74), [0, 1]);
    assert_eq!(kept(0.76), [0, 1, 2]);
    assert_eq!(kept(0.9), [0, 1, 2, 3]);
}

#[test]
fn top_p_is_a_share_of_what_top_k_left() {
    // After top_k 2: 2/3 and 1/3.
    let logits = [0.25f32, 0.5, 0.125, 0.125].map(f32::ln);
    let counts = counts(params(1.0, Some(2), 0.6), &logits, 500);
    assert_eq!(counts, [0, 500, 0, 0]);
}

#[test]
fn one_seed_gives_one_sequence() {
    let logits: Vec<f32> = (0..50).map(|i| ((i * 37) % 50) as f32 / 10.0).collect();
    let draw = |seed, fallback| {
        let params = SamplingParams::new(1.0, Some(40), 0.95, seed).unwrap();
        let mut sampler = Sampler::new(params, fallback);
        let ids = (0..12).map(|_| sampler.sample(&logits).unwrap().id);
        ids.collect::<Vec<_>>()
    };
    assert_eq!(draw(Some(1), 5), draw(Some(1), 6));
    assert_eq!(draw(None, 5), draw(Some(5), 0));
    assert_ne!(draw(Some(1), 0), draw(Some(2), 0));
}

/// A change of this list is a change of every seeded text: never do it lightly.
#[test]
fn seeded_ids_are_the_published_ones() {
    let logits: Vec<f32> = (0..64).map(|i| ((i * 29) % 64) as f32 / 16.0).collect();
    let params = SamplingParams::new(0.8, None, 1.0, Some(42)).unwrap();
    let mut sampler = Sampler::new(params, 0);
    let ids: Vec<u32> = (0..8)
        .map(|_| sampler.sample(&logits).unwrap().id)
        .collect();
    assert_eq!(ids, [41, 57, 24, 35, 15, 11, 17, 48]);
}

#[test]
fn tiny_temperature_is_greedy() {
    let logits = [1.0f32, 1.5, 1.25];
    let counts = counts(params(f32::MIN_POSITIVE, None, 1.0), &logits, 100);
    assert_eq!(counts, [0, 100, 0]);
}

proptest! {
    #[test]
    fn exp_agrees_with_the_platform(x in -708.0f64..=0.0) {
        let ours = exp_nonpositive(x);
        prop_assert!((ours / x.exp() - 1.0).abs() < 2e-15, "{ours} {}", x.exp());
    }

    /// Any finite row and any valid parameters choose a token of the row.
    #[test]
    fn never_panics(
        logits in prop::collection::vec(prop::num::f32::NORMAL | prop::num::f32::ZERO, 1..40),
        temperature in prop_oneof![Just(0.0f32), 1e-30f32..100.0],
        top_k in prop::option::of(1usize..50),
        top_p in 1e-6f32..=1.0,
        seed: u64,
    ) {
        let params = SamplingParams::new(temperature, top_k, top_p, Some(seed)).unwrap();
        let choice = Sampler::new(params, 0).sample(&logits).unwrap();
        prop_assert!((choice.id as usize) < logits.len());
        prop_assert!(choice.logprob <= 0.0);
    }
}
