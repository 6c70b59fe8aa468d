//! How much of full attention the chosen pages have.

use kvasir_engine::ModelConfig;
use kvasir_engine::model::BeforeLayer;
use kvasir_engine::paging::{Selector, page_weights};
use kvasir_engine::{BlockId, Pages as Chosen};

use super::ahead::{Ahead, Followed};
use super::{Digested, Way};
use crate::quality::reader::{Pages, Reader};
use crate::report::{Report, Row};

/// Sums over tokens, by way and layer.
#[derive(Debug)]
pub(super) struct Masses {
    ways: Vec<Way>,
    layers: usize,
    sums: Vec<Sums>,
    ahead: Ahead,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    mass: f64,
    recall: f64,
    bytes: f64,
    count: f64,
}

impl Masses {
    pub(super) fn new(ways: &[Way], layers: usize) -> Self {
        Self {
            ways: ways.to_vec(),
            layers,
            sums: vec![Sums::default(); ways.len() * layers],
            ahead: Ahead::default(),
        }
    }

    /// Along tails that attend to everything, what each way would have chosen.
    pub(super) fn measure(
        &mut self,
        reader: &mut Reader,
        context: &Pages,
        digests: &Digested,
        tails: &[Vec<u32>],
        ways: &[Way],
    ) -> anyhow::Result<()> {
        let config = reader.config().clone();
        let mut selectors: Vec<Vec<Selector>> = ways
            .iter()
            .map(|way| {
                let selector = |_| Selector::new(reader.model(), way.selection);
                tails.iter().map(selector).collect()
            })
            .collect();
        let mut followed: Vec<Followed> = tails
            .iter()
            .map(|_| Followed::new(reader.model()))
            .collect();
        reader.follow(context, tails, &mut |tail, before, step, blocks| {
            let followed = &mut followed[tail];
            self.ahead
                .add(followed, before, step, &digests.tokens, blocks);
            let mut of_way = selectors.iter_mut().map(|tails| &mut tails[tail]);
            self.add(&config, before, step, blocks, digests, &mut of_way);
            Chosen::All
        })?;
        Ok(())
    }

    /// Counts one step of one row.
    pub(super) fn add(
        &mut self,
        config: &ModelConfig,
        before: &BeforeLayer<'_>,
        step: usize,
        blocks: &[BlockId],
        digests: &Digested,
        selectors: &mut dyn Iterator<Item = &mut Selector>,
    ) {
        let weights = page_weights(config, before, step, blocks);
        let pages = weights.first().map_or(0, Vec::len);
        let group = config.heads / config.kv_heads;
        // What the query heads of each KV head make of each page, on average.
        let shared: Vec<Vec<f64>> = weights
            .chunks_exact(group)
            .map(|heads| {
                let of_page = |page: usize| heads.iter().map(|head| f64::from(head[page])).sum();
                let mean = |page| -> f64 { of_page(page) };
                (0..pages).map(|page| mean(page) / group as f64).collect()
            })
            .collect();
        for (way, selector) in selectors.enumerate() {
            let digests = digests.for_rule(self.ways[way].selection.rule);
            let chosen = match selector.choose(before, step, digests, blocks) {
                Chosen::Chosen(chosen) => chosen,
                Chosen::All => {
                    let all = (0..u32::try_from(pages).unwrap_or(u32::MAX)).collect();
                    vec![all; config.kv_heads]
                }
            };
            let sums = &mut self.sums[way * self.layers + before.layer];
            for (shared, chosen) in shared.iter().zip(&chosen) {
                let mut ranked: Vec<usize> = (0..pages).collect();
                ranked.sort_by(|&a, &b| shared[b].total_cmp(&shared[a]));
                let best = &ranked[..chosen.len()];
                let found = chosen
                    .iter()
                    .filter(|&&page| best.contains(&(page as usize)));
                sums.recall += found.count() as f64 / best.len().max(1) as f64;
                sums.mass += chosen
                    .iter()
                    .map(|&page| shared[page as usize])
                    .sum::<f64>();
                sums.bytes += chosen.len() as f64 / pages as f64;
                sums.count += 1.0;
            }
        }
    }

    /// Mean over layers.
    pub(super) fn mass(&self, way: usize) -> f64 {
        self.mean(way, |sums| sums.mass)
    }

    fn mean(&self, way: usize, of: impl Fn(&Sums) -> f64) -> f64 {
        let layers = &self.sums[way * self.layers..][..self.layers];
        let count: f64 = layers.iter().map(|sums| sums.count).sum();
        layers.iter().map(of).sum::<f64>() / count.max(1.0)
    }

    pub(super) fn report(&self, prefix: &str, report: &mut Report) {
        self.ahead.report(prefix, report);
        for (index, way) in self.ways.iter().enumerate() {
            let oracle = self.ways.iter().position(|other| {
                other.name == "oracle" && other.share.to_bits() == way.share.to_bits()
            });
            let row = |measure: &str| format!("{prefix}{}", way.row(measure));
            let mass = Row::new(row("mass"), self.mass(index), "share");
            report.push(match oracle.map(|oracle| self.mass(oracle)) {
                Some(most) => mass.against(most, self.mass(index) / most),
                None => mass,
            });
            let recall = self.mean(index, |sums| sums.recall);
            report.push(Row::new(row("recall"), recall, "share"));
            let bytes = self.mean(index, |sums| sums.bytes);
            report.push(Row::new(row("bytes"), bytes, "share"));
            for layer in 0..self.layers {
                let sums = self.sums[index * self.layers + layer];
                let mass = sums.mass / sums.count.max(1.0);
                let name = format!("{}/{layer}", row("mass"));
                report.push(Row::new(name, mass, "share"));
            }
        }
    }
}
