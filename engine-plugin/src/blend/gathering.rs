//! Fetching content chunks: each stands for itself.
//!
//! A get streams chunks of one layout, layer by layer, and what it loses takes with it whatever
//! follows. Content chunks differ in length. So those of one length go into one get, and a
//! get brings a few layers of them: layer 0 of all lengths is asked for first, then the next
//! layers of all, a few gets at a time, which the daemon answers in this order. What a lost
//! chunk took with it is asked for again, without that.
//!
//! No lease holds the chunks from one get to the next. One that is evicted meanwhile is absent.
//! One that another engine stores anew meanwhile, in another form, is still the same chunk: its
//! layers are decoded by the prelude that came with them, and a key covers whatever changes a
//! value.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::Either;
use futures::stream::{BoxStream, FuturesOrdered, SelectAll};
use futures::{StreamExt as _, TryStreamExt as _};
use kvasir_client::{CallError, ChunkInfo, Client, GetEvent, GetOptions};
use kvasir_types::{ChunkKey, KvLayout, LayerIdx, LayerRange};
use tracing::{debug, warn};

use super::recorder::Recorded;
use crate::coding::{Decoded, Decoding};
use crate::inbox::{End, Outbox, Received};
use crate::{Decision, Happened, LoadPolicy, Shared, TierBytes};

/// A content chunk of the prompt, once.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) key: ChunkKey,
    /// Its key in the shared corpus.
    pub(super) in_corpus: Option<ChunkKey>,
    pub(super) layout: KvLayout,
    /// Keys and layout of what was recorded of it, by this tenant or for the corpus, where
    /// that is wanted.
    pub(super) recorded: Option<(Vec<ChunkKey>, KvLayout)>,
    /// How long computing it takes, wherever it stands.
    pub(super) compute: Duration,
}

/// What the task hands over. Sources are indices of what is wanted.
#[derive(Debug)]
pub(super) enum Arrival {
    Planned {
        /// Sources that the cache holds.
        present: Vec<usize>,
        /// Whether they will be fetched.
        load: bool,
        /// What is expected to come of them.
        bytes: TierBytes,
        budget: Duration,
        /// What was recorded of sources.
        recorded: Vec<(usize, Recorded)>,
    },
    Layer {
        source: usize,
        layer: LayerIdx,
        came: Decoded,
    },
    /// It will not come.
    Lost { source: usize },
}

/// What was recorded of a source, as the cache has it.
#[derive(Debug)]
struct FoundRecord {
    source: usize,
    key: ChunkKey,
    layout: KvLayout,
}

/// The async half: talks to the daemon, feeds the channel.
pub(super) struct Gathering {
    shared: Arc<Shared>,
    wanted: Vec<Wanted>,
    outbox: Outbox<Arrival>,
}

impl Gathering {
    pub(super) fn new(shared: Arc<Shared>, wanted: Vec<Wanted>, outbox: Outbox<Arrival>) -> Self {
        Self {
            shared,
            wanted,
            outbox,
        }
    }

    pub(super) async fn run(&self, begun: Instant) -> Result<End, CallError> {
        let shared = &self.shared;
        let (found, recorded) = self.lookup().await?;
        let mut stored = TierBytes::default();
        for found in &found {
            stored += found.bytes;
        }
        let bytes = stored.map(|stored| shared.coder.expected_bytes(stored));
        let compute = found.iter().map(|it| self.wanted[it.source].compute).sum();
        let decision = match shared.config.load {
            _ if found.is_empty() => Decision::Compute,
            LoadPolicy::WhenFaster => shared.cost().decide_against(compute, bytes, Instant::now()),
            LoadPolicy::Always => Decision::Load {
                budget: shared.config.fetch_timeout,
            },
        };
        let (load, budget) = match decision {
            Decision::Load { budget } => (true, budget.min(shared.config.fetch_timeout)),
            Decision::Compute => (false, Duration::ZERO),
        };
        let recorded = match load {
            true => self.recorded(recorded).await,
            false => Vec::new(),
        };
        debug!(present = found.len(), load, ?bytes, ?budget, "decided");
        let planned = Arrival::Planned {
            present: found.iter().map(|found| found.source).collect(),
            load,
            bytes,
            budget,
            recorded,
        };
        if !self.outbox.hand_over(planned).await || !load {
            return Ok(End::Abandoned);
        }
        shared.stats.note(Happened::Load);
        let until = Instant::now() + shared.config.fetch_timeout;
        let mut loading = Loading::new(self, found, until);
        if !loading.run().await? {
            return Ok(End::Abandoned);
        }
        let received = loading.received;
        received.teach(shared, begun, stored);
        Ok(End::Completed)
    }

