//! Host memory.
//!
//! The tier's budget also pays for the buffers of reads and writes in flight, of
//! this tier and of the tiers below: [`MemoryTier::reserve`] is the only way to get
//! memory for payload, and it evicts to make room.

use std::fs;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use kvasir_codec::{ExtentError, Object, ObjectHeader};
use kvasir_mem::{ALIGNMENT, Arena};
use kvasir_types::{ChunkKey, Class, ExtentIdx, ExtentRange, Hints};

use crate::blocking::blocking;
use crate::budget::{Budget, ChargedBytes, Reservation, Throttled};
use crate::buffers::{Buffer, BufferError, Buffers};
use crate::clock::Clock;
use crate::config::MemoryConfig;
use crate::events::EventLog;
use crate::index::{self, Counters, Entry, Index, Worth, count};
use crate::payload::{Payload, PayloadShape, Received};
use crate::pins::{PinId, PinRefused};
use crate::policy::{ClassLimits, Prospect};
use crate::promotion::Promotions;
use crate::sync::{Mutex, MutexGuard};
use crate::tier::{
    ChunkReader, DeviceError, Facts, ReadError, Tier, TierKind, Usage, WriteError, Written,
};

/// The memory tier. Clones are handles to the same tier.
#[derive(Clone, Debug)]
pub struct MemoryTier(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    budget: Budget,
    index: Mutex<Index<Arc<Chunk>>>,
    promotions: Promotions,
    buffers: Buffers,
    counters: Counters,
    clock: Clock,
}

/// A whole object whose bytes are charged to the memory budget.
#[derive(Debug)]
pub(crate) struct Chunk {
    facts: Facts,
    hints: Hints,
    header: Arc<ObjectHeader>,
    extents: Vec<ChargedBytes>,
    _overhead: Reservation,
}

impl Chunk {
    /// Bytes charged for a chunk beyond its payload: header, index entry and the
    /// bookkeeping of each extent. Rounded up from the sizes of the structures.
    pub(crate) const fn overhead_bytes(extents: u32) -> u64 {
        ENTRY_BYTES + EXTENT_BYTES * extents as u64
    }

    /// Bytes that a chunk with this header is charged for.
    pub(crate) fn charged_bytes(header: &ObjectHeader) -> u64 {
        header.payload_bytes() + Self::overhead_bytes(header.all().end())
    }

    /// A chunk whose extents lie in buffers of this tier, which pay for themselves.
    fn prepaid(received: Received, hints: Hints) -> Self {
        let (header, extents) = received.object.into_parts();
        let extents = extents.into_iter().map(ChargedBytes::prepaid).collect();
        Self::new(header, extents, hints, received.overhead)
    }

    /// `None` where the reservation is too small for the header's chunk.
    pub(crate) fn charge(
        object: Object,
        hints: Hints,
        mut reservation: Reservation,
    ) -> Option<Self> {
        let (header, extents) = object.into_parts();
        let overhead = reservation.split(Self::overhead_bytes(header.all().end()))?;
        let extents = extents
            .into_iter()
            .map(|extent| reservation.charge(extent))
            .collect::<Option<_>>()?;
        Some(Self::new(header, extents, hints, overhead))
    }

    /// `extents` passed the header's checks.
    pub(crate) fn new(
        header: Arc<ObjectHeader>,
        extents: Vec<ChargedBytes>,
        hints: Hints,
        overhead: Reservation,
    ) -> Self {
        Self {
            facts: Facts::of(&header),
            hints,
            header,
            extents,
            _overhead: overhead,
        }
    }

    pub(crate) fn header(&self) -> &Arc<ObjectHeader> {
        &self.header
    }

    pub(crate) fn key(&self) -> &ChunkKey {
        &self.facts.key
    }

    pub(crate) fn hints(&self) -> Hints {
        self.hints
    }

    pub(crate) fn share(&self) -> Vec<Bytes> {
        self.extents.iter().map(ChargedBytes::share).collect()
    }

    fn verified(&self, range: ExtentRange) -> Result<Vec<Bytes>, ExtentError> {
        range
            .iter()
            .zip(self.in_range(range))
            .map(|(extent, bytes)| {
                self.header
                    .verify_extent(ExtentIdx(extent), bytes.as_ref())?;
                Ok(bytes.share())
            })
            .collect()
    }

    fn in_range(&self, range: ExtentRange) -> &[ChargedBytes] {
        self.extents
            .get(range.start() as usize..range.end() as usize)
            .unwrap_or(&[])
    }
}

/// A chunk that may move to disk. It does not count as held.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) key: ChunkKey,
    pub(crate) chunk: Weak<Chunk>,
    pub(crate) prospect: Prospect,
}

impl Candidate {
    fn new((chunk, prospect): (&Arc<Chunk>, Prospect)) -> Self {
        Self {
            key: *chunk.key(),
            chunk: Arc::downgrade(chunk),
            prospect,
        }
    }
}

