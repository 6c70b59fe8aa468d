//! `kvasir demo`: a language model answers questions about documents, first with its
//! prefill computed, then fetched from the daemon's memory, then from its disk after a
//! restart.
//!
//! Everything is real: this command starts `kvasird` and `kvasir-engine` as processes
//! beside itself and talks to the engine over HTTP as any client would.

mod engine;
mod processes;
mod questions;
mod table;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvasir_types::ByteSize;
use serde::Serialize;

use crate::context::Context;
use engine::{Answer, Engine, Source};
pub(crate) use processes::beside;
use processes::{Daemon, start_engine};
use questions::Question;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// A checkpoint in the Hugging Face layout.
    #[arg(long, default_value = "models/reader-9m")]
    model: PathBuf,
    /// Documents and questions, as JSON lines. Default: `questions.jsonl` beside the
    /// model, else the shipped ones.
    #[arg(long)]
    questions: Option<PathBuf>,
    /// Tokens per chunk.
    #[arg(long, default_value_t = 64)]
    chunk_tokens: u32,
    /// Budget of the daemon's memory tier.
    #[arg(long, default_value_t = ByteSize::mib(256))]
    memory: ByteSize,
}

/// What the demo found.
#[derive(Debug, Serialize)]
struct Outcome {
    model: String,
    documents: Vec<Row>,
    questions: usize,
    /// Questions whose answer is the one that transformers gives for this model.
    /// Absent when the questions come without.
    #[serde(skip_serializing_if = "Option::is_none")]
    as_transformers: Option<usize>,
    /// Whether every fetched answer, and every logit behind it, equals the computed one.
    identical: bool,
    bytes_moved: u64,
    daemon_peak_bytes: u64,
    engine_peak_bytes: u64,
    memory_tier_peak_bytes: u64,
    memory_tier_capacity_bytes: u64,
}

/// One document.
#[derive(Debug, Serialize)]
struct Row {
    document: String,
    tokens: usize,
    questions: usize,
    /// Prompt tokens of the first question that came from the cache.
    reused_tokens: usize,
    bytes: u64,
    /// Medians over the document's questions; from disk, the first question only,
    /// for the others find the document in memory again.
    computed_ms: f64,
    memory_ms: f64,
    disk_ms: f64,
    /// The first question's answer.
    answer: String,
    identical: bool,
}

/// Runs the demo and prints its table, or one JSON object as the last line.
pub(crate) async fn run(context: &Context, args: &Arguments) -> anyhow::Result<()> {
    ensure!(
        args.model.join("config.json").exists(),
        "{} holds no checkpoint; run this in the repository, or pass --model DIR",
        args.model.display()
    );
    let questions = questions::load(args.questions.as_deref(), &args.model)?;
    let documents = by_document(&questions);
    let total = 2 * questions.len() + documents.len();
    let progress = progress_bar(total as u64, context.json);

    progress.set_message("starting");
    let data = tempfile::tempdir().context("making a directory for the daemon's data")?;
    let daemon = Daemon::start(data.path(), args.memory, "127.0.0.1:0")?;
    let process = start_engine(&args.model, daemon.address(), args.chunk_tokens)?;
    let engine = Engine::new(process.address());

    progress.set_message("computing");
    let mut computed = Vec::with_capacity(questions.len());
    for asked in documents.values() {
        for (turn, &index) in asked.iter().enumerate() {
            // The first question's prefill leaves the document in the cache.
            let source = Source::Computed { store: turn == 0 };
            computed.push((index, engine.ask(&questions[index], source).await?));
            progress.inc(1);
        }
        engine.stored().await?;
    }

    progress.set_message("from memory");
    let mut memory = Vec::with_capacity(questions.len());
    for asked in documents.values() {
        for &index in asked {
            memory.push((index, engine.ask_cached(&questions[index]).await?));
            progress.inc(1);
        }
    }
    let first_daemon_peak = daemon.peak_resident_bytes();
    let tier = daemon.memory_tier().await?;

    progress.set_message("restarting");
    let address = daemon.address().to_owned();
    daemon.stop().await?;
    let daemon = Daemon::start(data.path(), args.memory, &address)?;
    progress.set_message("from disk");
    let mut disk = Vec::with_capacity(documents.len());
    for asked in documents.values() {
        let first = asked[0];
        disk.push((first, engine.ask_cached(&questions[first]).await?));
        progress.inc(1);
    }
    progress.finish_and_clear();

    let by_index = |answers: Vec<(usize, Answer)>| answers.into_iter().collect::<BTreeMap<_, _>>();
    let phases = Phases {
        computed: by_index(computed),
        memory: by_index(memory),
        disk: by_index(disk),
    };
    let rows: Vec<Row> = documents
        .values()
        .map(|asked| phases.row(&questions, asked))
        .collect();
    let outcome = Outcome {
        model: args.model.display().to_string(),
        questions: questions.len(),
        as_transformers: phases.as_reference(&questions),
        identical: rows.iter().all(|row| row.identical),
        bytes_moved: phases.bytes_moved(),
        daemon_peak_bytes: first_daemon_peak.max(daemon.peak_resident_bytes()),
        engine_peak_bytes: process.peak_resident_bytes(),
        memory_tier_peak_bytes: tier.peak_bytes,
        memory_tier_capacity_bytes: tier.capacity_bytes,
        documents: rows,
    };
    context.print(&outcome, |out| table::print(out, &outcome))?;
    ensure!(
        outcome.identical,
        "a fetched prefill gave other logits than a computed one; please report this"
    );
    Ok(())
}

