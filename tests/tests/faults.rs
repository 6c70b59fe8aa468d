//! Whatever happens to the cache, a request answers, and answers what computing answers.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::time::Duration;

use bytes::Bytes;
use kvasir_client::{Chunk, Client, Tier};
use kvasir_plugin::{DataPlane, LoadPolicy, PluginConfig};
use kvasir_server::child::ListeningChild;
use kvasir_tests::frame::Frame;
use kvasir_tests::harness::{self, Answer, CHUNK_TOKENS, Proxy, Rig, Use, signal, start_daemon};
use kvasir_types::{DType, KvLayout, Level, Planes};
use rustix::process::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");

/// Long enough for a fetch to take several times its deadline's granularity.
const PROMPT_TOKENS: usize = 1500;

/// Bytes after which a fetch of the prompt is well under way: 1,500 tokens are 18 MB.
const MID_FETCH: u64 = 4 << 20;

/// What a busy test machine may add to any measured time. The exact overrun is a
/// benchmark's business; here a request must not hang.
const NOISE: Duration = Duration::from_secs(5);

/// Loads what is expected to be faster, as in production.
fn config() -> PluginConfig {
    PluginConfig {
        lookup_timeout: Duration::from_secs(1),
        cooldown: Duration::from_millis(50),
        // What stands between the engine and the daemon here forwards TCP.
        data_plane: DataPlane::Grpc,
        ..PluginConfig::default()
    }
}

/// Loads whatever is there, so that it is certain what was tried.
fn eager() -> PluginConfig {
    PluginConfig {
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(5),
        ..config()
    }
}

struct Faulty {
    data: tempfile::TempDir,
    rig: Rig,
    prompt: Vec<u32>,
    computed: Answer,
}

/// A daemon that holds a prompt, and an engine that reaches it through `endpoint`.
async fn stored(
    daemon: &ListeningChild,
    data: tempfile::TempDir,
    endpoint: &str,
    config: PluginConfig,
) -> Faulty {
    let rig = Rig::reader(endpoint, config);
    let prompt = harness::prompt(PROMPT_TOKENS, 0);
    let computed = rig.ask(&prompt, Use::Write).await;
    let client = Client::connect(daemon.address()).await.unwrap();
    rig.stored(&client, &prompt).await;
    Faulty {
        data,
        rig,
        prompt,
        computed,
    }
}

impl Faulty {
    /// Asks with the cache; the answer must be the computed one, in time.
    async fn ask(&self) -> Answer {
        let answer = self.rig.ask(&self.prompt, Use::Read).await;
        answer.assert_equals(&self.computed);
        let budget = self.rig.plugin.cost_model().compute_time(0, PROMPT_TOKENS);
        let bound = config().lookup_timeout + budget + self.computed.ttft() + NOISE;
        assert!(answer.ttft() < bound, "{:?} of {bound:?}", answer.ttft());
        answer
    }

    async fn hits(&self) {
        for _ in 0..200 {
            if self.ask().await.usage.cached_tokens > 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the engine never came back to its cache");
    }
}

/// Stopped with SIGSTOP in the middle of a fetch: the deadline passes, the prompt is
/// computed, and the daemon is left alone; when it goes on, so does the cache.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_stalled_mid_fetch_costs_one_deadline() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let pid = daemon.pid();
    let stop = move || signal(pid, Signal::STOP);
    let proxy = Proxy::start(daemon.address().to_owned(), stop).await;
    let wary = PluginConfig {
        cooldown: Duration::from_secs(3600),
        ..config()
    };
    let mut faulty = stored(&daemon, data, proxy.address(), wary).await;
    faulty.hits().await;
    let before = faulty.rig.plugin.fetch_stats();
    proxy.arm(MID_FETCH);
    let answer = faulty.ask().await;
    assert!(proxy.has_acted(), "the daemon was never stopped");
    assert_eq!(answer.usage.cached_tokens, 0);
    for _ in 0..3 {
        assert_eq!(faulty.ask().await.usage.cached_tokens, 0);
    }
    let after = faulty.rig.plugin.fetch_stats();
    assert_eq!(after.loads - before.loads, 1);
    assert_eq!(after.late - before.late, 1);
    assert_eq!(after.skipped - before.skipped, 3);
    signal(pid, Signal::CONT);
    faulty.rig = Rig::reader(proxy.address(), config());
    faulty.hits().await;
}

/// A daemon that stalls while nobody fetches: the lookup is late, and the prompt computed.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_stalled_before_the_lookup_is_a_miss() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let faulty = stored(&daemon, data, daemon.address(), config()).await;
    faulty.hits().await;
    signal(daemon.pid(), Signal::STOP);
    let answer = faulty.ask().await;
    assert_eq!(answer.usage.cached_tokens, 0);
    signal(daemon.pid(), Signal::CONT);
    faulty.hits().await;
}

/// A sequence that waits for a stalled fetch holds nobody up.
#[tokio::test(flavor = "multi_thread")]
async fn others_run_while_a_fetch_stalls() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let pid = daemon.pid();
    let stop = move || signal(pid, Signal::STOP);
    let proxy = Proxy::start(daemon.address().to_owned(), stop).await;
    let faulty = stored(&daemon, data, proxy.address(), eager()).await;
    faulty.hits().await;
    proxy.arm(MID_FETCH);
    // Waits for its cache until the daemon goes on.
    let stalled = faulty.rig.ask(&faulty.prompt, Use::Read);
    let other = async {
        while !proxy.has_acted() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let answer = faulty.rig.ask(&faulty.prompt, Use::Nothing).await;
        signal(pid, Signal::CONT);
        answer
    };
    let (stalled, other) = tokio::join!(stalled, other);
    other.assert_equals(&faulty.computed);
    stalled.assert_equals(&faulty.computed);
    assert!(
        stalled.usage.cached_tokens > 0,
        "the other request was only answered after the fetch had been given up"
    );
}

