//! The end that asks.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rangemap::RangeSet;

use super::frame::MAX_RANGES;
use super::{Agreement, Ask, Config, Frame, RefuseReason, RequestId, Violation};

/// Asks for things over one connection at a time.
#[derive(Debug)]
pub struct Fetcher {
    config: Config,
    link: Link,
    requests: BTreeMap<RequestId, Asked>,
    next: u64,
    out: VecDeque<Frame>,
    events: VecDeque<FetchEvent>,
    flow: Flow,
    pings: Pings,
    draining: bool,
}

/// What became of a request, or of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchEvent {
    /// The ends know each other.
    Connected(Agreement),
    /// The holder says what it has.
    Described {
        /// Which request.
        request: RequestId,
        /// Bytes of all of it.
        total: u64,
        /// What they are.
        body: Bytes,
    },
    /// Bytes that have not come before. [`Fetcher::consumed`] makes room for more.
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
        /// Their places.
        range: Range<u64>,
        /// Why, in the holder's words.
        reason: u32,
    },
    /// All bytes came, or are lost.
    Complete {
        /// Which request.
        request: RequestId,
    },
    /// The holder does not have it, or not now.
    Refused {
        /// Which request.
        request: RequestId,
        /// In general.
        reason: RefuseReason,
        /// In particular.
        body: Bytes,
    },
    /// It ended without all of its bytes.
    Failed {
        /// Which request.
        request: RequestId,
        /// Why.
        reason: FailReason,
    },
    /// The holder is shutting down: what is new is better asked elsewhere.
    Draining,
}

/// Why a request ended without all of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FailReason {
    /// Its deadline passed.
    #[error("its deadline passed")]
    Expired,
    /// Asked again, the holder described something else.
    #[error("it changed between two connections")]
    Changed,
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that came.
    pub received: u64,
    /// Bytes of all of it, once it is described.
    pub total: Option<u64>,
}

#[derive(Debug)]
struct Asked {
    body: Bytes,
    priority: u32,
    deadline: Option<Instant>,
    described: Option<(u64, Bytes)>,
    /// What came, or is lost.
    settled: RangeSet<u64>,
    received: u64,
    /// When it was asked for, or something of it came.
    moved: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    /// Since when a hello is under way.
    Greeting(Instant),
    Open,
}

/// Bytes of data since the connection began.
#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    received: u64,
    consumed: u64,
    granted: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Pings {
    nonce: u64,
    /// When the last one went out.
    last: Option<Instant>,
    /// Whether it came back.
    answered: bool,
    smoothed: Option<Duration>,
}

