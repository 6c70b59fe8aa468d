//! What is done with hostile bytes: the body of each fuzz target, and of the test that
//! replays the seeds.
//!
//! ```text
//! make fuzz                  every target, a minute each (SECONDS=1200: twenty)
//! seeds/TARGET/*             where it starts; `make test` replays them
//! ```
//!
//! Nothing may panic, nor allocate more than the headers justify; the replay measures that.
//! Checksums would turn nearly every input away at the door, so they are made right before
//! the parser is called, or, inside of parts, not compared (`cfg(fuzzing)`).

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_codec::{CacheGen, ChunkDecoder, CirculatedCacheGen, CirculatedLevel, Object, Prelude};
use kvasir_events::wire::{Batch, Form, Unknown};
use kvasir_events::{Limits, Publisher};
use kvasir_transport::Lost;
use kvasir_transport::session::{Config, FetchEvent, Fetcher, FrameReader, Holder, HolderEvent};
use kvasir_types::{Checksum, DType, KvLayout, LayerIdx, Level, Planes};

/// A name, and what is done with bytes.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 6] = [
    ("container", container),
    ("prelude", prelude),
    ("layer", layer),
    ("cachegen", cachegen),
    ("session", session),
    ("events", events),
];

/// A whole object: header, then all of its extents, decoded at every level that it has.
///
/// # Panics
/// An intact object is not what it was parsed from.
pub fn container(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    seal(&mut bytes);
    let bytes = Bytes::from(bytes);
    let Ok(object) = Object::parse(&bytes) else {
        return;
    };
    assert_eq!(object.encode(), bytes, "one object, one form");
    let header = object.header();
    if header.layout().layer_bytes() > MOST_RAW {
        return;
    }
    let prelude = object.prelude().cloned().unwrap_or_default();
    let Ok(decoder) = ChunkDecoder::new(*header.layout(), header.level(), &prelude, &[]) else {
        return;
    };
    let mut raw = vec![0; header.layout().layer_bytes()];
    for layer in 0..header.layout().layers().min(2) {
        let parts = object.parts(LayerIdx(layer));
        for count in 0..=parts.len() {
            let _ = decoder.layer(LayerIdx(layer), &parts[..count], &mut raw);
        }
    }
}

/// A batch of an engine's events.
///
/// # Panics
/// What was read is not what is read again once it is written.
pub fn events(bytes: &[u8]) {
    let mut publisher = Publisher::new(false, [0; 32], Limits::default());
    publisher.connected();
    publisher.live(0, bytes);
    publisher.live(1, bytes);
    let Ok(mut batch) = Batch::decode(bytes) else {
        assert_eq!((publisher.counts().malformed, publisher.blocks()), (2, 0));
        return;
    };
    batch.unknown = Unknown::default();
    // No number is itself.
    if batch.timestamp.is_nan() {
        batch.timestamp = 0.0;
    }
    for form in [Form::Maps, Form::Arrays] {
        assert_eq!(Batch::decode(&batch.encode(form)), Ok(batch.clone()));
    }
}

