//! What a serving node computes of a trace.
//!
//! Unit of work and of bytes is one token in one layer, a *row*: KV takes as many bytes in
//! every layer, and computing a token is taken to cost as much in every layer. So work in
//! rows over tokens times layers is the charged budget of
//! [`Selection::charged`](kvasir_plugin::blend::Selection::charged), of the whole prompt.
//!
//! Requests come one after the other, each served before the next comes.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use clap::Args;

use super::share;
use super::store::{Content, Item, Store};
use super::trace::Request;
use super::variants::{Rules, Variants};
use crate::replay::generate::Chains;

/// What prompts, chunks and computing them cost.
#[derive(Clone, Debug, Args)]
pub(crate) struct Costs {
    /// Tokens of a canonical prefix.
    #[arg(long, default_value_t = 128)]
    pub(crate) prefix_tokens: u32,
    /// Tokens of a retrieved chunk.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) chunk_tokens: u32,
    /// Tokens of a prefix chunk.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) block_tokens: u32,
    /// Layers of the model.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) model_layers: u16,
    /// Texts behind which a chunk is computed when it is compiled, to record which of its
    /// tokens depend on what stands before them. 0: nothing is recorded.
    #[arg(long, default_value_t = 1)]
    pub(crate) probes: u16,
    /// Tokens of each of these texts.
    #[arg(long, default_value_t = 64)]
    pub(crate) probe_tokens: u32,
    /// Layers in which that is computed.
    #[arg(long, default_value_t = 4)]
    pub(crate) probe_layers: u16,
    /// Requests at the start that are served, and not counted.
    #[arg(long, default_value_t = 0, value_name = "REQUESTS")]
    pub(crate) warm_up: u32,
}

/// What is computed anew of a chunk that is reused.
#[derive(Clone, Copy, Debug, PartialEq, Args)]
pub(crate) struct Repair {
    /// Share of the tokens of a reused chunk that are computed anew.
    #[arg(long, default_value_t = 0.05, value_parser = share)]
    pub(crate) share: f64,
    /// Layers, from the first, in which they are.
    #[arg(long, default_value_t = 12)]
    pub(crate) layers: u16,
}

/// When content chunks are computed for the store.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Compile {
    /// Compile a chunk when so many requests have missed it.
    #[arg(long, default_value_t = 1, value_name = "MISSES", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) compile_after: u32,
    /// Keep what probes recorded of chunks that are evicted, a few bytes a token: a chunk is
    /// computed behind probes once.
    #[arg(long)]
    pub(crate) keep_records: bool,
}

/// What is kept of repairs.
#[derive(Clone, Debug, Args)]
pub(crate) struct VariantOptions {
    /// Overlap with what stood before a variant from which on it is used.
    #[arg(long, default_value_t = 0.5, value_parser = share)]
    pub(crate) overlap: f64,
    /// What the share of pairs of chunks in the other order takes from the overlap.
    #[arg(long, default_value_t = 1.0, value_parser = share)]
    pub(crate) order_penalty: f64,
    /// Part of the share that is computed anew over a variant that is not exact.
    #[arg(long, default_value_t = 0.5, value_parser = share)]
    pub(crate) overlap_share: f64,
    /// Variants of a chunk at most.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) variants: u16,
    /// Part of the store that variants may take.
    #[arg(long, default_value_t = 0.05, value_parser = share)]
    pub(crate) variants_bytes: f64,
    /// Seconds after which a use of a variant counts half.
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) variants_half_life: u32,
}

/// How content chunks are reused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blending<'a> {
    pub(crate) repair: Repair,
    pub(crate) compile: Compile,
    /// Prefix chunks are looked up first.
    pub(crate) prefix: bool,
    pub(crate) variants: Option<&'a VariantOptions>,
}

/// What came of it. Rows, but for what says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Computed, in requests and for the store.
    pub(crate) computed: u64,
    /// Of these, for the store: chunks alone, and behind probes.
    pub(crate) compiled: u64,
    /// Tokens of prompts that were computed in one layer at least.
    pub(crate) touched_tokens: u64,
    /// Chunks of prompts that were found, whole.
    pub(crate) found: u64,
    /// Of these, those that need no repair because of a variant.
    pub(crate) exact_variants: u64,
    /// Of these, those that need less of it.
    pub(crate) near_variants: u64,
    /// Stored in the end.
    pub(crate) stored: u64,
    /// Variants, in the end.
    pub(crate) variants: u64,
    /// What they take.
    pub(crate) variants_stored: u64,
}

