//! Real processes and sockets for end-to-end tests.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvasir_client::Client;
use kvasir_codec::{Profile, ProfileBasis, ProfilePlane, ProfileShape};
use kvasir_engine::kv::KvDtype;
use kvasir_engine::model::Model;
use kvasir_engine::request::{Event, GenerateRequest, Usage};
use kvasir_engine::sampling::SamplingParams;
use kvasir_engine::scheduler::{Engine, EngineConfig, EngineHandle};
use kvasir_engine::tokenizer::Tokenizer;
use kvasir_plugin::{CachePlugin, PluginConfig};
use kvasir_server::child::{ListeningChild, daemon_command};
use kvasir_types::{ByteSize, DType, Namespace};
use rustix::process::{Pid, Signal};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Tokens per chunk in these tests.
pub const CHUNK_TOKENS: u32 = 64;

/// Directory of the smaller shipped model: quick to run.
pub fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/reader-5m")
}

/// Starts `binary` as `kvasird` with its data in `data`, listening on `listen`.
pub fn start_daemon(binary: &str, data: &Path, listen: &str) -> ListeningChild {
    let command = daemon_command(binary.as_ref(), data, ByteSize::mib(256), listen);
    ListeningChild::start(command).expect("the daemon was built with the tests, and starts")
}

/// Sends `signal` to `pid`.
pub fn signal(pid: Pid, signal: Signal) {
    rustix::process::kill_process(pid, signal).expect("the process is ours");
}

/// Forwards TCP to a daemon, and does something once so many bytes came back.
#[derive(Debug)]
pub struct Proxy {
    address: String,
    /// Bytes that may still come back before the action; `u64::MAX` never acts.
    fuse: Arc<AtomicU64>,
}

impl Proxy {
    /// Starts to forward to `upstream`; runs `action` when the fuse burns down.
    pub async fn start(upstream: String, action: impl Fn() + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound").to_string();
        let fuse = Arc::new(AtomicU64::new(u64::MAX));
        let (burning, action) = (Arc::clone(&fuse), Arc::new(action));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&upstream).await else {
                    continue;
                };
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                tokio::spawn(async move {
                    // Either end may go away at any time; that is what is tested.
                    let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
                });
                let (fuse, action) = (Arc::clone(&burning), Arc::clone(&action));
                tokio::spawn(async move {
                    let mut buffer = vec![0; 16 << 10];
                    while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
                        if burn(&fuse, count as u64) {
                            action();
                        }
                        if to_client.write_all(&buffer[..count]).await.is_err() {
                            break;
                        }
                    }
                });
            }
        });
        Self { address, fuse }
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Acts after `bytes` more bytes came back.
    pub fn arm(&self, bytes: u64) {
        self.fuse.store(bytes, Ordering::SeqCst);
    }

    /// Whether an armed proxy has acted.
    pub fn has_acted(&self) -> bool {
        self.fuse.load(Ordering::SeqCst) == u64::MAX
    }
}

/// Forwards TCP to a daemon as slowly as a link of some bandwidth would, each way.
#[derive(Debug)]
pub struct Link {
    address: String,
    flow: Arc<Flow>,
}

/// What passes a [`Link`].
#[derive(Debug)]
struct Flow {
    /// Millions of bits a second.
    mbps: AtomicU32,
    /// Bytes, both ways.
    passed: AtomicU64,
}

