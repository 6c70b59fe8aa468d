//! KVTC (NVIDIA, ICLR 2026, arXiv 2511.01815).
//!
//! RoPE is undone; K and V of all layers and heads of a token are one vector each, less
//! its mean, in the basis of one principal component analysis over contexts of the
//! training split. A dynamic programme divides the components, the largest first, into
//! groups and gives each a type, so that the squared error on the training contexts is
//! least for a budget of bits. A group has a shift and a scale of 16 bits a token. All of a
//! plane goes through DEFLATE.
//!
//! As there: groups of 1, 16, 64, 256 or 1024; types of 0, 2, 4 and 8 bits (integers, and
//! E4M3). Here the programme runs at a price a bit, found by bisection, which gives the
//! same divisions at the budgets that it reaches; groups begin at multiples of 16; a group
//! of 1 is its shift. The bytes of shifts and scales are sorted by significance before
//! DEFLATE, in the method's favour.

use std::io::{Read as _, Write as _};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use half::f16;
use nalgebra::DMatrix;

use super::frame::{self, Basis};
use super::table::{Packer, Unpacker};
use super::{Chunk, Coder, Geometry, PROTECTED, Parts};

/// How the members of a group are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Int2,
    Int4,
    Fp8,
    /// Groups of 1: a number of 16 bits each.
    Alone,
}

/// Components that share a shift and a scale a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group {
    start: usize,
    len: usize,
    /// `None`: not stored.
    kind: Option<Type>,
}

/// What is calibrated for all budgets at once.
#[derive(Debug)]
pub(super) struct Profile {
    bases: [Basis; 2],
    /// Coefficients of some tokens of the training contexts.
    samples: [DMatrix<f32>; 2],
}

#[derive(Debug)]
pub(super) struct Kvtc {
    profile: Arc<Profile>,
    plans: [Vec<Group>; 2],
    geometry: Arc<Geometry>,
}

impl Profile {
    pub(super) fn new(training: &[Chunk], geometry: &Geometry) -> anyhow::Result<Self> {
        let mut planes: [Vec<DMatrix<f32>>; 2] = Default::default();
        for chunk in training {
            let matrices = frame::matrices(chunk, geometry);
            for (plane, matrix) in planes.iter_mut().zip(matrices) {
                let tokens = matrix.ncols() - PROTECTED;
                plane.push(matrix.columns(PROTECTED, tokens).into_owned());
            }
        }
        let basis = |samples: &[DMatrix<f32>]| {
            let first = samples.first().context("KVTC is calibrated")?;
            Basis::of(samples, 0..first.nrows())
        };
        let [keys, values] = std::thread::scope(|scope| {
            let workers = planes.each_ref().map(|plane| scope.spawn(|| basis(plane)));
            workers.map(|worker| worker.join().expect("no calibration panics"))
        });
        let bases = [keys?, values?];
        let sample = |plane: usize| {
            let basis: &Basis = &bases[plane];
            let columns: Vec<_> = planes[plane]
                .iter()
                .flat_map(|matrix| matrix.column_iter().step_by(SAMPLED))
                .collect();
            basis.project(DMatrix::from_columns(&columns), basis.mean.len())
        };
        Ok(Self {
            samples: [sample(0), sample(1)],
            bases,
        })
    }
}

impl Kvtc {
    /// `budget`: bits a value before DEFLATE.
    pub(super) fn new(profile: &Arc<Profile>, budget: f64, geometry: &Arc<Geometry>) -> Self {
        Self {
            plans: profile
                .samples
                .each_ref()
                .map(|sample| plan(sample, budget)),
            profile: Arc::clone(profile),
            geometry: Arc::clone(geometry),
        }
    }
}

