//! `prefill`: our prefill of a 512-token prompt beside torch's, same weights, same threads.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use kvasir_engine::kernels::Threads;
use kvasir_engine::kv::{BLOCK_TOKENS, KvDtype, KvPool};
use kvasir_engine::model::{LogitsWanted, Model, Positions, Scratch, Step};

use crate::checkpoint::{self, Shape};
use crate::report::{Report, Row, median};

const TOKENS: usize = 512;

pub(crate) fn run(quick: bool, python: Option<&Path>) -> anyhow::Result<Report> {
    let repeats = if quick { 3 } else { 9 };
    let threads = std::thread::available_parallelism()?.get();
    let mut report = Report::new("prefill");
    let dir = tempfile::tempdir()?;
    eprintln!(
        "writing a random checkpoint of {} M parameters",
        Shape::PREFILL.parameters() / 1_000_000
    );
    checkpoint::write(dir.path(), &Shape::PREFILL)?;
    let ours = ours(dir.path(), threads, repeats)?;
    match python.map(Path::to_owned).or_else(torch_python) {
        Some(python) => {
            let torch = torch(&python, dir.path(), threads, repeats)?;
            report.push(Row::new("ours", ours, "tokens/s").against(torch, ours / torch));
            report.push(Row::new("torch", torch, "tokens/s"));
            report.push(Row::new("ours.ratio", ours / torch, "x"));
        }
        None => {
            eprintln!(
                "torch was not measured: pass --python with a Python that has bench/torch/requirements.txt"
            );
            report.push(Row::new("ours", ours, "tokens/s"));
        }
    }
    Ok(report)
}

fn ours(dir: &Path, threads: usize, repeats: usize) -> anyhow::Result<f64> {
    let model = Model::load(dir)?;
    let mut pool = KvPool::new(model.config(), TOKENS.div_ceil(BLOCK_TOKENS), KvDtype::F32);
    let mut scratch = Scratch::new(Threads::new(threads)?);
    let blocks: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
    let prompt: Vec<u32> = (0..u32::try_from(TOKENS)?).collect();
    let progress = crate::progress(repeats as u64 + 2, "prefill");
    let mut speeds = Vec::with_capacity(repeats);
    for repeat in 0..repeats + 2 {
        let begun = Instant::now();
        model.forward(
            &mut pool,
            &mut scratch,
            &[Step {
                tokens: &prompt,
                positions: Positions::From(0),
                blocks: &blocks,
                logits: LogitsWanted::Last,
            }],
            &mut |_| std::ops::ControlFlow::Continue(()),
        )?;
        // The first two warm caches and buffers, as torch's script does.
        if repeat >= 2 {
            speeds.push(f64::from(u32::try_from(TOKENS)?) / begun.elapsed().as_secs_f64());
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(median(&mut speeds))
}

fn torch(python: &Path, model: &Path, threads: usize, repeats: usize) -> anyhow::Result<f64> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("torch/prefill.py");
    let output = Command::new(python)
        .arg(&script)
        .arg("--model")
        .arg(model)
        .args(["--tokens", &TOKENS.to_string()])
        .args(["--threads", &threads.to_string()])
        .args(["--repeat", &repeats.to_string()])
        .output()
        .with_context(|| format!("running {}", script.display()))?;
    ensure!(
        output.status.success(),
        "torch's script failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let stdout = String::from_utf8(output.stdout)?;
    let last = stdout
        .lines()
        .last()
        .context("torch's script printed nothing")?;
    let result: serde_json::Value = serde_json::from_str(last)?;
    result["tokens_per_s"]
        .as_f64()
        .context("torch's script gave no tokens_per_s")
}

/// The repository's own virtual environment, if it was made.
fn torch_python() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("torch/.venv/bin/python");
    python.exists().then_some(python)
}
