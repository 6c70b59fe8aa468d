//! Chunks in and out of the tier's segments, catalog and index; blocking.

use std::io;
use std::path::Path;
use std::sync::PoisonError;

use bytes::Bytes;
use kvasir_codec::{Object, ObjectHeader};
use kvasir_types::{ChunkKey, Hints};

use super::catalog::{LegacyRecord, Record};
use super::segment::{Location, frame_bytes};
use super::segments::BeginError;
use super::{Chunks, DiskEntry, Shared, is_full, legacy, space_of};
use crate::budget::{Reservation, Throttled};
use crate::index::{Worth, count};
use crate::sync::{MutexGuard, RwLockReadGuard};
use crate::tier::{DeviceError, Written};

impl Shared {
    /// Takes recovered chunks into the index, oldest first. Where the capacity
    /// shrank, the oldest are dropped.
    pub(super) fn adopt(&self, records: &[Record]) -> Result<(), DeviceError> {
        let capacity = self.budget.capacity();
        let mut excess = records
            .iter()
            .map(space_of)
            .sum::<u64>()
            .saturating_sub(capacity);
        let now = self.clock.now();
        let mut chunks = self.lock();
        chunks.index.reserve(records.len());
        for record in records {
            let bytes = space_of(record);
            let space = match excess {
                0 => self.budget.try_reserve(bytes),
                _ => None,
            };
            if let (Some(space), Some(entry)) = (space, chunks.entry(record)) {
                space.into_bytes();
                chunks.index.insert(entry, &Worth::new(record.hints), now);
                continue;
            }
            excess = excess.saturating_sub(bytes);
            let key = Record::key_of(&record.key, record.location);
            self.catalog.delete(&key, false)?;
            self.segments.free(record.location, bytes)?;
            count(&self.counters.evictions);
        }
        Ok(())
    }

    /// Moves the chunks of an older format version into segments.
    pub(super) fn import(&self, path: &Path, records: &[LegacyRecord]) -> Result<(), DeviceError> {
        let mut imported = 0u64;
        for record in records {
            if let Some((header, extents)) = legacy::read(path, record).map(Object::into_parts) {
                let bytes = frame_bytes(header.layout(), header.level(), header.object_bytes());
                let fits = bytes <= self.budget.capacity();
                let worth = Worth::new(Hints::default());
                if fits && self.store(&header, &extents, &worth, bytes)? == Written::Stored {
                    imported += 1;
                }
            }
            self.catalog.delete(record.key.as_bytes(), false)?;
            legacy::remove(path, record)?;
        }
        if !records.is_empty() {
            tracing::info!(imported, of = records.len(), "moved chunks into segments");
        }
        Ok(legacy::sweep(path)?)
    }

    pub(super) fn warn_of_little_room(&self, path: &Path) {
        let wanted = self.budget.capacity().saturating_sub(self.budget.used());
        match rustix::fs::statvfs(path) {
            Ok(room) if room.f_bavail.saturating_mul(room.f_frsize) < wanted => tracing::warn!(
                path = %path.display(),
                free = room.f_bavail.saturating_mul(room.f_frsize),
                wanted,
                "the file system has less room than the capacity; lower it, or make room",
            ),
            Ok(_) => (),
            Err(error) => tracing::warn!(%error, "cannot tell how much room there is"),
        }
    }

    pub(super) fn store(
        &self,
        header: &ObjectHeader,
        extents: &[Bytes],
        worth: &Worth,
        bytes: u64,
    ) -> Result<Written, DeviceError> {
        let mut failures = 0;
        loop {
            let space = match self.make_room(bytes)? {
                Ok(space) => space,
                Err(throttled) => {
                    count(&self.counters.throttled);
                    return Ok(Written::Throttled(throttled));
                }
            };
            match self.write(header, extents, worth, space) {
                // Something else fills the file system, and the capacity is more
                // than what is left.
                Err(DeviceError::Io(error)) if is_full(&error) => {
                    tracing::warn!(%error, "the file system has less room than the capacity");
                    failures += 1;
                    match failures {
                        // What goes leaves a place of the right size, as a rule.
                        1 if self.evict(bytes)? => (),
                        1 | 2 => self.segments.give_back_spares()?,
                        _ => {
                            count(&self.counters.throttled);
                            return Ok(Written::Throttled(self.budget.throttled(bytes)));
                        }
                    }
                }
                written => return written,
            }
        }
    }