/// A trace, with what is the same for all policies.
pub(crate) struct Trace<'a> {
    costs: &'a Costs,
    requests: &'a [Request],
    /// By request: prefix chunks, by the numbers of their chains. The last may not be whole.
    blocks: Vec<Vec<u64>>,
}

impl<'a> Trace<'a> {
    pub(crate) fn new(requests: &'a [Request], costs: &'a Costs) -> Self {
        let mut chains = Chains::default();
        let blocks = requests.iter().enumerate().map(|(number, request)| {
            let parts = costs.parts(request, number as u64);
            chains.blocks(&parts, costs.block_tokens.into())
        });
        Self {
            costs,
            requests,
            blocks: blocks.collect(),
        }
    }

    /// Rows of all prompts that are counted: what is computed where nothing is stored.
    pub(crate) fn rows(&self) -> u64 {
        self.tokens() * self.costs.layers()
    }

    pub(crate) fn tokens(&self) -> u64 {
        let tokens = self.counted().iter().map(|next| self.costs.tokens(next));
        tokens.sum()
    }

    /// Chunks of all prompts.
    pub(crate) fn chunks(&self) -> u64 {
        self.counted().iter().map(|r| r.chunks.len() as u64).sum()
    }

    /// Requests behind the warm-up.
    fn counted(&self) -> &'a [Request] {
        self.requests.get(self.warm_up()..).unwrap_or_default()
    }

    fn warm_up(&self) -> usize {
        usize::try_from(self.costs.warm_up).unwrap_or(usize::MAX)
    }

    /// Prefix caching, in a store of `capacity` rows; no limit: `None`.
    pub(crate) fn prefix_caching(&self, capacity: Option<u64>) -> Outcome {
        let mut outcome = Outcome::default();
        let mut store = Store::new(capacity);
        for (number, (request, blocks)) in self.requests.iter().zip(&self.blocks).enumerate() {
            if number == self.warm_up() {
                outcome = Outcome::default();
            }
            let now = Duration::from_millis(request.timestamp);
            store.begin();
            let hit = self.read_blocks(&mut store, blocks, now);
            let tokens = self.costs.tokens(request);
            outcome.computed += (tokens - hit) * self.costs.layers();
            outcome.touched_tokens += tokens - hit;
            let behind = hit.saturating_sub(self.costs.prefix_tokens.into());
            outcome.found += behind / u64::from(self.costs.chunk_tokens);
            self.store_blocks(&mut store, blocks, hit, tokens, 0, now);
        }
        outcome.stored = store.bytes();
        outcome
    }

    /// Content chunks, in a store of `capacity` rows; no limit: `None`.
    pub(crate) fn blending(&self, blending: Blending<'_>, capacity: Option<u64>) -> Outcome {
        let mut node = Node {
            trace: self,
            blending,
            store: Store::new(capacity),
            variants: blending.variants.map(|o| Variants::new(o.rules())),
            variants_limit: capacity
                .zip(blending.variants)
                .map(|(capacity, options)| part(capacity, options.variants_bytes)),
            missed: HashMap::new(),
            recorded: HashSet::new(),
            outcome: Outcome::default(),
        };
        for (number, (request, blocks)) in self.requests.iter().zip(&self.blocks).enumerate() {
            if number == self.warm_up() {
                node.outcome = Outcome::default();
            }
            node.serve(request, blocks);
        }
        let mut outcome = node.outcome;
        outcome.variants_stored = node.variants_bytes();
        outcome.stored = node.store.bytes() + outcome.variants_stored;
        outcome.variants = node.variants.map_or(0, |variants| variants.len() as u64);
        outcome
    }

    /// Reads the longest stored prefix. Returns its tokens.
    fn read_blocks(&self, store: &mut Store, blocks: &[u64], now: Duration) -> u64 {
        let stored = |block: &&u64| store.read(Item::Block(**block), now);
        let hit = blocks.iter().take_while(stored).count() as u64;
        hit * u64::from(self.costs.block_tokens)
    }

    /// Stores prefix chunks that are whole between two tokens of a prompt, as many as there is room
    /// for. Returns what was evicted.
    fn store_blocks(
        &self,
        store: &mut Store,
        blocks: &[u64],
        from: u64,
        to: u64,
        beside: u64,
        now: Duration,
    ) -> Vec<Item> {
        let size = u64::from(self.costs.block_tokens);
        let [from, to] =
            [from, to].map(|token| usize::try_from(token / size).unwrap_or(usize::MAX));
        let mut gone = Vec::new();
        for at in from..to.min(blocks.len()) {
            let parent = at.checked_sub(1).map(|at| Item::Block(blocks[at]));
            let bytes = size * self.costs.layers();
            let item = Item::Block(blocks[at]);
            // Behind a gap one may be stored whose chain was broken.
            if store.read(item, now) {
                continue;
            }
            match store.insert(item, bytes, size, parent, beside, now) {
                Some(evicted) => gone.extend(evicted),
                None => break,
            }
        }
        gone
    }
}