impl Entry for Arc<Chunk> {
    fn key(&self) -> &ChunkKey {
        &self.facts.key
    }

    fn facts(&self) -> Facts {
        self.facts
    }

    fn charged_bytes(&self) -> u64 {
        Chunk::charged_bytes(&self.header)
    }

    fn is_held(&self) -> bool {
        // In this order: a reader takes its extents before it lets go of the chunk.
        Arc::strong_count(self) > 1 || self.extents.iter().any(ChargedBytes::is_held)
    }
}

impl MemoryTier {
    /// An empty tier.
    pub fn new(config: &MemoryConfig, clock: Clock, events: EventLog) -> Self {
        let arena = config
            .shared
            .then(|| arena(config.capacity.as_u64()))
            .flatten();
        if arena.is_none() {
            warn_of_few_mappings(config.capacity.as_u64());
        }
        Self(Arc::new(Shared {
            budget: Budget::new(config.capacity.as_u64()),
            index: Mutex::new(Index::new(
                TierKind::Memory,
                config.policy,
                config.capacity.as_u64(),
                config.pin_limit_bytes(),
                events,
                clock.now(),
            )),
            promotions: Promotions::new(config.capacity.as_u64()),
            buffers: Buffers::new(config.capacity.as_u64() / IDLE_SHARE, arena),
            counters: Counters::default(),
            clock,
        }))
    }

    /// Memory for payload in flight. Evicts what it must.
    ///
    /// # Errors
    /// Everything that could be evicted would not be enough; then nothing is.
    pub fn reserve(&self, bytes: u64) -> Result<Reservation, Throttled> {
        self.evict_until(bytes, || self.0.budget.try_reserve(bytes))
    }

    /// Evicts until `attempt`, at something that takes `bytes`, succeeds.
    fn evict_until<T>(
        &self,
        bytes: u64,
        mut attempt: impl FnMut() -> Option<T>,
    ) -> Result<T, Throttled> {
        let shared = &*self.0;
        loop {
            if let Some(done) = attempt() {
                return Ok(done);
            }
            let throttled = shared.budget.throttled(bytes);
            if bytes > throttled.capacity {
                count(&shared.counters.throttled);
                return Err(throttled);
            }
            let excess = throttled
                .used
                .saturating_add(bytes)
                .saturating_sub(throttled.capacity);
            // Zero: somebody let go in between.
            let victims = shared.lock().evict(excess, shared.clock.now());
            if excess > 0 && victims.is_empty() {
                if shared.buffers.trim() || shared.promotions.abandon() {
                    continue;
                }
                count(&shared.counters.throttled);
                return Err(throttled);
            }
            for _ in &victims {
                count(&shared.counters.evictions);
            }
        }
    }

    /// A buffer of `bytes`, a multiple of a block, for a device to read into or write
    /// from; paid for. Evicts what it must.
    pub(crate) fn buffer(&self, bytes: u64) -> Result<Buffer, BufferError> {
        let Shared {
            buffers, budget, ..
        } = &*self.0;
        let len = usize::try_from(bytes).unwrap_or(usize::MAX);
        let found = self.evict_until(bytes, || match buffers.reuse(len) {
            Some(buffer) => Some(Ok(buffer)),
            // What was just evicted left a buffer, as a rule.
            None => budget.try_reserve(bytes).map(Err),
        });
        match found.map_err(BufferError::Throttled)? {
            Ok(buffer) => Ok(buffer),
            Err(reservation) => buffers.create(reservation).map_err(BufferError::Io),
        }
    }

    /// Memory that others may read, in which payload lies.
    pub(crate) fn arena(&self) -> Option<&Arc<Arena>> {
        self.0.buffers.arena()
    }

    pub(crate) fn promotions(&self) -> &Promotions {
        &self.0.promotions
    }

    /// Memory to receive a chunk into.
    pub(crate) fn payload(&self, shape: PayloadShape) -> Result<Payload, BufferError> {
        let overhead = self
            .reserve(Chunk::overhead_bytes(shape.extents()))
            .map_err(BufferError::Throttled)?;
        let alignment = ALIGNMENT as u64;
        let blocks = shape.bytes().div_ceil(alignment).max(1);
        let buffer = self.buffer(blocks.saturating_mul(alignment))?;
        Ok(Payload::new(buffer, shape, overhead))
    }

    /// A chunk of what was received.
    pub(crate) fn take(&self, received: Received, hints: Hints) -> Result<Arc<Chunk>, Throttled> {
        if received.overhead.belongs_to(&self.0.budget) {
            return Ok(Arc::new(Chunk::prepaid(received, hints)));
        }
        // Another store's memory.
        self.charge(received.object, hints)
    }

