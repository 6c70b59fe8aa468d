//! `transport`: gets over every path, from a daemon in a process of its own.
//!
//! # What is compared
//! | rows | ours | limit |
//! |---|---|---|
//! | `quic_get` | [`Client::get`] over QUIC, all layers, checksums compared | a stream of a bare quinn connection that is tuned the same way |
//! | `grpc_get` | the same over gRPC | one TCP socket |
//! | `tcp`, `quinn` | the limits themselves | |
//!
//! All chunks are in the daemon's memory. `OP/SIZE` is one get of SIZE after the other,
//! `OP/bulk` gets of 64 MiB, `OP/bulk/c8` these over eight connections at once. `/p50` and
//! `/p99` are times of gets of 64 KiB. `/cpu` is CPU time of both processes per GB.
//! Throughputs are medians of rounds in which all take turns.

pub(crate) mod raw;

use std::time::{Duration, Instant};

use anyhow::ensure;
use bytes::Bytes;
use kvasir_client::{Carrier, Chunk, Client, ClientConfig, DataPlane, GetEvent, GetOptions};
use kvasir_types::{ByteSize, ChunkKey, DType, KvLayout, Level, Planes};
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::net::TcpStream;

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
    Quinn(raw::Quic),
    Tcp(TcpStream, Vec<u8>),
}

/// Rounds of one way at one size.
#[derive(Debug, Default)]
struct Series {
    rates: Vec<f64>,
    cpu: Vec<f64>,
    micros: Vec<f64>,
}

pub(crate) async fn run(quick: bool) -> anyhow::Result<Report> {
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
    let names = ["quic_get", "grpc_get", "quinn", "tcp"];
    for size in SIZES {
        let keys = store(&daemon.client().await?, &size).await?;
        let connections: &[usize] = if size.name == "bulk" { &[1, 8] } else { &[1] };
        for &count in connections {
            let mut ways = Vec::new();
            for name in names {
                let mut all = Vec::new();
                for _ in 0..count {
                    all.push(way(name, &daemon, &raw, &keys).await?);
                }
                ways.push(all);
            }
            let mut series: Vec<Series> = names.map(|_| Series::default()).into();
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

fn rows(report: &mut Report, names: &[&str; 4], series: &mut [Series], size: &str) {
    let rates: Vec<f64> = series.iter_mut().map(|it| median(&mut it.rates)).collect();
    for (index, (name, series)) in names.iter().zip(series).enumerate() {
        let row = Row::new(format!("{name}/{size}"), rates[index], "GB/s");
        report.push(match *name {
            "quic_get" => row.against(rates[2], rates[index] / rates[2]),
            "grpc_get" | "quinn" => row.against(rates[3], rates[index] / rates[3]),
            _ => row,
        });
        let cpu = median(&mut series.cpu);
        report.push(Row::new(format!("{name}/{size}/cpu"), cpu, "s/GB"));
        if size == "64KiB" {
            for (quantile, share) in [("p50", 0.5), ("p99", 0.99)] {
                let value = percentile(&mut series.micros, share);
                report.push(Row::new(format!("{name}/{size}/{quantile}"), value, "us"));
            }
        }
    }
}

async fn way(name: &str, daemon: &Daemon, raw: &Raw, keys: &[ChunkKey]) -> anyhow::Result<Way> {
    Ok(match name {
        "quinn" => Way::Quinn(raw.quic().await?),
        "tcp" => Way::Tcp(raw.tcp().await?, vec![0; 1 << 20]),
        name => {
            let (data_plane, carrier) = match name {
                "quic_get" => (DataPlane::Best, Some(Carrier::Quic)),
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

/// Rate in GB/s, CPU seconds per GB, and the time of each operation in µs.
type Sample = (f64, f64, Vec<f64>);

/// One operation after the other, on all connections at once.
#[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
async fn drive(
    all: &mut [Way],
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
    let drives = all.iter_mut().map(|way| async move {
        let mut micros = Vec::new();
        while begun.elapsed() < window {
            let start = Instant::now();
            way.get(size).await?;
            micros.push(start.elapsed().as_secs_f64() * 1e6);
        }
        anyhow::Ok(micros)
    });
    let micros = futures::future::try_join_all(drives).await?.concat();
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
