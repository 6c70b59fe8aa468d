//! Fetches with a deadline over links that change, through a real daemon. What a link lets
//! pass decides what comes; nothing here measures time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use kvasir_client::Client;
use kvasir_engine::cache;
use kvasir_engine::model::Model;
use kvasir_plugin::{CodecConfig, DataPlane, Encoding, LoadPolicy, PluginConfig};
use kvasir_server::child::ListeningChild;
use kvasir_tests::harness::{self, Answer, CHUNK_TOKENS, Link, Rig, Use, start_daemon};
use kvasir_types::Level;

const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");
const CHUNKS: usize = 12;
const TOKENS: usize = CHUNKS * CHUNK_TOKENS as usize;
/// Longer than any test runs.
const NEVER: Duration = Duration::from_secs(600);

fn config(store: Level, fetch: Option<Level>, deadline: Option<Duration>) -> PluginConfig {
    let model = Model::load(&harness::model_dir()).unwrap();
    PluginConfig {
        data_plane: DataPlane::Grpc,
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(60),
        fetch_timeout: NEVER,
        codec: CodecConfig {
            encoding: Encoding::at(store),
            fetch,
            rotation: Some(cache::rotation(model.config())),
            ..CodecConfig::default()
        },
        deadline,
        ..PluginConfig::default()
    }
}

/// A daemon that holds a prompt at a level.
struct Stored {
    _data: tempfile::TempDir,
    daemon: ListeningChild,
    prompt: Vec<u32>,
    computed: Answer,
    store: Level,
}

impl Stored {
    async fn at(store: Level) -> Self {
        let data = tempfile::tempdir().unwrap();
        let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
        let client = Client::connect(daemon.address()).await.unwrap();
        let prompt = harness::prompt(TOKENS + 10, 0);
        let writer = Rig::reader(daemon.address(), config(store, None, None));
        let computed = writer.ask(&prompt, Use::Write).await;
        writer.stored(&client, &prompt).await;
        Self {
            _data: data,
            daemon,
            prompt,
            computed,
            store,
        }
    }

    fn rig(&self, endpoint: &str, fetch: Option<Level>, deadline: Option<Duration>) -> Rig {
        Rig::reader(endpoint, config(self.store, fetch, deadline))
    }

    /// The answer over everything at one level.
    async fn fixed(&self, level: Level) -> Answer {
        let rig = self.rig(self.daemon.address(), Some(level), None);
        rig.ask(&self.prompt, Use::Read).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_time_everything_comes_as_it_is_stored() {
    for store in [Level::L2, Level::L1, Level::LOSSLESS, Level::RAW] {
        let stored = Stored::at(store).await;
        let fixed = stored.fixed(store).await;
        let rig = stored.rig(stored.daemon.address(), None, Some(NEVER));
        for _ in 0..2 {
            let answer = rig.ask(&stored.prompt, Use::Both).await;
            answer.assert_equals(&fixed);
            assert_eq!(answer.usage.cached_tokens, TOKENS, "{store}");
            assert_eq!(answer.usage.cached_level, Some(store));
            assert_eq!(answer.usage.fetched_bytes, fixed.usage.fetched_bytes);
        }
        assert_eq!(rig.plugin.fetch_stats().missed, 0);
    }
}

/// The base comes well before the deadline, and all of it would come long after.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_link_brings_what_it_can() {
    let stored = Stored::at(Level::L2).await;
    let [least, most] = [stored.fixed(Level::L0).await, stored.fixed(Level::L2).await];
    let link = Link::start(stored.daemon.address().to_owned(), 1).await;
    let seconds = [&least, &most].map(|answer| answer.usage.fetched_bytes / 125_000);
    assert!(seconds[0] * 3 <= seconds[1], "{seconds:?}");
    let deadline = Duration::from_secs(seconds[0] + (seconds[1] - seconds[0]) / 2);
    let rig = stored.rig(link.address(), None, Some(deadline));
    // Computing is no way out.
    rig.plugin.observe_prefill(0, 1000, NEVER);
    let answer = rig.ask(&stored.prompt, Use::Both).await;
    let usage = answer.usage;
    assert_eq!(usage.cached_tokens, TOKENS);
    assert!(usage.cached_level < Some(Level::L2), "{usage:?}");
    assert!(usage.fetched_bytes < most.usage.fetched_bytes, "{usage:?}");
    assert!(
        usage.fetched_bytes >= least.usage.fetched_bytes,
        "{usage:?}"
    );
    // What is coarser than what is stored is not built upon.
    assert_eq!(rig.plugin.capture_stats().waiting, 0);
    assert_eq!(rig.plugin.capture_stats().stored, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_recovers_brings_everything() {
    let stored = Stored::at(Level::L2).await;
    let base = stored.fixed(Level::L0).await.usage.fetched_bytes;
    let link = Link::start(stored.daemon.address().to_owned(), 1).await;
    let rig = stored.rig(link.address(), None, Some(NEVER));
    let asked = rig.ask(&stored.prompt, Use::Read);
    let recovery = async {
        link.passed(base / 2).await;
        link.set_mbps(10_000);
    };
    let (answer, ()) = tokio::join!(asked, recovery);
    assert_eq!(answer.usage.cached_level, Some(Level::L2));
    answer.assert_equals(&stored.fixed(Level::L2).await);
}

/// The link dies while the base is on its way: computing takes over, at the last moment.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_dies_is_computed_around() {
    let stored = Stored::at(Level::L2).await;
    let base = stored.fixed(Level::L0).await.usage.fetched_bytes;
    let link = Link::start(stored.daemon.address().to_owned(), 1).await;
    let compute = stored.computed.ttft();
    let deadline = Duration::from_secs(2 * base / 125_000) + 3 * compute;
    let rig = stored.rig(link.address(), None, Some(deadline));
    rig.plugin.observe_prefill(0, TOKENS + 10, compute);
    let asked = rig.ask(&stored.prompt, Use::Read);
    let death = async {
        link.passed(base / 2).await;
        link.set_mbps(0);
    };
    let (answer, ()) = tokio::join!(asked, death);
    assert_eq!(answer.usage.cached_tokens, 0);
    answer.assert_equals(&stored.computed);
    let stats = rig.plugin.fetch_stats();
    assert_eq!((stats.loads, stats.late, stats.failed), (1, 0, 0));
}
