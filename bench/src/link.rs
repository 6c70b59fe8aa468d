//! `link`: time to first token over a slow link, by the level that KV is fetched at.
//!
//! The engine runs in this process and the daemon in its own. Between them is a proxy that
//! lets so many bits a second pass, each way. Chunks are stored in namespaces of their own:
//! raw, lossless, and at level 2, which serves the coarser levels too; that with the model's
//! profile besides, if it has one.
//!
//! # Rows
//! - `computed/N`: N tokens of context computed, in ms;
//! - `LEVEL/N`: fetched, for `raw`, `lossless`, `l2`, `l1`, `l0`, and `profile-l2` and so on;
//!   `ratio` is computed ÷ fetched;
//! - `LEVEL/N/bytes`: payload that came; `LEVEL/N/link`: the ms that the link takes for it,
//!   with `ratio` = this ÷ fetched, which is 1.0 where nothing but the link takes time;
//! - `deadline-MS/N`: fetched as finely as a deadline allows (`--deadlines`), of what is stored
//!   at level 2 without a profile, with `ratio` = deadline ÷ fetched; `/late`: runs of it that
//!   took longer, of nine, or of three with `--quick`; `/bytes`: payload; `/loaded`: tokens
//!   that were not computed.
//!
//! Values have 16 bits. Policy is to fetch always. What is fetched exactly must give the
//! logits that computing gave.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use kvasir_engine::kv::KvDtype;
use kvasir_engine::model::Model;
use kvasir_plugin::{CodecConfig, DataPlane, Encoding, LoadPolicy, PluginConfig};
use kvasir_tests::harness::{Link, Rig, Use};
use kvasir_types::{ByteSize, Level};

use crate::corpus::{self, Profile, Split, Vocabulary};
use crate::daemon::Daemon;
use crate::methods::{Geometry, calibration};
use crate::quality;
use crate::report::{Report, Row, median};

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// A model trained on the corpus, in the Hugging Face layout.
    #[arg(long, default_value = "models/reader-9m")]
    model: PathBuf,
    /// Tokens of context, a multiple of 256.
    #[arg(long, default_value_t = 3840)]
    tokens: usize,
    /// Millions of bits a second.
    #[arg(long, default_value_t = 1000)]
    mbps: u32,
    /// Milliseconds to the first token that further fetches keep to, by themselves.
    #[arg(long, value_delimiter = ',')]
    deadlines: Vec<u32>,
}

/// What a reader is told of the levels that it gets.
#[derive(Clone, Copy, Debug)]
enum Told {
    Level(Level),
    Deadline(u32),
}

