//! The channels of a group of heads: how their values become numbers.
//!
//! A number stands for `offset + number * step`, with an offset a channel. What a decoder
//! must know of the channels lies before the cells:
//!
//! ```text
//! channels := class (u8, bit 7: wide) … ‖ offset (i8) … ‖ wide offset (f32) …
//! ```
//!
//! An offset is a number of eighths of the class's deviation, or stored as it is. The class
//! ([`classes`]) says how far the numbers of a channel lie from zero.

use std::ops::Range;

use crate::classes;
use crate::input::Input;
use crate::quantise;
use crate::rans::LANES;

/// What is common to the cells of one group: how its values become numbers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Quantiser {
    /// The step of level 0.
    pub(crate) step: f32,
    /// By channel.
    pub(crate) offsets: Vec<f32>,
    /// By channel.
    pub(crate) classes: Vec<u8>,
}

/// What is said of the channels ends too early, or is not of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the channels of a plane are damaged")]
pub struct ChannelsError;

impl Quantiser {
    /// For values of such moments: offsets are means, and classes follow from standard
    /// deviations.
    pub(crate) fn of(moments: &[Moments], step: f32) -> Self {
        let (offsets, classes) = moments
            .iter()
            .map(|moments| moments.quantised(step))
            .unzip();
        Self {
            step,
            offsets,
            classes,
        }
    }

    /// Whether values of such moments take fewer bytes with [these](Self::of) than with what
    /// was `expected` of them. It is that of two normal variables, of which each has the noise
    /// of a step.
    pub(crate) fn is_worth_its_bytes(&self, expected: &Self, moments: &[Moments]) -> bool {
        let noise = self.step * self.step / 12.0;
        let mut lost = 0.0;
        for (moments, &class) in moments.iter().zip(&expected.classes) {
            let ratio = classes::RATIOS.get(usize::from(class)).unwrap_or(&0.0);
            let deviation = ratio * self.step;
            let (found, mean) = (moments.variance(), moments.mean());
            let share = |found: f32| (found + noise) / (deviation * deviation + noise);
            // In nats, of a value.
            let with_mean = share(found + mean * mean);
            lost += moments.count * 0.5 * (with_mean - 1.0 - share(found).ln()).max(0.0);
        }
        #[expect(clippy::cast_precision_loss, reason = "channels of a cell")]
        let bytes = lost / (8.0 * std::f32::consts::LN_2) - (2 * self.width()) as f32;
        bytes > 0.0 && bytes.is_finite()
    }

    pub(crate) fn width(&self) -> usize {
        self.classes.len()
    }

    /// Appends what a decoder must know of the channels: [`read`](Self::read) is the
    /// opposite.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let narrow = self
            .offsets
            .iter()
            .zip(&self.classes)
            .map(|(&offset, &class)| {
                let code = narrow_code(offset, class, self.step);
                code.filter(|&code| {
                    narrow_offset(code, class, self.step).to_bits() == offset.to_bits()
                })
            });
        let narrow: Vec<Option<i8>> = narrow.collect();
        for (code, &class) in narrow.iter().zip(&self.classes) {
            out.push(class | if code.is_none() { WIDE } else { 0 });
        }
        out.extend(
            narrow
                .iter()
                .flat_map(|code| code.unwrap_or(0).to_le_bytes()),
        );
        for (code, offset) in narrow.iter().zip(&self.offsets) {
            if code.is_none() {
                out.extend_from_slice(&offset.to_le_bytes());
            }
        }
    }

    /// Reads the channels at the start of `bytes`; gives what follows.
    ///
    /// # Errors
    /// Too few bytes, an unknown class, an offset that is no number.
    pub(crate) fn read(
        step: f32,
        width: usize,
        bytes: &[u8],
    ) -> Result<(Self, &[u8]), ChannelsError> {
        let (classes, rest) = bytes.split_at_checked(width).ok_or(ChannelsError)?;
        let (codes, mut rest) = rest.split_at_checked(width).ok_or(ChannelsError)?;
        let mut offsets = Vec::with_capacity(width);
        for (&class, &code) in classes.iter().zip(codes) {
            if class & !WIDE > classes::ZERO {
                return Err(ChannelsError);
            }
            let offset = if class & WIDE == 0 {
                narrow_offset(i8::from_le_bytes([code]), class, step)
            } else {
                let (&wide, after) = rest.split_first_chunk().ok_or(ChannelsError)?;
                rest = after;
                f32::from_le_bytes(wide)
            };
            offsets.push(offset);
        }
        if !offsets.iter().all(|offset| offset.is_finite()) {
            return Err(ChannelsError);
        }
        let quantiser = Self {
            step,
            offsets,
            classes: classes.iter().map(|class| class & !WIDE).collect(),
        };
        Ok((quantiser, rest))
    }

    /// The step of a level.
    pub(crate) fn step_at(&self, level: usize) -> f32 {
        (0..level).fold(self.step, |step, _| step / 3.0)
    }

    /// The classes of each row of lanes.
    pub(crate) fn blocks(&self) -> &[[u8; LANES]] {
        self.classes.as_chunks().0
    }
}

