//! Gets over the data plane.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::{
    CallError, Carrier, Chunk, Client, ClientConfig, DataPlane, GetEvent, GetOptions, TlsConfig,
};
use kvasir_server::{
    QuicSettings, Running, Server, ServerConfig, SharedMemorySettings, StartError,
};
use kvasir_transport::quic::{Authority, Issued, Purpose};
use kvasir_types::{ByteSize, HeadRange, Level, Slice, TokenRange};
use rustix::process::Signal;

use crate::daemon::Daemon;
use crate::support::*;

const LAYERS_OF_MANY: u16 = 2000;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A client of the server that has to use QUIC.
async fn over_quic(server: &Running) -> Client {
    let client = Client::connect_with(ClientConfig {
        endpoint: server.endpoint().parse().unwrap(),
        data_plane: DataPlane::Quic,
        ..ClientConfig::default()
    });
    let client = client.await.unwrap();
    assert_eq!(carrier(&client), Some(Carrier::Quic));
    client
}

fn carrier(client: &Client) -> Option<Carrier> {
    let path = client.data_path()?;
    path.connected.then_some(path.carrier)
}

#[tokio::test]
async fn gets_share_memory_or_go_over_quic_as_they_are_told() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    client.put(&chunk(1)).await.unwrap();
    assert_eq!(carrier(&client), Some(Carrier::SharedMemory));
    for client in [client, over_quic(&server).await] {
        assert_eq!(read_all(&client, &[1]).await, 1);
        soon("leases end with their gets", || {
            server.store().stats().leases == 0
        })
        .await;
    }
    server.shutdown().await;
}

/// What a client has stays as it is, though the chunk is deleted and its memory wanted.
#[tokio::test]
async fn what_is_lent_stays_until_it_is_dropped() {
    let (server, client) = start(memory(ByteSize::mib(4))).await;
    client.put(&chunk(1)).await.unwrap();
    let stream = client.get(&[key(1)], GetOptions::default()).await.unwrap();
    let kept = events(stream).await.layers;
    assert_eq!(client.delete(&[key(1)]).await.unwrap(), 1);
    let held = |server: &Running| server.store().stats().memory.bytes;
    assert!(held(&server) >= layout().chunk_bytes(), "it is paid for");
    for number in 2..50 {
        client.put(&chunk(number)).await.unwrap();
    }
    for (_, index, data) in &kept {
        assert_eq!(*data, layer(1, *index));
    }
    let numbers: Vec<_> = (2..50).map(key).collect();
    client.delete(&numbers).await.unwrap();
    let before = held(&server);
    drop(kept);
    soon("its memory comes back", || held(&server) < before).await;
    server.shutdown().await;
}

/// A client that dies with something lent leaves nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_gone_has_nothing_lent() {
    let (server, client) = start(memory(ByteSize::mib(4))).await;
    let numbers = [1, 2, 3, 4];
    for number in numbers {
        client.put(&chunk(number)).await.unwrap();
    }
    let endpoint = server.endpoint();
    // In a runtime of its own, which takes its sockets with it, as a process would.
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let kept = runtime.block_on(async {
            let client = Client::connect(&endpoint).await.unwrap();
            let keys = numbers.map(key);
            let stream = client.get(&keys, GetOptions::default()).await.unwrap();
            events(stream).await.layers
        });
        drop(runtime);
        kept
    });
    let kept = tokio::task::spawn_blocking(|| thread.join().unwrap())
        .await
        .unwrap();
    for (chunk, index, data) in &kept {
        assert_eq!(*data, layer(numbers[*chunk], *index));
    }
    assert_eq!(client.delete(&numbers.map(key)).await.unwrap(), 4);
    let held = || server.store().stats().memory.bytes;
    let before = held();
    drop(kept);
    soon("its memory comes back", || held() < before).await;
    server.shutdown().await;
}

