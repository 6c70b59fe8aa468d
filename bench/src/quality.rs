//! Quality of answers under every way of having a context's KV.
//!
//! Each method answers the same questions over the same contexts of the
//! corpus; full prefill is what the others are held against. Rows:
//!
//! - `METHOD/CELL/em`, `f1`: exact match and token F1 of greedy answers;
//! - `METHOD/CELL/em_loss`: what full prefill gets more, paired;
//! - `METHOD/CELL/kl`, `kl_median`, `kl_p99`: KL(full ‖ method) in nats at the
//!   tokens of the true answer, teacher-forced; `top1`: share of them where both
//!   think the same token most likely;
//! - `METHOD/CELL/diverged`: share of answers that differ from full prefill's;
//!   `divergence`: the first token at which these do, counted from 0;
//! - `METHOD/continuation/nll`: nats a token of text after the context;
//! - `METHOD/charged`: rows computed as a share of tokens times layers;
//!   `host_bytes`: KV read a context token; `bits`: a KV value as stored;
//! - `bar/…`: our codec beside others at equal KL, see [`bars`]; `sensitivity/…`: what
//!   each layer's planes are worth, see [`sensitivity`];
//! - `gate/…`: what the model must show for any of this to mean something,
//!   `ratio` 1.0 or more where it does.
//!
//! A METHOD is one of reuse ([`method::Method`]), or codes KV: `METHOD` or `METHOD:VARIANT`
//! of [`crate::methods`], see [`coded`] for how, or computes a part of it anew, see [`blended`]. For these, `bits` are those of the very
//! bytes that were decoded, protected tokens included.
//!
//! A CELL is a task at 8 chunks of 64 tokens; `TASK@N` at N chunks; `all` are all tasks at
//! 8 chunks together. Intervals
//! (`lo`, `hi`) are bootstrapped over contexts. The same seed gives the same rows.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};

use crate::contexts::Contexts;
use crate::corpus::{self, Profile, Split, Task, Vocabulary};
use crate::methods::{self, Geometry, Spec, Training};
use crate::page::Scatter;
use crate::report::{Report, Row};

pub(crate) mod bars;
pub(crate) mod blended;
pub(crate) mod coded;
pub(crate) mod gates;
pub(crate) mod interval;
pub(crate) mod method;
mod outcome;
pub(crate) mod reader;
mod score;
pub(crate) mod sensitivity;

use blended::Blended;
use coded::Coded;
use method::{Caches, Charge, Method, Way};
use outcome::{Held, Outcome, push};
use reader::Reader;
use score::Asked;

pub(crate) use score::mean;

/// The profile in a model's directory.
pub(crate) const PROFILE: &str = "kvasir-profile.bin";
/// Chunks of a cell that has no count in its name.
const BASE_CHUNKS: usize = 8;
/// Questions asked over one context at most: more say little new about its KV.
const QUESTIONS_PER_CONTEXT: usize = 8;
/// Contexts of a cell on which recomputing everything is checked to be full prefill.
const CHECKED_CONTEXTS: u64 = 4;
/// Tasks that are also asked at other numbers of chunks, besides those that are named: where
/// reuse must hurt, and the control.
const AT_ALL_COUNTS: [&str; 6] = ["hop1", "coref2", "coref3", "override", "ordinal", "compare"];
/// Room for questions and greedy answers beside the context, in tokens.
const TAIL_TOKENS: usize = 2048;

/// What to ask, and how often.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// A model trained on the corpus, in the Hugging Face layout.
    #[arg(long, default_value = "models/reader-9m")]
    pub(crate) model: PathBuf,
    /// Questions a cell. Default: 1000; with --quick, 24.
    #[arg(long)]
    pub(crate) questions: Option<usize>,
    /// Tasks to ask; all of them when left out.
    #[arg(long, value_delimiter = ',')]
    pub(crate) tasks: Vec<String>,
    /// Methods beside full prefill: prefix, naive, naive-unpositioned, recompute-all;
    /// what codes KV, as METHOD or METHOD:VARIANT, `codecs` being all of these; and what
    /// computes some tokens of reused chunks anew, as `blend:RULE:BUDGET[:LAYERS]`, see
    /// bench/src/quality/blended.rs.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "prefix,naive,naive-unpositioned"
    )]
    pub(crate) methods: Vec<String>,
    /// Other numbers of chunks: for tasks that are named; else for those where reuse must hurt.
    #[arg(long, value_delimiter = ',', default_values_t = [4, 12])]
    pub(crate) chunks: Vec<usize>,
    /// Tokens a chunk.
    #[arg(long, default_value_t = 64)]
    pub(crate) size: usize,
    /// Steps of level 0, in deviations, at which the levels of our codec are tried besides.
    #[arg(long, value_delimiter = ',')]
    pub(crate) steps: Vec<f32>,
    /// Measures instead what each layer's keys and values are worth to a variant of our
    /// codec, e.g. `kvasir:s3k0.3-L1`; see bench/src/quality/sensitivity.rs.
    #[arg(long, value_name = "VARIANT")]
    pub(crate) sensitivity: Option<Spec>,
    /// What `--sensitivity` printed: steps of variants that end in `-alloc` follow it.
    #[arg(long, value_name = "FILE")]
    pub(crate) allocation: Option<PathBuf>,
    /// The profile of variants that have one, as `kvasir-bench profile` writes it. Default:
    /// the model's.
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
    /// Asks about contexts of the training split: for what is calibrated from the answers.
    #[arg(long)]
    pub(crate) on_training: bool,
    /// Writes a plot of bits and KL.
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Seed of contexts and intervals.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

