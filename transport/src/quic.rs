//! QUIC (RFC 9000) over UDP, with TLS 1.3.
//!
//! # Streams
//! The fetcher opens one stream for both directions, on which its frames go, and those of the
//! holder that belong to no request or refuse one. Every request that is described gets a
//! stream of its own from the holder, with the request's priority, so that QUIC itself puts
//! packets of what matters more first. It is reset when the request has ended; the error code is
//! the number of bytes of data that went into it, since those that will not come had credit.
//!
//! # Connections
//! A [`connect`]ed path connects by itself and again after a loss; requests go on where they were.
//! A change of the client's address is QUIC's affair (RFC 9000, section 9).

mod authority;
mod fetcher;
mod holder;
mod tls;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::congestion::CubicConfig;
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustix::net::sockopt::{
    set_socket_recv_buffer_size, set_socket_recv_buffer_size_force, set_socket_send_buffer_size,
};

use crate::session::{Config, Frame, FrameReader, Violation};

pub use authority::{Authority, Issued, Purpose};
pub use fetcher::connect;
pub use holder::Listener;
pub use tls::{Identity, TlsError, Trust};

/// What bounds a connection.
#[derive(Clone, Copy, Debug)]
pub struct QuicConfig {
    /// The session's. Its credit is also the window of a connection.
    pub session: Config,
    /// Bytes that are sent and not acknowledged at most. Default: 8 MiB.
    pub send_window: u64,
    /// How long a peer may say nothing. Default: 5 s.
    pub idle: Duration,
    /// How long after a lost connection another one is tried at most. Default: 1 s.
    pub most_backoff: Duration,
}

impl Default for QuicConfig {
    fn default() -> Self {
        Self {
            session: Config::default(),
            send_window: 8 << 20,
            idle: Duration::from_secs(5),
            most_backoff: Duration::from_secs(1),
        }
    }
}

impl QuicConfig {
    /// What a connection to, or from, a peer at `address` is tuned to. For those who hold
    /// something against bare connections of the same tuning.
    pub fn transport(&self, address: IpAddr) -> Arc<TransportConfig> {
        let mut transport = TransportConfig::default();
        // Quinn hands the kernel ten datagrams at once, which must stay below 64 KiB in all:
        // larger ones are dropped, and taken for a loss. On a loopback device large datagrams
        // gain more than handing over many.
        let loopback = address.to_canonical().is_loopback();
        let payload = if loopback {
            LOOPBACK_PAYLOAD
        } else {
            MOST_PAYLOAD
        };
        transport.enable_segmentation_offload(!loopback);
        if loopback {
            // A window of a few packets, which is right for networks, would be less than one
            // datagram here: each would wait for a delayed acknowledgement of the one before.
            let mut congestion = CubicConfig::default();
            congestion.initial_window(LOOPBACK_WINDOW);
            transport.congestion_controller_factory(Arc::new(congestion));
        }
        let window = VarInt::from_u64(self.session.credit).unwrap_or(VarInt::MAX);
        let requests = u32::try_from(self.session.requests).unwrap_or(u32::MAX);
        let idle = IdleTimeout::try_from(self.idle).ok();
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(payload);
        transport
            .stream_receive_window(window)
            .receive_window(window)
            .send_window(self.send_window)
            .max_concurrent_bidi_streams(1u8.into())
            .max_concurrent_uni_streams(requests.into())
            .mtu_discovery_config(Some(discovery))
            .keep_alive_interval(Some(self.idle / 3))
            .max_idle_timeout(idle);
        Arc::new(transport)
    }

    /// An endpoint bound to `address`, which serves with `server`, if there is one.
    ///
    /// # Errors
    /// [`ConnectError::Socket`]
    pub fn endpoint(
        &self,
        address: SocketAddr,
        server: Option<quinn::ServerConfig>,
    ) -> Result<quinn::Endpoint, ConnectError> {
        let failed = |error| ConnectError::Socket(address, error);
        let socket = std::net::UdpSocket::bind(address).map_err(failed)?;
        // What needs a privilege, and else what the kernel's limits allow of it.
        if set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
            let _ = set_socket_recv_buffer_size(&socket, SOCKET_BUFFER);
        }
        let _ = set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
        let mut config = quinn::EndpointConfig::default();
        let sized = config.max_udp_payload_size(LOOPBACK_PAYLOAD);
        sized.map_err(|_| ConnectError::Payload)?;
        let runtime = Arc::new(quinn::TokioRuntime);
        quinn::Endpoint::new(config, server, socket, runtime).map_err(failed)
    }
}

/// Why there can be no endpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The socket cannot be had.
    #[error("{0}: no socket can be bound")]
    Socket(SocketAddr, #[source] io::Error),
    /// QUIC refuses the largest payload of UDP.
    #[error("payloads of {LOOPBACK_PAYLOAD} bytes are refused")]
    Payload,
    /// Certificates, keys, or what is trusted.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Connect(#[from] quinn::ConnectError),
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    #[error(transparent)]
    Write(#[from] quinn::WriteError),
    #[error(transparent)]
    Read(#[from] quinn::ReadError),
    #[error(transparent)]
    Violation(#[from] Violation),
    #[error("the peer closed the control stream")]
    Control,
}

/// Sends a frame.
async fn send(stream: &mut quinn::SendStream, frame: &Frame) -> Result<(), quinn::WriteError> {
    stream.write_all_chunks(&mut frame.encode()).await
}

/// Takes frames off a stream until it ends.
async fn receive(
    mut stream: quinn::RecvStream,
    mut take: impl FnMut(&mut Vec<Frame>) -> Result<(), Violation>,
) -> Result<(), Ended> {
    let mut reader = FrameReader::default();
    let mut chunks: [Bytes; CHUNKS] = std::array::from_fn(|_| Bytes::new());
    let mut frames = Vec::new();
    while let Some(count) = stream.read_chunks(&mut chunks).await? {
        for chunk in &mut chunks[..count] {
            while let Some(frame) = reader.next(chunk).map_err(Violation::from)? {
                frames.push(frame);
            }
        }
        take(&mut frames)?;
        frames.clear();
    }
    Ok(())
}

/// Bytes of UDP payload that are tried on a network: ten of them stay below 64 KiB.
const MOST_PAYLOAD: u16 = 6500;
/// And on a loopback device: what UDP has at most.
const LOOPBACK_PAYLOAD: u16 = 65_527;
/// Bytes that are sent there before the first acknowledgement: what fits the smallest buffers
/// of sockets that are usual.
const LOOPBACK_WINDOW: u64 = 256 << 10;
/// Bytes that the kernel is to hold of what was not taken yet.
const SOCKET_BUFFER: usize = 16 << 20;
/// Pieces that are taken off a stream at once.
const CHUNKS: usize = 64;
/// What both ends name in TLS's handshake.
const PROTOCOL: &[u8] = b"kvasir/1";
/// Codes of connections that are closed: at will, and for a [`Violation`].
const CLOSED: VarInt = VarInt::from_u32(0);
const VIOLATED: VarInt = VarInt::from_u32(1);