    /// Charges an object. Evicts what it must.
    pub(crate) fn charge(&self, object: Object, hints: Hints) -> Result<Arc<Chunk>, Throttled> {
        let reservation = self.reserve(Chunk::charged_bytes(object.header()))?;
        let chunk = Chunk::charge(object, hints, reservation);
        Ok(Arc::new(chunk.expect(
            "the reservation covers what the header states, and an object is what its header states",
        )))
    }

    /// Makes a chunk visible that was used `uses` times. Says whether it was absent.
    pub(crate) fn publish(&self, chunk: Arc<Chunk>, uses: u8) -> bool {
        let now = self.0.clock.now();
        let mut index = self.0.lock();
        if index.touch(&chunk.facts.key, now).is_some() {
            return false;
        }
        let hints = chunk.hints;
        index.insert(chunk, &Worth { hints, uses }, now);
        count(&self.0.counters.writes);
        true
    }

    /// Opens a chunk without waiting.
    pub(crate) fn reader(&self, key: &ChunkKey) -> Option<MemoryReader> {
        let now = self.0.clock.now();
        let chunk = self.0.lock().touch(key, now).map(|chunk| Arc::clone(chunk));
        count(if chunk.is_some() {
            &self.0.counters.hits
        } else {
            &self.0.counters.misses
        });
        Some(MemoryReader {
            chunk: chunk?,
            tier: self.clone(),
        })
    }

    /// Marks a chunk as used. Says whether it is there.
    pub(crate) fn touch(&self, key: &ChunkKey) -> bool {
        let now = self.0.clock.now();
        self.0.lock().touch(key, now).is_some()
    }

    pub(crate) fn discard(&self, key: &ChunkKey) -> bool {
        // The chunk's memory is freed after the lock is.
        let removed = self.0.lock().remove(key);
        removed.is_some()
    }

    /// Whether it is this very chunk that is stored under its key.
    pub(crate) fn has(&self, chunk: &Arc<Chunk>) -> bool {
        let index = self.0.lock();
        let stored = index.peek(chunk.key());
        stored.is_some_and(|stored| Arc::ptr_eq(stored, chunk))
    }

    /// The chunks that would be evicted for `bytes`, first to last.
    pub(crate) fn soon_evicted(&self, bytes: u64) -> Vec<Candidate> {
        let now = self.0.clock.now();
        let mut index = self.0.lock();
        let soon = index.soon_evicted(bytes, now);
        soon.into_iter().map(Candidate::new).collect()
    }

    /// All chunks, in no particular order.
    pub(crate) fn candidates(&self) -> Vec<Candidate> {
        let now = self.0.clock.now();
        let index = self.0.lock();
        index.prospects(now).map(Candidate::new).collect()
    }

    /// Bytes that are left of the capacity.
    pub(crate) fn room(&self) -> u64 {
        let budget = &self.0.budget;
        budget.capacity().saturating_sub(budget.used())
    }

    pub(crate) fn limit(&self, class: Class, limits: ClassLimits) {
        self.0.lock().limit(class, limits);
    }

    /// Shows the keys of all chunks; see [`index::in_parts`].
    pub(crate) fn keys(&self, mut show: impl FnMut(ChunkKey)) {
        let show = |chunk: &Arc<Chunk>| show(chunk.facts.key);
        index::in_parts(|part| part(&self.0.lock()), show);
    }

    pub(crate) fn pin_ids(&self) -> Vec<PinId> {
        self.0.lock().pin_ids(self.0.clock.now())
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.0.budget.capacity()
    }

    fn discard_corrupt(&self, chunk: &Arc<Chunk>) {
        let mut index = self.0.lock();
        let key = &chunk.facts.key;
        if index.peek(key).is_some_and(|now| Arc::ptr_eq(now, chunk)) {
            index.remove(key);
            count(&self.0.counters.corrupt);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Index<Arc<Chunk>>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tier for MemoryTier {
    fn kind(&self) -> TierKind {
        TierKind::Memory
    }

    fn write(&self, object: Object) -> BoxFuture<'_, Result<Written, WriteError>> {
        Box::pin(async move {
            if self.touch(object.header().key()) {
                return Ok(Written::AlreadyPresent);
            }
            let bytes = Chunk::charged_bytes(object.header());
            let capacity = self.0.budget.capacity();
            if bytes > capacity {
                return Err(WriteError::TooLarge {
                    tier: TierKind::Memory,
                    bytes,
                    capacity,
                });
            }
            Ok(match self.charge(object, Hints::default()) {
                Ok(chunk) => {
                    if self.publish(chunk, 1) {
                        Written::Stored
                    } else {
                        Written::AlreadyPresent
                    }
                }
                Err(throttled) => Written::Throttled(throttled),
            })
        })
    }

    fn open(
        &self,
        key: ChunkKey,
    ) -> BoxFuture<'_, Result<Option<Box<dyn ChunkReader>>, DeviceError>> {
        Box::pin(async move { Ok(self.reader(&key).map(|reader| Box::new(reader) as _)) })
    }

    fn find(&self, keys: &[ChunkKey]) -> Vec<Option<Facts>> {
        self.0.lock().find(keys)
    }

    fn remove(&self, key: ChunkKey) -> BoxFuture<'_, Result<bool, DeviceError>> {
        Box::pin(async move { Ok(self.discard(&key)) })
    }

