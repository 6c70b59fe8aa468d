//! Disks that hang in the middle of answers.

use std::io;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kvasir_engine::request::RequestError;
use kvasir_engine::scheduler::{Engine, EngineConfig, PagingConfig};
use kvasir_engine::{Backing, Model, PagingError, ScratchFile};

use super::broken::outcomes;
use super::paged::{frames, paging, prompts, run, start, stats, whole};
use super::*;

/// A scratch file some of whose operations hang until they are let go.
#[derive(Debug)]
struct Hanging {
    file: ScratchFile,
    reads: Gate,
    writes: Gate,
}

/// Lets some operations pass, holds some, and lets all others pass.
#[derive(Debug)]
struct Gate {
    passes: AtomicI64,
    holds: AtomicI64,
    /// How often it was opened.
    opened: Mutex<u64>,
    opens: Condvar,
}

impl Gate {
    fn new() -> Self {
        Self {
            passes: AtomicI64::new(i64::MAX),
            holds: AtomicI64::new(0),
            opened: Mutex::new(0),
            opens: Condvar::new(),
        }
    }

    fn close(&self, passes: i64, holds: i64) {
        self.holds.store(holds, Ordering::SeqCst);
        self.passes.store(passes, Ordering::SeqCst);
    }

    fn open(&self) {
        let mut opened = self.opened.lock().unwrap();
        self.close(i64::MAX, 0);
        *opened += 1;
        self.opens.notify_all();
    }

    fn pass(&self) {
        let opened = self.opened.lock().unwrap();
        if self.passes.fetch_sub(1, Ordering::SeqCst) > 0
            || self.holds.fetch_sub(1, Ordering::SeqCst) <= 0
        {
            return;
        }
        let before = *opened;
        let is_closed = |opened: &mut u64| *opened == before;
        drop(self.opens.wait_while(opened, is_closed).unwrap());
    }
}

impl Hanging {
    fn new() -> Arc<Self> {
        let directory = tempfile::tempdir().unwrap();
        Arc::new(Self {
            file: ScratchFile::create(directory.path()).unwrap(),
            reads: Gate::new(),
            writes: Gate::new(),
        })
    }

    fn open(&self) {
        self.reads.open();
        self.writes.open();
    }
}

impl Backing for Hanging {
    fn prepare(&self, bytes: u64) -> io::Result<()> {
        self.file.prepare(bytes)
    }

