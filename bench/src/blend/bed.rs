//! A daemon, engines that read from it, and prompts of chunks in many orders.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use kvasir_engine::blend::check::{PROBES, probed_layers};
use kvasir_engine::kv::KvDtype;
use kvasir_engine::model::Model;
use kvasir_engine::scheduler::{BlendConfig, EngineConfig};
use kvasir_plugin::blend::{ChunkLimits, Gate, Rule, Segment, Segmented, Selector};
use kvasir_plugin::{CodecConfig, DataPlane, Encoding, LoadPolicy, PluginConfig};
use kvasir_tests::harness::{Answer, Rig, Use};
use kvasir_types::{ByteSize, KvLayout, Level, Namespace};
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::checkpoint::{self, Shape};
use crate::daemon::Daemon;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) chunks: usize,
    pub(super) chunk_tokens: usize,
    /// Tokens of a prefix chunk.
    pub(super) prefix_tokens: u32,
    /// Of each method.
    pub(super) runs: usize,
    /// Of a measurement of throughput.
    pub(super) requests: usize,
}

impl Size {
    pub(super) const FULL: Self = Self {
        chunks: 6,
        chunk_tokens: 512,
        prefix_tokens: 256,
        runs: 5,
        requests: 32,
    };
    pub(super) const QUICK: Self = Self {
        chunks: 6,
        chunk_tokens: 96,
        prefix_tokens: 64,
        runs: 2,
        requests: 8,
    };

    /// Tokens in front of the question.
    pub(super) const fn context(self) -> usize {
        PREFIX.len() + self.chunks * self.chunk_tokens
    }
}

pub(super) struct Bed {
    pub(super) size: Size,
    pub(super) model: Arc<Model>,
    pub(super) layout: KvLayout,
    /// The order that prefixes are stored of.
    pub(super) stored: Order,
    used: HashSet<Vec<usize>>,
    rng: ChaCha8Rng,
    daemon: Option<Daemon>,
    address: String,
    data: tempfile::TempDir,
    /// Levels that chunks are stored at, each in a namespace of its own.
    levels: HashSet<u8>,
}

/// A prompt.
pub(super) struct Order {
    pub(super) tokens: Vec<u32>,
    pub(super) chunks: Vec<Range<usize>>,
}

/// An engine that blends in one way.
pub(super) struct Reader {
    pub(super) rig: Rig,
    selector: Selector,
}

