//! Fetches between two hosts. They are network namespaces, which take root and the tools of
//! iproute2: `make test-network` runs these tests.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use kvasir_client::Client;
use kvasir_engine::cache;
use kvasir_engine::model::Model;
use kvasir_plugin::{Carrier, CodecConfig, DataPlane, Encoding, LoadPolicy, PluginConfig};
use kvasir_server::child::{ListeningChild, daemon_command};
use kvasir_tests::harness::{self, Answer, CHUNK_TOKENS, Rig, Use, signal};
use kvasir_tests::network::Network;
use kvasir_types::{ByteSize, Level};
use rustix::process::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");
const CHUNKS: usize = 12;
const TOKENS: usize = CHUNKS * CHUNK_TOKENS as usize;
/// What a busy test machine may add to any measured time.
const NOISE: Duration = Duration::from_secs(5);
/// Longer than any test runs.
const NEVER: Duration = Duration::from_secs(600);
/// A fetch of the whole prompt, 9 MB, takes 750 ms on such a link.
const SLOW: u32 = 100;

fn config(data_plane: DataPlane) -> PluginConfig {
    PluginConfig {
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(5),
        fetch_timeout: Duration::from_secs(60),
        cooldown: Duration::from_millis(50),
        data_plane,
        ..PluginConfig::default()
    }
}

fn encoded(fetch: Option<Level>, deadline: Option<Duration>) -> PluginConfig {
    let model = Model::load(&harness::model_dir()).unwrap();
    PluginConfig {
        codec: CodecConfig {
            encoding: Encoding::at(Level::L2),
            fetch,
            rotation: Some(cache::rotation(model.config())),
            ..CodecConfig::default()
        },
        deadline,
        ..config(DataPlane::Quic)
    }
}

/// A daemon on the other host that holds a prompt.
struct Site {
    network: Network,
    daemon: ListeningChild,
    prompt: Vec<u32>,
    computed: Answer,
    _data: tempfile::TempDir,
}

impl Site {
    fn start(mbps: u32, config: &PluginConfig) -> Self {
        let network = Network::start(10_000).unwrap();
        let data = tempfile::tempdir().unwrap();
        let listen = format!("{}:0", network.far().address());
        let command = daemon_command(DAEMON.as_ref(), data.path(), ByteSize::mib(256), &listen);
        let daemon = ListeningChild::start(network.far().command(&command)).unwrap();
        let prompt = harness::prompt(TOKENS + 10, 0);
        let computed = network.near().run(|| async {
            let client = Client::connect(daemon.address()).await.unwrap();
            let writer = Rig::reader(daemon.address(), config.clone());
            let computed = writer.ask(&prompt, Use::Write).await;
            writer.stored(&client, &prompt).await;
            computed
        });
        network.set_mbps(mbps).unwrap();
        Self {
            computed: computed.unwrap(),
            network,
            daemon,
            prompt,
            _data: data,
        }
    }

    fn on_near<F: Future<Output = ()>>(&self, test: impl FnOnce() -> F + Send) {
        self.network.near().run(test).unwrap();
    }

    /// An engine whose fetches go as it is told.
    async fn rig(&self, config: PluginConfig) -> Rig {
        let wanted = (config.data_plane == DataPlane::Quic).then_some(Carrier::Quic);
        let rig = Rig::reader(self.daemon.address(), config);
        let begun = Instant::now();
        let carrier = || {
            let path = rig.plugin.data_path()?;
            path.connected.then_some(path.carrier)
        };
        while carrier() != wanted {
            assert!(begun.elapsed() < 2 * NOISE, "{:?}", rig.plugin.data_path());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        rig
    }
}

#[test]
#[ignore = "needs root; `make test-network` runs it"]
fn a_prompt_comes_over_links_of_any_speed() {
    for data_plane in [DataPlane::Quic, DataPlane::Grpc] {
        let site = Site::start(1000, &config(data_plane));
        site.on_near(|| async {
            let rig = site.rig(config(data_plane)).await;
            for mbps in [1000, 100] {
                site.network.set_mbps(mbps).unwrap();
                let answer = rig.ask(&site.prompt, Use::Read).await;
                answer.assert_equals(&site.computed);
                assert_eq!(answer.usage.cached_tokens, TOKENS);
                let least = answer.usage.fetched_bytes * 8 / u64::from(mbps);
                let took = answer.ttft();
                assert!(took > Duration::from_micros(least / 2), "{took:?}: no link");
            }
        });
    }
}

#[test]
#[ignore = "needs root; `make test-network` runs it"]
fn a_daemon_that_is_killed_is_a_miss_at_once() {
    let site = Site::start(SLOW, &config(DataPlane::Quic));
    site.on_near(|| async {
        let rig = site.rig(config(DataPlane::Quic)).await;
        let begun = Instant::now();
        let death = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            signal(site.daemon.pid(), Signal::KILL);
            begun.elapsed()
        };
        let (answer, killed) = tokio::join!(rig.ask(&site.prompt, Use::Read), death);
        answer.assert_equals(&site.computed);
        assert_eq!(answer.usage.cached_tokens, 0);
        let bound = killed + site.computed.ttft() + Duration::from_secs(1);
        assert!(answer.ttft() < bound, "{:?} of {bound:?}", answer.ttft());
    });
}