impl Link {
    /// Starts to forward to `upstream`.
    pub async fn start(upstream: String, mbps: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound").to_string();
        let flow = Arc::new(Flow {
            mbps: AtomicU32::new(mbps),
            passed: AtomicU64::new(0),
        });
        let link = Self {
            address,
            flow: Arc::clone(&flow),
        };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&upstream).await else {
                    continue;
                };
                let [client, server] = [client, server].map(|socket| {
                    // Small messages must not wait for more.
                    let _ = socket.set_nodelay(true);
                    socket.into_split()
                });
                tokio::spawn(pass(client.0, server.1, Arc::clone(&flow)));
                tokio::spawn(pass(server.0, client.1, Arc::clone(&flow)));
            }
        });
        link
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// From now on it lets so many million bits a second pass; with none, nothing.
    pub fn set_mbps(&self, mbps: u32) {
        self.flow.mbps.store(mbps, Ordering::SeqCst);
    }

    /// Waits until `bytes` have passed, both ways.
    pub async fn passed(&self, bytes: u64) {
        while self.flow.passed.load(Ordering::SeqCst) < bytes {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Passes bytes on, each no sooner than a link of this speed would.
async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, flow: Arc<Flow>) {
    let mut buffer = vec![0; 32 << 10];
    let mut free_at = Instant::now();
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let bits = 8 * u32::try_from(count).expect("the buffer is small");
        let mbps = loop {
            match flow.mbps.load(Ordering::SeqCst) {
                0 => tokio::time::sleep(BURST).await,
                mbps => break mbps,
            }
        };
        let takes = Duration::from_secs_f64(f64::from(bits) / (f64::from(mbps) * 1e6));
        // Timers are a millisecond coarse. What one oversleeps, later bytes make up for.
        let earliest = Instant::now().checked_sub(BURST).unwrap_or(free_at);
        free_at = free_at.max(earliest) + takes;
        if free_at > Instant::now() + Duration::from_millis(1) {
            tokio::time::sleep_until(free_at.into()).await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
        flow.passed.fetch_add(count as u64, Ordering::SeqCst);
    }
}

/// How far a link may lag behind its bandwidth.
const BURST: Duration = Duration::from_millis(3);

/// Burns `count` off the fuse; true when it has just burnt down.
fn burn(fuse: &AtomicU64, count: u64) -> bool {
    let before = fuse.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| match left {
        u64::MAX => None,
        left if left <= count => Some(u64::MAX),
        left => Some(left - count),
    });
    before.is_ok_and(|left| left <= count)
}

/// An engine in this process, connected to a daemon.
#[derive(Debug)]
pub struct Rig {
    /// Submits requests.
    pub engine: EngineHandle,
    /// The engine's connection to the cache.
    pub plugin: CachePlugin,
    _engine: Engine,
}

/// One finished request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Generated tokens.
    pub tokens: Vec<u32>,
    /// A digest of the logits behind each.
    pub logits: Vec<[u8; 32]>,
    /// What it cost.
    pub usage: Usage,
    /// From submission to each token.
    pub times: Vec<Duration>,
}

impl Answer {
    /// From submission to the first token.
    pub fn ttft(&self) -> Duration {
        self.times.first().copied().unwrap_or(Duration::MAX)
    }

    /// Asserts the same tokens from the very same logits.
    #[track_caller]
    pub fn assert_equals(&self, other: &Self) {
        assert_eq!(self.tokens, other.tokens, "other tokens");
        assert_eq!(self.logits, other.logits, "other logits");
    }
}

/// What a request does with the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Neither reads nor writes it.
    Nothing,
    /// Computes, and stores.
    Write,
    /// Reads.
    Read,
    /// Reads, and stores what it had to compute.
    Both,
}

/// The namespace of the shipped model's KV.
pub fn namespace(model: &Model, tokenizer: &Tokenizer) -> Namespace {
    let layout = kvasir_engine::cache::layout(model.config(), KvDtype::F32, CHUNK_TOKENS)
        .expect("the model is small");
    kvasir_engine::cache::namespace(model, layout, &tokenizer.digest(), b"")
}

/// A prompt of `tokens` tokens out of the shipped documents, from that of question `seed` on.
/// Several questions in a row are of one document.
pub fn prompt(tokens: usize, seed: usize) -> Vec<u32> {
    let text = std::fs::read_to_string(model_dir().join("questions.jsonl"))
        .expect("the shipped questions are there");
    let tokenizer = tokenizer();
    let documents: Vec<u32> = text
        .lines()
        .skip(seed)
        .flat_map(|line| {
            let question: serde_json::Value =
                serde_json::from_str(line).expect("a question is JSON");
            let document = question["document"].as_str().expect("it has a document");
            tokenizer
                .encode(document, false)
                .expect("its words are known")
        })
        .take(tokens)
        .collect();
    assert_eq!(
        documents.len(),
        tokens,
        "the shipped documents are too short"
    );
    documents
}

/// The shipped model's tokenizer.
pub fn tokenizer() -> Tokenizer {
    Tokenizer::load(&model_dir(), &[]).expect("the shipped tokenizer loads")
}

