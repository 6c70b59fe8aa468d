//! What there is to gain in the KV of a model, and where reuse of it goes wrong.
//!
//! Everything is measured on full prefill of contexts of the corpus, in f32,
//! without the token at position 0. Rows of layer L:
//!
//! - `layer/L/PLANE/…` with PLANE `v`, `k` (keys with RoPE undone) or `k_post` (keys
//!   as stored): `mean_share` of the second moment that is the channels' means; then,
//!   with these removed, `outlier_ratio` (largest over median standard deviation of a
//!   channel), `kurtosis` (excess, all channels together) and `kurtosis_channel`
//!   (median channel), `std`, and what tokens say about each other: `lag1`
//!   correlation, `lag1_delta` variance of the difference from the token before over
//!   variance (2.0: independent), `anchor_delta` the same for the first of ten tokens,
//!   `predicted_bits` what predicting from the token before could save;
//! - `layer/L/PLANE/rounding_RULE` with PLANE `k_post` or `v`: error of 8 bits a value, root of the
//!   mean square over that of the values, one step for a `token` and head, for a `channel` over 16
//!   tokens, or for a `group` of 32 channels of a token;
//! - `layer/L/k/rope_ratio`: variance with RoPE undone over variance as stored;
//! - `layer/L/PLANE/klt_…` with PLANE `k` or `v`: gain of a Karhunen–Loève transform
//!   over per-channel tables, per `head`, per `layer`, and over the layer and the next
//!   (`pair`); `…_held_out`: of a basis made of the contexts of even number, on the
//!   others; `channel_gain`: of per-channel tables over one table;
//! - `layer/L/sink_k`, `sink_v`: length of K or V at position 0 over that of the
//!   median token; `…/chunk` of a chunk's first token, mean over chunks, and
//!   `…/chunk_max` of the chunk where it is largest;
//! - `rank_correlation/L`, `top5/L`, `top15/L`, `overlap15/L` from layer 1 on: see
//!   [`deviation`]; means over contexts with bootstrapped intervals;
//! - `median/…`: of a measure over layers, and `gate/G6/…`: what reuse must show for
//!   a selector of tokens to be possible.
//!
//! A measure that does not exist, as the spread of padding, has no row. The same
//! seed gives the same rows.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use nalgebra::DMatrix;

use crate::corpus::{self, Profile, Split, Vocabulary};
use crate::quality::gates::{self, Bar};
use crate::quality::interval;
use crate::quality::method::Caches;
use crate::quality::reader::{Kv, Reader};
use crate::report::{Report, Row, median};

pub(crate) mod deviation;
mod klt;
mod moments;
pub(crate) mod plane;
mod rounding;
mod sinks;

use deviation::Deviation;
use klt::Scatter;
use moments::Moments;
use plane::{Plane, Shape};
use rounding::Rounding;
use sinks::Sinks;

/// Correlation of ranks of neighbouring layers, median over layers.
const RANK_CORRELATION: f64 = 0.3;
/// Share of the deviation in 15 % of the tokens, median over layers.
const TOP15: f64 = 0.5;

/// What to measure on.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// A model trained on the corpus, in the Hugging Face layout.
    #[arg(long, default_value = "models/reader-9m")]
    pub(crate) model: PathBuf,
    /// Contexts. Default: 32; with --quick, 16.
    #[arg(long)]
    pub(crate) contexts: Option<usize>,
    /// Chunks a context.
    #[arg(long, default_value_t = 8)]
    pub(crate) chunks: usize,
    /// Tokens a chunk.
    #[arg(long, default_value_t = 64)]
    pub(crate) size: usize,
    /// Seed of contexts and intervals.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

impl Options {
    fn record(&self, reader: &Reader, contexts: usize, quick: bool, report: &mut Report) {
        let model = self.model.file_name().unwrap_or(self.model.as_os_str());
        report.set("model", model.to_string_lossy());
        report.set("model_digest", reader.digest());
        report.set("seed", self.seed);
        report.set("contexts", contexts);
        report.set("chunks", self.chunks);
        report.set("chunk_tokens", self.size);
        report.set("quick", quick);
    }
}

