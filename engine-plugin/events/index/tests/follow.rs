//! Real sockets: engines that publish, are cut off, restart and vanish; a daemon; and who asks.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::{Chunk, Client};
use kvasir_events::Limits;
use kvasir_events::hash::{self, Prompt, none_hash, prompt_hashes};
use kvasir_events::wire::{BlockHash, Event, Form, Place, Removed, Stored};
use kvasir_index::{EventPublisher, PublishConfig, Running, Server, ServerConfig};
use kvasir_proto::v1::prefix_index_client::PrefixIndexClient;
use kvasir_proto::v1::{self, Standing};
use kvasir_types::{ChunkKey, DType, KvLayout, Level, Planes};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tonic::transport::Channel;
use zeromq::{Socket as _, SocketSend as _};

const BLOCK: u32 = 4;

fn prompt() -> Vec<u32> {
    (100..140).collect()
}

fn whole(seed: &str) -> Vec<[u8; 32]> {
    let tokens = prompt();
    let prompt = Prompt {
        tokens: &tokens,
        ..Prompt::default()
    };
    prompt_hashes(&none_hash(seed), BLOCK as usize, &prompt)
}

/// The first `count` blocks of the prompt, as vLLM says that it has them.
fn stored(count: usize) -> Event {
    let hashes = whole(hash::DEFAULT_SEED);
    let hashes = hashes
        .iter()
        .take(count)
        .map(|it| BlockHash::Int(hash::low64(it)));
    Event::Stored(Box::new(Stored {
        hashes: hashes.collect(),
        tokens: prompt()[..count * BLOCK as usize].to_vec(),
        block_size: BLOCK,
        place: gpu(),
        ..Stored::default()
    }))
}

fn removed(block: usize) -> Event {
    let hash = &whole(hash::DEFAULT_SEED)[block];
    Event::Removed(Removed {
        hashes: vec![BlockHash::Bytes(hash.as_slice().into())],
        place: gpu(),
    })
}

fn gpu() -> Place {
    Place {
        medium: Some("GPU".into()),
        ..Place::default()
    }
}

