//! What a link lets pass, and what of it gets use.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::ensure;
use bytes::Bytes;
use kvasir_client::{Carrier, Chunk, Client, ClientConfig, DataPlane, GetEvent, GetOptions};
use kvasir_tests::network::Network;
use kvasir_tests::relay::{Relay, Weather};
use kvasir_types::{ByteSize, ChunkKey, DType, KvLayout, Level, Planes};
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::daemon::Daemon;
use crate::report::{Report, Row, median};

use super::bed::{as_f64, millis};

const RATES: [u32; 2] = [100, 1000];
const CHUNKS: usize = 4;
const LAYERS: u16 = 16;
const LAYER_BYTES: u32 = 256 << 10;
const BYTES: u64 = CHUNKS as u64 * LAYERS as u64 * LAYER_BYTES as u64;
/// What an Ethernet leaves for the payload of UDP.
const ETHERNET: usize = 1472;
/// The round trip of another city.
const FAR_AWAY: Duration = Duration::from_millis(20);
const SMALL_BYTES: u32 = 64 << 10;
const SMALL_GETS: usize = 20;

pub(super) fn run(network: &Network, quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let data = tempfile::tempdir()?;
    let daemon = Daemon::start_on(network.far(), data.path(), ByteSize::mib(256), 0)?;
    let raw = serve_raw(network)?;
    let relays = network.near().other_address();
    network.near().run(|| async {
        let keys = store(&Client::connect(daemon.address()).await?).await?;
        let mut ways = vec![
            Way::tcp(raw).await?,
            Way::get("quic_get", daemon.address(), DataPlane::Quic, &keys).await?,
            Way::get("grpc_get", daemon.address(), DataPlane::Grpc, &keys).await?,
        ];
        let rounds = if quick { 2 } else { 7 };
        for mbps in RATES {
            network.set_mbps(mbps)?;
            let rates = rounds_of(&mut ways, rounds).await?;
            for (way, rate) in ways.iter().zip(&rates) {
                let row = Row::new(format!("{}/{mbps}", way.name), *rate, "MB/s");
                report.push(row.against(rates[0], rate / rates[0]));
            }
            for way in &mut ways[1..] {
                let mut times = Vec::new();
                for _ in 0..SMALL_GETS {
                    times.push(millis(way.small().await?));
                }
                let name = format!("{}/{mbps}/64KiB/p50", way.name);
                report.push(Row::new(name, median(&mut times), "ms"));
            }
        }
        // A relay in user space has no time for more.
        network.set_mbps(RATES[0])?;
        let weather = Weather {
            longest: ETHERNET,
            ..Weather::default()
        };
        let relay = Relay::start(daemon.address().parse()?, relays, weather, 1).await?;
        let address = relay.address();
        let mut way = [Way::get("relay", &address, DataPlane::Quic, &keys).await?];
        let mut without = None;
        for (name, loss, delay) in [
            ("relay", 0.0, Duration::ZERO),
            ("loss-1", 0.01, Duration::ZERO),
            ("rtt-20", 0.0, FAR_AWAY / 2),
            ("rtt-20-loss-1", 0.01, FAR_AWAY / 2),
        ] {
            let slow = loss > 0.0 && !delay.is_zero();
            if slow && quick {
                continue;
            }
            relay.switches().set_weather(Weather {
                loss,
                delay,
                ..weather
            });
            let rounds = if slow { 1 } else { rounds };
            let rate = rounds_of(&mut way, rounds).await?[0];
            let without = *without.get_or_insert(rate);
            let row = Row::new(format!("{name}/{}", RATES[0]), rate, "MB/s");
            report.push(row.against(without, rate / without));
        }
        anyhow::Ok(())
    })?
}

/// Medians in MB/s of rounds in which all take turns. The first opens windows.
async fn rounds_of(ways: &mut [Way], rounds: usize) -> anyhow::Result<Vec<f64>> {
    let mut rates = vec![Vec::new(); ways.len()];
    for round in 0..=rounds {
        for (way, rates) in ways.iter_mut().zip(&mut rates) {
            let begun = Instant::now();
            way.all().await?;
            if round > 0 {
                rates.push(as_f64(BYTES) / begun.elapsed().as_secs_f64() / 1e6);
            }
        }
    }
    Ok(rates.iter_mut().map(|rates| median(rates)).collect())
}