    fn pin(&self, id: PinId, keys: &[ChunkKey], expires: Instant) -> Result<(), PinRefused> {
        self.0.lock().pin(id, keys, expires, self.0.clock.now())
    }

    fn unpin(&self, id: PinId) -> bool {
        self.0.lock().unpin(id, self.0.clock.now())
    }

    fn entries(&self) -> Vec<Facts> {
        self.0.lock().iter().map(|chunk| chunk.facts).collect()
    }

    fn list(&self, after: Option<&ChunkKey>, limit: usize) -> Vec<Facts> {
        index::list(after, limit, |part| part(&self.0.lock()))
    }

    fn usage(&self) -> Usage {
        let shared = &*self.0;
        let now = shared.clock.now();
        let usage = shared.lock().usage(&shared.counters, &shared.budget, now);
        Usage {
            idle_bytes: shared.buffers.idle_bytes(),
            ..usage
        }
    }
}

/// A chunk held in memory.
#[derive(Debug)]
pub(crate) struct MemoryReader {
    chunk: Arc<Chunk>,
    tier: MemoryTier,
}

impl MemoryReader {
    /// Extents as they lie in memory, not verified.
    pub(crate) fn share(&self, range: ExtentRange) -> Vec<Bytes> {
        let extents = self.chunk.in_range(range).iter();
        extents.map(ChargedBytes::share).collect()
    }

    async fn read(&self, range: ExtentRange) -> Result<Vec<Bytes>, ReadError> {
        let header = &self.chunk.header;
        let entries = header.range(range).ok_or(ReadError::OutOfRange {
            range,
            extents: header.all().end(),
        })?;
        let bytes: u64 = entries.iter().map(|entry| entry.len).sum();
        let verified = if bytes <= INLINE_VERIFY_BYTES as u64 {
            self.chunk.verified(range)
        } else {
            let chunk = Arc::clone(&self.chunk);
            blocking(move || chunk.verified(range)).await?
        };
        verified.map_err(|cause| {
            self.tier.discard_corrupt(&self.chunk);
            ReadError::Corrupt {
                key: self.chunk.facts.key,
                tier: TierKind::Memory,
                cause,
            }
        })
    }
}

impl ChunkReader for MemoryReader {
    fn header(&self) -> &ObjectHeader {
        &self.chunk.header
    }

    fn read_extents(&self, range: ExtentRange) -> BoxFuture<'_, Result<Vec<Bytes>, ReadError>> {
        Box::pin(self.read(range))
    }
}

/// Memory that others may read. It is longer than what is ever used of it, so that buffers
/// of all sizes find a place.
fn arena(capacity: u64) -> Option<Arc<Arena>> {
    let len = usize::try_from(capacity.checked_mul(ARENA_SHARE)?).ok()?;
    let arena = Arena::new(len);
    arena
        .inspect_err(|error| tracing::warn!(%error, "memory cannot be shared with other processes"))
        .ok()
}

/// Where there is no arena, every buffer is a mapping of its own, and a system that has no more of them gives no
/// more memory.
fn warn_of_few_mappings(capacity: u64) {
    let limit = fs::read_to_string("/proc/sys/vm/max_map_count").ok();
    let Some(limit) = limit.and_then(|limit| limit.trim().parse::<u64>().ok()) else {
        return;
    };
    let wanted = capacity / USUAL_BUFFER_BYTES;
    if wanted > limit {
        tracing::warn!(
            limit,
            wanted,
            "the memory tier may need more mappings than the system allows; raise vm.max_map_count",
        );
    }
}

/// Bytes of address space for each that may be used.
const ARENA_SHARE: u64 = 4;

/// About the least that a extent of a chunk takes in models of today.
const USUAL_BUFFER_BYTES: u64 = 256 << 10;

/// Verifying this much takes some 100 µs from DRAM: about what handing it to
/// another thread and being woken again costs on a busy machine.
pub(crate) const INLINE_VERIFY_BYTES: usize = 1 << 20;

/// Which part of the budget buffers may take that nobody uses.
const IDLE_SHARE: u64 = 16;

/// Chunk, header and index node, without extents.
const ENTRY_BYTES: u64 = 512;
/// Layer table entry, handle, reference counts and allocator slack of one extent.
const EXTENT_BYTES: u64 = 192;

#[cfg(test)]
mod tests;
