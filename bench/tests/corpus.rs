//! `kvasir-bench corpus` prints the bytes that `bench/quality/corpus.py` prints.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::path::Path;
use std::process::Command;

const TASKS: [&str; 13] = [
    "hop1", "hop2", "coref2", "coref3", "coref4", "override", "update", "ordinal", "compare",
    "needle", "kv", "copy", "copyref",
];

#[test]
fn tasks_are_those_of_python() {
    for (index, task) in TASKS.into_iter().enumerate() {
        let seed = (u64::MAX - index as u64).to_string();
        let split = ["train", "test"][index % 2];
        same(&[
            "--task", task, "--chunks", "7", "--size", "72", "--seed", &seed, "--count", "12",
            "--split", split,
        ]);
    }
}

#[test]
fn samples_are_those_of_python() {
    for profile in [
        "{}",
        r#"{"pairs": 25}"#,
        r#"{"total": 1000, "update": 300, "town": 1000, "continuation": 700, "persons": 3}"#,
    ] {
        same(&["--profile", profile, "--split", "train", "--count", "100"]);
    }
}

#[test]
fn defaults_are_those_of_python() {
    same(&["--task", "hop1"]);
}

/// Both programs print the same, and something.
fn same(arguments: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("quality/corpus.py");
    let mut python = Command::new("python3");
    let theirs = stdout(python.arg("-B").arg(script).args(arguments));
    let mut bench = Command::new(env!("CARGO_BIN_EXE_kvasir-bench"));
    let ours = stdout(bench.arg("corpus").args(arguments));
    assert!(!theirs.is_empty());
    assert!(ours == theirs, "{arguments:?}");
}

fn stdout(command: &mut Command) -> Vec<u8> {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{:?}: {error}", command.get_program()));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    output.stdout
}
