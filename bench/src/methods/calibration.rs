//! The profile of a model: bases, means, and units of steps, from KV of the training split.
//!
//! Every plane of every layer gets the Karhunen–Loève basis over the channels of all heads
//! that share cells, keys before RoPE. The unit of a plane is its deviation, times what
//! `kvasir-bench quality --sensitivity … --on-training` found it to be worth, if that is given.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use kvasir_codec::{Pairing, Profile, ProfileBasis, ProfilePlane, ProfileShape};
use kvasir_types::DType;
use nalgebra::DMatrix;

use super::frame::{self, Basis};
use super::{Chunk, Coder as _, Geometry, Kvasir, PROTECTED, Variant};
use crate::corpus::Vocabulary;
use crate::quality::reader::Reader;
use crate::quality::{coded, sensitivity};
use crate::report::{Report, Row};

/// What to calibrate.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// A model trained on the corpus, in the Hugging Face layout.
    #[arg(long, default_value = "models/reader-9m")]
    model: PathBuf,
    /// Where the profile goes.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What `quality --sensitivity` printed, of a profile without it. May be given repeatedly,
    /// each measured with the profile of those before.
    #[arg(long, value_name = "FILE")]
    allocation: Vec<PathBuf>,
}

/// Calibrates a profile and writes it.
pub(crate) fn run(options: &Options) -> anyhow::Result<Report> {
    let vocabulary = Vocabulary::load()?;
    let mut reader = Reader::load(&options.model, 4 * coded::TRAINING_TOKENS)?;
    let geometry = Geometry::new(reader.config());
    let training = coded::training(
        &mut reader,
        &vocabulary,
        &geometry,
        coded::TRAINING_CHUNK_TOKENS,
    )?;
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
    let profile = calibrated(&training.chunks, &factors, &geometry)?;
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
    speed(&training.chunks, profile, &geometry, &mut report)?;
    Ok(report)
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
        for ((samples, factor), heads) in samples.iter().zip(factors).zip(per_basis) {
            let channels = heads * geometry.head_dim;
            let first = layer * per_layer;
            let groups = (first..first + per_layer).step_by(channels);
            let bases = groups.map(|group| basis(samples, group..group + channels));
            let bases: Vec<ProfileBasis> = bases.collect::<anyhow::Result<_>>()?;
            let squares = bases.iter().flat_map(|basis| &basis.deviations);
            let sum: f32 = squares.map(|deviation| deviation * deviation).sum();
            #[expect(clippy::cast_precision_loss, reason = "channels of a layer")]
            let unit = (sum / per_layer as f32).sqrt() * factor;
            planes.push(ProfilePlane { unit, bases });
        }
    }
    Ok(Profile::new(shape, planes)?)
}

fn basis(samples: &[DMatrix<f32>], rows: std::ops::Range<usize>) -> anyhow::Result<ProfileBasis> {
    let channels = rows.len();
    let basis = Basis::of(samples, rows.clone())?;
    let mut squares = vec![0.0; channels];
    let mut count = 0.0;
    for sample in samples {
        let coefficients = basis.project(sample.rows_range(rows.clone()).into_owned(), channels);
        for (sum, row) in squares.iter_mut().zip(coefficients.row_iter()) {
            *sum += row.norm_squared();
        }
        #[expect(clippy::cast_precision_loss, reason = "tokens of a context")]
        let tokens = sample.ncols() as f32;
        count += tokens;
    }
    let deviation = |sum: &f32| (sum / count).sqrt().max(SMALLEST);
    Ok(ProfileBasis::new(
        basis.mean.as_slice().to_vec(),
        vec![1.0; channels],
        squares.iter().map(deviation).collect(),
        basis.vectors.as_slice(),
    ))
}

/// Chunks whose coding is timed, and how often; the best counts.
const TIMED: usize = 16;
const ROUNDS: usize = 5;
/// Of a channel that does not vary.
const SMALLEST: f32 = 1e-6;
