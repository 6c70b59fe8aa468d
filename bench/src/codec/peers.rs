//! Every method on whole chunks, ours among them.
//!
//! Rows are `METHOD/LEVEL/…`, where LEVEL is the tokens of a chunk, after the variant where
//! there is one: `cachegen-circulated/L3-256/bits`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{CORPUS_CHUNK, Options, rate};
use crate::contexts::Contexts;
use crate::corpus::Split;
use crate::methods::{Chunk, Coder, Geometry, Parts, Spec, Training};
use crate::page::Scatter;
use crate::quality::coded;
use crate::quality::reader::Reader;
use crate::report::{Report, Row};

/// Methods, and tokens of their chunks.
const MEASURED: [(&str, usize); 18] = [
    ("zstd-planes", SHORT),
    ("int8", SHORT),
    ("int4-hadamard", SHORT),
    ("cachegen", SHORT),
    ("cachegen", LONG),
    ("cachegen-circulated:L1", SHORT),
    ("cachegen-circulated", SHORT),
    ("cachegen-circulated", LONG),
    ("cachegen-circulated:L3", SHORT),
    ("cachegen-circulated:L3", LONG),
    ("kivi4", SHORT),
    ("kivi2", SHORT),
    ("turboquant4", SHORT),
    ("turboquant3", SHORT),
    ("kvtc:4", SHORT),
    ("kvtc", SHORT),
    ("kvtc:1", SHORT),
    ("kvasir", LONG),
];
const SHORT: usize = 256;
const LONG: usize = 1500;

/// Measures all, and says `(series, bits, decode GB/s)` of each.
pub(super) fn measure(
    options: &Options,
    quick: bool,
    window: Duration,
    report: &mut Report,
) -> anyhow::Result<Vec<(String, f64, f64)>> {
    let source = Contexts::new(&options.model, options.text.as_deref())?;
    let mut reader = Reader::load(&options.model, LONG.next_multiple_of(128) + 1)?;
    let geometry = Arc::new(Geometry::new(reader.config()));
    let mut training = Training::default();
    if !quick {
        training = coded::training(&mut reader, &source, &geometry, CORPUS_CHUNK as usize)?;
    }
    let count = if quick { 2 } else { options.chunks };
    let mut points = Vec::new();
    for tokens in [SHORT, LONG] {
        let contexts: u64 = if tokens == SHORT {
            count
        } else {
            count.div_ceil(4)
        };
        for (name, _) in MEASURED.iter().filter(|(_, of)| *of == tokens) {
            let spec: Spec = name.parse()?;
            if quick && spec.is_calibrated() {
                continue;
            }
            let chunks = (0..contexts)
                .map(|index| chunk(&mut reader, &source, &geometry, &spec, tokens, index))
                .collect::<anyhow::Result<Vec<_>>>()?;
            let coder = spec.coder(&geometry, &training)?;
            let (method, variant) = name.split_once(':').unwrap_or((name, ""));
            let dash = if variant.is_empty() { "" } else { "-" };
            let name = format!("{method}/{variant}{dash}{tokens}");
            let (bits, decode) = one(&name, &*coder, &chunks, window, report)?;
            points.push((format!("{method}, {tokens} tokens"), bits, decode));
        }
    }
    Ok(points)
}

/// A chunk of a context, without the first token, whose KV is like no other's.
fn chunk(
    reader: &mut Reader,
    contexts: &Contexts,
    geometry: &Geometry,
    spec: &Spec,
    tokens: usize,
    index: u64,
) -> anyhow::Result<Chunk> {
    // A context has 16 chunks at most.
    let size = (CORPUS_CHUNK as usize) << usize::from(tokens > SHORT);
    let all = contexts.context(index, tokens, size, Split::Test)?;
    let pages = reader.prefill(&all)?;
    let kv = reader.take(&pages, 1..tokens + 1)?;
    reader.release(pages)?;
    Chunk::of(&kv, geometry, 1, spec.dtype())
}

/// Rows of one method; gives its bits and decode speed.
#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
fn one(
    name: &str,
    coder: &dyn Coder,
    chunks: &[Chunk],
    window: Duration,
    report: &mut Report,
) -> anyhow::Result<(f64, f64)> {
    let encoded: Vec<Parts> = chunks
        .iter()
        .map(|chunk| coder.encode(chunk))
        .collect::<anyhow::Result<_>>()?;
    let values: usize = chunks.iter().map(Chunk::values).sum();
    let bytes: usize = encoded.iter().flatten().map(Vec::len).sum();
    let bits = 8.0 * bytes as f64 / values as f64;
    report.push(Row::new(format!("{name}/bits"), bits, "bit"));
    // Of 16-bit KV, whatever the method takes.
    let size = 2 * values;
    let encode = rate(window, size, || {
        for chunk in chunks {
            black_box(coder.encode(chunk)).unwrap_or_default();
        }
    });
    report.push(Row::new(format!("{name}/encode_core"), encode, "GB/s"));
    let decode_all = |into: &mut Chunk| {
        for parts in &encoded {
            coder.decode(black_box(parts), into).unwrap_or(());
        }
    };
    let mut into = chunks[0].empty();
    // An error would be as fast as anything.
    coder.decode(&encoded[0], &mut into)?;
    let decode = rate(window, size, || decode_all(&mut into));
    report.push(Row::new(format!("{name}/decode_core"), decode, "GB/s"));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| decode_all(&mut chunks[0].empty()));
        }
    });
    let all = (cores * size) as f64 / 1e9 / begun.elapsed().as_secs_f64();
    report.push(Row::new(format!("{name}/decode_all"), all, "GB/s"));
    Ok((bits, decode))
}

/// Speed against bits.
pub(super) fn plot(points: Vec<(String, f64, f64)>, path: &std::path::Path) -> anyhow::Result<()> {
    let scatter = Scatter {
        title: "Decoding by bits, one core",
        x_label: "bits a value, everything counted",
        y_label: "GB of 16-bit KV a second (log scale)",
        log: true,
        points,
    };
    scatter.write(path)
}
