//! `cuda`: how fast a GPU decodes nested levels, beside sending it the raw KV.
//!
//! # Rows
//! PLACE/LEVEL, where PLACE is `raw`, a raw layer, or `pages`, pages of 16 tokens of a pool a
//! layer, and LEVEL is `L0` to `L2`, is followed by
//!
//! - `kernel`: GB of 16-bit KV a second of the kernel alone, as the device measured it;
//! - `whole`: a second from encoded bytes in host memory until the values lie on the device,
//!   beside the limit: the raw KV sent there;
//! - `plan`: a second of reading and checking on the host, in one thread, which is part of it;
//! - `sent`: bytes that were sent, as a share of the raw KV.
//!
//! Keys and values are random, of channels that differ in spread, f16, in layers as those of
//! an 8B model: 8 heads of 128 channels. What the first layer decodes to is compared with
//! the CPU's.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kvasir_codec::{EncodedLayer, LADDER, LayerCodec, Pairing, Rotation};
use kvasir_cuda::{CudaDecoder, CudaSlice, LayerJob, Placement};
use kvasir_types::{DType, KvLayout, Planes};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::report::{Report, Row, median};

/// What to measure on.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Options {
    /// Which device.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Tokens a chunk.
    #[arg(long, default_value_t = 256)]
    tokens: u32,
    /// Layers at once, of all chunks together.
    #[arg(long, default_value_t = 256)]
    layers: usize,
    /// Steps of level 0, in standard deviations.
    #[arg(long, default_value_t = 3.0)]
    step: f32,
}

pub(crate) fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    let mut decoder = CudaDecoder::new(options.device).context("no device to measure on")?;
    let mut report = Report::new("cuda");
    report.set("device", decoder.device_name()?);
    report.set("tokens", options.tokens);
    report.set("layers", options.layers);
    report.set("step", options.step);
    ensure!(options.layers > 0, "at least one layer");
    let layout = KvLayout::new(1, 8, Planes::symmetric(128), options.tokens, DType::F16)?;
    let frequencies: Vec<f32> = (0u8..64)
        .map(|at| 500_000f32.powf(-f32::from(at) / 64.0))
        .collect();
    let rotation = Rotation::new(&frequencies, Pairing::Halves, 1.0, 0, options.tokens);
    let codec = LayerCodec::new(layout, Some(&rotation))?;
    let raws: Vec<Vec<u8>> = (0..DISTINCT_LAYERS)
        .map(|seed| random_layer(&layout, seed))
        .collect();
    let encoded: Vec<EncodedLayer> = raws
        .iter()
        .map(|raw| {
            let steps = codec.deviations(raw).map(|of| of * options.step);
            codec.encode(raw, steps)
        })
        .collect();
    let window = Duration::from_millis(if quick { 200 } else { 2000 });

    let mut buffers = Vec::new();
    for _ in 0..options.layers {
        let buffer = decoder.stream().alloc_zeros::<u8>(layout.layer_bytes())?;
        buffers.push(buffer);
    }
    let limit = send_raw(&decoder, &raws, &mut buffers, window)?;
    report.push(Row::new("raw_sent", limit, "GB/s"));
    let pages = layout.tokens().div_ceil(PAGE_TOKENS);
    let places = [
        ("raw", Placement::raw(&layout, 0)),
        (
            "pages",
            Placement::pool(&layout, PAGE_TOKENS, pages, (0..pages).rev().collect()),
        ),
    ];
    for (name, placement) in &places {
        for level in 0..LADDER {
            let parts: Vec<Vec<&[u8]>> = encoded
                .iter()
                .map(|layer| layer.parts[..=level].iter().map(Vec::as_slice).collect())
                .collect();
            let jobs: Vec<LayerJob<'_>> = (0..options.layers)
                .zip(parts.iter().cycle())
                .map(|(buffer, parts)| LayerJob {
                    codec: &codec,
                    parts,
                    placement,
                    buffer,
                })
                .collect();
            let bytes = layout.layer_bytes() * options.layers;
            let speeds = Speeds::of(&mut decoder, &jobs, &mut buffers, bytes, window)?;
            if *name == "raw" {
                let mut expected = vec![0; layout.layer_bytes()];
                codec.decode(jobs[0].parts, &mut expected)?;
                let found = decoder.stream().clone_dtoh(&buffers[0])?;
                ensure!(found == expected, "the device decodes to other values");
            }
            let row =
                |what: &str, value, unit| Row::new(format!("{name}/L{level}/{what}"), value, unit);
            report.push(row("kernel", speeds.kernel, "GB/s"));
            let whole = row("whole", speeds.whole, "GB/s");
            report.push(whole.against(limit, speeds.whole / limit));
            report.push(row("plan", speeds.plan, "GB/s"));
            report.push(row("sent", speeds.sent, "share"));
        }
    }
    Ok(report)
}