impl Fetcher {
    /// Without a connection yet. Requests may be made already.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            link: Link::Down,
            requests: BTreeMap::new(),
            next: 0,
            out: VecDeque::new(),
            events: VecDeque::new(),
            flow: Flow::default(),
            pings: Pings::default(),
            draining: false,
        }
    }

    /// A connection is there: introduces itself, and asks for all that is missing.
    pub fn connect(&mut self, now: Instant) {
        self.disconnect();
        self.link = Link::Greeting(now);
        self.flow = Flow {
            granted: self.config.credit,
            ..Flow::default()
        };
        self.pings = Pings {
            smoothed: self.pings.smoothed,
            ..Pings::default()
        };
        self.draining = false;
        self.out.push_back(Frame::Hello(self.config.hello()));
        let all: Vec<RequestId> = self.requests.keys().copied().collect();
        for request in all {
            self.ask(now, request);
        }
    }

    /// The connection is gone. Requests stay, and go on with the next one.
    pub fn disconnect(&mut self) {
        self.link = Link::Down;
        self.out.clear();
    }

    /// Asks for something. Of requests that wait, those with the higher priority come first,
    /// then those with the earlier deadline.
    pub fn fetch(
        &mut self,
        now: Instant,
        body: Bytes,
        priority: u32,
        deadline: Option<Instant>,
    ) -> RequestId {
        let request = RequestId(self.next);
        self.next += 1;
        self.requests.insert(
            request,
            Asked {
                body,
                priority,
                deadline,
                described: None,
                settled: RangeSet::new(),
                received: 0,
                moved: now,
            },
        );
        if self.link != Link::Down {
            self.ask(now, request);
        }
        request
    }

    /// Makes a request matter more, or less.
    pub fn prioritise(&mut self, request: RequestId, priority: u32) {
        if let Some(asked) = self.requests.get_mut(&request) {
            asked.priority = priority;
            self.send(Frame::Prioritise { request, priority });
        }
    }

    /// Ends a request; what of it is under way is passed over.
    pub fn cancel(&mut self, request: RequestId) {
        if self.requests.remove(&request).is_some() {
            self.send(Frame::Finish { request });
        }
    }

    /// Data of so many bytes was taken out of the way.
    pub fn consumed(&mut self, bytes: u64) {
        self.flow.consumed += bytes;
        let limit = self.flow.consumed + self.config.credit;
        // Not for every frame.
        if limit - self.flow.granted.min(limit) >= self.config.credit / 4 {
            self.grant(limit);
        }
    }

    /// Data of so many bytes was sent, for requests that have ended, and will not come.
    ///
    /// # Errors
    /// [`Violation::Credit`]
    pub fn on_gone(&mut self, bytes: u64) -> Result<(), Violation> {
        self.flow.received = self.flow.received.saturating_add(bytes);
        if self.flow.received > self.flow.granted {
            return Err(Violation::Credit);
        }
        self.consumed(bytes);
        Ok(())
    }

    fn grant(&mut self, limit: u64) {
        self.flow.granted = limit;
        self.send(Frame::Credit { limit });
    }

    /// Takes a frame.
    ///
    /// # Errors
    /// [`Violation`]; the connection is to be closed, and requests go on with the next one.
    pub fn on_frame(&mut self, now: Instant, frame: Frame) -> Result<(), Violation> {
        if let (Link::Greeting(_), false) = (self.link, matches!(frame, Frame::Hello(_))) {
            // On a carrier that reorders, the hello may be behind.
            return match self.config.resend_after {
                Some(_) => Ok(()),
                None => Err(Violation::NoHello),
            };
        }
        match frame {
            Frame::Hello(hello) => {
                let agreement = self.config.agree(&hello)?;
                if self.link != Link::Open {
                    self.link = Link::Open;
                    self.events.push_back(FetchEvent::Connected(agreement));
                    self.ping(now);
                }
            }
            Frame::Describe {
                request,
                total,
                body,
            } => self.on_description(now, request, total, body),
            Frame::Refuse {
                request,
                reason,
                body,
            } => {
                if self.requests.remove(&request).is_some() {
                    self.events.push_back(FetchEvent::Refused {
                        request,
                        reason,
                        body,
                    });
                }
            }
            Frame::Data {
                request,
                offset,
                bytes,
            } => self.on_data(now, request, offset, bytes)?,
            Frame::Lost {
                request,
                range,
                reason,
            } => self.on_loss(now, request, range, reason)?,
            Frame::Pong { nonce } => {
                if let (Some(last), true) = (self.pings.last, nonce == self.pings.nonce)
                    && !std::mem::replace(&mut self.pings.answered, true)
                {
                    let sample = now.saturating_duration_since(last);
                    // RFC 6298, without its variance.
                    let smoothed = self.pings.smoothed;
                    let smoothed = smoothed.map_or(sample, |old| (old * 7 + sample) / 8);
                    self.pings.smoothed = Some(smoothed);
                }
            }
            Frame::Drain => {
                if !std::mem::replace(&mut self.draining, true) {
                    self.events.push_back(FetchEvent::Draining);
                }
            }
            Frame::Ask(_)
            | Frame::Prioritise { .. }
            | Frame::Finish { .. }
            | Frame::Credit { .. }
            | Frame::Ping { .. }
            | Frame::Lend(_)
            | Frame::Return { .. } => return Err(Violation::Role),
        }
        Ok(())
    }

    fn on_description(&mut self, now: Instant, request: RequestId, total: u64, body: Bytes) {
        let Some(asked) = self.requests.get_mut(&request) else {
            return;
        };
        asked.moved = now;
        match &asked.described {
            None => {
                asked.described = Some((total, body.clone()));
                self.events.push_back(FetchEvent::Described {
                    request,
                    total,
                    body,
                });
                self.complete(request);
            }
            Some(before) if *before == (total, body) => {}
            Some(_) => self.fail(request, FailReason::Changed),
        }
    }

    fn on_data(
        &mut self,
        now: Instant,
        request: RequestId,
        offset: u64,
        bytes: Bytes,
    ) -> Result<(), Violation> {
        let length = bytes.len() as u64;
        self.flow.received += length;
        if self.flow.received > self.flow.granted {
            return Err(Violation::Credit);
        }
        let range = offset..offset.saturating_add(length);
        let Some(asked) = self.described(request, &range)? else {
            // Nobody waits for it any more.
            self.consumed(length);
            return Ok(());
        };
        asked.moved = now;
        let new: Vec<Range<u64>> = asked.settled.gaps(&range).collect();
        let fresh = new.iter().map(|gap| gap.end - gap.start).sum::<u64>();
        if !range.is_empty() {
            asked.settled.insert(range);
        }
        asked.received += fresh;
        for gap in new {
            let place = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
            self.events.push_back(FetchEvent::Data {
                request,
                offset: gap.start,
                bytes: bytes.slice(place(gap.start)..place(gap.end)),
            });
        }
        self.consumed(length - fresh);
        self.complete(request);
        Ok(())
    }

    fn on_loss(
        &mut self,
        now: Instant,
        request: RequestId,
        range: Range<u64>,
        reason: u32,
    ) -> Result<(), Violation> {
        let Some(asked) = self.described(request, &range)? else {
            return Ok(());
        };
        asked.moved = now;
        let new: Vec<Range<u64>> = asked.settled.gaps(&range).collect();
        asked.settled.insert(range);
        for range in new {
            self.events.push_back(FetchEvent::Lost {
                request,
                range,
                reason,
            });
        }
        self.complete(request);
        Ok(())
    }

    /// A request that was described, and has such bytes.
    fn described(
        &mut self,
        request: RequestId,
        range: &Range<u64>,
    ) -> Result<Option<&mut Asked>, Violation> {
        let Some(asked) = self.requests.get_mut(&request) else {
            return Ok(None);
        };
        match asked.described {
            Some((total, _)) if range.end > total => Err(Violation::Beyond(range.start)),
            Some(_) => Ok(Some(asked)),
            // Its description was lost.
            None => Ok(None),
        }
    }

    fn complete(&mut self, request: RequestId) {
        let Some(asked) = self.requests.get(&request) else {
            return;
        };
        if let Some((total, _)) = asked.described
            && asked.settled.gaps(&(0..total)).next().is_none()
        {
            self.requests.remove(&request);
            self.send(Frame::Finish { request });
            self.events.push_back(FetchEvent::Complete { request });
        }
    }

    fn fail(&mut self, request: RequestId, reason: FailReason) {
        self.requests.remove(&request);
        self.send(Frame::Finish { request });
        self.events
            .push_back(FetchEvent::Failed { request, reason });
    }

    fn ask(&mut self, now: Instant, request: RequestId) {
        let Some(asked) = self.requests.get_mut(&request) else {
            return;
        };
        asked.moved = now;
        let left = asked
            .deadline
            .map(|deadline| deadline.saturating_duration_since(now));
        let budget = left.map_or(0, |left| left.as_millis().clamp(1, u64::MAX.into()));
        let mut missing = Vec::new();
        if let (Some((total, _)), false) = (&asked.described, asked.settled.is_empty()) {
            let all = 0..*total;
            let mut gaps = asked.settled.gaps(&all);
            missing.extend(gaps.by_ref().take(MAX_RANGES - 1));
            // Some of the rest came, and will be passed over.
            missing.extend(gaps.next().map(|gap| gap.start..*total));
        }
        let ask = Ask {
            request,
            priority: asked.priority,
            budget_ms: u64::try_from(budget).unwrap_or(u64::MAX),
            missing,
            body: asked.body.clone(),
        };
        self.out.push_back(Frame::Ask(ask));
    }

    fn send(&mut self, frame: Frame) {
        if self.link != Link::Down {
            self.out.push_back(frame);
        }
    }

    /// The next frame to send.
    pub fn poll_frame(&mut self) -> Option<Frame> {
        self.out.pop_front()
    }

    /// Whether there are any.
    pub fn has_frames(&self) -> bool {
        !self.out.is_empty()
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<FetchEvent> {
        self.events.pop_front()
    }

    /// When [`on_timeout`](Self::on_timeout) is to be called, at the latest.
    pub fn timeout(&self) -> Option<Instant> {
        let deadlines = self.requests.values().filter_map(|asked| asked.deadline);
        let up = self.link != Link::Down;
        let resend = self.config.resend_after.filter(|_| up);
        let stalls = resend.map(|after| {
            let requests = self.requests.values().map(move |asked| asked.moved + after);
            let greeting = match self.link {
                Link::Greeting(since) => Some(since + after),
                _ => None,
            };
            requests.chain(greeting)
        });
        let waits = self.link == Link::Open && !self.requests.is_empty();
        let ping = self.pings.last.map(|last| last + self.config.ping_every);
        let ping = ping.filter(|_| waits);
        let soonest = deadlines.chain(stalls.into_iter().flatten()).chain(ping);
        soonest.min()
    }

    /// Time has passed: ends what is overdue, asks again for what makes no progress.
    pub fn on_timeout(&mut self, now: Instant) {
        let overdue = |asked: &Asked| asked.deadline.is_some_and(|deadline| deadline <= now);
        let late: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, asked)| overdue(asked))
            .map(|(request, _)| *request)
            .collect();
        for request in late {
            self.fail(request, FailReason::Expired);
        }
        if self.link == Link::Down {
            return;
        }
        if let Some(after) = self.config.resend_after {
            if let Link::Greeting(since) = self.link
                && since + after <= now
            {
                self.link = Link::Greeting(now);
                self.out.push_back(Frame::Hello(self.config.hello()));
            }
            let stalled: Vec<RequestId> = self
                .requests
                .iter()
                .filter(|(_, asked)| asked.moved + after <= now)
                .map(|(request, _)| *request)
                .collect();
            for request in &stalled {
                self.ask(now, *request);
            }
            if !stalled.is_empty() {
                // What was lost on the way took credit that nobody will consume.
                let limit = self.flow.received.max(self.flow.granted) + self.config.credit;
                self.grant(limit);
            }
        }
        let due = self
            .pings
            .last
            .is_none_or(|last| last + self.config.ping_every <= now);
        if self.link == Link::Open && !self.requests.is_empty() && due {
            self.ping(now);
        }
    }

    fn ping(&mut self, now: Instant) {
        let nonce = self.pings.nonce + 1;
        self.pings = Pings {
            nonce,
            last: Some(now),
            answered: false,
            smoothed: self.pings.smoothed,
        };
        self.send(Frame::Ping { nonce });
    }

    /// How far a request is; `None` when it has ended.
    pub fn progress(&self, request: RequestId) -> Option<Progress> {
        let asked = self.requests.get(&request)?;
        Some(Progress {
            received: asked.received,
            total: asked.described.as_ref().map(|(total, _)| *total),
        })
    }

    /// The round trip, smoothed, once it was measured.
    pub fn round_trip(&self) -> Option<Duration> {
        self.pings.smoothed
    }

    /// Whether the holder is shutting down.
    pub fn is_draining(&self) -> bool {
        self.draining
    }
}
