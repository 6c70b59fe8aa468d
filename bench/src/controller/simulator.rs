//! One request in virtual time, under each policy.
//!
//! A prompt of some chunks and a question is answered once the KV of the chunks is there,
//! loaded or computed, and the question is computed over it. What was asked for begins to
//! come a round trip later and no sooner than what was asked for before it has come, as fast
//! as the trace says. Every layer is decoded, then its part of the computation runs.
//! Computing takes longer or shorter than its model says, by 5 % in the standard deviation;
//! how much, no policy knows but the oracle, nor does any know the trace.

use std::time::{Duration, Instant};

use kvasir_plugin::controller::{
    Action, Controller, DecodeSpeed, Forecast, Goal, Learnt, Stored, WINDOW,
};
use kvasir_types::Level;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::trace::{Kind, Trace, as_f64, gaussian};

/// A link, and the requests that come over it, one after the other.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) requests: Vec<Request>,
    trace: Trace,
    /// Seconds.
    round_trip: f64,
    epoch: Instant,
}

/// One prompt.
#[derive(Debug)]
pub(super) struct Request {
    /// Seconds from the beginning of the trace.
    begins: f64,
    /// Seconds from then on.
    deadline: f64,
    chunks: usize,
    /// Bytes, by chunk, layer and part.
    sizes: Vec<Vec<[f64; PARTS]>>,
    /// What computing takes, as a multiple of what the model says.
    noise: f64,
}

/// What a policy made of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Outcome {
    /// Seconds to the first token.
    pub(super) ttft: f64,
    /// Mean over chunks and layers; see [`super`].
    pub(super) level: f64,
    pub(super) in_time: bool,
}

/// What a controller believed of the link, and what it did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Belief {
    pub(super) forecast: Forecast,
    /// Bytes a second, in the mean over [`HORIZON`].
    pub(super) rate: f64,
}

impl Session {
    pub(super) fn new(kind: Kind, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut log_uniform =
            |from: f64, to: f64| (from.ln() + (to / from).ln() * rng.random::<f64>()).exp();
        let base = log_uniform(SLOWEST, FASTEST);
        let round_trip = log_uniform(1e-3, 40e-3);
        let trace = Trace::new(kind, base, seed);
        // Of another model, a level takes more or less.
        let model: [f64; PARTS] =
            std::array::from_fn(|part| BITS[part] / 16.0 * (0.2 * gaussian(&mut rng)).exp());
        let all = CONTEXTS
            .iter()
            .flat_map(|context| DEADLINES.map(|deadline| (*context, deadline)));
        let requests = all.enumerate().map(|(index, (context, deadline))| {
            let chunks = context / CHUNK_TOKENS;
            let mut sizes = |_| {
                let chunk = (0.05 * gaussian(&mut rng)).exp();
                let layer = |layer| 1.3 - 0.6 * as_f64(layer) / as_f64(LAYERS - 1);
                let sizes = |at| model.map(|part| part * LAYER_BYTES * chunk * layer(at));
                (0..LAYERS).map(sizes).collect()
            };
            Request {
                begins: 1.0 + PERIOD * as_f64(index),
                deadline,
                chunks,
                sizes: (0..chunks).map(&mut sizes).collect(),
                noise: (0.05 * gaussian(&mut rng)).exp(),
            }
        });
        Self {
            requests: requests.collect(),
            trace,
            round_trip,
            epoch: Instant::now(),
        }
    }

    /// What comes of `bytes` that follow what came until `free`, when asked for at `asked`.
    fn comes(&self, asked: f64, free: f64, bytes: f64) -> f64 {
        self.trace.after((asked + self.round_trip).max(free), bytes)
    }

    /// All requests, one after the other, with a controller that keeps what it learns.
    pub(super) fn ours(&self, beliefs: &mut Vec<Belief>) -> Vec<Outcome> {
        let mut learnt = Learnt {
            decoding: DecodeSpeed::of(DECODE),
            ..Learnt::default()
        };
        let run = |request| self.controlled(request, &mut learnt, beliefs);
        self.requests.iter().map(run).collect()
    }