    /// What the cache holds of all that is wanted: the tenant's own copy, or that of the corpus.
    /// And what it has of what was recorded.
    async fn lookup(&self) -> Result<(Vec<Found>, Vec<FoundRecord>), CallError> {
        let config = &self.shared.config;
        let asking = self.shared.client.with_call_timeout(config.lookup_timeout);
        let own = self.wanted.iter().map(|wanted| wanted.key);
        let in_corpus = self.wanted.iter().filter_map(|wanted| wanted.in_corpus);
        let records = self.wanted.iter().filter_map(|it| it.recorded.as_ref());
        let records = records.flat_map(|(keys, _)| keys.iter().copied());
        let keys: Vec<ChunkKey> = own.chain(in_corpus).chain(records).collect();
        let lookup = asking.lookup(&keys).await?;
        let (own, others) = lookup.found.split_at(self.wanted.len());
        let mut in_corpus = others.iter();
        let mut found = Vec::new();
        for (source, (wanted, own)) in self.wanted.iter().zip(own).enumerate() {
            let own = own.map(|own| (wanted.key, own));
            let shared = wanted
                .in_corpus
                .and_then(|key| Some((key, (*in_corpus.next()?)?)));
            if let Some((key, copy)) = own.or(shared) {
                found.push(Found {
                    source,
                    key,
                    layout: wanted.layout,
                    bytes: TierBytes::of(copy.tier, copy.bytes),
                    is_live: true,
                    fits: false,
                    received: vec![false; wanted.layout.layers().into()],
                });
            }
        }
        // Of those in the corpus, one was taken for each that could be there.
        let mut records = in_corpus;
        let mut recorded = Vec::new();
        for (source, wanted) in self.wanted.iter().enumerate() {
            let Some((keys, layout)) = &wanted.recorded else {
                continue;
            };
            let present: Vec<ChunkKey> = keys
                .iter()
                .zip(records.by_ref())
                .filter_map(|(key, found)| found.map(|_| *key))
                .collect();
            recorded.extend(present.first().map(|&key| FoundRecord {
                source,
                key,
                layout: *layout,
            }));
        }
        Ok((found, recorded))
    }

