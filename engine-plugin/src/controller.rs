//! Which level of which layers to load, and what to compute, so that a deadline holds.
//!
//! A prompt's first `N` chunks of `L` layers are stored somewhere behind a link. A chunk's
//! layer at a nested level is a base and refinements ([`Level`]); the chunks from some `m` on
//! may be computed instead ("text" in CacheGen, arXiv 2310.07240 §5.3). Attention of layer
//! `l` can run while layer `l + 1` is on the wire. The first token is due at `D`.
//!
//! # Formulas
//! Seconds and bytes. With `m` chunks loaded, what follows them takes `C(m)` to compute (a
//! prefill is `a · tokens + b · pairs`, [`CostModel`](crate::CostModel)), the same for each
//! layer, and a layer of `m` chunks takes `d(m)` to decode on the same processors:
//!
//! ```text
//! w(m)      = C(m) ÷ L + d(m)                         work on a layer once it has come
//! due(l, m) = D − (1 + ε) (L − l) w(m)                latest moment at which layer l lands
//! come(l, m, r) = now + max(rtt, under way ÷ r) + base bytes to be asked for up to l ÷ r
//! slack(m, r)   = min over l of due(l, m) − come(l, m, r)
//! ```
//!
//! `ε` is 0.1: what computing takes scatters too. `r` is a rate; of the quantiles of the
//! link's ([`LinkEstimate`]), *low* is exceeded nine times out of ten.
//!
//! # Decisions, made again whenever something comes and every few milliseconds
//! 1. **How many chunks.** All, while the rate that they require (at which `slack ≥ 0`) is
//!    below *low*. Else the `m` that requires least is the surest. More is loaded, as many
//!    as the median rate is enough for, while there is time to fall back on the surest: the
//!    chunks from `m` on are given up at the last moment at which what `m` requires is still
//!    below *low*; or if there was none, below the median; or below the *high* quantile.
//!    Where nothing requires less than that, the surest is loaded in the hope of a better
//!    link, and once no rate is enough, what is least late. Chunks that were given up do not
//!    come back.
//! 2. **Base before refinements**: the bases of all layers, in the order of layers.
//! 3. **Refinements** by quality for a byte: a refinement divides the step by three and the
//!    squared error by nine (`kvasir_codec`, `LADDER`), so the first removes 8/9 of it and
//!    the second 8/81, of what they take by [`PartSizes`]. Hence all layers come to level 1
//!    before one comes to level 2, in the order of layers, and of them those that are likely
//!    (median) to come before their layer is due.
//! 4. **Land** a layer once nothing better can come for it: it is whole, or due, or what
//!    would be asked for now would be too late.
//!
//! A little more than the link's delay product is under way at any time, in segments of a
//! few milliseconds, so that decisions do not wait for what was asked for before.
//!
//! Deterministic and pure: time is a parameter, and nothing is fetched here. Whoever drives
//! a [`Controller`] does what [`poll`](Controller::poll) says and tells it what came.

mod learnt;
mod link;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use kvasir_types::Level;

pub use learnt::{DecodeSpeed, Learnt, PartSizes};
pub use link::{Forecast, LinkEstimate, WINDOW};

pub(crate) use learnt::PARTS;

/// A chunk that could be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The level it is stored at.
    pub level: Level,
    /// Bytes that its layers take, all parts together.
    pub bytes: u64,
}

/// What is to be there, and when.
#[derive(Clone, Debug)]
pub struct Goal {
    /// The leading chunks that are stored.
    pub chunks: Vec<Stored>,
    /// Layers of a chunk.
    pub layers: u16,
    /// Bytes of a raw layer of a chunk.
    pub layer_bytes: u64,
    /// By the number of chunks that are loaded, none included: what computing the rest of the
    /// prompt takes.
    pub compute: Vec<Duration>,
    /// When the first token is due.
    pub deadline: Instant,
}

