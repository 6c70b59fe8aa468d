//! Continuous batching over paged KV.
//!
//! One thread, the engine thread, owns the pages and all sequences; callers hand it
//! requests over a channel and receive events over another. Each turn of its loop:
//!
//! 1. take new requests; admit waiting ones, first come first served, when pages for
//!    the whole of prompt and completion are free (so what has been admitted never lacks a
//!    page);
//! 2. land what the cache has delivered;
//! 3. run one batch: every decoding sequence's next token, and prefill up to
//!    [`EngineConfig::batch_tokens`];
//! 4. choose tokens, report them, end sequences;
//! 5. copy a finished chunk out of the pages for the cache.
//!
//! Chunks of a prompt that are reused at other places than they stood at are gathered, and
//! repaired ([`BlendConfig`]); those that the cache lacks are compiled in idle time.
//!
//! When a sequence that is being fetched is the only one, its attention runs layer by
//! layer behind the fetch. When others are there, or come, they run while it waits.
//!
//! Where memory holds a part of the pages ([`PagingConfig`]), sequences that do not fit together
//! are parked in the scratch file and take turns, and decoding may attend to some of its pages
//! only. One whose pages cannot be read back is computed again.
//!
//! Overflow: more than [`EngineConfig::max_waiting`] waiting requests are refused; a
//! receiver that goes away cancels its sequence.

mod batch;
mod blending;
mod capturing;
mod choosing;
mod compile;
mod engine_loop;
mod fetching;
#[cfg(test)]
mod fixtures;
mod pages;
mod parking;
mod recovery;
mod sequence;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc as sync_mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use kvasir_plugin::blend::{ContentCuts, Segment, Segmented};
use kvasir_plugin::{CachePlugin, Prompt};
use tokio::sync::mpsc;

use crate::cache;
use crate::config::ModelConfig;
use crate::kernels::Threads;
use crate::kv::{BLOCK_TOKENS, KvDtype, KvPool};
use crate::model::Model;
use crate::paging::{PagingError, Replacement};
use crate::request::{Event, GenerateRequest, RequestError};

use engine_loop::EngineLoop;
use pages::Paged;

pub use blending::BlendConfig;
pub use pages::{PageSelection, PagingConfig, PagingStats};

/// How the engine spends memory and time.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Pages of [`BLOCK_TOKENS`] tokens.
    pub blocks: usize,
    /// Element type of the pages. Default: f32.
    pub kv_dtype: KvDtype,
    /// Tokens of one batch, prefill and decode together; of a prompt that is computed while its
    /// chunks are loaded, four times as many. Default: 512.
    pub batch_tokens: usize,
    /// Most tokens of a sequence, prompt and completion. Default: what the model knows, or what
    /// fits: all of it into the pages, and a layer of it into memory.
    pub context_tokens: Option<usize>,
    /// Requests that may wait for pages. Default: 256.
    pub max_waiting: usize,
    /// Threads that compute. Default: one per core.
    pub threads: usize,
    /// How chunks are reused at any position. Default: not at all.
    pub blend: Option<BlendConfig>,
    /// Keeps KV in memory only in part. Default: all of it.
    pub paging: Option<PagingConfig>,
}

impl EngineConfig {
    /// Default of [`Self::batch_tokens`].
    pub const BATCH_TOKENS: usize = 512;
    /// Default of [`Self::max_waiting`].
    pub const MAX_WAITING: usize = 256;

    /// Enough pages for `tokens` tokens, everything else by default.
    pub fn for_tokens(tokens: usize) -> Self {
        Self {
            blocks: tokens.div_ceil(BLOCK_TOKENS),
            kv_dtype: KvDtype::default(),
            batch_tokens: Self::BATCH_TOKENS,
            context_tokens: None,
            max_waiting: Self::MAX_WAITING,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            blend: None,
            paging: None,
        }
    }

    /// Most tokens of a sequence in a pool.
    fn sequence_tokens(&self, model: &ModelConfig, pool: &KvPool) -> usize {
        let wanted = self.context_tokens.unwrap_or(model.max_positions);
        let held = pool.layer_blocks().min(pool.blocks()) * BLOCK_TOKENS;
        wanted.min(model.max_positions).min(held)
    }
}

/// What a request must fit into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Token ids below this exist.
    pub vocabulary: usize,
    /// Most tokens of one sequence, prompt and completion.
    pub sequence_tokens: usize,
}

/// A running engine. Dropping it waits until every [`EngineHandle`] is gone and every
/// sequence has ended.
#[derive(Debug)]
pub struct Engine {
    handle: Option<EngineHandle>,
    ready: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Hands requests to a running engine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: sync_mpsc::Sender<Submission>,
    waiting: Arc<AtomicUsize>,
    max_waiting: usize,
    limits: Limits,
    plugin: Option<CachePlugin>,
    blend: Option<Arc<BlendConfig>>,
    paging: Option<Arc<Mutex<PagingStats>>>,
}