/// A serving node that blends.
struct Node<'a> {
    trace: &'a Trace<'a>,
    blending: Blending<'a>,
    store: Store,
    variants: Option<Variants<Content>>,
    /// What variants may take; `None`: anything.
    variants_limit: Option<u64>,
    /// How often chunks were missed.
    missed: HashMap<Content, u32>,
    /// Chunks of which is kept what probes recorded.
    recorded: HashSet<Content>,
    outcome: Outcome,
}

impl Node<'_> {
    fn serve(&mut self, request: &Request, blocks: &[u64]) {
        let costs = self.trace.costs;
        let now = Duration::from_millis(request.timestamp);
        let chunk_tokens = u64::from(costs.chunk_tokens);
        let prefix_tokens = u64::from(costs.prefix_tokens);
        self.store.begin();
        let hit = match self.blending.prefix {
            true => self.trace.read_blocks(&mut self.store, blocks, now),
            false => 0,
        };
        let keys: Vec<Content> = request.chunks.iter().map(|c| request.content(*c)).collect();
        let needed = |place: usize| prefix_tokens + (place as u64 + 1) * chunk_tokens > hit;
        let stored: Vec<bool> = keys
            .iter()
            .enumerate()
            .map(|(place, key)| needed(place) && self.store.read(Item::Chunk(*key), now))
            .collect();
        self.prefix(request.prefix, prefix_tokens.saturating_sub(hit), now);
        // Up to here the KV of the prompt is what prefill would have computed.
        let mut right = prefix_tokens + chunk_tokens * keys.len() as u64;
        let mut start = prefix_tokens;
        for (place, &key) in keys.iter().enumerate() {
            let tokens = chunk_tokens - hit.clamp(start, start + chunk_tokens) + start;
            let before = &keys[..place];
            if tokens == 0 {
                self.outcome.found += 1;
            } else if stored[place] {
                self.outcome.found += 1;
                if place > 0 {
                    self.repair(key, before, tokens, now);
                    right = right.min(start);
                }
            } else {
                self.compute(tokens);
                self.compile(key, place == 0, now);
                self.keep_variant(key, before, now);
            }
            start += chunk_tokens;
        }
        let question = u64::from(request.question_length);
        self.compute(question);
        if right == start {
            right += question;
        }
        // What the prefix and the first chunk give, they give without prefix chunks.
        let whole = right - right % u64::from(costs.block_tokens);
        if self.blending.prefix && whole > prefix_tokens + chunk_tokens {
            let beside = self.variants_bytes();
            let trace = self.trace;
            let gone = trace.store_blocks(&mut self.store, blocks, hit, right, beside, now);
            self.forget(&gone);
        }
    }

    /// Counts tokens of the prompt that are computed in all layers.
    fn compute(&mut self, tokens: u64) {
        self.outcome.computed += tokens * self.trace.costs.layers();
        self.outcome.touched_tokens += tokens;
    }

    /// The canonical prefix, of which `tokens` are not in prefix chunks.
    fn prefix(&mut self, prefix: u32, tokens: u64, now: Duration) {
        let item = Item::Prefix(prefix);
        if tokens == 0 || self.store.read(item, now) {
            return;
        }
        self.compute(tokens);
        let all = u64::from(self.trace.costs.prefix_tokens);
        self.insert(item, all, now);
    }

    /// Computes a stored chunk anew in part, where it stands behind others; `tokens` of it
    /// are not in prefix chunks.
    fn repair(&mut self, key: Content, before: &[Content], tokens: u64, now: Duration) {
        let Repair { share, layers } = self.blending.repair;
        let mut share = share;
        if let (Some(variants), Some(options)) = (&mut self.variants, self.blending.variants)
            && let Some(found) = variants.best(key, before)
        {
            if found.exact {
                variants.used(found.id, 1.0, now);
                self.outcome.exact_variants += 1;
                return;
            }
            self.outcome.near_variants += 1;
            share *= options.overlap_share;
            if options.overlap_share < 1.0 {
                variants.used(found.id, 1.0 - options.overlap_share, now);
            }
        }
        let anew = part(tokens, share);
        self.outcome.computed += anew * u64::from(layers);
        self.outcome.touched_tokens += if layers > 0 { anew } else { 0 };
        self.keep_variant(key, before, now);
    }

    /// Computes a chunk alone for the store, and behind probes, if it was missed often enough
    /// and there is room for it. As the
    /// first of a prompt, a chunk was computed alone already.
    fn compile(&mut self, key: Content, alone_already: bool, now: Duration) {
        let costs = self.trace.costs;
        let tokens = u64::from(costs.chunk_tokens);
        let compile = self.blending.compile;
        let missed = self.missed.entry(key).or_default();
        *missed = missed.saturating_add(1);
        if *missed < compile.compile_after || !self.insert(Item::Chunk(key), tokens, now) {
            return;
        }
        let mut rows = 0;
        if self.recorded.insert(key) || !compile.keep_records {
            rows += costs.probe_rows();
        }
        if !alone_already {
            rows += tokens * costs.layers();
        }
        self.outcome.compiled += rows;
        self.outcome.computed += rows;
    }

    /// Stores an item of `tokens` tokens. False where there is no room.
    fn insert(&mut self, item: Item, tokens: u64, now: Duration) -> bool {
        let bytes = tokens * self.trace.costs.layers();
        let beside = self.variants_bytes();
        let inserted = self.store.insert(item, bytes, tokens, None, beside, now);
        inserted.is_some_and(|gone| {
            self.forget(&gone);
            true
        })
    }

    /// Keeps the rows of a chunk that are repaired, with what stands before it.
    fn keep_variant(&mut self, key: Content, before: &[Content], now: Duration) {
        let Some(variants) = &mut self.variants else {
            return;
        };
        let Repair { share, layers } = self.blending.repair;
        let tokens = part(self.trace.costs.chunk_tokens.into(), share);
        let bytes = tokens * u64::from(layers);
        if before.is_empty() || !self.store.contains(Item::Chunk(key)) {
            return;
        }
        if let Some(limit) = self.variants_limit {
            if bytes > limit {
                return;
            }
            while variants.bytes() + bytes > limit && variants.evict().is_some() {}
        }
        let Some(gone) = self.store.make_room(variants.bytes() + bytes, now) else {
            return;
        };
        variants.keep(key, before, bytes, now);
        self.forget(&gone);
    }

    fn variants_bytes(&self) -> u64 {
        self.variants.as_ref().map_or(0, Variants::bytes)
    }

    /// Variants of chunks that are gone are of no use.
    fn forget(&mut self, gone: &[Item]) {
        if let Some(variants) = &mut self.variants {
            for item in gone {
                if let Item::Chunk(content) = item {
                    variants.forget(*content);
                }
            }
        }
    }
}

