//! Whether a model's chunks may be reused at other places.

use std::path::PathBuf;

use anyhow::Context as _;
use kvasir_engine::Model;
use kvasir_engine::blend::check::{self, Context, ContextLine, Words};
use kvasir_engine::tokenizer::{EncodeError, Tokenizer};
use kvasir_plugin::blend::{Gate, Quality};

#[derive(Debug, clap::Args)]
pub(super) struct BlendCheckArgs {
    /// A checkpoint in the Hugging Face layout: config.json, safetensors, tokenizer.json.
    #[arg(long)]
    model: PathBuf,
    /// Contexts as JSON lines: {"chunks": [TEXT, ...], "questions": [{"prompt": TEXT, "answer":
    /// TEXT}, ...]}; a TEXT may be a list of token ids instead. The first four become probes.
    #[arg(long, value_name = "FILE")]
    questions: PathBuf,
    /// Text that every chunk is computed behind. Default: what the tokenizer puts first.
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// Where the verdict goes. Default: kvasir-blend.json in the model's directory.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(super) fn run(args: &BlendCheckArgs) -> anyhow::Result<()> {
    let model = Model::load(&args.model)
        .with_context(|| format!("loading the model in {}", args.model.display()))?;
    let tokenizer = Tokenizer::load(&args.model, &model.config().eos_token_ids)
        .with_context(|| format!("loading the tokenizer in {}", args.model.display()))?;
    let encode = |words: &Words| match words {
        Words::Tokens(tokens) => Ok(tokens.clone()),
        Words::Text(text) => tokenizer.encode(text, false),
    };
    let prefix = match &args.prefix {
        Some(text) => tokenizer.encode(text, false)?,
        None => tokenizer.encode("", true)?,
    };
    let path = args.questions.display();
    let lines = std::fs::read_to_string(&args.questions)
        .with_context(|| format!("reading the questions in {path}"))?;
    let mut contexts = Vec::new();
    for (number, line) in (1..)
        .zip(lines.lines())
        .filter(|(_, line)| !line.is_empty())
    {
        let line: ContextLine = serde_json::from_str(line)
            .with_context(|| format!("{path}, line {number} is not a context"))?;
        let chunks = line.chunks.iter().map(encode);
        let questions = line.questions.iter().map(|question| {
            let prompt = encode(&question.prompt)?;
            Ok((prompt, encode(&question.answer)?))
        });
        contexts.push(Context {
            chunks: chunks.collect::<Result<_, EncodeError>>()?,
            questions: questions.collect::<Result<_, EncodeError>>()?,
        });
    }
    let gate = check::check(&model, &prefix, &contexts, |done, all| {
        if done % 20 == 0 || done == all {
            eprintln!("{done} of {all} contexts");
        }
    })?;
    let out = args.out.clone();
    let out = out.unwrap_or_else(|| args.model.join(Gate::FILE));
    let mut json = serde_json::to_string(&gate)?;
    json.push('\n');
    std::fs::write(&out, json).with_context(|| format!("writing {}", out.display()))?;
    println!("budget   exact   KL (nats)   closed   text (nats)");
    let row = |budget: &str, exact: f64, kl: f64, closed: f64, text: f64| {
        println!("{budget:<6} {exact:>7.3} {kl:>11.4} {closed:>8.3} {text:>13.4}");
    };
    row("full", gate.full_exact, 0.0, 1.0, 0.0);
    row(
        "naive",
        gate.naive_exact,
        gate.naive_kl,
        0.0,
        gate.naive_text,
    );
    for repair in &gate.repairs {
        let closed = gate.closed(repair);
        row(
            &repair.budget.to_string(),
            repair.exact,
            repair.kl,
            closed,
            repair.text,
        );
    }
    for (name, quality) in [("high", Quality::High), ("fair", Quality::Fair)] {
        match gate.good(quality).next() {
            Some(repair) => println!(
                "quality {name}: blended from a budget of {} on",
                repair.budget
            ),
            None => println!("quality {name}: not blended"),
        }
    }
    println!(
        "{} questions; the verdict is in {}",
        gate.questions,
        out.display()
    );
    Ok(())
}