impl Options {
    /// Questions a cell.
    fn wanted(&self, quick: bool) -> usize {
        self.questions.unwrap_or(if quick { 24 } else { 1000 })
    }

    /// The split that contexts are of.
    fn split(&self) -> Split {
        if self.on_training {
            Split::Train
        } else {
            Split::Test
        }
    }

    /// The profile, if there is one.
    fn profile(&self, geometry: &Geometry) -> anyhow::Result<Option<Arc<kvasir_codec::Profile>>> {
        let path = self.profile.clone();
        let path = path.or_else(|| Some(self.model.join(PROFILE)).filter(|path| path.exists()));
        let profile = path.map(|path| methods::calibration::read(&path, geometry));
        profile.transpose()
    }

    /// The settings of the report.
    fn record(&self, reader: &Reader, wanted: usize, quick: bool, report: &mut Report) {
        let model = self.model.file_name().unwrap_or(self.model.as_os_str());
        report.set("model", model.to_string_lossy());
        report.set("model_digest", reader.digest());
        report.set("seed", self.seed);
        report.set("questions", wanted);
        report.set("chunks", BASE_CHUNKS);
        report.set("chunk_tokens", self.size);
        report.set("quick", quick);
    }

    /// Methods beside full prefill, and whether any codes KV.
    fn ways(&self, reader: &mut Reader, vocabulary: &Vocabulary) -> anyhow::Result<Vec<Way>> {
        let geometry = Arc::new(Geometry::new(reader.config()));
        let factors = self.allocation.as_deref().map(sensitivity::read);
        let factors = factors.transpose()?;
        let profile = self.profile(&geometry)?;
        let mut training = Training::default()
            .allocated(factors.clone())
            .with_profile(profile.clone());
        let mut is_trained = false;
        let mut ways = Vec::new();
        let names = self.methods.iter().flat_map(|name| match name.as_str() {
            "codecs" => methods::CODECS
                .iter()
                .map(|&name| name.to_owned())
                .collect(),
            _ => vec![name.clone()],
        });
        let steps = self.steps.iter();
        let steps =
            steps.flat_map(|step| (0..3).map(move |level| format!("kvasir:s{step}-L{level}")));
        let names: Vec<String> = names.chain(steps).collect();
        for name in names {
            match <Method as clap::ValueEnum>::from_str(&name, false) {
                Ok(Method::Full) => {}
                Ok(method) => ways.push(Way::Reuse(method)),
                Err(_) if name.starts_with("blend:") => {
                    let blended: Blended = name.parse()?;
                    let blended = blended.with_probes(vocabulary, self.size)?;
                    ways.push(Way::Blended(Arc::new(blended)));
                }
                Err(_) => {
                    let spec: Spec = name.parse()?;
                    if spec.is_calibrated() && !is_trained {
                        let chunks =
                            coded::training(reader, &Contexts::corpus()?, &geometry, self.size)?;
                        training = chunks
                            .allocated(factors.clone())
                            .with_profile(profile.clone());
                        is_trained = true;
                    }
                    let coded = Coded::new(spec, &geometry, &training)?;
                    ways.push(Way::Coded(Arc::new(coded)));
                }
            }
        }
        Ok(ways)
    }

    fn cells<'a>(&self, vocabulary: &'a Vocabulary) -> anyhow::Result<Vec<Cell<'a>>> {
        let known = vocabulary.tasks();
        for name in &self.tasks {
            ensure!(
                known.iter().any(|task| task.name == *name),
                "no task is called {name}; there are {}",
                known
                    .iter()
                    .map(|task| task.name.as_str())
                    .collect::<Vec<_>>()
                    .join(", ")
            );
        }
        let mut cells = Vec::new();
        for task in known {
            if !self.tasks.is_empty() && !self.tasks.contains(&task.name) {
                continue;
            }
            cells.push(Cell {
                task,
                chunks: BASE_CHUNKS,
            });
            let is_named = self.tasks.contains(&task.name);
            if is_named || AT_ALL_COUNTS.contains(&task.name.as_str()) {
                let others = self.chunks.iter().filter(|&&count| count != BASE_CHUNKS);
                cells.extend(others.map(|&chunks| Cell { task, chunks }));
            }
        }
        Ok(cells)
    }
}

