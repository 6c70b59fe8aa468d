//! What was acknowledged survives, and nothing else is ever seen: power cuts under a
//! store, and `kill -9` of a daemon.
//!
//! `KVASIR_CRASH_POINTS` says how many crashes of each kind there are, and
//! `KVASIR_CRASH_SEED` where to start.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use kvasir_tests::crash::{Chunks, Kills, Load, Outcome, PowerCuts, Violation, count_from_env};
use kvasir_tests::faulty::Lie;

const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");
const CLIENTS: u32 = 6;
/// Crashes in the life of one directory.
const PER_DIRECTORY: u32 = 5;

fn points() -> u64 {
    count_from_env("KVASIR_CRASH_POINTS", 100)
}

fn first_seed() -> u64 {
    count_from_env("KVASIR_CRASH_SEED", 0)
}

/// Directories that together live through the crashes asked for, and their seeds.
fn seeds() -> impl Iterator<Item = u64> {
    let first = first_seed();
    first..first + points().div_ceil(PER_DIRECTORY.into())
}

fn chunks() -> Chunks {
    Chunks::new(Load::chunks(CLIENTS))
}

#[track_caller]
fn assert_sound(what: &str, outcome: &Outcome, begin: Instant) {
    println!(
        "{what}: {} crashes, {} chunks had to be there, {} had to be gone, {} violations, {:.1?}",
        outcome.points,
        outcome.kept,
        outcome.gone,
        outcome.findings.len(),
        begin.elapsed(),
    );
    assert!(outcome.findings.is_empty(), "{:#?}", outcome.findings);
    assert!(outcome.kept > outcome.points, "too little was acknowledged");
    assert!(outcome.gone > outcome.points, "too little was deleted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_cuts_lose_nothing_that_was_acknowledged() {
    let (begin, chunks) = (Instant::now(), chunks());
    let mut outcome = Outcome::default();
    for seed in seeds() {
        let cuts = PowerCuts {
            seed,
            crashes: PER_DIRECTORY,
            tight: seed % 2 == 1,
            lie: None,
        };
        outcome.merge(cuts.run(&chunks).await.unwrap());
    }
    assert_sound("power cut", &outcome, begin);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_daemon_loses_nothing_that_was_acknowledged() {
    let (begin, chunks) = (Instant::now(), chunks());
    let mut outcome = Outcome::default();
    for seed in seeds() {
        let kills = Kills {
            binary: DAEMON,
            seed,
            crashes: PER_DIRECTORY,
            tight: seed % 2 == 1,
        };
        outcome.merge(kills.run(&chunks).await.unwrap());
    }
    assert_sound("kill -9", &outcome, begin);
}

/// Whoever acknowledges what was not synced is found out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledging_before_the_sync_is_found() {
    assert_found(Lie::Synced).await;
}

/// Whoever publishes what was not written is found out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishing_before_the_write_is_found() {
    assert_found(Lie::Written(Duration::from_millis(40))).await;
}

async fn assert_found(lie: Lie) {
    let chunks = chunks();
    let mut crashes = 0;
    for seed in 0..20 {
        let cuts = PowerCuts {
            seed,
            crashes: 1,
            tight: false,
            lie: Some(lie),
        };
        let outcome = cuts.run(&chunks).await.unwrap();
        crashes += outcome.points;
        let lost = |violation: &Violation| matches!(violation, Violation::Lost(_));
        if outcome.findings.iter().any(|it| lost(&it.violation)) {
            println!("{lie:?}: found after {crashes} crashes");
            return;
        }
    }
    panic!("{lie:?} was not found in {crashes} crashes");
}
