//! A context of cached chunks of which some tokens are computed anew.
//!
//! A method is `blend:RULE:BUDGET[:LAYERS]`. BUDGET is what may be charged: rows whose Q, K
//! and V are computed, summed over layers, as a share of the context's tokens times layers.
//! LAYERS, counted from the first, are those in which the chosen tokens are computed; all
//! of them when left out. Fewer layers leave budget for more tokens. The first chunk stands
//! where it was compiled, and is never computed anew.
//!
//! Rules: `random`, `first` (EPIC), `hkvd-k`, `hkvd-v` and `hkvd-kv` (CacheBlend, compared in
//! layer 1), the same with `-gradual`, `question` (attention of the question over reused KV,
//! summed over layers, as ProphetKV does), `question-N` (of layer N alone), `first-question`
//! (16 tokens of each chunk, then those), `probed` (what [`Probes`] recorded at layer 1),
//! `probed-N` (at layer N), `graded` (what they recorded in a third of the layers, see
//! [`Rule::Graded`]; the default of the engine), `graded-N` and `graded-N-L` (the same with the
//! first N of four probes, and in L layers, for what these add), and `oracle-N` (deviation at layer N from full prefill).
//! What a pass of the question costs is charged, all its rows in all layers.

use std::str::FromStr;

use anyhow::{Context as _, bail, ensure};
use kvasir_engine::blend::Probes;
use kvasir_engine::blend::check::{PROBES, probed_layers};
use kvasir_plugin::blend::{Check, Compared, Reused, Rule, Selection, Selector};

use super::method::{Caches, Charge};
use super::reader::{Kv, Pages, Reader};
use crate::corpus::{self, Profile, Split, Vocabulary};
use crate::kvstats::deviation;
use crate::kvstats::plane::Shape;

/// Tokens of each chunk that `first-question` begins with.
const FIRST: usize = 16;
/// Probes of a recording, at most.
const MOST_PROBES: usize = 4;

/// A method of blending.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Blended {
    pub(crate) name: String,
    by: By,
    budget: f32,
    layers: Option<u16>,
    /// Of probes.
    texts: Vec<Vec<u32>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    Random,
    First,
    Deviation {
        of: Compared,
        gradual: bool,
    },
    Question {
        layer: Option<usize>,
        first: bool,
    },
    Probed {
        layer: usize,
    },
    Graded {
        probes: usize,
        layers: Option<usize>,
    },
    Oracle {
        layer: usize,
    },
}

impl FromStr for Blended {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        let form = "blending is blend:RULE:BUDGET or blend:RULE:BUDGET:LAYERS";
        let mut parts = name.split(':').skip(1);
        let rule = parts.next().context(form)?;
        let budget: f32 = parts.next().context(form)?.parse().context(form)?;
        let layers = parts.next().map(str::parse).transpose().context(form)?;
        ensure!((0.0..=1.0).contains(&budget), "a budget is from 0 to 1");
        let (kind, of) = rule.split_once('-').unwrap_or((rule, ""));
        let by = match (kind, of) {
            ("random", "") => By::Random,
            ("first", "") => By::First,
            ("first", "question") => By::Question {
                layer: None,
                first: true,
            },
            ("hkvd", of) => {
                let (of, gradual) = match of.strip_suffix("-gradual") {
                    Some(of) => (of, true),
                    None => (of, false),
                };
                let of = match of {
                    "k" => Compared::Keys,
                    "v" => Compared::Values,
                    "kv" => Compared::Both,
                    _ => bail!("hkvd compares k, v or kv"),
                };
                By::Deviation { of, gradual }
            }
            ("question", layer) => By::Question {
                layer: (!layer.is_empty()).then(|| layer.parse()).transpose()?,
                first: false,
            },
            ("graded", "") => By::Graded {
                probes: PROBES,
                layers: None,
            },
            ("graded", of) => {
                let (probes, layers) = match of.split_once('-') {
                    Some((probes, layers)) => (probes, Some(layers.parse()?)),
                    None => (of, None),
                };
                let probes = probes.parse()?;
                ensure!(
                    (1..=MOST_PROBES).contains(&probes) && layers != Some(0),
                    "a chunk is graded with 1 to {MOST_PROBES} probes, in 1 layer or more"
                );
                By::Graded { probes, layers }
            }
            ("probed", "") => By::Probed { layer: 1 },
            ("probed", layer) => By::Probed {
                layer: layer.parse::<usize>()?.max(1),
            },
            ("oracle", layer) => By::Oracle {
                layer: layer.parse()?,
            },
            _ => bail!("no rule of blending is called {rule}"),
        };
        Ok(Self {
            name: name.to_owned(),
            by,
            budget,
            layers,
            texts: Vec::new(),
        })
    }
}

