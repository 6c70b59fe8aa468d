use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const CHUNK: u64 = 100;

fn facts(slot: u32, parent: Option<u32>) -> ChunkFacts {
    ChunkFacts {
        key_hash: u64::from(slot).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        bytes: CHUNK,
        recompute: 256,
        class: Class::default(),
        parent: parent.map(Slot),
        uses: 1,
    }
}

/// Chunks named by their slots, in a tier of so many.
struct Tier {
    policy: Policy,
    capacity: usize,
    stored: HashSet<u32>,
    start: Instant,
    now: Instant,
}

impl Tier {
    fn new(kind: PolicyKind, capacity: usize) -> Self {
        let now = Instant::now();
        Self {
            policy: Policy::new(kind, capacity as u64 * CHUNK, now),
            capacity,
            stored: HashSet::new(),
            start: now,
            now,
        }
    }

    fn insert(&mut self, slot: u32, parent: Option<u32>) {
        self.policy
            .inserted(Slot(slot), &facts(slot, parent), self.now);
        self.stored.insert(slot);
    }

    /// Uses a chunk, or stores it in place of others. Says whether it was there.
    fn request(&mut self, slot: u32) -> bool {
        if self.stored.contains(&slot) {
            self.policy.used(Slot(slot), self.now);
            return true;
        }
        if self.stored.len() == self.capacity {
            self.evict(1, |_| false).unwrap();
        }
        self.insert(slot, None);
        false
    }

    fn evict(&mut self, chunks: u64, exempt: impl Fn(u32) -> bool) -> Option<Vec<u32>> {
        let exempt = |slot: Slot| exempt(slot.0);
        let victims = self.policy.victims(chunks * CHUNK, self.now, exempt)?;
        let victims: Vec<u32> = victims.into_iter().map(|slot| slot.0).collect();
        for victim in &victims {
            assert!(self.stored.remove(victim), "{victim} is evicted once");
            let key = facts(*victim, None).key_hash;
            self.policy.evicted(Slot(*victim), key, self.now);
        }
        Some(victims)
    }
}

#[test]
fn a_long_scan_flushes_what_is_hot_under_lru_only() {
    let hot_after_scan = |kind| {
        let mut tier = Tier::new(kind, 100);
        for round in 0..200 {
            tier.now = tier.start + SECOND * round;
            for hot in 0..50 {
                tier.request(hot);
            }
            tier.request(1000 + round);
        }
        for scanned in 2000..3000 {
            tier.request(scanned);
        }
        (0..50).filter(|hot| tier.stored.contains(hot)).count()
    };
    assert_eq!(hot_after_scan(PolicyKind::Lru), 0);
    assert_eq!(hot_after_scan(PolicyKind::S3Fifo), 50);
    assert!(hot_after_scan(PolicyKind::Reuse) >= 45);
}

#[test]
fn chains_go_from_their_ends() {
    for kind in [PolicyKind::S3Fifo, PolicyKind::Reuse] {
        let mut tier = Tier::new(kind, 10);
        tier.insert(0, None);
        tier.insert(1, Some(0));
        tier.insert(2, Some(1));
        tier.insert(3, Some(0));
        let order = tier.evict(4, |_| false).unwrap();
        let place = |slot| order.iter().position(|other| *other == slot);
        assert!(
            place(2) < place(1) && place(1) < place(0),
            "{kind:?} {order:?}"
        );
        assert!(place(3) < place(0), "{kind:?} {order:?}");
    }
}

#[test]
fn a_parent_that_comes_late_or_goes_early_is_no_harm() {
    for kind in [PolicyKind::S3Fifo, PolicyKind::Reuse] {
        let mut tier = Tier::new(kind, 10);
        tier.insert(1, None);
        tier.insert(0, None);
        tier.policy.linked(Slot(1), Slot(0));
        tier.policy.linked(Slot(1), Slot(0));
        assert_eq!(tier.evict(1, |_| false), Some(vec![1]));
        tier.insert(1, Some(0));
        tier.policy.removed(Slot(0));
        tier.stored.remove(&0);
        // Another chunk in the parent's slot is not the parent.
        tier.insert(0, Some(1));
        assert_eq!(tier.evict(2, |_| false), Some(vec![0, 1]), "{kind:?}");
    }
}

#[test]
fn what_cannot_succeed_evicts_nothing_and_what_is_let_go_can_be_evicted() {
    for kind in PolicyKind::ALL {
        let mut tier = Tier::new(kind, 10);
        for slot in 0..4 {
            tier.insert(slot, slot.checked_sub(1));
        }
        assert_eq!(tier.evict(5, |_| false), None);
        assert_eq!(tier.evict(1, |_| true), None);
        // Only the end of the chain is held: better an orphan than a refusal.
        assert_eq!(
            tier.evict(3, |slot| slot == 3).map(|all| all.len()),
            Some(3)
        );
        assert_eq!(tier.evict(1, |_| false), Some(vec![3]), "{kind:?}");
        assert!(tier.policy.is_empty());
    }
}

