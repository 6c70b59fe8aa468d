//! An engine loop whose turns a test takes itself.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc as sync_mpsc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::engine_loop::EngineLoop;
use super::pages::Paged;
use super::sequence::{Phase, Sequence};
use super::{EngineConfig, PagingConfig, Submission};
use crate::kernels::Threads;
use crate::kv::{KvDtype, KvPool};
use crate::model::Model;
use crate::paging::faulty::FaultyFile;
use crate::paging::{Backing, Replacement, ScratchBits};
use crate::request::{Event, GenerateRequest};
use crate::sampling::SamplingParams;

/// Pages of the pool.
pub(super) const BLOCKS: usize = 32;

pub(super) fn model() -> Arc<Model> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    Arc::new(Model::load(&root.join("fixtures/llama3-gqa")).unwrap())
}

/// An engine with memory for so many pages of one layer, and where its others are.
pub(super) fn engine(
    pages: usize,
    timeout: Duration,
) -> (EngineLoop, sync_mpsc::Sender<Submission>, Arc<FaultyFile>) {
    let model = model();
    let file: Arc<FaultyFile> = Arc::default();
    let backing = Arc::clone(&file) as Arc<dyn Backing>;
    let frames = pages * model.config().kv_heads;
    let paging = PagingConfig::new(frames, Arc::clone(&backing));
    let pool = KvPool::paged(
        model.config(),
        BLOCKS,
        KvDtype::F32,
        frames,
        Replacement::Clock,
        backing,
        ScratchBits::default(),
    );
    let pool = pool.unwrap().with_timeout(timeout);
    let config = EngineConfig::for_tokens(BLOCKS * 16);
    let (commands, submissions) = sync_mpsc::channel();
    let threads = Threads::new(1).unwrap();
    let waiting = Arc::new(AtomicUsize::new(0));
    let mut engine = EngineLoop::new(model, pool, &config, threads, None, submissions, waiting);
    engine.paged = Some(Paged::new(&paging, Arc::default()));
    (engine, commands, file)
}

/// A request of so many tokens for a few more.
pub(super) fn submission(tokens: usize) -> (Submission, mpsc::Receiver<Event>) {
    let (events, receiver) = mpsc::channel(64);
    let request = GenerateRequest {
        prompt: vec![3; tokens],
        chunks: Vec::new(),
        max_tokens: 8,
        sampling: SamplingParams::greedy(),
        stop_tokens: Vec::new(),
        read_cache: false,
        write_cache: false,
        logits_digest: false,
    };
    let submission = Submission {
        request,
        prompt: None,
        segmented: None,
        events,
        submitted: Instant::now(),
    };
    (submission, receiver)
}

/// A sequence of three pages that decodes its token 41.
pub(super) fn decoding(engine: &mut EngineLoop) -> (Sequence, mpsc::Receiver<Event>) {
    let (submission, events) = submission(41);
    let blocks = engine.take_blocks(4).unwrap();
    let mut sequence = Sequence::new(submission, blocks, 49, 1);
    sequence.position = 40;
    sequence.phase = Phase::Decode;
    (sequence, events)
}
