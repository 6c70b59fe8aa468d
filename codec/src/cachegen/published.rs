//! CacheGen as its paper has it.
//!
//! ```text
//! layer  := plane × { step (f32) ‖ anchors ‖ table × channel ‖ length (u32) ‖ stream }
//! anchors := group × { scale (bf16) ‖ code (i8) × channel }
//! table  := symbols (u8) ‖ symbols × { symbol (i8) ‖ count (LEB128) }
//! ```
//!
//! What the paper leaves open is chosen in its favour: a step is a number of deviations of
//! the differences in the layer's plane, 0.5, 1 or 1.5 in the first, second and last third
//! of the layers, so that quiet channels take fewer bits; differences are from the decoded
//! anchor, so that errors do not add up; a distribution is shipped as the counts of the
//! symbols that occur.

use half::bf16;
use kvasir_types::KvLayout;

use super::{CacheGenError, Channels, Model, Reader, TOTAL, model};

/// Codes layers of chunks of one layout.
#[derive(Clone, Copy, Debug)]
pub struct CacheGen {
    layout: KvLayout,
    coarser: f32,
}

/// Symbols of a channel, and how often each occurs.
type Histogram = Vec<(i8, u32)>;

impl CacheGen {
    /// For chunks of `layout`, with steps `coarser` times those of the paper.
    ///
    /// # Errors
    /// Layouts that are not supported.
    ///
    /// # Panics
    /// `coarser` is no positive number.
    pub fn new(layout: KvLayout, coarser: f32) -> Result<Self, CacheGenError> {
        assert!(coarser.is_normal() && coarser > 0.0, "a factor is positive");
        if !crate::elements::is_float(layout.dtype()) {
            return Err(CacheGenError::DType(layout.dtype()));
        }
        Ok(Self { layout, coarser })
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
            self.encode_plane(layer, plane, &mut out)?;
        }
        Ok(out)
    }

    fn encode_plane(
        &self,
        layer: u16,
        mut plane: Channels,
        out: &mut Vec<u8>,
    ) -> Result<(), CacheGenError> {
        let tokens = plane.tokens;
        let mut anchors = Vec::new();
        for anchor in (0..tokens).step_by(GROUP) {
            let values = || plane.values.iter().skip(anchor).step_by(tokens);
            let largest = values().fold(0.0, |largest: f32, value| largest.max(value.abs()));
            // Rounded up, so that no code is beyond the last.
            let bits = (largest / 127.0).to_bits().div_ceil(1 << 16);
            let scale = bf16::from_bits(u16::try_from(bits).unwrap_or(u16::MAX));
            anchors.extend_from_slice(&scale.to_le_bytes());
            let scale = scale.to_f32();
            if !scale.is_finite() {
                return Err(CacheGenError::NotFinite);
            }
            for value in plane.values.iter_mut().skip(anchor).step_by(tokens) {
                // Zero over zero is no number, which becomes zero.
                #[expect(clippy::cast_possible_truncation, reason = "saturates, and fits")]
                let code = (*value / scale).round_ties_even() as i8;
                anchors.push(code.cast_unsigned());
                *value = f32::from(code) * scale;
            }
        }
        // From here on values are differences, those of anchors aside.
        for channel in plane.values.chunks_exact_mut(tokens) {
            for group in channel.chunks_mut(GROUP) {
                if let Some((anchor, others)) = group.split_first_mut() {
                    others.iter_mut().for_each(|value| *value -= *anchor);
                }
            }
        }
        let step = self.step(layer, deviation(&plane.values, tokens))?;
        let mut tables = Vec::new();
        let (mut symbols, mut models) = (Vec::new(), Vec::new());
        for channel in plane.values.chunks_exact(tokens) {
            #[expect(clippy::cast_possible_truncation, reason = "saturates, as it should")]
            let numbers: Vec<i8> = differences(channel)
                .map(|value| (value / step).round_ties_even() as i8)
                .collect();
            let histogram = histogram(&numbers);
            write_table(&histogram, &mut tables);
            let rank = |number: &i8| histogram.binary_search_by_key(number, |&(symbol, _)| symbol);
            let ranks: Vec<usize> = numbers.iter().map(|n| rank(n).unwrap_or(0)).collect();
            symbols.push(ranks);
            models.push(model_of(&histogram)?);
        }
        let runs = symbols.iter().zip(&models);
        let runs = runs.filter_map(|(symbols, model)| Some((symbols.as_slice(), model.as_ref()?)));
        let stream = super::encode_runs(runs);
        out.extend_from_slice(&step.to_le_bytes());
        out.extend(anchors);
        out.extend(tables);
        let len = u32::try_from(stream.len()).expect("a chunk has less than 2^30 bytes");
        out.extend_from_slice(&len.to_le_bytes());
        out.extend(stream);
        Ok(())
    }

    /// Decodes the layer of number `layer` into its raw form.
    ///
    /// # Errors
    /// Every truncation, and most damage; `raw` then holds anything.
    ///
    /// # Panics
    /// `raw` has not the bytes that the layout says.
    pub fn decode(&self, bytes: &[u8], raw: &mut [u8]) -> Result<(), CacheGenError> {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        let mut reader = Reader::new(bytes);
        let tokens = self.layout.tokens() as usize;
        let mut planes = Vec::new();
        for (plane, width) in super::widths(&self.layout) {
            let mut channels = Channels {
                plane,
                tokens,
                values: vec![0.0; width * tokens],
            };
            decode_plane(&mut reader, width, &mut channels)?;
            planes.push(channels);
        }
        reader.end()?;
        super::to_raw(&self.layout, &planes, raw);
        Ok(())
    }

    fn step(&self, layer: u16, deviation: f32) -> Result<f32, CacheGenError> {
        let third = 3 * u32::from(layer) / u32::from(self.layout.layers().max(1));
        let bin = BINS.get(third as usize).copied().unwrap_or(LAST_BIN);
        let step = (self.coarser * bin * deviation).max(f32::MIN_POSITIVE);
        if step.is_finite() {
            Ok(step)
        } else {
            Err(CacheGenError::NotFinite)
        }
    }
}

