//! `transport`: gets over every path, from a daemon in a process of its own.
//!
//! # What is compared
//! | rows | ours | limit |
//! |---|---|---|
//! | `shm_get` | a request of the data plane over shared memory: all bytes are there to be read, and were not touched | copying as many |
//! | `shm_get/SIZE/verified` | [`Client::get`] over shared memory: the same, and checksums compared | copying as many |
//! | `descriptor` | a descriptor of SIZE comes over a Unix socket, is mapped and unmapped | |
//! | `quic_get` | a request of the data plane over QUIC: all bytes have come | a stream of a bare quinn connection that is tuned the same way |
//! | `quic_get/SIZE/verified` | [`Client::get`] over QUIC: layers in one piece, and checksums compared | the same |
//! | `grpc_get` | [`Client::get`] over gRPC, checksums compared | one TCP socket |
//! | `tcp`, `quinn`, `memcpy` | the limits themselves | |
//!
//! All chunks are in the daemon's memory. `OP/SIZE` is one get of SIZE after the other,
//! `OP/bulk` gets of 64 MiB, `OP/bulk/c8` these over eight connections at once. `/p50` and
//! `/p99` are times of single gets. `/cpu` is CPU time of both processes per GB.
//! Throughputs are medians of rounds in which all take turns.

pub(crate) mod raw;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use clap::Args;
use kvasir_client::{Carrier, Chunk, Client, ClientConfig, DataPlane, GetEvent, GetOptions};
use kvasir_proto::v1::cache_client::CacheClient;
use kvasir_proto::{convert, v1};
use kvasir_transport::quic::{self, QuicConfig, Trust};
use kvasir_transport::session::{Config, FetchEvent};
use kvasir_transport::shm::{self, ShmConfig};
use kvasir_transport::{DataPath, FetchOptions};
use kvasir_types::{ByteSize, ChunkKey, DType, KvLayout, Level, Planes};
use prost::Message as _;
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::cpu;
use crate::daemon::Daemon;
use crate::report::{Report, Row, median, percentile};

use self::raw::Raw;

/// What is got at once.
#[derive(Clone, Copy, Debug)]
struct Size {
    name: &'static str,
    /// Layers of a chunk, of as many bytes.
    layers: u16,
    layer_bytes: u32,
    chunks: usize,
}

const SIZES: [Size; 4] = [
    Size {
        name: "64KiB",
        layers: 1,
        layer_bytes: 64 << 10,
        chunks: 1,
    },
    Size {
        name: "1MiB",
        layers: 4,
        layer_bytes: 256 << 10,
        chunks: 1,
    },
    Size {
        name: "16MiB",
        layers: 16,
        layer_bytes: 1 << 20,
        chunks: 1,
    },
    Size {
        name: "bulk",
        layers: 16,
        layer_bytes: 1 << 20,
        chunks: 4,
    },
];

/// A way that bytes come.
enum Way {
    Get(Client, Vec<ChunkKey>),
    /// Without the client: a path, and a request.
    Path(DataPath, Bytes),
    Descriptor(tokio::net::UnixStream),
    /// From many places, into one.
    Copy(Vec<u8>, Vec<u8>, u64),
    Quinn(raw::Quic),
    Tcp(TcpStream, Vec<u8>),
}

const NAMES: [&str; 9] = [
    "shm_get",
    "shm_verified",
    "memcpy",
    "descriptor",
    "quic_get",
    "quic_verified",
    "quinn",
    "grpc_get",
    "tcp",
];

/// The first one over sockets.
const OVER_SOCKETS: usize = 4;

/// More than caches hold.
const COPIED_BYTES: usize = 256 << 20;

/// Rounds of one way at one size.
#[derive(Debug, Default)]
struct Series {
    rates: Vec<f64>,
    cpu: Vec<f64>,
    micros: Vec<f64>,
}

#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Only these sizes, such as `64KiB,bulk`. Default: all.
    #[arg(long, value_name = "SIZES", value_delimiter = ',')]
    size: Vec<String>,
    /// Only these ways, such as `shm_get,quinn`. Default: all. Limits that are not among them
    /// are left out.
    #[arg(long, value_name = "WAYS", value_delimiter = ',')]
    way: Vec<String>,
}

