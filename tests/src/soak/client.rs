//! What loads the daemon: well-behaved clients, and others.

use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use kvasir_client::{
    CallError, Client, ClientConfig, GetEvent, GetOptions, LayerStream, ListOptions, LostReason,
    PinId, PutOptions, WatchedChange,
};
use kvasir_proto::v1::cache_client::CacheClient;
use kvasir_proto::{assembly, convert, v1};
use kvasir_types::{Checksum, Durability, ExtentIdx, LayerRange};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::Channel;
use v1::put_request::Message;

use super::tally::{Tally, Violation};
use super::working_set::WorkingSet;

/// A daemon under load.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) address: String,
    pub(super) set: WorkingSet,
    pub(super) tally: Arc<Tally>,
    /// After which the daemon ends a stream without progress.
    pub(super) stream_idle: Duration,
}

impl Target {
    /// Starts all of the load. Its tasks run until they are aborted.
    pub(super) fn load(&self, clients: u64, seed: u64) -> JoinSet<()> {
        let mut load = JoinSet::new();
        let mut seeds = seed * 1000..;
        let mut random = || StdRng::seed_from_u64(seeds.next().unwrap_or(seed));
        for _ in 0..clients {
            let client = Regular {
                client: self.connect(WINDOW),
                target: self.clone(),
                random: random(),
                pins: Vec::new(),
            };
            load.spawn(client.run());
        }
        load.spawn(self.clone().stalled_reader(random()));
        load.spawn(self.clone().stalled_writer(random()));
        load.spawn(self.clone().cut_reader(random()));
        load.spawn(self.clone().watcher(random(), false));
        load.spawn(self.clone().watcher(random(), true));
        load
    }

    fn connect(&self, window_bytes: u32) -> Client {
        Client::connect_lazy(ClientConfig {
            endpoint: self.address.parse().expect("a daemon says where it is"),
            window_bytes,
            // A full budget is what is wanted here; what it costs is not.
            call_timeout: Duration::from_secs(60),
            ..ClientConfig::default()
        })
    }

    /// Half of all uses go to a tenth of the chunks.
    fn any(&self, random: &mut StdRng) -> u32 {
        let count = self.set.count();
        let hot = random.random_bool(0.5);
        random.random_range(0..if hot { count / 10 } else { count })
    }

    /// At most four chunks of one layout.
    fn some(&self, random: &mut StdRng) -> Vec<u32> {
        let first = self.any(random);
        self.set.alike(first, random.random_range(1..=4))
    }

