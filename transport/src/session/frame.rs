//! What the two ends of a session say to each other, as bytes.
//!
//! ```text
//! frame := length of the header (u16, little-endian) ‖ header ‖ payload
//! ```
//!
//! The header is a Protocol Buffers message, so that fields which a reader does not know are
//! passed over; it says how long the payload is. Payloads are apart so that they are never
//! copied: a [`FrameReader`] hands out pieces of what it was fed, and of data as soon as they
//! come.

#[cfg(test)]
mod tests;
mod wire;

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use prost::Message as _;

use super::{Features, RefuseReason, RequestId};
use wire::Kind;

/// One message of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The first one each way.
    Hello(Hello),
    /// The fetcher wants something; again with the same number after a loss.
    Ask(Ask),
    /// The holder has it, and so much of it.
    Describe {
        /// Which request.
        request: RequestId,
        /// Bytes of all of it.
        total: u64,
        /// What the bytes are; the session does not look into it.
        body: Bytes,
    },
    /// The holder does not have it, or not now.
    Refuse {
        /// Which request.
        request: RequestId,
        /// In general.
        reason: RefuseReason,
        /// In particular; the session does not look into it.
        body: Bytes,
    },
    /// Some of the bytes.
    Data {
        /// Which request.
        request: RequestId,
        /// Place of the first byte.
        offset: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// Bytes that will not come.
    Lost {
        /// Which request.
        request: RequestId,
        /// The bytes.
        range: Range<u64>,
        /// Why; the session does not look into it.
        reason: u32,
    },
    /// How much a request matters, from now on.
    Prioritise {
        /// Which request.
        request: RequestId,
        /// More is sooner.
        priority: u32,
    },
    /// The fetcher has all it wants of a request.
    Finish {
        /// Which request.
        request: RequestId,
    },
    /// Bytes of data that the holder may have sent in all.
    Credit {
        /// Bytes since the session began.
        limit: u64,
    },
    /// Answered by [`Frame::Pong`].
    Ping {
        /// Comes back.
        nonce: u64,
    },
    /// Answers [`Frame::Ping`].
    Pong {
        /// That of the ping.
        nonce: u64,
    },
    /// The holder will take no further requests, and end those it has.
    Drain,
    /// Some of the bytes, where the fetcher finds them itself. Carriers make these of
    /// [`Frame::Data`], and data of these: a session knows of none.
    Lend(Loan),
    /// A loan is over.
    Return {
        /// Which.
        loan: u64,
    },
}

/// Bytes that stay where they are until they are given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loan {
    /// Which request.
    pub request: RequestId,
    /// Place of the first byte.
    pub offset: u64,
    /// A number that no other loan of the connection has.
    pub loan: u64,
    /// Where the holder has them.
    pub at: u64,
    /// How many there are.
    pub length: u64,
    /// What opens them, on a carrier where that takes a key.
    pub key: Option<u32>,
}

/// Who speaks, and what it can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Versions that it speaks: from, to.
    pub versions: (u32, u32),
    /// What else it can do.
    pub features: Features,
    /// Bytes of data that it will take before it gives more credit.
    pub credit: u64,
}

/// What a fetcher wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Its number: new for every request of a fetcher, also over several sessions.
    pub request: RequestId,
    /// More is sooner.
    pub priority: u32,
    /// Milliseconds after which nobody waits for it. 0: none.
    pub budget_ms: u64,
    /// Which bytes are missing; none where all are.
    pub missing: Vec<Range<u64>>,
    /// What it is; the session does not look into it.
    pub body: Bytes,
}

/// Why bytes are not frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The header is no message, or of a kind that no version has.
    #[error("a frame has a header that is none")]
    Header,
    /// It says more than a frame may have.
    #[error("a frame of {bytes} bytes, at most {limit} are allowed")]
    Length {
        /// Bytes that it says.
        bytes: u64,
        /// Bytes that it may have.
        limit: u64,
    },
    /// A range ends before it starts, or beyond what can be counted.
    #[error("a frame has a range that is none")]
    Range,
}

impl Frame {
    /// Bytes of data; 0 for all other kinds.
    pub fn data_bytes(&self) -> u64 {
        match self {
            Self::Data { bytes, .. } => bytes.len() as u64,
            _ => 0,
        }
    }

