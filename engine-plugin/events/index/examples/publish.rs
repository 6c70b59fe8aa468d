//! Publishes KV events as vLLM does, ten a second: for who writes a router, and has no engine.
//!
//! `cargo run --release -p kvasir-index --example publish`

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvasir_events::wire::{BlockHash, Event, Form, Place, Removed, Stored};
use kvasir_index::{EventPublisher, PublishConfig};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let publisher = EventPublisher::bind(PublishConfig {
        address: "tcp://127.0.0.1:0".into(),
        replay: Some("tcp://127.0.0.1:0".into()),
        topic: "kv-events".into(),
        form: Form::Maps,
        rank: Some(0),
        buffer: 10_000,
    })
    .await?;
    let replay = publisher.replay().unwrap_or_default();
    println!("events at {}, replay at {replay}", publisher.address());
    let place = Place {
        medium: Some("GPU".into()),
        ..Place::default()
    };
    for block in 0u32.. {
        let hash = |block: u32| BlockHash::Int(u64::from(block) << 32);
        let stored = Stored {
            hashes: vec![hash(block)],
            parent: block.checked_sub(1).map(hash),
            tokens: (0..16).map(|token| block * 16 + token).collect(),
            block_size: 16,
            place: place.clone(),
            ..Stored::default()
        };
        let removed = block.checked_sub(100).map(|block| {
            Event::Removed(Removed {
                hashes: vec![hash(block)],
                place: place.clone(),
            })
        });
        let events = [Event::Stored(Box::new(stored))].into_iter().chain(removed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        publisher
            .publish(now.as_secs_f64(), events.collect())
            .await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