/// Killed in the middle of a fetch, and started again.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_mid_fetch_is_a_miss() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let endpoint = daemon.address().to_owned();
    let pid = daemon.pid();
    let kill = move || signal(pid, Signal::KILL);
    let proxy = Proxy::start(endpoint.clone(), kill).await;
    let faulty = stored(&daemon, data, proxy.address(), config()).await;
    proxy.arm(MID_FETCH);
    let answer = faulty.ask().await;
    assert!(proxy.has_acted(), "the daemon was never killed");
    assert_eq!(answer.usage.cached_tokens, 0);
    drop(daemon);
    assert_eq!(faulty.ask().await.usage.cached_tokens, 0);
    let _daemon = start_daemon(DAEMON, faulty.data.path(), &endpoint);
    faulty.hits().await;
}

/// The engine starts before its cache.
#[tokio::test(flavor = "multi_thread")]
async fn an_absent_daemon_is_a_miss() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let endpoint = daemon.address().to_owned();
    let faulty = stored(&daemon, data, &endpoint, config()).await;
    daemon.stop().unwrap();
    let second = Rig::reader(&endpoint, config());
    let answer = second.ask(&faulty.prompt, Use::Read).await;
    answer.assert_equals(&faulty.computed);
    assert_eq!(answer.usage.cached_tokens, 0);
}

/// A flipped bit on the disk: the chunks before it are used, the rest is computed, and
/// the broken chunk is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_object_on_disk_is_a_miss() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let endpoint = daemon.address().to_owned();
    let faulty = stored(&daemon, data, &endpoint, eager()).await;
    daemon.stop().unwrap();
    let keys = faulty.rig.plugin.namespace().prefix_keys(&faulty.prompt);
    let broken = 5;
    let frame = Frame::of(faulty.data.path(), &keys[broken]);
    let mut bytes = frame.read();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    frame.write(&bytes);

    let daemon = start_daemon(DAEMON, faulty.data.path(), &endpoint);
    let answer = faulty.ask().await;
    assert_eq!(answer.usage.cached_tokens, broken * CHUNK_TOKENS as usize);
    let client = Client::connect(daemon.address()).await.unwrap();
    let stats = client.stats().await.unwrap();
    assert_eq!(stats.tier(Tier::Disk).unwrap().corrupt, 1);
    let lookup = client.lookup(&keys).await.unwrap();
    assert_eq!(lookup.prefix_chunks, broken);
    let answer = faulty.ask().await;
    assert_eq!(answer.usage.cached_tokens, broken * CHUNK_TOKENS as usize);
}

/// A whole, valid object of another chunk where this chunk should be on the disk.
#[tokio::test(flavor = "multi_thread")]
async fn another_object_in_the_right_place_is_a_miss() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let endpoint = daemon.address().to_owned();
    let faulty = stored(&daemon, data, &endpoint, eager()).await;
    daemon.stop().unwrap();
    let keys = faulty.rig.plugin.namespace().prefix_keys(&faulty.prompt);
    let wrong = Frame::of(faulty.data.path(), &keys[3]);
    let other = Frame::of(faulty.data.path(), &keys[4]);
    wrong.write(&other.read());

    let daemon = start_daemon(DAEMON, faulty.data.path(), &endpoint);
    let answer = faulty.ask().await;
    assert_eq!(answer.usage.cached_tokens, 3 * CHUNK_TOKENS as usize);
    let client = Client::connect(daemon.address()).await.unwrap();
    assert_eq!(client.lookup(&keys).await.unwrap().prefix_chunks, 3);
}

/// A chunk of another layout stored under the right name by another client.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_layout_under_the_right_name_is_a_miss() {
    let data = tempfile::tempdir().unwrap();
    let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
    let endpoint = daemon.address().to_owned();
    let faulty = stored(&daemon, data, &endpoint, eager()).await;
    let keys = faulty.rig.plugin.namespace().prefix_keys(&faulty.prompt);
    let client = Client::connect(daemon.address()).await.unwrap();
    let right = *faulty.rig.plugin.namespace().layout();
    // Half the heads, twice the width: as many bytes, another meaning.
    let layout = KvLayout::new(
        right.layers(),
        right.kv_heads() / 2,
        Planes::symmetric(128),
        CHUNK_TOKENS,
        DType::F32,
    )
    .unwrap();
    assert_eq!(layout.chunk_bytes(), right.chunk_bytes());
    assert_eq!(client.delete(&keys[2..3]).await.unwrap(), 1);
    let layers = (0..layout.layers())
        .map(|_| Bytes::from(vec![1; layout.layer_bytes()]))
        .collect();
    let chunk = Chunk {
        key: keys[2],
        layout,
        level: Level::RAW,
        extents: layers,
    };
    client.put(&chunk).await.unwrap();
    assert_eq!(
        client.lookup(&keys).await.unwrap().prefix_chunks,
        keys.len()
    );
    let answer = faulty.ask().await;
    assert_eq!(answer.usage.cached_tokens, 2 * CHUNK_TOKENS as usize);
}