impl Blended {
    /// With texts to probe chunks with: of the training split, one chunk each.
    pub(crate) fn with_probes(
        mut self,
        vocabulary: &Vocabulary,
        chunk_tokens: usize,
    ) -> anyhow::Result<Self> {
        let text = |index: u64| {
            let context = corpus::sample(
                vocabulary,
                &Profile::default(),
                2,
                chunk_tokens,
                corpus::mix(PROBE_SEED, index),
                Split::Train,
            )?;
            let first = context.chunks.into_iter().next();
            first.context("a context has chunks")
        };
        self.texts = (0..MOST_PROBES as u64)
            .map(text)
            .collect::<anyhow::Result<_>>()?;
        Ok(self)
    }

    /// Whether it depends on the question.
    pub(crate) fn is_per_question(&self) -> bool {
        matches!(self.by, By::Question { .. })
    }

    /// Fills pages with the whole context, for `question` where that matters.
    pub(super) fn prepare(
        &self,
        reader: &mut Reader,
        caches: &Caches,
        question: &[u32],
    ) -> anyhow::Result<(Pages, Charge)> {
        let tokens = caches.tokens();
        let moved = caches.repositioned(reader);
        let mut first = 1;
        let mut landing: Vec<(usize, &Kv)> = Vec::new();
        let mut reused = Vec::new();
        for (index, kv) in moved.iter().enumerate() {
            landing.push((first, kv));
            reused.push(Reused {
                tokens: first..first + kv.tokens,
                exact: index == 0,
            });
            first += kv.tokens;
        }
        let all = u16::try_from(reader.config().layers)?;
        let total: usize = reused.iter().map(|reused| reused.tokens.len()).sum();
        #[expect(clippy::cast_precision_loss, reason = "sizes of a benchmark")]
        let asked = match self.by {
            By::Question { .. } => question.len() as f32 / total as f32,
            _ => 0.0,
        };
        let (scores, rule) = self.scores(reader, caches, &moved, question)?;
        let selector = self.selector(rule, all, asked, &reused);
        let mut selection = Selection::new(selector, tokens.len(), &reused, all, &scores);
        let mut pages = reader.empty(tokens.len())?;
        reader.blend(&mut pages, &tokens, &mut selection, &landing)?;
        let bytes = total * reader.values_per_token() * size_of::<f32>();
        #[expect(clippy::cast_precision_loss, reason = "sizes of a benchmark")]
        let charge = Charge {
            recomputed: selection.charged() + f64::from(asked),
            host_bytes: bytes as f64 / tokens.len() as f64,
            bits: reader.bits_per_value(),
        };
        Ok((pages, charge))
    }

    /// As many tokens as the budget pays for.
    #[expect(clippy::cast_precision_loss, reason = "sizes of a benchmark")]
    fn selector(&self, rule: Rule, all: u16, asked: f32, reused: &[Reused]) -> Selector {
        let size = |reused: &Reused| reused.tokens.len() as f32;
        let total: f32 = reused.iter().map(size).sum();
        let open: f32 = reused.iter().filter(|it| !it.exact).map(size).sum();
        let (all, depth) = (f32::from(all), f32::from(self.layers.unwrap_or(all)));
        let budget = (self.budget - asked).max(0.0) * total / open.max(1.0);
        let share = match rule {
            // Two layers of all tokens, and the rest of those that are left.
            Rule::Graded => budget,
            Rule::Deviation(_) => (budget * all - 2.0).max(0.0) / (depth - 2.0).max(1.0),
            _ => budget * all / depth,
        };
        Selector {
            rule,
            share: share.min(1.0),
            layers: self.layers,
        }
    }

