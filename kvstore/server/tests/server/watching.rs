//! A listener's view never rots.

use std::collections::BTreeSet;
use std::time::Duration;

use kvasir_client::{CallError, Tier, Watch, WatchedChange};
use kvasir_store::EventLog;
use kvasir_types::{ByteSize, ChunkKey};

use crate::support::*;

type View = BTreeSet<(ChunkKey, Tier)>;

/// What a listener knows, kept as the protocol says.
#[derive(Default)]
struct Listener {
    view: View,
    epoch: u64,
    sequence: u64,
    snapshots: usize,
    fresh: bool,
}

impl Listener {
    async fn hear(&mut self, watch: &mut Watch) {
        let next = tokio::time::timeout(Duration::from_secs(10), watch.next());
        let event = next.await.unwrap().unwrap().unwrap();
        match event.change {
            WatchedChange::Snapshot { copies, more } => {
                if !self.fresh {
                    self.view.clear();
                    self.snapshots += 1;
                }
                self.fresh = more;
                self.epoch = event.epoch;
                self.view.extend(copies);
            }
            WatchedChange::Stored { key, tier } => {
                assert_eq!(
                    (event.epoch, event.sequence),
                    (self.epoch, self.sequence + 1)
                );
                self.view.insert((key, tier));
            }
            WatchedChange::Removed { key, tier } => {
                assert_eq!(
                    (event.epoch, event.sequence),
                    (self.epoch, self.sequence + 1)
                );
                self.view.remove(&(key, tier));
            }
        }
        self.sequence = event.sequence;
    }
}

#[tokio::test]
async fn changes_follow_a_snapshot() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    let mut watch = client.watch().await.unwrap();
    let mut listener = Listener::default();
    listener.hear(&mut watch).await;
    assert_eq!(listener.view, View::from([(key(1), Tier::Memory)]));

    client.put(&chunk(2)).await.unwrap();
    client.delete(&[key(1)]).await.unwrap();
    listener.hear(&mut watch).await;
    listener.hear(&mut watch).await;
    assert_eq!(listener.view, View::from([(key(2), Tier::Memory)]));
    server.shutdown().await;
}

#[tokio::test]
async fn a_listener_that_lags_gets_a_snapshot() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    let mut watch = client.watch().await.unwrap();
    let mut listener = Listener::default();
    listener.hear(&mut watch).await;
    // More changes than the queue and the connection hold, while nobody reads.
    let object = |number| {
        let chunk = chunk(number);
        kvasir_codec::Object::raw(chunk.key, &chunk.layout, chunk.extents).unwrap()
    };
    let object = object(1);
    for _ in 0..EventLog::CAPACITY * 20 {
        server.store().put(object.clone()).await.unwrap();
        server.store().delete(key(1)).await.unwrap();
    }
    client.put(&chunk(2)).await.unwrap();
    let last = server.store().snapshot().sequence;
    while listener.sequence < last {
        listener.hear(&mut watch).await;
    }
    assert!(listener.snapshots > 1, "it never lagged");
    assert_eq!(listener.view, View::from([(key(2), Tier::Memory)]));
    server.shutdown().await;
}

#[tokio::test]
async fn a_restart_changes_the_epoch_and_ends_watches() {
    let directory = tempfile::tempdir().unwrap();
    let (server, client) = start(on_disk(directory.path())).await;
    client.put(&chunk(1)).await.unwrap();
    let mut watch = client.watch().await.unwrap();
    let mut before = Listener::default();
    before.hear(&mut watch).await;
    assert_eq!(before.view.len(), 2);
    server.shutdown().await;
    let ended = watch.next().await;
    assert!(
        matches!(ended, Err(CallError::Unavailable { .. })),
        "{ended:?}"
    );

    let (server, client) = start(on_disk(directory.path())).await;
    let mut after = Listener::default();
    after.hear(&mut client.watch().await.unwrap()).await;
    assert_eq!(after.view, View::from([(key(1), Tier::Disk)]));
    assert_ne!(after.epoch, before.epoch);
    server.shutdown().await;
}