    /// Reads at most `limit` events of a stream; says whether it is at its end.
    async fn read(
        &self,
        stream: &mut LayerStream,
        numbers: &[u32],
        limit: usize,
    ) -> Result<bool, CallError> {
        for (info, number) in stream.chunks().iter().zip(numbers) {
            if info.layout != *self.set.layout(*number) {
                let key = self.set.key(*number);
                self.tally.violation(Violation::Wrong(key));
            }
        }
        for _ in 0..limit {
            match stream.next().await? {
                Some(GetEvent::Prelude { .. }) => (),
                Some(GetEvent::Layer {
                    chunk,
                    layer,
                    parts,
                }) => {
                    let data = parts.concat();
                    self.tally.add("read/bytes", data.len() as u64);
                    if !self.set.is_layer(numbers[chunk], layer.0, &data) {
                        let key = self.set.key(numbers[chunk]);
                        self.tally.violation(Violation::Wrong(key));
                    }
                }
                Some(GetEvent::Lost { chunk, reason }) => match reason {
                    LostReason::Throttled => self.tally.add("lost/throttled", 1),
                    reason => self.tally.violation(Violation::Lost {
                        key: self.set.key(numbers[chunk]),
                        reason,
                    }),
                },
                None => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Takes a layer or two, then nothing for longer than the daemon waits.
    async fn stalled_reader(self, mut random: StdRng) {
        let client = self.connect(SMALL_WINDOW);
        loop {
            let numbers = self.some(&mut random);
            let keys: Vec<_> = numbers.iter().map(|number| self.set.key(*number)).collect();
            match client.get(&keys, GetOptions::default()).await {
                Err(error) => self.tally.error("get", error),
                Ok(mut stream) => {
                    let begun = self.read(&mut stream, &numbers, 2).await;
                    if matches!(begun, Ok(false)) {
                        tokio::time::sleep(self.stream_idle + random.random_range(MARGIN)).await;
                        // It was ended, unless all of it was under way.
                        let _ = self.read(&mut stream, &numbers, usize::MAX).await;
                        self.tally.add("gets/stalled", 1);
                    }
                }
            }
        }
    }

    /// Sends half of a chunk, then nothing.
    async fn stalled_writer(self, mut random: StdRng) {
        let endpoint = format!("http://{}", self.address);
        loop {
            let chunk = self.set.chunk(self.any(&mut random));
            let header = Message::Header(v1::PutHeader {
                key: convert::key_to_wire(&chunk.key),
                layout: Some(v1::Layout::from(&chunk.layout)),
                level: chunk.level.code().into(),
                ..v1::PutHeader::default()
            });
            let half = (0..).zip(&chunk.extents[..chunk.extents.len() / 2]);
            let pieces = half.flat_map(|(extent, data)| {
                let checksum = Checksum::of(data);
                assembly::pieces(ExtentIdx(extent), data.clone(), checksum).map(Message::Piece)
            });
            let messages: Vec<_> = std::iter::once(header)
                .chain(pieces)
                .map(|message| v1::PutRequest {
                    message: Some(message),
                })
                .collect();
            let sent = stream::iter(messages);
            let sent = futures::StreamExt::chain(sent, stream::pending());
            let channel = Channel::from_shared(endpoint.clone()).expect("a daemon's address");
            if let Ok(channel) = channel.connect().await {
                let mut grpc = CacheClient::new(channel);
                match grpc.put(sent).await {
                    Err(status) if status.code() == Code::DeadlineExceeded => {
                        self.tally.add("puts/stalled", 1);
                    }
                    Err(status) if status.code() == Code::ResourceExhausted => {
                        self.tally.add("throttled", 1);
                    }
                    Ok(_) => self.tally.violation(Violation::Stray(chunk.key)),
                    Err(status) => self
                        .tally
                        .error("put", CallError::Refused(Box::new(status))),
                }
            }
        }
    }

    /// Goes away in the middle of a stream, connection and all, without a word.
    async fn cut_reader(self, mut random: StdRng) {
        loop {
            let target = self.clone();
            let numbers = target.some(&mut random);
            let events = random.random_range(1..20);
            let cut = tokio::task::spawn_blocking(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .expect("the system grants a runtime");
                let stream = runtime.block_on(target.begin(&numbers, events));
                // Nothing is closed in order: the connection's task ends first.
                runtime.shutdown_background();
                drop(stream);
                target.tally.add("connections/cut", 1);
            });
            if let Err(error) = cut.await
                && error.is_panic()
            {
                std::panic::resume_unwind(error.into_panic());
            }
            tokio::time::sleep(Duration::from_millis(random.random_range(10..100))).await;
        }
    }

    /// A stream on a new connection of which `events` events were read.
    async fn begin(&self, numbers: &[u32], events: usize) -> Option<LayerStream> {
        let keys: Vec<_> = numbers.iter().map(|it| self.set.key(*it)).collect();
        let client = self.connect(WINDOW);
        let mut stream = match client.get(&keys, GetOptions::default()).await {
            Ok(stream) => stream,
            Err(error) => {
                self.tally.error("get", error);
                return None;
            }
        };
        if let Err(error) = self.read(&mut stream, numbers, events).await {
            self.tally.error("get", error);
        }
        Some(stream)
    }

    /// Follows all changes; a slow one does not keep up.
    async fn watcher(self, mut random: StdRng, slow: bool) {
        let client = self.connect(WINDOW);
        loop {
            let mut watch = match client.watch().await {
                Ok(watch) => watch,
                Err(error) => {
                    self.tally.error("watch", error);
                    continue;
                }
            };
            let mut before = None;
            for _ in 0..random.random_range(1000..20_000) {
                let event = match watch.next().await {
                    Ok(Some(event)) => event,
                    Ok(None) => break,
                    Err(error) => {
                        self.tally.error("watch", error);
                        break;
                    }
                };
                self.tally.add("watched", 1);
                match event.change {
                    WatchedChange::Snapshot { copies, .. } => {
                        self.known(copies.iter().map(|(key, _)| key));
                    }
                    WatchedChange::Stored { key, .. } | WatchedChange::Removed { key, .. } => {
                        self.known([&key]);
                        if let Some(before) = before
                            && event.sequence != before + 1
                        {
                            let after = event.sequence;
                            self.tally.violation(Violation::Gap { before, after });
                        }
                    }
                }
                before = Some(event.sequence);
                if slow && random.random_bool(0.01) {
                    tokio::time::sleep(Duration::from_millis(random.random_range(0..2000))).await;
                }
            }
        }
    }

    fn known<'a>(&self, keys: impl IntoIterator<Item = &'a kvasir_types::ChunkKey>) {
        for key in keys {
            if self.set.number(key).is_none() {
                self.tally.violation(Violation::Stray(*key));
            }
        }
    }
}

/// A client that does everything, and now and then not to the end.
struct Regular {
    target: Target,
    client: Client,
    random: StdRng,
    pins: Vec<PinId>,
}

impl Regular {
    async fn run(mut self) {
        loop {
            let (name, result) = match self.random.random_range(0..1000) {
                0..350 => ("put", self.put().await),
                350..800 => ("get", self.get().await),
                800..880 => ("lookup", self.lookup().await),
                880..930 => ("pin", self.pin().await),
                930..945 => ("unpin", self.unpin().await),
                945..950 => ("hold", self.hold().await),
                950..990 => ("delete", self.delete().await),
                990..995 => ("list", self.list().await),
                _ => ("reconnect", self.reconnect().await),
            };
            if let Err(error) = result {
                self.target.tally.error(name, error);
            }
            // What fails at once should not spin.
            tokio::task::yield_now().await;
        }
    }

