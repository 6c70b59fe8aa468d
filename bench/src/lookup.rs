//! `lookup`: one call with the keys of a whole prompt.

use std::time::Instant;

use anyhow::ensure;
use bytes::Bytes;
use kvasir_client::Chunk;
use kvasir_types::{ByteSize, ChunkKey, DType, KvLayout, Level, Planes};
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::daemon::Daemon;
use crate::report::{Report, Row, median, percentile};

const KEYS: usize = 512;

pub(crate) async fn run(quick: bool) -> anyhow::Result<Report> {
    let (stored, calls) = if quick {
        (2_048, 1_000)
    } else {
        (10_240, 10_000)
    };
    let mut report = Report::new("lookup");
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start(dir.path(), ByteSize::gib(1), "127.0.0.1:0")?;
    let client = daemon.client().await?;
    let layout = KvLayout::new(1, 1, Planes::symmetric(8), 16, DType::F32)?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let keys: Vec<ChunkKey> = (0..stored)
        .map(|_| {
            let mut bytes = [0; 32];
            rng.fill_bytes(&mut bytes);
            ChunkKey::from_bytes(bytes)
        })
        .collect();
    let progress = crate::progress(keys.len() as u64, "storing chunks");
    for key in &keys {
        let layer = Bytes::from(vec![1u8; layout.layer_bytes()]);
        let chunk = Chunk {
            key: *key,
            layout,
            level: Level::RAW,
            extents: vec![layer],
        };
        client.put(&chunk).await?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    let mut micros = Vec::with_capacity(calls);
    for call in 0..calls {
        let start = call * 37 % (keys.len() - KEYS);
        let asked = &keys[start..start + KEYS];
        let begun = Instant::now();
        let found = client.lookup(asked).await?;
        micros.push(begun.elapsed().as_secs_f64() * 1e6);
        ensure!(found.prefix_chunks == KEYS, "a stored chunk was not found");
    }
    // The floor of any call on this connection: the same call with one key.
    let mut floor = Vec::with_capacity(calls);
    for call in 0..calls {
        let begun = Instant::now();
        client.lookup(&keys[call % keys.len()..][..1]).await?;
        floor.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    let typical = median(&mut micros);
    let floor = median(&mut floor);
    report.push(Row::new("p50", typical, "us").against(floor, floor / typical));
    report.push(Row::new("p99", percentile(&mut micros, 0.99), "us"));
    #[expect(clippy::cast_precision_loss, reason = "512 is exact")]
    report.push(Row::new("rate", KEYS as f64 / typical * 1e6, "keys/s"));
    Ok(report)
}
