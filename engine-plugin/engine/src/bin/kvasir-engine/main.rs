//! `kvasir-engine`: serves a checkpoint over an OpenAI-compatible HTTP interface.

#![forbid(unsafe_code)]

use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use kvasir_engine::cache;
use kvasir_engine::chat::ChatTemplate;
use kvasir_engine::http::{self, Chunks, Defaults, Front, Limits, Preparation};
use kvasir_engine::scheduler::{BlendConfig, Engine, EngineConfig};
use kvasir_engine::tokenizer::Tokenizer;
use kvasir_engine::{BLOCK_TOKENS, Model, metrics};
use kvasir_plugin::blend::{ContentCuts, Gate, Quality};
use kvasir_plugin::{CachePlugin, CodecConfig, Encoding, PluginConfig, Profile, TlsConfig};
use kvasir_types::Level;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tracing_subscriber::EnvFilter;

mod blend_check;
mod drain;
mod memory;

use blend_check::BlendCheckArgs;
use drain::{Signals, until_drained};
use memory::MemoryArgs;

/// A CPU inference engine that fetches prefill from Kvasir.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a checkpoint until interrupted.
    Serve(Box<ServeArgs>),
    /// Measure what reuse of chunks at other places does to a model's answers, and store the
    /// verdict with the model. Without one, its chunks are not reused.
    BlendCheck(BlendCheckArgs),
}

