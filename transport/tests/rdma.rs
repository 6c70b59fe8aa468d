//! One-sided reads, with a real device.
//!
//! They are ignored where there may be none; `make test-rdma` has one, and runs them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::future::Future;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::pin::pin;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_mem::AlignedBuffer;
use kvasir_transport::rdma::{
    Device, DeviceConfig, Endpoint, FindError, LendError, Loan, Pool, PrepareError, QueuePair,
    QueuePairConfig, QueuePairError, ReadError, Region, RegisterError, RemoteKey, RemoteRange,
};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// A second, in which a peer that is gone is noticed, and half of one for a slow machine.
const NOTICED: Duration = Duration::from_millis(1500);

fn device() -> Device {
    let found = Device::find(&DeviceConfig::default()).unwrap();
    found.expect("these tests need an RDMA device: run `make test-rdma`")
}

fn byte(at: usize) -> u8 {
    at.wrapping_mul(31).to_le_bytes()[1]
}

fn is_from(bytes: &[u8], start: u64) -> bool {
    let start = usize::try_from(start).unwrap();
    bytes
        .iter()
        .copied()
        .eq((start..start + bytes.len()).map(byte))
}

/// Registered memory, and its bytes, which tell their places.
struct Held {
    region: Region,
    bytes: Bytes,
    /// There as long as anybody has the bytes.
    in_use: Weak<()>,
}

struct Owner {
    memory: Arc<AlignedBuffer>,
    _in_use: Arc<()>,
}

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.memory
    }
}

fn hold(device: &Device, len: usize, piece: u64) -> Held {
    let mut memory = AlignedBuffer::zeroed(len).unwrap();
    for (at, place) in memory.iter_mut().enumerate() {
        *place = byte(at);
    }
    let memory = Arc::new(memory);
    let region = Region::in_pieces(device, Arc::clone(&memory), piece).unwrap();
    let in_use = Arc::new(());
    Held {
        region,
        in_use: Arc::downgrade(&in_use),
        bytes: Bytes::from_owner(Owner {
            memory,
            _in_use: in_use,
        }),
    }
}

/// A holder's and a fetcher's queue pair, of one device.
fn connected(device: &Device, config: &QueuePairConfig) -> (QueuePair, QueuePair) {
    let holder = device.prepare(config).unwrap();
    let fetcher = device.prepare(config).unwrap();
    let (ours, theirs) = (*holder.endpoint(), *fetcher.endpoint());
    let holder = holder.connect(&theirs).unwrap();
    (holder, fetcher.connect(&ours).unwrap())
}

async fn lend(queue_pair: &QueuePair, held: &Held) -> Loan {
    let loan = queue_pair.lend(&held.region, held.bytes.clone());
    loan.await.unwrap()
}

fn part(loan: RemoteRange, offset: u64, length: u64) -> RemoteRange {
    RemoteRange {
        offset: loan.offset + offset,
        length,
        ..loan
    }
}