    /// What was recorded of these sources, as far as it comes in the time of a lookup. A get
    /// brings chunks of one layout.
    async fn recorded(&self, found: Vec<FoundRecord>) -> Vec<(usize, Recorded)> {
        let mut by_length: BTreeMap<u32, Vec<FoundRecord>> = BTreeMap::new();
        for record in found {
            let length = record.layout.tokens();
            by_length.entry(length).or_default().push(record);
        }
        let gets = by_length.into_values().map(|group| self.recorded_of(group));
        let timeout = self.shared.config.lookup_timeout;
        match tokio::time::timeout(timeout, futures::future::try_join_all(gets)).await {
            Ok(Ok(groups)) => groups.concat(),
            Ok(Err(error)) => {
                debug!(%error, "what was recorded of chunks does not come");
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }

    async fn recorded_of(
        &self,
        records: Vec<FoundRecord>,
    ) -> Result<Vec<(usize, Recorded)>, CallError> {
        let keys: Vec<ChunkKey> = records.iter().map(|record| record.key).collect();
        let mut stream = self.shared.client.get(&keys, GetOptions::default()).await?;
        let fits = stream.chunks().iter().zip(&records);
        let fits = fits.take_while(|(info, record)| info.layout == record.layout);
        let mut recorded = vec![Vec::new(); fits.count()];
        while let Some(event) = stream.next().await? {
            if let GetEvent::Layer { chunk, parts, .. } = event
                && let Some(layers) = recorded.get_mut(chunk)
            {
                layers.push(Bytes::from(parts.concat()));
            }
        }
        let whole = records.into_iter().zip(recorded);
        let whole =
            whole.filter(|(record, layers)| layers.len() == usize::from(record.layout.layers()));
        Ok(whole
            .map(|(record, layers)| (record.source, layers))
            .collect())
    }

    /// A layer from those of its parts that came.
    async fn decode(
        &self,
        decoding: Arc<Decoding>,
        source: usize,
        layer: LayerIdx,
        parts: Vec<Bytes>,
    ) -> Arrival {
        let coder = &self.shared.coder;
        match coder.layer(decoding, layer, parts).await {
            Some(came) => Arrival::Layer {
                source,
                layer,
                came,
            },
            None => Arrival::Lost { source },
        }
    }
}

/// A chunk that the cache holds.
#[derive(Debug)]
struct Found {
    source: usize,
    key: ChunkKey,
    layout: KvLayout,
    bytes: TierBytes,
    /// Not lost.
    is_live: bool,
    /// A get has said that it is of the layout that is expected.
    fits: bool,
    /// By layer.
    received: Vec<bool>,
}

/// Some layers of some chunks of one length, to be asked for at once.
#[derive(Clone, Debug)]
struct Segment {
    /// Indices of what was found.
    chunks: Vec<usize>,
    layers: Range<u16>,
}

/// A get under way.
#[derive(Debug)]
struct Get {
    segment: Segment,
    /// Of the chunks that come, once they are known.
    decodings: Vec<Arc<Decoding>>,
}

/// What came of a get.
enum Came {
    /// The leading chunks that are there.
    Opened(Vec<ChunkInfo>),
    Event(GetEvent),
}

/// By the number of the get.
type Events = BoxStream<'static, Result<(usize, Came), CallError>>;

/// What is under way of a prompt.
struct Loading<'a> {
    gathering: &'a Gathering,
    found: Vec<Found>,
    /// What is still to be asked for, in order.
    waiting: VecDeque<Segment>,
    gets: Vec<Get>,
    events: SelectAll<Events>,
    /// Sources that were lost, and nobody told so.
    lost: Vec<usize>,
    received: Received,
    until: Instant,
}

impl<'a> Loading<'a> {
    fn new(gathering: &'a Gathering, found: Vec<Found>, until: Instant) -> Self {
        Self {
            gathering,
            waiting: plan(&found),
            found,
            gets: Vec::new(),
            events: SelectAll::new(),
            lost: Vec::new(),
            received: Received::default(),
            until,
        }
    }

    /// Until all has come that will. False when nobody waits any more.
    async fn run(&mut self) -> Result<bool, CallError> {
        let gathering = self.gathering;
        let most = 2 * gathering.shared.coder.config().threads.max(1);
        let mut decodes = FuturesOrdered::new();
        loop {
            self.ask();
            for source in self.lost.drain(..) {
                let lost = std::future::ready(Arrival::Lost { source });
                decodes.push_back(Either::Right(lost));
            }
            let arrival = tokio::select! {
                biased;
                Some(arrival) = decodes.next(), if !decodes.is_empty() => arrival,
                event = self.events.next(), if !self.events.is_empty() && decodes.len() < most => {
                    // The last of those under way may have ended, and others wait.
                    let Some(event) = event else { continue };
                    let (get, came) = event?;
                    if let Some((decoding, source, layer, parts)) = self.take(get, came) {
                        let decode = gathering.decode(decoding, source, layer, parts);
                        decodes.push_back(Either::Left(decode));
                    }
                    continue;
                }
                else => return Ok(true),
            };
            if let Arrival::Lost { source } = arrival {
                self.received.lost = true;
                let found = self.found.iter_mut().find(|found| found.source == source);
                if let Some(found) = found {
                    found.is_live = false;
                }
            }
            let handed = Instant::now();
            if !gathering.outbox.hand_over(arrival).await {
                return Ok(false);
            }
            self.received.busy += handed.elapsed();
        }
    }

