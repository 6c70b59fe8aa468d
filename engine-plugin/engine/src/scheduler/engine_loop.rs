//! The engine thread.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_plugin::{CachePlugin, CaptureOutcome, ChunkCopy};
use kvasir_types::LayerIdx;
use metrics::gauge;

use crate::cache::PoolBackend;
use crate::kernels::Threads;
use crate::kv::{BLOCK_TOKENS, BlockId, KvPool};
use crate::metrics::{FREE_BLOCKS, RUNNING, WAITING};
use crate::model::{ForwardError, LogitsWanted, Model, Scratch, Step};
use crate::request::RequestError;

use super::sequence::{Phase, Progress, Sequence};
use super::{EngineConfig, Submission};

/// Longest pause between looks at new requests while a fetch is awaited.
const FETCH_PATIENCE: Duration = Duration::from_micros(500);

/// Shortest prefill whose time says something about the next one.
const MIN_OBSERVED_TOKENS: usize = 32;

/// Prefill lengths measured at start, shortest first, and the time after which no
/// longer one is tried.
const CALIBRATION_TOKENS: [usize; 3] = [64, 128, 512];
const CALIBRATION_TIME: Duration = Duration::from_millis(300);

pub(super) struct EngineLoop {
    model: Arc<Model>,
    pool: KvPool,
    scratch: Scratch,
    batch_tokens: usize,
    plugin: Option<CachePlugin>,
    submissions: Receiver<Submission>,
    /// Requests sent but not admitted, shared with the handles.
    waiting_count: Arc<AtomicUsize>,
    waiting: VecDeque<Submission>,
    running: Vec<Sequence>,
    next_seed: u64,
}