/// In GB of raw KV a second.
struct Speeds {
    kernel: f64,
    whole: f64,
    plan: f64,
    /// Of the raw KV.
    sent: f64,
}

impl Speeds {
    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    fn of(
        decoder: &mut CudaDecoder,
        jobs: &[LayerJob<'_>],
        buffers: &mut [CudaSlice<u8>],
        bytes: usize,
        window: Duration,
    ) -> anyhow::Result<Self> {
        let gigabytes = bytes as f64 / 1e9;
        let (mut kernel, mut whole, mut plan) = (Vec::new(), Vec::new(), Vec::new());
        let mut sent = decoder.decode_layers(jobs, buffers)?.sent_bytes;
        let begun = Instant::now();
        while begun.elapsed() < window || whole.len() < 3 {
            let before = Instant::now();
            let timings = decoder.decode_layers(jobs, buffers)?;
            whole.push(gigabytes / before.elapsed().as_secs_f64());
            kernel.push(gigabytes / timings.kernel.as_secs_f64());
            plan.push(gigabytes / timings.plan.as_secs_f64());
            sent = timings.sent_bytes;
        }
        Ok(Self {
            kernel: median(&mut kernel),
            whole: median(&mut whole),
            plan: median(&mut plan),
            sent: sent as f64 / bytes as f64,
        })
    }
}

/// GB a second of raw layers that are copied to the device, each to its buffer.
#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
fn send_raw(
    decoder: &CudaDecoder,
    raws: &[Vec<u8>],
    buffers: &mut [CudaSlice<u8>],
    window: Duration,
) -> anyhow::Result<f64> {
    let bytes: usize = buffers.iter().map(|buffer| buffer.len()).sum();
    let mut speeds = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < window || speeds.len() < 3 {
        let before = Instant::now();
        for (buffer, raw) in buffers.iter_mut().zip(raws.iter().cycle()) {
            decoder.stream().memcpy_htod(raw, buffer)?;
        }
        decoder.stream().synchronize()?;
        speeds.push(bytes as f64 / 1e9 / before.elapsed().as_secs_f64());
    }
    Ok(median(&mut speeds))
}

/// 16-bit values: channels of means and spreads of their own, and nearly normal.
pub(crate) fn random_layer(layout: &KvLayout, seed: u64) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut channels = Vec::new();
    let heads = 2 * usize::from(layout.kv_heads());
    let dim = layout.layer_bytes() / 2 / heads / layout.tokens() as usize;
    let mut raw = Vec::with_capacity(layout.layer_bytes());
    for _ in 0..heads {
        channels.clear();
        channels.extend((0..dim).map(|_| {
            let spread = random.random_range(-2.0..1.5f32).exp();
            (random.random_range(-1.0..1.0f32), spread)
        }));
        for _ in 0..layout.tokens() {
            for (mean, spread) in &channels {
                let noise: f32 = (0..6).map(|_| random.random_range(-1.0..1.0f32)).sum();
                let value = mean + spread * noise / 1.4;
                raw.extend(match layout.dtype() {
                    DType::Bf16 => half::bf16::from_f32(value).to_le_bytes(),
                    _ => half::f16::from_f32(value).to_le_bytes(),
                });
            }
        }
    }
    raw
}

/// Enough for none to be like the one before, and few to make.
const DISTINCT_LAYERS: u64 = 8;
const PAGE_TOKENS: u32 = 16;
