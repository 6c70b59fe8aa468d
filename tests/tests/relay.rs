//! The data plane over a network that loses, reorders, shrinks, moves, stalls and dies: QUIC
//! between a client and a real daemon, through a relay of this process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::{
    Carrier, Chunk, Client, ClientConfig, DataPlane, GetEvent, GetOptions, LayerStream,
};
use kvasir_engine::cache;
use kvasir_engine::model::Model;
use kvasir_plugin::{CodecConfig, Encoding, LoadPolicy, PluginConfig};
use kvasir_server::child::ListeningChild;
use kvasir_tests::harness::{self, Answer, CHUNK_TOKENS, Rig, Use, signal, start_daemon};
use kvasir_tests::relay::{Passing, Relay, Weather};
use kvasir_types::{ChunkKey, DType, KvLayout, Level, Planes};
use rustix::process::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");
/// Where relays listen, and where clients seem to move.
const FAR: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
const MOVED: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3));
/// What an Ethernet leaves for the payload of UDP.
const ETHERNET: usize = 1472;
const CHUNKS: usize = 12;
const TOKENS: usize = CHUNKS * CHUNK_TOKENS as usize;
/// What a busy test machine may add to any measured time. A benchmark measures; here nothing
/// may hang.
const NOISE: Duration = Duration::from_secs(5);
/// How long a peer may say nothing; see `QuicConfig::idle`.
const IDLE: Duration = Duration::from_secs(5);
/// Longer than any test runs.
const NEVER: Duration = Duration::from_secs(60);

/// A daemon, and a relay to it.
struct Far {
    _data: tempfile::TempDir,
    daemon: ListeningChild,
    relay: Relay,
}

impl Far {
    async fn start(weather: Weather) -> Self {
        let data = tempfile::tempdir().unwrap();
        let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
        let address: SocketAddr = daemon.address().parse().unwrap();
        let relay = Relay::start(address, FAR, weather, 1).await.unwrap();
        Self {
            _data: data,
            daemon,
            relay,
        }
    }

    /// A client that is connected over QUIC.
    async fn client(&self) -> Client {
        let client = self.connect().await;
        assert_eq!(carrier(&client), Some(Carrier::Quic));
        client
    }

    async fn connect(&self) -> Client {
        let config = ClientConfig {
            endpoint: self.relay.address().parse().unwrap(),
            data_plane: DataPlane::Quic,
            ..ClientConfig::default()
        };
        Client::connect_with(config).await.unwrap()
    }

    /// Chunks in the daemon, put past the relay.
    async fn put(&self) -> Stored {
        let layout = KvLayout::new(16, 1, Planes::symmetric(64), 512, DType::F16).unwrap();
        let client = Client::connect(self.daemon.address()).await.unwrap();
        let mut chunks = Vec::new();
        for number in 0..8u8 {
            let layer = |layer: u16| {
                let seed = u32::from(number) * 251 + u32::from(layer) * 7919;
                let length = u32::try_from(layout.layer_bytes()).unwrap();
                let bytes = (0..length).map(|at| ((at ^ seed) % 251).to_le_bytes()[0]);
                bytes.collect::<Bytes>()
            };
            let chunk = Chunk {
                key: ChunkKey::from_bytes([number; 32]),
                layout,
                level: Level::RAW,
                extents: (0..layout.layers()).map(layer).collect(),
            };
            client.put(&chunk).await.unwrap();
            chunks.push(chunk);
        }
        Stored(chunks)
    }
}

fn carrier(client: &Client) -> Option<Carrier> {
    let path = client.data_path()?;
    path.connected.then_some(path.carrier)
}

/// What a daemon holds.
struct Stored(Vec<Chunk>);

impl Stored {
    fn bytes(&self) -> u64 {
        self.0.iter().map(|chunk| chunk.layout.chunk_bytes()).sum()
    }

    async fn get(&self, client: &Client) -> LayerStream {
        let keys: Vec<_> = self.0.iter().map(|chunk| chunk.key).collect();
        client.get(&keys, GetOptions::default()).await.unwrap()
    }