impl Costs {
    pub(crate) fn layers(&self) -> u64 {
        self.model_layers.into()
    }

    fn tokens(&self, request: &Request) -> u64 {
        let parts = self.parts(request, 0);
        parts.iter().map(|part| part.1).sum()
    }

    /// A prompt: texts, and tokens of each.
    fn parts(&self, request: &Request, number: u64) -> Vec<(u64, u64)> {
        let prefix = (u64::from(request.prefix) * 3, self.prefix_tokens.into());
        let chunk = |chunk: &u32| (u64::from(*chunk) * 3 + 1, self.chunk_tokens.into());
        let question = (number * 3 + 2, request.question_length.into());
        let mut parts = vec![prefix];
        parts.extend(request.chunks.iter().map(chunk));
        parts.push(question);
        parts
    }

    /// What recording behind probes costs.
    fn probe_rows(&self) -> u64 {
        let behind = u64::from(self.probe_tokens) + u64::from(self.chunk_tokens);
        u64::from(self.probes) * behind * u64::from(self.probe_layers)
    }
}

impl VariantOptions {
    fn rules(&self) -> Rules {
        Rules {
            order_penalty: self.order_penalty,
            least_overlap: self.overlap,
            per_chunk: self.variants.into(),
            half_life: Duration::from_secs(self.variants_half_life.into()),
        }
    }
}

impl Request {
    /// The content chunk that a retrieved one is in this prompt.
    pub(crate) fn content(&self, chunk: u32) -> Content {
        let prefix = self.prefix;
        Content { prefix, chunk }
    }
}

/// A share of a number, rounded.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a share of what fits"
)]
fn part(whole: u64, share: f64) -> u64 {
    (whole as f64 * share).round() as u64
}
