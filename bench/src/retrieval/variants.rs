//! Variants of chunks: what was computed anew of a chunk, kept with what stood before it.
//!
//! Rows of a reused chunk that were computed anew hold what these tokens read of the chunks
//! before them. Where the same chunks stand before it again, in the same order, they would come
//! out the same; where most of them do, fewer have to be computed. This is the idea of
//! Cache-Craft (Agarwal et al., SIGMOD 2025), with these differences: that paper weighs
//! the chunks before by the attention that they got, here all weigh the same; there a chunk
//! that is new before it costs nothing, here it counts as much as one that is missing.
//!
//! Plain data: no I/O, no bytes of KV, and time is a parameter. One value per node, or per
//! store. Not here: whether the chunk itself is stored; who evicts it calls
//! [`Variants::forget`].

use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Duration;

/// How variants are judged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rules {
    /// What chunks in another order take from the overlap; see [`overlap`].
    pub(crate) order_penalty: f64,
    /// The overlap below which a variant is of no use.
    pub(crate) least_overlap: f64,
    /// Variants of a chunk at most.
    pub(crate) per_chunk: usize,
    /// After which a use counts half.
    pub(crate) half_life: Duration,
}

/// Variants of chunks whose keys are `K`.
#[derive(Debug)]
pub(crate) struct Variants<K> {
    rules: Rules,
    variants: HashMap<VariantId, Variant<K>>,
    of: HashMap<K, Vec<VariantId>>,
    /// In the order of eviction.
    order: BTreeSet<(Worth, VariantId)>,
    next: u64,
    bytes: u64,
}

/// A variant; never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct VariantId(u64);

/// A variant that is of use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Found {
    pub(crate) id: VariantId,
    /// Above 0, 1 at most.
    pub(crate) overlap: f64,
    /// The very chunks, in the same order: nothing has to be computed anew.
    pub(crate) exact: bool,
}

#[derive(Debug)]
struct Variant<K> {
    chunk: K,
    before: Box<[K]>,
    bytes: u64,
    worth: Worth,
}

/// What uses of a variant saved, each halved for every half-life since, per byte; as a base-2
/// logarithm, for a moment that is the same for all. So the order of variants does not change
/// with time (forward decay: Cormode et al., ICDE 2009).
#[derive(Clone, Copy, Debug, PartialEq)]
struct Worth(f64);

impl Eq for Worth {}

impl Ord for Worth {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Worth {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<K: Copy + Eq + Hash> Variants<K> {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            variants: HashMap::new(),
            of: HashMap::new(),
            order: BTreeSet::new(),
            next: 0,
            bytes: 0,
        }
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.variants.len()
    }

    /// The variant of `chunk` that suits it best behind `before`: an exact one, else the one
    /// with the largest overlap, of equals the one that is worth most.
    pub(crate) fn best(&self, chunk: K, before: &[K]) -> Option<Found> {
        let found = self.of.get(&chunk)?.iter().map(|&id| {
            let variant = &self.variants[&id];
            let exact = *variant.before == *before;
            let overlap = match exact {
                true => 1.0,
                false => overlap(&variant.before, before, self.rules.order_penalty),
            };
            (Found { id, overlap, exact }, variant.worth)
        });
        let of_use = |(found, _): &(Found, Worth)| {
            found.exact || (found.overlap > 0.0 && found.overlap >= self.rules.least_overlap)
        };
        let best = found.filter(of_use).max_by(|(a, a_worth), (b, b_worth)| {
            let exact = a.exact.cmp(&b.exact);
            let overlap = a.overlap.total_cmp(&b.overlap);
            exact.then(overlap).then(a_worth.cmp(b_worth))
        });
        best.map(|(found, _)| found)
    }

    /// A variant was used, and `saved` of computing all of its rows: above 0, 1 at most.
    pub(crate) fn used(&mut self, id: VariantId, saved: f64, now: Duration) {
        let Some(variant) = self.variants.get_mut(&id) else {
            return;
        };
        self.order.remove(&(variant.worth, id));
        variant.worth = variant
            .worth
            .and(self.rules.worth(saved, variant.bytes, now));
        self.order.insert((variant.worth, id));
    }

    /// Keeps a variant of `bytes` bytes, as if it were used once. Does nothing where it is
    /// kept already. If the chunk has too many, the one that is worth least goes.
    pub(crate) fn keep(&mut self, chunk: K, before: &[K], bytes: u64, now: Duration) {
        let known = self.of.get(&chunk).map_or(&[][..], Vec::as_slice);
        if known.iter().any(|id| *self.variants[id].before == *before) {
            return;
        }
        if known.len() >= self.rules.per_chunk {
            let worth = |id: &&VariantId| (self.variants[*id].worth, **id);
            if let Some(&least) = known.iter().min_by_key(worth) {
                self.remove(least);
            }
        }
        let id = VariantId(self.next);
        self.next += 1;
        let worth = self.rules.worth(1.0, bytes, now);
        self.order.insert((worth, id));
        self.of.entry(chunk).or_default().push(id);
        self.bytes += bytes;
        let before = before.into();
        let variant = Variant {
            chunk,
            before,
            bytes,
            worth,
        };
        self.variants.insert(id, variant);
    }

