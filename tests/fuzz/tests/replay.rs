//! The seeds of every fuzz target, and what was found, through the same code as the fuzzer,
//! with an eye on memory. `KVASIR_WRITE_SEEDS=1` makes the seeds again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use kvasir_codec::{
    CacheGen, ChunkDecoder, CirculatedCacheGen, CirculatedLevel, Encoding, KeyRotation, Object,
    Pairing, Prelude,
};
use kvasir_events::wire::{Batch, BlockHash, Event, ExtraKey, Form, Place, Removed, Stored};
use kvasir_fuzz::{TARGETS, layouts};
use kvasir_transport::session::{Ask, Features, Frame, Hello, RefuseReason, RequestId, VERSIONS};
use kvasir_types::{ChunkKey, DType, KvLayout, LayerIdx, Level};

fn seeds(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("seeds")
        .join(target)
}

/// Values of all sizes, a few that are no numbers among them.
fn layer(layout: &KvLayout, strange: bool) -> Bytes {
    let mut state = 7u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let [.., a, b] = state.to_be_bytes().map(f32::from);
        (a - 128.0) / 64.0 + b / 1024.0
    };
    let bytes = (0..layout.layer_bytes() / layout.dtype().bytes()).flat_map(|at| {
        let value = match at % 97 {
            0 if strange => f32::NAN,
            5 if strange => f32::INFINITY,
            _ => next(),
        };
        match layout.dtype() {
            DType::F32 => value.to_le_bytes().to_vec(),
            DType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
            _ => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        }
    });
    bytes.collect::<Vec<u8>>().into()
}

fn object(layout: &KvLayout, level: Level, strange: bool) -> Object {
    let prelude = Prelude {
        rotation: Some(KeyRotation {
            pairing: Pairing::Halves,
            factor: 1.0,
            start: 64,
            frequencies: vec![1.0, 0.5, 0.01],
        }),
        model: Some([1; 32]),
        ..Prelude::default()
    };
    let key = ChunkKey::from_bytes([9; 32]);
    let layers = vec![layer(layout, strange)];
    Encoding::at(level)
        .encode(key, layout, &prelude, layers)
        .unwrap()
}

/// Intact inputs, from which damage is not far.
fn intact() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut all = Vec::new();
    for (number, layout) in layouts().iter().enumerate().take(2) {
        let layer = layer(layout, false);
        let published = CacheGen::new(*layout, 1.0).unwrap().encode(0, &layer);
        let circulated = CirculatedCacheGen::new(*layout, CirculatedLevel::Default).unwrap();
        for (circulated, layer) in [
            (false, published.unwrap()),
            (true, circulated.encode(0, &layer).unwrap()),
        ] {
            let input = kvasir_fuzz::cachegen_input(layout, circulated, &layer);
            all.push((
                "cachegen",
                format!(
                    "{}-{number}",
                    if circulated {
                        "circulated"
                    } else {
                        "published"
                    }
                ),
                input,
            ));
        }
    }
    for (number, layout) in layouts().iter().enumerate() {
        for level in Level::ALL {
            if level == Level::INT4 && number > 0 {
                // Not all widths have a Hadamard transform.
                continue;
            }
            let object = object(layout, level, number == 1);
            let level = object.header().level();
            let name = format!("{level}-{number}");
            let parts: Vec<&[u8]> = object
                .parts(LayerIdx(0))
                .into_iter()
                .map(|it| &**it)
                .collect();
            let input = kvasir_fuzz::layer_input(layout, level, &parts);
            all.push(("layer", name.clone(), input));
            if number == 0 {
                all.push(("container", name.clone(), object.encode()));
                let prelude = object.prelude().cloned().unwrap_or_default();
                all.push(("prelude", name, prelude.to_vec()));
            }
        }
    }
    all.extend(sessions());
    all.extend(events());
    all
}

/// Batches in both forms, with every event and field; and a later version's.
fn events() -> Vec<(&'static str, String, Vec<u8>)> {
    let whole: BlockHash = BlockHash::Bytes((0..32).collect());
    let stored = Stored {
        hashes: vec![BlockHash::Int(1), BlockHash::Int(u64::MAX), whole.clone()],
        parent: Some(whole),
        tokens: vec![0, 200, 70_000, u32::MAX],
        block_size: 2,
        lora_id: Some(-1),
        lora_name: Some("adapter".into()),
        extra_keys: Some(vec![
            None,
            Some(vec![
                ExtraKey::Text("salt".into()),
                ExtraKey::Item("image".into(), -3),
                ExtraKey::Bytes([1; 32].into()),
            ]),
        ]),
        place: Place {
            medium: Some("CPU".into()),
            group: Some(1),
            locality: Some("REMOTE".into()),
            ownership: Some("fs".into()),
        },
        kind: Some("sliding_window".into()),
        sliding_window: Some(4096),
        session_id: Some("one".into()),
    };
    let plain = Stored {
        hashes: (1..20).map(BlockHash::Int).collect(),
        tokens: (0..76).collect(),
        block_size: 4,
        ..Stored::default()
    };
    let removed = Removed {
        hashes: vec![BlockHash::Int(1)],
        place: stored.place.clone(),
    };
    let batch = Batch {
        timestamp: 1.5,
        events: vec![
            Event::Stored(Box::new(plain)),
            Event::Cleared,
            Event::Stored(Box::new(stored)),
            Event::Removed(removed),
        ],
        rank: Some(3),
        ..Batch::default()
    };
    // An event of no known type, with a map in it.
    let mut later = b"\x93\x01\x91\x93\xa5Novel".to_vec();
    later.extend(b"\x81\xa1x\x92\xc3\xca\x00\x00\x00\x00\xd9\x03abc\xc0");
    let seeds = [
        ("maps", batch.encode(Form::Maps)),
        ("arrays", batch.encode(Form::Arrays)),
        ("empty", Batch::default().encode(Form::Maps)),
        ("later", later),
    ];
    seeds
        .map(|(name, bytes)| ("events", name.to_owned(), bytes))
        .into()
}

