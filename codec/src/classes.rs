//! The tables of the format: what quantised values are likely to be.
//!
//! Every channel has a *class*, the ratio of its standard deviation to the quantiser's
//! step, and the tables of all classes are built in. A stream then carries a class a
//! channel, where one that carries tables, as CacheGen's, spends more on them than on the
//! values of a short chunk. The classes are 3^(1/7) apart, so
//! that a step three times finer is seven classes further.
//!
//! The distribution is a generalised Gaussian of shape 1.75, between what keys and values
//! of one chunk look like once their means are gone, and the longer tails that some
//! channels of large models have.
//!
//! - *base* tables, one a class and one for a channel that is zero: the symbol is
//!   `value + 63`. What is further out, or in no table, is stored apart.
//! - *refinement* tables, by class and by the coarser value's distance from zero, 0 to 3
//!   and more: which third of its step a value lies in. The symbol is 0 towards zero, 1 for
//!   the middle, 2 away from zero; where the coarser value is zero, 0 and 2 are the signs.
//!   One more table for a channel that is zero.
//!
//! The tables are data, in `classes.bin`: what a stream means must not depend on how a
//! machine rounds. The test at the end makes them again.

use std::sync::LazyLock;

use crate::rans::Tables;

/// Classes of channels that are not zero.
pub(crate) const CLASSES: u8 = 40;
/// The class of a channel without values that differ from its offset.
pub(crate) const ZERO: u8 = CLASSES;
/// How many classes further a step three times finer is.
pub(crate) const CLASSES_PER_LEVEL: u8 = 7;
/// The largest value of a base table.
pub(crate) const LARGEST: i32 = 63;
const ALPHABET: usize = 2 * LARGEST as usize + 1;
/// Distances from zero that refinement tables tell apart.
pub(crate) const DISTANCES: u8 = 4;
const THIRDS: usize = 3;
/// Standard deviation over step in the first class.
const FIRST_RATIO: f32 = 0.04;
/// 3^(1/7).
const SPACING: f32 = 1.169_930_8;

static DATA: &[u8] = include_bytes!("classes.bin");

pub(crate) static BASE: LazyLock<Tables> = LazyLock::new(|| read(0, CLASSES + 1, ALPHABET));

pub(crate) static REFINEMENT: LazyLock<Tables> = LazyLock::new(|| {
    let from = (usize::from(CLASSES) + 1) * ALPHABET;
    read(from, CLASSES * DISTANCES + 1, THIRDS)
});

/// Standard deviation over step, by class; nothing for a channel that is zero.
pub(crate) static RATIOS: [f32; ZERO as usize + 1] = ratios();

const fn ratios() -> [f32; ZERO as usize + 1] {
    let mut ratios = [0.0; ZERO as usize + 1];
    let (mut class, mut ratio) = (0, FIRST_RATIO);
    while class < ZERO as usize {
        ratios[class] = ratio;
        ratio *= SPACING;
        class += 1;
    }
    ratios
}

/// The largest number that each class has a symbol for, on both sides of zero.
pub(crate) static LARGEST_OF: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let has = |class, number: u8| {
        let zero = LARGEST.to_le_bytes()[0];
        BASE.has(class, zero + number) && BASE.has(class, zero - number)
    };
    let largest = |class| (0u8..=63).take_while(|&number| has(class, number)).last();
    (0..=ZERO)
        .map(|class| largest(class).unwrap_or(0))
        .collect()
});

/// The class of a channel with this standard deviation, in steps.
pub(crate) fn class_of(ratio: f32) -> u8 {
    let spacing = 3f32.ln() / f32::from(CLASSES_PER_LEVEL);
    let class = ((ratio / FIRST_RATIO).ln() / spacing).round();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped, and no number is the first class"
    )]
    let class = class.clamp(0.0, f32::from(CLASSES - 1)) as u8;
    class
}