/// Stopped, or behind a cable that was pulled: nobody says anything any more.
#[test]
#[ignore = "needs root; `make test-network` runs it"]
fn a_silent_peer_costs_one_budget() {
    for pulled in [false, true] {
        let budget = Duration::from_secs(1);
        let wary = PluginConfig {
            fetch_timeout: budget,
            cooldown: NEVER,
            ..config(DataPlane::Quic)
        };
        let site = Site::start(SLOW, &wary);
        site.on_near(|| async {
            let rig = site.rig(wary.clone()).await;
            let silence = async {
                while rig.plugin.fetch_stats().loads == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                if pulled {
                    site.network.set_up(false).unwrap();
                } else {
                    signal(site.daemon.pid(), Signal::STOP);
                }
            };
            let (answer, ()) = tokio::join!(rig.ask(&site.prompt, Use::Read), silence);
            answer.assert_equals(&site.computed);
            assert_eq!(answer.usage.cached_tokens, 0);
            let bound = budget + site.computed.ttft() + NOISE;
            assert!(answer.ttft() < bound, "{:?} of {bound:?}", answer.ttft());
            rig.ask(&site.prompt, Use::Read).await;
            let stats = rig.plugin.fetch_stats();
            assert_eq!((stats.loads, stats.skipped), (1, 1));
            // The engine's patience ends when the get's deadline does, and both may be noticed.
            let ended = stats.late + stats.failed;
            assert!((1..=2).contains(&ended), "{stats:?}");
        });
    }
}

/// A link that gets ten times slower brings less than all, and one that recovers brings all.
#[test]
#[ignore = "needs root; `make test-network` runs it"]
fn a_link_that_changes_brings_what_it_can() {
    let site = Site::start(SLOW, &encoded(None, None));
    site.on_near(|| async {
        let mut bytes = Vec::new();
        for level in [Level::L0, Level::L2] {
            let rig = site.rig(encoded(Some(level), None)).await;
            let answer = rig.ask(&site.prompt, Use::Read).await;
            bytes.push(answer.usage.fetched_bytes);
        }
        // At 4 Mbit/s all of it takes so long, and the base less than half of that.
        site.network.set_mbps(4).unwrap();
        let micros = [0, 1].map(|level| bytes[level] * 8 / 4);
        assert!(micros[0] * 2 < micros[1], "{micros:?}");
        let deadline = Duration::from_micros(micros[0] + (micros[1] - micros[0]) / 2);
        let rig = site.rig(encoded(None, Some(deadline))).await;
        // Computing is no way out.
        rig.plugin.observe_prefill(0, 1000, NEVER);
        let answer = rig.ask(&site.prompt, Use::Read).await;
        assert_eq!(answer.usage.cached_tokens, TOKENS);
        let came = answer.usage.fetched_bytes;
        assert!((bytes[0]..bytes[1]).contains(&came), "{came} of {bytes:?}");
        let rig = site.rig(encoded(None, Some(NEVER))).await;
        let recovery = async {
            tokio::time::sleep(Duration::from_micros(micros[0] / 2)).await;
            site.network.set_mbps(1000).unwrap();
        };
        let (answer, ()) = tokio::join!(rig.ask(&site.prompt, Use::Read), recovery);
        assert_eq!(answer.usage.cached_level, Some(Level::L2));
        assert_eq!(answer.usage.fetched_bytes, bytes[1]);
    });
}
