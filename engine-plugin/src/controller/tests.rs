#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "bytes and steps of a simulation"
)]

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const LAYER_BYTES: u64 = 1 << 20;

fn goal(chunks: &[Level], layers: u16, compute_all: f64, deadline: Instant) -> Goal {
    let count = index_to_f64(chunks.len());
    let compute = |loaded: usize| {
        let share = 1.0 - index_to_f64(loaded) / count;
        Duration::from_secs_f64(2e-3 + compute_all * share)
    };
    let stored = |level: &Level| {
        let bits = match level.parts() {
            _ if !level.is_nested() => 16.0,
            parts => [0.82, 2.21, 3.68][usize::from(parts) - 1],
        };
        let bytes = bits / 16.0 * to_f64(LAYER_BYTES) * f64::from(layers);
        Stored {
            level: *level,
            bytes: bytes as u64,
        }
    };
    Goal {
        chunks: chunks.iter().map(stored).collect(),
        layers,
        layer_bytes: LAYER_BYTES,
        compute: (0..=chunks.len()).map(compute).collect(),
        deadline,
    }
}

/// What became of a goal over a link.
#[derive(Debug)]
struct Ran {
    chunks: usize,
    /// Parts that landed, over layers and chunks that were kept.
    parts: u64,
    /// Seconds to the first token.
    ttft: f64,
    shrunk: Vec<usize>,
}

/// Drives a controller over a link of `rate(seconds)` bytes a second, and asserts on the way
/// what holds for any.
fn run(goal: &Goal, begun: Instant, learnt: Learnt, rate: impl Fn(f64) -> f64) -> Ran {
    let round_trip = 2e-3;
    let mut controller = Controller::new(goal.clone(), learnt);
    let mut asked = std::collections::HashSet::new();
    let mut coming: VecDeque<(f64, usize, u16, u8, u64)> = VecDeque::new();
    let (mut now, mut free) = (0.0, 0.0f64);
    let mut landed: Vec<(f64, Vec<u8>)> = Vec::new();
    let (mut restarted, mut shrunk) = (0.0, Vec::new());
    let at = |seconds: f64| begun + Duration::from_secs_f64(seconds);
    let parts_in_all: usize = goal
        .chunks
        .iter()
        .map(|it| usize::from(it.level.parts()))
        .sum();
    let mut acts = 0;
    loop {
        let action = controller.poll(at(now));
        if !matches!(action, Action::Wait { .. }) {
            acts += 1;
            let most = (parts_in_all + 1) * usize::from(goal.layers) + goal.chunks.len() + 1;
            assert!(acts <= most, "{acts} actions do not end");
        }
        match action {
            Action::Done => break,
            Action::Shrink { chunks } => {
                assert!(shrunk.last().is_none_or(|before| chunks < *before));
                restarted = now;
                shrunk.push(chunks);
            }
            Action::Land { layer } => {
                assert_eq!(usize::from(layer), landed.len(), "in order");
                let parts: Vec<u8> = (0..controller.chunks())
                    .map(|chunk| controller.parts(chunk, layer))
                    .collect();
                assert!(parts.iter().all(|parts| *parts > 0), "with its base");
                landed.push((now, parts));
            }
            Action::Request(segment) => {
                assert!(segment.chunks.end <= controller.chunks());
                assert!(!segment.chunks.is_empty() && !segment.layers.is_empty());
                for layer in segment.layers.clone() {
                    for chunk in segment.chunks.clone() {
                        let part = segment.part;
                        let stored = goal.chunks[chunk];
                        assert!(part < stored.level.parts(), "not stored");
                        assert!(asked.insert((chunk, layer, part)), "asked for twice");
                        assert!(part == 0 || asked.contains(&(chunk, layer, part - 1)));
                        let share = PartSizes::default().share(stored.level, part);
                        let bytes = to_f64(stored.bytes) / f64::from(goal.layers) * share;
                        free = free.max(now + round_trip);
                        let mut left = bytes;
                        // A link that is dead for longer never brings it.
                        while left > 0.0 && free < 100.0 {
                            let step = (left / rate(free).max(1.0)).clamp(1e-6, 1e-3);
                            left -= rate(free) * step;
                            free += step;
                        }
                        coming.push_back((free, chunk, layer, part, bytes as u64));
                    }
                }
                if segment.part > 0 {
                    let first = u16::try_from(landed.len()).unwrap();
                    for layer in first..goal.layers {
                        for chunk in 0..controller.target {
                            assert!(asked.contains(&(chunk, layer, 0)), "bases come first");
                        }
                    }
                }
            }
            Action::Wait { until } => {
                let until = until.duration_since(begun).as_secs_f64();
                assert!(until > now, "a wait ends later");
                now = until;
                if let Some(&(comes, chunk, layer, part, bytes)) = coming.front()
                    && comes <= now
                {
                    now = comes;
                    coming.pop_front();
                    controller.arrived(at(now), chunk, layer, part, bytes);
                }
            }
        }
    }
    let chunks = controller.chunks();
    let work = goal.compute[chunks].as_secs_f64() / f64::from(goal.layers);
    let mut ttft = restarted;
    for layer in 0..usize::from(goal.layers) {
        let land = landed.get(layer).map_or(restarted, |landed| landed.0);
        ttft = f64::max(ttft, land) + work;
    }
    let parts = landed.iter().flat_map(|(_, parts)| &parts[..chunks]);
    Ran {
        chunks,
        parts: parts.map(|parts| u64::from(*parts)).sum(),
        ttft,
        shrunk,
    }
}

