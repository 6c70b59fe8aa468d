//! What quality each layer's keys and values are worth, in bits.
//!
//! The step of one plane of one layer at a time is taken [`COARSER`] times as large as that
//! of the base variant. Rows, where PLANE is `k` or `v`:
//!
//! - `sensitivity/LAYER/PLANE/dkl`: KL that this adds, in nats, paired, with its interval;
//! - `sensitivity/LAYER/PLANE/dbits`: bits a value of the whole chunk that it saves;
//! - `sensitivity/LAYER/PLANE/slope`: the one over the other, nats a bit;
//! - `sensitivity/k/dkl` and so on: sums over layers.
//!
//! Noise adds up and its power goes with the square of a step, so that KL is least for its
//! bits where every slope is the same: steps in proportion to one over the root of `dkl`.
//! Such steps, cut off at [`MOST`] and its inverse, are tried on other contexts beside equal
//! ones: `allocated:xF/…` and `equal:xF/…`, where F multiplies all of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, ensure};

use super::coded::Coded;
use super::method::{Charge, Way};
use super::reader::Reader;
use super::{Cell, Options, Outcome, gates, interval, score};
use kvasir_codec::Profile;

use crate::corpus::Vocabulary;
use crate::methods::{Geometry, Kvasir, Spec, Variant};
use crate::report::{Report, Row};

/// What a step is multiplied by.
const COARSER: f32 = 2.0;
/// Limits of a factor.
const MOST: f32 = 4.0;
/// What all steps are multiplied by where steps by sensitivity and equal ones are compared.
const SCALES: [f32; 5] = [0.5, 0.7, 1.0, 1.4, 2.0];

/// A coder with steps of its own.
fn way(
    name: String,
    variant: Variant,
    geometry: &Arc<Geometry>,
    factors: &[[f32; 2]],
    profile: Option<&Arc<Profile>>,
) -> Way {
    let coder = Kvasir::new(variant, geometry)
        .times(factors)
        .with_profile(profile.cloned());
    let spec = Spec::Kvasir(variant);
    Way::Coded(Arc::new(Coded::of(name, spec, Box::new(coder), geometry)))
}

