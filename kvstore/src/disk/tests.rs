use kvasir_types::{DType, Planes};

use super::*;
use crate::policy::PolicyKind;

#[test]
fn directories_are_created_with_their_parents() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("a/b/c");
    create_directory(&path).unwrap();
    assert!(path.is_dir());
    create_directory(&path).unwrap();
}

#[test]
fn entries_are_small() {
    assert!(size_of::<DiskEntry>() <= 64);
}

/// What a start allocates, and what evictions add: ghosts. `KVASIR_INDEX_CHUNKS` says
/// of how many chunks; ten million take 1.2 GB.
#[test]
fn an_index_takes_at_most_128_bytes_a_chunk() {
    let count = std::env::var("KVASIR_INDEX_CHUNKS");
    let count: u32 = count.map_or(100_000, |count| count.parse().unwrap());
    let layout = KvLayout::new(1, 1, Planes::symmetric(8), 16, DType::Bf16).unwrap();
    let now = Instant::now();
    let (policy, log) = (PolicyKind::default(), EventLog::new());
    let mut chunks = Chunks {
        index: Index::new(TierKind::Disk, policy, u64::MAX, 0, log, now),
        retired: HashMap::new(),
        layouts: HashMap::new(),
    };
    let before = resident_bytes();
    chunks.index.reserve(count as usize);
    for number in 0..count {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_be_bytes());
        let record = Record {
            key: ChunkKey::from_bytes(key),
            location: Location {
                segment: SegmentId(1),
                block: number,
            },
            layout,
            level: Level::RAW,
            object_bytes: 600,
            created: u64::from(number),
            hints: Hints::default(),
        };
        let entry = chunks.entry(&record).unwrap();
        chunks.index.insert(entry, &Worth::new(record.hints), now);
    }
    #[expect(clippy::cast_precision_loss, reason = "to the nearest byte")]
    let per_chunk = |bytes: usize| bytes as f64 / f64::from(count);
    let resident = per_chunk(resident_bytes().saturating_sub(before));
    let filled = per_chunk(chunks.index.allocated_bytes());
    assert_eq!(chunks.index.evict(1, now).len(), 1);
    let evicted = per_chunk(chunks.index.allocated_bytes());
    println!(
        "{count} chunks: {filled:.1} bytes each, {evicted:.1} with ghosts; \
         {resident:.1} resident, whatever else runs included"
    );
    assert!(evicted <= 128.0, "{evicted}");
}

fn resident_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<usize>().unwrap() << 10
}
