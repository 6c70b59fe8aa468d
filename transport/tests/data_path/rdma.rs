//! RDMA, with QUIC for the rest.
//!
//! What needs a device is ignored where there may be none; `make test-rdma` has one, and runs it.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use kvasir_mem::Arena;
use kvasir_transport::quic::{Identity, Listener, QuicConfig, Trust};
use kvasir_transport::rdma::{
    self, Device, DeviceConfig, Lender, LenderConfig, QueuePairConfig, Reader, ReaderConfig,
};
use kvasir_transport::session::FetchEvent;
use kvasir_transport::{Carrier as By, DataPath, FetchOptions};

use crate::suite::{self, Carrier, Numbers, body, bytes, within};

const ANYWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const NAME: &str = "kvasir.test";
/// Those of soft-RoCE, which goes over an interface of its own.
const INTERFACE: &str = "roce0";

struct Rdma {
    listener: Listener,
    identity: Identity,
    lender: Option<Lender>,
    reader: Option<Reader>,
}

fn config() -> QuicConfig {
    QuicConfig {
        session: suite::config(),
        idle: Duration::from_millis(1500),
        most_backoff: Duration::from_millis(50),
        ..QuicConfig::default()
    }
}

fn lender_config() -> LenderConfig {
    LenderConfig {
        // So that some of what lies in the arena goes over QUIC.
        least: 20_000,
        most_lent: 1 << 20,
        ..LenderConfig::default()
    }
}

fn lender(source: &Numbers) -> Lender {
    let device = Device::find(&DeviceConfig::default()).unwrap();
    let device = device.expect("these tests need an RDMA device: run `make test-rdma`");
    let arena = Arc::clone(source.arena().unwrap());
    Lender::new(device, arena, lender_config())
}

fn reader(config: &ReaderConfig) -> Reader {
    let reader = Reader::find(config).unwrap();
    reader.expect("these tests need an RDMA device: run `make test-rdma`")
}

fn small() -> ReaderConfig {
    ReaderConfig {
        buffers: 16,
        // Smaller than the largest pieces, which are read in parts.
        buffer_bytes: 24 << 10,
        ..ReaderConfig::default()
    }
}

impl Rdma {
    fn between(source: Numbers, lender: Option<Lender>, reader: Option<Reader>) -> Self {
        let identity = Identity::self_signed(&[NAME]).unwrap();
        let source = Arc::new(source);
        let listener = rdma::listen(lender.clone(), ANYWHERE, &identity, None, source, config());
        Self {
            listener: listener.unwrap(),
            identity,
            lender,
            reader,
        }
    }

    fn path_to(&self, address: SocketAddr, trust: &Trust) -> DataPath {
        rdma::connect(self.reader.clone(), address, NAME, trust, None, config()).unwrap()
    }
}

impl Carrier for Rdma {
    // An emulated CPU does what adapters do.
    const SHARE: u64 = 8;

    fn serve(source: Numbers) -> Self {
        let lender = lender(&source);
        Self::between(source, Some(lender), Some(reader(&small())))
    }

    fn arena() -> Option<Arc<Arena>> {
        Some(Arena::new(256 << 20).unwrap())
    }

    fn connect(&self) -> DataPath {
        self.path_to(self.listener.address(), &self.identity.trust().unwrap())
    }

    fn astray(&self) -> [DataPath; 2] {
        let nobody = SocketAddr::new(ANYWHERE.ip(), 9);
        let stranger = Identity::self_signed(&[NAME]).unwrap().trust().unwrap();
        [
            self.path_to(nobody, &self.identity.trust().unwrap()),
            self.path_to(self.listener.address(), &stranger),
        ]
    }

