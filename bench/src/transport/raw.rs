//! What carries gets, without them: a stream of a bare QUIC connection that is tuned as ours,
//! and a TCP socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use kvasir_mem::{Arena, View};
use kvasir_server::child::ListeningChild;
use kvasir_transport::quic::{Identity, QuicConfig, Trust};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Takes a descriptor off a socket, maps what it is of, and unmaps it.
pub(super) async fn map_descriptor(stream: &mut UnixStream) -> anyhow::Result<()> {
    stream.write_all(b"?").await?;
    let descriptor = stream.async_io(Interest::READABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut byte = [0];
        let mut parts = [IoSliceMut::new(&mut byte)];
        recvmsg(&*stream, &mut parts, &mut control, flags)?;
        let mut messages = control.drain();
        Ok(messages.find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        }))
    });
    let descriptor = descriptor.await?.context("no descriptor came")?;
    ensure!(!View::new(descriptor)?.is_empty(), "an empty file came");
    Ok(())
}

/// Hands out a descriptor of so many bytes whenever it is asked for one.
async fn serve_descriptors(mut stream: UnixStream) -> anyhow::Result<()> {
    let bytes = usize::try_from(stream.read_u64_le().await?)?;
    let arena = Arena::new(bytes)?;
    let _block = arena.block(bytes)?;
    let descriptor = arena.descriptor()?;
    loop {
        stream.read_u8().await?;
        let fds = [descriptor.as_fd()];
        stream
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(&fds));
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                Ok(sendmsg(
                    &stream,
                    &[IoSlice::new(b"!")],
                    &mut control,
                    flags,
                )?)
            })
            .await?;
    }
}

/// A process that sends as many bytes as it is asked for.
pub(super) struct Raw {
    child: ListeningChild,
    quic: SocketAddr,
    trust: Trust,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Raw {
    pub(super) fn start() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("socket");
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("raw-sockets").arg(&socket);
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
            socket,
            _directory: directory,
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

    /// A socket over which descriptors of so many bytes come.
    pub(super) async fn descriptors(&self, bytes: u64) -> anyhow::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket).await?;
        stream.write_u64_le(bytes).await?;
        Ok(stream)
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
pub(crate) async fn serve(socket: &Path) -> anyhow::Result<()> {
    let unix = UnixListener::bind(socket)?;
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
    // As many places as the gets have that these are the limit of: a piece that is sent over and
    // over would come from caches.
    let data = Bytes::from(vec![0x5a; MOST_BYTES]);
    loop {
        let data = data.clone();
        tokio::select! {
            Some(incoming) = endpoint.accept() => {
                tokio::spawn(async move { serve_quic(incoming.await?, data).await });
            }
            accepted = unix.accept() => {
                tokio::spawn(serve_descriptors(accepted?.0));
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
        for piece in pieces(&data, u64::from_le_bytes(asked))? {
            answer.write_chunk(piece).await?;
        }
        answer.finish()?;
    }
}

async fn serve_tcp(mut stream: TcpStream, data: Bytes) -> anyhow::Result<()> {
    loop {
        for piece in pieces(&data, stream.read_u64_le().await?)? {
            stream.write_all(&piece).await?;
        }
    }
}

/// So many bytes, as they are handed to a socket.
fn pieces(data: &Bytes, bytes: u64) -> anyhow::Result<impl Iterator<Item = Bytes>> {
    let all = usize::try_from(bytes)?;
    ensure!(all <= data.len(), "{all} bytes at once");
    let from = (0..all).step_by(PIECE);
    Ok(from.map(move |from| data.slice(from..(from + PIECE).min(all))))
}

/// In the certificate.
const NAME: &str = "raw";
/// Bytes that are asked for at once, at most.
const MOST_BYTES: usize = 64 << 20;
/// Bytes that are handed to the socket at once.
const PIECE: usize = 1 << 20;