    /// Writes a frame and publishes it.
    pub(super) fn write(
        &self,
        header: &ObjectHeader,
        extents: &[Bytes],
        worth: &Worth,
        space: Reservation,
    ) -> Result<Written, DeviceError> {
        let mut frame = match self.segments.begin(space.bytes()) {
            Ok(frame) => frame,
            Err(BeginError::Throttled(throttled)) => return Ok(Written::Throttled(throttled)),
            Err(BeginError::Io(error)) => return Err(error.into()),
        };
        let record = Record {
            key: *header.key(),
            location: frame.location,
            layout: *header.layout(),
            level: header.level(),
            object_bytes: header.object_bytes(),
            created: self.catalog.now(),
            hints: worth.hints,
        };
        // Both at once: whichever is missing after a crash, the chunk is too.
        let recorded = self.catalog.put(&record);
        let written = frame.write(&header.encode(), extents);
        let committed = recorded.wait().and(written.map_err(DeviceError::from));
        let entry = self.lock().entry(&record);
        match (committed, entry) {
            (Ok(()), Some(entry)) => {
                self.segments.keep(&frame);
                space.into_bytes();
                self.lock().index.insert(entry, worth, self.clock.now());
                count(&self.counters.writes);
                Ok(Written::Stored)
            }
            (committed, _) => {
                // What cannot be removed now is swept at the next start.
                let key = Record::key_of(&record.key, record.location);
                let _ = self.catalog.delete(&key, true);
                self.segments.abandon(&frame);
                committed.and(Err(io::Error::from(io::ErrorKind::FileTooLarge).into()))
            }
        }
    }

    /// Space for a frame; evicts what it must.
    pub(super) fn make_room(
        &self,
        bytes: u64,
    ) -> Result<Result<Reservation, Throttled>, DeviceError> {
        loop {
            if let Some(space) = self.budget.try_reserve(bytes) {
                return Ok(Ok(space));
            }
            let throttled = self.budget.throttled(bytes);
            let excess = throttled
                .used
                .saturating_add(bytes)
                .saturating_sub(throttled.capacity);
            if !self.evict(excess)? && excess > 0 {
                return Ok(Err(throttled));
            }
        }
    }

    /// Deletes chunks that the policy says should go, `bytes` of them. Says whether
    /// there were that many.
    ///
    /// # Errors
    /// The device failed. Evicting more would fail too, and empty the tier.
    pub(super) fn evict(&self, bytes: u64) -> Result<bool, DeviceError> {
        let _removing = self.removing();
        let victims = self.lock().index.evict(bytes, self.clock.now());
        let mut retired = Ok(());
        for victim in &victims {
            count(&self.counters.evictions);
            // All of them: they left the index.
            retired = retired.and(self.retire(victim, false));
        }
        retired.map(|()| !victims.is_empty())
    }

    /// Deletes the record of an entry that left the index and, unless it has readers,
    /// gives its space back. Tries both.
    pub(super) fn retire(&self, entry: &DiskEntry, sync: bool) -> Result<(), DeviceError> {
        let forgotten = self.catalog.delete(entry.record_key().as_ref(), sync);
        if forgotten.is_err() {
            // The record would claim whatever lay in its place at the next start.
            self.segments.spoil(entry.location.segment);
        }
        let freed = match entry.readers {
            0 => self.free(entry),
            _ => Ok(()),
        };
        forgotten?;
        Ok(freed?)
    }

    /// Gives the space of a frame back. Where that fails it stays charged until the
    /// next start, which sweeps it.
    pub(super) fn free(&self, entry: &DiskEntry) -> io::Result<()> {
        let bytes = entry.space();
        self.segments.free(entry.location, bytes)?;
        drop(self.budget.adopt(bytes));
        Ok(())
    }

    pub(super) fn remove(&self, key: &ChunkKey) -> Result<bool, DeviceError> {
        let removing = self.removing();
        let Some(entry) = self.lock().remove(key) else {
            drop(removing);
            self.settle()?;
            return Ok(false);
        };
        self.retire(&entry, true)
            .inspect_err(|_| count(&self.counters.failures))?;
        Ok(true)
    }

    pub(super) fn removing(&self) -> RwLockReadGuard<'_, ()> {
        self.removing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what is not in the index stays away after a power cut. Waits for nobody.
    pub(super) fn is_settled(&self) -> bool {
        self.removing.try_write().is_ok() && self.catalog.is_settled()
    }

    /// Makes sure that what is not in the index stays away after a power cut. Blocks.
    pub(super) fn settle(&self) -> Result<(), DeviceError> {
        drop(
            self.removing
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
        Ok(self.catalog.settle()?)
    }

    /// Drops a copy that failed a check, unless it is already gone.
    pub(super) fn discard_corrupt(&self, key: &ChunkKey, location: Location) {
        let _removing = self.removing();
        let entry = {
            let mut chunks = self.lock();
            match chunks.index.peek(key) {
                Some(entry) if entry.location == location => chunks.remove(key),
                _ => None,
            }
        };
        let Some(entry) = entry else { return };
        count(&self.counters.corrupt);
        self.segments.spoil(entry.location.segment);
        if let Err(error) = self.retire(&entry, true) {
            self.warn_of_leftover(&entry, &error);
        }
    }

    pub(super) fn free_or_warn(&self, entry: &DiskEntry) {
        if let Err(error) = self.free(entry) {
            self.warn_of_leftover(entry, &error.into());
        }
    }

    pub(super) fn warn_of_leftover(&self, entry: &DiskEntry, error: &DeviceError) {
        count(&self.counters.failures);
        let key = entry.key;
        tracing::warn!(%key, %error, "cannot give back the space of a chunk; the next start will");
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Chunks> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
