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
//! - *base* tables, one a class and one for a channel that is zero, of the numbers from
//!   -63 to 63. They are even: a number and its opposite are equally likely, so a table is
//!   its half from zero on. What is further out, or in no table, is stored apart.
//! - *third* tables, by class and by the coarser number's distance from zero, 0 to 2
//!   and more: which third of its step a value lies in. The symbol is 0 towards zero, 1 for
//!   the middle, 2 away from zero; where the coarser number is zero, 0 and 2 are the signs.
//!
//! The tables are data, in `classes.bin`: what a stream means must not depend on how a
//! machine rounds. The test at the end makes them again.

use std::sync::LazyLock;

use crate::rans::{self, HALF, TOTAL};

/// Classes of channels that are not zero.
pub(crate) const CLASSES: u8 = 40;
/// The class of a channel without values that differ from its offset.
pub(crate) const ZERO: u8 = CLASSES;
/// How many classes further a step three times finer is.
pub(crate) const CLASSES_PER_LEVEL: u8 = 7;
/// The largest number of a base table.
pub(crate) const LARGEST: usize = 63;
/// Distances from zero that third tables tell apart.
pub(crate) const DISTANCES: usize = 3;
/// Classes as tables have them: a power of two, so that an index needs no check.
pub(crate) const PADDED: usize = 64;
/// Numbers from zero on that a base table has.
const NUMBERS: usize = LARGEST + 1;
/// Standard deviation over step in the first class.
const FIRST_RATIO: f32 = 0.04;
/// 3^(1/7).
const SPACING: f32 = 1.169_930_8;

static DATA: &[u8] = include_bytes!("classes.bin");

/// One entry a class.
pub(crate) type ByClass = [u16; PADDED];

/// The base tables. [`crate::rans`] says how slots and numbers belong together.
#[derive(Debug)]
pub(crate) struct BaseTables {
    /// By number from zero on, and class: the first slot of the half table; [`HALF`] where
    /// the class does not have the number.
    pub(crate) firsts: [ByClass; NUMBERS],
    /// By number from zero on, and class: frequency less one, and the number in the bits
    /// from [`NUMBER_BIT`] on, as far as it has room there.
    pub(crate) packed: [ByClass; NUMBERS],
    /// By class and slot: what decoding one takes, see [`slot`].
    pub(crate) slots: Vec<u32>,
    /// By class and number from zero on: what coding one takes, frequency and first slot,
    /// 16 bits each. No frequency where the class does not have the number.
    pub(crate) codes: Vec<u32>,
    /// By class: the largest number.
    pub(crate) largest: [u8; PADDED],
}

/// The third tables of one level.
#[derive(Debug)]
pub(crate) struct ThirdTables {
    /// By distance and class: the first slot of symbol 1.
    pub(crate) middle: [ByClass; DISTANCES],
    /// By distance and class: the first slot of symbol 2.
    pub(crate) away: [ByClass; DISTANCES],
}

/// Where the number lies in [`BaseTables::packed`].
pub(crate) const NUMBER_BIT: u32 = 11;

/// An entry of [`BaseTables::slots`], see [`rans::slot`](crate::rans::slot): the symbol is the
/// number and 64.
fn slot(number: i16, frequency: u32, place: u32) -> u32 {
    let [symbol, _] = (number + SLOT_ZERO).to_le_bytes();
    rans::slot(symbol, frequency, place)
}

/// What the number of an entry of [`BaseTables::slots`] is greater by.
pub(crate) const SLOT_ZERO: i16 = 64;

pub(crate) static BASE: LazyLock<BaseTables> = LazyLock::new(|| {
    let mut tables = BaseTables {
        firsts: [[HALF; PADDED]; NUMBERS],
        packed: [[0; PADDED]; NUMBERS],
        slots: vec![slot(0, 1, 0); PADDED * usize::from(TOTAL)],
        codes: vec![0; PADDED * NUMBERS],
        largest: [0; PADDED],
    };
    for (class, half) in words(0)
        .chunks(NUMBERS)
        .take(CLASSES as usize + 1)
        .enumerate()
    {
        tables.add(class, half);
    }
    tables
});