pub(crate) async fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    let (rounds, window) = if quick {
        (2, Duration::from_millis(250))
    } else {
        (7, Duration::from_secs(1))
    };
    let mut report = Report::new("transport");
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start(dir.path(), ByteSize::mib(512), "127.0.0.1:0")?;
    let raw = Raw::start()?;
    let processes = [daemon.process(), raw.process()];
    let asked = |list: &[String], name: &str| list.is_empty() || list.iter().any(|it| it == name);
    for size in SIZES
        .into_iter()
        .filter(|size| asked(&options.size, size.name))
    {
        let keys = store(&daemon.client().await?, &size).await?;
        let connections: &[usize] = if size.name == "bulk" { &[1, 8] } else { &[1] };
        for &count in connections {
            let mut ways = Vec::new();
            let first = if count > 1 { OVER_SOCKETS } else { 0 };
            let names = NAMES.into_iter().skip(first);
            let names: Vec<_> = names.filter(|name| asked(&options.way, name)).collect();
            for name in &names {
                let mut all = Vec::new();
                for _ in 0..count {
                    all.push(way(name, &daemon, &raw, &keys, &size).await?);
                }
                ways.push(all);
            }
            let mut series: Vec<Series> = names.iter().map(|_| Series::default()).collect();
            // The first round opens windows and warms everything up.
            for round in 0..=rounds {
                for (all, series) in ways.iter_mut().zip(&mut series) {
                    let sample = drive(all, &size, window, &processes).await?;
                    if round > 0 {
                        series.rates.push(sample.0);
                        series.cpu.push(sample.1);
                        series.micros.extend(sample.2);
                    }
                }
            }
            let suffix = if count > 1 {
                format!("/c{count}")
            } else {
                String::new()
            };
            rows(
                &mut report,
                &names,
                &mut series,
                &format!("{}{suffix}", size.name),
            );
        }
    }
    Ok(report)
}

fn rows(report: &mut Report, names: &[&str], series: &mut [Series], size: &str) {
    let rates: Vec<f64> = series.iter_mut().map(|it| median(&mut it.rates)).collect();
    let rate = |name: &str| {
        let names = names.iter().zip(&rates);
        names
            .filter(|(it, _)| **it == name)
            .map(|(_, rate)| *rate)
            .sum::<f64>()
    };
    for (name, series) in names.iter().zip(series) {
        let (ours, suffix) = match *name {
            "shm_verified" => ("shm_get", "/verified"),
            "quic_verified" => ("quic_get", "/verified"),
            name => (name, ""),
        };
        let ours = format!("{ours}/{size}{suffix}");
        let value = rate(name);
        let row = Row::new(&ours, value, "GB/s");
        let limit = match *name {
            "shm_get" | "shm_verified" => Some(rate("memcpy")),
            "quic_get" | "quic_verified" => Some(rate("quinn")),
            "grpc_get" | "quinn" => Some(rate("tcp")),
            _ => None,
        };
        report.push(match limit.filter(|&limit| limit > 0.0) {
            Some(limit) => row.against(limit, value / limit),
            None => row,
        });
        let cpu = median(&mut series.cpu);
        report.push(Row::new(format!("{ours}/cpu"), cpu, "s/GB"));
        for (quantile, share) in [("p50", 0.5), ("p99", 0.99)] {
            let value = percentile(&mut series.micros, share);
            report.push(Row::new(format!("{ours}/{quantile}"), value, "us"));
        }
    }
}

async fn way(
    name: &str,
    daemon: &Daemon,
    raw: &Raw,
    keys: &[ChunkKey],
    size: &Size,
) -> anyhow::Result<Way> {
    Ok(match name {
        "quinn" => Way::Quinn(raw.quic().await?),
        "tcp" => Way::Tcp(raw.tcp().await?, vec![0; 1 << 20]),
        "memcpy" => Way::Copy(vec![1; COPIED_BYTES], vec![1; size.bytes().try_into()?], 0),
        "descriptor" => Way::Descriptor(raw.descriptors(size.bytes()).await?),
        "shm_get" | "quic_get" => {
            let endpoint = format!("http://{}", daemon.address());
            let channel = tonic::transport::Endpoint::from_shared(endpoint)?;
            let mut grpc = CacheClient::new(channel.connect().await?);
            let mut paths = grpc.paths(v1::PathsRequest {}).await?.into_inner();
            let paths = paths
                .message()
                .await?
                .context("the daemon tells no paths")?;
            let path = match name {
                "shm_get" => over_memory(&paths)?,
                _ => over_quic(daemon, &paths)?,
            };
            path.connected().await;
            let request = v1::GetRequest {
                keys: keys.iter().map(convert::key_to_wire).collect(),
                ..v1::GetRequest::default()
            };
            Way::Path(path, request.encode_to_vec().into())
        }
        name => {
            let (data_plane, carrier) = match name {
                "shm_verified" => (DataPlane::Best, Some(Carrier::SharedMemory)),
                "quic_verified" => (DataPlane::Quic, Some(Carrier::Quic)),
                _ => (DataPlane::Grpc, None),
            };
            let client = Client::connect_with(ClientConfig {
                endpoint: daemon.address().parse()?,
                data_plane,
                ..ClientConfig::default()
            });
            let client = client.await?;
            let chosen = client.data_path().map(|path| path.carrier);
            ensure!(chosen == carrier, "{name} would go over {chosen:?}");
            Way::Get(client, keys.to_vec())
        }
    })
}

fn over_memory(paths: &v1::PathsResponse) -> anyhow::Result<DataPath> {
    let offered = paths.shared_memory.as_ref();
    let offered = offered.context("the daemon shares no memory")?;
    let token = shm::Token::try_from(&offered.token[..])?;
    Ok(shm::connect(&offered.socket, token, ShmConfig::default()))
}

