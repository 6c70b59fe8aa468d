//! Every call does what it says.

use std::time::Duration;

use kvasir_client::{ListOptions, PutOutcome, Tier};
use kvasir_store::policy::PolicyKind;
use kvasir_types::ByteSize;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::support::*;

#[tokio::test]
async fn a_chunk_is_stored_once_and_found() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    let put = client.put(&chunk(1)).await.unwrap();
    assert_eq!((put.outcome, put.durable), (PutOutcome::Stored, false));
    let again = client.put(&chunk(1)).await.unwrap();
    assert_eq!(again.outcome, PutOutcome::AlreadyPresent);
    client.put(&chunk(2)).await.unwrap();

    let lookup = client
        .lookup(&[key(1), key(2), key(3), key(1)])
        .await
        .unwrap();
    assert_eq!(lookup.prefix_chunks, 2);
    let tiers: Vec<_> = lookup
        .found
        .iter()
        .map(|found| found.map(|found| found.tier))
        .collect();
    let memory = Some(Tier::Memory);
    assert_eq!(tiers, [memory, memory, None, memory]);
    assert!(lookup.found[0].unwrap().bytes >= layout().chunk_bytes());

    assert_eq!(read_all(&client, &[1, 2, 3]).await, 2);
    assert_eq!(read_all(&client, &[3, 1]).await, 0);
    server.shutdown().await;
}

#[tokio::test]
async fn lookups_of_more_keys_than_one_request_holds_are_split() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    let mut keys = vec![key(1); 20_000];
    keys.push(key(9));
    let lookup = client.lookup(&keys).await.unwrap();
    assert_eq!(lookup.prefix_chunks, 20_000);
    assert_eq!(lookup.found.len(), 20_001);
    server.shutdown().await;
}

#[tokio::test]
async fn chunks_are_deleted_and_listed() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    for number in [3, 1, 2] {
        client.put(&chunk(number)).await.unwrap();
    }
    let list = async |after, limit| {
        let options = ListOptions { after, limit };
        let chunks = client.list(options).await.unwrap().collect().await.unwrap();
        chunks.iter().map(|chunk| chunk.key).collect::<Vec<_>>()
    };
    assert_eq!(list(None, 0).await, [key(1), key(2), key(3)]);
    assert_eq!(list(Some(key(1)), 1).await, [key(2)]);
    assert_eq!(client.delete(&[key(1), key(2), key(9)]).await.unwrap(), 2);
    assert_eq!(list(None, 0).await, [key(3)]);
    server.shutdown().await;
}

#[tokio::test]
async fn pinned_chunks_stay() {
    // Room for about three chunks; the oldest go first.
    let mut config = memory(ByteSize::kib(900));
    config.store.memory.policy = PolicyKind::Lru;
    let (server, client) = start(config).await;
    client.put(&chunk(1)).await.unwrap();
    let ttl = Duration::from_secs(60);
    let pin = client.pin(&[key(1), key(9)], ttl).await.unwrap();
    assert_eq!(pin.pinned, 1);
    for number in 2..8 {
        client.put(&chunk(number)).await.unwrap();
    }
    assert_eq!(client.lookup(&[key(1)]).await.unwrap().prefix_chunks, 1);
    let stats = client.stats().await.unwrap();
    assert_eq!(stats.pins, 1);
    assert!(stats.pinned_bytes >= layout().chunk_bytes());
    assert!(stats.tier(Tier::Memory).unwrap().evictions > 0);

    assert!(client.unpin(pin.id).await.unwrap());
    assert!(!client.unpin(pin.id).await.unwrap());
    for number in 8..14 {
        client.put(&chunk(number)).await.unwrap();
    }
    assert_eq!(client.lookup(&[key(1)]).await.unwrap().prefix_chunks, 0);
    server.shutdown().await;
}

#[tokio::test]
async fn a_pin_ends_by_itself() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    let ttl = Duration::from_millis(30);
    client.pin(&[key(1)], ttl).await.unwrap();
    tokio::time::sleep(ttl * 2).await;
    assert_eq!(client.stats().await.unwrap().pins, 0);
    server.shutdown().await;
}

#[tokio::test]
async fn stats_count_what_happened() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    client.lookup(&[key(1), key(2)]).await.unwrap();
    read_all(&client, &[1]).await;
    let stats = client.stats().await.unwrap();
    let bytes = layout().chunk_bytes();
    assert_eq!((stats.received_bytes, stats.sent_bytes), (bytes, 2 * bytes));
    assert_eq!((stats.lookup_keys, stats.lookup_hits), (2, 1));
    assert_eq!(stats.version, env!("CARGO_PKG_VERSION"));
    assert!(stats.resident_bytes > 0 && stats.peak_resident_bytes >= stats.resident_bytes);
    let memory = stats.tier(Tier::Memory).unwrap();
    assert_eq!((memory.chunks, memory.capacity_bytes), (1, 64 << 20));
    assert!(memory.peak_bytes >= memory.bytes);
    assert!(stats.tier(Tier::Disk).is_none());
    server.shutdown().await;
}

/// A client that has no copy of the protocol can ask for it, as `grpcurl` does.
#[tokio::test]
async fn the_protocol_describes_itself() {
    let (server, _client) = start(memory(ByteSize::mib(64))).await;
    let mut reflection = ServerReflectionClient::new(channel(&server).await);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = reflection
        .server_reflection_info(futures::stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(services)) = answer.message_response else {
        panic!("not a list of services: {answer:?}");
    };
    let names: Vec<_> = services
        .service
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    assert!(names.contains(&"kvasir.v1.Cache"), "{names:?}");
    server.shutdown().await;
}

#[tokio::test]
async fn health_is_reported() {
    let (server, _client) = start(memory(ByteSize::mib(64))).await;
    let mut health = HealthClient::new(channel(&server).await);
    for service in ["", "kvasir.v1.Cache"] {
        let request = HealthCheckRequest {
            service: service.into(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), tonic_health::ServingStatus::Serving.into());
    }
    server.shutdown().await;
}