/// One task at one number of chunks.
#[derive(Clone, Copy, Debug)]
struct Cell<'a> {
    task: &'a Task,
    chunks: usize,
}

impl Cell<'_> {
    fn name(&self) -> String {
        if self.chunks == BASE_CHUNKS {
            self.task.name.clone()
        } else {
            format!("{}@{}", self.task.name, self.chunks)
        }
    }
}

/// Runs the suite.
pub(crate) fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    let vocabulary = Vocabulary::load()?;
    let cells = options.cells(&vocabulary)?;
    let longest = cells.iter().map(|cell| cell.chunks).max().unwrap_or(0) * options.size + 1;
    // Two contexts at a time, the cached one and the one it is taken from.
    let mut reader = Reader::load(&options.model, 2 * longest + TAIL_TOKENS)?;
    ensure!(
        reader.config().vocab_size == vocabulary.len(),
        "{} has {} tokens, the corpus {}: use a model trained on it",
        options.model.display(),
        reader.config().vocab_size,
        vocabulary.len()
    );
    let mut report = Report::new("quality");
    let mut gates = gates::Gates::default();
    let mut charges: BTreeMap<String, Vec<Charge>> = BTreeMap::new();
    let ways = options.ways(&mut reader, &vocabulary)?;
    let wanted = options.wanted(quick);
    options.record(&reader, wanted, quick, &mut report);
    match options.sensitivity {
        Some(Spec::Kvasir(variant)) => {
            let cells = &cells[..];
            sensitivity::run(
                &mut reader,
                &vocabulary,
                cells,
                variant,
                options,
                wanted,
                &mut report,
            )?;
            return Ok(report);
        }
        Some(other) => bail!("{} is no variant of our codec", other.name()),
        None => {}
    }
    let bar = crate::progress(cells.len() as u64 + 1, "quality");
    let mut all = Outcome::default();
    for cell in &cells {
        bar.set_message(cell.name());
        let outcome = ask(
            &mut reader,
            &vocabulary,
            cell,
            &ways,
            options,
            wanted,
            &mut charges,
            &mut gates,
        )?;
        outcome.report(&cell.name(), options.seed, &mut report, &mut gates);
        if cell.chunks == BASE_CHUNKS {
            all.extend(outcome);
        }
        bar.inc(1);
    }
    if cells.len() > 1 {
        // Of no task: no gate is about them.
        all.report(
            "all",
            options.seed,
            &mut report,
            &mut gates::Gates::default(),
        );
    }
    bar.set_message("continuation");
    continuations(
        &mut reader,
        &vocabulary,
        &ways,
        options,
        wanted / QUESTIONS_PER_CONTEXT,
        &mut report,
        &mut gates,
    )?;
    bar.finish_and_clear();
    let mut points = Vec::new();
    for (method, charges) in charges {
        let mean =
            |of: fn(&Charge) -> f64| score::mean(&charges.iter().map(of).collect::<Vec<_>>());
        report.push(Row::new(
            format!("{method}/charged"),
            mean(|charge| charge.recomputed),
            "share",
        ));
        report.push(Row::new(
            format!("{method}/host_bytes"),
            mean(|charge| charge.host_bytes),
            "bytes/token",
        ));
        report.push(Row::new(
            format!("{method}/bits"),
            mean(|charge| charge.bits),
            "bits/value",
        ));
        let is_coded = |way: &&Way| matches!(way, Way::Coded(_)) && way.name() == method;
        if ways.iter().any(|way| is_coded(&way)) {
            points.push(all.point(method, mean(|charge| charge.bits)));
        }
    }
    bars::report(&points, &mut report);
    if let Some(path) = &options.plot {
        plot(&points, path)?;
    }
    gates.report(&mut report);
    Ok(report)
}

