//! The engine thread.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_plugin::{CachePlugin, CaptureOutcome, ChunkCopy, EngineBackend as _, LayerWait};
use kvasir_types::{Hints, LayerIdx};
use metrics::gauge;

use crate::blend::end_rows;
use crate::cache::PoolBackend;
use crate::kernels::Threads;
use crate::kv::{BLOCK_TOKENS, KvPool};
use crate::metrics::{FREE_BLOCKS, RUNNING, WAITING};
use crate::model::{
    BeforeLayer, ForwardError, Logits, LogitsWanted, Model, Positions, Scratch, Step,
};

use super::blending::Blender;
use super::sequence::{Phase, Progress, Sequence};
use super::{EngineConfig, Submission};

/// Longest pause between looks at new requests while a fetch is awaited.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// Share of a batch that decoding leaves to waiting prefill: one in this many tokens.
const PREFILL_SHARE: usize = 4;

/// Shortest prefill whose time says something about the next one.
const MIN_OBSERVED_TOKENS: usize = 32;

/// Prefill lengths measured at start, shortest first, and the time after which no
/// longer one is tried.
const CALIBRATION_TOKENS: [usize; 3] = [64, 128, 512];
const CALIBRATION_TIME: Duration = Duration::from_millis(300);

pub(super) struct EngineLoop {
    pub(super) model: Arc<Model>,
    pub(super) pool: KvPool,
    pub(super) scratch: Scratch,
    pub(super) batch_tokens: usize,
    pub(super) plugin: Option<CachePlugin>,
    pub(super) blender: Option<Blender>,
    submissions: Receiver<Submission>,
    /// Requests sent but not admitted, shared with the handles.
    pub(super) waiting_count: Arc<AtomicUsize>,
    waiting: VecDeque<Submission>,
    pub(super) running: Vec<Sequence>,
    next_seed: u64,
    /// Where decoding starts when not every sequence fits a batch.
    decode_turn: usize,
}

/// Rows of one sequence in the next batch.
pub(super) struct Planned {
    pub(super) sequence: usize,
    from: usize,
    to: usize,
    wants_logits: bool,
    /// Of a sequence that blends: those of the positions `from..to` that are computed.
    rows: Option<(Vec<u32>, Vec<usize>)>,
}

impl Planned {
    fn rows(&self) -> usize {
        match &self.rows {
            Some((tokens, _)) => tokens.len(),
            None => self.to - self.from,
        }
    }
}

impl EngineLoop {
    pub(super) fn new(
        model: Arc<Model>,
        pool: KvPool,
        config: &EngineConfig,
        threads: Threads,
        plugin: Option<CachePlugin>,
        submissions: Receiver<Submission>,
        waiting_count: Arc<AtomicUsize>,
    ) -> Self {
        Self {
            blender: config
                .blend
                .clone()
                .filter(|_| plugin.is_some())
                .map(|blend| Blender::new(blend, model.config())),
            scratch: Scratch::new(threads),
            batch_tokens: config.batch_tokens.max(BLOCK_TOKENS),
            model,
            pool,
            plugin,
            submissions,
            waiting_count,
            waiting: VecDeque::new(),
            running: Vec::new(),
            next_seed: 0,
            decode_turn: 0,
        }
    }

    /// Runs a few prefills on pages nobody uses yet, so that the cost model starts
    /// from measured times and the first request finds warm memory.
    pub(super) fn calibrate(&mut self) {
        let started = Instant::now();
        for tokens in CALIBRATION_TOKENS {
            let room = self.pool.layer_blocks() * BLOCK_TOKENS;
            let tokens = tokens.min(room).min(self.model.config().max_positions);
            let Some(blocks) = self.take_blocks(tokens.div_ceil(BLOCK_TOKENS)) else {
                return;
            };
            let prompt = vec![0u32; tokens];
            let step = Step {
                tokens: &prompt,
                positions: Positions::From(0),
                blocks: &blocks,
                logits: LogitsWanted::Last,
            };
            // The first run of a shape also pays for fresh buffers.
            for observed in [false, true] {
                let start = Instant::now();
                let outcome =
                    self.model
                        .forward(&mut self.pool, &mut self.scratch, &[step], &mut |_| {
                            ControlFlow::Continue(())
                        });
                if let Err(error) = outcome {
                    tracing::error!(%error, "calibration failed");
                    break;
                }
                if let (true, Some(plugin)) = (observed, &self.plugin) {
                    plugin.observe_prefill(0, tokens, start.elapsed());
                }
            }
            self.give_back(&blocks);
            if started.elapsed() > CALIBRATION_TIME {
                return;
            }
        }
    }