    fn controlled(
        &self,
        request: &Request,
        learnt: &mut Learnt,
        beliefs: &mut Vec<Belief>,
    ) -> Outcome {
        let at = |seconds: f64| self.epoch + Duration::from_secs_f64(seconds);
        let begins = request.begins;
        let bytes = |chunk: usize| request.sizes[chunk].as_flattened().iter().sum::<f64>();
        let goal = Goal {
            chunks: (0..request.chunks)
                .map(|chunk| Stored {
                    level: Level::L2,
                    bytes: whole(bytes(chunk)),
                })
                .collect(),
            layers: u16::try_from(LAYERS).expect("there are few"),
            layer_bytes: whole(LAYER_BYTES),
            compute: (0..=request.chunks)
                .map(|chunks| Duration::from_secs_f64(request.compute(chunks)))
                .collect(),
            deadline: at(begins + request.deadline),
        };
        let mut controller = Controller::new(goal, learnt.clone());
        let (mut now, mut free) = (begins, 0.0);
        // By layer: when it landed, and with how many parts of each chunk.
        let mut landed: Vec<(f64, Vec<u8>)> = Vec::new();
        let mut restarted = begins;
        let mut coming = std::collections::VecDeque::new();
        let mut next_belief = begins;
        loop {
            match controller.poll(at(now)) {
                Action::Done => break,
                Action::Shrink { .. } => restarted = now,
                Action::Land { layer } => {
                    let parts = |chunk| controller.parts(chunk, layer);
                    landed.push((now, (0..controller.chunks()).map(parts).collect()));
                }
                Action::Request(segment) => {
                    for layer in segment.layers {
                        for chunk in segment.chunks.clone() {
                            let size =
                                request.sizes[chunk][usize::from(layer)][usize::from(segment.part)];
                            free = self.comes(now, free, size);
                            coming.push_back((free, chunk, layer, segment.part, size));
                        }
                    }
                }
                Action::Wait { until } => {
                    if now >= next_belief && coming.front().is_some_and(|next| next.0 - now < 1.0) {
                        next_belief = now + WINDOW.as_secs_f64();
                        let passed = self.trace.until(now + HORIZON) - self.trace.until(now);
                        beliefs.push(Belief {
                            forecast: controller.learnt().link.forecast(at(now)),
                            rate: passed / HORIZON,
                        });
                    }
                    let until = until.duration_since(self.epoch).as_secs_f64();
                    assert!(until > now, "a wait ends later");
                    now = until;
                    if let Some(&(comes, chunk, layer, part, size)) = coming.front()
                        && comes <= until
                    {
                        now = comes;
                        coming.pop_front();
                        controller.arrived(at(now), chunk, layer, part, whole(size));
                    }
                }
            }
        }
        let chunks = controller.chunks();
        controller.close();
        learnt.clone_from(controller.learnt());
        let lands = (0..LAYERS).map(|layer| landed.get(layer).map_or(restarted, |it| it.0));
        let loaded = landed.iter().flat_map(|(_, parts)| &parts[..chunks]);
        let levels = loaded.map(|parts| f64::from(*parts) - 1.0).sum();
        request.outcome(restarted, lands, chunks, levels)
    }

    /// One level for all, layer by layer.
    pub(super) fn fixed(&self, request: &Request, level: usize) -> Outcome {
        let mut free = request.begins;
        let lands = (0..LAYERS).map(|layer| {
            let layer = request.sizes.iter().map(|chunk| &chunk[layer][..=level]);
            let bytes = layer.flatten().sum();
            free = self.comes(request.begins, free, bytes);
            free
        });
        let levels = as_f64(level * request.chunks * LAYERS);
        request.outcome(request.begins, lands, request.chunks, levels)
    }

    /// Everything is computed.
    pub(super) fn text(request: &Request) -> Outcome {
        request.outcome(request.begins, std::iter::empty(), 0, 0.0)
    }

