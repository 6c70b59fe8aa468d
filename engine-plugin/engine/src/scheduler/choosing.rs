//! Sequences that attend to some of their pages while they decode.

use super::engine_loop::EngineLoop;
use super::pages::PageSelection;
use super::sequence::{Phase, Sequence};
use crate::config::ModelConfig;
use crate::kernels::LANES;
use crate::kv::{BLOCK_TOKENS, BlockId};
use crate::model::{BeforeLayer, Model, Pages};
use crate::paging::{Detail, Digests, GROUP_PAGES, Rule, Selector};

/// What a sequence chooses its pages by.
#[derive(Debug)]
pub(super) struct Choice {
    digests: Digests,
    selector: Selector,
    from_tokens: usize,
    reads_ahead: bool,
    /// What the token before chose in the first layer: this one is expected to choose the same.
    first: Option<Pages>,
}

impl Choice {
    pub(super) fn new(model: &Model, selection: &PageSelection) -> Self {
        let options = selection.options;
        let detail = options.rule.detail().unwrap_or(Detail::Tokens);
        Self {
            digests: Digests::new(model.config(), detail),
            selector: Selector::new(model, options),
            from_tokens: selection.from_tokens,
            reads_ahead: selection.reads_ahead,
            first: None,
        }
    }

    /// Bytes of its digests.
    pub(super) fn bytes(&self) -> usize {
        self.digests.bytes()
    }

    /// Chooses the pages of a step in the layer at hand.
    pub(super) fn choose(&mut self, before: &mut BeforeLayer<'_>, step: usize, blocks: &[BlockId]) {
        let pages = self.selector.choose(before, step, &self.digests, blocks);
        if self.reads_ahead {
            if before.layer == 0 {
                self.first = Some(pages.clone());
            }
            before.expected[step] = match before.next {
                Some(_) => self.selector.foresee(before, step, &self.digests, blocks),
                None => self.first.clone(),
            };
        }
        before.pages[step] = pages;
    }
}

impl PageSelection {
    /// Bytes that digests of a sequence of so many tokens take at most.
    pub fn digest_bytes_of(config: &ModelConfig, tokens: usize) -> usize {
        // Bytes of a page and channel, those of the page's share of its group included.
        const PAGE_BYTES: usize = 4;
        let channels = config.layers * config.kv_heads * config.head_dim.next_multiple_of(LANES);
        (tokens / BLOCK_TOKENS).next_multiple_of(GROUP_PAGES) * PAGE_BYTES * channels
    }
}

impl EngineLoop {
    /// What a sequence chooses by that may grow to `limit` tokens, if it ever will.
    pub(super) fn choice(&self, limit: usize) -> Option<Choice> {
        let selection = self.paged.as_ref()?.selection.as_ref()?;
        (limit > selection.from_tokens).then(|| Choice::new(&self.model, selection))
    }

    /// Digests the pages of a sequence that have become full, which are in memory mostly, as they
    /// have just been written. A sequence whose digests find no room attends to all of its pages.
    pub(super) fn digest(&mut self, index: usize) {
        let Some(selection) = self.paged.as_ref().and_then(|it| it.selection.as_ref()) else {
            return;
        };
        let limit = selection.digest_bytes;
        let sequence = &self.running[index];
        let full = sequence.position / BLOCK_TOKENS;
        let grows = |choice: &Choice| choice.digests.pages() < full;
        if !sequence.choice.as_ref().is_some_and(grows) {
            return;
        }
        let others = self
            .running
            .iter()
            .enumerate()
            .filter(|(it, _)| *it != index);
        let taken: usize = others
            .filter_map(|(_, other)| other.choice.as_ref())
            .map(Choice::bytes)
            .sum();
        let needed = PageSelection::digest_bytes_of(self.model.config(), sequence.position);
        let sequence = &mut self.running[index];
        if taken + needed > limit {
            tracing::info!(
                needed,
                taken,
                limit,
                "no memory for digests: all pages are read"
            );
            sequence.choice = None;
            if let Some(paged) = &mut self.paged {
                paged.stats.undigested += 1;
            }
            return;
        }
        if let Some(choice) = &mut sequence.choice {
            let tokens = sequence.position;
            let grown = choice
                .digests
                .extend(&mut self.pool, &sequence.blocks, tokens);
            if let Err(error) = grown {
                // Whoever attends to the page finds out, and does something about it.
                tracing::debug!(%error, "pages cannot be digested: all are read");
                sequence.choice = None;
            }
        }
    }

    /// Bytes of all digests.
    pub(super) fn digest_bytes(&self) -> usize {
        let choices = self.running.iter().filter_map(|it| it.choice.as_ref());
        choices.map(Choice::bytes).sum()
    }
}

impl Sequence {
    /// Whether its next token chooses pages.
    pub(super) fn chooses(&self) -> bool {
        let covers = |choice: &Choice| {
            self.position >= choice.from_tokens
                && choice.digests.pages() == self.position / BLOCK_TOKENS
        };
        matches!(self.phase, Phase::Decode) && self.choice.as_ref().is_some_and(covers)
    }

    /// What it chooses by, for a batch in which it chooses.
    pub(super) fn take_choice(&mut self) -> Option<Choice> {
        if self.chooses() {
            self.choice.take()
        } else {
            None
        }
    }

    /// Pages of a layer that its next token attends to at most, if it chooses any.
    pub(super) fn chosen_pages(&self) -> Option<usize> {
        let choice = self.choice.as_ref().filter(|_| self.chooses())?;
        let options = choice.selector.options();
        let total = self.position / BLOCK_TOKENS + 1;
        if options.exact_layers > 0 || options.rule == Rule::All {
            return Some(total);
        }
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of the pages of a sequence"
        )]
        let budget = (options.share * total as f32).ceil() as usize;
        // And the page that the token is in.
        Some((budget.max(1) + 1).min(total))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::fixtures;
    use super::*;
    use crate::paging::Options;

    /// A sequence chooses its pages when it decodes, is long enough, and all of its full pages
    /// have digests: by fewer, the others would be read as if they were not full yet.
    #[test]
    fn pages_are_chosen_by_digests_of_all() {
        let (mut engine, _commands, _file) = fixtures::engine(64, Duration::from_secs(10));
        let (mut sequence, _events) = fixtures::decoding(&mut engine);
        let selection = PageSelection {
            options: Options::default(),
            from_tokens: 32,
            reads_ahead: false,
            digest_bytes: usize::MAX,
        };
        sequence.choice = Some(Choice::new(&engine.model, &selection));
        // Position, pages with digests.
        let cases = [
            (40, 0, false),
            (40, 1, false),
            (40, 2, true),
            (47, 2, true),
            (31, 2, false),
            (48, 2, false),
            (48, 3, true),
        ];
        for (position, pages, chooses) in cases {
            sequence.position = position;
            let choice = sequence.choice.as_mut().unwrap();
            let tokens = pages * BLOCK_TOKENS;
            choice
                .digests
                .extend(&mut engine.pool, &sequence.blocks, tokens)
                .unwrap();
            assert_eq!(choice.digests.pages(), pages);
            assert_eq!(sequence.chooses(), chooses, "{position}, {pages}");
            assert_eq!(sequence.chosen_pages().is_some(), chooses);
        }
        sequence.phase = Phase::Prefill;
        assert!(!sequence.chooses());
    }
}