pub(crate) async fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    ensure!(
        options.tokens > 0 && options.tokens.is_multiple_of(CHUNK_TOKENS as usize),
        "--tokens {} is not a multiple of {CHUNK_TOKENS}",
        options.tokens
    );
    ensure!(options.mbps > 0, "a link has a speed");
    let runs = if quick { 3 } else { 9 };
    let mut report = Report::new("link");
    report.set("model", options.model.to_string_lossy());
    report.set("mbps", options.mbps);
    let prompt = prompt(options.tokens)?;
    let model = Arc::new(Model::load(&options.model)?);
    let layout = kvasir_engine::cache::layout(model.config(), KvDtype::F16, CHUNK_TOKENS)?;
    let data = tempfile::tempdir()?;
    let daemon = Daemon::start(data.path(), ByteSize::gib(1), "127.0.0.1:0")?;
    let client = daemon.client().await?;
    let link = Link::start(daemon.address().to_owned(), options.mbps).await;
    let path = options.model.join(quality::PROFILE);
    let geometry = Geometry::new(model.config());
    let profile = path.exists().then(|| calibration::read(&path, &geometry));
    let profile = profile.transpose()?;
    let rig = |stored: Level, told: Told, with_profile: bool, endpoint: &str| {
        let (fetch, deadline) = match told {
            Told::Level(level) => (Some(level), None),
            Told::Deadline(millis) => (None, Some(Duration::from_millis(millis.into()))),
        };
        let salt = [stored.code(), u8::from(with_profile)];
        let mut encoding = Encoding::at(stored);
        encoding.profile = profile.clone().filter(|_| with_profile);
        let namespace = kvasir_engine::cache::namespace(&model, layout, &[0; 32], &salt);
        let config = PluginConfig {
            data_plane: DataPlane::Grpc,
            load: LoadPolicy::Always,
            lookup_timeout: Duration::from_secs(5),
            codec: CodecConfig {
                encoding,
                fetch,
                rotation: Some(kvasir_engine::cache::rotation(model.config())),
                ..CodecConfig::default()
            },
            deadline,
            ..PluginConfig::default()
        };
        Rig::start(
            Arc::clone(&model),
            namespace,
            prompt.len() + 32,
            endpoint,
            config,
        )
    };
    let mut computed = Vec::new();
    let mut logits = None;
    let mut stored = vec![
        (Level::RAW, false),
        (Level::LOSSLESS, false),
        (Level::L2, false),
    ];
    stored.extend(profile.is_some().then_some((Level::L2, true)));
    for &(level, with_profile) in &stored {
        let writer = rig(level, Told::Level(level), with_profile, daemon.address());
        for _ in 0..runs.min(3) {
            let answer = writer.ask(&prompt, Use::Nothing).await;
            computed.push(millis(answer.ttft()));
            logits = Some(answer.logits);
        }
        writer.ask(&prompt, Use::Write).await;
        writer.stored(&client, &prompt).await;
    }
    let computed = median(&mut computed);
    let tokens = options.tokens;
    report.push(Row::new(format!("computed/{tokens}"), computed, "ms"));
    let all = stored.into_iter().flat_map(|(level, with_profile)| {
        let fetched = if level.is_nested() {
            vec![Level::L2, Level::L1, Level::L0]
        } else {
            vec![level]
        };
        let fetched = fetched.into_iter();
        fetched.map(move |fetched| (level, fetched, with_profile))
    });
    for (stored, fetched, with_profile) in all {
        let reader = rig(stored, Told::Level(fetched), with_profile, link.address());
        let name = if with_profile {
            format!("profile-{fetched}/{tokens}")
        } else {
            format!("{fetched}/{tokens}")
        };
        let mut times = Vec::new();
        let mut bytes = 0;
        // The first opens the connection.
        for run in 0..=runs {
            let answer = reader.ask(&prompt, Use::Read).await;
            ensure!(
                answer.usage.cached_tokens == tokens,
                "{} of {tokens} tokens of context came from the cache",
                answer.usage.cached_tokens
            );
            ensure!(
                !fetched.is_exact() || logits.as_ref() == Some(&answer.logits),
                "fetched and computed logits differ"
            );
            bytes = answer.usage.fetched_bytes;
            if run > 0 {
                times.push(millis(answer.ttft()));
            }
        }
        let time = median(&mut times);
        let bytes = as_f64(bytes);
        let link = bytes * 8.0 / f64::from(options.mbps) / 1e3;
        report.push(Row::new(name.clone(), time, "ms").against(computed, computed / time));
        report.push(Row::new(format!("{name}/bytes"), bytes, "B"));
        report.push(Row::new(format!("{name}/link"), link, "ms").against(time, link / time));
    }
    for &deadline in &options.deadlines {
        let reader = rig(Level::L2, Told::Deadline(deadline), false, link.address());
        let (mut times, mut bytes, mut loaded) = (Vec::new(), Vec::new(), Vec::new());
        // The first opens the connection, and teaches.
        for run in 0..=runs {
            let answer = reader.ask(&prompt, Use::Read).await;
            if run > 0 {
                times.push(millis(answer.ttft()));
                bytes.push(as_f64(answer.usage.fetched_bytes));
                loaded.push(as_f64(answer.usage.cached_tokens as u64));
            }
        }
        let due = f64::from(deadline);
        let late = times.iter().filter(|time| **time > due).count();
        let time = median(&mut times);
        let name = format!("deadline-{deadline}/{tokens}");
        report.push(Row::new(name.clone(), time, "ms").against(due, due / time));
        report.push(Row::new(
            format!("{name}/late"),
            as_f64(late as u64),
            "runs",
        ));
        report.push(Row::new(format!("{name}/bytes"), median(&mut bytes), "B"));
        let loaded = median(&mut loaded);
        report.push(Row::new(format!("{name}/loaded"), loaded, "tokens"));
    }
    Ok(report)
}

/// Contexts of the corpus, one after the other, and a question's length more.
pub(crate) fn prompt(tokens: usize) -> anyhow::Result<Vec<u32>> {
    let vocabulary = Vocabulary::load()?;
    let mut all = vec![vocabulary.bos];
    for index in 0.. {
        if all.len() >= tokens + QUESTION_TOKENS {
            break;
        }
        let context = corpus::sample(
            &vocabulary,
            &Profile::default(),
            CORPUS_CHUNKS,
            CORPUS_CHUNK,
            corpus::mix(1, index),
            Split::Test,
        )?;
        all.extend(context.chunks.concat());
    }
    all.truncate(tokens + QUESTION_TOKENS);
    Ok(all)
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
fn as_f64(value: u64) -> f64 {
    value as f64
}

const CHUNK_TOKENS: u32 = 256;
const QUESTION_TOKENS: usize = 16;
/// Tokens of a chunk of the corpus.
const CORPUS_CHUNK: usize = 64;
/// Chunks of a context.
const CORPUS_CHUNKS: usize = 8;