#[derive(Debug, clap::Args)]
struct ServeArgs {
    /// A checkpoint in the Hugging Face layout: config.json, safetensors, tokenizer.json.
    #[arg(long)]
    model: PathBuf,
    /// Name under which the model is served. Default: the directory's name.
    #[arg(long)]
    model_name: Option<String>,
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// The cache daemon, HOST:PORT. It may start later than this engine.
    #[arg(long, env = "KVASIR_ENDPOINT", default_value = "127.0.0.1:7420")]
    kvasir: String,
    /// Serve without a cache.
    #[arg(long)]
    no_cache: bool,
    /// Tokens per cached chunk; a multiple of 16.
    #[arg(long, default_value_t = 256)]
    chunk_tokens: u32,
    /// Keeps this engine's chunks apart from those of engines with another salt.
    #[arg(long, default_value = "", hide_default_value = true)]
    tenant_salt: String,
    /// The salt of a tenant whose chunks of text this engine may read too, where prompts name
    /// them: a corpus that all share. Engines with this as their --tenant-salt fill it.
    #[arg(long, value_name = "SALT")]
    corpus_salt: Option<String>,
    /// Level at which chunks are stored: raw and lossless are exact; l2, l1 and l0 take
    /// ever fewer bytes, and hold all coarser ones.
    #[arg(long, default_value_t = Level::RAW)]
    cache_level: Level,
    /// A profile of the model, made by `kvasir-bench profile`, that levels l0 to l2 are encoded
    /// with: they take fewer bytes and more time. The daemon keeps it too, so that engines
    /// without it can use such chunks. Default: none.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// The finest of the levels l0 to l2 that is fetched. Default: as stored.
    #[arg(long)]
    fetch_level: Option<Level>,
    /// Milliseconds to the first token that fetches at levels l0 to l2 keep to: what comes is
    /// as fine as it can be until then, and what would be late is computed. Chunks at other
    /// places are repaired as well as that time allows. Not with
    /// --fetch-level. Default: none; everything comes as it is stored.
    #[arg(long, value_name = "MILLISECONDS", conflicts_with = "fetch_level")]
    deadline: Option<u64>,
    /// File of certificates in PEM, one of which must vouch for the daemon's data plane.
    /// Default: what the daemon says.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// File of this engine's certificate in PEM, for daemons that ask for one.
    #[arg(long, value_name = "FILE", requires = "client_key")]
    client_cert: Option<PathBuf>,
    /// File of its key.
    #[arg(long, value_name = "FILE", requires = "client_cert")]
    client_key: Option<PathBuf>,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Threads that compute. Default: one per core.
    #[arg(long)]
    threads: Option<usize>,
    /// How chunks of a prompt are reused where they did not stand before: as `blend-check` found
    /// this model to allow, or never.
    #[arg(long, value_enum, default_value_t = BlendArg::Proven)]
    blend: BlendArg,
    /// How near to full prefill answers over such chunks must be, among the repairs that
    /// `blend-check` measured.
    #[arg(long, value_enum, default_value_t = QualityArg::High)]
    blend_quality: QualityArg,
    /// Text that separates chunks in the prompts of completions. Default: none; requests name
    /// their chunks.
    #[arg(long, value_name = "TEXT")]
    chunk_separator: Option<String>,
    /// Cuts prompts that name no chunks into some, where the text itself says: about 192 tokens
    /// each, found again wherever the same text stands. What follows the last cut is text.
    #[arg(long)]
    content_cuts: bool,
    /// Misses of a chunk after which it is compiled, in time that no request waits for.
    #[arg(long, value_name = "MISSES", default_value_t = BlendConfig::COMPILE_AFTER)]
    compile_after: NonZeroU32,
    /// Tokens of one batch, prefill and decode together.
    #[arg(long, default_value_t = EngineConfig::BATCH_TOKENS)]
    batch_tokens: usize,
    /// Requests that may wait for pages before more are refused.
    #[arg(long, default_value_t = EngineConfig::MAX_WAITING)]
    max_waiting: usize,
    /// Seconds that requests in progress get at SIGINT or SIGTERM. A second signal
    /// ends them at once.
    #[arg(long, default_value_t = 10)]
    drain_timeout: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum BlendArg {
    /// With a repair that was found to be good enough.
    Proven,
    /// Never.
    Off,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum QualityArg {
    /// Nothing but chunks in the place that they were computed for is reused.
    Exact,
    /// Nine tenths of the gap between reuse as it is and full prefill are closed.
    High,
    /// Seven tenths.
    Fair,
}

impl From<QualityArg> for Quality {
    fn from(arg: QualityArg) -> Self {
        match arg {
            QualityArg::Exact => Self::Exact,
            QualityArg::High => Self::High,
            QualityArg::Fair => Self::Fair,
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match Args::parse().command {
        Command::Serve(args) => serve(*args).await,
        Command::BlendCheck(args) => tokio::task::block_in_place(|| blend_check::run(&args)),
    }
}

fn profile(args: &ServeArgs) -> anyhow::Result<Option<Arc<Profile>>> {
    let Some(path) = &args.profile else {
        return Ok(None);
    };
    let reading = || format!("reading the profile {}", path.display());
    let bytes = std::fs::read(path).with_context(reading)?;
    let profile = Profile::parse(&bytes).with_context(reading)?;
    Ok(Some(Arc::new(profile)))
}

/// What was measured on blending this very model.
fn proven(directory: &Path, model: &Model) -> anyhow::Result<Option<Gate>> {
    let Some(gate) = Gate::load(directory)? else {
        tracing::info!("chunks are not reused at other places: `blend-check` has not been run");
        return Ok(None);
    };
    let digest = model.weights_digest();
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(
        gate.weights == digest,
        "{} is about other weights; run `kvasir-engine blend-check` again, or remove it",
        directory.join(Gate::FILE).display()
    );
    Ok(Some(gate))
}

async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let block = u32::try_from(BLOCK_TOKENS)?;
    ensure!(
        args.chunk_tokens > 0 && args.chunk_tokens.is_multiple_of(block),
        "--chunk-tokens {} is not a multiple of {BLOCK_TOKENS}",
        args.chunk_tokens
    );
    let recorder = metrics::install()?;
    tokio::spawn(metrics::upkeep(recorder.clone()));
    let model = Model::load(&args.model)
        .with_context(|| format!("loading the model in {}", args.model.display()))?;
    let tokenizer = Arc::new(
        Tokenizer::load(&args.model, &model.config().eos_token_ids)
            .with_context(|| format!("loading the tokenizer in {}", args.model.display()))?,
    );
    let chat = ChatTemplate::new(tokenizer.templates(), tokenizer.special_tokens())?;
    let dtype = args.memory.dtype();
    let layout = cache::layout(model.config(), dtype, args.chunk_tokens)?;
    let plugin = if args.no_cache {
        None
    } else {
        let salt = args.tenant_salt.as_bytes();
        let namespace = cache::namespace(&model, layout, &tokenizer.digest(), salt);
        let corpus = args
            .corpus_salt
            .as_ref()
            .map(|salt| cache::namespace(&model, layout, &tokenizer.digest(), salt.as_bytes()));
        let runtime = tokio::runtime::Handle::current();
        let encoding = Encoding {
            profile: profile(&args)?,
            ..Encoding::at(args.cache_level)
        };
        let codec = CodecConfig {
            encoding,
            fetch: args.fetch_level,
            rotation: Some(cache::rotation(model.config())),
            ..CodecConfig::default()
        };
        codec.check(&layout).with_context(|| {
            let level = args.cache_level;
            format!("--cache-level {level}, or the profile, is not for this model")
        })?;
        let identity = args.client_cert.clone().zip(args.client_key.clone());
        let config = PluginConfig {
            codec,
            corpus,
            tls: TlsConfig::from_files(args.ca.clone(), identity)?,
            deadline: args.deadline.map(Duration::from_millis),
            ..PluginConfig::default()
        };
        Some(CachePlugin::connect(
            &args.kvasir,
            runtime,
            namespace,
            config,
        )?)
    };

    let mut config = args.memory.engine(model.config())?;
    config.batch_tokens = args.batch_tokens;
    config.max_waiting = args.max_waiting;
    config.threads = args.threads.unwrap_or(config.threads);
    let gate = match args.blend {
        BlendArg::Proven if plugin.is_some() => proven(&args.model, &model)?,
        _ => None,
    };
    let mut chunks = Chunks {
        prefix: tokenizer.encode("", true)?,
        separator: args.chunk_separator,
    };
    if let Some(gate) = gate {
        chunks.prefix.clone_from(&gate.prefix);
        config.blend = Some(BlendConfig {
            quality: args.blend_quality.into(),
            cuts: args.content_cuts.then(ContentCuts::default),
            compile_after: args.compile_after,
            ..BlendConfig::new(gate)
        });
    }

    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("listening on {}; is another process there?", args.listen))?;
    let address = listener.local_addr()?;
    let engine = Engine::start(Arc::new(model), &config, plugin)?;
    let handle = engine.handle();
    let limits = Limits::of_context(handle.limits().sequence_tokens);
    let name = args.model_name.or_else(|| {
        let name = args.model.canonicalize().ok()?;
        Some(name.file_name()?.to_string_lossy().into_owned())
    });
    let front = Front {
        model: name.unwrap_or_else(|| "model".to_owned()),
        tokenizer,
        chat,
        submit: Arc::new(move |request| handle.submit(request)),
        preparation: Preparation::default(),
        ready: engine.ready(),
        limits,
        defaults: Defaults::default(),
        chunks,
        metrics: Some(recorder),
    };
    tracing::info!(
        model = front.model,
        kv_tokens = config.blocks * BLOCK_TOKENS,
        context_tokens = limits.context_tokens,
        cache = if args.no_cache {
            "none"
        } else {
            args.kvasir.as_str()
        },
        %address,
        "starting"
    );
    let mut signals = Signals::watch()?;
    let ready = Arc::clone(&front.ready);
    tokio::spawn(async move {
        while !ready.load(Ordering::Acquire) {
            tokio::time::sleep(READY_INTERVAL).await;
        }
        tracing::info!("ready");
        // Parents read this line to learn the port, and send requests at once.
        println!("listening on {address}");
    });

    let (drain, draining) = oneshot::channel();
    // Its drop waits for the sequences, so it must not run when they are abandoned.
    let engine = ManuallyDrop::new(engine);
    let serving = async move {
        let draining = async { draining.await.unwrap_or(()) };
        http::serve(listener, front, draining).await?;
        // The handles are gone with the front: the engine thread ends by itself.
        tokio::task::spawn_blocking(|| drop(ManuallyDrop::into_inner(engine))).await?;
        Ok(())
    };
    let timeout = Duration::from_secs(args.drain_timeout);
    match until_drained(serving, async || signals.next().await, drain, timeout).await {
        Some(result) => result,
        // Connections still hold the engine; both end with the process.
        None => std::process::exit(0),
    }
}

/// From one look whether the engine is ready to the next.
const READY_INTERVAL: Duration = Duration::from_millis(10);