/// The answers of the three phases, by index of their question.
struct Phases {
    computed: BTreeMap<usize, Answer>,
    memory: BTreeMap<usize, Answer>,
    disk: BTreeMap<usize, Answer>,
}

impl Phases {
    fn row(&self, questions: &[Question], asked: &[usize]) -> Row {
        let first = asked[0];
        let millis = |phase: &BTreeMap<usize, Answer>| {
            let mut times: Vec<f64> = asked
                .iter()
                .filter_map(|index| Some(phase.get(index)?.ttft.as_secs_f64() * 1e3))
                .collect();
            median(&mut times)
        };
        let same = |index: &usize, phase: &BTreeMap<usize, Answer>| {
            phase
                .get(index)
                .is_none_or(|answer| answer.equals(&self.computed[index]))
        };
        let fetched = &self.memory[&first];
        Row {
            document: questions[first].document_id.clone(),
            tokens: fetched.prompt_tokens,
            questions: asked.len(),
            reused_tokens: fetched.cached_tokens,
            bytes: fetched.fetched_bytes,
            computed_ms: millis(&self.computed),
            memory_ms: millis(&self.memory),
            disk_ms: millis(&self.disk),
            answer: self.computed[&first].text.clone(),
            identical: asked
                .iter()
                .all(|index| same(index, &self.memory) && same(index, &self.disk)),
        }
    }

    fn as_reference(&self, questions: &[Question]) -> Option<usize> {
        let mut count = 0;
        for (index, question) in questions.iter().enumerate() {
            let reference = question.reference.as_ref()?;
            count += usize::from(self.computed[&index].text.trim() == reference.trim());
        }
        Some(count)
    }

    fn bytes_moved(&self) -> u64 {
        let fetched = self.memory.values().chain(self.disk.values());
        fetched.map(|answer| answer.fetched_bytes).sum()
    }
}

/// Indices of the questions of each document, in the order of the file.
fn by_document(questions: &[Question]) -> BTreeMap<usize, Vec<usize>> {
    let mut order: Vec<&str> = Vec::new();
    let mut documents: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (index, question) in questions.iter().enumerate() {
        let id = question.document_id.as_str();
        let place = order
            .iter()
            .position(|known| *known == id)
            .unwrap_or_else(|| {
                order.push(id);
                order.len() - 1
            });
        documents.entry(place).or_default().push(index);
    }
    documents
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn progress_bar(length: u64, json: bool) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:<12} {bar:40} {pos}/{len}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(length).with_style(style);
    if json {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}