/// Why an engine could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No threads to compute on.
    #[error("the system grants no threads to compute on")]
    ComputeThreads(#[source] rayon::ThreadPoolBuildError),
    /// The plugin's namespace has another geometry or element type than the pages.
    #[error(
        "the plugin's chunks have another layout than this engine's pages; derive the namespace from the same model and KV type"
    )]
    Layout,
    /// Pages are selected by a rule that reads the keys of all.
    #[error("the rule that selects pages reads the keys of all: choose one that does not")]
    Selection,
    /// Memory holds less than a layer of the longest sequence.
    #[error(
        "a layer of {tokens} tokens takes {needed} frames, and there are {frames}: give the pool more memory, or take shorter sequences"
    )]
    Frames {
        /// The longest sequence.
        tokens: usize,
        /// Pieces of a layer of it.
        needed: usize,
        /// Pieces that fit into memory.
        frames: usize,
    },
    /// The pages cannot be made.
    #[error("the KV pool cannot be made")]
    Paging(#[source] PagingError),
    /// No thread to schedule on.
    #[error("the system grants no thread to schedule on")]
    EngineThread(#[source] std::io::Error),
}

/// A request on its way to the engine thread.
#[derive(Debug)]
pub(crate) struct Submission {
    request: GenerateRequest,
    /// The prompt in chunks, when there is a cache and the request may use it.
    prompt: Option<Prompt>,
    /// The same cut into content chunks, when the request names any and the engine blends.
    segmented: Option<Segmented>,
    events: mpsc::Sender<Event>,
    submitted: Instant,
}

impl Engine {
    /// Allocates the pages and starts the engine thread, which first measures a few
    /// prefills; requests wait for that.
    ///
    /// # Errors
    /// The system grants no threads, or the plugin's chunks are not these pages'.
    pub fn start(
        model: Arc<Model>,
        config: &EngineConfig,
        plugin: Option<CachePlugin>,
    ) -> Result<Self, StartError> {
        if let Some(plugin) = &plugin {
            let layout = plugin.namespace().layout();
            let ours = cache::layout(model.config(), config.kv_dtype, layout.tokens());
            if ours != Ok(*layout) {
                return Err(StartError::Layout);
            }
        }
        let threads = Threads::new(config.threads).map_err(StartError::ComputeThreads)?;
        let (commands, submissions) = sync_mpsc::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let pool = match &config.paging {
            None => KvPool::new(model.config(), config.blocks, config.kv_dtype),
            Some(paging) => paged_pool(&model, config, paging)?,
        };
        let limits = Limits {
            vocabulary: model.config().vocab_size,
            sequence_tokens: config.sequence_tokens(model.config(), &pool),
        };
        let shown = Arc::new(Mutex::new(PagingStats::default()));
        let ready = Arc::new(AtomicBool::new(false));
        let handle = EngineHandle {
            commands,
            waiting: Arc::clone(&waiting),
            max_waiting: config.max_waiting.max(1),
            limits,
            plugin: plugin.clone(),
            blend: config.blend.clone().map(Arc::new),
            paging: config.paging.as_ref().map(|_| Arc::clone(&shown)),
        };
        let mut engine =
            EngineLoop::new(model, pool, config, threads, plugin, submissions, waiting);
        engine.paged = config.paging.as_ref().map(|it| Paged::new(it, shown));
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn({
                let ready = Readiness(Arc::clone(&ready));
                move || {
                    engine.calibrate();
                    ready.0.store(true, Ordering::Release);
                    engine.run();
                }
            })
            .map_err(StartError::EngineThread)?;
        Ok(Self {
            handle: Some(handle),
            ready,
            thread: Some(thread),
        })
    }

    /// True from the end of the first measurements until the engine thread ends, by
    /// whatever cause.
    pub fn ready(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.ready)
    }

    /// A handle to submit requests with.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone().expect("only drop takes the handle")
    }
}

/// Clears the flag when the engine thread ends, be it by a panic.
struct Readiness(Arc<AtomicBool>);

impl Drop for Readiness {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.handle = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine thread panicked");
        }
    }
}