/// With what the client has by default.
fn over_quic(daemon: &Daemon, paths: &v1::PathsResponse) -> anyhow::Result<DataPath> {
    let offered = paths.quic.as_ref().context("the daemon has no QUIC")?;
    let mut address: SocketAddr = daemon.address().parse()?;
    address.set_port(offered.port.try_into()?);
    let config = QuicConfig {
        session: Config {
            credit: ClientConfig::default().window_bytes.into(),
            ..Config::default()
        },
        ..QuicConfig::default()
    };
    let trust = Trust::from_der(&offered.certificate)?;
    Ok(quic::connect(address, &offered.name, &trust, None, config)?)
}

/// Rate in GB/s, CPU seconds per GB, and the time of each operation in µs.
type Sample = (f64, f64, Vec<f64>);

/// One operation after the other, on all connections at once.
#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
async fn drive(
    all: &mut Vec<Way>,
    size: &Size,
    window: Duration,
    processes: &[u32],
) -> anyhow::Result<Sample> {
    let cpu = || -> anyhow::Result<Duration> {
        let servers = processes.iter().map(|&process| cpu::of(process));
        let mut total = cpu::here()?;
        for server in servers {
            total += server?;
        }
        Ok(total)
    };
    let (cpu_before, begun) = (cpu()?, Instant::now());
    // In tasks, as engines fetch.
    let mut drives = JoinSet::new();
    for mut way in std::mem::take(all) {
        let size = *size;
        drives.spawn(async move {
            let mut micros = Vec::new();
            while begun.elapsed() < window {
                let start = Instant::now();
                way.get(&size).await?;
                micros.push(start.elapsed().as_secs_f64() * 1e6);
            }
            anyhow::Ok((way, micros))
        });
    }
    let mut micros = Vec::new();
    while let Some(done) = drives.join_next().await {
        let (way, took) = done??;
        all.push(way);
        micros.extend(took);
    }
    let wall = begun.elapsed();
    let cpu = cpu()?.saturating_sub(cpu_before);
    let gigabytes = (micros.len() as u64 * size.bytes()) as f64 / 1e9;
    Ok((
        gigabytes / wall.as_secs_f64(),
        cpu.as_secs_f64() / gigabytes,
        micros,
    ))
}

impl Way {
    async fn get(&mut self, size: &Size) -> anyhow::Result<()> {
        match self {
            Self::Get(client, keys) => {
                let mut stream = client.get(keys, GetOptions::default()).await?;
                let mut received = 0;
                while let Some(event) = stream.next().await? {
                    if let GetEvent::Layer { parts, .. } = event {
                        received += parts.iter().map(|part| part.len() as u64).sum::<u64>();
                    }
                }
                ensure!(received == size.bytes(), "{received} bytes came");
                Ok(())
            }
            Self::Path(path, request) => {
                let mut fetch = path.fetch(request.clone(), FetchOptions::default());
                let mut received = 0;
                while let Some(event) = fetch.next().await {
                    if let FetchEvent::Data { bytes, .. } = event {
                        received += bytes.len() as u64;
                    }
                }
                ensure!(received == size.bytes(), "{received} bytes came");
                Ok(())
            }
            Self::Descriptor(stream) => raw::map_descriptor(stream).await,
            Self::Copy(from, to, at) => {
                let (length, places) = (to.len(), from.len() / to.len());
                let place = usize::try_from(*at)? % places * length;
                *at += 1;
                to.copy_from_slice(std::hint::black_box(&from[place..place + length]));
                std::hint::black_box(to);
                tokio::task::yield_now().await;
                Ok(())
            }
            Self::Quinn(connection) => connection.get(size.bytes()).await,
            Self::Tcp(stream, buffer) => raw::tcp_get(stream, size.bytes(), buffer).await,
        }
    }
}

impl Size {
    fn bytes(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.layer_bytes) * self.chunks as u64
    }
}

/// Puts what is to be got.
async fn store(client: &Client, size: &Size) -> anyhow::Result<Vec<ChunkKey>> {
    // Keys and values of one head of 64 channels, of two bytes each.
    let tokens = size.layer_bytes / (2 * 64 * 2);
    let layout = KvLayout::new(size.layers, 1, Planes::symmetric(64), tokens, DType::F16)?;
    let mut random = ChaCha8Rng::seed_from_u64(size.bytes());
    let mut keys = Vec::new();
    for _ in 0..size.chunks {
        let mut key = [0; 32];
        random.fill_bytes(&mut key);
        let layer = || {
            let mut bytes = vec![0; layout.layer_bytes()];
            random.fill_bytes(&mut bytes);
            Bytes::from(bytes)
        };
        let chunk = Chunk {
            key: ChunkKey::from_bytes(key),
            layout,
            level: Level::RAW,
            extents: std::iter::repeat_with(layer)
                .take(size.layers.into())
                .collect(),
        };
        client.put(&chunk).await?;
        keys.push(chunk.key);
    }
    Ok(keys)
}
