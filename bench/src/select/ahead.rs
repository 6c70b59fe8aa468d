//! How much of a choice is known before its layer comes.

use kvasir_engine::model::BeforeLayer;
use kvasir_engine::paging::{Digests, Options, Selector};
use kvasir_engine::{BlockId, Model, Pages};

use crate::report::{Report, Row};

/// Lists of pages, by KV head.
type Lists = Vec<Vec<u32>>;

/// Choices of our rule along one tail.
#[derive(Debug)]
pub(super) struct Followed {
    selector: Selector,
    /// By layer, what was chosen for the token before.
    last: Vec<Option<Lists>>,
    /// What the layer before foresaw.
    foreseen: Option<Lists>,
}

/// Shares of chosen pages that were foreseen.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ahead {
    foreseen: Shares,
    last: Shares,
}

#[derive(Clone, Copy, Debug, Default)]
struct Shares {
    sum: f64,
    count: f64,
}

impl Followed {
    pub(super) fn new(model: &Model) -> Self {
        Self {
            selector: Selector::new(model, Options::default()),
            last: vec![None; model.config().layers],
            foreseen: None,
        }
    }
}

impl Ahead {
    pub(super) fn add(
        &mut self,
        followed: &mut Followed,
        before: &BeforeLayer<'_>,
        step: usize,
        digests: &Digests,
        blocks: &[BlockId],
    ) {
        let Pages::Chosen(chosen) = followed.selector.choose(before, step, digests, blocks) else {
            return;
        };
        self.foreseen.add(followed.foreseen.take(), &chosen);
        self.last.add(followed.last[before.layer].take(), &chosen);
        followed.last[before.layer] = Some(chosen);
        followed.foreseen = match followed.selector.foresee(before, step, digests, blocks) {
            Some(Pages::Chosen(lists)) => Some(lists),
            _ => None,
        };
    }

    pub(super) fn report(&self, prefix: &str, report: &mut Report) {
        let share = Options::default().share;
        for (name, shares) in [("foreseen", self.foreseen), ("last", self.last)] {
            let value = shares.sum / shares.count.max(1.0);
            let name = format!("{prefix}ahead/{name}@{share}");
            report.push(Row::new(name, value, "share"));
        }
    }
}

impl Shares {
    fn add(&mut self, expected: Option<Lists>, chosen: &[Vec<u32>]) {
        let Some(expected) = expected else { return };
        for (expected, chosen) in expected.iter().zip(chosen) {
            let found = chosen.iter().filter(|page| expected.contains(page));
            self.sum += found.count() as f64 / chosen.len().max(1) as f64;
            self.count += 1.0;
        }
    }
}