impl EngineHandle {
    /// Queues a request; its events arrive on the returned channel. Dropping the
    /// receiver cancels the request.
    ///
    /// # Errors
    /// A [`RequestError`] for a request that can never run, or not now; nothing is
    /// queued then.
    pub fn submit(
        &self,
        mut request: GenerateRequest,
    ) -> Result<mpsc::Receiver<Event>, RequestError> {
        let submitted = Instant::now();
        request.max_tokens = request.max_tokens.max(1);
        if request.prompt.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        let vocabulary = self.limits.vocabulary;
        if let Some(&token) = request
            .prompt
            .iter()
            .find(|&&token| token as usize >= vocabulary)
        {
            return Err(RequestError::UnknownToken { token, vocabulary });
        }
        let segments = segments(&request.prompt, &request.chunks)?;
        let needed = request.prompt.len() + 1;
        if needed > self.limits.sequence_tokens {
            return Err(RequestError::TooLong {
                needed,
                limit: self.limits.sequence_tokens,
            });
        }
        let waiting = self.waiting.fetch_add(1, Ordering::AcqRel);
        if waiting >= self.max_waiting {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(RequestError::Overloaded { waiting });
        }
        let prompt = self
            .plugin
            .as_ref()
            .filter(|_| request.read_cache || request.write_cache)
            .map(|plugin| Prompt::new(plugin.namespace(), &request.prompt));
        let blend = self.blend.as_ref().filter(|_| request.read_cache);
        let segmented = self.plugin.as_ref().zip(blend).map(|(plugin, blend)| {
            let namespace = plugin.namespace();
            let prefix = &blend.gate.prefix;
            let cuts = blend.cuts.filter(|_| request.chunks.is_empty());
            let cut = cuts.map(|cuts| cut(&request.prompt, prefix, cuts));
            Segmented::new(namespace, prefix, blend.limits, &cut.unwrap_or(segments))
        });
        // One event per token, one before and one after them: sending never waits.
        let completion = self.limits.sequence_tokens - request.prompt.len();
        let (events, receiver) = mpsc::channel(completion.min(request.max_tokens) + 2);
        let submission = Submission {
            request,
            prompt,
            segmented,
            events,
            submitted,
        };
        if self.commands.send(submission).is_err() {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(RequestError::ShuttingDown);
        }
        Ok(receiver)
    }

    /// What a request must fit into.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// What keeping KV in memory only in part has come to; none where all of it is there.
    pub fn paging(&self) -> Option<PagingStats> {
        let stats = self.paging.as_ref()?;
        Some(*stats.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn paged_pool(
    model: &Model,
    config: &EngineConfig,
    paging: &PagingConfig,
) -> Result<KvPool, StartError> {
    let selection = paging.selection.as_ref();
    if selection.is_some_and(|it| it.options.rule.needs_keys()) {
        return Err(StartError::Selection);
    }
    let pool = KvPool::paged(
        model.config(),
        config.blocks,
        config.kv_dtype,
        paging.frames,
        Replacement::default(),
        Arc::clone(&paging.backing),
        paging.bits,
    )
    .map_err(StartError::Paging)?
    .with_timeout(paging.timeout);
    let tokens = config.context_tokens.unwrap_or(1);
    let needed = tokens.div_ceil(BLOCK_TOKENS) * model.config().kv_heads;
    if needed > paging.frames {
        return Err(StartError::Frames {
            tokens,
            needed,
            frames: paging.frames,
        });
    }
    Ok(pool)
}

/// A prompt that names no chunks. Its first tokens are text if they are the canonical prefix,
/// and so is its last piece: that is what is asked of the others.
fn cut(prompt: &[u32], prefix: &[u32], cuts: ContentCuts) -> Vec<Segment> {
    let rest = prompt.strip_prefix(prefix).unwrap_or(prompt);
    let mut segments = cuts.segments(rest);
    if let Some(last) = segments.pop() {
        segments.push(Segment::Text(last.into_tokens()));
    }
    let front = Segment::Text(prompt[..prompt.len() - rest.len()].to_vec());
    segments.insert(0, front);
    segments
}

/// A prompt as chunks, and the text between them.
fn segments(prompt: &[u32], chunks: &[Range<usize>]) -> Result<Vec<Segment>, RequestError> {
    let mut segments = Vec::new();
    let mut end = 0;
    for chunk in chunks {
        if chunk.start < end || chunk.end < chunk.start || chunk.end > prompt.len() {
            return Err(RequestError::Chunks);
        }
        segments.push(Segment::Text(prompt[end..chunk.start].to_vec()));
        segments.push(Segment::Chunk(prompt[chunk.clone()].to_vec()));
        end = chunk.end;
    }
    segments.push(Segment::Text(prompt[end..].to_vec()));
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_and_what_is_asked_are_text() {
        let cuts = ContentCuts {
            min: 1,
            mean: 1000,
            max: 8,
        };
        let prompt: Vec<u32> = (0..21).collect();
        let text = |range: Range<u32>| Segment::Text(range.collect());
        let chunk = |range: Range<u32>| Segment::Chunk(range.collect());
        let behind = [text(0..1), chunk(1..9), chunk(9..17), text(17..21)];
        assert_eq!(cut(&prompt, &[0], cuts), behind);
        let bare = [text(0..0), chunk(0..8), chunk(8..16), text(16..21)];
        assert_eq!(cut(&prompt, &[7], cuts), bare);
        assert_eq!(cut(&[0], &[0], cuts), [text(0..1)]);
    }
}
