//! `select`: which pages of a long context are worth reading, by every rule.
//!
//! Rows, `F` being the share of pages read, of which the first, the last two and whatever else
//! is always read are a part:
//!
//! - `SELECTOR/mass@F`: mean share of attention that the chosen pages have in full attention,
//!   over query heads, layers and the tokens of questions and answers; `SELECTOR/mass@F/L` in
//!   layer L. `limit` is what the best choice of as many pages has;
//! - `SELECTOR/recall@F`: share of the heaviest pages that were chosen;
//! - `SELECTOR/bytes@F`: share of K and V that was read;
//! - `SELECTOR/em@F`, `SELECTOR/TASK/em@F`: exact answers where context was prefilled in full
//!   and each later token read the chosen pages; `limit` is full attention's, and
//!   `SELECTOR/TASK/em_loss@F` what that gets more, paired, with its interval;
//! - `MODEL/SELECTOR/…`: mass and recall over 32k tokens of text without meaning, of models of
//!   random weights; see [`long`];
//! - `ahead/foreseen@F`: share of the pages that `bounds` chooses which the layer before had
//!   foreseen, by its own input; `ahead/last@F`: which were chosen for the token before;
//! - `digest/share`: bytes of digests, of those of K and V in f16; `time/…`: see [`timing`];
//! - `bar/…`: what a rule should do, `ratio` 1.0 or more where `bounds` does it.
//!
//! All rules agree on everything but how pages are judged.

mod ahead;
mod long;
mod mass;
mod timing;

use std::path::PathBuf;

use anyhow::Context as _;
use kvasir_engine::paging::{Detail, Digests, Options as Selection, Rule, Selector, Vote};

use crate::corpus::{self, Split, Vocabulary};
use crate::quality::interval;
use crate::quality::reader::{Pages, Reader};
use crate::report::{Report, Row};
use mass::Masses;

const TASKS: [&str; 3] = ["needle", "kv", "copy"];
const SHARES: [f32; 4] = [0.031_25, 0.0625, 0.125, 0.25];
/// Of [`SHARES`], the one that bars are about.
const BAR: usize = 2;
/// Chunks of a context: the corpus numbers no more.
const CHUNKS: usize = 16;
const QUESTIONS_PER_CONTEXT: usize = 8;
/// Questions of a context along which mass is measured.
const MEASURED: usize = 2;

/// What to ask.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// A model trained on the corpus.
    #[arg(long, default_value = "models/reader-9m")]
    model: PathBuf,
    /// Questions for each task and length. Default: 96; with --quick, 8.
    #[arg(long)]
    questions: Option<usize>,
    /// Rules; all of them when left out.
    #[arg(long, value_delimiter = ',')]
    rules: Vec<String>,
    /// Tokens of each of the 16 chunks of a context. Default: 64,128,250; with --quick, 64.
    #[arg(long, value_delimiter = ',')]
    sizes: Vec<usize>,
    /// KV heads agree by the largest share instead of by the sum.
    #[arg(long)]
    max_vote: bool,
    /// Every KV head of a layer has the same budget.
    #[arg(long)]
    equal_heads: bool,
    /// First layers that read everything, which counts.
    #[arg(long, default_value_t = 0)]
    exact_layers: usize,
    /// Leaves out the contexts of random models, and times.
    #[arg(long)]
    answers_only: bool,
    /// Seed of contexts and intervals.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Every rule with its name; the best there can be first, then ours.
const RULES: [(&str, Rule); 9] = [
    ("oracle", Rule::Oracle),
    ("bounds", Rule::Bounds),
    ("quest", Rule::Quest),
    ("mean-box", Rule::MeanBox),
    ("centroid", Rule::Centroid),
    ("exact", Rule::Exact { alike: 0.9 }),
    ("frequency", Rule::Frequency { share: 0.25 }),
    ("recency", Rule::Recency),
    ("random", Rule::Random { seed: 1 }),
];

/// A rule at a share of pages.
#[derive(Clone, Debug)]
struct Way {
    name: &'static str,
    share: f32,
    selection: Selection,
}

impl Way {
    fn row(&self, measure: &str) -> String {
        format!("{}/{measure}@{}", self.name, self.share)
    }

    fn task_row(&self, task: &str, measure: &str) -> String {
        format!("{}/{task}/{measure}@{}", self.name, self.share)
    }
}

/// Digests of every kind.
#[derive(Debug)]
struct Digested {
    tokens: Digests,
    means: Digests,
    deviations: Digests,
}

impl Digested {
    fn of(reader: &mut Reader, context: &Pages) -> anyhow::Result<Self> {
        Ok(Self {
            tokens: reader.digests(context, Detail::Tokens)?,
            means: reader.digests(context, Detail::Mean)?,
            deviations: reader.digests(context, Detail::Deviation)?,
        })
    }