impl Coder for Kvtc {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let matrices = frame::matrices(chunk, &self.geometry);
        let planes = matrices
            .into_iter()
            .zip(&self.plans)
            .zip(&self.profile.bases);
        let parts = planes.map(|((matrix, plan), basis)| {
            let coefficients = basis.project(matrix, rank(plan));
            let (mut low, mut high) = (Vec::new(), Vec::new());
            let mut codes = Vec::new();
            for group in plan {
                let Some(kind) = group.kind else { continue };
                let mut packer = Packer::default();
                for column in coefficients.column_iter() {
                    let values = &column.as_slice()[group.start..][..group.len];
                    kind.encode(values, &mut packer, |half| {
                        let [a, b] = half.to_le_bytes();
                        low.push(a);
                        high.push(b);
                    });
                }
                codes.extend(packer.finish());
            }
            let mut deflate = DeflateEncoder::new(Vec::new(), Compression::default());
            for bytes in [&low, &high, &codes] {
                deflate.write_all(bytes)?;
            }
            Ok(deflate.finish()?)
        });
        parts.collect()
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        let tokens = chunk.layout.tokens() as usize;
        let planes = parts.iter().zip(&self.plans).zip(&self.profile.bases);
        let matrices = planes.map(|((part, plan), basis)| {
            let halves: usize = plan.iter().map(|group| group.halves() * tokens).sum();
            let codes: usize = plan.iter().map(|group| group.code_bytes(tokens)).sum();
            let mut bytes = Vec::new();
            let limit = (2 * halves + codes) as u64;
            DeflateDecoder::new(part.as_slice())
                .take(limit + 1)
                .read_to_end(&mut bytes)?;
            ensure!(bytes.len() as u64 == limit, "a plane of KVTC is damaged");
            let (low, rest) = bytes.split_at(halves);
            let (high, mut codes) = rest.split_at(halves);
            let mut halves = low
                .iter()
                .zip(high)
                .map(|(&a, &b)| f16::from_le_bytes([a, b]).to_f32());
            let mut coefficients = DMatrix::zeros(rank(plan), tokens);
            for group in plan {
                let Some(kind) = group.kind else { continue };
                let (here, after) = codes.split_at(group.code_bytes(tokens));
                codes = after;
                let mut unpacker = Unpacker::new(here);
                for mut column in coefficients.column_iter_mut() {
                    let values = &mut column.as_mut_slice()[group.start..][..group.len];
                    kind.decode(values, &mut unpacker, &mut halves);
                }
            }
            Ok(basis.restore(&coefficients))
        });
        let matrices: anyhow::Result<Vec<_>> = matrices.collect();
        let matrices = <[_; 2]>::try_from(matrices?).ok().context("two planes")?;
        frame::fill(chunk, &self.geometry, matrices);
        Ok(())
    }

    fn protected(&self) -> usize {
        PROTECTED
    }
}

impl Group {
    /// Numbers of 16 bits a token.
    fn halves(&self) -> usize {
        match self.kind {
            None => 0,
            Some(Type::Alone) => self.len,
            Some(_) => 2,
        }
    }

    fn code_bytes(&self, tokens: usize) -> usize {
        let bits = self.kind.map_or(0, Type::bits) as usize;
        (bits * self.len * tokens).div_ceil(8)
    }
}

impl Type {
    fn bits(self) -> u32 {
        match self {
            Self::Alone => 0,
            Self::Int2 => 2,
            Self::Int4 => 4,
            Self::Fp8 => 8,
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and no number becomes zero"
    )]
    fn encode(self, values: &[f32], codes: &mut Packer, mut half: impl FnMut(f16)) {
        if self == Self::Alone {
            values.iter().for_each(|&value| half(f16::from_f32(value)));
            return;
        }
        let low = values.iter().copied().fold(f32::INFINITY, f32::min);
        let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (shift, most) = match self {
            Self::Fp8 => (f32::midpoint(low, high), 2.0 * LARGEST_FP8),
            _ => (low, f32::from((1u8 << self.bits()) - 1)),
        };
        let shift = f16::from_f32(shift);
        let scale = f16::from_f32((high - low) / most);
        half(shift);
        half(scale);
        for value in values {
            let number = (value - shift.to_f32()) / scale.to_f32();
            let code = match self {
                Self::Fp8 => to_fp8(number),
                _ => number.round_ties_even().clamp(0.0, most) as u8,
            };
            codes.put(code, self.bits());
        }
    }

    fn decode(
        self,
        values: &mut [f32],
        codes: &mut Unpacker<'_>,
        halves: &mut impl Iterator<Item = f32>,
    ) {
        let mut half = || halves.next().unwrap_or(0.0);
        if self == Self::Alone {
            values.iter_mut().for_each(|value| *value = half());
            return;
        }
        let (shift, scale) = (half(), half());
        for value in values {
            let code = codes.take(self.bits());
            let number = match self {
                Self::Fp8 => from_fp8(code),
                _ => f32::from(code),
            };
            *value = shift + scale * number;
        }
    }
}

/// Components that are stored at all.
fn rank(plan: &[Group]) -> usize {
    let stored = plan.iter().filter(|group| group.kind.is_some());
    stored
        .map(|group| group.start + group.len)
        .max()
        .unwrap_or(0)
}

/// The division with the least error on `sample` of those that a price gives, within a
/// budget of bits a component.
#[expect(clippy::cast_precision_loss, reason = "counts of a benchmark")]
fn plan(sample: &DMatrix<f32>, budget: f64) -> Vec<Group> {
    let components = sample.nrows();
    let choices = choices(sample);
    let mut best = divide(components, &choices, f64::INFINITY);
    let (mut low, mut high) = (-40.0f64, 40.0f64);
    for _ in 0..ROUNDS {
        let price = f64::midpoint(low, high);
        let found = divide(components, &choices, price.exp2());
        let bits: usize = found.iter().map(cost).sum();
        if bits as f64 <= budget * components as f64 {
            (best, high) = (found, price);
        } else {
            low = price;
        }
    }
    best
}

/// Bits a token.
fn cost(group: &Group) -> usize {
    let bits = group.kind.map_or(0, Type::bits) as usize;
    16 * group.halves() + bits * group.len
}

