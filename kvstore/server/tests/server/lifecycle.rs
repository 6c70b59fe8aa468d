//! Starting, stopping, restarting.

use std::time::{Duration, Instant};

use kvasir_client::{CallError, Client, ClientConfig, GetOptions, Tier};
use kvasir_server::{Server, StartError};
use kvasir_types::ByteSize;

use crate::support::*;

#[tokio::test]
async fn a_restarted_daemon_is_warm() {
    let directory = tempfile::tempdir().unwrap();
    let (server, client) = start(on_disk(directory.path())).await;
    for number in 1..=5 {
        assert!(client.put(&chunk(number)).await.unwrap().durable);
    }
    server.shutdown().await;

    let (server, client) = start(on_disk(directory.path())).await;
    let lookup = client.lookup(&[key(1)]).await.unwrap();
    assert_eq!(lookup.found[0].unwrap().tier, Tier::Disk);
    assert_eq!(read_all(&client, &[1, 2, 3, 4, 5]).await, 5);
    server.shutdown().await;
}

#[tokio::test]
async fn shutdown_lets_transfers_finish() {
    let (server, client) = start(memory(ByteSize::mib(512))).await;
    let numbers: Vec<u8> = (0..200).collect();
    for number in &numbers {
        client.put(&chunk(*number)).await.unwrap();
    }
    let keys: Vec<_> = numbers.iter().copied().map(key).collect();
    let stream = client.get(&keys, GetOptions::default()).await.unwrap();
    let draining = tokio::spawn(server.shutdown());
    let all = usize::from(LAYERS) * numbers.len();
    assert_eq!(events(stream).await.layers.len(), all);
    draining.await.unwrap();
    let late = client.lookup(&keys).await;
    assert!(
        matches!(late, Err(CallError::Unavailable { .. })),
        "{late:?}"
    );
}

#[tokio::test]
async fn shutdown_does_not_wait_for_ever() {
    let mut config = memory(ByteSize::mib(512));
    config.limits.drain_ms = 100;
    let (server, client) = start(config).await;
    let numbers: Vec<u8> = (0..200).collect();
    for number in &numbers {
        client.put(&chunk(*number)).await.unwrap();
    }
    let keys: Vec<_> = numbers.iter().copied().map(key).collect();
    // Nobody reads this one.
    let stream = client.get(&keys, GetOptions::default()).await.unwrap();
    let begin = Instant::now();
    server.shutdown().await;
    assert!(begin.elapsed() < Duration::from_secs(5));
    drop(stream);
}

#[tokio::test]
async fn shutdown_does_not_wait_for_stuck_peers() {
    let (server, _client) = start(memory(ByteSize::mib(64))).await;
    let _silent = std::net::TcpStream::connect(server.addr()).unwrap();
    let begin = Instant::now();
    server.shutdown().await;
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_client_recovers_when_its_daemon_comes_back() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    let addr = server.addr();
    server.shutdown().await;
    let down = client.stats().await;
    assert!(
        matches!(down, Err(CallError::Unavailable { .. })),
        "{down:?}"
    );

    // A client that starts before its daemon.
    let early = Client::connect_lazy(ClientConfig {
        endpoint: addr.to_string().parse().unwrap(),
        ..ClientConfig::default()
    });
    assert!(early.stats().await.is_err());

    let mut config = memory(ByteSize::mib(64));
    config.listen = addr;
    let server = Server::start(config).await.unwrap();
    client.put(&chunk(1)).await.unwrap();
    assert_eq!(read_all(&early, &[1]).await, 1);
    server.shutdown().await;
}

#[tokio::test]
async fn what_prevents_a_start_is_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let (server, _client) = start(on_disk(directory.path())).await;
    let mut same_port = memory(ByteSize::mib(64));
    same_port.listen = server.addr();
    let error = Server::start(same_port).await.unwrap_err();
    assert!(matches!(error, StartError::Listen { .. }), "{error}");
    assert!(error.to_string().contains("--listen"), "{error}");
    let error = Server::start(on_disk(directory.path())).await.unwrap_err();
    assert!(matches!(error, StartError::Store(_)), "{error}");
    assert!(error.to_string().contains("in use"), "{error}");
    server.shutdown().await;
}

#[tokio::test]
async fn connections_over_the_bound_wait() {
    let mut config = memory(ByteSize::mib(64));
    config.limits.connections = 1;
    let (server, client) = start(config).await;
    let second = Client::connect_lazy(ClientConfig {
        endpoint: server.endpoint().parse().unwrap(),
        call_timeout: Duration::from_millis(100),
        ..ClientConfig::default()
    });
    let waiting = second.stats().await;
    assert!(
        matches!(waiting, Err(CallError::DeadlineExceeded)),
        "{waiting:?}"
    );
    drop(client);
    second
        .with_call_timeout(Duration::from_secs(5))
        .stats()
        .await
        .unwrap();
    server.shutdown().await;
}