/// Memory that goes bad under the daemon is noticed by whoever reads it, and dropped.
#[tokio::test(flavor = "multi_thread")]
async fn what_went_bad_in_shared_memory_is_a_miss() {
    use std::os::unix::fs::FileExt as _;
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&directory.path().join("data"), &[]);
    let client = Client::connect(&daemon.endpoint).await.unwrap();
    assert_eq!(carrier(&client), Some(Carrier::SharedMemory));
    client.put(&chunk(1)).await.unwrap();
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", daemon.process())).unwrap();
    let arena = descriptors.map(|entry| entry.unwrap().path()).find(|path| {
        let target = std::fs::read_link(path);
        target.is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:kvasir"))
    });
    let mut options = std::fs::File::options();
    let file = options.read(true).write(true).open(arena.unwrap()).unwrap();
    let wanted = &layer(1, 2)[..4096];
    let mut page = vec![0; 4096];
    let at = (0..file.metadata().unwrap().len())
        .step_by(4096)
        .find(|&at| {
            file.read_exact_at(&mut page, at).unwrap();
            page == wanted
        });
    file.write_all_at(&[!wanted[7]], at.unwrap() + 7).unwrap();

    let stream = client.get(&[key(1)], GetOptions::default()).await.unwrap();
    let seen = events(stream).await;
    assert_eq!(seen.order.last(), Some(&Seen::Lost(0)));
    for (_, index, data) in seen.layers {
        assert_eq!(data, layer(1, index));
    }
    // The copy on disk is good.
    let begun = Instant::now();
    loop {
        let stream = client.get(&[key(1)], GetOptions::default()).await.unwrap();
        if events(stream).await.layers.len() == usize::from(LAYERS) {
            break;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "it is never dropped"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let stats = client.stats().await.unwrap();
    assert_eq!(stats.tier(kvasir_client::Tier::Memory).unwrap().corrupt, 1);
}

/// A socket that others could reach is not used, and one that was asked for is missed.
#[tokio::test]
async fn memory_is_not_shared_with_strangers() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let start = async |socket: PathBuf| {
        let config = ServerConfig {
            shared_memory: SharedMemorySettings {
                enabled: true,
                socket: Some(socket),
            },
            ..ServerConfig::in_memory()
        };
        Server::start(config).await
    };
    let open = directory.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = start(open.join("socket")).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("another user"), "{error}");

    let socket = directory.path().join("own/socket");
    let server = start(socket.clone()).await.unwrap();
    let error = start(socket.clone()).await.map(drop).unwrap_err();
    assert!(
        error.to_string().contains("another process listens"),
        "{error}"
    );
    server.shutdown().await;
    // What a process left behind that was killed.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    start(socket).await.unwrap().shutdown().await;
}

#[tokio::test]
async fn a_daemon_without_a_data_plane_serves_over_grpc() {
    let config = ServerConfig {
        quic: QuicSettings {
            enabled: false,
            ..QuicSettings::default()
        },
        shared_memory: SharedMemorySettings {
            enabled: false,
            socket: None,
        },
        ..memory(ByteSize::mib(64))
    };
    let (server, client) = start(config).await;
    assert_eq!(client.data_path(), None);
    client.put(&chunk(1)).await.unwrap();
    assert_eq!(read_all(&client, &[1]).await, 1);
    server.shutdown().await;
}

/// Keys enough that their extents cannot be described in one message.
#[tokio::test]
async fn what_is_too_much_for_one_request_goes_over_grpc() {
    let (server, _) = start(memory(ByteSize::mib(256))).await;
    let client = over_quic(&server).await;
    let layout = kvasir_types::KvLayout::new(
        LAYERS_OF_MANY,
        1,
        kvasir_types::Planes::symmetric(1),
        1,
        kvasir_types::DType::F8E4m3,
    );
    let layout = layout.unwrap();
    let mut keys = Vec::new();
    for number in 0..=255 {
        let chunk = kvasir_client::Chunk {
            key: key(number),
            layout,
            level: kvasir_types::Level::RAW,
            extents: vec![vec![number; layout.layer_bytes()].into(); LAYERS_OF_MANY.into()],
        };
        client.put(&chunk).await.unwrap();
        keys.push(chunk.key);
    }
    let stream = client.get(&keys, GetOptions::default()).await.unwrap();
    assert_eq!(stream.chunks().len(), 256);
    let layers = events(stream).await.layers;
    assert_eq!(layers.len(), 256 * usize::from(LAYERS_OF_MANY));
    assert!(
        layers
            .iter()
            .all(|(chunk, _, data)| data.iter().all(|&byte| usize::from(byte) == *chunk))
    );
    server.shutdown().await;
}