    pub(super) fn run(&mut self) {
        while self.receive() {
            self.cancel();
            self.admit();
            self.land();
            self.start_gathers();
            self.land_chunks();
            if !self.run_batch() {
                self.await_fetch();
                self.await_chunks();
            }
            self.capture();
            self.compile();
            self.gauge();
        }
    }

    /// Takes what was submitted; waits when there is nothing else to do. False when
    /// all handles are gone and all work is done.
    fn receive(&mut self) -> bool {
        let idle = self.running.is_empty() && self.waiting.is_empty();
        let compiles = self
            .blender
            .as_ref()
            .is_some_and(|it| !it.compiler.is_idle());
        if idle && !compiles {
            self.gauge();
            match self.submissions.recv() {
                Ok(submission) => self.waiting.push_back(submission),
                Err(_) => return false,
            }
        }
        loop {
            match self.submissions.try_recv() {
                Ok(submission) => self.waiting.push_back(submission),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => {
                    return !(self.running.is_empty() && self.waiting.is_empty());
                }
            }
        }
    }

    fn admit(&mut self) {
        while let Some(submission) = self.waiting.front() {
            let prompt_tokens = submission.request.prompt.len();
            let limit = (self.pool.layer_blocks() * BLOCK_TOKENS)
                .min(self.model.config().max_positions)
                .min(prompt_tokens.saturating_add(submission.request.max_tokens));
            let Some(blocks) = self.take_blocks(limit.div_ceil(BLOCK_TOKENS)) else {
                return;
            };
            let Some(submission) = self.waiting.pop_front() else {
                return;
            };
            self.waiting_count.fetch_sub(1, Ordering::AcqRel);
            self.next_seed += 1;
            let mut sequence = Sequence::new(submission, blocks, limit, self.next_seed);
            if let (Some(plugin), Some(prompt), true) =
                (&self.plugin, &sequence.prompt, sequence.reads_cache())
            {
                sequence.phase = Phase::Fetching(plugin.prefetch(prompt));
            }
            self.running.push(sequence);
        }
    }

    /// Lands what the cache has delivered, without waiting.
    fn land(&mut self) {
        let Some(plugin) = &self.plugin else { return };
        let layout = plugin.namespace().layout();
        for sequence in &mut self.running {
            if let Phase::Fetching(prefetch) = &mut sequence.phase {
                let mut backend = PoolBackend::new(&mut self.pool, layout);
                let outcome = prefetch.poll(&mut backend, &sequence.blocks);
                sequence.settle(outcome);
            }
        }
    }

    /// Drops requests and sequences that nobody listens to any more.
    fn cancel(&mut self) {
        let before = self.waiting.len();
        self.waiting
            .retain(|submission| !submission.events.is_closed());
        let left = before - self.waiting.len();
        self.waiting_count.fetch_sub(left, Ordering::AcqRel);
        for index in (0..self.running.len()).rev() {
            let sequence = &self.running[index];
            if sequence.is_cancelled() && !matches!(sequence.phase, Phase::Draining) {
                self.end(index);
            }
        }
    }

    /// Runs one batch; false when no sequence could run.
    fn run_batch(&mut self) -> bool {
        let plan = self.plan();
        if plan.is_empty() {
            return self.run_behind_fetch() || self.run_behind_gather();
        }
        let started = Instant::now();
        let outcome = self.forward(&plan, &mut |_| ControlFlow::Continue(()));
        match outcome {
            Ok(logits) => {
                if let ([step], Some(plugin)) = (plan.as_slice(), &self.plugin)
                    && step.rows.is_none()
                    && step.to - step.from >= MIN_OBSERVED_TOKENS
                {
                    plugin.observe_prefill(step.from, step.to, started.elapsed());
                }
                self.apply(&plan, &logits);
            }
            Err(error) => self.fail(&plan, &error),
        }
        true
    }

