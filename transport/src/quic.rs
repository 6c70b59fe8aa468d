//! QUIC (RFC 9000) over UDP, with TLS 1.3.
//!
//! # Streams
//! The fetcher opens one stream for both directions, on which its frames go, and those of the
//! holder that belong to no request or refuse one. Every request that is described gets a
//! stream of its own from the holder, with the request's priority, so that QUIC itself puts
//! packets of what matters more first; it is reset when the request has ended.
//!
//! # Connections
//! A [`Connection`] connects by itself and again after a loss; requests go on where they were.
//! A change of the client's address is QUIC's affair (RFC 9000, section 9).

mod fetcher;
mod holder;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use crate::session::{Config, Frame, FrameReader, Violation};

pub use fetcher::{Connection, Status};
pub use holder::Listener;
pub use tls::{Identity, TlsError, Trust};

/// What bounds a connection.
#[derive(Clone, Copy, Debug)]
pub struct QuicConfig {
    /// The session's. Its credit is also the window of a connection.
    pub session: Config,
    /// Bytes of UDP payload that may be tried. Ethernet's frames take 1,452; a loopback
    /// device and jumbo frames take more. Default: 1452.
    pub most_payload: u16,
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
            most_payload: 1452,
            send_window: 8 << 20,
            idle: Duration::from_secs(5),
            most_backoff: Duration::from_secs(1),
        }
    }
}

impl QuicConfig {
    fn transport(&self) -> Arc<TransportConfig> {
        let mut transport = TransportConfig::default();
        let window = VarInt::from_u64(self.session.credit).unwrap_or(VarInt::MAX);
        let requests = u32::try_from(self.session.requests).unwrap_or(u32::MAX);
        let idle = IdleTimeout::try_from(self.idle).ok();
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.most_payload);
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

    fn endpoint(&self) -> Result<quinn::EndpointConfig, ConnectError> {
        let mut endpoint = quinn::EndpointConfig::default();
        let payload = self.most_payload.max(1200);
        endpoint
            .max_udp_payload_size(payload)
            .map_err(|_| ConnectError::Payload(payload))?;
        Ok(endpoint)
    }
}

/// Why there can be no endpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The socket cannot be had.
    #[error("{0}: no socket can be bound")]
    Socket(SocketAddr, #[source] io::Error),
    /// UDP has no such payloads.
    #[error("payloads of {0} bytes are not between 1200 and 65527")]
    Payload(u16),
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

/// Until `at`, or for ever.
async fn until(at: Option<std::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Pieces that are taken off a stream at once.
const CHUNKS: usize = 64;
/// What both ends name in TLS's handshake.
const PROTOCOL: &[u8] = b"kvasir/1";
/// Codes of connections that are closed: at will, and for a [`Violation`].
const CLOSED: VarInt = VarInt::from_u32(0);
const VIOLATED: VarInt = VarInt::from_u32(1);