/// What a peer says to one end of a session. The first byte chooses the end, and how many
/// bytes come at a time.
///
/// # Panics
/// Bytes are handed out twice, beyond their total, or after the request has ended.
pub fn session(bytes: &[u8]) {
    let Some((&choice, rest)) = bytes.split_first() else {
        return;
    };
    let now = Instant::now();
    let config = Config {
        credit: 1 << 20,
        piece: 1 << 10,
        resend_after: (choice & 2 != 0).then_some(Duration::from_millis(10)),
        ..Config::default()
    };
    let (mut fetcher, mut holder) = (Fetcher::new(config), Holder::new(config));
    fetcher.connect(now);
    let request = fetcher.fetch(now, Bytes::from_static(b"thing"), 0, None);
    let (mut total, mut came) = (0, vec![]);
    let mut reader = FrameReader::default();
    for (tick, bytes) in (1..).zip(rest.chunks(1 + usize::from(choice >> 2))) {
        let now = now + Duration::from_millis(tick);
        let mut bytes = Bytes::copy_from_slice(bytes);
        while let Ok(Some(frame)) = reader.next(&mut bytes) {
            let taken = if choice & 1 == 0 {
                fetcher.on_frame(now, frame)
            } else {
                holder.on_frame(now, frame)
            };
            if taken.is_err() {
                return;
            }
        }
        while let Some(event) = fetcher.poll_event() {
            match event {
                FetchEvent::Described { total: all, .. } => total = all,
                FetchEvent::Data { offset, bytes, .. } => {
                    assert!(mark(&mut came, offset, bytes.len() as u64) <= total);
                    fetcher.consumed(bytes.len() as u64);
                }
                FetchEvent::Lost { range, .. } => {
                    assert!(mark(&mut came, range.start, range.end - range.start) <= total);
                }
                FetchEvent::Complete { .. } => {
                    assert_eq!(
                        came.iter().map(|(start, end)| end - start).sum::<u64>(),
                        total
                    );
                    assert_eq!(fetcher.progress(request), None);
                }
                _ => {}
            }
        }
        while let Some(event) = holder.poll_event() {
            if let HolderEvent::Asked { request, body, .. } = event {
                match body.len() % 3 {
                    0 => holder.refuse(request, body),
                    _ => holder.describe(request, body.len() as u64 * 1000, body),
                }
            }
        }
        while let Some(read) = holder.poll_read(|_, at| at + 1) {
            let length = read.range.end - read.range.start;
            assert!((1..=config.piece).contains(&length), "a piece is no longer");
            if length.is_multiple_of(7) {
                let range = read.range.clone();
                holder.lose(
                    &read,
                    Lost {
                        ranges: vec![range],
                        reason: 1,
                    },
                );
            } else {
                let bytes = vec![0; usize::try_from(length).unwrap_or(0)];
                holder.supply(read.request, read.range.start, bytes.into());
            }
        }
        fetcher.on_timeout(now);
        holder.on_timeout(now);
        while fetcher.poll_frame().is_some() {}
        while holder.poll_frame(now).is_some() {}
    }
}

/// Notes a range that has come; gives its end.
fn mark(came: &mut Vec<(u64, u64)>, start: u64, length: u64) -> u64 {
    let end = start + length;
    let apart = came.iter().all(|&(from, to)| to <= start || end <= from);
    assert!(apart, "no byte comes twice");
    came.push((start, end));
    end
}

/// The prelude of an encoded object.
///
/// # Panics
/// What was parsed is not what it is written as.
pub fn prelude(bytes: &[u8]) {
    for layout in layouts() {
        if let Ok(prelude) = Prelude::parse(bytes, &layout) {
            let again = Prelude::parse(&prelude.encode(), &layout);
            assert_eq!(again, Ok(prelude), "what is read can be written");
        }
    }
}

/// The parts of one layer. The first byte chooses layout and level, and every part but the
/// last is preceded by its length.
pub fn layer(bytes: &[u8]) {
    let Some((&choice, mut rest)) = bytes.split_first() else {
        return;
    };
    let levels = Level::ALL;
    let (layouts, choice) = (layouts(), usize::from(choice));
    let layout = layouts[choice % layouts.len()];
    let level = levels[choice / layouts.len() % levels.len()];
    let Ok(decoder) = ChunkDecoder::new(layout, level, &[], &[]) else {
        return;
    };
    let mut parts = Vec::new();
    for _ in 1..level.parts() {
        let Some((&len, after)) = rest.split_first_chunk() else {
            break;
        };
        let len = usize::from(u16::from_le_bytes(len)).min(after.len());
        let (part, after) = after.split_at(len);
        parts.push(part);
        rest = after;
    }
    parts.push(rest);
    let mut raw = vec![0; layout.layer_bytes()];
    let _ = decoder.layer(LayerIdx(0), &parts, &mut raw);
}

/// A layer of either CacheGen, whose tables come with it. The first byte chooses which, and
/// the layout.
pub fn cachegen(bytes: &[u8]) {
    let Some((&choice, bytes)) = bytes.split_first() else {
        return;
    };
    let (layouts, choice) = (layouts(), usize::from(choice));
    let layout = layouts[choice % layouts.len()];
    let mut raw = vec![0; layout.layer_bytes()];
    if choice / layouts.len() % 2 == 0 {
        if let Ok(codec) = CacheGen::new(layout, 1.0) {
            let _ = codec.decode(bytes, &mut raw);
        }
    } else if let Ok(codec) = CirculatedCacheGen::new(layout, CirculatedLevel::Default) {
        let _ = codec.decode(0, bytes, &mut raw);
    }
}

