//! `kvasir` as a process.

use std::fs;
use std::process::{Command, Output};

use kvasir_client::Client;
use serde_json::Value;

use crate::daemon::Daemon;
use crate::profiles::{digest, profile};
use crate::support::*;

fn kvasir(daemon: &Daemon, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvasir"))
        .env("KVASIR_ENDPOINT", &daemon.endpoint)
        .args(arguments)
        .output()
        .unwrap()
}

fn text(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = kvasir(daemon, arguments);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    assert_eq!(errors, "");
    String::from_utf8(output.stdout).unwrap()
}

fn json(daemon: &Daemon, arguments: &[&str]) -> Value {
    let mut arguments = arguments.to_vec();
    arguments.push("--json");
    serde_json::from_str(&text(daemon, &arguments)).unwrap()
}

fn failure(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = kvasir(daemon, arguments);
    assert!(!output.status.success());
    assert_eq!(output.stdout, b"");
    String::from_utf8(output.stderr).unwrap()
}

#[tokio::test]
async fn every_command_speaks_text_and_json() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&directory.path().join("data"), &[]);
    let client = Client::connect(&daemon.endpoint).await.unwrap();
    client.put(&chunk(1)).await.unwrap();
    client.put(&chunk(2)).await.unwrap();
    let first = key(1).to_string();
    let second = key(2).to_string();

    let status = json(&daemon, &["status"]);
    assert_eq!(status["endpoint"], format!("http://{}", daemon.endpoint));
    assert_eq!(status["tiers"][0]["tier"], "memory");
    assert_eq!(status["tiers"][1]["chunks"], 2);
    assert!(text(&daemon, &["status"]).contains("memory"));

    let listed = json(&daemon, &["ls"]);
    assert_eq!(listed["chunks"][0]["key"], first.as_str());
    assert_eq!(listed["chunks"][0]["layout"]["layers"], u64::from(LAYERS));
    assert_eq!(
        listed["chunks"][1]["tiers"],
        serde_json::json!(["memory", "disk"])
    );
    let rest = json(&daemon, &["ls", "--after", &first, "--limit", "5"]);
    assert_eq!(rest["chunks"].as_array().unwrap().len(), 1);
    let table = text(&daemon, &["ls"]);
    assert!(table.ends_with("2 chunks, 512.3KiB\n"), "{table}");

    let file = directory.path().join("chunk.kv");
    let path = file.to_str().unwrap();
    let got = json(&daemon, &["get", &first, "-o", path]);
    assert_eq!(got["bytes"], fs::metadata(&file).unwrap().len());
    assert!(text(&daemon, &["get", &first, "--output", path]).contains("from memory"));

    let removed = json(&daemon, &["rm", &first, &key(9).to_string()]);
    assert_eq!(
        (&removed["deleted"], &removed["absent"]),
        (&1.into(), &1.into())
    );
    assert_eq!(text(&daemon, &["rm", &second]), "1 deleted\n");

    let put = json(&daemon, &["put", path]);
    assert_eq!(put["stored"][0]["key"], first.as_str());
    assert_eq!(put["stored"][0]["outcome"], "stored");
    assert_eq!(put["stored"][0]["durable"], true);
    assert!(text(&daemon, &["put", path]).contains("already-present"));
    assert_eq!(read_all(&client, &[1]).await, 1);

    let ticks = text(&daemon, &["top", "--json", "-n", "2", "-i", "0.05"]);
    let ticks: Vec<Value> = ticks
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(ticks.len(), 2);
    assert!(ticks[1]["rates"]["sent_bytes"].is_number());
    assert!(text(&daemon, &["top", "-n", "1"]).contains("received"));
}

#[tokio::test]
async fn profiles_are_stored_listed_fetched_and_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&directory.path().join("data"), &[]);
    let profile = profile(1, 1.0);
    let digest = digest(&profile).to_string();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (from, to) = (file("profile.bin"), file("again.bin"));
    fs::write(&from, profile.as_bytes()).unwrap();

    let error = failure(&daemon, &["profiles", "get", &digest, &to]);
    assert!(error.contains("`kvasir profiles`"), "{error}");
    let error = failure(&daemon, &["profiles", "rm", &digest]);
    assert!(error.contains("`kvasir profiles`"), "{error}");
    let error = failure(&daemon, &["profiles", "rm", "abc"]);
    assert!(error.contains("64 hexadecimal digits"), "{error}");
    fs::write(&to, b"garbage").unwrap();
    let error = failure(&daemon, &["profiles", "put", &to]);
    assert!(error.contains("not an intact profile"), "{error}");
    assert_eq!(text(&daemon, &["profiles"]), "0 profiles, 0B\n");

    let put = json(&daemon, &["profiles", "put", &from]);
    assert_eq!(
        (&put["digest"], &put["durable"]),
        (&digest.as_str().into(), &true.into())
    );
    assert_eq!(put["outcome"], "stored");
    assert!(text(&daemon, &["profiles", "put", &from]).contains("already-present"));
    let listed = json(&daemon, &["profiles", "ls"]);
    assert_eq!(listed["profiles"][0]["digest"], digest.as_str());
    assert_eq!(listed["profiles"][0]["key_dim"], 128);
    let table = text(&daemon, &["profiles"]);
    assert!(
        table.contains(&digest) && table.contains("128+128"),
        "{table}"
    );
    let status = json(&daemon, &["status"]);
    assert_eq!(
        (&status["profiles"], &status["profile_capacity_bytes"]),
        (&1.into(), &(1 << 30).into())
    );
    assert!(text(&daemon, &["status"]).contains("profiles  1, "));

    assert!(text(&daemon, &["profiles", "get", &digest, &to]).contains("again.bin"));
    assert_eq!(fs::read(&to).unwrap(), profile.as_bytes());
    assert_eq!(text(&daemon, &["profiles", "rm", &digest]), "1 deleted\n");
    assert_eq!(
        json(&daemon, &["profiles"])["profiles"],
        serde_json::json!([])
    );
}

#[test]
fn errors_say_what_to_do_next() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&directory.path().join("data"), &[]);
    let absent = key(9).to_string();
    let file = directory.path().join("chunk.kv");
    let path = file.to_str().unwrap();
    let error = failure(&daemon, &["get", &absent, "-o", path]);
    assert!(error.contains("kvasir ls"), "{error}");
    assert!(!file.exists());
    let error = failure(&daemon, &["rm", &absent]);
    assert!(error.contains("kvasir ls"), "{error}");
    let error = failure(&daemon, &["get", "abc", "-o", path]);
    assert!(error.contains("64 hexadecimal digits"), "{error}");
    fs::write(&file, b"not a chunk").unwrap();
    let error = failure(&daemon, &["put", path]);
    assert!(error.contains("not an intact chunk"), "{error}");
    let error = failure(&daemon, &["put", "/nonexistent"]);
    assert!(error.contains("cannot read /nonexistent"), "{error}");
    let error = failure(&daemon, &["status", "--endpoint", "127.0.0.1:9"]);
    assert!(error.contains("start `kvasird`"), "{error}");
    assert!(error.ends_with("or use its endpoint\n"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    let error = failure(&daemon, &["status", "--endpoint", "nowhere"]);
    assert!(error.contains("HOST:PORT"), "{error}");
}

#[tokio::test]
async fn a_reader_that_leaves_is_no_failure() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &[]);
    for arguments in [&["status"][..], &["ls"], &["ls", "--json"]] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kvasir"))
            .env("KVASIR_ENDPOINT", &daemon.endpoint)
            .args(arguments)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
        assert!(output.status.success());
    }
}
