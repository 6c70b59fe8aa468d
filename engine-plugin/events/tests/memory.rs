//! What a block costs. Alone in its process, because the allocator counts for all threads.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use kvasir_events::wire::{Batch, BlockHash, Event, Form, Stored};
use kvasir_events::{Limits, Publisher};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

#[test]
fn a_block_takes_at_most_21_bytes() {
    // A table is fullest right before it doubles, and emptiest right after.
    for blocks in [1_835_000, 1_836_000, 3_670_000] {
        let before = ALLOCATOR.current_usage();
        let mut publisher = Publisher::new(false, [0; 32], Limits::default());
        publisher.connected();
        for (sequence, start) in (0..).zip((0..blocks).step_by(1000)) {
            let hashes = (start..start + 1000).map(|n: u64| BlockHash::Int(n << 20));
            let stored = Stored {
                hashes: hashes.collect(),
                ..Stored::default()
            };
            let batch = Batch {
                events: vec![Event::Stored(Box::new(stored))],
                ..Batch::default()
            };
            publisher.live(sequence, &batch.encode(Form::Maps));
        }
        assert_eq!(publisher.blocks() as u64, blocks);
        let bytes = ALLOCATOR.current_usage() - before;
        #[expect(clippy::cast_precision_loss, reason = "small enough")]
        let each = bytes as f64 / blocks as f64;
        println!("{blocks} blocks: {each:.1} bytes each");
        assert!((8.0..21.0).contains(&each), "{each}");
    }
}