/// Some parts to ask for: of each layer in `layers`, part `part` of each chunk in `chunks`.
/// Chunks that are not stored at a nested level come whole with part 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Indices of chunks.
    pub chunks: Range<usize>,
    /// Layers.
    pub layers: Range<u16>,
    /// 0 is the base.
    pub part: u8,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Only so many leading chunks will be loaded. What was computed over more is void.
    Shrink {
        /// So many.
        chunks: usize,
    },
    /// Land this layer of every chunk, from the parts that are here.
    Land {
        /// The layer; they land in order.
        layer: u16,
    },
    /// Ask for this.
    Request(Segment),
    /// Nothing until something comes, or until then.
    Wait {
        /// Later than now.
        until: Instant,
    },
    /// All layers have landed.
    Done,
}

/// Decides for one prompt.
#[derive(Debug)]
pub struct Controller {
    goal: Goal,
    learnt: Learnt,
    /// Leading chunks that are loaded, at most.
    limit: usize,
    /// Of those, leading chunks that bases are asked for at present.
    target: usize,
    /// When `target` is decided on again, if nothing comes.
    decide_at: Option<Instant>,
    /// Layers that have landed.
    landed: u16,
    layers: Vec<Layer>,
    under_way: VecDeque<Piece>,
    bytes_under_way: f64,
    closed: bool,
    /// Parts that layers are decoded from, at most; none where nothing is encoded.
    decoded_from: Option<u8>,
}

/// How many chunks to load.
#[derive(Clone, Copy, Debug)]
struct Decision {
    /// Ask for the bases of so many.
    target: usize,
    /// Give up those from here on.
    keep: Option<usize>,
}

/// How far a layer has come.
#[derive(Clone, Debug)]
struct Layer {
    /// By part: chunks up to here were asked for, where they have it.
    asked: [usize; PARTS],
    /// By part: chunks up to here have it, where it is stored.
    here: [usize; PARTS],
    /// By chunk: which parts are here, a bit each.
    parts: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    chunk: usize,
    layer: u16,
    part: u8,
    expected: f64,
}

impl Controller {
    /// For one prompt, with what was learnt from those before.
    ///
    /// # Panics
    /// Unless `goal.compute` has one entry more than there are chunks.
    pub fn new(goal: Goal, learnt: Learnt) -> Self {
        let chunks = goal.chunks.len();
        assert_eq!(
            goal.compute.len(),
            chunks + 1,
            "none and each may be loaded"
        );
        let layer = Layer {
            asked: [0; PARTS],
            here: [0; PARTS],
            parts: vec![0; chunks],
        };
        Self {
            layers: vec![layer; goal.layers.into()],
            limit: chunks,
            target: chunks,
            decide_at: None,
            landed: 0,
            under_way: VecDeque::new(),
            bytes_under_way: 0.0,
            closed: false,
            decoded_from: {
                let levels = goal.chunks.iter().map(|stored| stored.level);
                let encoded = levels.filter(|level| level.is_encoded());
                encoded.map(Level::parts).max()
            },
            goal,
            learnt,
        }
    }

    /// What was learnt, up to now.
    pub fn learnt(&self) -> &Learnt {
        &self.learnt
    }

    /// Leading chunks that are loaded, as far as is decided.
    pub fn chunks(&self) -> usize {
        self.limit
    }

    /// Parts of a layer of a chunk that are here, from the base on.
    pub fn parts(&self, chunk: usize, layer: u16) -> u8 {
        let layer = self.layers.get(usize::from(layer));
        layer.map_or(0, |layer| leading(layer.parts[chunk]))
    }

