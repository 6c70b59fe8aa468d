//! Chunks over the data plane.

use std::collections::BTreeMap;

use bytes::Bytes;
use kvasir_proto::sequence::Place;
use kvasir_proto::transfer::{Item, Line};
use kvasir_proto::v1::chunk_lost::Reason;
use kvasir_proto::{InvalidField, status, v1};
use kvasir_transport::Fetch;
use kvasir_transport::session::{FailReason, FetchEvent, RefuseReason};
use kvasir_types::{Checksum, RunningChecksum};
use prost::Message as _;
use tonic::Status;

use super::{Arrival, LostReason};
use crate::deadline::Deadline;
use crate::error::{CallError, Origin, ProtocolError, broken};
use crate::paths::Gone;

/// A request that the daemon has not described yet.
#[derive(Debug)]
pub(super) struct Opening {
    origin: Origin,
    fetch: Fetch,
    gone: Gone,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Transfer {
    opening: Opening,
    line: Line,
    /// The extent that is due, by its index on the line.
    due: usize,
    /// What came of extents from the due one on.
    came: BTreeMap<usize, Partial>,
}

/// Some bytes of an extent. None comes twice, so their number says when it is whole.
#[derive(Debug)]
struct Partial {
    whole: Option<Bytes>,
    bytes: Vec<u8>,
    /// Of the bytes, taken while caches have them. `None` where they came out of order.
    checksum: Option<RunningChecksum>,
    received: u64,
}

impl Opening {
    pub(super) fn new(origin: Origin, fetch: Fetch, gone: Gone) -> Self {
        Self {
            origin,
            fetch,
            gone,
        }
    }

    /// How many bytes there are, and what they are.
    pub(super) async fn description(
        &mut self,
        deadline: Deadline,
    ) -> Result<(u64, v1::Transfer), CallError> {
        match self.event(deadline).await? {
            Some(FetchEvent::Described { total, body, .. }) => {
                let described = v1::Transfer::decode(body);
                let invalid = |error| broken(InvalidField::new("transfer", error));
                Ok((total, described.map_err(invalid)?))
            }
            _ => Err(ProtocolError::Header.into()),
        }
    }

    pub(super) fn transfer(self, total: u64, line: Line) -> Result<Transfer, CallError> {
        if line.total() != total {
            let problem = format!("{} bytes of {total}", line.total());
            return Err(broken(InvalidField::new("transfer.extent_bytes", problem)));
        }
        Ok(Transfer {
            opening: self,
            line,
            due: 0,
            came: BTreeMap::new(),
        })
    }

    /// What happens next, as long as the request lasts.
    async fn event(&mut self, deadline: Deadline) -> Result<Option<FetchEvent>, CallError> {
        let Self {
            origin,
            fetch,
            gone,
        } = self;
        let next = async {
            tokio::select! {
                biased;
                event = fetch.next() => Ok(event),
                () = gone.wait() => Err(Status::unavailable("the connection was lost")),
            }
        };
        let event = deadline.bound(origin, next).await?;
        let status = match event {
            Some(FetchEvent::Refused {
                reason: RefuseReason::Answer,
                body,
                ..
            }) => {
                let refusal = v1::Refusal::decode(body);
                let invalid = |error| broken(InvalidField::new("refusal", error));
                status::from_refusal(refusal.map_err(invalid)?)
            }
            Some(FetchEvent::Refused { reason, .. }) => match reason {
                RefuseReason::Idle => Status::deadline_exceeded("nothing was taken for too long"),
                RefuseReason::Busy => status::come_back("too many gets at once", BUSY),
                _ => Status::unavailable("the daemon is shutting down"),
            },
            Some(FetchEvent::Failed { reason, .. }) => match reason {
                FailReason::Expired => return Err(CallError::DeadlineExceeded),
                FailReason::Changed => Status::unavailable("the chunks changed with the daemon"),
            },
            event => return Ok(event),
        };
        Err(origin.error(status))
    }
}

impl Transfer {
    /// The extent that is due, once it is there, or a loss.
    pub(super) async fn next(
        &mut self,
        deadline: Deadline,
        due: &Place,
    ) -> Result<Arrival, CallError> {
        let item = self.seek(due)?;
        loop {
            if item.bytes == 0 {
                return Ok(Partial::default().arrival(&item));
            }
            if let Some(partial) = self.take(&item) {
                return Ok(partial.arrival(&item));
            }
            let truncated = ProtocolError::Truncated {
                chunk: due.chunk,
                extent: due.extent,
            };
            match self.opening.event(deadline).await? {
                Some(FetchEvent::Data { offset, bytes, .. }) => self.place(offset, &bytes),
                Some(FetchEvent::Lost { range, reason, .. }) => {
                    let first = self.line.within(&range).start;
                    let first = self.line.items().get(first).ok_or(truncated)?;
                    let reason = i32::try_from(reason).ok().map(Reason::try_from);
                    let reason = reason.and_then(Result::ok).unwrap_or_default();
                    return Ok(Arrival::Lost(
                        first.place.chunk,
                        LostReason::from_wire(reason),
                    ));
                }
                Some(_) if self.came.contains_key(&self.due) => {}
                Some(FetchEvent::Complete { .. }) | None => return Err(truncated.into()),
                Some(_) => {}
            }
        }
    }