    fn read_at(&self, into: &mut [io::IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        self.reads.pass();
        self.file.read_at(into, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.writes.pass();
        self.file.write_at(bytes, offset)
    }
}

/// Short where everything hangs.
const SHORT: Duration = Duration::from_millis(50);

/// Long enough for what does not hang, on a machine that is busy.
const LONG: Duration = Duration::from_secs(1);

fn hasty(model: &Model, tokens: usize, timeout: Duration, disk: &Arc<Hanging>) -> EngineConfig {
    let backing = Arc::clone(disk) as Arc<dyn Backing>;
    let config = paging(frames(model, tokens), backing);
    EngineConfig {
        paging: config
            .paging
            .map(|paging| PagingConfig { timeout, ..paging }),
        ..config
    }
}

/// Answers once more, when what hung has come to its end.
fn answers_again(engine: &Engine, prompts: &[Vec<u32>], expected: &[paged::Answer]) {
    for _ in 0..20 {
        let again = outcomes(engine, prompts);
        if again.iter().all(Result::is_ok) {
            let again: Vec<_> = again.into_iter().map(Result::unwrap).collect();
            assert!(again == expected);
            return;
        }
    }
    panic!("the disk is back, and requests fail");
}

/// A read that hangs costs computing its sequence again, and all requests are answered, right;
/// when it comes back, nothing is wrong either.
#[test]
fn one_read_hangs() {
    let model = fixture("llama3-gqa").model;
    let prompts = prompts(&model, 4);
    let expected = whole(&model, &prompts);
    let mut restarts = 0;
    for after in [0, 40, 200] {
        let disk = Hanging::new();
        let engine = start(&model, &hasty(&model, 300, LONG, &disk));
        disk.reads.close(after, 1);
        assert!(run(&engine, &prompts) == expected, "{after}");
        let stats = stats(&engine);
        assert!(stats.pager.timeouts <= 2, "{after}: {stats:?}");
        restarts += stats.restarts;
        disk.open();
        assert!(run(&engine, &prompts) == expected, "{after}");
    }
    assert!(restarts > 0);
}

/// A disk on which all reads hang: requests end, with an error that says why, and the engine
/// answers those that do not need it. When it is back, all are answered.
#[test]
fn all_reads_hang() {
    let model = fixture("llama3-gqa").model;
    let prompts = prompts(&model, 4);
    let expected = whole(&model, &prompts);
    let disk = Hanging::new();
    let engine = start(&model, &hasty(&model, 208, SHORT, &disk));
    disk.reads.close(0, i64::MAX);
    for outcome in outcomes(&engine, &prompts) {
        assert!(
            matches!(&outcome, Err(RequestError::Pages(error)) if error.is_timeout()),
            "{outcome:?}"
        );
    }
    let found = stats(&engine);
    assert_eq!(found.restarts, 8);
    assert!(found.pager.timeouts >= 4, "{found:?}");
    disk.open();
    answers_again(&engine, &prompts, &expected);
}

/// A disk on which writes hang: sequences that fit into memory one by one are answered one after
/// the other, whether one write hangs or all do; those that do not fit even alone fail, if all
/// do, with an error that says why.
#[test]
fn writes_hang() {
    let model = fixture("llama3-gqa").model;
    let layers = model.config().layers;
    let prompts = prompts(&model, 4);
    let expected = whole(&model, &prompts);
    for (holds, timeout) in [(1, LONG), (i64::MAX, SHORT)] {
        let disk = Hanging::new();
        let engine = start(&model, &hasty(&model, layers * 208, timeout, &disk));
        disk.writes.close(3, holds);
        assert!(run(&engine, &prompts) == expected, "{holds}");
        assert!(stats(&engine).pager.timeouts > 0);
        disk.open();
        answers_again(&engine, &prompts, &expected);
    }
    let disk = Hanging::new();
    let engine = start(&model, &hasty(&model, 208, SHORT, &disk));
    disk.writes.close(0, i64::MAX);
    for outcome in outcomes(&engine, &prompts) {
        let timeout = PagingError::Timeout { timeout: SHORT };
        assert_eq!(outcome, Err(RequestError::Pages(timeout)));
    }
    disk.open();
    answers_again(&engine, &prompts, &expected);
}

/// An engine can be dropped while its disk hangs.
#[test]
fn dropping_does_not_hang() {
    let model = fixture("llama3-gqa").model;
    let prompts = prompts(&model, 2);
    let disk = Hanging::new();
    let engine = start(&model, &hasty(&model, 208, SHORT, &disk));
    disk.reads.close(10, i64::MAX);
    disk.writes.close(10, i64::MAX);
    outcomes(&engine, &prompts);
    drop(engine);
    // What hung has its memory still.
    disk.open();
}

/// Now and then everything hangs, and goes on: who is answered is answered right.
#[test]
fn answers_are_right_or_none() {
    static SEED: AtomicU64 = AtomicU64::new(11);
    let model = fixture("qwen3").model;
    let prompts = prompts(&model, 4);
    let expected = whole(&model, &prompts);
    let draw = |most: u64| -> i64 {
        let next = SEED
            .load(Ordering::Relaxed)
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        SEED.store(next, Ordering::Relaxed);
        i64::try_from((next >> 33) % most).unwrap()
    };
    let (mut answered, mut failed) = (0, 0);
    for round in 0..6 {
        let disk = Hanging::new();
        let engine = start(&model, &hasty(&model, 300, SHORT, &disk));
        disk.reads.close(draw(600), draw(40));
        disk.writes.close(draw(100), draw(10));
        for part in prompts.chunks(2) {
            for outcome in outcomes(&engine, part) {
                match outcome {
                    Ok(answer) => {
                        assert!(expected.contains(&answer), "{round}");
                        answered += 1;
                    }
                    Err(RequestError::Pages(_)) => failed += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            disk.open();
        }
        answers_again(&engine, &prompts, &expected);
    }
    assert!(answered > 0, "{answered}, {failed}");
}