struct Way {
    name: &'static str,
    over: Over,
}

enum Over {
    Tcp(TcpStream, Vec<u8>),
    /// Keys of all that is got at once, and of something small.
    Client(Client, Vec<ChunkKey>),
}

impl Way {
    async fn tcp(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            name: "tcp",
            over: Over::Tcp(stream, vec![0; 1 << 20]),
        })
    }

    async fn get(
        name: &'static str,
        address: &str,
        data_plane: DataPlane,
        keys: &[ChunkKey],
    ) -> anyhow::Result<Self> {
        let client = Client::connect_with(ClientConfig {
            endpoint: address.parse()?,
            data_plane,
            ..ClientConfig::default()
        });
        let client = client.await?;
        let carrier = client.data_path().map(|path| path.carrier);
        let wanted = (data_plane == DataPlane::Quic).then_some(Carrier::Quic);
        ensure!(carrier == wanted, "{name} would go over {carrier:?}");
        Ok(Self {
            name,
            over: Over::Client(client, keys.to_vec()),
        })
    }

    async fn all(&mut self) -> anyhow::Result<()> {
        match &mut self.over {
            Over::Tcp(stream, buffer) => {
                stream.write_u64_le(BYTES).await?;
                let mut left = BYTES;
                while left > 0 {
                    let most = usize::try_from(left)?.min(buffer.len());
                    left -= stream.read(&mut buffer[..most]).await? as u64;
                }
                Ok(())
            }
            Over::Client(client, keys) => {
                let came = get(client, &keys[..CHUNKS]).await?;
                ensure!(came == BYTES, "{came} bytes came");
                Ok(())
            }
        }
    }

    async fn small(&mut self) -> anyhow::Result<Duration> {
        let Over::Client(client, keys) = &self.over else {
            anyhow::bail!("a socket has no small gets");
        };
        let begun = Instant::now();
        let came = get(client, &keys[CHUNKS..]).await?;
        ensure!(came == u64::from(SMALL_BYTES), "{came} bytes came");
        Ok(begun.elapsed())
    }
}

async fn get(client: &Client, keys: &[ChunkKey]) -> anyhow::Result<u64> {
    let mut stream = client.get(keys, GetOptions::default()).await?;
    let mut came = 0;
    while let Some(event) = stream.next().await? {
        if let GetEvent::Layer { parts, .. } = event {
            came += parts.iter().map(|part| part.len() as u64).sum::<u64>();
        }
    }
    Ok(came)
}

/// Puts what is to be got.
async fn store(client: &Client) -> anyhow::Result<Vec<ChunkKey>> {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut keys = Vec::new();
    for number in 0..=CHUNKS {
        let (layers, layer_bytes) = if number < CHUNKS {
            (LAYERS, LAYER_BYTES)
        } else {
            (1, SMALL_BYTES)
        };
        // Keys and values of one head of 64 channels, of two bytes each.
        let tokens = layer_bytes / (2 * 64 * 2);
        let layout = KvLayout::new(layers, 1, Planes::symmetric(64), tokens, DType::F16)?;
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
            extents: std::iter::repeat_with(layer).take(layers.into()).collect(),
        };
        client.put(&chunk).await?;
        keys.push(chunk.key);
    }
    Ok(keys)
}

/// Serves as many bytes as it is asked for over TCP, on the other host, until this process ends.
fn serve_raw(network: &Network) -> anyhow::Result<SocketAddr> {
    let address = SocketAddr::new(network.far().address(), 0);
    let listener = network
        .far()
        .run(|| std::future::ready(TcpListener::bind(address)))??;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        let piece = vec![0x5a; 256 << 10];
        while let Ok((mut client, _)) = listener.accept() {
            let mut asked = [0; 8];
            while client.read_exact(&mut asked).is_ok() {
                let mut left = u64::from_le_bytes(asked);
                while left > 0 {
                    let most = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
                    if client.write_all(&piece[..most]).is_err() {
                        break;
                    }
                    left -= most as u64;
                }
            }
        }
    });
    Ok(address)
}
