//! Sequences whose prefix is being fetched.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvasir_plugin::LayerWait;
use kvasir_types::LayerIdx;

use super::batch::Planned;
use super::engine_loop::{EngineLoop, LOOK_INTERVAL};
use super::sequence::Phase;
use crate::cache::PoolBackend;
use crate::model::ForwardError;

impl EngineLoop {
    /// Lands what the cache has delivered, without waiting.
    pub(super) fn land(&mut self) {
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

    /// Runs the rest of the one fetched sequence behind its fetch, layer by layer.
    /// False when there is no such sequence, or not only one.
    pub(super) fn run_behind_fetch(&mut self) -> bool {
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
    pub(super) fn await_fetch(&mut self) {
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
}