    /// The rows of the next batch: a token of every decoding sequence, then prefill in
    /// the order of arrival. When not all fit, decoding takes turns and leaves prefill
    /// its share.
    fn plan(&mut self) -> Vec<Planned> {
        let is_prefill =
            |sequence: &Sequence| matches!(sequence.phase, Phase::Prefill | Phase::Blending(_));
        let reserved = if self.running.iter().any(is_prefill) {
            self.batch_tokens / PREFILL_SHARE
        } else {
            0
        };
        let count = self.running.len();
        let mut plan = Vec::new();
        for turn in 0..count {
            if plan.len() == self.batch_tokens - reserved {
                self.decode_turn = (self.decode_turn + turn) % count;
                break;
            }
            let index = (self.decode_turn + turn) % count;
            let sequence = &self.running[index];
            if matches!(sequence.phase, Phase::Decode) {
                plan.push(Planned {
                    sequence: index,
                    from: sequence.position,
                    to: sequence.position + 1,
                    wants_logits: true,
                    rows: None,
                });
            }
        }
        let mut room = self.batch_tokens - plan.len();
        for (index, sequence) in self.running.iter().enumerate() {
            if is_prefill(sequence) && room > 0 {
                let planned = self.planned(index, room);
                room -= planned.rows();
                plan.push(planned);
            }
        }
        plan
    }

    /// The next rows of a sequence's prompt, `room` at most.
    pub(super) fn planned(&self, index: usize, room: usize) -> Planned {
        let sequence = &self.running[index];
        let (from, end) = (sequence.position, sequence.prompt_tokens);
        let (to, rows) = match &sequence.phase {
            Phase::Blending(selection) => {
                let selected = |&position: &usize| selection.layers[position] > 0;
                let mut positions: Vec<usize> = (from..end).filter(selected).collect();
                positions.truncate(room);
                let tokens = positions.iter().map(|&position| sequence.tokens[position]);
                let to = positions.last().map_or(end, |&last| last + 1);
                (to, Some((tokens.collect(), positions)))
            }
            _ => (end.min(from + room), None),
        };
        Planned {
            sequence: index,
            from,
            to,
            wants_logits: to == end,
            rows,
        }
    }

    /// Whether a request waits for its first token.
    pub(super) fn is_prefilling(&self) -> bool {
        let waits =
            |sequence: &Sequence| !matches!(sequence.phase, Phase::Decode | Phase::Draining);
        !self.waiting.is_empty() || self.running.iter().any(waits)
    }

