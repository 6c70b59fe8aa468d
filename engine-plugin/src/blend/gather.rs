//! Content chunks on their way into the engine's pages.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_types::{ChunkKey, LayerIdx, Level};
use tracing::warn;

use super::gathering::{Arrival, Gathering, Wanted};
use super::recorder::Recorded;
use super::{ContentChunk, Recorder, Segmented};
use crate::inbox::{Inbox, Stage, Wish};
use crate::{EngineBackend, LAYERS, LayerWait, Placement, Shared, TierBytes};

/// The content chunks of a prompt on their way into the engine's pages.
///
/// Owned by the engine thread; dropping it cancels the fetch. Each chunk stands for itself: one
/// that is missing, lost or damaged, or needs a profile that is not here, is absent, and the
/// engine computes it; the others still come. Spent patience takes every chunk that is not
/// whole. Patience is that of [`Prefetch`](crate::Prefetch).
///
/// Chunks come as they are stored, or at [`CodecConfig::fetch`](crate::CodecConfig::fetch); no
/// [`deadline`](crate::PluginConfig::deadline) steers them.
///
/// Chunks are named by their index in [`Segmented::chunks`]. What the same text has twice in a
/// prompt is fetched once and landed twice.
#[derive(Debug)]
pub struct Gather {
    inbox: Inbox<Arrival>,
    /// What is fetched once, by the order of first places.
    sources: Vec<Source>,
    /// Which source each chunk of the prompt has.
    source_of: Vec<usize>,
    /// What was expected to come when it was decided.
    expected: TierBytes,
    bytes: u64,
    /// Chunks were lost since the engine last heard what is expected.
    fewer: bool,
}

/// One content chunk, wherever it stands in the prompt.
#[derive(Debug)]
struct Source {
    places: Vec<Placement>,
    /// The cache was seen to hold it.
    present: bool,
    /// It is whole, or still expected to become so.
    expected: bool,
    /// By layer.
    landed: Vec<bool>,
    /// The coarsest level that a layer has come at.
    level: Option<Level>,
    /// What was recorded of it, where that was asked for.
    recorded: Option<Recorded>,
}

impl Source {
    fn is_whole(&self) -> bool {
        self.expected && self.landed.iter().all(|landed| *landed)
    }
}

/// What a gather has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GatherOutcome {
    /// The cache has not answered yet, or the cost model is still to be asked.
    Deciding,
    /// Layers are arriving, of [`Gather::chunks`].
    Loading,
    /// Nothing more will arrive: [`Gather::chunks`] are whole in the pages.
    Done,
}

pub(crate) fn start(
    shared: &Arc<Shared>,
    prompt: &Segmented,
    recorder: Option<&Recorder>,
    lacks: impl Fn(&ChunkKey) -> bool,
) -> Gather {
    let namespace = &shared.namespace;
    let layers = usize::from(shared.namespace.layout().layers());
    let (mut sources, mut wanted) = (Vec::<Source>::new(), Vec::<Wanted>::new());
    let mut known = HashMap::new();
    let mut source_of = Vec::new();
    for chunk in prompt.chunks() {
        let source = *known.entry(chunk.key()).or_insert_with(|| {
            sources.push(Source {
                places: Vec::new(),
                present: false,
                expected: false,
                landed: vec![false; layers],
                level: None,
                recorded: None,
            });
            let lacking = recorder.filter(|_| lacks(&chunk.key()));
            let in_corpus = in_corpus(shared, prompt, chunk);
            wanted.push(Wanted {
                key: chunk.key(),
                in_corpus,
                layout: *chunk.layout(),
                recorded: lacking.and_then(|recorder| {
                    let layout = recorder.layout(chunk.layout().tokens()).ok()?;
                    let own = recorder.key(namespace, &chunk.key());
                    let corpus = shared.config.corpus.as_ref().zip(in_corpus);
                    let of_corpus = corpus.map(|(corpus, key)| recorder.key(corpus, &key));
                    Some((std::iter::once(own).chain(of_corpus).collect(), layout))
                }),
                compute: Duration::ZERO,
            });
            sources.len() - 1
        });
        source_of.push(source);
        sources[source].places.push(prompt.placement(chunk));
        let range = chunk.range();
        wanted[source].compute += shared.cost().compute_time(range.start, range.end);
    }
    let layer_bytes = |wanted: &Wanted| wanted.layout.layer_bytes() as u64;
    let wish = Wish {
        chunks: wanted.len(),
        compute: wanted.iter().map(|wanted| wanted.compute).sum(),
        layer_bytes: wanted.iter().map(layer_bytes).max().unwrap_or(0),
    };
    let asking = Arc::clone(shared);
    let inbox = Inbox::begin(shared, &wish, move |outbox, begun| {
        let gathering = Gathering::new(asking, wanted, outbox);
        async move { gathering.run(begun).await }
    });
    Gather {
        inbox,
        sources,
        source_of,
        expected: TierBytes::default(),
        bytes: 0,
        fewer: false,
    }
}

/// The key that a chunk has in the shared corpus, where there is one of this geometry.
fn in_corpus(shared: &Shared, prompt: &Segmented, chunk: &ContentChunk) -> Option<ChunkKey> {
    let corpus = shared.config.corpus.as_ref()?;
    let same = corpus.layout() == shared.namespace.layout();
    same.then(|| corpus.content_after(prompt.prefix(), &prompt.tokens()[chunk.range()]))
}