    /// Asks for what waits, as long as few gets are under way.
    fn ask(&mut self) {
        while self.events.len() < GETS
            && let Some(mut segment) = self.waiting.pop_front()
        {
            // Layers that a chunk of another layout does not have would be refused, together
            // with those of all others.
            let is_unknown = |&chunk: &usize| self.found[chunk].is_live && !self.found[chunk].fits;
            if segment.layers.start > 0 && segment.chunks.iter().any(is_unknown) {
                self.waiting.push_front(segment);
                return;
            }
            segment.chunks.retain(|&chunk| self.found[chunk].is_live);
            if !segment.chunks.is_empty() {
                let events = self.get(&segment, self.gets.len());
                self.events.push(events);
                self.gets.push(Get {
                    segment,
                    decodings: Vec::new(),
                });
            }
        }
    }

    fn get(&self, segment: &Segment, number: usize) -> Events {
        let shared = &self.gathering.shared;
        let client = shared.client.clone();
        let keys: Vec<_> = segment
            .chunks
            .iter()
            .map(|&it| self.found[it].key)
            .collect();
        let Range { start, end } = segment.layers;
        let all = shared.namespace.layout().layers();
        let is_all = start == 0 && end == all;
        let options = GetOptions {
            layers: (!is_all)
                .then(|| LayerRange::new(start, end).ok())
                .flatten(),
            levels: shared.coder.config().fetch.into_iter().collect(),
            deadline: Some(self.until),
            ..GetOptions::default()
        };
        let stream = async move { client.get(&keys, options).await };
        let came = futures::stream::once(stream).map_ok(|stream| {
            let opened = Came::Opened(stream.chunks().to_vec());
            let events = futures::stream::try_unfold(stream, |mut stream| async move {
                let event = stream.next().await?;
                Ok(event.map(|event| (Came::Event(event), stream)))
            });
            futures::stream::once(std::future::ready(Ok(opened))).chain(events)
        });
        let came = came.try_flatten();
        came.map_ok(move |came| (number, came)).boxed()
    }

    /// Notes what came of a get. Where it is a layer, how it is decoded.
    fn take(&mut self, number: usize, came: Came) -> Option<ToDecode> {
        match came {
            Came::Opened(infos) => self.opened(number, &infos),
            Came::Event(GetEvent::Prelude { chunk, data }) => {
                let get = &mut self.gets[number];
                let found = get.segment.chunks[chunk];
                let level = get.decodings[chunk].level();
                let coder = &self.gathering.shared.coder;
                match coder.decoding(self.found[found].layout, level, data) {
                    Some(decoding) => get.decodings[chunk] = Arc::new(decoding),
                    None => {
                        debug!("a content chunk needs a profile; computing it");
                        self.lose(found);
                    }
                }
            }
            Came::Event(GetEvent::Layer {
                chunk,
                layer,
                parts,
            }) => {
                self.received.note(parts.iter().map(Bytes::len).sum());
                let get = &self.gets[number];
                let found = &mut self.found[get.segment.chunks[chunk]];
                // What is asked for again may have come in part.
                let received = found.received.get_mut(usize::from(layer.0))?;
                if found.is_live && !std::mem::replace(received, true) {
                    let decoding = Arc::clone(&get.decodings[chunk]);
                    return Some((decoding, found.source, layer, parts));
                }
            }
            Came::Event(GetEvent::Lost { chunk, reason }) => {
                warn!(?reason, "a content chunk was lost; computing it instead");
                self.lose(self.gets[number].segment.chunks[chunk]);
                self.ask_again(number, chunk + 1);
            }
        }
        None
    }