fn after(begun: Instant, seconds: f64) -> Instant {
    begun + Duration::from_secs_f64(seconds)
}

/// After a fetch over a link of so many bytes a second.
fn learnt(rate: f64) -> Learnt {
    let begun = Instant::now();
    let mut learnt = Learnt::default();
    learnt.link.requested(begun);
    for arrival in 1..=100 {
        let at = 2e-3 + f64::from(arrival) * 1e-3;
        let bytes = (rate * 1e-3) as u64;
        learnt.link.arrived(after(begun, at), bytes, arrival == 100);
    }
    learnt
}

#[test]
fn a_fast_link_brings_everything() {
    let begun = Instant::now();
    let goal = goal(&[Level::L2; 4], 8, 1.0, after(begun, 2.0));
    let ran = run(&goal, begun, Learnt::default(), |_| 1e9);
    assert_eq!((ran.chunks, ran.parts), (4, 4 * 8 * 3));
    assert!(ran.ttft < 0.1, "{ran:?}");
}

#[test]
fn what_is_stored_coarser_or_exact_comes_as_it_is() {
    let begun = Instant::now();
    let stored = [Level::L1, Level::RAW, Level::L0, Level::LOSSLESS, Level::L2];
    let goal = goal(&stored, 8, 1.0, after(begun, 2.0));
    let ran = run(&goal, begun, learnt(1e9), |_| 1e9);
    assert_eq!((ran.chunks, ran.parts), (5, 8 * (2 + 1 + 1 + 1 + 3)));
}

#[test]
fn refinements_come_until_the_deadline() {
    let begun = Instant::now();
    let deadline = 0.5;
    let goal = goal(&[Level::L2; 8], 16, 10.0, after(begun, deadline));
    // The base takes 0.23 s of it, and all of it would take 1 s.
    let ran = run(&goal, begun, learnt(30e6), |_| 30e6);
    assert_eq!(ran.chunks, 8);
    assert!(ran.ttft <= deadline, "{ran:?}");
    assert!(ran.parts > 8 * 16 * 3 / 2, "{ran:?}");
}

#[test]
fn a_link_that_dies_is_computed_around_in_time() {
    let begun = Instant::now();
    let goal = goal(&[Level::L2; 8], 16, 0.4, after(begun, 1.0));
    for dies in [0.0, 0.01, 0.1] {
        let ran = run(&goal, begun, learnt(20e6), |at| {
            if at < dies { 20e6 } else { 0.0 }
        });
        assert_eq!(ran.shrunk.last(), Some(&0), "{ran:?}");
        assert!(ran.ttft <= 1.0, "{ran:?}");
        // And not before it must be.
        assert!(ran.ttft > 0.8, "{ran:?}");
    }
}

#[test]
fn a_slow_link_and_computing_together_are_in_time() {
    let begun = Instant::now();
    // Either alone takes longer than there is time.
    let goal = goal(&[Level::L2; 16], 16, 1.2, after(begun, 1.0));
    let ran = run(&goal, begun, learnt(10e6), |_| 10e6);
    assert!(ran.chunks > 0 && ran.chunks < 16, "{ran:?}");
    assert!(ran.ttft <= 1.0, "{ran:?}");
}

#[test]
fn a_short_outage_is_waited_for() {
    let begun = Instant::now();
    // Computing would be too late from the beginning.
    let goal = goal(&[Level::L2; 8], 16, 5.0, after(begun, 1.0));
    let ran = run(&goal, begun, learnt(100e6), |at| {
        if (0.03..0.6).contains(&at) {
            0.0
        } else {
            100e6
        }
    });
    assert_eq!(ran.chunks, 8, "{ran:?}");
    assert!(ran.ttft <= 1.0, "{ran:?}");
}