    async fn put(&mut self) -> Result<(), CallError> {
        let target = self.target.clone();
        let chunk = target.set.chunk(target.any(&mut self.random));
        let in_memory = self.random.random_bool(0.3);
        let options = PutOptions {
            durability: if in_memory {
                Durability::Memory
            } else {
                Durability::Durable
            },
            ..PutOptions::default()
        };
        let put = self.client.put_with(&chunk, options);
        let patience = if self.random.random_bool(0.05) {
            Duration::from_micros(self.random.random_range(0..20_000))
        } else {
            Duration::MAX
        };
        match tokio::time::timeout(patience, put).await {
            Err(_) => target.tally.add("puts/dropped", 1),
            Ok(put) => {
                if !put?.durable && !in_memory {
                    target.tally.violation(Violation::Volatile(chunk.key));
                }
                target.tally.add("puts", 1);
                target
                    .tally
                    .add("written/bytes", chunk.layout.chunk_bytes());
            }
        }
        Ok(())
    }

    async fn get(&mut self) -> Result<(), CallError> {
        let target = self.target.clone();
        let numbers = target.some(&mut self.random);
        let keys: Vec<_> = numbers.iter().map(|it| target.set.key(*it)).collect();
        let layers = target.set.layout(numbers[0]).layers();
        let options = GetOptions {
            layers: self.random.random_bool(0.2).then(|| {
                let start = self.random.random_range(0..layers);
                let end = self.random.random_range(start + 1..=layers);
                LayerRange::new(start, end).expect("it is not empty")
            }),
            ..GetOptions::default()
        };
        let mut stream = self.client.get(&keys, options).await?;
        if stream.chunks().is_empty() {
            target.tally.add("gets/missed", 1);
            return Ok(());
        }
        let some = self.random.random_range(0..32);
        match self.random.random_range(0..100) {
            0..10 => {
                if !target.read(&mut stream, &numbers, some).await? {
                    target.tally.add("gets/dropped", 1);
                }
                return Ok(());
            }
            10..12 if !target.read(&mut stream, &numbers, some).await? => {
                // Shorter than the daemon's patience: the stream goes on.
                let pause = self.random.random_range(0..1500);
                tokio::time::sleep(Duration::from_millis(pause)).await;
                target.tally.add("gets/paused", 1);
            }
            _ => (),
        }
        target.read(&mut stream, &numbers, usize::MAX).await?;
        target.tally.add("gets", 1);
        Ok(())
    }

