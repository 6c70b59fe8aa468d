//! The engine thread.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use kvasir_plugin::CachePlugin;
use metrics::gauge;

use crate::kernels::Threads;
use crate::kv::{BLOCK_TOKENS, KvPool};
use crate::metrics::{FREE_BLOCKS, RUNNING, WAITING};
use crate::model::{LogitsWanted, Model, Positions, Scratch, Step};

use super::blending::Blender;
use super::pages::Paged;
use super::parking::Turn;
use super::sequence::{Phase, Sequence};
use super::{EngineConfig, Submission};

/// Longest pause between looks at new requests while a fetch is awaited.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(1);

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
    pub(super) waiting: VecDeque<Submission>,
    pub(super) running: Vec<Sequence>,
    next_seed: u64,
    /// Where not all KV is in memory.
    pub(super) paged: Option<Paged>,
    /// Most tokens of a sequence.
    pub(super) sequence_tokens: usize,
    /// Where decoding starts when not every sequence fits a batch.
    pub(super) decode_turn: usize,
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
        let sequence_tokens = config.sequence_tokens(model.config(), &pool);
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
            paged: None,
            sequence_tokens,
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
            let limit = self
                .sequence_tokens
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
            if let Some(paged) = &self.paged {
                sequence.turn = Turn::waiting(paged.now);
                sequence.choice = self.choice(limit);
            }
            if let (Some(plugin), Some(prompt), true) =
                (&self.plugin, &sequence.prompt, sequence.reads_cache())
            {
                sequence.phase = Phase::Fetching(plugin.prefetch(prompt));
            }
            self.running.push(sequence);
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

    #[expect(clippy::cast_precision_loss, reason = "gauges are f64")]
    fn gauge(&mut self) {
        self.show_paging();
        gauge!(RUNNING).set(self.running.len() as f64);
        gauge!(WAITING).set(self.waiting.len() as f64);
        gauge!(FREE_BLOCKS).set(self.pool.free_blocks() as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures;
    use super::*;

    /// A sequence that nobody listens to any more gives back its pages, be they in memory or
    /// parked.
    #[test]
    fn cancelled_sequences_give_back_their_pages() {
        let (mut engine, commands, _file) = fixtures::engine(16, Duration::from_secs(10));
        for is_parked in [false, true] {
            let (submission, events) = fixtures::submission(40);
            engine.waiting_count.fetch_add(1, Ordering::AcqRel);
            commands.send(submission).unwrap();
            assert!(engine.receive());
            engine.admit();
            assert!(engine.run_batch());
            assert_eq!(engine.pool.free_blocks(), fixtures::BLOCKS - 3);
            if is_parked {
                assert!(engine.park(0));
                assert!(engine.running[0].turn.is_parked);
            }
            engine.cancel();
            assert_eq!(engine.running.len(), 1);
            drop(events);
            engine.cancel();
            assert_eq!(engine.running.len(), 0);
            assert_eq!(engine.pool.free_blocks(), fixtures::BLOCKS, "{is_parked}");
        }
    }
}
