//! Transfers over QUIC, over real sockets.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_transport::quic::{self, Identity, Listener, QuicConfig, Trust};
use kvasir_transport::session::{Config, FailReason, FetchEvent, RefuseReason};
use kvasir_transport::{DataPath, FetchError, FetchOptions, Lost, Source, Thing};

const ANYWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const NAME: &str = "kvasir.test";

/// Of things with so many bytes, each read gives too few, or fails.
const SHORT: u64 = 4242;
const UNREADABLE: u64 = 4343;
const REASON: u32 = 9;

/// As many bytes as a body says, in decimal; the same ones every time.
#[derive(Debug, Default)]
struct Numbers {
    read: Arc<AtomicU64>,
    /// How long a read takes.
    delay: Duration,
}

#[derive(Debug)]
struct Number {
    total: u64,
    read: Arc<AtomicU64>,
    delay: Duration,
}

fn byte(at: u64) -> u8 {
    let [low, middle, high, ..] = at.to_le_bytes();
    low ^ middle.wrapping_mul(31) ^ high.wrapping_mul(17)
}

fn bytes(range: Range<u64>) -> Bytes {
    range.map(byte).collect()
}

impl Source for Numbers {
    type Thing = Number;

    async fn open(&self, body: Bytes, _: Option<Instant>) -> Result<Number, Bytes> {
        let text = std::str::from_utf8(&body).ok();
        let total = text.and_then(|text| text.parse().ok());
        Ok(Number {
            total: total.ok_or_else(|| Bytes::from_static(b"not a number"))?,
            read: Arc::clone(&self.read),
            delay: self.delay,
        })
    }
}

impl Thing for Number {
    fn total(&self) -> u64 {
        self.total
    }

    fn description(&self) -> Bytes {
        Bytes::from(format!("{} bytes", self.total))
    }

    async fn read(&self, range: Range<u64>) -> Result<Vec<Bytes>, Lost> {
        tokio::time::sleep(self.delay).await;
        self.read
            .fetch_add(range.end - range.start, Ordering::Relaxed);
        match self.total {
            SHORT => Ok(vec![bytes(range.start..range.end - 1)]),
            UNREADABLE => Err(Lost {
                ranges: vec![range],
                reason: REASON,
            }),
            _ => {
                let middle = range.start.midpoint(range.end);
                Ok(vec![bytes(range.start..middle), bytes(middle..range.end)])
            }
        }
    }
}

struct Pair {
    listener: Listener,
    path: DataPath,
    identity: Identity,
    read: Arc<AtomicU64>,
}

fn config() -> QuicConfig {
    QuicConfig {
        session: Config {
            piece: 64 << 10,
            ..Config::default()
        },
        idle: Duration::from_millis(600),
        most_backoff: Duration::from_millis(50),
        ..QuicConfig::default()
    }
}

fn pair(delay: Duration) -> Pair {
    let identity = Identity::self_signed(&[NAME]).unwrap();
    let source = Numbers {
        delay,
        ..Numbers::default()
    };
    let read = Arc::clone(&source.read);
    let listener = Listener::new(ANYWHERE, &identity, None, Arc::new(source), config()).unwrap();
    let trust = identity.trust().unwrap();
    let path = quic::connect(listener.address(), NAME, &trust, None, config()).unwrap();
    Pair {
        listener,
        path,
        identity,
        read,
    }
}

fn body(total: u64) -> Bytes {
    Bytes::from(total.to_string())
}

fn within(time: Duration) -> FetchOptions {
    FetchOptions {
        deadline: Some(Instant::now() + time),
        ..FetchOptions::default()
    }
}

#[tokio::test]
async fn many_requests_come_whole_over_one_connection() {
    let pair = pair(Duration::ZERO);
    let sizes = [0, 1, 1000, 65_536, 65_537, 3_000_000, 40_000_000];
    let requests = sizes.map(|size| (size, pair.path.fetch(body(size), FetchOptions::default())));
    for (size, request) in requests {
        let (description, all) = request.all().await.unwrap();
        assert_eq!(description, format!("{size} bytes"));
        assert!(all == bytes(0..size), "{size}");
    }
    assert_eq!(pair.read.load(Ordering::Relaxed), sizes.iter().sum::<u64>());
    let status = pair.path.status();
    assert!(status.connected && !status.draining && status.round_trip.is_some());
}

#[tokio::test]
async fn a_refusal_says_why() {
    let pair = pair(Duration::ZERO);
    let options = FetchOptions::default();
    let request = pair.path.fetch(Bytes::from_static(b"many"), options);
    let error = request.all().await.unwrap_err();
    assert_eq!(
        error,
        FetchError::Refused(Bytes::from_static(b"not a number"))
    );
}

#[tokio::test]
async fn what_cannot_be_read_is_lost() {
    let pair = pair(Duration::ZERO);
    for total in [SHORT, UNREADABLE] {
        let options = within(Duration::from_secs(5));
        let error = pair.path.fetch(body(total), options).all().await;
        assert!(error == Err(FetchError::Lost), "{total}");
    }
}