/// A profile as fine as any, in a basis that is none.
///
/// # Panics
/// With a unit that is none.
pub fn profile_of(shape: ProfileShape, unit: f32) -> Arc<Profile> {
    let heads = shape.heads_per_basis();
    let plane = |plane: usize| {
        let channels = usize::from(heads[plane] * shape.dims[plane]);
        let ones = vec![1.0; channels];
        let same = |at: usize| {
            if at.is_multiple_of(channels + 1) {
                1.0
            } else {
                0.0
            }
        };
        let vectors: Vec<f32> = (0..channels * channels).map(same).collect();
        let basis = ProfileBasis::new(vec![0.0; channels], ones, &vectors, &vectors);
        let bases = vec![basis; usize::from(shape.kv_heads / heads[plane])];
        ProfilePlane { unit, bases }
    };
    let planes = (0..shape.layers).flat_map(|_| [plane(0), plane(1)]);
    Arc::new(Profile::new(shape, planes.collect()).expect("its planes are those of its shape"))
}

impl Rig {
    /// Starts an engine on the shipped model that looks for its cache at `endpoint`.
    pub fn reader(endpoint: &str, config: PluginConfig) -> Self {
        let model = Model::load(&model_dir()).expect("the shipped model loads");
        let namespace = namespace(&model, &tokenizer());
        Self::start(Arc::new(model), namespace, 20_000, endpoint, config)
    }

    /// Starts an engine on `model` with pages for `kv_tokens` tokens.
    pub fn start(
        model: Arc<Model>,
        namespace: Namespace,
        kv_tokens: usize,
        endpoint: &str,
        config: PluginConfig,
    ) -> Self {
        let engine = EngineConfig::for_tokens(kv_tokens);
        Self::start_with(model, namespace, engine, endpoint, config)
    }

    /// Starts an engine on `model`, as `engine` says but for the type of its pages' elements.
    pub fn start_with(
        model: Arc<Model>,
        namespace: Namespace,
        mut engine: EngineConfig,
        endpoint: &str,
        config: PluginConfig,
    ) -> Self {
        let runtime = tokio::runtime::Handle::current();
        let plugin = CachePlugin::connect(endpoint, runtime, namespace, config)
            .expect("the endpoint is well formed");
        engine.kv_dtype = match plugin.namespace().layout().dtype() {
            DType::Bf16 => KvDtype::Bf16,
            DType::F16 => KvDtype::F16,
            _ => KvDtype::F32,
        };
        let engine =
            Engine::start(model, &engine, Some(plugin.clone())).expect("the system grants threads");
        Self {
            engine: engine.handle(),
            plugin,
            _engine: engine,
        }
    }

    /// Runs one request to its end.
    pub async fn ask(&self, prompt: &[u32], cache: Use) -> Answer {
        self.submit(prompt, cache)
            .await
            .expect("the request finishes")
    }

    /// Runs one request; `None` when it failed.
    pub async fn submit(&self, prompt: &[u32], cache: Use) -> Option<Answer> {
        self.submit_chunks(prompt, &[], cache).await
    }

    /// Runs one request whose prompt has chunks that others have too; `None` when it failed.
    pub async fn submit_chunks(
        &self,
        prompt: &[u32],
        chunks: &[Range<usize>],
        cache: Use,
    ) -> Option<Answer> {
        let begun = Instant::now();
        let mut events = self
            .engine
            .submit(GenerateRequest {
                prompt: prompt.to_vec(),
                chunks: chunks.to_vec(),
                max_tokens: 4,
                sampling: SamplingParams::greedy(),
                stop_tokens: Vec::new(),
                read_cache: matches!(cache, Use::Read | Use::Both),
                write_cache: matches!(cache, Use::Write | Use::Both),
                logits_digest: true,
            })
            .ok()?;
        let mut tokens = Vec::new();
        let mut logits = Vec::new();
        let mut times = Vec::new();
        while let Some(event) = events.recv().await {
            match event {
                Event::Prefilled { .. } => {}
                Event::Token {
                    id, logits_digest, ..
                } => {
                    times.push(begun.elapsed());
                    tokens.push(id);
                    logits.extend(logits_digest);
                }
                Event::Finished { usage, .. } => {
                    return Some(Answer {
                        tokens,
                        logits,
                        usage,
                        times,
                    });
                }
                Event::Failed(_) => return None,
            }
        }
        None
    }

    /// Waits until the daemon holds every whole chunk of `prompt`.
    pub async fn stored(&self, client: &Client, prompt: &[u32]) {
        let keys = self.plugin.namespace().prefix_keys(prompt);
        for _ in 0..12_000 {
            let lookup = client.lookup(&keys).await.expect("the daemon answers");
            if lookup.prefix_chunks == keys.len() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the prompt's chunks were not stored within a minute");
    }
}
