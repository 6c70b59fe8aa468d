//! Blend or compute: what is worth it for one prompt.
//!
//! Pure: what is known of the prompt, of the model and of the speeds goes in, a plan comes
//! out. Computing all that is not at the front of the prompt costs what [`CostModel`] says.
//! Blending costs the longer of loading the chunks and computing what is not reused, as the
//! layers of one run behind those of the other, and the first layer's load in front.
//!
//! Of the repairs that are good enough the cheapest is the soonest; but where loading takes
//! longer than it, a better one costs nothing: the best is chosen that is as fast
//! (CacheBlend's controller, arXiv 2405.16444 §5.1, turned around: there one repair is fixed
//! and the slowest tier chosen that hides behind it). With a deadline, the best that keeps it.

use std::time::Duration;

use super::{Gate, Quality, Repair, Reused, Rule, Selector};
use crate::{CostModel, LoadPolicy};

/// What is known when a prompt is to be answered.
#[derive(Clone, Debug)]
pub struct Situation<'a> {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Tokens at its front whose KV is right already.
    pub ready: usize,
    /// Chunks behind these that the cache has.
    pub chunks: &'a [Reused],
    /// How long loading them takes: of their tiers, at the levels that they come at.
    pub load: Duration,
    /// How long the first token may still take, where that is given.
    pub deadline: Option<Duration>,
    /// Layers of the model.
    pub layers: u16,
    /// How near to full prefill the answer must be.
    pub quality: Quality,
    /// Whether chunks are reused even where that is not faster.
    pub policy: LoadPolicy,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum BlendPlan {
    /// Compute everything.
    Compute(Why),
    /// Reuse the chunks.
    Blend {
        /// What is computed anew.
        selector: Selector,
        /// How long that is expected to take.
        expected: Duration,
    },
}

/// Why nothing is blended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The cache has no chunk of the prompt.
    NoChunks,
    /// No repair was found to be good enough for this model, or none was looked for.
    NotProven,
    /// Computing everything is as fast.
    NotFaster,
}

impl BlendPlan {
    /// The plan for a prompt of a model that `gate` is about.
    pub fn new(situation: &Situation<'_>, gate: &Gate, cost: &CostModel) -> Self {
        if situation.chunks.is_empty() {
            return Self::Compute(Why::NoChunks);
        }
        let good: Vec<&Repair> = match situation.inexact() {
            // Nothing to repair.
            0 if situation.quality == Quality::Exact => {
                return Self::decide(situation, cost, &[Selector::NONE]);
            }
            _ => gate.good(situation.quality).collect(),
        };
        let selectors: Vec<Selector> = good.iter().map(|repair| repair.selector()).collect();
        match selectors.as_slice() {
            [] => Self::Compute(Why::NotProven),
            selectors => Self::decide(situation, cost, selectors),
        }
    }

    /// The plan with a given repair, proven or not.
    pub fn forced(situation: &Situation<'_>, selector: Selector, cost: &CostModel) -> Self {
        if situation.chunks.is_empty() {
            return Self::Compute(Why::NoChunks);
        }
        Self::decide(situation, cost, &[selector])
    }

    /// `selectors` are the cheapest first.
    fn decide(situation: &Situation<'_>, cost: &CostModel, selectors: &[Selector]) -> Self {
        let timed = selectors
            .iter()
            .map(|selector| (*selector, situation.blended(selector, cost)));
        let timed: Vec<(Selector, Duration)> = timed.collect();
        let Some(soonest) = timed.iter().map(|(_, expected)| *expected).min() else {
            return Self::Compute(Why::NotProven);
        };
        let computed = cost.compute_time(situation.ready, situation.tokens);
        if situation.policy == LoadPolicy::WhenFaster && soonest >= computed {
            return Self::Compute(Why::NotFaster);
        }
        // Later ones repair more.
        let as_fast = soonest.mul_f64(FREE);
        // What repairs more must not come later than computing everything would.
        let in_time = situation.deadline.unwrap_or_default().min(computed);
        let enough = as_fast.max(in_time);
        let best = timed.into_iter().rfind(|(_, expected)| *expected <= enough);
        match best {
            Some((selector, expected)) => Self::Blend { selector, expected },
            None => Self::Compute(Why::NotProven),
        }
    }
}