/// One row range of the next batch.
struct Planned {
    sequence: usize,
    from: usize,
    to: usize,
    wants_logits: bool,
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
        }
    }

    /// Runs a few prefills on pages nobody uses yet, so that the cost model starts
    /// from measured times and the first request finds warm memory.
    pub(super) fn calibrate(&mut self) {
        let started = Instant::now();
        for tokens in CALIBRATION_TOKENS {
            let room = self.pool.blocks() * BLOCK_TOKENS;
            let tokens = tokens.min(room).min(self.model.config().max_positions);
            let Some(blocks) = self.take_blocks(tokens.div_ceil(BLOCK_TOKENS)) else {
                return;
            };
            let prompt = vec![0u32; tokens];
            let step = Step {
                tokens: &prompt,
                position: 0,
                blocks: &blocks,
                logits: LogitsWanted::Last,
            };
            // The first run of a shape also pays for fresh buffers.
            for observed in [false, true] {
                let start = Instant::now();
                let outcome =
                    self.model
                        .forward(&mut self.pool, &mut self.scratch, &[step], &mut |_, _| {
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
            self.admit();
            self.land();
            self.cancel();
            if !self.run_batch() {
                self.await_fetch();
            }
            self.capture_one();
            self.gauge();
        }
    }

    /// Takes what was submitted; waits when there is nothing else to do. False when
    /// all handles are gone and all work is done.
    fn receive(&mut self) -> bool {
        let idle = self.running.is_empty() && self.waiting.is_empty();
        if idle {
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
            let limit = (self.pool.blocks() * BLOCK_TOKENS)
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

    fn cancel(&mut self) {
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
            return self.run_behind_fetch();
        }
        let started = Instant::now();
        let outcome = self.forward(&plan, &mut |_, _| ControlFlow::Continue(()));
        match outcome {
            Ok(logits) => {
                if let ([step], Some(plugin)) = (plan.as_slice(), &self.plugin)
                    && step.to - step.from >= MIN_OBSERVED_TOKENS
                {
                    plugin.observe_prefill(step.from, step.to, started.elapsed());
                }
                self.apply(&plan, &logits);
            }
            Err(error) => self.fail_all(&plan, &error),
        }
        true
    }

    /// The rows of the next batch: every decoding sequence's token, then prefill in
    /// the order of arrival.
    fn plan(&self) -> Vec<Planned> {
        let mut plan = Vec::new();
        let mut room = self.batch_tokens;
        for (index, sequence) in self.running.iter().enumerate() {
            if matches!(sequence.phase, Phase::Decode) && room > 0 {
                room -= 1;
                plan.push(Planned {
                    sequence: index,
                    from: sequence.position,
                    to: sequence.position + 1,
                    wants_logits: true,
                });
            }
        }
        for (index, sequence) in self.running.iter().enumerate() {
            if matches!(sequence.phase, Phase::Prefill) && room > 0 {
                let to = sequence.prompt_tokens.min(sequence.position + room);
                room -= to - sequence.position;
                plan.push(Planned {
                    sequence: index,
                    from: sequence.position,
                    to,
                    wants_logits: to == sequence.prompt_tokens,
                });
            }
        }
        plan
    }

    fn forward(
        &mut self,
        plan: &[Planned],
        before_layer: &mut (dyn FnMut(usize, &mut KvPool) -> ControlFlow<()> + Send),
    ) -> Result<Vec<Option<Vec<f32>>>, ForwardError> {
        let steps: Vec<Step<'_>> = plan
            .iter()
            .map(|planned| {
                let sequence = &self.running[planned.sequence];
                Step {
                    tokens: &sequence.tokens[planned.from..planned.to],
                    position: planned.from,
                    blocks: &sequence.blocks,
                    logits: if planned.wants_logits {
                        LogitsWanted::Last
                    } else {
                        LogitsWanted::None
                    },
                }
            })
            .collect();
        let logits = self
            .model
            .forward(&mut self.pool, &mut self.scratch, &steps, before_layer)?;
        Ok((0..plan.len())
            .map(|index| logits.last(index).map(<[f32]>::to_vec))
            .collect())
    }

    fn apply(&mut self, plan: &[Planned], logits: &[Option<Vec<f32>>]) {
        let mut ended = Vec::new();
        for (planned, logits) in plan.iter().zip(logits) {
            let sequence = &mut self.running[planned.sequence];
            sequence.position = planned.to;
            if let Some(logits) = logits
                && sequence.advance(logits) == Progress::Ends
            {
                ended.push(planned.sequence);
            }
        }
        ended.sort_unstable();
        for index in ended.into_iter().rev() {
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
        if prefetch.target() == 0 {
            return false;
        }
        let from = prompt.resume_at(prefetch.target());
        let to = sequence.prompt_tokens.min(from + self.batch_tokens);
        let plan = [Planned {
            sequence: index,
            from,
            to,
            wants_logits: to == sequence.prompt_tokens,
        }];
        // The fetch lands layers into the pages while the forward pass reads them,
        // layer by layer, on this thread: take it out of the sequence meanwhile.
        let Phase::Fetching(mut prefetch) = std::mem::replace(&mut sequence.phase, Phase::Prefill)
        else {
            return false;
        };
        let blocks = sequence.blocks.clone();
        let outcome = self.forward(&plan, &mut |layer, pool| {
            let layer = LayerIdx(u16::try_from(layer).unwrap_or(u16::MAX));
            let mut backend = PoolBackend::new(pool, layout);
            match prefetch.wait_layer(layer, &mut backend, &blocks) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        });
        let mut backend = PoolBackend::new(&mut self.pool, layout);
        let fetched = prefetch.poll(&mut backend, &blocks);
        let sequence = &mut self.running[index];
        sequence.phase = Phase::Fetching(prefetch);
        sequence.settle(fetched);
        match outcome {
            Ok(logits) => self.apply(&plan, &logits),
            // The prefix fell short: what is whole stays, the rest is computed.
            Err(ForwardError::Stopped) => {}
            Err(error) => self.fail_all(&plan, &error),
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
            let outcome = prefetch.wait(FETCH_PATIENCE, &mut backend, &sequence.blocks);
            sequence.settle(outcome);
        }
    }

    /// Copies one chunk out of the pages for the cache, of a sequence whose first
    /// token is out; ends sequences that only waited for this.
    fn capture_one(&mut self) {
        let Some(plugin) = self.plugin.clone() else {
            return;
        };
        let ready = |sequence: &Sequence| {
            matches!(sequence.phase, Phase::Decode | Phase::Draining)
                && !sequence.capture.is_empty()
        };
        let Some(index) = self.running.iter().position(ready) else {
            return;
        };
        let layout = *plugin.namespace().layout();
        let sequence = &mut self.running[index];
        let chunk = sequence.capture.start;
        sequence.capture.start += 1;
        let draining = matches!(sequence.phase, Phase::Draining);
        let done = draining && sequence.capture.is_empty();
        if let Some(prompt) = &sequence.prompt
            && plugin.has_capture_room(layout.chunk_bytes())
        {
            let backend = PoolBackend::new(&mut self.pool, &layout);
            let layers: Result<Vec<Bytes>, _> = (0..layout.layers())
                .map(|layer| {
                    let mut payload = vec![0u8; layout.layer_bytes()];
                    kvasir_plugin::EngineBackend::read_layer(
                        &backend,
                        &sequence.blocks,
                        chunk,
                        LayerIdx(layer),
                        &mut payload,
                    )
                    .map(|()| Bytes::from(payload))
                })
                .collect();
            match layers {
                Ok(layers) => {
                    let key = prompt.keys()[chunk];
                    if plugin.capture(ChunkCopy { key, layers }) == CaptureOutcome::Dropped {
                        tracing::debug!(%key, "a chunk was not captured: too many wait");
                    }
                }
                Err(error) => tracing::error!(%error, chunk, "a chunk could not be copied"),
            }
        } else {
            plugin.note_dropped_capture();
        }
        if done {
            let sequence = self.running.swap_remove(index);
            self.give_back(&sequence.blocks);
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
        if sequence.capture.is_empty() || matches!(sequence.phase, Phase::Fetching(_)) {
            let sequence = self.running.swap_remove(index);
            self.give_back(&sequence.blocks);
        } else {
            sequence.phase = Phase::Draining;
        }
    }

    fn fail_all(&mut self, plan: &[Planned], error: &ForwardError) {
        tracing::error!(%error, "a batch failed");
        let mut failed: Vec<usize> = plan.iter().map(|planned| planned.sequence).collect();
        failed.sort_unstable();
        for index in failed.into_iter().rev() {
            self.running[index].fail(RequestError::Internal);
            self.running[index].capture = 0..0;
            self.end(index);
        }
    }

    fn take_blocks(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if self.pool.free_blocks() < count {
            return None;
        }
        (0..count).map(|_| self.pool.alloc()).collect()
    }

    fn give_back(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            if let Err(error) = self.pool.free(block) {
                tracing::error!(%error, "a page was given back twice");
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "gauges are f64")]
    fn gauge(&self) {
        gauge!(RUNNING).set(self.running.len() as f64);
        gauge!(WAITING).set(self.waiting.len() as f64);
        gauge!(FREE_BLOCKS).set(self.pool.free_blocks() as f64);
    }
}