    fn for_rule(&self, rule: Rule) -> &Digests {
        match rule.detail() {
            Some(Detail::Deviation) => &self.deviations,
            Some(Detail::Mean) => &self.means,
            _ => &self.tokens,
        }
    }
}

impl Options {
    fn ways(&self) -> anyhow::Result<Vec<Way>> {
        for name in &self.rules {
            let known = RULES.iter().any(|(known, _)| known == name);
            anyhow::ensure!(known, "no rule is called {name}");
        }
        let wanted = |(name, _): &&(&str, Rule)| {
            self.rules.is_empty() || self.rules.iter().any(|rule| rule == name)
        };
        let rules = RULES.iter().filter(wanted);
        let ways = rules.flat_map(|&(name, rule)| {
            SHARES.map(|share| Way {
                name,
                share,
                selection: Selection {
                    rule,
                    share,
                    vote: if self.max_vote { Vote::Max } else { Vote::Soft },
                    is_shared: !self.equal_heads,
                    exact_layers: self.exact_layers,
                    ..Selection::default()
                },
            })
        });
        Ok(ways.collect())
    }

    fn sizes(&self, quick: bool) -> Vec<usize> {
        match (&self.sizes[..], quick) {
            ([], true) => vec![64],
            ([], false) => vec![64, 128, 250],
            (sizes, _) => sizes.to_vec(),
        }
    }
}

