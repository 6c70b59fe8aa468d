//! `kvasird` as a process.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvasir_client::{CallError, Client, GetOptions};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::*;

/// A daemon with its data in a directory; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) endpoint: String,
}

impl Daemon {
    pub(crate) fn start(directory: &Path, arguments: &[&str]) -> Self {
        let mut child = command(directory)
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let endpoint = lines
            .find_map(|line| Some(line.unwrap().strip_prefix("listening on ")?.to_owned()))
            .unwrap();
        Self { child, endpoint }
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Gone already, where a test waited for its end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvasird"));
    command
        .args(["--listen", "127.0.0.1:0", "--memory", "64MiB", "--data-dir"])
        .arg(directory);
    command
}

#[tokio::test]
async fn sigterm_drains_and_exits_with_zero() {
    let directory = tempfile::tempdir().unwrap();
    let ready = directory.path().join("ready");
    for signal in [Signal::TERM, Signal::INT] {
        let arguments = ["--ready-file", ready.to_str().unwrap()];
        let mut daemon = Daemon::start(&directory.path().join("data"), &arguments);
        assert_eq!(fs::read_to_string(&ready).unwrap().trim(), daemon.endpoint);
        let client = Client::connect(&daemon.endpoint).await.unwrap();
        assert!(client.put(&chunk(1)).await.unwrap().durable);
        daemon.signal(signal);
        let mut status = None;
        soon("the daemon ends", || {
            status = daemon.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        assert!(status.unwrap().success());
    }
}

#[tokio::test]
async fn what_is_durable_survives_a_kill() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &[]);
    let client = Client::connect(&daemon.endpoint).await.unwrap();
    for number in 1..=5 {
        assert!(client.put(&chunk(number)).await.unwrap().durable);
    }
    daemon.signal(Signal::KILL);
    drop(daemon);
    let daemon = Daemon::start(directory.path(), &[]);
    let client = Client::connect(&daemon.endpoint).await.unwrap();
    assert_eq!(read_all(&client, &[1, 2, 3, 4, 5]).await, 5);
}

#[tokio::test]
async fn a_stopped_daemon_delays_nobody_past_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &[]);
    let client = Client::connect(&daemon.endpoint).await.unwrap();
    client.put(&chunk(1)).await.unwrap();
    daemon.signal(Signal::STOP);
    let status = format!("/proc/{}/status", daemon.child.id());
    soon("the daemon is stopped", || {
        fs::read_to_string(&status).unwrap().contains("T (stopped)")
    })
    .await;
    let begin = Instant::now();
    let deadline = begin + Duration::from_millis(100);
    let options = GetOptions {
        deadline: Some(deadline),
        ..GetOptions::default()
    };
    let get = client.get(&[key(1)], options).await;
    assert!(matches!(get, Err(CallError::DeadlineExceeded)), "{get:?}");
    let impatient = client.with_call_timeout(Duration::from_millis(100));
    let lookup = impatient.lookup(&[key(1)]).await;
    assert!(
        matches!(lookup, Err(CallError::DeadlineExceeded)),
        "{lookup:?}"
    );
    assert!(begin.elapsed() < Duration::from_secs(2));
    daemon.signal(Signal::CONT);
    assert_eq!(read_all(&client, &[1]).await, 1);
}

fn fails(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn errors_say_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&directory.path().join("data"), &[]);
    let locked = fails(&mut command(&directory.path().join("data")));
    assert!(locked.contains("in use"), "{locked}");
    let other = directory.path().join("other");
    let port = fails(command(&other).args(["--no-disk"]));
    assert!(port.contains("cannot be used with"), "{port}");
    let mut taken = Command::new(env!("CARGO_BIN_EXE_kvasird"));
    let taken = fails(taken.args(["--no-disk", "--listen", &daemon.endpoint]));
    assert!(taken.contains("--listen"), "{taken}");

    let config = directory.path().join("kvasird.toml");
    fs::write(&config, "memmory = 1\n").unwrap();
    let unknown = fails(command(&other).arg("--config").arg(&config));
    assert!(unknown.contains("memmory"), "{unknown}");
    let missing = fails(command(&other).args(["--config", "/nonexistent.toml"]));
    assert!(missing.contains("--config"), "{missing}");
}

#[test]
fn a_file_configures_and_flags_override() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("kvasird.toml");
    let data = directory.path().join("data");
    let text = format!(
        "listen = \"127.0.0.1:0\"\ndata-dir = {:?}\n[memory]\ncapacity = \"32MiB\"\n",
        data.to_str().unwrap()
    );
    fs::write(&config, text).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvasird"))
        .arg("--config")
        .arg(&config)
        .args(["--memory", "48MiB"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut first = String::new();
    out.read_line(&mut first).unwrap();
    assert!(first.contains("48MiB memory"), "{first}");
    assert!(first.contains(data.to_str().unwrap()), "{first}");
    let mut second = String::new();
    out.read_line(&mut second).unwrap();
    assert!(second.starts_with("listening on 127.0.0.1:"), "{second}");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "the address is the last line");
}