    /// By token of the context; none where the rule needs none.
    fn scores(
        &self,
        reader: &mut Reader,
        caches: &Caches,
        moved: &[Kv],
        question: &[u32],
    ) -> anyhow::Result<(Vec<Vec<f32>>, Rule)> {
        Ok(match self.by {
            By::Random => (Vec::new(), Rule::Random { seed: 1 }),
            By::First => (Vec::new(), Rule::First),
            By::Deviation { of, gradual } => {
                let check = Check {
                    layer: 1,
                    of,
                    gradual,
                };
                (Vec::new(), Rule::Deviation(check))
            }
            By::Question { layer, first } => {
                let tokens = caches.tokens();
                let mut pages = reader.empty(tokens.len())?;
                reader.extend(&mut pages, &tokens[..1])?;
                for kv in moved {
                    reader.land(&mut pages, kv)?;
                }
                let layers = reader.attention(&pages, question)?;
                reader.release(pages)?;
                let chosen = match layer {
                    Some(layer) => layers.get(layer..=layer).context("no such layer")?,
                    None => &layers[..],
                };
                let scores = (0..tokens.len())
                    .map(|token| chosen.iter().map(|layer| layer[token]).sum())
                    .collect();
                let rule = match first {
                    true => Rule::FirstAndScored { first: FIRST },
                    false => Rule::Scored,
                };
                (vec![scores], rule)
            }
            By::Probed { layer } => {
                let mut scores = self.probed(reader, caches, PROBES, layer)?;
                (scores.split_off(layer - 1), Rule::Scored)
            }
            By::Graded { probes, layers } => {
                let all = reader.config().layers;
                let layers = layers.unwrap_or(probed_layers(all)).min(all - 1);
                (self.probed(reader, caches, probes, layers)?, Rule::Graded)
            }
            By::Oracle { layer } => {
                let full = caches.full().context("full prefill was kept")?;
                let config = reader.config();
                let shape = Shape {
                    layers: config.layers,
                    kv_heads: config.kv_heads,
                    head_dim: config.head_dim,
                };
                let skipped = 1 + moved.first().map_or(0, |kv| kv.tokens);
                #[expect(clippy::cast_possible_truncation, reason = "a score")]
                let rest = deviation::of_layer(shape, full, moved, layer)
                    .into_iter()
                    .map(|score| score as f32);
                let scores = std::iter::repeat_n(0.0, skipped).chain(rest).collect();
                (vec![scores], Rule::Scored)
            }
        })
    }

    fn probed(
        &self,
        reader: &mut Reader,
        caches: &Caches,
        probes: usize,
        layers: usize,
    ) -> anyhow::Result<Vec<Vec<f32>>> {
        let probes = Probes {
            texts: self.texts[..probes].to_vec(),
            layers,
        };
        caches.probed(reader, &probes)
    }
}

/// Of no context that questions are asked about.
const PROBE_SEED: u64 = 0x7072_6f62_6573;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn graded_is_as_the_engine_does_unless_it_names_its_probes() {
        let by = |name: &str| name.parse::<Blended>().map(|blended| blended.by);
        let graded = |probes, layers| By::Graded { probes, layers };
        let all = graded(PROBES, None);
        assert_eq!(by("blend:graded:0.15").unwrap(), all);
        assert_eq!(by("blend:graded-1:0.15").unwrap(), all);
        assert_eq!(by("blend:graded-4:0.15").unwrap(), graded(4, None));
        assert_eq!(by("blend:graded-2-6:0.15").unwrap(), graded(2, Some(6)));
        for none in [
            "blend:graded-0:0.15",
            "blend:graded-5:0.15",
            "blend:graded-x:0.15",
            "blend:graded-1-0:0.15",
        ] {
            assert!(by(none).is_err(), "{none}");
        }
    }
}