    pub(super) fn forward(
        &mut self,
        plan: &[Planned],
        before_layer: &mut (dyn FnMut(BeforeLayer<'_>) -> ControlFlow<()> + Send),
    ) -> Result<Logits, ForwardError> {
        let steps: Vec<Step<'_>> = plan
            .iter()
            .map(|planned| {
                let sequence = &self.running[planned.sequence];
                let (tokens, positions) = match &planned.rows {
                    Some((tokens, positions)) => (&tokens[..], Positions::At(positions)),
                    None => {
                        let tokens = &sequence.tokens[planned.from..planned.to];
                        (tokens, Positions::From(planned.from))
                    }
                };
                Step {
                    tokens,
                    positions,
                    blocks: &sequence.blocks,
                    logits: if planned.wants_logits {
                        LogitsWanted::Last
                    } else {
                        LogitsWanted::None
                    },
                }
            })
            .collect();
        let running = &self.running;
        self.model
            .forward(&mut self.pool, &mut self.scratch, &steps, &mut |before| {
                let layer = u16::try_from(before.layer).unwrap_or(u16::MAX);
                for (planned, rows) in plan.iter().zip(before.steps) {
                    if let Phase::Blending(selection) = &running[planned.sequence].phase {
                        let positions = before.positions;
                        end_rows(before.fates, positions, rows, layer, selection);
                    }
                }
                before_layer(before)
            })
    }

    pub(super) fn apply(&mut self, plan: &[Planned], logits: &Logits) {
        let mut ended = Vec::new();
        for (row, planned) in plan.iter().enumerate() {
            let sequence = &mut self.running[planned.sequence];
            sequence.position = planned.to;
            if let Some(logits) = logits.last(row)
                && sequence.advance(logits) == Progress::Ends
            {
                ended.push(planned.sequence);
            }
        }
        self.end_all(ended);
    }

    pub(super) fn end_all(&mut self, mut sequences: Vec<usize>) {
        sequences.sort_unstable();
        for index in sequences.into_iter().rev() {
            self.end(index);
        }
    }

    /// Runs the rest of the one fetched sequence behind its fetch, layer by layer.
    /// False when there is no such sequence, or not only one.
    fn run_behind_fetch(&mut self) -> bool {
        let Some(plugin) = self.plugin.clone() else {
            return false;
        };
        let layout = plugin.namespace().layout();
        let mut fetching = self
            .running
            .iter_mut()
            .enumerate()
            .filter(|(_, sequence)| matches!(sequence.phase, Phase::Fetching(_)));
        let (Some((index, sequence)), None) = (fetching.next(), fetching.next()) else {
            return false;
        };
        let Phase::Fetching(prefetch) = &sequence.phase else {
            return false;
        };
        let Some(prompt) = &sequence.prompt else {
            return false;
        };
        let chunks = prefetch.target();
        // Requests that wait for pages have waited for this sequence already.
        if chunks == 0 || self.waiting_count.load(Ordering::Acquire) > 0 {
            return false;
        }
        let from = prompt.resume_at(chunks);
        // What is behind it is gathered, not computed.
        let reusable = sequence.segmented.as_ref();
        if reusable.is_some_and(|segmented| segmented.begins_behind(from)) {
            return false;
        }
        let to = sequence.prompt_tokens.min(from + self.batch_tokens);
        let plan = [Planned {
            sequence: index,
            from,
            to,
            wants_logits: to == sequence.prompt_tokens,
            rows: None,
        }];
        // The fetch lands layers into the pages while the forward pass reads them,
        // layer by layer, on this thread: take it out of the sequence meanwhile.
        let Phase::Fetching(mut prefetch) = std::mem::replace(&mut sequence.phase, Phase::Prefill)
        else {
            return false;
        };
        let blocks = sequence.blocks.clone();
        let (events, waiting) = (sequence.events(), Arc::clone(&self.waiting_count));
        let outcome = self.forward(&plan, &mut |before| {
            let layer = LayerIdx(u16::try_from(before.layer).unwrap_or(u16::MAX));
            let mut backend = PoolBackend::new(before.pool, layout);
            loop {
                match prefetch.wait_layer(chunks, layer, LOOK_INTERVAL, &mut backend, &blocks) {
                    LayerWait::Landed => return ControlFlow::Continue(()),
                    LayerWait::Short => return ControlFlow::Break(()),
                    // Whoever came meanwhile must not wait for this fetch.
                    LayerWait::Pending
                        if waiting.load(Ordering::Acquire) > 0 || events.is_closed() =>
                    {
                        return ControlFlow::Break(());
                    }
                    LayerWait::Pending => {}
                }
            }
        });
        let mut backend = PoolBackend::new(&mut self.pool, layout);
        let fetched = prefetch.poll(&mut backend, &blocks);
        if outcome.is_ok() && to == self.running[index].prompt_tokens {
            prefetch.answered(Instant::now());
        }
        let sequence = &mut self.running[index];
        sequence.phase = Phase::Fetching(prefetch);
        sequence.settle(fetched);
        match outcome {
            Ok(logits) => self.apply(&plan, &logits),
            // The prefix fell short, and the rest is computed; or somebody came, and
            // the layers that have landed stay.
            Err(ForwardError::Stopped) => {}
            Err(error) => self.fail(&plan, &error),
        }
        true
    }

    /// Nothing could run: waits a moment for one of the fetches.
    fn await_fetch(&mut self) {
        let Some(plugin) = &self.plugin else { return };
        let layout = plugin.namespace().layout();
        let fetching = self
            .running
            .iter_mut()
            .find(|sequence| matches!(sequence.phase, Phase::Fetching(_)));
        if let Some(sequence) = fetching
            && let Phase::Fetching(prefetch) = &mut sequence.phase
        {
            let mut backend = PoolBackend::new(&mut self.pool, layout);
            let outcome = prefetch.wait(LOOK_INTERVAL, &mut backend, &sequence.blocks);
            sequence.settle(outcome);
        }
    }

    /// Copies chunks out of the pages for the cache, of sequences whose first token is
    /// out: one a turn, so that decoding goes on, or all of a finished sequence when
    /// others wait for its pages. Ends sequences that only waited for this.
    fn capture(&mut self) {
        let Some(plugin) = self.plugin.clone() else {
            return;
        };
        loop {
            let of_phase = |wanted: fn(&Phase) -> bool| {
                self.running
                    .iter()
                    .position(|sequence| wanted(&sequence.phase) && !sequence.capture.is_empty())
            };
            let draining = of_phase(|phase| matches!(phase, Phase::Draining));
            let Some(index) = draining.or_else(|| of_phase(|phase| matches!(phase, Phase::Decode)))
            else {
                return;
            };
            self.capture_chunk(&plugin, index);
            let sequence = &self.running[index];
            if draining.is_some() && sequence.capture.is_empty() {
                let sequence = self.running.remove(index);
                self.give_back(&sequence.blocks);
            }
            if draining.is_none() || self.waiting.is_empty() {
                return;
            }
        }
    }

    /// Copies the next chunk of a sequence, or gives up all of them for lack of room.
    fn capture_chunk(&mut self, plugin: &CachePlugin, index: usize) {
        let layout = *plugin.namespace().layout();
        let sequence = &mut self.running[index];
        let chunk = sequence.capture.start;
        if !plugin.has_capture_room(layout.chunk_bytes()) {
            plugin.note_dropped_captures(sequence.capture.len());
            sequence.capture = 0..0;
            return;
        }
        sequence.capture.start += 1;
        let Some(prompt) = &sequence.prompt else {
            return;
        };
        let first = chunk * prompt.chunk_tokens();
        let layers: Result<Vec<Bytes>, _> = (0..layout.layers())
            .map(|layer| {
                let mut payload = vec![0u8; layout.layer_bytes()];
                let tokens = prompt.chunk_tokens();
                // Faster together; what cannot be brought is read one by one.
                let one = usize::from(layer);
                let brought = self
                    .pool
                    .bring(&sequence.blocks, first, tokens, one..one + 1);
                if let Err(error) = brought {
                    tracing::debug!(%error, chunk, "a chunk is read page by page");
                }
                PoolBackend::new(&mut self.pool, &layout)
                    .read_layer(&sequence.blocks, chunk, LayerIdx(layer), &mut payload)
                    .map(|()| Bytes::from(payload))
            })
            .collect();
        match layers {
            Ok(layers) => {
                let keys = prompt.keys();
                let key = keys[chunk];
                let hints = Hints {
                    parent: chunk.checked_sub(1).map(|before| keys[before]),
                    ..Hints::default()
                };
                let copy = ChunkCopy {
                    key,
                    layout,
                    start: first as u64,
                    layers,
                    hints,
                };
                if plugin.capture(copy) == CaptureOutcome::Dropped {
                    tracing::debug!(%key, "a chunk was not captured: too many wait");
                }
            }
            Err(error) => tracing::error!(%error, chunk, "a chunk could not be copied"),
        }
    }

    /// Ends a sequence; its pages stay while chunks of its prompt are to be captured.
    fn end(&mut self, index: usize) {
        let sequence = &mut self.running[index];
        // Only what is in the pages can be captured.
        if let Some(prompt) = &sequence.prompt {
            let whole = sequence.position / prompt.chunk_tokens();
            sequence.capture.end = sequence.capture.end.min(whole);
        }
        let loads = matches!(sequence.phase, Phase::Fetching(_) | Phase::Gathering(_));
        if sequence.capture.is_empty() || loads {
            let sequence = self.running.remove(index);
            self.give_back(&sequence.blocks);
        } else {
            sequence.phase = Phase::Draining;
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "gauges are f64")]
    fn gauge(&self) {
        gauge!(RUNNING).set(self.running.len() as f64);
        gauge!(WAITING).set(self.waiting.len() as f64);
        gauge!(FREE_BLOCKS).set(self.pool.free_blocks() as f64);
    }
}
