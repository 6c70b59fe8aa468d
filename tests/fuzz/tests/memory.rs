//! Hostile bytes take no more memory than their headers justify. Alone in its process,
//! because the allocator counts for all threads.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use kvasir_fuzz::{TARGETS, layouts};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

#[test]
fn damage_takes_no_more_memory_than_the_largest_layer_justifies() {
    let largest = layouts()
        .iter()
        .map(|layout| layout.layer_bytes())
        .max()
        .unwrap();
    // A layer, the values of a group of heads as f32 and as symbols, angles.
    let most = 16 * largest + (64 << 10);
    for (target, run) in TARGETS {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("seeds")
            .join(target);
        for file in fs::read_dir(seeds).unwrap() {
            let path = file.unwrap().path();
            let intact = fs::read(&path).unwrap();
            // Tables that are made once are not what is counted.
            run(&intact);
            // Lengths and counts are at the beginning; a byte that is all ones is a large one.
            for at in (0..intact.len()).take(300) {
                let mut damaged = intact.clone();
                damaged[at] = 0xff;
                let before = ALLOCATOR.current_usage();
                ALLOCATOR.reset_peak_usage();
                run(&damaged);
                let took = ALLOCATOR.peak_usage().saturating_sub(before);
                let name = path.display();
                assert!(
                    took <= most + 4 * intact.len(),
                    "{name}, byte {at}: {took} of {most}"
                );
            }
        }
    }
}