#[test]
fn what_is_lost_takes_what_follows_with_it() {
    let begun = Instant::now();
    let goal = goal(&[Level::L2; 4], 2, 1.0, after(begun, 1.0));
    let mut controller = Controller::new(goal, Learnt::default());
    assert!(matches!(controller.poll(begun), Action::Request(_)));
    controller.lost(1);
    assert_eq!(controller.chunks(), 1);
    controller.lost(2);
    assert_eq!(controller.chunks(), 1);
    controller.lost(0);
    assert_eq!(controller.poll(begun), Action::Done);
}

#[test]
fn once_closed_what_is_here_lands() {
    let begun = Instant::now();
    let goal = goal(&[Level::L1; 2], 2, 1.0, after(begun, 1.0));
    let mut controller = Controller::new(goal, learnt(1e9));
    while let Action::Request(_) = controller.poll(begun) {}
    // The second chunk lacks the base of its last layer.
    for (chunk, layer) in [(0, 0), (1, 0), (0, 1)] {
        controller.arrived(after(begun, 0.01), chunk, layer, 0, 50_000);
    }
    controller.arrived(after(begun, 0.01), 0, 1, 1, 80_000);
    controller.close();
    let now = after(begun, 0.02);
    let acts = std::iter::from_fn(|| Some(controller.poll(now)).filter(|it| *it != Action::Done));
    let acts: Vec<Action> = acts.take(10).collect();
    let land = |layer| Action::Land { layer };
    assert_eq!(acts, [land(0), Action::Shrink { chunks: 1 }, land(1)]);
    assert_eq!([controller.parts(0, 0), controller.parts(0, 1)], [1, 2]);
}

#[test]
fn sizes_of_parts_are_learnt() {
    let mut sizes = PartSizes::default();
    let [base, first, second] = [0.2, 0.3, 0.5];
    for _ in 0..300 {
        for (part, share) in [(0, base), (1, first), (2, second)] {
            sizes.observe(Level::L2, part, (share * 1e6) as u64, 1e6);
        }
    }
    for (part, share) in [(0, base), (1, first), (2, second)] {
        let found = sizes.share(Level::L2, part);
        assert!((found - share).abs() < 0.01, "{part}: {found}");
    }
    let of_two = sizes.share(Level::L1, 0) + sizes.share(Level::L1, 1);
    assert!((of_two - 1.0).abs() < 1e-9);
    assert!((sizes.share(Level::RAW, 0) - 1.0).abs() < 1e-9);
}

/// A link under observation.
struct Observed {
    link: LinkEstimate,
    begun: Instant,
    at: f64,
}

impl Observed {
    fn new() -> Self {
        let begun = Instant::now();
        let mut link = LinkEstimate::default();
        link.requested(begun);
        let at = 5e-3;
        link.arrived(after(begun, at), 1000, false);
        Self { link, begun, at }
    }

    /// Arrivals of a millisecond each.
    fn at_rate(mut self, rate: f64, seconds: f64) -> Self {
        let until = self.at + seconds;
        while self.at < until {
            self.at += 1e-3;
            let bytes = (rate * 1e-3) as u64;
            self.link.arrived(after(self.begun, self.at), bytes, false);
        }
        self
    }

    fn forecast(&self, later: f64) -> Forecast {
        self.link.forecast(after(self.begun, self.at + later))
    }
}

fn close_to(found: f64, expected: f64) -> bool {
    (found / expected - 1.0).abs() < 0.1
}

#[test]
fn a_steady_link_is_known_soon() {
    let forecast = Observed::new().at_rate(40e6, 0.1).forecast(0.0);
    assert!(close_to(forecast.median, 40e6), "{forecast:?}");
    assert!(forecast.low < forecast.median && forecast.median < forecast.high);
    assert!(close_to(forecast.round_trip, 5e-3), "{forecast:?}");
}

#[test]
fn a_step_is_followed_and_makes_uncertain() {
    let steady = Observed::new().at_rate(40e6, 1.0);
    let narrow = steady.forecast(0.0);
    let step = steady.at_rate(10e6, 0.1);
    let wide = step.forecast(0.0);
    assert!(wide.median < 15e6, "{wide:?}");
    assert!(wide.low / wide.median < narrow.low / narrow.median);
    let settled = step.at_rate(10e6, 0.5).forecast(0.0);
    assert!(close_to(settled.median, 10e6), "{settled:?}");
}

