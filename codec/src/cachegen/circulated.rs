//! CacheGen as its code circulates.
//!
//! ```text
//! layer := plane × { maximum (16 bits) × token ‖ distribution × channel
//!                    ‖ length (u32) × stream ‖ streams }
//! distribution := 33 × u16, cumulated
//! ```
//!
//! A value is a number of the largest magnitude over all channels of its layer, plane and
//! token, in 15 steps to each side, or 7, or 5, by layer ([`CirculatedLevel`]). There is one
//! stream a channel and 256 tokens. The distribution of a channel is its histogram over the
//! chunk, with room for 32 symbols however many are used. The original wraps this into a
//! Python pickle, which is left out and not counted.
//!
//! A stream's last word is shortened to the bytes that tell it apart, as the original's
//! coder, which writes bits, would.

use half::{bf16, f16};
use kvasir_types::{DType, KvLayout, Plane};

use super::{CacheGenError, Channels, Model, Reader, TOTAL, model};

/// Numbers of steps, as the configurations that circulate for models of 7 and 8 billion
/// parameters have them, with layers in proportion to their 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CirculatedLevel {
    /// Keys: 16 bins in the first ten of 32 layers, then 12; values: 16 in the first two, then 12.
    Coarse,
    /// Keys: 32 bins in the first ten of 32 layers, then 16; values: 32 in the first two, then 16.
    Default,
    /// 32 bins everywhere.
    Fine,
}

/// Codes layers of chunks of one layout.
#[derive(Clone, Copy, Debug)]
pub struct CirculatedCacheGen {
    layout: KvLayout,
    level: CirculatedLevel,
}

impl CirculatedCacheGen {
    /// For chunks of `layout`.
    ///
    /// # Errors
    /// Layouts that are not supported.
    pub fn new(layout: KvLayout, level: CirculatedLevel) -> Result<Self, CacheGenError> {
        if !crate::elements::is_float(layout.dtype()) {
            return Err(CacheGenError::DType(layout.dtype()));
        }
        Ok(Self { layout, level })
    }

    /// Codes the raw layer of number `layer`.
    ///
    /// # Errors
    /// A value that is not finite.
    ///
    /// # Panics
    /// The layer has not the bytes that the layout says.
    pub fn encode(&self, layer: u16, raw: &[u8]) -> Result<Vec<u8>, CacheGenError> {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        let mut out = Vec::new();
        for plane in super::channels(&self.layout, raw)? {
            let steps = self.steps(layer, plane.plane);
            self.encode_plane(steps, &plane, &mut out)?;
        }
        Ok(out)
    }

    fn encode_plane(
        &self,
        steps: u8,
        plane: &Channels,
        out: &mut Vec<u8>,
    ) -> Result<(), CacheGenError> {
        let tokens = plane.tokens;
        let mut largest = vec![0.0f32; tokens];
        for channel in plane.values.chunks_exact(tokens) {
            for (largest, value) in largest.iter_mut().zip(channel) {
                *largest = largest.max(value.abs());
            }
        }
        for largest in &mut largest {
            let bytes = self.to_half(*largest);
            *largest = self.of_half(bytes);
            out.extend_from_slice(&bytes);
        }
        let mut lengths = Vec::new();
        let mut streams = Vec::new();
        for channel in plane.values.chunks_exact(tokens) {
            let symbols: Vec<usize> = channel
                .iter()
                .zip(&largest)
                .map(|(value, largest)| symbol(*value, *largest, steps))
                .collect();
            let cumulated = cumulated(&symbols);
            for end in &cumulated {
                out.extend_from_slice(&end.to_le_bytes());
            }
            let model = model_of(&cumulated)?;
            for symbols in symbols.chunks(STREAM_TOKENS) {
                let mut stream = super::encode_runs(std::iter::once((symbols, &model)));
                shorten(&mut stream, symbols, &model);
                let len = u32::try_from(stream.len()).expect("256 symbols take less");
                lengths.extend_from_slice(&len.to_le_bytes());
                streams.extend(stream);
            }
        }
        out.extend(lengths);
        out.extend(streams);
        Ok(())
    }

    /// Decodes the layer of number `layer` into its raw form.
    ///
    /// # Errors
    /// Every truncation, and most damage; `raw` then holds anything.
    ///
    /// # Panics
    /// `raw` has not the bytes that the layout says.
    pub fn decode(&self, layer: u16, bytes: &[u8], raw: &mut [u8]) -> Result<(), CacheGenError> {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        let mut reader = Reader::new(bytes);
        let mut planes = Vec::new();
        for (plane, width) in super::widths(&self.layout) {
            let steps = self.steps(layer, plane);
            let values = self.decode_plane(&mut reader, steps, width)?;
            planes.push(Channels {
                plane,
                tokens: self.layout.tokens() as usize,
                values,
            });
        }
        reader.end()?;
        super::to_raw(&self.layout, &planes, raw);
        Ok(())
    }