#[expect(
    clippy::too_many_arguments,
    reason = "one call, from the loop over cells"
)]
fn ask(
    reader: &mut Reader,
    vocabulary: &Vocabulary,
    cell: &Cell<'_>,
    ways: &[Way],
    options: &Options,
    wanted: usize,
    charges: &mut BTreeMap<String, Vec<Charge>>,
    gates: &mut gates::Gates,
) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome {
        full: Vec::new(),
        others: ways
            .iter()
            .map(|way| (way.name().to_owned(), Vec::new()))
            .collect(),
    };
    let mut asked = 0;
    for index in 0.. {
        if asked >= wanted {
            break;
        }
        let context = corpus::with_questions(
            vocabulary,
            cell.task,
            cell.chunks,
            options.size,
            corpus::mix(options.seed, index),
            options.split(),
        )?;
        let questions: Vec<Asked> = context
            .questions
            .iter()
            .take(QUESTIONS_PER_CONTEXT.min(wanted - asked))
            .map(|question| Asked {
                prompt: vocabulary.prompt(question),
                answer: question.answer.clone(),
            })
            .collect();
        asked += questions.len();
        let mut caches = Caches::new(reader, vocabulary.bos, &context.chunks)?;
        let (pages, charge) = Method::Full.prepare(reader, &caches)?;
        charges
            .entry(Method::Full.name().to_owned())
            .or_default()
            .push(charge);
        caches.keep(reader.take(&pages, 0..caches.tokens().len())?);
        gates.layer0_keys(reader, &pages, &caches)?;
        let full = score::answer(reader, &pages, &questions, vocabulary.eos)?;
        reader.release(pages)?;
        let mut held = |reader: &mut Reader, way: &Way| -> anyhow::Result<(Held, Charge)> {
            let mut found = Vec::with_capacity(questions.len());
            let mut charge = Charge::default();
            let apart = if way.is_per_question() {
                1
            } else {
                questions.len()
            };
            for together in questions.chunks(apart.max(1)) {
                let question = &together[0].prompt;
                let pages;
                (pages, charge) = way.prepare(reader, &caches, question)?;
                found.extend(score::answer(reader, &pages, together, vocabulary.eos)?);
                reader.release(pages)?;
            }
            let held: Held = found
                .into_iter()
                .zip(&full)
                .map(|(answer, full)| {
                    let distance = answer.distance(full);
                    (answer, distance)
                })
                .collect();
            for (_, distance) in &held {
                gates.logits(way.name(), distance.logit);
            }
            Ok((held, charge))
        };
        for (way, (name, answers)) in ways.iter().zip(&mut outcome.others) {
            let (held, charge) = held(reader, way)?;
            charges.entry(name.clone()).or_default().push(charge);
            answers.push(held);
        }
        if index < CHECKED_CONTEXTS {
            held(reader, &Way::Reuse(Method::RecomputeAll))?;
        }
        outcome.full.push(full);
    }
    Ok(outcome)
}

/// Bits against KL, a curve a series.
fn plot(points: &[bars::Point], path: &std::path::Path) -> anyhow::Result<()> {
    let lossy = points.iter().filter(|point| point.bits < 16.0);
    let points = lossy.map(|point| (bars::series(&point.name), point.bits, point.kl));
    let scatter = Scatter {
        title: "KL from full prefill by bits",
        x_label: "bits a value, everything counted",
        y_label: "KL (nats, log scale)",
        log: true,
        points: points.collect(),
    };
    scatter.write(path)
}

/// Text that follows a context, as likely under each method as it is under full prefill?
fn continuations(
    reader: &mut Reader,
    vocabulary: &Vocabulary,
    ways: &[Way],
    options: &Options,
    contexts: usize,
    report: &mut Report,
    gates: &mut gates::Gates,
) -> anyhow::Result<()> {
    let all: Vec<Way> = std::iter::once(Way::Reuse(Method::Full))
        .chain(ways.iter().cloned())
        .collect();
    let mut losses = vec![Vec::new(); all.len()];
    for index in 0..contexts.max(2) {
        let mut context = corpus::sample(
            vocabulary,
            &Profile::default(),
            BASE_CHUNKS + 1,
            options.size,
            corpus::mix(options.seed, index as u64),
            Split::Test,
        )?;
        let continuation = context.chunks.pop().context("a context has chunks")?;
        let mut caches = Caches::new(reader, vocabulary.bos, &context.chunks)?;
        let pages = reader.prefill(&caches.tokens())?;
        caches.keep(reader.take(&pages, 0..caches.tokens().len())?);
        reader.release(pages)?;
        for (method, losses) in all.iter().zip(&mut losses) {
            let (pages, _) = method.prepare(reader, &caches, &continuation)?;
            let loss = score::negative_log_likelihood(reader, &pages, &continuation)?;
            reader.release(pages)?;
            losses.push(vec![loss]);
        }
    }
    for (way, losses_of) in all.iter().zip(&losses) {
        let row = |measure: &str| format!("{}/continuation/{measure}", way.name());
        push(report, row("nll"), "nats", losses_of, options.seed);
        if !matches!(way, Way::Reuse(Method::Full)) {
            let more: Vec<Vec<f64>> = losses_of
                .iter()
                .zip(&losses[0])
                .map(|(this, full)| vec![this[0] - full[0]])
                .collect();
            if let Some(more) = push(report, row("nll_more"), "nats", &more, options.seed) {
                gates.continuation(way.name(), more.value);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
