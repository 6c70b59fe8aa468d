//! The end that has what is asked for.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rangemap::RangeSet;

use super::{Agreement, Ask, Config, Frame, RefuseReason, RequestId, Violation};
use crate::source::Lost;

/// Answers one fetcher over one connection.
#[derive(Debug)]
pub struct Holder {
    config: Config,
    agreement: Option<Agreement>,
    requests: BTreeMap<RequestId, Serving>,
    out: VecDeque<Frame>,
    events: VecDeque<HolderEvent>,
    /// Bytes of data that may be sent in all, and that were.
    limit: u64,
    /// Of these, at any time, bytes that requests without priority leave to others.
    reserve: u64,
    sent: u64,
    /// Bytes that are being read, or were read and not sent.
    ahead: u64,
    draining: bool,
}

/// What the fetcher wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HolderEvent {
    /// The ends know each other.
    Connected(Agreement),
    /// Something is asked for: answer with [`Holder::describe`] or [`Holder::refuse`].
    Asked {
        /// Its number.
        request: RequestId,
        /// What it is.
        body: Bytes,
        /// When nobody will wait for it any more.
        deadline: Option<Instant>,
    },
    /// A request has ended: what it holds can be let go.
    Ended {
        /// Its number.
        request: RequestId,
    },
}

/// Bytes to be read: answer with [`Holder::supply`] or [`Holder::lose`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// Of which request.
    pub request: RequestId,
    /// Their places.
    pub range: Range<u64>,
}

#[derive(Debug)]
struct Serving {
    priority: u32,
    deadline: Option<Instant>,
    described: Option<(u64, Bytes)>,
    /// Still to be read. Before it is described, what was asked for, if not all.
    wanted: RangeSet<u64>,
    /// Read, and to be sent.
    ready: VecDeque<Frame>,
    /// Bytes being read.
    reading: u64,
    /// When it was asked for, or something of it was sent.
    moved: Instant,
}