fn decode_plane(
    reader: &mut Reader<'_>,
    width: usize,
    channels: &mut Channels,
) -> Result<(), CacheGenError> {
    let tokens = channels.tokens;
    let step = f32::from_le_bytes(reader.take()?);
    if !(step.is_normal() && step > 0.0) {
        return Err(CacheGenError::Scale);
    }
    for anchor in (0..tokens).step_by(GROUP) {
        let scale = bf16::from_le_bytes(reader.take()?).to_f32();
        if !(scale.is_finite() && scale >= 0.0) {
            return Err(CacheGenError::Scale);
        }
        let codes = reader.bytes(width)?;
        let slots = channels.values.iter_mut().skip(anchor).step_by(tokens);
        for (value, code) in slots.zip(codes) {
            *value = f32::from(code.cast_signed()) * scale;
        }
    }
    let coded = tokens - tokens.div_ceil(GROUP);
    let mut tables = Vec::with_capacity(width);
    for _ in 0..width {
        let histogram = read_table(reader, coded)?;
        tables.push((model_of(&histogram)?, histogram));
    }
    let len = u32::from_le_bytes(reader.take()?);
    let mut decoder = super::decoder(reader.bytes(len as usize)?)?;
    let mut ranks = Vec::with_capacity(coded);
    for (channel, (model, histogram)) in channels.values.chunks_exact_mut(tokens).zip(&tables) {
        ranks.clear();
        match model {
            Some(model) => super::decode_run(&mut decoder, coded, model, |rank| ranks.push(rank))?,
            None => ranks.resize(coded, 0),
        }
        let mut ranks = ranks.iter();
        for group in channel.chunks_mut(GROUP) {
            if let Some((anchor, others)) = group.split_first_mut() {
                for (value, &rank) in others.iter_mut().zip(ranks.by_ref()) {
                    let &(symbol, _) = histogram.get(rank).ok_or(CacheGenError::Stream)?;
                    *value = *anchor + f32::from(symbol) * step;
                }
            }
        }
    }
    Ok(())
}