#[test]
fn exempt_chunks_are_not_looked_at_again_and_again() {
    let looks = std::cell::Cell::new(0u32);
    for kind in PolicyKind::ALL {
        looks.set(0);
        let mut tier = Tier::new(kind, 20_000);
        for slot in 0..20_000 {
            tier.insert(slot, None);
        }
        for _ in 0..1000 {
            let exempt = |slot| {
                looks.set(looks.get() + 1);
                !(1000..19_000).contains(&slot)
            };
            tier.evict(1, exempt).unwrap();
        }
        assert!(looks.get() < 15_000, "{kind:?}: {}", looks.get());
    }
}

#[test]
fn expired_chunks_go_first_then_those_above_quota() {
    let [batch, agent, other] = [1, 2, 3].map(|class| Class::new(class).unwrap());
    for kind in PolicyKind::ALL {
        let mut tier = Tier::new(kind, 100);
        let time_to_live = Some(SECOND * 60);
        tier.policy.limit(
            batch,
            ClassLimits {
                time_to_live,
                quota_bytes: None,
            },
        );
        tier.policy.limit(
            agent,
            ClassLimits {
                time_to_live: None,
                quota_bytes: Some(2 * CHUNK),
            },
        );
        let insert = |tier: &mut Tier, slot, class| {
            let facts = ChunkFacts {
                class,
                ..facts(slot, None)
            };
            tier.policy.inserted(Slot(slot), &facts, tier.now);
            tier.stored.insert(slot);
        };
        insert(&mut tier, 0, other);
        insert(&mut tier, 10, batch);
        tier.now += SECOND * 50;
        insert(&mut tier, 11, batch);
        for slot in 20..24 {
            insert(&mut tier, slot, agent);
        }
        tier.now += SECOND * 20;
        assert_eq!(tier.evict(1, |_| false), Some(vec![10]), "{kind:?}");
        let above: Vec<u32> = tier.evict(2, |_| false).unwrap();
        assert!(
            above.iter().all(|slot| (20..24).contains(slot)),
            "{above:?}"
        );
        // The quota is met; the general order is the oldest first.
        assert_eq!(tier.evict(1, |_| false), Some(vec![0]), "{kind:?}");
    }
}

#[test]
fn what_is_cheap_to_compute_again_goes_first() {
    let mut tier = Tier::new(PolicyKind::Reuse, 10);
    for (slot, recompute) in [(0, 1000), (1, 250), (2, 4000)] {
        let facts = ChunkFacts {
            recompute,
            ..facts(slot, None)
        };
        tier.policy.inserted(Slot(slot), &facts, tier.now);
        tier.stored.insert(slot);
    }
    assert_eq!(tier.evict(3, |_| false), Some(vec![1, 0, 2]));
}

/// Chunks that are asked for again after a minute, among many that never are.
#[test]
fn reuse_is_learnt() {
    let hits = |kind| {
        let mut tier = Tier::new(kind, 100);
        let mut hits = 0;
        for second in 0..3000u32 {
            tier.now = tier.start + SECOND * second;
            // Every chunk is used three times, 60 seconds apart, or once.
            for turn in 0..3u32 {
                let slot = (second + 6000).wrapping_sub(60 * turn);
                hits += u32::from(tier.request(slot));
            }
            for once in 0..4 {
                tier.request(10_000 + second * 4 + once);
            }
        }
        hits
    };
    let [lru, _, reuse] = PolicyKind::ALL.map(hits);
    assert!(reuse > lru + 1000, "{lru} {reuse}");
}

#[test]
fn admission_asks_for_what_it_says() {
    let prospect = Prospect {
        uses: 1,
        reuse: 0.2,
        last_used: Instant::now(),
    };
    assert!(Admission::All.admits(&prospect));
    assert!(!Admission::SecondUse.admits(&prospect));
    assert!(Admission::MinReuse(0.2).admits(&prospect));
    assert!(!Admission::MinReuse(0.3).admits(&prospect));
}

#[test]
fn names_are_those_of_the_configuration() {
    for kind in PolicyKind::ALL {
        let json = serde_json::to_string(&kind).unwrap();
        assert_eq!(json, format!("{:?}", kind.name()));
    }
    let json = serde_json::to_string(&Admission::default()).unwrap();
    assert_eq!(json, r#"{"min-reuse":0.05}"#);
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u32, Option<u32>),
    Use(u32),
    Remove(u32),
    Link(u32, u32),
    /// Chunks wanted; a bit per slot is whether it is exempt.
    Evict(u64, u64),
    Wait(u32),
}

