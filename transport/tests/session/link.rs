//! Two ends of a session over a simulated link, in virtual time.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_transport::Lost;
use kvasir_transport::session::{
    Config, FetchEvent, Fetcher, Frame, FrameReader, Holder, HolderEvent, Read, RequestId,
};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// How a link treats frames, each way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quality {
    pub(crate) delay: Duration,
    /// Up to so much more, so that frames overtake each other.
    pub(crate) jitter: Duration,
    /// Share of frames.
    pub(crate) loss: f64,
    pub(crate) repeat: f64,
    pub(crate) bytes_per_second: f64,
}

impl Quality {
    pub(crate) const GOOD: Self = Self {
        delay: Duration::from_millis(5),
        jitter: Duration::ZERO,
        loss: 0.0,
        repeat: 0.0,
        bytes_per_second: 125e6,
    };
}

/// Frames on their way, by when they arrive.
#[derive(Debug, Default)]
struct Wire {
    frames: BTreeMap<(Instant, u64), Vec<u8>>,
    busy_until: Option<Instant>,
}

/// Both ends, what the holder has, and what the fetcher got.
pub(crate) struct Pair {
    pub(crate) now: Instant,
    pub(crate) begun: Instant,
    pub(crate) quality: Quality,
    pub(crate) fetcher: Fetcher,
    pub(crate) holder: Holder,
    /// What a body stands for; every other one is refused.
    pub(crate) things: HashMap<Bytes, Vec<u8>>,
    /// Places of things that cannot be read.
    pub(crate) unreadable: HashMap<Bytes, std::ops::Range<u64>>,
    pub(crate) got: BTreeMap<RequestId, Got>,
    pub(crate) events: Vec<FetchEvent>,
    /// Bytes of data in frames that left the holder.
    pub(crate) sent: u64,
    pub(crate) most_under_way: u64,
    /// Whether the fetcher's user takes data out of the way.
    pub(crate) takes: bool,
    read_delay: Duration,
    reads: Vec<(Instant, Read)>,
    asked: HashMap<RequestId, Bytes>,
    config: Config,
    wires: [Wire; 2],
    sequence: u64,
    random: ChaCha8Rng,
}

/// What came of one request.
#[derive(Debug, Default)]
pub(crate) struct Got {
    pub(crate) bytes: Vec<u8>,
    pub(crate) order: Vec<u64>,
    came: Vec<bool>,
    pub(crate) lost: u64,
    pub(crate) ended: Option<(FetchEvent, Instant)>,
}

impl Pair {
    pub(crate) fn new(config: Config, quality: Quality, seed: u64) -> Self {
        let now = Instant::now();
        let mut pair = Self {
            now,
            begun: now,
            quality,
            fetcher: Fetcher::new(config),
            holder: Holder::new(config),
            things: HashMap::new(),
            unreadable: HashMap::new(),
            got: BTreeMap::new(),
            events: Vec::new(),
            sent: 0,
            most_under_way: 0,
            takes: true,
            read_delay: Duration::from_millis(1),
            reads: Vec::new(),
            asked: HashMap::new(),
            config,
            wires: Default::default(),
            sequence: 0,
            random: ChaCha8Rng::seed_from_u64(seed),
        };
        pair.fetcher.connect(now);
        pair
    }

    /// A thing of so many bytes, under the name that is given back.
    pub(crate) fn have(&mut self, bytes: usize) -> Bytes {
        let name = Bytes::from(format!("thing {}", self.things.len()));
        let thing = (0..bytes).map(|_| self.random.random()).collect();
        self.things.insert(name.clone(), thing);
        name
    }

    pub(crate) fn fetch(
        &mut self,
        name: &Bytes,
        priority: u32,
        within: Option<Duration>,
    ) -> RequestId {
        let deadline = within.map(|within| self.now + within);
        let request = self
            .fetcher
            .fetch(self.now, name.clone(), priority, deadline);
        self.got.insert(request, Got::default());
        request
    }

    /// The connection breaks, with all that is under way; a new one is there at once.
    pub(crate) fn reconnect(&mut self) {
        self.fetcher.disconnect();
        self.holder = Holder::new(self.config);
        self.wires = Default::default();
        self.reads.clear();
        self.asked.clear();
        self.fetcher.connect(self.now);
    }

    pub(crate) fn after(&self, time: Duration) -> Instant {
        self.begun + time
    }

    /// Until nothing happens any more, or `until`.
    pub(crate) fn run(&mut self, until: Instant) {
        loop {
            self.settle();
            let arrivals = self.wires.iter().filter_map(|wire| {
                let ((at, _), _) = wire.frames.first_key_value()?;
                Some(*at)
            });
            let reads = self.reads.iter().map(|(at, _)| *at);
            let timers = [self.fetcher.timeout(), self.holder.timeout()];
            let next = arrivals
                .chain(reads)
                .chain(timers.into_iter().flatten())
                .min();
            match next {
                Some(at) if at <= until => self.now = self.now.max(at),
                _ => break,
            }
            self.advance();
        }
        self.now = self.now.max(until);
    }

