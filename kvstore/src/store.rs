//! The tiers as one store.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kvasir_codec::{Object, ObjectHeader};
use kvasir_mem::Arena;
use kvasir_types::{ChunkKey, Durability, Hints, KvLayout, LayoutDigest, Level, ProfileDigest};
use tokio::sync::broadcast;

use crate::blocking::joined;
use crate::budget::Throttled;
use crate::buffers::BufferError;
use crate::claims::Claims;
use crate::clock::Clock;
use crate::config::StoreConfig;
use crate::demotion::Demotions;
use crate::disk::{DiskTier, OpenError};
use crate::environment::Environment;
use crate::events::{Event, EventLog, Snapshot};
use crate::index::Worth;
use crate::lease::Lease;
use crate::leases::{LeaseId, LeaseSession, Leases};
use crate::memory::{Chunk, MemoryTier};
use crate::payload::{Payload, PayloadShape, Received};
use crate::pins::{PinId, PinRefused};
use crate::policy::Admission;
use crate::profiles::{GetProfileError, IncomingProfile, ProfileUsage, Profiles, PutProfileError};
use crate::tier::{DeviceError, Facts, Tier, TierKind, Usage, WriteError, Written};

/// Memory and, if configured, disk, as one store. Clones are handles to it.
///
/// A put goes to every tier and is acknowledged by the lowest, or, with
/// [`Durability::Memory`], to memory, and on to disk when memory needs its room. Reads
/// are served by the highest tier that has the chunk.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) memory: MemoryTier,
    pub(crate) disk: Option<DiskTier>,
    pub(crate) claims: Claims,
    pub(crate) demotions: Demotions,
    profiles: Profiles,
    events: EventLog,
    clock: Clock,
    next_pin: AtomicU64,
    leases: AtomicU64,
    named: Leases,
}

/// What [`Store::lookup`] knows of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The highest tier that has it.
    pub tier: TierKind,
    /// Digest of its layout.
    pub layout_digest: LayoutDigest,
    /// The level it is stored at.
    pub level: Level,
    /// Bytes of the object, header included.
    pub bytes: u64,
}

/// The answer to a lookup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LookupResult {
    /// One answer per key, in order.
    pub found: Vec<Option<Found>>,
    /// How many keys from the first on are there without a gap.
    pub prefix: usize,
}

/// How a put is to be done. The default is the strongest promise, and no hints.
#[derive(Clone, Copy, Debug, Default)]
pub struct PutOptions {
    /// What the acknowledgement promises.
    pub durability: Durability,
    /// What the chunk is worth.
    pub hints: Hints,
}

/// What became of a put, of a chunk or a profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Put {
    /// Whether it changed anything.
    pub outcome: PutOutcome,
    /// Whether what was put survives a crash from now on.
    pub durable: bool,
}

/// Whether a put changed anything. Both are success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// It is stored now.
    Stored,
    /// It already was.
    AlreadyPresent,
}

/// Why nothing was put.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PutError {
    /// No room now; retry later.
    #[error(transparent)]
    Throttled(#[from] Throttled),
    /// The object does not fit, or the device failed.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// One chunk of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its key.
    pub key: ChunkKey,
    /// Its geometry.
    pub layout: KvLayout,
    /// The level it is stored at.
    pub level: Level,
    /// Bytes of the object, header included.
    pub bytes: u64,
    /// Where it is, highest tier first.
    pub tiers: Vec<TierKind>,
}

/// Counters and fill levels of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// The memory tier. Its bytes include buffers of reads and writes in flight.
    pub memory: Usage,
    /// The disk tier, if there is one.
    pub disk: Option<Usage>,
    /// Pins that last; one that has keys in both tiers counts once.
    pub pins: u64,
    /// Leases that last.
    pub leases: u64,
    /// Codec profiles.
    pub profiles: ProfileUsage,
}

impl Store {
    /// Opens a store; recovers what its disk tier holds.
    ///
    /// # Errors
    /// The directory is in use, cannot be written, or cannot be read.
    pub async fn open(config: StoreConfig) -> Result<Self, OpenError> {
        Self::open_in(Environment::default(), config).await
    }

