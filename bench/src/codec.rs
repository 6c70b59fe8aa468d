//! `codec`: what a value takes, how exact it stays, and how fast it is coded.
//!
//! # Rows
//! METHOD/LEVEL is followed by
//!
//! - `bits` a value, everything counted: streams with their states, offsets, classes,
//!   steps, lengths; without the header of the object, which is the same for all;
//! - `snr`: of the centred keys and values, in dB: the mean square of what is left without
//!   the means of channels, over that of the errors, as the median over layers and planes;
//! - `encode_core`, `decode_core`: GB of 16-bit KV a second of CPU time, in one thread;
//!   `decode_all`: a second of wall time, in as many threads as there are cores.
//!
//! LEVEL is `L0` to `L2`, or `lossless`, which has no `snr`. `side_info` and the lossy rows
//! are of f16, and so is `lossless_f16`; `lossless` is of the same values as bf16, which is
//! what models are trained and served in.
//!
//! `kvasir/side_info` is the part of the bits that is not symbols, at level 0, as a share of
//! the 16 bits of a raw value. Levels nest: a level's bits hold those of all before it, and
//! encoding makes all of them at once.
//!
//! Of the other methods see [`peers`]; of those that do not ship, and are named in
//! [`crate::methods`] as comparisons, speeds say nothing about what is possible.
//!
//! The KV is that of the model on contexts of the corpus, or on a `--text`, f16, in chunks of as many tokens
//! as asked for. Speeds are of copies of it in turn.

mod peers;

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::ensure;
use kvasir_codec::{
    EncodedLayer, LADDER, LayerCodec, Pairing, Rotation, decode_lossless, encode_lossless,
};
use kvasir_engine::rope::Frequencies;
use kvasir_types::{DType, KvLayout, Planes};
use rustix::time::{ClockId, clock_gettime};

use crate::contexts::Contexts;
use crate::corpus::Split;
use crate::quality::reader::Reader;
use crate::report::{Report, Row, median};

/// What to measure on.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// A model in the Hugging Face layout; without `--text`, one trained on the corpus.
    #[arg(long, default_value = "models/reader-9m")]
    model: PathBuf,
    /// What the model reads instead of contexts of the corpus: a text, half of which is for
    /// calibration.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens a chunk, a multiple of 64.
    #[arg(long, default_value_t = 256)]
    tokens: u32,
    /// Chunks.
    #[arg(long, default_value_t = 8)]
    chunks: u64,
    /// Steps of level 0, in standard deviations.
    #[arg(long, value_delimiter = ',', default_value = "3")]
    steps: Vec<f32>,
    /// Writes a plot of bits and decoding speed.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Chunks of one layout.
struct Chunks {
    layout: KvLayout,
    rotation: Rotation,
    /// By chunk and layer, raw.
    layers: Vec<Vec<Vec<u8>>>,
    /// The same as bf16.
    bf16: Vec<Vec<Vec<u8>>>,
}

pub(crate) fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    let mut report = Report::new("codec");
    let count = if quick { 2 } else { options.chunks };
    let chunks = Chunks::of_model(options, count)?;
    report.set("model", options.model.to_string_lossy());
    report.set("tokens", options.tokens);
    report.set("chunks", count);
    let window = Duration::from_millis(if quick { 200 } else { 1500 });
    let mut points = Vec::new();
    for &step in &options.steps {
        ensure!(
            step.is_normal() && step > 0.0,
            "a step is a positive number"
        );
        report.set("step", step);
        chunks.measure(step, window, &mut points, &mut report)?;
    }
    chunks.measure_lossless(window, &mut points, &mut report)?;
    points.extend(peers::measure(options, quick, window, &mut report)?);
    if let Some(path) = &options.plot {
        peers::plot(points, path)?;
    }
    Ok(report)
}

