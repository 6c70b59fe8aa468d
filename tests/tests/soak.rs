//! A daemon at the edge of its budgets serves no wrong byte and keeps nothing that its
//! clients left behind. `make soak` runs the same for minutes, and judges its memory.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use kvasir_tests::soak::Soak;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_under_every_load_keeps_its_budgets() {
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_daemon"));
    daemon.env("RUST_LOG", "error");
    let parent = std::env::temp_dir();
    let outcome = Soak::QUICK.run(daemon, &parent, |_| ()).await.unwrap();
    assert!(outcome.violations.is_empty(), "{:#?}", outcome.violations);
    let counts = outcome.tally.counts();
    println!("{counts:?}");
    for operation in [
        "puts", "gets", "lookups", "pins", "deletes", "lists", "watched",
    ] {
        assert!(counts.contains_key(operation), "{operation}: {counts:?}");
    }
}