    /// Evicts the variant that is worth least. Returns its bytes.
    pub(crate) fn evict(&mut self) -> Option<u64> {
        let (_, least) = *self.order.first()?;
        self.remove(least)
    }

    /// Drops all variants of a chunk that is gone.
    pub(crate) fn forget(&mut self, chunk: K) {
        for id in self.of.get(&chunk).cloned().unwrap_or_default() {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: VariantId) -> Option<u64> {
        let variant = self.variants.remove(&id)?;
        self.order.remove(&(variant.worth, id));
        self.bytes -= variant.bytes;
        if let Some(ids) = self.of.get_mut(&variant.chunk) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.of.remove(&variant.chunk);
            }
        }
        Some(variant.bytes)
    }
}

impl Rules {
    #[expect(clippy::cast_precision_loss, reason = "a size's logarithm")]
    fn worth(&self, saved: f64, bytes: u64, now: Duration) -> Worth {
        let ages = now.as_secs_f64() / self.half_life.as_secs_f64();
        Worth(saved.log2() - (bytes.max(1) as f64).log2() + ages)
    }
}

impl Worth {
    /// The logarithm of the sum.
    fn and(self, other: Self) -> Self {
        let (large, small) = (self.0.max(other.0), self.0.min(other.0));
        Self(large + (small - large).exp2().ln_1p() / std::f64::consts::LN_2)
    }
}

