//! The tier suite, run against every tier.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use kvasir_store::{Clock, DiskConfig, DiskTier, EventLog, MemoryConfig, MemoryTier};
use kvasir_tests::conformance::tier::{Fixture, Setup, run};
use kvasir_types::ByteSize;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory() {
    run(|setup: Setup| async move {
        let config = MemoryConfig {
            capacity: setup.capacity,
            pin_limit: Some(setup.pin_limit),
        };
        Fixture {
            tier: Arc::new(MemoryTier::new(&config, setup.clock, EventLog::new())),
            keep: Box::new(()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk() {
    run(|setup: Setup| async move {
        let directory = tempfile::tempdir().unwrap();
        let config = DiskConfig {
            capacity: setup.capacity,
            pin_limit: Some(setup.pin_limit),
            ..DiskConfig::at(directory.path())
        };
        let buffers = MemoryConfig::with_capacity(ByteSize::mib(64));
        let memory = MemoryTier::new(&buffers, Clock::default(), EventLog::new());
        let tier = DiskTier::open(config, memory, setup.clock, EventLog::new())
            .await
            .unwrap();
        Fixture {
            tier: Arc::new(tier),
            keep: Box::new(directory),
        }
    })
    .await;
}