    /// All requests, one after the other, by CacheGen's rule (arXiv 2310.07240 §5.3): chunk
    /// by chunk, of 1.5 thousand tokens, the least lossy level at which all chunks to come
    /// would meet the deadline at the throughput of the chunk before; if there is none, the
    /// chunk is computed from its text. A medium level where no throughput is known.
    /// To its credit, it knows all sizes and how long the question takes.
    pub(super) fn cachegen(&self) -> Vec<Outcome> {
        let mut throughput = None;
        let run = |request| self.by_cachegen(request, &mut throughput);
        self.requests.iter().map(run).collect()
    }

    fn by_cachegen(&self, request: &Request, throughput: &mut Option<f64>) -> Outcome {
        let question = request.compute(request.chunks);
        let mut now = request.begins;
        let mut computed = request.begins;
        let mut levels = 0.0;
        let mut first = 0;
        while first < request.chunks {
            let end = request.chunks.min(first + CACHEGEN_CHUNKS);
            let bytes = |chunks: std::ops::Range<usize>, level: usize| {
                let layers = request.sizes[chunks].iter().flatten();
                layers.flat_map(|parts| &parts[..=level]).sum::<f64>()
            };
            let left = request.begins + request.deadline - question - now;
            let level = match *throughput {
                None => Some(1),
                Some(rate) => (0..PARTS)
                    .rev()
                    .find(|level| bytes(first..request.chunks, *level) / rate <= left),
            };
            if let Some(level) = level {
                let size = bytes(first..end, level);
                let begun = now;
                now = self.comes(request.begins, now, size);
                *throughput = Some(size / (now - begun));
                levels += as_f64(level * (end - first) * LAYERS);
                // The last of its layers is decoded behind it, the others meanwhile.
                computed = f64::max(computed, now + request.decode(end - first));
            } else {
                let tokens = request.compute(first) - request.compute(end);
                computed = computed.max(now) + tokens * request.noise;
                levels += as_f64(FINEST * (end - first) * LAYERS);
            }
            first = end;
        }
        let ttft = now.max(computed) + question * request.noise - request.begins;
        request.judged(ttft, levels)
    }

    /// The best mean level at which the request is in time, by who knows trace and noise.
    /// None where there is none.
    pub(super) fn oracle(&self, request: &Request) -> Option<Outcome> {
        let begins = request.begins;
        let begun = self.trace.until(begins + self.round_trip);
        // By layer and part: of one chunk, in the mean.
        let mean = |layer: usize, part: usize| {
            let sizes = request.sizes.iter().map(|chunk| chunk[layer][part]);
            sizes.sum::<f64>() / as_f64(request.chunks)
        };
        let sizes: Vec<[f64; PARTS]> = (0..LAYERS)
            .map(|layer| std::array::from_fn(|part| mean(layer, part)))
            .collect();
        let levels = (0..=request.chunks).filter_map(|chunks| {
            let work = request.work(chunks);
            let due = |layer| begins + request.deadline - as_f64(LAYERS - layer) * work;
            if due(0) < begins {
                return None;
            }
            // Bytes that can still come before each layer is due.
            let mut asked = 0.0;
            let mut room: Vec<f64> = (0..LAYERS)
                .map(|layer| {
                    asked += sizes[layer][0] * as_f64(chunks);
                    (self.trace.until(due(layer)) - begun).max(0.0) - asked
                })
                .collect();
            if chunks > 0 && room.iter().any(|room| *room < 0.0) {
                return None;
            }
            let mut taken = [chunks; LAYERS];
            let mut level = 0.0;
            let refinements = 1..PARTS;
            for part in refinements {
                let mut smallest: Vec<usize> = (0..LAYERS).collect();
                smallest.sort_by(|a, b| sizes[*a][part].total_cmp(&sizes[*b][part]));
                for layer in smallest {
                    let size = sizes[layer][part];
                    let least = room[layer..].iter().copied().fold(f64::INFINITY, f64::min);
                    taken[layer] = taken[layer].min(count(least / size));
                    let took = as_f64(taken[layer]);
                    level += took;
                    room[layer..]
                        .iter_mut()
                        .for_each(|room| *room -= took * size);
                }
            }
            Some(level + as_f64(FINEST * (request.chunks - chunks) * LAYERS))
        });
        let best = levels.max_by(f64::total_cmp)?;
        Some(request.judged(request.deadline, best))
    }
}

