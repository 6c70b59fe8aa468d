//! Host memory.
//!
//! The tier's budget also pays for the buffers of reads and writes in flight, of
//! this tier and of the tiers below: [`MemoryTier::reserve`] is the only way to get
//! memory for payload, and it evicts to make room.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use kvasir_codec::{LayerError, Object, ObjectHeader};
use kvasir_types::{ChunkKey, LayerIdx, LayerRange};

use crate::blocking::blocking;
use crate::budget::{Budget, ChargedBytes, Reservation, Throttled};
use crate::clock::Clock;
use crate::config::MemoryConfig;
use crate::events::EventLog;
use crate::index::{Counters, Entry, Index, count};
use crate::pins::{PinId, PinRefused};
use crate::promotion::Promotions;
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
    counters: Counters,
    clock: Clock,
}

/// A whole object whose bytes are charged to the memory budget.
#[derive(Debug)]
pub(crate) struct Chunk {
    facts: Facts,
    header: Arc<ObjectHeader>,
    layers: Vec<ChargedBytes>,
    _overhead: Reservation,
}

impl Chunk {
    /// Bytes charged for a chunk beyond its payload: header, index entry and the
    /// bookkeeping of each layer. Rounded up from the sizes of the structures.
    pub(crate) const fn overhead_bytes(layers: u16) -> u64 {
        ENTRY_BYTES + LAYER_BYTES * layers as u64
    }

    /// Bytes that a chunk with this header is charged for.
    pub(crate) fn charged_bytes(header: &ObjectHeader) -> u64 {
        header.payload_bytes() + Self::overhead_bytes(header.layout().layers())
    }

    /// `None` where the reservation is too small for the header's chunk.
    fn charge(object: Object, mut reservation: Reservation) -> Option<Self> {
        let (header, layers) = object.into_parts();
        let overhead = reservation.split(Self::overhead_bytes(header.layout().layers()))?;
        let layers = layers
            .into_iter()
            .map(|layer| reservation.charge(layer))
            .collect::<Option<_>>()?;
        Some(Self::new(header, layers, overhead))
    }

    /// `layers` passed the header's checks.
    pub(crate) fn new(
        header: Arc<ObjectHeader>,
        layers: Vec<ChargedBytes>,
        overhead: Reservation,
    ) -> Self {
        Self {
            facts: Facts::of(&header),
            header,
            layers,
            _overhead: overhead,
        }
    }

    pub(crate) fn header(&self) -> &Arc<ObjectHeader> {
        &self.header
    }

    pub(crate) fn share(&self) -> Vec<Bytes> {
        self.layers.iter().map(ChargedBytes::share).collect()
    }

    fn verified(&self, range: LayerRange) -> Result<Vec<Bytes>, LayerError> {
        range
            .iter()
            .zip(self.in_range(range))
            .map(|(layer, bytes)| {
                self.header.verify_layer(LayerIdx(layer), bytes.as_ref())?;
                Ok(bytes.share())
            })
            .collect()
    }

    fn in_range(&self, range: LayerRange) -> &[ChargedBytes] {
        self.layers
            .get(usize::from(range.start())..usize::from(range.end()))
            .unwrap_or(&[])
    }
}

impl Entry for Arc<Chunk> {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn charged_bytes(&self) -> u64 {
        Chunk::charged_bytes(&self.header)
    }

    fn is_held(&self) -> bool {
        Arc::strong_count(self) > 1 || self.layers.iter().any(ChargedBytes::is_held)
    }
}

impl MemoryTier {
    /// An empty tier.
    pub fn new(config: &MemoryConfig, clock: Clock, events: EventLog) -> Self {
        Self(Arc::new(Shared {
            budget: Budget::new(config.capacity.as_u64()),
            index: Mutex::new(Index::new(
                TierKind::Memory,
                config.pin_limit_bytes(),
                events,
            )),
            promotions: Promotions::new(config.capacity.as_u64()),
            counters: Counters::default(),
            clock,
        }))
    }