const SLOTS: u32 = 40;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let slot = || 0..SLOTS;
    let step = prop_oneof![
        6 => (slot(), prop::option::weighted(0.8, slot())).prop_map(|(s, p)| Step::Insert(s, p)),
        4 => slot().prop_map(Step::Use),
        1 => slot().prop_map(Step::Remove),
        1 => (slot(), slot()).prop_map(|(child, parent)| Step::Link(child, parent)),
        3 => (1..6u64, any::<u64>(), any::<u64>()).prop_map(|(n, a, b)| Step::Evict(n, a & b)),
        2 => (1..5000u32).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 1..200)
}

/// What a policy should know: the stored chunks with their parents.
#[derive(Default)]
struct Model {
    parents: BTreeMap<u32, Option<u32>>,
    recency: VecDeque<u32>,
}

impl Model {
    fn touch(&mut self, slot: u32) {
        self.recency.retain(|other| *other != slot);
        self.recency.push_back(slot);
    }

    fn remove(&mut self, slot: u32) {
        self.parents.remove(&slot);
        self.recency.retain(|other| *other != slot);
        for parent in self.parents.values_mut() {
            *parent = parent.filter(|parent| *parent != slot);
        }
    }

    fn descends(&self, mut slot: u32, from: u32) -> bool {
        loop {
            if slot == from {
                return true;
            }
            match self.parents.get(&slot) {
                Some(Some(parent)) => slot = *parent,
                _ => return false,
            }
        }
    }
}

fn check(kind: PolicyKind, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut tier = Tier::new(kind, 1000);
    let mut model = Model::default();
    let mut last_exempt: HashMap<u32, bool> = HashMap::new();
    for step in steps {
        match step {
            Step::Insert(slot, parent) if !model.parents.contains_key(&slot) => {
                let parent = parent.filter(|parent| model.parents.contains_key(parent));
                tier.insert(slot, parent);
                model.parents.insert(slot, parent);
                model.touch(slot);
                last_exempt.remove(&slot);
            }
            Step::Use(slot) if model.parents.contains_key(&slot) => {
                tier.policy.used(Slot(slot), tier.now);
                model.touch(slot);
            }
            Step::Remove(slot) => {
                tier.policy.removed(Slot(slot));
                tier.stored.remove(&slot);
                model.remove(slot);
            }
            Step::Link(child, parent) => {
                if model.parents.get(&child) == Some(&None)
                    && model.parents.contains_key(&parent)
                    && !model.descends(parent, child)
                {
                    tier.policy.linked(Slot(child), Slot(parent));
                    model.parents.insert(child, Some(parent));
                }
            }
            Step::Evict(chunks, exempt) => {
                let is_exempt = |slot: u32| exempt >> slot & 1 == 1;
                let free = model
                    .parents
                    .keys()
                    .filter(|slot| !is_exempt(**slot))
                    .count();
                let victims = tier.evict(chunks, is_exempt);
                let Some(victims) = victims else {
                    prop_assert!((free as u64) < chunks, "{free} could be evicted");
                    continue;
                };
                prop_assert_eq!(victims.len() as u64, chunks);
                for victim in victims {
                    prop_assert!(!is_exempt(victim));
                    if kind == PolicyKind::Lru && exempt == 0 && last_exempt.is_empty() {
                        prop_assert_eq!(Some(&victim), model.recency.front());
                    }
                    let child = model.parents.iter().find(|(child, parent)| {
                        **parent == Some(victim)
                            && !is_exempt(**child)
                            && last_exempt.get(child) != Some(&true)
                    });
                    if kind != PolicyKind::Lru {
                        prop_assert!(child.is_none(), "{victim} went before {child:?}");
                    }
                    model.remove(victim);
                }
                for slot in model.parents.keys().filter(|slot| is_exempt(**slot)) {
                    last_exempt.insert(*slot, true);
                }
            }
            Step::Wait(millis) => tier.now += Duration::from_millis(millis.into()),
            Step::Insert(..) | Step::Use(_) => {}
        }
        prop_assert_eq!(tier.policy.len(), model.parents.len());
    }
    // Nothing was lost: all of it can be evicted.
    let rest = model.parents.len() as u64;
    if rest > 0 {
        prop_assert_eq!(
            tier.evict(rest, |_| false).map(|all| all.len() as u64),
            Some(rest)
        );
    }
    prop_assert!(tier.policy.is_empty());
    prop_assert!(tier.classes_are_empty());
    Ok(())
}

impl Tier {
    fn classes_are_empty(&self) -> bool {
        self.policy.classes.iter().all(|class| class.bytes == 0)
    }
}

proptest! {
    /// Victims are stored, not exempt, found where there are any, and never before a
    /// child that could go; under `lru`, they are those of a naive list.
    #[test]
    fn victims_are_right(kind in prop::sample::select(&PolicyKind::ALL[..]), steps in steps()) {
        check(kind, steps)?;
    }
}
