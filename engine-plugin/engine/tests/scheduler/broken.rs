//! Disks that fail in the middle of answers.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use kvasir_engine::request::RequestError;
use kvasir_engine::scheduler::Engine;
use kvasir_engine::{Backing, PagingError, ScratchFile};

use super::paged::{Answer, frames, paging, prompts, run, start, stats, whole};
use super::*;

/// A scratch file that stops working.
#[derive(Debug)]
struct Broken {
    file: ScratchFile,
    reads: Fuse,
    lies: Fuse,
    writes: Fuse,
}

/// Lets some operations pass, fails some, and lets all others pass.
#[derive(Debug)]
struct Fuse {
    passes: AtomicI64,
    fails: AtomicI64,
}

impl Default for Fuse {
    fn default() -> Self {
        Self {
            passes: AtomicI64::new(i64::MAX),
            fails: AtomicI64::new(0),
        }
    }
}

impl Fuse {
    fn set(&self, passes: i64, fails: i64) {
        self.fails.store(fails, Ordering::SeqCst);
        self.passes.store(passes, Ordering::SeqCst);
    }

    fn blows(&self) -> bool {
        self.passes.fetch_sub(1, Ordering::SeqCst) <= 0
            && self.fails.fetch_sub(1, Ordering::SeqCst) > 0
    }
}

impl Broken {
    fn new() -> Arc<Self> {
        let directory = tempfile::tempdir().unwrap();
        Arc::new(Self {
            file: ScratchFile::create(directory.path()).unwrap(),
            reads: Fuse::default(),
            lies: Fuse::default(),
            writes: Fuse::default(),
        })
    }
}

impl Backing for Broken {
    fn prepare(&self, bytes: u64) -> io::Result<()> {
        self.file.prepare(bytes)
    }