pub(crate) static THIRDS: LazyLock<[ThirdTables; 2]> = LazyLock::new(|| {
    let words = words((usize::from(CLASSES) + 1) * NUMBERS);
    [0, CLASSES_PER_LEVEL].map(|further| {
        // The padding, and a channel that is zero: the middle is certain.
        let mut tables = ThirdTables {
            middle: [[0; PADDED]; DISTANCES],
            away: [[TOTAL; PADDED]; DISTANCES],
        };
        for class in 0..CLASSES {
            let from = usize::from((class + further).min(CLASSES - 1)) * DISTANCES;
            for distance in 0..DISTANCES {
                let [middle, away] = [0, 1].map(|bound| words[2 * (from + distance) + bound]);
                tables.middle[distance][usize::from(class)] = middle;
                tables.away[distance][usize::from(class)] = away;
            }
        }
        tables
    })
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

impl BaseTables {
    /// Enters a class: the frequencies of the numbers from zero on, that of zero halved.
    fn add(&mut self, class: usize, half: &[u16]) {
        let slots = &mut self.slots[class * usize::from(TOTAL)..][..usize::from(TOTAL)];
        let codes = &mut self.codes[class * NUMBERS..][..NUMBERS];
        let (positive, negative) = slots.split_at_mut(usize::from(HALF));
        let mut first = 0;
        for (number, &frequency) in (0u8..).zip(half).filter(|(_, f)| **f > 0) {
            let at = usize::from(number);
            let all = if number == 0 {
                2 * frequency
            } else {
                frequency
            };
            self.firsts[at][class] = first;
            self.packed[at][class] = (all - 1) | u16::from(number) << NUMBER_BIT;
            codes[at] = u32::from(all) | u32::from(first) << 16;
            self.largest[class] = number;
            let places = usize::from(first)..usize::from(first + frequency);
            for (place, at) in (0..).zip(places) {
                let (number, all) = (i16::from(number), u32::from(all));
                let second = if number == 0 { u32::from(frequency) } else { 0 };
                positive[at] = slot(number, all, place);
                negative[at] = slot(-number, all, place + second);
            }
            first += frequency;
        }
    }
}

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

/// The data from one word on.
fn words(from: usize) -> Vec<u16> {
    let (words, _) = DATA[2 * from..].as_chunks();
    words.iter().map(|&word| u16::from_le_bytes(word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn frequencies(probabilities: &[f64], total: u16) -> Vec<u16> {
        // Making room for a symbol costs the others; not having it, those who store it.
        let room = std::f64::consts::LOG2_E / f64::from(total);
        let gain = APART - f64::from(total).log2();
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

    /// The half from zero on, with half of zero.
    fn base(class: u8) -> Vec<u16> {
        let edge = |number: u8| (f64::from(number) - 0.5).max(0.0) / ratio_of(class);
        let edges: Vec<f64> = (0..=64).map(edge).collect();
        let half: Vec<f64> = probabilities(&edges).iter().map(|p| 2.0 * p).collect();
        frequencies(&half, HALF)
    }

    /// The first slots of the symbols 1 and 2.
    fn thirds(class: u8, distance: u8) -> [u16; 2] {
        // Of the last distance, so many coarser values, each as often as it occurs.
        let far = if usize::from(distance) + 1 == DISTANCES {
            12
        } else {
            1
        };
        let mut thirds = [1e-3; 3];
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
        let [towards, middle, _] = frequencies(&thirds, TOTAL)[..] else {
            unreachable!("three symbols")
        };
        [towards, towards + middle]
    }

    #[test]
    fn the_file_is_what_its_description_says() {
        let certain = (0..NUMBERS).map(|number| if number == 0 { HALF } else { 0 });
        let base = (0..CLASSES).flat_map(base).chain(certain);
        let thirds = (0..CLASSES).flat_map(|class| (0u8..3).flat_map(move |at| thirds(class, at)));
        let made: Vec<u8> = base.chain(thirds).flat_map(u16::to_le_bytes).collect();
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
        for class in 0..=usize::from(ZERO) {
            let codes = &BASE.codes[class * NUMBERS..][..NUMBERS];
            let largest = usize::from(BASE.largest[class]);
            assert!(codes[..=largest].iter().all(|&code| code & 0xffff > 0));
            assert!(codes[largest + 1..].iter().all(|&code| code == 0));
            for tables in THIRDS.iter() {
                for distance in 0..DISTANCES {
                    let bounds = [tables.middle[distance][class], tables.away[distance][class]];
                    let [middle, away] = bounds;
                    let zero = class == usize::from(ZERO);
                    assert!(if zero {
                        bounds == [0, TOTAL]
                    } else {
                        0 < middle && middle < away && away < TOTAL
                    });
                }
            }
        }
        assert_eq!(BASE.largest[usize::from(ZERO)], 0);
        let [middle, finest] = &*THIRDS;
        assert_eq!(finest.middle[1][3], middle.middle[1][10]);
        assert_eq!(finest.middle[1][39], middle.middle[1][39]);
    }

    #[test]
    fn slots_are_the_inverse_of_codes() {
        for class in 0..=usize::from(ZERO) {
            let slots = &BASE.slots[class * usize::from(TOTAL)..][..usize::from(TOTAL)];
            let mut frequencies = [0; 2 * NUMBERS];
            for entry in slots {
                frequencies[(entry & 0xff) as usize] += 1;
            }
            for entry in slots {
                let frequency = (entry >> 8 & 0x7ff) + 1;
                assert_eq!(frequencies[(entry & 0xff) as usize], frequency);
                assert!(entry >> 19 < frequency);
            }
        }
    }
}