    fn decode_plane(
        &self,
        reader: &mut Reader<'_>,
        steps: u8,
        width: usize,
    ) -> Result<Vec<f32>, CacheGenError> {
        let tokens = self.layout.tokens() as usize;
        let halves = reader.bytes(2 * tokens)?.as_chunks().0;
        let scales: Vec<f32> = halves
            .iter()
            .map(|&half| self.of_half(half) / f32::from(steps))
            .collect();
        if !scales
            .iter()
            .all(|&scale| scale.is_finite() && scale >= 0.0)
        {
            return Err(CacheGenError::Scale);
        }
        let mut models = Vec::with_capacity(width);
        for _ in 0..width {
            let ends = reader.bytes(2 * ENDS)?.as_chunks().0;
            let ends: Vec<u16> = ends.iter().map(|&end| u16::from_le_bytes(end)).collect();
            models.push(model_of(&ends)?);
        }
        let per_channel = tokens.div_ceil(STREAM_TOKENS);
        let lengths = reader.bytes(4 * width * per_channel)?.as_chunks().0;
        let mut lengths = lengths.iter().map(|&len| u32::from_le_bytes(len));
        let mut values = Vec::with_capacity(width * tokens);
        for model in &models {
            for scales in scales.chunks(STREAM_TOKENS) {
                let len = lengths.next().unwrap_or(0);
                let mut decoder = super::decoder(reader.bytes(len as usize)?)?;
                let mut scales = scales.iter();
                super::decode_run(&mut decoder, scales.len(), model, |symbol| {
                    let number = u8::try_from(symbol).unwrap_or(0);
                    let scale = scales.next().copied().unwrap_or(0.0);
                    values.push((f32::from(number) - f32::from(steps)) * scale);
                })?;
            }
        }
        Ok(values)
    }

    /// Steps to each side of zero.
    pub(super) fn steps(&self, layer: u16, plane: Plane) -> u8 {
        // Of 32 layers, rounded to the nearest.
        let before = |layers: u32| {
            let all = u32::from(self.layout.layers());
            u32::from(layer) < (layers * all + 16) / 32
        };
        let bins: u8 = match (self.level, plane) {
            (CirculatedLevel::Fine, _) => 32,
            (CirculatedLevel::Default, Plane::Key) if before(10) => 32,
            (CirculatedLevel::Default, Plane::Value) if before(2) => 32,
            (CirculatedLevel::Default, _) => 16,
            (CirculatedLevel::Coarse, Plane::Key) if before(10) => 16,
            (CirculatedLevel::Coarse, Plane::Value) if before(2) => 16,
            (CirculatedLevel::Coarse, _) => 12,
        };
        bins / 2 - 1
    }

    fn to_half(self, value: f32) -> [u8; 2] {
        match self.layout.dtype() {
            DType::F16 => f16::from_f32(value).to_le_bytes(),
            _ => bf16::from_f32(value).to_le_bytes(),
        }
    }

    fn of_half(self, bytes: [u8; 2]) -> f32 {
        match self.layout.dtype() {
            DType::F16 => f16::from_le_bytes(bytes).to_f32(),
            _ => bf16::from_le_bytes(bytes).to_f32(),
        }
    }
}

fn symbol(value: f32, largest: f32, steps: u8) -> usize {
    let steps = f32::from(steps);
    // Zero over zero is no number, which becomes zero.
    let number = (value * (steps / largest)).round_ties_even();
    let number = if number.is_nan() { 0.0 } else { number };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to twice the steps"
    )]
    let symbol = (number.clamp(-steps, steps) + steps) as u8;
    usize::from(symbol)
}

/// Starts of symbols and the end of the last, which is 2^16 and wraps to zero.
fn cumulated(symbols: &[usize]) -> Vec<u16> {
    let mut counts = [0u32; ENDS];
    for &symbol in symbols {
        if let Some(count) = counts.get_mut(symbol + 1) {
            *count += 1;
        }
    }
    let total = u64::try_from(symbols.len()).unwrap_or(u64::MAX).max(1);
    let mut sum = 0;
    counts
        .iter()
        .zip(0u64..)
        .map(|(&count, index)| {
            sum += u64::from(count);
            let end = sum * (u64::from(TOTAL) - SYMBOLS) / total + index;
            u16::try_from(end).unwrap_or(0)
        })
        .collect()
}

fn model_of(ends: &[u16]) -> Result<Model, CacheGenError> {
    let frequencies: Vec<u32> = ends
        .array_windows()
        .enumerate()
        .map(|(index, &[start, end])| {
            let end = match (u32::from(end), index + 2 == ends.len()) {
                (0, true) => TOTAL,
                (end, _) => end,
            };
            end.checked_sub(start.into()).filter(|&width| width > 0)
        })
        .collect::<Option<_>>()
        .ok_or(CacheGenError::Table)?;
    if ends.first() != Some(&0) || frequencies.iter().sum::<u32>() != TOTAL {
        return Err(CacheGenError::Table);
    }
    model(&frequencies)
}

/// Rounds the last word to as few bytes as still give the symbols.
fn shorten(stream: &mut Vec<u8>, symbols: &[usize], model: &Model) {
    let Some((before, &last)) = stream.split_last_chunk::<4>() else {
        return;
    };
    let (before, last) = (before.to_vec(), u32::from_be_bytes(last));
    for kept in 0..4usize {
        let mask = u32::MAX
            .checked_shr(8 * u32::try_from(kept).unwrap_or(0))
            .unwrap_or(0);
        let up = last.checked_add(mask).map(|word| word & !mask);
        for word in [up, Some(last & !mask)].into_iter().flatten() {
            let mut shorter = before.clone();
            shorter.extend(word.to_be_bytes().iter().take(kept));
            if gives(&shorter, symbols, model) {
                *stream = shorter;
                return;
            }
        }
    }
}

fn gives(stream: &[u8], symbols: &[usize], model: &Model) -> bool {
    let Ok(mut decoder) = super::decoder(stream) else {
        return false;
    };
    let mut expected = symbols.iter();
    let mut same = true;
    let ended = super::decode_run(&mut decoder, symbols.len(), model, |symbol| {
        same &= expected.next() == Some(&symbol);
    });
    ended.is_ok() && same
}

const STREAM_TOKENS: usize = 256;
const SYMBOLS: u64 = 32;
/// Of a distribution.
const ENDS: usize = 33;