    /// A part that was asked for has come.
    pub fn arrived(&mut self, now: Instant, chunk: usize, layer: u16, part: u8, bytes: u64) {
        let is_it = |piece: &Piece| (piece.chunk, piece.layer, piece.part) == (chunk, layer, part);
        let Some(place) = self.under_way.iter().position(is_it) else {
            return;
        };
        self.under_way.remove(place);
        self.count_under_way();
        let idle = self.under_way.is_empty();
        self.learnt.link.arrived(now, bytes, idle);
        let stored = self.goal.chunks[chunk];
        let layer_bytes = to_f64(stored.bytes) / f64::from(self.goal.layers);
        let sizes = &mut self.learnt.sizes;
        sizes.observe(stored.level, part, bytes, layer_bytes);
        let layer = &mut self.layers[usize::from(layer)];
        layer.parts[chunk] |= 1 << part;
        for (part, here) in (0..).zip(&mut layer.here) {
            let chunks = self.goal.chunks.iter().zip(&layer.parts).skip(*here);
            let has = |(stored, parts): &(&Stored, &u8)| {
                leading(**parts) > part || stored.level.parts() <= part
            };
            *here += chunks.take_while(has).count();
        }
    }

    /// A chunk, and every one after it, will not come.
    pub fn lost(&mut self, chunk: usize) {
        self.shrink(chunk);
    }

    /// Nothing more will come: what was asked for, neither.
    pub fn close(&mut self) {
        self.closed = true;
        self.under_way.clear();
        self.count_under_way();
        self.learnt.link.idle();
    }

    /// Decoding took so long; see [`DecodeSpeed::observe`].
    pub fn decoded(&mut self, parts: u8, raw_bytes: u64, elapsed: Duration) {
        self.learnt.decoding.observe(parts, raw_bytes, elapsed);
    }

    /// What to do now. Ends after finitely many calls with [`Action::Wait`] or
    /// [`Action::Done`].
    pub fn poll(&mut self, now: Instant) -> Action {
        if self.landed == self.goal.layers || self.limit == 0 {
            return Action::Done;
        }
        let link = self.learnt.link.forecast(now);
        let layer = self.landed;
        let due = self.due(layer, self.limit, now);
        if self.layers[usize::from(layer)].here[0] >= self.limit {
            let refinable = || (1..PARTS).any(|part| self.can_come(part, layer, now, &link));
            if self.is_whole(layer) || due <= 0.0 || !(self.awaits(layer) || refinable()) {
                self.landed += 1;
                return Action::Land { layer };
            }
        } else if self.closed {
            let layers = self.layers.iter().skip(layer.into());
            let chunks = layers.map(|layer| layer.here[0]).min().unwrap_or(0);
            self.shrink(chunks);
            return Action::Shrink { chunks };
        }
        if self.decide_at.is_none_or(|at| now >= at) {
            self.decide_at = Some(now + TICK);
            let decision = self.decide(now, &link);
            self.target = decision.target;
            if let Some(chunks) = decision.keep {
                self.shrink(chunks);
                return Action::Shrink { chunks };
            }
        }
        if let Some(segment) = self.next_segment(now, &link) {
            self.request(now, &segment);
            return Action::Request(segment);
        }
        let mut until = self.decide_at.unwrap_or(now + TICK).max(now + LEAST_WAIT);
        if due > 0.0 {
            let due = Duration::try_from_secs_f64(due)
                .unwrap_or(TICK)
                .max(LEAST_WAIT);
            until = until.min(now + due);
        }
        Action::Wait { until }
    }

    fn decide(&self, now: Instant, link: &Forecast) -> Decision {
        let all = self.limit;
        let view = View::new(self, now, link.round_trip);
        let keep_all = |target| Decision { target, keep: None };
        if self.closed || view.required(all, 0.0) <= link.low {
            return keep_all(all);
        }
        let step = all.div_ceil(MOST_CANDIDATES);
        let candidates = || (0..=all).rev().filter(|&m| m == all || m % step == 0);
        let least = |cost: &dyn Fn(usize) -> f64| {
            let costs = candidates().map(|chunks| (chunks, cost(chunks)));
            let least = costs.min_by(|a, b| a.1.total_cmp(&b.1));
            least.unwrap_or((all, f64::INFINITY))
        };
        let soon = GUARD.as_secs_f64();
        let (surest, rate) = least(&|chunks| view.required(chunks, 0.0));
        let (surest_soon, rate_soon) = least(&|chunks| view.required(chunks, soon));
        let likely = candidates().find(|&m| view.required(m, 0.0) <= link.median);
        let target = if rate_soon <= link.low {
            likely.unwrap_or(surest_soon)
        } else if rate.is_finite() {
            surest
        } else {
            // It will be late, whatever is done.
            least(&|chunks| view.lateness(chunks, link.median)).0
        };
        // The last moment at which it is as sure as that.
        let last = |quantile: f64| rate <= quantile && rate_soon > quantile;
        let quantiles = [link.low, link.median, link.high];
        let keep = rate.is_infinite() || quantiles.into_iter().any(last);
        Decision {
            target,
            keep: (keep && target < all).then_some(target),
        }
    }