/// A peer that was killed says nothing over UDP; the control connection tells.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_fails_a_get_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&directory.path().join("data"), &[]);
    let client = Client::connect_with(ClientConfig {
        endpoint: daemon.endpoint.parse().unwrap(),
        data_plane: DataPlane::Quic,
        ..ClientConfig::default()
    });
    let client = client.await.unwrap();
    assert_eq!(carrier(&client), Some(Carrier::Quic));
    // More than goes into windows that nobody empties.
    let numbers: Vec<u8> = (0..200).collect();
    for number in &numbers {
        client.put(&chunk(*number)).await.unwrap();
    }
    let keys: Vec<_> = numbers.iter().copied().map(key).collect();
    let mut stream = client.get(&keys, GetOptions::default()).await.unwrap();
    assert!(stream.next().await.unwrap().is_some());
    daemon.signal(Signal::KILL);
    let begun = Instant::now();
    let error = loop {
        match stream.next().await {
            Ok(event) => assert!(event.is_some(), "it ended as if nothing had happened"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, CallError::Unavailable { .. }), "{error}");
    assert!(
        begun.elapsed() < Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
}

/// A daemon that is back with another certificate is found again.
#[tokio::test]
async fn the_data_plane_comes_back_with_the_daemon() {
    let (server, client) = start(memory(ByteSize::mib(64))).await;
    let addr = server.addr();
    server.shutdown().await;
    let mut config = memory(ByteSize::mib(64));
    config.listen = addr;
    let server = Server::start(config).await.unwrap();
    client.put(&chunk(1)).await.unwrap();
    let begun = Instant::now();
    while carrier(&client) != Some(Carrier::SharedMemory) {
        assert!(begun.elapsed() < Duration::from_secs(10));
        // Over gRPC meanwhile.
        assert_eq!(read_all(&client, &[1]).await, 1);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(read_all(&client, &[1]).await, 1);
    server.shutdown().await;
}

fn write(directory: &Path, name: &str, issued: &Issued) -> (PathBuf, PathBuf) {
    let certificate = directory.join(format!("{name}.pem"));
    let key = directory.join(format!("{name}.key"));
    std::fs::write(&certificate, &issued.certificate).unwrap();
    std::fs::write(&key, &issued.key).unwrap();
    (certificate, key)
}

#[tokio::test]
async fn certificates_of_an_authority_are_demanded_of_both_sides() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let (authority, own) = Authority::new(DAY).unwrap();
    let (ca, _) = write(at, "ca", &own);
    let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
    let (certificate, key) = write(
        at,
        "server",
        &authority.issue(&names, Purpose::Server, DAY).unwrap(),
    );
    let client = ["engine".to_owned()];
    let identity = write(
        at,
        "client",
        &authority.issue(&client, Purpose::Client, DAY).unwrap(),
    );
    // Known by its key alone; another one has another key.
    let again = Authority::from_pem(&own.key).unwrap();
    let late = write(
        at,
        "late",
        &again.issue(&client, Purpose::Client, DAY).unwrap(),
    );
    let (other, others) = Authority::new(DAY).unwrap();
    let (stranger, _) = write(at, "stranger-ca", &others);
    let forged = write(
        at,
        "forged",
        &other.issue(&client, Purpose::Client, DAY).unwrap(),
    );

    let config = ServerConfig {
        quic: QuicSettings {
            certificate: Some(certificate),
            key: Some(key),
            client_ca: Some(ca.clone()),
            ..QuicSettings::default()
        },
        ..memory(ByteSize::mib(64))
    };
    let server = Server::start(config).await.unwrap();
    for (trust, identity, connects) in [
        (Some(&ca), Some(&identity), true),
        (Some(&ca), Some(&late), true),
        (Some(&ca), Some(&forged), false),
        (Some(&ca), None, false),
        (Some(&stranger), Some(&identity), false),
        // The daemon's certificate has an issuer, so nothing is to be pinned.
        (None, Some(&identity), false),
    ] {
        let client = Client::connect_with(ClientConfig {
            endpoint: server.endpoint().parse().unwrap(),
            data_plane: DataPlane::Quic,
            tls: TlsConfig::from_files(trust.cloned(), identity.cloned()).unwrap(),
            connect_timeout: Duration::from_secs(if connects { 10 } else { 1 }),
            ..ClientConfig::default()
        });
        let client = client.await.unwrap();
        // A client that is refused may take itself for connected until it hears of it.
        if connects {
            assert_eq!(carrier(&client), Some(Carrier::Quic));
            client.put(&chunk(1)).await.unwrap();
            assert_eq!(read_all(&client, &[1]).await, 1);
        } else {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let stays = (0..50).all(|_| carrier(&client).is_some());
            assert!(!stays, "{trust:?} {identity:?}");
        }
    }
    server.shutdown().await;
}

#[tokio::test]
async fn wrong_settings_are_told_apart() {
    let start = async |quic| {
        let config = ServerConfig {
            quic,
            ..ServerConfig::in_memory()
        };
        let error = Server::start(config).await.map(drop).unwrap_err();
        assert!(matches!(error, StartError::Quic(_)), "{error}");
        error.to_string()
    };
    let half = QuicSettings {
        key: Some("/nonexistent".into()),
        ..QuicSettings::default()
    };
    assert!(start(half.clone()).await.contains("only one of"));
    let absent = QuicSettings {
        certificate: Some("/nonexistent".into()),
        ..half
    };
    assert!(start(absent).await.contains("cannot read /nonexistent"));
    let file = tempfile::NamedTempFile::new().unwrap();
    let empty = QuicSettings {
        client_ca: Some(file.path().into()),
        ..QuicSettings::default()
    };
    assert!(start(empty).await.contains("kvasir cert"));
    assert!(TlsConfig::from_files(Some("/nonexistent".into()), None).is_err());
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_let_go() {
    let mut config = memory(ByteSize::mib(256));
    config.limits.stream_idle_ms = 300;
    let (server, _) = start(config).await;
    let client = over_quic(&server).await;
    let numbers: Vec<u8> = (0..200).collect();
    for number in &numbers {
        client.put(&chunk(*number)).await.unwrap();
    }
    let keys: Vec<_> = numbers.iter().copied().map(key).collect();
    let mut stream = client.get(&keys, GetOptions::default()).await.unwrap();
    soon("its leases end", || server.store().stats().leases == 0).await;
    let error = loop {
        match stream.next().await {
            Ok(event) => assert!(event.is_some()),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, CallError::DeadlineExceeded), "{error}");
    server.shutdown().await;
}

/// Of what is stored raw; what is encoded comes as it is.
#[tokio::test]
async fn some_heads_and_tokens_come_over_every_path_and_from_every_tier() {
    let dir = tempfile::tempdir().unwrap();
    let encoded = Chunk {
        level: Level::LOSSLESS,
        extents: std::iter::once(vec![1; 40])
            .chain((0..LAYERS).map(|layer| vec![layer as u8; 1000]))
            .map(Bytes::from)
            .collect(),
        ..chunk(2)
    };
    let heads = HeadRange::new(1, 2).unwrap();
    let tokens = TokenRange::new(32, 96).unwrap();
    let both = Slice {
        heads: Some(heads),
        tokens: Some(tokens),
    };
    let slices = [
        both,
        Slice {
            heads: None,
            ..both
        },
        Slice {
            tokens: None,
            ..both
        },
    ];
    let (server, client) = start(on_disk(dir.path())).await;
    client.put(&chunk(1)).await.unwrap();
    client.put(&encoded).await.unwrap();
    server.shutdown().await;
    // From disk at first, and then from memory.
    let (server, shared_memory) = start(on_disk(dir.path())).await;
    assert_eq!(carrier(&shared_memory), Some(Carrier::SharedMemory));
    let grpc = Client::connect_lazy(ClientConfig {
        data_plane: DataPlane::Grpc,
        ..shared_memory.config().clone()
    });
    let clients = [grpc, over_quic(&server).await, shared_memory];
    for _ in 0..2 {
        for (client, slice) in clients
            .iter()
            .flat_map(|it| slices.map(|slice| (it, slice)))
        {
            let options = GetOptions {
                slice: Some(slice),
                ..GetOptions::default()
            };
            let mut stream = client.get(&[key(1), key(2)], options).await.unwrap();
            assert_eq!((stream.slice(0), stream.slice(1)), (Some(slice), None));
            let mut layers = 0;
            while let Some(event) = stream.next().await.unwrap() {
                let GetEvent::Layer {
                    chunk,
                    layer: index,
                    parts,
                } = event
                else {
                    continue;
                };
                layers += 1;
                let whole = match chunk {
                    0 => layer(1, index.0),
                    _ => encoded.extents[1 + usize::from(index.0)].clone(),
                };
                let expected = match chunk {
                    0 => {
                        let cut = layout().cut(slice).map(|at| &whole[at]);
                        cut.collect::<Vec<_>>().concat()
                    }
                    _ => whole.to_vec(),
                };
                assert!(parts == [expected], "layer {index} of chunk {chunk}");
            }
            assert_eq!(layers, 2 * LAYERS);
        }
    }
    for client in &clients {
        let beyond = GetOptions {
            slice: Some(Slice {
                heads: HeadRange::new(1, 3).ok(),
                tokens: None,
            }),
            ..GetOptions::default()
        };
        let refused = client.get(&[key(1)], beyond).await.unwrap_err();
        assert!(matches!(refused, CallError::Invalid { .. }), "{refused}");
    }
    server.shutdown().await;
}