/// Runs the suite.
pub(crate) fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    ensure!(options.chunks > 1, "reuse needs a chunk after the first");
    let vocabulary = Vocabulary::load()?;
    let mut reader = Reader::load(&options.model, options.chunks * options.size + 1)?;
    let config = reader.config();
    ensure!(
        config.vocab_size == vocabulary.len(),
        "{} has {} tokens, the corpus {}: use a model trained on it",
        options.model.display(),
        config.vocab_size,
        vocabulary.len()
    );
    let shape = Shape {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
    };
    let contexts = options.contexts.unwrap_or(if quick { 16 } else { 32 });
    // Found out before the work, not after: each half must do for the largest basis.
    let half = contexts / 2 * options.chunks * options.size;
    klt::enough(half, shape.channels() * shape.layers.min(2))
        .context("each half of the contexts makes a basis: ask for more --contexts")?;
    let mut report = Report::new("kvstats");
    options.record(&reader, contexts, quick, &mut report);
    let mut statistics = Statistics::new(shape);
    let bar = crate::progress(contexts as u64, "kvstats");
    for index in 0..contexts as u64 {
        let context = corpus::sample(
            &vocabulary,
            &Profile::default(),
            options.chunks,
            options.size,
            corpus::mix(options.seed, index),
            Split::Test,
        )?;
        let caches = Caches::new(&mut reader, vocabulary.bos, &context.chunks)?;
        let tokens = caches.tokens();
        let pages = reader.prefill(&tokens)?;
        let full = reader.take(&pages, 0..tokens.len())?;
        reader.release(pages)?;
        let mut unrotated = full.clone();
        reader.unrotate(&mut unrotated, 0);
        statistics.add(&full, &unrotated, &caches.repositioned(&reader));
        bar.inc(1);
    }
    bar.finish_and_clear();
    statistics.report(options.seed, &mut report)?;
    Ok(report)
}

/// Sums over contexts.
#[derive(Debug)]
struct Statistics {
    shape: Shape,
    contexts: usize,
    layers: Vec<Layer>,
    /// K and V of contexts of even, and of odd number.
    scatters: [[Scatter; 2]; 2],
    deviations: Vec<Deviation>,
}

#[derive(Clone, Debug, Default)]
struct Layer {
    k: Moments,
    k_post: Moments,
    v: Moments,
    sinks: [Sinks; 2],
    /// Of K as stored, and of V.
    rounding: [Rounding; 2],
}

impl Statistics {
    fn new(shape: Shape) -> Self {
        let scatters = || {
            let scatter = Scatter::new(shape.layers, shape.channels());
            [scatter.clone(), scatter]
        };
        Self {
            shape,
            contexts: 0,
            layers: vec![Layer::default(); shape.layers],
            scatters: [scatters(), scatters()],
            deviations: Vec::new(),
        }
    }

    /// Adds a context as computed, the same with RoPE undone, and its chunks from caches.
    fn add(&mut self, full: &Kv, unrotated: &Kv, reused: &[Kv]) {
        let tokens = 1..full.tokens;
        let starts: Vec<usize> = reused
            .iter()
            .scan(1, |position, chunk| {
                let start = *position;
                *position += chunk.tokens;
                Some(start)
            })
            .collect();
        let mut planes: [Vec<DMatrix<f64>>; 2] = Default::default();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let matrix = |kv, plane| self.shape.matrix(kv, index, plane, tokens.clone());
            layer.k_post.add(&matrix(full, Plane::K));
            let (k, v) = (matrix(unrotated, Plane::K), matrix(full, Plane::V));
            layer.k.add(&k);
            layer.v.add(&v);
            for (rounding, plane) in layer.rounding.iter_mut().zip([Plane::K, Plane::V]) {
                rounding.add(self.shape, full, index, plane);
            }
            planes[0].push(k);
            planes[1].push(v);
            for (sinks, plane) in layer.sinks.iter_mut().zip([Plane::K, Plane::V]) {
                sinks.add(&self.shape.norms(full, index, plane), &starts);
            }
        }
        let half = &mut self.scatters[self.contexts % 2];
        for (scatter, values) in half.iter_mut().zip(&planes) {
            scatter.add(values);
        }
        self.deviations
            .push(Deviation::new(self.shape, full, reused));
        self.contexts += 1;
    }

    fn report(&self, seed: u64, report: &mut Report) -> anyhow::Result<()> {
        let mut rows = Rows {
            report,
            by_measure: BTreeMap::new(),
        };
        for (index, layer) in self.layers.iter().enumerate() {
            layer.report(index, &mut rows);
        }
        let [even, odd] = &self.scatters;
        for (name, (even, odd)) in ["k", "v"].into_iter().zip(even.iter().zip(odd)) {
            gains(self.shape, name, even, odd, &mut rows)?;
        }
        self.report_deviations(seed, &mut rows);
        rows.medians();
        Ok(())
    }

    fn report_deviations(&self, seed: u64, rows: &mut Rows<'_>) {
        type Measure = fn(&Deviation) -> &[Option<f64>];
        let measures: [(&'static str, Measure); 4] = [
            ("rank_correlation", |d| &d.rank_correlation),
            ("top5", |d| &d.top5),
            ("top15", |d| &d.top15),
            ("overlap15", |d| &d.overlap15),
        ];
        for (name, measure) in measures {
            for layer in 1..self.shape.layers {
                let found: Vec<Vec<f64>> = self
                    .deviations
                    .iter()
                    .map(|d| {
                        measure(d)
                            .get(layer - 1)
                            .copied()
                            .flatten()
                            .into_iter()
                            .collect()
                    })
                    .collect();
                if let Some(mean) = interval::estimate(&found, seed) {
                    let unit = if name == "rank_correlation" {
                        "ratio"
                    } else {
                        "share"
                    };
                    let row = Row::new(format!("{name}/{layer}"), mean.value, unit);
                    rows.push(name.to_owned(), row.within(mean.interval), mean.value, unit);
                }
            }
        }
    }
}