    /// Opens a store that takes time and files from `environment`.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub async fn open_in(environment: Environment, config: StoreConfig) -> Result<Self, OpenError> {
        let events = EventLog::new();
        let clock = environment.clock.clone();
        let memory = MemoryTier::new(&config.memory, clock.clone(), events.clone());
        let (admission, disk_bytes) = match &config.disk {
            Some(disk) => (disk.admission, disk.capacity.as_u64()),
            None => (Admission::All, 0),
        };
        let path = config.disk.as_ref().map(|disk| disk.path.clone());
        let disk = match config.disk {
            Some(disk) => {
                let open = DiskTier::open(environment, disk, memory.clone(), events.clone());
                Some(open.await?)
            }
            None => None,
        };
        let on_disk = disk.clone().zip(path.as_deref());
        let profiles = Profiles::open(&config.profiles, memory.clone(), on_disk).await?;
        for class in &config.class {
            memory.limit(class.number, class.limits());
            if let Some(disk) = &disk {
                disk.limit(class.number, class.limits());
            }
        }
        let inner = Arc::new(Inner {
            demotions: Demotions::new(admission, memory.capacity()),
            memory,
            disk,
            profiles,
            claims: Claims::default(),
            // Another run's ids should not name this run's pins and leases.
            next_pin: AtomicU64::new(events.epoch()),
            named: Leases::new(
                events.epoch(),
                config.memory.capacity.as_u64() / 2,
                disk_bytes / 2,
            ),
            events,
            clock,
            leases: AtomicU64::new(0),
        });
        if inner.disk.is_some() {
            Demotions::start(&inner);
        }
        Ok(Self(inner))
    }

    /// Where each chunk is. Reads indices only: no I/O, and no chunk lives longer
    /// for being looked up.
    pub fn lookup(&self, keys: &[ChunkKey]) -> LookupResult {
        let mut found = vec![None; keys.len()];
        // Highest tier last, so that its answer stands.
        for tier in self.tiers().rev() {
            for (slot, facts) in found.iter_mut().zip(tier.find(keys)) {
                if let Some(facts) = facts {
                    *slot = Some(Found {
                        tier: tier.kind(),
                        layout_digest: facts.layout_digest,
                        level: facts.level,
                        bytes: facts.bytes,
                    });
                }
            }
        }
        let prefix = found.iter().take_while(|slot| slot.is_some()).count();
        LookupResult { found, prefix }
    }

    /// Bytes of memory that an object with this header takes in the store.
    pub fn charged_bytes(header: &ObjectHeader) -> u64 {
        Chunk::charged_bytes(header)
    }

    /// Bytes of memory that a raw object of this layout takes in the store.
    pub fn charged_bytes_of_raw(layout: &KvLayout) -> u64 {
        layout.chunk_bytes() + Chunk::overhead_bytes(layout.layers().into())
    }

    /// Stores an object, durably if the store has a disk tier.
    ///
    /// # Errors
    /// As for [`put_with`](Self::put_with).
    pub async fn put(&self, object: Object) -> Result<PutOutcome, PutError> {
        let put = self.put_with(object, PutOptions::default()).await?;
        Ok(put.outcome)
    }

    /// Stores an object.
    ///
    /// Of concurrent writers of one key, one stores and the others find it present. A
    /// chunk that is in memory alone is written to disk by a writer who asks for
    /// [`Durability::Durable`]. Dropping the future leaves a whole chunk or none.
    ///
    /// # Errors
    /// No room, too large, or the device failed. Then nothing is stored that was not
    /// before.
    pub async fn put_with(&self, object: Object, options: PutOptions) -> Result<Put, PutError> {
        let inner = &*self.0;
        let bytes = Chunk::charged_bytes(object.header());
        let capacity = inner.memory.capacity();
        if bytes > capacity {
            return Err(PutError::Write(WriteError::TooLarge {
                tier: TierKind::Memory,
                bytes,
                capacity,
            }));
        }
        inner.demotions_catch_up(bytes).await;
        let key = *object.header().key();
        let charge = || inner.memory.charge(object, options.hints);
        self.store(key, options, charge).await
    }

    /// Memory to receive a chunk into; evicts what it must. The fastest way to put a
    /// chunk that comes from elsewhere: its memory was used before, and nothing is
    /// copied again.
    ///
    /// # Errors
    /// No room, or more than there will ever be: see [`Throttled::wanted`].
    pub async fn payload(&self, shape: PayloadShape) -> Result<Payload, PutError> {
        let inner = &*self.0;
        let bytes = shape
            .bytes()
            .saturating_add(Chunk::overhead_bytes(shape.extents()));
        inner.demotions_catch_up(bytes).await;
        inner.memory.payload(shape).map_err(|error| match error {
            BufferError::Throttled(throttled) => throttled.into(),
            BufferError::Io(error) => WriteError::from(DeviceError::from(error)).into(),
        })
    }

    /// Stores what was received into a [`payload`](Self::payload) of this store.
    ///
    /// # Errors
    /// As for [`put_with`](Self::put_with).
    pub async fn put_received(
        &self,
        received: Received,
        options: PutOptions,
    ) -> Result<Put, PutError> {
        let key = *received.object().header().key();
        let charge = || self.0.memory.take(received, options.hints);
        self.store(key, options, charge).await
    }

    /// Stores the chunk that `charge` gives, unless it is there already.
    async fn store(
        &self,
        key: ChunkKey,
        PutOptions { durability, hints }: PutOptions,
        charge: impl FnOnce() -> Result<Arc<Chunk>, Throttled>,
    ) -> Result<Put, PutError> {
        let inner = &*self.0;
        let _claim = inner.claims.claim(key).await;
        let (above, below) = inner.touch(&key);
        let disk = match durability {
            Durability::Durable => inner.disk.as_ref(),
            Durability::Memory => None,
        };
        if below || (above && disk.is_none()) {
            return Ok(Put {
                outcome: PutOutcome::AlreadyPresent,
                durable: below,
            });
        }
        let chunk = charge()?;
        if let Some(disk) = disk {
            let header = Arc::clone(chunk.header());
            let worth = Worth::new(hints);
            match disk.store(header, chunk.share(), worth).await? {
                Written::Stored | Written::AlreadyPresent => (),
                Written::Throttled(throttled) => return Err(throttled.into()),
            }
        }
        inner.memory.publish(Arc::clone(&chunk), 1);
        if disk.is_none() {
            inner.demote_later(&chunk);
        }
        Ok(Put {
            outcome: PutOutcome::Stored,
            durable: disk.is_some(),
        })
    }

    /// Opens a chunk for reading; `None` is a miss. A device that fails is a miss
    /// too, and counted.
    pub async fn lease(&self, key: ChunkKey) -> Option<Lease> {
        let inner = &self.0;
        if let Some(reader) = inner.memory.reader(&key) {
            // Else what is used most would be the first to go from the disk.
            if let Some(disk) = &inner.disk {
                disk.touch(&key);
            }
            return Some(Lease::memory(reader, Arc::clone(inner)));
        }
        match inner.disk.as_ref()?.lease(key).await {
            Ok(leased) => {
                let (reader, promotion) = leased?;
                Some(Lease::disk(reader, promotion, Arc::clone(inner)))
            }
            Err(error) => {
                tracing::warn!(%key, %error, "cannot open a chunk; treated as a miss");
                None
            }
        }
    }

    /// A holder of leases that have names: see [`leased`](Self::leased).
    pub fn lease_session(&self) -> LeaseSession {
        self.0.named.session()
    }

    /// A chunk by the name of its lease; `None` where the name does not cover it.
    pub fn leased(&self, id: LeaseId, key: &ChunkKey) -> Option<Arc<Lease>> {
        self.0.named.get(id, key)
    }

    /// Whether leases of this name last.
    pub fn lease_lasts(&self, id: LeaseId) -> bool {
        self.0.named.lasts(id)
    }

    /// Keeps chunks from being evicted for `ttl`: each in the lowest tier that has
    /// it. Deleting them is still possible. All are pinned, or none. A pin without
    /// keys has ended already.
    ///
    /// # Errors
    /// A key that is not stored, or more pinned bytes than the configuration allows.
    pub fn pin(&self, keys: &[ChunkKey], ttl: Duration) -> Result<PinId, PinRefused> {
        let inner = &*self.0;
        let id = PinId::from_u64(inner.next_pin.fetch_add(1, Ordering::Relaxed));
        let now = inner.clock.now();
        // A time too far to be expressed is cut to a century.
        let expires = now.checked_add(ttl).unwrap_or(now + CENTURY);
        let mut left = keys.to_vec();
        for tier in self.tiers().rev() {
            let found = tier.find(&left);
            let split = left.iter().copied().zip(found);
            let (here, elsewhere): (Vec<_>, Vec<_>) = split.partition(|(_, facts)| facts.is_some());
            let here: Vec<_> = here.into_iter().map(|(key, _)| key).collect();
            left = elsewhere.into_iter().map(|(key, _)| key).collect();
            if here.is_empty() {
                continue;
            }
            if let Err(refused) = tier.pin(id, &here, expires) {
                self.unpin(id);
                return Err(refused);
            }
        }
        match left.first() {
            Some(missing) => {
                self.unpin(id);
                Err(PinRefused::Missing(*missing))
            }
            None => Ok(id),
        }
    }

    /// Ends a pin before its time. Says whether it lasted.
    pub fn unpin(&self, id: PinId) -> bool {
        self.tiers()
            .fold(false, |lasted, tier| tier.unpin(id) | lasted)
    }

    /// Drops a chunk from every tier. Says whether there was one. What readers hold
    /// stays readable. Waits for a put of the chunk to end. Once polled it runs to its
    /// end, even if the future is dropped.
    ///
    /// # Errors
    /// The device failed. The chunk is no longer served, but may come back after a
    /// restart.
    pub async fn delete(&self, key: ChunkKey) -> Result<bool, DeviceError> {
        if self.0.disk.is_none() {
            return Ok(self.0.memory.discard(&key));
        }
        // A task of its own: between the tiers nobody may stop it, or memory would
        // go on serving what the disk no longer has.
        let inner = Arc::clone(&self.0);
        joined(tokio::spawn(async move { inner.delete(key).await })).await?
    }

    /// Chunks in the order of their keys: at most `limit`, with keys after `after`.
    /// Takes memory for about as many, and looks at all there are.
    pub fn list(&self, after: Option<&ChunkKey>, limit: usize) -> Vec<Listed> {
        let mut listed: BTreeMap<ChunkKey, (Facts, Vec<TierKind>)> = BTreeMap::new();
        for tier in self.tiers() {
            for facts in tier.list(after, limit) {
                let (_, tiers) = listed
                    .entry(facts.key)
                    .or_insert_with(|| (facts, Vec::new()));
                tiers.push(tier.kind());
            }
        }
        listed
            .into_values()
            .take(limit)
            .map(|(facts, tiers)| Listed {
                key: facts.key,
                layout: facts.layout,
                level: facts.level,
                bytes: facts.bytes,
                tiers,
            })
            .collect()
    }

    /// Memory that other processes may be allowed to read, in which payload lies; see
    /// [`MemoryConfig::shared`](crate::MemoryConfig::shared).
    pub fn arena(&self) -> Option<&Arc<Arena>> {
        self.0.memory.arena()
    }

    /// Counters and fill levels.
    pub fn stats(&self) -> Stats {
        Stats {
            memory: self.0.memory.usage(),
            disk: self.0.disk.as_ref().map(Tier::usage),
            pins: self.pins(),
            leases: self.0.leases.load(Ordering::Relaxed),
            profiles: self.0.profiles.usage(),
        }
    }

    /// The codec profiles.
    pub fn profiles(&self) -> &Profiles {
        &self.0.profiles
    }

    /// Memory to receive a profile of so many bytes into; evicts what it must. When it is
    /// whole, [`Profiles::put`] keeps it.
    ///
    /// # Errors
    /// It would not be kept, or there is no memory.
    pub async fn receive_profile(
        &self,
        digest: ProfileDigest,
        bytes: u64,
    ) -> Result<IncomingProfile, PutProfileError> {
        self.0.demotions_catch_up(bytes).await;
        self.0.profiles.receive(digest, bytes)
    }

    /// The bytes of a profile, which have this very digest; `None` where it is not kept, or
    /// was found to be damaged. They are charged to memory, which evicts what it must.
    ///
    /// # Errors
    /// There is no memory to read it into, or the device failed.
    pub async fn profile(&self, digest: ProfileDigest) -> Result<Option<Bytes>, GetProfileError> {
        let Some(info) = self.0.profiles.find(&digest) else {
            return Ok(None);
        };
        self.0.demotions_catch_up(info.bytes).await;
        self.0.profiles.get(digest).await
    }

    fn pins(&self) -> u64 {
        let mut ids: HashSet<PinId> = self.0.memory.pin_ids().into_iter().collect();
        if let Some(disk) = &self.0.disk {
            ids.extend(disk.pin_ids());
        }
        ids.len() as u64
    }

    /// Changes from now on. To know the state they apply to, subscribe, take a
    /// [`snapshot`](Self::snapshot), and skip events up to its sequence. A receiver
    /// that lags by more than [`EventLog::CAPACITY`] events must do so again.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.0.events.subscribe()
    }

    /// What is stored where. Nobody waits for it: see [`Snapshot`].
    pub fn snapshot(&self) -> Snapshot {
        let inner = &*self.0;
        // First, so that every change that the copies may lack is an event after it.
        let sequence = inner.events.sequence();
        let mut copies = Vec::new();
        inner
            .memory
            .keys(|key| copies.push((key, TierKind::Memory)));
        if let Some(disk) = &inner.disk {
            disk.keys(|key| copies.push((key, TierKind::Disk)));
        }
        Snapshot {
            epoch: inner.events.epoch(),
            sequence,
            copies,
        }
    }

    /// Moves what is in memory alone to disk, if it is worth it; waits for disk work in
    /// progress, refuses more, and makes the catalog durable. The directory stays locked
    /// until every handle and lease is dropped.
    ///
    /// # Errors
    /// The catalog failed.
    pub async fn close(&self) -> Result<(), DeviceError> {
        match &self.0.disk {
            Some(disk) => {
                self.0.demote_all().await;
                disk.close().await
            }
            None => Ok(()),
        }
    }

    /// Highest first.
    fn tiers(&self) -> impl DoubleEndedIterator<Item = &dyn Tier> {
        let memory: &dyn Tier = &self.0.memory;
        let disk = self.0.disk.as_ref().map(|disk| disk as &dyn Tier);
        std::iter::once(memory).chain(disk)
    }
}

impl Inner {
    async fn delete(&self, key: ChunkKey) -> Result<bool, DeviceError> {
        let _claim = self.claims.claim(key).await;
        // Lowest tier first: whoever copies a chunk upwards checks afterwards
        // whether it is still below.
        let below = match &self.disk {
            Some(disk) => disk.remove(key).await,
            None => Ok(false),
        };
        let above = self.memory.discard(&key);
        Ok(below? | above)
    }

    /// Whether memory has the chunk, and whether the disk has. Counts as a use.
    fn touch(&self, key: &ChunkKey) -> (bool, bool) {
        let above = self.memory.touch(key);
        let below = self.disk.as_ref().is_some_and(|disk| disk.touch(key));
        (above, below)
    }

    pub(crate) fn lease_begins(&self) {
        self.leases.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn lease_ends(&self) {
        self.leases.fetch_sub(1, Ordering::Relaxed);
    }
}

const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
