//! Sends chunks, layer-major.
//!
//! One task per get reads ahead of its receiver, at most
//! [`Limits::read_ahead`](crate::Limits::read_ahead) bytes, so that the device
//! reads the next layers while this one is on the wire. The chunks are leased from
//! before the header is sent until the stream ends.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, BoxStream, FuturesOrdered, StreamExt as _};
use kvasir_proto::sequence::{Place, Sequence, Wanted};
use kvasir_proto::{InvalidField, assembly, convert, v1};
use kvasir_store::{Lease, LeaseId};
use kvasir_types::{Checksum, ChunkKey, KvLayout, Slice};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use v1::chunk_lost::Reason;
use v1::get_response::Message;

use crate::admission::shutting_down;
use crate::service::{PARALLEL, Shared};
use crate::{read, wire};

type Messages = BoxStream<'static, Result<v1::GetResponse, Status>>;

/// Leases what is there and starts sending it.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    request: &v1::GetRequest,
) -> Result<Messages, Status> {
    let keys = convert::keys("keys", &request.keys)?;
    let wanted = convert::wanted(request)?;
    let permit = shared.admission.transfer()?;
    let leases = leases(&shared, request, &keys).await?;
    let sequence = sequence(&leases, wanted)?;

    let (sender, receiver) = mpsc::channel(SEND_QUEUE);
    let (end, ended) = oneshot::channel();
    tokio::spawn(async move {
        let transfer = Transfer {
            shared,
            leases,
            sender,
            _permit: permit,
        };
        if let Err(Stop::Refuse(status)) = transfer.run(sequence).await {
            // The receiver may be gone too.
            let _ = end.send(status);
        }
    });
    let last = stream::once(ended).filter_map(|status| async move { status.ok().map(Err) });
    Ok(ReceiverStream::new(receiver).map(Ok).chain(last).boxed())
}

/// What a get reads from.
pub(crate) async fn leases(
    shared: &Shared,
    request: &v1::GetRequest,
    keys: &[ChunkKey],
) -> Result<Vec<Arc<Lease>>, Status> {
    match request.lease_id.map(LeaseId::from_u64) {
        Some(id) => held(shared, id, keys),
        None => {
            let leases = lease_in_time(shared, keys).await?;
            Ok(leases.into_iter().map(Arc::new).collect())
        }
    }
}

/// The leading chunks that a named lease has. All of them are of one layout.
fn held(shared: &Shared, id: LeaseId, keys: &[ChunkKey]) -> Result<Vec<Arc<Lease>>, Status> {
    let store = &shared.store;
    let leases: Vec<_> = keys.iter().map_while(|key| store.leased(id, key)).collect();
    if leases.is_empty() && !store.lease_lasts(id) {
        return Err(Status::not_found("the lease has ended; acquire another"));
    }
    Ok(leases)
}

/// The leading chunks that are present and of one layout.
pub(crate) async fn lease_in_time(
    shared: &Shared,
    keys: &[ChunkKey],
) -> Result<Vec<Lease>, Status> {
    let leases = tokio::select! {
        () = shared.admission.aborting.cancelled() => return Err(shutting_down()),
        leases = timeout(shared.limits.read_timeout(), lease_prefix(shared, keys)) => leases,
    };
    leases.map_err(|_| Status::deadline_exceeded("the device does not answer"))
}

async fn lease_prefix(shared: &Shared, keys: &[ChunkKey]) -> Vec<Lease> {
    let found = shared.store.lookup(keys).found;
    let digest = found
        .first()
        .copied()
        .flatten()
        .map(|first| first.layout_digest);
    let prefix = found
        .iter()
        .take_while(|slot| slot.is_some_and(|found| Some(found.layout_digest) == digest))
        .count();
    let mut leases: Vec<Lease> = stream::iter(keys.iter().take(prefix).copied())
        .map(|key| shared.store.lease(key))
        .buffered(PARALLEL)
        .take_while(|lease| std::future::ready(lease.is_some()))
        .filter_map(std::future::ready)
        .collect()
        .await;
    // A chunk may have been replaced since the lookup.
    let same = leases
        .iter()
        .take_while(|lease| {
            leases
                .first()
                .is_some_and(|first| first.layout() == lease.layout())
        })
        .count();
    leases.truncate(same);
    leases
}

/// What is sent of the chunks.
pub(crate) fn sequence(leases: &[Arc<Lease>], wanted: Wanted) -> Result<Sequence, InvalidField> {
    let layout = leases.first().map(|first| *first.layout());
    let levels = leases.iter().map(|lease| lease.level()).collect();
    Sequence::new(wanted, layout, levels).map_err(|error| InvalidField::new(error.field(), error))
}

/// Why a transfer ends before its time.
enum Stop {
    /// The receiver is gone.
    Gone,
    /// The receiver is told.
    Refuse(Status),
}

struct Transfer {
    shared: Arc<Shared>,
    leases: Vec<Arc<Lease>>,
    sender: mpsc::Sender<v1::GetResponse>,
    _permit: OwnedSemaphorePermit,
}

