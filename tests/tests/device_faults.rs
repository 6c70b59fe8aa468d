//! Devices that fail, stall and lie, under a store and under a daemon.
//!
//! `KVASIR_INTEGRITY_READS` says how many chunks are read from a device that flips bits.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::{CallError, Chunk, Client, GetOptions};
use kvasir_codec::Object;
use kvasir_server::{Server, ServerConfig};
use kvasir_store::{DiskConfig, Environment, MemoryConfig, OpenError, ReadError, StoreConfig};
use kvasir_tests::crash::{Chunks, Got, StoreTarget, Target as _, allocated, count_from_env};
use kvasir_tests::faulty::{Faults, Faulty};
use kvasir_types::{ByteSize, ChunkKey, DType, Durability, ExtentRange, KvLayout, Planes};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

fn layout() -> KvLayout {
    KvLayout::new(4, 2, Planes::symmetric(32), 16, DType::Bf16).unwrap()
}

fn key(number: u8) -> ChunkKey {
    ChunkKey::from_bytes([number; 32])
}

fn object(number: u8) -> Object {
    let layers = vec![Bytes::from(vec![number; layout().layer_bytes()]); 4];
    Object::raw(key(number), &layout(), layers).unwrap()
}

fn on_disk(path: &std::path::Path) -> StoreConfig {
    StoreConfig {
        memory: MemoryConfig::with_capacity(ByteSize::mib(16)),
        disk: Some(DiskConfig::at(path)),
        ..StoreConfig::default()
    }
}

/// A device that hangs: the get fails in time, and a daemon goes on serving.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_get_does_not_wait_for_a_stuck_device_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let medium = Faulty::new(1);
    let start = || {
        let mut config = ServerConfig::in_memory();
        config.store = on_disk(directory.path());
        config.limits.read_timeout_ms = 100;
        let environment = Environment {
            medium: Arc::new(medium.clone()),
            ..Environment::default()
        };
        Server::start_in(environment, config)
    };
    let server = start().await.unwrap();
    let client = Client::connect(&server.endpoint()).await.unwrap();
    client.put(&chunk(1)).await.unwrap();
    server.shutdown().await;
    let server = start().await.unwrap();
    let client = Client::connect(&server.endpoint()).await.unwrap();

    medium.stall();
    let begin = Instant::now();
    let error = client.get(&[key(1)], GetOptions::default()).await;
    assert!(matches!(error, Err(CallError::DeadlineExceeded)));
    assert!(begin.elapsed() < Duration::from_secs(5));
    medium.release();
    server.shutdown().await;
}

fn chunk(number: u8) -> Chunk {
    let object = object(number);
    Chunk {
        key: key(number),
        layout: layout(),
        level: object.header().level(),
        extents: object.extents().to_vec(),
    }
}

/// Chunks that come and go.
const CHUNKS: u32 = 60;
/// Too little for more than a few of them, so that reads reach the disk.
const MEMORY: ByteSize = ByteSize::kib(512);
const ROOMY: ByteSize = ByteSize::mib(64);
const TIGHT: ByteSize = ByteSize::mib(1);

/// Whatever a device does: no wrong byte, no panic, no hang, no more than the capacity,
/// and once it works again, everything does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_device_never_gives_a_wrong_byte() {
    let chunks = Chunks::new(CHUNKS);
    let mut injected = 0;
    for seed in 0..6 {
        let run = fail_at_random(seed, &chunks);
        injected += tokio::time::timeout(Duration::from_secs(120), run)
            .await
            .unwrap_or_else(|_| panic!("seed {seed} hangs"));
    }
    println!("{injected} faults");
    assert!(injected > 1000, "{injected}");
}