/// Answers of all cells, and bits by method.
fn asked(
    reader: &mut Reader,
    vocabulary: &Vocabulary,
    cells: &[Cell<'_>],
    ways: &[Way],
    options: &Options,
    wanted: usize,
) -> anyhow::Result<(Outcome, BTreeMap<String, f64>)> {
    let mut all = Outcome::default();
    let mut charges: BTreeMap<String, Vec<Charge>> = BTreeMap::new();
    let bar = crate::progress(cells.len() as u64, "sensitivity");
    for cell in cells {
        bar.set_message(cell.name());
        let mut gates = gates::Gates::default();
        all.extend(super::ask(
            reader,
            vocabulary,
            cell,
            ways,
            options,
            wanted,
            &mut charges,
            &mut gates,
        )?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mean = |charges: &Vec<Charge>| {
        score::mean(&charges.iter().map(|charge| charge.bits).collect::<Vec<_>>())
    };
    let bits = charges.iter().map(|(name, of)| (name.clone(), mean(of)));
    Ok((all, bits.collect()))
}

/// The factors of a report of this kind, by layer and plane.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<[f32; 2]>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let line = text.lines().rfind(|line| !line.trim().is_empty());
    let report: serde_json::Value = serde_json::from_str(line.unwrap_or_default())
        .with_context(|| format!("{} has no report in its last line", path.display()))?;
    let rows = report["rows"].as_array().context("a report has rows")?;
    let factor = |layer: usize, plane: &str| {
        let name = format!("sensitivity/{layer}/{plane}/factor");
        let row = rows.iter().find(|row| row["name"] == name.as_str())?;
        #[expect(clippy::cast_possible_truncation, reason = "rounded to f32")]
        Some(row["value"].as_f64()? as f32)
    };
    let factors: Vec<[f32; 2]> = (0..)
        .map_while(|layer| Some([factor(layer, "k")?, factor(layer, "v")?]))
        .collect();
    ensure!(
        !factors.is_empty(),
        "{} is no report of --sensitivity",
        path.display()
    );
    Ok(factors)
}

/// Measures `variant` and what differs from it.
pub(super) fn run(
    reader: &mut Reader,
    vocabulary: &Vocabulary,
    cells: &[Cell<'_>],
    variant: Variant,
    options: &Options,
    wanted: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let geometry = Arc::new(Geometry::new(reader.config()));
    let mut profile = None;
    if variant.profile {
        profile = Some(options.profile(&geometry)?.context("pass --profile")?);
    }
    let profile = profile.as_ref();
    let equal = vec![[1.0; 2]; geometry.layers];
    let mut ways = vec![way("base".to_owned(), variant, &geometry, &equal, profile)];
    for layer in 0..geometry.layers {
        for (plane, name) in ["k", "v"].into_iter().enumerate() {
            let mut factors = equal.clone();
            factors[layer][plane] = COARSER;
            let name = format!("{layer}/{name}");
            ways.push(way(name, variant, &geometry, &factors, profile));
        }
    }
    let (outcome, bits) = asked(reader, vocabulary, cells, &ways, options, wanted)?;
    let mut found = vec![[0.0; 2]; geometry.layers];
    let mut sums = [(0.0, 0.0); 2];
    let base = outcome.kl("base");
    let bits_of = |name: &str| bits.get(name).copied().unwrap_or(f64::NAN);
    for (layer, found) in found.iter_mut().enumerate() {
        for (plane, letter) in ["k", "v"].into_iter().enumerate() {
            let name = format!("{layer}/{letter}");
            let more: Vec<Vec<f64>> = outcome
                .kl(&name)
                .iter()
                .zip(&base)
                .map(|(this, base)| this.iter().zip(base).map(|(a, b)| a - b).collect())
                .collect();
            let Some(more) = interval::estimate(&more, options.seed) else {
                continue;
            };
            let saved = bits_of("base") - bits_of(&name);
            found[plane] = more.value;
            sums[plane].0 += more.value;
            sums[plane].1 += saved;
            let row = |measure: &str| format!("sensitivity/{name}/{measure}");
            report.push(Row::new(row("dkl"), more.value, "nats").within(more.interval));
            report.push(Row::new(row("dbits"), saved, "bit"));
            report.push(Row::new(row("slope"), more.value / saved, "nats/bit"));
        }
    }
    for ((kl, saved), letter) in sums.into_iter().zip(["k", "v"]) {
        let row = |measure: &str| format!("sensitivity/{letter}/{measure}");
        report.push(Row::new(row("dkl"), kl, "nats"));
        report.push(Row::new(row("dbits"), saved, "bit"));
        report.push(Row::new(row("slope"), kl / saved, "nats/bit"));
    }
    let factors = allocated(&found);
    for (layer, factors) in factors.iter().enumerate() {
        for (factor, letter) in factors.iter().zip(["k", "v"]) {
            let name = format!("sensitivity/{layer}/{letter}/factor");
            report.push(Row::new(name, f64::from(*factor), "times"));
        }
    }
    let mut ways = Vec::new();
    for scale in SCALES {
        for (name, factors) in [("equal", &equal), ("allocated", &factors)] {
            let scaled: Vec<[f32; 2]> = factors.iter().map(|f| f.map(|f| f * scale)).collect();
            let name = format!("{name}:x{scale}");
            ways.push(way(name, variant, &geometry, &scaled, profile));
        }
    }
    let others = Options {
        seed: options.seed.wrapping_add(1),
        ..options.clone()
    };
    let (outcome, bits) = asked(reader, vocabulary, cells, &ways, &others, wanted)?;
    let scratch = &mut gates::Gates::default();
    outcome.report("all", others.seed, report, scratch);
    for way in &ways {
        let bits = bits.get(way.name()).copied().unwrap_or(f64::NAN);
        report.push(Row::new(format!("{}/bits", way.name()), bits, "bits/value"));
    }
    Ok(())
}

/// Steps in proportion to one over the root of what KL they add, around a geometric mean
/// of one.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32")]
fn allocated(found: &[[f64; 2]]) -> Vec<[f32; 2]> {
    let known = || found.iter().flatten().copied().filter(|&kl| kl > 0.0);
    let logs: Vec<f64> = known().map(f64::ln).collect();
    let middle = score::mean(&logs);
    let factor = |kl: f64| {
        if kl > 0.0 {
            (((middle - kl.ln()) / 2.0).exp() as f32).clamp(1.0 / MOST, MOST)
        } else {
            // Less than the noise of the measurement.
            MOST
        }
    };
    found.iter().map(|planes| planes.map(factor)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_times_the_loss_gets_half_the_step() {
        let factors = allocated(&[[0.04, 0.01], [0.02, -0.001]]);
        assert!((factors[0][1] / factors[0][0] - 2.0).abs() < 1e-5);
        assert!((factors[1][0] - 1.0).abs() < 1e-5);
        assert!((factors[1][1] - MOST).abs() < 1e-5);
    }
}