    /// Seconds until a layer of `chunks` chunks is due.
    fn due(&self, layer: u16, chunks: usize, now: Instant) -> f64 {
        let goal = &self.goal;
        let raw = to_f64(goal.layer_bytes) * index_to_f64(chunks);
        let decode = self
            .decoded_from
            .map_or(0.0, |parts| self.learnt.decoding.seconds(parts, raw));
        let layers = f64::from(goal.layers);
        let work = goal.compute[chunks].as_secs_f64() / layers + decode;
        let left = signed_seconds(now, goal.deadline) - MARGIN.as_secs_f64();
        left - SAFETY * f64::from(goal.layers - layer) * work
    }

    /// Bytes that are expected of a part of a layer of a chunk.
    fn expected(&self, chunk: usize, part: u8) -> f64 {
        let stored = self.goal.chunks[chunk];
        let share = self.learnt.sizes.share(stored.level, part);
        to_f64(stored.bytes) / f64::from(self.goal.layers) * share
    }

    fn is_whole(&self, layer: u16) -> bool {
        let here = &self.layers[usize::from(layer)].here;
        here.iter().all(|&chunks| chunks >= self.limit)
    }

    /// Whether something is under way for a layer.
    fn awaits(&self, layer: u16) -> bool {
        let mut pieces = self.under_way.iter();
        pieces.any(|piece| piece.layer == layer && piece.chunk < self.limit)
    }

    /// The first chunk of which a part of a layer can be asked for.
    fn first_unasked(&self, part: usize, layer: u16, chunks: usize) -> Option<usize> {
        let layer = &self.layers[usize::from(layer)];
        let first = (layer.asked[part]..chunks)
            .find(|&chunk| usize::from(self.goal.chunks[chunk].level.parts()) > part)?;
        (part == 0 || layer.asked[part - 1] > first).then_some(first)
    }

    /// Whether a refinement of a layer that is asked for now is likely to come in time.
    fn can_come(&self, part: usize, layer: u16, now: Instant, link: &Forecast) -> bool {
        let Some(first) = self.first_unasked(part, layer, self.target) else {
            return false;
        };
        !self.closed && self.in_time(layer, self.expected(first, as_part(part)), now, link)
    }

    fn in_time(&self, layer: u16, bytes: f64, now: Instant, link: &Forecast) -> bool {
        let comes = link.round_trip.max(self.bytes_under_way / link.median) + bytes / link.median;
        comes <= self.due(layer, self.target, now)
    }

    fn next_segment(&self, now: Instant, link: &Forecast) -> Option<Segment> {
        let left = signed_seconds(now, self.goal.deadline).max(0.0);
        let period = (left / SEGMENTS_LEFT).clamp(SHORTEST_SEGMENT, LONGEST_SEGMENT);
        let budget = (link.low * period).max(LEAST_SEGMENT);
        let full = self.bytes_under_way >= link.median * link.round_trip + budget;
        if self.closed || full {
            return None;
        }
        let unlanded = || self.landed..self.goal.layers;
        if let Some(layer) = unlanded().find(|&l| self.first_unasked(0, l, self.target).is_some()) {
            return self.segment(0, layer, budget, |_, _| true);
        }
        let mut parts: Vec<usize> = (1..PARTS).collect();
        let worth = |part: &usize| {
            ERROR_REMOVED[*part] / self.learnt.sizes.share(Level::L2, as_part(*part))
        };
        parts.sort_by(|a, b| worth(b).total_cmp(&worth(a)));
        let in_time = |layer, bytes| self.in_time(layer, bytes, now, link);
        parts.into_iter().find_map(|part| {
            let mut layers = unlanded();
            let layer = layers.find(|&layer| self.can_come(part, layer, now, link))?;
            self.segment(part, layer, budget, in_time)
        })
    }