/// What is not an anchor.
fn differences(channel: &[f32]) -> impl Iterator<Item = f32> {
    channel
        .chunks(GROUP)
        .flat_map(|group| group.iter().copied().skip(1))
}

/// The root of the mean square of all differences, each channel's mean aside, which its
/// distribution holds.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "a mean of f32 values"
)]
fn deviation(values: &[f32], tokens: usize) -> f32 {
    let (mut sum, mut count) = (0.0, 0.0);
    for channel in values.chunks_exact(tokens) {
        let n = differences(channel).count() as f64;
        let mean = differences(channel).map(f64::from).sum::<f64>() / n.max(1.0);
        sum += differences(channel)
            .map(|value| (f64::from(value) - mean).powi(2))
            .sum::<f64>();
        count += n;
    }
    (sum / count.max(1.0)).sqrt() as f32
}

fn histogram(numbers: &[i8]) -> Histogram {
    let mut counts = [0u32; 256];
    for number in numbers {
        let at = usize::from(number.cast_unsigned() ^ 0x80);
        if let Some(count) = counts.get_mut(at) {
            *count += 1;
        }
    }
    let symbols = (i8::MIN..=i8::MAX).zip(counts);
    symbols.filter(|&(_, count)| count > 0).collect()
}

/// `None` where nothing is left to tell apart.
fn model_of(histogram: &Histogram) -> Result<Option<Model>, CacheGenError> {
    if histogram.len() < 2 {
        return Ok(None);
    }
    let total: u64 = histogram.iter().map(|&(_, count)| u64::from(count)).sum();
    let symbols = histogram.len() as u64;
    let (mut sum, mut before) = (0, 0);
    let frequencies: Vec<u32> = histogram
        .iter()
        .zip(1..)
        .map(|(&(_, count), index)| {
            sum += u64::from(count);
            let end = sum * (u64::from(TOTAL) - symbols) / total + index;
            let frequency = end - before;
            before = end;
            u32::try_from(frequency).unwrap_or(TOTAL)
        })
        .collect();
    model(&frequencies).map(Some)
}

fn write_table(histogram: &Histogram, out: &mut Vec<u8>) {
    // 256 symbols are one more than a byte says: zero, which no table of values has.
    out.push((histogram.len() % 256).to_le_bytes()[0]);
    for &(symbol, mut count) in histogram {
        out.push(symbol.cast_unsigned());
        while count >= 0x80 {
            out.push(count.to_le_bytes()[0] | 0x80);
            count >>= 7;
        }
        out.push(count.to_le_bytes()[0]);
    }
}

/// A table of `total` symbols.
fn read_table(reader: &mut Reader<'_>, total: usize) -> Result<Histogram, CacheGenError> {
    if total == 0 {
        reader.bytes(1)?;
        return Ok(Vec::new());
    }
    let [symbols] = reader.take()?;
    let symbols = if symbols == 0 {
        256
    } else {
        usize::from(symbols)
    };
    let mut histogram = Histogram::with_capacity(symbols);
    let mut sum = 0u64;
    for _ in 0..symbols {
        let [symbol] = reader.take()?;
        let symbol = symbol.cast_signed();
        let mut count = 0u32;
        for shift in (0..28).step_by(7) {
            let [byte] = reader.take()?;
            count |= u32::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let ascends = histogram.last().is_none_or(|&(last, _)| last < symbol);
        if count == 0 || !ascends {
            return Err(CacheGenError::Table);
        }
        sum += u64::from(count);
        histogram.push((symbol, count));
    }
    if sum == total as u64 {
        Ok(histogram)
    } else {
        Err(CacheGenError::Table)
    }
}

/// Tokens of a group, its anchor included.
const GROUP: usize = 10;
/// Steps in deviations, by third of the layers.
const BINS: [f32; 3] = [0.5, 1.0, LAST_BIN];
const LAST_BIN: f32 = 1.5;
