//! The tier suite, run against every tier.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use kvasir_store::policy::PolicyKind;
use kvasir_store::{
    Clock, DirectIo, DiskConfig, DiskTier, Environment, EventLog, Medium, MemoryConfig, MemoryTier,
};
use kvasir_tests::conformance::tier::{Fixture, Setup, run};
use kvasir_tests::faulty::{Faults, Faulty};
use kvasir_types::ByteSize;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory() {
    let both = PolicyKind::ALL
        .into_iter()
        .flat_map(|it| [(it, false), (it, true)]);
    for (policy, shared) in both {
        run(policy, |setup: Setup| async move {
            let config = MemoryConfig {
                capacity: setup.capacity,
                pin_limit: Some(setup.pin_limit),
                policy: setup.policy,
                shared,
            };
            Fixture {
                tier: Arc::new(MemoryTier::new(&config, setup.clock, EventLog::new())),
                keep: Box::new(()),
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk() {
    for policy in PolicyKind::ALL {
        run(policy, |setup| open_disk(setup, Arc::new(DirectIo))).await;
    }
}

/// Short reads and writes are nothing that a tier may show.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_in_pieces() {
    let medium = Faulty::new(1);
    medium.set(Faults {
        short: 0.5,
        ..Faults::default()
    });
    let open = |setup| open_disk(setup, Arc::new(medium.clone()));
    run(PolicyKind::default(), open).await;
    assert!(medium.injected() > 100, "{}", medium.injected());
}

async fn open_disk(setup: Setup, medium: Arc<dyn Medium>) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let config = DiskConfig {
        capacity: setup.capacity,
        pin_limit: Some(setup.pin_limit),
        policy: setup.policy,
        ..DiskConfig::at(directory.path())
    };
    let buffers = MemoryConfig::with_capacity(ByteSize::mib(64));
    let memory = MemoryTier::new(&buffers, Clock::default(), EventLog::new());
    let environment = Environment {
        clock: setup.clock,
        medium,
    };
    let tier = DiskTier::open(environment, config, memory, EventLog::new())
        .await
        .unwrap();
    Fixture {
        tier: Arc::new(tier),
        keep: Box::new(directory),
    }
}