    /// Memory for payload in flight. Evicts what it must.
    ///
    /// # Errors
    /// Everything that could be evicted would not be enough; then nothing is.
    pub fn reserve(&self, bytes: u64) -> Result<Reservation, Throttled> {
        let shared = &*self.0;
        loop {
            if let Some(reservation) = shared.budget.try_reserve(bytes) {
                return Ok(reservation);
            }
            let throttled = shared.budget.throttled(bytes);
            let excess = throttled
                .used
                .saturating_add(bytes)
                .saturating_sub(throttled.capacity);
            // Zero: somebody let go in between.
            let victims = shared.lock().evict(excess, shared.clock.now());
            if excess > 0 && victims.is_empty() {
                if shared.promotions.abandon() {
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

    pub(crate) fn promotions(&self) -> &Promotions {
        &self.0.promotions
    }

    /// Charges an object, to a reservation of this tier if there is one.
    pub(crate) fn charge(
        &self,
        object: Object,
        reservation: Option<Reservation>,
    ) -> Result<Arc<Chunk>, Throttled> {
        let wanted = Chunk::charged_bytes(object.header());
        let mut reservation = match reservation.filter(|have| have.belongs_to(&self.0.budget)) {
            Some(reservation) => reservation,
            None => self.reserve(0)?,
        };
        if let Some(missing) = wanted.checked_sub(reservation.bytes()) {
            reservation.merge(self.reserve(missing)?);
        }
        let chunk = Chunk::charge(object, reservation);
        Ok(Arc::new(chunk.expect(
            "the reservation covers what the header states, and an object is what its header states",
        )))
    }

    /// Makes a chunk visible. Says whether it was absent.
    pub(crate) fn publish(&self, chunk: Arc<Chunk>) -> bool {
        let mut index = self.0.lock();
        if index.touch(&chunk.facts.key).is_some() {
            return false;
        }
        index.insert(chunk);
        count(&self.0.counters.writes);
        true
    }

    /// Opens a chunk without waiting.
    pub(crate) fn reader(&self, key: &ChunkKey) -> Option<MemoryReader> {
        let chunk = self.0.lock().touch(key).cloned();
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
        self.0.lock().touch(key).is_some()
    }

    pub(crate) fn discard(&self, key: &ChunkKey) -> bool {
        // The chunk's memory is freed after the lock is.
        let removed = self.0.lock().remove(key);
        removed.is_some()
    }

    /// Runs `view` on the locked index, and gives it its keys.
    pub(crate) fn keys_with<T>(&self, view: impl FnOnce(Vec<ChunkKey>) -> T) -> T {
        let index = self.0.lock();
        view(index.iter().map(|chunk| chunk.facts.key).collect())
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
            Ok(match self.charge(object, None) {
                Ok(chunk) => {
                    if self.publish(chunk) {
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
        self.0.lock().list(after, limit)
    }

    fn usage(&self) -> Usage {
        let shared = &*self.0;
        shared
            .lock()
            .usage(&shared.counters, &shared.budget, shared.clock.now())
    }
}

/// A chunk held in memory.
#[derive(Debug)]
pub(crate) struct MemoryReader {
    chunk: Arc<Chunk>,
    tier: MemoryTier,
}

impl MemoryReader {
    async fn read(&self, range: LayerRange) -> Result<Vec<Bytes>, ReadError> {
        let header = &self.chunk.header;
        let entries = header.range(range).ok_or(ReadError::OutOfRange {
            range,
            layers: header.layout().layers(),
        })?;
        let bytes: u64 = entries.iter().map(|entry| entry.len).sum();
        let verified = if bytes <= INLINE_VERIFY_BYTES {
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

    fn read_layers(&self, range: LayerRange) -> BoxFuture<'_, Result<Vec<Bytes>, ReadError>> {
        Box::pin(self.read(range))
    }
}

/// Verifying this much takes some 100 µs from DRAM: about what handing it to
/// another thread and being woken again costs on a busy machine.
const INLINE_VERIFY_BYTES: u64 = 1 << 20;

/// Chunk, header and index node, without layers.
const ENTRY_BYTES: u64 = 512;
/// Layer table entry, handle, reference counts and allocator slack of one layer.
const LAYER_BYTES: u64 = 192;

#[cfg(test)]
mod tests {
    use kvasir_types::{ByteSize, DType, KvLayout, Planes};

    use super::*;

    fn tier() -> MemoryTier {
        let config = MemoryConfig::with_capacity(ByteSize::kib(64));
        MemoryTier::new(&config, Clock::default(), EventLog::new())
    }

    fn object(fill: u8) -> Object {
        let layout = KvLayout::new(2, 1, Planes::symmetric(8), 16, DType::F8E4m3).unwrap();
        let layers = vec![Bytes::from(vec![fill; layout.layer_bytes()]); 2];
        Object::raw(ChunkKey::from_bytes([fill; 32]), &layout, layers).unwrap()
    }

    /// Memory that changed under the store: the header of one object over the
    /// bytes of another.
    #[tokio::test]
    async fn a_flipped_bit_in_memory_is_a_miss_and_then_gone() {
        let tier = tier();
        let good = object(1);
        let bad = tier.charge(object(2), None).unwrap();
        let chunk = Chunk::new(
            Arc::new(good.header().clone()),
            bad.layers.clone(),
            tier.reserve(1).unwrap(),
        );
        drop(bad);
        assert!(tier.publish(Arc::new(chunk)));

        let key = *good.header().key();
        let all = LayerRange::new(0, 2).unwrap();
        let reader = tier.open(key).await.unwrap().unwrap();
        assert!(matches!(
            reader.read_layers(all).await,
            Err(ReadError::Corrupt { .. })
        ));
        assert!(tier.open(key).await.unwrap().is_none());
        assert_eq!((tier.usage().corrupt, tier.usage().chunks), (1, 0));
        drop(reader);
        assert_eq!(tier.usage().bytes, 0);
    }

    #[test]
    fn a_request_that_cannot_succeed_evicts_nothing() {
        let tier = tier();
        assert!(tier.publish(tier.charge(object(1), None).unwrap()));
        let held = tier.reserve(40 << 10).unwrap();
        assert!(tier.reserve(30 << 10).is_err());
        assert!(tier.reserve(u64::MAX).is_err());
        assert_eq!((tier.usage().chunks, tier.usage().throttled), (1, 2));
        drop(held);
        assert!(tier.reserve(64 << 10).is_ok(), "evicts the chunk");
        assert_eq!((tier.usage().chunks, tier.usage().evictions), (0, 1));
    }

    #[test]
    fn a_chunk_is_charged_to_the_reservation_it_came_with() {
        let tier = tier();
        let object = object(3);
        let exact = Chunk::charged_bytes(object.header());
        let larger = tier.reserve(exact + 1000).unwrap();
        let chunk = tier.charge(object.clone(), Some(larger)).unwrap();
        assert_eq!(tier.usage().bytes, exact);
        drop(chunk);
        let smaller = tier.reserve(10).unwrap();
        let foreign = Budget::new(1 << 20).try_reserve(1 << 20).unwrap();
        let first = tier.charge(object.clone(), Some(smaller)).unwrap();
        let second = tier.charge(object, Some(foreign)).unwrap();
        assert_eq!(tier.usage().bytes, 2 * exact);
        drop((first, second));
        assert_eq!(tier.usage().bytes, 0);
    }
}