async fn publisher(address: &str, replay: Option<&str>, form: Form) -> EventPublisher {
    let config = PublishConfig {
        address: address.to_owned(),
        replay: replay.map(str::to_owned),
        topic: "kv".into(),
        form,
        rank: Some(0),
        buffer: 1000,
    };
    // The address of one that has just ended is free soon.
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match EventPublisher::bind(config.clone()).await {
            Ok(publisher) => return publisher,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

const ANY: &str = "tcp://127.0.0.1:0";

async fn server(engines: &[String], daemons: &[String]) -> (Running, PrefixIndexClient<Channel>) {
    let running = Server::start(ServerConfig {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        metrics: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        engines: engines.iter().map(|it| it.parse().unwrap()).collect(),
        daemons: daemons.iter().map(|it| it.parse().unwrap()).collect(),
        hash_seed: hash::DEFAULT_SEED.to_owned(),
        limits: Limits::default(),
    })
    .await
    .unwrap();
    let address = format!("http://{}", running.addr());
    let channel = Channel::from_shared(address)
        .unwrap()
        .connect()
        .await
        .unwrap();
    (running, PrefixIndexClient::new(channel))
}

async fn locate(client: &mut PrefixIndexClient<Channel>) -> Vec<v1::Location> {
    let request = v1::LocateRequest {
        prompt: Some(v1::Prompt {
            token_ids: prompt(),
            block_size: BLOCK,
            ..v1::Prompt::default()
        }),
        ..v1::LocateRequest::default()
    };
    let answer = client.locate(request).await.unwrap().into_inner();
    assert_eq!(answer.blocks, 10);
    answer.locations
}

/// Asks until the first publisher has so many blocks and stands so.
async fn until(client: &mut PrefixIndexClient<Channel>, standing: Standing, blocks: u32) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let located = locate(client).await.remove(0);
        if located.standing() == standing && located.blocks == blocks {
            assert_eq!(located.tokens, u64::from(blocks * BLOCK));
            return;
        }
        assert!(located.standing() != Standing::Behind || located.blocks == 0);
        assert!(Instant::now() < end, "{standing:?}, {blocks}: {located:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn first(client: &mut PrefixIndexClient<Channel>) -> v1::Publisher {
    let answer = client.publishers(v1::PublishersRequest {}).await.unwrap();
    answer.into_inner().publishers.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_published_before_and_after_is_located_in_either_form() {
    for form in [Form::Maps, Form::Arrays] {
        let engine = publisher(ANY, Some(ANY), form).await;
        engine.publish(1.0, vec![stored(3)]).await.unwrap();
        let spec = format!(
            "a={},replay={},topic=kv",
            engine.address(),
            engine.replay().unwrap()
        );
        let (running, mut client) = server(&[spec], &[]).await;
        until(&mut client, Standing::Complete, 3).await;
        engine.publish(2.0, vec![stored(6)]).await.unwrap();
        until(&mut client, Standing::Complete, 6).await;
        engine.publish(3.0, vec![removed(4)]).await.unwrap();
        until(&mut client, Standing::Complete, 4).await;

        let located = locate(&mut client).await.remove(0);
        let medium = v1::MediumBlocks {
            medium: "GPU".into(),
            blocks: 4,
        };
        assert_eq!(located.media, [medium]);
        let state = first(&mut client).await;
        assert_eq!(
            (state.blocks, state.sequence, state.block_size),
            (5, Some(2), BLOCK)
        );
        assert_eq!(state.hash_function(), v1::HashFunction::Sha256Cbor);
        assert_eq!(state.id.unwrap().kind(), v1::publisher_id::Kind::Engine);

        // The same blocks by their names, and others by theirs.
        let names = whole(hash::DEFAULT_SEED);
        let by_whole = v1::LocateRequest {
            whole_hashes: names.iter().map(|it| Bytes::copy_from_slice(it)).collect(),
            ..v1::LocateRequest::default()
        };
        let by_bits = v1::LocateRequest {
            hashes: names.iter().map(hash::low64).collect(),
            ..v1::LocateRequest::default()
        };
        let others = v1::LocateRequest {
            hashes: vec![1, 2],
            ..v1::LocateRequest::default()
        };
        for (request, blocks) in [(by_whole, 4), (by_bits, 4), (others, 0)] {
            let answer = client.locate(request).await.unwrap().into_inner();
            assert_eq!(answer.locations[0].blocks, blocks);
            assert_eq!(answer.locations[0].tokens, 0);
        }

        let metrics = format!("http://{}/metrics", running.metrics().unwrap());
        let text = reqwest::get(metrics).await.unwrap().text().await.unwrap();
        assert!(
            text.contains("kvasir_index_standing{publisher=\"a\",rank=\"0\"} 2"),
            "{text}"
        );
        assert!(
            text.contains("kvasir_index_batches_total{publisher=\"a\",rank=\"0\"} 3"),
            "{text}"
        );
        running.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_ends_is_not_offered_and_one_that_starts_over_is_cleared() {
    let engine = publisher(ANY, Some(ANY), Form::Maps).await;
    let (address, replay) = (
        engine.address().to_owned(),
        engine.replay().unwrap().to_owned(),
    );
    for n in 0..4 {
        engine.publish(f64::from(n), vec![stored(5)]).await.unwrap();
    }
    let spec = format!("a={address},replay={replay},check-ms=50");
    let (running, mut client) = server(&[spec], &[]).await;
    until(&mut client, Standing::Complete, 5).await;
    drop(engine);
    until(&mut client, Standing::Behind, 0).await;

    // Its successor has published more than it, before anybody connects.
    let engine = publisher(&address, Some(&replay), Form::Maps).await;
    for n in 10..20 {
        engine.publish(f64::from(n), vec![stored(2)]).await.unwrap();
    }
    until(&mut client, Standing::Complete, 2).await;
    let state = first(&mut client).await;
    assert_eq!((state.blocks, state.restarts), (2, 1));
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_replay_address_what_follows_is_known_in_part() {
    let engine = publisher(ANY, None, Form::Arrays).await;
    engine.publish(1.0, vec![stored(3)]).await.unwrap();
    let (running, mut client) = server(&[format!("a={}", engine.address())], &[]).await;
    until(&mut client, Standing::Partial, 0).await;
    // The subscription takes a moment to arrive.
    let end = Instant::now() + Duration::from_secs(10);
    for n in 2.. {
        engine.publish(f64::from(n), vec![stored(6)]).await.unwrap();
        if locate(&mut client).await[0].blocks == 6 {
            break;
        }
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    until(&mut client, Standing::Partial, 6).await;
    engine.publish(0.5, vec![Event::Cleared]).await.unwrap();
    until(&mut client, Standing::Complete, 0).await;
    running.shutdown().await;
}

/// A road that can be closed: connections end, and no new one is let in.
async fn road(to: &str) -> (SocketAddr, JoinSet<()>) {
    let to = to.strip_prefix("tcp://").unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    (at, open(listener, to))
}

fn open(listener: TcpListener, to: String) -> JoinSet<()> {
    let mut road = JoinSet::new();
    road.spawn(async move {
        let mut cars = JoinSet::new();
        while let Ok((mut from, _)) = listener.accept().await {
            let Ok(mut to) = TcpStream::connect(&to).await else {
                continue;
            };
            cars.spawn(async move {
                let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
            });
        }
    });
    road
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_while_the_connection_is_cut_is_asked_for() {
    let engine = publisher(ANY, Some(ANY), Form::Maps).await;
    engine.publish(1.0, vec![stored(3)]).await.unwrap();
    let (at, live) = road(engine.address()).await;
    let spec = format!("a=tcp://{at},replay={}", engine.replay().unwrap());
    let (running, mut client) = server(&[spec], &[]).await;
    until(&mut client, Standing::Complete, 3).await;
    drop(live);
    until(&mut client, Standing::Behind, 0).await;
    engine.publish(2.0, vec![removed(1)]).await.unwrap();
    engine.publish(3.0, vec![stored(1)]).await.unwrap();
    let to = engine.address().strip_prefix("tcp://").unwrap().to_owned();
    let _live = open(TcpListener::bind(at).await.unwrap(), to);
    until(&mut client, Standing::Complete, 1).await;
    let state = first(&mut client).await;
    assert_eq!((state.restarts, state.sequence), (0, Some(2)));
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_does_not_answer_is_not_offered() {
    let engine = publisher(ANY, Some(ANY), Form::Maps).await;
    engine.publish(1.0, vec![stored(3)]).await.unwrap();
    let (at, replay) = road(engine.replay().unwrap()).await;
    let spec = format!("a={},replay=tcp://{at},check-ms=50", engine.address());
    let (running, mut client) = server(&[spec], &[]).await;
    until(&mut client, Standing::Complete, 3).await;
    drop(replay);
    until(&mut client, Standing::Behind, 0).await;
    let to = engine
        .replay()
        .unwrap()
        .strip_prefix("tcp://")
        .unwrap()
        .to_owned();
    let _replay = open(TcpListener::bind(at).await.unwrap(), to);
    until(&mut client, Standing::Complete, 3).await;
    assert_eq!(first(&mut client).await.restarts, 0);
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publishers_of_another_model_are_left_out_and_requests_are_checked() {
    let engines = [
        "a=tcp://127.0.0.1:1,model=m",
        "b=tcp://127.0.0.1:1,model=n",
        "c=tcp://127.0.0.1:1",
    ];
    let (running, mut client) = server(&engines.map(str::to_owned), &[]).await;
    let request = v1::LocateRequest {
        model: "m".into(),
        ..v1::LocateRequest::default()
    };
    let answer = client.locate(request).await.unwrap().into_inner();
    let names = answer
        .locations
        .iter()
        .map(|it| it.publisher.as_ref().unwrap().name.as_str());
    assert_eq!(names.collect::<Vec<_>>(), ["a", "c"]);

    let prompt = |block_size, items: Vec<v1::Item>| v1::LocateRequest {
        prompt: Some(v1::Prompt {
            token_ids: prompt(),
            block_size,
            items,
            ..v1::Prompt::default()
        }),
        ..v1::LocateRequest::default()
    };
    let item = |offset, length| v1::Item {
        identifier: "i".into(),
        offset,
        length,
    };
    let wrong = [
        prompt(0, vec![]),
        prompt(4, vec![item(0, 5), item(4, 1)]),
        v1::LocateRequest {
            hashes: vec![1],
            ..prompt(4, vec![])
        },
        v1::LocateRequest {
            hashes: vec![1; 131_073],
            ..v1::LocateRequest::default()
        },
        v1::LocateRequest {
            whole_hashes: vec![Bytes::from_static(b"short")],
            ..v1::LocateRequest::default()
        },
    ];
    for request in wrong {
        let status = client.locate(request.clone()).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{request:?}");
    }
    client
        .locate(prompt(4, vec![item(0, 4), item(4, 1)]))
        .await
        .unwrap();
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemons_chunks_are_located_by_whole_hashes_and_tier() {
    let namespace = [5; 32];
    let hex: String = namespace.iter().map(|it| format!("{it:02x}")).collect();
    let daemon = kvasir_server::Server::start(kvasir_server::ServerConfig::in_memory())
        .await
        .unwrap();
    let store = Client::connect(&daemon.endpoint()).await.unwrap();
    let layout = KvLayout::new(1, 1, Planes::symmetric(8), BLOCK, DType::F32).unwrap();
    let keys: Vec<ChunkKey> = whole(hash::DEFAULT_SEED)
        .iter()
        .map(|hash| ChunkKey::opaque(&namespace, hash))
        .collect();
    let put = |key| Chunk {
        key,
        layout,
        level: Level::RAW,
        extents: vec![Bytes::from(vec![1; layout.layer_bytes()])],
    };
    store.put(&put(keys[0])).await.unwrap();
    let daemons = [
        format!("{},namespace={hex}", daemon.endpoint()),
        daemon.endpoint(),
    ];
    let (running, mut client) = server(&[], &daemons).await;
    until(&mut client, Standing::Complete, 1).await;
    store.put(&put(keys[1])).await.unwrap();
    store.put(&put(keys[3])).await.unwrap();
    until(&mut client, Standing::Complete, 2).await;
    let located = locate(&mut client).await;
    let medium = v1::MediumBlocks {
        medium: "memory".into(),
        blocks: 2,
    };
    assert_eq!(located[0].media, [medium]);
    assert_eq!(
        (located[1].standing(), located[1].blocks),
        (Standing::Complete, 0)
    );
    let by_bits = v1::LocateRequest {
        hashes: whole(hash::DEFAULT_SEED).iter().map(hash::low64).collect(),
        ..v1::LocateRequest::default()
    };
    let answer = client.locate(by_bits).await.unwrap().into_inner();
    assert_eq!(answer.locations[0].blocks, 0);

    let state = first(&mut client).await;
    assert!(state.has_namespace && state.epoch != 0);
    assert_eq!((state.blocks, state.replays), (3, 1));
    store.delete(&keys[..1]).await.unwrap();
    until(&mut client, Standing::Complete, 0).await;
    daemon.shutdown().await;
    until(&mut client, Standing::Behind, 0).await;
    running.shutdown().await;
}

/// Asks a publisher for everything, again and again, and never listens.
async fn deaf(replay: &str, requests: usize) -> zeromq::DealerSocket {
    let mut socket = zeromq::DealerSocket::new();
    socket.connect(replay).await.unwrap();
    for _ in 0..requests {
        let mut request = zeromq::ZmqMessage::from(Bytes::new());
        request.push_back(Bytes::copy_from_slice(&[0; 8]));
        socket.send(request).await.unwrap();
    }
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_replays_and_does_not_listen_holds_up_nobody() {
    let engine = publisher(ANY, Some(ANY), Form::Maps).await;
    for n in 0..1000 {
        engine
            .publish(f64::from(n), vec![stored(2); 20])
            .await
            .unwrap();
    }
    let spec = format!("a={},replay={}", engine.address(), engine.replay().unwrap());
    let (running, mut client) = server(&[spec], &[]).await;
    until(&mut client, Standing::Complete, 2).await;
    // More than the queue of a peer takes, and what lies in the kernel besides.
    let _deaf = deaf(engine.replay().unwrap(), 400).await;
    // Until that is so.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for n in 1000..1100 {
        let publish = engine.publish(f64::from(n), vec![stored(3)]);
        let published = tokio::time::timeout(Duration::from_secs(5), publish).await;
        published.expect("it is held up").unwrap();
    }
    until(&mut client, Standing::Complete, 3).await;
    running.shutdown().await;
}