#[test]
fn bursts_are_no_bandwidth() {
    let mut bursts = Observed::new();
    for _ in 0..50 {
        bursts.at += 20e-3;
        for _ in 0..10 {
            bursts.at += 1e-5;
            bursts
                .link
                .arrived(after(bursts.begun, bursts.at), 80_000, false);
        }
    }
    let forecast = bursts.forecast(0.0);
    assert!(close_to(forecast.median, 40e6), "{forecast:?}");
}

#[test]
fn a_stall_is_news_before_it_ends_and_an_outage_is_forgotten() {
    let link = Observed::new().at_rate(40e6, 0.5);
    let stalled = [0.01, 0.1, 0.3, 1.0].map(|later| link.forecast(later).median);
    assert!(close_to(stalled[0], 40e6), "{stalled:?}");
    assert!(
        stalled.is_sorted_by(|a, b| a > b) && stalled[3] < 1e6,
        "{stalled:?}"
    );
    let mut back = link;
    back.at += 1.0;
    let back = back.at_rate(40e6, 0.3).forecast(0.0);
    assert!(back.median > 20e6, "{back:?}");
}

#[test]
fn silence_without_requests_says_nothing() {
    let mut link = Observed::new().at_rate(40e6, 0.5);
    link.link.idle();
    let forecast = link.forecast(2.0);
    assert!(close_to(forecast.median, 40e6), "{forecast:?}");
    let old = link.forecast(3600.0);
    assert!(close_to(old.median, 125e6), "{old:?}");
    assert!(old.low < 0.1 * old.median);
}

fn any_level() -> impl Strategy<Value = Level> {
    proptest::sample::select(vec![
        Level::L2,
        Level::L2,
        Level::L1,
        Level::L0,
        Level::RAW,
        Level::LOSSLESS,
        Level::INT8,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What `run` asserts, for whatever is stored, however the link is.
    #[test]
    fn plans_are_sound(
        stored in vec(any_level(), 1..9),
        layers in 1u16..7,
        compute in 0.0f64..2.0,
        deadline in 0.0f64..1.0,
        rates in vec(0.0f64..1.0, 1..8),
        fastest in 1e6f64..1e9,
        known in proptest::option::of(1e5f64..1e10),
    ) {
        let begun = Instant::now();
        let goal = goal(&stored, layers, compute, after(begun, deadline));
        let learnt = known.map_or_else(Learnt::default, learnt);
        let ran = run(&goal, begun, learnt, |at| {
            // No link is dead for ever.
            let step = (at / 0.05) as usize;
            rates.get(step).map_or(fastest, |share| share * fastest)
        });
        prop_assert!(ran.chunks <= stored.len() && ran.ttft.is_finite());
    }

    /// Twice the bandwidth brings no less.
    #[test]
    fn more_bandwidth_is_no_worse(
        chunks in 1usize..9,
        layers in 1u16..9,
        compute in 0.0f64..2.0,
        deadline in 0.05f64..1.0,
        rate in 1e6f64..1e9,
    ) {
        let begun = Instant::now();
        let goal = goal(&vec![Level::L2; chunks], layers, compute, after(begun, deadline));
        let [slow, fast] = [rate, 2.0 * rate].map(|rate| run(&goal, begun, learnt(rate), |_| rate));
        prop_assert!(slow.chunks <= fast.chunks, "{:?} {:?}", slow, fast);
        let late = [&slow, &fast].map(|ran| ran.ttft > deadline);
        prop_assert!(late[0] || !late[1], "{:?} {:?}", slow, fast);
        if slow.chunks == fast.chunks {
            prop_assert!(slow.parts <= fast.parts, "{:?} {:?}", slow, fast);
        }
    }

    /// Whatever comes, however it comes: rates are positive numbers, in order.
    #[test]
    fn forecasts_are_numbers(
        events in vec((0u8..4, 0u64..1 << 40, 0.0f64..100.0), 0..200),
        later in 0.0f64..1e6,
    ) {
        let begun = Instant::now();
        let mut link = LinkEstimate::default();
        let mut at = 0.0;
        for (what, bytes, seconds) in events {
            at += if what == 3 { 0.0 } else { seconds * seconds * 1e-3 };
            match what {
                0 => link.requested(after(begun, at)),
                1 => link.idle(),
                _ => link.arrived(after(begun, at), bytes, bytes % 7 == 0),
            }
            let soon = link.forecast(after(begun, at));
            let later = link.forecast(after(begun, at + later));
            for forecast in [soon, later] {
                let Forecast { low, median, high, round_trip } = forecast;
                prop_assert!(low >= 1.0 && low <= median && median <= high, "{:?}", forecast);
                prop_assert!(high.is_finite() && round_trip.is_finite() && round_trip >= 0.0);
            }
        }
    }
}