    /// All that is due by now.
    fn advance(&mut self) {
        for wire in 0..2 {
            while let Some(entry) = self.wires[wire].frames.first_entry() {
                if entry.key().0 > self.now {
                    break;
                }
                let mut bytes = Bytes::from(entry.remove());
                let mut reader = FrameReader::default();
                while let Some(frame) = reader.next(&mut bytes).expect("frames of ours") {
                    let taken = match wire {
                        0 => self.holder.on_frame(self.now, frame),
                        _ => self.fetcher.on_frame(self.now, frame),
                    };
                    taken.expect("our ends do as they may");
                }
            }
        }
        let (due, later) = self.reads.drain(..).partition(|(at, _)| *at <= self.now);
        self.reads = later;
        for (_, read) in due {
            self.answer(read);
        }
        if self.fetcher.timeout().is_some_and(|at| at <= self.now) {
            self.fetcher.on_timeout(self.now);
        }
        if self.holder.timeout().is_some_and(|at| at <= self.now) {
            self.holder.on_timeout(self.now);
        }
    }

    fn answer(&mut self, read: Read) {
        let Some(name) = self.asked.get(&read.request) else {
            return;
        };
        if let Some(bad) = self.unreadable.get(name)
            && bad.start < read.range.end
            && read.range.start < bad.end
        {
            let range = read.range.clone();
            let reason = 7;
            self.holder.lose(
                &read,
                Lost {
                    ranges: vec![range],
                    reason,
                },
            );
            return;
        }
        let place = |at: u64| usize::try_from(at).expect("a test's things are small");
        let bytes = &self.things[name][place(read.range.start)..place(read.range.end)];
        let bytes = Bytes::copy_from_slice(bytes);
        self.holder.supply(read.request, read.range.start, bytes);
    }

    /// What the ends have to say, now.
    fn settle(&mut self) {
        while let Some(event) = self.holder.poll_event() {
            match event {
                HolderEvent::Asked { request, body, .. } => match self.things.get(&body) {
                    Some(thing) => {
                        let total = thing.len() as u64;
                        self.asked.insert(request, body.clone());
                        self.holder.describe(request, total, body);
                    }
                    None => self.holder.refuse(request, Bytes::from_static(b"unknown")),
                },
                HolderEvent::Ended { request } => drop(self.asked.remove(&request)),
                HolderEvent::Connected(_) => {}
            }
        }
        while let Some(event) = self.fetcher.poll_event() {
            self.take(event);
        }
        while let Some(read) = self.holder.poll_read(|_, at| at + 1) {
            self.reads.push((self.now + self.read_delay, read));
        }
        while let Some(frame) = self.fetcher.poll_frame() {
            self.send(0, &frame);
        }
        while let Some(frame) = self.holder.poll_frame(self.now) {
            self.sent += frame.data_bytes();
            self.send(1, &frame);
        }
    }

    fn take(&mut self, event: FetchEvent) {
        self.events.push(event.clone());
        match &event {
            FetchEvent::Data {
                request,
                offset,
                bytes,
            } => {
                let got = self.got.get_mut(request).expect("asked for");
                let at = usize::try_from(*offset).expect("small");
                let end = got.bytes.len().max(at + bytes.len());
                got.bytes.resize(end, 0);
                got.came.resize(end, false);
                for came in &mut got.came[at..][..bytes.len()] {
                    assert!(!std::mem::replace(came, true), "no byte comes twice");
                }
                got.bytes[at..][..bytes.len()].copy_from_slice(bytes);
                got.order.push(*offset);
                if self.takes {
                    self.fetcher.consumed(bytes.len() as u64);
                }
            }
            FetchEvent::Lost { request, range, .. } => {
                self.got.get_mut(request).expect("asked for").lost += range.end - range.start;
            }
            FetchEvent::Complete { request }
            | FetchEvent::Refused { request, .. }
            | FetchEvent::Failed { request, .. } => {
                let got = self.got.get_mut(request).expect("asked for");
                let before = got.ended.replace((event.clone(), self.now));
                assert_eq!(before, None, "a request ends once");
            }
            _ => {}
        }
    }

    fn send(&mut self, wire: usize, frame: &Frame) {
        let bytes = frame.encode().concat();
        let times = if self.random.random_bool(self.quality.repeat) {
            2
        } else {
            1
        };
        for _ in 0..times {
            let Quality {
                delay,
                jitter,
                loss,
                bytes_per_second,
                ..
            } = self.quality;
            #[expect(clippy::cast_precision_loss, reason = "lengths of frames")]
            let takes = Duration::from_secs_f64(bytes.len() as f64 / bytes_per_second);
            let begins = self.wires[wire]
                .busy_until
                .unwrap_or(self.now)
                .max(self.now);
            self.wires[wire].busy_until = Some(begins + takes);
            let jitter = jitter.mul_f64(self.random.random());
            if self.random.random_bool(loss) {
                continue;
            }
            self.sequence += 1;
            let arrives = begins + takes + delay + jitter;
            self.wires[wire]
                .frames
                .insert((arrives, self.sequence), bytes.clone());
        }
        let under_way = self.wires[1]
            .frames
            .values()
            .map(|it| it.len() as u64)
            .sum();
        self.most_under_way = self.most_under_way.max(under_way);
    }
}