    /// Goes on to an extent; those before it are of no more use.
    fn seek(&mut self, due: &Place) -> Result<Item, CallError> {
        let items = self.line.items().iter().enumerate().skip(self.due);
        let found = items.clone().find(|(_, item)| item.place == *due);
        let (index, item) = found.ok_or(ProtocolError::Truncated {
            chunk: due.chunk,
            extent: due.extent,
        })?;
        self.due = index;
        self.came = self.came.split_off(&index);
        Ok(*item)
    }

    /// The extent that is due, if all of it is there.
    fn take(&mut self, item: &Item) -> Option<Partial> {
        let entry = self.came.first_entry()?;
        if *entry.key() != self.due || entry.get().received < item.bytes {
            return None;
        }
        Some(entry.remove())
    }

    /// Puts bytes where they belong.
    fn place(&mut self, offset: u64, bytes: &Bytes) {
        let range = offset..offset + bytes.len() as u64;
        let indices = self.line.within(&range);
        let items = self.line.items().get(indices.clone()).unwrap_or(&[]);
        for (index, item) in indices.zip(items) {
            let extent = item.range();
            let some = range.start.max(extent.start)..range.end.min(extent.end);
            let at = |place: u64, from: u64| usize::try_from(place - from).unwrap_or(usize::MAX);
            let piece = bytes.slice(at(some.start, offset)..at(some.end, offset));
            if index >= self.due {
                let partial = self.came.entry(index).or_default();
                partial.add(at(some.start, extent.start), piece, item.bytes);
            }
        }
    }
}

impl Default for Partial {
    fn default() -> Self {
        Self {
            whole: None,
            bytes: Vec::new(),
            checksum: Some(RunningChecksum::new()),
            received: 0,
        }
    }
}

impl Partial {
    /// All bytes have come.
    fn arrival(self, item: &Item) -> Arrival {
        let (data, running) = match self.whole {
            Some(whole) => (whole, None),
            None => (self.bytes.into(), self.checksum),
        };
        Arrival::Whole {
            found: running.map_or_else(|| Checksum::of(&data), |running| running.value()),
            stated: item.checksum,
            data,
        }
    }

    /// Of an extent of `total` bytes.
    fn add(&mut self, at: usize, piece: Bytes, total: u64) {
        self.received += piece.len() as u64;
        if piece.len() as u64 == total {
            self.whole = Some(piece);
            return;
        }
        if self.bytes.is_empty() {
            self.bytes
                .reserve_exact(usize::try_from(total).unwrap_or(0));
        }
        // In order, as a rule.
        if at == self.bytes.len() {
            self.bytes.extend_from_slice(&piece);
            if let Some(checksum) = &mut self.checksum {
                checksum.update(&piece);
            }
            return;
        }
        self.checksum = None;
        let end = at + piece.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        if let Some(place) = self.bytes.get_mut(at..end) {
            place.copy_from_slice(&piece);
        }
    }
}

/// About the time of one transfer.
const BUSY: std::time::Duration = std::time::Duration::from_millis(50);
