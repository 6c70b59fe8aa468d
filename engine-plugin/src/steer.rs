//! Fetching by the decisions of a [`Controller`].
//!
//! One task asks for segments, keeps what came of each layer until the controller lands it,
//! decodes it then from all of its parts, and hands it over. All gets are by one lease, so that
//! a refinement is of the very object that its base is of.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{BoxStream, FuturesOrdered, SelectAll};
use futures::{StreamExt as _, TryStreamExt as _};
use kvasir_client::{CallError, ChunkInfo, GetEvent, GetOptions, Held, Hold, Tier};
use kvasir_types::{LayerIdx, LayerRange, Level};
use tracing::{debug, warn};

use crate::coding::Decoding;
use crate::controller::{Action, Controller, Goal, PARTS, Segment, Stored};
use crate::fetch::{Arrival, Fetch};
use crate::inbox::End;
use crate::{FetchObservation, Shared};

impl Shared {
    /// The deadline of fetches that a controller steers; none where they are not.
    pub(crate) fn steered_within(&self) -> Option<Duration> {
        let fixed = self.coder.config().fetch.is_some();
        self.config.deadline.filter(|_| !fixed)
    }
}

type Events = BoxStream<'static, Result<(Segment, GetEvent), CallError>>;

/// What is under way of a prompt.
struct Loading<'a> {
    fetch: &'a Fetch,
    held: Held,
    controller: Controller,
    /// By chunk, once its prelude is here.
    decodings: Vec<Option<Arc<Decoding>>>,
    /// By layer and chunk: the parts that came.
    parts: Vec<Vec<[Option<Bytes>; PARTS]>>,
    events: SelectAll<Events>,
    /// Layers of chunks that are to be decoded.
    landing: VecDeque<(usize, LayerIdx)>,
    /// When the first token is due.
    due: Instant,
    /// Until when each get must be over.
    until: Instant,
    first: Option<Instant>,
    after_first: u64,
    failure: Option<CallError>,
}

impl Fetch {
    /// Loads chunks that take so many bytes each, as fine as they can come until `deadline`.
    pub(crate) async fn steer(
        &self,
        mut hold: Hold,
        sizes: &[u64],
        tier: Tier,
        begun: Instant,
        deadline: Instant,
    ) -> Result<End, CallError> {
        let shared = &self.shared;
        let held = hold.acquire(&self.prompt.keys()[..sizes.len()]).await?;
        let layout = *shared.namespace.layout();
        let fits = |chunk: &&ChunkInfo| chunk.layout == layout;
        let fitting = held.chunks.iter().take_while(fits).count();
        if fitting < sizes.len() {
            debug!(fitting, "fewer fitting chunks than looked up");
            let lost = Arrival::Lost { chunk: fitting };
            if !self.hand_over(lost).await {
                return Ok(End::Abandoned);
            }
        }
        let chunks = held.chunks.iter().zip(sizes).take(fitting);
        let compute = |chunks| {
            let from = self.prompt.resume_at(chunks);
            shared.cost().compute_time(from, self.prompt.tokens())
        };
        let goal = Goal {
            chunks: chunks
                .map(|(chunk, &bytes)| Stored {
                    level: chunk.level,
                    bytes,
                })
                .collect(),
            layers: layout.layers(),
            layer_bytes: layout.layer_bytes() as u64,
            compute: (0..=fitting).map(compute).collect(),
            deadline: deadline - shared.overrun().min((deadline - begun) / 4),
        };
        let learnt = shared.learnt().clone();
        let mut loading = Loading {
            fetch: self,
            decodings: vec![None; fitting],
            parts: vec![vec![[const { None }; PARTS]; fitting]; layout.layers().into()],
            held,
            controller: Controller::new(goal, learnt),
            events: SelectAll::new(),
            landing: VecDeque::new(),
            due: deadline,
            until: begun + shared.config.fetch_timeout,
            first: None,
            after_first: 0,
            failure: None,
        };
        let went_on = loading.run().await;
        let now = Instant::now();
        loading.controller.close();
        let learnt = loading.controller.learnt().clone();
        if let Some(first) = loading.first {
            let median = learnt.link.forecast(now).median;
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            let seconds = loading.after_first as f64 / median;
            let observation = FetchObservation {
                tier,
                latency: first - begun,
                bytes: loading.after_first,
                elapsed: Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX),
            };
            shared.cost().observe_fetch(observation, now);
        }
        *shared.learnt() = learnt;
        match loading.failure {
            Some(error) => Err(error),
            None if went_on => Ok(End::Completed),
            None => Ok(End::Abandoned),
        }
    }
}