    async fn restart(self, source: Numbers) -> Self {
        let Self {
            listener,
            identity,
            reader,
            ..
        } = self;
        let address = listener.address();
        drop(listener);
        let lender = lender(&source);
        // The port is free once the old endpoint is gone.
        loop {
            let (source, lent) = (Arc::new(source.clone()), Some(lender.clone()));
            match rdma::listen(lent, address, &identity, None, source, config()) {
                Ok(listener) => {
                    return Self {
                        listener,
                        identity,
                        lender: Some(lender),
                        reader,
                    };
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    fn drain(self, within: Duration) -> impl Future<Output = ()> + Send + 'static {
        self.listener.drain(within)
    }
}

crate::conforms!(Rdma, #[ignore = "needs an RDMA device"]);

async fn holds(path: &DataPath, total: u64) -> bool {
    let request = path.fetch(body(total), within(Duration::from_secs(60)));
    let (_, all) = request.all().await.unwrap();
    all == bytes(0..total)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_device_bytes_come_over_quic() {
    let config = ReaderConfig {
        device: DeviceConfig {
            name: Some("no-such-device".to_owned()),
            ..DeviceConfig::default()
        },
        ..ReaderConfig::default()
    };
    let reader = Reader::find(&config).unwrap();
    assert!(reader.is_none());
    let holder = Rdma::between(Numbers::default(), None, reader);
    let path = holder.connect();
    assert!(holds(&path, 3_000_000).await);
    assert_eq!(path.status().carrier, By::Quic);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device"]
async fn where_one_end_has_no_device_bytes_come_over_quic() {
    for lends in [false, true] {
        let source = suite::numbers::<Rdma>(Duration::ZERO);
        let lender = lends.then(|| lender(&source));
        let reader = (!lends).then(|| reader(&small()));
        let holder = Rdma::between(source, lender, reader);
        let path = holder.connect();
        assert!(holds(&path, 3_000_000).await);
        assert_eq!(path.status().carrier, By::Quic);
        let registered = holder.lender.map_or(0, |lender| lender.registered());
        assert_eq!(registered, 0);
    }
}

/// Where the holder has no room for another queue pair, or the fetcher.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device"]
async fn without_a_queue_pair_bytes_come_over_quic() {
    let few = DeviceConfig {
        outstanding: 8,
        ..DeviceConfig::default()
    };
    for of_holder in [false, true] {
        let source = suite::numbers::<Rdma>(Duration::ZERO);
        let lender = if of_holder {
            let device = Device::find(&few).unwrap().unwrap();
            let arena = Arc::clone(source.arena().unwrap());
            Lender::new(device, arena, lender_config())
        } else {
            lender(&source)
        };
        let mut config = small();
        if !of_holder {
            config.device = few.clone();
        }
        let holder = Rdma::between(source, Some(lender), Some(reader(&config)));
        let path = holder.connect();
        assert!(holds(&path, 3_000_000).await);
        assert_eq!(path.status().carrier, By::Quic);
        assert_eq!(holder.lender.unwrap().registered(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device"]
async fn what_is_lent_is_read_and_given_back() {
    let holder = Rdma::serve(suite::numbers::<Rdma>(Duration::ZERO));
    let lender = holder.lender.clone().unwrap();
    let path = holder.connect();
    assert!(holds(&path, 10_000_000).await);
    let status = path.status();
    assert!(status.carrier == By::Rdma && status.connected);
    assert!(lender.lent_ever() > 1_000_000, "{}", lender.lent_ever());
    // What was registered is not, any more, since its blocks are gone.
    suite::eventually(|| lender.lent() == 0 && lender.registered() == 0).await;
}

/// Bytes that are kept do not keep others from coming: not until loans are overdue, nor at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device"]
async fn a_pool_that_is_spent_holds_nobody_up() {
    let config = ReaderConfig {
        buffers: 4,
        ..small()
    };
    let mut holder = Rdma::serve(suite::numbers::<Rdma>(Duration::ZERO));
    holder.reader = Some(reader(&config));
    let path = holder.connect();
    let total = 5_000_000;
    let mut request = path.fetch(body(total), within(Duration::from_secs(8)));
    let mut kept: Vec<(u64, Bytes)> = Vec::new();
    let ended = loop {
        match request.next().await.unwrap() {
            FetchEvent::Data { offset, bytes, .. } => kept.push((offset, bytes)),
            FetchEvent::Described { .. } => {}
            ended => break ended,
        }
    };
    assert!(matches!(ended, FetchEvent::Complete { .. }), "{ended:?}");
    let came: usize = kept.iter().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!(came as u64, total);
    for (offset, found) in kept {
        assert!(found == bytes(offset..offset + found.len() as u64));
    }
    assert_eq!(path.status().carrier, By::Rdma);
}

/// An interface that goes down, and up again when this is dropped.
struct Down;

impl Down {
    fn now() -> Self {
        set_link("down");
        Self
    }
}

impl Drop for Down {
    fn drop(&mut self) {
        set_link("up");
    }
}

fn set_link(state: &str) {
    let mut command = Command::new("/bin/ip");
    command.args(["link", "set", INTERFACE, state]);
    assert!(command.status().unwrap().success());
}

/// A queue pair whose peer is silent in the middle of a transfer: the rest comes over QUIC, and
/// later connections try one-sided reads again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device"]
async fn what_a_broken_queue_pair_leaves_comes_over_quic() {
    let source = suite::numbers::<Rdma>(Duration::from_millis(1));
    let read = Arc::clone(source.read());
    let holder = Rdma::serve(source);
    let lender = holder.lender.clone().unwrap();
    let path = holder.connect();
    let total = 12_000_000;
    let mut request = path.fetch(body(total), within(Duration::from_secs(60)));
    let (mut all, mut came) = (vec![0; usize::try_from(total).unwrap()], 0);
    let mut down = None;
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
        if came > total / 3 && down.is_none() {
            assert_eq!(path.status().carrier, By::Rdma);
            down = Some(Down::now());
        }
    };
    assert!(matches!(ended, FetchEvent::Complete { .. }), "{ended:?}");
    assert!(all == bytes(0..total));
    assert_eq!(came, total);
    assert_eq!(path.status().carrier, By::Quic);
    // What had come was not read again; what was under way may have been.
    assert!(read.load(Ordering::Relaxed) < 2 * total);
    suite::eventually(|| lender.lent() == 0 && lender.registered() == 0).await;
    drop(down);

    // The same connection stays with QUIC; others do not.
    assert!(holds(&path, 1_000_000).await);
    assert_eq!(path.status().carrier, By::Quic);
    let again = holder.connect();
    assert!(holds(&again, 1_000_000).await);
    assert_eq!(again.status().carrier, By::Rdma);

    // And so does this one, once it is lost and has waited.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let numbers = suite::numbers::<Rdma>(Duration::ZERO);
    let _holder = holder.restart(numbers).await;
    path.disconnected().await;
    assert!(holds(&path, 1_000_000).await);
    assert_eq!(path.status().carrier, By::Rdma);
}

/// A fetcher that stands still loses its connection, and goes on over QUIC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device"]
async fn what_is_not_given_back_ends_the_connection() {
    let source = suite::numbers::<Rdma>(Duration::from_millis(1));
    let device = Device::find(&DeviceConfig::default()).unwrap().unwrap();
    let config = LenderConfig {
        longest: Duration::from_millis(200),
        ..lender_config()
    };
    let lender = Lender::new(device, Arc::clone(source.arena().unwrap()), config);
    let holder = Rdma::between(source, Some(lender.clone()), Some(reader(&small())));
    let fetch = async {
        let path = holder.connect();
        let total = 8_000_000;
        let mut request = path.fetch(body(total), within(Duration::from_secs(20)));
        let (mut stood, mut came) = (false, 0);
        let ended = loop {
            match request.next().await.unwrap() {
                FetchEvent::Data { offset, bytes, .. } => {
                    assert!(bytes == suite::bytes(offset..offset + bytes.len() as u64));
                    came += bytes.len() as u64;
                }
                FetchEvent::Described { .. } => {}
                ended => break ended,
            }
            if came > total / 3 && !stood {
                assert_eq!(path.status().carrier, By::Rdma);
                stood = true;
                // All of its tasks are on this thread.
                std::thread::sleep(Duration::from_millis(700));
            }
        };
        assert!(matches!(ended, FetchEvent::Complete { .. }), "{ended:?}");
        assert_eq!((came, path.status().carrier), (total, By::Quic));
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_all().build().unwrap().block_on(fetch);
        });
    });
    suite::eventually(|| lender.lent() == 0).await;
}

/// Requests that were given up give back what was lent to them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device"]
async fn what_is_given_up_is_given_back() {
    let holder = Rdma::serve(suite::numbers::<Rdma>(Duration::ZERO));
    let lender = holder.lender.clone().unwrap();
    let path = holder.connect();
    for _ in 0..10 {
        let mut request = path.fetch(body(5_000_000), FetchOptions::default());
        while !matches!(request.next().await.unwrap(), FetchEvent::Data { .. }) {}
    }
    assert!(holds(&path, 100_000).await);
    suite::eventually(|| lender.lent() == 0).await;
    let status = path.status();
    assert!(status.carrier == By::Rdma && status.connected);
}

/// More reads than the queue pair takes at once, and more loans than it gives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device"]
async fn little_room_in_queues_is_enough() {
    let queue_pair = QueuePairConfig {
        depth: 3,
        outstanding_reads: 1,
        loans: 4,
        ..QueuePairConfig::default()
    };
    let source = suite::numbers::<Rdma>(Duration::ZERO);
    let device = Device::find(&DeviceConfig::default()).unwrap().unwrap();
    let config = LenderConfig {
        queue_pair,
        ..lender_config()
    };
    let lender = Lender::new(device, Arc::clone(source.arena().unwrap()), config);
    let config = ReaderConfig {
        queue_pair,
        ..small()
    };
    let holder = Rdma::between(source, Some(lender.clone()), Some(reader(&config)));
    let path = holder.connect();
    assert!(holds(&path, 5_000_000).await);
    assert_eq!(path.status().carrier, By::Rdma);
    assert!(lender.lent_ever() > 0);
}