/// What each end of a session may hear.
fn sessions() -> Vec<(&'static str, String, Vec<u8>)> {
    let hello = Frame::Hello(Hello {
        versions: VERSIONS,
        features: Features(0),
        credit: 1 << 20,
    });
    let request = RequestId(0);
    let body = || Bytes::from_static(b"what it is");
    let data = |offset, bytes: usize| Frame::Data {
        request,
        offset,
        bytes: vec![7; bytes].into(),
    };
    let described = vec![
        hello.clone(),
        Frame::Describe {
            request,
            total: 300,
            body: body(),
        },
        data(0, 100),
        data(200, 50),
        Frame::Pong { nonce: 1 },
        data(90, 60),
        Frame::Lost {
            request,
            range: 240..300,
            reason: 2,
        },
        Frame::Drain,
        data(150, 50),
    ];
    let refused = vec![
        hello.clone(),
        Frame::Refuse {
            request,
            reason: RefuseReason::Busy,
            body: body(),
        },
    ];
    let ask = |missing, body: Bytes| {
        Frame::Ask(Ask {
            request,
            priority: 1,
            budget_ms: 40,
            missing,
            body,
        })
    };
    let asked = vec![
        hello.clone(),
        ask(vec![], body()),
        Frame::Credit { limit: 3 << 20 },
        Frame::Ping { nonce: 3 },
        Frame::Prioritise {
            request,
            priority: 2,
        },
        ask(vec![10..20, 500..900], body()),
        Frame::Finish { request },
    ];
    let missing = vec![hello, ask(vec![1..7000, 8000..9000], body())];
    let both = [(0, "described", described), (0, "refused", refused)];
    let both = both
        .into_iter()
        .chain([(1, "asked", asked), (1, "missing", missing)]);
    let seeds = both.flat_map(|(end, name, frames)| {
        let bytes: Vec<u8> = frames.iter().flat_map(|it| it.encode().concat()).collect();
        [("", 252), ("-lossy", 2)].map(|(kind, choice)| {
            let input = [&[end | choice][..], &bytes].concat();
            ("session", format!("{name}{kind}"), input)
        })
    });
    seeds.collect()
}

#[test]
fn seeds_do_no_harm() {
    for (target, run) in TARGETS {
        let mut count = 0;
        for file in fs::read_dir(seeds(target)).unwrap() {
            let path = file.unwrap().path();
            println!("{}", path.display());
            run(&fs::read(path).unwrap());
            count += 1;
        }
        assert!(count > 3, "{target} has {count} seeds");
    }
}

#[test]
fn seeds_are_what_the_codec_writes() {
    for (target, name, bytes) in intact() {
        let path = seeds(target).join(name);
        if std::env::var_os("KVASIR_WRITE_SEEDS").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &bytes).unwrap();
        }
        let kept = fs::read(&path).unwrap_or_default();
        assert!(
            kept == bytes,
            "{}: KVASIR_WRITE_SEEDS=1 makes it again",
            path.display()
        );
    }
}

#[test]
fn seeds_reach_what_they_are_for() {
    // Else the targets would test nothing but their own doors.
    for layout in layouts() {
        let object = object(&layout, Level::L2, false);
        let level = object.header().level();
        let prelude = object.prelude().cloned().unwrap_or_default();
        let decoder = ChunkDecoder::new(layout, level, &prelude, &[]).unwrap();
        let mut raw = vec![0; layout.layer_bytes()];
        decoder
            .layer(LayerIdx(0), &object.parts(LayerIdx(0)), &mut raw)
            .unwrap();
    }
}

#[test]
fn damage_does_no_harm() {
    for (target, name, bytes) in intact() {
        let (_, run) = TARGETS.iter().find(|(name, _)| *name == target).unwrap();
        println!("{target} {name}");
        let step = (bytes.len() / 200).max(1);
        for at in (0..bytes.len()).step_by(step) {
            run(&bytes[..at]);
            for change in [1, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= change;
                run(&damaged);
            }
        }
    }
}