/// A repair that takes so many times the soonest is as fast.
const FREE: f64 = 1.05;

impl Situation<'_> {
    /// Tokens that are reused and not right.
    fn inexact(&self) -> usize {
        let inexact = self.chunks.iter().filter(|chunk| !chunk.exact);
        inexact.map(|chunk| chunk.tokens.len()).sum()
    }

    /// From the start of loading until the first token.
    fn blended(&self, selector: &Selector, cost: &CostModel) -> Duration {
        let layers = f64::from(self.layers.max(1));
        let depth = f64::from(selector.layers.unwrap_or(self.layers).min(self.layers));
        let anew = match selector.rule {
            Rule::None => 0.0,
            Rule::Graded => f64::from(selector.share),
            _ => f64::from(selector.share) * depth / layers,
        };
        // Rows, and keys that they see, with reused tokens counted by what is computed of them.
        let (mut rows, mut pairs) = (0.0, 0.0);
        let mut position = self.ready;
        for chunk in self.chunks {
            let start = chunk.tokens.start.max(position);
            add(&mut rows, &mut pairs, position, start, 1.0);
            let weight = if chunk.exact { 0.0 } else { anew };
            add(&mut rows, &mut pairs, start, chunk.tokens.end, weight);
            position = chunk.tokens.end.max(position);
        }
        add(&mut rows, &mut pairs, position, self.tokens, 1.0);
        let compute = cost.work_time(rows, pairs);
        let (longer, shorter) = (compute.max(self.load), compute.min(self.load));
        longer + shorter.div_f64(layers)
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn add(rows: &mut f64, pairs: &mut f64, from: usize, to: usize, weight: f64) {
    let count = to.saturating_sub(from) as f64;
    *rows += weight * count;
    *pairs += weight * count * (from as f64 + to as f64 + 1.0) / 2.0;
}

impl Repair {
    /// What computes it.
    pub fn selector(&self) -> Selector {
        Selector {
            rule: Rule::Graded,
            share: self.budget,
            layers: None,
        }
    }
}

impl Selector {
    /// Nothing is computed anew.
    pub const NONE: Self = Self {
        rule: Rule::None,
        share: 0.0,
        layers: None,
    };
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    const LAYERS: u16 = 12;

    /// A millisecond a token, and a nanosecond a pair.
    fn cost() -> CostModel {
        let mut cost = CostModel::default();
        for to in [64usize, 256, 1024, 512, 2048, 128, 4096] {
            #[expect(clippy::cast_precision_loss, reason = "a test")]
            let (tokens, to_f) = (to as f64, to as f64);
            let seconds = 1e-3 * tokens + 1e-9 * to_f * (to_f + 1.0) / 2.0;
            cost.observe_prefill(0, to, Duration::from_secs_f64(seconds));
        }
        cost
    }

    fn gate(repairs: &[(f32, f64)]) -> Gate {
        Gate {
            version: Gate::VERSION,
            weights: String::new(),
            prefix: vec![1],
            probe_layers: 1,
            probes: Vec::new(),
            questions: 1000,
            full_exact: 0.9,
            naive_exact: 0.5,
            naive_kl: 1.0,
            naive_text: 0.1,
            repairs: repairs
                .iter()
                .map(|&(budget, kl)| Repair {
                    budget,
                    exact: 0.9,
                    kl,
                    text: 0.0,
                })
                .collect(),
        }
    }

    fn reused(tokens: Range<usize>, exact: bool) -> Reused {
        Reused { tokens, exact }
    }

    fn situation(chunks: &[Reused], load: u64) -> Situation<'_> {
        Situation {
            tokens: 3100,
            ready: 0,
            chunks,
            load: Duration::from_millis(load),
            deadline: None,
            layers: LAYERS,
            quality: Quality::High,
            policy: LoadPolicy::WhenFaster,
        }
    }

    fn share(plan: &BlendPlan) -> Option<f32> {
        match plan {
            BlendPlan::Blend { selector, .. } => Some(selector.share),
            BlendPlan::Compute(_) => None,
        }
    }

    #[test]
    fn time_is_that_of_what_is_computed_or_of_what_is_loaded() {
        let chunks = [reused(1..513, true), reused(513..3073, false)];
        let gate = gate(&[(0.125, 0.05)]);
        let BlendPlan::Blend { expected, .. } =
            BlendPlan::new(&situation(&chunks, 0), &gate, &cost())
        else {
            panic!("faster");
        };
        // 28 tokens of text, and of 2560 an eighth: 320 rows.
        let millis = expected.as_secs_f64() * 1e3;
        assert!((millis - 348.0).abs() < 4.0, "{millis}");
        let BlendPlan::Blend { expected, .. } =
            BlendPlan::new(&situation(&chunks, 1000), &gate, &cost())
        else {
            panic!("faster");
        };
        let millis = expected.as_secs_f64() * 1e3;
        assert!((millis - 1029.0).abs() < 4.0, "{millis}");
    }

    #[test]
    fn what_hides_behind_the_load_is_free() {
        let chunks = [reused(1..3073, false)];
        let gate = gate(&[(0.03, 0.08), (0.125, 0.05), (0.5, 0.01)]);
        let chosen = |load| share(&BlendPlan::new(&situation(&chunks, load), &gate, &cost()));
        assert_eq!(chosen(0), Some(0.03));
        assert_eq!(chosen(3000), Some(0.5));
    }

    #[test]
    fn the_time_until_a_deadline_goes_into_repairs() {
        let chunks = [reused(1..3073, false)];
        let gate = gate(&[(0.03, 0.08), (0.125, 0.05), (0.5, 0.01), (1.0, 0.0)]);
        let chosen = |deadline| {
            let situation = Situation {
                deadline: Some(Duration::from_millis(deadline)),
                ..situation(&chunks, 10)
            };
            share(&BlendPlan::new(&situation, &gate, &cost()))
        };
        // 28 rows of text, and of 3072 a part: 120, 412 and 1564 ms.
        assert_eq!(chosen(50), Some(0.03));
        assert_eq!(chosen(400), Some(0.03));
        assert_eq!(chosen(420), Some(0.125));
        assert_eq!(chosen(2000), Some(0.5));
        // Not later than computing everything, even when there is time.
        assert_eq!(chosen(10_000), Some(0.5));
    }

    #[test]
    fn nothing_is_blended_that_is_not_faster_or_not_proven() {
        let chunks = [reused(1..3073, false)];
        let proven = gate(&[(0.03, 0.08)]);
        let plan = |chunks: &[Reused], load, gate: &Gate| {
            BlendPlan::new(&situation(chunks, load), gate, &cost())
        };
        assert_eq!(plan(&[], 0, &proven), BlendPlan::Compute(Why::NoChunks));
        assert_eq!(
            plan(&chunks, 4000, &proven),
            BlendPlan::Compute(Why::NotFaster)
        );
        let weak = gate(&[(0.03, 0.3)]);
        assert_eq!(plan(&chunks, 0, &weak), BlendPlan::Compute(Why::NotProven));
        let always = Situation {
            policy: LoadPolicy::Always,
            ..situation(&chunks, 4000)
        };
        assert_eq!(
            share(&BlendPlan::new(&always, &proven, &cost())),
            Some(0.03)
        );
        let full = gate(&[(1.0, 0.0)]);
        assert_eq!(plan(&chunks, 10, &full), BlendPlan::Compute(Why::NotFaster));
    }

    #[test]
    fn chunks_in_their_own_place_need_no_proof() {
        let chunks = [reused(1..3073, true)];
        let exact = Situation {
            quality: Quality::Exact,
            ..situation(&chunks, 10)
        };
        let plan = BlendPlan::new(&exact, &gate(&[]), &cost());
        assert_eq!(share(&plan), Some(0.0));
    }
}