    /// Takes all of it, and compares it with what was put.
    async fn check(&self, mut stream: LayerStream) {
        let mut layers = 0;
        while let Some(event) = stream.next().await.unwrap() {
            let GetEvent::Layer {
                chunk,
                layer,
                parts,
            } = event
            else {
                panic!("{event:?}");
            };
            assert!(parts[0] == self.0[chunk].extents[usize::from(layer.0)]);
            layers += 1;
        }
        assert_eq!(layers, 16 * self.0.len());
    }
}

/// Beside what is lost: one in a hundred for each of 200 datagrams is 2, whatever the seed.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_loses_and_reorders_brings_every_byte() {
    let far = Far::start(Weather {
        loss: 0.02,
        overtaken: 0.02,
        delay: Duration::from_millis(1),
        longest: ETHERNET,
        mbps: None,
    })
    .await;
    let stored = far.put().await;
    let client = far.client().await;
    stored.check(stored.get(&client).await).await;
    let seen = far.relay.seen();
    assert!(seen.bytes_back > stored.bytes(), "it went another way");
    assert!(seen.lost > 50, "{seen:?}");
}

/// Behind a route that changes, datagrams are too long that were not before.
#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_shrinks_brings_every_byte() {
    let far = Far::start(Weather::default()).await;
    let stored = far.put().await;
    let client = far.client().await;
    far.relay.arm(stored.bytes() / 4, |switches| {
        switches.set_weather(Weather {
            longest: ETHERNET,
            ..Weather::default()
        });
    });
    let begun = Instant::now();
    stored.check(stored.get(&client).await).await;
    assert!(far.relay.has_acted());
    assert!(begun.elapsed() < NOISE, "{:?}", begun.elapsed());
    stored.check(stored.get(&client).await).await;
}

/// Neither a new connection, nor again what had come.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_moves_goes_on_where_it_was() {
    let far = Far::start(Weather {
        mbps: Some(200),
        longest: ETHERNET,
        ..Weather::default()
    })
    .await;
    let stored = far.put().await;
    let client = far.client().await;
    for home in [MOVED, FAR] {
        let before = far.relay.seen();
        far.relay.arm(stored.bytes() / 2, move |switches| {
            switches.move_clients(home);
        });
        stored.check(stored.get(&client).await).await;
        assert!(far.relay.has_acted(), "it never moved");
        let seen = far.relay.seen();
        assert_eq!(seen.handshakes, before.handshakes, "it connected again");
        let came = seen.bytes_back - before.bytes_back;
        // What was under way is lost: what waits for the link, at most.
        assert!(came < stored.bytes() / 4 * 5, "{came} bytes came");
    }
}