/// Runs the suite.
pub(crate) fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    let mut report = Report::new("select");
    let ways = options.ways()?;
    let wanted = options.questions.unwrap_or(if quick { 8 } else { 96 });
    report.set("questions", wanted);
    report.set("seed", options.seed);
    report.set("quick", quick);
    let sizes = options.sizes(quick);
    let longest = sizes.iter().max().copied().unwrap_or(0) * CHUNKS + 1;
    let mut reader = Reader::load(&options.model, longest + 1024)?;
    report.set("model_digest", reader.digest());
    let vocabulary = Vocabulary::load()?;
    let mut answers = Answers::new(ways.len());
    let mut masses = Masses::new(&ways, reader.config().layers);
    let bar = crate::progress((sizes.len() * TASKS.len()) as u64, "select");
    for &size in &sizes {
        for task in TASKS {
            bar.set_message(format!("{task}, {} tokens", size * CHUNKS));
            let mut asked = 0;
            for index in 0.. {
                if asked >= wanted {
                    break;
                }
                let spec = vocabulary.task(task).context("a task of the corpus")?;
                let seed = corpus::mix(options.seed, index);
                let context =
                    corpus::with_questions(&vocabulary, spec, CHUNKS, size, seed, Split::Test)?;
                let front = std::iter::once(vocabulary.bos);
                let tokens: Vec<u32> = front.chain(context.chunks.concat()).collect();
                let questions = context.questions.iter();
                let questions: Vec<(Vec<u32>, &[u32])> = questions
                    .take(QUESTIONS_PER_CONTEXT.min(wanted - asked))
                    .map(|question| (vocabulary.prompt(question), &question.answer[..]))
                    .collect();
                asked += questions.len();
                let pages = reader.prefill(&tokens)?;
                let digests = Digested::of(&mut reader, &pages)?;
                let tails: Vec<Vec<u32>> = questions
                    .iter()
                    .map(|(prompt, answer)| [&prompt[..], answer].concat())
                    .collect();
                let measured = if quick { 1 } else { MEASURED };
                let measured = &tails[..tails.len().min(measured)];
                masses.measure(&mut reader, &pages, &digests, measured, &ways)?;
                answers.ask(
                    &mut reader,
                    &pages,
                    &digests,
                    &questions,
                    vocabulary.eos,
                    &ways,
                    task,
                )?;
                reader.release(pages)?;
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    masses.report("", &mut report);
    answers.report(&ways, options.seed, &mut report);
    bars(&ways, &masses, &answers, options.seed, &mut report);
    if !options.answers_only {
        long::run(&ways, quick, &mut report)?;
        timing::run(quick, &mut report)?;
    }
    Ok(report)
}

/// Which questions were answered exactly: by task, context and question.
#[derive(Debug)]
struct Answers {
    tasks: Vec<&'static str>,
    full: Vec<Vec<f64>>,
    /// `[way][context][question]`.
    ways: Vec<Vec<Vec<f64>>>,
}

impl Answers {
    fn new(ways: usize) -> Self {
        Self {
            tasks: Vec::new(),
            full: Vec::new(),
            ways: vec![Vec::new(); ways],
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one call, from the loop over contexts"
    )]
    fn ask(
        &mut self,
        reader: &mut Reader,
        context: &Pages,
        digests: &Digested,
        questions: &[(Vec<u32>, &[u32])],
        end: u32,
        ways: &[Way],
        task: &'static str,
    ) -> anyhow::Result<()> {
        let tails: Vec<Vec<u32>> = questions
            .iter()
            .map(|(prompt, answer)| [&prompt[..], answer].concat())
            .collect();
        let exact = |likeliest: Vec<Vec<u32>>| -> Vec<f64> {
            let each = likeliest.iter().zip(questions);
            // Greedy decoding sees what the right answer shows up to its first mistake.
            let each = each.map(|(likeliest, (prompt, answer))| {
                let after = &likeliest[prompt.len() - 1..];
                let (last, before) = after.split_last().expect("a prompt has a token");
                f64::from(u8::from(before == *answer && *last == end))
            });
            each.collect()
        };
        let full = reader.follow(context, &tails, &mut |_, _, _, _| kvasir_engine::Pages::All)?;
        self.full.push(exact(full));
        self.tasks.push(task);
        for (way, found) in ways.iter().zip(&mut self.ways) {
            let mut selectors: Vec<Selector> = tails
                .iter()
                .map(|_| Selector::new(reader.model(), way.selection))
                .collect();
            let digests = digests.for_rule(way.selection.rule);
            let likeliest = reader.follow(context, &tails, &mut |tail, before, step, blocks| {
                selectors[tail].choose(before, step, digests, blocks)
            })?;
            found.push(exact(likeliest));
        }
        Ok(())
    }

    /// Of one task, or of all.
    fn of<'a>(&self, values: &'a [Vec<f64>], task: Option<&str>) -> Vec<&'a [f64]> {
        let of = self.tasks.iter().zip(values);
        of.filter(|(of, _)| task.is_none_or(|task| task == **of))
            .map(|(_, values)| &values[..])
            .collect()
    }

    /// What full attention gets more, paired, and its interval.
    fn loss(&self, way: usize, task: Option<&str>, seed: u64) -> Option<interval::Estimate> {
        let full = self.of(&self.full, task).into_iter();
        let pairs = full.zip(self.of(&self.ways[way], task));
        let differences = pairs.map(|(full, this)| {
            let pairs = full.iter().zip(this);
            pairs.map(|(full, this)| full - this).collect()
        });
        interval::estimate(&differences.collect::<Vec<Vec<f64>>>(), seed)
    }

    fn report(&self, ways: &[Way], seed: u64, report: &mut Report) {
        let mean = |values: &[&[f64]]| {
            let all: Vec<f64> = values.concat();
            crate::quality::mean(&all)
        };
        report.push(Row::new(
            "full/em",
            mean(&self.of(&self.full, None)),
            "share",
        ));
        for task in TASKS {
            let full = mean(&self.of(&self.full, Some(task)));
            report.push(Row::new(format!("full/{task}/em"), full, "share"));
        }
        for (index, way) in ways.iter().enumerate() {
            for task in std::iter::once(None).chain(TASKS.map(Some)) {
                let full = mean(&self.of(&self.full, task));
                let em = mean(&self.of(&self.ways[index], task));
                let row = |measure: &str| {
                    task.map_or_else(|| way.row(measure), |task| way.task_row(task, measure))
                };
                let ratio = if full > 0.0 { em / full } else { 0.0 };
                report.push(Row::new(row("em"), em, "share").against(full, ratio));
                if let Some(loss) = self.loss(index, task, seed) {
                    let loss = Row::new(row("em_loss"), loss.value, "share").within(loss.interval);
                    report.push(loss);
                }
            }
        }
    }
}

/// What our rule should do at an eighth of the pages.
fn bars(ways: &[Way], masses: &Masses, answers: &Answers, seed: u64, report: &mut Report) {
    let at = |name: &str| {
        let is = |way: &Way| way.name == name && way.share == SHARES[BAR];
        ways.iter().position(is)
    };
    let Some(ours) = at("bounds") else { return };
    let mass = masses.mass(ours);
    report.push(Row::new("bar/mass", mass, "share").against(0.9, mass / 0.9));
    if let Some(oracle) = at("oracle") {
        let most = masses.mass(oracle);
        report.push(Row::new("bar/mass_of_oracle", mass, "share").against(most, mass / most));
    }
    for task in TASKS {
        if let Some(loss) = answers.loss(ours, Some(task), seed) {
            // 1.0 at a loss of one point.
            let ratio = 1.0 - (loss.value - 0.01);
            let row = Row::new(format!("bar/{task}/em_loss"), loss.value, "share");
            report.push(row.against(0.01, ratio).within(loss.interval));
        }
    }
    for other in ["centroid", "recency", "random"] {
        if let Some(other_way) = at(other) {
            let theirs = masses.mass(other_way);
            let row = Row::new(format!("bar/mass_beats_{other}"), mass, "share");
            report.push(row.against(theirs, mass / theirs));
        }
    }
}
