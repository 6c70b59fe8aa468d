//! Chunks reused by engines whose memory does not hold their sequences.

use std::num::NonZeroUsize;

use kvasir_engine::scheduler::PagingConfig;
use kvasir_engine::{BLOCK_TOKENS, ScratchFile};

use super::*;

/// With memory for a layer of one prompt, chunks are compiled, land in pages that go to disk, and
/// are repaired there: answers are those of an engine with all of it in memory, be they blended
/// one by one or together, parked and resumed.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_repaired_on_disk_as_in_memory() {
    let bed = Bed::start().await;
    let blend = BlendConfig {
        compile_after: NonZeroU32::MIN,
        ..BlendConfig::new(proven())
    };
    let whole = bed.engine(Some(proven()), None);
    let directory = tempfile::tempdir().unwrap();
    let model = Model::load(&model_dir()).unwrap();
    let heads = model.config().kv_heads;
    let namespace = harness::namespace(&model, &harness::tokenizer());
    let first = order(&PREFIX, &[0, 1, 2, 3], 0);
    let frames = (first.tokens.len() + 4).div_ceil(BLOCK_TOKENS) * heads;
    let file = Arc::new(ScratchFile::create(directory.path()).unwrap());
    let config = EngineConfig {
        blend: Some(blend),
        paging: Some(PagingConfig {
            turn_batches: NonZeroUsize::MIN,
            ..PagingConfig::new(frames, file)
        }),
        ..EngineConfig::for_tokens(20_000)
    };
    let address = bed.daemon.address();
    let paged = Rig::start_with(Arc::new(model), namespace, config, address, patient());
    first.ask(&paged, Use::Both).await;
    bed.compiled(&paged, &first).await;

    let orders: Vec<Order> = [[3, 1, 0, 2], [2, 0, 3, 1], [1, 3, 2, 0]]
        .iter()
        .enumerate()
        .map(|(question, documents)| order(&PREFIX, documents, question))
        .collect();
    let mut expected = Vec::new();
    for order in &orders {
        expected.push(order.ask(&whole, Use::Read).await);
    }
    let mut found = Vec::new();
    for order in &orders {
        found.push(order.ask(&paged, Use::Read).await);
    }
    let together = orders.iter().map(|order| order.ask(&paged, Use::Read));
    found.extend(futures::future::join_all(together).await);
    for (answer, (order, expected)) in found.iter().zip(orders.iter().zip(&expected).cycle()) {
        assert_eq!(answer.usage.blended_tokens, order.chunk_tokens());
        answer.assert_equals(expected);
    }
    let stats = paged.engine.paging().unwrap();
    assert!(
        stats.pager.read_bytes > 0 && stats.restarts == 0,
        "{stats:?}"
    );
    assert!(stats.parks > 0, "{stats:?}");
}
