//! Chunks copied out of the pages for the cache, and the end of sequences.

use bytes::Bytes;
use kvasir_plugin::{CachePlugin, CaptureOutcome, ChunkCopy, EngineBackend as _};
use kvasir_types::{Hints, LayerIdx};

use super::engine_loop::EngineLoop;
use super::sequence::Phase;
use crate::cache::PoolBackend;
use crate::kv::{BLOCK_TOKENS, KvError};

impl EngineLoop {
    /// Copies chunks out of the pages for the cache, of sequences whose first token is
    /// out: one a turn, so that decoding goes on, or all of a finished sequence when
    /// others wait for its pages. Ends sequences that only waited for this.
    pub(super) fn capture(&mut self) {
        let Some(plugin) = self.plugin.clone() else {
            return;
        };
        loop {
            // What is parked would have to be read again: its turn comes.
            let of_phase = |wanted: fn(&Phase) -> bool| {
                self.running.iter().position(|sequence| {
                    wanted(&sequence.phase)
                        && !sequence.capture.is_empty()
                        && !(sequence.turn.is_parked && matches!(sequence.phase, Phase::Decode))
                })
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
        let mut hangs = false;
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
                    hangs |= matches!(error, KvError::Paging(error) if error.is_timeout());
                }
                PoolBackend::new(&mut self.pool, &layout)
                    .read_layer(&sequence.blocks, chunk, LayerIdx(layer), &mut payload)
                    .map(|()| Bytes::from(payload))
            })
            .collect();
        // Others would take for exact what was rounded, or computed over what was.
        let end = (first + prompt.chunk_tokens()).div_ceil(BLOCK_TOKENS);
        if !self.pool.is_exact(&sequence.blocks[..end]) {
            tracing::debug!(chunk, "a chunk is not stored: its pages were rounded");
            sequence.capture = 0..0;
            return;
        }
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
            Err(error) => {
                tracing::error!(%error, chunk, "a chunk could not be copied");
                if hangs {
                    // Each of the others would hold everybody up as well.
                    plugin.note_dropped_captures(sequence.capture.len());
                    sequence.capture = 0..0;
                }
            }
        }
    }

    pub(super) fn end_all(&mut self, mut sequences: Vec<usize>) {
        sequences.sort_unstable();
        for index in sequences.into_iter().rev() {
            self.end(index);
        }
    }

    /// Ends a sequence; its pages stay while chunks of its prompt are to be captured.
    pub(super) fn end(&mut self, index: usize) {
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
}
