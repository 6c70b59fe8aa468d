//! Gets over the data plane.
//!
//! A request's body is a [`v1::GetRequest`]; its bytes are the extents of the chunks, one
//! after the other in the order in which a get streams them, and its description says where
//! each begins and what its checksum is. The chunks are leased until the request ends.
//!
//! Receivers compare checksums. Here that is left to them for what is in memory; a receiver to
//! whom such bytes come corrupt has them read, and compared, over gRPC.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::future::join_all;
use kvasir_proto::transfer::{Item, Line};
use kvasir_proto::v1::chunk_lost::Reason;
use kvasir_proto::{convert, status, v1};
use kvasir_store::Lease;
use kvasir_transport::session::MAX_BODY;
use kvasir_transport::{Lost, Source, Thing};
use kvasir_types::Slice;
use lru::LruCache;
use prost::Message as _;
use tokio::sync::{OnceCell, OwnedSemaphorePermit};
use tokio::time::timeout;
use tonic::Status;

use crate::service::Shared;
use crate::{get, read};

/// What the store has.
#[derive(Debug)]
pub(crate) struct Chunks {
    shared: Arc<Shared>,
}

impl Chunks {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

/// The chunks of one request.
#[derive(Debug)]
pub(crate) struct Transfer {
    shared: Arc<Shared>,
    leases: Vec<Arc<Lease>>,
    line: Line,
    slice: Option<Slice>,
    description: Bytes,
    /// Extents of which not all is asked for at once, by their index.
    parts: Mutex<LruCache<usize, Arc<Part>>>,
    /// Held by whoever waits for memory.
    patient: tokio::sync::Mutex<()>,
    _permit: OwnedSemaphorePermit,
}

/// An extent, read once for all who wait for some of it.
type Part = OnceCell<Bytes>;

impl Source for Chunks {
    type Thing = Transfer;

    async fn open(&self, body: Bytes, _: Option<Instant>) -> Result<Transfer, Bytes> {
        let opened = Transfer::open(self, body).await;
        opened.map_err(|refusal| status::to_refusal(&refusal).encode_to_vec().into())
    }
}

impl Transfer {
    async fn open(chunks: &Chunks, body: Bytes) -> Result<Self, Status> {
        let shared = &chunks.shared;
        let request = v1::GetRequest::decode(body)
            .map_err(|error| Status::invalid_argument(format!("not a get: {error}")))?;
        let keys = convert::keys("keys", &request.keys)?;
        let wanted = convert::wanted(&request)?;
        let permit = shared.admission.transfer()?;
        let leases = get::leases(shared, &request, &keys).await?;
        let mut line = Line::default();
        let slice = wanted.slice;
        let sequence = get::sequence(&leases, wanted)?;
        for place in sequence.clone() {
            let lease = leases.get(place.chunk);
            let entry = lease.and_then(|lease| lease.header().extent(place.extent));
            entry
                .and_then(|entry| match sequence.slice(place.chunk) {
                    Some(_) => line.push(place, sequence.bounds(&place)[0], None),
                    None => line.push(place, entry.len, Some(entry.checksum)),
                })
                .ok_or_else(|| Status::internal("a chunk has other extents than its level says"))?;
        }
        let description = line.to_wire(get::header(&leases)).encode_to_vec();
        if description.len() as u64 > MAX_BODY {
            let problem = "too many extents for one request of the data plane; get fewer chunks";
            return Err(Status::out_of_range(problem));
        }
        Ok(Self {
            shared: Arc::clone(shared),
            leases,
            line,
            slice,
            description: description.into(),
            parts: Mutex::new(LruCache::new(PARTS)),
            patient: tokio::sync::Mutex::default(),
            _permit: permit,
        })
    }

    /// Some bytes of an extent, or of what is cut of one.
    async fn piece(
        &self,
        index: usize,
        item: Item,
        range: &Range<u64>,
        patience: Patience,
    ) -> Result<Vec<Bytes>, Failed> {
        let whole = item.range();
        let wanted = range.start.max(whole.start)..range.end.min(whole.end);
        let failed = |reason| Failed { item, reason };
        if wanted == whole && item.checksum.is_some() {
            let extent = self.extent(&item, patience).await;
            return Ok(vec![extent.map_err(failed)?]);
        }
        let part = {
            let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(parts.get_or_insert(index, Arc::default))
        };
        let read = part.get_or_try_init(|| self.extent(&item, patience)).await;
        let place = |at: u64| usize::try_from(at - whole.start).unwrap_or(usize::MAX);
        let read = read.map_err(failed)?;
        let wanted = place(wanted.start)..place(wanted.end);
        if item.checksum.is_some() {
            return Ok(vec![read.slice(wanted)]);
        }
        let lease = self.leases.get(item.place.chunk);
        let (lease, slice) = lease.zip(self.slice).ok_or(failed(Reason::Device))?;
        Ok(cut(read, lease.layout().cut(slice), &wanted))
    }