    /// As bytes: length and header, and the payload.
    pub fn encode(&self) -> [Bytes; 2] {
        let empty = Bytes::new();
        let (kind, payload) = match self {
            Self::Hello(hello) => (
                Kind::Hello(wire::Hello {
                    from: hello.versions.0,
                    to: hello.versions.1,
                    features: hello.features.0,
                    credit: hello.credit,
                }),
                &empty,
            ),
            Self::Ask(ask) => (
                Kind::Ask(wire::Ask {
                    request: ask.request.0,
                    priority: ask.priority,
                    budget_ms: ask.budget_ms,
                    missing: ask
                        .missing
                        .iter()
                        .flat_map(|it| [it.start, it.end])
                        .collect(),
                }),
                &ask.body,
            ),
            Self::Describe {
                request,
                total,
                body,
            } => (
                Kind::Describe(wire::Describe {
                    request: request.0,
                    total: *total,
                }),
                body,
            ),
            Self::Refuse {
                request,
                reason,
                body,
            } => (
                Kind::Refuse(wire::Refuse {
                    request: request.0,
                    reason: match reason {
                        RefuseReason::Answer => 0,
                        RefuseReason::Busy => 1,
                        RefuseReason::Draining => 2,
                        RefuseReason::Idle => 3,
                    },
                }),
                body,
            ),
            Self::Data {
                request,
                offset,
                bytes,
            } => (
                Kind::Data(wire::Data {
                    request: request.0,
                    offset: *offset,
                }),
                bytes,
            ),
            Self::Lost {
                request,
                range,
                reason,
            } => (
                Kind::Lost(wire::Lost {
                    request: request.0,
                    start: range.start,
                    end: range.end,
                    reason: *reason,
                }),
                &empty,
            ),
            Self::Prioritise { request, priority } => (
                Kind::Prioritise(wire::Prioritise {
                    request: request.0,
                    priority: *priority,
                }),
                &empty,
            ),
            Self::Finish { request } => {
                (Kind::Finish(wire::Request { request: request.0 }), &empty)
            }
            Self::Credit { limit } => (Kind::Credit(wire::Number { number: *limit }), &empty),
            Self::Ping { nonce } => (Kind::Ping(wire::Number { number: *nonce }), &empty),
            Self::Pong { nonce } => (Kind::Pong(wire::Number { number: *nonce }), &empty),
            Self::Drain => (Kind::Drain(wire::Number { number: 0 }), &empty),
            Self::Lend(loan) => (
                Kind::Lend(wire::Lend {
                    request: loan.request.0,
                    offset: loan.offset,
                    loan: loan.loan,
                    at: loan.at,
                    length: loan.length,
                    key: loan.key,
                }),
                &empty,
            ),
            Self::Return { loan } => (Kind::Return(wire::Number { number: *loan }), &empty),
        };
        let header = wire::Header {
            payload: payload.len() as u64,
            kind: Some(kind),
        };
        let message = header.encode_to_vec();
        // Ranges are the only part without a bound, and there are `MAX_RANGES` of them.
        let length = u16::try_from(message.len()).expect("a header has less than 64 KiB");
        let mut bytes = BytesMut::with_capacity(2 + message.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&message);
        [bytes.freeze(), payload.clone()]
    }
}

/// Frames out of bytes as they come, one reader a stream.
#[derive(Debug, Default)]
pub struct FrameReader {
    state: State,
}

#[derive(Debug)]
enum State {
    /// Bytes so far of the length.
    Length(Vec<u8>),
    /// Of the header, and how many there are.
    Header(Vec<u8>, usize),
    /// Of a payload that is no data.
    Body(Kind, BytesMut, usize),
    /// Data: the place of the next byte, and how many follow.
    Data(RequestId, u64, u64),
}

impl Default for State {
    fn default() -> Self {
        Self::Length(Vec::new())
    }
}