impl Holder {
    /// Of a new connection.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            agreement: None,
            requests: BTreeMap::new(),
            out: VecDeque::new(),
            events: VecDeque::new(),
            limit: 0,
            reserve: 0,
            sent: 0,
            ahead: 0,
            draining: false,
        }
    }

    /// Takes a frame.
    ///
    /// # Errors
    /// [`Violation`]; the connection is to be closed.
    pub fn on_frame(&mut self, now: Instant, frame: Frame) -> Result<(), Violation> {
        if self.agreement.is_none() && !matches!(frame, Frame::Hello(_)) {
            // On a carrier that reorders, the hello may be behind.
            return match self.config.resend_after {
                Some(_) => Ok(()),
                None => Err(Violation::NoHello),
            };
        }
        match frame {
            Frame::Hello(hello) => {
                let agreement = self.config.agree(&hello)?;
                self.limit = self.limit.max(hello.credit);
                self.reserve = hello.credit / 4;
                self.out.push_back(Frame::Hello(self.config.hello()));
                if self.agreement.replace(agreement).is_none() {
                    self.events.push_back(HolderEvent::Connected(agreement));
                }
            }
            Frame::Ask(ask) => self.on_ask(now, ask),
            Frame::Prioritise { request, priority } => {
                if let Some(serving) = self.requests.get_mut(&request) {
                    serving.priority = priority;
                }
            }
            Frame::Finish { request } => self.end(request),
            Frame::Credit { limit } => self.limit = self.limit.max(limit),
            Frame::Ping { nonce } => self.out.push_back(Frame::Pong { nonce }),
            Frame::Describe { .. }
            | Frame::Refuse { .. }
            | Frame::Data { .. }
            | Frame::Lost { .. }
            | Frame::Pong { .. }
            | Frame::Drain
            | Frame::Lend(_)
            | Frame::Return { .. } => return Err(Violation::Role),
        }
        Ok(())
    }

    fn on_ask(&mut self, now: Instant, ask: Ask) {
        let request = ask.request;
        let deadline =
            (ask.budget_ms > 0).then(|| now.checked_add(Duration::from_millis(ask.budget_ms)));
        let deadline = deadline.flatten();
        let missing: RangeSet<u64> = ask.missing.into_iter().collect();
        if let Some(serving) = self.requests.get_mut(&request) {
            serving.priority = ask.priority;
            serving.moved = now;
            let Some((total, body)) = serving.described.clone() else {
                serving.wanted = missing;
                return;
            };
            // What was sent and did not come; what is under way stays so.
            let unsent = serving
                .ready
                .drain(..)
                .map(|frame| frame.data_bytes())
                .sum::<u64>();
            self.ahead -= unsent;
            serving.wanted = within(missing, total);
            self.out.push_back(Frame::Describe {
                request,
                total,
                body,
            });
            return;
        }
        let refusal = match (self.draining, self.requests.len() >= self.config.requests) {
            (true, _) => Some(RefuseReason::Draining),
            (_, true) => Some(RefuseReason::Busy),
            _ => None,
        };
        if let Some(reason) = refusal {
            self.out.push_back(Frame::Refuse {
                request,
                reason,
                body: Bytes::new(),
            });
            return;
        }
        self.requests.insert(
            request,
            Serving {
                priority: ask.priority,
                deadline,
                described: None,
                wanted: missing,
                ready: VecDeque::new(),
                reading: 0,
                moved: now,
            },
        );
        self.events.push_back(HolderEvent::Asked {
            request,
            body: ask.body,
            deadline,
        });
    }

    /// Says what a request's bytes are, and how many. Nothing happens where it has ended.
    pub fn describe(&mut self, request: RequestId, total: u64, body: Bytes) {
        let Some(serving) = self.requests.get_mut(&request) else {
            return;
        };
        serving.wanted = within(std::mem::take(&mut serving.wanted), total);
        serving.described = Some((total, body.clone()));
        self.out.push_back(Frame::Describe {
            request,
            total,
            body,
        });
    }

    /// Ends a request with a reason that the fetcher understands.
    pub fn refuse(&mut self, request: RequestId, body: Bytes) {
        if let Some(serving) = self.requests.remove(&request) {
            self.forget(&serving);
            self.out.push_back(Frame::Refuse {
                request,
                reason: RefuseReason::Answer,
                body,
            });
        }
    }

    /// What to read next. Its bytes lie one after the other. `end` says where the part of a
    /// request ends that has a place; see [`Config::whole`].
    pub fn poll_read(&mut self, end: impl FnOnce(RequestId, u64) -> u64) -> Option<Read> {
        let room = self.config.read_ahead.saturating_sub(self.ahead);
        let credit = self.limit.saturating_sub(self.sent + self.ahead);
        let waiting = self
            .requests
            .iter_mut()
            .filter(|(_, serving)| serving.described.is_some() && !serving.wanted.is_empty());
        let (request, serving) = waiting.min_by_key(|(request, it)| urgency(**request, it))?;
        let first = serving.wanted.first()?.clone();
        let reserve = if serving.priority == 0 {
            self.reserve
        } else {
            0
        };
        let credit = credit.saturating_sub(reserve);
        let most = room.min(credit);
        if most == 0 {
            return None;
        }
        let mut until = first.end.min(first.start + most.min(self.config.piece));
        if self.config.whole {
            let whole = end(*request, until - 1).min(first.end);
            if until < whole && whole - first.start <= most {
                until = whole;
            }
        }
        let range = first.start..until;
        serving.wanted.remove(range.clone());
        let length = range.end - range.start;
        serving.reading += length;
        self.ahead += length;
        Some(Read {
            request: *request,
            range,
        })
    }

    /// Bytes that were to be read; a request that has ended does not miss them.
    pub fn supply(&mut self, request: RequestId, offset: u64, bytes: Bytes) {
        let length = bytes.len() as u64;
        if let Some(serving) = self.requests.get_mut(&request) {
            serving.reading = serving.reading.saturating_sub(length);
            serving.ready.push_back(Frame::Data {
                request,
                offset,
                bytes,
            });
        }
    }

    /// What was to be read, and was not: it is to be read again.
    pub fn put_off(&mut self, read: &Read) {
        let length = read.range.end - read.range.start;
        if let Some(serving) = self.requests.get_mut(&read.request)
            && length > 0
        {
            serving.reading = serving.reading.saturating_sub(length);
            self.ahead = self.ahead.saturating_sub(length);
            serving.wanted.insert(read.range.clone());
        }
    }

    /// Some of what was to be read is lost, and so may be more, whether it was to be read or
    /// not. What of it is not is to be read again; where all of it is not, all of it is lost.
    pub fn lose(&mut self, read: &Read, lost: Lost) {
        let length = read.range.end - read.range.start;
        if let Some(serving) = self.requests.get_mut(&read.request) {
            serving.reading = serving.reading.saturating_sub(length);
            self.ahead = self.ahead.saturating_sub(length);
            let mut ranges = lost.ranges;
            let concerns =
                |range: &Range<u64>| range.start < read.range.end && read.range.start < range.end;
            if !ranges.iter().any(concerns) {
                ranges.push(read.range.clone());
            }
            serving.wanted.insert(read.range.clone());
            for range in ranges.into_iter().filter(|range| !range.is_empty()) {
                serving.wanted.remove(range.clone());
                serving.ready.push_back(Frame::Lost {
                    request: read.request,
                    range,
                    reason: lost.reason,
                });
            }
        }
    }

    /// The next frame to send.
    pub fn poll_frame(&mut self, now: Instant) -> Option<Frame> {
        if let Some(frame) = self.out.pop_front() {
            return Some(frame);
        }
        let ready = self
            .requests
            .iter_mut()
            .filter(|(_, it)| !it.ready.is_empty());
        let (_, serving) = ready.min_by_key(|(request, it)| urgency(**request, it))?;
        let frame = serving.ready.pop_front()?;
        serving.moved = now;
        self.sent += frame.data_bytes();
        self.ahead = self.ahead.saturating_sub(frame.data_bytes());
        Some(frame)
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<HolderEvent> {
        self.events.pop_front()
    }

    /// When [`on_timeout`](Self::on_timeout) is to be called, at the latest.
    pub fn timeout(&self) -> Option<Instant> {
        let linger = self.config.linger;
        let ends = self.requests.values().flat_map(|serving| {
            let idle = serving.described.is_some().then(|| serving.moved + linger);
            serving.deadline.into_iter().chain(idle)
        });
        ends.min()
    }

    /// Time has passed: ends requests that nobody waits for.
    pub fn on_timeout(&mut self, now: Instant) {
        let linger = self.config.linger;
        let over = |serving: &Serving| {
            serving.deadline.is_some_and(|deadline| deadline <= now)
                || (serving.described.is_some() && serving.moved + linger <= now)
        };
        let ended: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, serving)| over(serving))
            .map(|(request, _)| *request)
            .collect();
        for request in ended {
            self.end(request);
            // Somebody may wait all the same.
            self.out.push_back(Frame::Refuse {
                request,
                reason: RefuseReason::Idle,
                body: Bytes::new(),
            });
        }
    }

    /// Takes nothing new, says so, and ends what it has.
    pub fn drain(&mut self) {
        if !std::mem::replace(&mut self.draining, true) {
            self.out.push_back(Frame::Drain);
        }
    }

    /// Whether a request was asked for and has not ended.
    pub fn serves(&self, request: RequestId) -> bool {
        self.requests.contains_key(&request)
    }

    /// How much a request matters; `None` where it has ended.
    pub fn priority(&self, request: RequestId) -> Option<u32> {
        let serving = self.requests.get(&request)?;
        Some(serving.priority)
    }

    /// Whether it [drains](Self::drain).
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Whether nothing is asked for, and nothing to be sent.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.out.is_empty()
    }

    fn end(&mut self, request: RequestId) {
        if let Some(serving) = self.requests.remove(&request) {
            self.forget(&serving);
            self.events.push_back(HolderEvent::Ended { request });
        }
    }

    fn forget(&mut self, serving: &Serving) {
        let ready = serving.ready.iter().map(Frame::data_bytes).sum::<u64>();
        self.ahead = self.ahead.saturating_sub(ready + serving.reading);
    }
}

/// Less is sooner.
fn urgency(
    request: RequestId,
    serving: &Serving,
) -> (Reverse<u32>, bool, Option<Instant>, RequestId) {
    let deadline = serving.deadline;
    (
        Reverse(serving.priority),
        deadline.is_none(),
        deadline,
        request,
    )
}

/// What of the ranges there is; all, where there are none.
fn within(ranges: RangeSet<u64>, total: u64) -> RangeSet<u64> {
    let mut ranges = ranges;
    if ranges.is_empty() && total > 0 {
        ranges.insert(0..total);
    }
    if total < u64::MAX {
        ranges.remove(total..u64::MAX);
    }
    ranges
}