#[tokio::test]
async fn what_matters_more_overtakes() {
    let pair = pair(Duration::from_millis(2));
    let mut large = pair.path.fetch(body(200_000_000), FetchOptions::default());
    // Under way.
    while !matches!(large.next().await.unwrap(), FetchEvent::Data { .. }) {}
    let urgent = FetchOptions {
        priority: 1,
        ..FetchOptions::default()
    };
    let urgent = pair.path.fetch(body(100_000), urgent);
    urgent.all().await.unwrap();
    // The large one has not come meanwhile, and is given up.
    assert!(pair.read.load(Ordering::Relaxed) < 100_000_000);
    drop(large);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = pair.read.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(pair.read.load(Ordering::Relaxed), before);
}

#[tokio::test]
async fn a_holder_that_is_not_there_costs_no_more_than_the_deadline() {
    let pair = pair(Duration::ZERO);
    let stranger = Identity::self_signed(&[NAME]).unwrap().trust().unwrap();
    let nobody = SocketAddr::new(ANYWHERE.ip(), 9);
    for (address, trust) in [
        (nobody, pair.identity.trust().unwrap()),
        // One that is not who it should be.
        (pair.listener.address(), stranger),
    ] {
        let path = quic::connect(address, NAME, &trust, None, config()).unwrap();
        let begun = Instant::now();
        let request = path.fetch(body(10), within(Duration::from_millis(300)));
        let error = request.all().await.unwrap_err();
        assert_eq!(error, FetchError::Failed(FailReason::Expired));
        assert!(begun.elapsed() >= Duration::from_millis(300));
        assert!(!path.status().connected);
    }
}

#[tokio::test]
async fn a_holder_can_demand_certificates() {
    let server = Identity::self_signed(&[NAME]).unwrap();
    let client = Identity::self_signed(&["client"]).unwrap();
    let stranger = Identity::self_signed(&["client"]).unwrap();
    let clients = client.trust().unwrap();
    let source = Arc::new(Numbers::default());
    let listener = Listener::new(ANYWHERE, &server, Some(&clients), source, config()).unwrap();
    let trust: Trust = server.trust().unwrap();
    for (identity, serves) in [
        (Some(&client), true),
        (Some(&stranger), false),
        (None, false),
    ] {
        let address = listener.address();
        let path = quic::connect(address, NAME, &trust, identity, config()).unwrap();
        let request = path.fetch(body(10), within(Duration::from_millis(1000)));
        assert_eq!(request.all().await.is_ok(), serves);
    }
}

#[tokio::test]
async fn a_lost_connection_goes_on_with_what_is_missing() {
    let pair = pair(Duration::from_millis(1));
    let total = 100_000_000;
    let mut request = pair.path.fetch(body(total), FetchOptions::default());
    let (mut all, mut came) = (vec![0; usize::try_from(total).unwrap()], 0);
    let mut restarted = None;
    let address = pair.listener.address();
    let mut listener = Some(pair.listener);
    let ended = loop {
        match request.next().await.unwrap() {
            FetchEvent::Data { offset, bytes, .. } => {
                let at = usize::try_from(offset).unwrap();
                all[at..][..bytes.len()].copy_from_slice(&bytes);
                came += bytes.len() as u64;
            }
            FetchEvent::Described { .. } => {}
            ended => break ended,
        }
        if came > total / 2 && restarted.is_none() {
            drop(listener.take());
            let again = Numbers::default();
            let read = Arc::clone(&again.read);
            let again = Arc::new(again);
            // The port is free once the old endpoint is gone.
            let new = loop {
                let again = Arc::clone(&again);
                match Listener::new(address, &pair.identity, None, again, config()) {
                    Ok(new) => break new,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            };
            restarted = Some((new, read));
        }
    };
    assert!(matches!(ended, FetchEvent::Complete { .. }), "{ended:?}");
    assert!(all == bytes(0..total));
    assert_eq!(came, total);
    let (_listener, read) = restarted.unwrap();
    assert!(read.load(Ordering::Relaxed) < total / 2);
}

#[tokio::test]
async fn draining_ends_what_is_under_way_and_takes_nothing_new() {
    let pair = pair(Duration::from_millis(1));
    let total = 50_000_000;
    let mut first = pair.path.fetch(body(total), FetchOptions::default());
    while !matches!(first.next().await.unwrap(), FetchEvent::Data { .. }) {}
    let drained = tokio::spawn(pair.listener.drain(Duration::from_secs(20)));
    while !pair.path.status().draining {
        // Somebody has to take what is under way.
        first.next().await.unwrap();
    }
    let mut second = pair.path.fetch(body(10), within(Duration::from_secs(5)));
    let event = second.next().await.unwrap();
    let reason = RefuseReason::Draining;
    assert!(matches!(event, FetchEvent::Refused { reason: found, .. } if found == reason));
    let mut last = None;
    while let Some(event) = first.next().await {
        last = Some(event);
    }
    assert!(
        matches!(last, Some(FetchEvent::Complete { .. })),
        "{last:?}"
    );
    drained.await.unwrap();
}
