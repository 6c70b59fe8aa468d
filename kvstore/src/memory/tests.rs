use kvasir_types::{ByteSize, DType, KvLayout, Planes};

use super::*;

fn tier() -> MemoryTier {
    let config = MemoryConfig::with_capacity(ByteSize::kib(64));
    MemoryTier::new(&config, Clock::default(), EventLog::new())
}

fn object(fill: u8) -> Object {
    let layout = KvLayout::new(2, 1, Planes::symmetric(8), 16, DType::F8E4m3).unwrap();
    let extents = vec![Bytes::from(vec![fill; layout.layer_bytes()]); 2];
    Object::raw(ChunkKey::from_bytes([fill; 32]), &layout, extents).unwrap()
}

fn charge(tier: &MemoryTier, object: Object) -> Result<Arc<Chunk>, Throttled> {
    tier.charge(object, Hints::default())
}

/// Memory that changed under the store: the header of one object over the
/// bytes of another.
#[tokio::test]
async fn a_flipped_bit_in_memory_is_a_miss_and_then_gone() {
    let tier = tier();
    let good = object(1);
    let bad = charge(&tier, object(2)).unwrap();
    let chunk = Chunk::new(
        Arc::new(good.header().clone()),
        bad.extents.clone(),
        Hints::default(),
        tier.reserve(1).unwrap(),
    );
    drop(bad);
    assert!(tier.publish(Arc::new(chunk), 1));

    let key = *good.header().key();
    let all = ExtentRange::new(0, 2).unwrap();
    let reader = tier.open(key).await.unwrap().unwrap();
    assert!(matches!(
        reader.read_extents(all).await,
        Err(ReadError::Corrupt { .. })
    ));
    assert!(tier.open(key).await.unwrap().is_none());
    assert_eq!((tier.usage().corrupt, tier.usage().chunks), (1, 0));
    drop(reader);
    assert_eq!(tier.usage().bytes, 0);
}

#[test]
fn what_is_listed_in_parts_is_in_order_and_whole() {
    const CHUNKS: u16 = 10_000;
    let config = MemoryConfig::with_capacity(ByteSize::mib(16));
    let tier = MemoryTier::new(&config, Clock::default(), EventLog::new());
    let layout = KvLayout::new(1, 1, Planes::symmetric(1), 1, DType::F8E4m3).unwrap();
    for number in 0..CHUNKS {
        let mut key = [0; 32];
        // Slots in another order than keys.
        key[..2].copy_from_slice(&number.wrapping_mul(7919).to_be_bytes());
        let extents = vec![Bytes::from_static(&[1, 2])];
        let object = Object::raw(ChunkKey::from_bytes(key), &layout, extents).unwrap();
        assert!(tier.publish(charge(&tier, object).unwrap(), 1));
    }
    let keys = |after: Option<ChunkKey>, limit| -> Vec<ChunkKey> {
        let listed = tier.list(after.as_ref(), limit).into_iter();
        listed.map(|facts| facts.key).collect()
    };
    let all = keys(None, usize::MAX);
    assert_eq!(all.len(), usize::from(CHUNKS));
    assert!(all.is_sorted());
    let mut pages: Vec<ChunkKey> = Vec::new();
    loop {
        let page = keys(pages.last().copied(), 999);
        if page.is_empty() {
            break;
        }
        pages.extend(page);
    }
    assert_eq!(pages, all);
    assert!(keys(None, 0).is_empty());
}

#[test]
fn a_request_that_cannot_succeed_evicts_nothing() {
    let tier = tier();
    assert!(tier.publish(charge(&tier, object(1)).unwrap(), 1));
    let held = tier.reserve(40 << 10).unwrap();
    assert!(tier.reserve(30 << 10).is_err());
    assert!(tier.reserve(u64::MAX).is_err());
    assert_eq!((tier.usage().chunks, tier.usage().throttled), (1, 2));
    drop(held);
    assert!(tier.reserve(64 << 10).is_ok(), "evicts the chunk");
    assert_eq!((tier.usage().chunks, tier.usage().evictions), (0, 1));
}

#[test]
fn a_chunk_is_charged_exactly() {
    let tier = tier();
    let chunk = charge(&tier, object(3)).unwrap();
    assert_eq!(tier.usage().bytes, Chunk::charged_bytes(chunk.header()));
    drop(chunk);
    assert_eq!(tier.usage().bytes, 0);
}