/// How much of what stood before a chunk stands before it again: β′ of Cache-Craft.
///
/// β is the number of chunks that are in both, as a share of the longer of the two. It is
/// reduced by the share γ of pairs of these that stand in the other order (Kendall's distance),
/// times `order_penalty`: β′ = β · (1 - γ · penalty).
#[expect(clippy::cast_precision_loss, reason = "chunks of a prompt")]
pub(crate) fn overlap<K: PartialEq>(then: &[K], now: &[K], order_penalty: f64) -> f64 {
    let place = |chunk: &K| now.iter().position(|other| other == chunk);
    let places: Vec<usize> = then.iter().filter_map(place).collect();
    let longer = then.len().max(now.len());
    if places.is_empty() {
        return 0.0;
    }
    let mut swapped = 0;
    for (index, first) in places.iter().enumerate() {
        swapped += places[index..]
            .iter()
            .filter(|later| *later < first)
            .count();
    }
    let pairs = places.len() * (places.len() - 1) / 2;
    let disorder = swapped as f64 / pairs.max(1) as f64;
    let overlap = places.len() as f64 / longer as f64;
    overlap * (1.0 - order_penalty * disorder).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        order_penalty: 1.0,
        least_overlap: 0.5,
        per_chunk: 3,
        half_life: Duration::from_secs(10),
    };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Which variants of chunk 7 there are, by the first chunk before it.
    fn kept(variants: &Variants<u32>) -> Vec<u32> {
        let mut kept: Vec<u32> = variants.variants.values().map(|v| v.before[0]).collect();
        kept.sort_unstable();
        kept
    }

    #[test]
    fn overlap_counts_common_chunks_and_pairs_in_order() {
        let scores: [(&[u32], &[u32], f64); 7] = [
            (&[1, 2], &[1, 2], 1.0),
            (&[1, 2], &[3, 4], 0.0),
            (&[1, 2, 3, 4], &[1, 2], 0.5),
            (&[1, 2], &[1, 5, 2, 6], 0.5),
            (&[1, 2], &[2, 1], 0.0),
            // One of three pairs.
            (&[1, 2, 3], &[1, 3, 2], 1.0 - 1.0 / 3.0),
            (&[1, 2, 3, 4], &[3, 9, 1, 2], 0.75 * (1.0 - 2.0 / 3.0)),
        ];
        for (then, now, expected) in scores {
            let got = overlap(then, now, 1.0);
            assert!((got - expected).abs() < 1e-12, "{then:?} {now:?}: {got}");
        }
        assert_eq!(overlap(&[1, 2], &[2, 1], 0.0), 1.0);
        assert_eq!(overlap(&[1, 2], &[2, 1], 0.5), 0.5);
        assert_eq!(overlap::<u32>(&[], &[], 1.0), 0.0);
    }

    #[test]
    fn the_exact_one_is_best_then_the_most_alike() {
        let mut variants = Variants::new(RULES);
        assert_eq!(variants.best(7, &[1]), None);
        variants.keep(7, &[1, 2, 3, 4], 10, at(0));
        variants.keep(7, &[1, 2, 5, 6], 10, at(0));
        variants.keep(8, &[1, 2, 3, 4, 5], 10, at(0));
        let found = variants.best(7, &[1, 2, 5, 6]).unwrap();
        assert!(found.exact && found.overlap == 1.0);
        let found = variants.best(7, &[1, 2, 3, 9]).unwrap();
        assert_eq!((found.exact, found.overlap), (false, 0.75));
        assert_eq!(found.id, variants.best(7, &[1, 2, 3, 4]).unwrap().id);
        // Half is the least, and in another order it is less than half.
        assert_eq!(variants.best(7, &[1, 2]).unwrap().overlap, 0.5);
        assert_eq!(variants.best(7, &[2, 1]), None);
        assert_eq!(variants.best(7, &[1]), None);
    }

    #[test]
    fn another_order_is_never_exact() {
        let mut variants = Variants::new(Rules {
            order_penalty: 0.0,
            ..RULES
        });
        variants.keep(7, &[1, 2], 10, at(0));
        let found = variants.best(7, &[2, 1]).unwrap();
        assert!(found.overlap == 1.0 && !found.exact);
        // Not even where the one in the right order is worth less.
        variants.keep(7, &[2, 1], 10, at(0));
        variants.used(found.id, 1.0, at(0));
        assert!(variants.best(7, &[2, 1]).unwrap().exact);
    }

    #[test]
    fn of_variants_that_are_as_alike_the_one_worth_more_is_best() {
        let mut variants = Variants::new(RULES);
        variants.keep(7, &[1, 2], 10, at(0));
        variants.keep(7, &[1, 3], 10, at(0));
        for before in [[1, 2], [1, 3], [1, 2]] {
            let id = variants.best(7, &before).unwrap().id;
            variants.used(id, 1.0, at(0));
        }
        let best = variants.best(7, &[1, 4]).unwrap();
        assert_eq!(best.id, variants.best(7, &[1, 2]).unwrap().id);
    }

    #[test]
    fn what_saved_least_per_byte_goes_first() {
        let mut variants = Variants::new(RULES);
        variants.keep(7, &[1], 10, at(0));
        variants.keep(7, &[2], 10, at(0));
        variants.keep(7, &[3], 10, at(0));
        // 1 saved twice a half beside its start, 2 once the whole, and 0.1 more; 3 nothing.
        let id = |variants: &Variants<u32>, first| variants.best(7, &[first]).unwrap().id;
        let (first, second) = (id(&variants, 1), id(&variants, 2));
        variants.used(first, 0.5, at(0));
        variants.used(first, 0.5, at(0));
        variants.used(second, 1.0, at(0));
        variants.used(second, 0.1, at(0));
        assert_eq!(variants.bytes(), 30);
        assert_eq!((variants.evict(), kept(&variants)), (Some(10), vec![1, 2]));
        assert_eq!((variants.evict(), kept(&variants)), (Some(10), vec![2]));
        // As often used, and five times as large.
        variants.keep(8, &[9], 50, at(0));
        let large = variants.best(8, &[9]).unwrap().id;
        variants.used(large, 1.0, at(0));
        variants.used(large, 0.1, at(0));
        assert_eq!((variants.evict(), kept(&variants)), (Some(50), vec![2]));
        assert_eq!((variants.evict(), variants.evict()), (Some(10), None));
        assert_eq!((variants.bytes(), variants.len()), (0, 0));
    }

    #[test]
    fn uses_count_half_after_the_half_life() {
        let mut variants = Variants::new(RULES);
        variants.keep(7, &[1], 10, at(0));
        let id = variants.best(7, &[1]).unwrap().id;
        variants.used(id, 1.0, at(0));
        variants.used(id, 1.0, at(0));
        // 3 · 2^-(t/10) is 1 after 15.85 seconds.
        variants.keep(7, &[2], 10, at(15));
        assert_eq!((variants.evict(), kept(&variants)), (Some(10), vec![1]));
        variants.keep(7, &[3], 10, at(17));
        assert_eq!((variants.evict(), kept(&variants)), (Some(10), vec![3]));
    }

    #[test]
    fn a_chunk_has_so_many_variants_and_none_twice() {
        let mut variants = Variants::new(RULES);
        for before in [1, 2, 3, 3, 3] {
            variants.keep(7, &[before], 10, at(before.into()));
        }
        assert_eq!((variants.len(), variants.bytes()), (3, 30));
        variants.keep(9, &[1], 10, at(0));
        // The oldest of chunk 7, though that of chunk 9 is worth less.
        variants.keep(7, &[4], 10, at(4));
        assert_eq!(kept(&variants), [1, 2, 3, 4]);
        assert!(variants.best(7, &[1]).is_none() && variants.best(9, &[1]).is_some());
        variants.forget(7);
        assert_eq!((kept(&variants), variants.bytes()), (vec![1], 10));
        assert!(variants.best(7, &[2]).is_none());
    }
}