    /// Reads by the name of a lease what others may delete meanwhile.
    async fn hold(&mut self) -> Result<(), CallError> {
        let target = self.target.clone();
        let mut numbers = target.some(&mut self.random);
        // More than half of the memory tier is refused, and four of the largest are that.
        numbers.truncate(2);
        let keys: Vec<_> = numbers.iter().map(|it| target.set.key(*it)).collect();
        let mut hold = self.client.hold().await?;
        let held = hold.acquire(&keys).await?;
        let options = GetOptions {
            lease: Some(held.id),
            ..GetOptions::default()
        };
        if !held.chunks.is_empty() {
            let mut stream = self.client.get(&keys, options).await?;
            target.read(&mut stream, &numbers, usize::MAX).await?;
        }
        // Else the session's end releases it.
        if self.random.random_bool(0.5) {
            hold.release(held.id).await?;
        }
        target.tally.add("holds", 1);
        Ok(())
    }

    async fn lookup(&mut self) -> Result<(), CallError> {
        let target = &self.target;
        let count = self.random.random_range(1..=512);
        let keys: Vec<_> = (0..count)
            .map(|_| target.set.key(target.any(&mut self.random)))
            .collect();
        self.client.lookup(&keys).await?;
        target.tally.add("lookups", 1);
        Ok(())
    }

    async fn pin(&mut self) -> Result<(), CallError> {
        let numbers = self.target.some(&mut self.random);
        let keys: Vec<_> = numbers.iter().map(|it| self.target.set.key(*it)).collect();
        let pin = self
            .client
            .pin(&keys, self.random.random_range(MIN_PIN..MAX_PIN));
        self.pins.push(pin.await?.id);
        self.target.tally.add("pins", 1);
        Ok(())
    }

    async fn unpin(&mut self) -> Result<(), CallError> {
        if let Some(pin) = self.pins.pop() {
            self.client.unpin(pin).await?;
            self.target.tally.add("unpins", 1);
        }
        // The others end by themselves.
        self.pins.truncate(16);
        Ok(())
    }

    async fn delete(&mut self) -> Result<(), CallError> {
        let numbers = self.target.some(&mut self.random);
        let keys: Vec<_> = numbers.iter().map(|it| self.target.set.key(*it)).collect();
        self.client.delete(&keys).await?;
        self.target.tally.add("deletes", 1);
        Ok(())
    }

    async fn list(&mut self) -> Result<(), CallError> {
        let target = self.target.clone();
        let mut before = Some(target.set.key(target.any(&mut self.random)));
        let options = ListOptions {
            after: before,
            limit: self.random.random_range(0..1000),
        };
        let mut listing = self.client.list(options).await?;
        while let Some(chunk) = listing.next().await? {
            let number = target.set.number(&chunk.key);
            let layout = number.map(|number| *target.set.layout(number));
            if layout != Some(chunk.layout) || before.is_some_and(|before| before >= chunk.key) {
                target.tally.violation(Violation::Stray(chunk.key));
            }
            before = Some(chunk.key);
            if self.random.random_bool(0.001) {
                break;
            }
        }
        target.tally.add("lists", 1);
        Ok(())
    }

    async fn reconnect(&mut self) -> Result<(), CallError> {
        self.client = self.target.connect(WINDOW);
        self.client.stats().await?;
        self.target.tally.add("reconnects", 1);
        Ok(())
    }
}

/// Pins last no longer than this.
pub(super) const MAX_PIN: Duration = Duration::from_secs(3);
const MIN_PIN: Duration = Duration::from_millis(100);
const WINDOW: u32 = 4 << 20;
/// So that the daemon cannot send ahead what nobody takes.
const SMALL_WINDOW: u32 = 64 << 10;
/// Milliseconds beyond the daemon's patience.
const MARGIN: std::ops::Range<Duration> = Duration::from_millis(200)..Duration::from_millis(1500);