    /// What to ask for of a part, from a layer on: about `budget` bytes, and one part at least.
    fn segment(
        &self,
        part: usize,
        layer: u16,
        budget: f64,
        in_time: impl Fn(u16, f64) -> bool,
    ) -> Option<Segment> {
        let first = self.first_unasked(part, layer, self.target)?;
        let available = |layer: u16, chunk: usize| {
            let asked = &self.layers[usize::from(layer)].asked;
            usize::from(self.goal.chunks[chunk].level.parts()) > part
                && (part == 0 || asked[part - 1] > chunk)
        };
        let mut end = first;
        let mut bytes = 0.0;
        while end < self.target && available(layer, end) {
            let more = self.expected(end, as_part(part));
            if end > first && (bytes + more > budget || !in_time(layer, bytes + more)) {
                break;
            }
            bytes += more;
            end += 1;
        }
        let of_layer = bytes;
        let mut last = layer + 1;
        while last < self.goal.layers
            && end == self.target
            && bytes + of_layer <= budget
            && self.first_unasked(part, last, self.target) == Some(first)
            && (first..end).all(|chunk| available(last, chunk))
            && in_time(last, bytes + of_layer)
        {
            bytes += of_layer;
            last += 1;
        }
        Some(Segment {
            chunks: first..end,
            layers: layer..last,
            part: as_part(part),
        })
    }

    fn request(&mut self, now: Instant, segment: &Segment) {
        for layer in segment.layers.clone() {
            self.layers[usize::from(layer)].asked[usize::from(segment.part)] = segment.chunks.end;
            for chunk in segment.chunks.clone() {
                let expected = self.expected(chunk, segment.part);
                self.under_way.push_back(Piece {
                    chunk,
                    layer,
                    part: segment.part,
                    expected,
                });
            }
        }
        self.count_under_way();
        self.learnt.link.requested(now);
    }

    fn count_under_way(&mut self) {
        self.bytes_under_way = self.under_way.iter().map(|piece| piece.expected).sum();
    }

    fn shrink(&mut self, chunks: usize) {
        self.limit = self.limit.min(chunks);
        self.target = self.target.min(self.limit);
        self.decide_at = None;
    }
}

/// What slack is computed from, at one moment.
struct View<'a> {
    controller: &'a Controller,
    now: Instant,
    round_trip: f64,
    /// By chunk: bytes of the bases of one layer of all chunks before it.
    bases: Vec<f64>,
    /// By layer: bytes under way up to its last base.
    under_way: Vec<f64>,
}

impl<'a> View<'a> {
    fn new(controller: &'a Controller, now: Instant, round_trip: f64) -> Self {
        let mut bases = vec![0.0];
        let mut sum = 0.0;
        for chunk in 0..controller.limit {
            sum += controller.expected(chunk, 0);
            bases.push(sum);
        }
        let mut under_way = vec![0.0; controller.layers.len()];
        let mut sum = 0.0;
        for piece in &controller.under_way {
            sum += piece.expected;
            if piece.part == 0 {
                under_way[usize::from(piece.layer)] = sum;
            }
        }
        Self {
            controller,
            now,
            round_trip,
            bases,
            under_way,
        }
    }

