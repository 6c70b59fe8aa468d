//! A peer of the version before: what it said, and how it reads what we say.
//!
//! `recorded/*.bin` is what both ends of it sent over two connections, the first of which broke
//! in the middle: three requests, of which the third is refused; 1,500 bytes each, of which the
//! last 220 of the first are lost. `recorded/wire.rs` are its messages, as they were. When the
//! session changes, these stay, and the version that is left behind is recorded beside them.

#[path = "recorded/wire.rs"]
mod wire;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_transport::session::{
    Ask, Config, FetchEvent, Fetcher, Frame, FrameReader, Holder, HolderEvent, RequestId,
};
use prost::Message as _;
use wire::Kind;

const FETCHER: [&[u8]; 2] = [
    include_bytes!("recorded/fetcher-1.bin"),
    include_bytes!("recorded/fetcher-2.bin"),
];
const HOLDER: [&[u8]; 2] = [
    include_bytes!("recorded/holder-1.bin"),
    include_bytes!("recorded/holder-2.bin"),
];
const TOTAL: u64 = 1500;

fn frames(recorded: &'static [u8]) -> Vec<Frame> {
    let (mut reader, mut input) = (FrameReader::default(), Bytes::from_static(recorded));
    std::iter::from_fn(|| reader.next(&mut input).unwrap()).collect()
}

fn config() -> Config {
    Config {
        piece: 256,
        credit: 2000,
        ..Config::default()
    }
}

fn content(body: &[u8], at: u64) -> u8 {
    at.to_le_bytes()[0].wrapping_mul(7) ^ body[0]
}

/// What the old reader makes of a frame: its kind, and its payload.
fn read_by_the_old(frame: &Frame) -> (Kind, Bytes) {
    let [head, payload] = frame.encode();
    let length = usize::from(u16::from_le_bytes([head[0], head[1]]));
    assert_eq!(head.len(), 2 + length);
    let header = wire::Header::decode(&head[2..]).unwrap();
    assert_eq!(header.payload, payload.len() as u64);
    (header.kind.expect("a kind that it knows"), payload)
}

#[test]
fn an_old_fetcher_is_served() {
    for recorded in FETCHER {
        let now = Instant::now();
        let mut holder = Holder::new(config());
        let mut bodies: BTreeMap<RequestId, Bytes> = BTreeMap::new();
        let mut asked: BTreeMap<RequestId, Ask> = BTreeMap::new();
        let mut sent: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        let (mut hello, mut refused) = (false, false);
        for frame in frames(recorded) {
            if let Frame::Ask(ask) = &frame {
                asked.insert(ask.request, ask.clone());
            }
            holder.on_frame(now, frame).unwrap();
            while let Some(event) = holder.poll_event() {
                if let HolderEvent::Asked { request, body, .. } = event {
                    if body == "third" {
                        holder.refuse(request, Bytes::from_static(b"not here"));
                    } else {
                        let about = [b"about ", &body[..]].concat();
                        holder.describe(request, TOTAL, about.into());
                        bodies.insert(request, body);
                    }
                }
            }
            loop {
                while let Some(read) = holder.poll_read(|_, at| at + 1) {
                    let body = &bodies[&read.request];
                    let bytes = read.range.clone().map(|at| content(body, at)).collect();
                    holder.supply(read.request, read.range.start, bytes);
                }
                let Some(frame) = holder.poll_frame(now) else {
                    break;
                };
                match read_by_the_old(&frame) {
                    (Kind::Hello(said), _) => {
                        assert!(said.from <= 1 && said.to >= 1);
                        hello = true;
                    }
                    (Kind::Data(data), payload) => {
                        let places = sent.entry(data.request).or_default();
                        places.extend((data.offset..).take(payload.len()));
                    }
                    (Kind::Describe(described), _) => assert_eq!(described.total, TOTAL),
                    (Kind::Refuse(_), payload) => refused = payload == "not here",
                    (Kind::Pong(_), _) => {}
                    (kind, _) => panic!("{kind:?}"),
                }
            }
        }
        assert!(hello);
        assert_eq!(refused, asked.values().any(|ask| ask.body == "third"));
        for (request, ask) in asked {
            let Some(places) = sent.get_mut(&request.0) else {
                continue;
            };
            places.sort_unstable();
            assert!(
                places.windows(2).all(|pair| pair[0] < pair[1]),
                "no byte twice"
            );
            let wanted = |at: &u64| {
                ask.missing.is_empty() || ask.missing.iter().any(|range| range.contains(at))
            };
            assert!(places.iter().all(wanted), "nothing that it has");
        }
        let all = sent.values().map(Vec::len).sum::<usize>();
        assert!(all > 1000, "{all} bytes");
    }
}

#[test]
fn an_old_holder_is_understood() {
    let now = Instant::now();
    let mut fetcher = Fetcher::new(config());
    let bodies = [&b"first"[..], b"second", b"third"];
    let soon = Some(now + Duration::from_secs(5));
    for (body, (priority, deadline)) in bodies.into_iter().zip([(0, None), (3, soon), (0, None)]) {
        fetcher.fetch(now, Bytes::from_static(body), priority, deadline);
    }
    let mut came = [const { Vec::new() }; 3];
    let mut lost = 0;
    let mut ends = BTreeMap::new();
    let (mut connected, mut draining) = (0, false);
    for recorded in HOLDER {
        fetcher.connect(now);
        for frame in frames(recorded) {
            fetcher.on_frame(now, frame).unwrap();
            while let Some(event) = fetcher.poll_event() {
                match event {
                    FetchEvent::Connected(agreement) => {
                        assert_eq!(agreement.version, 1);
                        connected += 1;
                    }
                    FetchEvent::Described { total, .. } => assert_eq!(total, TOTAL),
                    FetchEvent::Data {
                        request,
                        offset,
                        bytes,
                    } => {
                        let which = usize::try_from(request.0).unwrap();
                        for (at, byte) in (offset..).zip(&bytes) {
                            assert_eq!(*byte, content(bodies[which], at));
                            came[which].push(at);
                        }
                        fetcher.consumed(bytes.len() as u64);
                    }
                    FetchEvent::Lost { request, range, .. } => {
                        assert_eq!(request, RequestId(0));
                        lost += range.end - range.start;
                    }
                    FetchEvent::Refused { request, body, .. } => {
                        assert_eq!(body, "not here");
                        ends.insert(request.0, "refused");
                    }
                    FetchEvent::Complete { request } => {
                        ends.insert(request.0, "complete");
                    }
                    FetchEvent::Failed { reason, .. } => panic!("{reason}"),
                    FetchEvent::Draining => draining = true,
                }
            }
        }
        // What we say in turn, it can read.
        while let Some(frame) = fetcher.poll_frame() {
            read_by_the_old(&frame);
        }
        fetcher.disconnect();
    }
    assert_eq!((connected, draining), (2, true));
    assert_eq!(lost, 220);
    for (which, places) in came.iter_mut().enumerate() {
        places.sort_unstable();
        let expected: Vec<u64> = match which {
            0 => (0..TOTAL - 220).collect(),
            1 => (0..TOTAL).collect(),
            _ => Vec::new(),
        };
        assert_eq!(*places, expected);
    }
    let ends: Vec<_> = ends.into_values().collect();
    assert_eq!(ends, ["complete", "complete", "refused"]);
}