impl Transfer {
    async fn run(&self, mut places: Sequence) -> Result<(), Stop> {
        self.send(Message::Header(header(&self.leases))).await?;
        let Some(first) = self.leases.first() else {
            return Ok(());
        };
        let ahead = self.shared.limits.read_ahead.as_u64() / first.layout().layer_bytes() as u64;
        let mut ahead = usize::try_from(ahead)
            .unwrap_or(MAX_READS)
            .clamp(2, MAX_READS);
        let mut reads = FuturesOrdered::new();
        let mut due = VecDeque::new();
        loop {
            while reads.len() < ahead
                && let Some(place) = places.next()
            {
                due.push_back(place);
                reads.push_back(self.read(place));
            }
            let Some(place) = due.pop_front() else {
                return Ok(());
            };
            let mut read = match self.wait_for(reads.next()).await?.flatten() {
                Some(read) => read,
                None => {
                    reads = FuturesOrdered::new();
                    due.clear();
                    places.resume_after(&place);
                    Err(Reason::Device)
                }
            };
            if place.chunk >= places.live() {
                continue;
            }
            if matches!(read, Err(Reason::Throttled)) {
                // Extents read ahead may hold the very memory that this one needs.
                reads = FuturesOrdered::new();
                due.clear();
                places.resume_after(&place);
                ahead = (ahead / 2).max(1);
                let patient = self.wait_for(self.read_patiently(place)).await?;
                read = patient.unwrap_or(Err(Reason::Device));
            }
            match read {
                Ok((data, checksum)) => {
                    let (data, checksum) = match places.slice(place.chunk) {
                        Some(slice) => cut(first.layout(), slice, &data),
                        None => (data, checksum),
                    };
                    self.send_extent(place, data, checksum).await?;
                }
                Err(reason) => {
                    places.lose(place.chunk);
                    self.send(Message::Lost(v1::ChunkLost {
                        chunk: wire_index(place.chunk),
                        reason: reason.into(),
                    }))
                    .await?;
                }
            }
        }
    }

    /// Waits for the device, but not for ever (`None`), nor for a receiver that is
    /// gone.
    async fn wait_for<T>(&self, read: impl Future<Output = T>) -> Result<Option<T>, Stop> {
        tokio::select! {
            () = self.shared.admission.aborting.cancelled() => Err(Stop::Refuse(shutting_down())),
            () = self.sender.closed() => Err(Stop::Gone),
            read = timeout(self.shared.limits.read_timeout(), read) => Ok(read.ok()),
        }
    }

    async fn send_extent(&self, place: Place, data: Bytes, checksum: Checksum) -> Result<(), Stop> {
        let bytes = data.len();
        for piece in assembly::pieces(place.extent, data, checksum) {
            self.send(Message::Piece(v1::ChunkPiece {
                chunk: wire_index(place.chunk),
                piece: Some(piece),
            }))
            .await?;
        }
        self.shared.counters.sent_bytes.add(bytes);
        Ok(())
    }

    async fn send(&self, message: Message) -> Result<(), Stop> {
        let response = v1::GetResponse {
            message: Some(message),
        };
        let idle = self.shared.limits.stream_idle();
        let sent = tokio::select! {
            () = self.shared.admission.aborting.cancelled() => {
                return Err(Stop::Refuse(shutting_down()));
            }
            sent = timeout(idle, self.sender.send(response)) => sent,
        };
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Stop::Gone),
            Err(_) => Err(Stop::Refuse(Status::deadline_exceeded(
                "the receiver took nothing for too long",
            ))),
        }
    }

    async fn read(&self, place: Place) -> Result<(Bytes, Checksum), Reason> {
        let lease = self.leases.get(place.chunk).ok_or(Reason::Device)?;
        read::extent(&self.shared.store, lease, &place).await
    }

    async fn read_patiently(&self, place: Place) -> Result<(Bytes, Checksum), Reason> {
        let lease = self.leases.get(place.chunk).ok_or(Reason::Device)?;
        read::extent_patiently(&self.shared.store, lease, &place).await
    }
}

/// Some heads and tokens of a layer, by themselves.
fn cut(layout: &KvLayout, slice: Slice, layer: &[u8]) -> (Bytes, Checksum) {
    let parts = layout.cut(slice).filter_map(|range| layer.get(range));
    let data = Bytes::from(parts.collect::<Vec<_>>().concat());
    let checksum = Checksum::of(&data);
    (data, checksum)
}

pub(crate) fn header(leases: &[Arc<Lease>]) -> v1::GetHeader {
    v1::GetHeader {
        chunks: leases.iter().map(|lease| info(lease)).collect(),
        cut: true,
    }
}

pub(crate) fn info(lease: &Lease) -> v1::ChunkInfo {
    v1::ChunkInfo {
        layout: Some(v1::Layout::from(lease.layout())),
        level: lease.level().code().into(),
        tier: wire::tier(lease.tier()).into(),
    }
}

/// A request has no more than 16384 keys.
fn wire_index(chunk: usize) -> u32 {
    u32::try_from(chunk).unwrap_or(u32::MAX)
}

/// Messages between the reads and the socket.
const SEND_QUEUE: usize = 2;
/// Most reads in progress for one get, however small the extents are.
const MAX_READS: usize = 64;