/// What [`cachegen`] reads.
///
/// # Panics
/// The layout is none of those that a target knows.
pub fn cachegen_input(layout: &KvLayout, circulated: bool, layer: &[u8]) -> Vec<u8> {
    let layouts = layouts();
    let of_layout = layouts.iter().position(|other| other == layout);
    let of_layout = of_layout.expect("a target knows it");
    let choice = of_layout + layouts.len() * usize::from(circulated);
    let mut out = vec![u8::try_from(choice).expect("there are few")];
    out.extend_from_slice(layer);
    out
}

/// What [`layer`] reads, of these parts.
///
/// # Panics
/// The layout, or the level, is none of those that a target knows.
pub fn layer_input(layout: &KvLayout, level: Level, parts: &[&[u8]]) -> Vec<u8> {
    let layouts = layouts();
    let of_layout = layouts.iter().position(|other| other == layout);
    let of_level = Level::ALL.iter().position(|other| *other == level);
    let (of_layout, of_level) = of_layout.zip(of_level).expect("a target knows them");
    let choice = of_level * layouts.len() + of_layout;
    let mut out = vec![u8::try_from(choice).expect("there are few")];
    for (number, part) in (1..).zip(parts) {
        if number < parts.len() {
            let len = u16::try_from(part.len()).expect("parts are small");
            out.extend_from_slice(&len.to_le_bytes());
        }
        out.extend_from_slice(part);
    }
    out
}

/// Geometries that targets decode into: whole and broken cells, one plane and two, heads of
/// all kinds of widths.
///
/// # Panics
/// Never: they are valid.
pub fn layouts() -> [KvLayout; 4] {
    let new = |heads, planes, tokens, dtype| {
        KvLayout::new(1, heads, planes, tokens, dtype).expect("a small geometry")
    };
    let uneven = Planes::KeyValue {
        key_dim: 24,
        value_dim: 40,
    };
    [
        new(2, Planes::symmetric(32), 64, DType::F16),
        new(3, uneven, 70, DType::Bf16),
        new(1, Planes::Single { dim: 36 }, 130, DType::F32),
        new(1, Planes::symmetric(64), 1, DType::Bf16),
    ]
}

/// Makes the checksums of an object right: of the header that it states, and of extents
/// that lie where the header says.
fn seal(bytes: &mut [u8]) {
    // The smallest header there is, to learn how long this one is.
    let field = |bytes: &[u8], at: usize| bytes.get(at).copied().unwrap_or(0);
    let level = Level::from_code(field(bytes, 10)).unwrap_or(Level::RAW);
    let layers = u16::from_le_bytes([field(bytes, 96), field(bytes, 97)]);
    let extents = level.extents(layers) as usize;
    let end = FIXED_BYTES + ENTRY_BYTES * extents;
    let Some((head, payload)) = bytes.split_at_mut_checked(end + CHECKSUM_BYTES) else {
        return;
    };
    let mut payload = &*payload;
    for entry in head[FIXED_BYTES..end].as_chunks_mut::<ENTRY_BYTES>().0 {
        let (len, checksum) = entry.split_at_mut(8);
        let len = u64::from_le_bytes(len.try_into().unwrap_or_default());
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let Some((extent, rest)) = payload.split_at_checked(len) else {
            break;
        };
        checksum.copy_from_slice(&Checksum::of(extent).as_u64().to_le_bytes());
        payload = rest;
    }
    let (covered, checksum) = head.split_at_mut(end);
    checksum.copy_from_slice(&Checksum::of(covered).as_u64().to_le_bytes());
}

/// Larger layers are not decoded: they take the time of many small ones.
const MOST_RAW: usize = 1 << 20;
/// Of a header, before and in its table, and after it.
const FIXED_BYTES: usize = 104;
const ENTRY_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 8;