/// Every group that can be, and its squared error a token.
#[expect(clippy::cast_precision_loss, reason = "counts of a benchmark")]
fn choices(sample: &DMatrix<f32>) -> Vec<(Group, f64)> {
    let components = sample.nrows();
    let mut choices = Vec::new();
    let mut decoded = Vec::new();
    for start in (0..components).step_by(SLOT) {
        let small = [None, Some(Type::Alone)].map(|kind| (SLOT, kind));
        let large = SIZES
            .iter()
            .flat_map(|&size| [Type::Int2, Type::Int4, Type::Fp8].map(|kind| (size, Some(kind))));
        for (size, kind) in small.into_iter().chain(large) {
            if size > SLOT && start + size > components {
                continue;
            }
            let len = size.min(components - start);
            let mut error = 0.0;
            for column in sample.column_iter() {
                let values = &column.as_slice()[start..][..len];
                decoded.clear();
                decoded.resize(len, 0.0);
                if let Some(kind) = kind {
                    let mut packer = Packer::default();
                    let mut halves = Vec::new();
                    kind.encode(values, &mut packer, |half| halves.push(half.to_f32()));
                    let bytes = packer.finish();
                    let mut halves = halves.into_iter();
                    kind.decode(&mut decoded, &mut Unpacker::new(&bytes), &mut halves);
                }
                let errors = values
                    .iter()
                    .zip(&decoded)
                    .map(|(a, b)| f64::from(a - b).powi(2));
                error += errors.sum::<f64>();
            }
            choices.push((Group { start, len, kind }, error / sample.ncols() as f64));
        }
    }
    choices
}

/// Least error plus price times bits, from the last component to the first.
#[expect(clippy::cast_precision_loss, reason = "counts of a benchmark")]
fn divide(components: usize, choices: &[(Group, f64)], price: f64) -> Vec<Group> {
    let mut best: Vec<(f64, Option<Group>)> = vec![(f64::INFINITY, None); components + 1];
    best[components].0 = 0.0;
    for &(group, error) in choices.iter().rev() {
        let bits = cost(&group) as f64;
        let paid = if bits > 0.0 { price * bits } else { 0.0 };
        let total = error + paid + best[group.start + group.len].0;
        if total < best[group.start].0 {
            best[group.start] = (total, Some(group));
        }
    }
    let mut groups = Vec::new();
    let mut at = 0;
    while let Some(group) = best[at].1 {
        groups.push(group);
        at = group.start + group.len;
    }
    groups
}

/// E4M3, rounded to nearest, of a magnitude of 448 at most.
fn to_fp8(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs();
    // Codes are ordered as the numbers are.
    let (mut low, mut high) = (0u8, 0x7e);
    while low < high {
        let middle = low.midpoint(high);
        if f32::midpoint(from_fp8(middle), from_fp8(middle + 1)) < magnitude {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    sign | low
}

fn from_fp8(code: u8) -> f32 {
    let (exponent, fraction) = (code >> 3 & 15, f32::from(code & 7));
    let magnitude = if exponent == 0 {
        fraction / 512.0
    } else {
        (1.0 + fraction / 8.0) * 2f32.powi(i32::from(exponent) - 7)
    };
    if code & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

const LARGEST_FP8: f32 = 448.0;
/// Groups begin at its multiples.
const SLOT: usize = 16;
const SIZES: [usize; 4] = [16, 64, 256, 1024];
/// One in so many tokens is a sample for the programme.
const SAMPLED: usize = 64;
const ROUNDS: usize = 50;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_is_e4m3() {
        let numbers = [0.0, 1.0, -1.5, 448.0, 2f32.powi(-9), -0.875, 240.0];
        for number in numbers {
            assert_eq!(from_fp8(to_fp8(number)), number);
        }
        assert_eq!(from_fp8(to_fp8(1.06)), 1.0);
        assert_eq!(from_fp8(to_fp8(1.07)), 1.125);
        assert_eq!(from_fp8(to_fp8(500.0)), 448.0);
    }

    #[test]
    fn the_first_components_get_the_bits_and_no_more_than_there_are() {
        let spread = |row: usize| 0.99f32.powi(i32::try_from(row).unwrap());
        let sample = DMatrix::from_fn(600, 32, |row, column| {
            let sign = if (row * 7 + column * 13) % 5 < 2 {
                1.0
            } else {
                -1.0
            };
            sign * spread(row) * (1.0 + f32::from(u8::try_from(column % 4).unwrap()))
        });
        for budget in [0.0, 0.5, 2.0, 4.0] {
            let plan = plan(&sample, budget);
            assert_eq!(plan.iter().map(|group| group.len).sum::<usize>(), 600);
            let bits: usize = plan.iter().map(cost).sum();
            let bits = f64::from(u32::try_from(bits).unwrap()) / 600.0;
            assert!(bits <= budget && bits >= budget * 0.8, "{budget}: {bits}");
            let of = |group: &Group| group.kind.map_or(0, Type::bits);
            assert!(of(&plan[0]) >= of(&plan[plan.len() - 1]));
        }
    }
}
