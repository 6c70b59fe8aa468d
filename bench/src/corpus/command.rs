//! `kvasir-bench corpus`: contexts as JSON lines, as `corpus.py` prints them.

use std::io::{self, BufWriter, Write};

use anyhow::Context as _;
use serde::Serialize;

use super::{Context, Kind, Profile, Split, Vocabulary, mix, sample, with_questions};

/// Which contexts to print.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Arguments {
    /// An evaluation task of bench/quality/corpus.json.
    #[arg(long, required_unless_present = "profile", conflicts_with = "profile")]
    pub(super) task: Option<String>,
    /// Contexts with every question instead: a profile as JSON; what is left out has
    /// its default.
    #[arg(long)]
    pub(super) profile: Option<String>,
    /// Chunks of a context.
    #[arg(long, default_value_t = 8)]
    pub(super) chunks: usize,
    /// Tokens of a chunk.
    #[arg(long, default_value_t = 64)]
    pub(super) size: usize,
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
    /// Contexts.
    #[arg(long, default_value_t = 1)]
    pub(super) count: u64,
    #[arg(long, value_enum, default_value_t = Split::Test)]
    pub(super) split: Split,
}

/// Prints contexts to stdout.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    write(arguments, &mut out)?;
    Ok(out.flush()?)
}

/// Writes one line per context.
pub(super) fn write(arguments: &Arguments, out: &mut dyn Write) -> anyhow::Result<()> {
    let vocabulary = Vocabulary::load()?;
    let Arguments {
        chunks,
        size,
        seed,
        split,
        ..
    } = *arguments;
    let profile: Profile = match &arguments.profile {
        Some(json) => serde_json::from_str(json).context("reading the profile")?,
        None => Profile::default(),
    };
    let task = match &arguments.task {
        Some(name) => Some(
            vocabulary
                .task(name)
                .with_context(|| format!("no task {name:?}, but {}", names(&vocabulary)))?,
        ),
        None => None,
    };
    for index in 0..arguments.count {
        let seed_of_context = mix(seed, index);
        let context = match task {
            Some(task) => with_questions(&vocabulary, task, chunks, size, seed_of_context, split),
            None => sample(&vocabulary, &profile, chunks, size, seed_of_context, split),
        }?;
        let line = Line {
            task: task.map_or("sample", |task| &task.name),
            split: match split {
                Split::Train => "train",
                Split::Test => "test",
            },
            seed,
            index,
            chunks: &context.chunks,
            questions: asked(&vocabulary, &context),
        };
        writeln!(out, "{}", serde_json::to_string(&line)?)?;
    }
    Ok(())
}

/// One context.
#[derive(Debug, Serialize)]
struct Line<'a> {
    task: &'a str,
    split: &'a str,
    seed: u64,
    index: u64,
    chunks: &'a [Vec<u32>],
    questions: Vec<Asked<'a>>,
}

/// One question.
#[derive(Debug, Serialize)]
struct Asked<'a> {
    kind: Kind,
    chunks: &'a [usize],
    question: &'a [u32],
    answer: &'a [u32],
    prompt_text: String,
    answer_text: String,
}

fn asked<'a>(vocabulary: &Vocabulary, context: &'a Context) -> Vec<Asked<'a>> {
    let asked = context.questions.iter().map(|question| Asked {
        kind: question.kind,
        chunks: &question.chunks,
        question: &question.question,
        answer: &question.answer,
        prompt_text: vocabulary.text(&vocabulary.prompt(question)),
        answer_text: vocabulary.text(&question.answer),
    });
    asked.collect()
}

fn names(vocabulary: &Vocabulary) -> String {
    let names: Vec<&str> = vocabulary
        .tasks()
        .iter()
        .map(|task| task.name.as_str())
        .collect();
    names.join(", ")
}