    fn read_at(&self, into: &mut [io::IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        if self.reads.blows() {
            return Err(io::Error::from_raw_os_error(5));
        }
        let read = self.file.read_at(into, offset)?;
        if self.lies.blows()
            && let Some(byte) = into.first_mut().and_then(|slice| slice.get_mut(100))
        {
            *byte ^= 1;
        }
        Ok(read)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        match self.writes.blows() {
            true => Err(io::Error::from_raw_os_error(28)),
            false => self.file.write_at(bytes, offset),
        }
    }
}

/// What became of sequences of 200 tokens.
pub(super) fn outcomes(engine: &Engine, prompts: &[Vec<u32>]) -> Vec<Result<Answer, RequestError>> {
    let handle = engine.handle();
    let all: Vec<_> = prompts
        .iter()
        .map(|prompt| submit(&handle, prompt, 200 - prompt.len()))
        .collect();
    all.into_iter()
        .map(|mut events| {
            let (mut tokens, mut digests) = (Vec::new(), Vec::new());
            loop {
                match events.blocking_recv().unwrap() {
                    Event::Token {
                        id, logits_digest, ..
                    } => {
                        tokens.push(id);
                        digests.push(logits_digest.unwrap());
                    }
                    Event::Finished { .. } => return Ok((tokens, digests)),
                    Event::Failed(error) => return Err(error),
                    Event::Prefilled { .. } => {}
                }
            }
        })
        .collect()
}

/// A page that cannot be read, or comes back with another bit, costs computing its sequence
/// again, wherever that happens: no request fails, and no token is wrong or told twice.
#[test]
fn lost_pages_are_computed_again() {
    for name in ["llama3-gqa", "qwen3"] {
        let model = fixture(name).model;
        let prompts = prompts(&model, 4);
        let expected = whole(&model, &prompts);
        let mut restarts = 0;
        for after in [0, 3, 40, 200, 700] {
            for lies in [false, true] {
                let broken = Broken::new();
                let backing = Arc::clone(&broken) as Arc<dyn Backing>;
                let engine = start(&model, &paging(frames(&model, 208), backing));
                let fuse = if lies { &broken.lies } else { &broken.reads };
                fuse.set(after, 2);
                assert!(
                    run(&engine, &prompts) == expected,
                    "{name}: {after}, {lies}"
                );
                restarts += stats(&engine).restarts;
            }
        }
        // Reads ahead are tried again without that.
        assert!(restarts > 0, "{name}");
    }
}

/// A disk that cannot be read any more fails the requests that need it, with an error that
/// says so, after they were computed again; what fits into memory is answered, and all is as
/// before when the disk is back.
#[test]
fn a_dead_disk_fails_what_needs_it() {
    let model = fixture("llama3-gqa").model;
    let layers = model.config().layers;
    let prompts = prompts(&model, 4);
    let expected = whole(&model, &prompts);
    let broken = Broken::new();
    let backing = Arc::clone(&broken) as Arc<dyn Backing>;
    let engine = start(&model, &paging(frames(&model, 208), backing));
    broken.reads.set(0, i64::MAX);
    for outcome in outcomes(&engine, &prompts) {
        let read = |error: &PagingError| matches!(error, PagingError::Read { .. });
        assert!(
            matches!(&outcome, Err(RequestError::Pages(error)) if read(error)),
            "{outcome:?}"
        );
    }
    assert_eq!(stats(&engine).restarts, 8);
    broken.reads.set(0, 0);
    assert!(run(&engine, &prompts) == expected);

    // With memory for one, only being parked needs the disk.
    let broken = Broken::new();
    let backing = Arc::clone(&broken) as Arc<dyn Backing>;
    let engine = start(&model, &paging(frames(&model, layers * 208), backing));
    broken.reads.set(0, i64::MAX);
    let mut answered = 0;
    for (outcome, expected) in outcomes(&engine, &prompts).into_iter().zip(&expected) {
        match outcome {
            Ok(answer) => {
                assert!(answer == *expected);
                answered += 1;
            }
            Err(RequestError::Pages(PagingError::Read { .. })) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!(answered > 0);
}

/// A full disk: where sequences fit into memory one by one, all are answered, one after the
/// other. One that does not fit even alone fails, with an error that says so.
#[test]
fn a_full_disk_takes_turns_from_nobody() {
    let model = fixture("llama3-gqa").model;
    let layers = model.config().layers;
    let prompts = prompts(&model, 5);
    let expected = whole(&model, &prompts);
    for after in [0, 1, 5, 20] {
        let broken = Broken::new();
        let backing = Arc::clone(&broken) as Arc<dyn Backing>;
        let engine = start(&model, &paging(frames(&model, layers * 208), backing));
        broken.writes.set(after, i64::MAX);
        assert!(run(&engine, &prompts) == expected, "{after}");
        // Space is freed.
        broken.writes.set(0, 0);
        assert!(run(&engine, &prompts) == expected, "{after}");
    }
    let broken = Broken::new();
    let backing = Arc::clone(&broken) as Arc<dyn Backing>;
    let engine = start(&model, &paging(frames(&model, 208), backing));
    broken.writes.set(0, i64::MAX);
    for outcome in outcomes(&engine, &prompts) {
        let full = Err(RequestError::Pages(PagingError::Full));
        assert_eq!(outcome, full);
    }
    broken.writes.set(0, 0);
    assert!(run(&engine, &prompts) == expected);
}

/// Faults of all kinds, now and then: who is answered is answered right.
#[test]
fn answers_are_right_or_none() {
    static SEED: AtomicU64 = AtomicU64::new(7);
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
    for round in 0..12 {
        let broken = Broken::new();
        let backing = Arc::clone(&broken) as Arc<dyn Backing>;
        let engine = start(&model, &paging(frames(&model, 300), backing));
        for fuse in [&broken.reads, &broken.lies, &broken.writes] {
            // Few enough to be answered in spite of them, and many.
            let most = if round % 2 == 0 { 3 } else { 60 };
            fuse.set(draw(400), draw(most));
        }
        for (outcome, expected) in outcomes(&engine, &prompts).into_iter().zip(&expected) {
            match outcome {
                Ok(answer) => {
                    assert!(answer == *expected);
                    answered += 1;
                }
                Err(RequestError::Pages(_)) => failed += 1,
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(answered > 0 && failed > 0, "{answered}, {failed}");
}
