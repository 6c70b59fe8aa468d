//! `device`: the engine on a GPU.
//!
//! # Rows
//! Of a random Llama of about 1.1 B parameters (`--quick`: 246 M), weights and pages bf16:
//!
//! - `prefill/N`: tokens a second of a prompt of N tokens;
//! - `decode/B`: tokens a second of B sequences at once, each behind N tokens, of greedy choice
//!   on the device;
//! - `write_layer`, `read_layer`: GB a second of layers of 256 tokens between payloads and
//!   pages, beside the limit: copies of one page-locked buffer of the same size;
//! - `decoded/L0` to `decoded/L2`: GB a second of 16-bit KV that was sent encoded and decoded
//!   into pages, beside the limit: the same KV written raw. Suite `cuda` has more of that.
//!
//! There is no comparison with another engine. Where there is no GPU there are no rows: the
//! suite fails and says what is missing.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kvasir_codec::{LADDER, LayerCodec};
use kvasir_cuda::CudaDecoder;
use kvasir_engine::device::{
    BeforeDeviceLayer, Device, DeviceModel, DevicePool, DeviceScratch, EncodedLayer,
};
use kvasir_engine::{BLOCK_TOKENS, BlockId, KvDtype, LogitsWanted, Positions, Step};
use kvasir_types::{DType, KvLayout, Planes};

use crate::checkpoint::{self, Shape};
use crate::cuda::random_layer;
use crate::report::{Report, Row, median};

/// What to measure on.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Options {
    /// Which device.
    #[arg(long, default_value_t = 0)]
    device: usize,
}

pub(crate) fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    // First of all: what follows takes minutes and gigabytes.
    let device = Device::cuda(options.device).context("no device to measure on")?;
    let mut decoder = CudaDecoder::new(options.device).context("no device to measure on")?;
    let (shape, prompt) = if quick {
        (Shape::PREFILL, 512)
    } else {
        (Shape::BILLION, 2048)
    };
    let mut report = Report::new("device");
    report.set("device", device.name()?);
    report.set("parameters", shape.parameters());
    let window = Duration::from_millis(if quick { 500 } else { 5000 });

    let directory = tempfile::tempdir()?;
    checkpoint::write(directory.path(), &shape)?;
    let model = DeviceModel::load(&device, directory.path(), KvDtype::Bf16)?;
    let sequence = prompt + DECODED;
    let blocks = LARGEST_BATCH * sequence.div_ceil(BLOCK_TOKENS);
    let mut pool = DevicePool::new(&device, model.config(), blocks, KvDtype::Bf16)?;
    let mut engine = Engine {
        scratch: DeviceScratch::new(&device),
        model,
        tables: (0..LARGEST_BATCH)
            .map(|_| {
                let pages = (0..sequence.div_ceil(BLOCK_TOKENS)).filter_map(|_| pool.alloc());
                pages.collect()
            })
            .collect(),
        pool,
        vocabulary: u32::try_from(shape.vocabulary)?,
    };
    let speed = engine.prefill(prompt, window)?;
    report.push(Row::new(format!("prefill/{prompt}"), speed, "tokens/s"));
    for batch in [1, LARGEST_BATCH] {
        let speed = engine.decode(batch, prompt)?;
        report.push(Row::new(format!("decode/{batch}"), speed, "tokens/s"));
    }
    layers(&device, &mut engine, &mut decoder, window, &mut report)?;
    Ok(report)
}

struct Engine {
    model: DeviceModel,
    pool: DevicePool,
    scratch: DeviceScratch,
    tables: Vec<Vec<BlockId>>,
    vocabulary: u32,
}

impl Engine {
    /// Tokens a second of one prompt; every sequence holds one afterwards.
    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    fn prefill(&mut self, prompt: usize, window: Duration) -> anyhow::Result<f64> {
        let mut speeds = Vec::new();
        let begun = Instant::now();
        for (run, sequence) in (0..self.tables.len()).cycle().enumerate() {
            if run > self.tables.len() && begun.elapsed() > window {
                break;
            }
            let tokens: Vec<u32> = (0..u32::try_from(prompt)?)
                .map(|at| (at * 31 + 7) % self.vocabulary)
                .collect();
            let step = Step {
                tokens: &tokens,
                positions: Positions::From(0),
                blocks: &self.tables[sequence],
                logits: LogitsWanted::Last,
            };
            let before = Instant::now();
            self.model
                .forward_greedy(&mut self.pool, &mut self.scratch, &[step], &mut go_on)?;
            // The first one finds algorithms, and memory for activations.
            if run > 0 {
                speeds.push(prompt as f64 / before.elapsed().as_secs_f64());
            }
        }
        Ok(median(&mut speeds))
    }

