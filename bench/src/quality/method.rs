//! Ways to have the KV of a context: the thing under test.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use kvasir_engine::blend::Probes;

use super::blended::Blended;
use super::coded::Coded;
use super::reader::{Kv, Pages, Reader};

/// How the pages of a context come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Method {
    /// Every token computed in the context: what the others are held against.
    Full,
    /// The first half of the chunks from a cache, under the same prefix; the rest computed.
    Prefix,
    /// Every chunk from a cache of its own, keys rotated to their new positions; nothing computed.
    Naive,
    /// As [`Self::Naive`], but keys stay rotated for the chunk's own positions.
    NaiveUnpositioned,
    /// As [`Self::Naive`], then every token computed over it: must be [`Self::Full`] again.
    RecomputeAll,
}

/// What a method used up for one context.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Charge {
    /// Rows of the context run through a layer, as a share of tokens times layers.
    pub(crate) recomputed: f64,
    /// KV bytes read from a cache in host memory, a token of the context.
    pub(crate) host_bytes: f64,
    /// Bits that a value of KV takes where it is cached.
    pub(crate) bits: f64,
}

/// A method of either kind.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// KV is computed and reused, exactly as it was.
    Reuse(Method),
    /// KV is coded and decoded.
    Coded(Arc<Coded>),
    /// Chunks are reused, and some of their tokens computed anew.
    Blended(Arc<Blended>),
}

impl Way {
    /// As in the rows of a report.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Reuse(method) => method.name(),
            Self::Coded(coded) => &coded.name,
            Self::Blended(blended) => &blended.name,
        }
    }

    /// Whether each question has its own way to have the context.
    pub(crate) fn is_per_question(&self) -> bool {
        matches!(self, Self::Blended(blended) if blended.is_per_question())
    }

    /// Fills pages with the whole context, for `question` where that matters.
    pub(crate) fn prepare(
        &self,
        reader: &mut Reader,
        caches: &Caches,
        question: &[u32],
    ) -> anyhow::Result<(Pages, Charge)> {
        match self {
            Self::Blended(blended) => blended.prepare(reader, caches, question),
            Self::Reuse(method) => method.prepare(reader, caches),
            Self::Coded(coded) => coded.prepare(reader, caches),
        }
    }
}

/// What probes recorded: by layer, from layer 1, and token of the context.
type Recorded = Vec<Vec<f32>>;

/// One context as chunks, and the KV that each has when it is computed alone.
#[derive(Debug)]
pub(crate) struct Caches {
    chunks: Vec<Vec<u32>>,
    /// K and V of each chunk after the first token `<s>`, which is dropped:
    /// positions `1..=chunk`.
    alone: Vec<Kv>,
    /// K and V of all tokens as full prefill computed them, where they are kept.
    full: Option<Kv>,
    first: u32,
    /// What probes recorded, by their digest and the number of layers they recorded.
    probed: RefCell<BTreeMap<([u8; 32], usize), Recorded>>,
}