/// The first refinement table of a channel of `class` at a level from 1 on; the others, of
/// greater distances, follow. A channel that is zero has one table.
pub(crate) fn refinement_tables(class: u8, level: u8) -> u8 {
    if class >= ZERO {
        return CLASSES * DISTANCES;
    }
    let class = class.saturating_add(CLASSES_PER_LEVEL * level.saturating_sub(1));
    class.min(CLASSES - 1) * DISTANCES
}

fn read(from: usize, tables: u8, alphabet: usize) -> Tables {
    let bytes = &DATA[2 * from..][..2 * usize::from(tables) * alphabet];
    let (words, _) = bytes.as_chunks();
    let frequencies: Vec<u16> = words.iter().map(|&word| u16::from_le_bytes(word)).collect();
    let frequencies: Vec<_> = frequencies.chunks(alphabet).map(<[u16]>::to_vec).collect();
    Tables::new(&frequencies).expect("the file holds tables, as a test makes sure")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rans::PRECISION;

    const SHAPE: f64 = 1.75;
    /// Standard deviation of the density below at scale 1: `sqrt(Γ(3/β) / Γ(1/β))`.
    const DEVIATION: f64 = 0.764_707_552_560_018_3;
    /// Bits that storing a value apart takes, about.
    const APART: f64 = 32.0;

    /// Probabilities of the intervals between neighbouring `edges`, in standard deviations.
    fn probabilities(edges: &[f64]) -> Vec<f64> {
        let density = |x: f64| (-(x.abs() * DEVIATION).powf(SHAPE)).exp();
        let of = |from: f64, to: f64| {
            const STEPS: u32 = 64;
            let (from, to) = (from.max(-9.0), to.min(9.0));
            let width = (to - from) / f64::from(STEPS);
            let at = |step: u32| density(from + width * (f64::from(step) + 0.5));
            (0..STEPS).map(at).sum::<f64>() * width.max(0.0)
        };
        let all: f64 = (-900..900)
            .map(|at| of(f64::from(at) / 100.0, f64::from(at + 1) / 100.0))
            .sum();
        edges
            .windows(2)
            .map(|edge| of(edge[0], edge[1]) / all)
            .collect()
    }

    /// Frequencies that add up; what is too rare has none.
    fn frequencies(probabilities: &[f64]) -> Vec<u16> {
        let total = 1u16 << PRECISION;
        // Making room for a symbol costs the others; not having it, those who store it.
        let room = std::f64::consts::LOG2_E / f64::from(total);
        let gain = APART - f64::from(PRECISION);
        let kept = |&p: &f64| if p * gain > room { p } else { 0.0 };
        let kept: Vec<f64> = probabilities.iter().map(kept).collect();
        let sum: f64 = kept.iter().sum();
        let mut out: Vec<u16> = kept
            .iter()
            .map(|p| {
                let exact = p / sum * f64::from(total);
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "small"
                )]
                let rounded = exact.round() as u16;
                if *p > 0.0 { rounded.max(1) } else { 0 }
            })
            .collect();
        while out.iter().sum::<u16>() != total {
            let short = out.iter().sum::<u16>() < total;
            // Where one more, or less, changes the cost least.
            let weight = |at: &usize| {
                let f = f64::from(out[*at]);
                let change = if short { (f + 1.0) / f } else { f / (f - 1.0) };
                kept[*at] * change.ln()
            };
            let may = (0..out.len()).filter(|&at| out[at] > u16::from(!short));
            let by_weight = |a: &usize, b: &usize| weight(a).total_cmp(&weight(b));
            let at = if short {
                may.max_by(by_weight)
            } else {
                may.min_by(by_weight)
            };
            let at = at.unwrap();
            out[at] = if short { out[at] + 1 } else { out[at] - 1 };
        }
        out
    }

    fn ratio_of(class: u8) -> f64 {
        let exponent = f64::from(class) / f64::from(CLASSES_PER_LEVEL);
        f64::from(FIRST_RATIO) * 3f64.powf(exponent)
    }

    fn base(class: u8) -> Vec<u16> {
        let edge = |value: i32| (f64::from(value) - 0.5) / ratio_of(class);
        let edges: Vec<f64> = (-LARGEST..=LARGEST + 1).map(edge).collect();
        frequencies(&probabilities(&edges))
    }

    fn refinement(class: u8, distance: u8) -> Vec<u16> {
        // Of the last distance, so many coarser values, each as often as it occurs.
        let far = if distance + 1 == DISTANCES { 12 } else { 1 };
        let mut thirds = vec![1e-3; THIRDS];
        for value in distance..distance + far {
            let start = f64::from(value) - 0.5;
            let edge = |third: u8| (start + f64::from(third) / 3.0) / ratio_of(class);
            let of = probabilities(&[edge(0), edge(1), edge(2), edge(3)]);
            let of = of.iter().map(|p| p + 1e-12);
            thirds
                .iter_mut()
                .zip(of)
                .for_each(|(sum, p)| *sum += 1e6 * p);
        }
        let sum: f64 = thirds.iter().sum();
        thirds.iter_mut().for_each(|p| *p = (*p / sum).max(1e-3));
        let sum: f64 = thirds.iter().sum();
        thirds.iter_mut().for_each(|p| *p /= sum);
        frequencies(&thirds)
    }

    #[test]
    fn the_file_is_what_its_description_says() {
        let certain = |at: usize| u16::from(at == LARGEST as usize) << PRECISION;
        let zero = (0..ALPHABET).map(certain).collect();
        let base = (0..CLASSES).map(base).chain([zero]);
        let refinement = (0..CLASSES)
            .flat_map(|class| (0..DISTANCES).map(move |distance| refinement(class, distance)));
        let certain = vec![0, 1 << PRECISION, 0];
        let made: Vec<u8> = base
            .chain(refinement)
            .chain([certain])
            .flatten()
            .flat_map(u16::to_le_bytes)
            .collect();
        if std::env::var_os("KVASIR_WRITE_TABLES").is_some() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/classes.bin");
            std::fs::write(path, &made).unwrap();
        } else {
            assert!(
                made == DATA,
                "run this with KVASIR_WRITE_TABLES=1, and bump the format version"
            );
        }
    }

    #[test]
    fn the_deviation_is_that_of_the_density() {
        let (mut square, mut all) = (0.0, 0.0);
        for at in -90_000..90_000 {
            let x = f64::from(at) / 10_000.0;
            let p = (-(x.abs() * DEVIATION).powf(SHAPE)).exp();
            square += x * x * p;
            all += p;
        }
        assert!((square / all - 1.0).abs() < 1e-6, "{}", square / all);
    }

    #[test]
    fn a_class_is_the_nearest_ratio() {
        for class in 0..CLASSES {
            let ratio = FIRST_RATIO * 3f32.powf(f32::from(class) / f32::from(CLASSES_PER_LEVEL));
            assert_eq!(class_of(ratio), class);
        }
        for (class, ratio) in (0..CLASSES).zip(RATIOS) {
            assert!((f64::from(ratio) / ratio_of(class) - 1.0).abs() < 1e-5);
        }
        assert_eq!(class_of(0.0), 0);
        assert_eq!(class_of(f32::INFINITY), CLASSES - 1);
        assert_eq!(class_of(f32::NAN), 0);
    }

    #[test]
    fn tables_have_what_may_occur() {
        for class in 0..CLASSES {
            assert!(BASE.has(class, LARGEST.to_le_bytes()[0]));
            for distance in 0..DISTANCES {
                let table = refinement_tables(class, 1) + distance;
                assert!((0..3).all(|third| REFINEMENT.has(table, third)));
            }
        }
        assert_eq!(refinement_tables(39, 2), refinement_tables(39, 1));
        assert_eq!(refinement_tables(3, 2), refinement_tables(10, 1));
        let certain = refinement_tables(ZERO, 2);
        assert!(REFINEMENT.has(certain, 1) && !REFINEMENT.has(certain, 0));
        assert!(!BASE.has(ZERO, 0) && !BASE.has(0, 0));
    }
}