impl Loading<'_> {
    /// Until all has landed that will. False when nobody waits any more.
    async fn run(&mut self) -> bool {
        let fetch = self.fetch;
        let coder = &fetch.shared.coder;
        let layout = *fetch.shared.namespace.layout();
        let layer_bytes = layout.layer_bytes() as u64;
        let most = 2 * coder.config().threads.max(1);
        let mut decodes = FuturesOrdered::new();
        // Since when layers have been decoded without a break, their bytes, and most parts.
        let mut decoding: Option<(Instant, u64, u8)> = None;
        loop {
            let until = match self.act() {
                Acted::Wait(until) => Some(until),
                Acted::Shrunk(chunk) => {
                    debug!(chunk, "the deadline takes computing from here on");
                    if !fetch.hand_over(Arrival::Left { chunk }).await {
                        return false;
                    }
                    continue;
                }
                Acted::Landed => {
                    let at = Instant::now() + self.last_layer();
                    let due = self.due;
                    if !fetch.hand_over(Arrival::Expected { at, due }).await {
                        return false;
                    }
                    continue;
                }
                Acted::Done => None,
            };
            while decodes.len() < most
                && let Some((chunk, layer)) = self.landing.pop_front()
            {
                let parts = std::mem::take(&mut self.parts[usize::from(layer.0)][chunk]);
                let parts: Vec<Bytes> = parts.into_iter().map_while(|part| part).collect();
                let count = u8::try_from(parts.len()).unwrap_or(u8::MAX);
                let (_, bytes, finest) = decoding.get_or_insert((Instant::now(), 0, 0));
                *bytes += layer_bytes;
                *finest = count.max(*finest);
                let how = match &self.decodings[chunk] {
                    Some(decoding) => Arc::clone(decoding),
                    None => Arc::new(Decoding::raw(layout, self.held.chunks[chunk].level)),
                };
                decodes.push_back(fetch.decode(how, chunk, layer, parts));
            }
            let wait = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some(arrival) = decodes.next(), if !decodes.is_empty() => {
                    if decodes.is_empty()
                        && let Some((since, bytes, parts)) = decoding.take()
                    {
                        self.controller.decoded(parts, bytes, since.elapsed());
                    }
                    if let Arrival::Lost { chunk } = arrival {
                        self.controller.lost(chunk);
                    }
                    if !fetch.hand_over(arrival).await {
                        return false;
                    }
                }
                Some(event) = self.events.next(), if until.is_some() => {
                    let lost = match event {
                        Ok((segment, event)) => self.take(&segment, event),
                        Err(error) => {
                            self.controller.close();
                            self.failure.get_or_insert(error);
                            None
                        }
                    };
                    if let Some(chunk) = lost
                        && !fetch.hand_over(Arrival::Lost { chunk }).await
                    {
                        return false;
                    }
                }
                () = wait, if until.is_some() => {}
                else => return true,
            }
        }
    }

    /// What is left to compute once the last layer is here.
    fn last_layer(&self) -> Duration {
        let (shared, prompt) = (&self.fetch.shared, &self.fetch.prompt);
        let from = prompt.resume_at(self.controller.chunks());
        let compute = shared.cost().compute_time(from, prompt.tokens());
        compute / u32::from(shared.namespace.layout().layers())
    }

    /// Does what the controller says, until it says to wait.
    fn act(&mut self) -> Acted {
        loop {
            match self.controller.poll(Instant::now()) {
                Action::Done => return Acted::Done,
                Action::Wait { until } => return Acted::Wait(until),
                Action::Shrink { chunks } => return Acted::Shrunk(chunks),
                Action::Request(segment) => self.events.push(self.get(segment)),
                Action::Land { layer } => {
                    let chunks = 0..self.controller.chunks();
                    let is_last = usize::from(layer) + 1 == self.parts.len();
                    let layer = LayerIdx(layer);
                    self.landing.extend(chunks.map(|chunk| (chunk, layer)));
                    if is_last {
                        return Acted::Landed;
                    }
                }
            }
        }
    }

    fn get(&self, segment: Segment) -> Events {
        let shared = &self.fetch.shared;
        let client = shared.client.clone();
        let keys = self.fetch.prompt.keys()[segment.chunks.clone()].to_vec();
        let nested = [Level::L0, Level::L1, Level::L2];
        let part = usize::from(segment.part);
        let options = GetOptions {
            layers: LayerRange::new(segment.layers.start, segment.layers.end).ok(),
            levels: vec![nested[part]],
            have: part.checked_sub(1).map(|below| nested[below]),
            deadline: Some(self.until),
            lease: Some(self.held.id),
            slice: None,
            // A request that has nothing yet goes before one that would be finer.
            ahead: part > 0,
        };
        let stream = async move { client.get(&keys, options).await };
        let events = futures::stream::once(stream).and_then(move |stream| {
            let segment = segment.clone();
            let events = futures::stream::try_unfold(stream, |mut stream| async move {
                Ok(stream.next().await?.map(|event| (event, stream)))
            });
            let events = events.map_ok(move |event| (segment.clone(), event));
            std::future::ready(Ok(events))
        });
        events.try_flatten().boxed()
    }

    /// Notes what came of a segment. Where a chunk is lost, which.
    fn take(&mut self, segment: &Segment, event: GetEvent) -> Option<usize> {
        let first = segment.chunks.start;
        let now = Instant::now();
        match event {
            GetEvent::Prelude { chunk, data } => {
                let chunk = first + chunk;
                if self.decodings[chunk].is_some() {
                    return None;
                }
                let ChunkInfo { layout, level, .. } = self.held.chunks[chunk];
                match self.fetch.shared.coder.decoding(layout, level, data) {
                    Some(decoding) => self.decodings[chunk] = Some(Arc::new(decoding)),
                    None => {
                        debug!(chunk, "a cached chunk needs a profile; computing it");
                        self.controller.lost(chunk);
                        return Some(chunk);
                    }
                }
            }
            GetEvent::Layer {
                chunk,
                layer,
                parts,
            } => {
                let chunk = first + chunk;
                let bytes = parts.iter().map(|part| part.len() as u64).sum();
                match self.first {
                    None => self.first = Some(now),
                    Some(_) => self.after_first += bytes,
                }
                let slots = self.parts[usize::from(layer.0)][chunk].iter_mut();
                for (slot, part) in slots.skip(segment.part.into()).zip(parts) {
                    *slot = Some(part);
                }
                let part = segment.part;
                self.controller.arrived(now, chunk, layer.0, part, bytes);
            }
            GetEvent::Lost { chunk, reason } if segment.part == 0 => {
                let chunk = first + chunk;
                warn!(
                    chunk,
                    ?reason,
                    "a cached chunk was lost; computing it instead"
                );
                self.controller.lost(chunk);
                return Some(chunk);
            }
            GetEvent::Lost { chunk, reason } => {
                warn!(chunk, ?reason, "a refinement was lost; doing without");
                self.controller.close();
            }
        }
        None
    }
}

/// What is left to do for now.
enum Acted {
    Wait(Instant),
    Shrunk(usize),
    /// The last layer.
    Landed,
    Done,
}