impl Caches {
    pub(crate) fn new(
        reader: &mut Reader,
        first: u32,
        chunks: &[Vec<u32>],
    ) -> anyhow::Result<Self> {
        let mut alone = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let tokens: Vec<u32> = std::iter::once(first)
                .chain(chunk.iter().copied())
                .collect();
            let pages = reader.prefill(&tokens)?;
            alone.push(reader.take(&pages, 1..tokens.len())?);
            reader.release(pages)?;
        }
        Ok(Self {
            chunks: chunks.to_vec(),
            alone,
            full: None,
            first,
            probed: RefCell::default(),
        })
    }

    /// By layer, from layer 1, and token of the context: how much it deviates behind texts
    /// that are strange to it; see [`kvasir_engine::blend::Probes`].
    pub(crate) fn probed(&self, reader: &mut Reader, probes: &Probes) -> anyhow::Result<Recorded> {
        let key = (probes.digest(), probes.layers);
        if let Some(scores) = self.probed.borrow().get(&key) {
            return Ok(scores.clone());
        }
        let mut scores = vec![vec![0.0]; probes.layers];
        for chunk in &self.chunks {
            let recorded = reader.record(probes, &[self.first], chunk)?;
            for (scores, recorded) in scores.iter_mut().zip(recorded) {
                scores.extend(recorded);
            }
        }
        let mut known = self.probed.borrow_mut();
        known.insert(key, scores.clone());
        Ok(scores)
    }

    /// Keeps what full prefill computed.
    pub(crate) fn keep(&mut self, full: Kv) {
        self.full = Some(full);
    }

    pub(crate) fn full(&self) -> Option<&Kv> {
        self.full.as_ref()
    }

    /// `<s>` and all chunks.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        std::iter::once(self.first)
            .chain(self.chunks.iter().flatten().copied())
            .collect()
    }

    /// K and V of every chunk, moved to where it is in the context.
    pub(crate) fn repositioned(&self, reader: &Reader) -> Vec<Kv> {
        let mut position = 1;
        self.alone
            .iter()
            .map(|kv| {
                let mut kv = kv.clone();
                reader.reposition(&mut kv, 1, position);
                position += kv.tokens;
                kv
            })
            .collect()
    }
}

impl Method {
    /// As in the rows of a report.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Prefix => "prefix",
            Self::Naive => "naive",
            Self::NaiveUnpositioned => "naive-unpositioned",
            Self::RecomputeAll => "recompute-all",
        }
    }

    /// Fills pages with the whole context.
    pub(crate) fn prepare(
        self,
        reader: &mut Reader,
        caches: &Caches,
    ) -> anyhow::Result<(Pages, Charge)> {
        let tokens = caches.tokens();
        let mut pages = reader.empty(tokens.len())?;
        let computed = match self {
            Self::Full => {
                reader.extend(&mut pages, &tokens)?;
                tokens.len()
            }
            Self::Prefix => {
                let half: usize = caches.chunks[..caches.chunks.len() / 2]
                    .iter()
                    .map(Vec::len)
                    .sum();
                let (cached, rest) = tokens.split_at(1 + half);
                let earlier = reader.prefill(cached)?;
                let kv = reader.take(&earlier, 0..cached.len())?;
                reader.release(earlier)?;
                reader.land(&mut pages, &kv)?;
                reader.extend(&mut pages, rest)?;
                rest.len()
            }
            Self::Naive => {
                land_all(reader, &mut pages, caches, &caches.repositioned(reader))?;
                1
            }
            Self::RecomputeAll => {
                land_all(reader, &mut pages, caches, &caches.repositioned(reader))?;
                pages.rewind();
                reader.extend(&mut pages, &tokens[..1])?;
                for chunk in &caches.chunks {
                    reader.extend(&mut pages, chunk)?;
                }
                tokens.len()
            }
            Self::NaiveUnpositioned => {
                land_all(reader, &mut pages, caches, &caches.alone)?;
                1
            }
        };
        let cached = match self {
            Self::Full => 0,
            Self::RecomputeAll => tokens.len() - 1,
            _ => tokens.len() - computed,
        };
        let bytes = cached * reader.values_per_token() * size_of::<f32>();
        #[expect(clippy::cast_precision_loss, reason = "sizes of a benchmark")]
        let per_token = |amount: usize| amount as f64 / tokens.len() as f64;
        Ok((
            pages,
            Charge {
                recomputed: per_token(computed),
                host_bytes: per_token(bytes),
                bits: reader.bits_per_value(),
            },
        ))
    }
}

/// `<s>` computed, the chunks put behind it.
fn land_all(
    reader: &mut Reader,
    pages: &mut Pages,
    caches: &Caches,
    chunks: &[Kv],
) -> anyhow::Result<()> {
    reader.extend(pages, &[caches.first])?;
    for kv in chunks {
        reader.land(pages, kv)?;
    }
    Ok(())
}