    /// Tokens a second of some sequences at once.
    #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
    fn decode(&mut self, batch: usize, prompt: usize) -> anyhow::Result<f64> {
        let mut tokens = vec![1u32; batch];
        let mut speeds = Vec::new();
        for position in prompt..prompt + DECODED {
            let steps: Vec<Step<'_>> = tokens
                .chunks(1)
                .zip(&self.tables)
                .map(|(tokens, blocks)| Step {
                    tokens,
                    positions: Positions::From(position),
                    blocks,
                    logits: LogitsWanted::Last,
                })
                .collect();
            let before = Instant::now();
            let chosen =
                self.model
                    .forward_greedy(&mut self.pool, &mut self.scratch, &steps, &mut go_on)?;
            if position > prompt {
                speeds.push(batch as f64 / before.elapsed().as_secs_f64());
            }
            let chosen = chosen.concat().into_iter().collect::<Option<Vec<u32>>>();
            tokens = chosen.context("the device computed what is no number")?;
        }
        Ok(median(&mut speeds))
    }
}

/// Layers between the host and pages: raw both ways, and encoded.
#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
fn layers(
    device: &Device,
    engine: &mut Engine,
    decoder: &mut CudaDecoder,
    window: Duration,
    report: &mut Report,
) -> anyhow::Result<()> {
    let config = engine.model.config();
    let (heads, dim) = (config.kv_heads.try_into()?, config.head_dim.try_into()?);
    let layers = config.layers;
    let tokens = u32::try_from(CHUNK_TOKENS)?;
    let layout = KvLayout::new(1, heads, Planes::symmetric(dim), tokens, DType::Bf16)?;
    let raw = random_layer(&layout, 1);
    let gigabytes = (layers * layout.layer_bytes()) as f64 / 1e9;
    let table = &engine.tables[0];
    let pool = &mut engine.pool;

    // The best of some: a limit is not what happened to be in the way.
    let mut limits = [f64::MAX; 2];
    for _ in 0..8 {
        let times = device.time_copies(raw.len(), layers)?;
        for (limit, time) in limits.iter_mut().zip(times) {
            *limit = limit.min(time.as_secs_f64());
        }
    }
    let [limit_in, limit_out] = limits.map(|seconds| gigabytes / seconds);
    let speed = |what: &mut dyn FnMut() -> anyhow::Result<()>| -> anyhow::Result<f64> {
        let mut speeds = Vec::new();
        let begun = Instant::now();
        while begun.elapsed() < window || speeds.len() < 3 {
            let before = Instant::now();
            what()?;
            speeds.push(gigabytes / before.elapsed().as_secs_f64());
        }
        Ok(median(&mut speeds))
    };
    let written = speed(&mut || {
        for layer in 0..layers {
            pool.write_layer(table, 0, CHUNK_TOKENS, layer, &raw)?;
        }
        Ok(pool.finish_copies()?)
    })?;
    let row = Row::new("write_layer", written, "GB/s");
    report.push(row.against(limit_in, written / limit_in));
    let mut out = vec![0; raw.len()];
    let read = speed(&mut || {
        for layer in 0..layers {
            pool.read_layer(table, 0, CHUNK_TOKENS, layer, &mut out)?;
        }
        Ok(())
    })?;
    anyhow::ensure!(out == raw, "pages hold other bytes than were written");
    let row = Row::new("read_layer", read, "GB/s");
    report.push(row.against(limit_out, read / limit_out));

    let codec = LayerCodec::new(layout, None)?;
    let steps = codec.deviations(&raw).map(|of| of * 3.0);
    let encoded = codec.encode(&raw, steps);
    for level in 0..LADDER {
        let parts: Vec<&[u8]> = encoded.parts[..=level].iter().map(Vec::as_slice).collect();
        let jobs: Vec<EncodedLayer<'_>> = (0..layers)
            .map(|layer| EncodedLayer {
                codec: &codec,
                parts: &parts,
                blocks: table,
                first_token: 0,
                layer,
            })
            .collect();
        let decoded = speed(&mut || {
            pool.decode_layers(decoder, &jobs)?;
            Ok(())
        })?;
        let mut expected = vec![0; raw.len()];
        codec.decode(&parts, &mut expected)?;
        pool.read_layer(table, 0, CHUNK_TOKENS, layers - 1, &mut out)?;
        anyhow::ensure!(out == expected, "the device decodes to other values");
        let row = Row::new(format!("decoded/L{level}"), decoded, "GB/s");
        report.push(row.against(written, decoded / written));
    }
    Ok(())
}

fn go_on(_: BeforeDeviceLayer<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

const LARGEST_BATCH: usize = 16;
/// Tokens that are decoded behind each prompt.
const DECODED: usize = 64;
const CHUNK_TOKENS: usize = 256;