impl Chunks {
    fn of_model(options: &Options, count: u64) -> anyhow::Result<Self> {
        ensure!(
            options.tokens > 0 && options.tokens.is_multiple_of(CORPUS_CHUNK),
            "chunks of 64 tokens"
        );
        let contexts = Contexts::new(&options.model, options.text.as_deref())?;
        let tokens = options.tokens as usize;
        let mut reader = Reader::load(&options.model, tokens + 1)?;
        let config = reader.config();
        let width = u16::try_from(config.head_dim)?;
        let layout = KvLayout::new(
            u16::try_from(config.layers)?,
            u16::try_from(config.kv_heads)?,
            Planes::symmetric(width),
            options.tokens,
            DType::F16,
        )?;
        let Frequencies {
            radians,
            attention_factor,
        } = config.rope.frequencies(config.head_dim);
        let rotation = Rotation::new(
            &radians,
            Pairing::Halves,
            attention_factor,
            1,
            options.tokens,
        );
        let (mut layers, mut bf16) = (Vec::new(), Vec::new());
        for index in 0..count {
            let all = contexts.context(index, tokens, CORPUS_CHUNK as usize, Split::Test)?;
            let pages = reader.prefill(&all)?;
            // Without the first token, whose keys and values are like no other's.
            let kv = reader.take(&pages, 1..all.len())?;
            reader.release(pages)?;
            layers.push(kv.layers.iter().map(|layer| to_f16(layer)).collect());
            bf16.push(kv.layers.iter().map(|layer| to_bf16(layer)).collect());
        }
        Ok(Self {
            layout,
            rotation,
            layers,
            bf16,
        })
    }

