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

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use prost::Message as _;

use super::{Features, RefuseReason, RequestId};

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
            Self::Lost { request, range } => (
                Kind::Lost(wire::Lost {
                    request: request.0,
                    start: range.start,
                    end: range.end,
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
    })
}

fn range(start: u64, end: u64) -> Result<Range<u64>, FrameError> {
    (start < end).then_some(start..end).ok_or(FrameError::Range)
}

/// Bytes of data in one frame at most.
const MAX_DATA: u64 = 16 << 20;
/// Bytes of what a session does not look into: keys, headers of chunks.
pub(super) const MAX_BODY: u64 = 4 << 20;
/// Ranges that an [`Ask`] has at most, so that its header stays below 64 KiB.
pub(super) const MAX_RANGES: usize = 1024;

use wire::Kind;

/// Messages of headers. Numbers of fields are never used again for something else.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Header {
        #[prost(uint64, tag = "1")]
        pub(super) payload: u64,
        #[prost(oneof = "Kind", tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13")]
        pub(super) kind: Option<Kind>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Kind {
        #[prost(message, tag = "2")]
        Hello(Hello),
        #[prost(message, tag = "3")]
        Ask(Ask),
        #[prost(message, tag = "4")]
        Describe(Describe),
        #[prost(message, tag = "5")]
        Refuse(Refuse),
        #[prost(message, tag = "6")]
        Data(Data),
        #[prost(message, tag = "7")]
        Lost(Lost),
        #[prost(message, tag = "8")]
        Prioritise(Prioritise),
        #[prost(message, tag = "9")]
        Finish(Request),
        #[prost(message, tag = "10")]
        Credit(Number),
        #[prost(message, tag = "11")]
        Ping(Number),
        #[prost(message, tag = "12")]
        Pong(Number),
        #[prost(message, tag = "13")]
        Drain(Number),
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Hello {
        #[prost(uint32, tag = "1")]
        pub(super) from: u32,
        #[prost(uint32, tag = "2")]
        pub(super) to: u32,
        #[prost(uint64, tag = "3")]
        pub(super) features: u64,
        #[prost(uint64, tag = "4")]
        pub(super) credit: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Ask {
        #[prost(uint64, tag = "1")]
        pub(super) request: u64,
        #[prost(uint32, tag = "2")]
        pub(super) priority: u32,
        #[prost(uint64, tag = "3")]
        pub(super) budget_ms: u64,
        #[prost(uint64, repeated, tag = "4")]
        pub(super) missing: Vec<u64>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Describe {
        #[prost(uint64, tag = "1")]
        pub(super) request: u64,
        #[prost(uint64, tag = "2")]
        pub(super) total: u64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Refuse {
        #[prost(uint64, tag = "1")]
        pub(super) request: u64,
        #[prost(uint32, tag = "2")]
        pub(super) reason: u32,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Request {
        #[prost(uint64, tag = "1")]
        pub(super) request: u64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Data {
        #[prost(uint64, tag = "1")]
        pub(super) request: u64,
        #[prost(uint64, tag = "2")]
        pub(super) offset: u64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Lost {
        #[prost(uint64, tag = "1")]
        pub(super) request: u64,
        #[prost(uint64, tag = "2")]
        pub(super) start: u64,
        #[prost(uint64, tag = "3")]
        pub(super) end: u64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Prioritise {
        #[prost(uint64, tag = "1")]
        pub(super) request: u64,
        #[prost(uint32, tag = "2")]
        pub(super) priority: u32,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Number {
        #[prost(uint64, tag = "1")]
        pub(super) number: u64,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn body() -> impl Strategy<Value = Bytes> {
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from)
    }

    fn range() -> impl Strategy<Value = Range<u64>> {
        (0..u64::MAX, any::<u64>()).prop_map(|(start, length)| {
            let end = start.saturating_add(length).max(start + 1);
            start..end
        })
    }

    fn frames() -> impl Strategy<Value = Frame> {
        let request = || any::<u64>().prop_map(RequestId);
        let reason = prop_oneof![
            Just(RefuseReason::Answer),
            Just(RefuseReason::Busy),
            Just(RefuseReason::Draining)
        ];
        let ranges = prop::collection::vec(range(), 0..5);
        prop_oneof![
            any::<((u32, u32), u64, u64)>().prop_map(|(versions, features, credit)| {
                Frame::Hello(Hello {
                    versions,
                    features: Features(features),
                    credit,
                })
            }),
            (request(), any::<u32>(), any::<u64>(), ranges, body()).prop_map(
                |(request, priority, budget_ms, missing, body)| Frame::Ask(Ask {
                    request,
                    priority,
                    budget_ms,
                    missing,
                    body,
                })
            ),
            (request(), any::<u64>(), body()).prop_map(|(request, total, body)| {
                Frame::Describe {
                    request,
                    total,
                    body,
                }
            }),
            (request(), reason, body()).prop_map(|(request, reason, body)| Frame::Refuse {
                request,
                reason,
                body,
            }),
            (request(), 0..u64::MAX / 2, body()).prop_map(|(request, offset, bytes)| {
                Frame::Data {
                    request,
                    offset,
                    bytes,
                }
            }),
            (request(), range()).prop_map(|(request, range)| Frame::Lost { request, range }),
            (request(), any::<u32>())
                .prop_map(|(request, priority)| Frame::Prioritise { request, priority }),
            request().prop_map(|request| Frame::Finish { request }),
            any::<u64>().prop_map(|limit| Frame::Credit { limit }),
            any::<u64>().prop_map(|nonce| Frame::Ping { nonce }),
            any::<u64>().prop_map(|nonce| Frame::Pong { nonce }),
            Just(Frame::Drain),
        ]
    }

    /// All frames in bytes that come `step` at a time, pieces of data put together.
    fn read(bytes: &Bytes, step: usize) -> Result<Vec<Frame>, FrameError> {
        let mut reader = FrameReader::default();
        let mut frames: Vec<Frame> = Vec::new();
        for at in (0..bytes.len()).step_by(step) {
            let mut piece = bytes.slice(at..bytes.len().min(at + step));
            while let Some(frame) = reader.next(&mut piece)? {
                match (frames.last_mut(), frame) {
                    (
                        Some(Frame::Data {
                            request,
                            offset,
                            bytes,
                        }),
                        Frame::Data {
                            request: same,
                            offset: at,
                            bytes: more,
                        },
                    ) if *request == same && *offset + bytes.len() as u64 == at => {
                        *bytes = [bytes.as_ref(), &more].concat().into();
                    }
                    (_, frame) => frames.push(frame),
                }
            }
        }
        Ok(frames)
    }

    proptest! {
        #[test]
        fn frames_come_as_they_were_sent(frame in frames(), step in 1usize..50) {
            let bytes = Bytes::from(frame.encode().concat());
            let twice = Bytes::from([bytes.as_ref(), &Frame::Drain.encode().concat()].concat());
            prop_assert_eq!(read(&twice, step), Ok(vec![frame, Frame::Drain]));
        }

        #[test]
        fn bytes_that_are_no_frames_are_errors_or_wait_for_more(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            frame in frames(),
            at: usize,
            with: u8,
        ) {
            drop(read(&Bytes::from(bytes), 7));
            let mut bytes = frame.encode().concat();
            let at = at % bytes.len();
            bytes[at] = with;
            drop(read(&Bytes::from(bytes), 7));
        }
    }

    fn of(header: &wire::Header) -> Result<Vec<Frame>, FrameError> {
        let message = header.encode_to_vec();
        let length = u16::try_from(message.len()).unwrap().to_le_bytes();
        read(&Bytes::from([&length[..], &message].concat()), 1000)
    }

    #[test]
    fn what_a_frame_may_not_say_is_refused_before_it_is_taken() {
        let header = |kind, payload| wire::Header {
            payload,
            kind: Some(kind),
        };
        let data = |offset| Kind::Data(wire::Data { request: 1, offset });
        let over = |bytes, limit| Err(FrameError::Length { bytes, limit });
        assert_eq!(
            of(&header(data(0), MAX_DATA + 1)),
            over(MAX_DATA + 1, MAX_DATA)
        );
        assert_eq!(of(&header(data(u64::MAX), 1)), Err(FrameError::Range));
        let ping = Kind::Ping(wire::Number { number: 1 });
        assert_eq!(of(&header(ping, 1)), over(1, 0));
        let ask = |missing| {
            Kind::Ask(wire::Ask {
                missing,
                ..wire::Ask::default()
            })
        };
        assert_eq!(
            of(&header(ask(vec![]), MAX_BODY + 1)),
            over(MAX_BODY + 1, MAX_BODY)
        );
        for missing in [
            vec![1],
            vec![2, 2],
            vec![3, 2],
            [1, 2].repeat(MAX_RANGES + 1),
        ] {
            assert_eq!(of(&header(ask(missing), 0)), Err(FrameError::Range));
        }
        let none = wire::Header {
            payload: 0,
            kind: None,
        };
        assert_eq!(of(&none), Err(FrameError::Header));
    }
}