    /// For each layer to land, with `chunks` chunks: when it is due, in seconds; bytes of bases
    /// to be asked for up to it; and bytes under way up to its own.
    fn layers(&self, chunks: usize) -> impl Iterator<Item = (f64, f64, f64)> {
        let controller = self.controller;
        // Computing begins again where the chunks become fewer.
        let restart =
            (chunks < controller.limit).then(|| (controller.due(0, chunks, self.now), 0.0, 0.0));
        let mut unasked = 0.0;
        // None is waited for where everything is computed.
        let first = if chunks == 0 {
            controller.goal.layers
        } else {
            controller.landed
        };
        let layers = (first..controller.goal.layers).map(move |layer| {
            let index = usize::from(layer);
            let asked = controller.layers[index].asked[0].min(chunks);
            unasked += self.bases[chunks] - self.bases[asked];
            let due = controller.due(layer, chunks, self.now);
            (due, unasked, self.under_way[index])
        });
        restart.into_iter().chain(layers)
    }

    /// The rate at which every layer of `chunks` chunks comes before it is due, if nothing
    /// comes for `pause` seconds. Infinite where none is enough.
    fn required(&self, chunks: usize, pause: f64) -> f64 {
        let rate = |bytes: f64, seconds: f64| match seconds {
            _ if seconds < 0.0 => f64::INFINITY,
            _ if bytes > 0.0 => bytes / seconds,
            _ => 0.0,
        };
        let all_under_way = self.controller.bytes_under_way;
        let rates = self.layers(chunks).map(|(due, unasked, under_way)| {
            let due = due - pause;
            if unasked > 0.0 {
                let behind = rate(unasked + all_under_way, due);
                behind.max(rate(unasked, due - self.round_trip))
            } else {
                rate(under_way, due)
            }
        });
        rates.fold(0.0, f64::max)
    }

    /// Seconds by which a layer of `chunks` chunks comes too late at a rate, at most.
    fn lateness(&self, chunks: usize, rate: f64) -> f64 {
        let all_under_way = self.controller.bytes_under_way;
        let late = self.layers(chunks).map(|(due, unasked, under_way)| {
            let comes = if unasked > 0.0 {
                self.round_trip.max(all_under_way / rate) + unasked / rate
            } else {
                under_way / rate
            };
            comes - due
        });
        late.fold(f64::NEG_INFINITY, f64::max)
    }
}

/// Parts from the base on, of a bit each.
fn leading(parts: u8) -> u8 {
    u8::try_from(parts.trailing_ones()).expect("a byte has eight bits")
}

fn signed_seconds(from: Instant, to: Instant) -> f64 {
    let ahead = to.saturating_duration_since(from).as_secs_f64();
    ahead - from.saturating_duration_since(to).as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn to_f64(value: u64) -> f64 {
    value as f64
}

fn index_to_f64(value: usize) -> f64 {
    to_f64(value as u64)
}

fn as_part(part: usize) -> u8 {
    u8::try_from(part).expect("a level has three parts at most")
}

/// `1 + ε`.
const SAFETY: f64 = 1.1;
/// Clocks and schedulers are no more exact.
const MARGIN: Duration = Duration::from_millis(2);
/// From one decision to the next, where nothing comes.
const TICK: Duration = Duration::from_millis(5);
/// Chunks are given up when what is safe has no more slack than this.
const GUARD: Duration = Duration::from_millis(10);
/// A wait is no shorter.
const LEAST_WAIT: Duration = Duration::from_micros(200);
/// At most so many numbers of chunks are considered at a time.
const MOST_CANDIDATES: usize = 64;
/// A segment takes this part of the time that is left,
const SEGMENTS_LEFT: f64 = 20.0;
/// seconds at least,
const SHORTEST_SEGMENT: f64 = 5e-3;
/// and at most,
const LONGEST_SEGMENT: f64 = 50e-3;
/// and so many bytes at least, as requests cost time too.
const LEAST_SEGMENT: f64 = 64.0 * 1024.0;
/// Of the squared error of level 0, what each part removes.
const ERROR_REMOVED: [f64; PARTS] = [1.0, 8.0 / 9.0, 8.0 / 81.0];
