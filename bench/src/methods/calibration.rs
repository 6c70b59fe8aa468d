//! The profile of a model: bases, means, and units of steps, from KV of the training split.
//!
//! Every plane of every layer gets a basis over the channels of all heads that share cells, keys
//! before RoPE: the eigenvectors of the covariance of channels, each weighted by what errors in
//! them do to the layer's output ([`metric`](super::metric)). `--weighting none` leaves that out: the
//! Karhunen–Loève basis, whose errors are those of channels. The unit of a plane
//! is [`STEP`] times the deviation of its coefficients, times what
//! `kvasir-bench quality --sensitivity … --on-training` found it to be worth, if that is given.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use kvasir_codec::{Pairing, Profile, ProfileBasis, ProfilePlane, ProfileShape};
use kvasir_types::DType;
use nalgebra::DMatrix;

use super::frame::{self, Basis};
use super::metric::Metric;
use super::{Chunk, Coder as _, Geometry, Kvasir, PROTECTED, STEP, Variant};
use crate::contexts::Contexts;
use crate::quality::reader::Reader;
use crate::quality::{coded, sensitivity};
use crate::report::{Report, Row};

/// What to calibrate.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// A model in the Hugging Face layout; without `--text`, one trained on the corpus.
    #[arg(long, default_value = "models/reader-9m")]
    model: PathBuf,
    /// What the model reads instead of contexts of the corpus: a text, of which half is used.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Where the profile goes.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What errors are weighted by before a basis is chosen.
    #[arg(long, value_enum, default_value_t = Weighting::Attention)]
    weighting: Weighting,
    /// What `quality --sensitivity` printed, of a profile without it. May be given repeatedly,
    /// each measured with the profile of those before.
    #[arg(long, value_name = "FILE")]
    allocation: Vec<PathBuf>,
}

/// What errors are weighted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Weighting {
    /// Nothing.
    None,
    /// What queries look at, and what the output projection passes on.
    Attention,
}

/// Calibrates a profile and writes it.
pub(crate) fn run(options: &Options) -> anyhow::Result<Report> {
    let contexts = Contexts::new(&options.model, options.text.as_deref())?;
    let mut reader = Reader::load(&options.model, 4 * coded::TRAINING_TOKENS)?;
    let geometry = Geometry::new(reader.config());
    let (chunks, metric) = observed(&mut reader, &contexts, &geometry)?;
    let metric = Some(metric).filter(|_| options.weighting == Weighting::Attention);
    let mut factors = vec![[1.0; 2]; geometry.layers];
    for path in &options.allocation {
        let more = sensitivity::read(path)?;
        ensure!(
            more.len() == factors.len(),
            "{} is of another model",
            path.display()
        );
        for (factor, more) in factors.iter_mut().flatten().zip(more.iter().flatten()) {
            *factor *= more;
        }
    }
    let profile = calibrated(&chunks, metric.as_ref(), &factors, &geometry)?;
    std::fs::write(&options.out, profile.as_bytes())
        .with_context(|| format!("writing {}", options.out.display()))?;
    let mut report = Report::new("profile");
    let digest = profile.digest().map(|byte| format!("{byte:02x}"));
    report.set("digest", digest.concat());
    let bytes = profile.as_bytes().len();
    #[expect(clippy::cast_precision_loss, reason = "sizes of a benchmark")]
    report.push(Row::new("profile/bytes", bytes as f64, "bytes"));
    for (at, plane) in profile.planes().iter().enumerate() {
        let name = format!("profile/{}/{}/unit", at / 2, ["k", "v"][at % 2]);
        report.push(Row::new(name, f64::from(plane.unit), "times"));
    }
    speed(&chunks, profile, &geometry, &mut report)?;
    Ok(report)
}