async fn eventually(mut holds: impl FnMut() -> bool) {
    let waited = timeout(NOTICED, async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.expect("it comes to hold");
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn a_device_says_what_it_can_do() {
    let device = device();
    let limits = *device.limits();
    assert!(limits.region_bytes >= 1 << 20 && limits.message_bytes >= 1 << 20);
    assert!(limits.initiator_depth > 0 && limits.responder_resources > 0);
    assert!(limits.windows > 0 && limits.queue_depth >= 16);
    let of_no_gid = DeviceConfig {
        gid_index: Some(250),
        ..DeviceConfig::default()
    };
    assert!(Device::find(&of_no_gid).unwrap().is_none());
    let named = |gid_index| DeviceConfig {
        name: Some("rxe0".to_owned()),
        gid_index,
        ..DeviceConfig::default()
    };
    assert!(Device::find(&named(None)).unwrap().is_some());
    let error = Device::find(&named(Some(250))).unwrap_err();
    assert!(matches!(error, FindError::Gid { .. }), "{error}");
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn reads_of_all_sizes_give_the_bytes_that_are_there() {
    const LEN: u64 = 3 << 20;
    let device = device();
    let held = hold(&device, usize::try_from(LEN).unwrap(), u64::MAX);
    let pool = Pool::new(&device, 4, 1 << 20).unwrap();
    let (holder, fetcher) = connected(&device, &QueuePairConfig::default());
    let loan = lend(&holder, &held).await;
    for length in [
        1,
        2,
        63,
        1023,
        1024,
        4095,
        4096,
        4097,
        65_536,
        100_001,
        1 << 20,
    ] {
        for offset in [0, 1, 4095, 4096, 1_234_567, LEN - length] {
            let range = part(loan.range(), offset, length);
            let bytes = fetcher.read(&pool, range).await.unwrap();
            assert_eq!(bytes.len() as u64, length);
            assert!(is_from(&bytes, offset), "{length} bytes at {offset}");
        }
    }
    let none = fetcher.read(&pool, part(loan.range(), 7, 0)).await.unwrap();
    assert!(none.is_empty());
    let long = part(loan.range(), 0, (1 << 20) + 1);
    let error = fetcher.read(&pool, long).await.map(drop).unwrap_err();
    assert!(matches!(
        error,
        ReadError::TooLong {
            limit: 0x10_0000,
            ..
        }
    ));
    // That broke nothing.
    let bytes = fetcher.read(&pool, part(loan.range(), 5, 5)).await.unwrap();
    assert!(is_from(&bytes, 5));
}

/// With little room in every queue: more reads than buffers, than requests and than reads that
/// may be outstanding, each of several messages.
#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn reads_wait_for_their_turn() {
    let device = device();
    let held = hold(&device, 1 << 20, u64::MAX);
    let pool = Pool::new(&device, 8, 32 << 10).unwrap();
    let config = QueuePairConfig {
        depth: 5,
        outstanding_reads: 2,
        message_bytes: 5000,
        ..QueuePairConfig::default()
    };
    let (holder, fetcher) = connected(&device, &config);
    let loan = lend(&holder, &held).await;
    let mut reads = JoinSet::new();
    for number in 0..100 {
        let offset = number * 9_973;
        let range = part(loan.range(), offset, 10_000 + number * 227);
        let read = fetcher.read(&pool, range);
        reads.spawn(async move { is_from(&read.await.unwrap(), offset) });
    }
    assert!(reads.join_all().await.into_iter().all(|same| same));
    assert_eq!(pool.free(), 8);
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn beyond_the_region_is_an_error_and_the_end_of_the_queue_pair() {
    let device = device();
    let held = hold(&device, 1 << 20, u64::MAX);
    let pool = Pool::new(&device, 2, 1 << 20).unwrap();
    for (offset, length) in [
        (1 << 20, 1),
        ((1 << 20) - 1, 2),
        (1 << 40, 8),
        (u64::MAX, 1),
    ] {
        let (holder, fetcher) = connected(&device, &QueuePairConfig::default());
        let loan = lend(&holder, &held).await;
        let range = part(loan.range(), offset, length);
        let error = fetcher.read(&pool, range).await.map(drop).unwrap_err();
        assert_eq!(error, ReadError::Failed(QueuePairError::RemoteAccess));
        assert_eq!(fetcher.failed().await, QueuePairError::RemoteAccess);
        let error = fetcher
            .read(&pool, loan.range())
            .await
            .map(drop)
            .unwrap_err();
        assert_eq!(error, ReadError::Dead(QueuePairError::RemoteAccess));
        // The holder notices when it lends, and loans end all the same.
        let lent = holder.lend(&held.region, held.bytes.clone()).await;
        assert!(matches!(lent, Err(LendError::Dead(_))), "{lent:?}");
        loan.end().await;
    }
    assert_eq!(pool.free(), 2);
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn only_the_key_of_a_loan_opens_it() {
    let device = device();
    let held = hold(&device, 1 << 16, u64::MAX);
    let pool = Pool::new(&device, 2, 1 << 16).unwrap();
    for wrong in [1, 0x100, u32::MAX] {
        let (holder, fetcher) = connected(&device, &QueuePairConfig::default());
        let loan = lend(&holder, &held).await;
        let range = RemoteRange {
            key: RemoteKey(loan.range().key.0 ^ wrong),
            ..loan.range()
        };
        let error = fetcher.read(&pool, range).await.map(drop).unwrap_err();
        assert_eq!(error, ReadError::Failed(QueuePairError::RemoteAccess));
    }
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn what_was_lent_is_closed_again() {
    let device = device();
    let held = hold(&device, 1 << 16, u64::MAX);
    let pool = Pool::new(&device, 2, 1 << 16).unwrap();
    let (holder, fetcher) = connected(&device, &QueuePairConfig::default());
    let mut keys = Vec::new();
    for _ in 0..20 {
        let loan = lend(&holder, &held).await;
        let bytes = fetcher.read(&pool, loan.range()).await.unwrap();
        assert!(is_from(&bytes, 0));
        keys.push(loan.range());
        loan.end().await;
    }
    // One of them closes the queue pair, so the last one has to be it.
    let error = fetcher
        .read(&pool, *keys.last().unwrap())
        .await
        .map(drop)
        .unwrap_err();
    assert_eq!(error, ReadError::Failed(QueuePairError::RemoteAccess));
    // Windows are used again, with another key every time.
    keys.dedup_by_key(|range| range.key);
    assert_eq!(keys.len(), 20);
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn a_loan_keeps_its_bytes_until_it_has_ended() {
    let device = device();
    let held = hold(&device, 1 << 16, u64::MAX);
    let Held {
        region,
        bytes,
        in_use,
    } = held;
    let (holder, _fetcher) = connected(&device, &QueuePairConfig::default());
    let first = holder.lend(&region, bytes.slice(10..20)).await.unwrap();
    let second = holder.lend(&region, bytes).await.unwrap();
    assert_eq!((first.range().offset, first.range().length), (10, 10));
    first.end().await;
    assert!(in_use.upgrade().is_some());
    drop(second);
    eventually(|| in_use.upgrade().is_none()).await;

    // A loan that nobody waits for any more, and those of a queue pair that ends.
    let held = hold(&device, 1 << 16, u64::MAX);
    let Held {
        region,
        bytes,
        in_use,
    } = held;
    drop_polled(holder.lend(&region, bytes.clone()));
    let kept = holder.lend(&region, bytes).await.unwrap();
    drop(holder);
    eventually(|| in_use.upgrade().is_none()).await;
    kept.end().await;
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn keys_are_of_one_session_and_die_with_it() {
    let device = device();
    let held = hold(&device, 1 << 16, u64::MAX);
    let pool = Pool::new(&device, 2, 1 << 16).unwrap();
    let config = QueuePairConfig::default();
    let (holder, fetcher) = connected(&device, &config);
    let (_other_holder, other) = connected(&device, &config);
    let loan = lend(&holder, &held).await;
    let error = other.read(&pool, loan.range()).await.map(drop).unwrap_err();
    assert_eq!(error, ReadError::Failed(QueuePairError::RemoteAccess));
    // Whose it is was not disturbed.
    let bytes = fetcher.read(&pool, loan.range()).await.unwrap();
    assert!(is_from(&bytes, 0));

    let range = loan.range();
    drop(holder);
    loan.end().await;
    let (next_holder, next) = connected(&device, &config);
    let error = next.read(&pool, range).await.map(drop).unwrap_err();
    assert_eq!(error, ReadError::Failed(QueuePairError::RemoteAccess));
    drop(next_holder);
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn a_dropped_read_keeps_its_buffer_until_the_device_is_done() {
    let device = device();
    let held = hold(&device, 1 << 20, u64::MAX);
    let pool = Pool::new(&device, 3, 1 << 20).unwrap();
    let config = QueuePairConfig::default();
    let (holder, fetcher) = connected(&device, &config);
    let loan = lend(&holder, &held).await;
    for length in [1, 5000, 1 << 20].into_iter().cycle().take(12) {
        drop_polled(fetcher.read(&pool, part(loan.range(), 0, length)));
        // If bytes are still on their way, then not into a buffer that somebody else has.
        let bytes = fetcher.read(&pool, part(loan.range(), 3, 5000)).await;
        assert!(is_from(&bytes.unwrap(), 3));
    }
    eventually(|| pool.free() == 3).await;

    // Of a peer that does not answer yet.
    let late = device.prepare(&config).unwrap();
    let fetcher = device.prepare(&config).unwrap();
    let endpoint = *fetcher.endpoint();
    let fetcher = fetcher.connect(late.endpoint()).unwrap();
    drop_polled(fetcher.read(&pool, loan.range()));
    sleep(Duration::from_millis(50)).await;
    assert_eq!(pool.free(), 2, "the device may still write into it");
    let late = late.connect(&endpoint).unwrap();
    // The key is of another session.
    let failed = timeout(NOTICED, fetcher.failed()).await;
    assert_eq!(failed, Ok(QueuePairError::RemoteAccess));
    eventually(|| pool.free() == 3).await;
    drop((late, fetcher));

    // Together with everything else: then the device is told to stop, and does not try on.
    let patient = QueuePairConfig {
        timeout: Duration::from_secs(10),
        ..config
    };
    let late = device.prepare(&config).unwrap();
    let fetcher = device.prepare(&patient).unwrap();
    let fetcher = fetcher.connect(late.endpoint()).unwrap();
    drop_polled(fetcher.read(&pool, loan.range()));
    assert_eq!(pool.free(), 2);
    drop((fetcher, late, holder, loan, held, device));
    eventually(|| pool.free() == 3).await;
}

/// Begins something, and gives it up.
fn drop_polled(future: impl Future) {
    let _ = pin!(future).poll(&mut Context::from_waker(Waker::noop()));
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn reads_wait_for_a_buffer() {
    let device = device();
    let held = hold(&device, 1 << 16, u64::MAX);
    let pool = Pool::new(&device, 1, 1 << 16).unwrap();
    let (holder, fetcher) = connected(&device, &QueuePairConfig::default());
    let loan = lend(&holder, &held).await;
    let bytes = fetcher.read(&pool, loan.range()).await.unwrap();
    let mut second = pin!(fetcher.read(&pool, part(loan.range(), 9, 9)));
    let waited = timeout(Duration::from_millis(50), second.as_mut()).await;
    assert!(waited.is_err(), "there was no buffer");
    drop(bytes);
    assert!(is_from(&second.await.unwrap(), 9));

    // Who waits for a buffer is told that the queue pair failed.
    let kept = pool.buffer().await;
    let waiting = tokio::spawn(fetcher.read(&pool, loan.range()));
    sleep(Duration::from_millis(20)).await;
    drop(fetcher);
    let error = timeout(NOTICED, waiting).await.unwrap().unwrap();
    let error = error.map(drop).unwrap_err();
    assert_eq!(error, ReadError::Dead(QueuePairError::Closed));
    drop(kept);
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn what_a_pool_holds_can_be_lent() {
    let device = device();
    let pool = Pool::new(&device, 2, 5000).unwrap();
    let (holder, fetcher) = connected(&device, &QueuePairConfig::default());
    let elsewhere = holder
        .lend(pool.region(), Bytes::from_static(b"elsewhere"))
        .await;
    assert!(matches!(elsewhere, Err(LendError::NotRegistered)));
    let mut buffer = pool.buffer().await;
    buffer[..6].copy_from_slice(b"copied");
    let loan = holder.lend(pool.region(), buffer.freeze(6)).await.unwrap();
    let bytes = fetcher.read(&pool, loan.range()).await.unwrap();
    assert_eq!(&bytes[..], b"copied");
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn memory_is_registered_in_pieces() {
    const PIECE: u64 = 64 << 10;
    let device = device();
    let held = hold(&device, 1 << 20, PIECE + 4095);
    let pool = Pool::new(&device, 2, 1 << 16).unwrap();
    let (holder, fetcher) = connected(&device, &QueuePairConfig::default());
    let whole = holder.lend(&held.region, held.bytes.clone()).await;
    assert!(matches!(whole, Err(LendError::Pieces)));
    let parts = held.region.split(held.bytes.slice(1000..1_000_000));
    assert_eq!(parts.len(), 16);
    let mut all = Vec::new();
    for bytes in parts {
        let loan = holder.lend(&held.region, bytes).await.unwrap();
        assert_eq!(loan.range().offset, 1000 + all.len() as u64);
        all.extend(fetcher.read(&pool, loan.range()).await.unwrap());
    }
    assert_eq!(all.len(), 999_000);
    assert!(is_from(&all, 1000));

    // The last byte of a piece is lent, the first one of the next is not.
    let bytes = held.bytes.slice(..usize::try_from(PIECE).unwrap());
    let loan = holder.lend(&held.region, bytes).await.unwrap();
    let read = fetcher.read(&pool, part(loan.range(), PIECE - 1, 2));
    let error = read.await.map(drop).unwrap_err();
    assert_eq!(error, ReadError::Failed(QueuePairError::RemoteAccess));

    let memory = AlignedBuffer::zeroed(1).unwrap();
    let none = Region::in_pieces(&device, memory, 4095);
    assert!(matches!(none, Err(RegisterError::Limit { .. })));
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn loans_are_bounded() {
    let device = device();
    let held = hold(&device, 1 << 16, u64::MAX);
    let config = QueuePairConfig {
        loans: 3,
        ..QueuePairConfig::default()
    };
    let (holder, _fetcher) = connected(&device, &config);
    let mut loans = Vec::new();
    for _ in 0..3 {
        loans.push(lend(&holder, &held).await);
    }
    let fourth = holder.lend(&held.region, held.bytes.clone()).await;
    assert!(matches!(fourth, Err(LendError::Loans { limit: 3 })));
    loans.pop().unwrap().end().await;
    lend(&holder, &held).await;
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn queue_pairs_are_bounded_and_give_their_room_back() {
    let config = DeviceConfig {
        outstanding: 256,
        ..DeviceConfig::default()
    };
    let device = Device::find(&config).unwrap().unwrap();
    let config = QueuePairConfig::default();
    for _ in 0..10 {
        let (holder, fetcher) = connected(&device, &config);
        let third = device.prepare(&config);
        assert!(matches!(
            third,
            Err(PrepareError::Completions { depth: 128 })
        ));
        drop((holder, fetcher));
    }
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn after_a_failure_another_queue_pair_goes_on() {
    let device = device();
    let held = hold(&device, 1 << 20, u64::MAX);
    let pool = Pool::new(&device, 4, 1 << 20).unwrap();
    for _ in 0..5 {
        let (holder, fetcher) = connected(&device, &QueuePairConfig::default());
        let loan = lend(&holder, &held).await;
        let bytes = fetcher.read(&pool, loan.range()).await.unwrap();
        assert!(is_from(&bytes, 0));
        // All that is outstanding fails with the one that is refused.
        let refused = fetcher.read(&pool, part(loan.range(), 1 << 30, 1));
        let behind = fetcher.read(&pool, loan.range());
        let (refused, behind) = tokio::join!(refused, behind);
        let error = refused.map(drop).unwrap_err();
        assert_eq!(error, ReadError::Failed(QueuePairError::RemoteAccess));
        let error = behind.map(drop).unwrap_err();
        assert_eq!(error, ReadError::Dead(QueuePairError::RemoteAccess));
    }
    eventually(|| pool.free() == 4).await;
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn handles_may_be_dropped_in_any_order() {
    let device = device();
    let held = hold(&device, 1 << 16, u64::MAX);
    let pool = Pool::new(&device, 2, 1 << 16).unwrap();
    let (holder, fetcher) = connected(&device, &QueuePairConfig::default());
    let loan = lend(&holder, &held).await;
    drop((device, held));
    let read = fetcher.read(&pool, loan.range());
    drop(pool);
    let bytes = read.await.unwrap();
    drop(holder);
    drop(loan);
    drop(fetcher);
    assert!(is_from(&bytes, 0));
}

/// A process that lends.
struct Peer {
    process: Child,
    address: String,
}

impl Peer {
    fn start(bytes: usize) -> Self {
        let tests = std::env::current_exe().unwrap();
        let examples = tests.parent().unwrap().parent().unwrap().join("examples");
        let mut process = Command::new(examples.join("rdma_read"))
            .args(["hold", "127.0.0.1:0", &bytes.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut says = BufReader::new(process.stdout.take().unwrap());
        says.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap();
        Self {
            address: address.to_owned(),
            process,
        }
    }

    /// A queue pair with its, what it lends, and what ends that.
    fn connect(&self, device: &Device) -> (QueuePair, RemoteRange, TcpStream) {
        let prepared = device.prepare(&QueuePairConfig::default()).unwrap();
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.write_all(&prepared.endpoint().to_bytes()).unwrap();
        let mut said = [0; Endpoint::LEN + 20];
        stream.read_exact(&mut said).unwrap();
        let (endpoint, range) = said.split_at(Endpoint::LEN);
        let queue_pair = prepared.connect(&Endpoint::parse(endpoint).unwrap());
        let (key, range) = range.split_at(4);
        let (offset, length) = range.split_at(8);
        let range = RemoteRange {
            key: RemoteKey(u32::from_le_bytes(key.try_into().unwrap())),
            offset: u64::from_le_bytes(offset.try_into().unwrap()),
            length: u64::from_le_bytes(length.try_into().unwrap()),
        };
        (queue_pair.unwrap(), range, stream)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn another_process_is_read_from_until_it_ends_the_session() {
    let device = device();
    let pool = Pool::new(&device, 4, 1 << 16).unwrap();
    let peer = Peer::start(1_000_000);
    let (fetcher, range, session) = peer.connect(&device);
    assert_eq!((range.offset, range.length), (0, 1_000_000));
    let mut reads = JoinSet::new();
    for offset in (0..range.length).step_by(1 << 16) {
        let length = (1 << 16).min(range.length - offset);
        let read = fetcher.read(&pool, part(range, offset, length));
        reads.spawn(async move { is_from(&read.await.unwrap(), offset) });
    }
    assert!(reads.join_all().await.into_iter().all(|same| same));

    // The peer ends its loan, drops its queue pair, and does not answer that any more.
    drop(session);
    let start = Instant::now();
    let error = loop {
        match fetcher.read(&pool, part(range, 0, 1)).await {
            Ok(_) => assert!(start.elapsed() < NOTICED, "the key outlives the session"),
            Err(error) => break error,
        }
    };
    // The loan ends first, so the last read may come between the two.
    let ended = [QueuePairError::RetryExceeded, QueuePairError::RemoteAccess];
    assert!(ended.map(ReadError::Failed).contains(&error), "{error:?}");

    // Of another session, the key opens nothing; that session's own does.
    let (fetcher, new, _session) = peer.connect(&device);
    let bytes = fetcher.read(&pool, part(new, 77, 77)).await.unwrap();
    assert!(is_from(&bytes, 77));
    let read = fetcher.read(&pool, part(range, 0, 1));
    let error = read.await.map(drop).unwrap_err();
    assert_eq!(error, ReadError::Failed(QueuePairError::RemoteAccess));
}

#[tokio::test]
#[ignore = "needs an RDMA device"]
async fn a_peer_that_is_killed_is_noticed_within_the_retry_time() {
    let device = device();
    let pool = Pool::new(&device, 32, 1 << 16).unwrap();
    let mut peer = Peer::start(1 << 20);
    let (fetcher, range, _session) = peer.connect(&device);
    let fetcher = Arc::new(fetcher);
    // Some are under way all the time.
    let mut readers = JoinSet::new();
    for number in 0..8 {
        let (fetcher, pool) = (Arc::clone(&fetcher), pool.clone());
        readers.spawn(async move {
            let mut read = 0;
            loop {
                match fetcher
                    .read(&pool, part(range, number << 16, 1 << 16))
                    .await
                {
                    Ok(bytes) => assert!(is_from(&bytes, number << 16)),
                    Err(error) => return (read, error),
                }
                read += 1;
            }
        });
    }
    sleep(Duration::from_millis(200)).await;
    peer.process.kill().unwrap();
    peer.process.wait().unwrap();
    let start = Instant::now();
    let done = timeout(2 * NOTICED, readers.join_all()).await.unwrap();
    let after = start.elapsed();
    assert!(after < NOTICED, "noticed after {after:?}");
    for (read, error) in done {
        assert!(read > 0);
        let (ReadError::Failed(why) | ReadError::Dead(why)) = error else {
            panic!("{error}");
        };
        assert_eq!(why, QueuePairError::RetryExceeded);
    }
    println!("noticed after {after:?}");
    // And a peer that comes again is read from.
    drop(fetcher);
    eventually(|| pool.free() == 32).await;
    let peer = Peer::start(1 << 20);
    let (fetcher, range, _session) = peer.connect(&device);
    let bytes = fetcher.read(&pool, part(range, 4321, 4321)).await.unwrap();
    assert!(is_from(&bytes, 4321));
}