impl FrameReader {
    /// Takes bytes off `input` until there is a frame; `None` when it is empty. Data comes in
    /// as many frames as it takes pieces of input.
    ///
    /// # Errors
    /// [`FrameError`]; the stream is of no further use then.
    pub fn next(&mut self, input: &mut Bytes) -> Result<Option<Frame>, FrameError> {
        loop {
            match &mut self.state {
                State::Length(bytes) => {
                    if !fill(bytes, 2, input) {
                        return Ok(None);
                    }
                    let length = bytes
                        .iter()
                        .rev()
                        .fold(0, |all, &b| all << 8 | usize::from(b));
                    self.state = State::Header(Vec::new(), length);
                }
                State::Header(bytes, length) => {
                    if !fill(bytes, *length, input) {
                        return Ok(None);
                    }
                    let header = wire::Header::decode(bytes.as_slice());
                    let header = header.map_err(|_| FrameError::Header)?;
                    let kind = header.kind.ok_or(FrameError::Header)?;
                    if let Some(frame) = self.begin(kind, header.payload)? {
                        return Ok(Some(frame));
                    }
                }
                State::Body(_, bytes, length) => {
                    let more = input.split_to(input.len().min(*length - bytes.len()));
                    bytes.extend_from_slice(&more);
                    if bytes.len() < *length {
                        return Ok(None);
                    }
                    let State::Body(kind, bytes, _) = std::mem::take(&mut self.state) else {
                        return Ok(None);
                    };
                    return frame(kind, bytes.freeze()).map(Some);
                }
                State::Data(request, offset, left) => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let most = usize::try_from(*left).unwrap_or(usize::MAX);
                    let bytes = input.split_to(input.len().min(most));
                    let (request, at, taken) = (*request, *offset, bytes.len() as u64);
                    (*offset, *left) = (at + taken, *left - taken);
                    if *left == 0 {
                        self.state = State::default();
                    }
                    return Ok(Some(Frame::Data {
                        request,
                        offset: at,
                        bytes,
                    }));
                }
            }
        }
    }

    /// What follows a header: nothing, where it gives a frame.
    fn begin(&mut self, kind: Kind, payload: u64) -> Result<Option<Frame>, FrameError> {
        let limit = match &kind {
            Kind::Data(_) => MAX_DATA,
            Kind::Ask(_) | Kind::Describe(_) | Kind::Refuse(_) => MAX_BODY,
            _ => 0,
        };
        if payload > limit {
            return Err(FrameError::Length {
                bytes: payload,
                limit,
            });
        }
        self.state = State::default();
        match kind {
            Kind::Data(data) if payload > 0 => {
                data.offset.checked_add(payload).ok_or(FrameError::Range)?;
                self.state = State::Data(RequestId(data.request), data.offset, payload);
                Ok(None)
            }
            kind if payload == 0 => frame(kind, Bytes::new()).map(Some),
            kind => {
                let length = usize::try_from(payload).unwrap_or(usize::MAX);
                self.state = State::Body(kind, BytesMut::new(), length);
                Ok(None)
            }
        }
    }
}

/// Adds to `bytes` until there are `length`; says whether there are.
fn fill(bytes: &mut Vec<u8>, length: usize, input: &mut Bytes) -> bool {
    let more = input.split_to(input.len().min(length - bytes.len()));
    bytes.extend_from_slice(&more);
    bytes.len() == length
}

fn frame(kind: Kind, body: Bytes) -> Result<Frame, FrameError> {
    Ok(match kind {
        Kind::Hello(hello) => Frame::Hello(Hello {
            versions: (hello.from, hello.to),
            features: Features(hello.features),
            credit: hello.credit,
        }),
        Kind::Ask(ask) => {
            let (pairs, odd) = ask.missing.as_chunks();
            if !odd.is_empty() || pairs.len() > MAX_RANGES {
                return Err(FrameError::Range);
            }
            let missing = pairs.iter().map(|&[start, end]| range(start, end));
            Frame::Ask(Ask {
                request: RequestId(ask.request),
                priority: ask.priority,
                budget_ms: ask.budget_ms,
                missing: missing.collect::<Result<_, _>>()?,
                body,
            })
        }
        Kind::Describe(it) => Frame::Describe {
            request: RequestId(it.request),
            total: it.total,
            body,
        },
        Kind::Refuse(it) => Frame::Refuse {
            request: RequestId(it.request),
            reason: match it.reason {
                1 => RefuseReason::Busy,
                2 => RefuseReason::Draining,
                3 => RefuseReason::Idle,
                _ => RefuseReason::Answer,
            },
            body,
        },
        Kind::Data(it) => Frame::Data {
            request: RequestId(it.request),
            offset: it.offset,
            bytes: body,
        },
        Kind::Lost(it) => Frame::Lost {
            request: RequestId(it.request),
            range: range(it.start, it.end)?,
            reason: it.reason,
        },
        Kind::Prioritise(it) => Frame::Prioritise {
            request: RequestId(it.request),
            priority: it.priority,
        },
        Kind::Finish(it) => Frame::Finish {
            request: RequestId(it.request),
        },
        Kind::Credit(it) => Frame::Credit { limit: it.number },
        Kind::Ping(it) => Frame::Ping { nonce: it.number },
        Kind::Pong(it) => Frame::Pong { nonce: it.number },
        Kind::Drain(_) => Frame::Drain,
        Kind::Lend(it) => {
            it.offset.checked_add(it.length).ok_or(FrameError::Range)?;
            it.at.checked_add(it.length).ok_or(FrameError::Range)?;
            Frame::Lend(Loan {
                request: RequestId(it.request),
                offset: it.offset,
                loan: it.loan,
                at: it.at,
                length: it.length,
                key: it.key,
            })
        }
        Kind::Return(it) => Frame::Return { loan: it.number },
    })
}

fn range(start: u64, end: u64) -> Result<Range<u64>, FrameError> {
    (start < end).then_some(start..end).ok_or(FrameError::Range)
}

/// Bytes of data in one frame at most.
const MAX_DATA: u64 = 16 << 20;
/// Bytes of a body, which a session does not look into, at most.
pub const MAX_BODY: u64 = 4 << 20;
/// Ranges that an [`Ask`] has at most, so that its header stays below 64 KiB.
pub(super) const MAX_RANGES: usize = 1024;
