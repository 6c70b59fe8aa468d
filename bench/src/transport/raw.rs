//! What carries gets, without them: a stream of a bare QUIC connection that is tuned as ours,
//! and a TCP socket.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use kvasir_server::child::ListeningChild;
use kvasir_transport::quic::{Identity, QuicConfig, Trust};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// A process that sends as many bytes as it is asked for.
pub(super) struct Raw {
    child: ListeningChild,
    quic: SocketAddr,
    trust: Trust,
}

impl Raw {
    pub(super) fn start() -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("raw-sockets");
        let child = ListeningChild::start(command)?;
        // Its certificate comes in the address, because that is all that a child tells.
        let (tcp, rest) = child.address().split_once('/').context("no QUIC address")?;
        let (port, certificate) = rest.split_once('/').context("no certificate")?;
        ensure!(tcp.parse::<SocketAddr>().is_ok(), "not an address: {tcp}");
        let quic = SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse()?));
        let digits = certificate.as_bytes().chunks(2);
        let byte = |pair: &[u8]| -> anyhow::Result<u8> {
            Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?)
        };
        let certificate: Vec<u8> = digits.map(byte).collect::<Result<_, _>>()?;
        Ok(Self {
            quic,
            trust: Trust::from_der(&certificate)?,
            child,
        })
    }

    pub(super) fn process(&self) -> u32 {
        self.child.pid().as_raw_nonzero().get().unsigned_abs()
    }

    pub(super) async fn quic(&self) -> anyhow::Result<Quic> {
        let config = QuicConfig::default();
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let mut endpoint = config.endpoint(any, None)?;
        let mut client = quinn::ClientConfig::new(Arc::new(self.trust.fetching(None)?));
        client.transport_config(config.transport(self.quic.ip()));
        endpoint.set_default_client_config(client);
        let connection = endpoint.connect(self.quic, NAME)?.await?;
        let (asks, _) = connection.open_bi().await?;
        Ok(Quic { connection, asks })
    }

    pub(super) async fn tcp(&self) -> anyhow::Result<TcpStream> {
        let address = self.child.address().split('/').next().unwrap_or_default();
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// A bare connection, and the stream that asks go over.
pub(super) struct Quic {
    connection: quinn::Connection,
    asks: quinn::SendStream,
}

impl Quic {
    /// Has so many bytes sent over a new stream, and drops them.
    pub(super) async fn get(&mut self, bytes: u64) -> anyhow::Result<()> {
        self.asks.write_all(&bytes.to_le_bytes()).await?;
        let mut answer = self.connection.accept_uni().await?;
        let mut chunks: [Bytes; 64] = std::array::from_fn(|_| Bytes::new());
        let mut received = 0;
        while let Some(count) = answer.read_chunks(&mut chunks).await? {
            for chunk in &mut chunks[..count] {
                received += std::mem::take(chunk).len() as u64;
            }
        }
        ensure!(received == bytes, "{received} bytes of {bytes} came");
        Ok(())
    }
}

/// Has so many bytes sent, and reads them into `buffer`, over and over.
pub(super) async fn tcp_get(
    stream: &mut TcpStream,
    bytes: u64,
    buffer: &mut [u8],
) -> anyhow::Result<()> {
    stream.write_u64_le(bytes).await?;
    let mut left = bytes;
    while left > 0 {
        let most = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        left -= stream.read(&mut buffer[..most]).await? as u64;
    }
    Ok(())
}

/// Serves until killed; prints its addresses.
pub(crate) async fn serve() -> anyhow::Result<()> {
    let identity = Identity::self_signed(&[NAME])?;
    let config = QuicConfig::default();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(identity.serving(None)?));
    server.transport_config(config.transport(address.ip()));
    let endpoint = config.endpoint(address, Some(server))?;
    let tcp = TcpListener::bind(address).await?;
    let digits = identity.certificate().iter();
    let certificate: String = digits.map(|byte| format!("{byte:02x}")).collect();
    let port = endpoint.local_addr()?.port();
    println!("listening on {}/{port}/{certificate}", tcp.local_addr()?);
    let data = Bytes::from(vec![0x5a; PIECE]);
    loop {
        let data = data.clone();
        tokio::select! {
            Some(incoming) = endpoint.accept() => {
                tokio::spawn(async move { serve_quic(incoming.await?, data).await });
            }
            accepted = tcp.accept() => {
                let (stream, _) = accepted?;
                stream.set_nodelay(true)?;
                tokio::spawn(serve_tcp(stream, data));
            }
        }
    }
}

async fn serve_quic(connection: quinn::Connection, data: Bytes) -> anyhow::Result<()> {
    let (_, mut asks) = connection.accept_bi().await?;
    loop {
        let mut asked = [0; 8];
        asks.read_exact(&mut asked).await?;
        let mut answer = connection.open_uni().await?;
        let mut left = u64::from_le_bytes(asked);
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
            answer.write_chunk(data.slice(..length)).await?;
            left -= length as u64;
        }
        answer.finish()?;
    }
}

async fn serve_tcp(mut stream: TcpStream, data: Bytes) -> anyhow::Result<()> {
    loop {
        let mut left = stream.read_u64_le().await?;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
            stream.write_all(&data[..length]).await?;
            left -= length as u64;
        }
    }
}

/// In the certificate.
const NAME: &str = "raw";
/// Bytes that are handed to the socket at once.
const PIECE: usize = 1 << 20;
