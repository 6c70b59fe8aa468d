//! Reading one chunk file.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use kvasir_codec::{LayerError, ObjectHeader};
use kvasir_types::{LayerIdx, LayerRange};
use rustix::io::Errno;

use super::{DiskEntry, DiskTier, Shared};
use crate::budget::{ChargedBytes, Reservation};
use crate::index::count;
use crate::tier::{ChunkReader, DeviceError, ReadError, TierKind};

/// A chunk file held open: unlinking it does not disturb the reader.
#[derive(Clone, Debug)]
pub(crate) struct DiskReader {
    file: Arc<File>,
    header: Arc<ObjectHeader>,
    entry: DiskEntry,
    tier: DiskTier,
}

impl DiskTier {
    /// Opens and checks an entry's file. A file that is not what the index says is
    /// dropped and a miss. Blocks.
    pub(super) fn open_entry(&self, entry: &DiskEntry) -> Result<Option<DiskReader>, DeviceError> {
        let shared = &*self.0;
        let opened = match shared.open_file(entry) {
            Ok(opened) => opened,
            Err(error) => {
                count(&shared.counters.failures);
                shared.discard_unreadable(entry, &error);
                return Err(error.into());
            }
        };
        let Some((file, header)) = opened else {
            shared.discard_corrupt(&entry.facts.key, entry.generation);
            return Ok(None);
        };
        Ok(Some(DiskReader {
            file: Arc::new(file),
            header: Arc::new(header),
            entry: entry.clone(),
            tier: self.clone(),
        }))
    }
}

impl Shared {
    /// Drops a copy that the device cannot read, so that it can be stored again.
    fn discard_unreadable(&self, entry: &DiskEntry, error: &io::Error) {
        if is_shortage(error) {
            return;
        }
        let key = &entry.facts.key;
        tracing::warn!(%key, %error, "a chunk file cannot be read");
        self.discard_corrupt(key, entry.generation);
    }

    fn open_file(&self, entry: &DiskEntry) -> io::Result<Option<(File, ObjectHeader)>> {
        let facts = &entry.facts;
        let file = match self.files.reader(&facts.key, entry.generation) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let header_bytes = ObjectHeader::header_bytes(facts.layout.layers());
        let bytes = self.files.read(&file, 0, header_bytes)?;
        let header = match ObjectHeader::parse(&bytes) {
            Ok((header, _)) => header,
            Err(error) => {
                tracing::warn!(key = %facts.key, %error, "a stored header is corrupt");
                return Ok(None);
            }
        };
        if let Err(error) = header.verify(&facts.key, &facts.layout_digest) {
            tracing::warn!(key = %facts.key, %error, "a chunk file holds something else");
            return Ok(None);
        }
        Ok(Some((file, header)))
    }
}

impl DiskReader {
    pub(crate) fn header(&self) -> &Arc<ObjectHeader> {
        &self.header
    }

    /// The layers of `range`, verified, in buffers charged to the memory budget.
    pub(crate) async fn read(&self, range: LayerRange) -> Result<Vec<ChargedBytes>, ReadError> {
        let entries = self.header.range(range).ok_or(ReadError::OutOfRange {
            range,
            layers: self.header.layout().layers(),
        })?;
        let bytes = entries.iter().map(|entry| entry.len).sum();
        let reservation = self.tier.0.memory.reserve(bytes)?;
        let reader = self.clone();
        self.tier
            .run(move |shared| reader.read_blocking(shared, range, reservation))
            .await?
    }

    fn read_blocking(
        &self,
        shared: &Shared,
        range: LayerRange,
        mut reservation: Reservation,
    ) -> Result<Vec<ChargedBytes>, ReadError> {
        let mut layers = Vec::with_capacity(usize::from(range.len()));
        for layer in range.iter().map(LayerIdx) {
            let bytes = match self.read_layer(shared, layer) {
                Ok(bytes) => bytes,
                Err(error) => {
                    count(&shared.counters.failures);
                    shared.discard_unreadable(&self.entry, &error);
                    return Err(DeviceError::from(error).into());
                }
            };
            // While the bytes are still in the cache.
            if let Err(cause) = self.header.verify_layer(layer, &bytes) {
                return Err(self.corrupt(shared, cause));
            }
            layers.push(
                reservation
                    .charge(bytes)
                    .expect("the reservation is the sum of the layers' lengths"),
            );
        }
        shared.files.finished(&self.file);
        Ok(layers)
    }

    /// A layer's bytes; fewer where the file ends early.
    fn read_layer(&self, shared: &Shared, layer: LayerIdx) -> io::Result<Bytes> {
        let Some(entry) = self.header.layer(layer) else {
            return Ok(Bytes::new());
        };
        let payload = ObjectHeader::header_bytes(self.header.layout().layers()) as u64;
        // Lossless: a chunk is far smaller than the address space.
        let len = usize::try_from(entry.len).unwrap_or(usize::MAX);
        let bytes = shared.files.read(&self.file, payload + entry.offset, len)?;
        Ok(bytes.into())
    }

    fn corrupt(&self, shared: &Shared, cause: LayerError) -> ReadError {
        let key = self.entry.facts.key;
        shared.discard_corrupt(&key, self.entry.generation);
        ReadError::Corrupt {
            key,
            tier: TierKind::Disk,
            cause,
        }
    }

    /// Whether the tier still has this copy.
    pub(crate) fn is_current(&self) -> bool {
        self.tier
            .0
            .lock()
            .peek(&self.entry.facts.key)
            .is_some_and(|now| now.generation == self.entry.generation)
    }
}

impl ChunkReader for DiskReader {
    fn header(&self) -> &ObjectHeader {
        &self.header
    }

    fn read_layers(&self, range: LayerRange) -> BoxFuture<'_, Result<Vec<Bytes>, ReadError>> {
        Box::pin(async move {
            let layers = self.read(range).await?;
            Ok(layers.iter().map(ChargedBytes::share).collect())
        })
    }
}

/// Whether the process or the system is short of something; the file may be good.
fn is_shortage(error: &io::Error) -> bool {
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOMEM];
    shortages
        .map(Errno::raw_os_error)
        .map(Some)
        .contains(&error.raw_os_error())
}