/// The KV of the training contexts, and what errors in it do.
fn observed(
    reader: &mut Reader,
    source: &Contexts,
    geometry: &Geometry,
) -> anyhow::Result<(Vec<Chunk>, Metric)> {
    let projections = reader.projections();
    let mut metric = Metric::new(reader.config());
    let bar = crate::progress(coded::TRAINING_CONTEXTS, "calibration");
    let contexts = (0..coded::TRAINING_CONTEXTS).map(|index| {
        let chunk = coded::TRAINING_CHUNK_TOKENS;
        let tokens = coded::training_context(source, chunk, index)?;
        let (pages, queries) = reader.observe(&tokens)?;
        let kv = reader.take(&pages, 0..tokens.len())?;
        reader.release(pages)?;
        metric.add(reader.config(), &projections, &kv, &queries);
        bar.inc(1);
        Chunk::of(&kv, geometry, 0, DType::F32)
    });
    let chunks = contexts.collect::<anyhow::Result<_>>()?;
    bar.finish_and_clear();
    Ok((chunks, metric))
}

/// Raw bytes coded a second, of f16 on one core, by level.
fn speed(
    training: &[Chunk],
    profile: Profile,
    geometry: &Geometry,
    report: &mut Report,
) -> anyhow::Result<()> {
    let chunks = training.iter().take(TIMED).map(|chunk| {
        let kv = chunk.to_kv();
        let kv = kv.tokens_of(geometry.head_dim, 0..coded::STORED_TOKENS);
        Chunk::of(&kv, geometry, 0, DType::F16)
    });
    let mut chunks: Vec<Chunk> = chunks.collect::<anyhow::Result<_>>()?;
    let geometry = Arc::new(geometry.unturned());
    let profile = Arc::new(profile);
    #[expect(clippy::cast_precision_loss, reason = "bytes of a benchmark")]
    let bytes = chunks.iter().map(|it| 2 * it.values()).sum::<usize>() as f64;
    for (level, name) in ["L0", "L1", "L2"].into_iter().enumerate() {
        for with in [None, Some(&profile)] {
            let variant = Variant {
                profile: with.is_some(),
                step: if with.is_some() { 1.0 } else { STEP },
                level,
                ..Variant::DEFAULT
            };
            let coder = Kvasir::new(variant, &geometry).with_profile(with.cloned());
            let (mut encode, mut decode) = (f64::MAX, f64::MAX);
            for _ in 0..ROUNDS {
                let begun = Instant::now();
                let parts = chunks.iter().map(|chunk| coder.encode(chunk));
                let parts: Vec<_> = parts.collect::<anyhow::Result<_>>()?;
                encode = encode.min(begun.elapsed().as_secs_f64());
                let begun = Instant::now();
                for (chunk, parts) in chunks.iter_mut().zip(&parts) {
                    coder.decode(parts, chunk)?;
                }
                decode = decode.min(begun.elapsed().as_secs_f64());
            }
            let with = if with.is_some() { "profile" } else { "none" };
            for (what, seconds) in [("encode", encode), ("decode", decode)] {
                let row = format!("{what}/{with}/{name}");
                report.push(Row::new(row, bytes / seconds / 1e9, "GB/s"));
            }
        }
    }
    Ok(())
}

/// Reads a profile of a model.
pub(crate) fn read(path: &Path, geometry: &Geometry) -> anyhow::Result<Arc<Profile>> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let profile = Profile::parse(&bytes).with_context(|| path.display().to_string())?;
    ensure!(
        *profile.shape() == shape(geometry)?,
        "{} is of another model",
        path.display()
    );
    Ok(Arc::new(profile))
}

fn shape(geometry: &Geometry) -> anyhow::Result<ProfileShape> {
    let layout = geometry.layout(1, DType::F16)?;
    Ok(ProfileShape::of(&layout, Some(Pairing::Halves)))
}