    fn codec(&self) -> anyhow::Result<LayerCodec<'_>> {
        Ok(LayerCodec::new(self.layout, Some(&self.rotation))?)
    }

    fn all(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.layers.iter().flatten()
    }

    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    fn measure(
        &self,
        step: f32,
        window: Duration,
        points: &mut Vec<(String, f64, f64)>,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let codec = self.codec()?;
        let steps: Vec<[f32; 2]> = self
            .all()
            .map(|raw| {
                codec
                    .deviations(raw)
                    .map(|deviation| (deviation * step).max(f32::MIN_POSITIVE))
            })
            .collect();
        let encoded: Vec<EncodedLayer> = self
            .all()
            .zip(&steps)
            .map(|(raw, &steps)| codec.encode(raw, steps))
            .collect();
        let values = (encoded.len() * self.layout.layer_bytes() / 2) as f64;
        let turns = rate(window, self.layout.layer_bytes() * encoded.len(), || {
            for (raw, &steps) in self.all().zip(&steps) {
                black_box(codec.encode(raw, steps));
            }
        });
        for level in 0..LADDER {
            let name = format!("kvasir/L{level}");
            let parts: Vec<Vec<&[u8]>> = encoded
                .iter()
                .map(|layer| layer.parts[..=level].iter().map(Vec::as_slice).collect())
                .collect();
            let bytes: usize = parts.iter().flatten().map(|part| part.len()).sum();
            let bits = 8.0 * bytes as f64 / values;
            report.push(Row::new(format!("{name}/bits"), bits, "bit"));
            let mut raw = vec![0; self.layout.layer_bytes()];
            let mut ratios = Vec::new();
            for (parts, before) in parts.iter().zip(self.all()) {
                codec.decode(parts, &mut raw)?;
                ratios.extend(self.signal_to_noise(before, &raw)?);
            }
            report.push(Row::new(format!("{name}/snr"), median(&mut ratios), "dB"));
            report.push(Row::new(format!("{name}/encode_core"), turns, "GB/s"));
            let decode = |raw: &mut [u8]| -> anyhow::Result<()> {
                for parts in &parts {
                    codec.decode(black_box(parts), raw)?;
                }
                Ok(())
            };
            let size = self.layout.layer_bytes() * encoded.len();
            let core = rate(window, size, || decode(&mut raw).unwrap_or(()));
            report.push(Row::new(format!("{name}/decode_core"), core, "GB/s"));
            points.push((
                format!("kvasir, {} tokens", self.layout.tokens()),
                bits,
                core,
            ));
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let begun = Instant::now();
            std::thread::scope(|scope| {
                for _ in 0..cores {
                    scope.spawn(|| {
                        let mut raw = vec![0; self.layout.layer_bytes()];
                        decode(&mut raw).unwrap_or(());
                    });
                }
            });
            let all = (cores * size) as f64 / 1e9 / begun.elapsed().as_secs_f64();
            report.push(Row::new(format!("{name}/decode_all"), all, "GB/s"));
        }
        let side = codec.side_bytes() * encoded.len();
        report.push(Row::new(
            "kvasir/side_info",
            8.0 * side as f64 / values / 16.0,
            "share",
        ));
        Ok(())
    }

    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    fn measure_lossless(
        &self,
        window: Duration,
        points: &mut Vec<(String, f64, f64)>,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        for (name, layers, dtype) in [
            ("kvasir/lossless", &self.bf16, DType::Bf16),
            ("kvasir/lossless_f16", &self.layers, DType::F16),
        ] {
            let (heads, planes, tokens) = (
                self.layout.kv_heads(),
                self.layout.planes(),
                self.layout.tokens(),
            );
            let layout = KvLayout::new(self.layout.layers(), heads, planes, tokens, dtype)?;
            let raws: Vec<&Vec<u8>> = layers.iter().flatten().collect();
            let encoded: Vec<Vec<u8>> = raws
                .iter()
                .map(|raw| encode_lossless(&layout, raw))
                .collect();
            let mut raw = vec![0; layout.layer_bytes()];
            for (encoded, before) in encoded.iter().zip(&raws) {
                decode_lossless(&layout, encoded, &mut raw)?;
                ensure!(raw == **before, "a lossless codec lost something");
            }
            let size = layout.layer_bytes() * raws.len();
            let bytes: usize = encoded.iter().map(Vec::len).sum();
            let bits = 16.0 * bytes as f64 / size as f64;
            report.push(Row::new(format!("{name}/bits"), bits, "bit"));
            let encode = rate(window, size, || {
                for raw in &raws {
                    black_box(encode_lossless(&layout, raw));
                }
            });
            report.push(Row::new(format!("{name}/encode_core"), encode, "GB/s"));
            let decode = rate(window, size, || {
                for encoded in &encoded {
                    decode_lossless(&layout, black_box(encoded), &mut raw).unwrap_or(());
                }
            });
            report.push(Row::new(format!("{name}/decode_core"), decode, "GB/s"));
            points.push((format!("kvasir, {}", dtype), bits, decode));
        }
        Ok(())
    }

    /// Of each plane, in dB.
    fn signal_to_noise(&self, before: &[u8], after: &[u8]) -> anyhow::Result<[f64; 2]> {
        let half = before.len() / 2;
        let dim = half / 2 / self.layout.kv_heads() as usize / self.layout.tokens() as usize;
        let mut ratios = [0.0; 2];
        for (plane, ratio) in ratios.iter_mut().enumerate() {
            let place = plane * half..(plane + 1) * half;
            let read = |raw: &[u8]| from_f16(raw.get(place.clone()).unwrap_or(&[]));
            let (before, after) = (read(before), read(after));
            let (mut signal, mut noise) = (0.0, 0.0);
            let head = dim * self.layout.tokens() as usize;
            for (before, after) in before.chunks(head).zip(after.chunks(head)) {
                for channel in 0..dim {
                    let of = |values: &[f64]| -> Vec<f64> {
                        values.iter().skip(channel).step_by(dim).copied().collect()
                    };
                    let (before, after) = (of(before), of(after));
                    let mean = before.iter().sum::<f64>() / f64::from(self.layout.tokens());
                    signal += before
                        .iter()
                        .map(|value| (value - mean).powi(2))
                        .sum::<f64>();
                    noise += before
                        .iter()
                        .zip(&after)
                        .map(|(a, b)| (a - b).powi(2))
                        .sum::<f64>();
                }
            }
            *ratio = 10.0 * (signal / noise).log10();
        }
        Ok(ratios)
    }
}

/// GB a second of CPU time: the median of several loops.
#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
fn rate(window: Duration, bytes: usize, mut work: impl FnMut()) -> f64 {
    let cpu = || {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(
            now.tv_sec.unsigned_abs(),
            u32::try_from(now.tv_nsec).unwrap_or(0),
        )
    };
    work();
    let begun = Instant::now();
    let mut rates = Vec::new();
    while begun.elapsed() < window || rates.len() < 3 {
        let before = cpu();
        work();
        rates.push(bytes as f64 / 1e9 / (cpu() - before).as_secs_f64());
    }
    median(&mut rates)
}

fn to_f16(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|&value| half::f16::from_f32(value).to_le_bytes())
        .collect()
}

fn to_bf16(values: &[f32]) -> Vec<u8> {
    let bytes = |&value: &f32| half::bf16::from_f32(value).to_le_bytes();
    values.iter().flat_map(bytes).collect()
}

fn from_f16(raw: &[u8]) -> Vec<f64> {
    raw.as_chunks()
        .0
        .iter()
        .map(|&bytes| half::f16::from_le_bytes(bytes).to_f64())
        .collect()
}

/// Tokens of a chunk of the corpus.
const CORPUS_CHUNK: u32 = 64;