impl Request {
    /// What the model says of computing all that follows `chunks` chunks, in seconds.
    fn compute(&self, chunks: usize) -> f64 {
        let from = as_f64(chunks * CHUNK_TOKENS);
        let to = as_f64(self.chunks * CHUNK_TOKENS + QUESTION_TOKENS);
        SECONDS_PER_TOKEN * (to - from) + SECONDS_PER_PAIR * (to * to - from * from) / 2.0
    }

    /// To decode one layer of so many chunks.
    fn decode(&self, chunks: usize) -> f64 {
        as_f64(chunks) * LAYER_BYTES / DECODE[FINEST]
    }

    /// To decode a layer, and to compute what it takes of the rest.
    fn work(&self, chunks: usize) -> f64 {
        self.compute(chunks) / as_f64(LAYERS) * self.noise + self.decode(chunks)
    }

    /// `levels`: summed over what was loaded.
    fn outcome(
        &self,
        begun: f64,
        lands: impl Iterator<Item = f64>,
        chunks: usize,
        levels: f64,
    ) -> Outcome {
        let work = self.work(chunks);
        let mut lands = lands;
        let land = |_| {
            if chunks == 0 {
                begun
            } else {
                lands.next().unwrap_or(begun)
            }
        };
        let ends = (0..LAYERS)
            .map(land)
            .fold(begun, |free, land| free.max(land) + work);
        let computed = as_f64(FINEST * (self.chunks - chunks) * LAYERS);
        self.judged(ends - self.begins, levels + computed)
    }

    /// `levels`: summed over all chunks and layers.
    fn judged(&self, ttft: f64, levels: f64) -> Outcome {
        Outcome {
            ttft,
            level: levels / as_f64(self.chunks * LAYERS),
            in_time: ttft <= self.deadline + 1e-9,
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "bytes of a simulation"
)]
fn whole(value: f64) -> u64 {
    value as u64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "chunks of a prompt, or more"
)]
fn count(value: f64) -> usize {
    value.max(0.0) as usize
}

/// Levels of the simulation: 0, 1 and 2.
pub(super) const PARTS: usize = 3;
const FINEST: usize = PARTS - 1;
/// Of a model of 8 G parameters with 8 KV heads of 128 channels, in 16 bits.
const LAYERS: usize = 32;
const CHUNK_TOKENS: usize = 256;
const LAYER_BYTES: f64 = 1024.0 * 1024.0;
const QUESTION_TOKENS: usize = 64;
/// A prefill of 4,096 tokens takes 0.6 s, of 16,384 tokens 3.3 s.
const SECONDS_PER_TOKEN: f64 = 1.2e-4;
const SECONDS_PER_PAIR: f64 = 1e-8;
/// Bits a value of each part, of 16 (docs/measurements.md).
const BITS: [f64; PARTS] = [0.82, 1.39, 1.47];
/// Bytes of raw KV a second, by parts: eight cores (docs/measurements.md).
const DECODE: [f64; PARTS] = [8.0 * 5.57e9, 8.0 * 3.36e9, 8.0 * 2.41e9];
/// Bytes a second: 0.2 to 4 Gbit/s.
const SLOWEST: f64 = 25e6;
const FASTEST: f64 = 500e6;
const CONTEXTS: [usize; 3] = [4096, 8192, 16_384];
/// Seconds.
const DEADLINES: [f64; 3] = [0.5, 1.0, 2.0];
/// Seconds from one request to the next.
const PERIOD: f64 = 5.0;
/// 1,536 tokens.
const CACHEGEN_CHUNKS: usize = 6;
/// Seconds over which forecasts are compared with what was to come.
pub(super) const HORIZON: f64 = 0.2;