fn calibrated(
    training: &[Chunk],
    metric: Option<&Metric>,
    factors: &[[f32; 2]],
    geometry: &Geometry,
) -> anyhow::Result<Profile> {
    let shape = shape(geometry)?;
    let per_layer = geometry.kv_heads * geometry.head_dim;
    let per_basis = shape.heads_per_basis().map(usize::from);
    let mut samples: [Vec<DMatrix<f32>>; 2] = Default::default();
    for chunk in training {
        for (plane, matrix) in samples.iter_mut().zip(frame::matrices(chunk, geometry)) {
            let tokens = matrix.ncols() - PROTECTED;
            plane.push(matrix.columns(PROTECTED, tokens).into_owned());
        }
    }
    let mut planes = Vec::new();
    for (layer, factors) in factors.iter().enumerate() {
        for (plane, heads) in per_basis.into_iter().enumerate() {
            let (channels, first) = (heads * geometry.head_dim, layer * per_layer);
            let of_layer = metric.map(|metric| &metric.layers[layer][plane]);
            let groups = (0..per_layer).step_by(channels);
            let bases = groups.map(|group| {
                let place = (group, group);
                let metric = of_layer.map(|it| it.view(place, (channels, channels)).into_owned());
                let rows = first + group..first + group + channels;
                basis(&samples[plane], rows, metric)
            });
            let bases: Vec<ProfileBasis> = bases.collect::<anyhow::Result<_>>()?;
            let squares = bases.iter().flat_map(|basis| &basis.deviations);
            let sum: f32 = squares.map(|deviation| deviation * deviation).sum();
            #[expect(clippy::cast_precision_loss, reason = "channels of a layer")]
            let unit = STEP * (sum / per_layer as f32).sqrt() * factors[plane];
            planes.push(ProfilePlane { unit, bases });
        }
    }
    Ok(Profile::new(shape, planes)?)
}

/// A basis for some rows of all samples, in which errors do the same harm along each
/// coefficient, as much as in an average channel.
fn basis(
    samples: &[DMatrix<f32>],
    rows: Range<usize>,
    metric: Option<DMatrix<f32>>,
) -> anyhow::Result<ProfileBasis> {
    let channels = rows.len();
    #[expect(clippy::cast_precision_loss, reason = "channels of a basis")]
    let count = channels as f32;
    let metric = metric.map(|metric| {
        let mean = metric.trace() / count;
        metric / mean + DMatrix::from_diagonal_element(channels, channels, LEAST_HARM)
    });
    // Errors do harm as the square of the root's product with them says.
    let root = match metric {
        None => DMatrix::identity(channels, channels),
        Some(metric) => {
            let root = nalgebra::Cholesky::new(metric).context("a metric is positive")?;
            root.l().transpose()
        }
    };
    let inverse = root.clone().try_inverse().context("a root is invertible")?;
    let weighted: Vec<DMatrix<f32>> = samples
        .iter()
        .map(|sample| &root * sample.rows_range(rows.clone()))
        .collect();
    let basis = Basis::of(&weighted, 0..channels)?;
    let mut squares = vec![0.0; channels];
    let mut tokens = 0.0;
    for sample in weighted {
        #[expect(clippy::cast_precision_loss, reason = "tokens of a context")]
        let of_sample = sample.ncols() as f32;
        tokens += of_sample;
        for (sum, row) in squares
            .iter_mut()
            .zip(basis.project(sample, channels).row_iter())
        {
            *sum += row.norm_squared();
        }
    }
    let deviation = |sum: &f32| (sum / tokens).sqrt().max(SMALLEST);
    // A row of the profile's matrices is a column here.
    let analysis = root.tr_mul(&basis.vectors);
    let synthesis = &inverse * &basis.vectors;
    Ok(ProfileBasis::new(
        (inverse * &basis.mean).as_slice().to_vec(),
        squares.iter().map(deviation).collect(),
        analysis.as_slice(),
        synthesis.as_slice(),
    ))
}

/// What errors in any direction do at least, as a share of the mean over directions: the
/// contexts of a calibration are not all there are.
const LEAST_HARM: f32 = 0.05;
/// Chunks whose coding is timed, and how often; the best counts.
const TIMED: usize = 16;
const ROUNDS: usize = 5;
/// Of a channel that does not vary.
const SMALLEST: f32 = 1e-6;
