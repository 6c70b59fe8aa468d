//! What every carrier owes.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_mem::Arena;
use kvasir_transport::session::{Config, FailReason, FetchEvent, RefuseReason};
use kvasir_transport::{DataPath, FetchError, FetchOptions, Lost, Source, Thing};

/// A holder over one carrier, and how to reach it.
pub(crate) trait Carrier: Sized {
    /// Which part of the bytes is tested with that others are: some run where all is slow.
    const SHARE: u64 = 1;

    /// One that serves `source`, with its data in an arena, where it lends.
    fn serve(source: Numbers) -> Self;

    /// The arena that data may lie in.
    fn arena() -> Option<Arc<Arena>>;

    /// A path to it.
    fn connect(&self) -> DataPath;

    /// A path that leads nowhere, and one to a holder that is somebody else.
    fn astray(&self) -> [DataPath; 2];

    /// Ends it at once, and serves `source` at the same place.
    fn restart(self, source: Numbers) -> impl Future<Output = Self>;

    fn drain(self, within: Duration) -> impl Future<Output = ()> + Send + 'static;
}

/// Sessions of the suite.
pub(crate) fn config() -> Config {
    Config {
        piece: 64 << 10,
        ..Config::default()
    }
}

/// Of things with so many bytes, each read gives few, or none, or fails.
const SHORT: u64 = 424_242;
const NOTHING: u64 = 4141;
const UNREADABLE: u64 = 4343;
/// Bytes that are better sent as one.
const PART: u64 = 100_000;
const REASON: u32 = 9;

/// As many bytes as a body says, in decimal; the same ones every time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbers {
    read: Arc<AtomicU64>,
    /// How long a read takes.
    delay: Duration,
    /// Where every other piece lies.
    arena: Option<Arc<Arena>>,
}

impl Numbers {
    /// Where data may lie.
    pub(crate) fn arena(&self) -> Option<&Arc<Arena>> {
        self.arena.as_ref()
    }

    /// How many bytes were read.
    #[cfg(feature = "rdma")]
    pub(crate) fn read(&self) -> &Arc<AtomicU64> {
        &self.read
    }

    /// A piece, in the arena if there is one.
    fn placed(&self, range: Range<u64>) -> Bytes {
        let bytes = bytes(range);
        let block = self
            .arena
            .as_ref()
            .map(|arena| arena.block(bytes.len()).unwrap());
        let Some(mut block) = block.flatten() else {
            return bytes;
        };
        block[..bytes.len()].copy_from_slice(&bytes);
        Bytes::from_owner(block).slice(..bytes.len())
    }
}

#[derive(Debug)]
pub(crate) struct Number {
    total: u64,
    source: Numbers,
}

fn byte(at: u64) -> u8 {
    let [low, middle, high, ..] = at.to_le_bytes();
    low ^ middle.wrapping_mul(31) ^ high.wrapping_mul(17)
}

pub(crate) fn bytes(range: Range<u64>) -> Bytes {
    range.map(byte).collect()
}

impl Source for Numbers {
    type Thing = Number;