/// Of every channel, over some tokens; what is not finite does not count.
pub(crate) fn moments(input: &Input<'_>, tokens: Range<usize>, width: usize) -> Vec<Moments> {
    let mut sums = vec![[[0.0; LANES]; 2]; width / LANES];
    input.show(tokens.clone(), width, |values| {
        let [sums, squares] = &mut sums[values.block];
        quantise::add_moments(values, sums, squares);
    });
    #[expect(clippy::cast_precision_loss, reason = "tokens of a chunk")]
    let count = tokens.len() as f32;
    let channels = sums
        .iter()
        .flat_map(|[sums, squares]| sums.iter().zip(squares));
    let moments = channels.map(|(&sum, &squares)| Moments {
        count,
        sum,
        squares,
    });
    let mut moments: Vec<_> = moments.collect();
    if !moments.iter().all(|of| of.squares.is_finite()) {
        moments.fill(Moments::default());
        input.show(tokens, width, |values| {
            let moments = &mut moments[values.block * LANES..][..LANES];
            for row in values.rows() {
                for (moments, value) in moments.iter_mut().zip(row) {
                    moments.add_finite(*value);
                }
            }
        });
    }
    moments
}

/// Sums over the values of a channel.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moments {
    count: f32,
    sum: f32,
    squares: f32,
}

impl Moments {
    fn add_finite(&mut self, value: f32) {
        if value.is_finite() {
            self.count += 1.0;
            self.sum += value;
            self.squares += value * value;
        }
    }

    fn mean(self) -> f32 {
        self.sum / self.count.max(1.0)
    }

    pub(crate) fn variance(self) -> f32 {
        let mean = self.mean();
        (self.squares / self.count.max(1.0) - mean * mean).max(0.0)
    }

    /// The offset and the class: of a mean that is an offset to within a sixteenth of the
    /// deviation.
    fn quantised(self, step: f32) -> (f32, u8) {
        let mean = self.mean();
        let ratio = self.variance().sqrt() / step;
        let class = if ratio > 0.0 {
            classes::class_of(ratio)
        } else {
            classes::ZERO
        };
        let narrow = narrow_code(mean, class, step);
        let offset = narrow.map_or(mean, |code| narrow_offset(code, class, step));
        let offset = if offset.is_finite() { offset } else { 0.0 };
        (offset, class)
    }
}

/// An offset as a number of eighths of the class's deviation; `None` where it is too large.
fn narrow_code(offset: f32, class: u8, step: f32) -> Option<i8> {
    let code = (offset / narrow_offset(1, class, step)).round();
    #[expect(clippy::cast_possible_truncation, reason = "in range")]
    let code = (code.abs() <= f32::from(i8::MAX)).then_some(code as i8);
    code.or((offset == 0.0).then_some(0))
}

fn narrow_offset(code: i8, class: u8, step: f32) -> f32 {
    let ratio = classes::RATIOS.get(usize::from(class)).unwrap_or(&0.0);
    f32::from(code) * (ratio * step / 8.0)
}

/// Bit of a class whose offset is stored apart, as it is.
const WIDE: u8 = 0x80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_come_back() {
        let mut rows = crate::cell::tests::gaussian(64, 30, 3);
        for row in rows.chunks_mut(64) {
            (row[3], row[4]) = (7.25, 0.0);
            row[5] += 1000.0;
        }
        let quantiser = crate::cell::tests::quantiser(&rows, 64, 0.7);
        assert_eq!(quantiser.classes[3..5], [classes::ZERO; 2]);
        assert_eq!(quantiser.offsets[3..5], [7.25, 0.0]);
        let mut bytes = Vec::new();
        quantiser.write(&mut bytes);
        // Two offsets are wide: a constant, and one that is far from its deviation.
        assert_eq!(bytes.len(), 2 * 64 + 2 * 4);
        bytes.push(9);
        let (again, rest) = Quantiser::read(0.7, 64, &bytes).unwrap();
        assert_eq!((again, rest), (quantiser, &[9][..]));
        for cut in 0..bytes.len() - 1 {
            assert_eq!(Quantiser::read(0.7, 64, &bytes[..cut]), Err(ChannelsError));
        }
        bytes[0] = classes::ZERO + 1;
        assert_eq!(Quantiser::read(0.7, 64, &bytes), Err(ChannelsError));
    }
}