impl Gather {
    /// The chunks that are whole in the pages, or still expected to become so. None before it
    /// is decided which are fetched.
    pub fn chunks(&self) -> impl Iterator<Item = usize> + '_ {
        self.which(|source| source.expected)
    }

    /// The chunks that the cache was seen to hold, fetched or not. They need not be compiled
    /// again.
    pub fn present(&self) -> impl Iterator<Item = usize> + '_ {
        self.which(|source| source.present)
    }

    /// Of each of [`chunks`](Self::chunks) of which some has landed, the level that it has come
    /// at: the coarsest of its layers.
    pub fn levels(&self) -> impl Iterator<Item = (usize, Level)> + '_ {
        let level = |chunk: usize| Some((chunk, self.sources[self.source_of[chunk]].level?));
        self.chunks().filter_map(level)
    }

    /// What was recorded of a chunk, by layer, of a little-endian half-precision number a token:
    /// where that was asked for and the cache has it, once it is decided what is fetched.
    pub fn recorded(&self, chunk: usize) -> Option<&[Bytes]> {
        self.sources[self.source_of[chunk]].recorded.as_deref()
    }

    /// Bytes that [`chunks`](Self::chunks) were expected to take when it was decided that they
    /// are fetched, at the levels that they come at.
    pub fn expected_bytes(&self) -> TierBytes {
        self.expected
    }

    /// Payload bytes that came for the layers landed so far, as they were sent.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Lands what has arrived, without waiting.
    pub fn poll<B: EngineBackend>(&mut self, backend: &mut B, pages: &B::Pages) -> GatherOutcome {
        while let Some(arrival) = self.inbox.arrived() {
            self.take(arrival, backend, pages);
        }
        self.settle();
        // Whoever hears this looks at what is expected now.
        self.fewer = false;
        match self.inbox.stage() {
            Stage::Deciding => GatherOutcome::Deciding,
            Stage::Loading => GatherOutcome::Loading,
            Stage::Done => GatherOutcome::Done,
        }
    }

    /// Waits for the next arrival, `longest` at most, and lands what is there.
    /// Must not be called on a runtime's own thread.
    pub fn wait<B: EngineBackend>(
        &mut self,
        longest: Duration,
        backend: &mut B,
        pages: &B::Pages,
    ) -> GatherOutcome {
        if let Some(arrival) = self.inbox.wait(longest) {
            self.take(arrival, backend, pages);
        }
        self.poll(backend, pages)
    }

    /// Waits, `longest` at most, until `layer` of every expected chunk has landed: of those that
    /// [`chunks`](Self::chunks) named when [`poll`](Self::poll), [`wait`](Self::wait), or this
    /// with [`LayerWait::Short`], last returned. Pending, too, where it is not yet decided which.
    /// Must not be called on a runtime's own thread.
    pub fn wait_layer<B: EngineBackend>(
        &mut self,
        layer: LayerIdx,
        longest: Duration,
        backend: &mut B,
        pages: &B::Pages,
    ) -> LayerWait {
        let until = Instant::now() + longest;
        loop {
            if std::mem::take(&mut self.fewer) {
                return LayerWait::Short;
            }
            let here = |source: &Source| {
                let landed = source.landed.get(usize::from(layer.0));
                !source.expected || landed.is_some_and(|landed| *landed)
            };
            if self.inbox.stage() != Stage::Deciding && self.sources.iter().all(here) {
                return LayerWait::Landed;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return LayerWait::Pending;
            }
            if let Some(arrival) = self.inbox.wait(left) {
                self.take(arrival, backend, pages);
            }
            self.settle();
        }
    }

    fn which(&self, wanted: impl Fn(&Source) -> bool) -> impl Iterator<Item = usize> {
        let sources = self.source_of.iter().enumerate();
        sources.filter_map(move |(chunk, &source)| wanted(&self.sources[source]).then_some(chunk))
    }

    fn take<B: EngineBackend>(&mut self, arrival: Arrival, backend: &mut B, pages: &B::Pages) {
        match arrival {
            Arrival::Planned {
                present,
                load,
                bytes,
                budget,
                recorded,
            } => {
                self.expected = bytes;
                for (source, recorded) in recorded {
                    self.sources[source].recorded = Some(recorded);
                }
                for source in present {
                    self.sources[source].present = true;
                    self.sources[source].expected = load;
                }
                self.inbox.decided(budget);
            }
            Arrival::Layer {
                source: index,
                layer,
                came,
            } => {
                let source = &mut self.sources[index];
                // What is lost may still be in the channel.
                if !source.expected {
                    return;
                }
                for place in &source.places {
                    if let Err(error) = backend.write_moved(pages, *place, layer, &came.data) {
                        warn!(%error, %layer, "a fetched layer does not fit the pages");
                        self.lose(index);
                        return;
                    }
                }
                source.landed[usize::from(layer.0)] = true;
                let levels = source.level.into_iter().chain([came.level]);
                source.level = Level::coarsest(levels.collect::<Vec<_>>());
                self.bytes += came.received;
                metrics::counter!(LAYERS, "level" => came.level.to_string()).increment(1);
            }
            Arrival::Lost { source } => self.lose(source),
        }
        let is_settled = |source: &Source| !source.expected || source.is_whole();
        if self.inbox.stage() == Stage::Loading && self.sources.iter().all(is_settled) {
            self.inbox.close(true);
        }
    }

    fn lose(&mut self, source: usize) {
        let source = &mut self.sources[source];
        source.present = false;
        self.fewer |= std::mem::take(&mut source.expected);
    }

    /// When nothing more will be taken, what is whole is all there is.
    fn settle(&mut self) {
        if self.inbox.stage() != Stage::Done {
            return;
        }
        let mut complete = true;
        for source in &mut self.sources {
            if source.expected && !source.is_whole() {
                source.expected = false;
                self.fewer = true;
                complete = false;
            }
        }
        self.inbox.close(complete);
    }
}