    /// A get says what it brings. What it does not bring may be there all the same.
    fn opened(&mut self, number: usize, infos: &[ChunkInfo]) {
        let segment = &self.gets[number].segment;
        let layout = self.found[segment.chunks[0]].layout;
        let come = infos.len().min(segment.chunks.len());
        let fit = infos.first().is_none_or(|first| first.layout == layout);
        // All that come are of the first one's layout, so the one that ends them is another.
        let gone = if fit { come..come + 1 } else { 0..come };
        let gone_chunks = segment
            .chunks
            .get(gone.clone())
            .unwrap_or_default()
            .to_vec();
        for chunk in gone_chunks {
            debug!(fit, "a content chunk that was looked up is not there");
            self.lose(chunk);
        }
        self.ask_again(number, gone.end);
        for &chunk in self.gets[number].segment.chunks.iter().take(come) {
            self.found[chunk].fits = fit;
        }
        let raw = |info: &ChunkInfo| Arc::new(Decoding::raw(layout, info.level));
        self.gets[number].decodings = infos.iter().map(raw).collect();
    }

    /// What a get was to bring from `chunk` on is asked for by another one.
    fn ask_again(&mut self, number: usize, chunk: usize) {
        let segment = &self.gets[number].segment;
        let rest = segment.chunks.get(chunk..).unwrap_or_default();
        let layers = segment.layers.clone();
        let lacks = |&chunk: &usize| {
            let received = &self.found[chunk].received;
            layers.clone().any(|layer| !received[usize::from(layer)])
        };
        let chunks: Vec<usize> = rest.iter().copied().filter(lacks).collect();
        if !chunks.is_empty() {
            self.waiting.push_front(Segment { chunks, layers });
        }
    }

    fn lose(&mut self, found: usize) {
        let found = &mut self.found[found];
        if std::mem::take(&mut found.is_live) {
            self.lost.push(found.source);
        }
    }
}

/// A layer that came, and how it is decoded.
type ToDecode = (Arc<Decoding>, usize, LayerIdx, Vec<Bytes>);

/// What is asked for, in order: layer 0 of every chunk, then the next layers of every chunk.
fn plan(found: &[Found]) -> VecDeque<Segment> {
    let mut by_length: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (index, found) in found.iter().enumerate() {
        by_length
            .entry(found.layout.tokens())
            .or_default()
            .push(index);
    }
    let groups: Vec<&[usize]> = by_length
        .values()
        .flat_map(|group| group.chunks(Client::MAX_GET_KEYS))
        .collect();
    let Some(layers) = found.first().map(|first| first.layout.layers()) else {
        return VecDeque::new();
    };
    let stored: u64 = found.iter().map(|found| found.bytes.total()).sum();
    let of_a_get = stored / u64::from(layers) / groups.len() as u64;
    let step = GET_BYTES.div_ceil(of_a_get.max(1)).min(layers.into());
    let step = u16::try_from(step).unwrap_or(layers);
    // One get streams layer by layer, and needs no other.
    let first = if groups.len() == 1 { layers } else { 1 };
    let later = (first..layers).step_by(step.into());
    let later = later.map(|from| from..from.saturating_add(step).min(layers));
    let steps = std::iter::once(0..first).chain(later);
    let of_step = |layers: Range<u16>| {
        groups.iter().map(move |group| Segment {
            chunks: group.to_vec(),
            layers: layers.clone(),
        })
    };
    steps.flat_map(of_step).collect()
}

/// Gets under way at once: enough to hide their round trips, and few of those that a daemon
/// admits.
const GETS: usize = 4;
/// Bytes that make a get worth its round trip.
const GET_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests;