async fn fail_at_random(seed: u64, chunks: &Chunks) -> u64 {
    let capacity = if seed.is_multiple_of(2) { ROOMY } else { TIGHT };
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path();
    let medium = Faulty::new(seed);
    let mut random = StdRng::seed_from_u64(seed);
    let open = || StoreTarget::open(data, &medium, chunks, MEMORY, capacity);
    let target = open().await.unwrap();
    medium.set(Faults {
        read_error: 0.02,
        write_error: 0.02,
        full: 0.02,
        sync_error: 0.02,
        punch_error: 0.05,
        short: 0.05,
        flip_read: 0.03,
        flip_write: 0.03,
    });
    for _ in 0..500 {
        // Four at a time, so that they get into each other's way.
        let four = std::array::from_fn::<_, 4, _>(|_| {
            let (number, dice) = (random.random_range(0..CHUNKS), random.random_range(0..10));
            let target = target.clone();
            async move {
                match dice {
                    0..4 => drop(target.put(number, Durability::Durable).await),
                    4..9 => {
                        let got = target.get(number).await;
                        assert_ne!(got, Got::Wrong, "seed {seed}, chunk {number}");
                    }
                    _ => drop(target.delete(number).await),
                }
            }
        });
        futures::future::join_all(four).await;
        let usage = target.store.stats().disk.unwrap();
        assert!(usage.peak_bytes <= usage.capacity, "seed {seed}: {usage:?}");
    }
    medium.set(Faults::default());
    for number in 0..CHUNKS {
        let got = target.get(number).await;
        assert!(matches!(got, Got::Right | Got::Miss), "{got:?}");
    }
    // What could not be freed takes room until the next start.
    target.store.close().await.unwrap();
    drop(target);
    let target = reopened(&open).await;
    // Bits may be stored wrong: reading finds out, and makes room.
    for number in 0..CHUNKS {
        let got = target.get(number).await;
        assert!(matches!(got, Got::Right | Got::Miss), "{got:?}");
    }
    let mut kept = 0;
    let mut last: Vec<u32> = Vec::new();
    for number in (0..CHUNKS).rev() {
        assert!(
            target.put(number, Durability::Durable).await,
            "seed {seed}, chunk {number}"
        );
        last.push(number);
    }
    target.store.close().await.unwrap();
    drop(target);
    let target = reopened(&open).await;
    let mut room = capacity.as_u64();
    for number in last.into_iter().rev() {
        let got = target.get(number).await;
        // Those written last fit.
        room = room.saturating_sub(2 * chunks.frame_bytes(number));
        if room > 0 {
            assert_eq!(got, Got::Right, "seed {seed}, chunk {number}");
            kept += 1;
        }
        assert!(matches!(got, Got::Right | Got::Miss), "{got:?}");
    }
    assert!(kept > 5, "seed {seed}: {kept}");
    let (bytes, capacity) = target.disk_usage().await;
    assert!(bytes <= capacity, "seed {seed}");
    let (allocated, files) = allocated(&data.join("segments")).unwrap();
    assert_eq!(allocated, bytes + files * 4096, "seed {seed}");
    medium.injected()
}

/// Opens a directory again once the last handle of the store before it is gone.
async fn reopened<F: Future<Output = Result<StoreTarget, OpenError>>>(
    open: impl Fn() -> F,
) -> StoreTarget {
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        match open().await {
            Err(OpenError::Locked(_)) if Instant::now() < patience => (),
            opened => return opened.unwrap(),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Bits flip, on their way to the device and back; nobody ever sees one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_read_gives_a_flipped_bit() {
    let reads = count_from_env("KVASIR_INTEGRITY_READS", 100_000);
    let chunks = Chunks::new(CHUNKS);
    let directory = tempfile::tempdir().unwrap();
    let medium = Faulty::new(1);
    let target = StoreTarget::open(directory.path(), &medium, &chunks, MEMORY, ROOMY)
        .await
        .unwrap();
    medium.set(Faults {
        // Of a chunk that is read whole, most flips hit what nobody asks for.
        flip_read: 0.03,
        flip_write: 0.02,
        ..Faults::default()
    });
    let begin = Instant::now();
    let readers = (0..READERS).map(|reader| {
        let (target, chunks) = (target.clone(), chunks.clone());
        let share = reads.div_ceil(READERS);
        tokio::spawn(async move { read_and_repair(reader, share, &target, &chunks).await })
    });
    let mut right = 0;
    for reader in futures::future::join_all(readers).await {
        right += reader.unwrap();
    }
    let disk = target.store.stats().disk.unwrap();
    println!(
        "{reads} reads, {right} right, the others misses; {} from disk, {} bits flipped, \
         {} copies dropped, 0 wrong; {:.1?}",
        disk.hits,
        medium.injected(),
        disk.corrupt,
        begin.elapsed(),
    );
    assert!(disk.corrupt > reads / 1000, "{}", disk.corrupt);
    assert!(disk.hits > reads / 4, "{}", disk.hits);
    assert!(right > reads / 2, "{right}");
}

/// Reads a layer or all of a random chunk, and stores it where it is missing. Says how
/// often there was something.
async fn read_and_repair(seed: u64, reads: u64, target: &StoreTarget, chunks: &Chunks) -> u64 {
    let mut random = StdRng::seed_from_u64(seed);
    let mut right = 0;
    for _ in 0..reads {
        let number = random.random_range(0..CHUNKS);
        let Some(lease) = target.store.lease(chunks.key(number)).await else {
            target.put(number, Durability::Durable).await;
            continue;
        };
        let layers = u32::from(lease.layout().layers());
        // Seldom all of it: that moves the chunk into memory.
        let start = random.random_range(0..layers);
        let range = match random.random_bool(0.01) {
            true => ExtentRange::new(0, layers),
            false => ExtentRange::new(start, start + 1),
        };
        let range = range.unwrap();
        match lease.read_extents(range).await {
            Ok(got) => {
                let wanted = range.start() as usize..range.end() as usize;
                let wanted = &chunks.object(number).extents()[wanted];
                assert_eq!(got, wanted, "chunk {number}");
                right += 1;
            }
            Err(ReadError::Corrupt { .. } | ReadError::Throttled(_)) => (),
            Err(error) => panic!("chunk {number}: {error}"),
        }
    }
    right
}

const READERS: u64 = 4;