    async fn open(&self, body: Bytes, _: Option<Instant>) -> Result<Number, Bytes> {
        let text = std::str::from_utf8(&body).ok();
        let total = text.and_then(|text| text.parse().ok());
        Ok(Number {
            total: total.ok_or_else(|| Bytes::from_static(b"not a number"))?,
            source: self.clone(),
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

    fn end_of(&self, at: u64) -> u64 {
        (at + 1).next_multiple_of(PART)
    }

    async fn read(&self, range: Range<u64>) -> Result<Vec<Bytes>, Lost> {
        tokio::time::sleep(self.source.delay).await;
        let length = match self.total {
            NOTHING => 0,
            SHORT => (range.end - range.start).div_ceil(2),
            _ => range.end - range.start,
        };
        self.source.read.fetch_add(length, Ordering::Relaxed);
        match self.total {
            NOTHING => Ok(Vec::new()),
            SHORT => Ok(vec![bytes(range.start..range.start + length)]),
            UNREADABLE => Err(Lost {
                ranges: vec![range],
                reason: REASON,
            }),
            _ => {
                let middle = range.start.midpoint(range.end);
                let placed = self.source.placed(range.start..middle);
                Ok(vec![placed, bytes(middle..range.end)])
            }
        }
    }
}

struct Pair<C> {
    holder: C,
    path: DataPath,
    read: Arc<AtomicU64>,
}

pub(crate) fn numbers<C: Carrier>(delay: Duration) -> Numbers {
    Numbers {
        delay,
        arena: C::arena(),
        ..Numbers::default()
    }
}

fn pair<C: Carrier>(delay: Duration) -> Pair<C> {
    let source = numbers::<C>(delay);
    let read = Arc::clone(&source.read);
    let holder = C::serve(source);
    let path = holder.connect();
    Pair { holder, path, read }
}

pub(crate) fn body(total: u64) -> Bytes {
    Bytes::from(total.to_string())
}

pub(crate) fn within(time: Duration) -> FetchOptions {
    FetchOptions {
        deadline: Some(Instant::now() + time),
        ..FetchOptions::default()
    }
}

#[cfg(feature = "rdma")]
pub(crate) async fn eventually(mut holds: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(5), async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.expect("it comes to hold");
}

pub(crate) async fn many_requests_come_whole_over_one_connection<C: Carrier>() {
    let pair = pair::<C>(Duration::ZERO);
    let large = 40_000_000 / C::SHARE;
    let sizes = [0, 1, 1000, 65_536, 65_537, SHORT, 3_000_000, large];
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

pub(crate) async fn a_refusal_says_why<C: Carrier>() {
    let pair = pair::<C>(Duration::ZERO);
    let options = FetchOptions::default();
    let request = pair.path.fetch(Bytes::from_static(b"many"), options);
    let error = request.all().await.unwrap_err();
    assert_eq!(
        error,
        FetchError::Refused(Bytes::from_static(b"not a number"))
    );
}

pub(crate) async fn what_cannot_be_read_is_lost<C: Carrier>() {
    let pair = pair::<C>(Duration::ZERO);
    for total in [NOTHING, UNREADABLE] {
        let options = within(Duration::from_secs(5));
        let error = pair.path.fetch(body(total), options).all().await;
        assert!(error == Err(FetchError::Lost), "{total}");
    }
}

pub(crate) async fn what_matters_more_overtakes<C: Carrier>() {
    let pair = pair::<C>(Duration::from_millis(2));
    let total = 200_000_000;
    let mut large = pair.path.fetch(body(total), FetchOptions::default());
    // Under way.
    while !matches!(large.next().await.unwrap(), FetchEvent::Data { .. }) {}
    let urgent = FetchOptions {
        priority: 1,
        ..FetchOptions::default()
    };
    let urgent = pair.path.fetch(body(100_000), urgent);
    urgent.all().await.unwrap();
    // The large one has not come meanwhile, and is given up.
    assert!(pair.read.load(Ordering::Relaxed) < total / 2);
    drop(large);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = pair.read.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(pair.read.load(Ordering::Relaxed), before);
}

pub(crate) async fn a_holder_that_is_not_there_costs_no_more_than_the_deadline<C: Carrier>() {
    let pair = pair::<C>(Duration::ZERO);
    for path in pair.holder.astray() {
        let begun = Instant::now();
        let request = path.fetch(body(10), within(Duration::from_millis(300)));
        let error = request.all().await.unwrap_err();
        assert_eq!(error, FetchError::Failed(FailReason::Expired));
        assert!(begun.elapsed() >= Duration::from_millis(300));
        assert!(!path.status().connected);
    }
}

/// Requests may be made before there is a connection.
pub(crate) async fn a_connection_serves_from_its_first_moment<C: Carrier>() {
    let pair = pair::<C>(Duration::ZERO);
    let mut early = 0;
    for size in 1_000_000..1_000_020 {
        let path = pair.holder.connect();
        // Where the test is held up here, the connection may be there already.
        early += u32::from(!path.status().connected);
        let request = path.fetch(body(size), within(Duration::from_secs(20)));
        assert!(request.all().await.is_ok());
        assert!(path.status().connected);
    }
    assert!(early > 0);
}

/// What was handed out stays as it is, also when the session is over.
pub(crate) async fn bytes_outlive_their_connection<C: Carrier>() {
    let pair = pair::<C>(Duration::ZERO);
    let mut request = pair.path.fetch(body(1_000_000), FetchOptions::default());
    let mut kept = Vec::new();
    while let Some(event) = request.next().await {
        if let FetchEvent::Data { offset, bytes, .. } = event {
            kept.push((offset, bytes));
        }
    }
    drop((request, pair.path));
    // Whoever holds it may want its memory for something else.
    let other = pair.holder.connect();
    for _ in 0..10 {
        let request = other.fetch(body(2_000_000), FetchOptions::default());
        request.all().await.unwrap();
    }
    drop((other, pair.holder));
    tokio::time::sleep(Duration::from_millis(50)).await;
    for (offset, found) in kept {
        assert!(
            found == bytes(offset..offset + found.len() as u64),
            "{offset}"
        );
    }
}

pub(crate) async fn a_lost_connection_goes_on_with_what_is_missing<C: Carrier>() {
    let pair = pair::<C>(Duration::from_millis(1));
    let total = 100_000_000 / C::SHARE;
    let mut request = pair.path.fetch(body(total), FetchOptions::default());
    let (mut all, mut came) = (vec![0; usize::try_from(total).unwrap()], 0);
    let mut restarted = None;
    let mut holder = Some(pair.holder);
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
            let again = numbers::<C>(Duration::from_millis(1));
            let read = Arc::clone(&again.read);
            restarted = Some((holder.take().unwrap().restart(again).await, read));
        }
    };
    assert!(matches!(ended, FetchEvent::Complete { .. }), "{ended:?}");
    assert!(all == bytes(0..total));
    assert_eq!(came, total);
    let (_holder, read) = restarted.unwrap();
    assert!(read.load(Ordering::Relaxed) < total / 2);
}

/// Bytes that were under way to nobody make room for others.
pub(crate) async fn what_is_given_up_costs_no_credit<C: Carrier>() {
    let pair = pair::<C>(Duration::ZERO);
    let total = 50_000_000 / C::SHARE;
    for _ in 0..20 {
        let mut request = pair.path.fetch(body(total), FetchOptions::default());
        while !matches!(request.next().await.unwrap(), FetchEvent::Data { .. }) {}
    }
    let request = pair
        .path
        .fetch(body(total), within(Duration::from_secs(60)));
    let (_, all) = request.all().await.unwrap();
    assert!(all == bytes(0..total));
}

pub(crate) async fn draining_ends_what_is_under_way_and_takes_nothing_new<C: Carrier>() {
    let pair = pair::<C>(Duration::from_millis(1));
    let total = 50_000_000 / C::SHARE;
    let mut first = pair.path.fetch(body(total), FetchOptions::default());
    while !matches!(first.next().await.unwrap(), FetchEvent::Data { .. }) {}
    let drained = tokio::spawn(pair.holder.drain(Duration::from_secs(20)));
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