    /// An extent, of as many bytes as the line says, if it is not to be cut.
    async fn extent(&self, item: &Item, patience: Patience) -> Result<Bytes, Reason> {
        let lease = self.leases.get(item.place.chunk).ok_or(Reason::Device)?;
        // Receivers compare checksums, and say so where they do not match.
        if item.checksum.is_some()
            && let Some(mut extents) = lease.share_extents(item.place.extent.alone())
            && let Some(extent) = extents.pop()
        {
            return Ok(extent);
        }
        let store = &self.shared.store;
        let read = async {
            match patience {
                Patience::No => read::extent(store, lease, &item.place).await,
                Patience::Yes => {
                    // One after the other: memory that comes back is not fought for.
                    let _turn = self.patient.lock().await;
                    read::extent_patiently(store, lease, &item.place).await
                }
            }
        };
        // The device is waited for, but not for ever.
        let read = timeout(self.shared.limits.read_timeout(), read).await;
        let (bytes, _) = read.unwrap_or(Err(Reason::Device))?;
        if bytes.len() as u64 == item.bytes || item.checksum.is_none() {
            Ok(bytes)
        } else {
            Err(Reason::Corrupt)
        }
    }
}

/// Whether memory that is short is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    No,
    Yes,
}

/// An extent that cannot be read.
struct Failed {
    item: Item,
    reason: Reason,
}

impl Thing for Transfer {
    fn total(&self) -> u64 {
        self.line.total()
    }

    fn description(&self) -> Bytes {
        self.description.clone()
    }

    fn end_of(&self, at: u64) -> u64 {
        let index = self.line.within(&(at..at.saturating_add(1))).start;
        let item = self.line.items().get(index);
        item.map_or(at, |item| item.range().end)
    }

    async fn read(&self, range: Range<u64>) -> Result<Vec<Bytes>, Lost> {
        let indices = self.line.within(&range);
        let items = self.line.items().get(indices.clone()).unwrap_or(&[]);
        let pieces = indices
            .clone()
            .zip(items)
            .map(|(index, item)| self.piece(index, *item, &range, Patience::No));
        let mut pieces = join_all(pieces).await.into_iter();
        let mut read = Vec::with_capacity(pieces.len());
        let failed = loop {
            match pieces.next() {
                Some(Ok(piece)) => read.extend(piece),
                Some(Err(failed)) if read.is_empty() => break Some(failed),
                // What follows is asked for again, and is the first then.
                Some(Err(_)) | None => break None,
            }
        };
        if let Some(mut failed) = failed {
            // What was read ahead may have the very memory that is short.
            drop(pieces);
            if failed.reason == Reason::Throttled {
                let again = self.piece(indices.start, failed.item, &range, Patience::Yes);
                match again.await {
                    Ok(piece) => read.extend(piece),
                    Err(error) => failed = error,
                }
            }
            if read.is_empty() {
                // With a chunk, all that follow it are of no use; earlier ones go on.
                let chunk = failed.item.place.chunk;
                return Err(Lost {
                    ranges: self.line.after_loss(chunk, range.start),
                    reason: i32::from(failed.reason).unsigned_abs(),
                });
            }
        }
        let bytes = read.iter().map(Bytes::len).sum();
        self.shared.counters.sent_bytes.add(bytes);
        Ok(read)
    }
}

/// Of bytes at `places` of an extent, one after the other, those in `wanted`: where they lie,
/// and not copied.
fn cut(
    extent: &Bytes,
    places: impl Iterator<Item = Range<usize>>,
    wanted: &Range<usize>,
) -> Vec<Bytes> {
    let mut before = 0;
    let mut pieces = Vec::new();
    for place in places.filter(|place| place.end <= extent.len()) {
        let from = wanted.start.max(before) - before;
        let to = wanted.end.min(before + place.len()).saturating_sub(before);
        if from < to {
            pieces.push(extent.slice(place.start + from..place.start + to));
        }
        before += place.len();
    }
    pieces
}

/// Extents that pieces under way are parts of.
const PARTS: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_of_what_is_cut_can_be_had() {
        let extent: Bytes = (0..100u8).collect();
        let places = [3usize..10, 20..21, 50..70, 99..100];
        let all: Vec<u8> = places
            .clone()
            .into_iter()
            .flat_map(|at| extent[at].to_vec())
            .collect();
        for start in 0..all.len() {
            for end in start..=all.len() {
                let pieces = cut(&extent, places.clone().into_iter(), &(start..end));
                assert_eq!(pieces.concat(), all[start..end]);
                assert!(pieces.iter().all(|piece| !piece.is_empty()));
            }
        }
    }
}