/// A firewall that does not know QUIC: gets go over gRPC, also once it is closed in the middle,
/// and over QUIC again when it opens.
#[tokio::test(flavor = "multi_thread")]
async fn where_datagrams_do_not_pass_gets_go_over_grpc() {
    let far = Far::start(Weather::default()).await;
    let stored = far.put().await;
    far.relay.switches().set_passing(Passing::Tcp);
    let client = far.connect().await;
    assert_eq!(carrier(&client), None);
    stored.check(stored.get(&client).await).await;
    let until = async |wanted: Option<Carrier>| {
        let begun = Instant::now();
        while carrier(&client) != wanted {
            assert!(begun.elapsed() < IDLE + NOISE, "not within its idle time");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    far.relay.switches().set_passing(Passing::All);
    until(Some(Carrier::Quic)).await;
    stored.check(stored.get(&client).await).await;
    far.relay.arm(stored.bytes() / 4, |switches| {
        switches.set_passing(Passing::Tcp);
    });
    let cut = stored.get(&client).await;
    until(None).await;
    stored.check(stored.get(&client).await).await;
    // What had begun goes on where it was.
    far.relay.switches().set_passing(Passing::All);
    stored.check(cut).await;
}

/// What was sent for gets that ended early had credit, which comes back.
#[tokio::test(flavor = "multi_thread")]
async fn gets_that_are_given_up_leave_room_for_others() {
    let far = Far::start(Weather {
        mbps: Some(200),
        longest: ETHERNET,
        ..Weather::default()
    })
    .await;
    let stored = far.put().await;
    let client = far.client().await;
    for _ in 0..10 {
        let mut stream = stored.get(&client).await;
        assert!(stream.next().await.unwrap().is_some());
        drop(stream);
        // Until the daemon has nothing else to do than to forget it.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let all = stored.check(stored.get(&client).await);
    let in_time = tokio::time::timeout(2 * NOISE, all).await;
    in_time.expect("there is credit left");
}

/// Of a get that has ended, not all comes that was to be sent, though others go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_get_that_is_given_up_holds_nobody_up() {
    let far = Far::start(Weather {
        mbps: Some(200),
        longest: ETHERNET,
        ..Weather::default()
    })
    .await;
    let stored = far.put().await;
    let client = far.client().await;
    // What others are under way with, the daemon sends first.
    let mut first = stored.get(&client).await;
    assert!(first.next().await.unwrap().is_some());
    let second = stored.get(&client).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(first);
    let before = far.relay.seen().bytes_back;
    stored.check(second).await;
    let came = far.relay.seen().bytes_back - before;
    // The daemon had 8 MiB of the first one under way.
    let bytes = stored.bytes();
    assert!(came < bytes + (4 << 20), "{came} bytes came for {bytes}");
}

fn config() -> PluginConfig {
    PluginConfig {
        lookup_timeout: Duration::from_secs(1),
        cooldown: Duration::from_millis(50),
        data_plane: DataPlane::Quic,
        ..PluginConfig::default()
    }
}

/// Loads whatever is there, so that it is certain what was tried.
fn eager() -> PluginConfig {
    PluginConfig {
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(60),
        fetch_timeout: NEVER,
        ..config()
    }
}

fn encoded(deadline: Option<Duration>, fetch: Option<Level>) -> PluginConfig {
    let model = Model::load(&harness::model_dir()).unwrap();
    PluginConfig {
        codec: CodecConfig {
            encoding: Encoding::at(Level::L2),
            fetch,
            rotation: Some(cache::rotation(model.config())),
            ..CodecConfig::default()
        },
        deadline,
        ..eager()
    }
}

/// An engine whose prompt is in a daemon, which it reaches through a relay.
struct Asking {
    far: Far,
    rig: Rig,
    prompt: Vec<u32>,
    computed: Answer,
}

impl Asking {
    async fn start(weather: Weather, config: PluginConfig) -> Self {
        let far = Far::start(weather).await;
        let prompt = harness::prompt(TOKENS + 10, 0);
        let near = Rig::reader(far.daemon.address(), config.clone());
        let computed = near.ask(&prompt, Use::Write).await;
        let client = Client::connect(far.daemon.address()).await.unwrap();
        near.stored(&client, &prompt).await;
        let rig = Rig::reader(&far.relay.address(), config);
        let asking = Self {
            far,
            rig,
            prompt,
            computed,
        };
        asking.connected().await;
        asking
    }

    /// Waits until the engine gets its chunks over QUIC.
    async fn connected(&self) {
        let begun = Instant::now();
        while begun.elapsed() < 4 * NOISE {
            let before = self.far.relay.seen().bytes_back;
            let answer = self.rig.ask(&self.prompt, Use::Read).await;
            let over_quic = self.far.relay.seen().bytes_back - before;
            if answer.usage.cached_tokens == TOKENS && over_quic > answer.usage.fetched_bytes {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the engine never fetched over QUIC");
    }

    async fn ask(&self) -> Answer {
        self.rig.ask(&self.prompt, Use::Read).await
    }

    /// Bytes after which a fetch is well under way.
    fn quarter(&self) -> u64 {
        CHUNKS as u64 / 4 * self.rig.plugin.namespace().layout().chunk_bytes()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_over_a_lossy_network_gives_the_computed_answer() {
    let weather = Weather {
        loss: 0.01,
        overtaken: 0.01,
        longest: ETHERNET,
        ..Weather::default()
    };
    let asking = Asking::start(weather, eager()).await;
    let before = asking.far.relay.seen();
    let answer = asking.ask().await;
    answer.assert_equals(&asking.computed);
    assert_eq!(answer.usage.cached_tokens, TOKENS);
    assert!(asking.far.relay.seen().lost > before.lost + 20);
}

/// The peer falls silent, or only its datagrams do: the request waits as long as it may, then
/// computes, and the daemon is left alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_stalls_costs_one_budget() {
    for stalled in [Passing::Nothing, Passing::Tcp] {
        let wary = PluginConfig {
            cooldown: NEVER,
            ..config()
        };
        let asking = Asking::start(Weather::default(), wary).await;
        let before = asking.rig.plugin.fetch_stats();
        asking.far.relay.arm(asking.quarter(), move |switches| {
            switches.set_passing(stalled)
        });
        let budget = asking.rig.plugin.cost_model().compute_time(0, TOKENS + 10);
        let answer = asking.ask().await;
        assert!(asking.far.relay.has_acted(), "it never stalled");
        answer.assert_equals(&asking.computed);
        assert_eq!(answer.usage.cached_tokens, 0);
        let bound = budget + asking.computed.ttft() + NOISE;
        assert!(answer.ttft() < bound, "{:?} of {bound:?}", answer.ttft());
        for _ in 0..3 {
            asking.ask().await.assert_equals(&asking.computed);
        }
        let after = asking.rig.plugin.fetch_stats();
        assert_eq!(after.loads - before.loads, 1);
        assert_eq!(after.late - before.late, 1);
        assert_eq!(after.skipped - before.skipped, 3);
    }
}

/// Its kernel tells who has a connection over TCP, and so nobody waits for datagrams.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_killed_is_a_miss_at_once() {
    // Nothing but the end of the daemon ends the fetch.
    let asking = Asking::start(Weather::default(), eager()).await;
    let pid = asking.far.daemon.pid();
    let (tell, killed) = std::sync::mpsc::channel();
    asking.far.relay.arm(asking.quarter(), move |switches| {
        // What it had sent by then might be all of it.
        switches.set_passing(Passing::Tcp);
        signal(pid, Signal::KILL);
        tell.send(Instant::now()).unwrap();
    });
    let answer = asking.ask().await;
    let answered = Instant::now();
    answer.assert_equals(&asking.computed);
    assert_eq!(answer.usage.cached_tokens, 0);
    let took = answered - killed.try_recv().expect("it was killed");
    let bound = Duration::from_secs(1) + asking.computed.times.last().copied().unwrap();
    assert!(took < bound, "{took:?} of {bound:?}");
}

/// As over gRPC: the base comes well before the deadline, and all of it would come long after.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_network_brings_what_it_can_in_time() {
    let weather = |mbps| Weather {
        longest: ETHERNET,
        mbps: Some(mbps),
        ..Weather::default()
    };
    let asking = Asking::start(weather(100), encoded(Some(NEVER), None)).await;
    let endpoint = asking.far.daemon.address();
    let mut bytes = Vec::new();
    for level in [Level::L0, Level::L2] {
        let fixed = Rig::reader(endpoint, encoded(None, Some(level)));
        let answer = fixed.ask(&asking.prompt, Use::Read).await;
        bytes.push(answer.usage.fetched_bytes);
    }
    let seconds: Vec<u64> = bytes.iter().map(|bytes| bytes / 125_000).collect();
    assert!(seconds[0] * 3 <= seconds[1], "{seconds:?}");
    let deadline = Duration::from_secs(seconds[0] + (seconds[1] - seconds[0]) / 2);
    let far = Arc::new(asking.far);
    far.relay.switches().set_weather(weather(1));
    let rig = Rig::reader(&far.relay.address(), encoded(Some(deadline), None));
    // Computing is no way out.
    rig.plugin.observe_prefill(0, 1000, NEVER);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = far.relay.seen();
    let answer = rig.ask(&asking.prompt, Use::Read).await;
    let usage = answer.usage;
    let came = far.relay.seen().bytes_back - before.bytes_back;
    assert!(came > usage.fetched_bytes, "it went another way");
    assert_eq!(usage.cached_tokens, TOKENS);
    assert!(usage.cached_level < Some(Level::L2), "{usage:?}");
    assert!(
        (bytes[0]..bytes[1]).contains(&usage.fetched_bytes),
        "{usage:?}"
    );
}