impl Layer {
    fn report(&self, index: usize, rows: &mut Rows<'_>) {
        for (plane, moments) in [("k", &self.k), ("k_post", &self.k_post), ("v", &self.v)] {
            let Some(s) = moments.summary() else {
                continue;
            };
            for (measure, value, unit) in [
                ("mean_share", s.mean_share, "share"),
                ("outlier_ratio", s.outlier_ratio, "ratio"),
                ("kurtosis", s.kurtosis, "excess"),
                ("kurtosis_channel", s.kurtosis_channel, "excess"),
                ("std", s.std, "value"),
                ("lag1", s.lag1, "ratio"),
                ("lag1_delta", s.lag1_delta, "ratio"),
                ("anchor_delta", s.anchor_delta, "ratio"),
                ("predicted_bits", s.predicted_bits, "bits/value"),
            ] {
                rows.layer(index, format!("{plane}/{measure}"), value, unit);
            }
        }
        for (plane, rounding) in ["k_post", "v"].into_iter().zip(&self.rounding) {
            for (rule, error) in rounding.errors() {
                rows.layer(index, format!("{plane}/rounding_{rule}"), error, "ratio");
            }
        }
        let ratio = self.k.variance() / self.k_post.variance();
        rows.layer(index, "k/rope_ratio".to_owned(), ratio, "ratio");
        for (name, sinks) in ["sink_k", "sink_v"].into_iter().zip(&self.sinks) {
            let chunks = sinks.chunks();
            rows.layer(index, name.to_owned(), sinks.first(), "ratio");
            let mean = chunks.iter().sum::<f64>() / count(chunks.len());
            rows.layer(index, format!("{name}/chunk"), mean, "ratio");
            let largest = chunks.into_iter().fold(f64::NAN, f64::max);
            rows.layer(index, format!("{name}/chunk_max"), largest, "ratio");
        }
    }
}

/// Coding gains of one plane, of all contexts and of one half on the other.
fn gains(
    shape: Shape,
    plane: &str,
    even: &Scatter,
    odd: &Scatter,
    rows: &mut Rows<'_>,
) -> anyhow::Result<()> {
    let all = even.with(odd);
    for layer in 0..shape.layers {
        let found = all.gains(&all, layer, shape.head_dim);
        let held_out = even.gains(odd, layer, shape.head_dim);
        for (suffix, found) in [("", found), ("_held_out", held_out)] {
            let Some(found) = found.with_context(|| format!("layer {layer}, {plane}"))? else {
                continue;
            };
            let mut push = |measure: &str, value: f64| {
                let name = format!("{plane}/{measure}{suffix}");
                rows.layer(layer, name, value, "dB");
            };
            if suffix.is_empty() {
                push("channel_gain", found.channels);
            }
            push("klt_head", found.head);
            push("klt_layer", found.layer);
            if let Some(pair) = found.pair {
                push("klt_pair", pair);
            }
        }
    }
    Ok(())
}

/// Rows of layers on their way into a report, and the medians to come of them.
#[derive(Debug)]
struct Rows<'a> {
    report: &'a mut Report,
    by_measure: BTreeMap<String, (Vec<f64>, &'static str)>,
}

impl Rows<'_> {
    fn layer(&mut self, layer: usize, measure: String, value: f64, unit: &'static str) {
        let row = Row::new(format!("layer/{layer}/{measure}"), value, unit);
        self.push(measure, row, value, unit);
    }

    fn push(&mut self, measure: String, row: Row, value: f64, unit: &'static str) {
        if value.is_finite() {
            self.report.push(row);
            let of_layers = self.by_measure.entry(measure);
            of_layers.or_insert((Vec::new(), unit)).0.push(value);
        }
    }

    /// Medians over layers, and the gates on two of them.
    fn medians(self) {
        let medians: BTreeMap<String, (f64, &'static str)> = self
            .by_measure
            .into_iter()
            .map(|(measure, (mut values, unit))| (measure, (median(&mut values), unit)))
            .collect();
        for (measure, &(value, unit)) in &medians {
            self.report
                .push(Row::new(format!("median/{measure}"), value, unit));
        }
        for (measure, bar) in [("rank_correlation", RANK_CORRELATION), ("top15", TOP15)] {
            if let Some(&(value, unit)) = medians.get(measure) {
                let name = format!("G6/{measure}");
                gates::push(self.report, &name, value, bar, Bar::AtLeast, unit);
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a benchmark")]
fn count(n: usize) -> f64 {
    n as f64
}

/// A stream of standard normal values, Box and Muller's.
#[cfg(test)]
fn normal(seed: u64) -> impl FnMut() -> f64 {
    use rand::{Rng as _, SeedableRng as _};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    move || {
        let (a, b): (f64, f64) = (rng.random(), rng.random());
        (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }
}