impl Bed {
    pub(super) fn start(size: Size) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        eprintln!(
            "writing a random checkpoint of {} M parameters",
            SHAPE.parameters() / 1_000_000
        );
        checkpoint::write(directory.path(), &SHAPE)?;
        let model = Arc::new(Model::load(directory.path())?);
        let layout =
            kvasir_engine::cache::layout(model.config(), KvDtype::F32, size.prefix_tokens)?;
        let data = tempfile::tempdir()?;
        let daemon = start_daemon(data.path(), "127.0.0.1:0")?;
        Ok(Self {
            stored: order(size, &(0..size.chunks).collect::<Vec<_>>(), 0, 0),
            used: HashSet::new(),
            rng: ChaCha8Rng::seed_from_u64(1),
            address: daemon.address().to_owned(),
            daemon: Some(daemon),
            size,
            model,
            layout,
            data,
            levels: HashSet::new(),
        })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The daemon starts anew, with nothing in memory, and nothing of its data in the page cache.
    pub(super) async fn restart(&mut self) -> anyhow::Result<()> {
        self.daemon.take().context("it was started")?.stop()?;
        let daemon = start_daemon(self.data.path(), &self.address)?;
        daemon.client().await?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Chunks in an order that they have not been asked for in, none behind what it was stored
    /// behind.
    pub(super) fn next_order(&mut self) -> Order {
        loop {
            let mut chunks: Vec<usize> = (0..self.size.chunks).collect();
            for index in (1..chunks.len()).rev() {
                chunks.swap(index, self.rng.next_u32() as usize % (index + 1));
            }
            // What begins like the stored order would come as a prefix.
            if chunks[0] != 0 && self.used.insert(chunks.clone()) {
                return order(self.size, &chunks, 0, self.used.len());
            }
        }
    }

    pub(super) fn namespace(&self, level: Level) -> Namespace {
        kvasir_engine::cache::namespace(&self.model, self.layout, &[0; 32], &[level.code()])
    }

    /// An engine that reuses chunks stored at `level`, and knows all that it needs of them.
    pub(super) async fn reader(
        &mut self,
        selector: Selector,
        level: Level,
        requests: usize,
    ) -> anyhow::Result<Reader> {
        let address = self.address.clone();
        let config = self.plugin(DataPlane::default(), level);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        self.reader_at(&address, config, threads, selector, level, requests)
            .await
    }

    /// One that loads whatever is there.
    pub(super) fn plugin(&self, data_plane: DataPlane, level: Level) -> PluginConfig {
        PluginConfig {
            data_plane,
            load: LoadPolicy::Always,
            lookup_timeout: Duration::from_secs(5),
            fetch_timeout: Duration::from_secs(60),
            codec: CodecConfig {
                encoding: Encoding::at(level),
                rotation: Some(kvasir_engine::cache::rotation(self.model.config())),
                ..CodecConfig::default()
            },
            ..PluginConfig::default()
        }
    }

    /// One that computes on so many threads.
    pub(super) async fn reader_at(
        &mut self,
        address: &str,
        config: PluginConfig,
        threads: usize,
        selector: Selector,
        level: Level,
        requests: usize,
    ) -> anyhow::Result<Reader> {
        let longest = self.size.context() + QUESTION_TOKENS + 32;
        // Compiling needs pages too.
        let mut engine = EngineConfig::for_tokens((requests + 1) * longest);
        engine.threads = threads;
        let needs_scores = selector.rule == Rule::Graded;
        engine.blend = Some(BlendConfig {
            forced: Some(selector),
            compile_after: NonZeroU32::MIN,
            ..BlendConfig::new(self.gate(needs_scores))
        });
        let model = Arc::clone(&self.model);
        let rig = Rig::start_with(model, self.namespace(level), engine, address, config);
        let reader = Reader { rig, selector };
        self.compile(&reader, level).await?;
        Ok(reader)
    }

    /// What an engine must know to blend. It is no verdict: what is computed anew is forced.
    pub(super) fn gate(&self, needs_scores: bool) -> Gate {
        let layers = probed_layers(self.model.config().layers);
        Gate {
            version: Gate::VERSION,
            weights: String::new(),
            prefix: PREFIX.to_vec(),
            probe_layers: match needs_scores {
                true => u16::try_from(layers).unwrap_or(u16::MAX),
                false => 0,
            },
            probes: (0..)
                .take(PROBES)
                .map(|probe| random(PROBE_TOKENS, &[3, probe]))
                .collect(),
            questions: 0,
            full_exact: 0.0,
            naive_exact: 0.0,
            naive_kl: 0.0,
            naive_text: 0.0,
            repairs: Vec::new(),
        }
    }

    /// Has `reader` store the chunks if nobody has, and record what it needs to know of them.
    async fn compile(&mut self, reader: &Reader, level: Level) -> anyhow::Result<()> {
        let client = self.daemon.as_ref().context("it runs")?.client().await?;
        if self.levels.insert(level.code()) {
            reader.ask(&self.stored, Use::Both).await?;
            reader.rig.stored(&client, &self.stored.tokens).await;
        } else {
            let order = self.next_order();
            reader.ask(&order, Use::Both).await?;
        }
        let namespace = reader.rig.plugin.namespace();
        let chunks = self.stored.cut(namespace);
        let keys: Vec<_> = chunks.chunks().iter().map(|chunk| chunk.key()).collect();
        for _ in 0..PATIENCE {
            let found = client.lookup(&keys).await?.found;
            if found.iter().all(Option::is_some) && self.knows(reader).await? {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        anyhow::bail!("chunks were not compiled");
    }

    /// Whether `reader` reuses every chunk. One of which it does not know what depends on
    /// context is computed like text.
    async fn knows(&self, reader: &Reader) -> anyhow::Result<bool> {
        for chunk in 0..self.size.chunks {
            // Behind a text, so that it is not exact.
            let alone = order(self.size, &[chunk], TEXT_TOKENS, 0);
            let usage = reader.ask(&alone, Use::Read).await?.usage;
            if usage.blended_tokens != self.size.chunk_tokens || usage.recomputed > 0.9 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Reader {
    pub(super) async fn ask(&self, order: &Order, cache: Use) -> anyhow::Result<Answer> {
        self.rig
            .submit_chunks(&order.tokens, &order.chunks, cache)
            .await
            .context("a request failed")
    }

    /// Asks, and checks that all chunks were reused, and repaired as they should be.
    pub(super) async fn blend(&self, order: &Order) -> anyhow::Result<Answer> {
        let answer = self.ask(order, Use::Read).await?;
        let usage = answer.usage;
        let tokens: usize = order.chunks.iter().map(Range::len).sum();
        ensure!(
            usage.blended_tokens == tokens && usage.cached_tokens == 0,
            "{} of {tokens} tokens were reused, and {} more as a prefix",
            usage.blended_tokens,
            usage.cached_tokens
        );
        let share = self.selector.share;
        ensure!(
            usage.recomputed <= 1.01 * share && usage.recomputed >= 0.5 * share,
            "{} of the rows were computed anew, not {share}",
            usage.recomputed
        );
        Ok(answer)
    }
}

impl Order {
    pub(super) fn cut(&self, namespace: &Namespace) -> Segmented {
        let mut segments = Vec::new();
        let mut end = 0;
        for chunk in &self.chunks {
            segments.push(Segment::Text(self.tokens[end..chunk.start].to_vec()));
            segments.push(Segment::Chunk(self.tokens[chunk.clone()].to_vec()));
            end = chunk.end;
        }
        segments.push(Segment::Text(self.tokens[end..].to_vec()));
        Segmented::new(namespace, &PREFIX, ChunkLimits::default(), &segments)
    }
}

/// The prefix, `text` tokens, these chunks, and a question.
fn order(size: Size, chunks: &[usize], text: usize, question: usize) -> Order {
    let mut tokens = PREFIX.to_vec();
    tokens.extend(random(text, &[2]));
    let mut ranges = Vec::new();
    for &chunk in chunks {
        let start = tokens.len();
        tokens.extend(random(size.chunk_tokens, &[0, chunk]));
        ranges.push(start..tokens.len());
    }
    tokens.extend(random(QUESTION_TOKENS, &[1, question]));
    Order {
        tokens,
        chunks: ranges,
    }
}

/// Tokens that are always the same for one `name`.
fn random(count: usize, name: &[usize]) -> Vec<u32> {
    let mut seed = [0; 32];
    for (bytes, &part) in seed.chunks_exact_mut(8).zip(name) {
        bytes.copy_from_slice(&(part as u64 + 1).to_le_bytes());
    }
    let mut rng = ChaCha8Rng::from_seed(seed);
    let vocabulary = u32::try_from(SHAPE.vocabulary).unwrap_or(u32::MAX);
    (0..count).map(|_| rng.next_u32() % vocabulary).collect()
}

fn start_daemon(data: &Path, listen: &str) -> anyhow::Result<Daemon> {
    Daemon::start(data, ByteSize::gib(1), listen)
}

pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

pub(super) const PREFIX: [u32; 1] = [1];
const SHAPE: Shape = Shape::SERVING;
const QUESTION_TOKENS: usize = 32;
const PROBE_TOKENS: usize = 64;
const TEXT_TOKENS: usize = 32;
/// Looks at what is compiled, 200 ms apart at least.
const PATIENCE: usize = 600;
